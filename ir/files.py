"""Models from and to files: ``load`` refuses what it cannot trust or keep whole, ``save`` replaces or leaves alone."""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from .address import graphs, path_text, printable
from .atomic import Replacement, explained, reason_of, settle
from .diagnosis import diagnosis
from .errors import BadFile, PenjingError
from .external import DataFiles, MappedTensor
from .intake import Intake
from .interrupts import uninterrupted
from .layout import Layout, at, in_memory, plan, write_data, write_tensor
from .references import mark
from .sparse import location_of, put_back, stand_in
from .tensors import StoredTensor, standing_in, tensors
from .versions import saved_ir_version

LARGE = 3 << 29
"""Bytes. 1.5 GiB: a model whose tensors take more is saved with a data file, well before protobuf's limit."""

PROTOBUF_LIMIT = (1 << 31) - 1
"""Bytes that a protobuf message may take."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX model (protobuf). Its external data stay in their files, mapped; nothing else is opened.

    ``model.meta["penjing.path"]`` is the absolute path, ``model.meta["penjing.external"]`` a list of the paths of its
    data files. Sparse constants stay sparse. Type and shape of values that the graph does not have are left behind.

    Raises ``BadFile``, in a sentence: no such file, not ONNX, cut short, made for a newer onnx, broken or unsafe
    external data, a tensor whose data do not fit its type and shape, or something that the IR cannot keep.
    """
    path = path_text(path)
    place, absolute = printable(path), os.path.abspath(path)
    proto, intake = _admitted(absolute, place)
    with _undisturbed():
        try:
            model = ir.serde.deserialize_model(proto)
        except Exception as error:  # whatever onnx_ir raises on a broken model
            raise BadFile(place + diagnosis(proto, error)) from error
    _complete(model, proto, intake)
    model.meta["penjing.path"] = absolute
    locations = sorted({location for location, _, _ in intake.external})
    model.meta["penjing.external"] = [os.path.join(os.path.dirname(absolute), location) for location in locations]
    return model


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external: bool | None = None,
    then: Callable[[], None] | None = None,
) -> None:
    """Write a model so that ``path`` holds the old file or the whole new one, whatever happens on the way.

    ``external``: whether tensors of 1 KiB or more go to a data file ``PATH.<12 hex>.data``; None: if the model came
    with one, or they take more than 1.5 GiB. Tensors are computed, read and written one at a time. Data files of
    ``path`` that the new model does not name are removed, and so is what a killed save left. Shapes, axes, scales of
    Resize and the like stay in the model, whatever their size. ``then`` is called when the file is in place, before an
    interrupt can come between. Saving a model over the file that it was loaded from is safe, and it stays usable.

    The model is not changed. Operator sets are kept; the IR version is kept between what the contents need and 13 (see
    ``versions.saved_ir_version``). The same model gives the same bytes.

    The new files have the permissions of the one at ``path``, if there is one. A symbolic link there is replaced, and
    what it points to stays as it is. Processes that save over one path at the same time do so one after another.

    Raises ``BadFile``: the folder is missing or cannot be written, the disk is full, ``path`` is a folder, a device,
    write-protected or a data file of this model, or the part that must be inside the model passes protobuf's 2 GiB.
    """
    path = path_text(path)
    target = os.path.abspath(path)
    require_apart(model, path)
    with _writing(path), Replacement(target) as replacement:
        layout = plan(model, external, LARGE)
        store, location = None, ""
        if layout.slots:
            store = replacement.temporary()
            with store:
                location = f"{replacement.name}.{write_data(store, layout.slots)}.data"
                settle(store)
        file = replacement.temporary()
        with file:
            _compose(model, layout, location).write(file)
            settle(file)
        with uninterrupted():
            replacement.commit(file, store, location)
            if then is not None:
                then()


def require_apart(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Raise ``BadFile`` where writing the file ``path`` would destroy weights of the file that ``model`` is from."""
    held = (tensor.path for _, tensor in tensors(model) if isinstance(tensor, ir.ExternalTensor))
    if os.path.realpath(path) in map(os.path.realpath, dict.fromkeys([*model.meta.get("penjing.external", ()), *held])):
        raise BadFile(f"{printable(os.fspath(path))} holds weights of the model that is to be saved; name another file")


def disk_bytes(model: ir.Model, path: str | os.PathLike[str]) -> int:
    """Bytes of the file ``path`` that ``model`` was read from, and of the data files that it names."""
    external = (tensor.path for _, tensor in tensors(model) if isinstance(tensor, ir.ExternalTensor))
    return sum(os.path.getsize(file) for file in dict.fromkeys([os.fspath(path), *map(os.fspath, external)]))


def saved_bytes(model: ir.Model, path: str | os.PathLike[str] = "model.onnx") -> int:
    """The bytes that ``save(model, path)`` would write, model and data file; lazy tensors are not computed.

    With a data file its name, and so that of ``path``, counts once a tensor. Tensors in bodies and attributes of nodes,
    which are mostly small, are serialized on the way.
    """
    layout = plan(model, None, LARGE)
    location = f"{os.path.basename(os.fspath(path))}.{'0' * 12}.data"
    return _compose(model, layout, location).size + layout.data_bytes


def _admitted(path: str, place: str) -> tuple[onnx.ModelProto, Intake]:
    """The file and its data files, checked; read again where it was replaced meanwhile, which takes its data away."""
    tries = 10
    while True:
        before, tries = _identity(path), tries - 1
        proto = _parse(path, place)
        intake = Intake(place, DataFiles(os.path.dirname(path), place))
        try:
            intake.admit(proto)
        except BadFile:
            if not tries or _identity(path) == before:
                raise
        else:
            return proto, intake


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _parse(path: str, place: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        # NONBLOCK: opening a pipe must not wait.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_size(os.fstat(handle), place)
            with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                start = bytes(view[:2])
                proto.ParseFromString(view)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise BadFile(f"{place} does not exist") from None
    except OSError as error:
        raise BadFile(f"{place} cannot be read: {reason_of(error)}") from None
    except DecodeError as error:
        raise BadFile(place + _undecodable(start, str(error))) from None
    return proto


def _check_size(found: os.stat_result, place: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise BadFile(f"{place} is {what}; expected an ONNX file")
    if found.st_size == 0:
        raise BadFile(f"{place} is empty; expected an ONNX file")
    if found.st_size > PROTOBUF_LIMIT:
        raise BadFile(
            f"{place} has {found.st_size} bytes; an ONNX file has at most {PROTOBUF_LIMIT}, and larger models keep "
            "their tensors in external data"
        )


def _undecodable(start: bytes, reason: str) -> str:
    # A model starts with its IR version: the tag of field 1, then a small number.
    if len(start) < 2 or start[0] != 8 or not 0 < start[1] < 32:
        return " is not an ONNX file"
    if "MaxDepth" in reason or "recursion" in reason.lower():
        return " nests its graphs or types deeper than protobuf reads (100 messages)"
    return " is damaged or cut short: its protobuf does not decode"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let onnx_ir build a graph or a protobuf without two interruptions.

    Nothing is dropped on the way, so looking for garbage would be a third of the time for nothing; nor is what was
    built young, as the collector would take it to be. And what onnx_ir logs of broken models, with their names as they
    stand, ``verify`` says with the names escaped.
    """
    collecting, log = gc.isenabled(), logging.getLogger("onnx_ir.serde")
    level = log.level
    gc.disable()
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        if collecting:
            if not gc.get_freeze_count():  # else unfreezing would undo the caller's own freeze
                gc.freeze()
                gc.unfreeze()  # the two move all objects to the oldest generation, without a walk over them
            gc.enable()


def _complete(model: ir.Model, proto: onnx.ModelProto, intake: Intake) -> None:
    """What onnx_ir leaves out or would write twice."""
    for function, kept in zip(proto.functions, model.functions.values(), strict=True):
        described = {info.name: info for info in function.value_info}
        for value in kept.inputs:
            if value.name in described:
                ir.serde.deserialize_value_info_proto(described[value.name], value)
    for _, graph in graphs(model):
        for value in graph.initializers.values():
            if type(value.const_value) is ir.TensorProtoTensor:
                raw, own = value.const_value.raw, value.shape
                fits = (
                    own is not None and own.frozen and own == tuple(raw.dims)
                )  # the file may say another for the value
                value.const_value = StoredTensor(raw, own if fits else None)
    if intake.annotated:
        mark(model)
    if not intake.external and not intake.labelled and not intake.sparse:
        return
    for holder, tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor) and (sparse := intake.sparse.get(os.fspath(tensor.location))):
            holder.put(sparse)
        elif isinstance(tensor, ir.ExternalTensor):
            bytes_ = intake.external[os.fspath(tensor.location), tensor.offset or 0, tensor.nbytes]
            holder.put(MappedTensor(tensor, intake.files.folder, bytes_))
        elif isinstance(tensor, ir.TensorProtoTensor):
            del tensor.raw.metadata_props[:]  # the tensor has its own copy, and both would be written


@dataclass(frozen=True)
class _Composition:
    """A model file in parts: bytes, and tensors whose bytes come between them; ``size`` is the whole in bytes."""

    parts: list[bytes | ir.TensorProtocol]

    @property
    def size(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.parts)

    def write(self, file: BinaryIO) -> None:
        if self.size > PROTOBUF_LIMIT:
            raise BadFile(_too_large(f"takes {self.size} bytes"))
        for part in self.parts:
            if isinstance(part, bytes):
                file.write(part)
            else:
                write_tensor(file, part)


def _compose(model: ir.Model, layout: Layout, location: str) -> _Composition:
    """Serialize the model without its larger tensors, then put the main graph's back, to be written one by one.

    Their place in the file is by the wire format: a field is a tag, a length and contents, in any order.
    """
    pairs = [(holder, at(location, slot.offset, holder, slot.tensor)) for holder, slot in layout.external]
    pairs += [(holder, at("", 0, holder, tensor)) for holder, tensor in layout.streamed]
    sparse = {stand_in(number): tensor for number, (_, tensor) in enumerate(layout.sparse)}
    pairs += [
        (holder, at(stand_in(number), 0, holder, tensor)) for number, (holder, tensor) in enumerate(layout.sparse)
    ]
    with standing_in([*pairs, *((holder, in_memory(tensor)) for holder, tensor in layout.returned)]):
        proto = _skeleton(model)
    put_back(proto, sparse)
    streamed = {holder.owner.name: tensor for holder, tensor in layout.streamed}
    initializers: list[bytes | ir.TensorProtocol] = []
    for tensor in proto.graph.initializer:
        contents = streamed.get(tensor.name)
        if sparse and (set_aside := sparse.get(location_of(tensor))) is not None:
            whole = set_aside.named(tensor.name).SerializeToString(deterministic=True)
            initializers += [_head(_SPARSE_INITIALIZER, len(whole)), whole]
        elif contents is None:
            whole = tensor.SerializeToString(deterministic=True)
            initializers.append(_head(_INITIALIZER, len(whole)) + whole)
        else:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            start = tensor.SerializeToString(deterministic=True) + _head(_RAW_DATA, contents.nbytes)
            initializers += [_head(_INITIALIZER, len(start) + contents.nbytes) + start, contents]
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    length = _Composition([graph, *initializers]).size
    start = proto.SerializeToString(deterministic=True) + _head(_GRAPH, length) + graph
    return _Composition([start, *initializers])


_GRAPH, _INITIALIZER, _SPARSE_INITIALIZER, _RAW_DATA = (
    message.DESCRIPTOR.fields_by_name[name].number << 3 | 2
    for message, name in (
        (onnx.ModelProto, "graph"),
        (onnx.GraphProto, "initializer"),
        (onnx.GraphProto, "sparse_initializer"),
        (onnx.TensorProto, "raw_data"),
    )
)
"""Tags of length-delimited fields."""


def _head(tag: int, length: int) -> bytes:
    """A field's tag and the length of what follows, as base-128 varints."""
    out = bytearray([tag])
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out)


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    for prefix, graph in graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise BadFile(f"initializer '{printable(prefix + name)}' has no value; give it one or make it an input")
    for function in model.functions.values():
        for name in function.graph.initializers:
            raise BadFile(
                f"function '{printable(function.name)}' holds the initializer '{printable(name)}', which ONNX does not "
                "allow; use a Constant node"
            )
    stamped = model.ir_version
    try:
        with _undisturbed():
            model.ir_version = saved_ir_version(model)  # decides where the types in functions go
            proto = ir.serde.serialize_model(model)
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, PenjingError | OSError):  # from a lazy tensor
            raise cause from error
        raise BadFile(f"the model cannot be serialized: {printable(str(cause))}") from error
    finally:
        model.ir_version = stamped
    _drop_implied(proto.graph)
    return proto


def _drop_implied(graph: onnx.GraphProto) -> None:
    """Take out the value_info of initializers, which onnx_ir writes first and which their tensors say already."""
    inputs, implied = {value.name for value in graph.input}, 0
    names = [tensor.name for tensor in graph.initializer if tensor.name not in inputs]
    for name, info in zip(names, graph.value_info, strict=False):
        if info.name != name or info.doc_string or info.metadata_props:
            break
        implied += 1
    del graph.value_info[:implied]


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """Turn what goes wrong into a sentence that names the file being saved."""
    try:
        with explained(path):
            yield
    except (BadFile, EncodeError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        reason = str(error) if isinstance(error, BadFile) else _too_large("cannot be serialized")
        raise BadFile(f"{printable(path)} cannot be written: {reason}") from error


def _too_large(found: str) -> str:
    return (
        f"the model without its external data {found}, past the {PROTOBUF_LIMIT} of protobuf; save it with external "
        "data, and turn large constants in bodies into initializers of the main graph"
    )
