"""What stands at a joint whose sides do not fit, where it was asked for: a tiny model from one value to another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...ir.shapes import Dims, dims
from ...ir.unify import dtype_name

Adapter = Literal["cast", "reshape", "transpose", "linear"]

_LAYOUTS = ((0, 3, 1, 2), (0, 2, 3, 1), (0, 4, 1, 2, 3), (0, 2, 3, 4, 1), (0, 2, 1), (1, 0))
"""Permutations that are tried first: channels last to first, first to last, sequences, matrices."""
_DEEPEST = 5  # dimensions whose permutations are all tried


def adapter(giver: ir.Value, taker: ir.Value, allowed: Sequence[Adapter], opset: int) -> tuple[ir.Model, str] | None:
    """A model that makes what ``taker`` takes of what ``giver`` is, and what it does in words.

    Of the kinds ``allowed``: ``cast`` changes the element type; ``transpose`` permutes dimensions where one
    permutation alone fits, or a usual change of layout; ``reshape`` keeps the elements of each sample, and their number
    must be known to be equal. ``None`` where these do not do. ``linear`` is not made here, for it needs data.
    """
    one, two = giver.type, taker.type
    if not isinstance(one, ir.TensorType) or not isinstance(two, ir.TensorType):
        return None
    value = ir.Value(name="x", type=one, shape=giver.shape)
    nodes: list[ir.Node] = []
    words: list[str] = []
    constants: list[ir.Value] = []
    end = value
    if one.dtype != two.dtype:
        if "cast" not in allowed or ir.DataType.STRING in (one.dtype, two.dtype):
            return None
        nodes.append(ir.node("Cast", [end], {"to": int(two.dtype)}))
        words.append(f"cast from {dtype_name(one.dtype)} to {dtype_name(two.dtype)}")
        end = nodes[-1].outputs[0]
    given, taken = dims(giver), dims(taker)
    if given is not None and taken is not None and not fits(given, taken):
        if "transpose" in allowed and (order := permutation(given, taken)) is not None:
            nodes.append(ir.node("Transpose", [end], {"perm": order}))
            words.append(f"transposed by {list(order)}")
        elif "reshape" in allowed and (target := reshaping(given, taken)) is not None:
            array = np.array(target, np.int64)
            shape = ir.Value(
                name="shape",
                type=ir.TensorType(ir.DataType.INT64),
                shape=ir.Shape(array.shape),
                const_value=ir.Tensor(array, name="shape"),
            )
            constants.append(shape)
            nodes.append(ir.node("Reshape", [end, shape]))
            words.append(f"reshaped to {target}")
        else:
            return None
        end = nodes[-1].outputs[0]
    if not nodes:
        return None
    made = taken if taken is None or fits_exactly(given, taken) else _shape_after(given, taken, nodes[-1])
    return small_model(value, nodes, constants, two, made, opset), ", ".join(words)


def small_model(
    value: ir.Value,
    nodes: Sequence[ir.Node],
    constants: Sequence[ir.Value],
    kind: ir.TypeProtocol,
    shape: Dims | None,
    opset: int,
) -> ir.Model:
    """A model from ``x`` to ``y``."""
    for number, node in enumerate(nodes):
        node.name = f"adapter_{node.op_type}"
        node.outputs[0].name = f"adapted_{number}"
    end = nodes[-1].outputs[0]
    end.name, end.type = "y", kind
    end.shape = None if shape is None else ir.Shape(shape)
    graph = ir.Graph([value], [end], nodes=nodes, initializers=constants, opset_imports={"": opset}, name="adapter")
    return ir.Model(graph, ir_version=4)


def fits(given: Dims, taken: Dims) -> bool:
    """Whether ranks are equal, and no two known sizes differ."""
    return len(given) == len(taken) and all(
        one == two or not (isinstance(one, int) and isinstance(two, int)) for one, two in zip(given, taken, strict=True)
    )


def fits_exactly(given: Dims | None, taken: Dims) -> bool:
    return given is None or all(isinstance(dim, int) for dim in taken)


def permutation(given: Dims, taken: Dims) -> tuple[int, ...] | None:
    """The order that brings ``given`` to ``taken``: a usual change of layout, or else the only one that fits."""
    rank = len(given)
    if rank != len(taken) or not 2 <= rank <= _DEEPEST:
        return None

    def brings(order: Sequence[int]) -> bool:
        return fits(tuple(given[axis] for axis in order), taken)

    for order in _LAYOUTS:
        if len(order) == rank and brings(order):
            return order
    found = [order for order in itertools.permutations(range(rank)) if brings(order)]
    return found[0] if len(found) == 1 else None


def reshaping(given: Dims, taken: Dims) -> list[int] | None:
    """The target of a Reshape that keeps the elements of each sample; ``None`` where they are not known to be equal."""
    if all(isinstance(dim, int) for dim in (*given, *taken)):
        sizes = [dim for dim in taken if isinstance(dim, int)]
        return sizes if math.prod(sizes) == math.prod(dim for dim in given if isinstance(dim, int)) else None
    if not given or not taken:
        return None
    rests = [[dim for dim in rest if isinstance(dim, int)] for rest in (given[1:], taken[1:])]
    whole = len(rests[0]) == len(given) - 1 and len(rests[1]) == len(taken) - 1
    if not whole or math.prod(rests[0]) != math.prod(rests[1]):
        return None
    if isinstance(given[0], int) and isinstance(taken[0], int) and given[0] != taken[0]:
        return None
    return [taken[0] if isinstance(taken[0], int) else -1, *rests[1]]


def _shape_after(given: Dims | None, taken: Dims, node: ir.Node) -> Dims:
    """What is known behind the adapter: the names of dimensions are those of its input."""
    if given is None:
        return taken
    if node.op_type == "Transpose":
        return tuple(given[axis] for axis in node.attributes["perm"].as_ints())
    return (given[0], *taken[1:])  # a Reshape that keeps samples, or a Cast
