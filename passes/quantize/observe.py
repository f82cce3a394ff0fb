"""The ranges and sizes of activations: from sample data, or from a file that `penjing calibrate` wrote."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.address import printable
from ...ir.affine import U8, Grid
from ...ir.errors import BadFile, nearest
from ...ir.ops import operator
from ..answers import clause
from ..base import Context, Feeds
from ..points import Distribution, Histogram, Point, Shape, Unanswered
from .calibrators import Method, calibrate
from .plan import Plan
from .ranges import read_ranges
from .units import Unit

_FEW = 16  # steps: a value of less is as good as lost
_FAR = 64.0  # the least magnitude of a mask; gates and probabilities, which end at 1, may well be near 0 or 1
_COMMON = 1e-4  # of the elements: a rarer outlier is what calibrators that clip are for

MASKED = f"a mask sets the range of an activation: it would leave under {_FEW} steps to all that is not masked"
ONE_SAMPLE = "ranges rest on one sample, and others may go beyond them; give more"
ALIKE = "ranges rest on samples that are all the same, and others may go beyond them; give samples that differ"


@dataclass(slots=True)
class Observed:
    """What is known of activations, by address: how their numbers are distributed, the sizes of the largest run, and
    of others why nothing is known; and from how many ``samples``."""

    distributions: dict[str, Distribution] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    samples: int = 0

    def take(self, address: str, found: Distribution | None, grid: Grid) -> None:
        """Keep what was found of a value, or why it is not to become integers of ``grid``."""
        if found is None or not found.seen:
            self.reasons[address] = "no sample reaches an activation"
        elif is_masked(found, grid):
            self.reasons[address] = MASKED
        else:
            self.distributions[address] = found

    def ranges(
        self, plan: Plan, units: Iterable[Unit], method: Method, grid: Grid
    ) -> dict[ir.Value, tuple[float, float]]:
        """The range that ``method`` finds, for integers of ``grid``, for each activation of ``units``."""
        values = dict.fromkeys(value for unit in units for value in (*unit.sources, *unit.outputs))
        return {value: calibrate(method, self.distributions[plan.addresses[value]], grid, False) for value in values}


def observe(plan: Plan, ctx: Context, grid: Grid = U8, feeds: Feeds | None = None) -> Observed:
    """Run the sample data, or these ``feeds``, through the model once; activations will be integers of ``grid``.

    Raises ``NeedsData``, and ``BadFeeds`` for NaN or infinity in the data themselves.
    """
    observed = Observed()
    addresses = [plan.addresses[value] for value in plan.values]
    points: list[Point] = [point for address in addresses for point in (Histogram(address), Shape(address))]
    try:
        answers = ctx.runner.statistics(plan.model, points, ctx.data if feeds is None else feeds)
    except Unanswered as error:
        masks = {value.name: _is_only_added(value) for value in plan.model.graph.inputs}
        for point, reason in error.reasons.items():
            if point.value in masks and ("NaN" in reason or not masks[point.value]):
                raise  # the data themselves; a mask of -inf is no fault
        answers = error.answers
        observed.reasons.update({point.value: clause(reason) for point, reason in error.reasons.items()})
    for address in addresses:
        found, shape = answers.get(Histogram(address)), answers.get(Shape(address))
        if shape is not None and shape.fullest is not None:
            observed.sizes[address] = shape.fullest
        if address not in observed.reasons:
            observed.take(address, found, grid)
    shapes = (answers[point] for point in points if isinstance(point, Shape) and point in answers)
    observed.samples = max((shape.seen for shape in shapes), default=0)
    if plan.values and (doubt := doubts(ctx.data, observed.samples)):
        ctx.warn(f"{doubt}.")
    return observed


def _is_only_added(value: ir.Value) -> bool:
    """Whether an input is, wherever it is moved, but added or picked from, as a mask of -inf is."""
    readers = [use.node for use in value.uses()]
    moved = [output for node in readers if operator(node).moves for output in node.outputs]
    plain = all(operator(node).moves or node.op_type in ("Add", "Where") for node in readers)
    return bool(readers) and plain and all(map(_is_only_added, moved))


def doubts(feeds: Feeds, samples: int) -> str | None:
    """Why ranges of so many ``samples`` say little, as a clause: there is one, or they are all the same.

    Looks at the data only as far as the first that differs.
    """
    first: Mapping[str, Any] = {}
    runs = 0
    for feed in feeds:
        runs += 1
        first = first or feed
        if any(not _equal(first.get(name), array) for name, array in feed.items()):
            return None
    if runs == 1 and samples <= 1:
        return ONE_SAMPLE
    several = samples > runs  # in one run
    return None if several and any(_varies(array) for array in first.values()) else ALIKE


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)


def _varies(array: Any) -> bool:
    return not isinstance(array, np.ndarray) or (array.ndim > 0 and bool((array != array[:1]).any()))


def is_masked(found: Distribution, grid: Grid) -> bool:
    """Whether numbers that only say "not this one", -1e9 say, make the range so wide that the others are lost.

    They lie apart from all others, are many, and leave them a few steps of ``grid``. (Zeros are lost nowhere.)
    """
    far, near = (found.low, found.high) if -found.low > found.high else (found.high, found.low)
    if abs(far) < _FAR or far * near >= 0 or not found.counts.size:
        return False
    edges, counts, bulk = found.edges(), found.counts, _FEW * (found.high - found.low) / grid.steps
    distant = (edges[1:] <= -3 * bulk) | (edges[:-1] >= 3 * bulk)
    close = (edges[1:] <= bulk) & (edges[:-1] >= -bulk)
    return not counts[~(distant | close)].any() and counts[distant].sum() >= _COMMON * found.seen


def read_observed(path: str, plan: Plan, names: Collection[str], ctx: Context, grid: Grid = U8) -> Observed:
    """What the file at ``path`` knows of the activations of ``plan``; a warning for what is not among ``names``, those
    of the model as it came. Raises ``BadFile``.
    """
    observed, known = Observed(), read_ranges(path)
    wanted = [plan.addresses[value] for value in plan.values]
    if wanted and not any(address in known for address in wanted):
        raise BadFile(
            f"{printable(path)} has a range for none of the {len(wanted)} activations of this model, such as "
            f"'{printable(wanted[0])}'; it is of another model. `penjing calibrate` makes one."
        )
    strangers = [name for name in known if name not in names]
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        place, hint = printable(path), printable(nearest(strangers[0], names))
        ctx.warn(f"{place} has a range for '{printable(strangers[0])}'{more}, which the model does not have.{hint}")
    for address in wanted:
        if address in known:
            observed.take(address, known[address], grid)
        else:
            observed.reasons[address] = "the ranges file has no range for an activation"
    return observed
