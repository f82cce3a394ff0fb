"""Putting a region of branches into a graph as one: new nodes in place of those of the branches."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ...ir.edit import Names, replace_uses
from ...ir.references import replace_all_uses
from ...ir.scopes import Scope
from ...ir.unused import discard
from .branches import Region, Stack, Step, rank
from .branches_build import Builder
from .branches_rules import Action, Layer
from .branches_tails import Tail, tail_of


@dataclass(frozen=True, eq=False)
class Ends:
    """Where a region ends: combinations that become part of it, and those that become part of its last layer."""

    tails: list[Tail]
    layers: dict[Stack, Tail]

    @property
    def nodes(self) -> set[ir.Node]:
        return {node for tail in (*self.tails, *self.layers.values()) for node in tail.nodes}

    def covers(self, step: Step) -> bool:
        """Whether a step is part of a combination: the factors of a weighted sum."""
        return not self.nodes.isdisjoint(step.nodes)


def ends(region: Region, scope: Scope) -> Ends:
    """A sum of what a layer makes is that layer's; other combinations are reductions, of matrices only."""
    found = Ends([], {})
    for step in region.steps:
        tail = None if found.covers(step) else tail_of(step.outputs, scope)
        if tail is None:
            continue
        if tail.kind == "sum" and isinstance(step.action, Layer) and step.action.summed(tail.factors) is not None:
            found.layers[step.outputs] = tail
        elif rank(step.outputs[0]) == 2 or tail.kind == "beside":
            found.tails.append(tail)
    return found


def fuse(region: Region, scope: Scope, names: Names) -> tuple[int, int]:
    """Replace the branches; -> how many nodes there were, and how many there are instead."""
    last, builder = ends(region, scope), Builder(scope, names, region.value)
    replaced: list[tuple[ir.Value, ir.Value]] = []
    for step in region.steps:
        if last.covers(step):
            continue
        tail = last.layers.get(step.outputs)
        if tail is None:
            action: Action = step.action  # type: ignore[assignment]
            builder.hold(step.outputs, *action.build(builder))
            continue
        assert isinstance(step.action, Layer)
        layer = step.action.summed(tail.factors)
        assert layer is not None
        replaced.append((tail.result, tail.build_layer(builder, layer)))
    replaced += [(tail.result, tail.build(builder)) for tail in last.tails]
    inside = region.nodes | last.nodes
    for step in region.steps:
        if any(_is_read_outside(value, inside) for value in step.outputs):
            replaced += zip(step.outputs, builder.split(step.outputs), strict=True)
    _put_in(builder, replaced, inside, names)
    return len(inside), len(builder.nodes)


def _is_read_outside(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(node not in inside for node, _ in value.uses())


def _put_in(builder: Builder, replaced: list[tuple[ir.Value, ir.Value]], inside: set[ir.Node], names: Names) -> None:
    graph = builder.scope.graph
    graph.extend(builder.nodes)
    for old, new in replaced:
        new.type, new.shape = old.type, None if old.shape is None else old.shape.copy()
        if old.is_graph_output():
            replace_uses(old, new, names)
        else:
            replace_all_uses(old, new)
    old_nodes = [node for node in graph if node in inside]
    graph.sort()
    discard([value for node in reversed(old_nodes) for value in node.outputs])
