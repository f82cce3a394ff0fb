"""Outputs that hold what a model picks by its own numbers, as detectors do, and what tells more of how near they are.

TopK sorts rows by score and NonMaxSuppression leaves some: the least change of a score moves rows, or changes how many
there are, so outputs behind them cannot be compared place by place. What is picked from and by can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ..ir.address import bodies
from ..ir.constants import constant_tensor
from ..ir.ops import operator
from ..ir.shapes import infer_shapes

_LEAVING = ("NonMaxSuppression", "NonZero", "Compress")
_PICKING = ("TopK", *_LEAVING)
_NO_FLOATS = (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING)
_FEW = 16  # floats of a constant that are no weights: a scale of boxes, a threshold


@dataclass(frozen=True)
class Picks:
    """``outputs`` of the main graph lie behind ``nodes`` that pick; ``values`` are the floats before these, by name.

    Those that are no outputs have their types in ``types``. ``gathers``: rows of something else are picked by the
    scores, so that these are none of classes.
    """

    nodes: tuple[str, ...]
    outputs: frozenset[str]
    values: tuple[str, ...]
    types: Mapping[str, ir.TypeProtocol | None]
    gathers: bool

    def show(self, model: ir.Model) -> ir.Model:
        """A copy of ``model`` that gives out the values too, behind its own outputs."""
        made = model.clone()
        made.meta.update(model.meta)
        known = {value.name: value for node in made.graph for value in node.outputs}
        for name, kind in self.types.items():
            known[name].type = kind
            made.graph.outputs.append(known[name])
        return made

    def hide(self, model: ir.Model) -> None:
        """Take the values from the outputs again."""
        kept = [value for value in model.graph.outputs if value.name not in self.types]
        model.graph.outputs.clear()
        model.graph.outputs.extend(kept)

    def __str__(self) -> str:
        return f"judged by {', '.join(self.values)}, before {', '.join(self.nodes)}"


def picks(model: ir.Model) -> Picks | None:
    """The picks of ``model``, where nothing comes behind them that has weights; ``None`` where there are none.

    Behind a pick may be what moves, compares and computes element by element or by rows: no layer, no table, no node
    with bodies, no function, nothing that is not known.
    """
    if not any(node.op_type in _PICKING for node in model.graph):
        return None
    model = model.clone()
    infer_shapes(model)
    weights = _weights(model)
    made: set[ir.Value] = set()  # by layers, and by what reads that
    behind: set[ir.Value] = set()
    nodes: list[ir.Node] = []
    for node in model.graph:
        read = _reads(node)
        picking = node.op_type in _PICKING and not node.domain and made.intersection(read)
        if picking or behind.intersection(read):
            if not _is_light(node, model) or weights.intersection(read):
                return None
            nodes.append(node)
            behind.update(node.outputs)
        elif made.intersection(read) or weights.intersection(read) or operator(node).matrices:
            made.update(node.outputs)
    values = list(dict.fromkeys(found for node in nodes for value in _reads(node) for found in _floats(value, made)))
    outputs = frozenset(value.name or "" for value in model.graph.outputs if value in behind)
    if not outputs or not values:
        return None
    return Picks(
        tuple(f"{one.op_type} '{one.name or one.outputs[0].name}'" for one in nodes if one.op_type in _PICKING),
        outputs,
        tuple(value.name or "" for value in values),
        {value.name or "": value.type for value in values if not value.is_graph_output()},
        any(node.op_type in _LEAVING or (_gathers(node) and node.inputs[0] in made) for node in nodes),
    )


def _weights(model: ir.Model) -> set[ir.Value]:
    """Constants of more than a few floats, or of integers that may stand for floats, and what is computed of these."""
    held = (*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs))
    found = {value for value in held if _is_weight(value)}
    for node in model.graph:
        if found.intersection(node.inputs) and all(
            one is None or one in found or _is_fixed(one) for one in node.inputs
        ):
            found.update(node.outputs)
    return found


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else constant_tensor(value)
    return tensor is not None and tensor.size > _FEW and tensor.dtype not in _NO_FLOATS


def _is_fixed(value: ir.Value) -> bool:
    return value.is_initializer() or constant_tensor(value) is not None


def _is_light(node: ir.Node, model: ir.Model) -> bool:
    entry = operator(node)
    own = node.op_identifier() not in model.functions
    return own and entry.known and not entry.matrices and not entry.control


def _gathers(node: ir.Node) -> bool:
    return node.op_type.startswith("Gather") and not node.domain


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
            waiting += _reads(node)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, and its bodies of the graphs around them."""
    inner = (one for _, body in bodies(node) for one in body.all_nodes())
    return [value for one in (node, *inner) for value in one.inputs if value is not None]
