"""How far the outputs of a compressed model are from those of the float model, and whether that is near enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.errors import BadFeeds
from ..ir.ops import operator
from .base import Array, Context, Outputs
from .deviation import Deviation
from .picks import Picks

MOST_RUNS = 128  # that are compared; more feeds hardly change a ratio
_MAKE_FEATURES = ("LSTM", "GRU", "RNN", "Loop", "Scan", "Tanh", "LayerNormalization", "LpNormalization")
_HELD = 256 * 2**20  # bytes of outputs of the float model that are kept, not computed again


@dataclass(frozen=True, slots=True)
class Bars:
    """What the user allows to be lost: of the metric or, where there is none, of top-1 agreement and SQNR in dB.

    ``least_sqnr`` and ``max_error``, max|Δ|/max|y|, hold for each float output beside a metric too.
    """

    max_drop: float
    min_sqnr: float
    least_sqnr: float = -math.inf
    max_error: float | None = None

    @property
    def on_outputs(self) -> bool:
        """Whether the outputs themselves are bounded, whatever they hold."""
        return self.least_sqnr > -math.inf or self.max_error is not None


@dataclass(slots=True)
class Fidelity:
    """How a model compares with the float one: by output the SQNR in dB, and of how many cases how many are not the
    same; the greatest max|Δ|/max|y| of a float output; and the drop of the metric.

    ``surely`` is the SQNR with noise one standard error more: on other data it may be so, and more cases may differ.
    ``typical`` is noise over signal of the worst output in the run of the median. Where a run flips between two answers
    all noise of the others is little beside that, so it says more about where noise comes from than their sum.
    """

    sqnr: dict[str, float] = field(default_factory=dict)
    flips: dict[str, tuple[int, int]] = field(default_factory=dict)
    drop: float | None = None
    error: float = 0.0
    surely: dict[str, float] = field(default_factory=dict)
    typical: float = 0.0

    def distance(self, bars: Bars, *, surely: bool = False) -> float:
        """What is lost as a share of what is allowed: at most 1 is good, the less the better; on other data too, as far
        as these tell, if that is to be ``surely``.

        Of few cases one may differ where ``max_drop`` is not 0: 1 of 64 does not tell whether it is 1 in 100.
        """
        if self.drop is not None:
            lost, least = [_share(max(self.drop, 0.0), bars.max_drop)], bars.least_sqnr
        else:
            flips = [(lost + (_more(lost) if surely else 0.0), cases) for lost, cases in self.flips.values()]
            lost = [_share(lost, math.ceil(bars.max_drop * cases)) for lost, cases in flips]
            least = max(bars.min_sqnr, bars.least_sqnr)
        if least > -math.inf:
            lost += [10 ** ((least - found) / 10) for found in (self.surely if surely else self.sqnr).values()]
        if bars.max_error is not None:
            lost.append(_share(self.error, bars.max_error))
        return max(lost, default=0.0)

    @property
    def noise(self) -> float:
        """Noise over signal, of the worst output."""
        return max((10 ** (-found / 10) for found in self.sqnr.values()), default=0.0)

    def __str__(self) -> str:
        parts = [] if self.drop is None else [f"metric down by {self.drop:.4g}"]
        if self.sqnr:
            parts.append(f"SQNR {min(self.sqnr.values()):.1f} dB")
        if self.flips:
            lost, cases = max(self.flips.values(), key=lambda pair: pair[0] / pair[1])
            parts.append(f"{cases - lost} of {cases} cases the same")
        return ", ".join(parts) or "no float output"


class Judge:
    """Compares models with the float one on the same feeds, as users would see them: at full optimization.

    What the outputs of ``picked`` hold does not count, but its values do, which ``model`` gives out too.
    """

    def __init__(self, model: ir.Model, ctx: Context, picked: Picks | None = None) -> None:
        self.besides = frozenset[str]() if picked is None else picked.outputs
        feeds = ctx.check_data if ctx.has("check_data") else ctx.data
        self.model, self.ctx, self.runner = model, ctx, ctx.runner
        self.features = {output.name for output in model.graph.outputs if _are_features(output)}
        self.features.update(picked.values if picked is not None and picked.gathers else ())
        self.masked = frozenset(() if picked is None else picked.values)
        self.feeds = _spread(feeds, MOST_RUNS)
        self.states = _states(model, self.feeds, self._float_outputs())
        self.score = None
        if ctx.has("metric"):  # what passes before have lost counts too
            self.score = ctx.runner.score(model) if ctx.metric_before is None else ctx.metric_before
        self._kept = kept(self._float_outputs())
        if self._kept and not any(_holds_something(output) for outputs in self._kept for output in outputs.values()):
            raise BadFeeds(
                "The data give nothing but empty outputs, so that no model could be judged by them; give samples."
            )

    def fidelity(self, model: ir.Model, *, runs: int | None = None, metric: bool = True) -> Fidelity:
        """How ``model`` compares on all feeds, or about ``runs`` of them; the metric takes all of its own data."""
        feeds = self.some(runs)
        step = -(-len(self.feeds) // max(1, len(feeds)))
        wanted = self._kept[::step] if self._kept else self.runner.run(self.model, feeds)
        sums: dict[str, Deviation] = {}
        for expected, found in zip(wanted, self._outputs(model, feeds), strict=True):
            for name, output in expected.items():
                if name in self.besides:
                    continue
                if name not in sums:
                    sums[name] = Deviation(features=name in self.features, masked=name in self.masked)
                sums[name].add(output, found.get(name))
        floats = {name: one.energies for name, one in sums.items() if one.is_float}
        result = Fidelity(
            {name: min(one.sqnr for one in energies) for name, energies in floats.items()},
            {name: (one.rows - one.same, one.rows) for name, one in sums.items() if one.rows},
            error=max((one.error for one in sums.values()), default=0.0),
            surely={name: min(one.surely for one in energies) for name, energies in floats.items()},
            typical=max((energies[0].typical for energies in floats.values()), default=0.0),
        )
        if self.score is not None and metric:
            result.drop = self.score - self.runner.score(model)
        return result

    def some(self, runs: int | None) -> Sequence[Mapping[str, Array]]:
        """About ``runs`` of the feeds, evenly spaced; all where they are the steps of a sequence."""
        return self.feeds if runs is None or self.states else self.feeds[:: -(-len(self.feeds) // runs) or 1]

    def _float_outputs(self) -> Iterator[Outputs]:
        return self.runner.run(self.model, self.feeds)

    def _outputs(self, model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> Iterator[Outputs]:
        """The outputs of each feed; where feeds are steps of a sequence, a model gets the states that it made."""
        if not self.states:
            yield from self.runner.run(model, feeds)
            return
        state: dict[str, Any] = {}

        def steps() -> Iterator[Mapping[str, Array]]:
            for place, feed in enumerate(feeds):
                yield {**feed, **state} if place not in self.states.starts else feed

        for outputs in self.runner.run(model, _Lazy(steps)):
            state = {name: outputs[source] for name, source in self.states.pairs.items()}
            yield outputs


def _are_features(value: ir.Value) -> bool:
    """Whether an output is a state, or normalized, and so hardly the scores of classes, of which the largest counts."""
    node = value.producer()
    while node is not None and operator(node).moves and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _MAKE_FEATURES


def kept(outputs: Iterable[Outputs]) -> list[Outputs]:
    """``outputs``; none of them where they take much memory, so that they had better be computed anew."""
    found, size = [], 0
    for one in outputs:
        found.append(one)
        size += sum(value.nbytes for value in one.values() if isinstance(value, np.ndarray))
        if size > _HELD:
            return []
    return found


@dataclass(frozen=True, slots=True)
class States:
    """Inputs that are outputs of the step before, and the feeds that start anew."""

    pairs: Mapping[str, str]
    starts: frozenset[int]

    def __bool__(self) -> bool:
        return bool(self.pairs)


def _states(model: ir.Model, feeds: Sequence[Mapping[str, Array]], outputs: Iterable[Outputs]) -> States:
    """Which inputs the feeds take from the outputs of the float model one run earlier, to the last bits."""
    pairs: dict[str, str] | None = None
    starts = {0}
    last: Outputs = {}
    for place, (feed, found) in enumerate(zip(feeds, outputs, strict=True)):
        if place:
            carried = {name: _source(array, last) for name, array in feed.items()}
            known = {name: source for name, source in carried.items() if source is not None}
            if known:
                pairs = known if pairs is None else {k: v for k, v in pairs.items() if known.get(k) == v}
            else:
                starts.add(place)
        last = found
    return States(pairs or {}, frozenset(starts))


def _source(array: Array, outputs: Outputs) -> str | None:
    """The output that ``array`` repeats; nothing that is all equal numbers, as states are where they start."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.size < 2 or not np.ptp(array):
        return None
    for name, found in outputs.items():
        if isinstance(found, np.ndarray) and found.shape == array.shape and np.allclose(found, array, 1e-3, 1e-5):
            return name
    return None


class _Lazy:
    """Feeds that depend on the outputs of the run before."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        return iter(self.steps())


def _spread(feeds: Iterable[Mapping[str, Array]], most: int) -> list[Mapping[str, Array]]:
    """All feeds, or as many as ``most`` consecutive ones: the first, since they may be steps of a sequence."""
    return list(itertools.islice(feeds, most))


def _holds_something(output: Any) -> bool:
    """Whether an output has elements; sequences and maps count as they are."""
    return bool(np.size(output)) if isinstance(output, np.ndarray) else True


def _more(cases: int) -> float:
    """One standard error of a count of rare cases, but that one case is no more than itself."""
    return max(0.0, math.sqrt(cases) - 1)


def _share(lost: float, allowed: float) -> float:
    return lost / allowed if allowed else (math.inf if lost else 0.0)
