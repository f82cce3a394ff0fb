"""Costs by the clock: what the parts of a model take on this machine, measured once, or as an earlier run found them.

    penjing run MODEL -o OUT --passes 'quantize-auto{timing=measure}' --data FEEDS --json report.json
    penjing run MODEL -o OUT --passes 'quantize-auto{decisions=report.json}' --data FEEDS

A change of the report whose ``what`` is ``timed`` says what a part took: its ``subject`` is all that its time depends
on, its ``numbers`` are nanoseconds. The second run decides by these, without a clock, so that its bytes are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from ...ir.address import path_text, printable
from ...ir.constants import constant_tensor
from ...ir.errors import BadFile, PenjingError, UsageError
from ..base import Context, Runner
from ..ledger import Change
from ..timed import TIMED, Times, read_times, rounded
from . import timing_nets as nets
from .columns import Folding
from .costs import DYNAMIC, Table, Target
from .fold_columns import foldable
from .insertion import Grids
from .placement import Costs, Foretold, Sizes
from .timing_nets import Pair, Part, Untimed
from .units import Unit

_SECONDS = 0.15  # of the clock for each net
_LEAST = 20.0  # nanoseconds: a difference below that is noise
_FORMS = (
    ("float",),
    ("integer", "dynamic"),
    "float_ns and, where there is such a form, integer_ns or dynamic_ns",
)
_COLUMN = {"Transpose": "integer"}  # of the cost table's rows; the others stand under "float"

Timing = Literal["table", "measure"]
Forms = Mapping[str, Callable[[Part], Pair | None]]  # how to build the nets of each form


def check_timing(step: str, timing: Timing, decisions: str | None, target: Target) -> None:
    """Raises ``UsageError`` for options that exclude each other."""
    if timing == "measure" and decisions is not None:
        raise UsageError(f"{step}: timing=measure and decisions=FILE exclude each other; FILE is what was measured.")
    if target == "any" and (timing == "measure" or decisions is not None):
        raise UsageError(f"{step}: target=any takes whatever has an integer kernel, so there is nothing to time.")


def costs_by(timing: Timing, decisions: str | None, target: Target, grids: Grids, ctx: Context) -> Costs:
    """Where costs come from: the table for the target, the clock, or the report of an earlier run.

    Raises ``NeedsData`` where there is nothing to measure with, ``BadFile`` for a report that cannot be used.
    """
    table = Table.of(target)
    if decisions is not None:
        return Measured(
            table, grids, None, read_times(decisions, ctx.step, *_FORMS), place=printable(path_text(decisions))
        )
    return Measured(table, grids, ctx.runner) if timing == "measure" else Foretold(table, folds=foldable(grids))


def write_times(costs: Costs, ctx: Context) -> None:
    """Write what was timed into the ledger, before all else, if the pass changed anything."""
    if isinstance(costs, Measured) and ctx.ledger.changes:
        ctx.ledger.changes[:0] = [
            Change(subject, TIMED, {f"{form}_ns": spent for form, spent in times.items()})
            for subject, times in costs.used.items()
        ]


@dataclass
class Measured:
    """Nanoseconds of parts as they were found before, else by the clock of ``runner``; without one it is an error.

    Parts that do not stand by themselves go by the table.
    """

    table: Table
    grids: Grids
    runner: Runner | None = None
    known: Mapping[str, Times] = field(default_factory=dict)
    place: str = ""
    used: dict[str, Times] = field(default_factory=dict)  # in order of first use

    def unit(self, unit: Unit, dims: Sizes) -> tuple[float, float]:
        part = Part.of_unit(unit, dims)
        integer = functools.partial(nets.on_integers, grids=self.grids, folding=self.folding(unit.node, dims))
        forms: Forms = {"float": nets.in_float, "integer": integer}
        times = self._times(
            f"{part}, {self._kinds}", part, forms, dict(zip(forms, self._told(unit, dims), strict=True))
        )
        return times["float"], times.get("integer", math.inf)

    def layer(self, node: ir.Node, dims: Sizes) -> tuple[float, float]:
        told = Foretold(self.table).layer(node, dims)
        if node.op_type not in DYNAMIC or constant_tensor(node.inputs[1]) is None:
            return told
        part = Part.of_layer(node, dims)
        forms: Forms = {"float": nets.in_float, "dynamic": functools.partial(nets.dynamic, grids=self.grids)}
        subject = f"{part}, input quantized in each run, {self._kinds}"
        times = self._times(subject, part, forms, dict(zip(forms, told, strict=True)))
        return times["float"], times.get("dynamic", math.inf)

    def folding(self, conv: ir.Node, dims: Sizes) -> Folding | None:
        """By the table: its time is measured as that says."""
        return Foretold(self.table, folds=foldable(self.grids)).folding(conv, dims)

    def quantize(self, elements: int) -> float:
        return self._crossings.quantize_cost(elements)

    def dequantize(self, elements: int) -> float:
        return self._crossings.dequantize_cost(elements)

    def transpose(self, elements: int) -> float:
        return self._crossings.transpose_cost(elements)

    def figures(self, unit: Unit, dims: Sizes) -> dict[str, float]:
        pairs = zip(("float_ns", "integer_ns"), self.unit(unit, dims), strict=True)
        return {name: spent for name, spent in pairs if math.isfinite(spent)}

    @property
    def _kinds(self) -> str:
        """Which kernels: the integers of activations and weights."""
        return f"{self.grids.activations.dtype.name} x {self.grids.weights.dtype.name}".lower()

    def _told(self, unit: Unit, dims: Sizes) -> tuple[float, float]:
        return Foretold(self.table, folds=foldable(self.grids)).unit(unit, dims)

    @functools.cached_property
    def _crossings(self) -> Table:
        """The table with rows of our own for what goes between floats and integers."""
        rows: dict[str, dict[str, list[float]]] = {}
        for name, count, part in nets.crossings(self.table.elements):
            column = _COLUMN.get(name, "float")
            told = self.table.elementwise_cost(name, count, column)
            times = self._times(f"{name} of {count} elements", part, {"float": nets.in_float}, {"float": told})
            rows.setdefault(name, {}).setdefault(column, []).append(times["float"] / count)
        return dataclasses.replace(self.table, elementwise={**self.table.elementwise, **rows})

    def _times(self, subject: str, part: Part, forms: Forms, told: Times) -> Times:
        """What each form of a part takes; one that cannot be is not among them."""
        if subject not in self.used:
            if subject in self.known:
                self.used[subject] = self.known[subject]
            elif self.runner is None:
                raise BadFile(
                    f"{self.place} does not say how long '{printable(subject)}' takes; it is the report of another "
                    "model, of other data or options. Run with timing=measure again."
                )
            else:
                found = _timed(self.runner, part, forms) or told
                self.used[subject] = {form: rounded(spent) for form, spent in found.items() if math.isfinite(spent)}
        return self.used[subject]


def _timed(runner: Runner, part: Part, forms: Forms) -> dict[str, float] | None:
    """Nanoseconds of each form by the clock; None where the part does not run by itself."""
    try:
        pairs = {form: pair for form, build in forms.items() if (pair := build(part)) is not None}
        models = [model for pair in pairs.values() for model in (pair.more, pair.less)]
        seconds = runner.time(models, [pairs["float"].feed], seconds=_SECONDS)
    except (Untimed, PenjingError):
        return None
    spent = zip(seconds[::2], seconds[1::2], strict=True)
    return {
        form: max((more - less) * 1e9 / pair.copies, _LEAST)
        for (form, pair), (more, less) in zip(pairs.items(), spent, strict=True)
    }
