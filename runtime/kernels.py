"""Which kernels a model runs in: read from the graph that ONNX Runtime itself makes of it.

found = kernels(model)
found.summary()     # "12 of 14 layers in integer kernels"
found.floating[0]   # Floating(address="/head/conv", operator="Conv", reason="its output has no scale: ...")
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from ..ir.address import addresses, graphs
from ..ir.kernels import obstacle
from ..ir.ops import operator
from ..ir.shapes import infer_shapes
from .session import optimized

_MARK = re.compile(r"@(\d+)@")
_UNEXPLAINED = "ONNX Runtime did not merge it with its QuantizeLinear and DequantizeLinear"
_TO_INTEGER = ("QuantizeLinear", "DynamicQuantizeLinear")
_FROM_INTEGER = ("DequantizeLinear", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")
_INTEGER = re.compile(
    r"QLinear|QGemm|QAttention|QMoE|QEmbedLayerNormalization|MatMulInteger|ConvInteger|MatMulNBits"
    r"|DynamicQuantize(?!Linear)|GatherBlockQuantized|QOrdered"
)


class Floating(NamedTuple):
    """A node that computes in float: its address and operator in the model, and why, as a clause."""

    address: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Kernels:
    """What runs in integer kernels and what does not.

    ``integer`` and ``quantizers`` (what is left of QuantizeLinear and DequantizeLinear, and DynamicQuantizeLinear)
    count operators of the optimized graph, movements of integers among them. ``floating`` are the layers of the model
    (Conv, MatMul, Gemm, LSTM ...) that compute in float, ``others`` the other operators that have an integer kernel.
    ``layers`` counts the layers in both; those that ONNX Runtime computes ahead are not among them.
    """

    integer: Counter[str]
    quantizers: Counter[str]
    floating: list[Floating]
    others: list[Floating]
    layers: int

    @property
    def fused(self) -> int:
        """How many layers run in integer kernels."""
        return self.layers - len(self.floating)

    def summary(self) -> str:
        """For a report: ``12 of 14 layers in integer kernels``."""
        return f"{self.fused} of {self.layers} layers in integer kernels"


def kernels(model: ir.Model) -> Kernels:
    """The kernels of ``model`` at level all. Raises ``DoesNotRun`` for a model that does not run, or of over 1.5 GiB.

    Nodes are found again by their names, which ONNX Runtime keeps when it merges them.
    """
    named = addresses(model)
    marked = model.clone()
    infer_shapes(marked)  # types and ranks tell why
    pairs = list(zip(_nodes(model), _nodes(marked), strict=True))
    for number, (_, node) in enumerate(pairs):
        node.name = f"@{number}@"
    became: dict[int, bool] = {}
    integer, quantizers = Counter[str](), Counter[str]()
    for node, is_integer in _judged(optimized(marked)):
        if is_integer:
            integer[node.op_type] += 1
        elif node.op_type in (*_TO_INTEGER, "DequantizeLinear"):
            quantizers[node.op_type] += 1
        for mark in map(int, _MARK.findall(node.name or "")):
            became[mark] = became.get(mark, False) or is_integer
    floating: list[Floating] = []
    others: list[Floating] = []
    layers = 0
    for number in sorted(became):
        original, node = pairs[number]
        is_layer = bool(operator(node).matrices)
        layers += is_layer
        if not became[number] and (is_layer or (operator(node).integer and _gives_floats(node))):
            found = Floating(named[original], node.op_type, obstacle(node) or _UNEXPLAINED)
            (floating if is_layer else others).append(found)
    return Kernels(integer, quantizers, floating, others, layers)


def _gives_floats(node: ir.Node) -> bool:
    """Whether it may: shapes are computed with the same operators."""
    dtype = node.outputs[0].dtype
    return dtype is None or dtype.is_floating_point()


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for _, graph in graphs(model) for node in graph]


def _judged(model: ir.Model) -> Iterator[tuple[ir.Node, bool]]:
    """Each node of an optimized model, and whether it computes on integers, or moves 8-bit ones."""
    narrow: set[ir.Value] = set()
    for _, graph in graphs(model):
        narrow |= {value for value in graph.inputs if value.dtype in (ir.DataType.UINT8, ir.DataType.INT8)}
        for node in graph:
            computes = _INTEGER.match(node.op_type) is not None
            first = node.inputs[0] if node.inputs else None
            carries = first in narrow and node.op_type not in (*_TO_INTEGER, *_FROM_INTEGER, "Cast", "Shape")
            yield node, computes or carries
            if node.op_type in _TO_INTEGER or (carries and not _is_unscaled(node)):
                narrow.add(node.outputs[0])
                narrow.update(node.outputs if carries else ())


def _is_unscaled(node: ir.Node) -> bool:
    """A QGemm without a scale for its output, which gives floats."""
    return node.op_type == "QGemm" and len(node.inputs) < 8
