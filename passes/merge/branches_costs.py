"""Whether branches are faster together: by a table of measured times, by the clock, or as an earlier run found.

``branches-costs.json`` was measured by ``tests.benchmarks.branches --write``: for kinds of layers, nanoseconds of
one layer of all branches, apart and together, over numbers of branches, channels and pixels (samples, of matrices).
Between the points of a grid the time per multiply-add is interpolated in log space; beyond its upper edges it stays
what it is there, and below the lower ones the time itself does. What else there is counts by its number of nodes.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import onnx_ir as ir

from ...ir.address import path_text, printable
from ...ir.errors import BadFile
from ...ir.scopes import Scope
from ..base import Context
from ..ledger import Change
from ..timed import TIMED, read_times, rounded
from .branches import Region, Step, sizes
from .branches_build import BLOCK, packing
from .branches_fuse import ends
from .branches_rules import Layer

GAIN = 0.9  # together they must take less than this share of what they take apart: less is within the noise
_WORDS = "apart_ns and together_ns"
_IN_LAYER = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "BatchNormalization")  # part of the layer when it runs
_SECONDS = 0.5  # of the clock for each model


@dataclass(frozen=True)
class Verdict:
    fused: bool
    reason: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


Decide: TypeAlias = "Callable[[Region, Scope], Verdict]"
Walk: TypeAlias = "Callable[[ir.Model, Context, Decide], int]"


def verdicts(
    timing: Literal["table", "measure"],
    decisions: str | None,
    model: ir.Model,
    ctx: Context,
    walk: Walk,
    timed: list[Change],
) -> Decide:
    """A function that says of each region whether it is faster together; what it times it adds to ``timed``.

    Raises ``NeedsData`` where there is nothing to measure with, ``BadFile`` for a report that cannot be used.
    """
    if decisions is not None:
        known = read_times(decisions, ctx.step, ("apart", "together"), (), _WORDS)
        place = printable(path_text(decisions))
        return lambda region, scope: _replayed(region, scope, known, place, timed)
    if timing == "measure":
        feeds, runner = ctx.data, ctx.runner

        def by_clock(region: Region, scope: Scope) -> Verdict:
            subject, trial = _subject(region, scope), model.clone()
            walk(trial, ctx.for_step(ctx.step), lambda one, at: Verdict(_subject(one, at) == subject))
            apart, together = (rounded(1e9 * spent) for spent in runner.time([model, trial], feeds, _SECONDS))
            return _timed(subject, apart, together, timed)

        return by_clock
    return lambda region, scope: _foretold(region, scope, Table.read())


def _replayed(
    region: Region, scope: Scope, known: Mapping[str, Mapping[str, float]], place: str, timed: list[Change]
) -> Verdict:
    subject = _subject(region, scope)
    if subject not in known:
        raise BadFile(
            f"{place} does not say how long '{printable(subject)}' takes; it is the report of another model or of "
            "other options. Run with timing=measure again."
        )
    return _timed(subject, known[subject]["apart"], known[subject]["together"], timed)


def _timed(subject: str, apart: float, together: float, timed: list[Change]) -> Verdict:
    timed.append(Change(subject, TIMED, {"apart_ns": apart, "together_ns": together}))
    return _verdict(apart, together, "by the clock")


def _verdict(apart: float, together: float, how: str) -> Verdict:
    if together < GAIN * apart:
        return Verdict(True, numbers={"speedup": rounded(apart / together)})
    return Verdict(False, f"apart they are as fast {how}: together they take {together / apart:.2f} of the time")


def _subject(region: Region, scope: Scope) -> str:
    return f"{scope.prefix}{region.subject}: {region.count} times {region}"


# The table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """``call`` is what a node takes however little it does. A grid has ``axes`` branches, channels, pixels, and flat
    rows ``apart`` and ``together``, the last axis running fastest: nanoseconds of one layer of all branches."""

    call: float
    grids: Mapping[str, Mapping[str, Any]]

    @staticmethod
    @functools.cache
    def read() -> Table:
        found = json.loads(importlib.resources.files(__package__).joinpath("branches-costs.json").read_text("utf-8"))
        return Table(found["call"], found["grids"])

    def times(self, kind: str, count: int, width: float, pixels: int, work: float) -> tuple[float, float]:
        """Apart and together. ``work`` is multiply-adds of all branches, to those of the grid's layer of that size."""
        grid = self.grids[kind]
        at = (count, width, pixels)
        edge = [min(max(size, axis[0]), axis[-1]) for size, axis in zip(at, grid["axes"], strict=True)]
        scale = max(1.0, work / layer_work(kind, *edge))
        apart, together = (scale * _interpolated(grid["axes"], grid[form], edge) for form in ("apart", "together"))
        return apart, together


def layer_work(kind: str, count: float, width: float, pixels: float) -> float:
    """Multiply-adds of the layer that is measured at a point of a grid."""
    kernel = 9 if kind.startswith(("window", "depthwise")) else 1
    return count * pixels * width * kernel * (1 if kind == "depthwise" else width)


def _interpolated(axes: Sequence[Sequence[float]], row: Sequence[float], at: Sequence[float]) -> float:
    """Multilinear in the logarithms of sizes and times."""
    corners: list[tuple[int, float]] = [(0, 1.0)]
    for axis, size in zip(axes, at, strict=True):
        low = max(place for place, point in enumerate(axis) if point <= size)
        share = 0.0 if low == len(axis) - 1 else math.log(size / axis[low]) / math.log(axis[low + 1] / axis[low])
        steps = ((0, 1 - share), (1, share)) if share else ((0, 1.0),)
        corners = [(index * len(axis) + low + step, by * part) for index, by in corners for step, part in steps]
    return math.exp(sum(by * math.log(row[index]) for index, by in corners))


def _foretold(region: Region, scope: Scope, table: Table) -> Verdict:
    apart = together = 0.0
    for step in region.layers:
        spent = _layer(step, region.count, table)
        apart, together = apart + spent[0], together + spent[1]
    last = ends(region, scope)
    others = [step for step in region.steps if not isinstance(step.action, Layer) and not last.covers(step)]
    moved = sum(step.nodes[0].op_type not in _IN_LAYER for step in others)
    outputs = sum(
        any(node not in region.nodes | last.nodes for node, _ in value.uses()) or value.is_graph_output()
        for step in region.steps
        for value in step.outputs
    )
    apart += table.call * (moved * region.count + len(last.nodes))
    turns = sum(isinstance(step.action, Layer) and not step.action.image for step in region.steps)
    together += table.call * (moved + 2 * len(last.tails) + 4 * bool(turns) + (outputs / 4 + 1) * bool(outputs))
    return _verdict(apart, together, "by the table")


def _layer(step: Step, count: int, table: Table) -> tuple[float, float]:
    layer = step.action
    assert isinstance(layer, Layer)
    kernel, outputs = math.prod(layer.tail), layer.matrices.outputs
    inputs, shape = layer.matrices.inputs // kernel, sizes(step.outputs[0])
    pixels = math.prod(shape) // max(shape[1], 1)
    work = count * pixels * outputs * layer.matrices.inputs
    if layer.groups > 1 and inputs == 1:
        return table.times("depthwise", count, outputs, pixels, work)
    if layer.groups > 1:
        inputs *= layer.groups
    kind = "matrix" if not layer.image else "pointwise" if kernel == 1 else "window"
    packed = packing(count, outputs, inputs)
    if (
        layer.image and len(layer.source) == 1
    ):  # one wide convolution: hardly faster, and what the grids hold is grouped
        return (table.times(kind, count, math.sqrt(inputs * outputs), pixels, work)[0],) * 2
    whole = not (packed * outputs % BLOCK or packed * inputs % BLOCK)
    wasteful = packed > 2 and packed * max(outputs, inputs) > BLOCK  # most of what such a group multiplies by is zero
    if len(layer.source) > 1 and (wasteful or not whole):
        kind += " of odd width"
    return table.times(kind, count, math.sqrt(inputs * outputs), pixels, work)
