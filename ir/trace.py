"""From a constant's storage to the operators that compute with it, keeping track of axes, scales and calls."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from .address import bodies, graphs
from .constants import constant_tensor
from .ops import Kind, Port, operator
from .quantization import Quantization, placed
from .sparse import SparseTensor

Array = np.ndarray[Any, Any]

_VAST = 16 << 20  # bytes
_RESHAPING = {"Reshape", "Squeeze", "Unsqueeze", "Flatten"}
_KEEPING = {"Identity", "Cast", "CastLike", "QuantizeLinear"}
_DECODING = {"Sub", "Mul"}
Call = tuple[ir.Node, ir.Graph]  # a node that calls a function, and the function's graph

_FOLLOWED = {("", name) for name in _RESHAPING | _KEEPING | {"Transpose", "DequantizeLinear"}} | {
    ("com.microsoft", "QuantizeLinear"),
    ("com.microsoft", "DequantizeLinear"),
}


@dataclass(frozen=True, slots=True)
class Use:
    """One input of one operator that computes with a constant.

    ``output_axis`` and ``input_axis`` are its channel axes in the axes of the *stored* tensor: None where it has none,
    or where the path does not keep them apart. ``path`` holds the nodes between storage and operator.
    With ``quantization`` the operator takes stored integers for (q - zero_point) * scale. ``port`` is -1 where the
    constant is not an input of the Loop, Scan or the like but an output of its body.
    """

    node: ir.Node
    port: int
    kind: Kind
    output_axis: int | None = None
    input_axis: int | None = None
    path: tuple[ir.Node, ...] = ()
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class _View:
    """The constant as it arrives at ``value``: its shape there (None: unknown), and the stored axis of each axis."""

    value: ir.Value
    shape: tuple[int, ...] | None
    axes: tuple[int | None, ...]
    rank: int  # of the stored tensor
    dtype: ir.DataType  # of the stored tensor
    path: tuple[ir.Node, ...] = ()
    calls: tuple[Call, ...] = ()
    quantization: Quantization | None = None
    is_float: bool = False
    requantized: bool = False
    offset: Array | None = None  # what Sub took off the integers, after Cast, in the stored axes


class Tracer:
    """Follows constants of one model; the model must not change meanwhile."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.functions = dict(model.functions)
        self.called = {(function.domain, function.name) for function in self.functions.values()}

    def uses(self, value: ir.Value, tensor: ir.TensorProtocol) -> tuple[tuple[Use, ...], bool]:
        """The uses of the constant ``value``, nearest first, and whether it is an output of the model."""
        direct = self._direct(value, tensor)
        if direct is not None:
            return direct, False
        shape = tuple(tensor.shape.numpy())
        is_float = tensor.dtype.is_floating_point()
        start = _View(value, shape, tuple(range(len(shape))), len(shape), tensor.dtype, is_float=is_float)
        found: list[Use] = []
        views, output, seen = deque([start]), False, set()
        while views:
            view = views.popleft()
            if (view.value, view.calls) in seen:  # both branches of an If, or a function that calls itself
                continue
            seen.add((view.value, view.calls))
            for node, index in view.value.uses():
                views.extend(self._through(view, node, index, found))
            if view.value.is_graph_output():
                views.extend(self._outside(view, found))
                output |= view.value.graph is self.model.graph
        return tuple(found), output

    def _direct(self, value: ir.Value, tensor: ir.TensorProtocol) -> tuple[Use, ...] | None:
        """The uses where no path, scale or call is in the way, as for nearly all constants; None where one is."""
        if value.is_graph_output():
            return None
        found = []
        for node, index in value.uses():
            key = (node.domain, node.op_type)
            port = operator(node).port(index)
            followed = key in _FOLLOWED and index == 0
            if followed or key in self.called or port.kind is Kind.EMBEDDING or port.zero_point is not None:
                return None
            if port.kind is Kind.MATRIX:
                axes = port.axes(node, len(tensor.shape if value.shape is None else value.shape))
                found.append(Use(node, index, port.kind, axes.output, axes.input))
            else:
                found.append(Use(node, index, port.kind))
        return tuple(found)

    def _through(self, view: _View, node: ir.Node, index: int, found: list[Use]) -> list[_View]:
        """What the constant is after ``node``; where the node computes with it, the use goes to ``found`` instead."""
        if (node.domain, node.op_type) in _FOLLOWED and index == 0:
            step = self._step(view, node)
            if step is not None:
                return [replace(step, value=node.outputs[0], path=(*view.path, node))]
        elif node.op_type in _DECODING and not node.domain and (step := self._decoded(view, node, index)) is not None:
            return [replace(step, value=node.outputs[0], path=(*view.path, node))]
        elif (node.domain, node.op_type) in self.called and node.op_identifier() in self.functions:
            function = self.functions[node.op_identifier()]
            recursive = any(graph is function.graph for _, graph in view.calls)
            if not recursive and index < len(function.inputs):
                return [replace(view, value=function.inputs[index], calls=(*view.calls, (node, function.graph)))]
        found.append(self._use(view, node, index))
        return []

    def _step(self, view: _View, node: ir.Node) -> _View | None:
        """The view after one of the operators that are followed; None where it is more than a view."""
        if node.op_type == "Transpose" and view.shape is not None:
            rank = len(view.shape)
            order = tuple(node.attributes.get_ints("perm", ()) or reversed(range(rank)))
            shape = tuple(view.shape[axis] for axis in order)
            return replace(view, shape=shape, axes=tuple(view.axes[axis] for axis in order))
        if node.op_type in _RESHAPING and view.shape is not None:
            new = self._reshaped(node, view)
            return replace(view, shape=new, axes=_regrouped(view.shape, view.axes, new) if new is not None else ())
        if node.op_type == "DequantizeLinear":
            if view.requantized or view.quantization is not None:
                return replace(view, is_float=True, requantized=False)
            quantization = self._dequantization(view, node)
            return None if quantization is None else replace(view, quantization=quantization, is_float=True)
        if node.op_type == "QuantizeLinear":
            return replace(view, requantized=True, is_float=False)
        return view

    def _decoded(self, view: _View, node: ir.Node, index: int) -> _View | None:
        """The view after Sub of a zero point, or Mul by a scale, of integers that Cast made float; else None."""
        if view.is_float or view.quantization is not None or view.shape is None or index > 1:
            return None
        casts = [maker.attributes.get_int("to", 0) for maker in view.path if maker.op_type == "Cast"]
        plain = view.dtype.is_integer() and view.dtype.bitwidth <= 16
        if not (plain and casts and ir.DataType(casts[-1]).is_floating_point()):
            return None
        given = constant(node.inputs[1 - index], view.calls)
        array = None if given is None else _broadcast(given, view.shape)
        if array is None:
            return None
        if node.op_type == "Sub":
            with np.errstate(invalid="ignore"):
                exact = np.array_equal(array.astype(view.dtype.numpy()).astype(array.dtype), array)
            usable = exact and index == 0 and view.offset is None
            offset = placed(array, view.axes, view.rank) if usable else None
            return None if offset is None else replace(view, offset=offset.astype(view.dtype.numpy()))
        varying = [axis for axis, size in enumerate(array.shape) if size > 1]
        zero = np.zeros((), view.dtype.numpy())
        found = _quantization(view, array, zero, varying[0] if len(varying) == 1 else None, 0)
        if found is not None and view.offset is not None:
            found = replace(found, zero_point=view.offset)
        return None if found is None else replace(view, quantization=found, is_float=True)

    def _outside(self, view: _View, found: list[Use]) -> list[_View]:
        """Where the output of a function or of an If branch goes; of other bodies, a use by their node in ``found``."""
        graph = view.value.graph
        if graph is None or graph is self.model.graph:
            return []
        callers, calls = self._holders.get(graph, []), view.calls
        if calls and calls[-1][1] is graph:
            callers, calls = [calls[-1][0]], calls[:-1]
        places = [index for index, output in enumerate(graph.outputs) if output is view.value]
        views = []
        for node in callers:
            if (node.domain, node.op_type) == ("", "If") or (node.domain, node.op_type) in self.called:
                values = [node.outputs[place] for place in places if place < len(node.outputs)]
                views += [replace(view, value=value, calls=calls) for value in values]
            else:
                found.append(Use(node, -1, Kind.OPERAND, path=view.path, quantization=view.quantization))
        return views

    @cached_property
    def _holders(self) -> dict[ir.Graph, list[ir.Node]]:
        """The node of each body, and the calls of each function."""
        holders: dict[ir.Graph, list[ir.Node]] = {}
        for _, graph in graphs(self.model):
            for node in graph:
                for _, body in bodies(node):
                    holders.setdefault(body, []).append(node)
                if node.op_identifier() in self.functions:
                    holders.setdefault(self.functions[node.op_identifier()].graph, []).append(node)
        return holders

    # Uses ---------------------------------------------------------------------------------------------------------

    def _use(self, view: _View, node: ir.Node, index: int) -> Use:
        port = operator(node).port(index)
        kind = self._kind(view, node, port)
        if kind is not Kind.MATRIX:
            return Use(node, index, kind, path=view.path, quantization=view.quantization)
        output_axis, input_axis, operand_axis = None, None, None
        if view.shape is not None:
            axes = port.axes(node, len(view.shape))
            operand_axis = axes.output
            output_axis = None if axes.output is None else view.axes[axes.output]
            input_axis = None if axes.input is None else view.axes[axes.input]
        quantization = view.quantization
        if port.zero_point is not None and quantization is None and not (view.is_float or view.requantized):
            quantization = self._port_quantization(view, node, port, operand_axis)
        return Use(node, index, kind, output_axis, input_axis, view.path, quantization)

    def _kind(self, view: _View, node: ir.Node, port: Port) -> Kind:
        if port.kind is not Kind.EMBEDDING:
            return port.kind
        looked_up = len(view.shape or ()) < 2 or not (view.is_float or view.quantization is not None)
        if looked_up or (node.op_type == "Gather" and self._constant_inputs(node.inputs[1], view.calls)):
            return Kind.TABLE
        return Kind.EMBEDDING

    def _constant_inputs(self, value: ir.Value | None, calls: Sequence[Call]) -> bool:
        """Whether ``value`` is computed from constants alone; False where that takes more than 64 steps to find out."""
        waiting, steps = [value], 0
        while waiting:
            value, steps = waiting.pop(), steps + 1
            if value is None or constant(value, calls) is not None:
                continue
            node = value.producer()
            if node is None or steps > 64 or any(True for _ in bodies(node)):
                return False
            waiting.extend(node.inputs)
        return True

    # Scales and zero points ---------------------------------------------------------------------------------------

    def _dequantization(self, view: _View, node: ir.Node) -> Quantization | None:
        """What DequantizeLinear does with the integers of ``view``; None where its parameters are not constant."""
        if view.shape is None or (view.is_float and view.dtype.bitwidth > 8):
            return None
        rank = len(view.shape)
        scale = constant(node.inputs[1], view.calls)
        axis = node.attributes.get_int("axis", 1) if rank else 0
        axis += rank if axis < 0 else 0
        block = node.attributes.get_int("block_size", 0)
        return _quantization(view, scale, self._zero_point(view, node, 2), axis, block)

    def _port_quantization(self, view: _View, node: ir.Node, port: Port, axis: int | None) -> Quantization | None:
        """What an operator on integers takes the integers of ``view`` for; ``axis`` is the operand's output channel."""
        assert port.zero_point is not None
        if port.scale is None:
            scale = self._scale_after(node, view.calls)
        else:
            scale = constant(node.inputs[port.scale], view.calls)
        return _quantization(view, scale, self._zero_point(view, node, port.zero_point), axis, 0)

    def _zero_point(self, view: _View, node: ir.Node, index: int) -> Array | None:
        """The constant zero point at an input; zeros where it is absent, None where it is computed."""
        if index >= len(node.inputs) or node.inputs[index] is None:
            return np.zeros((), view.dtype.numpy())
        return constant(node.inputs[index], view.calls)

    def _scale_after(self, node: ir.Node, calls: Sequence[Call]) -> Array | None:
        """The weight's scale after MatMulInteger or ConvInteger: Cast, then Mul by it or by a product with it."""
        value = node.outputs[0]
        for op_type in ("Cast", "Mul"):
            consumers = value.consumers()
            if len(consumers) != 1 or consumers[0].op_type != op_type:
                return None
            following, before = consumers[0], value
            value = following.outputs[0]
        factor = next(item for item in following.inputs if item is not before)
        maker = factor.producer() if factor is not None else None
        found = constant(factor, calls)
        if found is None and maker is not None and maker.op_type == "Mul":
            constants = [array for item in maker.inputs if (array := constant(item, calls)) is not None]
            found = constants[0] if len(constants) == 1 else None
        return None if found is None else found.reshape(-1)

    # Shapes -------------------------------------------------------------------------------------------------------

    def _reshaped(self, node: ir.Node, view: _View) -> tuple[int, ...] | None:
        """The shape after Reshape, Flatten, Squeeze or Unsqueeze of ``view``; None where it is not known."""
        assert view.shape is not None
        old = view.shape
        if node.op_type == "Flatten":
            axis = node.attributes.get_int("axis", 1)
            return (math.prod(old[:axis]), math.prod(old[axis:]))
        second = node.inputs[1] if len(node.inputs) > 1 else None
        if second is not None:
            given = constant(second, view.calls)
            wanted = None if given is None else given.reshape(-1).tolist()
        else:
            name = "shape" if node.op_type == "Reshape" else "axes"
            wanted = list(node.attributes.get_ints(name, ())) or None
        if node.op_type == "Reshape":
            return None if wanted is None else _resolved(old, wanted, node.attributes.get_int("allowzero", 0))
        if node.op_type == "Squeeze" and second is None and wanted is None:
            return tuple(size for size in old if size != 1)
        if wanted is None:
            return None
        rank = len(old) + (len(wanted) if node.op_type == "Unsqueeze" else 0)
        chosen = {int(axis) % rank for axis in wanted}
        if node.op_type == "Squeeze":
            return tuple(size for axis, size in enumerate(old) if axis not in chosen)
        sizes = iter(old)
        return tuple(1 if axis in chosen else next(sizes) for axis in range(rank))


def constant(value: ir.Value | None, calls: Sequence[Call] = ()) -> Array | None:
    """The array of a value that is constant, through Identity; None where it is not, or may be overridden, or is sparse
    and over 16 MiB once dense.

    ``calls`` are the calls under way, outermost first: an input of the innermost function is its call's argument.
    """
    pending = list(calls)
    while value is not None:
        node = value.producer()
        if node is None and value.is_graph_input():
            if value.is_initializer() or not pending or pending[-1][1] is not value.graph:
                return None
            call, graph = pending.pop()
            index = next(place for place, item in enumerate(graph.inputs) if item is value)
            value = call.inputs[index] if index < len(call.inputs) else None
        elif node is not None and node.op_type == "Identity" and node.domain == "":
            value = node.inputs[0]
        else:
            tensor = constant_tensor(value)
            vast = isinstance(tensor, SparseTensor) and tensor.nbytes > _VAST
            return None if tensor is None or vast else tensor.numpy()
    return None


def _quantization(
    view: _View, scale: Array | None, zero_point: Array | None, axis: int | None, block: int
) -> Quantization | None:
    """Scale and zero point as given to an operator along the axes of ``view``, brought to the axes of the storage."""
    if view.shape is None or scale is None or zero_point is None:
        return None
    parts = []
    stored = np.dtype(view.dtype.numpy())
    for given in (scale, zero_point if zero_point.dtype == stored else zero_point.astype(stored)):
        array = _aligned(given, view.shape, axis)
        array = None if array is None else placed(array, view.axes, view.rank)
        if array is None:
            return None
        parts.append(array)
    varying = [place for place, size in enumerate(parts[0].shape) if size > 1]
    stored_axis = view.axes[axis] if axis is not None and (block or len(varying) == 1) else None
    return Quantization(parts[0], parts[1], stored_axis, block)


def _aligned(given: Array, shape: Sequence[int], axis: int | None) -> Array | None:
    """A scalar, a vector along ``axis``, [directions], [directions, channels] or full rank, at full rank."""
    rank = len(shape)
    if given.size == 1:
        return given.reshape((1,) * rank)
    if given.ndim == rank:
        return given
    if axis is None or given.ndim > 2:
        return None
    if given.ndim == 2:  # recurrent operators: directions are axis 0
        return given.reshape([given.shape[0] if a == 0 else given.shape[1] if a == axis else 1 for a in range(rank)])
    if given.size != shape[axis]:  # DynamicQuantizeLSTM per tensor: one for each direction
        return given.reshape([-1, *[1] * (rank - 1)]) if given.size == shape[0] else None
    return given.reshape([-1 if place == axis else 1 for place in range(rank)])


def _broadcast(given: Array, shape: tuple[int, ...]) -> Array | None:
    """``given`` at the rank of ``shape``; None where that does not stay the same once they are broadcast."""
    if given.ndim > len(shape):
        return None
    full = given.reshape((1,) * (len(shape) - given.ndim) + given.shape)
    return full if all(size in (1, own) for size, own in zip(full.shape, shape, strict=True)) else None


def _resolved(old: tuple[int, ...], wanted: list[int], allow_zero: int) -> tuple[int, ...]:
    """Reshape's target with 0 (copy) and -1 (what remains) replaced."""
    new = [
        old[place] if size == 0 and not allow_zero and place < len(old) else size for place, size in enumerate(wanted)
    ]
    known = math.prod(size for size in new if size != -1)
    return tuple(math.prod(old) // max(1, known) if size == -1 else size for size in new)


def _regrouped(old: tuple[int, ...], axes: tuple[int | None, ...], new: tuple[int, ...]) -> tuple[int | None, ...]:
    """The stored axis of each axis of ``new``: of the old axis with the same size and as many elements before it."""
    places: dict[tuple[int, int], list[int | None]] = {}
    before = 1
    for size, axis in zip(old, axes, strict=True):
        places.setdefault((before, size), []).append(axis)
        before *= size
    result, before = [], 1
    for size in new:
        matches = places.get((before, size), [])
        result.append(matches.pop(0) if matches else None)
        before *= size
    return tuple(result)
