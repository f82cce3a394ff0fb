"""Relu and Relu6 that quantizers leave to the rounding: integers that end at 0 clamp as they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.constants import is_constant
from ...ir.match import Replacement, Rule
from ...ir.ops import Kind, operator
from ...ir.trace import constant
from ..rewrite import Tape
from .float_operators import DEQUANTIZE, DOMAINS, QUANTIZE, attributes, named, three

RELU6 = 6.0
_NEAR = 1e-5  # relative: how near to 6 the end of a range is that was clamped there
_DEPTH = 8  # nodes to look back along for what cannot be negative

_NOT_NEGATIVE = "Relu Sigmoid HardSigmoid Softmax Abs Exp Sqrt Softplus ThresholdedRelu"
_LEAST = {(name, ""): 0.0 for name in _NOT_NEGATIVE.split()}
_LEAST |= {("Erf", ""): -1.0, ("Tanh", ""): -1.0, ("HardSwish", ""): -0.375, ("Mish", ""): -0.31}
_LEAST |= dict.fromkeys((("Gelu", ""), ("Gelu", "com.microsoft"), ("FastGelu", "com.microsoft")), -0.17)
_WITHIN = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"}
_WITHIN |= {"Resize", "Upsample", "Concat", "Dropout", "Add", "Mul"}
"""Operators whose outputs lie within their operands, or follow from them."""
_GATES = {"Sigmoid", "HardSigmoid", "Erf", "Tanh"}
_GATE_DEPTH = 4  # nodes from the product of a gate back to it: x * 0.5 * (1 + erf(x / sqrt(2)))
_NUMBERS = (Kind.OPERAND, Kind.EMBEDDING, Kind.TABLE)
_FEW = 1024


def clamp_rules() -> Iterator[Rule]:
    """Rules that put Relu and Relu6 before the QuantizeLinear that does their work."""
    for domain in DOMAINS:
        text = f"node @ {domain + '.' if domain else ''}{QUANTIZE}(*_)"
        yield named("Relu where integers clamped at 0", text, _clamped)


def _clamped(tape: Tape, node: ir.Node) -> Replacement:
    """QuantizeLinear whose zero point is its least integer is a Relu, and a Relu6 if its greatest stands for 6.

    Quantizers take the operator out before it, for then it changes nothing.
    """
    x, scale, zero = three(node)
    if x is None or not any(user.op_type == DEQUANTIZE for user in node.outputs[0].consumers()):
        return None
    scales, zeros = constant(scale), constant(zero) if zero is not None else np.zeros((), np.uint8)
    if scales is None or zeros is None or zeros.dtype.kind not in "iu":
        return None
    kind = np.iinfo(zeros.dtype)
    if x.producer() is None or is_constant(x) or not np.all(zeros == kind.min):
        return None
    if _least(x) >= -scales.min() / 2 or _is_gated(x):  # then the clamp does no more than the rounding
        return None
    highest = (kind.max - kind.min) * scales.astype(np.float64)
    positive = _clipped(tape, x, scales.dtype) if np.all(np.abs(highest - RELU6) <= _NEAR * RELU6) else tape.Relu(x)
    return tape.op(node.domain, QUANTIZE, positive, *node.inputs[1:], **attributes(node))  # type: ignore[no-any-return]


def _clipped(tape: Tape, x: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    if tape.version < 11:
        return tape.Clip(x, min=0.0, max=RELU6)  # type: ignore[no-any-return]
    ends = [tape.constant(np.asarray(end, dtype), f"{x.name}_{word}") for word, end in (("min", 0), ("max", RELU6))]
    return tape.Clip(x, *ends)  # type: ignore[no-any-return]


def _is_gated(value: ir.Value | None, depth: int = _GATE_DEPTH) -> bool:
    """Whether ``value`` is a product with a gate, as SiLU and GELU are written: no Relu is merged with such."""
    node = value.producer() if value is not None else None
    if node is None or depth == 0:
        return False
    if depth < _GATE_DEPTH and node.op_type in _GATES:
        return True
    if node.op_type == "Mul" or (depth < _GATE_DEPTH and node.op_type == "Add"):
        return any(_is_gated(item, depth - 1) for item in node.inputs)
    return False


def _least(value: ir.Value | None, depth: int = _DEPTH) -> float:
    """A number that ``value`` is never below, by the operators that make it; -inf where none is known."""
    node = value.producer() if value is not None else None
    if value is None or depth == 0:
        return -np.inf
    if node is None or is_constant(value):
        array = constant(value)
        known = array is not None and array.dtype.kind == "f" and 0 < array.size <= _FEW
        return float(array.min()) if array is not None and known else -np.inf
    if (node.op_type, node.domain) in _LEAST:
        return _LEAST[node.op_type, node.domain]
    if node.op_type == "Clip":
        low = constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_float("min", -np.inf)
        return -np.inf if low is None else float(low)
    if node.op_type == DEQUANTIZE:
        zeros = constant(three(node)[2])
        lowest = zeros is not None and zeros.dtype.kind in "iu" and bool(np.all(zeros == np.iinfo(zeros.dtype).min))
        return 0.0 if lowest else -np.inf
    return _least_of_operands(node, depth)


def _least_of_operands(node: ir.Node, depth: int) -> float:
    entry = operator(node)
    if (node.op_type not in _WITHIN and not entry.moves) or node.attributes.get_string("mode", "") == "cubic":
        return -np.inf
    data = [item for place, item in enumerate(node.inputs) if entry.port(place).kind in _NUMBERS]
    ends = [_least(item, depth - 1) for item in data]
    if node.op_type == "Add":
        return sum(ends)
    least = min(ends, default=-np.inf)
    return least if node.op_type != "Mul" or least >= 0 else -np.inf
