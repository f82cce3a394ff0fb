"""What a protobuf must be before an IR is built from it: one cheap walk that refuses in a sentence what is broken,
and what the IR would drop in silence. Sparse constants, which it lacks, are set aside here and put back after."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

import onnx
import onnx.defs
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from .address import printable
from .diagnosis import named
from .errors import BadFile
from .external import Bytes, DataFiles
from .sparse import SparseTensor, problem, stand_in

MOST = 100_000
"""Initializers, inputs or outputs of one graph, and attributes of one node: no exporter writes as many, and more would
take memory and time out of proportion to the file."""

MOST_DIMS = 32
"""What every numpy takes."""

_BITS = {kind.value: kind.bitwidth for kind in ir.DataType if kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING)}
_PARTS: dict[int, int] = {TensorProto.COMPLEX64: 2, TensorProto.COMPLEX128: 2}
_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
}
_PLAIN = frozenset(
    {
        AttributeProto.FLOAT,
        AttributeProto.INT,
        AttributeProto.STRING,
        AttributeProto.FLOATS,
        AttributeProto.INTS,
        AttributeProto.STRINGS,
        AttributeProto.TYPE_PROTO,
        AttributeProto.TYPE_PROTOS,
    }
)
T = TypeVar("T")
_Described = ModelProto | GraphProto | NodeProto | TensorProto | onnx.FunctionProto | onnx.ValueInfoProto
_DIGITS = re.compile(r"[0-9]{1,19}")


class Intake:
    """The walk over one model. After ``admit``:

    ``external`` holds the bytes of each external tensor, by (location, offset, length in bytes); ``sparse`` the sparse
    tensors, each by the location of the external tensor that stands in for it, which no file can have;
    ``labelled`` tells that a tensor has metadata of its own, ``annotated`` that there are quantization annotations.
    """

    def __init__(self, place: str, files: DataFiles) -> None:
        self.place = place
        self.files = files
        self.external: dict[tuple[str, int, int], Bytes] = {}
        self.sparse: dict[str, SparseTensor] = {}
        self.labelled = self.annotated = False
        self._ir_version = 0

    def admit(self, proto: ModelProto) -> None:
        """Refuse, or make ready for ``onnx_ir``: sparse constants set aside, the domain ``ai.onnx`` by its short name.

        Raises ``BadFile``.
        """
        self._model(proto)
        waiting = [proto.graph]
        for function in proto.functions:
            waiting += self._function(function)
        while waiting:  # not recursion: only memory bounds the depth
            waiting += self._graph(waiting.pop())

    def _refuse(self, sentence: str) -> NoReturn:
        raise BadFile(f"{self.place}{sentence}")

    def _text(self, texts: Sequence[str]) -> None:
        try:
            "".join(texts)
        except TypeError:  # protobuf hands over as bytes what does not decode
            first = next(text for text in texts if not isinstance(text, str))
            self._refuse(f": {first!r} is not UTF-8, which names, keys and descriptions must be")

    def _model(self, proto: ModelProto) -> None:
        if not proto.HasField("graph") or not proto.HasField("ir_version"):
            missing = "IR version" if proto.HasField("graph") else "graph"
            self._refuse(f" is not a whole ONNX model: it holds no {missing}; it may be cut short")
        version, newest = proto.ir_version, int(onnx.IR_VERSION)
        self._ir_version = version
        if not 3 <= version <= newest:
            age = "newer" if version > newest else "older"
            self._refuse(
                f" has IR version {version}, {age} than any that is understood (3 to {newest}, onnx {onnx.__version__})"
            )
        if proto.training_info:
            self._refuse(
                " holds training information (training_info), which would be lost; export it for inference, or "
                "delete that field"
            )
        if not proto.opset_import:
            self._refuse(" is not a whole ONNX model: it names no operator set (opset_import); it may be cut short")
        self._text([proto.producer_name, proto.producer_version, proto.domain, proto.doc_string])
        self._text([entry.domain for entry in proto.opset_import] + _entries(proto))
        self._opsets(proto.opset_import)
        self._unique_keys(proto.metadata_props, "the model")
        if proto.configuration and version < 11:
            self._refuse(f" has device configurations, which need IR version 11; it has {version}")
        names = [(function.domain, function.name, function.overload) for function in proto.functions]
        self._text([text for name in names for text in name])
        if len(set(names)) < len(names):
            self._refuse(f" defines the function '{printable('::'.join(_twice(names)[:2]))}' twice")

    def _opsets(self, imports: Iterable[onnx.OperatorSetIdProto]) -> None:
        found: dict[str, int] = {}
        for entry in imports:
            if entry.domain == "ai.onnx":  # the long name of the same domain; nodes are kept under the short one
                entry.domain = ""
            if found.setdefault(entry.domain, entry.version) != entry.version:
                self._refuse(
                    f" imports two versions of the operator set '{printable(entry.domain)}': "
                    f"{found[entry.domain]} and {entry.version}"
                )
        if found.get("", 1) < 1:
            self._refuse(f" uses operator set {found['']}; operator sets count from 1, so the file is damaged")
        newest = onnx.defs.onnx_opset_version()
        if found.get("", 0) > newest:
            self._refuse(
                f" uses operator set {found['']}, newer than the {newest} of the installed onnx {onnx.__version__}; "
                "upgrade onnx"
            )

    def _function(self, function: onnx.FunctionProto) -> list[GraphProto]:
        where = f"function '{printable(function.name)}'"
        self._text([function.doc_string, *function.input, *function.output, *function.attribute, *_entries(function)])
        self._text([entry.domain for entry in function.opset_import])
        self._text(_info_texts(function.value_info))
        self._text([attribute.name for attribute in function.attribute_proto])
        self._text(_node_texts(function.node))
        self._opsets(function.opset_import)
        self._unique_keys(function.metadata_props, where)
        self._unique(function.input, "input", where)
        self._unique([*function.attribute, *(a.name for a in function.attribute_proto)], "attribute", where)
        inner: list[GraphProto] = []
        for attribute in function.attribute_proto:
            inner += self._attribute(attribute, where)
        return inner + self._nodes(function.node)

    def _graph(self, graph: GraphProto) -> list[GraphProto]:
        self._text([graph.name, graph.doc_string, *_entries(graph)])
        for infos in (graph.input, graph.output, graph.value_info):
            self._text(_info_texts(infos))
        self._text([annotation.tensor_name for annotation in graph.quantization_annotation])
        self._text(_node_texts(graph.node))
        where = f"graph '{printable(graph.name)}'"
        for what, things in (("initializers", graph.initializer), ("inputs", graph.input), ("outputs", graph.output)):
            if len(things) > MOST:
                self._refuse(f": {where} has {len(things):,} {what}; at most {MOST:,} are supported")
        for tensor in graph.initializer:
            self._tensor(tensor)
        if graph.sparse_initializer:
            for sparse in graph.sparse_initializer:
                self._set_aside(sparse, graph.initializer.add())
            del graph.sparse_initializer[:]
        names = [tensor.name for tensor in graph.initializer]
        if not all(names):
            self._refuse(f": an initializer of {where} has no name, so nothing can use it; name or delete it")
        self._unique(names, "initializer", where)
        self._unique([value.name for value in graph.input], "input", where)
        for value in (*graph.input, *graph.output):
            if value.type.HasField("opaque_type"):
                self._refuse(f": '{printable(value.name)}' of {where} has an opaque type, which would be lost")
        self._unique_keys(graph.metadata_props, where)
        if graph.quantization_annotation:
            self._annotations(graph, where)
        return self._nodes(graph.node)

    def _annotations(self, graph: GraphProto, where: str) -> None:
        self.annotated = True
        names = [annotation.tensor_name for annotation in graph.quantization_annotation]
        # onnx_ir itself writes an annotation twice where an input or initializer is also an output.
        unlike = {annotation.SerializeToString(deterministic=True) for annotation in graph.quantization_annotation}
        if len(unlike) > len(set(names)):
            self._refuse(f": {where} has two unlike quantization annotations of one value")
        known = {value.name for value in (*graph.input, *graph.initializer)}
        known.update(name for node in graph.node for name in node.output)
        for name in names:  # one of an outer graph would be lost
            if name not in known:
                self._refuse(f": {where} annotates '{printable(name)}' (quantization_annotation), which it lacks")

    def _nodes(self, nodes: Sequence[NodeProto]) -> list[GraphProto]:
        inner: list[GraphProto] = []
        devices = self._ir_version >= 11
        for node in nodes:
            if not node.op_type:
                empty = sum(not node.op_type for node in nodes)
                self._refuse(f": {empty} of {len(nodes)} nodes have no operator type; the file is damaged")
            if attributes := node.attribute:
                if len(attributes) > MOST:
                    self._refuse(f": {named(node)} has {len(attributes):,} attributes; at most {MOST:,} are supported")
                if len(attributes) > 1:
                    self._unique([attribute.name for attribute in attributes], "attribute", node)
                for attribute in attributes:
                    if attribute.type not in _PLAIN:
                        inner += self._attribute(attribute, node)
            if node.metadata_props:
                self._unique_keys(node.metadata_props, node)
            if node.device_configurations and not devices:
                self._refuse(f": {named(node)} has device configurations, which need IR version 11")
        return inner

    def _attribute(self, attribute: AttributeProto, owner: NodeProto | str) -> Sequence[GraphProto]:
        kind = attribute.type
        if attribute.ref_attr_name or kind in _PLAIN:
            return ()
        if kind == AttributeProto.TENSOR:
            self._tensor(attribute.t)
        elif kind == AttributeProto.TENSORS:
            for tensor in attribute.tensors:
                self._tensor(tensor)
        elif kind == AttributeProto.GRAPH:
            return (attribute.g,)
        elif kind == AttributeProto.GRAPHS:
            return tuple(attribute.graphs)
        elif kind == AttributeProto.SPARSE_TENSOR and isinstance(owner, NodeProto) and owner.op_type == "Constant":
            self._set_aside(attribute.sparse_tensor, attribute.t)
            attribute.ClearField("sparse_tensor")
            attribute.name, attribute.type = "value", AttributeProto.TENSOR
        else:
            kind_name = AttributeProto.AttributeType.Name(kind) if kind else "no"
            self._refuse(
                f": attribute '{printable(attribute.name)}' of {named(owner)} has {kind_name} type, "
                "which the IR cannot hold"
            )
        return ()

    def _tensor(self, tensor: TensorProto) -> None:
        self._text((tensor.name, tensor.doc_string))
        if tensor.metadata_props:
            self.labelled = True
            self._text(_entries(tensor))
            self._unique_keys(tensor.metadata_props, f"tensor '{printable(tensor.name)}'")
        count, size = self._extent(tensor.name, tensor.dims, tensor.data_type)
        if tensor.data_location == TensorProto.EXTERNAL:
            self._external(tensor, size)
            return
        if tensor.HasField("segment"):
            self._refuse(f": tensor '{printable(tensor.name)}' is one segment of several, which is not supported")
        if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
            found, expected, unit = len(tensor.raw_data), size, "bytes"
        else:
            found, expected, unit = _stored(tensor, count, size)
        if found != expected:
            kind = TensorProto.DataType.Name(tensor.data_type)
            self._refuse(
                f": tensor '{printable(tensor.name)}', {kind}{list(tensor.dims)}, holds {found} {unit} where "
                f"{expected} are expected; the file is damaged"
            )

    def _extent(self, name: str, dims: Sequence[int], kind: int) -> tuple[int, int]:
        """Elements and bytes of a tensor: -> (count, size); the size of strings is 0."""
        if kind not in _BITS and kind != TensorProto.STRING:
            self._refuse(f": tensor '{printable(name)}' has data type {kind}, which onnx {onnx.__version__} lacks")
        if len(dims) > MOST_DIMS:
            self._refuse(f": tensor '{printable(name)}' has {len(dims)} dimensions; at most {MOST_DIMS} are supported")
        bits = _BITS.get(kind, 8)
        count = math.prod(dims)
        span = count or math.prod(dim for dim in dims if dim)  # numpy bounds the shape of an empty array, too
        if (dims and min(dims) < 0) or span * bits >= 1 << 66:  # 2^63 bytes
            self._refuse(f": tensor '{printable(name)}' has the impossible shape {list(dims)}")
        return count, 0 if kind == TensorProto.STRING else (count * bits + 7) // 8

    def _external(self, tensor: TensorProto, size: int) -> None:
        name = printable(tensor.name)
        if tensor.data_type == TensorProto.STRING:
            self._refuse(f": tensor '{name}' keeps strings in a data file, which ONNX does not allow")
        self._text([text for entry in tensor.external_data for text in (entry.key, entry.value)])
        keys = {entry.key: entry.value for entry in tensor.external_data}
        for key in ("offset", "length"):
            text = keys.get(key, "0")
            if not _DIGITS.fullmatch(text) or int(text) >= 1 << 63:
                self._refuse(
                    f": tensor '{name}' has the {key} '{printable(text)}'; expected a count of bytes below 2^63"
                )
        length = int(keys.get("length", size))
        if length != size:
            kind = TensorProto.DataType.Name(tensor.data_type)
            self._refuse(
                f": tensor '{name}', {kind}{list(tensor.dims)}, takes {size} bytes, but its external data have "
                f"the length {length}"
            )
        location, offset = keys.get("location", ""), int(keys.get("offset", "0"))
        self.external[location, offset, size] = self.files.part(tensor.name, location, offset, size)

    def _set_aside(self, sparse: SparseTensorProto, dense: TensorProto) -> None:
        """Keep ``sparse``, and let ``dense`` stand in for it with its name, type and shape."""
        name, dims, values, indices = sparse.values.name, sparse.dims, sparse.values, sparse.indices
        self._text((name,))
        where = f"sparse tensor '{printable(name)}'"
        count, _ = self._extent(name, dims, values.data_type)
        if values.data_type == TensorProto.STRING or indices.data_type != TensorProto.INT64:
            self._refuse(f": {where} must have numbers for values and int64 indices")
        if TensorProto.EXTERNAL in (values.data_location, indices.data_location):
            self._refuse(f": {where} keeps its data in a file, which is not supported; make it dense")
        self._tensor(values)
        self._tensor(indices)
        if count >= 1 << 63:
            self._refuse(f": {where} has the impossible shape {list(dims)}")
        if reason := problem(sparse):
            self._refuse(f": {where} {reason}")
        location = stand_in(len(self.sparse))
        self.sparse[location] = SparseTensor(sparse)
        dense.name, dense.data_type, dense.data_location = name, values.data_type, TensorProto.EXTERNAL
        dense.dims.extend(dims)
        dense.external_data.add(key="location", value=location)

    def _unique(self, names: Sequence[str], what: str, owner: NodeProto | str) -> None:
        if len(set(names)) < len(names):
            self._refuse(f": {named(owner)} has the {what} '{printable(_twice(names))}' twice")

    def _unique_keys(self, entries: Sequence[onnx.StringStringEntryProto], owner: NodeProto | str) -> None:
        if len(entries) > 1:
            self._unique([entry.key for entry in entries], "metadata key", owner)


def _node_texts(nodes: Iterable[NodeProto]) -> list[str]:
    """What needs a check; not what is plain ASCII on the wire, texts and all, which protobuf tells ten times faster."""
    texts: list[str] = []
    for node in nodes:
        if not node.attribute and node.SerializeToString().isascii():
            continue
        texts += (node.name, node.op_type, node.domain, node.overload, node.doc_string)
        texts += node.input
        texts += node.output
        for attribute in node.attribute:
            texts += (attribute.name, attribute.ref_attr_name, attribute.doc_string)
        if node.metadata_props:
            texts += _entries(node)
    return texts


def _info_texts(infos: Iterable[onnx.ValueInfoProto]) -> list[str]:
    texts: list[str] = []
    for info in infos:
        texts += (info.name, info.doc_string)
        if (tensor := info.type.tensor_type).HasField("shape") and not tensor.HasField("elem_type"):
            tensor.elem_type = 0  # its default, UNDEFINED: a shape without a type would not be written
        if info.metadata_props:
            texts += _entries(info)
        if not info.type.SerializeToString().isascii():
            texts += _type_texts(info.type)
    return texts


def _type_texts(kind: onnx.TypeProto) -> Iterator[str]:
    """Denotations and the names of dimensions."""
    yield kind.denotation
    for tensor in (kind.tensor_type, kind.sparse_tensor_type):
        for dim in tensor.shape.dim:
            yield dim.dim_param
            yield dim.denotation
    for field, inner in (("sequence_type", "elem_type"), ("optional_type", "elem_type"), ("map_type", "value_type")):
        if kind.HasField(field):
            yield from _type_texts(getattr(getattr(kind, field), inner))


def _entries(message: _Described) -> list[str]:
    return [text for entry in message.metadata_props for text in (entry.key, entry.value)]


def _stored(tensor: TensorProto, count: int, size: int) -> tuple[int, int, str]:
    """Entries in the typed field of a tensor: -> (found, expected, unit). int4 and int2 are packed there."""
    kind = tensor.data_type
    if kind == TensorProto.STRING:
        return len(tensor.string_data), count, "strings"
    if kind in _FIELDS:
        return len(getattr(tensor, _FIELDS[kind])), count * _PARTS.get(kind, 1), "entries"
    return len(tensor.int32_data), size if _BITS[kind] in (2, 4) else count, "entries"


def _twice(names: Sequence[T]) -> T:
    seen: set[T] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("the caller saw a repetition")
