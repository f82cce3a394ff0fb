"""What operators cost in float and on int8, in nanoseconds of one thread: from a table, so that decisions repeat.

    table = Table.of("cpu-vnni")
    table.integer_cost(node) + table.quantize_cost(n) + table.dequantize_cost(m) < table.float_cost(node)

``costs-vnni.json`` and ``costs-avx2.json`` were measured by ``tests/benchmarks/costs.py``: grids of sizes for classes
of operators. Between the points of a grid the time per unit of work (a multiply-add, an element) is interpolated in log
space. Beyond its upper edges that stays what it is there; below the lower ones the time itself does. Absolute times are
those of the machine that the table names; ratios carry further.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import onnx_ir as ir

from ...ir.constants import is_constant
from ...ir.kernels import bounds
from ...ir.ops import operator
from .columns import Folding

Target: TypeAlias = Literal["cpu-vnni", "cpu-avx2", "any"]
"""Processors with integer dot products (AVX512-VNNI, AVX-VNNI); with AVX2 alone; or whatever there will be."""

Dims: TypeAlias = Sequence[int]
Shapes: TypeAlias = Mapping[str, Dims] | Callable[[ir.Value], Dims | None] | None
"""How big values are: by name, or by a function; else the value's own shape. An unknown dimension counts as 1."""

__all__ = ["Shapes", "Table", "Target"]

_FREE = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Shape")
_CONV_FUSED = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "BatchNormalization")  # if float
_TRANSPARENT = ("BatchNormalization", "HardSwish", "HardSigmoid", "QuantizeLinear", "DequantizeLinear")
DYNAMIC = ("MatMul", "Gemm", "LSTM")
_BLOCK = 16  # channels that a float convolution computes together
_ODD = {"float": 1.4, "integer": 2.2, "line-float": 1.0, "line-integer": 2.0}
"""By how much a depthwise convolution is slower where the last block of channels is not full."""
_FEW = 4  # input channels of a first convolution at most
_NEAR = 8  # operators that stand between a convolution and one that keeps to its layout, at most


# What is asked --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Measured times on one kind of processor: ``call`` in nanoseconds, rows by operator at numbers of ``elements`` in
    nanoseconds per element, and grids by class of layer in nanoseconds per multiply-add."""

    call: float  # what a node takes however little it does
    elements: Sequence[int]
    elementwise: Mapping[str, Mapping[str, Sequence[float]]]
    grids: Mapping[str, Mapping[str, Any]]
    machine: Mapping[str, Any]

    @staticmethod
    @functools.cache
    def of(target: Target) -> Table:
        """The table for a target; for ``any`` that of processors with integer dot products."""
        name = "costs-avx2.json" if target == "cpu-avx2" else "costs-vnni.json"
        found = json.loads(importlib.resources.files(__package__).joinpath(name).read_text("utf-8"))
        return Table(**{key: found[key] for key in ("call", "elements", "elementwise", "grids", "machine")})

    def float_cost(self, node: ir.Node, shapes: Shapes = None) -> float:
        """Nanoseconds of ``node`` in float between float neighbours: what merges with a Conv before it is free."""
        return 0.0 if _merges(node) else _cost(self, node, shapes, "float")

    def integer_cost(self, node: ir.Node, shapes: Shapes = None) -> float:
        """Nanoseconds of ``node`` in its integer kernel, integers in and out; infinite where it has none."""
        if operator(node).integer is None:
            return 0.0 if bounds(node) is not None else math.inf
        return _cost(self, node, shapes, "integer")

    def dynamic_cost(self, node: ir.Node, shapes: Shapes = None) -> float:
        """Nanoseconds of a MatMul, Gemm, LSTM on weights of 8 bits that quantizes its input itself; else infinite."""
        return _cost(self, node, shapes, "dynamic") if node.op_type in DYNAMIC else math.inf

    def blocked_cost(self, node: ir.Node, bits: int, shapes: Shapes = None) -> float:
        """Nanoseconds of a MatMul on weights of 4 or 8 bits in blocks of 32, as a MatMulNBits; else infinite.

        ONNX Runtime then rounds its input to 8 bits as it runs (accuracy level 4).
        """
        possible = node.op_type in ("MatMul", "Gemm") and bits in (4, 8)
        return _cost(self, node, shapes, f"bits{bits}") if possible else math.inf

    def folded_cost(self, conv: ir.Node, found: Folding, shapes: Shapes = None) -> float:
        """Nanoseconds of a Conv in its integer kernel, its columns folded into channels, changes of shape included."""
        y, (outputs, inputs, height, _) = _dims(conv.outputs[0], shapes), _dims(conv.inputs[1], shapes)
        sizes = (y[0] * math.prod(y[2:]) / found.steps, found.factor * inputs, found.steps * outputs)
        spent = self.grid_cost("window", sizes, math.prod((*sizes, height, found.blocks)), "integer")
        return 2 * self.call + spent

    def quantize_cost(self, elements: int) -> float:
        """Nanoseconds of a QuantizeLinear of ``elements`` floats."""
        return self.elementwise_cost("QuantizeLinear", elements, "float")

    def dequantize_cost(self, elements: int) -> float:
        """Nanoseconds of a DequantizeLinear of ``elements`` bytes; those may be weights, if it merges with nothing."""
        return self.elementwise_cost("DequantizeLinear", elements, "float")

    def transpose_cost(self, elements: int) -> float:
        """Nanoseconds of the Transpose of bytes where ``elements`` enter or leave a chain of integer convolutions.

        Those run channels-last; ONNX Runtime puts a Transpose wherever another operator than those that go along reads
        or makes the value.
        """
        return self.elementwise_cost("Transpose", elements, "integer")

    def elementwise_cost(self, name: str, elements: int, column: str) -> float:
        """Nanoseconds of an operator on so many elements."""
        row = self.elementwise.get(name) or self.elementwise["other"]
        rates = row.get(column) or row["float"]
        return max(self.call, elements * _interpolated([self.elements], rates, (elements,)))

    def grid_cost(self, name: str, sizes: Sequence[float], work: float, column: str) -> float:
        """Nanoseconds of ``work`` units at these sizes; what is smaller than the grid takes as long as its edge."""
        grid = self.grids[name]
        rates = grid.get(column)
        if rates is None:
            return math.inf
        for axis, size in zip(grid["axes"], sizes, strict=True):
            work *= max(1.0, axis[0] / max(size, 1))
        return max(self.call, work * _interpolated(grid["axes"], rates, sizes))


# How it is answered ---------------------------------------------------------------------------------------------------


def _merges(node: ir.Node) -> bool:
    """Whether ONNX Runtime makes ``node`` a part of the float convolution before it."""
    return node.op_type in _CONV_FUSED and _only_source(node, 0) == "Conv"


def _only_source(node: ir.Node, index: int) -> str | None:
    """The operator that makes an input which nothing else reads."""
    value = node.inputs[index] if index < len(node.inputs) else None
    source = None if value is None else value.producer()
    return source.op_type if source is not None and value is not None and len(value.uses()) == 1 else None


def _cost(table: Table, node: ir.Node, shapes: Shapes, column: str) -> float:
    name = node.op_type
    if name == "Constant":
        return 0.0
    if name in _FREE:
        return table.call
    if name in _LAYERS:
        return _LAYERS[name](table, node, shapes, column)
    if name == "Resize":
        return table.elementwise_cost(_resize(node), _elements(node, shapes), column)
    if name in ("MaxPool", "AveragePool"):
        return _pool(table, node, shapes, column)
    if name == "Add" and column == "float" and "Conv" in (_only_source(node, 0), _only_source(node, 1)):
        return table.elementwise_cost("residual Add", _elements(node, shapes), column)
    return table.elementwise_cost(name, _elements(node, shapes), column)


def _resize(node: ir.Node) -> str:
    """Nearest neighbours by a factor, rounded down, are a kernel of their own."""
    get = node.attributes.get_string
    if get("mode", "nearest") != "nearest":
        return "Resize linear"
    plain = get("coordinate_transformation_mode", "half_pixel") == "asymmetric"
    return "Resize floor" if plain and get("nearest_mode", "round_prefer_floor") == "floor" else "Resize"


def _pool(table: Table, node: ir.Node, shapes: Shapes, column: str) -> float:
    """By half of what it reads and writes together. Integers that are not channels-last make a MaxPool slow."""
    inner, outer = (math.prod(_dims(value, shapes)) for value in (node.inputs[0], node.outputs[0]))
    apart = node.op_type == "MaxPool" and column == "integer" and not _channels_last(node)
    return table.elementwise_cost("MaxPool apart" if apart else node.op_type, (inner + outer) // 2, column)


def _channels_last(node: ir.Node) -> bool:
    """Whether ``node`` follows a convolution with nothing between but what may run on integers too."""
    for _ in range(_NEAR):
        value = node.inputs[0] if node.inputs else None
        source = None if value is None else value.producer()
        if source is None or source.op_type == "Conv":
            return source is not None
        if not (operator(source).integer or bounds(source) or source.op_type in _TRANSPARENT):
            return False
        node = source
    return False


def _conv(table: Table, node: ir.Node, shapes: Shapes, column: str) -> float:
    """By pixels of the output (of the input, transposed), channels in and out, and the kind of window."""
    x, w, y = (_dims(value, shapes) for value in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if len(w) < 3 or len(x) != len(w) or len(y) != len(w):
        return math.inf if column != "float" else table.call
    groups = node.attributes.get_int("group", 1)
    window = math.prod(w[2:])
    pixels, inputs, outputs = y[0] * math.prod(y[2:]), w[1], w[0] // groups
    work = pixels * window * inputs * outputs * groups
    line = "line-" if len(w) == 3 else ""
    if groups > 1 and inputs == 1:
        odd = _ODD[line + column] if groups * outputs % _BLOCK else 1.0
        return odd * table.grid_cost(f"{line}depthwise", (pixels, groups * outputs, window), work, column)
    if groups > 1:
        return table.grid_cost("grouped", (pixels, groups, inputs), work, column)
    if line:
        return table.grid_cost("line-pointwise" if window == 1 else "line", (pixels, inputs, outputs), work, column)
    if inputs <= _FEW:
        return table.grid_cost("first", (pixels, window * inputs, outputs), work, column)
    name = "pointwise" if window == 1 else "window"
    if column == "float":  # computed in blocks of channels
        inputs, outputs = (-(-channels // _BLOCK) * _BLOCK for channels in (inputs, outputs))
        work = pixels * window * inputs * outputs
    return table.grid_cost(name, (pixels, inputs, outputs), work, column)


def _conv_transpose(table: Table, node: ir.Node, shapes: Shapes, column: str) -> float:
    """By pixels of the input."""
    x, w = (_dims(value, shapes) for value in node.inputs[:2])
    if column != "float" or len(w) < 3 or len(x) != len(w):
        return table.call if column == "float" else math.inf
    pixels = x[0] * math.prod(x[2:])
    return table.grid_cost("transposed", (pixels, w[0], w[1]), pixels * math.prod(w), column)


def _matmul(table: Table, node: ir.Node, shapes: Shapes, column: str) -> float:
    """By rows, columns and what is summed over; a product of two activations, where each has a batch, apart."""
    a, b, y = (_dims(value, shapes) for value in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if not a or not b:
        return table.call
    outputs = y[-1] if len(b) > 1 and y else 1
    inputs = a[0] if node.attributes.get_int("transA", 0) and len(a) == 2 else a[-1]
    rows = max(math.prod(y) // outputs, 1)
    work = rows * inputs * outputs
    if node.op_type == "MatMul" and not _is_constant(node.inputs[1]) and column in ("float", "integer"):
        return table.grid_cost("activations", (a[-2] if len(a) > 1 else 1, inputs, outputs), work, column)
    return table.grid_cost("matmul", (rows, inputs, outputs), work, column)


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a weight, quantized or not."""
    source = None if value is None else value.producer()
    if source is not None and source.op_type == "DequantizeLinear":
        return _is_constant(source.inputs[0])
    return is_constant(value)


def _lstm(table: Table, node: ir.Node, shapes: Shapes, column: str) -> float:
    """By batch, input size, hidden size; the work is that of all steps and directions."""
    x, w, r = (_dims(value, shapes) for value in node.inputs[:3])
    if len(x) != 3 or len(w) != 3 or len(r) != 3:
        return math.inf if column != "float" else table.call
    steps, batch = (x[1], x[0]) if node.attributes.get_int("layout", 0) else (x[0], x[1])
    work = steps * batch * w[0] * w[1] * (w[2] + r[2])
    return table.grid_cost("lstm", (batch, w[2], r[2]), work, column)


_LAYERS = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "Gemm": _matmul,
    "LSTM": _lstm,
    "GRU": _lstm,
    "RNN": _lstm,
}


def _elements(node: ir.Node, shapes: Shapes) -> int:
    """Of the greatest of what it reads and writes."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return max((math.prod(_dims(value, shapes)) for value in values), default=1)


def _interpolated(axes: Sequence[Sequence[float]], rates: Sequence[float], sizes: Sequence[float]) -> float:
    """Multilinear in the logarithms of sizes and rates; ``rates`` is flat, the last axis running fastest."""
    corners: list[tuple[int, float]] = [(0, 1.0)]
    for axis, size in zip(axes, sizes, strict=True):
        place, share = _between(axis, size)
        corners = [
            (index * len(axis) + place + step, weight * part)
            for index, weight in corners
            for step, part in ((0, 1 - share), (1, share))
            if part > 0
        ]
    return math.exp(sum(weight * math.log(rates[index]) for index, weight in corners))


def _between(axis: Sequence[float], size: float) -> tuple[int, float]:
    """The index of the point below ``size``, and how far it is to the next in log space; at the edge beyond it."""
    size = min(max(size, axis[0]), axis[-1])
    place = max(index for index, point in enumerate(axis) if point <= size)
    if place == len(axis) - 1:
        return place, 0.0
    return place, math.log(size / axis[place]) / math.log(axis[place + 1] / axis[place])


def _dims(value: ir.Value | None, shapes: Shapes) -> tuple[int, ...]:
    if value is None:
        return ()
    found: Sequence[Any] | None = None
    if callable(shapes):
        found = shapes(value)
    elif shapes is not None:
        found = shapes.get(value.name or "")
    if found is None:
        found = tuple(value.shape) if value.shape is not None else ()
    return tuple(size if isinstance(size, int) and size > 0 else 1 for size in found)
