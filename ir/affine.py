"""Affine quantization: a real number x as an integer q, with x ~ (q - zero point) * scale.

Arithmetic as ONNX's QuantizeLinear and DequantizeLinear define it: the quotient is rounded half to even, shifted by the
zero point and saturated; scales are float32. Jacob et al., 2018 (arXiv 1712.05877), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

LEAST_SCALE = float(np.finfo(np.float32).tiny)  # a scale of 0 would divide by it; one of less loses bits


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers that a quantized number may take: a type, and the range of it that is used.

    ``reduced`` 7-bit weights use a part of their type only, so that two products of them with uint8 fit into 16 bits.
    """

    dtype: ir.DataType
    lowest: int
    highest: int

    @classmethod
    def of(cls, dtype: ir.DataType, *, symmetric: bool = False) -> Grid:
        """All of ``dtype``; ``symmetric`` leaves out the lowest of a signed type, which has no negative."""
        bits = dtype.bitwidth
        if not dtype.is_signed():
            return cls(dtype, 0, 2**bits - 1)
        return cls(dtype, -(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1)

    @property
    def steps(self) -> int:
        return self.highest - self.lowest

    @property
    def middle(self) -> int:
        """The zero point of symmetric quantization: 0 of a signed type, 128 of uint8."""
        return 0 if self.lowest <= 0 and self.dtype.is_signed() else (self.lowest + self.highest + 1) // 2


U8 = Grid.of(ir.DataType.UINT8)
S8 = Grid.of(ir.DataType.INT8, symmetric=True)
S8_7BIT = Grid(ir.DataType.INT8, -63, 63)


@dataclass(frozen=True, eq=False, slots=True)
class Affine:
    """A scale (float32) and zero point (of the grid's type), scalars or of one shape, and the integers they go with."""

    scale: Array
    zero_point: Array
    grid: Grid

    def quantized(self, values: Array) -> Array:
        """``values`` (float) as integers of the grid, in its type; scale and zero point broadcast over them."""
        quotient = np.asarray(np.rint(values.astype(np.float32) / self.scale))
        quotient += self.zero_point.astype(np.float32)
        np.clip(quotient, self.grid.lowest, self.grid.highest, out=quotient)
        return quotient.astype(self.grid.dtype.numpy())

    def dequantized(self, integers: Array) -> Array:
        """The float32 numbers that ``integers`` stand for."""
        steps = integers.astype(np.int32) - self.zero_point.astype(np.int32)
        return np.asarray(steps.astype(np.float32) * self.scale, np.float32)

    def rounded(self, values: Array) -> Array:
        """``values`` as they are after quantization and back, float32."""
        return self.dequantized(self.quantized(values))


def affine(
    low: Array | float, high: Array | float, grid: Grid, *, symmetric: bool = False, power_of_two: bool = False
) -> Affine:
    """The finest scale and the zero point whose integers span [``low``, ``high``] and 0, elementwise.

    0 is always one of the numbers, so that padding and the bend of Relu are exact. ``symmetric`` puts it in the middle
    of the grid. ``power_of_two`` takes the next greater scale 2^-p: fixed point, q = round(x * 2^p). A range of nothing
    but 0 gets scale 1. Raises ``ValueError`` for a bound that is not finite.
    """
    low, high = (np.minimum(np.asarray(low, np.float64), 0), np.maximum(np.asarray(high, np.float64), 0))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a range that is not finite has no scale")
    if symmetric:
        extent, steps = np.maximum(-low, high), min(grid.highest - grid.middle, grid.middle - grid.lowest)
    else:
        extent, steps = high - low, grid.steps
    with np.errstate(divide="ignore"):
        exact = extent / steps
        scale = np.exp2(np.ceil(np.log2(exact))) if power_of_two else exact
    scale = np.where(extent > 0, np.maximum(scale, LEAST_SCALE), 1.0).astype(np.float32)
    if symmetric:
        zero_point = np.full(scale.shape, grid.middle)
    else:
        zero_point = np.clip(np.rint(grid.lowest - low / scale.astype(np.float64)), grid.lowest, grid.highest)
    return Affine(scale, zero_point.astype(grid.dtype.numpy()), grid)
