"""Constants that passes compute with: what a value holds when it never changes, and new ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .scopes import Scope

Array = np.ndarray[Any, Any]

_NUMBERS = {
    "value_float": ir.DataType.FLOAT,
    "value_floats": ir.DataType.FLOAT,
    "value_int": ir.DataType.INT64,
    "value_ints": ir.DataType.INT64,
}


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that ``value`` always holds: of an initializer that no caller can override, or of a Constant node.

    ``None`` for anything else, among it strings in attributes and what the caller of a function sets. It may be a
    ``sparse.SparseTensor``, whose ``nbytes`` are those it takes dense.
    """
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() and not value.is_graph_input() else None
    if node.op_type != "Constant" or node.domain:
        return None
    for attribute in node.attributes.values():
        if attribute.is_ref():
            return None
        if attribute.name == "value":
            return attribute.as_tensor()
        if attribute.name in _NUMBERS:
            return ir.Tensor(np.asarray(attribute.value, _NUMBERS[attribute.name].numpy()))
    return None


def constant_array(value: ir.Value | None, at_most: int = 1 << 20) -> Array | None:
    """What ``value`` always holds, in its own dtype; ``None`` where that is unknown, or more than ``at_most`` bytes."""
    tensor = constant_tensor(value)
    return tensor.numpy() if tensor is not None and tensor.nbytes <= at_most else None


def constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers that ``value`` always holds, flat; ``None`` where it is no small constant of integers."""
    array = constant_array(value, 1 << 16)
    return tuple(array.ravel().tolist()) if array is not None and array.dtype.kind in "iu" else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``value`` never changes: ``constant_tensor`` without reading a tensor, and strings too."""
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return value.is_initializer() and not value.is_graph_input() and value.const_value is not None
    return (
        node.op_type == "Constant"
        and not node.domain
        and all(attribute.name != "sparse_value" and not attribute.is_ref() for attribute in node.attributes.values())
    )


def new_constant(scope: Scope, tensor: ir.TensorProtocol, name: str) -> tuple[ir.Value, ir.Node | None]:
    """A constant for ``scope``: an initializer, or in a function, which cannot hold one, a Constant node.

    Returns the value and the node. Neither is in the graph yet: register the value, or insert the node.
    """
    if scope.function is not None:
        return constant_node(tensor, name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=_shape(tensor), const_value=tensor)
    return value, None


def constant_node(tensor: ir.TensorProtocol, name: str) -> tuple[ir.Value, ir.Node]:
    """A Constant node with its output, in no graph yet."""
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=_shape(tensor))
    return value, ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value], name=name)


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tensor.shape.numpy())
