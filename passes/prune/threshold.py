"""The exact k-th smallest magnitude of many tensors, without holding any of them.

A sorted sample brackets it; one pass over everything counts what lies below the bracket and keeps what lies inside;
a partition of the few that were kept gives the answer. Where the sample was misleading (most elements equal, say), a
radix selection does: four passes, each of which counts 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
Read = Callable[[int, int], Array]

BLOCK = 1 << 16  # elements: 256 KiB of float32, which stay in cache between the steps
SMALL = 1 << 20  # up to here everything is read and partitioned at once
RUN = 64  # neighbours that are sampled together: a page of a mapped file costs more than its elements
RUNS = 1 << 12
KEPT = 1 << 23  # elements that may be kept from inside the bracket


class Source(Protocol):
    """A tensor of magnitudes: float32 or float64, none negative."""

    @property
    def size(self) -> int: ...

    def magnitude_reader(self, buffer: Array | None = None) -> Read: ...


@dataclass(frozen=True)
class Cut:
    """The ``count`` smallest elements of several tensors, equal ones in order of tensor, then of place.

    ``threshold`` is the largest magnitude among them. ``counts`` says for each tensor how many of its elements are
    cut; ``ties`` how many of its elements equal to the threshold, the first ones: all below it are cut.
    """

    threshold: float
    counts: tuple[int, ...]
    ties: tuple[int, ...]

    @property
    def count(self) -> int:
        return sum(self.counts)


class NotANumber(Exception):
    """A tensor holds NaN, which has no magnitude; ``place`` is its place among the sources."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def smallest(sources: Sequence[Source], count: int) -> Cut:
    """Cut the ``count`` smallest elements of all ``sources``; raises ``NotANumber``."""
    total = sum(source.size for source in sources)
    if not 0 <= count <= total:
        raise ValueError(f"cannot take {count} of {total} elements")
    if count == 0:
        return Cut(0.0, (0,) * len(sources), (0,) * len(sources))
    if total <= SMALL:
        return _divide(sources, _Sweep(sources, 0.0, np.inf, total), count)
    for lower, upper in _brackets(sources, count / total):
        sweep = _Sweep(sources, lower, upper, KEPT)
        if not sweep.full and sum(sweep.below) < count <= sum(sweep.below) + sum(map(len, sweep.inside)):
            return _divide(sources, sweep, count)
        if sweep.full:
            break
    exact = _radix(sources, count)
    return _divide(sources, _Sweep(sources, exact, exact, None), count)


def at_most(sources: Sequence[Source], threshold: float) -> Cut:
    """Cut every element whose magnitude is at most ``threshold``; raises ``NotANumber``."""
    sweep = _Sweep(sources, threshold, threshold, None)
    counts = tuple(below + equal for below, equal in zip(sweep.below, sweep.equal, strict=True))
    return Cut(threshold, counts, tuple(sweep.equal))


class _Sweep:
    """One pass: for each source, how many elements are below ``lower``, and those from ``lower`` to ``upper``.

    With ``limit`` None the two bounds are one value, and elements equal to it are counted instead of kept. ``full``
    says that more than ``limit`` elements lay inside and the pass stopped.
    """

    def __init__(self, sources: Sequence[Source], lower: float, upper: float, limit: int | None) -> None:
        self.below, self.equal = [0] * len(sources), [0] * len(sources)
        self.inside: list[Array] = []
        self.full = False
        buffer, first, second = np.empty(BLOCK, np.float32), np.empty(BLOCK, bool), np.empty(BLOCK, bool)
        kept = 0
        for place, source in enumerate(sources):
            parts: list[Array] = []
            for block in _blocks(source, buffer):
                low, high = _bounds(block.dtype, lower, upper)
                below = np.less(block, low, out=first[: block.size])
                upto = np.less_equal(block, high, out=second[: block.size])
                if np.isnan(block.max()):
                    raise NotANumber(place)
                self.below[place] += int(np.count_nonzero(below))
                inside = np.not_equal(below, upto, out=upto)
                if limit is None:
                    self.equal[place] += int(np.count_nonzero(inside)) if low <= high else 0
                else:
                    parts.append(block[inside])
                    kept += parts[-1].size
                    if kept > limit:
                        self.full = True
                        return
            self.inside.append(np.concatenate(parts) if parts else np.empty(0, np.float32))


def _divide(sources: Sequence[Source], sweep: _Sweep, count: int) -> Cut:
    """The cut of ``count`` elements that a sweep around its threshold gives."""
    if sweep.inside:
        wanted = count - sum(sweep.below)
        pool = np.concatenate(sweep.inside)
        threshold = float(np.partition(pool, wanted - 1)[wanted - 1])
        below = [
            before + int(np.count_nonzero(part < threshold))
            for before, part in zip(sweep.below, sweep.inside, strict=True)
        ]
        equal = [int(np.count_nonzero(part == threshold)) for part in sweep.inside]
    ties, left = [], count - sum(below)
    for available in equal:
        ties.append(min(left, available))
        left -= ties[-1]
    return Cut(threshold, tuple(b + t for b, t in zip(below, ties, strict=True)), tuple(ties))
