"""Where each tensor's bytes go when a model is saved, and writing them one tensor at a time."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

import numpy as np
import onnx_ir as ir
import xxhash

from .address import printable
from .errors import BadFile
from .external import MappedTensor
from .ops import Kind
from .sparse import SparseTensor
from .tensors import Holder, is_external, tensors
from .trace import Tracer

INLINE_BELOW = 1 << 10
"""Bytes. Smaller tensors stay in the model: a reference to a data file would take a tenth of that, and a read."""

CONSTANT_FROM = 1 << 20
"""Bytes. Tensors of Constant nodes from here on need not stay in the model, which is serialized as a whole."""

PAGE, STEP, WASTE = 64 << 10, 64, 16
"""A tensor starts at a multiple of the largest power of two that is at most a ``WASTE``-th of its bytes, between
``STEP`` (a cache line, so that any element type is aligned) and ``PAGE`` (which every system can map, as ONNX asks).

So from 1 MiB on tensors lie at multiples of 64 KiB, from 64 KiB on at multiples of a 4 KiB page, and padding is less
than a sixteenth of the tensors, whatever their sizes; where most bytes are in large tensors it is next to nothing."""

PIECE = 128 << 10
"""Bytes digested and written in one go: small enough to stay in the core's own cache between the two."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place in the data file; ``offset`` in bytes."""

    tensor: ir.TensorProtocol
    offset: int


@dataclass
class Layout:
    """What goes where; no tensor that is in none of these needs care: onnx_ir writes it into the model.

    ``slots`` are the data file in order, ``external`` the holders whose tensors are there (several may share a slot),
    ``streamed`` the main graph's initializers that are written into the model one by one, and ``returned`` those that
    came from a data file and now go into the model. ``sparse`` ones stay sparse, in the model.
    """

    slots: list[Slot] = field(default_factory=list)
    external: list[tuple[Holder, Slot]] = field(default_factory=list)
    streamed: list[tuple[Holder, ir.TensorProtocol]] = field(default_factory=list)
    returned: list[tuple[Holder, ir.TensorProtocol]] = field(default_factory=list)
    sparse: list[tuple[Holder, SparseTensor]] = field(default_factory=list)

    @property
    def data_bytes(self) -> int:
        """The data file's length; 0 if there is none."""
        return self.slots[-1].offset + self.slots[-1].tensor.nbytes if self.slots else 0


def plan(model: ir.Model, external: bool | None, large: int) -> Layout:
    """Lay out a model. ``external``: whether there is a data file; None: if the model came with one, or its tensors
    take more than ``large`` bytes. Then it holds the initializers of ``INLINE_BELOW`` bytes or more; the tensors of
    nodes stay in the model, unless they came from a data file or take more than ``large`` bytes together, and those of
    Constant nodes from ``CONSTANT_FROM`` bytes on. Shapes, axes, scales of Resize and the like stay in the model
    whatever their size.
    """
    layout = Layout()
    held: list[tuple[Holder, ir.TensorProtocol]] = []
    for holder, tensor in tensors(model):
        if type(tensor) is SparseTensor:
            layout.sparse.append((holder, tensor))
        else:
            held.append((holder, tensor))
    if external is None:
        external = (
            bool(model.meta.get("penjing.external"))
            or any(is_external(tensor) for _, tensor in held)
            or sum(tensor.nbytes for _, tensor in held) > large
        )
    in_nodes = sum(tensor.nbytes for holder, tensor in held if holder.attribute)
    tracer = Tracer(model)
    slots: dict[object, Slot] = {}
    for holder, tensor in held:
        came = is_external(tensor)
        small = tensor.nbytes < INLINE_BELOW or tensor.dtype == ir.DataType.STRING
        large_constant = tensor.nbytes >= CONSTANT_FROM and _is_constant(holder.owner)
        movable = not holder.attribute or came or in_nodes > large or large_constant
        if external and not small and movable and not _is_setting(holder, tensor, tracer):
            key = _storage(tensor)
            if key not in slots:
                slots[key] = Slot(tensor, _start(layout.data_bytes, tensor.nbytes))
                layout.slots.append(slots[key])
            layout.external.append((holder, slots[key]))
        elif not small and not holder.attribute and holder.graph is model.graph:
            layout.streamed.append((holder, tensor))
        elif came:
            layout.returned.append((holder, tensor))
    return layout


def write_data(file: BinaryIO, slots: list[Slot]) -> str:
    """Write a data file, a tensor at a time; -> 12 hex digits that stand for its contents."""
    digested = _Digested(file)
    for slot in slots:
        digested.write(bytes(slot.offset - digested.tell()))
        write_tensor(digested, slot.tensor)
    return digested.hex()


class Sink(Protocol):
    """What tensors are written to."""

    def write(self, data: bytes | memoryview, /) -> object: ...

    def tell(self) -> int: ...


def write_tensor(file: Sink, tensor: ir.TensorProtocol) -> None:
    """Write a tensor's bytes as ONNX stores them: little endian, types under a byte packed.

    A lazy one is computed here; one with its own ``tofile`` may write itself in parts. Raises ``BadFile`` if it is not
    as large as it says.
    """
    start = file.tell()
    if isinstance(tensor, ir.LazyTensor) and type(tensor).tofile is not ir.LazyTensor.tofile:
        tensor.tofile(file)
    else:
        file.write(_bytes(tensor))
    if file.tell() - start != tensor.nbytes:
        raise BadFile(
            f"tensor '{printable(tensor.name or '')}' gave {file.tell() - start} bytes where its type and shape, "
            f"{tensor.dtype}{list(tensor.shape)}, take {tensor.nbytes}; what made it is wrong"
        )


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    """A tensor's bytes, without a copy where they lie in memory as ONNX wants them."""
    if isinstance(tensor, MappedTensor):
        return tensor.data.data
    if isinstance(tensor, ir.TensorProtoTensor) or tensor.dtype.bitwidth < 8 or sys.byteorder == "big":
        return memoryview(tensor.tobytes())
    array = np.ascontiguousarray(tensor.numpy())
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.reshape(-1).view(np.uint8).data


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same tensor with its values in memory."""
    return ir.Tensor(
        np.array(tensor.numpy()),
        dtype=tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def at(location: str, offset: int, holder: Holder, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """A reference to the tensor's bytes in the file ``location``; nothing is read through it."""
    name = tensor.name if holder.attribute else holder.owner.name
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _is_setting(holder: Holder, tensor: ir.TensorProtocol, tracer: Tracer) -> bool:
    """Whether an operator takes its shape, axes, scales or the like from it, if only in a body or through a function.

    Shape inference, of onnx and in ONNX Runtime, reads these from the model and refuses those of a data file. They are
    lists or single numbers.
    """
    if tensor.shape.rank() > 1:
        return False
    if isinstance(holder.owner, ir.Value):
        value = holder.owner
    elif _is_constant(holder.owner):
        value = holder.owner.outputs[0]
    else:
        return False
    uses, _ = tracer.uses(value, tensor)
    return any(use.kind is Kind.SHAPE for use in uses)


def _is_constant(owner: ir.Value | ir.Node) -> bool:
    return isinstance(owner, ir.Node) and owner.op_type == "Constant" and owner.domain == ""


def _storage(tensor: ir.TensorProtocol) -> object:
    """What two holders must agree in to share bytes: the same tensor, or the same part of a mapped file."""
    if isinstance(tensor, MappedTensor):
        return (tensor.data.ctypes.data, tensor.data.size)
    return id(tensor)


def _start(end: int, size: int) -> int:
    step = min(PAGE, max(STEP, 1 << (size // WASTE).bit_length() - 1))
    return -(-end // step) * step


class _Digested:
    """A file that digests what is written to it (XXH3, which is quicker than writing), to tell data files apart.

    A piece is digested and written while it is in the core's cache.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written = 0
        self._digest = xxhash.xxh3_128()

    def tell(self) -> int:
        return self._written

    def write(self, data: bytes | memoryview, /) -> None:
        view = memoryview(data)
        for start in range(0, view.nbytes, PIECE):
            piece = view[start : start + PIECE]
            self._digest.update(piece)
            self._file.write(piece)
        self._written += view.nbytes

    def hex(self) -> str:
        return self._digest.hexdigest()[:12]
