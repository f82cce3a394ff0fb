"""What ONNX Runtime's CPU provider runs in integer kernels, where the ``Integer`` column of ``ops`` alone cannot say.

    integer(node)               # how this very node runs on int8: its attributes and types considered
    integer_inputs(node)        # which of its inputs then have to come from a DequantizeLinear
    bounds(node)                # Relu, Clip: what the QuantizeLinear after it must stay within for it to vanish
    matmul_bias(node)           # the Add that ONNX Runtime makes the bias of a MatMul

Measured with 1.31; tests build each row as a tiny model and count the kernels of the installed version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .address import printable
from .affine import Affine
from .constants import constant_array, is_constant
from .ops import Integer, Kind, operator

__all__ = [
    "Bias",
    "Bounds",
    "bounds",
    "fused_activation",
    "integer",
    "integer_inputs",
    "matmul_bias",
    "moves_along",
    "obstacle",
    "weight_axis",
]

_EPSILON = float(np.finfo(np.float32).eps)  # that ONNX Runtime forgives a bound, in absolute terms
_MOVED_ALONG = ("Reshape", "Transpose", "MaxPool", "Slice", "Identity", "Squeeze", "Unsqueeze")


def integer(node: ir.Node) -> Integer | None:
    """How ONNX Runtime runs ``node`` on int8 between DequantizeLinear and QuantizeLinear; None where it does not.

    Unknown types and shapes get the benefit of the doubt.
    """
    found = operator(node).integer
    if found is None or any(not _is_float(node.inputs[index]) for index in integer_inputs(node)):
        return None
    refuses = _REFUSES.get(node.op_type)
    return None if refuses is not None and refuses(node) else found


def integer_inputs(node: ir.Node) -> tuple[int, ...]:
    """The inputs, by index, that have to come from a DequantizeLinear for ``node`` to run on int8; biases are not."""
    if node.op_type == "Where":
        return (1, 2)
    kinds = (Kind.OPERAND, Kind.MATRIX, Kind.EMBEDDING, Kind.TABLE)
    entry = operator(node)
    return tuple(
        index for index, value in enumerate(node.inputs) if value is not None and entry.port(index).kind in kinds
    )


def weight_axis(node: ir.Node, index: int = 1) -> int | None:
    """The axis of the weight at this input along which its scales may run; None where it may have one scale only.

    That of the output channels. Scales along the input channels are taken for these in silence, and the results are
    wrong; a matrix of more than two dimensions with many scales fails in the run.
    """
    value = node.inputs[index]
    if value is None or value.shape is None or operator(node).integer is None:
        return None
    rank = len(value.shape)
    port = operator(node).port(index)
    if port.kind is not Kind.MATRIX or (node.op_type in ("MatMul", "Gemm") and (rank != 2 or index != 1)):
        return None
    return port.axes(node, rank).output


def moves_along(node: ir.Node) -> bool:
    """Whether ONNX Runtime itself carries a scale over ``node``: it needs a Q and DQ on one of its sides only."""
    return node.domain == "" and node.op_type in _MOVED_ALONG


@dataclass(frozen=True, slots=True)
class Bounds:
    """The real numbers that an activation function lets through unchanged, when it cuts off all others."""

    low: float
    high: float

    def hold(self, affine: Affine) -> bool:
        """Whether every number of ``affine`` lies within: the QuantizeLinear cuts off as much, the function vanishes.

        Computed in float32 as ONNX Runtime does. For Relu it means that the zero point is the lowest integer.
        """
        info = np.iinfo(affine.grid.dtype.numpy())
        scale, zero_point = np.float32(affine.scale), np.float32(affine.zero_point)
        lowest, highest = (info.min - zero_point) * scale, (info.max - zero_point) * scale
        return bool(np.all(self.low - lowest <= _EPSILON) and np.all(highest - self.high <= _EPSILON))


def bounds(node: ir.Node) -> Bounds | None:
    """What ``node`` cuts off, for Relu and for Clip by constants; None for all others."""
    if node.domain != "":
        return None
    if node.op_type == "Relu":
        return Bounds(0.0, math.inf)
    if node.op_type != "Clip":
        return None
    low = _limit(node, 1, "min", -math.inf)
    high = _limit(node, 2, "max", math.inf)
    return None if low is None or high is None else Bounds(low, high)


def fused_activation(producer: ir.Node, node: ir.Node) -> Bounds | None:
    """The condition under which ``producer`` and the activation function ``node`` run as one integer kernel.

    It is on the QuantizeLinear after ``node``, with none in between. None: they never do, so that ``producer`` needs a
    QuantizeLinear of its own. (LeakyRelu and Sigmoid have kernels of their own; after other functions there is none.)
    """
    found = bounds(node)
    if found is None or len(producer.outputs[0].uses()) != 1 or producer.outputs[0].is_graph_output():
        return None
    if producer.op_type == "Add" and producer.domain == "":
        matmul = next((value.producer() for value in producer.inputs if value is not None and value.producer()), None)
        if matmul is not None and (bias := matmul_bias(matmul)) and bias.add is producer and _rank(matmul, 0) != 2:
            return None  # a Reshape comes between the Gemm and the function
    return found if integer(producer) is not None else None


@dataclass(frozen=True, slots=True)
class Bias:
    """An Add after a MatMul that ONNX Runtime merges with it to one Gemm.

    On int8 the Gemm runs only with a QuantizeLinear straight after the Add, and none before it. ``flat``: the bias is
    [N]. Another shape makes a Gemm that never runs on int8, so [1, N] is to be reshaped first. Neither does one whose
    ``bias`` is computed, as a residual is: a QuantizeLinear before the Add keeps the two apart.
    """

    add: ir.Node
    bias: ir.Value
    flat: bool


def matmul_bias(node: ir.Node) -> Bias | None:
    """The bias that ONNX Runtime finds for a MatMul; None where there is none."""
    if node.op_type != "MatMul" or node.domain != "" or node.outputs[0].is_graph_output():
        return None
    uses = tuple(node.outputs[0].uses())
    if len(uses) != 1 or _rank(node, 1) != 2:
        return None
    add = uses[0].node
    if add.op_type != "Add" or add.domain != "":
        return None
    other = add.inputs[1 - uses[0].idx]
    if other is None or other.shape is None:
        return None
    rank, sizes = _rank(node, 0), tuple(other.shape)
    if all(size == 1 for size in sizes):
        return None  # one number, or none known to be of the channels
    if len(sizes) == 1:
        return Bias(add, other, True)
    return Bias(add, other, False) if rank == 2 and len(sizes) == 2 else None


def _is_weight(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant, quantized or not."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _is_weight(producer.inputs[0])
    return is_constant(value)


def _is_float(value: ir.Value | None) -> bool:
    return value is None or value.dtype in (None, ir.DataType.FLOAT, ir.DataType.UNDEFINED)


def _rank(node: ir.Node, index: int) -> int | None:
    value = node.inputs[index]
    return None if value is None or value.shape is None else len(value.shape)


def _limit(node: ir.Node, index: int, name: str, default: float) -> float | None:
    """A bound of a Clip, an attribute before opset 11; None where it is computed."""
    if name in node.attributes:
        return float(node.attributes.get_float(name, default))
    if index >= len(node.inputs) or node.inputs[index] is None:
        return default
    array = constant_array(node.inputs[index])
    return None if array is None else float(array.reshape(-1)[0])


# Forms of an operator that have no integer kernel, or one that fails or is wrong --------------------------------------


def _resize(node: ir.Node) -> bool:
    interpolates = node.attributes.get_string("mode", "nearest") != "nearest"
    return interpolates or node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"


def _gemm(node: ir.Node) -> bool:
    """The bias must be a constant [N] and enter as it is."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return False
    scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    if scaled or not _is_weight(bias):
        return True
    matrix = node.inputs[1]
    if bias.shape is None or matrix is None or matrix.shape is None:
        return False
    outputs = matrix.shape[0 if node.attributes.get_int("transB", 0) else 1]
    return len(bias.shape) != 1 or (isinstance(outputs, int) and bias.shape[0] != outputs)


def _max_pool(node: ir.Node) -> bool:
    return len(node.outputs) > 1 and bool(node.outputs[1].uses() or node.outputs[1].is_graph_output())


def _average_pool(node: ir.Node) -> bool:
    """A model with a dilated one does not load; one that rounds up and counts padding is wrong by several steps."""
    dilated = any(step != 1 for step in node.attributes.get_ints("dilations", ()))
    get = node.attributes.get_int
    return dilated or bool(get("ceil_mode", 0) and get("count_include_pad", 0))


_REFUSES = {"Resize": _resize, "Gemm": _gemm, "MaxPool": _max_pool, "AveragePool": _average_pool}


# Why not --------------------------------------------------------------------------------------------------------------


def obstacle(node: ir.Node) -> str | None:
    """Why ``node``, as it stands in its graph, does not run in an integer kernel, as a clause; None where nothing is
    in the way. Of an operator of integers it says nothing."""
    if operator(node).integer is None:
        return None if operator(node).port(0).scale else f"ONNX Runtime has no integer kernel for {node.op_type}"
    found = integer(node)
    if found is None:
        return f"ONNX Runtime has no integer kernel for {node.op_type} with these attributes, types and shapes"
    return _input_obstacle(node) or _bias_obstacle(node) or _output_obstacle(node, found)


def _input_obstacle(node: ir.Node) -> str | None:
    if moves_along(node) and any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
        return None  # ONNX Runtime moves it before the node
    for index in integer_inputs(node):
        value = node.inputs[index]
        source = _source(value)
        name = printable(value.name or "") if value is not None else ""
        if source is None:
            if node.op_type == "Conv" and index == 1 and is_constant(value):
                continue  # ONNX Runtime quantizes it itself
            return f"its input '{name}' is not quantized"
        stored = source.inputs[0]
        dtype = None if stored is None else stored.dtype
        if dtype is ir.DataType.INT8 and node.op_type != "Conv" and index == 0 and is_constant(stored):
            return f"its first input '{name}' is a constant of int8, where uint8 is needed"
        if dtype is not None and dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
            return f"its input '{name}' is {dtype.name.lower()}, and integer kernels take 8 bits"
    return None


def _bias_obstacle(node: ir.Node) -> str | None:
    """A bias must be float, or int32 with the product of the scales of input and weight."""
    port = operator(node).bias
    bias = node.inputs[port] if port is not None and port < len(node.inputs) else None
    source = _source(bias)
    if source is None:
        return None if bias is None or is_constant(bias) else "its bias is computed"
    if source.inputs[0] is not None and source.inputs[0].dtype not in (None, ir.DataType.INT32):
        return "its bias is quantized, but not to int32"
    scales = [_constant_scale(_source(value)) for value in (node.inputs[0], node.inputs[1], bias)]
    if any(scale is None for scale in scales):
        return None
    x, w, b = (np.asarray(scale, np.float32).reshape(-1) for scale in scales)
    expected = x * w
    if b.size not in (1, expected.size) or not np.allclose(b, expected, rtol=1e-2, atol=0):
        return "the scale of its bias is not the product of the scales of its input and weight"
    return None


def _output_obstacle(node: ir.Node, found: Integer) -> str | None:
    for output in node.outputs:
        reason = _reader_obstacle(node, output, found)
        if reason:
            return reason
    return None


def _reader_obstacle(node: ir.Node, output: ir.Value, found: Integer) -> str | None:
    uses = tuple(output.uses())
    quantizers = [use.node for use in uses if use.node.op_type == "QuantizeLinear"]
    name = printable(output.name or "")
    if not found.needs_output and not quantizers:
        bias = matmul_bias(node)
        return None if bias is None else _bias_add_obstacle(bias)
    if output.is_graph_output() and found.needs_output:
        return f"its output '{name}' is an output of the graph"
    if len(uses) > 1 or output.is_graph_output():
        readers = "the outputs" if not uses else f"{len(uses)} readers"
        return f"its output '{name}' fans out to {readers}, where one QuantizeLinear is needed"
    if not uses:
        return None if found.equal else f"its output '{name}' has no scale: nothing reads it"
    if not quantizers:
        return _float_reader_obstacle(node, uses[0].node, name)
    if found.equal and (before := _source(node.inputs[0])) and not _same(before, quantizers[0]):
        return f"{node.op_type} needs equal scales and zero points before and after it"
    return None


def _float_reader_obstacle(node: ir.Node, reader: ir.Node, name: str) -> str | None:
    """The one reader of an output is no QuantizeLinear."""
    if moves_along(node) or moves_along(reader):
        return None
    limits = fused_activation(node, reader)
    if limits is not None:
        after = tuple(reader.outputs[0].uses())
        if len(after) == 1 and after[0].node.op_type == "QuantizeLinear":
            return f"the QuantizeLinear after {reader.op_type} reaches beyond what that lets through"
    return f"its output '{name}' has no scale: {reader.op_type} reads it in float"


def _bias_add_obstacle(bias: Bias) -> str | None:
    after = bias.add.outputs[0].uses()
    if not bias.flat:
        return "ONNX Runtime makes a Gemm of it and its bias, which is not [N]"
    if _source(bias.bias) is None and [use.node.op_type for use in after] != ["QuantizeLinear"]:
        return "ONNX Runtime makes a Gemm of it and its bias, and that has no output scale"
    return None


def _source(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, over operators that ONNX Runtime carries scales over."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return node
        if not moves_along(node):
            return None
        value = node.inputs[0]
    return None


def _constant_scale(node: ir.Node | None) -> object:
    return None if node is None else constant_array(node.inputs[1])


def _same(one: ir.Node, other: ir.Node) -> bool:
    """Whether two Q or DQ have equal constant scales and zero points, or the same ones."""
    for index in (1, 2):
        first, second = (node.inputs[index] if index < len(node.inputs) else None for node in (one, other))
        if first is second:
            continue
        a, b = constant_array(first), constant_array(second)
        if a is None or b is None or not np.array_equal(a.reshape(-1), b.reshape(-1)):
            return False
    return True
