"""Types and shapes that follow from the operators, by ``onnx.shape_inference``, written onto the values of a model.

The inference gets a copy of the model's structure only, written straight in protobuf's wire format: values are
numbered, all but the smallest constants are inputs of their type and shape. So it costs no memory for weights and
rebuilds nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx
import onnx_ir as ir

from .apart import Gone, apart
from .calls import overgrown
from .constants import constant_tensor
from .packing.decoded import packed_values
from .scopes import Scope, scopes

Dims: TypeAlias = "tuple[int | str | None, ...]"
_INTEGERS, _FLOATS = 128, 16  # elements; no operator reads its output's shape from more
_CONTRADICTION = -1
_NO_NAMES = ("", "?", "-1", "None", "none")
_BYTES = [bytes((number,)) for number in range(128)]
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(frozen=True, slots=True)
class Inferred:
    """What inference says of a value; ``dims`` is None where even the rank is unknown."""

    type: ir.TypeProtocol
    dims: Dims | None


@dataclass(slots=True)
class Outcome:
    """How many values of each graph, by prefix, are better known now, and what was not believed."""

    improved: dict[str, int] = field(default_factory=dict)
    conflicts: list[tuple[str, str]] = field(default_factory=list)  # address, sentence
    failure: str | None = None


def infer_shapes(model: ir.Model) -> Outcome:
    """Write inferred types and shapes onto the values of the main graph and all bodies.

    A known type or dimension is never replaced, only refined: a number takes the place of a name, a name that of
    nothing. Values inside functions depend on the caller and stay as they are; so do those between a packed weight and
    its storage, of which there are many, and which nothing else reads.
    """
    outcome = Outcome()
    found = [scope for scope in scopes(model) if scope.function is None]
    inside = packed_values(model)
    wanted = {value: scope for scope in found for value in outputs(scope.graph) if value not in inside}
    if all(map(is_known, wanted)):
        return outcome
    try:
        answers = _infer(model, ())
        pins = [value for value in wanted if value.type and _is_better(value, answers.get(value))]
        if pins:  # what the file says and inference cannot see, so that it can go on from there
            answers = _infer(model, pins)
    except Exception as error:
        outcome.failure = str(error).strip().partition("\n")[0]
        return outcome
    for value, scope in wanted.items():
        answer = answers.get(value)
        if answer is not None:
            _refine(value, answer, scope, outcome)
    return outcome


def dims(value: ir.Value) -> Dims | None:
    """The shape of a value: a number, a name or None for each dimension."""
    return None if value.shape is None else tuple(map(_plain, value.shape))


def static_dims(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value whose every dimension is a known number; else None."""
    shape = value.shape
    if shape is None:
        return None
    sizes = tuple(shape)
    return sizes if all(type(size) is int for size in sizes) else None  # type: ignore[return-value]


def _plain(dim: int | ir.SymbolicDim) -> int | str | None:
    """Some exporters write -1 or ``?`` for a dimension that they do not know; two of these need not be equal."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return None if dim.value in _NO_NAMES else dim.value


def symbolic_dims(model: ir.Model) -> dict[ir.Value, Dims]:
    """Inferred shapes with the names that inference makes up: dimensions of one name are equal in every run.

    Empty where inference fails. Writes nothing.
    """
    try:
        found = _infer(model, (), invented=True)
    except Exception:
        return {}
    return {value: item.dims for value, item in found.items() if item.dims is not None}


def inferred(model: ir.Model) -> dict[ir.Value, Inferred]:
    """What inference says of each value, without writing it. Raises what ``onnx.shape_inference`` raises."""
    return _infer(model, ())


def outputs(graph: ir.Graph) -> Iterator[ir.Value]:
    """The outputs of nodes that are not left out."""
    return (value for node in graph for value in node.outputs if value.name != "")


def is_known(value: ir.Value) -> bool:
    """Whether the type and every dimension of ``value`` are known, if only by name."""
    shape = value.shape
    if shape is None or value.type is None:
        return False
    return all(_plain(dim) is not None for dim in shape)


def _is_better(value: ir.Value, found: Inferred | None) -> bool:
    """Whether the file knows more of a value, whose type it tells, than was inferred."""
    if found is None:
        return True
    known = dims(value)
    if known is None or found.dims is None:
        return known is not None
    return len(known) == len(found.dims) and any(
        isinstance(old, int) and not isinstance(new, int) for old, new in zip(known, found.dims, strict=True)
    )


def _refine(value: ir.Value, found: Inferred, scope: Scope, outcome: Outcome) -> None:
    known = dims(value)
    if known == found.dims and value.type == found.type:
        return
    if value.type is not None and value.type != found.type and value.dtype != ir.DataType.UNDEFINED:
        outcome.conflicts.append(
            (scope.address(value), f"the file says its type is {value.type}, its operator makes {found.type}")
        )
        return
    merged = _merged(known, found.dims)
    if merged is not None and _CONTRADICTION in merged:
        outcome.conflicts.append(
            (scope.address(value), f"the file says its shape is {_text(known)}, its operator makes {_text(found.dims)}")
        )
        return
    if value.type is not None and merged == known:
        return
    value.type = found.type
    if merged is not None and merged != known:
        value.shape = _shape(merged)
    outcome.improved[scope.prefix] = outcome.improved.get(scope.prefix, 0) + 1


@functools.lru_cache(1024)
def _shape(sizes: Dims) -> ir.Shape:
    """Frozen, for values of equal shape share it, as they do their tensors' shapes."""
    return ir.Shape(sizes, frozen=True)


def _merged(known: Dims | None, found: Dims | None) -> Dims | None:
    """The better known of each dimension; ``_CONTRADICTION`` among them where the two cannot both be true."""
    if known is None or found is None:
        return known if found is None else found
    if len(known) != len(found):
        return (_CONTRADICTION,)
    return tuple(map(_merge, known, found))


def _merge(known: int | str | None, found: int | str | None) -> int | str | None:
    if isinstance(known, int):
        return known if not isinstance(found, int) or found == known else _CONTRADICTION
    return found if isinstance(found, int) or known is None else known


def _text(sizes: Dims | None) -> str:
    return "?" if sizes is None else "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"


# Asking onnx --------------------------------------------------------------------------------------------------------


def _infer(model: ir.Model, pins: Iterable[ir.Value], invented: bool = False) -> dict[ir.Value, Inferred]:
    writer = _Writer(model)
    answer = _asked(writer.model(pins), len(writer.numbers))
    names = None if invented else writer.names
    return dict(_read(answer.graph, writer, names)) | writer.constants


def _asked(model: bytes, values: int) -> onnx.ModelProto:
    """What ``onnx.shape_inference`` answers, with values of integers followed where that ends.

    Following them it makes a list as long as any vector that is added, joined or cut: a vector of 2^62 elements, or
    one of 2^30 weights, takes all memory. Without, the shapes that come from such values stay unknown.
    """
    import onnx.shape_inference  # here, for a process that ends cannot keep it

    run = functools.partial(apart, given=model, seconds=20 + 1e-3 * values, room=(256 << 20) + 64 * len(model))
    try:
        answer = run(functools.partial(_native, True))
    except Gone:
        answer = run(functools.partial(_native, False))
    proto = onnx.ModelProto()
    proto.ParseFromString(answer)
    return proto


def _native(data_prop: bool, model: bytes) -> bytes:
    answer: bytes = onnx.onnx_cpp2py_export.shape_inference.infer_shapes(model, False, False, data_prop)
    return answer


def _read(graph: onnx.GraphProto, writer: _Writer, names: set[str] | None) -> Iterator[tuple[ir.Value, Inferred]]:
    """Many values have the same type and shape, so each distinct one is read once."""
    known: dict[bytes, Inferred | None] = {}
    stack = [graph]
    while stack:
        graph = stack.pop()
        for infos in (graph.value_info, graph.output):
            for info in infos:
                raw = info.type.SerializeToString()
                if raw not in known:
                    known[raw] = _inferred(info.type, names)
                found = known[raw]
                value = writer.value(info.name)
                if found is not None and value is not None:
                    yield value, found
        if writer.nested:
            for node in graph.node:
                for attribute in node.attribute:
                    stack += [attribute.g] if attribute.HasField("g") else attribute.graphs


def _inferred(proto: onnx.TypeProto, names: set[str] | None) -> Inferred | None:
    found = ir.serde.deserialize_type_proto_for_type(proto)
    if found is None:
        return None
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    if shape is None:
        return Inferred(found, None)
    plain = map(_plain, shape)
    return Inferred(found, tuple(d if isinstance(d, int) or names is None or d in names else None for d in plain))


class _Numbers(dict[ir.Value | None, bytes]):
    """The name of each value, after its length: eight digits, given when first asked for; none for one left out."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[ir.Value] = []

    def __missing__(self, value: ir.Value | None) -> bytes:
        found = b"\x00"
        if value is not None and value.name != "":
            found = b"\x08%08x" % len(self.listed)
            self.listed.append(value)
        self[value] = found
        return found


class _Writer:
    """The structure of a model in protobuf's wire format (onnx.proto3): a value is named by its number."""

    def __init__(self, model: ir.Model) -> None:
        self.source = model
        self.numbers = _Numbers()
        self.operators: dict[ir.OperatorIdentifier, bytes] = {}
        self.names: set[str] = set()  # of dimensions; the inference makes up more
        self.nested = False
        self.constants: dict[ir.Value, Inferred] = {}  # outputs of Constant nodes
        self.inputs: list[bytes] = []
        self.initializers: list[bytes] = []
        self.attributes: dict[object, bytes] = {}

    def value(self, name: str) -> ir.Value | None:
        return self.numbers.listed[int(name, 16)] if name else None

    def model(self, pins: Iterable[ir.Value]) -> bytes:
        model = self.source
        body = self.graph(model.graph, b"", [_chunk(13, self.info(value, True)) for value in pins])
        graph = b"".join((body, *self.inputs, *self.initializers))
        opsets = b"".join(
            _chunk(8, _chunk(1, domain.encode()) + _varint(0x10) + _varint(version))
            for domain, version in model.opset_imports.items()
        )
        functions = b"".join(
            _chunk(25, bytes(ir.serde.serialize_function(function).SerializeToString()))
            for function in (() if overgrown(model) else model.functions.values())
        )
        return b"\x08" + _varint(model.ir_version or 8) + _chunk(7, graph) + opsets + functions

    def graph(self, graph: ir.Graph, name: bytes, more: Iterable[bytes] = ()) -> bytes:
        parts = [_chunk(2, name or b"g")]
        parts += [_chunk(11, self.info(value, True)) for value in graph.inputs]
        for value in graph.initializers.values():
            if not value.is_graph_input():
                self.constant(value, value.const_value)
        for node in graph:
            if node.op_type == "Constant" and (tensor := constant_tensor(node.outputs[0])) is not None:
                self.constant(node.outputs[0], tensor)
                sizes = tuple(tensor.shape.numpy())
                self.constants[node.outputs[0]] = Inferred(ir.TensorType(tensor.dtype), sizes)
                continue
            parts.append(_chunk(1, self.node(node)))
        parts += [_chunk(12, self.info(value, False)) for value in graph.outputs]
        return b"".join((*parts, *more))

    def node(self, node: ir.Node) -> bytes:
        number = self.numbers.__getitem__
        key = node.op_identifier()
        operator = self.operators.get(key)
        if operator is None:
            domain, op_type, overload = (word.encode() for word in key)
            operator = self.operators[key] = _chunk(4, op_type) + _chunk(7, domain) + _chunk(8, overload)
        inputs = b"\x0a".join((b"", *map(number, node.inputs)))
        outputs = b"\x12".join((b"", *map(number, node.outputs)))
        attributes = [_chunk(5, self.attribute(attribute)) for attribute in node.attributes.data.values()]
        return b"".join((inputs, outputs, operator, *attributes))

    def attribute(self, attribute: ir.Attr) -> bytes:
        if attribute.type in _GRAPHS and not attribute.is_ref():
            self.nested = True
            name = _chunk(1, attribute.name.encode())
            if attribute.type == ir.AttributeType.GRAPH:
                return name + _chunk(6, self.graph(attribute.value, b"b")) + b"\xa0\x01\x05"
            return name + b"".join(_chunk(11, self.graph(body, b"b")) for body in attribute.value) + b"\xa0\x01\x0a"
        if attribute.type == ir.AttributeType.TENSOR:
            return _attribute(attribute)
        try:
            key = (attribute.name, attribute.type, attribute.value, attribute.ref_attr_name)
            known = self.attributes.get(key)
            if known is None:
                known = self.attributes[key] = _attribute(attribute)
            return known
        except TypeError:  # a value that does not hash
            return _attribute(attribute)

    def info(self, value: ir.Value, typed: bool) -> bytes:
        """A ValueInfoProto."""
        name = b"\x0a" + self.numbers[value]
        if not typed or value.type is None:
            return name
        self.names.update(size for size in dims(value) or () if isinstance(size, str))
        return name + _type(value.type, value.shape)

    def constant(self, value: ir.Value, tensor: ir.TensorProtocol | None) -> None:
        """Constants of all graphs become the main graph's, visible everywhere: a body's inputs are its own."""
        if tensor is None:
            self.inputs.append(_chunk(11, self.info(value, True)))
            return
        sizes, dtype, number = static_dims(value), tensor.dtype, self.numbers[value]
        if sizes is None:
            sizes = tuple(tensor.shape.numpy())
        if _may_tell_a_shape(dtype, sizes):
            head = b"".join(b"\x08" + _varint(size) for size in sizes) + b"\x10" + _varint(int(dtype))
            self.initializers.append(_chunk(5, head + b"\x42" + number + _chunk(9, tensor.tobytes())))
        else:
            self.inputs.append(_chunk(11, b"\x0a" + number + _tensor_type(dtype, sizes)))


@functools.lru_cache(1024)
def _may_tell_a_shape(dtype: ir.DataType, sizes: tuple[int, ...]) -> bool:
    """Whether an operator might read its output's shape from such a constant: from integers, or a list of scales."""
    if dtype.is_integer():
        return math.prod(sizes) <= _INTEGERS
    return dtype != ir.DataType.STRING and len(sizes) < 2 and math.prod(sizes) <= _FLOATS


@functools.lru_cache(1024)
def _tensor_type(dtype: ir.DataType, sizes: tuple[int, ...]) -> bytes:
    return _type(ir.TensorType(dtype), ir.Shape(sizes))


def _attribute(attribute: ir.Attr) -> bytes:
    return bytes(ir.serde.serialize_attribute(attribute).SerializeToString())


def _type(sort: ir.TypeProtocol, shape: ir.Shape | None) -> bytes:
    proto = onnx.ValueInfoProto()
    plain = None if shape is None else ir.Shape(map(_plain, shape))
    ir.serde.serialize_value_into(proto, ir.Value(name="", type=sort, shape=plain))
    return _chunk(2, bytes(proto.type.SerializeToString()))


def _varint(number: int) -> bytes:
    if 0 <= number < 128:
        return _BYTES[number]
    number &= (1 << 64) - 1  # as negative numbers are written
    parts = bytearray()
    while number >= 128:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _chunk(tag: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(tag << 3 | 2) + _varint(len(content)) + content
