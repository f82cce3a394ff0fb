"""int8 within the bounds that the user gives: a search over what is done with each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import onnx_ir as ir

from ...ir.affine import S8, S8_7BIT, U8
from ...ir.edit import become
from ...ir.errors import UsageError
from ...ir.files import saved_bytes
from ...ir.scopes import scopes
from ..base import NOTHING, Context, Effect, Pass, Selection, register
from .calibrators import Method
from .filters import REASON, is_filter_bank
from .insertion import Grids
from .judge import Bars, Fidelity, Judge
from .observe import observe
from .plan import Plan, forget_shapes, known_shapes, prepare, sizes_of
from .smooth import Smooth
from .static import slower
from .treatments import Choice, Treated, Treatment, layers, treat
from .units import Role

_TRIED = 16  # feeds on which candidates are compared; the result is held to the bounds on all
_GROUPS = 32  # of neighbouring layers whose effects are measured apart


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
        if not 0 <= self.min_sqnr <= 200:
            raise UsageError(f"quantize-auto: min-sqnr={self.min_sqnr:g} is out of range; it is 0 to 200 dB.")

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` without data, ``BadFeeds`` for data that hold NaN or infinity."""
        search = Search(model, ctx, Bars(self.max_drop, self.min_sqnr), self.target, self.keep)
        found = search.run()
        if found is None:
            ctx.skip("model", "nothing gains within the bounds: it stays as it was")
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
        kept = {address: Treatment.FLOAT for address, node in self.layers.items() if self._is_kept(node)}
        best = self._calibrated(Choice(kept))
        if not self._good(best):
            best = self._mended(best)
        return best if self._good(best) else self._lifted(best)

    def _is_kept(self, node: ir.Node) -> bool:
        return node in self.keep or is_filter_bank(node)

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

    def _lifted(self, start: Candidate) -> Candidate:
        """The fewest units lifted to float, with weights stored in 8 bits if the bounds hold for that at all. Else with
        their own weights, of which then as many as can be are stored in 8 bits, and of the rest in 16. In the end what
        is still on integers is mended, if that helps."""
        units = [address for address in self._order() if start.choice.of(address) is Treatment.FAST]
        # What had to clip may do without, once the worst is lifted.
        methods = dict.fromkeys((start.choice.calibrator, get_args(Method)[0]))
        plain = [replace(start.choice, calibrator=method, mended=False) for method in methods]
        stored = self._whole(self._try(plain[0].lifted(units, Treatment.STORED)))
        to = Treatment.STORED if self._safe(stored, Treatment.STORED) else Treatment.FLOAT
        ways = [self._fewest(choice, units, to, to) for choice in plain]
        best = min(ways, key=lambda one: (not self._good(one), one.treated.cost))
        for treatment in (Treatment.STORED, Treatment.HALF):
            lifted = [address for address in self.layers if best.choice.treatments.get(address) is Treatment.FLOAT]
            lifted = [address for address in lifted if not self._is_kept(self.layers[address])]
            if lifted and self._good(best):
                low = best.choice.lifted(lifted, treatment)
                found = self._whole(self._try(low))
                best = found if self._safe(found, treatment) else self._fewest(low, lifted, Treatment.FLOAT, treatment)
        if start.choice.mended and self._distance(best) > _COMFORT:
            found = self._whole(self._try(replace(best.choice, mended=True)))
            best = found if self._distance(found) < self._distance(best) else best
        return best

    def _order(self) -> list[str]:
        """Every unit and layer, as they come in the graph, so that neighbours are lifted together."""
        units = {unit.address for _, members in Plan.of(self.model).units for unit in members}
        return [
            address
            for scope in scopes(self.model)
            for node in scope.graph
            if (address := scope.address(node)) in units or address in self.layers
        ]

    def _fewest(self, choice: Choice, addresses: Sequence[str], to: Treatment, stage: Treatment) -> Candidate:
        """The least number of groups of ``addresses`` lifted, worst first, for which the bounds hold with that in hand
        which is left at this ``stage``; all of them where there is no such number."""
        order = self._by_harm(choice, addresses, to)
        low, high = 1, len(order)
        best = self._whole(self._try(choice.lifted(addresses, to)))
        while low < high and self._safe(best, stage):
            middle = (low + high) // 2
            some = [address for group in order[:middle] for address in group]
            found = self._whole(self._try(choice.lifted(some, to)))
            if self._safe(found, stage):
                best, high = found, middle
            else:
                low = middle + 1
        return best

    def _by_harm(self, choice: Choice, addresses: Sequence[str], to: Treatment) -> list[list[str]]:
        """Groups of neighbours by the noise that the outputs lose for the time that it costs to lift them.

        Noise of many small sources adds up, so that is what a group puts in. Where there is more noise than signal it
        does not: there a group is measured with all others in float.
        """
        size = math.ceil(len(addresses) / _GROUPS) or 1
        groups = [list(addresses[start : start + size]) for start in range(0, len(addresses), size)]
        base = self._try(choice)
        worth = []
        for group in groups:
            lifted = self._try(choice.lifted(group, to))
            harm = base.fidelity.noise - lifted.fidelity.noise
            if base.fidelity.noise > _WRECKED:
                others = [address for address in addresses if address not in group]
                harm = self._try(choice.lifted(others, to)).fidelity.noise
            worth.append(harm / max(lifted.treated.cost - base.treated.cost, _CHEAP * base.treated.cost, 1.0))
        return [group for _, group in sorted(zip(worth, groups, strict=True), key=lambda pair: -pair[0])]

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

    def _safe(self, candidate: Candidate, lifted: Treatment) -> bool:
        """Whether the bounds hold with something in hand: of many choices the one that just holds them on these data is
        likely not to on others."""
        return self._distance(candidate) <= _IN_HAND[lifted]

    def _distance(self, candidate: Candidate) -> float:
        return candidate.fidelity.distance(self.bars)

    # The ledger -------------------------------------------------------------------------------------------------------

    def tell(self, found: Candidate) -> None:
        """What became of each layer, and why."""
        own, ledger = self.ctx.for_step(self.ctx.step), self.ctx.ledger
        treat(self.model, found.choice, self.observed, self.grids, own)
        ledger.changes += self.preparation.ledger.changes
        for address, role in found.treated.static.items():
            if role is Role.LAYER:
                self.ctx.change(address, f"{self.layers[address].op_type} on integers, its range from the data")
        if others := sum(role is not Role.LAYER for role in found.treated.static.values()):
            self.ctx.change("neighbours", f"{others} operators between layers on integers too")
        ledger.changes += own.ledger.changes
        for line in self.trail:
            self.ctx.change("search", line)
        self.ctx.change("outputs", f"in the end: {found.fidelity}")
        for address, treatment in found.choice.treatments.items():
            node = self.layers.get(address)
            kept = None if node is None else "kept by request" if node in self.keep else REASON
            is_kept = node is not None and self._is_kept(node)
            self.ctx.skip(address, kept if is_kept and kept else f"lifted to {treatment}, for its harm")
        told = {*found.treated.static, *found.treated.dynamic, *found.choice.treatments}
        for address, reason in self._reasons().items():
            if address not in told:
                self.ctx.skip(address, reason)

    def _reasons(self) -> dict[str, str]:
        """Why each layer would be in float, if nothing else is said of it."""
        plan = Plan.of(self.model)
        sizes = sizes_of(plan.known(self.observed.sizes))
        reasons = {left.address: left.reason for left in plan.left}
        for unit in (unit for _, units in plan.units for unit in units if unit.role is Role.LAYER):
            unknown = (plan.addresses[value] for value in (*unit.sources, *unit.outputs))
            missing = next((self.observed.reasons[one] for one in unknown if one in self.observed.reasons), "")
            reasons[unit.address] = missing or slower(unit, sizes)
        return {address: reasons[address] for address in self.layers if address in reasons}


_IN_HAND = {Treatment.FLOAT: 0.55, Treatment.STORED: 0.7, Treatment.HALF: 0.75}
# of what is allowed, as noise 1 to 3 dB: the rest is for other data, and for storing smaller what was lifted to float
_WRECKED = 0.5  # noise over signal
_CHEAP = 0.005  # of the predicted time: what costs less counts as much
_COMFORT = 0.25  # of what is allowed: with less harm than this no other calibrator is tried
