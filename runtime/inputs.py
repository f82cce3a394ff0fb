"""What a model asks of its inputs, and whether arrays fit: every misfit is a sentence before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.errors import BadFeeds, nearest
from ..ir.maps import has_map, held_type
from ..passes.base import Array

Feed = dict[str, Any]  # arrays by input name; lists for sequences, dicts for maps, None for empty optionals

BATCH = 64  # samples a run, where the model leaves the batch open


@dataclass(frozen=True)
class Input:
    """A model input. Dimensions are sizes, names, or ``None``; ``dims`` is ``None`` where the rank is not known."""

    name: str
    type: ir.TypeProtocol | None
    dims: tuple[int | str | None, ...] | None
    required: bool

    @classmethod
    def of(cls, value: ir.Value) -> Input:
        dims = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)
        return cls(value.name or "", value.type, dims, value.const_value is None)

    @property
    def dtype(self) -> ir.DataType | None:
        """The element type, or ``None`` for maps and sparse tensors."""
        form = held_type(self.type)
        return form.dtype if isinstance(form, ir.TensorType) and not self.mapped else None

    @property
    def optional(self) -> bool:
        return isinstance(self.type, ir.OptionalType)

    @property
    def mapped(self) -> bool:
        """Whether it is a map, or a sequence or optional of one."""
        return has_map(self.type)

    @property
    def sequence(self) -> bool:
        inner = self.type.elem_type if isinstance(self.type, ir.OptionalType) else self.type
        return isinstance(inner, ir.SequenceType)

    def axes(self) -> list[int | str]:
        """Its dimensions, each open one under a name; an open one without a name gets its own."""
        dims: tuple[int | str | None, ...] = (None, None) if self.dims is None else self.dims
        return [f"{self.name}.{axis}" if dim is None else dim for axis, dim in enumerate(dims)]

    def __str__(self) -> str:
        shape = (
            "" if self.dims is None or self.mapped else " " + _shape("?" if dim is None else dim for dim in self.dims)
        )
        dtype = dtype_name(self.dtype) if self.dtype else "map" if self.mapped else "of an unknown type"
        return f"'{self.name}' ({'sequence of ' if self.sequence else ''}{dtype}{shape})"


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    """Some exporters write an open dimension as -1 or ``?``, which is no name."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim.value if dim.value not in ("", "?") else None


def fit_all(given: Mapping[str, Any], place: str, inputs: Sequence[Input]) -> Feed:
    by_name = match_names(given, place, inputs)
    return {key: fit(value, by_name[key], place) for key, value in given.items()}


def match_names(given: Mapping[str, Any], place: str, inputs: Sequence[Input]) -> dict[str, Input]:
    by_name = {one.name: one for one in inputs}
    takes = ", ".join(map(str, inputs)) or "none"
    if unknown := [key for key in given if key not in by_name]:
        hint = nearest(unknown[0], by_name)
        raise BadFeeds(f"{place} has '{unknown[0]}', which is no input of the model.{hint} Its inputs are {takes}.")
    if missing := [one for one in inputs if one.required and not one.optional and one.name not in given]:
        raise BadFeeds(f"{place} has no array for the input {missing[0]}; it has {', '.join(given) or 'nothing'}.")
    return by_name


def fit(value: Any, wanted: Input, place: str, batch: bool = False) -> Any:
    """``value`` as a session takes it. ``batch``: its first axis counts samples, whatever the model's dimension."""
    if value is None and wanted.optional:
        return None
    if wanted.mapped:
        return _fit_map(value, wanted, place)
    if wanted.sequence:
        if not isinstance(value, list | tuple):
            raise BadFeeds(f"{place}: {wanted} takes a list of arrays, one list a run; a function can yield it.")
        return [_fit_array(np.asarray(item), wanted, None, place, False) for item in value]
    return _fit_array(np.asarray(value), wanted, wanted.dims, place, batch)


def _fit_map(value: Any, wanted: Input, place: str) -> Any:
    items = value if wanted.sequence and isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, Mapping) for item in items) or (wanted.sequence and items is not value):
        takes = "a list of dicts" if wanted.sequence else "a dict"
        raise BadFeeds(f"{place}: {wanted} takes {takes} a run; a function can yield it.")
    found = [dict(item) for item in items]
    return found if wanted.sequence else found[0]


def _fit_array(
    array: Array, wanted: Input, dims: tuple[int | str | None, ...] | None, place: str, batch: bool
) -> Array:
    array = _fit_dtype(array, wanted, place)
    if dims is not None:
        expected = (None, *dims[1:]) if batch else dims
        fits = len(expected) == array.ndim and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(expected, array.shape, strict=True)
        )
        if not fits:
            first = ", the first axis counting samples" if batch else ""
            raise BadFeeds(
                f"{place}: '{wanted.name}' has shape {_shape(array.shape)}; the model takes {wanted}{first}."
            )
    if array.dtype.kind in "fcV" and (nan := array != array).any():
        where = f" in sample {int(np.argwhere(nan)[0][0])}" if batch else ""
        raise BadFeeds(f"{place}: '{wanted.name}' holds NaN{where}; leave such samples out.")
    return array


def _fit_dtype(array: Array, wanted: Input, place: str) -> Array:
    if wanted.dtype is None:
        return array
    expected = wanted.dtype.numpy()
    if array.dtype == expected or (wanted.dtype is ir.DataType.STRING and array.dtype.kind in "UO"):
        return array.astype(object) if array.dtype.kind == "U" else array
    if array.dtype == np.dtype(f"V{expected.itemsize}") and expected.kind == "V":
        return array.view(expected)  # .npz keeps the bits of bfloat16 and its like, not the type
    name = dtype_name(wanted.dtype)
    found = "strings" if array.dtype.kind in "OUS" else array.dtype.name
    remedy = "" if wanted.dtype is ir.DataType.STRING else f"; convert it with .astype('{name}')"
    raise BadFeeds(f"{place}: '{wanted.name}' is {found}, the model takes {name}{remedy}.")


def common_length(batched: Mapping[str, Array], place: str) -> int:
    lengths = {key: len(array) for key, array in batched.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"'{key}' {length}" for key, length in lengths.items())
        remedy = "A folder of .npz files, one a run, takes arrays of any length."
        raise BadFeeds(f"{place}: the arrays hold unlike numbers of samples: {counts}. {remedy}")
    return next(iter(lengths.values()), 1)


def batch_size(inputs: Sequence[Input], place: str) -> tuple[int, bool]:
    """Samples a run, and whether the model insists on that number."""
    fixed = {one.name: one.dims[0] for one in inputs if one.dims and isinstance(one.dims[0], int)}
    if len(set(fixed.values())) > 1:
        sizes = ", ".join(f"'{name}' {size}" for name, size in fixed.items())
        remedy = "Give a folder of .npz files, one a run."
        raise BadFeeds(f"{place}: the model takes unlike numbers of samples a run: {sizes}. {remedy}")
    return (max(1, next(iter(fixed.values()))), True) if fixed else (BATCH, False)


def dtype_name(dtype: ir.DataType) -> str:
    return "string" if dtype is ir.DataType.STRING else dtype.numpy().name


def _shape(sizes: Iterable[int | str]) -> str:
    return f"[{','.join(map(str, sizes))}]"


def words(array: Array) -> str:
    return f"{array.dtype.name} {_shape(array.shape)}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
