"""Newer versions of ONNX's operators."""

from __future__ import annotations

import onnx_ir as ir

from ...ir.address import printable
from ...ir.errors import UsageError
from ...ir.opset import newest_opset, raise_opset
from ..base import Context, Effect, Pass, register


@register("raise-opset")
class RaiseOpset(Pass):
    """Write the model in a newer version of the ONNX operators, its bodies and functions included.

    Only operators that changed their meaning or form are written anew; their names, outputs and weights stay. Where one
    has no exact conversion nothing is done: the refusal names the node, the operator, the two versions and why. Other
    domains keep their versions.
    """

    to: int = 21

    def validate(self) -> None:
        if not 1 <= self.to <= newest_opset():
            raise UsageError(f"raise-opset: to={self.to} is not a known opset; 1 to {newest_opset()} are known here.")

    def effect(self) -> Effect:
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``UsageError`` for a version below the model's, or above what the runner takes; ``NoConversion``."""
        if ctx.has("runner") and self.to > (newest := ctx.runner.newest_opset()):
            raise UsageError(f"raise-opset: to={self.to} is newer than the ONNX Runtime here takes ({newest}).")
        report = raise_opset(model, self.to)
        for place, version in report.stamps:
            ctx.change(place, f"opset {version} to {self.to}")
        for address, what in report.rewritten:
            ctx.change(address, f"rewritten: {what}")
        for place in report.at_it:
            ctx.skip(place, f"it is at opset {self.to} already")
        for domain, count in report.others.items():
            ctx.skip(f"domain {printable(domain)}", f"another domain, whose version stays ({count} nodes)")
        if not report.stamps and not report.at_it:
            ctx.skip("main graph", "it imports no operators of ONNX")
