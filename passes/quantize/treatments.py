"""What can be done with each layer, and a model in which that is done."""

from __future__ import annotations

import enum
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir

from ...ir.address import addresses
from ...ir.affine import S8, S8_7BIT, U8, Grid
from ...ir.constants import constant_tensor
from ...ir.edit import Names
from ...ir.ops import Kind, operator
from ...ir.scopes import Scope, scopes
from ..base import Context
from ..feeds import Some
from ..ledger import Ledger
from ..selection import Selection
from .bias import CorrectBias
from .calibrators import Method
from .dynamic import QuantizeDynamic
from .float16 import ToFloat16
from .fold_columns import fold
from .insertion import Grids, Inserter
from .observe import Observed
from .original import remember
from .placement import Costs, Sizes
from .plan import Plan, scales, sizes_of
from .pooled import turn_pixels
from .rounding import RoundAdaptively
from .units import Role, Unit, is_layer
from .weights import QuantizeWeights

GRIDS: dict[Grid, Literal["s8", "s8-7bit", "u8"]] = {S8: "s8", S8_7BIT: "s8-7bit", U8: "u8"}
_SAMPLES = 128  # by which layers are rounded, each at 64 places: many times what it takes to tell their inputs apart
_GAIN = 0.9  # of the time in float, under which a dynamic product is worth its rounding


class Treatment(enum.StrEnum):
    """How the weights of a layer are kept and how it computes, from fastest to most exact."""

    FAST = "fast"  # on integers where the cost table says so: static, or dynamic
    STORED = "stored"  # in float, weights stored in 8 bits
    HALF = "half"  # in float, weights stored in float16
    FLOAT = "float"  # as it was


@dataclass(frozen=True)
class Choice:
    """A treatment for each layer, by address, and what goes for all of them."""

    treatments: Mapping[str, Treatment] = field(default_factory=dict)
    default: Treatment = Treatment.FAST
    calibrator: Method = "minmax"
    mended: bool = False  # rounded adaptively, biases corrected
    forced: frozenset[str] = frozenset()  # on integers, whatever that costs, so that their harm can be measured

    def of(self, address: str) -> Treatment:
        return self.treatments.get(address, self.default)

    def lifted(self, addresses: Iterable[str], treatment: Treatment) -> Choice:
        return self.with_(dict.fromkeys(addresses, treatment))

    def with_(self, treatments: Mapping[str, Treatment]) -> Choice:
        return replace(self, treatments={**self.treatments, **treatments})


@dataclass(frozen=True)
class Treated:
    """A model with what of it is on integers, by address: ``static`` units with ranges from the data, each with its
    role, and ``dynamic`` layers that take them anew in each run; ``ledger`` tells what was done to the others."""

    model: ir.Model
    static: dict[str, Role]
    dynamic: list[str]
    cost: float  # predicted nanoseconds of a run, of what could be on integers
    ledger: Ledger


def layers(model: ir.Model) -> dict[str, ir.Node]:
    """Every node with weights by its address, in order: those that contract, and those that pick rows of a table."""
    return {
        scope.address(node): node
        for scope in scopes(model)
        for node in scope.graph
        if is_layer(node) or _has_table(node)
    }


def _has_table(node: ir.Node) -> bool:
    ports = (port.index for port in operator(node).ports if port.kind is Kind.EMBEDDING)
    tables = (constant_tensor(node.inputs[index]) for index in ports if index < len(node.inputs))
    return any(table is not None and table.dtype is ir.DataType.FLOAT for table in tables)


def treat(model: ir.Model, choice: Choice, observed: Observed, grids: Grids, costs: Costs, ctx: Context) -> Treated:
    """A copy of the prepared ``model``, each layer treated as ``choice`` says; the ledger of ``ctx`` is empty."""
    work = model.clone()
    work.meta.update(model.meta)
    remember(work)
    plan, nodes = Plan.of(work), layers(work)
    sizes = sizes_of(plan.known(observed.sizes))
    chosen, cost = place(plan, choice, observed, sizes, costs)
    static = {unit.address: unit.role for _, units in chosen for unit in units}
    dynamic = _dynamic(choice, plan, static, sizes, costs)
    write(work, plan, chosen, observed, grids, choice.calibrator)
    weights = GRIDS[grids.weights]
    if dynamic:
        QuantizeDynamic(weights=weights, only=_named(nodes[address] for address in dynamic)).run(work, ctx)
    by = {kind: [node for address, node in nodes.items() if choice.of(address) is kind] for kind in Treatment}
    if by[Treatment.HALF]:
        ToFloat16(only=_named(by[Treatment.HALF])).run(work, ctx)
    QuantizeWeights(keep=_named([*by[Treatment.HALF], *by[Treatment.FLOAT]])).run(work, ctx)
    if choice.mended:
        _mend(work, observed.samples, ctx)
    places = addresses(work)
    fold(work, ctx, lambda conv: costs.folding(conv, sizes) if places.get(conv) in static else None)
    turn_pixels(work, ctx)
    return Treated(work, static, dynamic, cost, ctx.ledger)


def _mend(model: ir.Model, samples: int, ctx: Context) -> None:
    """Round adaptively, by about ``_SAMPLES`` of the ``samples``, and correct biases by all."""
    runs = getattr(ctx.data, "runs", None)
    some = ctx.data if runs is None or not samples else Some(ctx.data, math.ceil(runs * min(1, _SAMPLES / samples)))
    own = ctx.replaced(data=some)
    RoundAdaptively(positions=64).run(model, own)
    ctx.ledger.changes += own.ledger.changes
    ctx.ledger.skips += own.ledger.skips
    ctx.ledger.warnings += own.ledger.warnings
    CorrectBias(sweeps=4).run(model, ctx)


def place(
    plan: Plan, choice: Choice, observed: Observed, sizes: Sizes, costs: Costs
) -> tuple[list[tuple[Scope, list[Unit]]], float]:
    """The units on integers, by graph, and the predicted nanoseconds of a run, of what could be.

    What reads integers is not quantized in each run: such a layer goes along with the units before it.
    """
    found = plan.place(sizes, lambda unit: choose(unit, choice, plan, observed, sizes, costs), costs)
    static = {unit.address: unit.role for _, units in found[0] for unit in units}
    made = {value for _, units in found[0] for unit in units for value in unit.outputs}
    nodes = layers(plan.model)
    late = [
        address for address in _dynamic(choice, plan, static, sizes, costs) if made.intersection(nodes[address].inputs)
    ]
    if not late:
        return found
    choice = replace(choice, forced=choice.forced.union(late))
    return plan.place(sizes, lambda unit: choose(unit, choice, plan, observed, sizes, costs), costs)


def predicted(model: ir.Model, choice: Choice, observed: Observed, costs: Costs) -> float:
    """The ``Treated.cost`` of a choice, found without making its model."""
    plan = Plan.of(model)
    return place(plan, choice, observed, sizes_of(plan.known(observed.sizes)), costs)[1]


def choose(
    unit: Unit, choice: Choice, plan: Plan, observed: Observed, sizes: Sizes, costs: Costs
) -> tuple[float, float]:
    """Nanoseconds of a unit off and on integers, infinite where it must not be so treated."""
    in_float, on_integers = costs.unit(unit, sizes)
    known = all(plan.addresses[value] in observed.distributions for value in (*unit.sources, *unit.outputs))
    fast = choice.of(unit.address) is Treatment.FAST
    if fast and unit.role is Role.LAYER:
        in_float = min(in_float, costs.layer(unit.node, sizes)[1])
    if unit.address in choice.forced and known:
        return math.inf, on_integers
    return in_float, on_integers if known and fast else math.inf


def _dynamic(choice: Choice, plan: Plan, static: Mapping[str, Role], sizes: Sizes, costs: Costs) -> list[str]:
    """The layers that take the range of their input anew in each run."""
    return [
        address
        for address, node in layers(plan.model).items()
        if address not in static and _gains(choice.of(address), node, sizes, costs)
    ]


def write(
    model: ir.Model,
    plan: Plan,
    chosen: Sequence[tuple[Scope, Sequence[Unit]]],
    observed: Observed,
    grids: Grids,
    calibrator: Method,
) -> None:
    """Put the units ``chosen`` on integers."""
    units = [unit for _, members in chosen for unit in members]
    found = scales(units, observed.ranges(plan, units, calibrator, grids.activations), grids)
    inserter = Inserter(model, grids, found, Names(model))
    for scope, members in chosen:
        inserter.write(scope, members)
    inserter.finish()


def _gains(treatment: Treatment, node: ir.Node, sizes: Sizes, costs: Costs) -> bool:
    """Whether a layer that is not static is to be dynamic."""
    if treatment is not Treatment.FAST or node.op_type not in ("MatMul", "Gemm", "LSTM"):
        return False
    in_float, dynamic = costs.layer(node, sizes)
    return dynamic < _GAIN * in_float


def _named(nodes: Iterable[ir.Node]) -> Selection:
    return Selection(tuple(f"node:{glob.escape(node.name or '')}" for node in nodes))
