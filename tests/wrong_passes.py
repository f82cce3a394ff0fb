"""Passes that are wrong on purpose, each in one way; the tests see them caught."""

import numpy as np
import onnx_ir as ir
import onnxruntime

from penjing.passes.base import Context, Effect, Pass
from penjing.passes.registry import register


def nudge(model: ir.Model, by: float) -> None:
    """Add ``by`` to every float initializer."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.dtype == np.float32:
            value.const_value = ir.tensor(array + np.float32(by), name=value.name)


@register("wrong-numbers")
class WrongNumbers(Pass):
    """Claims to round, and changes every weight by ``by``."""

    by: float = 0.01

    def effect(self) -> Effect:
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        nudge(model, self.by)
        ctx.change("model", "nudged")


@register("wrong-structure")
class WrongStructure(Pass):
    """Feeds the last node with a value that nothing defines."""

    def run(self, model: ir.Model, ctx: Context) -> None:
        model.graph[-1].replace_input_with(0, ir.Value(name="nowhere"))
        ctx.change("model", "broken")


@register("wrong-crash")
class WrongCrash(Pass):
    """Fails with an error of its own."""

    def run(self, model: ir.Model, ctx: Context) -> None:
        raise IndexError("the pass fell over")


@register("right-rename")
class RightRename(Pass):
    """Does nothing wrong: names the nodes anew."""

    def run(self, model: ir.Model, ctx: Context) -> None:
        for index, node in enumerate(model.graph):
            node.name = f"renamed_{index}"
            ctx.change(node, "renamed")


@register("lossy-nudge")
class LossyNudge(Pass):
    """Changes every weight by ``by``, and says so."""

    by: float = 0.01

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        nudge(model, self.by)
        ctx.change("model", "nudged")


def sum_of_outputs(session: onnxruntime.InferenceSession) -> float:
    """A metric: minus the sum of the outputs on fixed inputs."""
    return -float(session.run(None, {"x": np.ones((2, 3), np.float32)})[0].sum())
