"""What of a graph could run on integers: units, each an operator with what ONNX Runtime fuses into it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ...ir.address import printable
from ...ir.constants import constant_array, constant_tensor, is_constant
from ...ir.kernels import Bounds, fused_activation, integer, matmul_bias
from ...ir.match import attribute
from ...ir.ops import Kind, operator
from ...ir.scopes import Scope
from ...ir.shapes import dims
from ...ir.sparse import SparseTensor
from .dynamic_layers import DECODED, is_decoded
from .filters import REASON, is_filter_bank

Port = tuple[ir.Node, int]

LOGARITHM = "a logarithm is taken of it, and makes much of what rounding does to small numbers"
_NO_LOSS = ("Cast", "HardSigmoid", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
"""Operators of which it is not worth saying that they have no integer kernel."""
_LEAST_SLOPE = 1e-6  # of a HardSigmoid, and one through the greatest


class Role(enum.StrEnum):
    """What a unit does, and so how its values are quantized."""

    LAYER = "layer"  # contracts activations with a constant weight
    ARITHMETIC = "arithmetic"  # computes: each of its values has a scale of its own
    SAME = "same"  # moves or picks: its values share one scale
    CLAMP = "clamp"  # HardSigmoid, which is a change of scale that saturates


@dataclass(eq=False, slots=True)
class Unit:
    """One operator, with the bias and the activation function that its integer kernel takes in.

    ``inputs`` are the ports of the first node that read activations, ``constants`` those that read other operands;
    ``bias`` is the port of whichever node adds it.
    """

    scope: Scope
    role: Role
    nodes: list[ir.Node]
    inputs: list[int]
    constants: list[int] = field(default_factory=list)
    weight: int | None = None
    bias: Port | None = None
    bounds: Bounds | None = None  # of the activation function
    needs_output: bool = True

    @property
    def node(self) -> ir.Node:
        return self.nodes[0]

    @property
    def outputs(self) -> list[ir.Value]:
        return [value for value in self.nodes[-1].outputs if value.uses() or value.is_graph_output()]

    @property
    def read(self) -> list[ir.Value]:
        """The activation at each of its ports."""
        return [_input(self.node, port) for port in self.inputs]

    @property
    def sources(self) -> list[ir.Value]:
        """The activations that it reads, each once."""
        return list(dict.fromkeys(self.read))

    @property
    def address(self) -> str:
        return self.scope.address(self.node)


@dataclass(frozen=True, slots=True)
class Left:
    """A node that cannot run on integers, and why."""

    address: str
    node: ir.Node
    reason: str


def find_units(scope: Scope) -> tuple[list[Unit], list[Left]]:
    """The units of one graph in order, and the layers that are none."""
    units, left, taken = [], [], set[ir.Node]()
    delicate = _before_logarithms(scope.graph)
    for node in scope.graph:
        if node in taken:
            continue
        found = _unit(scope, node)
        if isinstance(found, Unit) and node in delicate:
            found = LOGARITHM
        if isinstance(found, str):
            left.append(Left(scope.address(node), node, found))
        elif found is not None:
            _take_tail(found)
            taken.update(found.nodes)
            units.append(found)
    return units, left


def _before_logarithms(graph: ir.Graph) -> set[ir.Node]:
    """The operators, up to the last layer, of whose results a logarithm is taken."""
    found: set[ir.Node] = set()
    waiting = [node.inputs[0] for node in graph if node.op_type == "Log" and node.domain == ""]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or node in found or node.graph is not graph or (is_layer(node) and not is_filter_bank(node)):
            continue
        found.add(node)
        waiting += node.inputs
    return found


def has_no_kernel(node: ir.Node) -> bool:
    """Whether a node computes floats from activations, and ONNX Runtime has no integer kernel for it; of no layer."""
    if is_layer(node) or operator(node).control or integer(node) is not None or node.op_type in _NO_LOSS:
        return False
    given = any(value is not None and _is_float(value) and not is_constant(value) for value in node.inputs)
    return given and any(map(_is_float, node.outputs))


def is_layer(node: ir.Node) -> bool:
    """Whether the operator contracts activations with weights."""
    return bool(operator(node).matrices)


def _unit(scope: Scope, node: ir.Node) -> Unit | str | None:
    """The unit that begins with ``node``; for a layer that is none the reason, for other nodes None."""
    if node.domain == "" and node.op_type == "HardSigmoid" and _is_float(node.outputs[0]):
        return Unit(scope, Role.CLAMP, [node], [0]) if _is_change_of_scale(node) else None
    kernel = integer(node)
    if is_layer(node):
        if is_filter_bank(node):
            return REASON
        if operator(node).matrices[0].zero_point is not None:
            return "quantized already"
        return _layer(scope, node) if kernel is not None else _no_kernel(node)
    if kernel is None or not _is_float(node.outputs[0]):
        return None
    data = _data_ports(node)
    activations = [port for port in data if not is_constant(_input(node, port))]
    constants = [port for port in data if port not in activations]
    if not activations or not all(_is_small_and_finite(_input(node, port)) for port in constants):
        return None
    if any(_is_unscaled(_input(node, port)) for port in activations):
        return None
    if all(_is_quantized(_input(node, port)) for port in activations):
        return None
    role = Role.SAME if kernel.equal else Role.ARITHMETIC
    if role is Role.SAME and constants:
        return None
    return Unit(scope, role, [node], activations, constants, needs_output=kernel.needs_output)


def _no_kernel(node: ir.Node) -> str:
    dtype = node.outputs[0].dtype
    if operator(node).integer is not None and dtype is not None and dtype is not ir.DataType.FLOAT:
        return f"its values are {dtype.name.lower()}, and integer kernels are for float32"
    form = " of this form" if operator(node).integer is not None else ""
    return f"ONNX Runtime has no integer kernel for {printable(node.op_type)}{form}"


def _layer(scope: Scope, node: ir.Node) -> Unit | str:
    """A Conv, Gemm or MatMul on integers, or why it cannot be."""
    first, second = _input(node, 0), _input(node, 1)
    if not _is_float(node.outputs[0]):
        return "not of float32"
    if constant_tensor(first) is not None:
        return "its first operand is constant"
    if not is_constant(second):
        if second.is_graph_input() and second.is_initializer():
            return "the caller of the model may pass another weight"
        if _is_quantized(first) and _is_quantized(second):
            return "quantized already"
        if is_decoded(second):
            return DECODED
        producer = second.producer()
        if node.op_type == "MatMul" and not (producer is not None and all(map(is_constant, producer.inputs))):
            return Unit(scope, Role.ARITHMETIC, [node], [0, 1], needs_output=_becomes_gemm(node))
        half = producer is not None and producer.op_type == "Cast" and is_constant(producer.inputs[0])
        return "its weight is stored in half precision" if half else "its weight is computed at run time"
    tensor = constant_tensor(second)
    if tensor is None or isinstance(tensor, SparseTensor):
        return "its weight is stored sparse"
    rank = len(tensor.shape)
    if node.op_type == "Conv":
        bias = (node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if bias and not is_constant(node.inputs[2]):
            return "its bias is computed at run time"
        return Unit(scope, Role.LAYER, [node], [0], weight=1, bias=bias)
    if rank != 2:
        return f"a weight of {rank} dimensions has no integer kernel"
    if node.op_type == "Gemm":
        return _gemm(scope, node)
    unit = Unit(scope, Role.LAYER, [node], [0], weight=1, needs_output=False)
    _take_bias(unit, int(tensor.shape.numpy()[1]))
    unit.needs_output = unit.bias is None and _becomes_gemm(node)
    return unit


def _is_quantized(value: ir.Value) -> bool:
    """Whether it goes through integers already."""
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _is_unscaled(value: ir.Value) -> bool:
    """Whether it is a part of quantization that is written out: integers as floats, or a scale that a run finds."""
    producer = value.producer()
    if producer is None or producer.op_type != "Cast":
        return producer is not None and producer.op_type == "DynamicQuantizeLinear"
    source = producer.inputs[0]
    return source is not None and source.dtype is not None and source.dtype.is_integer()


def _becomes_gemm(node: ir.Node) -> bool:
    """Whether ONNX Runtime merges a MatMul and the Add behind it to a Gemm in float, unless integers are in between."""
    return matmul_bias(node) is not None


def _is_change_of_scale(node: ir.Node) -> bool:
    """Whether a HardSigmoid rises, and at 0 lies within [0, 1], so that a scale and a zero point say it."""
    alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
    return _LEAST_SLOPE <= alpha <= 1 / _LEAST_SLOPE and 0 <= beta <= 1


def _is_small_and_finite(value: ir.Value) -> bool:
    array = constant_array(value)
    return array is not None and bool(np.isfinite(array).all())


def _gemm(scope: Scope, node: ir.Node) -> Unit | str:
    bias: Port | None = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        known = constant_tensor(node.inputs[2])
        if known is None or tuple(known.shape.numpy()) != (_channels(node),):
            return "its bias is not one number for each output channel"
        bias = (node, 2)
    return Unit(scope, Role.LAYER, [node], [0], weight=1, bias=bias, needs_output=False)


def _take_bias(unit: Unit, channels: int) -> None:
    """The Add of a constant row behind a MatMul is its bias."""
    reader = _only_reader(unit.node.outputs[0])
    if reader is None or reader.op_type != "Add" or reader.domain or reader.graph is not unit.scope.graph:
        return
    port = next((port for port, value in enumerate(reader.inputs) if value is not unit.node.outputs[0]), None)
    tensor = None if port is None else constant_tensor(reader.inputs[port])
    rank = None if (shape := dims(unit.node.outputs[0])) is None else len(shape)
    if tensor is not None and rank is not None and tuple(tensor.shape.numpy()) in _rows(channels, rank):
        assert port is not None
        unit.nodes.append(reader)
        unit.bias = (reader, port)


def _take_tail(unit: Unit) -> None:
    """The activation function behind a unit, where the QuantizeLinear behind it takes it in."""
    if unit.role is Role.SAME or len(unit.nodes[-1].outputs) != 1:
        return
    last = unit.nodes[-1]
    reader = _only_reader(last.outputs[0])
    if reader is None or reader.graph is not unit.scope.graph:
        return
    bounds = fused_activation(last, reader)
    # From 0 on, the zero point is the lowest integer, and the scale fits exactly.
    if bounds is not None and bounds.low == 0 < bounds.high:
        unit.bounds, unit.needs_output = bounds, True
        unit.nodes.append(reader)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return None if len(uses) != 1 or value.is_graph_output() else uses[0].node


def _rows(channels: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of a row of ``channels`` numbers that broadcast over a product of this rank without widening it."""
    return [(1,) * ones + (channels,) for ones in range(rank)]


def _channels(node: ir.Node) -> int:
    """The output channels of a Gemm or MatMul with a constant matrix."""
    tensor = constant_tensor(node.inputs[1])
    assert tensor is not None
    return int(tensor.shape.numpy()[0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1])


def _data_ports(node: ir.Node) -> list[int]:
    """The ports of ``node`` that read float data, and not settings."""
    settings = (Kind.SHAPE, Kind.INDEX, Kind.SCALE, Kind.ZERO_POINT)
    entry = operator(node)
    return [
        port
        for port, value in enumerate(node.inputs)
        if value is not None and entry.port(port).kind not in settings and _is_float(value)
    ]


def _is_float(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype is ir.DataType.FLOAT


def _input(node: ir.Node, port: int) -> ir.Value:
    value = node.inputs[port]
    assert value is not None
    return value


def readers(value: ir.Value) -> Iterator[Port]:
    """Every node and port that reads ``value``."""
    yield from ((use.node, use.idx) for use in value.uses())
