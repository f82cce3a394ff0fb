"""Operators that move integers about between QuantizeLinear and DequantizeLinear, as they move the floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.constants import is_constant
from ...ir.match import Replacement, Rule, attribute, rule
from ...ir.ops import OPERATORS
from ...ir.trace import constant
from ..rewrite import Tape
from .float_operators import attributes

_DATA = {"Where": (1, 2), "Pad": (0, 2)}  # the inputs that hold numbers; of others the first, of Concat all
_ORDER = {"ArgMax": (), "ArgMin": (), "TopK": (0,)}  # outputs that hold numbers; of others all
_MORE = ("MaxPool", "Pad", "Resize", "Upsample", "Where", *_ORDER)


def move_rules() -> Iterator[Rule]:
    """A rule for each operator that gives the numbers it gets, or compares them."""
    names = [name for (domain, name), known in OPERATORS.items() if not domain and known.moves]
    for name in dict.fromkeys((*names, *_MORE)):
        yield replace(rule(f"node @ {name}(*_)")(_moved), name=f"{name} of floats, not integers")


def _moved(tape: Tape, node: ir.Node) -> Replacement:
    """The node between DequantizeLinear and QuantizeLinear, by the one scale that its integers have."""
    data = [place for place in _data(node) if place < len(node.inputs) and node.inputs[place] is not None]
    found = _rounding(node, data)
    if found is None:
        return None
    read, write = found
    inputs = list(node.inputs)
    for place in data:
        inputs[place] = read(tape, inputs[place])
    if node.op_type == "Pad" and 2 not in data and attribute(node, "mode", "constant") == "constant":
        inputs[2:] = [read(tape, _padding(tape, node)), *inputs[3:]]
    made = tape.op("", node.op_type, *inputs, outputs=len(node.outputs), **attributes(node))
    results = made if isinstance(made, tuple) else (made,)
    numbers = _ORDER.get(node.op_type, range(len(results)))
    return tuple(write(tape, value) if place in numbers else value for place, value in enumerate(results))


def _data(node: ir.Node) -> tuple[int, ...]:
    return tuple(range(len(node.inputs))) if node.op_type == "Concat" else _DATA.get(node.op_type, (0,))


def _padding(tape: Tape, node: ir.Node) -> ir.Value:
    """What Pad fills up with where nothing says: the integer 0, whatever number it stands for."""
    value = node.inputs[0]
    dtype = ir.DataType.UINT8 if value is None or value.dtype is None else value.dtype
    return tape.constant(np.zeros((), dtype.numpy()), f"{node.name}_padding")


Step = Callable[[Tape, Any], ir.Value]


def _rounding(node: ir.Node, data: list[int]) -> tuple[Step, Step] | None:
    """How to read the integers of a node and how to write them: as what made them did, or what reads them does.

    ``None`` where they are no integers with a scale, or have more than one.
    """
    makers = [node.inputs[place].producer() for place in data if not is_constant(node.inputs[place])]  # type: ignore[union-attr]
    if makers:
        given = _parameters([maker for maker in makers if maker is not None], "QuantizeLinear")
        complete = all(maker is not None for maker in makers)
    else:
        readers = [user for value in node.outputs for user in value.consumers()]
        given, complete = _parameters(readers, "DequantizeLinear"), not any(v.is_graph_output() for v in node.outputs)
    if given is None or not complete:
        return None
    domain, parameters = given

    def read(tape: Tape, value: ir.Value) -> ir.Value:
        return tape.op(domain, "DequantizeLinear", value, *parameters)  # type: ignore[no-any-return]

    def write(tape: Tape, value: ir.Value) -> ir.Value:
        return tape.op(domain, "QuantizeLinear", value, *parameters)  # type: ignore[no-any-return]

    return read, write


def _parameters(nodes: list[ir.Node], op_type: str) -> tuple[str, tuple[ir.Value | None, ...]] | None:
    """Domain, scale and zero point that nodes of ``op_type`` agree on, per tensor; ``None`` where they do not."""
    if not nodes or any(item.op_type != op_type for item in nodes):
        return None
    first = nodes[0]
    scale, zero = constant(first.inputs[1]), constant(first.inputs[2]) if len(first.inputs) > 2 else None
    if scale is None or scale.size != 1 or "output_dtype" in first.attributes:
        return None
    for other in nodes[1:]:
        own = constant(other.inputs[1]), constant(other.inputs[2]) if len(other.inputs) > 2 else None
        if not (np.array_equal(_flat(scale), _flat(own[0])) and np.array_equal(_flat(zero), _flat(own[1]))):
            return None
    return first.domain, tuple(first.inputs[1:])


def _flat(array: Any) -> Any:
    return np.zeros(1, np.uint8) if array is None else array.ravel()
