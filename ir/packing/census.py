"""What decides how small a tensor can be stored: its values, where they are, narrower types, and repeats."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..sparse import SparseTensor, stored_bytes
from ..storage import BLOCK, Array, blocks, reader, value_counts

NARROWER = {
    ir.DataType.FLOAT: (ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
    ir.DataType.DOUBLE: (ir.DataType.FLOAT16, ir.DataType.FLOAT),
    ir.DataType.INT64: (ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32),
    ir.DataType.INT32: (ir.DataType.INT8, ir.DataType.INT16),
}
"""Narrower types that each may be stored in, narrowest first."""

_SPARSE = 0.55  # density up to which gaps may pay
_MOST = 2**31 - 1  # elements: places are int32
_SAMPLE = 64  # elements

TYPES = (
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL),
    *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
    *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
)
"""Types that ONNX Runtime's decoding operators all take."""

Counts = tuple[Array, Array] | None


@dataclass(frozen=True, slots=True)
class Repeat:
    """The tensor, as [before, times, block], is one [before, 1, block] stretched."""

    before: int
    times: int
    block: int


@dataclass(eq=False)
class Census:
    """A tensor's elements by their bits, counted when first asked for; what it counts it reads a block at a time.

    ``counts``: patterns and how often each occurs, as ``storage.value_counts`` has them; None where there are more
    than 65,536.
    """

    tensor: ir.TensorProtocol
    counts: Counts
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = tuple(self.tensor.shape.numpy())

    @classmethod
    def of(cls, tensor: ir.TensorProtocol) -> Census:
        return cls(tensor, value_counts(tensor))

    @property
    def size(self) -> int:
        return self.tensor.size

    @property
    def dtype(self) -> ir.DataType:
        return self.tensor.dtype

    @property
    def bytes(self) -> int:
        """What it takes now."""
        return stored_bytes(self.tensor)

    @property
    def obstacle(self) -> str | None:
        """Why none of the encodings can hold it."""
        if self.dtype not in TYPES:
            return f"{self.dtype.name.lower()}, which the operators that decode do not take"
        if self.size == 0:
            return "empty"
        return "more elements than a 32-bit place can tell apart" if self.size > _MOST else None

    @functools.cached_property
    def bits(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integers of the elements' width."""
        return np.dtype(f"u{self.dtype.itemsize:.0f}")

    def patterns(self) -> Iterator[Array]:
        """The elements' bits, in C order."""
        return (np.ascontiguousarray(block).view(self.bits) for block in blocks(self.tensor))

    @functools.cached_property
    def palette(self) -> Array | None:
        """The distinct patterns, ascending."""
        return None if self.counts is None else np.ascontiguousarray(self.counts[0]).view(self.bits)

    @functools.cached_property
    def background(self) -> int:
        """The pattern that occurs most; zero where there are too many to count."""
        return 0 if self.counts is None or self.palette is None else int(self.palette[self.counts[1].argmax()])

    @functools.cached_property
    def kept(self) -> int:
        """How many elements are not ``background``."""
        if self.counts is not None:
            return self.size - int(self.counts[1].max())
        return self.size - sum(int(np.count_nonzero(block == 0)) for block in self.patterns())

    @functools.cached_property
    def _steps(self) -> tuple[Array, Array] | None:
        """How far each element that is kept is from the one before, or from the first: distances, and counts."""
        if self.kept > _SPARSE * self.size:
            return None
        found, last, start = Counter[int](), 0, 0
        for block in self.patterns():
            places = np.flatnonzero(block != self.background) + start
            steps, counts = np.unique(np.diff(places, prepend=last), return_counts=True)
            found.update(dict(zip(steps.tolist(), counts.tolist(), strict=True)))
            last, start = int(places[-1]) if places.size else last, start + block.size
        found.pop(0, None)  # the first element of all, which has an entry whatever it is
        return np.array(list(found), np.int64), np.array(list(found.values()), np.int64)

    def entries(self, gap: int) -> tuple[int, int] | None:
        """How many entries no further than ``gap`` from the next there are: one for the first element, those for the
        elements kept, and those that bridge longer gaps; and how many more there may be, where short gaps are bridged
        too. None where too little is background."""
        if self._steps is None:
            return None
        steps, counts = self._steps
        least = 1 + int((counts * (1 + (steps - 1) // gap)).sum())
        return least, int(counts[(steps - 1) % gap > 0].sum())

    @functools.cached_property
    def narrow(self) -> ir.DataType | None:
        """The narrowest type that a Cast brings every element back from, bit by bit; None where there is none."""
        for dtype in NARROWER.get(self.dtype, ()):
            if all(_comes_back(block, dtype) for block in self._floats()):
                return dtype
        return None

    def _floats(self) -> Iterator[Array]:
        if self.counts is not None:
            yield self.counts[0]
        else:
            yield from blocks(self.tensor)

    @functools.cached_property
    def repeat(self) -> Repeat | None:
        """The repetition that saves most."""
        if self.counts is not None and len(self.counts[0]) == 1:
            return Repeat(1, self.size, 1)
        if isinstance(self.tensor, SparseTensor):
            return None
        shape = self.shape
        for times, axis, period in sorted(_periods(shape), reverse=True):
            before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
            found = Repeat(before, times, period * after)
            if self._repeats(found):
                return found
        return None

    def _repeats(self, found: Repeat) -> bool:
        """Whether every element equals that of the first block; a few that do not decide it for most tensors."""
        read, group = reader(self.tensor), found.times * found.block
        for place in range(self.size - 1, 0, -max(1, self.size // _SAMPLE)):
            first = place - (place % group // found.block) * found.block
            if read(place, place + 1).tobytes() != read(first, first + 1).tobytes():
                return False
        whole = self._raw(self.tensor.numpy().reshape(-1)).reshape(found.before, found.times, found.block)
        return all(bool((part == part[:, :1]).all()) for part in np.array_split(whole, -(-self.size // BLOCK)))

    def _raw(self, block: Array) -> Array:
        return np.ascontiguousarray(block).view(self.bits)


def _periods(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(times, axis, period) for every way in which an axis may repeat a part of itself."""
    for axis, size in enumerate(shape):
        yield from ((size // period, axis, period) for period in range(1, size // 2 + 1) if size % period == 0)


def _comes_back(block: Array, dtype: ir.DataType) -> bool:
    """Whether a cast there and back keeps every bit; NaN does not count on keeping its payload."""
    if block.dtype.kind == "f" and np.isnan(block).any():
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        there = block.astype(dtype.numpy()).astype(block.dtype)
    return there.tobytes() == block.tobytes()
