"""Scales and shifts of channels, moved into the layer before: y = s (W x + b) + t is (s W) x + (s b + t).

Computed in float64 and rounded once to the layer's own type (Jacob et al. 2018, section 3.2, for BatchNormalization).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .match import attribute, decline

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


def scaled_weight(layer: ir.Node, weight: Array, scale: Array) -> Array:
    """``weight`` with each output channel times its ``scale`` [channels], in the dtype of ``weight``.

    Declines where a number does not fit into that type.
    """
    return rounded(weight.astype(np.float64) * _spread(layer, weight, scale), weight.dtype)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """``array`` in ``dtype``; declines where a finite number would overflow."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not np.all(np.isfinite(result)):
        decline(f"the folded numbers do not fit into {dtype}")
    return result


def _spread(layer: ir.Node, weight: Array, scale: Array) -> Array:
    """``scale`` in a shape that broadcasts over ``weight``."""
    tail = (1,) * (weight.ndim - 2)
    if layer.op_type == "Conv":
        return scale.reshape(-1, 1, *tail)
    if layer.op_type == "ConvTranspose":  # W [C, M/group, ...]: input channel c belongs to group c // (C/group)
        groups = int(attribute(layer, "group", 1))
        rows = scale.reshape(groups, -1)
        return np.repeat(rows, weight.shape[0] // groups, axis=0).reshape(*weight.shape[:2], *tail)
    return scale.reshape(-1, 1) if attribute(layer, "transB", 0) else scale.reshape(1, -1)
