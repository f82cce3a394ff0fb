"""How the places of elements are held. The values of those that are kept come first to last, after the background's.

What all others are, the background, is the pattern that occurs most: zero in pruned weights, the zero point in
quantized ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ..storage import Array
from . import digits
from .census import Census
from .streams import Flow
from .tape import Tape
from .values import Values, numbers

GAPS = (4, 6, 8, 9, 12, 16, 18, 24, 32, 48, 64, 96, 128, 256)
"""The greatest gaps that an entry can bridge, one of which is chosen."""

NODE = 100  # bytes of one more node
_MOST_PAIRED = 64  # values that leave a byte gaps up to 4
_FAR = 1 << 30
_PADDED = 1 << 14  # entries from which on there are rather some more than nodes that cut off what fills bytes


class Places(Protocol):
    """A storage of places. ``opset`` is the least that its operators need."""

    word: str
    opset: int

    def nodes(self, census: Census, values: Values) -> int:
        """About how many nodes read both."""
        ...

    def bytes(self, census: Census, values: Values) -> int | None:
        """What they and the values take; None where they cannot be held so."""
        ...

    def build(self, tape: Tape, census: Census, values: Values) -> ir.Value:
        """Nodes whose last gives all elements, flat."""
        ...


class Everywhere:
    """Every element has its value."""

    word, opset = "", 5

    def nodes(self, census: Census, values: Values) -> int:
        return values.nodes(census, census.size)

    def bytes(self, census: Census, values: Values) -> int | None:
        return values.bytes(census, census.size)

    def build(self, tape: Tape, census: Census, values: Values) -> ir.Value:
        return values.build(tape, census, census.size, census.patterns)


class Bitmask:
    """A bit for each element says whether it is kept. To decode, a table tells each byte's own ranks, and a running
    sum over bytes how many were kept before. What is not kept is found behind those that are: there are as many of the
    background that none has to be told from another, which takes less time than to clamp their places."""

    word, opset = "bitmask", 12

    def nodes(self, census: Census, values: Values) -> int:
        return values.nodes(census, census.kept) + 11 + (census.size % 8 > 0)

    def bytes(self, census: Census, values: Values) -> int | None:
        held = values.bytes(census, census.kept) if census.kept else None
        return None if held is None else held + (census.size + 7) // 8

    def build(self, tape: Tape, census: Census, values: Values) -> ir.Value:
        def kept() -> Flow:
            return (block[block != census.background] for block in census.patterns())

        def mask() -> Flow:  # blocks hold a multiple of 8 elements
            return (np.packbits(block != census.background, bitorder="little") for block in census.patterns())

        found = tape.flat(values.build(tape, census, census.kept, kept))
        table = tape.op("Concat", found, _background(tape, census, census.kept + 1), axis=0)
        stored = tape.stored("mask", mask, (census.size + 7) // 8, ir.DataType.UINT8)
        ranks, counts = _rank_tables(tape)
        ranks = tape.op("Min", ranks, tape.constant("unset", np.asarray(tape.lengths[found], np.int32)))
        index = tape.op("Cast", stored, to=ir.DataType.INT32)
        before = tape.op("CumSum", tape.picked(counts, index), tape.axis(), exclusive=1)
        before, full = tape.op("Reshape", before, tape.dims(-1, 1)), -(-census.size // 8) * 8
        rank = tape.op("Add", tape.op("Gather", ranks, index), before, length=full, rows=True)
        return tape.picked(table, tape.flat(rank))


@dataclass(frozen=True, order=True, slots=True)
class _Size:
    """What gaps up to ``gap`` take: ``cost`` in bytes with their nodes, without, and how many nodes."""

    cost: int
    bytes: int
    nodes: int
    gap: int


class Gaps:
    """A number for each entry says how far on the next is; longer gaps are bridged by entries of the background."""

    word, opset = "gaps", 11

    def nodes(self, census: Census, values: Values) -> int:
        found = self._sizes(census, values)
        return min(found).nodes if found else 0

    def bytes(self, census: Census, values: Values) -> int | None:
        found = self._sizes(census, values)
        return min(found).bytes if found else None

    def _sizes(self, census: Census, values: Values) -> list[_Size]:
        found = []
        for gap in GAPS:
            count = _count(census, gap)
            held = None if count is None else values.bytes(census, count)
            if count is not None and held is not None:
                size, less = held + digits.stored_bytes(gap, count), 4 + values.nodes(census, count)
                cost = held + digits.cost(gap, count) + NODE * less
                found.append(_Size(cost, size, less + digits.nodes(gap, count), gap))
        return found

    def build(self, tape: Tape, census: Census, values: Values) -> ir.Value:
        gap = min(self._sizes(census, values)).gap
        count = _count(census, gap) or 0
        updates = values.build(tape, census, count, lambda: (kept for _, kept in _entries(census, gap)))
        updates = tape.first(updates, count)
        stored = digits.write(tape, "gaps", gap, count, lambda: (steps for steps, _ in _entries(census, gap)))
        steps = tape.first(digits.read(tape, gap, count, stored, 1), count)
        places = tape.op("CumSum", steps, tape.axis(), exclusive=1)
        return _scattered(tape, census, places, updates)


class Pairs:
    """Gaps over a palette with one byte for both: the digit below the number of values says which one it is."""

    word, opset = "gaps paired with palette", 11

    def nodes(self, census: Census) -> int:
        return 7

    def bytes(self, census: Census) -> int | None:
        limit = 0 if census.palette is None else len(census.palette)
        count = _count(census, 256 // limit) if 1 < limit <= _MOST_PAIRED else None
        return None if count is None else count + limit * census.bits.itemsize

    def build(self, tape: Tape, census: Census) -> ir.Value:
        palette = census.palette
        assert palette is not None
        limit = len(palette)

        def pairs() -> Flow:
            for steps, kept in _entries(census, 256 // limit):
                yield (steps * limit + numbers(palette, kept)).astype(np.uint8)

        stored = tape.stored("pairs", pairs, _count(census, 256 // limit) or 0, ir.DataType.UINT8)
        index = tape.op("Cast", stored, to=ir.DataType.INT32)
        steps, places = _pair_tables(tape, limit)
        table = tape.op("Gather", tape.constant("palette", palette.view(census.dtype.numpy())), places)
        before = tape.op("CumSum", tape.picked(steps, index), tape.axis(), exclusive=1)
        return _scattered(tape, census, before, tape.picked(table, index))


def _pair_tables(tape: Tape, limit: int) -> tuple[ir.Value, ir.Value]:
    """int32 [256] each: what each byte says of the gap, from 1 on, and of the palette."""
    with tape.sharing(f"pairs_{limit}") as steps, tape.sharing(f"paired_{limit}") as places:
        if steps.made is None or places.made is None:
            each = tape.op("Reshape", tape.numbers(256), tape.dims(-1))
            divisor = tape.constant("limit", np.asarray(limit, np.int32))
            places.made = tape.op("Mod", each, divisor)
            one = tape.constant("one", np.asarray(1, np.int32))
            steps.made = tape.op("Add", tape.op("Div", each, divisor), one)
        return steps.made, places.made


def _scattered(tape: Tape, census: Census, places: ir.Value, updates: ir.Value) -> ir.Value:
    """A flat background with these in it."""
    filled = _background(tape, census, census.size)
    return tape.op("ScatterElements", filled, places, updates, length=census.size, axis=0)


def _background(tape: Tape, census: Census, count: int) -> ir.Value:
    """So many of the background, flat."""
    return tape.filled(np.array([census.background], census.bits).view(census.dtype.numpy()), count)


def _count(census: Census, gap: int) -> int | None:
    """How many entries are stored: where there are many, whole bytes of them in any plane, if they can be made so."""
    found = census.entries(gap)
    if found is None:
        return None
    least, spare = found
    more = -least % digits.EVEN
    return least + more if least >= _PADDED and spare >= more else least


def _entries(census: Census, gap: int) -> Iterator[tuple[Array, Array]]:
    """For each entry, its distance to the next less one (0 for the last of all) and its pattern, a part at a time.

    No two are more than ``gap`` apart; the first element has one in any case. There are ``_count`` of them: the first
    gaps that can be are bridged by one entry more than they need.
    """
    least, _ = census.entries(gap) or (0, 0)
    last, start, extra = 0, 0, (_count(census, gap) or 0) - least
    pattern = np.zeros(1, census.bits)
    for block in census.patterns():
        if start == 0:
            pattern = block[:1]
        places = np.flatnonzero(block != census.background) + start
        places = places[places > 0]
        steps = np.diff(places, prepend=last)
        more = (steps - 1) // gap  # entries that bridge what is further
        rest = steps - more * gap - 1
        split = np.flatnonzero(rest)[:extra]
        extra -= split.size
        more[split] += 1
        ends = np.cumsum(more + 1) - 1
        found = np.full(int(more.sum()) + places.size, gap - 1, np.int64)
        found[ends] = rest
        found[ends[split] - 1] = 0
        found[ends[split]] -= 1
        kept = np.full(found.size + 1, census.background, census.bits)
        kept[0], kept[1:][ends] = pattern[0], block[places - start]
        yield found, kept[:-1]
        pattern, start = kept[-1:], start + block.size
        last = int(places[-1]) if places.size else last
    yield np.zeros(1, np.int64), pattern


def _rank_tables(tape: Tape) -> tuple[ir.Value, ir.Value]:
    """int32 [256, 8] and [256]: for each byte, which of its set bits each bit is, from 0 on, and a great number
    where it is not set; and how many are set."""
    with tape.sharing("ranks") as ranks, tape.sharing("counts") as counts:
        if ranks.made is None or counts.made is None:
            bits = digits.Plane(2, 1).table(tape, 0)
            along = tape.constant("along", np.asarray(1, np.int32))
            running = tape.op("CumSum", bits, along)
            far = tape.constant("far", np.asarray(_FAR, np.int32))
            less = tape.op("Mul", bits, tape.constant("near", np.asarray(_FAR + 1, np.int32)))
            ranks.made = tape.op("Sub", tape.op("Add", running, far), less)
            last = tape.constant("last", np.asarray(7, np.int32))
            counts.made = tape.op("Gather", running, last, axis=1)
        return ranks.made, counts.made


PLACES: tuple[Places, ...] = (Everywhere(), Bitmask(), Gaps())
