"""What is known of integers computed from shapes: Shape, and what Gather, Slice, Concat and the like make of it.

An element is a number, or a dimension: a name that the file gives or that shape inference makes up, or the axis of a
value of which nothing else is known. Two equal elements are equal in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from .constants import Array, constant_ints, constant_tensor
from .edit import Names
from .scopes import Scope
from .shapes import dims, symbolic_dims

Element: TypeAlias = "int | str | tuple[ir.Value, int]"
Elements: TypeAlias = "np.ndarray[Any, Any]"  # of dtype object

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


class Dimensions:
    """Integers computed from shapes in one graph."""

    def __init__(self, model: ir.Model, scope: Scope) -> None:
        self.model = model
        self.scope = scope
        self._known: dict[ir.Value, Elements] = {}
        for node in scope.graph:
            compute = _COMPUTE.get(node.op_type)
            if compute is not None and not node.domain and not _refers(node):
                found = compute(self, node)
                if found is not None:
                    self._known[node.outputs[0]] = found

    @cached_property
    def names(self) -> Names:
        """Free names, made when the first is needed."""
        return Names(self.model)

    @cached_property
    def symbols(self) -> dict[ir.Value, tuple[int | str | None, ...]]:
        """Shapes with the names that inference makes up; inferred when the first is needed."""
        return symbolic_dims(self.model) if self.scope.function is None else {}

    def known(self, node: ir.Node) -> Array | None:
        """What ``node`` makes where that is computed from a shape and every number of it is known."""
        elements = self._known.get(node.outputs[0]) if node.outputs else None
        if elements is None or not all(isinstance(item, int) for item in elements.ravel()):
            return None
        dtype = node.outputs[0].dtype
        return elements.astype(dtype.numpy() if dtype in _INTEGERS else np.int64)

    def reshape_target(self, node: ir.Node) -> list[int] | None:
        """The target of a Reshape as constants: 0, which copies, where it is the data's own dimension of that place.

        ``None`` where an element is neither that nor a number, or all are numbers.
        """
        data, target = node.inputs[0], node.inputs[1]
        elements = self._known.get(target) if target is not None else None
        if data is None or elements is None or elements.ndim != 1:
            return None
        if all(isinstance(item, int) for item in elements):
            return None
        own = list(self._dims(data) or ())
        result = []
        for place, item in enumerate(elements):
            if not isinstance(item, int) and item not in (*own[place : place + 1], (data, place)):
                return None
            result.append(item if isinstance(item, int) else 0)
        return result

    def _dims(self, value: ir.Value) -> tuple[int | str | None, ...] | None:
        """The shape of a value with the names that inference makes up."""
        declared = dims(value)
        if declared is not None and None not in declared:
            return declared
        return self.symbols.get(value, declared)

    def elements(self, value: ir.Value | None) -> Elements | None:
        if value is None:
            return None
        if value in self._known:
            return self._known[value]
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype not in _INTEGERS or tensor.size > 64:
            return None
        return tensor.numpy().astype(object)

    def shape(self, node: ir.Node) -> Elements | None:
        value = node.inputs[0]
        found = None if value is None else self._dims(value)
        if value is None or found is None:
            return None
        items: list[Element] = [(value, axis) if size is None else size for axis, size in enumerate(found)]
        start, end = _int(node, "start", 0), _int(node, "end", None)
        return _objects(items[start:end])

    def same(self, node: ir.Node) -> Elements | None:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and (to is None or to.value not in _INTEGERS):  # the enumeration's members are ints
            return None
        return self.elements(node.inputs[0])

    def gather(self, node: ir.Node) -> Elements | None:
        data, index = self.elements(node.inputs[0]), constant_tensor(node.inputs[1])
        if data is None or data.ndim != 1 or index is None or index.size > 64 or _int(node, "axis", 0) not in (0, -1):
            return None
        places = index.numpy()
        inside = np.all((places < len(data)) & (places >= -len(data)))
        return data[places.ravel()].reshape(places.shape) if inside else None

    def slice(self, node: ir.Node) -> Elements | None:
        data = self.elements(node.inputs[0])
        if data is None or data.ndim != 1 or self.scope.version < 10:
            return None
        given = [constant_ints(value) for value in node.inputs[1:]]
        if any(item is None or len(item) != 1 for item in given):
            return None
        start, end, axis, step = ([item[0] for item in given if item is not None] + [None] * 4)[:4]
        return data[start : end : step or 1] if axis in (0, -1, None) and (step or 1) > 0 else None

    def concat(self, node: ir.Node) -> Elements | None:
        parts = [self.elements(value) for value in node.inputs]
        if any(part is None or part.ndim != 1 for part in parts):
            return None
        return np.concatenate([part for part in parts if part is not None])

    def squeeze(self, node: ir.Node) -> Elements | None:
        data = self.elements(node.inputs[0])
        return data.reshape(()) if data is not None and data.size == 1 and data.ndim == 1 else None

    def unsqueeze(self, node: ir.Node) -> Elements | None:
        data = self.elements(node.inputs[0])
        return data.reshape((1,)) if data is not None and data.ndim == 0 else None


_COMPUTE: dict[str, Callable[[Dimensions, ir.Node], Elements | None]] = {
    "Shape": Dimensions.shape,
    "Cast": Dimensions.same,
    "Identity": Dimensions.same,
    "Gather": Dimensions.gather,
    "Slice": Dimensions.slice,
    "Concat": Dimensions.concat,
    "Squeeze": Dimensions.squeeze,
    "Unsqueeze": Dimensions.unsqueeze,
}


def _objects(items: list[Element]) -> Elements:
    array = np.empty(len(items), object)
    for place, item in enumerate(items):
        array[place] = item
    return array


def _int(node: ir.Node, name: str, default: int | None) -> int | None:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _refers(node: ir.Node) -> bool:
    return any(attribute.is_ref() for attribute in node.attributes.values())
