"""The energy of the inputs that each weight meets: the mean square of its input channel over the sample data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses
from ...ir.ops import operator
from ...ir.storage import Array
from ...ir.trace import Use
from ...ir.weights import Weight
from ..base import Context, Feeds
from ..points import Point, Unanswered, Unfit, floats, require_finite


@dataclass(frozen=True)
class MeanSquare(Point):
    """The mean square of each channel along ``axis``. The answer is a ``ChannelEnergy``."""

    axis: int = 1
    checks = True

    def start(self) -> ChannelEnergy:
        return ChannelEnergy(self.axis)


@dataclass
class ChannelEnergy:
    """``total``, float64 [channels], the sum of squares of each; ``seen`` elements so far."""

    axis: int
    seen: int = 0
    total: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def mean(self) -> Array:
        """The mean square of each channel, float64 [channels]."""
        return self.total * (self.total.size / max(1, self.seen))

    def update(self, array: Array) -> None:
        if not array.size:
            return
        if not -array.ndim <= self.axis < array.ndim:
            raise Unfit(f"has {array.ndim} dimensions, and so no axis {self.axis}")
        moved = np.moveaxis(floats(array), self.axis, -1)
        rows = moved.reshape(-1, moved.shape[-1])
        total = np.einsum("nc,nc->c", rows, rows, dtype=np.float64)
        require_finite(float(total.sum()))
        self._take(total, array.size)

    def merge(self, other: Self) -> None:
        if other.seen:
            self._take(other.total, other.seen)

    def _take(self, total: Array, seen: int) -> None:
        if self.seen and total.size != self.total.size:
            raise Unfit(f"has {self.total.size} channels in one run, and {total.size} in another")
        self.total, self.seen = (self.total + total if self.seen else total), self.seen + seen


def energies(
    model: ir.Model, found: Sequence[Weight], ctx: Context, feeds: Feeds | None = None
) -> dict[Weight, Array | str]:
    """For each weight the energies of the inputs that its elements meet, float64, broadcasting over the stored tensor
    with mean 1; or why they are not known, in a clause. One sweep over the sample data, or ``feeds``, answers all.

    Raises ``NeedsData`` without data.
    """
    places = addresses(model)
    asked = {weight: [_point(use, places) for use in weight.uses] for weight in found}
    points = list(dict.fromkeys(point for own in asked.values() for point in own if point is not None))
    answers: Mapping[Point, Any] = {}
    if points:
        try:
            answers = ctx.runner.statistics(model, points, ctx.data if feeds is None else feeds)
        except Unanswered as error:
            answers = error.answers
    return {weight: _energy(weight, points, answers) for weight, points in asked.items()}


def _point(use: Use, places: Mapping[Any, str]) -> MeanSquare | None:
    """What to ask of the value that the weight is contracted with; None where it is not known which that is."""
    if use.port not in (0, 1) or use.input_axis is None or use.node.domain:
        return None
    value = use.node.inputs[1 - use.port]
    axis = _AXES.get((use.node.op_type, use.port))
    if axis is None or value is None or value not in places:
        return None
    transposed = "transA" if use.port else "transB"
    if use.node.op_type == "Gemm" and use.node.attributes.get_int(transposed, False):
        axis = 1 - axis
    return MeanSquare(places[value], axis)


_AXES = {("Conv", 1): 1, ("ConvTranspose", 1): 1, ("MatMul", 1): -1, ("MatMul", 0): -2, ("Gemm", 1): 1, ("Gemm", 0): 0}
"""By operator and the weight's port: the contracted axis of the other input."""


def _energy(weight: Weight, points: Sequence[MeanSquare | None], answers: Mapping[Point, Any]) -> Array | str:
    """The sum over all uses, as ``energies`` gives it."""
    total: Array | None = None
    for use, point in zip(weight.uses, points, strict=True):
        if point is None:
            return "which inputs it meets is not known"
        answer = answers.get(point)
        if answer is None or not answer.seen:
            return "no finite sample reaches it"
        own = _placed(weight, use, answer.mean)
        if own is None:
            return "its input channels are not those of its input"
        total = own if total is None else total + own
    if total is None or not total.any():
        return "its inputs are all zero"
    evened: Array = total / total.mean()
    return evened


def _placed(weight: Weight, use: Use, mean: Array) -> Array | None:
    """Energies of channels along the axes of the stored tensor."""
    shape, axis = weight.shape, use.input_axis
    assert axis is not None
    if mean.size == shape[axis]:
        return mean.reshape([-1 if place == axis else 1 for place in range(len(shape))])
    groups = operator(use.node).port(use.port).axes(use.node, len(shape)).groups
    if use.path or groups * shape[1] != mean.size or shape[0] % groups:
        return None
    rows = np.repeat(mean.reshape(groups, shape[1]), shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))
