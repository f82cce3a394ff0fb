"""Passes that others wrote: any onnx_ir pass and any onnx-graphsurgeon function runs as a step.

penjing.run(model, [CommonSubexpressionEliminationPass(), "clean"])       # an onnx_ir pass, as it is
register_onnx_ir("cse", CommonSubexpressionEliminationPass, Effect.SAME)   # ... or under a name
register_surgeon("swap-clip", my_graphsurgeon_function, Effect.LOSSY)      # Graph -> Graph or None
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ..ir.edit import become
from ..ir.text import text
from .base import Context, Effect, Pass, register


@dataclass(frozen=True)
class OnnxIrPass(Pass):
    """A pass of onnx_ir's as a step. Its effect is LOSSY, so measured but not judged, unless said otherwise."""

    inner: Any = field(init=False)
    declared: Effect = field(init=False)

    def __init__(self, inner: ir.passes.PassBase, effect: Effect = Effect.LOSSY) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "declared", effect)

    def __str__(self) -> str:
        return self.name or type(self.inner).__name__

    def effect(self) -> Effect:
        return self.declared

    def run(self, model: ir.Model, ctx: Context) -> None:
        result = self.inner(model)
        if result.model is not model:
            become(model, result.model)
        if result.modified:
            ctx.change("model", f"rewritten by {type(self.inner).__name__}")


def register_onnx_ir(name: str, make: Callable[[], ir.passes.PassBase], effect: Effect) -> type[Pass]:
    """Let pipeline texts call an onnx_ir pass ``name``; ``make`` gives a fresh one for each run."""

    def run(self: Pass, model: ir.Model, ctx: Context) -> None:
        del self
        OnnxIrPass(make(), effect).run(model, ctx)

    return _enter(name, make, run, effect, f"The onnx_ir pass {getattr(make, '__name__', name)}.")


def register_surgeon(name: str, function: Callable[[Any], Any], effect: Effect) -> type[Pass]:
    """Let pipeline texts call an onnx-graphsurgeon function ``name``.

    ``function`` takes a ``gs.Graph`` and edits it, or returns another. A model that graphsurgeon cannot carry
    without loss is refused with a ``UsageError`` that says what would be lost.
    """

    called = getattr(function, "__name__", name)  # a functools.partial has no name

    def run(self: Pass, model: ir.Model, ctx: Context) -> None:
        del self
        from ..ir.surgeon import surgeon_step

        before = text(model)
        surgeon_step(function, model)
        if text(model) != before:
            ctx.change("model", f"rewritten by {called}")

    return _enter(name, function, run, effect, f"The onnx-graphsurgeon function {called}.")


def _enter(
    name: str, home: Any, run: Callable[[Any, ir.Model, Context], None], effect: Effect, about: str
) -> type[Pass]:
    """Register a pass without options that lives where ``home`` is written, so that a reproducer finds its source."""
    body = {"__doc__": about, "__module__": home.__module__, "run": run, "effect": lambda self: effect}
    return register(name)(type(name, (Pass,), body))
