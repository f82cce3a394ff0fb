"""What branches are combined by at their end: sums, weighted sums and means, and Concat.

A sum of what a layer of each branch gives is that layer with the inputs of all branches beside each other and no
groups: the last layer and the combination are one Conv. Otherwise it is a reduction over an axis of branches. Both
add in another order than the nodes that they stand for: rounding, no more. Min and Max stay nodes of their own behind
a Split, for they keep a NaN, and ONNX Runtime's ReduceMin and ReduceMax drop it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_array
from ...ir.scopes import Scope
from .branches import Nodes, Stack, attributes, channels, rank
from .branches_build import Builder, Form, one_row
from .branches_rules import Layer

_SUMS = ("Add", "Sum", "Mean")
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)  # what ONNX Runtime's ReduceSum takes
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Tail:
    """``nodes`` make ``result`` of a stack; for a sum, each branch counts with its factor.

    They fit the dtype of the stack, and are 1 where that is one of integers.
    """

    stack: Stack
    kind: Literal["sum", "beside"]
    nodes: Nodes
    result: ir.Value
    factors: tuple[float, ...] = ()

    def build(self, builder: Builder) -> ir.Value:
        """From the stack, which is held already."""
        value, count, each = builder.beside(self.stack), len(self.stack), channels(self.stack[0])
        if self.kind == "beside":
            return value
        apart = builder.reshape(value, [-1, count, each])
        dtype = self.stack[0].dtype
        assert dtype is not None
        factors = np.array(self.factors, dtype.numpy())
        narrow = dtype == ir.DataType.FLOAT16 and set(self.factors) != {1}  # a sum might not fit where its mean does
        if len(set(self.factors)) > 1 or narrow:
            apart = builder.node("Mul", [apart, builder.array(factors[:, None], "factors")])
            return _summed(builder, apart)
        total = _summed(builder, apart)
        return total if factors[0] == 1 else builder.node("Mul", [total, builder.array(factors[:1], "factor")])

    def build_layer(self, builder: Builder, layer: Layer) -> ir.Value:
        """With the layer that makes the stack, in one."""
        form, value = layer.build(builder)
        if form is Form.BESIDE:
            return value
        return builder.rows(value, channels(self.stack[0]), one_row(self.stack))


def _summed(builder: Builder, value: ir.Value) -> ir.Value:
    """Over axis 1 of three."""
    if builder.scope.version >= 13:
        return builder.node("ReduceSum", [value, builder.ints([1], "axes")], keepdims=0)
    return builder.node("ReduceSum", [value], axes=[1], keepdims=0)


def tail_of(stack: Stack, scope: Scope) -> Tail | None:
    """The combination of all values of a stack, if nothing else reads them; of a sum with all factors around it."""
    if len(set(stack)) < len(stack):
        return None
    beside = _concat(stack, scope)
    if beside is not None:
        return beside
    dtype = stack[0].dtype
    if dtype in _INTEGERS:
        gathered = _gathered(list(stack), scope)  # factors, and a division by how many there are, would round
        return None if gathered is None else Tail(stack, "sum", tuple(gathered[0]), gathered[1], (1.0,) * len(stack))
    if dtype not in _FLOATS:
        return None
    parts: dict[ir.Value, float] = {}
    nodes: list[ir.Node] = []
    for value in stack:
        scaled = _scaled(value, scope)
        parts[value if scaled is None else scaled[0].outputs[0]] = 1.0 if scaled is None else scaled[1]
        nodes += [] if scaled is None else [scaled[0]]
    gathered = _gathered(list(parts), scope)
    if gathered is None:
        return None
    combining, result = gathered
    nodes += combining
    factor = 1 / len(stack) if combining[0].op_type == "Mean" else 1.0
    while (scaled := _scaled(result, scope)) is not None:
        nodes.append(scaled[0])
        factor, result = factor * scaled[1], scaled[0].outputs[0]
    factors = tuple(by * factor for by in parts.values())
    return Tail(stack, "sum", tuple(nodes), result, factors) if _fit(factors, dtype) else None


def _fit(factors: tuple[float, ...], dtype: ir.DataType) -> bool:
    """Whether a dtype holds products of factors that it held one by one."""
    limits = np.finfo(dtype.numpy())
    return all(by == 0 or float(limits.tiny) <= abs(by) <= float(limits.max) for by in factors)


def _only_reader(value: ir.Value, scope: Scope) -> ir.Node | None:
    """The node of the graph that alone reads a value, once."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0][0].graph is not scope.graph or uses[0][0].domain:
        return None
    return uses[0][0]


def _scaled(value: ir.Value, scope: Scope) -> tuple[ir.Node, float] | None:
    """A Mul or Div by one number behind a value."""
    node = _only_reader(value, scope)
    if node is None or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    other = node.inputs[1 if node.inputs[0] is value else 0]
    array = constant_array(other)
    if array is None or array.size != 1 or array.ndim > 1 or (node.op_type == "Div" and node.inputs[0] is not value):
        return None
    number = float(array.reshape(())[()])
    if node.op_type == "Div":
        return (node, 1 / number) if number else None
    return node, number


def _gathered(parts: list[ir.Value], scope: Scope) -> tuple[list[ir.Node], ir.Value] | None:
    """One node, or a row of nodes of one operator, that adds each part once; and the total."""
    pending, nodes, total = dict.fromkeys(parts), list[ir.Node](), parts[0]
    del pending[total]
    while pending:
        node = _only_reader(total, scope)
        if node is None or node.op_type not in _SUMS or (nodes and node.op_type != nodes[0].op_type):
            return None
        others = [value for value in node.inputs if value is not total]
        if not others or len(others) + 1 != len(node.inputs) or len(set(others)) < len(others):
            return None
        if node.op_type == "Mean" and len(others) + 1 != len(parts):
            return None
        for value in others:
            if value not in pending or _only_reader(value, scope) is not node:
                return None
            del pending[value]
        nodes.append(node)
        total = node.outputs[0]
    return nodes, total


def _concat(stack: Stack, scope: Scope) -> Tail | None:
    node = _only_reader(stack[0], scope)
    if node is None or node.op_type != "Concat" or tuple(node.inputs) != stack:
        return None
    axis = attributes(node, scope.version).get("axis")
    if (
        not isinstance(axis, int)
        or axis % rank(stack[0]) != 1
        or any(_only_reader(one, scope) is None for one in stack)
    ):
        return None
    return Tail(stack, "beside", (node,), node.outputs[0])
