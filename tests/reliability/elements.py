"""The elements of tensors as protobuf stores them: in one of its fields or in a data file, dense or sparse.

Written against onnx.proto, apart from how models are loaded: for judging, not for computing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

Array: TypeAlias = np.ndarray[Any, Any]

FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "raw_data", "double_data", "uint64_data")
"""The fields of TensorProto that may hold elements; a valid tensor has one of them, or external data."""

_PIECE = 1 << 20  # bytes compared at a time
_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.UINT2, TensorProto.INT2), 2),
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.FLOAT6E2M3, TensorProto.FLOAT6E3M2), 6),
    **dict.fromkeys((TensorProto.UINT16, TensorProto.INT16, TensorProto.FLOAT16, TensorProto.BFLOAT16), 16),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64, TensorProto.COMPLEX64), 64),
    TensorProto.COMPLEX128: 128,
}  # others, as bool, int8 and float8, take 8


def storage(tensor: TensorProto) -> str | None:
    """The field that holds the elements of ``tensor``: ``""`` where none does, ``None`` where several do."""
    used = [field.name for field, _ in tensor.ListFields() if field.name in FIELDS or field.name == "external_data"]
    if len(used) > 1 or ("external_data" in used) != (tensor.data_location == TensorProto.EXTERNAL):
        return None
    return used[0] if used else ""


def same_elements(a: TensorProto, b: TensorProto, folders: tuple[str, str] = ("", "")) -> bool:
    """Whether two tensors of one type and of the same dims hold the same bits, wherever each stores them.

    Bits after the last element, which fill a byte, do not count. ``folders`` hold the data files, which are mapped.
    Raises ``OSError`` where one is missing.
    """
    if "string_data" in (storage(a), storage(b)):
        return list(a.string_data) == list(b.string_data) and storage(a) == storage(b)
    old, new = (_stored(tensor, folder) for tensor, folder in zip((a, b), folders, strict=True))
    if old.size != new.size:
        return False
    spare = math.prod(a.dims) * _BITS.get(a.data_type, 8) % 8
    if spare and old.size:
        last = (1 << spare) - 1
        if (old[-1] ^ new[-1]) & last:
            return False
        old, new = old[:-1], new[:-1]
    pieces = range(0, old.size, _PIECE)
    return all(np.array_equal(old[start : start + _PIECE], new[start : start + _PIECE]) for start in pieces)


def same_sparse(a: TensorProto | onnx.SparseTensorProto, b: TensorProto | onnx.SparseTensorProto) -> bool:
    """Whether two constants of one type and of the same dims, dense or sparse, hold the same elements.

    An element that a sparse one does not name is zero bits. False where a sparse one names an element twice, or where
    its values and indices do not fit together, and for strings.
    """
    try:
        found = [sorted(_named_elements(constant)) for constant in (a, b)]
    except ValueError:
        return False
    return found[0] == found[1]


def _named_elements(constant: TensorProto | onnx.SparseTensorProto) -> Iterator[tuple[int, bytes]]:
    """The elements that are not zero bits, as (place in row-major order, bytes)."""
    dims = list(constant.dims)
    values = constant if isinstance(constant, TensorProto) else constant.values
    wide = _each(values)
    if isinstance(constant, TensorProto):
        places = np.arange(len(wide))
    else:
        raw = _stored(constant.indices, "").view("<i8")
        index = raw.reshape(list(constant.indices.dims))
        places = np.ravel_multi_index(tuple(index.T), dims) if index.ndim == 2 and index.size else index.reshape(-1)
    if len(places) != len(wide) or len(np.unique(places)) < len(places):
        raise ValueError("values and indices do not fit together")
    used = wide.any(axis=1)
    yield from zip(places[used].tolist(), map(bytes, wide[used]), strict=True)


def _each(tensor: TensorProto) -> Array:
    """uint8 [elements, bytes each]; those of less than 8 bits take a byte each."""
    count, bits = math.prod(tensor.dims), _BITS.get(tensor.data_type, 8)
    if tensor.data_type == TensorProto.STRING:
        raise ValueError("strings have no bits")
    stored = _stored(tensor, "")
    if bits < 8:
        unpacked = np.unpackbits(stored, bitorder="little")[: count * bits].reshape(count, bits)
        return np.packbits(unpacked, axis=1, bitorder="little")
    return stored.reshape(count, bits // 8)


def _stored(tensor: TensorProto, folder: str) -> Array:
    """The bytes of the elements, uint8, as ``raw_data`` would hold them."""
    field, bits = storage(tensor), _BITS.get(tensor.data_type, 8)
    if field == "external_data":
        return _mapped(tensor, folder)
    if field in ("raw_data", "", None):
        return np.frombuffer(tensor.raw_data, np.uint8)
    if field in ("float_data", "double_data"):
        return np.array(getattr(tensor, field), "<f4" if field == "float_data" else "<f8").view(np.uint8)
    wide = np.array(getattr(tensor, field), np.uint64 if field == "uint64_data" else np.int64)
    narrow = wide.astype(f"<u{min(max(bits // 8, 1), 8)}").view(np.uint8)
    if bits == 6:  # one an entry here, four in three bytes of raw_data
        return np.packbits(np.unpackbits(narrow, bitorder="little").reshape(-1, 8)[:, :6], bitorder="little")
    return narrow


def _mapped(tensor: TensorProto, folder: str) -> Array:
    keys = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = os.path.join(folder, keys.get("location", "")), int(keys.get("offset", "0"))
    size = (math.prod(tensor.dims) * _BITS.get(tensor.data_type, 8) + 7) // 8
    size = int(keys["length"]) if "length" in keys else size
    return np.memmap(path, np.uint8, "r", offset, (size,)) if size else np.empty(0, np.uint8)
