"""Types and shapes written onto values."""

from __future__ import annotations

import onnx_ir as ir

from ...ir.scopes import scopes
from ...ir.shapes import infer_shapes, is_known, outputs
from ..base import Context, Pass, register


@register("infer-shapes")
class InferShapes(Pass):
    """Write down the types and shapes that follow from the operators, in the main graph and all bodies.

    What the file says is refined, never replaced; where the two contradict each other, the file stands and the ledger
    tells. Dimensions keep their names, and get no invented ones. Values inside functions are left as they are, for
    types and shapes there depend on the caller; the ledger names the functions where some are unknown.
    """

    def run(self, model: ir.Model, ctx: Context) -> None:
        """One run of ``onnx.shape_inference`` on the structure of the model, two where the file knows more."""
        outcome = infer_shapes(model)
        for prefix, count in outcome.improved.items():
            ctx.change(prefix or "main graph", "types and shapes inferred", values=count)
        for address, sentence in outcome.conflicts:
            ctx.skip(address, sentence)
        for scope in scopes(model):
            unknown = [value for value in outputs(scope.graph) if not is_known(value)] if scope.function else []
            if unknown:
                ctx.skip(scope.prefix, "inside a function types and shapes depend on the caller")
        if outcome.failure:
            ctx.skip("model", f"shape inference failed: {outcome.failure}")
