"""What nothing uses: nodes, initializers, functions, optional outputs."""

from __future__ import annotations

import functools

import onnx_ir as ir

from ...ir.address import function_prefix
from ...ir.references import leave
from ...ir.scopes import Scope, scopes
from ...ir.unused import discard, is_idle, take_out
from ..base import Context, Pass, register

_WHY = "removed, for nothing uses it"


@register("remove-dead-code")
class RemoveDeadCode(Pass):
    """Remove nodes, initializers and functions that nothing uses; leave out optional outputs that nothing uses.

    In bodies and functions too. Inputs and outputs of graphs stay.
    """

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Innermost graphs first, each from its end, so that one walk finds everything."""
        found = list(scopes(model))
        for scope in reversed(found):
            _nodes(scope, ctx)
        for scope in found:
            for gone in discard(reversed(list(scope.graph.initializers.values())))[1]:
                ctx.change(scope.address(gone), _WHY)
        _functions(model, ctx)


def _nodes(scope: Scope, ctx: Context) -> None:
    for node in reversed(scope.graph):
        outputs = node.outputs
        if all(map(is_idle, outputs)):
            take_out(node)
            ctx.change(scope.address(node), _WHY)
        elif len(outputs) > 1 and not node.domain:
            _outputs(node, scope, ctx)


def _outputs(node: ir.Node, scope: Scope, ctx: Context) -> None:
    """An omitted output has an empty name; omitted ones at the end go."""
    if node.op_type == "BatchNormalization" and (scope.version < 14 or "training_mode" in node.attributes):
        return  # whether there are more outputs says whether it trains
    optional = _optional_outputs(node.op_type, scope.version)
    for value, may_go in zip(node.outputs, optional, strict=False):
        if may_go and value.name != "" and is_idle(value):
            if node.sharding_of(value):
                ctx.skip(scope.address(value), "unused, but the node's device configuration names it")
                continue
            leave(value, scope.graph)
            ctx.change(scope.address(value), _WHY)
            value.name = ""
    kept = len(node.outputs)
    while kept > 1 and node.outputs[kept - 1].name == "" and is_idle(node.outputs[kept - 1]):
        kept -= 1
    node.resize_outputs(kept)


@functools.cache
def _optional_outputs(op_type: str, version: int) -> tuple[bool, ...]:
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, max_inclusive_version=version, domain="")
    except onnx.defs.SchemaError:
        return ()
    return tuple(output.option == onnx.defs.OpSchema.FormalParameterOption.Optional for output in schema.outputs)


def _functions(model: ir.Model, ctx: Context) -> None:
    """Those that are not called from the main graph, directly or through others."""
    if not model.functions:
        return
    called: dict[ir.OperatorIdentifier, None] = {}
    waiting: list[ir.Graph | ir.Function] = [model.graph]
    while waiting:
        for node in waiting.pop().all_nodes():
            key = node.op_identifier()
            if key in model.functions and key not in called:
                called[key] = None
                waiting.append(model.functions[key])
    for key, function in list(model.functions.items()):
        if key not in called:
            del model.functions[key]
            ctx.change(function_prefix(function), "removed, for nothing calls it")
