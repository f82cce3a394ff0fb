"""Names that every tool can live with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx_ir as ir

from ...ir.edit import Names
from ...ir.references import renaming
from ...ir.scopes import Scope, scopes, values
from ..base import Context, Pass, register


@register("unify-names")
class UnifyNames(Pass):
    """Give every node and value a name of its own, without control characters.

    Unique over the main graph and all its bodies, and within each function. Inputs and outputs of the model keep their
    names. Of two that share a name the first keeps it.
    """

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Walks all graphs once; a value and a node may share a name."""
        with renaming(model):
            self.rename(model, ctx)

    def rename(self, model: ir.Model, ctx: Context) -> None:
        kept = dict.fromkeys([*model.graph.inputs, *model.graph.outputs])
        for value in kept:
            if _clean(value.name or "") != value.name:
                ctx.skip(value, "an input or output of the model, whose name is its interface")
        names = functools.cache(lambda: Names(model))  # made when the first is needed, once for all functions
        tree: object = self
        for scope in scopes(model):
            if scope.function is not tree:
                tree = scope.function
                known = _Known(names, {value.name or "" for value in kept} if tree is None else set())
            known.values(scope, kept, ctx)
            known.nodes(scope, ctx)


class _Known:
    """The names met so far in one tree of graphs."""

    def __init__(self, names: Callable[[], Names], taken: set[str]) -> None:
        self.names = names
        self.taken = taken
        self.node_names: set[str] = set()

    def values(self, scope: Scope, kept: dict[ir.Value, None], ctx: Context) -> None:
        taken = self.taken
        for value in [*values(scope.graph)]:
            name = value.name
            if name and name not in taken and name.isprintable():
                taken.add(name)
            elif value not in kept and (name != "" or value.uses() or value.is_graph_output()):
                value.name = self.fresh(_clean(name or "") or _stem(value))
                taken.add(value.name)
                ctx.change(scope.address(value), f"value renamed, {_fault(name)}")

    def nodes(self, scope: Scope, ctx: Context) -> None:
        taken = self.node_names
        for node in scope.graph:
            name = node.name
            if name and name not in taken and name.isprintable():
                taken.add(name)
            else:
                node.name = self.fresh(_clean(name or "") or node.op_type)
                taken.add(node.name)
                ctx.change(scope.address(node), f"node renamed, {_fault(name)}")

    def fresh(self, stem: str) -> str:
        return self.names().fresh(stem)


def _stem(value: ir.Value) -> str:
    node = value.producer()
    return "value" if node is None else f"{_clean(node.name or '') or node.op_type}_output"


def _fault(name: str | None) -> str:
    """What was wrong with a name."""
    if not name:
        return "for it had no name"
    return "for another has that name" if name.isprintable() else "for its name held control characters"


def _clean(name: str) -> str:
    return name if name.isprintable() else "".join(c if c.isprintable() else "_" for c in name)
