"""A copy of a model that hands out what is asked of its values, also of those in bodies.

A value of the main graph comes out as it is, also where only its least and greatest element are asked for: numpy finds
these in less time than ONNX Runtime's ReduceMin and ReduceMax, which besides overlook NaN. Of a value in a body they,
its sum (for NaN) and the number of elements are found there, so that what the body hands out is as large whichever way
the model takes. Out of a body it gets as one more output of the node that holds it: of an If, whose other branch gives
a neutral element; of a Loop or Scan as a scan output, folded behind it into one for all iterations. Bodies in bodies do
that level by level.

What convolutions compute on x86-64 ONNX Runtime holds in blocks of channels, and copies for whoever wants it as ONNX
has it. A copy with the channels last goes along memory and takes the least time, so that is how it comes out where the
places of the elements do not matter.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.address import bodies, function_prefix, graphs, printable
from ..ir.constants import constant_array, constant_tensor
from ..ir.edit import Names
from ..ir.errors import UsageError, nearest
from ..ir.scopes import values
from ..ir.shapes import infer_shapes
from ..passes.base import Array
from ..passes.points import NotFinite, Unfit

_FLOAT, _INT = ir.DataType.FLOAT, ir.DataType.INT64
_EXTREMES = (("ReduceMin", np.inf), ("ReduceMax", -np.inf), ("ReduceSum", 0.0), ("Size", 0))
_IN_BLOCKS = frozenset(("Add", "AveragePool", "Concat", "MaxPool", "Mul", "Relu", "Sigmoid", "Sum", "Tanh"))
_BLOCKS = platform.machine() in ("x86_64", "AMD64")
_SAME_ELEMENTS = frozenset(("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"))


@dataclass(frozen=True)
class Extremes:
    """How the extremes of a value in a body come out: four scalars."""

    names: tuple[str, ...]

    def read(self, found: Mapping[str, Any]) -> tuple[float, float, int]:
        """``low``, ``high`` and the number of elements. Raises ``NotFinite``."""
        if any(found[name] is None for name in self.names):
            return np.inf, -np.inf, 0
        low, high, total, size = (found[name].item() for name in self.names)
        if np.isnan(total):  # one of finite floats may at most overflow
            raise NotFinite("holds NaN")
        return low, high, int(size)


@dataclass(frozen=True)
class Dims:
    """How the shape of a value comes out: one vector, of the greatest sizes where it is in a Loop or Scan.

    Before the sizes stands a 1, or something negative where the value did not come about.
    """

    names: tuple[str]

    def read(self, found: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape, or None where the value did not come about."""
        if found[self.names[0]] is None:  # ONNX Runtime gives nothing for some outputs of branches in branches
            return None
        there, *sizes = found[self.names[0]].tolist()
        return tuple(sizes) if there > 0 else None


@dataclass(frozen=True)
class Whole:
    """How a value itself comes out, from an output or an input, behind axes for the iterations around it."""

    names: tuple[str]
    loops: int = 0

    def read(self, found: Mapping[str, Any]) -> list[Array]:
        """The array of each time that it came about."""
        array = found.get(self.names[0])  # no feed need give an input that has a default
        if array is not None and not isinstance(array, np.ndarray):
            raise Unfit("is no tensor")
        if array is None or array.size == 0:
            return []
        return list(array.reshape(-1, *array.shape[self.loops :])) if self.loops else [array]


class Watched:
    """A copy of a model, whose values are looked up by address and given more outputs. The model stays as it is."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()  # weights are shared
        self.model.meta.update(model.meta)
        self._names = Names(self.model)
        self._found: dict[str, tuple[ir.Value, ir.Graph]] = {}
        self._addresses: dict[ir.Value, str] = {}
        self._holders: dict[ir.Graph, tuple[ir.Node, ir.Graph]] = {}
        self._functions = tuple(map(function_prefix, model.functions.values()))
        for prefix, graph in graphs(self.model):
            for value in values(graph):
                if value.name:
                    self._found.setdefault(prefix + value.name, (value, graph))
                    self._addresses.setdefault(value, prefix + value.name)
            for node in graph:
                self._holders.update({body: (node, graph) for _, body in bodies(node)})
        self._blocked: dict[ir.Value, bool] = {}
        self._elements: dict[ir.Value, str] = {}
        self._ordered: set[str] = set()
        self._given_out = set(self.model.graph.outputs)

    def keep_order(self, addresses: Iterable[str]) -> None:
        """The values of these addresses come out as they are, whatever is asked besides."""
        self._ordered.update(addresses)

    def know_types(self, addresses: Sequence[str]) -> None:
        """Infer types and shapes where one of these values lacks its type, or stands in a body."""
        known = [self._found[address] for address in addresses if address in self._found]
        if any(value.type is None or graph is not self.model.graph for value, graph in known):
            infer_shapes(self.model)

    def root(self, address: str, asked: Callable[[str], bool]) -> tuple[str, float, float]:
        """Of the values that are asked for too, the first of which this one holds the same elements, clipped; bounds.

        So what a Relu or a Reshape makes need not be looked at where what it takes is.
        """
        best = address, -np.inf, np.inf
        value, graph = self._lookup(address)
        low, high = -np.inf, np.inf
        while (step := _clipping(value)) is not None and step[0].dtype == value.dtype:
            value, *bounds = step
            low, high = (min(max(bound, low), high) for bound in bounds)
            above = self._addresses.get(value)
            if above is None or self._found[above][1] is not graph:
                break
            if asked(above):
                best = above, low, high
        return best

    def extremes(self, address: str) -> Extremes | Whole:
        """Raises ``Unfit`` for a value that is not of floats, or that cannot be brought out of its body."""
        value, graph = self._lookup(address)
        if isinstance(value.type, ir.TensorType) and not value.type.dtype.is_floating_point():
            raise Unfit(f"is {value.type.dtype.name.lower()}, and only floats have a range")
        if graph is self.model.graph:
            return self.elements(address)
        self._require_tensor(value)
        self._require_way_out(graph)
        if value.dtype not in (_FLOAT, ir.DataType.DOUBLE):
            value = self._node(graph, "Cast", [value], _FLOAT, to=_FLOAT)
        names = []
        for op_type, neutral in _EXTREMES:
            dtype = _INT if op_type == "Size" else value.dtype or _FLOAT
            attributes = {} if op_type == "Size" else {"keepdims": 0}
            found = self._node(graph, op_type, [value], dtype, **attributes)
            found.shape = ir.Shape([])
            fold = "ReduceSum" if op_type == "Size" else op_type
            out, _ = self._brought_out(found, graph, np.asarray(neutral, dtype.numpy()), fold)
            names.append(self._output(out))
        return Extremes(tuple(names))

    def dims(self, address: str) -> Dims:
        value, graph = self._lookup(address)
        self._require_tensor(value)
        self._require_way_out(graph)
        rank = None if value.shape is None else len(value.shape)
        sizes = self._node(graph, "Shape", [value], _INT)
        found = self._node(graph, "Concat", [self._constant(graph, np.array([1])), sizes], _INT, axis=0)
        found.shape = ir.Shape([None if rank is None else rank + 1])
        out, _ = self._brought_out(found, graph, np.full((rank or 0) + 1, -1), "ReduceMax")
        return Dims((self._output(out),))

    def whole(self, address: str) -> Whole:
        value, graph = self._lookup(address)
        if graph is self.model.graph:
            if not value.is_graph_input() and not value.is_graph_output():
                graph.outputs.append(value)
            return Whole((value.name or "",))
        self._require_tensor(value)
        self._require_way_out(graph)
        if value.dtype is None:
            raise Unfit("is in a body, and of a type that is not known")
        found = self._node(graph, "Identity", [value], value.dtype)
        found.shape = value.shape
        rank = 0 if value.shape is None else len(value.shape)
        out, loops = self._brought_out(found, graph, np.zeros((0,) * max(rank, 1), value.dtype.numpy()), None)
        return Whole((self._output(out),), loops)

    def elements(self, address: str) -> Whole:
        """As ``whole``, where the places of the elements do not matter, and the axes may be in another order."""
        value, graph = self._lookup(address)
        comes = address in self._ordered or value in self._given_out
        if comes or graph is not self.model.graph or not (_BLOCKS and self._in_blocks(value)):
            return self.whole(address)
        if value not in self._elements:
            turned = self._node(graph, "Transpose", [value], _FLOAT, perm=[0, 2, 3, 1])
            self._elements[value] = self._output(turned)
        return Whole((self._elements[value],))

    def _in_blocks(self, value: ir.Value) -> bool:
        """Whether ONNX Runtime is expected to hold a value of the main graph in blocks of channels."""
        pending = [value]
        while pending:
            at = pending[-1]
            node = at.producer()
            if at in self._blocked:
                pending.pop()
            elif node is None or node.domain or at.dtype is not _FLOAT or len(node.outputs) > 1:
                self._blocked[at] = False
            elif node.op_type == "Conv":
                weight = constant_tensor(node.inputs[1])
                self._blocked[at] = weight is not None and len(weight.shape) == 4
            elif node.op_type not in _IN_BLOCKS:
                self._blocked[at] = False
            else:
                read = [one for one in node.inputs if one is not None]
                pending += [one for one in read if one not in self._blocked]
                if pending[-1] is at:
                    self._blocked[at] = all(self._blocked[one] for one in read)
        return self._blocked[value]

    def in_loop(self, address: str) -> bool:
        """Whether the value stands in the body of a Loop, in which its shape may change."""
        graph = self._lookup(address)[1]
        while graph in self._holders:
            node, graph = self._holders[graph]
            if node.op_type != "If":
                return True
        return False

    def _lookup(self, address: str) -> tuple[ir.Value, ir.Graph]:
        found = self._found.get(address)
        if found is None:
            hint = nearest(address, self._found)
            raise UsageError(f"The model has no value '{printable(address)}' to watch.{printable(hint)}")
        if address.startswith(self._functions):
            raise Unfit("is inside a function, which each call computes anew; inline the functions first")
        return found

    def _require_tensor(self, value: ir.Value) -> None:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise Unfit("is no tensor")

    def _require_way_out(self, graph: ir.Graph) -> None:
        while graph in self._holders:
            node, graph = self._holders[graph]
            if node.domain or node.op_type not in ("If", "Loop", "Scan"):
                raise Unfit(f"is in a body of {printable(node.op_type)}, which gives out nothing but its outputs")

    def _brought_out(self, value: ir.Value, graph: ir.Graph, neutral: Array, fold: str | None) -> tuple[ir.Value, int]:
        """``value`` of ``graph`` as one of the main graph, and the number of Loops and Scans on the way.

        ``neutral`` is what a branch that was not taken gives; ``fold`` makes one of those of all iterations.
        """
        loops = 0
        while graph is not self.model.graph:
            node, outer = self._holders[graph]
            for _, body in bodies(node):
                body.outputs.append(value if body is graph else self._constant(body, neutral))
            out = self._new_output(node, value)
            if node.op_type != "If":
                loops += 1
                if value.shape is not None:
                    out.shape = ir.Shape([None, *value.shape])
                if fold is not None:
                    out = self._folded(outer, out, fold, value)
            value, graph = out, outer
        return value, loops

    def _new_output(self, node: ir.Node, value: ir.Value) -> ir.Value:
        node.resize_outputs(len(node.outputs) + 1)
        out = node.outputs[-1]
        out.name, out.type = self._names.fresh("watched"), value.type
        out.shape = None if node.op_type == "If" else value.shape  # the branches differ
        for name in ("scan_output_axes", "scan_output_directions"):
            if (attribute := node.attributes.get(name)) is not None:
                node.attributes[name] = ir.AttrInt64s(name, [*attribute.as_ints(), 0])
        return out

    def _folded(self, graph: ir.Graph, value: ir.Value, fold: str, one: ir.Value) -> ir.Value:
        """The values of all iterations, along the first axis, made into one."""
        assert one.dtype is not None
        since = 13 if fold == "ReduceSum" else 18
        if one.shape is not None and len(one.shape) == 0:
            made = self._node(graph, fold, [value], one.dtype, keepdims=0)
        elif self.model.opset_imports.get("", 0) >= since:
            made = self._node(graph, fold, [value, self._constant(graph, np.array([0]))], one.dtype, keepdims=0)
        else:
            made = self._node(graph, fold, [value], one.dtype, keepdims=0, axes=[0])
        made.shape = one.shape
        return made

    def _node(
        self, graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType, **attributes: Any
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=self._names.fresh(f"watch_{op_type}"))
        node.outputs[0].name, node.outputs[0].type = self._names.fresh("watched"), ir.TensorType(dtype)
        graph.append(node)
        return node.outputs[0]

    def _constant(self, graph: ir.Graph, array: Array) -> ir.Value:
        """A node in ``graph``; it may come behind what reads it nowhere but among the outputs."""
        node = ir.node("Constant", [], {"value": ir.tensor(array)}, name=self._names.fresh("watch_Constant"))
        node.outputs[0].name = self._names.fresh("watched")
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(node.attributes["value"].as_tensor().dtype), None
        graph.append(node)
        return node.outputs[0]

    def _output(self, value: ir.Value) -> str:
        self.model.graph.outputs.append(value)
        return value.name or ""


def _clipping(value: ir.Value) -> tuple[ir.Value, float, float] | None:
    """What ``value`` holds the elements of, and the bounds to which it clips them; None where it is something else."""
    node = value.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None or len(node.outputs) != 1:
        return None
    if node.op_type in _SAME_ELEMENTS:
        return node.inputs[0], -np.inf, np.inf
    if node.op_type == "Relu":
        return node.inputs[0], 0.0, np.inf
    if node.op_type == "Clip":
        bounds = _clip_bounds(node)
        return None if bounds is None else (node.inputs[0], *bounds)
    return None


def _clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Constant bounds, from the inputs (opset 11) or the attributes before; None where they are not known."""
    found = []
    for place, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        given = node.inputs[place] if place < len(node.inputs) else None
        array = constant_array(given)
        attribute = node.attributes.get(name)
        if (given is not None and (array is None or array.size != 1)) or (attribute and attribute.is_ref()):
            return None
        if array is not None:
            found.append(float(array.reshape(-1)[0]))
        else:
            found.append(default if attribute is None else attribute.as_float())
    return (found[0], found[1]) if found[0] <= found[1] else None
