"""The exact k-th smallest magnitude of many tensors, without holding any of them.

A sorted sample brackets it; one pass over everything counts what lies below the bracket and keeps what lies inside;
a partition of the few that were kept gives the answer. Where the sample was misleading, a radix selection does: four
passes, each of which settles 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

Array = np.ndarray[Any, Any]
Read = Callable[[int, int], Array]

BLOCK = 1 << 16  # elements: 256 KiB of float32, which stay in cache from one step to the next
SMALL = 1 << 22  # up to here everything is read and partitioned at once
RUNS, RUN = 1 << 14, 64  # the sample: neighbours together, for a page of a mapped file costs more than its elements
SHARE = 40  # at most one element in so many may lie inside the bracket


class Source(Protocol):
    """A tensor of magnitudes: float32 or float64, none negative."""

    @property
    def size(self) -> int: ...

    def magnitude_reader(self, buffer: Array | None = None) -> Read: ...


@dataclass(frozen=True)
class Cut:
    """The smallest elements of several tensors; of equal ones, those of earlier tensors and places.

    ``threshold`` is the largest magnitude among them. In tensor i, ``counts[i]`` elements are cut: all below the
    threshold, and those equal to it before the flat place ``until[i]``.
    """

    threshold: float
    counts: tuple[int, ...]
    until: tuple[int, ...]


class NotANumber(Exception):
    """A tensor holds NaN, which has no magnitude; ``place`` is its place among the sources."""

    def __init__(self, place: int) -> None:
        super().__init__(f"tensor {place} holds NaN")
        self.place = place


def smallest(sources: Sequence[Source], count: int) -> Cut:
    """Cut the ``count`` smallest elements of all ``sources``; raises ``NotANumber``."""
    total = sum(source.size for source in sources)
    if not 0 <= count <= total:
        raise ValueError(f"cannot take {count} of {total} elements")
    if count == 0:
        return Cut(0.0, (0,) * len(sources), (0,) * len(sources))
    if total <= SMALL:
        return _small(sources, count)
    for lower, upper in _brackets(sources, count / total):
        value = lower
        if lower < upper:
            found = _collect(sources, lower, upper, total // SHARE)
            if found is None:
                break
            below, inside = found
            rank = count - sum(below)
            if 0 < rank <= sum(part.size for parts in inside for part in parts):
                return _from_pool(sources, below, inside, rank)
            value = lower if rank <= 0 else upper
        below, equal = _count(sources, value)
        if sum(below) < count <= sum(below) + sum(map(sum, equal)):
            return _with_ties(sources, value, below, equal, count)
    value = _radix(sources, count)
    return _with_ties(sources, value, *_count(sources, value), count)


def at_most(sources: Sequence[Source], threshold: float) -> Cut:
    """Cut every element whose magnitude is at most ``threshold``; raises ``NotANumber``."""
    below, equal = _count(sources, threshold)
    counts = tuple(smaller + sum(ties) for smaller, ties in zip(below, equal, strict=True))
    return Cut(threshold, counts, tuple(source.size for source in sources))


def cut(magnitudes: Array, start: int, threshold: float, until: int) -> Array:
    """Which of the ``magnitudes`` from flat place ``start`` on are cut: a bool array."""
    lower, upper = _bounds(magnitudes.dtype, threshold)
    if until <= start:
        return cast(Array, magnitudes < lower)
    chosen: Array = magnitudes <= upper
    if until < start + magnitudes.size:
        late = slice(until - start, None)
        chosen[late] = magnitudes[late] < lower
    return chosen


# One pass -------------------------------------------------------------------------------------------------------------


def _blocks(sources: Sequence[Source]) -> Iterator[tuple[int, int, Array]]:
    """Every block: the place of its tensor, its first flat element, its magnitudes (overwritten by the next block)."""
    buffer = np.empty(BLOCK, np.float32)
    for place, source in enumerate(sources):
        read = source.magnitude_reader(buffer)
        for start in range(0, source.size, BLOCK):
            block = read(start, min(start + BLOCK, source.size))
            if np.isnan(block.max()):
                raise NotANumber(place)
            yield place, start, block


def _bounds(dtype: np.dtype[Any], value: float) -> tuple[Any, Any]:
    """The least number of ``dtype`` that is not below ``value``, and the greatest that is not above it."""
    with np.errstate(over="ignore"):
        near = dtype.type(value)
    return (
        near if near >= value else np.nextafter(near, dtype.type(np.inf)),
        near if near <= value else np.nextafter(near, dtype.type(-np.inf)),
    )


def _collect(
    sources: Sequence[Source], lower: float, upper: float, limit: int
) -> tuple[list[int], list[list[Array]]] | None:
    """For each tensor, how many elements are at most ``lower``, and block by block those between it and ``upper``.

    None as soon as there are more than ``limit`` of the latter.
    """
    below = [0] * len(sources)
    parts: list[list[Array]] = [[] for _ in sources]
    masks, kept = np.empty((2, BLOCK), bool), 0
    for place, _, block in _blocks(sources):
        under = np.less_equal(block, _bounds(block.dtype, lower)[1], out=masks[0, : block.size])
        short = np.less(block, _bounds(block.dtype, upper)[0], out=masks[1, : block.size])
        below[place] += int(np.count_nonzero(under))
        inside = block[np.not_equal(under, short, out=short)]
        kept += inside.size
        if kept > limit:
            return None
        parts[place].append(inside)
    return below, parts


def _count(sources: Sequence[Source], value: float) -> tuple[list[int], list[list[int]]]:
    """For each tensor, how many elements are below ``value``, and block by block how many equal it."""
    below, equal = [0] * len(sources), [[] for _ in sources]  # type: tuple[list[int], list[list[int]]]
    for place, _, block in _blocks(sources):
        lower, upper = _bounds(block.dtype, value)
        less = int(np.count_nonzero(block < lower))
        below[place] += less
        equal[place].append(int(np.count_nonzero(block <= upper)) - less)
    return below, equal


# From counts to a cut -------------------------------------------------------------------------------------------------


def _small(sources: Sequence[Source], count: int) -> Cut:
    everything: list[list[Array]] = [[] for _ in sources]
    for place, _, block in _blocks(sources):
        everything[place].append(block.copy())
    return _from_pool(sources, [0] * len(sources), everything, count)


def _from_pool(sources: Sequence[Source], below: list[int], inside: list[list[Array]], rank: int) -> Cut:
    """The cut whose threshold is the ``rank``-th smallest of ``inside``; ``below`` counts the elements before those."""
    pool = np.concatenate([part for parts in inside for part in parts])
    pool.partition(rank - 1)
    value = float(pool[rank - 1])
    smaller, equal = list(below), []
    for place, parts in enumerate(inside):
        smaller[place] += sum(int(np.count_nonzero(part < value)) for part in parts)
        equal.append([int(np.count_nonzero(part == value)) for part in parts])
    return _with_ties(sources, value, smaller, equal, sum(below) + rank)


def _with_ties(sources: Sequence[Source], value: float, below: list[int], equal: list[list[int]], count: int) -> Cut:
    """The cut of ``count`` elements at the threshold ``value``; ``equal`` counts the ties of each block."""
    left = count - sum(below)
    counts, until = [], []
    for source, smaller, ties in zip(sources, below, equal, strict=True):
        taken = min(left, sum(ties))
        left -= taken
        counts.append(smaller + taken)
        until.append(source.size if taken == sum(ties) else _place(source, value, ties, taken))
    return Cut(value, tuple(counts), tuple(until))


def _place(source: Source, value: float, ties: list[int], taken: int) -> int:
    """The flat place before which exactly ``taken`` elements of ``source`` equal ``value``."""
    if not taken:
        return 0
    reached = np.cumsum(ties)
    block = int(np.searchsorted(reached, taken))
    before, start = int(reached[block]) - ties[block], block * BLOCK
    read = source.magnitude_reader()(start, min(start + BLOCK, source.size))
    return start + int(np.flatnonzero(read == value)[taken - before - 1]) + 1


# Where to look --------------------------------------------------------------------------------------------------------


def _brackets(sources: Sequence[Source], share: float) -> Iterator[tuple[float, float]]:
    """Two pairs of sampled values around the ``share`` quantile, 5 and 40 standard errors away.

    The error is that of systematic sampling of runs, from the differences between successive runs (Wolter,
    Introduction to Variance Estimation, chapter 8), because neighbours are alike and layers are not.
    """
    runs = _sample(sources)
    sample = np.concatenate(runs)
    starts = np.cumsum([0, *map(len, runs[:-1])])
    ordered = np.sort(sample)
    middle = ordered[min(int(share * sample.size), sample.size - 1)]
    excess = np.add.reduceat(sample <= middle, starts, dtype=np.int64) - share * np.array([len(run) for run in runs])
    error = math.sqrt(float(np.square(np.diff(excess)).sum()) / 2) + 1
    for factor in (5, 40):
        low, high = math.floor(share * sample.size - factor * error), math.ceil(share * sample.size + factor * error)
        yield float(ordered[low]) if low >= 0 else 0.0, float(ordered[high]) if high < sample.size else math.inf


def _sample(sources: Sequence[Source]) -> list[Array]:
    """About ``RUNS`` runs of neighbours, evenly over all elements."""
    step = max(RUN, sum(source.size for source in sources) // RUNS) // 4 * 4
    runs, offset = [], 0
    for source in sources:
        read = source.magnitude_reader()
        runs += [read(start, min(start + RUN, source.size)) for start in range(offset, source.size, step)]
        offset = (offset - source.size) % step // 4 * 4
    return runs


def _radix(sources: Sequence[Source], count: int) -> float:
    """The ``count``-th smallest magnitude, 16 bits a pass: the bits of non-negative doubles order like the doubles."""
    prefix, left = 0, count
    for shift in (48, 32, 16, 0):
        histogram = np.zeros(1 << 16, np.int64)
        for _, _, block in _blocks(sources):
            bits = block.astype(np.float64).view(np.uint64) >> np.uint64(shift)
            chosen = bits[bits >> np.uint64(16) == prefix] & np.uint64(0xFFFF)
            histogram += np.bincount(chosen.astype(np.int64), minlength=1 << 16)
        reached = np.cumsum(histogram)
        digit = int(np.searchsorted(reached, left))
        left -= int(reached[digit] - histogram[digit])
        prefix = prefix << 16 | digit
    return float(np.uint64(prefix).view(np.float64))
