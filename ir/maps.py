"""Map types, which onnx_ir lacks: what ZipMap, CastMap and DictVectorizer of ai.onnx.ml give and take.

onnx_ir reads and writes types in four functions of ``onnx_ir.serde``. Here they learn maps, for the whole process and
once: every place that holds a type (values of all graphs and functions, attributes) and every caller (load, save,
sessions, shape inference, onnx_ir's own passes) goes through them. What they took before they treat as before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

_Nested: TypeAlias = "ir.SequenceType | ir.OptionalType | MapType"
_INNER = {"sequence_type": "elem_type", "optional_type": "elem_type", "map_type": "value_type"}


@dataclass
class MapType(ir.TypeProtocol):
    """``map(key, value)``: from integers or strings to values of one type, which may itself be nested.

    Shape and ``dtype`` of a value of this type are those of the tensors that it holds, as of a sequence.
    """

    key: ir.DataType
    elem_type: ir.TypeProtocol
    denotation: str | None = None

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        return self.elem_type.dtype

    def __eq__(self, other: object) -> bool:
        """As of onnx_ir's types: the denotation says nothing about what there is."""
        return isinstance(other, MapType) and (self.key, self.elem_type) == (other.key, other.elem_type)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"Map({self.key!r}, {self.elem_type!r})"


def held_type(form: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    """What sequences, optionals and maps hold in the end: a tensor's type."""
    while isinstance(form, ir.SequenceType | ir.OptionalType | MapType):
        form = form.elem_type
    return form


def has_map(form: ir.TypeProtocol | None) -> bool:
    """Whether a type is a map, or a sequence or optional of one."""
    while isinstance(form, ir.SequenceType | ir.OptionalType):
        form = form.elem_type
    return isinstance(form, MapType)


def _deserialize_type(plain: Any, proto: onnx.TypeProto) -> Any:
    if not proto.HasField("map_type"):
        found = plain(proto)
        if found is None and proto.HasField("opaque_type"):
            raise ValueError("a value has an opaque type, which would be lost")
        return found
    held = ir.serde.deserialize_type_proto_for_type(proto.map_type.value_type)
    if held is None:
        raise ValueError("a map type does not say what it maps to (value_type)")
    key = ir.DataType(proto.map_type.key_type)
    return MapType(key, held, proto.denotation if proto.HasField("denotation") else None)


def _deserialize_shape(plain: Any, proto: onnx.TypeProto) -> Any:
    return plain(proto.map_type.value_type if proto.HasField("map_type") else proto)


def _serialize_type(plain: Any, type_proto: onnx.TypeProto, from_: ir.TypeProtocol) -> None:
    if not isinstance(from_, MapType):
        plain(type_proto, from_)
        return
    if from_.denotation:
        type_proto.denotation = from_.denotation
    type_proto.map_type.key_type = int(from_.key)
    ir.serde.serialize_type_into(type_proto.map_type.value_type, from_.elem_type)


def _serialize_shape(plain: Any, type_proto: onnx.TypeProto, from_: ir.Shape) -> None:
    kind = type_proto.WhichOneof("value")
    while kind in _INNER:
        type_proto = getattr(getattr(type_proto, kind), _INNER[kind])
        kind = type_proto.WhichOneof("value")
    plain(type_proto, from_)


def _teach() -> None:
    """Put each function above in front of the one of onnx_ir, unless that was done before."""
    for name, taught in (
        ("deserialize_type_proto_for_type", _deserialize_type),
        ("deserialize_type_proto_for_shape", _deserialize_shape),
        ("serialize_type_into", _serialize_type),
        ("serialize_shape_into", _serialize_shape),
    ):
        plain = getattr(ir.serde, name)
        if not isinstance(plain, functools.partial):
            setattr(ir.serde, name, functools.partial(taught, plain))


_teach()
