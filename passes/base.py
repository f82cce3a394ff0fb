"""What a pass is: a frozen dataclass whose fields are its options, with one method that edits a model.

@register("share-weights")
@dataclass(frozen=True)
class ShareWeights(Pass):
    \"\"\"Let each weight take one of few shared values.\"\"\"

    bits: int = 4

    def run(self, model, ctx): ...
"""

from __future__ import annotations

import enum
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from ..ir.errors import NeedsData
from .ledger import Change, Ledger, Number, Skip
from .options import check_fields, format_options
from .points import Point
from .registry import register
from .selection import NOTHING, Selection

__all__ = [
    "NOTHING",
    "Array",
    "Context",
    "Effect",
    "Feeds",
    "Level",
    "Limits",
    "Outputs",
    "Pass",
    "Runner",
    "Selection",
    "register",
]

Array = np.ndarray[Any, Any]
Feeds = Iterable[Mapping[str, Array]]  # one mapping of model inputs for each run; can be walked more than once
Outputs = Mapping[str, Any]  # arrays, or lists, dicts and None for sequences, maps and empty optionals
Level = str  # an optimization level of ONNX Runtime: "off", "basic", "extended" or "all"


@dataclass(frozen=True)
class Limits:
    """What the user allows a run to lose; a pass that searches keeps within it. ``None`` bounds nothing.

    ``max_drop``: loss of the metric, absolute. ``max_error``: max|Δ|/max|y| of each float output. ``min_sqnr``: signal
    to quantization noise ratio of each float output, in dB.
    """

    max_drop: float | None = None
    max_error: float | None = None
    min_sqnr: float | None = None


class Effect(enum.Enum):
    """What a pass may do to the outputs of a model; the check holds it to this.

    ``SAME``: bit-identical at the same optimization level and number of threads. ``ROUNDING``: each float output
    within 1e-5 of its largest magnitude plus four times what the runtime's own optimizations move the unchanged
    model by. ``LOSSY``: measured, reported, and bounded only by what the user asks.
    """

    SAME = "same"
    ROUNDING = "rounding"
    LOSSY = "lossy"


class Runner(Protocol):
    """Runs models for passes; ``runtime.session`` implements it, so that passes need not import the runtime.

    An ``exact`` one runs models as they are written unless told otherwise: optimizations off, weights not repacked, so
    that graphs which compute the same give the same bits.
    """

    @property
    def exact(self) -> bool: ...

    def run(
        self, model: ir.Model, feeds: Feeds, outputs: Sequence[str] | None = None, level: Level = "all"
    ) -> Iterator[Outputs]:
        """The outputs of each feed; ``outputs`` may also name intermediate values of the main graph."""
        ...

    def statistics(self, model: ir.Model, points: Iterable[Point], feeds: Feeds) -> Mapping[Point, Any]:
        """What each point asks for, from one sweep over the feeds; a point's class says which type its answer has."""
        ...

    def score(self, model: ir.Model) -> float:
        """The user's metric; higher is better."""
        ...

    def time(self, models: Sequence[ir.Model], feeds: Feeds, seconds: float = 1.0) -> list[float]:
        """Seconds a run for each model, interleaved in one go, which takes about ``seconds`` for each."""
        ...

    def newest_opset(self) -> int:
        """The newest version of the ONNX domain that it takes."""
        ...


def _given(name: str, option: str) -> Any:
    def read(self: Context) -> Any:
        value = self.__dict__["_given"].get(name)
        if value is None:
            raise NeedsData(f"{self.step} needs {option}; none was given.")
        return value

    return property(read, doc=f"What the user gave with {option}; raises ``NeedsData`` where that is nothing.")


def _address(subject: Any) -> str:
    """What a ledger calls ``subject``: text as it is, a weight by its address, a node or value by its name."""
    if isinstance(subject, str):
        return subject
    return str(getattr(subject, "address", None) or subject.name or "")


class Context:
    """What a pass may need of the world. Reading a field that was not given raises ``NeedsData``.

    ``models`` are partners and teachers by name; ``data`` and ``check_data`` sample inputs; ``labels`` int64
    or text [samples]; ``metric`` a function of an ``InferenceSession``; ``runner`` runs models.
    """

    models: Mapping[str, ir.Model] = _given("models", "--with NAME=MODEL")
    data: Feeds = _given("data", "--data")
    check_data: Feeds = _given("check_data", "--check-data or --data")
    labels: Array = _given("labels", "--labels")
    metric: Callable[[Any], float] = _given("metric", "--metric")
    runner: Runner = _given("runner", "a runner, which `penjing.run` gives")

    def __init__(self, *, step: str = "this pass", seed: int = 0, **given: Any) -> None:
        self.step = step
        self.seed = seed
        self.ledger = Ledger()
        self.metric_before: float | None = given.pop("metric_before", None)  # of the model as the run found it
        self._given = given

    @property
    def limits(self) -> Limits:
        """What the user allows the run as a whole to lose: nothing is bounded where nothing was said."""
        found: Limits | None = self._given.get("limits")
        return found or Limits()

    def has(self, name: str) -> bool:
        """Whether the field ``name`` was given."""
        return self._given.get(name) is not None

    def for_step(self, step: str) -> Context:
        """The same world with an empty ledger, for the next pass."""
        return Context(step=step, seed=self.seed, metric_before=self.metric_before, **self._given)

    def replaced(self, **given: Any) -> Context:
        """The same world with other fields."""
        return Context(step=self.step, seed=self.seed, metric_before=self.metric_before, **{**self._given, **given})

    def change(self, subject: object, what: str, **numbers: Number) -> None:
        """Write down that ``subject`` (a weight, node, value or address) was changed."""
        plain = {name: number.item() if hasattr(number, "item") else number for name, number in numbers.items()}
        self.ledger.changes.append(Change(_address(subject), what, plain))

    def skip(self, subject: object, reason: str) -> None:
        """Write down that ``subject`` was left alone, and why."""
        self.ledger.skips.append(Skip(_address(subject), reason))

    def warn(self, sentence: str) -> None:
        """Warn the user, once, of what makes the result doubtful; under ``--strict`` that is an error."""
        if sentence not in self.ledger.warnings:
            self.ledger.warnings.append(sentence)


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """One rewriting of a model. Subclasses are frozen dataclasses, registered under a name.

    A pass finds a valid model and leaves a valid one, keeps no state between runs, and is deterministic for a seed.
    It is an onnx_ir pass too: driven by onnx_ir's pass manager it gets an empty ledger and no runner.
    """

    name: ClassVar[str] = ""
    keeps_inputs: ClassVar[bool] = False  # of a pass that brings its own reference

    def __post_init__(self) -> None:
        check_fields(self)
        self.validate()

    def validate(self) -> None:
        """Raise ``UsageError`` where options exclude each other or are out of range."""

    def effect(self) -> Effect:
        """What this pass, with these options, may do to the outputs."""
        return Effect.SAME

    @abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> None:
        """Edit ``model`` in place and write every change and skip into ``ctx``."""

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]] | None:
        """Expected outputs, for a pass that changes the interface; ``None`` means those of ``before`` as it was.

        What runs models for it leaves the level to ``ctx.runner``, whose default is off where outputs have to be
        bit-identical. Feeds may hold more than ``before`` takes: what the model takes after the pass, too.
        """
        del before, ctx
        return None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run as an onnx_ir pass."""
        ctx = Context(step=self.name)
        self.run(model, ctx)
        return ir.passes.PassResult(model, modified=bool(ctx.ledger.changes))

    def __str__(self) -> str:
        return self.name + format_options(self)

    @classmethod
    def summary(cls) -> str:
        """The first line of the pass's manual page."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]
