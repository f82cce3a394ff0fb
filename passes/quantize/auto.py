"""int8 within the bounds that the user gives: a search over what is done with each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir

from ...ir.edit import become
from ...ir.errors import UsageError
from ...ir.files import saved_bytes
from ..base import NOTHING, Context, Effect, Pass, Selection, register
from ..judge import Bars
from ..ledger import Change
from ..picks import picks
from ..pipeline import Pipeline
from .candidates import TRIED, Bench, Candidate, Subject, copy
from .equalize import Equalize
from .filters import REASON
from .lifting import Lifting
from .plan import Plan, sizes_of
from .smooth import Smooth
from .static import slower
from .timing import Timing, check_timing, costs_by, write_times
from .treatments import Choice, Treatment
from .units import Role


@register("quantize-auto")
class QuantizeAuto(Pass):
    """Make a model small and fast in int8, as far as its outputs stay within bounds.

    Each layer is treated in the fastest way that the cost table knows: on integers with ranges from the data, on
    integers with ranges taken in each run, or in float with its weights stored in 8 bits. Where the outputs are then
    too far from those of the float model, on the same data, other calibrators are tried, smoothing and equalizing,
    adaptive rounding and corrected biases, and then the layers that do most harm for what they gain are lifted to
    float, until the bounds hold: with weights of 8 bits, of 16 where that does too much harm, or as they were. The
    ledger says which, and why.

    With a metric its loss is at most `max-drop`. Without one, every float output has an SQNR of at least `min-sqnr`
    dB, and the largest entry of each row of an output [N, classes], or of probabilities [..., classes] where it is
    clearly ahead, and every entry of an integer output, is the same in all but `max-drop` of the cases. Outputs that
    hold what TopK or NonMaxSuppression picked are judged by what that picks from. Bounds that the run has for its
    checks count where they are stricter. Feeds in which a state goes from run to run are judged as such sequences.

    With `timing=measure` the parts of this model are timed on this machine, in place of the table, and the JSON report
    says what they took; `decisions` names such a report, to decide by it again without the clock.
    """

    max_drop: float = 0.01
    min_sqnr: float = 20.0
    target: Literal["cpu-vnni", "cpu-avx2"] = "cpu-vnni"
    timing: Timing = "table"
    decisions: str | None = None
    keep: Selection = NOTHING

    def validate(self) -> None:
        check_timing(self.name, self.timing, self.decisions, self.target)
        if not 0 <= self.max_drop <= 1:
            raise UsageError(f"quantize-auto: max-drop={self.max_drop:g} is out of range; it is 0 to 1.")
        if not 0 <= self.min_sqnr <= 200:
            raise UsageError(f"quantize-auto: min-sqnr={self.min_sqnr:g} is out of range; it is 0 to 200 dB.")

    def effect(self) -> Effect:
        return Effect.LOSSY

    def _bars(self, ctx: Context) -> Bars:
        limits = ctx.limits
        drop = limits.max_drop if limits.max_drop is not None and ctx.has("metric") else self.max_drop
        least = -math.inf if limits.min_sqnr is None else limits.min_sqnr
        return Bars(min(self.max_drop, drop), self.min_sqnr, least, limits.max_error)

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` without data, ``BadFeeds`` for data that hold NaN or infinity."""
        bars = self._bars(ctx)
        picked = None if ctx.has("metric") or bars.on_outputs else picks(model)
        bench = Bench(picked.show(model) if picked else model, ctx, bars, self.target, self.keep, picked)
        bench.costs = costs_by(self.timing, self.decisions, self.target, bench.grids, ctx)
        search = Search(bench)
        found = search.run()
        if found is None:
            ctx.skip("model", search.reason)
            return
        made = found.treated.model
        if picked is not None:
            ctx.change(", ".join(sorted(picked.outputs)), str(picked))
            picked.hide(made)
            Pipeline.of("remove-dead-code").run(made, ctx.for_step(ctx.step))
        search.tell(found)
        write_times(bench.costs, ctx)
        become(model, made)


@dataclass
class Search:
    """The way from the fastest choice to one that holds the bounds."""

    bench: Bench
    trail: list[str] = field(default_factory=list)  # what was tried, for the ledger
    reason: str = "nothing gains within the bounds: it stays as it was"  # why there is no result, if there is none
    scaling: list[Change] = field(default_factory=list)  # between layers, so that their channels are even

    def run(self) -> Candidate | None:
        """The best choice that holds the bounds; None where the model had better stay as it is."""
        prepared = self.bench.subject
        best = self._found()
        if best.good and self.bench.gains(best):
            return best
        self.bench.subject, self.scaling = prepared, []
        plain = self.bench.whole(Choice(default=Treatment.FLOAT))  # cleaned only, its activations fused
        if not plain.good:
            self.reason = (
                "it stays as it was: merging float operators alone moves its outputs beyond the bounds "
                f"({plain.fidelity}), as where rows are sorted by score; say with --metric what counts"
            )
        return plain if plain.good and self.bench.gains(plain) else None

    def _found(self) -> Candidate:
        layers, kept = self.bench.subject.layers, self.bench.is_kept
        best = self._calibrated(Choice({address: Treatment.FLOAT for address, node in layers.items() if kept(node)}))
        if best.distance > _COMFORT:
            best = self._evened(best)
        if _COMFORT < best.distance <= _FAR:
            best = self._mended(best)
        if best.distance <= 1:
            return best
        mending_helps = best.choice.mended
        if mending_helps:
            self.trail.pop()  # begun anew without it
        best = Lifting(self.bench, best.choice).run()
        self.trail.append(f"the least harmful units on integers: {best.fidelity}")
        return self._mended(best) if mending_helps and best.distance > _COMFORT else best

    def _calibrated(self, choice: Choice) -> Candidate:
        """The calibrator under which the fastest choice is nearest to the float model."""
        best = self.bench.whole(choice)
        if best.treated.static and best.distance > _COMFORT:
            nearest = self.bench.calibrated(choice)
            best = best if nearest == choice else self.bench.whole(nearest)
        self.trail.append(f"calibrator {best.choice.calibrator}: {best.fidelity}")
        return best

    def _evened(self, best: Candidate) -> Candidate:
        """The same with channels evened out, by what was seen of activations and by the weights, where that helps."""
        for pass_ in EVENING:
            best = self._rescaled(pass_, best)
        return best

    def _rescaled(self, pass_: Pass, best: Candidate) -> Candidate:
        """The same after ``pass_``, which moves scales between layers, if that brings it nearer."""
        bench, own = self.bench, self.bench.ctx.for_step(pass_.name)
        plain, scaled = bench.subject, copy(bench.subject.model)
        pass_.run(scaled, own)
        if not own.ledger.changes:
            return best
        some = Subject.of(scaled, bench.ctx, TRIED)
        if bench.tried(best.choice, some, TRIED).distance < bench.tried(best.choice, runs=TRIED).distance:
            bench.subject = Subject.of(scaled, bench.ctx)
            found = bench.whole(best.choice)
            if found.distance < best.distance:
                self.scaling += own.ledger.changes
                self.trail.append(f"{pass_.name}: {found.fidelity}")
                return found
        bench.subject = plain
        return best

    def _mended(self, best: Candidate) -> Candidate:
        """The same with adaptive rounding and corrected biases, if that helps."""
        found = self.bench.whole(replace(best.choice, mended=True))
        if found.distance >= best.distance:
            return best
        self.trail.append(f"round-adaptively, correct-bias: {found.fidelity}")
        return found

    # The ledger -------------------------------------------------------------------------------------------------------

    def tell(self, found: Candidate) -> None:
        """What became of each layer, and why."""
        bench, ctx = self.bench, self.bench.ctx
        ledger, layers = ctx.ledger, bench.subject.layers
        for line in self.trail:
            ctx.change("search", line)
        ctx.change("outputs", f"in the end: {found.fidelity}")
        ledger.changes += [*bench.preparation.ledger.changes, *self.scaling]
        figures = self._figures()
        for address, role in found.treated.static.items():
            if role is Role.LAYER:
                how = f"{layers[address].op_type} on integers, its range from the data"
                ctx.change(address, how, **figures.get(address, {}))
        if others := sum(role is not Role.LAYER for role in found.treated.static.values()):
            ctx.change("neighbours", f"{others} operators between layers on integers too")
        ledger.changes += found.treated.ledger.changes
        reasons = self._reasons() | self._lifted(found)
        for address in bench.subject.addresses():
            if address in reasons and address not in {*found.treated.static, *found.treated.dynamic}:
                ctx.skip(address, reasons[address])
        constants, least = found.treated.model.graph.initializers, _LARGE * saved_bytes(found.treated.model)
        for skip in found.treated.ledger.skips:
            tensor = constants[skip.subject].const_value if skip.subject in constants else None
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.nbytes >= least:
                ctx.skip(skip.subject, skip.reason)

    def _lifted(self, found: Candidate) -> dict[str, str]:
        """Why the units that were treated otherwise than in the fastest way are so treated."""
        bench, layers, treatments = self.bench, self.bench.subject.layers, found.choice.treatments
        if found.choice.default is Treatment.FLOAT:
            return dict.fromkeys(layers, "on integers the model would gain nothing within the bounds")
        kept = [address for address in treatments if address in layers and bench.is_kept(layers[address])]
        fastest = Choice(dict.fromkeys(kept, Treatment.FLOAT), calibrator=found.choice.calibrator)
        fast = bench.treat(fastest)
        integer, reasons = {*fast.static, *fast.dynamic}, dict[str, str]()
        for address, treatment in treatments.items():
            if address in kept:
                reasons[address] = "kept by request" if layers[address] in bench.keep else REASON
            elif treatment is not Treatment.FAST and address in integer:
                own = f"lifted to {treatment}, for its harm"
                reasons[address] = own if address in layers else "lifted to float with its neighbours, for their harm"
            elif treatment in (Treatment.HALF, Treatment.FLOAT) and address in layers:
                reasons[address] = f"its weights lifted to {treatment}, for the harm that 8 bits do"
        return reasons

    def _figures(self) -> dict[str, dict[str, float]]:
        """What was timed of each unit."""
        subject = self.bench.subject
        plan = Plan.of(subject.model)
        sizes = sizes_of(plan.known(subject.observed.sizes))
        units = (unit for _, members in plan.units for unit in members)
        return {unit.address: self.bench.costs.figures(unit, sizes) for unit in units}

    def _reasons(self) -> dict[str, str]:
        """Why each layer would be in float, if nothing else is said of it."""
        subject = self.bench.subject
        plan = Plan.of(subject.model)
        sizes = sizes_of(plan.known(subject.observed.sizes))
        reasons = {left.address: left.reason for left in plan.left}
        for unit in (unit for _, units in plan.units for unit in units if unit.role is Role.LAYER):
            unknown = (plan.addresses[value] for value in (*unit.sources, *unit.outputs))
            missing = next((subject.observed.reasons[one] for one in unknown if one in subject.observed.reasons), "")
            reasons[unit.address] = missing or slower(unit, sizes, self.bench.costs)
        return {address: reasons[address] for address in subject.addresses() if address in reasons}


EVENING = (Smooth(), Equalize())

_LARGE = 0.01  # of the file: a constant that is said to stay as it was
_COMFORT = 0.4  # of what is allowed: with less harm than this nothing else is tried
_FAR = 3.0  # of what is allowed: rounding otherwise does not bring nearer what is further away
