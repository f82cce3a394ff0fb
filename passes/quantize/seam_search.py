"""Finding the seams of a model: from each layer on through all that lets factors pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses, graphs
from ...ir.channels import Tie, channels
from ...ir.constants import constant_array, is_constant
from ...ir.ops import operator
from ...ir.shapes import infer_shapes, outputs
from ...ir.sparse import SparseTensor
from ...ir.weights import Weight, weights
from .seams import NORMS, Array, Part, Seam, Vertex

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_FIRST = frozenset(
    "Relu LeakyRelu PRelu Identity Dropout Abs Neg MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool "  # noqa: SIM905
    "GlobalLpPool ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 Transpose Split Gather Slice Reshape "
    "Flatten Squeeze Unsqueeze".split()
)
"""Positively homogeneous in the first input, channel by channel."""
_ALL = {"Add", "Sub", "Max", "Min", "Sum", "Mean", "Concat"}
"""Positively homogeneous in all inputs together."""
_WIDE = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BFLOAT16}
"""Types with room for factors: float16 overflows at 65,504."""


def seams(model: ir.Model) -> list[Seam]:
    """Every seam of ``model`` that a layer reads, in the order of those layers.

    Conv (plain or depthwise), ConvTranspose, Gemm and MatMul with a constant weight are layers. Scaling one seam
    changes the weights of another, but neither its values nor its edges.
    """
    with _known_shapes(model):
        finder = _Finder(model)
        found, taken = list[Seam](), set[Vertex]()
        for _, graph in graphs(model):
            for node in graph:
                for start in finder.read_by(node):
                    if start not in taken:
                        found.append(_Growth(finder, start).finished())
                        taken.update(found[-1].vertices)
        return found


@contextlib.contextmanager
def _known_shapes(model: ir.Model) -> Iterator[None]:
    """Shapes are inferred, and are afterwards as the file has them: whoever only looks changes nothing."""
    before = [(value, value.type, value.shape) for _, graph in graphs(model) for value in outputs(graph)]
    try:
        infer_shapes(model)
        yield
    finally:
        for value, kind, shape in before:
            value.type, value.shape = kind, shape


class _Finder:
    """Grows seams from the layers that read them; the model must not change but in the numbers of its weights."""

    def __init__(self, model: ir.Model) -> None:
        self.view = channels(model)
        self.addresses = addresses(model)
        self.constants: dict[ir.Value, Weight] = {value: weight for weight in weights(model) for value in weight.values}

    def read_by(self, node: ir.Node) -> Iterator[Vertex]:
        """The values, with axes, that the layer ``node`` contracts with constants."""
        if not _is_layer(node):
            return
        for value in dict.fromkeys(node.inputs[:2]):
            if value is None or is_constant(value):
                continue
            for axis in range(len(value.shape or ())):
                if self.weight_ties((value, axis), node, made=False):
                    yield value, axis

    def tied(self, vertex: Vertex, node: ir.Node, value: ir.Value | None) -> list[tuple[Vertex, Tie]]:
        """What ``node`` ties to ``vertex`` among the axes of ``value``."""
        edges = self.view.adj[vertex].items() if vertex in self.view else ()
        return [(other, tie) for other, edge in edges if other[0] is value for tie in edge["ties"] if tie.node is node]

    def weight_ties(self, vertex: Vertex, node: ir.Node, made: bool) -> list[tuple[Vertex, Tie]]:
        """The tie of ``vertex``, which the layer ``node`` made or reads, to the channel axis of its weight."""
        for port in operator(node).matrices:
            value = node.inputs[port.index]
            if value is not None and is_constant(value) and value.shape is not None:
                axes = port.axes(node, len(value.shape))
                axis = axes.output if made or axes.groups > 1 else axes.input
                return [item for item in self.tied(vertex, node, value) if item[0][1] == axis]
        return []

    def constant(self, node: ir.Node, value: ir.Value) -> Weight | str:
        """The constant ``value`` if ``node`` alone reads it and may have it scaled, else why not."""
        weight = self.constants.get(value)
        if weight is None:
            return f"{node.op_type} takes a computed value where a constant would take the factors"
        name = f"a constant of {node.op_type}"
        if len(weight.uses) != 1 or weight.output or len(weight.values) != 1:
            return f"{name} has other uses"
        if weight.overridable:
            return f"the model's caller may pass another tensor for {name}"
        if weight.dtype not in _WIDE or isinstance(weight.tensor, SparseTensor):
            return f"{name} is not stored as floats with room for factors"
        return weight


class _Growth:
    """One seam on its way: vertices that wait, ties that join them, and what is at the edges."""

    def __init__(self, finder: _Finder, start: Vertex) -> None:
        self.finder = finder
        self.start = start
        self.waiting = [start]
        self.sizes: dict[Vertex, int] = {}
        self.joins: list[Tie] = []
        self.parts: list[tuple[Vertex, Tie, ir.Node, Weight, int, int, bool]] = []
        self.pins: dict[Vertex, str] = {}

    def finished(self) -> Seam:
        while self.waiting:
            vertex = self.waiting.pop()
            if vertex not in self.sizes:
                self.visit(vertex)
        labels = self.labels()
        ranks = {vertex: len(vertex[0].shape or ()) for vertex in labels}
        seam = Seam(self.finder.addresses[self.start[0]], labels, ranks, pins=self.pins)
        seam.free = np.ones(1 + max(int(ids.max(initial=-1)) for ids in labels.values()), bool)
        for vertex in self.pins:
            seam.free[labels[vertex]] = False
        for vertex, tie, node, weight, axis, power, layer in self.parts:
            seam.parts.append(Part(node, weight, axis, power, layer, np.repeat(labels[vertex], tie.repeat)))
        if seam.free.any() and (reason := seam.hold_extremes()):
            self.pin(self.start, reason)
        return seam

    def labels(self) -> dict[Vertex, Array]:
        """The seam's channel of each index of each vertex: ties say which indices are one channel."""
        starts = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()]).tolist(), strict=False))
        left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for tie in dict.fromkeys(self.joins):
            count = self.sizes[tie.narrow]
            if not 0 < tie.start + count * tie.repeat <= self.sizes[tie.wide]:
                self.pin(tie.narrow, "how many channels it has is not known")
                self.pin(tie.wide, "how many channels it has is not known")
                continue
            left.append(starts[tie.narrow] + np.repeat(np.arange(count), tie.repeat))
            right.append(starts[tie.wide] + tie.start + np.arange(count * tie.repeat))
        label = _joined(sum(self.sizes.values()), np.concatenate(left), np.concatenate(right))
        return {vertex: label[starts[vertex] : starts[vertex] + size] for vertex, size in self.sizes.items()}

    def visit(self, vertex: Vertex) -> None:
        """Take ``vertex`` in, and ask each node that makes or reads it what becomes of factors there."""
        value, axis = vertex
        size = None if value.shape is None else value.shape[axis]
        self.sizes[vertex] = size if isinstance(size, int) else 0
        closed = self.finder.view.nodes[vertex].get("closed")
        producer = value.producer()
        if producer is None:
            self.pin(vertex, "it is an input of a graph")
        elif value.is_graph_output():
            self.pin(vertex, "it is an output of a graph")
        elif closed:
            self.pin(vertex, f"{str(closed).removeprefix('axis of ')} takes no factors")
        if not isinstance(size, int):
            self.pin(vertex, "how many channels it has is not known")
            return
        for node in dict.fromkeys((producer, *value.consumers())):
            if node is not None and (vertex not in self.pins or _is_layer(node)):
                self.meet(vertex, node)

    def pin(self, vertex: Vertex, reason: str) -> None:
        self.pins.setdefault(vertex, reason)

    def meet(self, vertex: Vertex, node: ir.Node) -> None:
        """What becomes of factors on ``vertex`` at ``node``."""
        made = vertex[0] in node.outputs
        if _is_layer(node):
            self.meet_layer(vertex, node, made)
        elif node.domain == "" and node.op_type in NORMS and made:
            self.meet_norm(vertex, node)
        elif node.domain == "" and node.op_type in ("Mul", "Div"):
            self.meet_product(vertex, node, made)
        elif (carried := _carried(node)) is not None:
            self.carry(vertex, node, carried)
        elif node.op_type == "Clip":
            self.pin(vertex, "Clip has a bound that would have to scale too")
        else:
            self.pin(vertex, f"{node.op_type} {'makes it and' if made else 'reads it and'} takes no factors")

    def meet_layer(self, vertex: Vertex, node: ir.Node, made: bool) -> None:
        ties = self.finder.weight_ties(vertex, node, made)
        self.take(vertex, node, ties, -1 if made else 1, layer=True)
        bias = node.inputs[2] if made and len(node.inputs) > 2 else None
        if bias is not None:
            self.shift(vertex, node, bias)

    def meet_norm(self, vertex: Vertex, node: ir.Node) -> None:
        parameters = node.inputs[1:3]  # what it scales and shifts by in the end
        if vertex[0] is not node.outputs[0] or not parameters:
            self.pin(vertex, f"{node.op_type} has no scale for it")
            return
        for value in parameters:
            if value is not None:
                self.take(vertex, node, self.finder.tied(vertex, node, value), -1)

    def meet_product(self, vertex: Vertex, node: ir.Node, made: bool) -> None:
        """A constant for each channel takes the factors; any other constant lets them through."""
        place = next((place for place, value in enumerate(node.inputs) if is_constant(value)), -1)
        factor = node.inputs[place]
        if place < 0 or factor is None or (node.op_type == "Div" and place == 0):
            self.pin(vertex, f"{node.op_type} of computed values takes no factors")
            return
        outputs = [vertex] if made else [other for other, _ in self.finder.tied(vertex, node, node.outputs[0])]
        ties = [item for output in outputs for item in self.finder.tied(output, node, factor)]
        if ties and not isinstance(self.finder.constant(node, factor), str):
            self.take(vertex, node, ties, (-1 if made else 1) * (-1 if node.op_type == "Div" else 1))
        else:
            self.carry(vertex, node, [1 - place])

    def take(
        self, vertex: Vertex, node: ir.Node, ties: list[tuple[Vertex, Tie]], power: int, layer: bool = False
    ) -> None:
        """Let the constant that ``node`` ties to ``vertex`` take the factors, or pin the vertex."""
        if len(ties) != 1:
            self.pin(vertex, f"{node.op_type} has no constant for each channel of it")
            return
        (value, axis), tie = ties[0]
        weight = self.finder.constant(node, value)
        if isinstance(weight, str):
            self.pin(vertex, weight)
        elif tie.start or (tie.repeat > 1 and tie.wide != (value, axis)):
            self.pin(vertex, f"its channels and those of {node.op_type} do not meet one to one")
        else:
            self.parts.append((vertex, tie, node, weight, axis, power, layer))

    def shift(self, vertex: Vertex, node: ir.Node, constant: ir.Value) -> None:
        """A constant is added to ``vertex`` at ``node``: it is divided as the rest is, unless it is 0."""
        array = constant_array(constant)
        if array is None or np.any(array != 0):
            self.take(vertex, node, self.finder.tied(vertex, node, constant), -1)

    def carry(self, vertex: Vertex, node: ir.Node, places: list[int]) -> None:
        """Factors go through ``node``: its outputs and the inputs at ``places`` join, constants there are divided."""
        inputs = [value for place in places if (value := node.inputs[place]) is not None]
        outputs = list(node.outputs) if node.op_type == "Split" else [node.outputs[0]]
        if vertex[0] in outputs:
            for value in dict.fromkeys(inputs):
                ties = self.finder.tied(vertex, node, value)
                if is_constant(value):
                    self.shift(vertex, node, value)
                elif ties:
                    self.join(ties)
                else:
                    self.pin(vertex, f"{node.op_type} stretches an operand over its channels")
        elif vertex[0] in inputs:
            ties = [item for output in outputs for item in self.finder.tied(vertex, node, output)]
            self.join(ties)
            if not ties:
                self.pin(vertex, f"{node.op_type} takes no factors")
        else:
            self.pin(vertex, f"{node.op_type} has other business with it, and takes no factors")

    def join(self, ties: list[tuple[Vertex, Tie]]) -> None:
        self.joins += [tie for _, tie in ties]
        self.waiting += [other for other, _ in ties]


def _joined(size: int, left: Array, right: Array) -> Array:
    """Numbers from 0 for the classes of range(``size``) where each of ``left`` is one with its place in ``right``."""
    label = np.arange(size)
    while True:
        before, low = label, np.minimum(label[left], label[right])
        label = label.copy()
        np.minimum.at(label, left, low)
        np.minimum.at(label, right, low)
        label = label[label]
        if np.array_equal(label, before):
            return np.asarray(np.unique(label, return_inverse=True)[1])


def _is_layer(node: ir.Node) -> bool:
    return not node.domain and node.op_type in _LAYERS


def _carried(node: ir.Node) -> list[int] | None:
    """The inputs of ``node`` that scale with its output; None for an operator that lets no factors through."""
    if node.domain:
        return None
    if node.op_type in _FIRST:
        return [0]
    if node.op_type in _ALL:
        return list(range(len(node.inputs)))
    if node.op_type == "Where":
        return [1, 2]
    if node.op_type == "Clip" and _is_relu(node):
        return [0]
    return None


def _is_relu(node: ir.Node) -> bool:
    """Whether a Clip has no bound but 0."""
    if "min" in node.attributes or "max" in node.attributes:  # before opset 11
        bounds = [node.attributes.get_float("min", -np.inf), node.attributes.get_float("max", np.inf)]
        return all(bound == 0 or abs(bound) > 1e38 for bound in bounds)
    return all(
        value is None or ((bound := constant_array(value)) is not None and not np.any(bound))
        for value in node.inputs[1:3]
    )
