"""Per channel or per block of a stored tensor: least, greatest and mean magnitude, read a part at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from .storage import BLOCK, Array, reader

Box = tuple[int, int, slice, tuple[int, int, int]]  # flat start and stop, channels, shape [outer, channels, inner]


def channel_range(tensor: ir.TensorProtocol, axis: int | None) -> tuple[Array, Array]:
    """Least and greatest element of each channel along ``axis``, float64, of the tensor's rank with 1 elsewhere.

    ``axis`` None takes all as one channel. NaN where a channel holds one; (inf, -inf) of no elements.
    """
    shape = tuple(tensor.shape.numpy())
    count = 1 if axis is None else shape[axis]
    low, high, read = np.full(count, np.inf), np.full(count, -np.inf), reader(tensor)
    for start, stop, channels, box in _boxes(shape, axis):
        part = read(start, stop).reshape(box)
        low[channels] = np.minimum(low[channels], part.min(axis=(0, 2)).astype(np.float64))
        high[channels] = np.maximum(high[channels], part.max(axis=(0, 2)).astype(np.float64))
    kept = channel_shape(shape, axis)
    return low.reshape(kept), high.reshape(kept)


def mean_magnitude(tensor: ir.TensorProtocol, axis: int | None) -> Array:
    """The mean |w| of each channel, as ``channel_range`` gives its bounds; 0 of no elements."""
    shape = tuple(tensor.shape.numpy())
    total, read = np.zeros(1 if axis is None else shape[axis]), reader(tensor)
    for start, stop, channels, box in _boxes(shape, axis):
        total[channels] += np.abs(read(start, stop).astype(np.float64)).reshape(box).sum(axis=(0, 2))
    mean = total * total.size / max(1, tensor.size)
    return mean.reshape(channel_shape(shape, axis))


def block_range(tensor: ir.TensorProtocol, block: int) -> tuple[Array, Array]:
    """Least and greatest of each ``block`` elements along axis 0 of a matrix [K, N]: float64 [K / block, N].

    ``block`` divides K.
    """
    rows, columns = tensor.shape.numpy()
    low, high, read = np.empty((rows // block, columns)), np.empty((rows // block, columns)), reader(tensor)
    step = max(1, BLOCK // (block * columns))
    for first in range(0, rows // block, step):
        last = min(first + step, rows // block)
        part = read(first * block * columns, last * block * columns).reshape(-1, block, columns)
        low[first:last], high[first:last] = part.min(axis=1), part.max(axis=1)
    return low, high


def channel_shape(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
    """``shape`` with 1 for all axes but ``axis``."""
    return tuple(size if place == axis else 1 for place, size in enumerate(shape))


def spread(values: Array, shape: Sequence[int], block: int = 0) -> Callable[[int, int], Array]:
    """A function that repeats ``values`` for the flat elements [start, stop) of a tensor of this shape.

    ``values`` has the tensor's rank and size 1 on all axes but one; or it is [K / block, N] for a matrix [K, N].
    """
    if values.size == 1:
        scalar = values.reshape(())
        return lambda start, stop: scalar
    if block:
        columns = shape[1]

        def rows(start: int, stop: int) -> Array:
            first, last = start // columns, -(-stop // columns)
            whole = values[np.arange(first, last) // block].reshape(-1)
            return whole[start - first * columns : stop - first * columns]

        return rows
    axis = next(place for place, size in enumerate(values.shape) if size > 1)
    flat, inner = values.reshape(-1), math.prod(shape[axis + 1 :])

    def runs(start: int, stop: int) -> Array:
        first, last = start // inner, -(-stop // inner)  # runs of ``inner`` elements of one channel
        begin = first % flat.size
        channels = np.tile(flat, -(-(begin + last - first) // flat.size))[begin : begin + last - first]
        if inner == 1:
            return channels
        lengths = np.full(last - first, inner)
        lengths[-1] -= last * inner - stop
        lengths[0] -= start - first * inner
        return np.repeat(channels, lengths)

    return runs


def _boxes(shape: Sequence[int], axis: int | None) -> Iterator[Box]:
    """Flat ranges of about ``BLOCK`` elements that cover the tensor, each a box of [outer, channels, inner]."""
    outer, count, inner = 1, 1, math.prod(shape)
    if axis is not None:
        outer, count, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if not outer * count * inner:
        return
    if count * inner <= BLOCK:
        slab, step = count * inner, BLOCK // (count * inner)
        for first in range(0, outer, step):
            last = min(first + step, outer)
            yield first * slab, last * slab, slice(0, count), (last - first, count, inner)
        return
    step, piece = max(1, BLOCK // inner), min(inner, BLOCK)
    for base in range(0, outer * count, count):
        for first in range(0, count, step):
            last = min(first + step, count)
            for start in range(0, inner, piece):
                length = min(piece, inner - start)
                begin = (base + first) * inner + start
                yield begin, begin + (last - first - 1) * inner + length, slice(first, last), (1, last - first, length)
