"""int8 within the bounds that the user gives: a search over what is done with each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import onnx_ir as ir

from ...ir.affine import S8, S8_7BIT, U8
from ...ir.edit import become
from ...ir.errors import UsageError
from ...ir.files import saved_bytes
from ..base import NOTHING, Context, Effect, Pass, Selection, register
from .calibrators import Method
from .insertion import Grids
from .judge import Bars, Fidelity, Judge
from .observe import observe
from .plan import Plan, forget_shapes, known_shapes, prepare
from .treatments import Choice, Treated, Treatment, layers, treat

_TRIED = 16  # feeds on which candidates are compared; the result is held to the bounds on all
_GROUPS = 48  # of neighbouring layers whose effects are measured apart


@register("quantize-auto")
class QuantizeAuto(Pass):
    """Make a model small and fast in int8, as far as its outputs stay within bounds.

    Each layer is treated in the fastest way that the cost table knows: on integers with ranges from the data, on
    integers with ranges taken in each run, or in float with its weights stored in 8 bits. Where the outputs are then
    too far from those of the float model, on the same data, other calibrators are tried, and then the layers that do
    most harm are lifted: to float with stored weights, to weights of 16 bits, to float as it was, until the bounds
    hold. The ledger says which, and why.

    With a metric its loss is at most `max-drop`. Without one, every float output has an SQNR of at least `min-sqnr`
    dB, and the largest entry of each row of an output [N, classes], and every entry of an integer output, is the same
    in all but `max-drop` of the cases. Feeds in which a state goes from run to run are judged as such sequences.
    """

    max_drop: float = 0.01
    min_sqnr: float = 20.0
    target: Literal["cpu-vnni", "cpu-avx2"] = "cpu-vnni"
    keep: Selection = NOTHING

    def validate(self) -> None:
        if not 0 <= self.max_drop <= 1:
            raise UsageError(f"quantize-auto: max-drop={self.max_drop:g} is out of range; it is 0 to 1.")

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` without data, ``BadFeeds`` for data that hold NaN or infinity."""
        search = Search(model, ctx, Bars(self.max_drop, self.min_sqnr), self.target, self.keep)
        found = search.run()
        if found is None:
            ctx.skip("model", "nothing gains: it stays as it was")
            return
        search.tell(found)
        become(model, found.treated.model)


@dataclass(frozen=True)
class Candidate:
    """A choice, the model that it makes, and how that compares."""

    choice: Choice
    treated: Treated
    fidelity: Fidelity


@dataclass
class Search:
    """The way from the fastest choice to one that holds the bounds."""

    original: ir.Model
    ctx: Context
    bars: Bars
    target: str
    keep: Selection
    trail: list[str] = field(default_factory=list)  # what was tried, for the ledger

    def run(self) -> Candidate | None:
        """The best choice that holds the bounds; None where the model had better stay as it is."""
        best = self._found()
        if self._good(best) and self._gains(best):
            return best
        plain = self._whole(self._try(Choice(default=Treatment.FLOAT)))  # cleaned only, its activations fused
        return plain if self._good(plain) and self._gains(plain) else None

    def _found(self) -> Candidate:
        ctx = self.ctx
        self.judge = Judge(self.original, ctx)
        self.known = known_shapes(self.original)
        self.model = self.original.clone()
        self.model.meta.update(self.original.meta)
        prepare(self.model, ctx)
        self.observed = observe(Plan.of(self.model), ctx)
        self.grids = Grids(U8, S8_7BIT if self.target == "cpu-avx2" else S8)
        self.layers = layers(self.model)
        kept = {address: Treatment.FLOAT for address, node in self.layers.items() if node in self.keep}
        best = self._calibrated(Choice(kept))
        if self._good(best):
            return best
        for treatment in (Treatment.STORED, Treatment.HALF, Treatment.FLOAT):
            best = self._lifted(best.choice, treatment)
            if self._good(best):
                return best
        return best

    # Steps ------------------------------------------------------------------------------------------------------------

    def _calibrated(self, choice: Choice) -> Candidate:
        """The calibrator under which the fastest choice is nearest to the float model."""
        first = self._try(choice)
        found = [first]
        if first.treated.static and first.fidelity.distance(self.bars) > _COMFORT:
            found += [self._try(Choice(choice.treatments, calibrator=method)) for method in get_args(Method)[1:]]
        best = min(found, key=lambda one: one.fidelity.distance(self.bars))
        self.trail.append(f"calibrator {best.choice.calibrator}: {best.fidelity}")
        return self._whole(best)

    def _lifted(self, choice: Choice, treatment: Treatment) -> Candidate:
        """The fewest layers lifted to ``treatment``, worst first, for which the bounds hold; else all of them."""
        order = self._by_harm(choice, treatment)
        low, high = 1, len(order)
        best = self._whole(self._try(self._lift(choice, order, high, treatment)))
        if not self._good(best):
            self.trail.append(f"all layers {treatment}: {best.fidelity}")
            return best
        while low < high:
            middle = (low + high) // 2
            found = self._whole(self._try(self._lift(choice, order, middle, treatment)))
            if self._good(found):
                best, high = found, middle
            else:
                low = middle + 1
        return best

    def _by_harm(self, choice: Choice, treatment: Treatment) -> list[list[str]]:
        """Groups of layers that are below ``treatment``, by the noise that each alone puts into the outputs."""
        below = [address for address in self.layers if _LEVEL[choice.of(address)] < _LEVEL[treatment]]
        size = math.ceil(len(below) / _GROUPS) or 1
        groups = [below[start : start + size] for start in range(0, len(below), size)]
        harm = []
        for group in groups:
            alone = Choice(
                {address: choice.of(address) if address in group else Treatment.FLOAT for address in self.layers},
                calibrator=choice.calibrator,
            )
            harm.append(self._try(alone, metric=False).fidelity.noise)
        return [group for _, group in sorted(zip(harm, groups, strict=True), key=lambda pair: -pair[0])]

    def _lift(self, choice: Choice, order: Sequence[Sequence[str]], count: int, treatment: Treatment) -> Choice:
        return choice.lifted([address for group in order[:count] for address in group], treatment)

    # Trying -----------------------------------------------------------------------------------------------------------

    def _try(self, choice: Choice, *, metric: bool = False) -> Candidate:
        treated = treat(self.model, choice, self.observed, self.grids, self.ctx.for_step(self.ctx.step))
        forget_shapes(treated.model, self.known)
        return Candidate(choice, treated, self.judge.fidelity(treated.model, runs=_TRIED, metric=metric))

    def _whole(self, candidate: Candidate) -> Candidate:
        """The same, judged on all feeds and by the metric."""
        return Candidate(candidate.choice, candidate.treated, self.judge.fidelity(candidate.treated.model))

    def _gains(self, candidate: Candidate) -> bool:
        """Whether it is smaller than the original, or as large and faster by the table."""
        before, after = saved_bytes(self.original), saved_bytes(candidate.treated.model)
        return after < before or (after == before and bool(candidate.treated.static or candidate.treated.dynamic))

    def _good(self, candidate: Candidate) -> bool:
        return candidate.fidelity.distance(self.bars) <= 1

    # The ledger -------------------------------------------------------------------------------------------------------

    def tell(self, found: Candidate) -> None:
        """What became of each layer, and why."""
        own = self.ctx.for_step(self.ctx.step)
        treat(self.model, found.choice, self.observed, self.grids, own)
        for address, node in self.layers.items():
            if address in found.treated.static:
                self.ctx.change(address, f"{node.op_type} on integers, ranges from the data")
        self.ctx.ledger.changes += own.ledger.changes
        for address, treatment in found.choice.treatments.items():
            self.ctx.skip(address, f"lifted to {treatment}: it costs the outputs most")
        self.ctx.ledger.skips += own.ledger.skips
        self.ctx.change("outputs", f"{found.fidelity}")
        for line in self.trail:
            self.ctx.change("search", line)


_COMFORT = 0.25  # of what is allowed: with less harm than this no other calibrator is tried
_LEVEL = {treatment: level for level, treatment in enumerate(Treatment)}
