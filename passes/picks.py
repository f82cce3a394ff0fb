"""Outputs that hold what a model picks by its own numbers, as detectors do, and what tells more of how near they are.

TopK sorts rows by score and NonMaxSuppression leaves some: the least change of a score moves rows, or changes how many
there are, so outputs behind them cannot be compared place by place. What is picked from and by can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ..ir.address import bodies
from ..ir.constants import is_constant
from ..ir.ops import operator
from ..ir.shapes import infer_shapes

_LEAVING = ("NonMaxSuppression", "NonZero", "Compress")
_PICKING = ("TopK", *_LEAVING)


@dataclass(frozen=True)
class Picks:
    """``outputs`` of the main graph lie behind ``nodes`` that pick; ``values`` are the floats before these, by name.

    ``gathers``: rows of something else are picked by the scores, so that these are none of classes.
    """

    nodes: tuple[str, ...]
    outputs: frozenset[str]
    types: Mapping[str, ir.TypeProtocol | None]
    gathers: bool

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.types)

    def show(self, model: ir.Model) -> ir.Model:
        """A copy of ``model`` that gives out the values too, behind its own outputs."""
        made = model.clone()
        made.meta.update(model.meta)
        known = {value.name: value for node in made.graph for value in node.outputs}
        for name in self.values:
            known[name].type = self.types[name]
            made.graph.outputs.append(known[name])
        return made

    def hide(self, model: ir.Model) -> None:
        """Take the values from the outputs again."""
        kept = [value for value in model.graph.outputs if value.name not in self.values]
        model.graph.outputs.clear()
        model.graph.outputs.extend(kept)

    def __str__(self) -> str:
        return f"judged by {', '.join(self.values)}, before {', '.join(self.nodes)}"


def picks(model: ir.Model) -> Picks | None:
    """The picks of ``model`` behind which no layer comes; ``None`` where there are none."""
    if not any(node.op_type in _PICKING for node in model.graph):
        return None
    model = model.clone()
    infer_shapes(model)
    behind_layers: set[ir.Value] = set()
    behind: set[ir.Value] = set()
    picking: list[ir.Node] = []
    nodes: list[ir.Node] = []
    for node in model.graph:
        layer, read = any(map(_is_layer, _all(node))), _reads(node)
        if behind.intersection(read):
            if layer:
                return None
        elif node.op_type in _PICKING and not node.domain and behind_layers.intersection(read):
            picking.append(node)
        else:
            if layer or behind_layers.intersection(read):
                behind_layers.update(node.outputs)
            continue
        nodes.append(node)
        behind.update(node.outputs)
    outputs = [value for value in model.graph.outputs if value in behind]
    values = dict.fromkeys(
        found
        for node in nodes
        for value in _reads(node)
        if value in behind_layers
        for found in _floats(value, behind_layers)
    )
    own = set(model.graph.outputs)
    if not outputs or not values:
        return None
    return Picks(
        tuple(f"{node.op_type} '{node.name or node.outputs[0].name}'" for node in picking),
        frozenset(value.name or "" for value in outputs),
        {value.name or "": value.type for value in values if value not in own},
        gathers=any(node.op_type.startswith("Gather") or node.op_type in _LEAVING for node in nodes),
    )


def _floats(value: ir.Value, among: set[ir.Value]) -> Iterator[ir.Value]:
    """``value``, or where it is not of floats those that it is made of, as what is past a threshold is."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        one = waiting.pop()
        node = one.producer()
        if one in seen or one not in among or node is None:
            continue
        seen.add(one)
        if one.dtype is None or one.dtype.is_floating_point():
            yield one
        else:
            waiting += [read for read in node.inputs if read is not None]


def _is_layer(node: ir.Node) -> bool:
    return any(
        port.index < len(node.inputs) and is_constant(node.inputs[port.index]) for port in operator(node).matrices
    )


def _all(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and those of its bodies."""
    yield node
    for _, body in bodies(node):
        yield from body.all_nodes()


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, and its bodies of the graphs around them."""
    return [value for one in _all(node) for value in one.inputs if value is not None]
