"""BatchNormalization, and the Mul and Add that older exporters write for it, into the layer before."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.batchnorm import affine, output_channels, rounded, scaled_weight
from ...ir.constants import Array, constant_array, constant_tensor
from ...ir.match import Replacement, Rule, attribute, decline, rule
from ...ir.sparse import stored_bytes
from ...ir.unused import is_idle
from ..base import Context, Effect, Pass, register
from ..rewrite import Tape, rewrite

_SMALL = 1 << 10  # bytes by which a fold may let the file grow

Rest = tuple[ir.Value | None, ...]


@register("fold-batchnorm")
class FoldBatchNorm(Pass):
    """Fold BatchNormalization, and constant scales and shifts of channels, into the layer before.

    Conv and ConvTranspose (any group), Gemm, and a MatMul with its Add. Computed in float64 and rounded once. A layer
    whose weight other nodes use too, or whose own output is used, stays as it is, unless its weight is under 1 KiB;
    weights of half precision are shifted by it, but not scaled, for that would round them once more.
    """

    def effect(self) -> Effect:
        """Rounding: the weight is rounded where the output was."""
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Rewrites every graph, to a fixed point."""
        rewrite(model, RULES, ctx)


def batchnorm_into_layer(
    tape: Tape,
    layer: ir.Node,
    x: ir.Value,
    w: ir.Value,
    rest: Rest,
    scale: ir.Value,
    bias: ir.Value,
    mean: ir.Value,
    variance: ir.Value,
    epsilon: float,
) -> Replacement:
    _check_inference(tape)
    factor, shift = _statistics(scale, bias, mean, variance, epsilon)
    return _folded(tape, layer, x, w, rest, factor, shift)


@rule(
    "BatchNormalization(add @ Add(layer @ MatMul(x, w), b), scale, bias, mean, variance, epsilon=epsilon)", shared=True
)
def batchnorm_into_matmul_and_add(
    tape: Tape,
    add: ir.Node,
    layer: ir.Node,
    x: ir.Value,
    w: ir.Value,
    b: ir.Value,
    scale: ir.Value,
    bias: ir.Value,
    mean: ir.Value,
    variance: ir.Value,
    epsilon: float,
) -> Replacement:
    _check_inference(tape)
    _check_private(add)
    _check_private(layer)
    weight, offset = _weight(w), constant_array(b)
    product = layer.outputs[0]
    if product.shape is None or product.shape.rank() != 2 or weight.shape.rank() != 2:
        decline("its channels are not known to be the columns of the product")
    channels = weight.shape.numpy()[1]
    if offset is None or offset.shape not in ((channels,), (1, channels), (1,), ()):
        decline("what is added is not one constant a channel")
    _check_precision(weight)
    factor, shift = _statistics(scale, bias, mean, variance, epsilon)
    _check_channels(factor, channels)
    moved = rounded(offset.astype(np.float64).ravel() * factor + shift, weight.dtype.numpy())
    new = tape.MatMul(x, tape.constant(scaled_weight(layer, weight, factor), instead_of=w), name=layer.name)
    return tape.Add(new, tape.constant(moved, instead_of=b))  # type: ignore[no-any-return]


def scale_into_layer(tape: Tape, layer: ir.Node, x: ir.Value, w: ir.Value, rest: Rest, c: ir.Value) -> Replacement:
    number = _per_channel(layer, w, c)
    return None if number is None else _folded(tape, layer, x, w, rest, number, np.zeros_like(number))


def division_into_layer(tape: Tape, layer: ir.Node, x: ir.Value, w: ir.Value, rest: Rest, c: ir.Value) -> Replacement:
    number = _per_channel(layer, w, c)
    if number is None or not number.all():
        return None
    return _folded(tape, layer, x, w, rest, 1 / number, np.zeros_like(number))


def shift_into_layer(tape: Tape, layer: ir.Node, x: ir.Value, w: ir.Value, rest: Rest, c: ir.Value) -> Replacement:
    number = _per_channel(layer, w, c)
    return None if number is None else _folded(tape, layer, x, w, rest, None, number)


def negative_shift_into_layer(
    tape: Tape, layer: ir.Node, x: ir.Value, w: ir.Value, rest: Rest, c: ir.Value
) -> Replacement:
    number = _per_channel(layer, w, c)
    return None if number is None else _folded(tape, layer, x, w, rest, None, -number)


_STATISTICS = "scale, bias, mean, variance, epsilon=epsilon"
_AFFINE = {
    "Mul": scale_into_layer,
    "Div": division_into_layer,
    "Add": shift_into_layer,
    "Sub": negative_shift_into_layer,
}

RULES: list[Rule] = [
    *(
        rule(f"BatchNormalization(layer @ {name}(x, w, *rest), {_STATISTICS})", shared=True)(batchnorm_into_layer)
        for name in ("Conv", "ConvTranspose", "Gemm")
    ),
    batchnorm_into_matmul_and_add,
    *(
        rule(f"{operator}(layer @ {name}(x, w, *rest), c)", shared=True)(function)
        for operator, function in _AFFINE.items()
        for name in ("Conv", "ConvTranspose")
    ),
]


def _folded(
    tape: Tape, layer: ir.Node, x: ir.Value, w: ir.Value, rest: Rest, scale: Array | None, shift: Array
) -> Replacement:
    """The layer with its output channels scaled (by ``None``: not at all) and shifted, float64 [channels]."""
    _check_private(layer)
    weight = _weight(w)
    channels = output_channels(layer, weight.shape.numpy())
    _check_channels(shift, channels)
    offset = np.zeros(channels) if not rest or rest[0] is None else _offset(layer, rest[0], channels)
    moved = rounded(offset * (1.0 if scale is None else scale) + shift, weight.dtype.numpy())
    if scale is not None:
        _check_precision(weight)
        _check_growth(w, layer)
        w = tape.constant(scaled_weight(layer, weight, scale), instead_of=w)
    attributes: dict[str, Any] = {name: item for name, item in layer.attributes.items() if name != "beta"}
    named = rest[0] if rest else None
    b = tape.constant(moved, f"{layer.name or layer.op_type}_bias", instead_of=named)
    return tape.op("", layer.op_type, x, w, b, name=layer.name, **attributes)  # type: ignore[no-any-return]


def _offset(layer: ir.Node, value: ir.Value, channels: int) -> Array:
    """The layer's bias, float64 [channels]; for Gemm times its beta."""
    array = constant_array(value)
    if array is None:
        decline("the layer's bias is no constant")
    if array.size not in (1, channels) or (array.ndim and array.shape[-1] != array.size):
        decline("the layer's bias is not one number a channel")
    factor = attribute(layer, "beta", 1.0) if layer.op_type == "Gemm" else 1.0
    return np.broadcast_to(array.astype(np.float64).ravel() * factor, (channels,))


def _statistics(
    scale: ir.Value, bias: ir.Value, mean: ir.Value, variance: ir.Value, epsilon: float
) -> tuple[Array, Array]:
    arrays = [constant_array(value) for value in (scale, bias, mean, variance)]
    if any(array is None for array in arrays):
        decline("its statistics are no constants, or a caller may override them")
    gamma, beta, average, spread = (array for array in arrays if array is not None)
    return affine(gamma, beta, average, spread, epsilon)


def _check_inference(tape: Tape) -> None:
    node = tape.root
    if tape.version < 7:
        decline("before opset 7 it need not be at inference")
    if tape.attribute(node, "training_mode", 0) or (
        tape.version < 14 and any(output.name for output in node.outputs[1:])
    ):
        decline("it is in training mode")
    if tape.version < 9 and not tape.attribute(node, "spatial", 1):
        decline("it normalizes each position by itself")
    if not all(map(is_idle, node.outputs[1:])):
        decline("its statistics are used")


def _check_private(layer: ir.Node) -> None:
    output = layer.outputs[0]
    if output.is_graph_output():
        decline("the layer's output is an output of the graph")
    if len(output.uses()) > 1:
        decline("the layer's output is used elsewhere")


def _check_channels(numbers: Array, channels: int) -> None:
    if numbers.size != channels:
        decline(f"there are {numbers.size} numbers for {channels} channels")


def _check_precision(weight: ir.TensorProtocol) -> None:
    """Scaling half-precision weights rounds them once more: of PP-OCRv4 recognition, by 4 % of the largest output."""
    if weight.dtype.bitwidth < 32:
        decline(f"scaling would round the {weight.dtype.numpy().name} weight once more")


def _check_growth(w: ir.Value, layer: ir.Node) -> None:
    """A weight that others use too would have to be copied, so that the file grows."""
    tensor = constant_tensor(w)
    shared = len(w.uses()) > 1 or w.is_graph_output()
    if shared and tensor is not None and tensor.nbytes > _SMALL:
        decline(f"the weight of {layer.name or layer.op_type} is shared, and a copy would let the file grow")


def _weight(w: ir.Value) -> ir.TensorProtocol:
    tensor = constant_tensor(w)
    if tensor is None:
        decline("the layer's weight is no constant, or a caller may override it")
    if tensor.nbytes > stored_bytes(tensor) + _SMALL:
        decline("the layer's weight is stored sparse, and the file would grow by it dense")
    if not tensor.dtype.is_floating_point() or tensor.shape.rank() < 2:
        decline("the layer's weight is not of floats")
    return tensor


def _per_channel(layer: ir.Node, w: ir.Value, c: ir.Value) -> Array | None:
    """The constant ``c`` as float64 [channels], where it holds one number or one a channel.

    ``None`` where not, or where the layer's output has other uses: then there is nothing unusual about it.
    """
    if len(layer.outputs[0].uses()) > 1 or layer.outputs[0].is_graph_output():
        return None
    weight = constant_tensor(w)
    array = constant_array(c)
    if weight is None or array is None or array.dtype.kind not in "fV":
        return None
    sizes = weight.shape.numpy()
    channels = output_channels(layer, sizes)
    shape = (1,) * (len(sizes) - array.ndim) + array.shape
    if len(shape) != len(sizes) or array.size != shape[1] or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(array.astype(np.float64).ravel(), (channels,))
