"""What two model protobufs say differently: a comparison of everything that a file holds, field by field.

It is written against onnx.proto alone and shares no code with ``load`` and ``save``, so that it can judge them. Every
field of every message counts, those that the installed onnx does not know included. A difference that means nothing
is not passed over but *explained*: it is found like any other, and carries one of the reasons of ``Explained``.

Two protobufs without a difference of either kind are equal as protobufs, but for the order of fields on the wire and
for bits that belong to no element: those that fill the last byte, or the rest of a wider field.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from penjing.ir.address import printable

from .elements import FIELDS, same_elements, same_sparse, storage

_LONG = 60  # characters of a value shown in a sentence
_SIX_BITS = (onnx.TensorProto.FLOAT6E2M3, onnx.TensorProto.FLOAT6E3M2)
_TYPE_FIELDS = frozenset({"data_type", "elem_type"})
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})


class Explained(enum.Enum):
    """Why two protobufs mean the same where they differ. Nothing else is held to be equal.

    ``STORAGE``: ONNX stores elements as ``raw_data``, in a field of their type, or in a data file. ``SPARSE``: a sparse
    constant stands for a dense one, whose other elements are zero bits; a Constant's ``sparse_value`` becomes its
    ``value``. ``DEFAULT``: proto2 reads a field that is not there as its default; not so for alternatives (``oneof``),
    where presence counts, except an empty ``dim_param``, which names nothing. ``ORDER``: operator sets, metadata,
    attributes, initializers, types of values and quantization annotations are found by name. ``IMPLIED``: an
    initializer's entry in ``value_info`` that says no more than type and dims of its tensor. ``ELSEWHERE``: an entry in
    ``value_info`` for a name that the graph neither takes, stores nor computes: nothing reads it. ``IR_VERSION``: 13
    for 14, where there is no type of 6 bits, which is all that 14 added.
    """

    STORAGE = "elements are stored in another field or place; type, dims and bits are the same"
    SPARSE = "a sparse constant and a dense one with the same elements"
    DEFAULT = "a field that is left out says the same as its default"
    DOMAIN = "'ai.onnx' is the long name of the domain ''"
    ORDER = "these are found by name and have no order"
    REPEATED = "the same is said more than once"
    IMPLIED = "the tensor of an initializer says its type and shape"
    ELSEWHERE = "type and shape of a value that the graph does not have"
    OMITTED = "outputs without a name at the end of a node are left out"
    IR_VERSION = "IR version 14 added 6-bit floats to 13, and there are none"


@dataclass(frozen=True)
class Difference:
    """``place`` is an address, ``what`` says what the second model has and the first had, ``why`` explains it away."""

    place: str
    what: str
    why: Explained | None = None

    def __str__(self) -> str:
        return f"{self.place or 'model'}: {self.what}" + (f" ({self.why.value})" if self.why else "")


def differences(
    before: onnx.ModelProto, after: onnx.ModelProto, folders: tuple[str, str] | None = None
) -> list[Difference]:
    """Everything in which ``after`` is not ``before``, in the order of onnx.proto; explained ones have a ``why``.

    ``folders`` are where the data files of the two lie; without them external data are equal if their places are.
    Attribute numbers compare by their bits. The walk keeps its own stack, so only memory bounds the depth of nesting,
    and holds one tensor's elements at a time; data files are mapped. Raises ``OSError`` for a data file that is
    missing.
    """
    walk = _Walk(folders)
    walk.run(before, after)
    return walk.found


class _Place(NamedTuple):
    """An address that shares its beginning with its neighbours': deep nesting would make it long."""

    before: _Place | None
    word: str

    def __truediv__(self, word: str) -> _Place:
        return _Place(self, word)

    def text(self) -> str:
        words = []
        place: _Place | None = self
        while place is not None:
            words.append(place.word)
            place = place.before
        return "/".join(word for word in reversed(words) if word)


class _Walk:
    def __init__(self, folders: tuple[str, str] | None) -> None:
        self.found: list[Difference] = []
        self._folders = folders
        self._waiting: list[tuple[_Place, Any, Any]] = []
        self._six_bits = False

    def run(self, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
        self._waiting = [(_Place(None, ""), before, after)]
        while self._waiting:
            start = len(self._waiting) - 1
            self._messages(*self._waiting.pop())
            self._waiting[start:] = reversed(self._waiting[start:])  # the first is to be the next
        if before.ir_version != after.ir_version:
            lowered = (before.ir_version, after.ir_version) == (14, 13) and not self._six_bits
            versions = f"ir_version is {after.ir_version}, was {before.ir_version}"
            self._say(_Place(None, ""), versions, Explained.IR_VERSION if lowered else None)

    def _say(self, place: _Place, what: str, why: Explained | None = None) -> None:
        self.found.append(Difference(place.text(), what, why))

    def _messages(self, place: _Place, old: Any, new: Any) -> None:
        """Two messages of one kind: by the rules of their fields, else field by field."""
        rules = _RULES.get(old.DESCRIPTOR.name, {})
        fields = {field.name: field for message in (old, new) for field, _ in message.ListFields()}
        done: list[Callable[..., None]] = []
        for name in sorted(fields, key=lambda name: fields[name].index):
            rule = rules.get(name)
            if rule is None:
                self._field(place, fields[name], old, new)
            elif rule not in done:  # several fields may have one rule
                rule(self, place, old, new)
                done.append(rule)
        unknown = [[(field.field_number, field.data) for field in UnknownFieldSet(message)] for message in (old, new)]
        if unknown[0] != unknown[1]:
            self._say(place, f"has {len(unknown[1])} fields that onnx does not know, had {len(unknown[0])}")

    def _field(self, place: _Place, field: Any, old: Any, new: Any) -> None:
        name = field.name
        a, b = getattr(old, name), getattr(new, name)
        if isinstance(a, int | float | str | bytes):
            if name in _TYPE_FIELDS:
                self._six_bits |= a in _SIX_BITS
            present = old.HasField(name), new.HasField(name)
            if _bits(a) != _bits(b):
                self._say(place, f"{name} is {_shown(b)}, was {_shown(a)}")
            elif present[0] != present[1]:
                optional = field.containing_oneof is None or a == ""
                how = "is given and was not" if present[1] else "is not given and was"
                self._say(place, f"{name} {how}: {_shown(a)}", Explained.DEFAULT if optional else None)
        elif field.message_type is None:
            self._scalars(place, name, a, b)
        elif hasattr(a, "DESCRIPTOR"):
            self._one(place, name, old, new)
        else:
            self._several(place, name, a, b)

    def _scalars(self, place: _Place, name: str, old: Sequence[Any], new: Sequence[Any]) -> None:
        if len(old) != len(new):
            self._say(place, f"{name} has {len(new)} entries, had {len(old)}")
        elif unlike := [index for index, (a, b) in enumerate(zip(old, new, strict=True)) if _bits(a) != _bits(b)]:
            first = unlike[0]
            also = f" ({len(unlike)} entries differ)" if len(unlike) > 1 else ""
            self._say(place, f"{name}[{first}] is {_shown(new[first])}, was {_shown(old[first])}{also}")

    def _one(self, place: _Place, name: str, old: Any, new: Any) -> None:
        if old.HasField(name) and new.HasField(name):
            inner = place if name in ("graph", "type", "g", "t") else place / name
            self._waiting.append((inner, getattr(old, name), getattr(new, name)))
        elif old.HasField(name) or new.HasField(name):
            self._say(place, f"has a {name}, had none" if new.HasField(name) else f"has no {name}, had one")

    def _several(self, place: _Place, name: str, old: Sequence[Any], new: Sequence[Any]) -> None:
        if len(old) != len(new):
            self._say(place, f"has {len(new)} {name}, had {len(old)}")
            return
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            self._waiting.append((place / _word(name, a, index), a, b))

    def _named(
        self,
        place: _Place,
        what: str,
        old: Iterable[Any],
        new: Iterable[Any],
        key: Callable[[Any], str],
        lone: Callable[[Any, bool], Explained | None] = lambda item, is_new: None,
        says: Callable[[Any], Any] = lambda item: item.SerializeToString(deterministic=True),
    ) -> Iterator[tuple[str, Any, Any]]:
        """Pairs of those with one name; says what only one side has, unless ``lone`` explains it, and of their order.

        What is there more often on one side is a difference unless it ``says`` the same each time.
        """
        sides = [_grouped(items, key) for items in (old, new)]
        for name in dict.fromkeys([*sides[0], *sides[1]]):
            a, b = (side.get(name, []) for side in sides)
            if not a or not b:
                only = f"{what} '{printable(name)}'"
                sentence = f"{only} was not there" if b else f"{only} is gone"
                reasons = [lone(item, bool(b)) for item in a or b]
                self._say(place, sentence, None if None in reasons else reasons[0])
                continue
            if len(a) != len(b):
                alike = all(says(item) == says(side[0]) for side in (a, b) for item in side)
                sentence = f"{what} '{printable(name)}' is there {len(b)} times, was {len(a)} times"
                self._say(place, sentence, Explained.REPEATED if alike else None)
            yield from ((name, x, y) for x, y in zip(a, b, strict=False))
        common = [[name for name in side if name in other] for side, other in (sides, sides[::-1])]
        if common[0] != common[1]:
            self._say(place, f"the order of {what} is another", Explained.ORDER)

    # Rules: for fields whose messages are found by name, or that may say the same in several ways ----------------

    def _ir_version(self, place: _Place, old: Any, new: Any) -> None:
        """Judged at the end, by what was met on the way."""

    def _opsets(self, place: _Place, old: Any, new: Any) -> None:
        sides = (old.opset_import, new.opset_import)
        for name, a, b in self._named(place, "operator set", *sides, key=_imported, says=lambda one: one.version):
            self._waiting.append((place / f"operator set '{printable(name)}'", a, b))

    def _domain(self, place: _Place, old: Any, new: Any) -> None:
        if old.domain != new.domain:
            why = Explained.DOMAIN if _short(old.domain) == _short(new.domain) else None
            self._say(place, f"domain is {_shown(new.domain)}, was {_shown(old.domain)}", why)
        elif old.HasField("domain") != new.HasField("domain"):
            self._say(place, "domain is given in one only, and is ''", Explained.DEFAULT)

    def _metadata(self, place: _Place, old: Any, new: Any) -> None:
        self._entries(place, "metadata", old.metadata_props, new.metadata_props)

    def _parameters(self, place: _Place, old: Any, new: Any) -> None:
        self._entries(place, "parameter", old.quant_parameter_tensor_names, new.quant_parameter_tensor_names)

    def _entries(self, place: _Place, what: str, old: Any, new: Any) -> None:
        for name, a, b in self._named(place, what, old, new, key=lambda entry: str(entry.key)):
            self._waiting.append((place / f"{what} {printable(name)}", a, b))

    def _initializers(self, place: _Place, old: Any, new: Any) -> None:
        for name, a, b in self._named(place, "initializer", _stored(old), _stored(new), key=_tensor_name):
            self._constants(place / f"initializer {printable(name)}", a, b)

    def _constants(self, place: _Place, old: Any, new: Any) -> None:
        """Two constants, each dense or sparse. The name of indices goes where they do."""
        if type(old) is type(new):
            self._waiting.append((place, old, new))
            return
        self._six_bits |= _values(old).data_type in _SIX_BITS
        kinds = [(_values(constant).data_type, list(constant.dims)) for constant in (old, new)]
        if kinds[0] != kinds[1]:
            self._say(place, f"has data_type and dims {kinds[1]}, had {kinds[0]}")
        elif not same_sparse(old, new):
            self._say(place, "has other elements")
        else:
            self._say(place, "is dense in one and sparse in the other", Explained.SPARSE)
        for a, b in ((_values(old), _values(new)), (_indices(old), _indices(new))):
            self._waiting.append((place, _labels(a), _labels(b)))

    def _value_info(self, place: _Place, old: Any, new: Any) -> None:
        tensors = {_tensor_name(item): item for item in _stored(old)}
        known = _defined(old) | tensors.keys()

        def lone(info: Any, is_new: bool) -> Explained | None:
            if info.name in tensors and _implied(info, tensors[info.name]):
                return Explained.IMPLIED
            return None if is_new or info.name in known else Explained.ELSEWHERE

        infos = (old.value_info, new.value_info)
        for name, a, b in self._named(place, "value_info", *infos, key=lambda info: str(info.name), lone=lone):
            self._waiting.append((place / f"value_info {printable(name)}", a, b))

    def _annotations(self, place: _Place, old: Any, new: Any) -> None:
        sides = (old.quantization_annotation, new.quantization_annotation)
        for name, a, b in self._named(place, "quantization annotation", *sides, key=lambda one: str(one.tensor_name)):
            self._waiting.append((place / f"annotation {printable(name)}", a, b))

    def _outputs(self, place: _Place, old: Any, new: Any) -> None:
        a, b = ([*node.output] for node in (old, new))
        if a != b and _without_end(a) == _without_end(b):
            self._say(place, f"has {len(b)} outputs, had {len(a)}", Explained.OMITTED)
        else:
            self._scalars(place, "output", a, b)

    def _attributes(self, place: _Place, old: Any, new: Any) -> None:
        sides = (old.attribute, new.attribute)
        names = [[attribute.name for attribute in side] for side in sides]
        if _is_constant(old) and names in _VALUES:
            self._values(place / "value", *(side[0] for side in sides))
            return
        for name, a, b in self._named(place, "attribute", *sides, key=lambda one: str(one.name)):
            self._six_bits |= name in _TYPE_ATTRIBUTES and a.i in _SIX_BITS
            self._waiting.append((place / printable(name), a, b))

    def _values(self, place: _Place, old: onnx.AttributeProto, new: onnx.AttributeProto) -> None:
        """The value of a Constant, dense in one and sparse in the other; name and type of the attributes say so."""
        self._constants(place, *(one.t if one.name == "value" else one.sparse_tensor for one in (old, new)))
        rest = onnx.AttributeProto(), onnx.AttributeProto()
        for one, copy in zip((old, new), rest, strict=True):
            copy.CopyFrom(one)
            for field in ("name", "type", "t" if one.name == "value" else "sparse_tensor"):
                copy.ClearField(field)
        self._waiting.append((place, *rest))

    def _defaults(self, place: _Place, old: Any, new: Any) -> None:
        sides = (old.attribute_proto, new.attribute_proto)
        for name, a, b in self._named(place, "default of", *sides, key=lambda one: str(one.name)):
            self._waiting.append((place / f"attribute {printable(name)}", a, b))

    def _elements(self, place: _Place, old: Any, new: Any) -> None:
        """The elements of two dense tensors, wherever they are stored."""
        here = [storage(tensor) for tensor in (old, new)]
        if None in here or (self._folders is None and "external_data" in here):
            for name in _STORAGE:  # in several places, or out of reach: as they are written
                self._field(place, old.DESCRIPTOR.fields_by_name[name], old, new)
        elif old.data_type == new.data_type and list(old.dims) == list(new.dims):  # else that was said
            if not same_elements(old, new, self._folders or ("", "")):
                self._say(place, "has other elements")
            elif here[0] != here[1] or _location(old) != _location(new):
                words = [field or "no field" for field in here]
                self._say(place, f"elements are in {words[1]}, were in {words[0]}", Explained.STORAGE)


_VALUES = ([["value"], ["sparse_value"]], [["sparse_value"], ["value"]])
_STORAGE = (*FIELDS, "external_data", "data_location")
_RULES: dict[str, dict[str, Callable[[_Walk, _Place, Any, Any], None]]] = {
    "ModelProto": {"ir_version": _Walk._ir_version, "opset_import": _Walk._opsets, "metadata_props": _Walk._metadata},
    "GraphProto": {
        "initializer": _Walk._initializers,
        "sparse_initializer": _Walk._initializers,
        "value_info": _Walk._value_info,
        "quantization_annotation": _Walk._annotations,
        "metadata_props": _Walk._metadata,
    },
    "FunctionProto": {
        "opset_import": _Walk._opsets,
        "attribute_proto": _Walk._defaults,
        "value_info": _Walk._value_info,
        "metadata_props": _Walk._metadata,
    },
    "NodeProto": {
        "output": _Walk._outputs,
        "domain": _Walk._domain,
        "attribute": _Walk._attributes,
        "metadata_props": _Walk._metadata,
    },
    "OperatorSetIdProto": {"domain": _Walk._domain},
    "ValueInfoProto": {"metadata_props": _Walk._metadata},
    "TensorAnnotation": {"quant_parameter_tensor_names": _Walk._parameters},
    "TensorProto": {"metadata_props": _Walk._metadata} | dict.fromkeys(_STORAGE, _Walk._elements),
}


def _bits(value: Any) -> Any:
    """What tells a number from another: 0.0 is not -0.0, and NaN is itself."""
    return (type(value), np.float64(value).tobytes()) if isinstance(value, float) else value


def _shown(value: Any) -> str:
    text = printable(value) if isinstance(value, str) else repr(value)
    text = text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."
    return f"'{text}'" if isinstance(value, str) else text


def _word(field: str, message: Any, index: int) -> str:
    """How an entry of a repeated field is called in an address: by its name, where it has one."""
    name = printable(getattr(message, "name", "") or "")
    if field == "node":
        return name or f"{printable(message.op_type)}#{index}"
    return f"{field} {name}" if name else f"{field}[{index}]"


def _grouped(items: Iterable[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _short(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _imported(opset: onnx.OperatorSetIdProto) -> str:
    return _short(opset.domain)


def _without_end(names: list[str]) -> list[str]:
    end = len(names)
    while end and not names[end - 1]:
        end -= 1
    return names[:end]


def _values(constant: Any) -> onnx.TensorProto:
    return constant if isinstance(constant, onnx.TensorProto) else constant.values


def _tensor_name(constant: Any) -> str:
    return str(_values(constant).name)


def _indices(constant: Any) -> onnx.TensorProto:
    return onnx.TensorProto() if isinstance(constant, onnx.TensorProto) else constant.indices


def _labels(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """What a tensor says besides its name, type, dims and elements."""
    return onnx.TensorProto(doc_string=tensor.doc_string, metadata_props=tensor.metadata_props)


def _stored(graph: Any) -> list[Any]:
    return [] if isinstance(graph, onnx.FunctionProto) else [*graph.initializer, *graph.sparse_initializer]


def _defined(graph: Any) -> set[str]:
    """The names of what a graph or function takes and computes; its outputs are among these."""
    takes = graph.input if isinstance(graph, onnx.FunctionProto) else [value.name for value in graph.input]
    return {*takes, *(name for node in graph.node for name in node.output)}


def _implied(info: onnx.ValueInfoProto, constant: Any) -> bool:
    """Whether ``info`` says no more of an initializer than that its tensor has this type, and maybe these dims."""
    said = onnx.ValueInfoProto(name=info.name)
    said.type.tensor_type.elem_type = _values(constant).data_type
    if info.type.tensor_type.HasField("shape"):
        said.type.tensor_type.shape.SetInParent()
        for dim in constant.dims:
            said.type.tensor_type.shape.dim.add().dim_value = dim
    return info == said


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and not _short(node.domain)


def _location(tensor: onnx.TensorProto) -> tuple[bool, list[tuple[str, str]]]:
    return tensor.HasField("data_location"), [(entry.key, entry.value) for entry in tensor.external_data]
