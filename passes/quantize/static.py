"""int8 by QuantizeLinear and DequantizeLinear, with ranges from sample data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

import onnx_ir as ir

from ...ir.address import addresses
from ...ir.affine import S8, S8_7BIT, U8, Grid
from ...ir.errors import UsageError
from ...ir.opset import raise_opset
from ...ir.scopes import Scope, scopes
from ...ir.weights import weights
from ..base import NOTHING, Context, Effect, Pass, Selection, register
from ..selection import left_out
from .calibrators import Method
from .costs import Target
from .filters import REASON
from .fold_columns import fold
from .insertion import Grids
from .observe import Observed, observe, read_observed
from .original import remember
from .placement import Costs, Sizes
from .plan import Plan, forget_shapes, known_shapes, prepare, scales, sizes_of
from .pooled import turn_pixels
from .timing import Timing, check_timing, costs_by, write_times
from .treatments import write
from .units import Role, Unit
from .weights import QuantizeWeights

_ACTIVATIONS = {
    "u8": U8,
    "s8": Grid.of(ir.DataType.INT8),
    "u16": Grid.of(ir.DataType.UINT16),
    "s16": Grid.of(ir.DataType.INT16),
}
_WEIGHTS = {"s8": S8, "s8-7bit": S8_7BIT, "u8": U8}


@register("quantize-static")
class QuantizeStatic(Pass):
    """Run layers on int8, with the range of each activation known from sample data.

    Where ONNX Runtime has integer kernels and they are predicted to be faster, QuantizeLinear and DequantizeLinear go
    around the operators: unsigned activations with a zero point, signed weights with a scale for each output channel.
    Everything else stays in float; its weights are stored in int8 where that makes the file smaller. The model is
    cleaned first. With `target=any` every layer that has an integer kernel is taken; `cpu-avx2` uses 7 bits of weights,
    since products of 8 bits overflow on processors without VNNI.

    Which kernels are faster a table says, measured once on a processor of the target's kind, so that the same model
    gives the same bytes anywhere. With `timing=measure` the parts of this model are timed on this machine instead, and
    the JSON report says what they took; `decisions` names such a report, to decide by it again without the clock.
    """

    calibrator: Method = "minmax"
    weights: Literal["s8", "s8-7bit", "u8"] = "s8"
    activations: Literal["u8", "s8", "u16", "s16"] = "u8"
    scale: Literal["float", "power-of-two"] = "float"
    ranges: str | None = None
    target: Target = "cpu-vnni"
    timing: Timing = "table"
    decisions: str | None = None
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def validate(self) -> None:
        check_timing(self.name, self.timing, self.decisions, self.target)
        if self.activations.endswith("16") and self.target != "any":
            raise UsageError(
                f"quantize-static: activations={self.activations} needs target=any; ONNX Runtime's CPU kernels take "
                "8 bits."
            )

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` without data and ranges, ``BadFeeds`` for data that hold NaN or infinity."""
        known = known_shapes(model)
        names = [address for item, address in addresses(model).items() if isinstance(item, ir.Value)]
        prepare(model, ctx, self.only, self.keep)
        remember(model)
        if self.activations.endswith("16") and next(scopes(model)).version < 21:
            raise_opset(model, 21)
            ctx.change("main graph", "raised to opset 21, for activations of 16 bits")
        plan = Plan.of(model)
        grid = self.grids.activations
        if self.ranges:
            observed = read_observed(self.ranges, plan, dict.fromkeys(names), ctx, grid)
        else:
            observed = observe(plan, ctx, grid)
        sizes = sizes_of(plan.known(observed.sizes))
        costs = costs_by(self.timing, self.decisions, self.target, self.grids, ctx)
        chosen, _ = plan.place(sizes, lambda unit: self._costs(unit, plan, observed, sizes, costs), costs)
        self._tell(plan, chosen, observed, sizes, costs, ctx)
        constants = {weight.address for weight in weights(model)}
        write(model, plan, chosen, observed, self.grids, self.calibrator)
        exact = [f"node:{left.node.name}" for left in plan.left if left.reason == REASON]
        own = ctx.for_step(ctx.step)
        QuantizeWeights(only=self.only, keep=Selection((*self.keep.patterns, *exact))).run(model, own)
        ctx.ledger.changes += own.ledger.changes
        ctx.ledger.skips += [skip for skip in own.ledger.skips if skip.subject in constants]  # not what was made here
        if self.target != "any":
            mine = {unit.node for _, units in chosen for unit in units}
            fold(model, ctx, lambda conv: costs.folding(conv, sizes) if conv in mine else None)
            turn_pixels(model, ctx)
        forget_shapes(model, known)
        write_times(costs, ctx)
        if not ctx.ledger.changes and not ctx.ledger.skips:
            ctx.skip("model", "it has no operator that could run on integers")

    @property
    def grids(self) -> Grids:
        reduced = self.target == "cpu-avx2" and self.weights == "s8"
        weights = S8_7BIT if reduced else _WEIGHTS[self.weights]
        return Grids(_ACTIVATIONS[self.activations], weights, self.scale == "power-of-two")

    def _costs(self, unit: Unit, plan: Plan, observed: Observed, sizes: Sizes, costs: Costs) -> tuple[float, float]:
        """Nanoseconds of a unit in float and on integers, infinite where it must not be so."""
        in_float, on_integers = costs.unit(unit, sizes)
        if self._why_not(unit, plan, observed):
            return in_float, math.inf
        return (math.inf if self.target == "any" else in_float), on_integers

    def _why_not(self, unit: Unit, plan: Plan, observed: Observed) -> str | None:
        """Why a unit cannot be on integers."""
        if reason := left_out(unit.node, self.only if unit.role is Role.LAYER else NOTHING, self.keep):
            return reason
        values = [plan.addresses[value] for value in (*unit.sources, *unit.outputs)]
        if reason := next((observed.reasons[address] for address in values if address in observed.reasons), None):
            return reason
        if self.scale == "power-of-two" and unit.bounds is not None:
            ranges = observed.ranges(plan, [unit], self.calibrator, self.grids.activations)
            if not all(unit.bounds.hold(scales([unit], ranges, self.grids)[value]) for value in unit.outputs):
                return (
                    f"no power of two ends where {unit.nodes[-1].op_type} does, so ONNX Runtime has no kernel for both"
                )
        return None

    def _tell(
        self,
        plan: Plan,
        chosen: Sequence[tuple[Scope, Sequence[Unit]]],
        observed: Observed,
        sizes: Sizes,
        costs: Costs,
        ctx: Context,
    ) -> None:
        """A line for each unit and each layer that is none; operators without an integer kernel are counted."""
        integer = {unit for _, units in chosen for unit in units}
        signed = self._kept_signed(integer)
        for unit in (unit for _, units in plan.units for unit in units):
            name, alone = unit.node.op_type, unit.role is Role.LAYER
            if unit in integer:
                in_float = self._why_in_float(unit, signed)
                how = "on integers" if alone else "on integers with its neighbours"
                how = f"as QDQ, for which ONNX Runtime has no integer kernel: {in_float}" if in_float else how
                ctx.change(unit.address, f"{name} {how}", **costs.figures(unit, sizes))
            elif reason := self._why_not(unit, plan, observed):
                ctx.skip(unit.address, reason)
            else:
                reason = slower(unit, sizes, costs) if alone else f"{name} in float with its neighbours"
                ctx.skip(unit.address, reason)
        for left in plan.left:
            ctx.skip(left.address, left.reason)
        if plan.floats:
            told = ", ".join(f"{count} {name}" for name, count in plan.floats.most_common())
            ctx.skip("other operators", f"ONNX Runtime has no integer kernels for them as they are: {told}")

    def _why_in_float(self, unit: Unit, signed: Collection[ir.Value]) -> str | None:
        """Why ONNX Runtime does not take a unit to its integer kernels although it is written as one."""
        if self.grids.activations.dtype.bitwidth > 8:
            return "those take 8 bits"
        if any(value in signed for value in (*unit.sources, *unit.outputs)):
            return "int8 that several operators read stays int8, and those take uint8"
        return None

    def _kept_signed(self, integer: Collection[Unit]) -> set[ir.Value]:
        """The values that stay int8: ONNX Runtime makes uint8 of what a single operator reads."""
        if self.grids.activations.dtype is not ir.DataType.INT8:
            return set()
        made = {value for unit in integer for value in unit.outputs}
        read = Counter(value for unit in integer for value in unit.read if value not in made)
        for value in made:
            read[value] = len(value.uses()) + value.is_graph_output()
        return {value for value, count in read.items() if count > 1}


def slower(unit: Unit, sizes: Sizes, costs: Costs) -> str:
    """The reason for a layer that could be on integers and is not."""
    in_float, on_integers = costs.unit(unit, sizes)
    told = f": {on_integers:g} ns, and {in_float:g} ns in float" if costs.figures(unit, sizes) else ""
    if on_integers >= in_float:
        return f"its integer kernel is predicted to be slower{told}"
    return f"it is predicted to gain less on integers than it takes to get there and back{told}"
