"""From a float model and what is known of its activations to the units that run on integers, and their scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses, bodies
from ...ir.affine import LEAST_SCALE, Affine, affine
from ...ir.constants import constant_array, is_constant
from ...ir.edit import Names
from ...ir.kernels import Bounds
from ...ir.match import Replacement, Rule, attribute, rule
from ...ir.opset import raise_opset
from ...ir.scopes import Scope, scopes
from ...ir.shapes import dims
from ..base import NOTHING, Context, Selection
from ..pipeline import Pipeline
from ..rewrite import Tape, rewrite
from ..selection import left_out
from .float_operators import attributes
from .insertion import Grids, clamp_scales
from .placement import Costs, Sizes, place
from .units import Left, Role, Unit, find_units, has_no_kernel

LEAST_OPSET = 13  # below it a QuantizeLinear has one scale for a whole tensor
_FORMING = ("Add", "Cast", "Identity", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze")
_USUAL = 1  # the size of a dimension of which nothing is known

Ranges = Mapping[ir.Value, tuple[float, float]]


def prepare(model: ir.Model, ctx: Context, only: Selection = NOTHING, keep: Selection = NOTHING) -> None:
    """Bring a model into the form that is placed: inlined, of opset 13 or newer, cleaned.

    Convolutions that ``keep`` names, or ``only`` does not, keep their weights.
    """
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        count = len(model.functions)
        InlinePass()(model)
        ctx.change("functions", f"{count} inlined, for their scales depend on the caller")
    stamp = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if 0 < stamp < LEAST_OPSET:
        raise_opset(model, LEAST_OPSET)
        ctx.change("main graph", f"opset {stamp} to {LEAST_OPSET}, for scales of channels")
    for step in Pipeline.of("clean,fuse-activations,infer-shapes").run(model, ctx):
        ctx.ledger.changes += step.ledger.changes
    for scope in scopes(model):
        for node in scope.graph:
            _type_body(node)
    own = ctx.for_step(ctx.step)
    rewrite(model, [flat_bias, pooled_mean, factor_rule(only, keep)], own)
    ctx.ledger.changes += own.ledger.changes
    names = Names(model)
    for scope in scopes(model):
        for node in scope.graph:
            node.name = node.name or names.fresh(node.op_type)


def _type_body(node: ir.Node) -> None:
    """Give the inputs of a Loop's or Scan's body, which need not have one, the type of what goes into them."""
    if node.domain or node.op_type not in ("Loop", "Scan"):
        return
    own = [ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)] if node.op_type == "Loop" else []
    given = [*own, *(None if value is None else value.type for value in node.inputs[len(own) :])]
    for _, body in bodies(node):
        for value, kind in zip(body.inputs, given, strict=False):
            value.type = value.type or kind


@rule("node @ Gemm(x, w, bias)")
def flat_bias(tape: Tape, node: ir.Node, x: ir.Value, w: ir.Value, bias: ir.Value) -> Replacement:
    """A constant row, or number, that a Gemm adds becomes [N], which alone its integer kernel takes."""
    array, sizes = constant_array(bias), dims(w)
    channels = None if sizes is None else sizes[0 if attribute(node, "transB", 0) else 1]
    if array is None or not isinstance(channels, int) or array.shape == (channels,):
        return None
    if array.size != 1 and array.shape != (1, channels):
        return None
    row = np.broadcast_to(array.reshape(-1), (channels,)).copy()
    return tape.Gemm(x, w, tape.constant(row, instead_of=bias), **attributes(node))  # type: ignore[no-any-return]


@rule("node @ ReduceMean(x, *rest)")
def pooled_mean(tape: Tape, node: ir.Node, x: ir.Value, rest: tuple[ir.Value | None, ...]) -> Replacement:
    """A mean over the pixels of images becomes GlobalAveragePool, which has an integer kernel."""
    given = constant_array(rest[0]) if rest else attribute(node, "axes")
    sizes = dims(x)
    if given is None or sizes is None or len(sizes) != 4 or x.dtype is not ir.DataType.FLOAT:
        return None
    if sorted(axis % 4 for axis in given) != [2, 3]:
        return None
    mean = tape.GlobalAveragePool(x)
    mean.type, mean.shape = x.type, ir.Shape([*sizes[:2], 1, 1])
    return mean if attribute(node, "keepdims", 1) else tape.Flatten(mean, axis=1)  # type: ignore[no-any-return]


def factor_rule(only: Selection = NOTHING, keep: Selection = NOTHING, but: Collection[str | None] = ()) -> Rule:
    """A number that an image is multiplied with goes into the weight of the convolution that reads it.

    Not where ``keep`` names that convolution, or ``only`` does not, or ``but`` is told the name of the product.
    """

    def factor_into_layer(
        tape: Tape, layer: ir.Node, x: ir.Value, factor: ir.Value, w: ir.Value, rest: tuple[ir.Value | None, ...]
    ) -> Replacement:
        product = layer.inputs[0].producer() if layer.inputs[0] is not None else None
        if left_out(layer, only, keep) or w in keep or (product is not None and product.name in but):
            return None
        return _with_factor(tape, layer, x, factor, w, rest)

    return rule("layer @ Conv(Mul(x, factor), w, *rest)")(factor_into_layer)


def _with_factor(
    tape: Tape, layer: ir.Node, x: ir.Value, factor: ir.Value, w: ir.Value, rest: tuple[ir.Value | None, ...]
) -> Replacement:
    number, weight = constant_array(factor), constant_array(w)
    if number is None or number.size != 1 or weight is None or weight.dtype != np.float32 or len(w.uses()) > 1:
        return None
    sizes = dims(x)
    if number.ndim and (sizes is None or len(sizes) != weight.ndim or number.ndim > weight.ndim):
        return None
    if not np.isfinite(number).all() or not number.any() or not _is_image(x):
        return None
    scaled = (weight.astype(np.float64) * number.reshape(-1)[0]).astype(np.float32)
    if not np.isfinite(scaled).all():
        return None
    made = tape.constant(scaled, instead_of=w)
    return tape.Conv(x, made, *rest, name=layer.name, **attributes(layer))  # type: ignore[no-any-return]


def _is_image(value: ir.Value | None) -> bool:
    """Whether a value is an input of the model, or one whose mean was taken away or whose form was changed."""
    while value is not None and (node := value.producer()) is not None:
        others = [other for other in node.inputs[1:] if other is not None]
        if node.op_type not in _FORMING or not all(map(is_constant, others)):
            return False
        value = node.inputs[0]
    return value is not None and value.is_graph_input()


def known_shapes(model: ir.Model) -> frozenset[str]:
    """The addresses of the values whose shapes the file gives."""
    return frozenset(
        scope.address(value)
        for scope in scopes(model)
        for node in scope.graph
        for value in node.outputs
        if value.shape is not None
    )


def forget_shapes(model: ir.Model, known: frozenset[str]) -> None:
    """Drop the shapes of values inside that were inferred on the way: a line of the file each, and ONNX Runtime infers
    them itself."""
    for scope in scopes(model):
        for node in scope.graph:
            for value in node.outputs:
                if not value.is_graph_output() and scope.address(value) not in known:
                    value.shape = value.type = None


@dataclass(slots=True)
class Plan:
    """The units of all graphs, the layers that cannot be units, other operators that have no integer kernel, each with
    how many there are, and the address of every value."""

    model: ir.Model
    units: list[tuple[Scope, list[Unit]]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    floats: Counter[str] = field(default_factory=Counter)
    addresses: Mapping[ir.Value | ir.Node, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ir.Model) -> Plan:
        plan = cls(model, addresses=addresses(model))
        for scope in scopes(model):
            units, left = find_units(scope)
            plan.units.append((scope, units))
            plan.left += left
            taken = {node for unit in units for node in unit.nodes}
            plan.floats.update(node.op_type for node in scope.graph if node not in taken and has_no_kernel(node))
        return plan

    @property
    def values(self) -> list[ir.Value]:
        """The activations that a unit reads or makes: what there have to be ranges of."""
        found = (value for _, units in self.units for unit in units for value in (*unit.sources, *unit.outputs))
        return list(dict.fromkeys(found))

    def known(self, sizes: Mapping[str, tuple[int, ...]]) -> dict[ir.Value, tuple[int, ...]]:
        """What is known by address, by value; what is inside a unit is as large as what the unit makes."""
        found = {value: sizes[address] for value in self.values if (address := self.addresses[value]) in sizes}
        for unit in (unit for _, units in self.units for unit in units):
            inside = (value for node in unit.nodes[:-1] for value in node.outputs)
            found.update(
                (value, found[unit.outputs[0]]) for value in inside if unit.outputs and unit.outputs[0] in found
            )
        return found

    def place(
        self, sizes: Sizes, choose: Callable[[Unit], tuple[float, float]], costs: Costs
    ) -> tuple[list[tuple[Scope, list[Unit]]], float]:
        """The units that run on integers, by graph, and the predicted nanoseconds of all units."""
        found = [(scope, place(units, sizes, choose, costs)) for scope, units in self.units]
        return [(scope, chosen) for scope, (chosen, _) in found], sum(cost for _, (_, cost) in found)


def sizes_of(known: Mapping[ir.Value, tuple[int, ...]]) -> Sizes:
    """Sizes as they were seen at run time, else as inferred, with 1 for what is not known."""

    def sizes(value: ir.Value) -> tuple[int, ...]:
        if value in known:
            return known[value]
        found = dims(value)
        return () if found is None else tuple(size if isinstance(size, int) else _USUAL for size in found)

    return sizes


def scales(units: list[Unit], ranges: Ranges, grids: Grids) -> dict[ir.Value, Affine]:
    """The scale of each activation that ``units``, which are in order, read or make.

    Its own, from its range; that of another where a unit only moves it; fixed for what HardSigmoid makes.
    """
    bounds = {value: unit.bounds for unit in units for value in unit.outputs if unit.bounds is not None}
    found: dict[ir.Value, Affine] = {}
    for unit in units:
        for value in unit.sources:
            if value not in found:
                found[value] = _own(ranges[value], grids, bounds.get(value))
        for value in unit.outputs:
            if unit.role is Role.SAME:
                found[value] = found[unit.sources[0]]
            elif unit.role is Role.CLAMP:
                found[value] = clamp_scales(unit.node, grids.activations)[1]
            elif unit.needs_output or value.uses():
                found[value] = _own(ranges[value], grids, bounds.get(value))
    return found


def _own(extent: tuple[float, float], grids: Grids, bounds: Bounds | None) -> Affine:
    low, high = extent
    if bounds is not None:
        low, high = max(low, bounds.low), min(high, bounds.high)
    made = affine(low, high, grids.activations, power_of_two=grids.power_of_two)
    if bounds is None or grids.power_of_two or made.zero_point != grids.activations.lowest:
        return made  # a power of two would have to be half of what the range takes
    if not bounds.hold(made):  # what is all zeros has a scale of 1
        exact = max(bounds.high / grids.activations.steps, LEAST_SCALE)
        made = replace(made, scale=np.minimum(made.scale, np.float32(exact)))
    while not bounds.hold(made):
        made = replace(made, scale=np.nextafter(made.scale, np.float32(0)))
    return made
