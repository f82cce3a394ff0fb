"""From how a value is distributed to the range that its integers span.

A wide range rounds coarsely, a narrow one clips; the calibrators differ in what they weigh. All of them take a
histogram as a density that is even within each bin. What a Relu, padding or a mask puts at exactly zero lies in the
bin of zero, and stands out there; zero is a number of every grid, so that this spike costs nothing anywhere and is
left out of account.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ...ir.affine import Grid
from ...ir.errors import UsageError, nearest
from ..points import Distribution

Array = np.ndarray[Any, Any]
Method = Literal["minmax", "percentile", "entropy", "mse"]

BINS = 2048  # of a histogram that calibrators look at; so one that was kept in a file gives the same
PERCENTILE = 99.99  # percent of the elements that are not clipped
_CANDIDATES = 32  # ends of a range that are tried at a time
_EQUAL = 1e-3  # a difference of cost, as a share, that is none
_LEAST = 2.0**-10  # the narrowest range that is tried, as a share of the widest
_FEWEST = 1 / 4  # the narrowest range for the entropy: with fewer bins a step there is little to tell apart


def calibrate(
    method: Method, histogram: Distribution, grid: Grid, symmetric: bool, *, percentile: float = PERCENTILE
) -> tuple[float, float]:
    """The range (low, high), zero within it, that ``grid`` should span.

    ``minmax`` clips nothing. ``percentile`` clips at most (100 - ``percentile``) / 2 percent of the elements at either
    end; twice as many at the one end where all lie on one side of zero, or of magnitudes where ``symmetric``.
    ``entropy`` keeps the most information: the least Kullback-Leibler divergence of what is quantized from what was
    (Migacz, 8-bit inference with TensorRT, GTC 2017). ``mse`` has the least squared error of rounding and clipping to
    ``grid``. A ``symmetric`` range is (-x, x). A histogram without counts, a range by hand, is taken as it stands.

    Raises ``UsageError`` for another method, ``ValueError`` for a histogram that has seen nothing.
    """
    if method not in get_args(Method):
        known = ", ".join(get_args(Method))
        raise UsageError(f"There is no calibrator '{method}'; the calibrators are {known}.{nearest(method, _METHODS)}")
    if not histogram.seen:
        raise ValueError("a value that was never seen has no range")
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if method == "minmax" or low == high or not histogram.counts.size:
        return low, high
    histogram = histogram.coarse(BINS)
    if method == "percentile":
        return _percentile(histogram, symmetric, percentile)
    return _METHODS[method](histogram, grid, symmetric, (low, high))


# Percentiles --------------------------------------------------------------------------------------------------------


def _percentile(histogram: Distribution, symmetric: bool, percentile: float) -> tuple[float, float]:
    """The ends of bins between which no fewer elements lie, for within a bin they may lie anywhere."""
    if symmetric:
        high = _magnitude(histogram, percentile / 100)
        return -high, high
    tail = (1 - percentile / 100) / (2 if histogram.low < 0 < histogram.high else 1)
    edges, below = histogram.edges(), _below(histogram)
    low = edges[np.searchsorted(below, tail, side="right") - 1] if histogram.low < 0 else 0.0
    high = edges[np.searchsorted(below, 1 - tail)] if histogram.high > 0 else 0.0
    return min(float(low), 0.0), max(float(high), 0.0)


def _below(histogram: Distribution) -> Array:
    """The share of the elements below each edge."""
    return np.concatenate(([0], np.cumsum(histogram.counts))) / histogram.seen


def _magnitude(histogram: Distribution, share: float) -> float:
    """Of the magnitudes on the grid the least below which the given share of the elements lies, or the greatest."""
    width, edges, below = 2.0**histogram.exponent, histogram.edges(), _below(histogram)
    greatest = max(-histogram.low, histogram.high)
    bounds = np.arange(1, np.ceil(greatest / width) + 1) * width
    inside = np.interp(bounds, edges, below, right=1.0) - np.interp(-bounds, edges, below, left=0.0)
    place = int(np.argmax(inside >= share))
    return float(min(bounds[place], greatest))


# The search ---------------------------------------------------------------------------------------------------------

Cost = Callable[[Array, Array], Array]  # of many ranges, by their ends, which broadcast


def _best(cost: Cost, ends: tuple[float, float], symmetric: bool) -> tuple[float, float]:
    """The range within ``ends`` of least cost: over a geometric grid of both ends, then finer around the best."""
    ratio = _LEAST ** (1 / (_CANDIDATES - 1))
    shares = ratio ** np.arange(_CANDIDATES)
    low, high = _least(cost, ends[0] * shares, ends[1] * shares, symmetric)
    around = np.linspace(ratio, 1 / ratio, _CANDIDATES)
    return _least(cost, np.maximum(low * around, ends[0]), np.minimum(high * around, ends[1]), symmetric)


def _least(cost: Cost, lows: Array, highs: Array, symmetric: bool) -> tuple[float, float]:
    """The widest range whose cost is the least, or as good as that."""
    lows, highs = np.unique(lows)[:, None], np.unique(highs)[::-1]
    if symmetric:
        lows = -highs
    costs = cost(lows, highs)
    place = int(np.argmax(costs <= costs.min() * (1 + _EQUAL)))
    lows, highs = (ends.ravel() for ends in np.broadcast_arrays(lows, highs))
    return float(lows[place]), float(highs[place])


def _scale(lows: Array, highs: Array, grid: Grid, symmetric: bool) -> Array:
    if symmetric:
        return np.asarray(np.maximum(-lows, highs) / min(grid.highest - grid.middle, grid.middle - grid.lowest))
    return (highs - lows) / grid.steps


def _without_spike(histogram: Distribution) -> Array:
    """The counts, as floats, with no more in the bin of zero than its neighbours let expect."""
    counts = histogram.counts.astype(np.float64)
    zero = -histogram.first
    if 0 <= zero < len(counts):
        beside = [counts[place] for place in (zero - 1, zero + 1) if 0 <= place < len(counts)]
        counts[zero] = min(counts[zero], sum(beside))
    return counts


# Squared error ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums of 1, x and x^2 over the elements below any bound, for a density that is even in each bin."""

    edges: Array
    counts: Array

    @functools.cached_property
    def _sums(self) -> Array:
        powers = np.stack([self._within(self.edges[1:], np.arange(len(self.counts)), power) for power in range(3)])
        return np.concatenate((np.zeros((3, 1)), np.cumsum(powers, axis=1)), axis=1)

    @functools.cached_property
    def _widths(self) -> Array:
        return np.diff(self.edges)

    @functools.cached_property
    def _powers(self) -> list[Array]:
        """The edges to the power of 0, 1, 2 and 3: powers take long."""
        return [self.edges**power for power in range(4)]

    def below(self, bounds: Array) -> list[Array]:
        place = np.clip(np.searchsorted(self.edges, bounds, side="right") - 1, 0, len(self.counts) - 1)
        any_below = bounds >= self.edges[0]
        bounds = np.clip(bounds, self.edges[0], self.edges[-1])
        return [any_below * (self._sums[power][place] + self._within(bounds, place, power)) for power in range(3)]

    def _within(self, bounds: Array, place: Array, power: int) -> Array:
        """Of the part of the bins ``place`` that lies below ``bounds``; a bin of no width is all at one number."""
        width, counts = self._widths[place], self.counts[place]
        with np.errstate(divide="ignore", invalid="ignore"):
            even = (bounds ** (power + 1) - self._powers[power + 1][place]) / ((power + 1) * width)
        if width.all():
            return np.asarray(counts * even)
        return np.asarray(
            counts * np.where(width > 0, even, (bounds >= self.edges[place]) * self._powers[power][place])
        )


def _mse(histogram: Distribution, grid: Grid, symmetric: bool, ends: tuple[float, float]) -> tuple[float, float]:
    """The error of an element: its square, where it rounds to zero; else a twelfth of the squared step, for rounding
    errors are even within a step; outside of the range its distance, squared.
    """
    moments = _Moments(histogram.edges(), _without_spike(histogram))
    total = moments.below(np.array([np.inf]))

    def cost(lows: Array, highs: Array) -> Array:
        step = _scale(lows, highs, grid, symmetric)
        under, over = (
            moments.below(lows),
            [whole - part for whole, part in zip(total, moments.below(highs), strict=True)],
        )
        clipped = sum(
            second - 2 * end * first + end**2 * count for (count, first, second), end in ((under, lows), (over, highs))
        )
        small, tiny = moments.below(np.minimum(step / 2, highs)), moments.below(np.maximum(-step / 2, lows))
        rounded = total[0] - under[0] - over[0] - (small[0] - tiny[0])
        return np.asarray(clipped + (small[2] - tiny[2]) + step**2 / 12 * rounded)

    return _best(cost, ends, symmetric)


# Entropy ------------------------------------------------------------------------------------------------------------


def _entropy(histogram: Distribution, grid: Grid, symmetric: bool, ends: tuple[float, float]) -> tuple[float, float]:
    """Both ends move inwards by one share; then each of them by itself, the other held."""
    edges, counts = histogram.edges(), _without_spike(histogram)
    middles = (edges[:-1] + edges[1:]) / 2
    shares = np.linspace(1.0, _FEWEST, _CANDIDATES)

    def divergence(low: float, high: float) -> float:
        step = float(_scale(np.array(low), np.array(high), grid, symmetric))
        return _divergence(middles, counts, low, high, step)

    def best(ranges: list[tuple[float, float]]) -> tuple[float, float]:
        return min(ranges, key=lambda ends: divergence(*ends))

    low, high = best([(ends[0] * share, ends[1] * share) for share in shares])
    around = np.linspace(1 + shares[1] - shares[0], 1 + shares[0] - shares[1], _CANDIDATES // 4)
    near = [(max(low * share, ends[0]), min(high * share, ends[1])) for share in around]
    low, high = best([(low, high), *near])
    if symmetric or not (low and high):
        return low, high
    low, high = best([(low, high), *((ends[0] * share, high) for share in shares[::2])])
    return best([(low, high), *((low, ends[1] * share) for share in shares[::2])])


def _divergence(middles: Array, counts: Array, low: float, high: float, step: float) -> float:
    """KL(P || Q): P are the counts, those outside the range in its first and last bin; Q is what is left of the counts
    inside when only the sum of each step is known, spread evenly over its bins that are not empty.
    """
    start, stop = np.searchsorted(middles, (low, high))
    if stop <= start:
        return float("inf")
    inside = counts[start:stop]
    actual = inside.copy()
    actual[0] += counts[:start].sum()
    actual[-1] += counts[stop:].sum()
    level = np.rint(middles[start:stop] / step).astype(np.int64)
    level -= level[0]
    filled = inside > 0
    sums, sizes = np.bincount(level, weights=inside), np.bincount(level, weights=filled)
    known = np.where(filled, (sums / np.maximum(sizes, 1))[level], 0.0)
    if not known.any():
        return float("inf")
    met = actual > 0
    expected = np.maximum(known[met] / known.sum(), 1e-4 / counts.sum())  # an empty bin cannot tell of infinity
    share = actual[met] / actual.sum()
    return float((share * np.log(share / expected)).sum())


_METHODS: dict[str, Callable[[Distribution, Grid, bool, tuple[float, float]], tuple[float, float]]] = {
    "minmax": lambda histogram, grid, symmetric, ends: ends,
    "percentile": lambda histogram, grid, symmetric, ends: _percentile(histogram, symmetric, PERCENTILE),
    "entropy": _entropy,
    "mse": _mse,
}
