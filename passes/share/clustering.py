"""k-means of numbers: the k values for which the squared distances of all numbers to the nearest are least.

In one dimension a cluster is an interval, so the best clusters are found by dynamic programming over where the sorted
numbers are cut (Wu, 1991, "Optimal quantization by matrix searching"; Groenlund et al., 2017, arXiv 1701.07204). Many
numbers are counted in ``BINS`` bins first. The program runs over some thousands of places to cut at, as dense as the
best cuts would be; then, again and again, over places near the cuts that it found, down to single bins. So 256 values
take under half a second, and the sum of squares is that of the program over all bins, but for some hundred-thousandths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.storage import Array
from .grid import BINS, Grid

STEP = 1 << 18  # numbers that are counted or replaced at a time: two MiB of float64

_PLACES = 2048  # to cut at, of the first program; more for many clusters
_REACH = 6  # how many places on either side of a cut are looked at
_ROUNDS = 40  # at most, for each distance of places

Part = tuple[Array, Array | None]  # flat floats, and the weight of each; None: 1 each
Sweep = Callable[[], Iterable[Part]]  # all the numbers, in parts; can be walked more than once


class NotFinite(ValueError):
    """There is NaN or infinity among the numbers."""


@dataclass(frozen=True, eq=False)
class Points:
    """Numbers as places on a line: ``values`` ascending, each with its ``mass``, the sum of weights there; float64.

    Exact zeros, of either sign, are apart: ``zeros`` of them, and their mass does not matter. ``count`` holds how many
    numbers each place stands for, and ``energy`` the sum of weight · number² over all.
    """

    values: Array
    mass: Array
    count: Array
    zeros: int
    energy: float

    @property
    def size(self) -> int:
        return int(self.count.sum()) + self.zeros


def in_steps(array: Array, weights: Array | None = None) -> Iterator[Part]:
    """An array as parts of ``STEP`` numbers."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, STEP):
        stop = start + STEP
        yield flat[start:stop], None if weights is None else weights[start:stop]


# Counting -------------------------------------------------------------------------------------------------------------


def points(sweep: Sweep, size: int) -> Points:
    """The numbers of ``sweep``, of which there are ``size``, as at most ``BINS`` places. Raises ``NotFinite``.

    Up to ``BINS`` numbers are held each as itself. More of them are counted in bins of equal width, in two sweeps.
    """
    return _sorted(sweep()) if size <= BINS else _binned(sweep)


def _sorted(parts: Iterable[Part]) -> Points:
    found = [(numbers.astype(np.float64), mass) for numbers, mass in parts]
    numbers = np.concatenate([part for part, _ in found]) if found else np.zeros(0)
    if not np.isfinite(numbers).all():
        raise NotFinite
    mass = np.concatenate([np.ones(part.size) if own is None else own for part, own in found]) if found else numbers
    with np.errstate(over="ignore"):
        energy = float((mass * np.square(numbers)).sum())
    other = numbers != 0
    values, place, counts = np.unique(numbers[other], return_inverse=True, return_counts=True)
    return Points(values, np.bincount(place, mass[other], values.size), counts, numbers.size - int(other.sum()), energy)


def _binned(sweep: Sweep) -> Points:
    low, high = math.inf, -math.inf
    for numbers, _ in sweep():
        least, most = float(numbers.min()), float(numbers.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise NotFinite
        low, high = min(low, least), max(high, most)
    grid = Grid.over(low, high)
    count, mass, total = np.zeros(grid.bins, np.int64), np.zeros(grid.bins), np.zeros(grid.bins)
    zeros, energy = 0, 0.0
    weighted = False
    for numbers, weights in sweep():
        index, wide = grid.index(numbers), numbers.astype(np.float64)
        zeros += numbers.size - int(np.count_nonzero(numbers))
        count += np.bincount(index, minlength=grid.bins)
        if weights is None:
            energy += float(np.square(wide).sum())
            total += np.bincount(index, wide, grid.bins)
        else:
            weighted = True
            own = np.multiply(wide, weights)
            energy += float((wide * own).sum())
            total += np.bincount(index, own, grid.bins)
            mass += np.bincount(index, np.where(wide == 0, 0, weights), grid.bins)
    if zeros:
        count[int(grid.index(np.zeros(1, np.float32))[0])] -= zeros
    mass = mass if weighted else count.astype(np.float64)
    taken = np.flatnonzero(count)
    centers = grid.centers()[taken]
    values = np.divide(total[taken], mass[taken], out=centers, where=mass[taken] > 0)
    order = np.argsort(values, kind="stable")  # weights of 0 leave centers, which may be out of place
    return Points(values[order], mass[taken][order], count[taken][order], zeros, energy)


# Clustering -----------------------------------------------------------------------------------------------------------


def kmeans(found: Points, clusters: int) -> Array:
    """The best ``clusters`` values for ``found``, ascending, float64; 0 is one of them where zeros are.

    There are fewer where fewer do without any error.
    """
    return Clusters(found, clusters).values(clusters)


class Clusters:
    """The best values for ``found``, for any number of them up to ``most``, from one program for all."""

    def __init__(self, found: Points, most: int) -> None:
        self.found = found
        distinct = found.values.size + bool(found.zeros)
        most = min(most, distinct)
        mass = found.mass if found.mass.any() else found.count.astype(np.float64)
        if found.zeros:
            split, self.middle = int(np.searchsorted(found.values, 0.0)), 0.0
            lines = [
                _Line.of(found.values[:split], mass[:split]),
                _Line.of(found.values[split:][::-1], mass[split:][::-1]),
            ]
            most -= 1
        else:
            self.middle = float(np.average(found.values, weights=mass)) if distinct else 0.0
            lines = [_Line.of(found.values - self.middle, mass)]
        self.tables = [_Table(line, _spread(line, most), most) for line in lines]

    def values(self, clusters: int) -> Array:
        """As ``kmeans`` gives them."""
        found = self.found
        if found.values.size + bool(found.zeros) <= clusters:
            values = found.values
        elif found.zeros:
            values = self._around_zero(clusters - 1)
        else:
            values = self.tables[0].centers(clusters, free=False) + self.middle
        return np.unique(np.append(values, 0.0)) if found.zeros else np.unique(values)

    def _around_zero(self, clusters: int) -> Array:
        """The best ``clusters`` values beside 0: some for the negative numbers, from below, the rest from above.

        The cluster at 0 takes what lies between. What it costs on one side does not depend on the other side, so each
        has a program of its own, and only how the clusters are dealt out joins them.
        """
        below, above = (table.best[: clusters + 1] for table in self.tables)
        first = int(np.argmax(below + above[::-1]))
        sides = zip(self.tables, (first, clusters - first), strict=True)
        return np.concatenate([table.centers(count, free=True) for table, count in sides])


@dataclass(frozen=True, eq=False)
class _Line:
    """Sums up to each of the ``size`` + 1 places between points: of masses, and of masses times values."""

    values: Array
    mass: Array
    moment: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> _Line:
        return cls(values, _summed(weights), _summed(weights * values))

    @property
    def size(self) -> int:
        return int(self.values.size)

    def gain(self, start: Array, stop: Array) -> Array:
        """What one cluster of the points [start, stop) takes off the sum of squares, over a cluster at 0."""
        moment, mass = self.moment[stop] - self.moment[start], self.mass[stop] - self.mass[start]
        gain: Array = np.divide(np.square(moment), mass, out=np.zeros(moment.shape), where=mass > 0)
        return gain

    def centers(self, cuts: Array) -> Array:
        """The mean of the points between neighbours among ``cuts``; none for those that hold no point."""
        start, stop = cuts[:-1], cuts[1:]
        mass = self.mass[stop] - self.mass[start]
        full = mass > 0
        centers: Array = (self.moment[stop] - self.moment[start])[full] / mass[full]
        return centers


def _summed(numbers: Array) -> Array:
    return np.concatenate([np.zeros(1), np.cumsum(numbers)])


def _spread(line: _Line, clusters: int) -> Array:
    """Places to cut at, ascending, with both ends: as dense as the best clusters of such numbers are.

    Where there are many, their density goes by the cube root of that of the numbers (Panter and Dite, 1951).
    """
    most = max(_PLACES, 16 * clusters)
    if line.size <= most:
        return np.arange(line.size + 1)
    gaps = np.abs(np.gradient(line.values))
    share = _summed(np.cbrt(np.diff(line.mass) * np.square(gaps)))
    wanted = np.linspace(0, share[-1], most + 1)
    return np.unique(np.append(np.searchsorted(share, wanted), [0, line.size]))


class _Table:
    """The dynamic program over all places: ``totals`` [clusters + 1, places] holds the greatest gain of so many
    clusters from the first place up to each; ``best`` [clusters + 1] that up to wherever it is greatest.
    """

    def __init__(self, line: _Line, places: Array, clusters: int) -> None:
        self.line, self.places = line, places
        mass, moment = line.mass[places], line.moment[places]
        totals = np.full((clusters + 1, places.size), -math.inf)
        totals[0, 0] = 0.0
        self.starts = np.zeros((clusters + 1, places.size), np.int32)
        previous = np.where(np.arange(places.size) == 0, 0.0, -math.inf)
        for count in range(1, clusters + 1):
            if count == 1:
                totals[1] = line.gain(np.zeros_like(places), places)
            else:
                totals[count], self.starts[count] = _layer(previous, mass, moment)
            previous = totals[count]
        self.totals = totals
        self.best = totals.max(axis=1)

    def centers(self, count: int, *, free: bool) -> Array:
        """The values of the best ``count`` clusters of all points; ``free``: of those up to wherever it is best."""
        place = int(np.argmax(self.totals[count])) if free else self.places.size - 1
        found = [place]
        for layer in range(count, 0, -1):
            place = int(self.starts[layer, place])
            found.append(place)
        return self.line.centers(_refined(self.line, self.places[found[::-1]], free=free))


def _layer(previous: Array, mass: Array, moment: Array) -> tuple[Array, Array]:
    """The best totals with one more cluster, which ends at each place, and where it begins.

    The best beginning never moves back as the end moves on. So ends are done in order of distance, halved again and
    again, and each looks only between what its neighbours chose: all ends of one distance at once.
    """
    size = previous.size
    totals, starts = np.empty(size), np.zeros(size, np.int64)
    totals[0] = previous[0]
    step = 1 << max(0, (size - 1).bit_length() - 1)
    while step:
        ends = np.arange(step, size, 2 * step)
        before = starts[ends - step]
        behind = ends + step
        after = np.where(behind < size, np.minimum(starts[np.minimum(behind, size - 1)], ends), ends)
        lengths = after - before + 1
        firsts = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(ends.size), lengths)
        begin = np.arange(owner.size) - (firsts - before)[owner]
        end = ends[owner]
        width = mass[end] - mass[begin]
        gain = np.square(moment[end] - moment[begin])
        np.divide(gain, width, out=gain, where=width > 0)
        gain += previous[begin]
        totals[ends] = np.maximum.reduceat(gain, firsts)
        hits = np.flatnonzero(gain == totals[ends][owner])
        starts[ends[owner[hits[::-1]]]] = begin[hits[::-1]]  # of equals the first
        step //= 2
    return totals, starts


def _refined(line: _Line, cuts: Array, *, free: bool) -> Array:
    """``cuts`` moved to where the gain is greatest, by programs over places near them; the first stays.

    ``free``: the last moves too, for what is behind it belongs to the cluster at 0.
    """
    if cuts.size < 2 or (cuts.size == 2 and not free):
        return cuts
    step = max(1, line.size // _PLACES)
    while True:
        for _ in range(_ROUNDS):
            moved = _moved(line, cuts, step, free)
            if np.array_equal(moved, cuts):
                break
            cuts = moved
        if step == 1:
            return cuts
        step //= 2


def _moved(line: _Line, cuts: Array, step: int, free: bool) -> Array:
    """The best cuts within ``_REACH`` places, ``step`` apart, of those that there are."""
    offsets = np.arange(-_REACH, _REACH + 1) * step
    places = np.clip(cuts[:, None] + offsets, 0, line.size)  # [cuts, offsets]
    places[0] = cuts[0]
    if not free:
        places[-1] = cuts[-1]
    start, stop = places[:-1, :, None], places[1:, None, :]
    gains = line.gain(np.minimum(start, stop), stop)
    gains[np.broadcast_to(start > stop, gains.shape)] = -math.inf
    total, choices = np.zeros(offsets.size), []
    for gain in gains:
        sums = total[:, None] + gain
        choice = sums.argmax(axis=0)
        choices.append(choice)
        total = sums[choice, np.arange(offsets.size)]
    here = _REACH if total[_REACH] == total.max() else int(total.argmax())
    found = [places[-1, here]]
    for row, choice in zip(places[-2::-1], choices[::-1], strict=True):
        here = int(choice[here])
        found.append(row[here])
    return np.array(found[::-1])


# Replacing ------------------------------------------------------------------------------------------------------------


class Codebook:
    """Shared values, and which of them each number takes: the nearest.

    ``values`` are ascending, of the stored type; ``wide`` are the same in float64.

    For more than ``BINS`` numbers a table of bins tells which is nearest, in a tenth of the time. Less than a bin's
    width from the middle between two values the other may be taken; 0 stays 0.
    """

    def __init__(self, values: Array, dtype: np.dtype[Any], size: int) -> None:
        self.wide = np.unique(values.astype(dtype).astype(np.float64))
        self.values = self.wide.astype(dtype)
        self._middles = (self.wide[1:] + self.wide[:-1]) / 2
        self._table = self._tabled() if size > BINS else None

    def index(self, numbers: Array) -> Array:
        """The place in ``values`` of the nearest to each number."""
        return np.searchsorted(self._middles, numbers, side="left")

    def nearest(self, numbers: Array) -> Array:
        """The nearest value to each number, of whatever shape; float64."""
        found: Array = self.wide[self.index(numbers)]
        return found

    def figures(self, found: Points) -> tuple[float, Array]:
        """The sum of squared errors of ``found``, and how many of its numbers take each value (int64)."""
        index = self.index(found.values)
        mass = np.bincount(index, found.mass, self.values.size)
        moment = np.bincount(index, found.mass * found.values, self.values.size)
        counts = np.bincount(index, found.count, self.values.size).astype(np.int64)
        error = found.energy - 2 * float(np.dot(moment, self.wide)) + float(np.dot(mass, np.square(self.wide)))
        if found.zeros:
            counts[int(self.index(np.zeros(1))[0])] += found.zeros
        return max(0.0, error), counts

    def apply(self, numbers: Array) -> Array:
        """Each of flat floats replaced by its value, in the stored type."""
        if self._table is None:
            return self.values[self.index(numbers.astype(np.float64))]
        grid, table, guarded = self._table
        found: Array = table.take(grid.index(numbers), mode="clip")
        if guarded:
            found[numbers == 0] = 0
        return found

    def _tabled(self) -> tuple[Grid, Array, bool]:
        """Bins, the value that each takes, and whether zeros need a look of their own."""
        grid = Grid.over(float(self.wide[0]), float(self.wide[-1]))
        table = self.values[self.index(grid.centers())]
        guarded = bool((self.wide == 0).any()) and bool(table[grid.index(np.zeros(1, np.float32))][0])
        return grid, table, guarded
