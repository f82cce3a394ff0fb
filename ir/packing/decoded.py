"""What a decoder decodes: its operators, interpreted one by one, whatever encoding they were made for.

A decoder is known by what it is: a Reshape of what operators that move and count elements, and never round, make of
constants, whose result takes more bytes than the flat ones among them (others are tables). So decoders are found that
``clean`` has folded in part, that were renamed, or that another tool made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ..address import graphs
from ..constants import constant_ints, constant_tensor
from ..sparse import DENSE_LIMIT
from ..storage import LARGE, Array, MadeTensor

_COUNTING: dict[str, Callable[[Array, Array], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)),  # ONNX rounds towards zero
    "Mod": np.mod,
    "Max": np.maximum,
    "Min": np.minimum,
}
_INPUTS = {"Cast": 1, "ConstantOfShape": 1, "Slice": 3, "ScatterElements": 3} | dict.fromkeys(_COUNTING, 2)
_INPUTS |= dict.fromkeys(("Concat", "CumSum", "Expand", "Gather", "GatherElements", "Reshape"), 2)
_TABLE = 1 << 20  # elements that a table, or a step of a small weight, may have
_RATIO = 64  # of bytes decoded to bytes stored: from what lies in the file anyway, large weights may be made
GROWTH = 1 << 10
"""Bytes by which a file may grow where what constants give is computed ahead: packed is what takes more."""

_MOVING = ("Reshape", "Cast", "Slice", "Expand")
_ATTRIBUTES = ("axis", "exclusive", "to", "value", "saturate")


@dataclass(frozen=True, eq=False)
class Decoder:
    """``value``: what its last node gives. ``leaves``: the constants that it reads, the largest flat one
    first, tables last. ``saves``: how many bytes less than the value the flat ones take."""

    value: ir.Value
    leaves: tuple[ir.Value, ...]
    saves: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        node = self.value.producer()
        assert node is not None
        return constant_ints(node.inputs[1]) or ()

    @property
    def dtype(self) -> ir.DataType:
        return _dtype(self.value)

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes that compute it, those of shared tables too, each after those that it reads."""
        return list(_steps(self.value))

    @property
    def bytes(self) -> int:
        """Bytes of the constants, shared ones too."""
        return sum(tensor.nbytes for leaf in self.leaves if (tensor := constant_tensor(leaf)) is not None)

    def tensor(self) -> ir.TensorProtocol:
        """What it gives, bit by bit; computed once, and again at each reading where it is large.

        Raises an error of numpy's where a step cannot be computed, and ``ValueError`` where it is none of a decoder's,
        or where a small file asks for more than ``DENSE_LIMIT``.
        """
        dtype, shape, name = self.dtype, self.shape, self.value.name
        size = math.prod(shape)
        if size * dtype.itemsize > max(DENSE_LIMIT, _RATIO * self.bytes):
            raise ValueError(f"it would take {size * dtype.itemsize:.0f} bytes, past the limit of {DENSE_LIMIT}")
        run = _Program(self.value, 2 * size + _TABLE).run
        whole = run()
        if whole.shape != shape or whole.dtype != dtype.numpy():
            raise ValueError(f"it gives {whole.dtype}{list(whole.shape)}, not {dtype}{list(shape)}")
        if whole.nbytes < LARGE:
            return ir.Tensor(whole, dtype=dtype, name=name)
        return MadeTensor(run, dtype, ir.Shape(shape), name=name, provenance="lazy: unpack-weights")


def decoders(model: ir.Model) -> list[Decoder]:
    """Every decoder of the model, in order of graphs and nodes."""
    decoding: dict[ir.Value, None] = {}
    found = []
    for _, graph in graphs(model):
        for node in graph:
            if _is_step(node) and all(_is_known(value, decoding) for value in node.inputs):
                try:
                    decoder = _decoder(node)
                except (TypeError, ValueError):  # an attribute of the wrong type, or a type that there is not
                    continue
                if decoder is None:
                    decoding[node.outputs[0]] = None
                else:
                    found.append(decoder)
    return found


def packed_nodes(model: ir.Model) -> set[ir.Node]:
    """The nodes of all decoders that save more than ``GROWTH``, which are to stay as they are."""
    return {node for decoder in decoders(model) if decoder.saves > GROWTH for node in decoder.nodes}


def packed_values(model: ir.Model) -> set[ir.Value]:
    """What is computed on the way to packed weights."""
    last = {decoder.value for decoder in decoders(model)}
    return {value for node in packed_nodes(model) for value in node.outputs if value not in last}


def _is_known(value: ir.Value | None, decoding: dict[ir.Value, None]) -> bool:
    return value is not None and (value in decoding or constant_tensor(value) is not None)


def _is_step(node: ir.Node) -> bool:
    """Whether a node is one that ``_computed`` understands."""
    if node.domain or not node.inputs or len(node.inputs) != _INPUTS.get(node.op_type):
        return False
    return all(not attribute.is_ref() and attribute.name in _ATTRIBUTES for attribute in node.attributes.values())


def _decoder(node: ir.Node) -> Decoder | None:
    """The decoder that ends in ``node``, if it is one."""
    shape = constant_ints(node.inputs[1]) if node.op_type == "Reshape" else None
    if shape is None or any(size < 1 for size in shape) or node.outputs[0].is_graph_output():
        return None
    leaves = dict.fromkeys(_leaves(node.outputs[0]))
    flat = {leaf: tensor.nbytes for leaf in leaves if (tensor := constant_tensor(leaf)) and tensor.shape.rank() == 1}
    if _has_rounding(node.outputs[0]) or not flat or _is_moved(node):
        return None
    ordered = sorted(flat, key=lambda leaf: -flat[leaf])
    size = math.prod(shape) * _dtype(node.outputs[0]).itemsize
    saves = int(size) - sum(flat.values())
    tables = (leaf for leaf in leaves if leaf not in flat)
    return Decoder(node.outputs[0], (*ordered, *tables), saves) if saves > 0 else None


def _is_moved(node: ir.Node) -> bool:
    """Whether a Reshape gives a weight of an exporter's in another shape: one that was not laid out flat."""
    value = node.inputs[0]
    while value is not None and (before := value.producer()) is not None and before.op_type in _MOVING:
        value = before.inputs[0]
    tensor = constant_tensor(value)
    return tensor is not None and tensor.shape.rank() > 1


def _steps(value: ir.Value) -> dict[ir.Node, None]:
    """The nodes that compute a value, a node after those that it reads."""
    order: dict[ir.Node, None] = {}
    waiting = [value.producer()]
    while waiting:
        node = waiting[-1]
        if node is None or node in order or node.op_type == "Constant":
            waiting.pop()
            continue
        before = [made.producer() for made in node.inputs if made is not None]
        missing = [one for one in before if one is not None and one not in order and one.op_type != "Constant"]
        if missing:
            waiting += missing
        else:
            order[node] = None
            waiting.pop()
    return order


def _leaves(value: ir.Value) -> list[ir.Value]:
    steps = _steps(value)
    return [made for node in steps for made in node.inputs if made is not None and made.producer() not in steps]


def _dtype(value: ir.Value) -> ir.DataType:
    """Of what an allowed step gives."""
    while (node := value.producer()) is not None and node.op_type != "Constant":
        if node.op_type == "Cast":
            return ir.DataType(node.attributes.get_int("to", 0))
        if node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            return ir.DataType.FLOAT if given is None else given.as_tensor().dtype
        assert node.inputs[0] is not None
        value = node.inputs[0]
    tensor = constant_tensor(value)
    assert tensor is not None
    return tensor.dtype


def _has_rounding(value: ir.Value) -> bool:
    """Whether a step computes with floats, or casts to fewer bits."""
    for node in _steps(value):
        if node.op_type in _COUNTING or node.op_type == "CumSum":
            if not _dtype(node.outputs[0]).is_integer():
                return True
        elif node.op_type == "Cast" and node.inputs[0] is not None:
            before, after = _dtype(node.inputs[0]), _dtype(node.outputs[0])
            if before.bitwidth > after.bitwidth or (before.is_floating_point() and not after.is_floating_point()):
                return True
    return False


# Computing ------------------------------------------------------------------------------------------------------------


class _Program:
    """The steps to a value, and the constants that they read: it outlives the nodes."""

    def __init__(self, value: ir.Value, most: int) -> None:
        self.value, self.most = value, most
        self.steps = [(node, [read for read in node.inputs if read is not None]) for node in _steps(value)]
        self.leaves = {leaf: tensor for leaf in _leaves(value) if (tensor := constant_tensor(leaf)) is not None}

    def run(self) -> Array:
        """What the last step gives; what no later step reads goes as soon as it can."""
        left = Counter(read for _, inputs in self.steps for read in inputs)
        held: dict[ir.Value, Array] = {}
        for node, inputs in self.steps:
            given = [held[read] if read in held else self.leaves[read].numpy() for read in inputs]
            if (size := _size(node, given)) > self.most:
                raise ValueError(f"{node.op_type} to {size} elements is no step of a decoder")
            held[node.outputs[0]] = _computed(node, given)
            left.subtract(inputs)
            for read in inputs:
                if not left[read]:
                    held.pop(read, None)
        return held[self.value]


def _size(node: ir.Node, given: list[Array]) -> int:
    """How many elements a step would give."""
    first, *others = given
    match node.op_type:
        case "Gather":
            return int(first.size // max(1, first.shape[node.attributes.get_int("axis", 0)]) * others[0].size)
        case "GatherElements":
            return int(others[0].size)
        case "ConstantOfShape":
            return math.prod(first.ravel().tolist())
        case "Expand":
            return math.prod(np.broadcast_shapes(first.shape, tuple(others[0].ravel().tolist())))
        case "Concat":
            return int(first.size + others[0].size)
        case counting if counting in _COUNTING:
            return math.prod(np.broadcast_shapes(first.shape, others[0].shape))
    return int(first.size)


def _computed(node: ir.Node, given: list[Array]) -> Array:
    """One operator, as ONNX defines it for what decoders ask of it; raises ``ValueError`` for what they do not."""
    first, axis = given[0], node.attributes.get_int("axis", 0)
    dims = tuple(given[-1].ravel().tolist()) if node.op_type in ("Reshape", "Expand", "ConstantOfShape") else ()
    if 0 in dims:
        raise ValueError(f"{node.op_type} to {list(dims)} is no step of a decoder")
    match node.op_type:
        case "CumSum":
            sums = np.cumsum(first, int(given[1].reshape(())), first.dtype)
            return sums - first if node.attributes.get_int("exclusive", 0) else sums
        case "Gather":
            return np.take(first, given[1], axis)
        case "GatherElements":
            if first.ndim != 1 or given[1].ndim != 1:
                raise ValueError("GatherElements of more than one dimension is no step of a decoder")
            return np.take(first, given[1])
        case "Concat":
            if first.ndim != 1 or given[1].ndim != 1:
                raise ValueError("Concat of more than one dimension is no step of a decoder")
            return np.concatenate(given)
        case "Reshape":
            return first.reshape(dims)
        case "Slice":
            return first[given[1].item() : given[2].item()]
        case "Expand":
            return np.ascontiguousarray(np.broadcast_to(first, np.broadcast_shapes(first.shape, dims)))
        case "Cast":
            return first.astype(ir.DataType(node.attributes.get_int("to", 0)).numpy())
        case "ConstantOfShape":
            value = node.attributes.get("value")
            fill = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
            return np.full(dims, fill.reshape(()))
        case "ScatterElements":
            if first.ndim != 1 or axis != 0:
                raise ValueError("ScatterElements of more than one dimension is no step of a decoder")
            made = first.copy()
            made[given[1]] = given[2]
            return made
        case counting:
            return cast(Array, _COUNTING[counting](first, given[1]))
