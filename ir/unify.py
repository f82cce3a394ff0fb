"""Types and dimensions of several models as one: names that stand for equal sizes, and numbers that some of them are.

A named dimension belongs to its model: ``batch`` of two models are two dimensions until something says that they are
one. ONNX Runtime plans memory by the names, so two that may differ must not share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import onnx_ir as ir

from .address import printable
from .maps import held_type
from .scopes import scopes, values
from .shapes import Dims, dims

Named: TypeAlias = "tuple[int, str]"  # the number of the model, and the name that it gives the dimension
Dim: TypeAlias = "int | Named | None"


class Misfit(Exception):
    """What keeps a value from taking the place of another, as a clause."""


class Symbols:
    """Which named dimensions of several models are one, by union-find."""

    def __init__(self) -> None:
        self._parents: dict[Named, int | Named] = {}

    def unify(self, giver: tuple[int, ir.Value], taker: tuple[int, ir.Value]) -> None:
        """Let the dimensions of two values, each with the number of its model, be one. Raises ``Misfit``, and is as
        it was, where types, ranks or sizes differ."""
        if reason := unlike_types(giver[1].type, taker[1].type):
            raise Misfit(reason)
        one, two = dims(giver[1]), dims(taker[1])
        if one is None or two is None:
            return
        if len(one) != len(two):
            raise Misfit(f"one has {len(one)} dimensions, the other {len(two)}")
        kept = dict(self._parents)
        try:
            for axis, pair in enumerate(zip(one, two, strict=True)):
                self._join(_own(giver[0], pair[0]), _own(taker[0], pair[1]), axis)
        except Misfit:
            self._parents = kept
            raise

    def find(self, dim: Dim) -> Dim:
        """A number, or the dimension that stands for all that are one with ``dim``."""
        while isinstance(dim, tuple) and dim in self._parents:
            dim = self._parents[dim]
        return dim

    def _join(self, one: Dim, two: Dim, axis: int) -> None:
        first, second = self.find(one), self.find(two)
        if first is None or second is None or first == second:
            return
        if isinstance(first, int) and isinstance(second, int):
            raise Misfit(f"dimension {axis} is {_said(one, first)} in one and {_said(two, second)} in the other")
        if isinstance(second, int) or (isinstance(first, tuple) and first > second):
            first, second = second, first  # the earlier model's name stays, and a number stays in any case
        assert isinstance(second, tuple)
        self._parents[second] = first

    def write(self, models: Sequence[tuple[str, ir.Model]]) -> list[tuple[str, str]]:
        """Write onto the values of all models what their dimensions are called now.

        A name that another dimension of an earlier model has becomes ``model/name``. Returns what became a number: the
        name of the model and a sentence.
        """
        shown: dict[Dim, str] = {}
        taken: set[str] = set()
        fixed: dict[tuple[str, str], str] = {}
        for number, (name, model) in enumerate(models):
            for value in _all_values(model):
                found = dims(value)
                if found is None or not any(isinstance(dim, str) for dim in found):
                    continue
                new = [dim if not isinstance(dim, str) else self.find((number, dim)) for dim in found]
                for old, dim in zip(found, new, strict=True):
                    if isinstance(dim, tuple) and dim not in shown:
                        shown[dim] = _free(dim[1] if dim[0] == number else str(old), name, taken)
                    elif isinstance(old, str) and isinstance(dim, int):
                        sentence = f"its dimension '{printable(old)}' is {dim} now, for what it is joined with is so"
                        fixed.setdefault((name, old), sentence)
                written = [shown[dim] if isinstance(dim, tuple) else dim for dim in new]
                if written != list(found):
                    _write(value, written)
        return [(name, sentence) for (name, _), sentence in fixed.items()]


def unlike_types(one: ir.TypeProtocol | None, two: ir.TypeProtocol | None) -> str | None:
    """How two types differ, as a clause; ``None`` where they do not, or one is not known."""
    if one is None or two is None or one == two:
        return None
    if isinstance(one, ir.TensorType) and isinstance(two, ir.TensorType):
        if ir.DataType.UNDEFINED in (one.dtype, two.dtype):
            return None
        return f"one is {dtype_name(one.dtype)}, the other {dtype_name(two.dtype)}"
    return f"one is {_kind(one)}, the other {_kind(two)}"


def described(value: ir.Value) -> str:
    """Type and shape of a value: ``float32 [batch, 10]``."""
    kind = value.type
    if kind is None:
        return "of unknown type"
    if not isinstance(kind, ir.TensorType):
        return _kind(kind)
    known = dims(value)
    shape = "" if known is None else f" [{', '.join('?' if dim is None else printable(str(dim)) for dim in known)}]"
    return dtype_name(kind.dtype) + shape


def dtype_name(dtype: ir.DataType) -> str:
    """An element type as numpy calls it."""
    return {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}.get(dtype, dtype.name.lower())


def _kind(kind: ir.TypeProtocol) -> str:
    if isinstance(kind, ir.TensorType):
        return f"a tensor of {dtype_name(kind.dtype)}"
    sequence, optional = (isinstance(kind, one) for one in (ir.SequenceType, ir.OptionalType))
    word = "a sequence" if sequence else "an optional" if optional else "a map"
    held = held_type(kind)
    return f"{word} of {dtype_name(held.dtype)}" if isinstance(held, ir.TensorType) else word


def _own(model: int, dim: int | str | None) -> Dim:
    return (model, dim) if isinstance(dim, str) else dim


def _said(dim: Dim, size: int) -> str:
    return f"'{printable(dim[1])}', which is {size}," if isinstance(dim, tuple) else str(size)


def _free(wanted: str, member: str, taken: set[str]) -> str:
    name, number = wanted, 0
    while name in taken:
        name = f"{member}/{wanted}" if not number else f"{member}/{wanted}_{number}"
        number += 1
    taken.add(name)
    return name


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Those of the main graph and its bodies, inputs first; dimensions in functions are the callers' affair."""
    for scope in scopes(model):
        if scope.function is None:
            yield from values(scope.graph)


def _write(value: ir.Value, new: Dims | list[int | str | None]) -> None:
    shape = value.shape
    assert shape is not None
    kept = [old if dim is None else dim for old, dim in zip(shape, new, strict=True)]  # '?' stays as it is
    value.shape = ir.Shape(kept, [shape.get_denotation(axis) for axis in range(len(kept))])
