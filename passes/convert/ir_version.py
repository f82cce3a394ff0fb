"""Older versions of ONNX's file format."""

from __future__ import annotations

import onnx_ir as ir

from ...ir.errors import UsageError
from ...ir.versions import greatest_need
from ..base import Context, Pass, register


@register("lower-ir")
class LowerIr(Pass):
    """Lower the IR version to the one given, or to the least that the model's contents need.

    The IR version says which readers understand the file, and changes nothing of what the model computes. Exporters
    stamp the newest they know, which other tools then refuse. Metadata counts for nothing, since older readers skip it;
    nor do operator sets, which have versions of their own. A model that has no higher version stays as it is.
    """

    to: int | None = None

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``UsageError`` that says what needs more."""
        need, found = greatest_need(model), model.ir_version
        target = need.version if self.to is None else self.to
        if target < need.version:
            raise UsageError(
                f"lower-ir: to={target} is too low: {need.reason}, which needs IR version {need.version}, the least "
                "that this model can have."
            )
        if target >= found:
            lower = f", and can have no lower one: {need.reason}" if self.to is None else " already"
            ctx.skip("model", f"it has IR version {found}{lower}")
            return
        model.ir_version = target
        ctx.change("model", f"IR version {found} to {target}")
