"""Prove what passes did: run the model as it was and as it is, and hold each pass to its declared effect.

Consecutive exact passes (SAME, ROUNDING) form a segment, judged against its own start; a breach is bisected to the
first bad pass. Passes that lose precision are measured over the whole run and bounded by what the user asks.

- SAME: bit-identical with the runtime's optimizations off, and within one ROUNDING bound at full optimization, since
  the runtime may fuse a changed graph in another way.
- ROUNDING, k passes: at full optimization within k times 1e-5·max|y| + 4·noise for each float output.
- A model that computes in float16 or bfloat16 is held to ROUNDING with 4 eps of that type throughout: ONNX Runtime
  computes these in float32 and rounds where casts fall, also with optimizations off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from ..ir.address import graphs
from ..ir.errors import BadFeeds, PenjingError
from ..ir.verify import problems
from ..passes.base import Context, Effect, Feeds, Outputs, Pass
from ..passes.instruments import Instrument, Step
from .compare import Comparison, Judge, tolerance
from .report import Mode
from .session import OrtRunner

Reference: TypeAlias = Callable[[Feeds], Iterator[Outputs]]


@dataclass
class Segment:
    """Passes judged together: their texts, the strength, and what was found wrong (nothing, when they held)."""

    passes: list[str]
    effect: Effect
    breaches: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"passes": self.passes, "effect": self.effect.value, "breaches": self.breaches}


class Breach(PenjingError):
    """A pass did not keep its effect, or the run a bound. ``before`` is the model found, ``feeds`` show the difference.

    ``pass_`` is the text of the culprit, or of the whole pipeline; ``message`` says it all.
    """

    exit_code = 1

    def __init__(self, pass_: str, reasons: list[str], before: ir.Model, feeds: Feeds, message: str = "") -> None:
        self.pass_ = pass_
        self.reasons = reasons
        self.before = before
        self.feeds = feeds
        shown = "\n".join(f"  {reason}" for reason in reasons[:10])
        super().__init__(message or f"{pass_} broke its promise:\n{shown}")


class Checker(Instrument):
    """Watches a pipeline and judges it on ``feeds``; raises ``Breach`` for the first pass that broke its promise.

    ``each`` judges after every pass, ``end`` at the end of each segment; ``segments`` holds the verdicts.
    """

    def __init__(self, runner: OrtRunner, feeds: Feeds, ctx: Context, mode: Mode) -> None:
        self.segments: list[Segment] = []
        self._runner, self._feeds, self._ctx, self._mode = runner, feeds, ctx, mode
        self.last_change: ir.Model | None = None  # what the last pass that changed the interface found
        self._start: ir.Model | None = None
        self._open: list[Pass] = []

    def before(self, step: Step, model: ir.Model) -> None:
        pass_ = step.pass_
        if brings_reference(pass_):
            self.last_change = model.clone()
        if self._mode == "off":
            return
        alone = self._mode == "each" or brings_reference(pass_)
        if alone or pass_.effect() is Effect.LOSSY:
            self.finish(model)
        if self._start is None and (alone or pass_.effect() is not Effect.LOSSY):
            self._start = model.clone()

    def after(self, step: Step, model: ir.Model) -> None:
        if self._start is None:
            return
        self._open.append(step.pass_)
        if self._mode == "each" or brings_reference(step.pass_):
            self.finish(model)

    def finish(self, model: ir.Model) -> None:
        """Judge the open segment, if there is one, against ``model``."""
        if self._start is None:
            return
        start, passes = self._start, self._open
        self._start, self._open = None, []
        reasons = judge_passes(passes, start, model, self._feeds, self._runner, self._ctx)
        effect = max((pass_.effect() for pass_ in passes), key=list(Effect).index)
        self.segments.append(Segment([str(pass_) for pass_ in passes], effect, reasons))
        if reasons:
            raise bisect(passes, start, self._feeds, self._runner, self._ctx) or Breach(
                ",".join(map(str, passes)), reasons, start, list(self._feeds)
            )


def brings_reference(pass_: Pass) -> bool:
    """Whether the pass brings its own reference, since its outputs are not those of the model it found."""
    return type(pass_).reference is not Pass.reference


def judge_passes(
    passes: Sequence[Pass], before: ir.Model, after: ir.Model, feeds: Feeds, runner: OrtRunner, ctx: Context
) -> list[str]:
    """Sentences for each way in which ``after`` is not what ``passes`` promise to make of ``before``; none if it is."""
    if len(passes) == 1 and (expected := passes[0].reference(before, ctx)):
        if passes[0].effect() is Effect.LOSSY:
            return _runs(after, feeds, runner)
        bare = _bare(runner)
        plainly = passes[0].reference(before, ctx.replaced(runner=_Plain(runner, bare)))
        least = max(map(half_tolerance, (before, after)))
        same = passes[0].effect() is Effect.SAME and not least
        return _judge_reference(expected, plainly or expected, after, feeds, (runner, bare), same, least)
    effects = [pass_.effect() for pass_ in passes]
    if Effect.LOSSY in effects:
        return _runs(after, feeds, runner)
    rounding, half = effects.count(Effect.ROUNDING), half_tolerance(before)
    judge = judge_models(before, after, feeds, runner, half)
    if isinstance(judge, str):
        return [judge]
    reasons = judge.breaches("rounding", max(rounding, 1))
    if not rounding and not half:  # ONNX Runtime computes half types in float32, and rounds where it sees fit
        exact, bare = Judge(), _bare(runner)
        plain = bare.run(before, Fitted(feeds, before), level="off")
        for old, new in zip(plain, _guarded(bare, after, feeds, "off"), strict=False):
            if isinstance(new, str):
                return [new]
            exact.add(old, old, new)
        reasons = reasons or exact.breaches("same", 1)
    return reasons


def half_tolerance(model: ir.Model) -> float:
    """The tolerance of the narrowest of float16 and bfloat16 that ``model`` computes in; 0 where it does in neither."""
    found = {
        value.dtype
        for _, graph in graphs(model)
        for node in graph
        if node.op_type not in ("Cast", "Constant", "Identity")
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    }
    return max((tolerance(dtype.numpy().name) for dtype in found if dtype is not None), default=0.0)


def judge_models(before: ir.Model, after: ir.Model, feeds: Feeds, runner: OrtRunner, least: float = 0.0) -> Judge | str:
    """A judge that has seen both models on all feeds, or a sentence where ``after`` fails on a feed ``before`` took."""
    judge = Judge(least)
    own = Fitted(feeds, before)
    expected = zip(runner.run(before, own), runner.run(before, own, level="off"), strict=True)
    found = _guarded(runner, after, feeds)
    for (old, plain), new in zip(expected, found, strict=True):
        if isinstance(new, str):
            return new
        judge.add(old, plain, new)
    return judge


def compare_reference(
    expected: Callable[[Feeds], Iterator[Outputs]], after: ir.Model, feeds: Feeds, runner: OrtRunner
) -> Comparison | str:
    """How far the outputs of ``after`` at full optimization are from those expected, or why it did not run."""
    judge = Judge()
    for wanted, found in zip(expected(feeds), _guarded(runner, after, feeds), strict=False):
        if isinstance(found, str):
            return found
        judge.add(wanted, None, found)
    return judge.comparison


@dataclass(frozen=True)
class Fitted:
    """What ``model`` takes of ``feeds``, floats in the types that it takes them in: a pass may have changed both."""

    feeds: Feeds
    model: ir.Model

    def __iter__(self) -> Iterator[dict[str, Any]]:
        types = {value.name: value.dtype.numpy() for value in self.model.graph.inputs if value.dtype is not None}
        names = {value.name for value in self.model.graph.inputs}
        for feed in self.feeds:
            yield {name: _as_float(array, types.get(name)) for name, array in feed.items() if name in names}


def _as_float(array: Any, dtype: Any) -> Any:
    if not isinstance(array, np.ndarray) or dtype is None or array.dtype == dtype:
        return array
    return array.astype(dtype) if array.dtype.kind == "f" and np.dtype(dtype).kind in "fV" else array


def bisect(passes: Sequence[Pass], start: ir.Model, feeds: Feeds, runner: OrtRunner, ctx: Context) -> Breach | None:
    """Run ``passes`` again one by one from ``start``; the first that breaks the model or its promise, with evidence.

    Passes are deterministic for a seed, so the second run does what the first did. ``None``: each alone holds.
    """
    model = start.clone()
    for pass_ in passes:
        before = model.clone()
        try:
            pass_.run(model, ctx.for_step(pass_.name))
        except Exception as error:
            return Breach(str(pass_), [f"it failed with {type(error).__name__}: {error}"], before, [])
        if found := problems(model):
            return Breach(str(pass_), found, before, [])
        judged = (pass_, before, model, runner, ctx)
        if reasons := _judge_one(*judged, feeds):
            worst = next(([feed] for feed in feeds if _judge_one(*judged, [feed])), list(feeds))
            return Breach(str(pass_), reasons, before, worst)
    return None


def unvisited(model: ir.Model, feeds: Feeds, runner: OrtRunner) -> list[str]:
    """A warning that names the branches of Ifs in the main graph that no run takes: nothing was checked there."""
    ifs = [(value, node) for node in model.graph if node.op_type == "If" and (value := node.inputs[0]) is not None]
    if not ifs:
        return []
    made = list(
        dict.fromkeys(value.name or "" for value, _ in ifs if value.is_initializer() or not value.is_graph_input())
    )
    taken: dict[ir.Node, set[bool]] = {node: set() for _, node in ifs}
    for feed, found in zip(feeds, runner.run(model, feeds, outputs=made, level="off"), strict=True):
        for value, node in ifs:
            taken[node].add(bool({**found, **feed}[value.name or ""]))
    words = {True: "then", False: "else"}
    never = [
        f"{node.name or node.op_type}/{words[way]}" for node, ways in taken.items() for way in words if way not in ways
    ]
    if not never:
        return []
    return [f"No run on these feeds takes the branch {', '.join(never)}; what passes did there is not checked."]


def _judge_one(
    pass_: Pass, before: ir.Model, after: ir.Model, runner: OrtRunner, ctx: Context, feeds: Feeds
) -> list[str]:
    return judge_passes([pass_], before, after, feeds, runner, ctx)


def _judge_reference(
    expected: Reference,
    plainly: Reference,
    after: ir.Model,
    feeds: Feeds,
    runners: tuple[OrtRunner, OrtRunner],
    exact: bool,
    least: float,
) -> list[str]:
    """``after`` beside what a pass expects, at full optimization, and if ``exact`` also with optimizations off."""
    judge, same = Judge(least), Judge()
    runs = zip(
        expected(feeds),
        plainly(feeds),
        _guarded(runners[0], after, feeds),
        _guarded(runners[1], after, feeds, "off"),
        strict=False,
    )  # a failed run ends its row
    for wanted, bare, full, plain in runs:
        if isinstance(full, str) or isinstance(plain, str):
            return [found for found in (full, plain) if isinstance(found, str)]
        judge.add(wanted, bare, full)
        same.add(bare, bare, plain)
    return judge.breaches("rounding", 1) or (same.breaches("same", 1) if exact else [])


@dataclass(frozen=True)
class _Plain:
    """A runner that runs with the runtime's optimizations off, by ``bare``, where no level is asked for."""

    runner: OrtRunner
    bare: OrtRunner
    exact: bool = True

    def run(
        self, model: ir.Model, feeds: Feeds, outputs: Sequence[str] | None = None, level: str | None = None
    ) -> Iterator[Outputs]:
        if level is None:
            return self.bare.run(model, feeds, outputs, level="off")
        return self.runner.run(model, feeds, outputs, level)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)


def _bare(runner: OrtRunner) -> OrtRunner:
    """One that leaves weights as they are stored, which is an optimization too: with these off a weight that nodes
    decode is not packed for its kernel, as one that lies in the file would be, and packing moves last bits."""
    return OrtRunner(threads=runner.threads, prepack=False)


def _runs(model: ir.Model, feeds: Feeds, runner: OrtRunner) -> list[str]:
    return [found for found in _guarded(runner, model, feeds) if isinstance(found, str)][:1]


def _guarded(runner: OrtRunner, model: ir.Model, feeds: Feeds, level: str = "all") -> Iterator[Outputs | str]:
    """The outputs of each run; where the model fails, a sentence instead, which is the last."""
    try:
        yield from runner.run(model, Fitted(feeds, model), level=level)
    except BadFeeds:
        raise
    except Exception as error:
        yield f"the model runs no more: {error}"
