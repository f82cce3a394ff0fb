"""What a pass may ask about the values of a model while it runs; ``runtime.statistics`` answers all of it in one sweep.

    points = [Range("hidden"), Channels("features", axis=1)]
    found = ctx.runner.statistics(model, points, ctx.data)
    found[points[0]].low

A point is a frozen dataclass that names a value and says what to keep of it. What it keeps has bounded size, is
reduced within a run and merged over runs, and does not depend on how the samples are split into runs or ordered. A
statistic with ``seen == 0`` has met no element: the value is in a branch that no sample took, or was always empty.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from ..ir.errors import BadFeeds

Array = np.ndarray[Any, Any]

FINEST = -115  # the least exponent of a bin's width, so that its inverse times any such float32 is finite
_BLOCK = 1 << 16  # elements that are counted at a time, so that they stay in the cache with their bins
_READ = 1 << 16  # elements that are compared at a time, so that the second look finds them in the cache


class Statistic(Protocol):
    """What is known so far of one value."""

    def update(self, array: Array) -> None:
        """Take in the value of one run: any shape, possibly of no elements. Raises ``Unfit``, and is as it was."""
        ...

    def merge(self, other: Self) -> None:
        """Take in what another statistic of the same point has seen."""
        ...


@dataclass(frozen=True)
class Point:
    """One question about one value. ``value`` is its address: a name, or ``node/then/name`` in a body.

    ``asks`` says what the statistic wants of each run: the ``array`` (``update``); its ``extremes`` (``update`` for a
    value of the main graph, ``update_extremes(low, high, elements)`` for one in a body, where they are found inside);
    or its ``dims`` (``update_dims(dims, samples)``), which are found inside the graph. ``elementwise``: it does not
    matter where in the value an element stands, and the statistic has ``clipped(low, high)``, what would be known of
    the value had each element been clipped; so Relu, Clip and Reshape cost nothing. ``checks``: the statistic itself
    raises ``Unfit`` for NaN and infinity; else the engine looks.
    """

    value: str
    asks: ClassVar[Literal["array", "extremes", "dims"]] = "array"
    elementwise: ClassVar[bool] = False
    checks: ClassVar[bool] = False

    @abstractmethod
    def start(self) -> Statistic:
        """A statistic that has seen nothing."""


class Unfit(ValueError):
    """A statistic cannot take an array; the message is a clause that goes with the name of the value."""


class NotFinite(Unfit):
    """An array holds NaN or infinity."""


class Unanswered(BadFeeds):
    """Some points have no answer: NaN or infinity was met, or their values cannot be watched.

    ``reasons`` holds a sentence for each of these points; ``answers`` what the other points found, for a pass that can
    do without. The message is the first of the sentences.
    """

    def __init__(self, reasons: Mapping[Point, str], answers: Mapping[Point, Any]) -> None:
        self.reasons = dict(reasons)
        self.answers = dict(answers)
        others = len({point.value for point in reasons}) - 1
        more = f" So it is with {others} more value{'s' if others > 1 else ''}." if others else ""
        super().__init__(next(iter(reasons.values())) + more)


# Least and greatest -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range(Point):
    """The least and the greatest element of a float value. The answer is an ``Extremes``."""

    asks = "extremes"
    elementwise = True
    checks = True

    def start(self) -> Extremes:
        return Extremes()


@dataclass
class Extremes:
    """``low`` and ``high`` are exact; ``seen`` counts elements. Where it is 0 they are inf and -inf."""

    low: float = math.inf
    high: float = -math.inf
    seen: int = 0

    def update(self, array: Array) -> None:
        if array.size:
            self.update_extremes(*extremes(floats(array)), array.size)

    def update_extremes(self, low: float, high: float, elements: int) -> None:
        self.low, self.high, self.seen = min(self.low, low), max(self.high, high), self.seen + elements

    def merge(self, other: Self) -> None:
        self.update_extremes(other.low, other.high, other.seen)

    def clipped(self, low: float, high: float) -> Extremes:
        if not self.seen:
            return Extremes()
        return Extremes(_clip(self.low, low, high), _clip(self.high, low, high), self.seen)


def floats(array: Array) -> Array:
    """``array`` as float32 or, where it is that, float64. Raises ``Unfit`` for integers and the like."""
    if array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.kind in "biucOSUM" or array.dtype.names:
        raise Unfit(f"is {array.dtype.name}, and only floats have a range")
    return array.astype(np.float32)


def extremes(array: Array) -> tuple[float, float]:
    """The least and the greatest element of floats, at least one. Raises ``NotFinite``."""
    least, most = np.minimum.reduce, np.maximum.reduce  # NaN, where there is one
    found = np.array([(least(block), most(block)) for block in _blocks(array.reshape(-1), _READ)])
    low, high = float(least(found[:, 0])), float(most(found[:, 1]))
    require_finite(low, high)
    return low, high


def require_finite(*numbers: float) -> None:
    """Raise ``NotFinite`` for NaN or infinity among ``numbers``."""
    if any(map(math.isnan, numbers)):
        raise NotFinite("holds NaN")
    if any(map(math.isinf, numbers)):
        raise NotFinite("holds infinity")


def _clip(number: float, low: float, high: float) -> float:
    return min(max(number, low), high)


# Histograms ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram(Point):
    """How the elements of a float value are distributed, in at most ``bins`` bins. The answer is a ``Distribution``."""

    bins: int = 8192
    elementwise = True
    checks = True

    def start(self) -> Distribution:
        return Distribution(self.bins)


@dataclass
class Distribution:
    """Counts of elements on the grid of all multiples of 2^``exponent``.

    Bin k counts the x with trunc(x / 2^exponent) = k, so bin 0 reaches to both sides of zero, and every bin of twice
    the width is exactly the sum of two, or around zero of three. ``exponent`` is the least for which [``low``,
    ``high``] and zero fit into ``limit`` bins: it depends on these two alone, and with it the counts, whatever the
    order and the batches in which the elements came. ``counts`` is int64, for the bins from ``first`` on, up to that
    of ``high``. ``low`` and ``high`` are exact; ``seen`` counts elements.
    """

    limit: int = 8192
    low: float = math.inf
    high: float = -math.inf
    seen: int = 0
    exponent: int = FINEST
    first: int = 0
    counts: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def update(self, array: Array) -> None:
        if array.size:
            array = floats(array).reshape(-1)
            counted = self._counted(array)
            if counted is None:
                self._reach(*extremes(array))
                counted = self._counted(array)
            assert counted is not None
            self.counts += counted
            self.seen += array.size

    def _counted(self, array: Array) -> Array | None:
        """The counts of flat float32 or float64; None, quickly, where some of it is beyond the bins that there are.

        The product with a power of two is exact. A look at the bins takes less time than one at the numbers, of which
        only those in the outermost bins can be the least or the greatest.
        """
        if not self.counts.size:
            return None
        scale = array.dtype.type(math.ldexp(1.0, -self.exponent))
        size = min(_BLOCK, array.size)
        scaled, index = np.empty(size, array.dtype), np.empty(size, np.int32)
        total, last = np.zeros_like(self.counts), self.counts.size - 1
        low, high = self.low, self.high
        for block in _blocks(array, _BLOCK):
            part, place = scaled[: block.size], index[: block.size]
            with np.errstate(invalid="ignore", over="ignore"):
                np.multiply(block, scale, out=part)
                np.copyto(place, part, casting="unsafe")  # towards zero; what does not fit, and NaN, becomes -2^31
            place -= self.first
            if place.view(np.uint32).max() > last:  # so is what is negative
                return None
            found = np.bincount(place, minlength=total.size)
            if found[0]:
                low = min(low, float(block.min()))
            if found[last]:
                high = max(high, float(block.max()))
            total += found
        self.low, self.high = low, high
        return total

    def merge(self, other: Self) -> None:
        if other.seen:
            self._reach(other.low, other.high)
            self._add(other)
            self.seen += other.seen

    def clipped(self, low: float, high: float) -> Distribution:
        """The distribution after each element was clipped, on the same grid."""
        if not self.seen:
            return Distribution(self.limit)
        ends = _clip(self.low, low, high), _clip(self.high, low, high)
        found = Distribution(self.limit, *ends, self.seen).spanned(self.exponent)
        places = np.arange(self.first, self.first + len(self.counts)) - found.first
        np.add.at(found.counts, np.clip(places, 0, len(found.counts) - 1), self.counts)
        return found

    def coarse(self, bins: int) -> Distribution:
        """The same in at most ``bins`` bins."""
        if not self.seen:
            return Distribution(bins)
        exponent = max(self.exponent, finest_exponent(self.low, self.high, bins))
        found = Distribution(bins, self.low, self.high, self.seen).spanned(exponent)
        found._add(self)
        return found

    def spanned(self, exponent: int) -> Self:
        """Itself, with empty bins of 2^``exponent`` from that of ``low`` to that of ``high``."""
        self.exponent, self.first = exponent, _bin(self.low, exponent)
        self.counts = np.zeros(_bin(self.high, exponent) - self.first + 1, np.int64)
        return self

    def edges(self) -> Array:
        """Where the bins begin and the last one ends, float64 [bins + 1], within [``low``, ``high``]."""
        index = np.arange(self.first, self.first + len(self.counts) + 1)
        lower = np.where(index > 0, index, index - 1) * 2.0**self.exponent
        lower[-1] = self.high
        return np.clip(lower, self.low, self.high)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Distribution):
            return NotImplemented
        mine, theirs = ((d.low, d.high, d.seen, d.exponent, d.first) for d in (self, other))
        return mine == theirs and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def _reach(self, low: float, high: float) -> None:
        """Grow so that [``low``, ``high``] fits, by merging of neighbours."""
        if self.low <= low and high <= self.high:
            return
        before = Distribution(self.limit, self.low, self.high, self.seen, self.exponent, self.first, self.counts)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.spanned(finest_exponent(self.low, self.high, self.limit))._add(before)

    def _add(self, other: Distribution) -> None:
        """Add counts of a grid that is as fine, or finer, and within reach."""
        index = np.arange(other.first, other.first + len(other.counts))
        index = np.sign(index) * (np.abs(index) >> (self.exponent - other.exponent)) - self.first
        starts = np.flatnonzero(np.diff(index, prepend=-1))  # of the runs that fall into one bin
        self.counts[index[starts]] += np.add.reduceat(other.counts, starts)


def finest_exponent(low: float, high: float, bins: int) -> int:
    """The least e of at least ``FINEST`` for which [``low``, ``high``] and zero take at most ``bins`` bins of 2^e."""
    low, high = min(low, 0.0), max(high, 0.0)
    extent = max(high, -low)
    exponent = max(FINEST, math.frexp(extent / bins)[1] - 1) if extent else FINEST
    while _bin(high, exponent) - _bin(low, exponent) + 1 > bins:
        exponent += 1
    return exponent


def _bin(number: float, exponent: int) -> int:
    return math.trunc(math.ldexp(number, -exponent))


def _blocks(array: Array, size: int) -> Iterator[Array]:
    return (array[start : start + size] for start in range(0, array.size, size))


# Channels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Channels(Point):
    """The least and greatest element of each channel along ``axis``. The answer is a ``ChannelExtremes``."""

    axis: int = 1
    checks = True

    def start(self) -> ChannelExtremes:
        return ChannelExtremes(self.axis)


@dataclass
class ChannelExtremes:
    """``low`` and ``high`` are float64 [channels], empty while ``seen``, the elements so far, is 0."""

    axis: int
    low: Array = field(default_factory=lambda: np.zeros(0))
    high: Array = field(default_factory=lambda: np.zeros(0))
    seen: int = 0

    @property
    def absmax(self) -> Array:
        """The greatest magnitude of each channel."""
        return np.maximum(-self.low, self.high)

    def update(self, array: Array) -> None:
        if array.size:
            others = _other_axes(array, self.axis)
            array = floats(array)
            low, high = array.min(axis=others).astype(np.float64), array.max(axis=others).astype(np.float64)
            extremes(np.concatenate((low, high)))
            self._take(low, high, array.size)

    def merge(self, other: Self) -> None:
        if other.seen:
            self._take(other.low, other.high, other.seen)

    def _take(self, low: Array, high: Array, elements: int) -> None:
        if self.seen:
            _require_channels(len(self.low), len(low), self.axis)
            low, high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.low, self.high, self.seen = low, high, self.seen + elements


@dataclass(frozen=True)
class Mean(Point):
    """The mean of each channel along ``axis``. The answer is a ``ChannelMeans``."""

    axis: int = 1
    checks = True

    def start(self) -> ChannelMeans:
        return ChannelMeans(self.axis)


@dataclass
class ChannelMeans:
    """``mean`` is float64 [channels], empty while ``seen``, the elements so far, is 0.

    The sums are compensated (Neumaier, 1974), so that the order of samples and their batches move at most the last
    bits of float64: equal as float32 for all purposes, but not exact like the other statistics.
    """

    axis: int
    seen: int = 0
    _sum: Array = field(default_factory=lambda: np.zeros(0))
    _rest: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def mean(self) -> Array:
        return (self._sum + self._rest) * (len(self._sum) / max(self.seen, 1))

    def update(self, array: Array) -> None:
        if array.size:
            others = _other_axes(array, self.axis)
            total = floats(array).sum(axis=others, dtype=np.float64)
            require_finite(float(total.sum()))
            self._take(total, np.zeros_like(total), array.size)

    def merge(self, other: Self) -> None:
        if other.seen:
            self._take(other._sum, other._rest, other.seen)

    def _take(self, total: Array, rest: Array, elements: int) -> None:
        if self.seen:
            _require_channels(len(self._sum), len(total), self.axis)
            new = self._sum + total
            greater = np.abs(self._sum) >= np.abs(total)
            lost = np.where(greater, self._sum - new + total, total - new + self._sum)
            total, rest = new, self._rest + rest + lost
        self._sum, self._rest, self.seen = total, rest, self.seen + elements


def _other_axes(array: Array, axis: int) -> tuple[int, ...]:
    if not -array.ndim <= axis < array.ndim:
        raise Unfit(f"has {array.ndim} dimensions, and so no axis {axis}")
    return tuple(place for place in range(array.ndim) if place != axis % array.ndim)


def _require_channels(known: int, found: int, axis: int) -> None:
    if known != found:
        raise Unfit(f"has {known} channels along axis {axis} in one run, and {found} in another")


# Shapes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape(Point):
    """The shape of a value of any type, of one sample where samples can be told apart. The answer is a ``Dims``."""

    asks = "dims"

    def start(self) -> Dims:
        return Dims()


@dataclass
class Dims:
    """``largest`` holds the greatest size of each axis, ``fullest`` the shape of most elements (the greatest of equals,
    axis by axis); both ``None`` while ``seen``, the samples or runs so far, is 0.
    """

    largest: tuple[int, ...] | None = None
    fullest: tuple[int, ...] | None = None
    seen: int = 0

    def update(self, array: Array) -> None:
        self.update_dims(array.shape, 1)

    def update_dims(self, dims: tuple[int, ...], samples: int) -> None:
        self.merge(type(self)(dims, dims, samples))

    def merge(self, other: Self) -> None:
        if other.largest is None or other.fullest is None:
            return
        if self.largest is None or self.fullest is None:
            self.largest, self.fullest = other.largest, other.fullest
        elif len(self.largest) != len(other.largest):
            raise Unfit(f"has {len(self.largest)} dimensions in one run, and {len(other.largest)} in another")
        else:
            self.largest = tuple(map(max, self.largest, other.largest))
            self.fullest = max(self.fullest, other.fullest, key=lambda dims: (math.prod(dims), dims))
        self.seen += other.seen
