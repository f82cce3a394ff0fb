"""Outliers of activations, channel by channel, moved into the weights that they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses
from ...ir.constants import new_constant
from ...ir.edit import Names
from ...ir.errors import UsageError
from ...ir.scopes import scopes
from ..answers import answers
from ..base import Array, Context, Effect, Pass, register
from ..points import Channels
from ..selection import NOTHING, Selection, left_out
from .seam_search import seams
from .seams import NO_SEAM, NOT_FINITE, Part, Seam, Vertex, along, powers, reach, unevenness


@register("smooth")
class Smooth(Pass):
    """Move outliers of activation channels into the weights of the layers that read them.

    Channel i of what Conv, Gemm and MatMul layers read is divided by s_i, and what they multiply it with is multiplied
    by it, with s_i = max|x_i|^strength / max|w_i|^(1 - strength) (SmoothQuant: Xiao et al. 2022, arXiv 2211.10438);
    ``max|w_i|`` is the largest share of any reader. The division goes into whatever makes the channels: the scale and
    shift of a LayerNormalization or RMSNormalization (also written out as Mul and Add), or the weight and bias of the
    layers before, through Relu, pooling, sums and the like. Factors are the nearest powers of two, so the model still
    computes the same bits. Ranges of ``x`` come from the sample data.

    Where nothing takes the division, for example behind Gelu or Softmax, ``insert=yes`` puts a Mul there, one more
    walk over the values in each run; by default such layers stay as they are. A higher ``strength`` (0 to 1) leaves
    less to the activations and more to the weights.
    """

    strength: float = 0.5
    insert: Literal["no", "yes"] = "no"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def validate(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UsageError(f"smooth: strength={self.strength:g} is out of range; it is from 0 to 1.")

    def effect(self) -> Effect:
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` without sample data."""
        all_seams = seams(model)
        if not all_seams:
            ctx.skip("model", NO_SEAM)
        found = [seam for seam in all_seams if self._wanted(seam, ctx)]
        places, names = addresses(model), Names(model)
        points = {vertex: Channels(places[vertex[0]], vertex[1]) for seam in found for vertex in seam.inputs()}
        known, reasons = answers(model, list(points.values()), ctx) if points else ({}, {})
        for seam in found:
            own = [points[vertex] for vertex in seam.inputs()]
            if reason := next((reasons[point] for point in own if point in reasons), None):
                ctx.skip(seam.address, reason)
            elif not all(known[point].seen for point in own):
                ctx.skip(seam.address, "no sample reaches it")
            else:
                ranges = {vertex: np.asarray(known[points[vertex]].absmax) for vertex in seam.inputs()}
                if seam.free.any():
                    self._smooth(seam, ranges, ctx)
                else:
                    self._insert(seam, ranges, model, names, ctx)

    def _wanted(self, seam: Seam, ctx: Context) -> bool:
        """Whether to measure ``seam``; a line in the ledger where not."""
        reason = next((why for part in seam.layers if (why := left_out(part.weight, self.only, self.keep))), None)
        if reason is None and not seam.readers:
            reason = next(iter(seam.pins.values()), "no layer reads it")
        if reason is None and not seam.free.any() and self.insert == "no":
            reason = next(iter(seam.pins.values()))
        if reason is None and not all(np.isfinite(part.weight.magnitudes()).all() for part in seam.readers):
            reason = NOT_FINITE
        if reason is not None:
            ctx.skip(seam.address, reason)
        return reason is None

    def _smooth(self, seam: Seam, ranges: Mapping[Vertex, Array], ctx: Context) -> None:
        activations = _activations(seam, ranges)
        exponents = self._exponents(activations, reach(seam.readers, seam.size), seam.free)
        if not exponents.any():
            ctx.skip(seam.address, "its channels are even enough already")
            return
        before = _worst(seam.readers)
        seam.scale(exponents, str(self))
        figures = _figures(exponents, activations, before, seam.readers)
        ctx.change(seam.address, "outliers moved into the weights", **figures)

    def _insert(self, seam: Seam, ranges: Mapping[Vertex, Array], model: ir.Model, names: Names, ctx: Context) -> None:
        """A Mul before the layers that read each value of ``seam``, where it at least halves the worst outlier."""
        for vertex, activations in ranges.items():
            size = activations.size
            readers = [
                replace(part, channels=np.repeat(np.arange(size), part.channels.size // size))
                for part in seam.readers
                if vertex[0] in part.node.inputs
            ]
            exponents = self._exponents(activations, reach(readers, size), np.ones(size, bool))
            factors = np.exp2(-exponents.astype(np.float64))
            if 2 * unevenness(activations * factors) > unevenness(activations):
                ctx.skip(vertex[0], "its channels are too even for a Mul to gain anything")
                continue
            before = _worst(readers)
            for part in readers:
                part.scale(exponents, str(self))
            shape = [-1 if axis == vertex[1] else 1 for axis in range(seam.ranks[vertex])]
            constant = factors.reshape(shape).astype(readers[0].weight.dtype.numpy())
            _multiply(model, vertex[0], constant, [part.node for part in readers], names)
            figures = _figures(exponents, activations, before, readers)
            ctx.change(vertex[0], "outliers moved into the weights by a Mul", **figures)

    def _exponents(self, activations: Array, weights: Array, free: Array) -> Array:
        """s = activations^strength / weights^(1 - strength) in powers of two; 0 where there is nothing to go by."""
        known, wanted = (activations > 0) & (weights > 0), np.full(activations.shape, np.nan)
        wanted[known] = self.strength * np.log2(activations[known]) - (1 - self.strength) * np.log2(weights[known])
        return powers(wanted, free)


def _worst(parts: Sequence[Part]) -> float:
    """How uneven the channels of the worst of these weights are."""
    return max(unevenness(along(part.weight.magnitudes(), part.axis)) for part in parts)


def _figures(exponents: Array, activations: Array, weights_before: float, readers: Sequence[Part]) -> dict[str, float]:
    """For the ledger, once the weights are scaled: the largest range of a channel over the geometric mean."""
    return {
        "channels": int(np.count_nonzero(exponents)),
        "activations_before": unevenness(activations),
        "activations_after": unevenness(activations * np.exp2(-exponents.astype(np.float64))),
        "weights_before": weights_before,
        "weights_after": _worst(readers),
    }


def _activations(seam: Seam, ranges: Mapping[Vertex, Array]) -> Array:
    """max|x| for each channel of ``seam``."""
    found = np.zeros(seam.size)
    for vertex, magnitudes in ranges.items():
        np.maximum.at(found, seam.vertices[vertex], magnitudes)
    return found


def _multiply(model: ir.Model, value: ir.Value, factors: Array, nodes: Sequence[ir.Node], names: Names) -> None:
    """Let ``nodes`` read ``value`` times ``factors``."""
    graph = value.graph
    assert graph is not None
    name = names.fresh(f"{value.name}_smoothing")
    scope = next(scope for scope in scopes(model) if scope.graph is graph)
    constant, node = new_constant(scope, ir.Tensor(factors, name=name), name)
    product = ir.node("Mul", [value, constant], name=names.fresh(f"{value.name}_Mul"))
    output = product.outputs[0]
    output.name, output.type, output.shape = names.fresh(f"{value.name}_smooth"), value.type, value.shape
    if node is None:
        graph.register_initializer(constant)
    made = [product] if node is None else [node, product]
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], made)
    else:
        graph.insert_after(producer, made)
    for reader in dict.fromkeys(nodes):
        for port, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(port, output)
