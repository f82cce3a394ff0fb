"""What choices for a model make of it, and how that compares with the float model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import onnx_ir as ir

from ...ir.affine import S8, S8_7BIT, U8
from ...ir.files import saved_bytes
from ...ir.scopes import scopes
from ..base import Context
from ..feeds import Some
from ..judge import Bars, Fidelity, Judge
from ..meter import Meter
from ..picks import Picks
from ..selection import Selection
from .calibrators import Method
from .costs import Table, Target
from .filters import is_filter_bank
from .insertion import Grids
from .observe import Observed, observe
from .placement import Costs, Foretold
from .plan import Plan, forget_shapes, known_shapes, prepare
from .treatments import Choice, Treated, layers, predicted, treat

TRIED = 16  # feeds on which it is measured where noise comes from
_CLIPS = 1.25  # so many times nearer has to be what a calibrator makes that clips


@dataclass(frozen=True)
class Candidate:
    """A choice, the model that it makes, and how that compares with the float model.

    ``distance`` is what is surely lost as a share of what may be: of many choices, the one that just holds the bounds
    on these data is likely not to on others. ``good``: the bounds hold on these.
    """

    choice: Choice
    treated: Treated
    fidelity: Fidelity
    distance: float
    good: bool


@dataclass(frozen=True)
class Subject:
    """A form of the float model that choices are made for, and what the data say of its activations."""

    model: ir.Model
    observed: Observed
    layers: dict[str, ir.Node]

    @classmethod
    def of(cls, model: ir.Model, ctx: Context, runs: int | None = None) -> Subject:
        """From one sweep over all of the data, or about so many ``runs`` of them."""
        feeds = None if runs is None else Some(ctx.data, runs)
        return cls(model, observe(Plan.of(model), ctx, feeds=feeds), layers(model))

    def predicted(self, choice: Choice, costs: Costs) -> float:
        """Nanoseconds of a run, of what could be on integers."""
        return predicted(self.model, choice, self.observed, costs)

    def addresses(self) -> list[str]:
        """Every unit and layer, as they come in the graph."""
        units = {unit.address for _, members in Plan.of(self.model).units for unit in members}
        return [
            address
            for scope in scopes(self.model)
            for node in scope.graph
            if (address := scope.address(node)) in units or address in self.layers
        ]


class Bench:
    """Where candidates are made and judged, by what is ``picked`` from where ``original`` gives that out too.

    ``subject`` is the form of the model that is worked on.
    """

    def __init__(
        self,
        original: ir.Model,
        ctx: Context,
        bars: Bars,
        target: Target,
        keep: Selection,
        picked: Picks | None = None,
    ) -> None:
        self.original, self.ctx, self.bars, self.keep = original, ctx, bars, keep
        self.grids = Grids(U8, S8_7BIT if target == "cpu-avx2" else S8)
        self.costs: Costs = Foretold(Table.of(target))
        self.known = known_shapes(original)
        self.judge = Judge(original, ctx, picked)
        self.meter: Meter | None = None
        self.preparation = ctx.for_step(ctx.step)
        model = copy(original)
        prepare(model, self.preparation, keep=self.keep)
        self.subject = Subject.of(model, ctx)

    def is_kept(self, node: ir.Node) -> bool:
        """Whether a layer stays in float in any case."""
        return node in self.keep or is_filter_bank(node)

    def tried(self, choice: Choice, subject: Subject | None = None, runs: int | None = None) -> Candidate:
        """What a choice makes, judged on all feeds, or about ``runs`` of them, without the metric."""
        treated = self.treat(choice, subject)
        return self._candidate(choice, treated, self.judge.fidelity(treated.model, runs=runs, metric=False))

    def calibrated(self, choice: Choice) -> Choice:
        """The same under the calibrator that brings it nearest; one that clips has to be clearly nearer, for on other
        data it may clip more."""
        choices = [replace(choice, calibrator=method) for method in get_args(Method)]
        found = [self.tried(one).distance * (1.0 if number == 0 else _CLIPS) for number, one in enumerate(choices)]
        return choices[found.index(min(found))]

    def whole(self, choice: Choice) -> Candidate:
        """What a choice makes, judged on all feeds and by the metric."""
        treated = self.treat(choice)
        return self._candidate(choice, treated, self.judge.fidelity(treated.model))

    def treat(self, choice: Choice, subject: Subject | None = None) -> Treated:
        """The model that a choice makes."""
        subject, own = subject or self.subject, self.ctx.for_step(self.ctx.step)
        treated = treat(subject.model, choice, subject.observed, self.grids, self.costs, own)
        forget_shapes(treated.model, self.known)
        return treated

    def noise(self, choice: Choice) -> float:
        """What a choice puts into the outputs, by a ``Meter``."""
        self.meter = self.meter or Meter(self.subject.model, self.judge, TRIED)
        return self.meter.noise(self.treat(choice).model)

    def gains(self, candidate: Candidate) -> bool:
        """Whether it is smaller than the original, or as large and faster by the table."""
        before, after = saved_bytes(self.original), saved_bytes(candidate.treated.model)
        return after < before or (after == before and bool(candidate.treated.static or candidate.treated.dynamic))

    def _candidate(self, choice: Choice, treated: Treated, fidelity: Fidelity) -> Candidate:
        return Candidate(
            choice, treated, fidelity, fidelity.distance(self.bars, surely=True), fidelity.distance(self.bars) <= 1
        )


def copy(model: ir.Model) -> ir.Model:
    """A copy that shares the weights, with what is remembered of the model."""
    made = model.clone()
    made.meta.update(model.meta)
    return made
