"""Stored tensors, a block at a time: reading, making lazily, counting zeros and values, and how small they could be.

Nothing here holds more than a few MiB beyond a tensor that is mapped from a file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from .external import MappedTensor
from .sparse import SparseTensor

BLOCK = 1 << 16  # elements; 256 KiB of float32 stay in a core's cache from one numpy call to the next
DISTINCT_LIMIT = 1 << 16
FEW = 1 << 12  # elements that are sorted to be counted
LARGE = 1 << 20  # bytes from which a tensor that a pass computes is better made anew at each reading than held

Array = np.ndarray[Any, Any]
Read = Callable[[int, int], Array]  # flat elements [start, stop) in C order


class MadeTensor(ir.LazyTensor):
    """A tensor made when it is read, and not kept; ``provenance`` says how, as ``lazy: prune-magnitude(...)``."""

    __slots__ = ("provenance",)

    def __init__(
        self, make: Callable[[], Array], dtype: ir.DataType, shape: ir.Shape, *, name: str | None, provenance: str
    ) -> None:
        super().__init__(lambda: ir.Tensor(make(), dtype=dtype, name=name), dtype, shape, name=name)
        self.provenance = provenance


class StreamedTensor(MadeTensor):
    """A tensor made a block at a time: ``tofile`` writes it without ever holding it whole.

    ``open`` begins a sweep: it returns a function that makes flat parts.
    """

    __slots__ = ("open",)

    def __init__(
        self,
        open: Callable[[], Read],
        dtype: ir.DataType,
        shape: ir.Shape,
        *,
        name: str | None,
        provenance: str,
    ) -> None:
        super().__init__(self._whole, dtype, shape, name=name, provenance=provenance)
        self.open = open

    def tofile(self, file: Any) -> None:
        """Write the tensor's bytes in blocks of at most 64 Ki elements; ``file`` needs ``write`` only."""
        plain = self.dtype.bitwidth >= 8 and sys.byteorder == "little"
        for block in blocks(self):
            if plain:
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
            else:
                file.write(ir.Tensor(block, dtype=self.dtype).tobytes())

    def _whole(self) -> Array:
        whole = np.empty(self.size, self.dtype.numpy())
        for start, block in zip(range(0, self.size, BLOCK), blocks(self), strict=True):
            whole[start : start + block.size] = block
        return whole.reshape(self.shape.numpy())


def reader(tensor: ir.TensorProtocol) -> Read:
    """A function that reads parts of ``tensor`` in its numpy (ml_dtypes) type; for one sweep, not to be kept."""
    if isinstance(tensor, StreamedTensor):
        return tensor.open()
    if isinstance(tensor, SparseTensor):
        return tensor.reader()
    packed = _packed_bytes(tensor)
    if packed is not None:
        return _unpacker(packed, tensor.dtype)
    flat = tensor.numpy().reshape(-1)
    return lambda start, stop: flat[start:stop]


def blocks(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """The elements of ``tensor`` in C order, ``BLOCK`` at a time."""
    read, size = reader(tensor), tensor.size
    return (read(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def _packed_bytes(tensor: ir.TensorProtocol) -> Array | None:
    """The bytes of a tensor of less than 8 bits an element that lies packed in memory or in a file."""
    if tensor.dtype.bitwidth >= 8:
        return None
    if isinstance(tensor, ir.PackedTensor):
        return tensor.numpy_packed().reshape(-1)
    return tensor.data if isinstance(tensor, MappedTensor) else None


def _unpacker(packed: Array, dtype: ir.DataType) -> Read:
    def read(start: int, stop: int) -> Array:
        even = start // 4 * 4  # four elements of 2, 4 or 6 bits fill whole bytes
        part = packed[even * dtype.bitwidth // 8 : math.ceil(stop * dtype.bitwidth / 8)]
        return ir.PackedTensor(part, dtype, shape=[stop - even]).numpy()[start - even :]

    return read


# Counting -------------------------------------------------------------------------------------------------------------


def is_zero(block: Array) -> Array:
    """Where the elements of an array of any ONNX type equal 0."""
    if block.dtype.kind == "V" and block.dtype.itemsize == 2:  # bfloat16: comparing its bits is 20 times as fast
        block = block.view(np.uint16) & 0x7FFF
    return cast(Array, block == np.zeros((), block.dtype))


class ValueCounts:
    """Counts of the distinct bit patterns of a tensor, as long as they are few.

    Patterns of up to 16 bits index a table. Wider ones go through a hash table with one pattern a slot; what finds
    its slot taken by another goes through sorting, so counts are exact whatever collides.
    """

    def __init__(self, dtype: np.dtype[Any], limit: int = DISTINCT_LIMIT) -> None:
        self.dtype, self.limit = dtype, limit
        self.bits = np.dtype(f"u{dtype.itemsize}")
        self._slot_counts = np.zeros(1 << min(16, 8 * dtype.itemsize), np.int64)
        self._slots = np.zeros(1 << 16, self.bits)
        self._used = np.zeros(1 << 16, bool)
        self._others: dict[int, int] = {}

    def add(self, block: Array) -> bool:
        """Count the elements of ``block``; False as soon as there are more than ``limit`` distinct ones."""
        patterns = np.ascontiguousarray(block).view(self.bits)
        size = self._slot_counts.size
        if self.bits.itemsize <= 2:
            self._slot_counts += np.bincount(patterns, minlength=size)
        elif patterns.size and (patterns == patterns[0]).all():  # what nobody has written to, or pruned away
            self._add_same(patterns)
        else:
            slots = self._hash(patterns)
            found = (self._slots[slots] == patterns) & self._used[slots]
            self._slot_counts += np.bincount(slots[found], minlength=size)
            if not found.all():
                self._add_new(*np.unique(patterns[~found], return_counts=True))
        return len(self) <= self.limit

    def _add_same(self, patterns: Array) -> None:
        slot = self._hash(patterns[:1])[0]
        if self._used[slot] and self._slots[slot] == patterns[0]:
            self._slot_counts[slot] += patterns.size
        else:
            self._add_new(patterns[:1], np.array([patterns.size]))

    def _add_new(self, patterns: Array, counts: Array) -> None:
        slots = self._hash(patterns)
        _, first = np.unique(slots, return_index=True)
        first = first[~self._used[slots[first]]]
        self._slots[slots[first]], self._used[slots[first]] = patterns[first], True
        self._slot_counts[slots[first]] = counts[first]
        rest = np.ones(patterns.size, bool)
        rest[first] = False
        for pattern, count in zip(patterns[rest].tolist(), counts[rest].tolist(), strict=True):
            self._others[pattern] = self._others.get(pattern, 0) + count

    def _hash(self, patterns: Array) -> Array:
        odd = {4: 0x9E3779B1, 8: 0x9E3779B97F4A7C15}[self.bits.itemsize]  # multiplicative hashing, Knuth 6.4
        hashed: Array = (patterns * self.bits.type(odd)) >> self.bits.type(8 * self.bits.itemsize - 16)
        return hashed.astype(np.intp)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._slot_counts)) + len(self._others)

    def values(self) -> tuple[Array, Array]:
        """The distinct values (in the tensor's type) and how often each occurs (int64), by bit pattern."""
        taken = np.flatnonzero(self._slot_counts)
        patterns = taken.astype(self.bits) if self.bits.itemsize <= 2 else self._slots[taken]
        patterns = np.append(patterns, np.fromiter(self._others, self.bits, len(self._others)))
        counts = np.append(self._slot_counts[taken], np.fromiter(self._others.values(), np.int64, len(self._others)))
        order = np.argsort(patterns)
        return patterns[order].view(self.dtype), counts[order]


def value_counts(tensor: ir.TensorProtocol, limit: int = DISTINCT_LIMIT) -> tuple[Array, Array] | None:
    """The distinct values of ``tensor`` and their counts, or None where there are more than ``limit``.

    Values are told apart by their bits, as a file stores them: 0.0 and -0.0 are two.
    """
    dtype = np.dtype(tensor.dtype.numpy())
    if dtype.itemsize > 8 or dtype.kind == "O":
        return None
    if isinstance(tensor, SparseTensor):
        return _sparse_counts(tensor, limit)
    if tensor.size <= FEW:
        patterns, found = np.unique(
            np.ascontiguousarray(reader(tensor)(0, tensor.size)).view(f"u{dtype.itemsize}"), return_counts=True
        )
        return (patterns.view(dtype), found) if len(found) <= limit else None
    counts = ValueCounts(dtype, limit)
    return counts.values() if all(counts.add(block) for block in blocks(tensor)) else None


def _sparse_counts(tensor: SparseTensor, limit: int) -> tuple[Array, Array] | None:
    """From the stored elements; the others are zero bits, which come first."""
    stored = tensor.values()
    found = value_counts(ir.Tensor(stored, dtype=tensor.dtype), limit)
    if found is None or stored.size == tensor.size:
        return found
    values, counts = found
    if not values.size or values[:1].tobytes().strip(b"\0"):
        values = np.append(np.zeros(1, values.dtype), values)
        counts = np.append(np.zeros(1, np.int64), counts)
    counts[0] += tensor.size - stored.size
    return (values, counts) if len(values) <= limit else None


def distinct(tensor: ir.TensorProtocol, limit: int = DISTINCT_LIMIT) -> int | None:
    """How many distinct values ``tensor`` holds, or None where there are more than ``limit``."""
    found = value_counts(tensor, limit)
    return None if found is None else len(found[0])


# How small it could be ------------------------------------------------------------------------------------------------


def entropy(counts: Array) -> float:
    """Shannon's entropy in bits of one draw, from counts."""
    share = counts[counts > 0] / max(1, counts.sum())
    return float(-(share * np.log2(share)).sum())


def mask_bytes(size: int, zeros: int, bits: int) -> int:
    """Bytes of the non-zeros, ``bits`` each, and of a mask that says where they are, at its entropy."""
    mask = size * entropy(np.array([zeros, size - zeros], np.int64))
    return math.ceil((mask + (size - zeros) * bits) / 8)


def value_bytes(counts: Array, bits: int) -> int:
    """Bytes of the values at their entropy, and of a table of the distinct ones."""
    present = counts[counts > 0]
    return math.ceil((int(present.sum()) * entropy(present) + present.size * bits) / 8)


def entropy_bytes(tensor: ir.TensorProtocol, zeros: int) -> int:
    """The least bytes that any of three storages could take: dense, mask and non-zeros, coded values and their table.

    ``zeros`` are the elements that carry nothing: those equal to zero, or to the zero point. The bounds look at
    elements one by one, so a compressor that finds repeats may do better.
    """
    found = value_counts(tensor)
    return least_bytes(tensor, zeros, None if found is None else found[1])


def least_bytes(tensor: ir.TensorProtocol, zeros: int, counts: Array | None) -> int:
    """``entropy_bytes`` where the counts of its values are known already, or known to be too many (None)."""
    bits = tensor.dtype.bitwidth
    best = min(int(tensor.nbytes), mask_bytes(tensor.size, zeros, bits))
    return best if counts is None else min(best, value_bytes(counts, bits))
