"""A linear layer from the features of one model to those that another model's head was trained on (model stitching).

Lenc and Vedaldi, Understanding image representations by measuring their equivariance and equivalence (2015); Bansal,
Nakkiran and Barak, Revisiting model stitching (2021). Here the layer is fitted to the features themselves, by least
squares, not trained through the head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...ir.errors import BadFeeds, UsageError
from ...ir.shapes import Dims
from ..base import Array
from .adapters import small_model

_FLOAT = ir.DataType.FLOAT
_SMALLEST = 1e-12  # singular values of the moments, as a share of the largest, that count for nothing


@dataclass
class Fitted:
    """``weight`` [out, in], ``bias`` [out], float32. ``error``: the root of what is left of the targets' variance."""

    weight: Array
    bias: Array
    samples: int
    error: float


def least_squares(pairs: Iterable[tuple[Array, Array]]) -> Fitted:
    """The affine map from features to targets, both [samples, channels] or [samples, channels, ...], that leaves the
    least squared error. Sums of products are kept, in float64, not the samples. Raises ``BadFeeds``."""
    moments = cross = None
    squares = 0.0
    total: Array | None = None
    for features, targets in pairs:
        x, y = _rows(features), _rows(targets)
        if len(x) != len(y):
            raise BadFeeds(
                f"The features have {len(x)} rows and the values to fit them to {len(y)}; they must pair up."
            )
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        if moments is None or cross is None or total is None:
            moments, cross, total = x.T @ x, x.T @ y, y.sum(axis=0)
        else:
            moments, cross, total = moments + x.T @ x, cross + x.T @ y, total + y.sum(axis=0)
        squares += float((y**2).sum())
    if moments is None or cross is None or total is None:
        raise BadFeeds("The data hold no samples; the linear adapter is fitted on them.")
    count = round(float(moments[-1, -1]))
    if not (np.isfinite(moments).all() and np.isfinite(cross).all()):
        raise BadFeeds("The features on these data are not all finite; the linear adapter cannot be fitted to them.")
    solved = np.linalg.lstsq(moments, cross, rcond=_SMALLEST)[0]
    left = squares - 2 * float((solved * cross).sum()) + float((solved * (moments @ solved)).sum())
    variance = squares - float((total**2).sum()) / max(count, 1)
    error = (max(left, 0.0) / variance) ** 0.5 if variance > 0 else 0.0
    return Fitted(solved[:-1].T.astype(np.float32), solved[-1].astype(np.float32), count, error)


def _rows(array: Array) -> Array:
    """[samples, channels, ...] as [samples and places, channels] in float64."""
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]).astype(np.float64)


def linear_model(fitted: Fitted, shape: Dims, opset: int) -> ir.Model:
    """A Gemm for features [N, C], a 1x1 Conv for [N, C, H, W]."""
    rank = len(shape)
    weight = fitted.weight if rank == 2 else fitted.weight.reshape(*fitted.weight.shape, *[1] * (rank - 2))
    value = ir.Value(name="x", type=ir.TensorType(_FLOAT), shape=ir.Shape(shape))
    constants = [_constant("weight", weight), _constant("bias", fitted.bias)]
    if rank == 2:
        node = ir.node("Gemm", [value, *constants], {"transB": 1})
    else:
        node = ir.node("Conv", [value, *constants], {"kernel_shape": [1] * (rank - 2)})
    after = (shape[0], len(fitted.bias), *shape[2:])
    return small_model(value, [node], constants, ir.TensorType(_FLOAT), after, opset)


def require_stitchable(shapes: tuple[Dims | None, Dims | None], kinds: tuple[object, object], joint: str) -> Dims:
    """The shape of the features. Raises ``UsageError`` unless both sides are float32 of one rank, 2 or more, with a
    known number of channels on axis 1."""
    one, two = shapes
    known = one is not None and two is not None and len(one) == len(two) and 2 <= len(one) <= 5
    if not known or kinds != (_FLOAT, _FLOAT):
        raise UsageError(
            f"{joint} cannot be stitched by a linear adapter: both must be float32, of one rank from 2 to 5, channels "
            "on axis 1."
        )
    assert one is not None
    return one


def _constant(name: str, array: Array) -> ir.Value:
    array = np.ascontiguousarray(array)
    return ir.Value(
        name=name, type=ir.TensorType(_FLOAT), shape=ir.Shape(array.shape), const_value=ir.Tensor(array, name=name)
    )
