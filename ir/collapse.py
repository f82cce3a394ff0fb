"""Branches of joined models that compute the same from the same, found by value numbering and kept once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from .constants import constant_tensor
from .references import is_annotated, is_named, replace_all_uses
from .sparse import SparseTensor
from .tensors import held
from .unused import take_out

_RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")
)
_TOLD = 7  # the first opset whose Dropout does nothing unless it is told to train
_KNOWN = ("", "ai.onnx.ml", "com.microsoft")  # domains whose other operators give the same for the same
_MOST = 1 << 20  # bytes of a constant that are compared; larger ones are held once already where they are equal


def collapse(model: ir.Model, branches: Sequence[Sequence[ir.Node]]) -> dict[ir.Value, ir.Value]:
    """Drop nodes of the main graph that compute what a node of an earlier branch does; -> new values by old ones.

    ``branches`` are the nodes of each joined model, in order. Equal are operators with equal attributes, bodies
    included, that read equal values; constants are equal by content. A DequantizeLinear is dropped only with all that
    reads it, for ONNX Runtime fuses it only where that is so; what is computed of constants alone likewise. Random
    operators, and those of unknown domains, stay. Outputs of the graph are to be replaced by the caller.
    """
    numbering = _Numbering(model)
    twins: dict[ir.Node, ir.Node] = {}
    seen: dict[Hashable, tuple[int, ir.Node]] = {}
    for place, nodes in enumerate(branches):
        for node in nodes:
            key = numbering.key(node)
            if key is None:
                continue
            where, first = seen.setdefault(key, (place, node))
            if first is node or first.graph is not node.graph:
                continue
            for old, new in zip(node.outputs, first.outputs, strict=True):
                numbering.equate(old, new)  # also of one branch, which keeps both
            if where < place:
                twins[node] = first
    outputs = set(model.graph.outputs)
    return _drop(twins, [node for nodes in branches for node in nodes], numbering, outputs)


def _drop(
    twins: Mapping[ir.Node, ir.Node], order: Sequence[ir.Node], numbering: _Numbering, outputs: set[ir.Value]
) -> dict[ir.Value, ir.Value]:
    going: dict[ir.Node, None] = {}
    for node in reversed(order):
        if node not in twins:
            continue
        hangs = node.op_type == "DequantizeLinear" or not numbering.varies(node)
        users = [user for value in node.outputs for user, _ in value.uses()]
        shown = any(value in outputs for value in node.outputs)
        if not hangs or (not shown and all(user in going for user in users)):
            going[node] = None
    moved: dict[ir.Value, ir.Value] = {}
    for node in reversed(list(going)):
        for old, new in zip(node.outputs, twins[node].outputs, strict=True):
            moved[old] = new
            replace_all_uses(old, new)
    graph = next(iter(going)).graph if going else None
    if graph is not None:
        kept = [moved.get(value, value) for value in graph.outputs]
        graph.outputs.clear()
        for node in going:
            take_out(node)
        graph.outputs.extend(dict.fromkeys(kept))
    return moved


class _Numbering:
    """A key for each node: two nodes of one key give equal values in every run."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._same: dict[ir.Value, ir.Value] = {}
        self._varying: dict[ir.Value, bool] = {}
        self._steady: dict[ir.OperatorIdentifier, bool] = {}

    def equate(self, old: ir.Value, new: ir.Value) -> None:
        self._same[old] = new

    def varies(self, node: ir.Node) -> bool:
        """Whether a node computes with an input of the model."""
        return any(self._varying.get(value, False) for value in node.outputs)

    def key(self, node: ir.Node) -> Hashable | None:
        """``None`` for a node that may give other values each time."""
        reads = [value for value in node.inputs if value is not None]
        inner = any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        )
        varies = inner or any(v.is_graph_input() or self._varying.get(v, False) for v in reads)
        for value in node.outputs:
            self._varying[value] = varies
        if any(is_annotated(value) or is_named(value) for value in node.outputs) or node.device_configurations:
            return None
        return self._node(node, {})

    def _node(self, node: ir.Node, local: Mapping[ir.Value, Hashable]) -> Hashable | None:
        if not self._is_steady(node):
            return None
        attributes = []
        for name, attribute in sorted(node.attributes.items()):
            found = self._attribute(node, attribute, local)
            if found is None:
                return None
            attributes.append((name, found))
        inputs = tuple(None if value is None else self._value(value, local) for value in node.inputs)
        made = tuple(value.name != "" for value in node.outputs)
        return node.domain, node.op_type, node.overload, inputs, tuple(attributes), made

    def _value(self, value: ir.Value, local: Mapping[ir.Value, Hashable]) -> Hashable:
        if value in local:
            return local[value]
        tensor = constant_tensor(value)
        if tensor is not None and tensor.nbytes <= _MOST:
            return _content(tensor)
        return self._same.get(value, value)

    def _attribute(self, node: ir.Node, attribute: ir.Attr, local: Mapping[ir.Value, Hashable]) -> Hashable | None:
        if attribute.is_ref():
            return "ref", attribute.ref_attr_name
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            bodies = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
            found = [self._graph(body, local) for body in bodies]
            return None if None in found else tuple(found)
        if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
            assert node.graph is not None
            tensors = [tensor for _, tensor in held(node.graph, node)]
            return tuple(map(_content, tensors))
        return attribute.type.name, repr(attribute.value)

    def _graph(self, graph: ir.Graph, outer: Mapping[ir.Value, Hashable]) -> Hashable | None:
        depth = len(outer)
        local: dict[ir.Value, Hashable] = dict(outer)
        for place, value in enumerate(graph.inputs):
            local[value] = "input", depth, place
        for value in graph.initializers.values():
            if value not in local:
                assert value.const_value is not None
                local[value] = _content(value.const_value)
        lines = []
        for place, node in enumerate(graph):
            line = self._node(node, local)
            if line is None:
                return None
            lines.append(line)
            for port, value in enumerate(node.outputs):
                local[value] = "node", depth, place, port
        return len(graph.inputs), tuple(lines), tuple(self._value(value, local) for value in graph.outputs)

    def _is_steady(self, node: ir.Node) -> bool:
        key = node.op_identifier()
        if key in self.model.functions:
            if key not in self._steady:
                self._steady[key] = False  # of one that calls itself
                self._steady[key] = all(map(self._is_steady, self.model.functions[key].all_nodes()))
            return self._steady[key]
        return node.domain in _KNOWN and (node.op_type not in _RANDOM or self._passes(node))

    def _passes(self, node: ir.Node) -> bool:
        """Whether it is a Dropout that does nothing, for it is not told that this is training."""
        new = self.model.opset_imports.get("", 0) >= _TOLD
        return node.op_type == "Dropout" and new and (len(node.inputs) < 3 or node.inputs[2] is None)


def _content(tensor: ir.TensorProtocol) -> Hashable:
    """What a tensor holds; of a large one, and of a sparse one, the tensor itself."""
    if tensor.nbytes > _MOST or isinstance(tensor, SparseTensor):
        return id(tensor)
    kind: tuple[Any, ...] = (tensor.dtype, tuple(tensor.shape.numpy()))
    if tensor.dtype == ir.DataType.STRING:
        return *kind, tuple(bytes(word) for word in tensor.numpy().flat)
    return *kind, tensor.tobytes()
