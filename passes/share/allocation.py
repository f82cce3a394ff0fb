"""How many shared values each weight gets, for the whole model to stay within its bounds and be as small as can be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ...ir.packing.digits import stored_bytes
from ...ir.storage import Array, distinct
from ...ir.weights import Weight
from ..base import Context, Limits
from ..feeds import Some
from ..judge import Fidelity, Judge
from ..meter import Meter
from .clustering import Codebook, NotFinite
from .measured import weighed_by_outputs
from .parts import Outcome, Source, codebooks, outcomes, shared, tell, together

COUNTS = (256, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2)  # of values: those whose numbers pack well
DEFAULT = 20.0  # dB, of each float output, where the run has no bounds
FLIPS = 0.01  # of the cases of a model without float outputs

_PROBES = (128, 16, 4)  # values with which each weight is tried alone
_MUCH = 0.003  # noise over signal in the outputs, from which fewer values are not tried: there will be no room for them
_RUNS = 8  # of the data, on which weights are tried alone
_GROUPS = 64  # of neighbours that are tried, at most
_START = 0.02  # noise over signal in the outputs that a metric is tried with first
_LEAPS = (1 / 30, 8.0)  # by which the noise is changed at most from one trial to the next
_TRIALS = 8  # of the whole model, at most
_ALIKE = 0.04  # of the bytes: the search ends where it could not save more
_NODES = 8  # that decode a weight; so many bytes each, and the weight's name so often in each
_NODE, _NAMES = 70, 4
_IN_HAND = 0.8  # of the noise or error allowed that is used: the rest, 1 dB, is for other data
_OF_DROP = 0.7  # of the loss of the metric that passes before have left
_BACK = 0.7  # of the noise with which the metric still holds: what is chosen by trying on some cases is lucky with them


@dataclass(frozen=True, eq=False)
class Option:
    """One way to store a weight: its codebook, what that does to it, and about how many bytes the file takes for it."""

    book: Codebook
    outcome: Outcome
    bytes: int


@dataclass(eq=False)
class Item:
    """A weight with its options, most bytes first.

    ``slopes`` holds, ascending, noises in the weight (as in ``Outcome``) with the ratio of noise in the outputs to it.
    """

    weight: Weight
    source: Source
    options: list[Option]
    slopes: list[tuple[float, float]] = field(default_factory=list)

    def probe(self, most: int) -> Option:
        """The option that it is tried with: of at most so many values, if it has one."""
        return next((option for option in self.options if option.outcome.values <= most), self.options[-1])

    def noise(self, option: Option) -> float:
        """What an option puts into the outputs, over their signal: its own noise times a ratio between those known."""
        own = option.outcome.noise
        if not own or not self.slopes:
            return own
        places, ratios = np.log(np.maximum(np.array(sorted(self.slopes)).T, 1e-30))
        return own * math.exp(np.interp(math.log(own), places, ratios))


@dataclass(frozen=True)
class Step:
    """A weight goes on to one of its options, which saves ``worth`` bytes for each ``noise`` more in the outputs."""

    item: Item
    option: int
    worth: float
    noise: float


def allocate(model: ir.Model, sources: Mapping[Weight, Source], provenance: str, ctx: Context) -> None:
    """Let the weights of ``sources`` take shared values, each as many as it needs.

    Noise of many small sources adds up, where a ``Meter`` measures it, so each weight, or some neighbours together, is
    tried alone, with few and with many values; from that and from the errors of its options follows what each does to
    the outputs. Steps of all weights that save bytes for noise stand in one row, best first, and the run's bounds say
    how far to go: that is found by measuring the whole model some times. Where there are data, errors of elements are
    weighed by the energy of the inputs that they meet. Raises ``NeedsData``.
    """
    if ctx.has("data"):
        sources, _ = weighed_by_outputs(model, list(sources), ctx)
    items = [item for weight, source in sources.items() if (item := _item(weight, source, ctx)) is not None]
    if items:
        _Search(model, items, provenance, ctx).run()


def _item(weight: Weight, source: Source, ctx: Context) -> Item | None:
    """The options of ``weight``; None, with a line in the ledger, where none saves anything."""
    try:
        found = together([source])
    except NotFinite:
        ctx.skip(weight, "holds NaN or infinity")
        return None
    values, size = distinct(weight.tensor, COUNTS[0]), weight.size
    counts = [count for count in COUNTS if values is None or count < values]
    if values is not None:
        counts.insert(0, values)  # nothing lost: for the search to start from
    decoder = _NODES * (_NODE + _NAMES * len((weight.value.name or "").encode()))
    least, options = weight.nbytes, list[Option]()
    books = codebooks(found, counts, weight.dtype)
    for book, outcome in zip(books, outcomes(source, found, books), strict=True):
        most = _bytes(size, outcome.zeros, len(book.values)) + book.values.nbytes + decoder
        if most < least:
            options.append(Option(book, outcome, most))
            least = most
    if not options:
        ctx.skip(weight, "too small: values, indices and the nodes that decode them would take what they save")
        return None
    return Item(weight, source, options)


def _bytes(size: int, zeros: int, values: int) -> int:
    """Of a number below ``values`` for each element, or of a mask of what is not zero and such numbers for that."""
    masked = math.ceil(size / 8) + stored_bytes(max(2, values - 1), size - zeros)
    return min(stored_bytes(max(2, values), size), masked)


class _Search:
    """The search for how far to go: by the metric alone where only that is bounded, by the outputs where they are."""

    def __init__(self, model: ir.Model, items: Sequence[Item], provenance: str, ctx: Context) -> None:
        self.model, self.items, self.provenance, self.ctx = model, items, provenance, ctx
        limits = ctx.limits
        bounded = any(bound is not None for bound in vars(limits).values())
        self.limits = limits if bounded else Limits(min_sqnr=DEFAULT)
        self.by_metric = self.limits.max_drop is not None
        self.by_outputs = self.limits.min_sqnr is not None or self.limits.max_error is not None
        self.judge = Judge(_copy(model), _without_metric(ctx)) if self.by_outputs else None
        self.score, self.lost = 0.0, 0.0
        if self.by_metric:
            self.score = ctx.runner.score(model)
            self.lost = max(0.0, (self.score if ctx.metric_before is None else ctx.metric_before) - self.score)
        self.probes = 0
        self.trail: list[str] = []

    def run(self) -> None:
        self._measure()
        steps = sorted((step for item in self.items for step in _hull(item)), key=lambda step: -step.worth)
        best = self._furthest(steps)
        self._finish(steps[:best], len(steps))

    # What each weight does --------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """The noise in the outputs for that in each weight, of neighbours together where there are many.

        Without data every weight counts by its own noise: so it is in a chain of layers.
        """
        ctx = self.ctx
        if not (ctx.has("data") or ctx.has("check_data")):
            return
        judge = self.judge or Judge(_copy(self.model), _without_metric(ctx, _RUNS))
        meter = Meter(judge.model, judge, _RUNS)
        size = math.ceil(len(self.items) / _GROUPS)
        for start in range(0, len(self.items), size):
            group = self.items[start : start + size]
            for most in _PROBES:
                probes = [(item, item.probe(most)) for item in group]
                own = sum(option.outcome.noise for _, option in probes)
                if not own:
                    continue
                self.probes += 1
                with _Chosen(probes, self.provenance):
                    noise = min(meter.noise(self.model), 1e6)
                for item, option in probes:
                    item.slopes.append((option.outcome.noise, noise / own))
                if noise > _MUCH:
                    break

    # How far to go ----------------------------------------------------------------------------------------------------

    def _furthest(self, steps: Sequence[Step]) -> int:
        """How many of ``steps`` keep the bounds, with something in hand.

        What is lost goes up with the noise foretold, about as it does; so from trial to trial the noise is changed by
        what the last one had left, and between one that kept the bounds and one that did not.
        """
        totals = np.cumsum([step.noise for step in steps])
        good, bad = int(np.searchsorted(totals, 0.0, "right")), len(steps) + 1
        known: dict[int, float] = {}  # what is lost, as a share of what may be
        budget = self._start()
        while len(known) < _TRIALS and bad - good > 1 and not self._alike(steps, good, bad):
            count = min(max(int(np.searchsorted(totals, budget, "right")), good + 1), bad - 1)
            share = known[count] = self._tried(_state(steps[:count]))
            good, bad = (count, bad) if share <= 1 else (good, count)
            budget = float(totals[count - 1])
            if good in known and bad in known:
                budget = _between(*((float(totals[place - 1]), known[place]) for place in (good, bad)))
            else:
                budget *= min(max(0.95 / share if share else math.inf, _LEAPS[0]), _LEAPS[1])
        return self._back(steps, totals, good) if good in known else good

    def _back(self, steps: Sequence[Step], totals: Array, good: int) -> int:
        """A little less far than ``good``, where a metric on few cases chose, if that keeps the bounds too."""
        back = int(np.searchsorted(totals, _BACK * float(totals[good - 1]), "right"))
        if not self.by_metric or not 0 < back < good:
            return good
        return back if self._tried(_state(steps[:back])) <= 1 else good

    def _start(self) -> float:
        """The noise that is tried first."""
        if self.limits.min_sqnr is not None:
            return _IN_HAND * 10 ** (-self.limits.min_sqnr / 10)
        return _START if self.by_metric else (self.limits.max_error or 0.0) ** 2

    def _alike(self, steps: Sequence[Step], good: int, bad: int) -> bool:
        """Whether what lies between is not worth a trial."""
        if bad > len(steps):
            return False
        parts = [_part(self.items, _state(steps[:count])) for count in (good, bad - 1)]
        return parts[0] - parts[1] < _ALIKE * parts[0]

    def _tried(self, chosen: Sequence[tuple[Item, Option]]) -> float:
        """What is lost with ``chosen`` options in place as a share of what may be used of the bounds.

        At most 1 is good. Afterwards the model is as it was.
        """
        with _Chosen(chosen, self.provenance):
            found = Fidelity() if self.judge is None else self.judge.fidelity(self.model)
            shares = self._shares(found)
            if self.by_metric and max(shares, default=0.0) <= 1:
                found.drop = self.score - self.ctx.runner.score(self.model)
                assert self.limits.max_drop is not None
                shares.append(_over(max(found.drop, 0.0), _OF_DROP * (self.limits.max_drop - self.lost)))
        self.trail.append(f"{_part(self.items, chosen):.3f} of the bytes: {found}")
        return max(shares, default=0.0)

    def _shares(self, found: Fidelity) -> list[float]:
        limits, shares = self.limits, list[float]()
        if limits.max_error is not None:
            shares.append(_over(found.error, _IN_HAND * limits.max_error))
        if limits.min_sqnr is not None:
            shares += [10 ** ((limits.min_sqnr - sqnr) / 10) / _IN_HAND for sqnr in found.sqnr.values()]
            if not found.sqnr:
                shares += [_over(lost, math.ceil(FLIPS * cases)) for lost, cases in found.flips.values()]
        return shares

    # In the end -------------------------------------------------------------------------------------------------------

    def _finish(self, steps: Sequence[Step], total: int) -> None:
        chosen = dict(_state(steps))
        for item in self.items:
            option = chosen.get(item)
            if option is None:
                self.ctx.skip(item.weight, "the bounds leave no room for fewer values")
                continue
            item.weight.replace(shared(item.source, option.book, self.provenance))
            tell(item.weight, item.source, option.outcome, self.ctx)
        if chosen:
            for line in self.trail:
                self.ctx.change("search", line)
            self.ctx.change("search", f"{len(steps)} of {total} steps taken", probes=self.probes)


class _Chosen:
    """Weights with options in place; afterwards they are as they were."""

    def __init__(self, chosen: Sequence[tuple[Item, Option]], provenance: str) -> None:
        self.chosen, self.provenance = chosen, provenance

    def __enter__(self) -> None:
        for item, option in self.chosen:
            item.weight.replace(shared(item.source, option.book, self.provenance))

    def __exit__(self, *_: object) -> None:
        for item, _option in self.chosen:
            item.weight.replace(item.source.tensor)


def _copy(model: ir.Model) -> ir.Model:
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy


def _without_metric(ctx: Context, runs: int | None = None) -> Context:
    """The same data, or so many runs of them, and nothing to ask a metric with."""
    feeds = ctx.check_data if ctx.has("check_data") else ctx.data
    return Context(step=ctx.step, seed=ctx.seed, data=feeds if runs is None else Some(feeds, runs), runner=ctx.runner)


def _hull(item: Item) -> Iterator[Step]:
    """The steps of one weight, from as it was through options that save ever less for the noise that they make.

    Only those on the lower convex hull of bytes over noise count, so that the steps come in order.
    """
    noises = [item.noise(option) for option in item.options]
    at, size, noise = -1, item.weight.nbytes, 0.0
    while at + 1 < len(item.options):
        left = range(at + 1, len(item.options))
        worths = {
            place: (size - item.options[place].bytes) / (noises[place] - noise) if noises[place] > noise else math.inf
            for place in left
        }
        at = max(left, key=lambda place: (worths[place], place))
        yield Step(item, at, worths[at], max(0.0, noises[at] - noise))
        size, noise = item.options[at].bytes, max(noise, noises[at])


def _between(good: tuple[float, float], bad: tuple[float, float]) -> float:
    """The noise at which all that may be lost is lost, between a trial that kept the bounds and one that did not.

    On logarithms, and never near either end: a metric of few cases goes by steps.
    """
    (low, least), (high, most) = good, bad
    place = 0.5
    if least > 0 and most < math.inf and most > least:
        place = min(max(math.log(0.95 / least) / math.log(most / least), 0.3), 0.7)
    return math.exp((1 - place) * math.log(max(low, 1e-30)) + place * math.log(high))


def _state(steps: Sequence[Step]) -> list[tuple[Item, Option]]:
    """The option of each weight after ``steps``."""
    latest = {step.item: step.option for step in steps}
    return [(item, item.options[place]) for item, place in latest.items()]


def _part(items: Sequence[Item], chosen: Sequence[tuple[Item, Option]]) -> float:
    """About how many of the bytes of all ``items`` are left."""
    found = dict(chosen)
    left = sum(found[item].bytes if item in found else item.weight.nbytes for item in items)
    return left / sum(item.weight.nbytes for item in items)


def _over(lost: float, allowed: float) -> float:
    return lost / allowed if allowed > 0 else (math.inf if lost > 0 else 0.0)
