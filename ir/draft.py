"""A node on its way to another version of ONNX's operators: what it will say, before anything in the model changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from .constants import Array, constant_array
from .schemas import form
from .scopes import Scope
from .shapes import Dims


class Refusal(Exception):
    """There is no exact conversion of a node; the message says why, as a clause."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A node still to be made; as an operand it stands for its only output. ``word`` names what a Constant is for."""

    op_type: str
    inputs: tuple[Operand, ...]
    attributes: tuple[ir.Attr, ...] = ()
    word: str = ""


Operand: TypeAlias = "ir.Value | Call | None"


class Facts(Protocol):
    """What is known of the values of a model, from the file or by inference; ``None`` for what is not."""

    def dtype(self, value: ir.Value) -> ir.DataType | None: ...

    def dims(self, value: ir.Value) -> Dims | None: ...


class Draft:
    """What a node says, to be rewritten for version ``to`` of the ONNX domain; the node stays as it is."""

    def __init__(self, node: ir.Node, scope: Scope, to: int, facts: Facts) -> None:
        self.node, self.scope, self.to, self.facts = node, scope, to, facts
        self.op_type = node.op_type
        self.inputs: list[Operand] = list(node.inputs)
        self.attributes: dict[str, ir.Attr] = dict(node.attributes)
        self.output_types: dict[ir.Value, ir.TypeProtocol] = {}  # where they are others now

    def become(self, op_type: str, *inputs: Operand, **attributes: Any) -> None:
        self.op_type, self.inputs, self.attributes = op_type, list(inputs), {}
        self.put(**attributes)

    def put(self, **attributes: Any) -> None:
        """Set attributes to plain values; ``None`` sets nothing."""
        self.attributes.update({attribute.name: attribute for attribute in _attributes(attributes)})

    def input(self, index: int) -> Operand:
        return self.inputs[index] if index < len(self.inputs) else None

    def set_input(self, index: int, operand: Operand) -> None:
        self.inputs += [None] * (index + 1 - len(self.inputs))
        self.inputs[index] = operand

    def value(self, name: str, default: Any = None) -> Any:
        """An attribute as a plain value; refuses where the caller of the function sets it."""
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        if attribute.is_ref():
            refuse(f"its attribute '{name}' is set by the caller of the function")
        return attribute.value

    def pop(self, name: str, default: Any = None) -> Any:
        """The same, and the attribute is gone."""
        found = self.value(name, default)
        self.attributes.pop(name, None)
        return found

    def dims(self, index: int) -> Dims | None:
        operand = self.input(index)
        if isinstance(operand, Call):
            array = self.array(index)
            return None if array is None else array.shape
        return None if operand is None else self.facts.dims(operand)

    def dtype(self, index: int) -> ir.DataType | None:
        operand = self.input(index)
        return self.facts.dtype(operand) if isinstance(operand, ir.Value) else None

    def array(self, index: int) -> Array | None:
        """What an input always holds, where it is a constant."""
        operand = self.input(index)
        if not isinstance(operand, Call):
            return constant_array(operand)
        if operand.op_type != "Constant" or operand.attributes[0].is_ref():
            return None
        array: Array = operand.attributes[0].value.numpy()
        return array

    def unsqueeze(self, operand: Operand, axes: Sequence[int]) -> Call:
        if self.to < 13:
            return call("Unsqueeze", operand, axes=tuple(axes))
        return call("Unsqueeze", operand, constant(np.asarray(axes, np.int64), "axes"))

    def moved(self, name: str) -> Operand:
        """An attribute as an operand: of int64 or float32, with the rank that it has; ``None`` where it is not set.

        One that the caller of a function sets becomes a Constant with that reference.
        """
        attribute = self.attributes.pop(name, None)
        if attribute is None:
            return None
        if not attribute.is_ref():
            kind = np.int64 if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS) else np.float32
            return constant(np.asarray(attribute.value, kind), name)
        reference, function = attribute.ref_attr_name or "", self.scope.function
        declared = function.attributes.get(reference) if function is not None else None
        known = form("", self.node.op_type, self.scope.version)
        given = (known is not None and name in known.required) or (declared is not None and declared.value is not None)
        if self.to < 12 or not given:
            refuse(f"a caller of the function may leave out its attribute '{name}'")
        told = ir.RefAttr(f"value_{attribute.type.name.lower()}", reference, attribute.type)
        return Call("Constant", (), (told,), name)

    def like_data(self, operand: Operand) -> Operand:
        """A float32 scalar as one of the element type of the first input."""
        if operand is None:
            return None
        assert isinstance(operand, Call)
        dtype = self.dtype(0)
        if dtype is None and self.to < 15:
            refuse("the element type of its input is not known")
        if dtype is None:
            return call("CastLike", operand, self.inputs[0])
        if dtype == ir.DataType.FLOAT:
            return operand
        if operand.attributes[0].is_ref():
            return call("Cast", operand, to=int(dtype))
        return constant(operand.attributes[0].value.numpy().astype(dtype.numpy()), operand.word)


def refuse(reason: str) -> NoReturn:
    raise Refusal(reason)


def call(op_type: str, *inputs: Operand, **attributes: Any) -> Call:
    return Call(op_type, inputs, _attributes(attributes))


def constant(array: Array, word: str) -> Call:
    return Call("Constant", (), (ir.AttrTensor("value", ir.Tensor(array)),), word)


def _attributes(values: Mapping[str, Any]) -> tuple[ir.Attr, ...]:
    return tuple(ir.convenience.convert_attributes({key: value for key, value in values.items() if value is not None}))
