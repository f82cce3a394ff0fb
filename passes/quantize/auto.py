"""int8 within the bounds that the user gives: a search over what is done with each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from .smooth import Smooth
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
        self._prepare()
        kept = {address: Treatment.FLOAT for address, node in self.layers.items() if node in self.keep}
        best = self._calibrated(Choice(kept))
        if not self._good(best):
            best = self._mended(best)
        return best if self._good(best) else self._lifted(best.choice)

    def _prepare(self) -> None:
        self.known = known_shapes(self.original)
        self.judge = Judge(self.original, self.ctx)
        self.model = self.original.clone()
        self.model.meta.update(self.original.meta)
        self.preparation = self.ctx.for_step(self.ctx.step)
        prepare(self.model, self.preparation)
        self.grids = Grids(U8, S8_7BIT if self.target == "cpu-avx2" else S8)
        self._observe()

    def _observe(self) -> None:
        self.observed = observe(Plan.of(self.model), self.ctx)
        self.layers = layers(self.model)

    # Steps ------------------------------------------------------------------------------------------------------------

    def _calibrated(self, choice: Choice) -> Candidate:
        """The calibrator under which the fastest choice is nearest to the float model."""
        first = self._try(choice)
        found = [first]
        if first.treated.static and first.fidelity.distance(self.bars) > _COMFORT:
            found += [self._try(replace(choice, calibrator=method)) for method in get_args(Method)[1:]]
        best = self._whole(min(found, key=self._distance))
        self.trail.append(f"calibrator {best.choice.calibrator}: {best.fidelity}")
        return best

    def _mended(self, best: Candidate) -> Candidate:
        """The same with outliers moved into weights, adaptive rounding and corrected biases, as far as these help."""
        plain, observed = self.model, self.observed
        smooth = self.model.clone()
        own = self.ctx.for_step("smooth")
        Smooth().run(smooth, own)
        if own.ledger.changes:
            self.model = smooth
            self._observe()
            found = self._whole(self._try(best.choice))
            if self._distance(found) < self._distance(best):
                self.preparation.ledger.changes += own.ledger.changes
                self.trail.append(f"smooth: {found.fidelity}")
                best = found
            else:
                self.model, self.observed, self.layers = plain, observed, layers(plain)
        found = self._whole(self._try(replace(best.choice, mended=True)))
        if self._distance(found) < self._distance(best):
            self.trail.append(f"round-adaptively, correct-bias: {found.fidelity}")
            return found
        return best

    def _lifted(self, choice: Choice) -> Candidate:
        """The fewest layers lifted to float, worst first, for which the bounds hold; then as many of these as can be
        are stored in 8 bits, and of the rest in 16."""
        fast = [address for address in self.layers if choice.of(address) is Treatment.FAST]
        order = self._by_harm(choice, fast)
        best = self._fewest(order, lambda some: choice.lifted(some, Treatment.FLOAT))
        for treatment in (Treatment.STORED, Treatment.HALF):
            lifted = [address for address in fast if best.choice.of(address) is Treatment.FLOAT]
            if not lifted or not self._good(best):
                break
            base = best.choice
            order = self._by_harm(base.lifted(lifted, treatment), lifted)
            low = base.lifted(lifted, treatment)
            best = self._fewest(order, lambda some, low=low: low.lifted(some, Treatment.FLOAT))  # type: ignore[misc]
        return best

    def _fewest(self, order: Sequence[Sequence[str]], choose: Callable[[list[str]], Choice]) -> Candidate:
        """The choice for the least number of groups, in order, for which the bounds hold; else for all of them."""
        low, high = 0, len(order)
        best: Candidate | None = None
        while low < high:
            middle = (low + high) // 2
            found = self._whole(self._try(choose(_joined(order[:middle]))))
            if self._good(found):
                best, high = found, middle
            else:
                low = middle + 1
        return best if best is not None else self._whole(self._try(choose(_joined(order))))

    def _by_harm(self, choice: Choice, addresses: Sequence[str]) -> list[list[str]]:
        """Groups of neighbouring layers, by the noise that each alone puts into the outputs, worst first."""
        size = math.ceil(len(addresses) / _GROUPS) or 1
        groups = [list(addresses[start : start + size]) for start in range(0, len(addresses), size)]
        harm = []
        for group in groups:
            alone = {address: choice.of(address) if address in group else Treatment.FLOAT for address in self.layers}
            harm.append(self._try(replace(choice, treatments=alone)).fidelity.noise)
        return [group for _, group in sorted(zip(harm, groups, strict=True), key=lambda pair: -pair[0])]

    # Trying -----------------------------------------------------------------------------------------------------------

    def _try(self, choice: Choice) -> Candidate:
        """What a choice makes, compared on some of the feeds, without the metric."""
        treated = treat(self.model, choice, self.observed, self.grids, self.ctx.for_step(self.ctx.step))
        forget_shapes(treated.model, self.known)
        return Candidate(choice, treated, self.judge.fidelity(treated.model, runs=_TRIED, metric=False))

    def _whole(self, candidate: Candidate) -> Candidate:
        """The same, judged on all feeds and by the metric."""
        return Candidate(candidate.choice, candidate.treated, self.judge.fidelity(candidate.treated.model))

    def _gains(self, candidate: Candidate) -> bool:
        """Whether it is smaller than the original, or as large and faster by the table."""
        before, after = saved_bytes(self.original), saved_bytes(candidate.treated.model)
        return after < before or (after == before and bool(candidate.treated.static or candidate.treated.dynamic))

    def _good(self, candidate: Candidate) -> bool:
        return self._distance(candidate) <= 1

    def _distance(self, candidate: Candidate) -> float:
        return candidate.fidelity.distance(self.bars)

    # The ledger -------------------------------------------------------------------------------------------------------

    def tell(self, found: Candidate) -> None:
        """What became of each layer, and why."""
        own, ledger = self.ctx.for_step(self.ctx.step), self.ctx.ledger
        treat(self.model, found.choice, self.observed, self.grids, own)
        ledger.changes += self.preparation.ledger.changes
        for address in found.treated.static:
            self.ctx.change(address, f"{self.layers[address].op_type} on integers, its range from the data")
        ledger.changes += own.ledger.changes
        for line in self.trail:
            self.ctx.change("search", line)
        self.ctx.change("outputs", str(found.fidelity))
        for address, treatment in found.choice.treatments.items():
            reason = "kept by request" if self.layers[address] in self.keep else f"lifted to {treatment}, for its harm"
            self.ctx.skip(address, reason)
        told = {*found.treated.static, *found.treated.dynamic, *found.choice.treatments}
        ledger.skips += [skip for skip in own.ledger.skips if skip.subject in self.layers and skip.subject not in told]


def _joined(groups: Sequence[Sequence[str]]) -> list[str]:
    return [address for group in groups for address in group]


_COMFORT = 0.25  # of what is allowed: with less harm than this no other calibrator is tried
