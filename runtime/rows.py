"""Whether samples that run together are as they are alone: told from the operators, where these are of the usual kinds.

Followed are the values whose first axis counts samples, with the rank of each. What is not known to keep samples apart
ends it, so a model of other operators is not said to mix them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from ..ir.constants import constant_ints, constant_tensor, is_constant
from ..ir.ops import is_random, operator
from ..ir.shapes import dims

Ranks = Mapping[ir.Value, int]

_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")


def rows_stay_apart(model: ir.Model, inputs: set[str]) -> bool:
    """Whether each output has one row, along axis 0, for each sample of the ``inputs``, made of that alone."""
    ranks: dict[ir.Value, int] = {}
    for value in model.graph.inputs:
        if value.name in inputs and value.shape is not None and len(value.shape):
            ranks[value] = len(value.shape)
    for node in model.graph:
        read = [value for value in node.inputs if value is not None]
        if not any(value in ranks for value in read) and all(map(is_constant, read)):
            continue  # a Constant, or what is computed from constants: nothing reads it but where its size is known
        made = None if is_random(node) else _rank(node, read, ranks)
        if made is None:
            return False
        ranks.update(dict.fromkeys(node.outputs, made))
    return all(value in ranks for value in model.graph.outputs)


def _rank(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    """Of what ``node`` makes with a row for each sample; ``None`` where that is not known."""
    if any(attribute.is_ref() for attribute in node.attributes.values()) or not read:
        return None
    if node.op_type == "CastLike":
        return ranks.get(read[0])  # of the other only the type counts
    if operator(node).elementwise:
        return _broadcast(read, ranks)
    rule = None if node.domain else _RULES.get(node.op_type)
    if rule is None or read[0] not in ranks or len(node.outputs) > 1:
        return None
    if node.op_type not in _SEVERAL and any(value in ranks or not is_constant(value) for value in read[1:]):
        return None
    return rule(node, read, ranks)


def _broadcast(read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    """Samples meet samples only where all that has them is of one rank, and nothing else has rows."""
    rank = max((ranks[value] for value in read if value in ranks), default=0)
    for value in read:
        if value in ranks:
            apart = ranks[value] == rank
        else:
            tensor = constant_tensor(value)
            sizes = (0,) * (rank + 1) if tensor is None else tuple(tensor.shape.numpy())
            apart = len(sizes) < rank or (len(sizes) == rank and sizes[0] == 1)
        if not apart:
            return None
    return rank


def _same(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    del node
    return ranks[read[0]]


def _along(default: int) -> Callable[[ir.Node, Sequence[ir.Value], Ranks], int | None]:
    """By an attribute ``axis``, which must not be that of the samples."""

    def rule(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
        rank = ranks[read[0]]
        return rank if node.attributes.get_int("axis", default) % rank else None

    return rule


def _concat(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    rank = ranks[read[0]]
    same = all(ranks.get(value) == rank for value in read)
    return rank if same and node.attributes.get_int("axis", 0) % rank else None


def _flatten(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    del read, ranks
    return 2 if node.attributes.get_int("axis", 1) == 1 else None


def _gemm(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    if node.attributes.get_int("transA", 0) or any(value in ranks for value in read[1:]):
        return None
    return 2 if len(read) < 3 or _broadcast([read[0], read[2]], ranks) else None


def _matmul(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    """With a matrix, or of two values that both have a batch in front."""
    del node
    rank, other = ranks[read[0]], ranks.get(read[1])
    if other is not None:
        return rank if rank == other > 2 else None
    tensor = constant_tensor(read[1])
    return rank if tensor is not None and len(tensor.shape) == 2 and rank > 1 else None


def _transpose(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    turned = node.attributes.get_ints("perm", ())
    return ranks[read[0]] if turned and turned[0] == 0 else None


def _reduce(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    rank = ranks[read[0]]
    axes = node.attributes.get_ints("axes", ()) or (constant_ints(read[1]) if len(read) > 1 else None)
    if not axes or any(axis % rank == 0 for axis in axes):
        return None
    kept = node.attributes.get_int("keepdims", 1)
    return rank if kept else rank - len({axis % rank for axis in axes})


def _reshape(node: ir.Node, read: Sequence[ir.Value], ranks: Ranks) -> int | None:
    """To a shape that begins with a 0, or with a -1 before what a sample has elements."""
    del ranks
    target = constant_ints(read[1]) if len(read) > 1 else None  # opset 1 had an attribute
    if not target:
        return None
    if target[0] == 0:
        return None if node.attributes.get_int("allowzero", 0) else len(target)
    sizes = [size for size in (dims(read[0]) or ())[1:] if isinstance(size, int)]
    whole = sizes and len(sizes) + 1 == len(dims(read[0]) or ()) and min(target[1:], default=0) > 0
    return len(target) if target[0] == -1 and whole and math.prod(sizes) == math.prod(target[1:]) else None


_SEVERAL = ("Concat", "MatMul")  # may read more than one value with samples
_RULES: Mapping[str, Callable[[ir.Node, Sequence[ir.Value], Ranks], int | None]] = {
    **dict.fromkeys((*_POOLS, "BatchNormalization", "Conv", "InstanceNormalization"), _same),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _along(-1)),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
    "LayerNormalization": _along(-1),
    "Concat": _concat,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Transpose": _transpose,
    "Reshape": _reshape,
}
