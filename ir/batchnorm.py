"""Scales and shifts of channels, moved into the layer before: y = s (W x + b) + t is (s W) x + (s b + t).

Computed in float64 and rounded once to the layer's own type (Jacob et al. 2018, section 3.2, for BatchNormalization).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .match import attribute, decline
from .storage import LARGE, Read, StreamedTensor, blocks, reader

Array = np.ndarray[Any, Any]


def affine(scale: Array, bias: Array, mean: Array, variance: Array, epsilon: float) -> tuple[Array, Array]:
    """The scale and shift that an inference BatchNormalization applies to each channel, float64 [channels].

    Declines where a variance plus ``epsilon`` is not positive.
    """
    spread = variance.astype(np.float64) + epsilon
    if not np.all(spread > 0):
        decline("a variance is negative")
    factor = scale.astype(np.float64) / np.sqrt(spread)
    return factor, bias.astype(np.float64) - mean.astype(np.float64) * factor


def output_channels(layer: ir.Node, shape: Sequence[int]) -> int:
    """How many channels Conv, ConvTranspose, Gemm or MatMul makes with a weight of ``shape``, in its layout."""
    if layer.op_type == "Conv":
        return shape[0]
    if layer.op_type == "ConvTranspose":
        return shape[1] * int(attribute(layer, "group", 1))
    return shape[0 if attribute(layer, "transB", 0) else 1]


def scaled_weight(layer: ir.Node, weight: ir.TensorProtocol, scale: Array) -> ir.TensorProtocol:
    """``weight`` with each output channel times its ``scale`` [channels], in the type of ``weight``.

    From ``storage.LARGE`` bytes on it is computed when it is read, a block at a time. Declines where a number does not
    fit into the type.
    """
    shape, dtype = tuple(weight.shape.numpy()), weight.dtype.numpy()
    spread = _spread(layer, shape, scale)
    if weight.nbytes < LARGE:
        return ir.Tensor(rounded(weight.numpy().astype(np.float64) * spread, dtype), name=weight.name)

    def open() -> Read:
        read, wide = reader(weight), np.broadcast_to(spread, shape).flat
        return lambda start, stop: rounded(read(start, stop).astype(np.float64) * wide[start:stop], dtype)

    made = StreamedTensor(open, weight.dtype, ir.Shape(shape), name=weight.name, provenance="lazy: fold-batchnorm")
    for _ in blocks(made):  # declines now, if at all
        pass
    return made


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """``array`` in ``dtype``; declines where a finite number would overflow."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not np.all(np.isfinite(result)):
        decline(f"the folded numbers do not fit into {dtype}")
    return result


def _spread(layer: ir.Node, shape: Sequence[int], scale: Array) -> Array:
    """``scale`` in a shape that broadcasts over a weight of ``shape``."""
    tail = (1,) * (len(shape) - 2)
    if layer.op_type == "Conv":
        return scale.reshape(-1, 1, *tail)
    if layer.op_type == "ConvTranspose":  # W [C, M/group, ...]: input channel c belongs to group c // (C/group)
        groups = int(attribute(layer, "group", 1))
        rows = scale.reshape(groups, -1)
        return np.repeat(rows, shape[0] // groups, axis=0).reshape(*shape[:2], *tail)
    return scale.reshape(-1, 1) if attribute(layer, "transB", 0) else scale.reshape(1, -1)
