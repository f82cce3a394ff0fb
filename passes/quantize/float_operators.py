"""The operators that compute on integers, each as its float operator between DequantizeLinear and QuantizeLinear.

A table: the integer operator, and the function that writes the float one. ONNX's QLinear*, and those of ONNX Runtime
(domain ``com.microsoft``, contrib operator documentation of 1.31).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.dequantize import Blocks, dequantized, quantization, swapped, unpacked
from ...ir.match import Replacement, Rule, attribute, decline, rule
from ...ir.trace import constant
from ..base import Array
from ..rewrite import Tape
from .float_constants import Constants, constant_integers

MICROSOFT = "com.microsoft"
DOMAINS = ("", MICROSOFT)
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
Lowering = Callable[[Tape, "Constants", ir.Node], Replacement]


def named(name: str, text: str, function: Callable[..., Replacement]) -> Rule:
    return replace(rule(text, shared=True)(function), name=name)


def three(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    inputs = [*node.inputs, None, None, None]
    return inputs[0], inputs[1], inputs[2]


# What the table's functions are written with --------------------------------------------------------------------------


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _needed(node: ir.Node, index: int) -> ir.Value:
    value = _input(node, index)
    return value if value is not None else decline("an input is missing")


def _array(node: ir.Node, index: int, what: str) -> Array:
    found = constant(_input(node, index))
    return found if found is not None else decline(f"its {what} is no constant")


def _optional(node: ir.Node, index: int, what: str) -> Array | None:
    return None if _input(node, index) is None else _array(node, index, what)


def attributes(node: ir.Node, *but: str) -> dict[str, Any]:
    """The attributes of ``node`` but some. Declines where the caller of a function sets one."""
    for name in node.attributes:
        attribute(node, name)
    return {name: held for name, held in node.attributes.items() if name not in but}


def _real(tape: Tape, made: Constants, node: ir.Node, index: int, scale: int, zero: int, axis: int = 1) -> ir.Value:
    """An integer input as float: a constant of floats, or DequantizeLinear of it."""
    value = _needed(node, index)
    scales, zeros = constant(_needed(node, scale)), constant(_input(node, zero))
    if (
        constant_integers(value) is not None
        and scales is not None
        and (zeros is not None or _input(node, zero) is None)
    ):
        return made.restored(tape, value, scales, zeros, axis=axis)
    if scales is None or scales.size == 1:
        return tape.DequantizeLinear(value, _needed(node, scale), _input(node, zero))  # type: ignore[no-any-return]
    if tape.version < 13:
        decline("a scale for each channel of what is no constant needs opset 13")
    return tape.DequantizeLinear(value, _needed(node, scale), _input(node, zero), axis=axis)  # type: ignore[no-any-return]


def _whole(tape: Tape, made: Constants, node: ir.Node, value: ir.Value, scale: int, zero: int) -> ir.Value:
    """A float result as the integers that the node gave."""
    zero_point = _input(node, zero)
    if zero_point is None:
        dtype = node.outputs[0].dtype or _needed(node, 0).dtype
        if dtype is None:
            decline("the type of its output is not known")
        zero_point = tape.constant(np.zeros((), dtype.numpy()), f"{node.outputs[0].name}_zero_point")
    made.wish(value, node.outputs[0])
    return tape.QuantizeLinear(value, _needed(node, scale), zero_point)  # type: ignore[no-any-return]


def _bias(
    tape: Tape, made: Constants, node: ir.Node, index: int, scales: Sequence[Array], axis: int = 0
) -> ir.Value | None:
    """An int32 bias, whose scale is the product of others."""
    value = _input(node, index)
    if value is None:
        return None
    if constant_integers(value) is None:
        decline("its bias is no constant")
    factor = scales[0].astype(np.float32).reshape(()) * scales[1].astype(np.float32)
    return made.restored(tape, value, np.asarray(factor, np.float32), None, axis=axis)


# Layers ---------------------------------------------------------------------------------------------------------------


def _conv(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    if attribute(node, "channels_last", 0):
        decline("its channels are last")
    x, w = _real(tape, made, node, 0, 1, 2), _real(tape, made, node, 3, 4, 5, axis=0)
    bias = None
    if _input(node, 8) is not None:
        bias = _bias(tape, made, node, 8, (_array(node, 1, "scale"), _array(node, 4, "weight's scale")))
    options = attributes(node, "channels_last")
    return _whole(tape, made, node, tape.Conv(x, w, *([] if bias is None else [bias]), **options), 6, 7)


def _matmul(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    a, b = _real(tape, made, node, 0, 1, 2, axis=-2), _real(tape, made, node, 3, 4, 5, axis=-1)
    return _whole(tape, made, node, tape.MatMul(a, b), 6, 7)


def _gemm(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    """Its bias joins the integer product before alpha scales both."""
    axis = 0 if attribute(node, "transB", 0) else 1
    a, b = _real(tape, made, node, 0, 1, 2), _real(tape, made, node, 3, 4, 5, axis=axis)
    scales = (_array(node, 1, "scale"), _array(node, 4, "weight's scale"))
    c = _bias(tape, made, node, 6, scales, axis=-1)
    alpha = attribute(node, "alpha", 1.0)
    if c is None and tape.version < 11:
        decline("Gemm without C needs opset 11")
    options = {**attributes(node), **({"beta": alpha} if c is not None and alpha != 1 else {})}
    y = tape.Gemm(a, b, *([] if c is None else [c]), **options)
    return y if _input(node, 7) is None else _whole(tape, made, node, y, 7, 8)


def _matmul_to_float(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    a, b = _real(tape, made, node, 0, 2, 4), _real(tape, made, node, 1, 3, 5, axis=-1)
    return _plus(tape, tape.MatMul(a, b), _input(node, 6))


def _dynamic_matmul(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    return _plus(tape, tape.MatMul(_needed(node, 0), _real(tape, made, node, 1, 2, 3, axis=-1)), _input(node, 4))


def _plus(tape: Tape, y: ir.Value, bias: ir.Value | None) -> ir.Value:
    return y if bias is None else tape.Add(y, bias)


def _block_matmul(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    """MatMulNBits."""
    if attribute(node, "weight_prepacked", 0):
        decline("its weight is packed for one kind of processor")
    if _input(node, 4) is not None:
        decline("its groups are not in order (g_idx)")
    stored, bits, block = _needed(node, 1), attribute(node, "bits", 4), attribute(node, "block_size", 0)
    outputs, inputs = attribute(node, "N", 0), attribute(node, "K", 0)
    packed = constant_integers(stored)
    if packed is None:
        decline("its weight is no constant")
    blocks = -(-inputs // block)
    scales = _array(node, 2, "scale").reshape(outputs, blocks)
    zeros = _optional(node, 3, "zero point")
    if zeros is None:
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    elif zeros.dtype == np.uint8:
        zeros = unpacked(zeros.reshape(outputs, -1), bits)[:, :blocks]
    found = Blocks(packed, scales, zeros.reshape(outputs, blocks), bits, block, inputs)
    key = (_input(node, 2), _input(node, 3))
    weight = made.once(tape, key, stored, found.weight)
    return _plus(tape, tape.MatMul(_needed(node, 0), weight), _input(node, 5))


def _block_gather(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    """GatherBlockQuantized: uint8 data may hold several numbers a byte along the last axis, as ONNX packs uint4."""
    stored, scales, zeros = _needed(node, 0), _array(node, 2, "scale"), _optional(node, 3, "zero point")
    tensor = constant_integers(stored)
    if tensor is None:
        decline("its data is no constant")
    bits = attribute(node, "bits", 4) if tensor.dtype is ir.DataType.UINT8 else 0
    if bits:
        if zeros is None:
            zeros = np.asarray(1 << (bits - 1), np.uint8)
        elif bits < 8:
            zeros = unpacked(zeros, bits)[..., : scales.shape[-1]]
    if 0 < bits < 8:
        *outer, last = tensor.shape.numpy()
        kind = {4: ir.DataType.UINT4, 2: ir.DataType.UINT2}[bits]
        tensor = ir.PackedTensor(tensor.numpy().reshape(-1), kind, shape=ir.Shape((*outer, last * 8 // bits)))
    shape, axis = tuple(tensor.shape.numpy()), attribute(node, "quantize_axis", 1)
    block = attribute(node, "block_size", 128) or shape[axis]
    found, dtype = quantization(shape, scales, zeros, axis, block), ir.DataType.from_numpy(scales.dtype)
    key = (_input(node, 2), _input(node, 3))
    table = made.once(tape, key, stored, lambda: dequantized(tensor, found, dtype))
    return tape.Gather(table, _needed(node, 1), axis=attribute(node, "gather_axis", 0))  # type: ignore[no-any-return]


def _lstm(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    weights = []
    for index, scale in ((1, 8), (2, 10)):
        stored, scales = _needed(node, index), _array(node, scale, "scale")
        tensor, zeros = constant_integers(stored), _optional(node, scale + 1, "zero point")
        if tensor is None:
            decline("its weight is no constant")
        shape = tuple(tensor.shape.numpy())
        tall = (scales.shape[0], 1, -1)
        zeros = zeros if zeros is None or zeros.size == 1 else zeros.reshape(tall)
        found = quantization(shape, scales.reshape(tall), zeros)
        make = lambda tensor=tensor, found=found: swapped(dequantized(tensor, found, ir.DataType.FLOAT))  # noqa: E731
        key = (_input(node, scale), _input(node, scale + 1))
        weights.append(made.once(tape, key, stored, make))
    inputs = [_needed(node, 0), *weights, *(_input(node, index) for index in range(3, 8))]
    while inputs[-1] is None:
        inputs.pop()
    return tape.op("", "LSTM", *inputs, outputs=len(node.outputs), **attributes(node))  # type: ignore[no-any-return]


def _attention(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    """QAttention as ONNX Runtime's float Attention."""
    x, w = _real(tape, made, node, 0, 3, 6), _real(tape, made, node, 1, 4, 7, axis=-1)
    inputs = [x, w, _needed(node, 2), _input(node, 5), _input(node, 8)]
    while inputs[-1] is None:
        inputs.pop()
    return tape.op(MICROSOFT, "Attention", *inputs, outputs=len(node.outputs), **attributes(node))  # type: ignore[no-any-return]


def _embedding(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    """QEmbedLayerNormalization: five tables and vectors, with their scales from input 8 and zero points from 13 on."""
    parts = [
        None if _input(node, index) is None else _real(tape, made, node, index, 8 + place, 13 + place)
        for place, index in enumerate((2, 3, 4, 5, 6))
    ]
    inputs = [_needed(node, 0), _input(node, 1), *parts, _input(node, 7)]
    while inputs[-1] is None:
        inputs.pop()
    return tape.op(MICROSOFT, "EmbedLayerNormalization", *inputs, outputs=len(node.outputs), **attributes(node))  # type: ignore[no-any-return]


# Arithmetic -----------------------------------------------------------------------------------------------------------


def _unary(op_type: str, *but: str) -> Lowering:
    def lower(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
        if attribute(node, "channels_last", 0):
            decline("its channels are last")
        y = tape.op("", op_type, _real(tape, made, node, 0, 1, 2), **attributes(node, "channels_last", *but))
        return _whole(tape, made, node, y, 3, 4)

    return lower


def _binary(op_type: str) -> Lowering:
    def lower(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
        a, b = _real(tape, made, node, 0, 1, 2), _real(tape, made, node, 3, 4, 5)
        return _whole(tape, made, node, tape.op("", op_type, a, b), 6, 7)

    return lower


def _softmax(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    meant = attribute(node, "opset", 0)
    if (meant < 13) != (tape.version < 13):
        decline(f"it means Softmax of opset {meant}, and the model is at {tape.version}")
    return _unary("Softmax", "opset")(tape, made, node)


def _concat(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    parts = [_real(tape, made, node, index, index + 1, index + 2) for index in range(2, len(node.inputs), 3)]
    return _whole(tape, made, node, tape.Concat(*parts, **attributes(node)), 0, 1)


def _where(tape: Tape, made: Constants, node: ir.Node) -> Replacement:
    x, y = _real(tape, made, node, 1, 2, 3), _real(tape, made, node, 4, 5, 6)
    return _whole(tape, made, node, tape.Where(_needed(node, 0), x, y), 7, 8)


LOWERINGS: dict[tuple[str, str], Lowering] = {
    ("", "QLinearConv"): _conv,
    (MICROSOFT, "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (MICROSOFT, "QGemm"): _gemm,
    (MICROSOFT, "MatMulIntegerToFloat"): _matmul_to_float,
    (MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_matmul,
    (MICROSOFT, "MatMulNBits"): _block_matmul,
    (MICROSOFT, "GatherBlockQuantized"): _block_gather,
    (MICROSOFT, "DynamicQuantizeLSTM"): _lstm,
    (MICROSOFT, "QAttention"): _attention,
    (MICROSOFT, "QEmbedLayerNormalization"): _embedding,
    (MICROSOFT, "QLinearAdd"): _binary("Add"),
    (MICROSOFT, "QLinearMul"): _binary("Mul"),
    (MICROSOFT, "QLinearConcat"): _concat,
    (MICROSOFT, "QLinearWhere"): _where,
    (MICROSOFT, "QLinearAveragePool"): _unary("AveragePool"),
    (MICROSOFT, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    (MICROSOFT, "QLinearSigmoid"): _unary("Sigmoid"),
    (MICROSOFT, "QLinearLeakyRelu"): _unary("LeakyRelu"),
    (MICROSOFT, "QLinearSoftmax"): _softmax,
}


def operator_rules(made: Constants) -> Iterator[Rule]:
    """A rule for each operator of the table."""
    for (domain, name), lowering in LOWERINGS.items():
        text = f"node @ {domain + '.' if domain else ''}{name}(*_)"
        yield replace(rule(text)(_writer(lowering, made)), name=f"{name} in float")


def _writer(lowering: Lowering, made: Constants) -> Callable[[Tape, ir.Node], Replacement]:
    def write(tape: Tape, node: ir.Node) -> Replacement:
        return lowering(tape, made, node)

    return write
