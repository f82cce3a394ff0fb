"""Branches of one architecture, computed together."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from ...ir.address import printable
from ...ir.edit import Names
from ...ir.errors import UsageError
from ...ir.scopes import Scope, scopes
from ...ir.shapes import infer_shapes
from ..base import Context, Effect, Pass, register
from ..ledger import Change
from ..selection import NOTHING, Selection, left_out
from .branches import LAYERS, Nodes, Region, Site, Step, Unlike, name, quantized, starts, unhandled
from .branches_costs import Decide, Verdict, verdicts
from .branches_fuse import fuse
from .branches_rules import rule


@register("fuse-branches")
class FuseBranches(Pass):
    """Compute branches of one architecture together, as one wide network.

    For what `ensemble` and `merge-parallel` make of members of one architecture: where layers that are built alike read
    one value, they become one, and so on forward while all branches match. Convolutions become a grouped one on
    channels side by side; matrix products a grouped 1x1 convolution over the samples. What stands between them
    (activations, BatchNormalization, pools, sums, shapes) works on all branches at once, and a sum, mean or weighted
    sum that ends them is part of it. Where branches end or differ, and before a minimum or maximum, they are split.

    `when=faster` fuses what a table of measured times says is faster, for one sample a run where the batch is open;
    `when=always` whatever fits. With `timing=measure` the model is timed on this machine with and without each set of
    branches, and the JSON report says what they took; `decisions` names such a report, to decide by it again without
    the clock. ``only`` and ``keep`` choose among layers.

    Rounding: sums of products are taken in another order, and those of a combination that became part of the last
    layer too. Where a value of one branch is infinite, a neighbour that shares its group of channels may get NaN. Fused
    matrix products take one sample at least, for ONNX Runtime refuses convolutions of no pixels.
    """

    when: Literal["faster", "always"] = "faster"
    timing: Literal["table", "measure"] = "table"
    decisions: str | None = None
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def validate(self) -> None:
        if self.timing == "measure" and self.decisions is not None:
            raise UsageError(
                "fuse-branches: timing=measure and decisions=FILE exclude each other; FILE is what was measured."
            )
        if self.when == "always" and (self.timing == "measure" or self.decisions is not None):
            raise UsageError("fuse-branches: when=always fuses whatever fits, so there is nothing to time.")

    def effect(self) -> Effect:
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        self.only.require_matches(model, "only")
        self.keep.require_matches(model, "keep")
        timed: list[Change] = []
        if self.when == "always":
            found = self._walk(model, ctx, lambda region, scope: Verdict(True))
        else:
            found = self._walk(model, ctx, verdicts(self.timing, self.decisions, model, ctx, self._walk, timed))
        if ctx.ledger.changes:
            ctx.ledger.changes[:0] = timed
        if not found and not ctx.ledger.skips:
            ctx.skip("model", "there are no branches: no value is read by two Conv, Gemm or MatMul layers built alike")

    def _walk(self, model: ir.Model, ctx: Context, decide: Decide) -> int:
        """Fuse what ``decide`` says; -> how many regions there were."""
        infer_shapes(model)
        names, found = Names(model), 0
        for scope in scopes(model):
            if scope.function is not None:
                for value, sets, _ in starts(scope):
                    for nodes in sets:
                        ctx.skip(scope.address(value), f"read by {len(nodes)} layers alike, in a function: left apart")
                continue
            for value, count in quantized(scope):
                ctx.skip(scope.address(value), f"read by {count} quantized branches, which stay apart: on integers")
            for value, kind, count in unhandled(scope):
                ctx.skip(scope.address(value), f"read by {count} {kind}, which stay apart: there is no rule for these")
            for value, sets, others in starts(scope):
                for nodes in others:
                    ctx.skip(_address(scope, nodes[0]), _alone(value, nodes[0]))
                for nodes in sets:
                    found += self._region(value, nodes, scope, names, ctx, decide)
        return found

    def _region(self, value: ir.Value, nodes: Nodes, scope: Scope, names: Names, ctx: Context, decide: Decide) -> int:
        chosen = [node for node in nodes if node.graph is not None]
        for node in chosen:
            if reason := self._left_out(node):
                ctx.skip(_address(scope, node), reason)
        chosen = [node for node in chosen if not self._left_out(node)]
        if len(chosen) < 2:
            return 0
        try:
            region = Region.grown(value, tuple(chosen), scope, self._rule)
        except Unlike as why:
            ctx.skip(_address(scope, chosen[0]), f"it and {len(chosen) - 1} like it are left apart: {why}")
            return 0
        verdict = decide(region, scope)
        if not verdict.fused:
            ctx.skip(scope.prefix + region.subject, verdict.reason)
            return 1
        left = [(_address(scope, thing), reason) for thing, reason in region.left]
        count, layers, text = region.count, len(region.layers), str(region)
        before, after = fuse(region, scope, names)
        ctx.change(
            scope.prefix + region.subject,
            f"{count} branches fused: {text}",
            branches=count,
            layers=layers,
            nodes_before=before,
            nodes=after,
            **verdict.numbers,
        )
        for subject, reason in left:
            ctx.skip(subject, reason)
        return 1

    def _rule(self, site: Site) -> Step:
        if site.node.op_type in LAYERS:
            for node in site.nodes:
                if reason := self._left_out(node):
                    raise Unlike(reason)
        return rule(site)

    def _left_out(self, node: ir.Node) -> str | None:
        """A layer is chosen by its own name or operator, or by that of its weight."""
        weight = node.inputs[1]
        if weight is not None and weight in self.keep:
            return left_out(weight, NOTHING, self.keep)
        if self.only and weight is not None and weight in self.only:
            return left_out(node, NOTHING, self.keep)
        return left_out(node, self.only, self.keep)


def _alone(value: ir.Value, node: ir.Node) -> str:
    return f"no other layer that reads '{printable(value.name or '')}' is built like {node.op_type} '{name(node)}'"


def _address(scope: Scope, thing: ir.Node | ir.Value) -> str:
    """Of a node without a name that of its output."""
    return scope.prefix + name(thing) if isinstance(thing, ir.Node) else scope.address(thing)
