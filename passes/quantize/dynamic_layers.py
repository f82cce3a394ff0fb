"""Layers that can run on integers with activations quantized in each run, and why others cannot or had better not."""

from __future__ import annotations

import onnx_ir as ir

from ...ir.constants import is_constant
from ...ir.match import attribute, decline
from ...ir.ops import operator
from ...ir.quantization import NARROW
from ...ir.scopes import Scope
from ...ir.weights import Weight
from .recurrent import NO_FORM, WEIGHTS, check_lstm

FEWEST_COLUMNS, FEWEST_WEIGHTS = 16, 4096
"""With fewer columns, or weights in all, quantizing the input takes longer than the product saves (M from 1 to 256)."""

DECODED = "its weight is decoded from integers; dequantize it first"
NO_GAIN = {
    "Conv": "a convolution: ConvInteger takes five times as long as float",
    "ConvTranspose": "ONNX Runtime has no integer ConvTranspose",
    **NO_FORM,
}


class Layer:
    """A node that computes with constant matrices, and these matrices."""

    def __init__(self, scope: Scope, node: ir.Node) -> None:
        self.scope, self.node = scope, node
        self.address = scope.address(node)
        self.weights: list[Weight] = []
        self.swapped: list[bool] = []  # whether each is stored [..., N, K]; N are the output channels

    @property
    def deed(self) -> str:
        return f"{'LSTM' if self.is_lstm else 'product'} of integers, its input quantized in each run"

    @property
    def is_lstm(self) -> bool:
        return self.node.op_type == "LSTM"

    def read(self, constants: dict[ir.Value, Weight]) -> None:
        """Find the weights. Declines where there is no dynamic form for the layer."""
        node = self.node
        if operator(node).matrices[0].zero_point is not None:
            decline("it computes on integers already")
        if node.domain or node.op_type not in ("MatMul", "Gemm", "LSTM"):
            decline(NO_GAIN.get(node.op_type, f"ONNX Runtime has no dynamic integer form of {node.op_type}"))
        if node.device_configurations:
            decline("it is assigned to devices")
        for port in WEIGHTS if self.is_lstm else (1,):
            value, swapped, cast = _source(node.inputs[port])
            weight = constants.get(value) if value is not None else None
            if weight is None:
                decline(DECODED if is_decoded(node.inputs[port]) else "its weight is no constant")
            self.weights.append(weight)
            _check_weight(weight, cast)
            self.swapped.append(swapped != self._is_output_first())
        if self.is_lstm:
            check_lstm(node)
        else:
            self._check_product()

    def _is_output_first(self) -> bool:
        return self.is_lstm or (self.node.op_type == "Gemm" and bool(attribute(self.node, "transB", 0)))

    @property
    def columns(self) -> int:
        """How many output channels the first matrix has."""
        return self.weights[0].shape[-2 if self.swapped[0] else -1]

    def _check_product(self) -> None:
        node = self.node
        source = node.inputs[0]
        maker = source.producer() if source is not None else None
        if maker is not None and maker.op_type == "DequantizeLinear":
            decline("its input comes from integers already")
        if node.op_type == "Gemm" and self.alpha <= 0:
            decline("its alpha is not positive")
        if self.columns == 1 and any(user.op_type == "Add" for user in node.outputs[0].consumers()):
            decline("one column, and what is added to it might widen it, which ONNX Runtime's kernel refuses")

    @property
    def alpha(self) -> float:
        """What the product is multiplied by."""
        return float(attribute(self.node, "alpha", 1.0)) if self.node.op_type == "Gemm" else 1.0

    def loss(self) -> str | None:
        """Why the layer would run no faster; ``None`` where it would."""
        size = sum(weight.size for weight in self.weights)
        if self.columns < FEWEST_COLUMNS:
            return f"fewer than {FEWEST_COLUMNS} output channels save less than quantizing the input costs"
        if size < (4 * FEWEST_WEIGHTS if self.is_lstm else FEWEST_WEIGHTS):
            return "so few weights that quantizing the input costs more than they save"
        return None


def is_decoded(value: ir.Value | None, steps: int = 4) -> bool:
    """Whether ``value`` is computed from constant integers and scales alone, as stored weights are decoded."""
    node = value.producer() if value is not None else None
    if node is None or steps == 0:
        return False
    known = [item for item in node.inputs if item is not None]
    if node.op_type in ("Cast", "DequantizeLinear"):
        return bool(known) and all(map(is_constant, known)) and known[0].dtype not in NARROW
    through = node.op_type in ("Mul", "Sub", "Transpose", "Identity")
    return through and any(is_decoded(item, steps - 1) for item in known)


def _source(value: ir.Value | None) -> tuple[ir.Value | None, bool, bool]:
    """What ``value`` is a view of, through Identity, Transpose of a matrix and Cast to float32; whether transposed, and
    whether cast."""
    swapped = cast = False
    while value is not None and (node := value.producer()) is not None and not node.domain:
        if node.op_type == "Transpose":
            order = node.attributes.get_ints("perm", ())
            shape = node.inputs[0].shape if node.inputs[0] is not None else None
            if not (tuple(order) == (1, 0) or (not order and shape is not None and len(shape) == 2)):
                break
            swapped = not swapped
        elif node.op_type == "Cast":
            if node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
                break
            cast = True
        elif node.op_type != "Identity":
            break
        value = node.inputs[0]
    return value, swapped, cast


def _check_weight(weight: Weight, cast: bool) -> None:
    """Declines for a weight that is no plain float one; ``cast``: it is made float32 where it is read."""
    if weight.dtype.is_integer():
        decline("its weight is stored in integers already")
    if weight.dtype is not ir.DataType.FLOAT and not (cast and weight.dtype in NARROW):
        decline(f"it computes in {weight.dtype.name.lower()}")
    if len(weight.shape) < 2:
        decline("its weight is a vector")
    if weight.size == 0:
        decline("its weight is empty")
    if weight.overridable:
        decline("the model's caller may pass another tensor for its weight")
