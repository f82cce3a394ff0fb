"""Which channels of which values depend on each other: the view that structured pruning walks.

After the groups of DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023), but between values,
not modules: a tie holds between two axes, and says by start and repeat which channels meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import onnx_ir as ir

from .address import graphs
from .constants import constant_ints, constant_tensor
from .ops import operator

if TYPE_CHECKING:
    import networkx as nx

Vertex = tuple[ir.Value, int]
Dim = int | str | None


@dataclass(frozen=True, slots=True)
class Tie:
    """Channel ``c`` of ``narrow`` is channels ``start + c·repeat`` to ``start + (c + 1)·repeat - 1`` of ``wide``.

    Most ties are plain: start 0, repeat 1, equal counts. ``node`` is the operator that ties.
    """

    node: ir.Node
    narrow: Vertex
    wide: Vertex
    start: int = 0
    repeat: int = 1


def channels(where: ir.Model | ir.Graph) -> nx.Graph[Vertex]:
    """The channel dependencies of a model, or of one graph and its bodies.

    A vertex is a value and one of its axes, from 0. An edge holds ``ties``, a list of ``Tie``: whoever removes channels
    at one end removes those that the ties name at the other. A weight's output-channel axis is tied to its layer's
    output, its input-channel axis to the layer's input. A connected component is a group; through Concat and Split it
    holds channels that do not depend on each other, which the ties tell apart.

    A vertex with the attribute ``closed`` (the reason, a few words) must keep its count: an input or output of a graph,
    or an axis that its operator mixes, picks from or is not understood to carry; it closes its group. Shapes must be
    inferred first. A Reshape's shape, a Split's sizes and the ``group`` of a depthwise Conv may hold the count as a
    constant; whoever changes the count changes them.
    """
    found = [graph for _, graph in graphs(where)] if isinstance(where, ir.Model) else [where, *where.subgraphs()]
    ties = _Ties()
    for graph in found:
        for word, values in (("graph input", graph.inputs), ("graph output", graph.outputs)):
            for value in values:
                ties.shut(value, word)
    for graph in found:
        for node in graph:
            ties.carry(node)
    return ties.finished()


class _Ties:
    """Gathers ties one node at a time; each axis that the node's rule does not tie is closed."""

    def __init__(self) -> None:
        import networkx as nx

        self.view: nx.Graph[Vertex] = nx.Graph()
        self.closed: dict[ir.Value, str] = {}  # whole values, whatever their rank
        self.node: ir.Node | None = None
        self.tied: set[Vertex] = set()
        self.doubtful: set[Vertex] = set()

    def carry(self, node: ir.Node) -> None:
        self.node, self.tied, self.doubtful = node, set(), set()
        values = [value for value in dict.fromkeys((*node.inputs, *node.outputs)) if value is not None and value.name]
        blind = [value for value in values if _known(value) is None]
        for value in blind:
            self.shut(value, f"{node.op_type}, rank unknown")
        rule = _elementwise if operator(node).elementwise else _RULES.get((node.domain, node.op_type))
        if rule is not None and not blind:
            rule(self, node)
        reason = f"axis of {node.op_type}" if rule else node.op_type
        for value in values:
            for axis in range(len(_dims(value))):
                if (value, axis) not in self.tied or (value, axis) in self.doubtful:
                    self.view.add_node((value, axis))
                    self.view.nodes[value, axis].setdefault("closed", reason)

    def tie(self, narrow: Vertex, wide: Vertex, start: int = 0, repeat: int = 1) -> None:
        assert self.node is not None
        self.tied.update((narrow, wide))
        if not self.view.has_edge(narrow, wide):
            self.view.add_edge(narrow, wide, ties=[])
        self.view.edges[narrow, wide]["ties"].append(Tie(self.node, narrow, wide, start, repeat))

    def same(self, x: ir.Value, y: ir.Value, axes: Iterable[int] | None = None) -> None:
        for axis in range(len(_dims(x))) if axes is None else axes:
            self.tie((x, axis), (y, axis))

    def broadcast(self, x: ir.Value | None, y: ir.Value, but: int = 0) -> None:
        """Axes align from the right, the last ``but`` left out. One of size 1 is stretched and tied to nothing.

        Where it is not known whether it is stretched, the axis of ``y`` is closed too.
        """
        dims, out = _dims(x), _dims(y)
        for axis, dim in enumerate(dims[: len(dims) - but]):
            place = len(out) - len(dims) + axis
            if x is not None and dim is not None and dim == out[place]:
                self.tie((x, axis), (y, place))
            elif dim != 1:
                self.doubtful.add((y, place))

    def free(self, value: ir.Value) -> None:
        """The node leaves all axes of ``value`` as they are."""
        self.tied.update((value, axis) for axis in range(len(_dims(value))))

    def shut(self, value: ir.Value, reason: str) -> None:
        self.closed.setdefault(value, reason)

    def finished(self) -> nx.Graph[Vertex]:
        for value in self.closed:
            self.view.add_nodes_from((value, axis) for axis in range(len(_dims(value))))
        for value, axis in self.view:
            if value in self.closed:
                self.view.nodes[value, axis]["closed"] = self.closed[value]
        return self.view


# Rules ----------------------------------------------------------------------------------------------------------------
# Each may take every rank as known, and ties what it understands.


def _elementwise(ties: _Ties, node: ir.Node) -> None:
    inputs = node.inputs[:1] if operator(node).elementwise == "unary" else node.inputs
    for output in node.outputs:
        for value in inputs:
            ties.broadcast(value, output)


def _conv(ties: _Ties, node: ir.Node) -> None:
    """A depthwise convolution (W [M, 1, ...], C groups) ties each of its C input channels to M/C output channels."""
    x, w, bias, y = node.inputs[0], node.inputs[1], _operand(node, 2), node.outputs[0]
    axes, size = operator(node).port(1).axes(node, len(_dims(w))), _dims(w)[0]
    depthwise = node.op_type == "Conv" and _dims(x)[1] == axes.groups and isinstance(size, int)
    if x is None or w is None or axes.output is None or axes.input is None or (axes.groups > 1 and not depthwise):
        return
    if axes.groups > 1 and isinstance(size, int):
        ties.tie((x, 1), (w, 0), repeat=size // axes.groups)
    else:
        ties.tie((x, 1), (w, axes.input))
    ties.tie((w, axes.output), (y, 1))
    ties.tie((x, 0), (y, 0))
    if bias is not None:
        ties.tie((bias, 0), (y, 1))


def _gemm(ties: _Ties, node: ir.Node) -> None:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if a is not None and b is not None:
        turned_a, turned_b = _int(node, "transA", 0), _int(node, "transB", 0)
        ties.tie((a, turned_a), (y, 0))
        ties.tie((a, 1 - turned_a), (b, turned_b))
        ties.tie((b, 1 - turned_b), (y, 1))
        ties.broadcast(_operand(node, 2), y)


def _matmul(ties: _Ties, node: ir.Node) -> None:
    """[..., M, K] x [..., K, N]; the leading axes broadcast. Products with a vector close."""
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    rows, columns, out = len(_dims(a)), len(_dims(b)), len(_dims(y))
    if a is not None and b is not None and rows > 1 and columns > 1:
        ties.tie((a, rows - 2), (y, out - 2))
        ties.tie((a, rows - 1), (b, columns - 2))
        ties.tie((b, columns - 1), (y, out - 1))
        ties.broadcast(a, y, but=2)
        ties.broadcast(b, y, but=2)


def _batch_norm(ties: _Ties, node: ir.Node) -> None:
    """Also InstanceNormalization: parameters [C] for axis 1."""
    x, *parameters = node.inputs
    if x is not None:
        ties.same(x, node.outputs[0])
        for value in parameters:
            if value is not None:
                ties.tie((value, 0), (node.outputs[0], 1))


def _layer_norm(ties: _Ties, node: ir.Node) -> None:
    x, *parameters = node.inputs
    if x is not None:
        ties.same(x, node.outputs[0])
        for value in parameters:
            ties.broadcast(value, node.outputs[0])


def _pool(ties: _Ties, node: ir.Node) -> None:
    """Batch and channels stay; the positions of maxima count across channels."""
    if node.inputs[0] is not None and len(node.outputs) == 1:
        ties.same(node.inputs[0], node.outputs[0], (0, 1))


def _softmax(ties: _Ties, node: ir.Node) -> None:
    """The axes before the one it sums along; before opset 13 it sums over the later ones too, and begins at 1."""
    if node.inputs[0] is not None and (rank := len(_dims(node.inputs[0]))):
        ties.same(node.inputs[0], node.outputs[0], range(_int(node, "axis", 1) % rank))


def _reduce(ties: _Ties, node: ir.Node) -> None:
    x, y, rank = node.inputs[0], node.outputs[0], len(_dims(node.inputs[0]))
    listed = node.attributes.get_ints("axes", ()) if "axes" in node.attributes else constant_ints(_operand(node, 1))
    if x is None or not listed:
        return
    reduced = {axis % rank for axis in listed}
    place = 0
    for axis in range(rank):
        if axis not in reduced:
            ties.tie((x, axis), (y, place))
        place += axis not in reduced or bool(_int(node, "keepdims", 1))


def _transpose(ties: _Ties, node: ir.Node) -> None:
    x = node.inputs[0]
    if x is not None:
        order = node.attributes.get_ints("perm", None) or reversed(range(len(_dims(x))))
        for place, axis in enumerate(order):
            ties.tie((x, axis), (node.outputs[0], place))


def _concat(ties: _Ties, node: ir.Node) -> None:
    _pieces(ties, node.inputs, node.outputs[0], _int(node, "axis", 1))


def _split(ties: _Ties, node: ir.Node) -> None:
    _pieces(ties, node.outputs, node.inputs[0], _int(node, "axis", 0))


def _pieces(ties: _Ties, parts: Sequence[ir.Value | None], whole: ir.Value | None, axis: int) -> None:
    """The parts lie one after the other along ``axis`` of the whole; their sizes there must be known."""
    rank, start = len(_dims(whole)), 0
    sizes = [_dims(part)[axis] for part in parts]
    if whole is None:
        return
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            ties.same(part, whole, (place for place in range(rank) if place != axis % rank))
            if all(isinstance(other, int) for other in sizes):
                ties.tie((part, axis % rank), (whole, axis % rank), start=start)
        start += size if isinstance(size, int) else 0


def _gather(ties: _Ties, node: ir.Node) -> None:
    """All axes of the data but the one that is picked from."""
    x, added = node.inputs[0], len(_dims(node.inputs[1])) - 1
    if x is not None:
        axis = _int(node, "axis", 0) % len(_dims(x))
        for place in range(len(_dims(x))):
            if place != axis:
                ties.tie((x, place), (node.outputs[0], place if place < axis else place + added))


def _slice(ties: _Ties, node: ir.Node) -> None:
    """All axes but those that are cut; which they are must be constant."""
    x, starts, axes = node.inputs[0], constant_ints(_operand(node, 1)), constant_ints(_operand(node, 3))
    if x is not None and starts is not None and (axes is not None or _operand(node, 3) is None):
        rank = len(_dims(x))
        cut = {axis % rank for axis in (range(len(starts)) if axes is None else axes)}
        ties.same(x, node.outputs[0], (axis for axis in range(rank) if axis not in cut))


def _quantize(ties: _Ties, node: ir.Node) -> None:
    """Also DequantizeLinear. Scale and zero point are for the whole, or [C] along ``axis``; blocks close."""
    x, *parameters = node.inputs
    if x is not None and not _int(node, "block_size", 0):
        ties.same(x, node.outputs[0])
        for value in parameters:
            if value is not None and len(_dims(value)) == 1 and _dims(value) != (1,):
                ties.tie((value, 0), (node.outputs[0], _int(node, "axis", 1) % len(_dims(x))))


def _reshape(ties: _Ties, node: ir.Node) -> None:
    """Also Flatten, Squeeze, Unsqueeze: where an axis stays, or is the slowest of those merged into one or split."""
    x, y = node.inputs[0], node.outputs[0]
    if x is not None:
        for left, right, merged, split in _regrouped(_dims(x), _dims(y)):
            if split == 1:
                ties.tie((x, left), (y, right), repeat=merged)
            else:
                ties.tie((y, right), (x, left), repeat=split)


def _read_only(ties: _Ties, node: ir.Node) -> None:
    """Constant has no input to tie; Shape and Size read what there is when they run."""
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            ties.free(value)


_RULES: dict[tuple[str, str], Callable[[_Ties, ir.Node], None]] = {
    ("", name): rule
    for names, rule in (
        ("Conv ConvTranspose", _conv),
        ("Gemm", _gemm),
        ("MatMul", _matmul),
        ("BatchNormalization InstanceNormalization", _batch_norm),
        ("LayerNormalization RMSNormalization", _layer_norm),
        ("MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool GlobalLpPool", _pool),
        ("Softmax LogSoftmax", _softmax),
        ("ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceProd ReduceSumSquare", _reduce),
        ("ReduceLogSum ReduceLogSumExp", _reduce),
        ("Transpose", _transpose),
        ("Concat", _concat),
        ("Split", _split),
        ("Gather", _gather),
        ("Slice", _slice),
        ("QuantizeLinear DequantizeLinear", _quantize),
        ("Reshape Flatten Squeeze Unsqueeze", _reshape),
        ("Constant Shape Size", _read_only),
    )
    for name in names.split()
}


# Shapes ----------------------------------------------------------------------------------------------------------


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes.get_int(name, default)


def _dims(value: ir.Value | None) -> Sequence[Dim]:
    """Sizes, names of symbolic dimensions, None for unknown ones; empty where there is no value or no known rank."""
    return _known(value) or ()


def _known(value: ir.Value | None) -> Sequence[Dim] | None:
    shape = None if value is None else value.shape
    if shape is not None:
        return tuple(dim if isinstance(dim, int) else dim.value for dim in shape)
    tensor = constant_tensor(value)
    return None if tensor is None else tuple(int(dim) for dim in tensor.shape.numpy())


def _regrouped(before: Sequence[Dim], after: Sequence[Dim]) -> Iterator[tuple[int, int, int, int]]:
    """Axes that meet in a reshape: axis before, axis after, channels after for one before, and before for one after.

    A dimension of unknown size splits the shapes: where there is one on each side, it is the same if all that surrounds
    it agrees; of several, the names must agree.
    """
    open_before = [axis for axis, dim in enumerate(before) if not isinstance(dim, int)]
    open_after = [axis for axis, dim in enumerate(after) if not isinstance(dim, int)]
    names = [before[axis] for axis in open_before]
    if len(open_before) != len(open_after) or 0 in before or 0 in after:
        return
    if len(names) > 1 and (None in names or names != [after[axis] for axis in open_after]):
        return
    edges = zip([-1, *open_before], [*open_before, len(before)], strict=True)
    others = zip([-1, *open_after], [*open_after, len(after)], strict=True)
    segments = [
        (range(low + 1, high), range(start + 1, end)) for (low, high), (start, end) in zip(edges, others, strict=True)
    ]
    if any(_size(before, left) != _size(after, right) for left, right in segments):
        return
    for left, right in zip(open_before, open_after, strict=True):
        yield left, right, 1, 1
    for inner, outer in segments:
        yield from _blocks(before, after, inner, outer)


def _blocks(
    before: Sequence[Dim], after: Sequence[Dim], left: Sequence[int], right: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """The smallest runs of axes of equal product on both sides; only those with one axis on one side are plain."""
    left = [axis for axis in left if before[axis] != 1]
    right = [axis for axis in right if after[axis] != 1]
    while left and right:
        i = j = 1
        while (here := _size(before, left[:i])) != (there := _size(after, right[:j])):
            i, j = (i + 1, j) if here < there else (i, j + 1)
        if j == 1:
            yield left[0], right[0], here // _size(before, left[:1]), 1
        elif i == 1:
            yield left[0], right[0], 1, here // _size(after, right[:1])
        left, right = left[i:], right[j:]


def _size(dims: Sequence[Dim], axes: Sequence[int]) -> int:
    return prod(dim for axis in axes if isinstance(dim := dims[axis], int))
