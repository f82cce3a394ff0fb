"""Rounding of weights that minimizes the error of what their layers compute, not that of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses
from ...ir.affine import Affine, Grid
from ...ir.errors import UsageError
from ...ir.trace import Use
from ...ir.weights import Weight
from ..answers import answers
from ..base import Array, Context, Effect, Pass, register
from ..gptq import Moments, Rows
from ..gram import Gram, GramStatistic, in_its_layout
from ..selection import NOTHING, Selection, left_out
from .fold_columns import plain
from .original import Layer, original, quantized_layers

_MEMORY = 256 << 20  # bytes of moments that are collected in one sweep over the data
_DECIBELS = 200.0  # what an exact result counts as


def gptq(weight: Array, moments: Moments, affine: Affine) -> Array:
    """``weight`` [G, N, K] in the integers of ``affine`` that nearly minimize tr(E M Eᵀ) in each group, E the weight's
    error and M the ``moments`` of the layer's inputs.

    Scale and zero point broadcast over [G, N, K]. An output channel whose error would be larger keeps the nearest
    integers.
    """
    nearest = affine.quantized(weight)
    scale, zero_point = (np.broadcast_to(part, weight.shape) for part in (affine.scale, affine.zero_point))

    def take(inputs: Array, wanted: Array) -> Array:
        own = [np.take_along_axis(part, inputs[:, None, None], axis=2)[..., 0] for part in (scale, zero_point)]
        column = Affine(own[0], own[1], affine.grid)
        return column.dequantized(column.quantized(wanted))

    return affine.quantized(moments.carried(weight, affine.dequantized(nearest), take))


def output_error(weight: Array, integers: Array, moments: Moments, affine: Affine) -> Array:
    """e M eᵀ for each output channel, float64 [G, N]: the energy of the error that ``integers`` make in its output."""
    return moments.energy(weight.astype(np.float64) - affine.dequantized(integers))


@register("round-adaptively")
class RoundAdaptively(Pass):
    """Round quantized weights so that the outputs of their layers, not the weights, are nearest to the float model's.

    For Conv, Gemm and MatMul with integer weights, after a pass that quantized them (or with the float model given as
    ``--with original=MODEL``). Scales and zero points stay; each integer may move by a step or more, within the range
    that the weight's integers span, so that errors of inputs that occur together cancel (GPTQ: Frantar et al. 2022,
    arXiv 2210.17323). The fewer the bits, the more it gains. The inputs of the float model on the sample data count: of
    each sample at most ``positions`` places. Layers that contract more than ``limit`` inputs are left alone, for their
    moments take 8 bytes times the square of that.
    """

    damping: float = 0.01
    positions: int = 256
    limit: int = 4608
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def validate(self) -> None:
        if not 0 < self.damping <= 1:
            raise UsageError(
                f"round-adaptively: damping={self.damping:g} is out of range; it is above 0 and at most 1."
            )
        if self.positions < 1 or self.limit < 1:
            raise UsageError("round-adaptively: positions and limit are numbers of at least 1.")

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` without sample data or the float model."""
        with plain(model, ctx):
            self._run(model, ctx)

    def _run(self, model: ir.Model, ctx: Context) -> None:
        float_model = original(model, ctx)
        tasks = self._tasks(model, float_model, ctx)
        for chunk in _chunks(tasks):
            points = [point for task in chunk for point in task.points]
            found, reasons = answers(float_model, points, ctx)
            for task in chunk:
                if reason := next((reasons[point] for point in task.points if point in reasons), None):
                    ctx.skip(task.layer.weight, reason)
                else:
                    self._round(task, [found[point] for point in task.points], ctx)

    def _tasks(self, model: ir.Model, float_model: ir.Model, ctx: Context) -> list[_Task]:
        places, tasks = addresses(float_model), dict[Weight, _Task]()
        for layer in quantized_layers(model, float_model):
            if isinstance(layer, tuple):
                ctx.skip(*layer)
                continue
            reason = left_out(layer.weight, self.only, self.keep) or _obstacle(layer, self.limit)
            if reason is not None:
                ctx.skip(layer.address, reason)
                continue
            data = layer.twin_use.node.inputs[layer.data]
            assert data is not None
            task = tasks.setdefault(layer.weight, _Task(layer))
            task.points.append(
                Gram.of(places[data], layer.twin_use.node, layer.data, layer.weight.shape[2:], self.positions)
            )
        return list(tasks.values())

    def _round(self, task: _Task, statistics: Sequence[GramStatistic], ctx: Context) -> None:
        weight = task.layer.weight
        if any(found.total is None for found in statistics):
            ctx.skip(weight, "no sample reaches its layer")
            return
        stored, floats = weight.array(), task.floats()
        old = task.rows.of(stored)
        if not _same(task, old, floats):
            ctx.skip(weight, "it is not what the float model's weight was rounded to")
            return
        grams = np.sum([found.total for found in statistics if found.total is not None], axis=0)
        count = sum(found.count for found in statistics)
        moments, affine = Moments(grams, count, self.damping), task.affine()
        new = gptq(floats, moments, affine)
        errors = [output_error(floats, integers, moments, affine) for integers in (old, new)]
        new = np.where((errors[1] < errors[0])[..., None], new, old)
        signal = float(moments.energy(floats.astype(np.float64)).sum())
        before, after = float(errors[0].sum()), float(np.minimum(*errors).sum())
        moved = int(np.count_nonzero(new != old))
        if not moved:
            ctx.skip(weight, "the integers it has are the best found")
            return
        weight.replace(ir.Tensor(task.rows.back(new), dtype=weight.dtype, name=weight.tensor.name))
        ctx.change(
            weight,
            "rounded for the inputs of its layer",
            moved=moved / weight.size,
            sqnr_before=_decibels(signal, before),
            sqnr_after=_decibels(signal, after),
        )


@dataclass(eq=False)
class _Task:
    """A quantized weight, and the points that tell what its layers read."""

    layer: Layer
    points: list[Gram] = field(default_factory=list)

    @property
    def rows(self) -> Rows:
        """Of the quantized weight, or what broadcasts over it."""
        return self._rows(self.layer.weight, self.layer.use)

    def floats(self) -> Array:
        """The float weight as [groups, N / groups, K]."""
        return self._rows(self.layer.twin, self.layer.twin_use).of(self.layer.twin.array()).astype(np.float32)

    def affine(self) -> Affine:
        """Scale and zero point [groups, N / groups, K], with the integers that the weight spans now."""
        quantization, weight = self.layer.use.quantization, self.layer.weight
        assert quantization is not None
        parts = []
        for values in (quantization.scale, quantization.zero_point):
            if quantization.block and quantization.axis is not None and values.shape[quantization.axis] > 1:
                repeated = np.repeat(values, quantization.block, axis=quantization.axis)
                values = repeated[tuple(slice(size) for size in weight.shape)]
            parts.append(self.rows.of(values))
        integers = weight.array()
        grid = Grid(weight.dtype, int(integers.min()), int(integers.max()))
        return Affine(parts[0].astype(np.float32), parts[1], grid)

    def _rows(self, weight: Weight, use: Use) -> Rows:
        assert use.output_axis is not None
        return Rows(weight.shape, use.output_axis, self.groups)

    @property
    def groups(self) -> int:
        node = self.layer.use.node
        return node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1


def _obstacle(layer: Layer, limit: int) -> str | None:
    """Why the weight of ``layer`` cannot be rounded here, in words that follow its name."""
    node, weight, twin = layer.use.node, layer.weight, layer.twin
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return f"{node.op_type} is not rounded here; Conv, Gemm and MatMul are"
    if weight.overridable or weight.output or weight.quantization is None:
        return "its integers have other uses, or other scales elsewhere"
    axes, twins = _axes(layer.use), _axes(layer.twin_use)
    if axes is None or twins is None or weight.axes() != axes:
        return "its channel axes are not known, or its uses disagree on them"
    if node.op_type == "Conv":
        straight = in_its_layout(layer.use) and in_its_layout(layer.twin_use)
        if axes != (0, 1) or twins != (0, 1) or weight.shape != twin.shape or not straight:
            return "its weight is stored in another layout than Conv's"
    elif len(weight.shape) != 2 or len(twin.shape) != 2:
        return "its weight is not one matrix"
    elif [weight.shape[axis] for axis in axes] != [twin.shape[axis] for axis in twins]:
        return "its weight has another shape in the float model"
    width = weight.size // weight.shape[axes[0]]
    return f"it contracts {width} inputs, above limit={limit}" if width > limit else None


def _axes(use: Use) -> tuple[int, int] | None:
    """Output-channel and input-channel axis in the storage."""
    return None if use.output_axis is None or use.input_axis is None else (use.output_axis, use.input_axis)


def _chunks(tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
    """The tasks in order, as many at a time as ``_MEMORY`` bytes of moments allow, at least one."""
    chunk: list[_Task] = []
    total = 0
    for task in tasks:
        weight, groups = task.layer.weight, task.groups
        channels = weight.shape[task.layer.use.output_axis or 0]
        need = 8 * groups * (weight.size // max(1, channels)) ** 2 * len(task.points)
        if chunk and total + need > _MEMORY:
            yield chunk
            chunk, total = [], 0
        chunk.append(task)
        total += need
    if chunk:
        yield chunk


def _same(task: _Task, integers: Array, floats: Array) -> bool:
    """Whether most of ``integers`` are within two steps of ``floats``."""
    affine = task.affine()
    close = int(np.count_nonzero(np.abs(affine.dequantized(integers) - floats) <= 2 * affine.scale))
    return close * 2 >= integers.size


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return _DECIBELS
    return 10 * math.log10(signal / noise) if signal else -_DECIBELS
