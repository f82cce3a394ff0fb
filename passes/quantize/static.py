"""int8 by QuantizeLinear and DequantizeLinear, with ranges from sample data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir

from ...ir.affine import S8, S8_7BIT, U8, Grid
from ...ir.errors import UsageError
from ...ir.opset import raise_opset
from ...ir.scopes import Scope, scopes
from ..base import NOTHING, Context, Effect, Pass, Selection, register
from ..selection import left_out
from .calibrators import Method
from .filters import REASON
from .insertion import Grids
from .observe import Observed, observe, read_observed
from .original import remember
from .placement import Sizes, unit_costs
from .plan import Plan, forget_shapes, known_shapes, prepare, sizes_of
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
    """

    calibrator: Method = "minmax"
    weights: Literal["s8", "s8-7bit", "u8"] = "s8"
    activations: Literal["u8", "s8", "u16", "s16"] = "u8"
    scale: Literal["float", "power-of-two"] = "float"
    ranges: str | None = None
    target: Literal["cpu-vnni", "cpu-avx2", "any"] = "cpu-vnni"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def validate(self) -> None:
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
        prepare(model, ctx)
        remember(model)
        if self.activations.endswith("16") and next(scopes(model)).version < 21:
            raise_opset(model, 21)
            ctx.change("main graph", "raised to opset 21, for activations of 16 bits")
        plan = Plan.of(model)
        observed = read_observed(self.ranges, plan) if self.ranges else observe(plan, ctx)
        sizes = sizes_of(plan.known(observed.sizes))
        chosen, _ = plan.place(sizes, lambda unit: self._costs(unit, plan, observed, sizes))
        self._tell(plan, chosen, observed, sizes, ctx)
        write(model, plan, chosen, observed, self.grids, self.calibrator)
        exact = [f"node:{left.node.name}" for left in plan.left if left.reason == REASON]
        QuantizeWeights(only=self.only, keep=Selection((*self.keep.patterns, *exact))).run(model, ctx)
        forget_shapes(model, known)

    @property
    def grids(self) -> Grids:
        reduced = self.target == "cpu-avx2" and self.weights == "s8"
        weights = S8_7BIT if reduced else _WEIGHTS[self.weights]
        return Grids(_ACTIVATIONS[self.activations], weights, self.scale == "power-of-two")

    def _costs(self, unit: Unit, plan: Plan, observed: Observed, sizes: Sizes) -> tuple[float, float]:
        """Nanoseconds of a unit in float and on integers, infinite where it must not be so."""
        in_float, on_integers = unit_costs(unit, sizes)
        if self._why_not(unit, plan, observed):
            return in_float, math.inf
        return (math.inf if self.target == "any" else in_float), on_integers

    def _why_not(self, unit: Unit, plan: Plan, observed: Observed) -> str | None:
        """Why a unit cannot be on integers."""
        if reason := left_out(unit.node, self.only if unit.role is Role.LAYER else NOTHING, self.keep):
            return reason
        unknown = (plan.addresses[value] for value in (*unit.sources, *unit.outputs))
        return next((observed.reasons[address] for address in unknown if address in observed.reasons), None)

    def _tell(
        self,
        plan: Plan,
        chosen: Sequence[tuple[Scope, Sequence[Unit]]],
        observed: Observed,
        sizes: Sizes,
        ctx: Context,
    ) -> None:
        """A line for each layer; operators that only go along are counted."""
        integer = {unit for _, units in chosen for unit in units}
        others: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for unit in (unit for _, units in plan.units for unit in units):
            if unit.role is not Role.LAYER:
                others[unit in integer][unit.node.op_type] += 1
            elif unit in integer:
                ctx.change(unit.address, f"{unit.node.op_type} on integers")
            else:
                ctx.skip(unit.address, self._why_not(unit, plan, observed) or slower(unit, sizes))
        for left in plan.left:
            ctx.skip(left.address, left.reason)
        for name, count in others[True].items():
            ctx.change(f"op:{name}", f"{count} on integers with their neighbours")
        for name, count in others[False].items():
            ctx.skip(f"op:{name}", f"{count} stay in float with their neighbours")


def slower(unit: Unit, sizes: Sizes) -> str:
    """The reason for a layer that could be on integers and is not."""
    in_float, on_integers = unit_costs(unit, sizes)
    if on_integers >= in_float:
        return "its integer kernel is predicted to be slower"
    return "it is predicted to gain less on integers than it takes to get there and back"
