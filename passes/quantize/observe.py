"""The ranges and sizes of activations: from sample data, or from a file that `penjing calibrate` wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from ...ir.address import printable
from ...ir.affine import Grid
from ...ir.errors import BadFile
from ..base import Context
from ..points import Distribution, Histogram, Point, Shape, Unanswered
from .calibrators import Method, calibrate
from .plan import Plan
from .ranges import read_ranges
from .units import Unit


@dataclass(slots=True)
class Observed:
    """What is known of activations, by address: how their numbers are distributed, the sizes of the largest run, and
    of others why nothing is known."""

    distributions: dict[str, Distribution] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def ranges(
        self, plan: Plan, units: Iterable[Unit], method: Method, grid: Grid
    ) -> dict[ir.Value, tuple[float, float]]:
        """The range that ``method`` finds, for integers of ``grid``, for each activation of ``units``."""
        values = dict.fromkeys(value for unit in units for value in (*unit.sources, *unit.outputs))
        return {value: calibrate(method, self.distributions[plan.addresses[value]], grid, False) for value in values}


def observe(plan: Plan, ctx: Context) -> Observed:
    """Run the sample data through the model once. Raises ``NeedsData``, and ``BadFeeds`` for NaN or infinity."""
    observed = Observed()
    addresses = [plan.addresses[value] for value in plan.values]
    points: list[Point] = [point for address in addresses for point in (Histogram(address), Shape(address))]
    try:
        answers = ctx.runner.statistics(plan.model, points, ctx.data)
    except Unanswered as error:
        given = {value.name for value in plan.model.graph.inputs}
        if any(point.value in given for point in error.reasons):
            raise  # the data themselves; inside, a mask of -inf is no fault
        answers = error.answers
        observed.reasons.update({point.value: reason for point, reason in error.reasons.items()})
    for address in addresses:
        found, shape = answers.get(Histogram(address)), answers.get(Shape(address))
        if shape is not None and shape.fullest is not None:
            observed.sizes[address] = shape.fullest
        if found is not None and found.seen:
            observed.distributions[address] = found
        else:
            observed.reasons.setdefault(address, f"no sample reaches {address}")
    return observed


def read_observed(path: str, plan: Plan) -> Observed:
    """What the file at ``path`` knows of the activations of ``plan``. Raises ``BadFile``."""
    observed, known = Observed(), read_ranges(path)
    wanted = [plan.addresses[value] for value in plan.values]
    if wanted and not any(address in known for address in wanted):
        raise BadFile(
            f"{printable(path)} has a range for none of the {len(wanted)} activations of this model, such as "
            f"'{printable(wanted[0])}'; it is of another model. `penjing calibrate` makes one."
        )
    for value in plan.values:
        address = plan.addresses[value]
        if address in known:
            observed.distributions[address] = known[address]
        else:
            observed.reasons[address] = f"{path} has no range for {address}"
    return observed
