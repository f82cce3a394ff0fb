"""Scales and zero points in the axes of the stored integers, whatever path leads from the storage to its reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .sparse import SparseTensor
from .storage import BLOCK, Read, blocks, is_zero, reader

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Quantization:
    """A stored element q stands for (q - zero_point) * scale.

    ``scale`` (in its own type, for blocks have many) and ``zero_point`` (in the stored type) have the rank of the
    stored tensor and size 1 along each axis on which they do not depend. ``axis`` is the channel axis, or the blocked
    one where ``block`` > 0: then one entry serves ``block`` elements of it. ``axis`` is None per tensor and for more
    than one axis.
    """

    scale: Array
    zero_point: Array
    axis: int | None = None
    block: int = 0

    def same(self, other: Quantization | None) -> bool:
        """Whether both give every element the same value."""
        return (
            other is not None
            and self.block == other.block
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point.astype(np.float64), other.zero_point.astype(np.float64))
        )

    def at(self, values: Array, shape: Sequence[int], start: int, stop: int) -> Array:
        """``values`` (the scale or the zero point) for the flat elements [start, stop) of a tensor of this shape."""
        if values.size == 1:
            return values.reshape(())
        flat, index, step, table_step = np.arange(start, stop), np.zeros(stop - start, np.int64), 1, 1
        for axis in reversed(range(len(shape))):
            if values.shape[axis] > 1:
                position = flat // step % shape[axis]
                index += (position // self.block if self.block and axis == self.axis else position) * table_step
            step *= shape[axis]
            table_step *= values.shape[axis]
        return values.reshape(-1)[index]

    def magnitudes(self, stored: Array, shape: Sequence[int], start: int) -> Array:
        """|(q - zero point) * scale| as float64 for the stored flat elements from ``start`` on; exact."""
        steps = self.steps(stored, shape, start)
        scale = self.at(self.scale, shape, start, start + stored.size).astype(np.float64)
        return np.abs(np.multiply(steps, scale, out=steps), out=steps)

    def steps(self, stored: Array, shape: Sequence[int], start: int) -> Array:
        """q - zero point as float64 for the stored flat elements from ``start`` on."""
        zero_point = self.at(self.zero_point, shape, start, start + stored.size)
        steps: Array = stored.astype(np.float64) - zero_point.astype(np.float64)
        return steps


NARROW = {
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
    ir.DataType.FLOAT4E2M1,
}
"""Types whose values float32 holds exactly."""


def magnitude_reader(
    tensor: ir.TensorProtocol, quantization: Quantization | None = None, buffer: Array | None = None
) -> Read:
    """A function that reads flat parts of |w|, or |(q - zero point) * scale|: float32 where exact, else float64.

    ``buffer`` (float32, one dimension) saves allocation: what fits is made in it, and overwritten by the next read.
    """
    read, shape = reader(tensor), tuple(tensor.shape.numpy())
    if quantization is not None:
        return lambda start, stop: quantization.magnitudes(read(start, stop), shape, start)
    if tensor.dtype not in NARROW:
        return lambda start, stop: np.abs(read(start, stop))
    direct = tensor.dtype is ir.DataType.FLOAT

    def narrow(start: int, stop: int) -> Array:
        size = stop - start
        room = np.empty(size, np.float32) if buffer is None or size > buffer.size else buffer[:size]
        if direct:
            return np.abs(read(start, stop), out=room)
        room[:] = read(start, stop)
        return np.abs(room, out=room)

    return narrow


def placed(values: Array, axes: Sequence[int | None], rank: int) -> Array | None:
    """``values``, given along the axes of a view, as an array along the axes of the stored tensor of ``rank``.

    ``axes`` holds for each axis of the view the stored axis it is; None where it is not one, which is only allowed
    where ``values`` does not depend on it. Returns None otherwise.
    """
    used = [axis for axis, size in enumerate(values.shape) if size > 1]
    stored = [axes[axis] for axis in used]
    if any(axis is None for axis in stored):
        return None
    known = [axis for axis in stored if axis is not None]
    shape = [1] * rank
    for axis, place in zip(used, known, strict=True):
        shape[place] = values.shape[axis]
    squeezed = values.reshape([values.shape[axis] for axis in used])
    return squeezed.transpose(np.argsort(known)).reshape(shape) if known else values.reshape(shape)


def count_zeros(tensor: ir.TensorProtocol, quantization: Quantization | None = None) -> int:
    """How many elements stand for 0: equal to 0 (of either sign), or to the zero point."""
    if tensor.dtype is ir.DataType.STRING:
        return 0
    if quantization is None or (isinstance(tensor, SparseTensor) and bool(is_zero(quantization.zero_point).all())):
        if isinstance(tensor, SparseTensor):
            return tensor.size - int(np.count_nonzero(~is_zero(tensor.values())))
        return sum(int(np.count_nonzero(is_zero(block))) for block in blocks(tensor))
    shape, total = tuple(tensor.shape.numpy()), 0
    for start, block in zip(range(0, tensor.size, BLOCK), blocks(tensor), strict=True):
        zero_point = quantization.at(quantization.zero_point, shape, start, start + block.size)
        total += int(np.count_nonzero(block == zero_point))
    return total
