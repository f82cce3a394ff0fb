"""Pipelines: passes in a row, as text and as what that text means.

pipeline = step (',' step)*
step     = name ['{' option (' ' option)* '}']
option   = key '=' value
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import onnx_ir as ir

from ..ir.errors import UsageError
from ..ir.packing.decoded import GROWTH, decoders
from .base import Context, Effect, Pass
from .instruments import Instrument, Step, Timing, Verify
from .options import WORD, Quoted, Raw, read_options
from .registry import find, named_pipeline
from .selection import Selection

Steps: TypeAlias = "str | Pipeline | Pass | ir.passes.PassBase | Sequence[str | Pass | ir.passes.PassBase]"


@dataclass(frozen=True)
class Pipeline:
    """Passes to run in order. A part that came from a named pipeline prints as that name."""

    parts: tuple[Pass | Pipeline, ...]
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline that ``text`` says; raises ``UsageError`` for words it does not know or cannot read."""
        try:
            return cls(tuple(_Reader(text).pipeline()))
        except RecursionError:
            raise UsageError("The pipeline text nests lists in lists too deeply.") from None

    @classmethod
    def of(cls, steps: Steps) -> Pipeline:
        """A pipeline from text, passes of penjing or onnx_ir, or a sequence of these."""
        if isinstance(steps, Pipeline):
            return steps
        if isinstance(steps, str):
            return cls.parse(steps)
        if isinstance(steps, Pass):
            return cls((steps,))
        if isinstance(steps, ir.passes.PassBase):
            from .interop import OnnxIrPass

            return cls((OnnxIrPass(steps),))
        if isinstance(steps, Sequence):
            return cls(tuple(part for step in steps for part in cls.of(step).parts))
        raise UsageError(f"A pipeline is text, a pass, or a list of these; found {type(steps).__name__}.")

    def __str__(self) -> str:
        return self.name or self.expanded()

    def expanded(self) -> str:
        """The text with this pipeline's own name, if it has one, replaced by its steps."""
        return ",".join(str(part) for part in self.parts)

    def steps(self, group: str | None = None) -> Iterator[tuple[Pass, str | None]]:
        """Every pass in order, with the name of the outermost named pipeline that it came from."""
        for part in self.parts:
            if isinstance(part, Pipeline):
                yield from part.steps(group or part.name)
            else:
                yield part, group

    def run(self, model: ir.Model, ctx: Context | None = None, instruments: Sequence[Instrument] = ()) -> list[Step]:
        """Run the passes on ``model`` in place; the verifier runs after each.

        Returns a step for each pass with its ledger and wall seconds. Raises what a pass or an instrument raises,
        and ``InvalidModel`` where a pass broke the model; ``model`` is then in the state that the pass left.
        """
        ctx = ctx or Context()
        stack = [*instruments, Verify(), Timing()]
        done = []
        for index, (pass_, group) in enumerate(self.steps()):
            step = Step(index, pass_, group)
            own = ctx.for_step(pass_.name)
            step.ledger = own.ledger
            with _watched(stack, step, model):
                require_matches(pass_, model)
                _tell_packed(pass_, model, own)
                pass_.run(model, own)
            done.append(step)
        return done


def require_matches(pass_: Pass, model: ir.Model) -> None:
    """Raise ``UsageError`` where a selection among the options of ``pass_`` names nothing in ``model``."""
    for key, value in vars(pass_).items():
        if isinstance(value, Selection):
            value.require_matches(model, f"{pass_.name}: {key}")


def _tell_packed(pass_: Pass, model: ir.Model, ctx: Context) -> None:
    """Passes that change weights see constants only; those that are packed are computed by their decoders."""
    if pass_.effect() is Effect.LOSSY and (count := sum(decoder.saves > GROWTH for decoder in decoders(model))):
        ctx.skip(
            f"{count} packed weights", f"stored for loading; put unpack-weights before {pass_.name} to change them"
        )


@contextlib.contextmanager
def _watched(stack: Sequence[Instrument], step: Step, model: ir.Model) -> Iterator[None]:
    try:
        for instrument in stack:
            instrument.before(step, model)
        yield
        for instrument in reversed(stack):
            instrument.after(step, model)
    except BaseException as error:
        for instrument in reversed(stack):
            instrument.failed(step, model, error)
        raise


class _Reader:
    """A recursive-descent reader of pipeline text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def pipeline(self) -> Iterator[Pass | Pipeline]:
        yield self.step()
        while self.took(","):
            yield self.step()
        if self.at < len(self.text):
            self.refuse("',' or the end")

    def step(self) -> Pass | Pipeline:
        name = self.word("the name of a pass")
        steps = named_pipeline(name)
        written = self.options() if self.took("{") else {}
        if steps is not None:
            if written:
                raise UsageError(f"The pipeline '{name}' takes no options; write its steps: {steps}.")
            return Pipeline(Pipeline.parse(steps).parts, name)
        cls = find(name)
        return cls(**read_options(cls, name, written))

    def options(self) -> dict[str, Raw]:
        written: dict[str, Raw] = {}
        while not self.took("}"):
            key = self.word("an option or '}'")
            if not self.took("="):
                self.refuse(f"'=' after '{key}'")
            if key in written:
                raise UsageError(f"The option '{key}' is given twice in: {self.text}")
            written[key] = self.value()
        return written

    def value(self) -> Raw:
        if self.took("("):
            return self.values()
        if quoted := re.compile(r"\s*'((?:[^']|'')*)'").match(self.text, self.at):
            self.at = quoted.end()
            return Quoted(quoted[1].replace("''", "'"))
        return self.word("a value")

    def values(self) -> Raw:
        items: list[Raw] = []
        while not self.took(")"):
            if items and not self.took(","):
                self.refuse("',' or ')'")
            items.append(self.value())
        return tuple(items)

    def word(self, expected: str) -> str:
        self.space()
        match = WORD.match(self.text, self.at)
        if not match:
            self.refuse(expected)
        self.at = match.end()
        return match[0]

    def took(self, mark: str) -> bool:
        self.space()
        found = self.text.startswith(mark, self.at)
        self.at += len(mark) * found
        return found

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def refuse(self, expected: str) -> NoReturn:
        found = f"'{self.text[self.at]}'" if self.at < len(self.text) else "the end"
        raise UsageError(
            f"The pipeline text stops making sense at character {self.at + 1}: expected {expected}, found {found}, "
            f"in: {self.text}"
        )
