"""What watches a pipeline run. Instruments nest like a stack: the last to start is the first to be told of the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from ..ir.errors import InvalidModel
from ..ir.text import diff, text
from ..ir.verify import problems
from .base import Pass
from .ledger import Ledger


@dataclass
class Step:
    """One pass on its way through a pipeline. ``group`` is the name of the pipeline it came from, if it had one."""

    index: int
    pass_: Pass
    group: str | None = None
    seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def changed(self) -> bool:
        return bool(self.ledger.changes)


class Instrument:
    """Told before a pass, after it, or of its failure; the methods do nothing unless overridden."""

    def before(self, step: Step, model: ir.Model) -> None: ...

    def after(self, step: Step, model: ir.Model) -> None: ...

    def failed(self, step: Step, model: ir.Model, error: BaseException) -> None: ...


class Timing(Instrument):
    """Writes the wall seconds of each pass into its step."""

    def before(self, step: Step, model: ir.Model) -> None:
        step.seconds = -time.perf_counter()

    def after(self, step: Step, model: ir.Model) -> None:
        step.seconds += time.perf_counter()

    def failed(self, step: Step, model: ir.Model, error: BaseException) -> None:
        if step.seconds < 0:  # it is what failed, not an instrument after it
            step.seconds += time.perf_counter()


class Verify(Instrument):
    """Holds every pass to leave a model whose invariants stand; raises ``InvalidModel`` that names the pass."""

    def after(self, step: Step, model: ir.Model) -> None:
        if found := problems(model):
            raise InvalidModel(f"What {step.pass_} (step {step.index + 1}) left", found)


class Printing(Instrument):
    """Writes the model as text after passes: a diff where it changed, or whole with ``everything``."""

    def __init__(self, write: Callable[[str], None], everything: bool = False) -> None:
        self._write = write
        self._everything = everything
        self._text = ""

    def before(self, step: Step, model: ir.Model) -> None:
        self._text = text(model)

    def after(self, step: Step, model: ir.Model) -> None:
        now = text(model)
        if self._everything:
            self._write(f"=== after {step.pass_}\n{now}")
        elif now != self._text:
            self._write(f"=== {step.pass_} changed\n{diff(self._text, now)}")
