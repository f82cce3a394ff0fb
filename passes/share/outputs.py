"""Shared values chosen for what a layer computes: its inputs' second moments carry each error on (``gptq``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses
from ...ir.storage import Array
from ...ir.trace import Use
from ...ir.weights import Weight
from ..answers import answers
from ..base import Context, Feeds
from ..gptq import Moments, Rows
from ..gram import Gram, in_its_layout
from .clustering import Codebook

_WIDEST = 4608  # inputs that a layer contracts: moments take 8 bytes times the square of that
_MEMORY = 512 << 20  # bytes of moments, and their factors, that are held at a time: of the narrowest layers
_LARGEST = 128 << 20  # bytes of a weight, which is held in memory when it has been chosen
_TOGETHER = 1 << 21  # elements that errors are carried in at a time
_POSITIONS = 64  # of each sample
_LEAST = 1e-3  # of the mean energy of elements: what few inputs, all zero so far, may still meet


@dataclass(frozen=True, eq=False)
class Outputs:
    """How a weight is read as rows, and the moments of what they are multiplied with."""

    rows: Rows
    moments: Moments

    @property
    def energy(self) -> Array:
        """The moment of the input that each element meets, with mean 1, broadcasting over the stored weight."""
        found: Array = self.moments.diagonal / self.moments.diagonal.mean() + _LEAST
        shape, groups = self.rows.shape, len(found)
        if self.rows.output_axis:
            return found.T
        return np.repeat(found, shape[0] // groups if groups > 1 else 1, axis=0).reshape(-1, *shape[1:])

    def apply(self, array: Array, books: Sequence[Codebook], group: int | None = None) -> Array:
        """The weight with each element one of the values of ``books``, of which there is one for each ``group`` of
        output channels, or one for all. Zeros stay zero."""
        weight = self.rows.of(array)
        groups, rows, width = weight.shape
        unit = group if group and len(books) > 1 else 1
        step = max(1, _TOGETHER // (width * unit)) * unit if groups == 1 else rows  # rows do not depend on others
        made = np.empty(weight.shape, books[0].values.dtype)
        for start in range(0, rows, step):
            part = weight[:, start : start + step].astype(np.float64)
            nearest = books[0].nearest if len(books) == 1 else _by_rows(books[start // unit :], unit)
            made[:, start : start + step] = self._carried(part, nearest)
        return self.rows.back(made)

    def each(self, array: Array, books: Sequence[Codebook]) -> Iterator[Array]:
        """The weight with the values of one of ``books`` after another."""
        weight = self.rows.of(array).astype(np.float64)
        rows, step = weight.shape[1], max(1, _TOGETHER // max(1, weight.size))
        if weight.size > _TOGETHER:
            yield from (self.apply(array, [book]) for book in books)
            return
        for first in range(0, len(books), step):
            some = books[first : first + step]

            def nearest(wanted: Array, some: Sequence[Codebook] = some) -> Array:
                parts = np.split(wanted, len(some), axis=1)
                return np.concatenate([book.nearest(part) for book, part in zip(some, parts, strict=True)], axis=1)

            made = self._carried(np.tile(weight, (1, len(some), 1)), nearest)
            for place, book in enumerate(some):
                yield self.rows.back(made[:, place * rows : (place + 1) * rows].astype(book.values.dtype))

    def _carried(self, weight: Array, nearest: Callable[[Array], Array]) -> Array:
        """``weight`` in values that ``nearest`` takes for wanted ones, [G, N] or [G, N, K]; zeros stay zero."""
        zero = weight == 0

        def take(inputs: Array, wanted: Array) -> Array:
            found = nearest(wanted)
            found[np.take_along_axis(zero, inputs[:, None, None], axis=2)[..., 0]] = 0
            return found

        return self.moments.carried(weight, np.where(zero, 0, nearest(weight)), take)

    def noise(self, array: Array, made: Array) -> float:
        """The energy of the error in the outputs over that of the outputs."""
        whole = self.rows.of(array).astype(np.float64)
        signal = float(self.moments.energy(whole).sum())
        return float(self.moments.energy(whole - self.rows.of(made)).sum()) / signal if signal else 0.0


def _by_rows(books: Sequence[Codebook], group: int) -> Callable[[Array], Array]:
    """A function from wanted values [G, N, ...] to the nearest, of one of ``books`` for each ``group`` of all rows."""

    def nearest(wanted: Array) -> Array:
        flat = wanted.reshape(wanted.shape[0] * wanted.shape[1], -1)
        parts = [flat[first : first + group] for first in range(0, len(flat), group)]
        found = [book.nearest(part) for book, part in zip(books, parts, strict=False)]
        return (found[0] if len(found) == 1 else np.concatenate(found)).reshape(wanted.shape)

    return nearest


def outputs(
    model: ir.Model, found: Sequence[Weight], ctx: Context, feeds: Feeds | None = None
) -> dict[Weight, Outputs | str]:
    """For each weight the outputs that it is read for; or why they are not known, in a clause.

    One sweep over the sample data, or ``feeds``, answers all. Raises ``NeedsData`` without data.
    """
    places = addresses(model)
    known: dict[Weight, Outputs | str] = {}
    asked: dict[Weight, list[Gram]] = {}
    room = _MEMORY
    for weight in sorted(found, key=_width):
        rows = _rows(weight, places)
        if isinstance(rows, str):
            known[weight] = rows
        elif weight.nbytes > _LARGEST:
            known[weight] = f"it takes more than {_LARGEST >> 20} MiB"
        elif (need := 8 * rows.groups * _width(weight) ** 2 * (len(weight.uses) + 1)) > room:
            known[weight] = f"{_MEMORY >> 20} MiB do not hold the moments of its inputs too"
        else:
            room -= need
            asked[weight] = [_point(use, weight, places) for use in weight.uses]
    if not asked:
        return known
    told, reasons = answers(model, dict.fromkeys(point for own in asked.values() for point in own), ctx, feeds)
    for weight, own in asked.items():
        rows = _rows(weight, places)
        assert isinstance(rows, Rows)
        reason = next((reasons[point] for point in own if point in reasons), None)
        known[weight] = reason or _outputs(weight, rows, [told[point] for point in own])
    return known


def _point(use: Use, weight: Weight, places: Mapping[Any, str]) -> Gram:
    data = 1 - use.port
    return Gram.of(places[use.node.inputs[data]], use.node, data, weight.shape[2:], _POSITIONS)


def _outputs(weight: Weight, rows: Rows, found: Sequence[Any]) -> Outputs | str:
    if any(one.total is None for one in found):
        return "no sample reaches it"
    total = np.sum([one.total for one in found], axis=0)
    if total.shape[-1] != _width(weight):
        return "its input channels are not those of its input"
    if not total.any() or not np.isfinite(total).all():
        return "its inputs are all zero" if np.isfinite(total).all() else "its inputs are too large"
    scale = np.diagonal(total, axis1=1, axis2=2).mean()  # what follows asks for ratios, which may not overflow
    return Outputs(rows, Moments(total / scale, sum(one.count for one in found)))


def _width(weight: Weight) -> int:
    """How many inputs its layer contracts, as far as its shape and axes tell."""
    axis = weight.axes()[0]
    return weight.size // weight.shape[axis] if axis is not None else weight.size


def _rows(weight: Weight, places: Mapping[Any, str]) -> Rows | str:
    """How the weight is read as rows; or why it cannot be."""
    axes, kinds = weight.axes(), {use.node.op_identifier()[:2] for use in weight.uses}
    if None in axes or not all(_contracted(use, places) for use in weight.uses):
        return "which inputs it meets is not known"
    if not all(in_its_layout(use) for use in weight.uses):
        return "it is stored in another layout than its layer takes"
    if kinds == {("", "Conv")} and axes == (0, 1):
        groups = {_groups(use) for use in weight.uses}
        rows = Rows(weight.shape, 0, groups.pop()) if len(groups) == 1 else None
    else:
        matrix = kinds <= {("", "Gemm"), ("", "MatMul")} and len(weight.shape) == 2
        rows = Rows(weight.shape, axes[0] or 0) if matrix else None
    if rows is None:
        return "its layers read it in unlike ways, or are neither Conv nor Gemm nor MatMul"
    return rows if _width(weight) <= _WIDEST else f"its layer contracts {_width(weight)} inputs, more than {_WIDEST}"


def _contracted(use: Use, places: Mapping[Any, str]) -> bool:
    """Whether the other input of its layer is a value that can be looked at."""
    return use.port in (0, 1) and len(use.node.inputs) > 1 and use.node.inputs[1 - use.port] in places


def _groups(use: Use) -> int:
    return int(use.node.attributes.get_int("group", 1))
