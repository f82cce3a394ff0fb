"""The calibration engine: one sweep over sample inputs answers all that any pass asks about values of a model.

What is asked is reduced run by run and merged, so memory does not grow with the number of samples. Where the model
leaves the batch open and treats each sample by itself - as its operators tell, else is tried - samples of equal shape
run together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..ir.address import printable
from ..ir.errors import BadFeeds
from ..passes.base import Feeds
from ..passes.points import NotFinite, Point, Unanswered, Unfit, extremes, require_finite
from .inputs import Input
from .rows import rows_stay_apart
from .session import DoesNotRun, open_session, run_feed
from .watch import Dims, Extremes, Watched, Whole

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from .progress import Progress

BATCH = 8  # samples that run together, at most
FETCHED = 2**26  # bytes of values that one run hands out, at most, where fewer samples together can do that
_EQUAL = 1e-3  # difference between a sample in a batch and alone, of the largest element, that is rounding

Feed = Mapping[str, Any]
View = Whole | Extremes | Dims


def collect(
    model: ir.Model, points: Iterable[Point], feeds: Feeds, *, threads: int = 1, progress: Progress | None = None
) -> dict[Point, Any]:
    """The statistic of each point over all ``feeds``, in one sweep; ``model`` stays as it is.

    Samples run in batches of up to ``BATCH`` where all inputs share an open first dimension, neighbours have equal
    shapes, and operators keep samples apart or a sample gives the same outputs in the first batch as alone. Else each
    feed runs as it is. Statistics of values with equal elements are equal for every order and grouping of the samples;
    ONNX Runtime's own kernels may move the last bits of an element with the size of a batch.

    Raises ``Unanswered``, which holds the answers to all other points, where a value holds NaN or infinity, is not of
    floats where the point needs that, is inside a function, in a body that gives nothing out, or asked for as a whole
    in a Loop in which its shape changes. Raises ``UsageError`` for a value that there is not, ``BadFeeds`` for no
    feeds, ``DoesNotRun``.
    """
    wanted = list(dict.fromkeys(points))
    if not wanted:
        return {}
    if progress is not None:
        feeds = progress.watched(feeds, "calibrating")
    sweep = _Sweep(model, wanted, threads)
    try:
        sweep.run(feeds)
    except DoesNotRun as error:
        looped = sweep.whole_in_loops()
        if not looped:
            raise
        why = "is in a Loop whose iterations cannot be put together, for its shape may change"
        refused = {point: _sentence(point.value, why) for point in looped}
        sweep = _Sweep(model, [point for point in wanted if point not in refused], threads)
        try:
            sweep.run(feeds)
        except DoesNotRun:
            raise error from None
        sweep.reasons |= refused
    return sweep.answers(wanted)


@dataclass
class _Root:
    """A point that the sweep looks at: how its value comes out, and what was found."""

    point: Point
    view: View
    statistic: Any


@dataclass
class _Run:
    """A feed, and the numbers of the samples that are its rows; of the run, where the feed is taken as it is."""

    feed: Feed
    numbers: list[int]
    split: bool

    @property
    def samples(self) -> int:
        return len(self.numbers)

    def row(self, place: int) -> _Run:
        if not self.split:
            return self
        feed = {name: array[place : place + 1] for name, array in self.feed.items()}
        return _Run(feed, [self.numbers[place]], True)

    def __str__(self) -> str:
        if not self.split:
            return f"run {self.numbers[0]} of the data"
        least, most = min(self.numbers), max(self.numbers)
        return f"sample {least}" if least == most else f"samples {least} to {most}"


class _Mixes(Exception):
    """A sample in a batch does not come out as it does alone."""


class _Sweep:
    """One walk over the feeds with one session."""

    def __init__(self, model: ir.Model, points: list[Point], threads: int) -> None:
        self.outputs = [output.name or "" for output in model.graph.outputs]
        self.inputs = {value.name for value in model.graph.inputs}
        self.batched = _batched_inputs(model)
        self.reasons: dict[Point, str] = {}
        self.derived: dict[Point, tuple[Point, float, float]] = {}
        self.watched = Watched(model)
        self.watched.know_types([point.value for point in points])
        self.watched.keep_order(it.value for it in points if it.asks == "array" and not it.elementwise)
        self.roots = self._roots(points)
        dims = any(isinstance(root.view, Dims) for root in self.roots.values())  # which of these count samples is tried
        self.apart = not dims and self.batched is not None and rows_stay_apart(model, self.batched)
        self.threads = threads
        self.batch_axes: dict[Point, set[int]] = {}

    def _roots(self, points: list[Point]) -> dict[Point, _Root]:
        """The points to look at; others follow from these."""
        asked = set(points)
        views: dict[tuple[str, str], View] = {}
        found = {}
        for point in points:
            try:
                if point.elementwise:
                    alike = _Alike(point, asked)
                    address, low, high = self.watched.root(point.value, alike)
                    if address != point.value:
                        self.derived[point] = (replace(point, value=address), low, high)
                        continue
                key = point.value, point.asks
                if key not in views:
                    views[key] = self._view(point)
                found[point] = _Root(point, views[key], point.start())
            except Unfit as reason:
                self.reasons[point] = _sentence(point.value, str(reason))
        return found

    def _view(self, point: Point) -> View:
        if point.asks == "extremes":
            return self.watched.extremes(point.value)
        if point.asks == "dims":
            return self.watched.dims(point.value)
        return self.watched.elements(point.value) if point.elementwise else self.watched.whole(point.value)

    def whole_in_loops(self) -> list[Point]:
        """The points that want arrays out of the body of a Loop."""
        return [
            root.point
            for root in self.roots.values()
            if isinstance(root.view, Whole) and self.watched.in_loop(root.point.value)
        ]

    def run(self, feeds: Feeds) -> None:
        session = open_session(self.watched.model, threads=self.threads, planned=False)
        if self.batched is not None:
            try:
                return self._run_batches(session, feeds)
            except (_Mixes, DoesNotRun):  # a model may say that its batch is open, and hold a Reshape that is not
                for root in self.roots.values():
                    root.statistic = root.point.start()
        return self._run_feeds(session, feeds)

    def _run_feeds(self, session: InferenceSession, feeds: Feeds) -> None:
        count = 0
        for count, feed in enumerate(feeds, 1):
            run = _Run(feed, [count - 1], False)
            self._take(session, run, self._fetch(session, run))
        if not count:
            raise BadFeeds("The data hold no samples; at least one is needed to see what values a model computes.")

    def _run_batches(self, session: InferenceSession, feeds: Feeds) -> None:
        """Samples of equal shape together. The first is run by itself: its values tell how many go together. Unless
        the operators tell that rows stay apart, it is run in a batch too, and its outputs tell.
        """
        rows = self._rows(feeds)
        first = _Run(next(rows, {}), [0], True)
        if not first.feed:
            raise _Mixes
        alone = self._fetch(session, first, () if self.apart else self.outputs)
        size = sum(array.nbytes for array in alone.values() if isinstance(array, np.ndarray))
        together = min(BATCH, max(1, FETCHED // max(size, 1)))
        if self.apart:
            self._take(session, first, alone)
            del alone
            for run in _batches(rows, together, 1):
                self._take(session, run, self._fetch(session, run))
            return
        batches = _batches(itertools.chain([first.feed], rows), together, 0)
        tried = False
        for run in batches:
            trial = run.samples > 1 and not tried
            more = self.outputs if trial else ()
            found = alone if run.numbers == [0] else self._fetch(session, run, more)
            if trial:
                middle = run.row(run.samples // 2)
                single = alone if middle.numbers == [0] else self._fetch(session, middle, self.outputs)
                self._compare(run, found, single)
                tried = True
                del single
            alone = {}
            self._take(session, run, found)
            del found  # before the next run wants as much memory

    def _rows(self, feeds: Feeds) -> Iterator[Feed]:
        for feed in feeds:
            sizes = {array.shape[0] if isinstance(array, np.ndarray) and array.ndim else -1 for array in feed.values()}
            if len(sizes) != 1 or -1 in sizes or set(feed) != self.batched:
                raise _Mixes
            for row in range(sizes.pop()):
                yield {name: array[row : row + 1] for name, array in feed.items()}

    def _compare(self, run: _Run, together: Mapping[str, Any], single: Mapping[str, Any]) -> None:
        """Raise ``_Mixes`` unless the sample in the middle, which any way of mixing would reach, is as it is alone.

        From its shapes and those of the batch it follows which axes count samples.
        """
        for name in self.outputs:
            if not _is_row(together[name], single[name], run.samples // 2, run.samples):
                raise _Mixes
        for root in self.roots.values():
            if isinstance(root.view, Dims):
                pairs = zip(root.view.read(together) or (), root.view.read(single) or (), strict=False)
                axes = {axis for axis, (many, one) in enumerate(pairs) if many == run.samples * one != one}
                self.batch_axes[root.point] = axes

    def _fetch(self, session: InferenceSession, run: _Run, more: Iterable[str] = ()) -> dict[str, Any]:
        """What the points still want of one run, and ``more``."""
        wanted = (name for root in self.roots.values() for name in root.view.names)
        return self._values(session, run, dict.fromkeys((*wanted, *more)))

    def _values(self, session: InferenceSession, run: _Run, names: Iterable[str]) -> dict[str, Any]:
        fetched = [name for name in names if name not in self.inputs]
        found = run_feed(session, run.feed, fetched, place=str(run)) if fetched else {}
        return found | {name: np.asarray(run.feed[name]) for name in names if name in run.feed}

    def _take(self, session: InferenceSession, run: _Run, found: Mapping[str, Any]) -> None:
        for root in list(self.roots.values()):
            try:
                self._update(root, run, found, root.statistic)
            except Unfit as reason:
                del self.roots[root.point]
                where, remedy = "", ""
                if isinstance(reason, NotFinite):
                    where = f" in {self._culprit(session, run, root)}"
                    given = root.point.value in self.inputs
                    way = "put a finite number there" if given else "keep what computes it in float"
                    remedy = f"; leave such samples out, or {way}"
                self.reasons[root.point] = _sentence(root.point.value, f"{reason}{where}{remedy}")

    def _update(self, root: _Root, run: _Run, found: Mapping[str, Any], statistic: Any) -> None:
        view = root.view
        if isinstance(view, Extremes):
            low, high, elements = view.read(found)
            if elements:
                require_finite(low, high)
                statistic.update_extremes(low, high, elements)
        elif isinstance(view, Dims):
            if (dims := view.read(found)) is not None:
                axes = self.batch_axes.get(root.point, ()) if run.samples > 1 else ()
                one = tuple(size // run.samples if axis in axes else size for axis, size in enumerate(dims))
                statistic.update_dims(one, run.samples)
        else:
            for array in view.read(found):
                if not root.point.checks and array.dtype.kind in "fV":
                    extremes(array)
                statistic.update(array)

    def _culprit(self, session: InferenceSession, run: _Run, root: _Root) -> _Run:
        """The first sample that holds what is not finite, by itself."""
        for place in np.argsort(run.numbers):
            one = run.row(int(place))
            try:
                self._update(root, one, self._values(session, one, root.view.names), root.point.start())
            except Unfit:
                return one
        return run

    def answers(self, points: list[Point]) -> dict[Point, Any]:
        """In the order of ``points``. Raises ``Unanswered``."""
        found = {}
        reasons = {}
        for point in points:
            root, low, high = self.derived.get(point, (point, -np.inf, np.inf))
            if root in self.reasons:
                reasons[point] = self.reasons[root]
            else:
                statistic = self.roots[root].statistic
                found[point] = statistic if root is point else statistic.clipped(low, high)
        if reasons:
            raise Unanswered(reasons, found)
        return found


@dataclass(frozen=True)
class _Alike:
    """Whether the same is asked of another value."""

    point: Point
    asked: set[Point] = field(repr=False)

    def __call__(self, address: str) -> bool:
        return replace(self.point, value=address) in self.asked


def _batched_inputs(model: ir.Model) -> set[str] | None:
    """The inputs, where all of them begin with one and the same open dimension; else None."""
    inputs = [one for one in map(Input.of, model.graph.inputs) if one.required]
    first = [one.dims[0] if one.dims else 1 for one in inputs]
    shared = len(inputs) == 1 or (len(set(first)) == 1 and first[0] is not None)
    if not inputs or not shared or isinstance(first[0], int):
        return None
    return {one.name for one in inputs}


def _batches(rows: Iterable[Feed], size: int, first: int) -> Iterator[_Run]:
    """Neighbours of equal shape, at most ``size`` together, numbered from ``first``; sample 0 stands in the middle."""
    pending: list[Feed] = []
    numbers = itertools.count(first)
    for row in rows:
        if pending and (len(pending) >= size or _shapes(row) != _shapes(pending[0])):
            yield _joined(pending, numbers)
            pending = []
        pending.append(row)
    if pending:
        yield _joined(pending, numbers)


def _joined(rows: list[Feed], numbers: Iterator[int]) -> _Run:
    taken = list(itertools.islice(numbers, len(rows)))
    if taken[0] == 0:
        turn = (len(rows) + 1) // 2
        rows, taken = rows[turn:] + rows[:turn], taken[turn:] + taken[:turn]
    return _Run({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, taken, True)


def _shapes(feed: Feed) -> list[tuple[int, ...]]:
    return [array.shape for array in feed.values()]


def _is_row(together: Any, single: Any, row: int, samples: int) -> bool:
    """Whether an output of one sample is what stands at its place in that of a batch."""
    if not (isinstance(together, np.ndarray) and isinstance(single, np.ndarray)) or single.ndim == 0:
        return False
    size = single.shape[0]
    if together.shape != (samples * size, *single.shape[1:]):
        return False
    part = together[row * size : (row + 1) * size]
    if single.dtype.kind != "f":
        return bool((part == single).all())
    if not single.size:
        return True
    with np.errstate(all="ignore"):
        near = np.abs(part - single) <= _EQUAL * np.abs(single[np.isfinite(single)]).max(initial=0)
    return bool((near | (part == single) | (np.isnan(part) & np.isnan(single))).all())


def _sentence(address: str, clause: str) -> str:
    return f"The value '{printable(address)}' {clause}."
