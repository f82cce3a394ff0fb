"""Weights with some of their elements pruned, made a block at a time when they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...ir.quantization import Quantization, magnitude_reader
from ...ir.storage import BLOCK, Array, Read, StreamedTensor, reader
from ...ir.weights import Weight
from .threshold import cut

Open = Callable[[], Read]


@dataclass(frozen=True, eq=False)
class Stored:
    """What a weight held before it was pruned; later changes of the weight do not reach it."""

    tensor: ir.TensorProtocol
    quantization: Quantization | None

    @classmethod
    def of(cls, weight: Weight) -> Stored:
        return cls(weight.tensor, weight.quantization)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    def zero(self, start: int, stop: int) -> Array:
        """What a pruned element becomes, for the flat elements [start, stop) or as a scalar for all."""
        if self.quantization is None:
            return np.zeros((), self.tensor.dtype.numpy())
        return self.quantization.at(self.quantization.zero_point, self.shape, start, stop)


def pruned(stored: Stored, made: Open, provenance: str = "") -> StreamedTensor:
    """The tensor that ``made`` makes, in the type and shape of what was stored."""
    like = stored.tensor
    shape = ir.Shape(stored.shape)
    return StreamedTensor(made, like.dtype, shape, name=like.name, provenance=f"lazy: {provenance}")


def hard(stored: Stored, threshold: float, until: int) -> Open:
    """Elements that are cut become zero, the others stay."""

    def open() -> Read:
        read = reader(stored.tensor)
        magnitudes = magnitude_reader(stored.tensor, stored.quantization, np.empty(BLOCK, np.float32))

        def part(start: int, stop: int) -> Array:
            chosen = cut(magnitudes(start, stop), start, threshold, until)
            return zeroed(read(start, stop), chosen, stored.zero(start, stop))

        return part

    return open


def soft(stored: Stored, threshold: float, until: int) -> Open:
    """Elements that are cut become zero, the others come ``threshold`` nearer to zero without reaching it."""

    def open() -> Read:
        read = reader(stored.tensor)
        magnitudes = magnitude_reader(stored.tensor, stored.quantization)

        def part(start: int, stop: int) -> Array:
            held, magnitude = read(start, stop), magnitudes(start, stop)
            rest = np.maximum(magnitude.astype(np.float64) - threshold, 0)
            shrunk = _shrunk(stored, held, rest, start)
            return zeroed(shrunk, cut(magnitude, start, threshold, until), stored.zero(start, stop))

        return part

    return open


def _shrunk(stored: Stored, held: Array, rest: Array, start: int) -> Array:
    """``held`` with magnitudes ``rest``, but nothing nearer to zero than the least that its type can tell from it."""
    quantization = stored.quantization
    if quantization is None:
        least = float(ml_dtypes.finfo(held.dtype).smallest_normal)  # type: ignore[no-untyped-call]
        left = np.minimum(np.maximum(rest, least), np.abs(held.astype(np.float64)))
        return np.copysign(left, held.astype(np.float64)).astype(held.dtype)
    stop = start + held.size
    steps = quantization.steps(held, stored.shape, start)
    scale = np.abs(quantization.at(quantization.scale, stored.shape, start, stop).astype(np.float64))
    left = np.minimum(np.maximum(np.rint(rest / scale), 1), np.abs(steps))
    zero_point = quantization.at(quantization.zero_point, stored.shape, start, stop).astype(np.float64)
    return np.asarray(zero_point + np.copysign(left, steps)).astype(held.dtype)


def n_of_m(stored: Stored, keep: int, group: int, axis: int) -> Open:
    """Of each ``group`` neighbours along ``axis`` the ``keep`` largest stay; what remains of the axis stays dense.

    Of equal magnitudes those that come first become zero.
    """
    inner = math.prod(stored.shape[axis + 1 :])
    length = stored.shape[axis]

    def open() -> Read:
        read, magnitudes = reader(stored.tensor), magnitude_reader(stored.tensor, stored.quantization)

        def part(start: int, stop: int) -> Array:
            chosen = np.zeros(stop - start, bool)
            for first, last, rows in _whole_groups(start, stop, length, inner, group):
                window = magnitudes(first, last).reshape(-1, rows, inner)
                grouped = window[:, : rows // group * group].reshape(-1, group, inner)
                found = np.zeros(window.shape, bool)
                found[:, : rows // group * group] = _least(grouped, group - keep).reshape(len(window), -1, inner)
                begin, end = max(first, start), min(last, stop)
                chosen[begin - start : end - start] = found.reshape(-1)[begin - first : end - first]
            return zeroed(read(start, stop), chosen, stored.zero(start, stop))

        return part

    return open


def _whole_groups(start: int, stop: int, length: int, inner: int, group: int) -> Iterator[tuple[int, int, int]]:
    """Flat ranges that cover the groups in [start, stop), each of whole stretches of so many steps along the axis.

    Where the axis as a whole is no more than a block, a range holds all its steps, else only those of whole groups.
    """
    row, slab = length * inner, group * inner
    if row <= BLOCK:
        yield start // row * row, -(-stop // row) * row, length
        return
    for base in range(start // row * row, stop, row):
        begin, end = max(start - base, 0), min(stop - base, length // group * slab)
        if begin < end:
            yield base + begin // slab * slab, base - (-end // slab) * slab, group


def _least(magnitudes: Array, count: int) -> Array:
    """The ``count`` least along axis 1 of [n, group, inner], earlier ones before equal later ones, as a bool array."""
    before = np.zeros(magnitudes.shape, np.int8)
    for one, other in combinations(range(magnitudes.shape[1]), 2):
        first = magnitudes[:, one] <= magnitudes[:, other]
        before[:, other] += first
        before[:, one] += ~first
    return before < count


def zeroed(held: Array, chosen: Array, zero: Array) -> Array:
    """``held`` with ``zero`` in the chosen places.

    On bits, for a mask costs a third of what ``np.where`` does where the choice cannot be foreseen.
    """
    unsigned, signed = np.dtype(f"u{held.dtype.itemsize}"), np.dtype(f"i{held.dtype.itemsize}")
    mask = chosen.view(np.int8).astype(signed)
    mixed = np.subtract(mask, 1, out=mask).view(unsigned)  # all ones where an element stays
    bits, fill = np.ascontiguousarray(held).view(unsigned), np.asarray(zero).view(unsigned)
    if fill.any():
        np.bitwise_and(bits ^ fill, mixed, out=mixed)
        np.bitwise_xor(mixed, fill, out=mixed)
    else:
        np.bitwise_and(bits, mixed, out=mixed)
    result: Array = mixed.view(held.dtype)
    return result
