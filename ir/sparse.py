"""Sparse constants as ONNX stores them, values and their places: kept so from load to save, dense only where read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from .address import printable
from .errors import BadFile

DENSE_LIMIT = 1 << 30
"""Bytes that a sparse constant may take once dense: a few bytes of file can ask for any amount."""

_BLOCK = 1 << 20  # elements looked at together

Array = np.ndarray[Any, Any]


class SparseTensor(ir.LazyTensor):
    """A tensor whose elements are zero but for those that ``proto`` names; ``Constant.sparse_value`` and
    ``GraphProto.sparse_initializer`` hold such.

    ``nbytes`` is what it takes dense, ``stored_bytes`` what it takes in the file. ``numpy()`` makes it dense, each
    time it is asked, and raises ``BadFile`` past ``DENSE_LIMIT``. ``proto`` has values [n], and indices int64 [n]
    (row-major) or [n, rank] that are in the shape and all different; it is not copied.
    """

    __slots__ = ("proto",)

    def __init__(self, proto: onnx.SparseTensorProto) -> None:
        dtype, shape = ir.DataType(proto.values.data_type), ir.Shape(proto.dims, frozen=True)
        super().__init__(self._dense, dtype, shape, name=proto.values.name, doc_string=proto.values.doc_string or None)
        self.proto = proto

    @property
    def stored_bytes(self) -> int:
        """Bytes of the values and of their indices."""
        return int(math.ceil(self.dtype.itemsize * self.count) + 8 * math.prod(self.proto.indices.dims))

    @property
    def count(self) -> int:
        """How many elements are stored."""
        return int(self.proto.values.dims[0])

    def named(self, name: str) -> onnx.SparseTensorProto:
        """The protobuf under this name, to be written before it is asked for under another."""
        if self.proto.values.name != name:
            self.proto.values.name = name
        return self.proto

    def values(self) -> Array:
        """The stored elements [n], in file order."""
        return ir.serde.deserialize_tensor(self.proto.values).numpy()

    def places(self) -> Array:
        """Where they are in the flat tensor: int64 [n], row-major, in file order."""
        return np.concatenate([np.zeros(0, np.int64), *_places(self.proto)])

    def entries(self) -> tuple[Array, Array]:
        """Places, ascending, and values."""
        places, values = self.places(), self.values()
        if not np.all(places[1:] > places[:-1]):
            order = np.argsort(places)
            places, values = places[order], values[order]
        return places, values

    def reader(self) -> Callable[[int, int], Array]:
        """A function that makes the flat elements [start, stop), as large as the tensor may be."""
        places, values = self.entries()

        def read(start: int, stop: int) -> Array:
            block = np.zeros(stop - start, values.dtype)
            first, last = np.searchsorted(places, (start, stop))
            block[places[first:last] - start] = values[first:last]
            return block

        return read

    def _dense(self) -> ir.TensorProtocol:
        if max(self.nbytes, self.size) > DENSE_LIMIT:  # types under a byte take one each in memory
            raise BadFile(
                f"the sparse tensor '{printable(self.name or '')}' would take {self.nbytes} bytes dense, past the "
                f"limit of {DENSE_LIMIT}; it can be kept and saved as it is, but not computed with"
            )
        array = self.reader()(0, self.size).reshape(self.shape.numpy())
        return ir.Tensor(array, dtype=self.dtype, name=self.name)


def stored_bytes(tensor: ir.TensorProtocol) -> int:
    """Bytes that a tensor takes in a file: those of its entries, where it is sparse."""
    return tensor.stored_bytes if isinstance(tensor, SparseTensor) else int(tensor.nbytes)


def stand_in(number: int) -> str:
    """The location of an external tensor that keeps the place of a sparse one in a graph or protobuf.

    onnx_ir has no sparse constants, and no file can have this location.
    """
    return f"\0{number}"


def location_of(tensor: onnx.TensorProto) -> str:
    """The location of an external tensor's data; empty for others."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def put_back(proto: onnx.ModelProto, sparse: Mapping[str, SparseTensor]) -> None:
    """Write sparse tensors, by the locations of their stand-ins, into nodes and bodies; not the main graph's own."""
    waiting: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions] if sparse else []
    while waiting:
        graph = waiting.pop()
        for attribute in [attribute for node in graph.node for attribute in node.attribute]:
            waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            if (found := sparse.get(location_of(attribute.t))) is not None:
                attribute.sparse_tensor.CopyFrom(found.named(attribute.t.name))
                attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
                attribute.ClearField("t")
        if isinstance(graph, onnx.FunctionProto) or graph is proto.graph:
            continue
        for place in reversed(range(len(graph.initializer))):  # they are the last ones, mostly
            tensor = graph.initializer[place]
            if (found := sparse.get(location_of(tensor))) is not None:
                graph.sparse_initializer.add().CopyFrom(found.named(tensor.name))
                del graph.initializer[place]


def problem(proto: onnx.SparseTensorProto) -> str | None:
    """What is wrong with the entries of a sparse tensor whose values and indices are sound by themselves, as a clause.

    ONNX wants the indices in ascending order. Any order is taken here, as they have one meaning in any.
    """
    values, indices, dims = list(proto.values.dims), list(proto.indices.dims), list(proto.dims)
    if len(values) != 1 or indices not in (values, [*values, len(dims)]):
        return f"has values {values} and indices {indices}; expected [n] and [n] or [n, {len(dims)}]"
    index = _indices(proto)
    columns = index.T if index.ndim == 2 else index[None]
    limits = dims if index.ndim == 2 else [math.prod(dims)]
    if any(len(c) and (c.min() < 0 or c.max() >= limit) for c, limit in zip(columns, limits, strict=True)):
        return f"has an index outside its shape {dims}"
    if values[0] > math.prod(dims):  # of a scalar the columns say nothing
        return "gives the same element twice"
    last, ascending = -1, True
    for places in _places(proto):
        ascending = ascending and places[0] > last and bool(np.all(places[1:] > places[:-1]))
        last = int(places[-1])
    if not ascending:
        places = np.sort(SparseTensor(proto).places())
        if np.any(places[1:] == places[:-1]):
            return "gives the same element twice"
    return None


def _indices(proto: onnx.SparseTensorProto) -> Array:
    return ir.serde.deserialize_tensor(proto.indices).numpy()


def _places(proto: onnx.SparseTensorProto) -> list[Array]:
    """Places in the flat tensor, int64, a block at a time; none of them empty."""
    index, dims = _indices(proto), list(proto.dims)
    if index.ndim == 2:
        strides = np.array([math.prod(dims[axis + 1 :]) for axis in range(len(dims))] if len(index) else 0, np.int64)
        return [index[at : at + _BLOCK] @ strides for at in range(0, len(index), _BLOCK)]
    return [index[at : at + _BLOCK] for at in range(0, len(index), _BLOCK)]
