"""Which units run on integers: the choice of least predicted time, found exactly as a minimum cut.

Each unit is on integers or in float and costs its time there; each value that crosses from float to integers costs a
QuantizeLinear once, and one that crosses back a DequantizeLinear. Such a sum of costs of single and paired choices is
the capacity of a cut (Greig, Porteous and Seheult, 1989), so no choice of regions is faster by the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir

from .columns import Folding, folding, is_small, unrounded
from .costs import Table
from .units import Role, Unit, readers

Sizes = Callable[[ir.Value], tuple[int, ...]]

_INTEGER, _FLOAT = "integer", "float"
_SHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MatMul")  # what a Transpose does not move behind
_TICKS = 16  # a nanosecond in so many whole units, for the cut is exact in integers only


class Costs(Protocol):
    """Nanoseconds of one thread: foretold, or measured (``timing.Measured``). ``dims`` gives the sizes of a value."""

    def unit(self, unit: Unit, dims: Sizes) -> tuple[float, float]:
        """A unit in float, and on integers."""
        ...

    def layer(self, node: ir.Node, dims: Sizes) -> tuple[float, float]:
        """A layer in float, and with its input quantized in each run; infinite where that cannot be."""
        ...

    def folding(self, conv: ir.Node, dims: Sizes) -> Folding | None:
        """How columns are folded into channels, where a Conv between integers is quicker so."""
        ...

    def quantize(self, elements: int) -> float:
        """A QuantizeLinear."""
        ...

    def dequantize(self, elements: int) -> float:
        """A DequantizeLinear."""
        ...

    def transpose(self, elements: int) -> float:
        """A Transpose of bytes, to or from channels-last."""
        ...

    def figures(self, unit: Unit, dims: Sizes) -> dict[str, float]:
        """What a decision rests on, for the ledger; nothing where that is the table, which can be looked up."""
        ...


@dataclass(frozen=True)
class Foretold:
    """Costs by a table; ``folds`` where columns of images may be folded into channels."""

    table: Table
    folds: bool = field(default=True, kw_only=True)

    def unit(self, unit: Unit, dims: Sizes) -> tuple[float, float]:
        in_float = sum(self.table.float_cost(node, dims) for node in unit.nodes)
        if unit.node.op_type == "MaxPool" and _behind_conv(unit.sources[0]):
            return in_float, in_float  # channels-last it is as fast; elsewhere its integer kernel is many times slower
        if (found := self.folding(unit.node, dims)) is not None:
            return in_float, self.table.folded_cost(unit.node, found, dims)
        node = _lookup(unit, dims) if unit.role is Role.CLAMP else unit.node
        return in_float, self.table.integer_cost(node, dims)

    def layer(self, node: ir.Node, dims: Sizes) -> tuple[float, float]:
        return self.table.float_cost(node, dims), self.table.dynamic_cost(node, dims)

    def folding(self, conv: ir.Node, dims: Sizes) -> Folding | None:
        found = folding(conv) if self.folds and conv.op_type == "Conv" else None
        return found if found is not None and is_small(conv, found) and gains(self.table, conv, found, dims) else None

    def quantize(self, elements: int) -> float:
        return self.table.quantize_cost(elements)

    def dequantize(self, elements: int) -> float:
        return self.table.dequantize_cost(elements)

    def transpose(self, elements: int) -> float:
        return self.table.transpose_cost(elements)

    def figures(self, unit: Unit, dims: Sizes) -> dict[str, float]:
        del unit, dims
        return {}


def gains(table: Table, conv: ir.Node, found: Folding, dims: Sizes) -> bool:
    """Whether a Conv between integers is foretold to be quicker with columns folded into channels."""

    def sizes(value: ir.Value) -> tuple[int, ...]:
        return dims(unrounded(value))

    return table.folded_cost(conv, found, sizes) <= table.integer_cost(conv, sizes)


def place(
    units: Sequence[Unit], dims: Sizes, choose: Callable[[Unit], tuple[float, float]], costs: Costs
) -> tuple[list[Unit], float]:
    """The units of one graph to run on integers, and the nanoseconds that all of them are then predicted to take.

    ``dims`` gives the sizes of a value; ``choose`` the nanoseconds of a unit in float and on integers, infinite where
    it must not be so; ``costs`` those of going from one to the other. Of choices of equal cost the one with the most
    integers.
    """
    import networkx as nx

    if not units:
        return [], 0.0
    network = nx.DiGraph()
    makers = {value: unit for unit in units for value in unit.outputs}
    members = {node: unit for unit in units for node in unit.nodes}
    last = _channels_last(units)
    for unit in units:
        in_float, on_integers = choose(unit)
        _join(network, _INTEGER, unit, in_float)  # cut where the unit is in float
        _join(network, unit, _FLOAT, on_integers)
    for value in dict.fromkeys(value for unit in units for value in (*unit.sources, *unit.outputs)):
        reading = _reading(value, members)
        # Integer convolutions run channels-last: what enters or leaves a chain of them is transposed.
        turn = costs.transpose(elements(value, dims)) if len(dims(value)) > 2 else 0.0
        _add_value(network, value, makers.get(value), reading, turn if value in last else 0.0, dims, costs)
        convs = [] if value in last else list(filter(_is_conv, reading[0]))
        for unit in convs:
            _join(network, unit, ("transpose", value), math.inf)
        if convs:
            _join(network, ("transpose", value), _FLOAT, turn)
    ticks, (integers, _) = nx.minimum_cut(network, _INTEGER, _FLOAT)
    return [unit for unit in units if unit in integers], ticks / _TICKS


def _behind_conv(value: ir.Value) -> bool:
    """Whether a convolution makes ``value``, an activation function included."""
    node = value.producer()
    while node is not None and node.op_type in ("Relu", "Clip", "MaxPool"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node is not None and node.op_type == "Conv"


def _lookup(unit: Unit, dims: Sizes) -> ir.Node:
    """The node that a HardSigmoid becomes on integers: a table of 256 entries is looked up."""
    return ir.node("LeakyRelu", [ir.Value(shape=ir.Shape(dims(unit.outputs[0])))])


def elements(value: ir.Value, dims: Sizes) -> int:
    """How many elements ``value`` has."""
    return math.prod(dims(value))


def _add_value(
    network: Any,
    value: ir.Value,
    maker: Unit | None,
    reading: tuple[list[Unit], bool],
    turn: float,
    dims: Sizes,
    costs: Costs,
) -> None:
    units, others = reading
    size = elements(value, dims)
    source: object = maker or _FLOAT
    gate = ("quantize", value)
    for unit in units:
        _join(network, unit, gate, math.inf)
    if units:
        _join(network, gate, source, costs.quantize(size) + turn)
    if maker is None:
        return
    gate = ("dequantize", value)
    plain = not maker.needs_output and maker.role is Role.LAYER  # its kernel can give floats at once
    _join(network, maker, gate, 0.0 if plain and not units else costs.dequantize(size) + turn)
    for reader in (*units, *([_FLOAT] if others else [])):
        _join(network, gate, reader, math.inf)


def _reading(value: ir.Value, members: dict[ir.Node, Unit]) -> tuple[list[Unit], bool]:
    """The units that read ``value`` as an activation, and whether anything else does."""
    units: dict[Unit, None] = {}
    others = value.is_graph_output()
    for node, port in readers(value):
        unit = members.get(node)
        if unit is not None and node is unit.node and port in unit.inputs:
            units[unit] = None
        elif unit is None or node is unit.node:
            others = True
    return list(units), others


def _join(network: Any, start: object, end: object, capacity: float) -> None:
    """An edge that costs ``capacity`` nanoseconds to cut, on top of what it may cost already."""
    known = network.edges[start, end]["capacity"] if network.has_edge(start, end) else 0
    network.add_edge(start, end, capacity=known + (capacity if math.isinf(capacity) else round(capacity * _TICKS)))


def _is_conv(unit: Unit) -> bool:
    return unit.node.op_type == "Conv"


def _channels_last(units: Sequence[Unit]) -> set[ir.Value]:
    """What convolutions make, and what sums, pools and the like take on channels-last; ``units`` are in order."""
    found: set[ir.Value] = set()
    for unit in units:
        along = unit.role is not Role.LAYER and unit.node.op_type not in _SHAPES
        if _is_conv(unit) or (along and found.intersection(unit.sources)):
            found.update(unit.outputs)
    return found
