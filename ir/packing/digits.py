"""Numbers below a limit in few bits: several digits to a byte, and tables of 256 rows that take them apart again.

A byte holds 8 digits below 2, 5 below 3, 4 below 4, 3 below 6, or 2 below 16; two bytes hold 5 below 9, where there are
so many numbers that a table of 59,049 rows pays. What one plane cannot hold is split over some, as the digits of a
number with mixed radix. To decode, each byte picks a row of a table (Gather, which folds and needs no opset above 10),
so no shifts are made.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..storage import Array
from .streams import Flow, Make
from .tape import Tape

_DIGITS = {2: 8, 3: 5, 4: 4, 6: 3, 9: 5, 16: 2, 256: 1, 65536: 1}  # base: digits in a byte, or in two
EVEN = math.lcm(*_DIGITS.values())
"""So many numbers, and multiples of them, leave no byte of any plane in part empty."""

_WIDE = 9  # the base of several digits in two bytes, of so many numbers at least:
_MANY = 1 << 18
_MOST_PLANES = 3
_TIME = 0.15  # bits for which one more plane is not worth the time it takes to decode
_NODES = 100  # bytes of a node that reads a plane, with the names in it


@dataclass(frozen=True, slots=True)
class Plane:
    """The digits of one base of all numbers; ``weight`` is what one of them counts."""

    base: int
    weight: int

    @property
    def digits(self) -> int:
        """How many there are in one stored element."""
        return _DIGITS[self.base]

    @property
    def needs_table(self) -> bool:
        return self.digits > 1 or self.weight > 1

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint16 if self.base in (_WIDE, 65536) else np.uint8)

    def packed(self, numbers: Array) -> Array:
        """The plane's digits of ``numbers``, whose count is a multiple of ``digits``, as bytes (or 16 bits)."""
        digits = numbers // self.weight % self.base
        return (digits.reshape(-1, self.digits) @ self.base ** np.arange(self.digits)).astype(self.dtype)

    def table(self, tape: Tape, first: int) -> ir.Value:
        """int32 [256 or more, digits]: what each stored number holds, times ``weight``, plus ``first``; shared by all
        that need it."""
        name = f"{self.base}s" + (f"_by_{self.weight}" if self.weight > 1 else "") + "_from_1" * first
        with tape.sharing(name) as shared:
            if shared.made is None:
                every = tape.numbers(max(256, self.base**self.digits))
                powers = self.base ** np.arange(self.digits, dtype=np.int32)
                made = tape.op("Div", every, tape.constant("powers", powers)) if self.digits > 1 else every
                made = tape.op("Mod", made, tape.constant("base", np.asarray(self.base, np.int32)))
                if self.weight > 1:
                    made = tape.op("Mul", made, tape.constant("weight", np.asarray(self.weight, np.int32)))
                if first:
                    made = tape.op("Add", made, tape.constant("first", np.asarray(first, np.int32)))
                shared.made = made
            return shared.made


def planes(limit: int, count: int) -> tuple[Plane, ...]:
    """The planes that hold ``count`` numbers below ``limit`` (up to 65,536) in the fewest bytes, lowest digits first.

    One plane more has to save what its nodes take, and be worth the time that it takes to decode.
    """
    return min(_choices(limit, count >= _MANY), key=lambda found: (_cost(found, count), len(found)))


def cost(limit: int, count: int) -> int:
    """Bytes that numbers and the nodes that read them take, and those that the time of reading several planes is
    worth."""
    return math.ceil(_cost(planes(limit, count), count))


def _cost(found: tuple[Plane, ...], count: int) -> float:
    return count / 8 * (_bits(found) + _TIME * (len(found) - 1)) + _NODES * _read_by(found)


@functools.cache
def _choices(limit: int, many: bool) -> tuple[tuple[Plane, ...], ...]:
    """For each number of planes those of the fewest bits."""
    if limit > 32768:
        return ((Plane(65536, 1),),)
    found = []
    for count in range(1, _MOST_PLANES + 1):
        bases = (256, 16, 9, 6, 4, 3, 2) if many and count == 1 else (256, 16, 6, 4, 3, 2)
        every = itertools.combinations_with_replacement(bases, count)
        enough = [_of(bases) for bases in every if math.prod(bases) >= limit]
        found += [min(enough, key=_bits)] if enough else []
    return tuple(found)


def _of(bases: tuple[int, ...]) -> tuple[Plane, ...]:
    return tuple(Plane(base, math.prod(bases[:place])) for place, base in enumerate(bases))


def _bits(found: tuple[Plane, ...]) -> float:
    return sum(8 * plane.dtype.itemsize / plane.digits for plane in found)


def _read_by(found: tuple[Plane, ...]) -> int:
    """How many nodes read planes."""
    return sum(3 if plane.needs_table else 1 for plane in found) + len(found) - 1


def bits(limit: int, count: int) -> float:
    """Bits that each of ``count`` numbers below ``limit`` takes."""
    return _bits(planes(limit, count))


def nodes(limit: int, count: int) -> int:
    """How many nodes read them, and leave out those that only fill bytes."""
    return _read_by(planes(limit, count)) + (padded(limit, count) > count)


def padded(limit: int, count: int) -> int:
    """The least number of numbers from ``count`` on that fills whole bytes of every plane."""
    multiple = math.lcm(*(plane.digits for plane in planes(limit, count)))
    return -(-count // multiple) * multiple


def stored_bytes(limit: int, count: int) -> int:
    """Bytes of ``count`` numbers below ``limit``."""
    full = padded(limit, count)
    return sum(full // plane.digits * plane.dtype.itemsize for plane in planes(limit, count))


def write(tape: Tape, word: str, limit: int, count: int, numbers: Make) -> list[ir.Value]:
    """Store a flow of ``count`` numbers below ``limit``: one constant for each plane."""
    found, full = planes(limit, count), padded(limit, count)
    stored = []
    for place, plane in enumerate(found):

        def make(plane: Plane = plane) -> Flow:
            multiple = math.lcm(*(plane.digits for plane in found))
            return (plane.packed(block) for block in _whole(numbers(), multiple))

        label = word if len(found) == 1 else f"{word}_{place}"
        stored.append(tape.stored(label, make, full // plane.digits, ir.DataType.from_numpy(plane.dtype)))
    return stored


def _whole(numbers: Flow, multiple: int) -> Flow:
    """The same flow in blocks of a multiple of ``multiple``, zeros after its end."""
    rest = np.zeros(0, np.int64)
    for block in numbers:
        rest = np.concatenate([rest, block]) if rest.size else block
        whole = rest.size // multiple * multiple
        if whole:
            yield rest[:whole]
        rest = rest[whole:]
    if rest.size:
        yield np.concatenate([rest, np.zeros(-rest.size % multiple, rest.dtype)])


def read(tape: Tape, limit: int, count: int, stored: list[ir.Value], first: int = 0) -> ir.Value:
    """int32 [padded count]: the stored numbers, plus ``first``."""
    total, full = None, padded(limit, count)
    for plane, value in zip(planes(limit, count), stored, strict=True):
        part = tape.op("Cast", value, length=full, to=ir.DataType.INT32)
        offset = first if total is None else 0
        if plane.needs_table:
            part = tape.flat(tape.op("Gather", plane.table(tape, offset), part, length=full, rows=True))
        elif offset:
            part = tape.op("Add", part, tape.constant("first", np.asarray(offset, np.int32)), length=full)
        total = part if total is None else tape.op("Add", total, part, length=full)
    assert total is not None
    return total
