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
from ..base import Context, Feeds
from ..gptq import Moments, Rows
from ..gram import Gram
from ..points import Unanswered
from .clustering import Codebook

_WIDEST = 4608  # inputs that a layer contracts: moments take 8 bytes times the square of that
_MEMORY = 512 << 20  # bytes of moments that are held at a time: of the narrowest layers
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
        weight = self.rows.of(array).astype(np.float64)
        channels = weight.shape[0] * weight.shape[1]
        group = group or channels

        def nearest(wanted: Array) -> Array:
            flat = wanted.reshape(channels, -1)
            parts = (flat[first : first + group] for first in range(0, channels, group))
            found = [book.nearest(part) for book, part in zip(books, parts, strict=True)]
            return (found[0] if len(found) == 1 else np.concatenate(found)).reshape(wanted.shape)

        return self._stored(self._carried(weight, nearest), books[0])

    def each(self, array: Array, books: Sequence[Codebook]) -> Iterator[Array]:
        """The weight with the values of one of ``books`` after another."""
        weight = self.rows.of(array).astype(np.float64)
        rows, step = weight.shape[1], max(1, _TOGETHER // max(1, weight.size))
        for first in range(0, len(books), step):
            some = books[first : first + step]

            def nearest(wanted: Array, some: Sequence[Codebook] = some) -> Array:
                parts = np.split(wanted, len(some), axis=1)
                return np.concatenate([book.nearest(part) for book, part in zip(some, parts, strict=True)], axis=1)

            made = self._carried(np.tile(weight, (1, len(some), 1)), nearest)
            for place, book in enumerate(some):
                yield self._stored(made[:, place * rows : (place + 1) * rows], book)

    def _carried(self, weight: Array, nearest: Callable[[Array], Array]) -> Array:
        """``weight`` in values that ``nearest`` takes for wanted ones, [G, N] or [G, N, K]; zeros stay zero."""
        zero = weight == 0

        def take(inputs: Array, wanted: Array) -> Array:
            found = nearest(wanted)
            found[np.take_along_axis(zero, inputs[:, None, None], axis=2)[..., 0]] = 0
            return found

        return self.moments.carried(weight, np.where(zero, 0, nearest(weight)), take)

    def _stored(self, rows: Array, book: Codebook) -> Array:
        return self.rows.back(rows).astype(book.values.dtype)

    def noise(self, array: Array, made: Array) -> float:
        """The energy of the error in the outputs over that of the outputs."""
        whole, error = (self.rows.of(part).astype(np.float64) for part in (array, array.astype(np.float64) - made))
        signal = float(self.moments.energy(whole).sum())
        return float(self.moments.energy(error).sum()) / signal if signal else 0.0


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
        elif (need := 8 * rows.groups * _width(weight) ** 2 * len(weight.uses)) > room:
            known[weight] = f"{_MEMORY >> 20} MiB do not hold the moments of its inputs too"
        else:
            room -= need
            asked[weight] = [_point(use, weight, places) for use in weight.uses]
    answers: Mapping[Any, Any] = {}
    if asked:
        points = list(dict.fromkeys(point for points in asked.values() for point in points))
        try:
            answers = ctx.runner.statistics(model, points, ctx.data if feeds is None else feeds)
        except Unanswered as error:
            answers = error.answers
    for weight, points in asked.items():
        rows = _rows(weight, places)
        assert isinstance(rows, Rows)
        known[weight] = _outputs(weight, rows, [answers.get(point) for point in points])
    return known


def _point(use: Use, weight: Weight, places: Mapping[Any, str]) -> Gram:
    data = 1 - use.port
    return Gram.of(places[use.node.inputs[data]], use.node, data, weight.shape[2:], _POSITIONS)


def _outputs(weight: Weight, rows: Rows, answers: Sequence[Any]) -> Outputs | str:
    if any(answer is None or answer.total is None for answer in answers):
        return "no finite sample reaches it"
    total = np.sum([answer.total for answer in answers], axis=0)
    if total.shape[-1] != _width(weight):
        return "its input channels are not those of its input"
    if not total.any() or not np.isfinite(total).all():
        return "its inputs are all zero" if np.isfinite(total).all() else "its inputs are too large"
    return Outputs(rows, Moments(total, sum(answer.count for answer in answers)))


def _width(weight: Weight) -> int:
    """How many inputs its layer contracts, as far as its shape and axes tell."""
    axis = weight.axes()[0]
    return weight.size // weight.shape[axis] if axis is not None else weight.size


def _rows(weight: Weight, places: Mapping[Any, str]) -> Rows | str:
    """How the weight is read as rows; or why it cannot be."""
    axes, kinds = weight.axes(), {use.node.op_identifier()[:2] for use in weight.uses}
    if None in axes or not all(_contracted(use, places) for use in weight.uses):
        return "which inputs it meets is not known"
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
