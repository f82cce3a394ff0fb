"""Cross-layer equalization: channels of even reach in the layers on both sides of what lies between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.storage import BLOCK
from ...ir.weights import Weight
from ..base import Array, Context, Effect, Pass, register
from ..selection import NOTHING, Selection, left_out
from .seam_search import seams
from .seams import LEAST, NO_SEAM, Part, Seam, powers, unevenness

_SWEEPS = 100
_SETTLED = 2.0**-6  # of a factor's logarithm
_ROUNDS = 8
_LEAST_GAIN = 0.01  # of the noise


@register("equalize")
class Equalize(Pass):
    """Even out the ranges of channels between layers, so that one scale fits all of them.

    Where nothing but Relu, pooling, sums and the like lies between Conv, Gemm or MatMul layers (depthwise ones too, and
    residual sums of several), channel i is divided by s_i where it is made and multiplied where it is read, with s_i =
    sqrt(made range / read range), repeated until all layers agree (Nagel et al. 2019, arXiv 1906.04721, section 4.1).
    Factors are the nearest powers of two, so the model still computes the same bits; each range is within a factor
    sqrt(2) of its goal. Needs no data. It helps scales per tensor: of weights, and of activations where these follow
    the weights.

    Bounded activations (Clip, ReLU6), normalizations, products, inputs and outputs of graphs, and weights used twice
    stay as they are; ``smooth`` goes by measured activations, and also takes normalizations. A layer that ``keep``
    matches, or ``only`` does not, leaves its neighbours alone too.
    """

    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        chosen, found_seams = [], seams(model)
        if not found_seams:
            ctx.skip("model", NO_SEAM)
        for seam in found_seams:
            reason = self._obstacle(seam)
            if reason is None:
                chosen.append(seam)
            else:
                ctx.skip(seam.address, reason)
        profiles = {part.weight: _Profile(part.weight) for seam in chosen for part in seam.layers}
        for seam in chosen:
            for part in seam.layers:
                profiles[part.weight].parts.append((seam, part))
        exponents = _equalized(chosen, profiles)
        for seam in chosen:
            found = exponents[seam]
            if not found.any():
                ctx.skip(seam.address, "its channels are even already, as powers of two go")
                continue
            ctx.change(
                seam.address,
                "channels equalized",
                channels=int(np.count_nonzero(found)),
                largest_to_mean_before=_noise(seam, profiles, {}) ** 0.5,
                largest_to_mean_after=_noise(seam, profiles, exponents) ** 0.5,
            )
        for seam in chosen:
            seam.scale(exponents[seam], str(self))

    def _obstacle(self, seam: Seam) -> str | None:
        for part in seam.layers:
            if reason := left_out(part.weight, self.only, self.keep):
                return f"a weight beside it: {reason}"
        if not seam.free.any():
            return next(iter(seam.pins.values()))
        if any(not part.layer and part.norm for part in seam.parts):
            return "a normalization makes it, whose range no weight tells; smooth measures it"
        if not seam.makers:
            return "no layer makes it"
        return None


class _Profile:
    """The magnitudes of a layer's weight along the axes that seams scale, the largest over all others."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.parts: list[tuple[Seam, Part]] = []
        self._table: Array | None = None

    @property
    def table(self) -> Array:
        if self._table is None:
            axes = {part.axis for _, part in self.parts}
            magnitudes = self.weight.magnitudes()
            rest = tuple(axis for axis in range(magnitudes.ndim) if axis not in axes)
            self._table = magnitudes.max(axis=rest, keepdims=True)
        return self._table

    def along(self, part: Part, logarithms: dict[Seam, Array]) -> Array:
        """The ranges along the axis of ``part`` with all seams scaled, as shares of the largest; float64."""
        table, own, rest = np.moveaxis(self.table, part.axis, 0), np.ones(1), np.ones((1,) * self.table.ndim)
        for seam, other in self.parts:
            factors = np.exp2(other.power * logarithms[seam][other.channels]) if seam in logarithms else np.ones(1)
            if other.axis == part.axis:
                own = own * factors
            else:
                shape = [-1 if axis == other.axis else 1 for axis in range(self.table.ndim)]
                rest = rest * factors.reshape(shape)
        rest = np.moveaxis(rest, part.axis, 0).astype(np.float32)
        found = np.zeros(len(table))
        step = max(1, BLOCK // max(1, table[:1].size))
        for start in range(0, len(table), step):  # a block at a time, for a matrix may be as large as memory
            block = table[start : start + step] * rest
            found[start : start + step] = block.max(axis=tuple(range(1, table.ndim)))
        found *= own
        return found / max(float(found.max(initial=0)), LEAST)


def _equalized(chosen: Sequence[Seam], profiles: dict[Weight, _Profile]) -> dict[Seam, Array]:
    """The exponents for each seam: solved for and rounded, and again from there, until that gains nothing."""

    def total(exponents: dict[Seam, Array]) -> float:
        return sum(_noise(seam, profiles, exponents) for seam in chosen)

    exponents = {seam: np.zeros(seam.size, np.int64) for seam in chosen}
    known = total(exponents)
    for _ in range(_ROUNDS):
        solved = _settle(chosen, profiles, exponents)
        wanted = {seam: exponents[seam] + powers(solved[seam] - exponents[seam], seam.free) for seam in chosen}
        found = total(wanted)
        if found > known * (1 - _LEAST_GAIN):
            break
        exponents, known = wanted, found
    return exponents


def _settle(
    chosen: Sequence[Seam], profiles: dict[Weight, _Profile], exponents: dict[Seam, Array]
) -> dict[Seam, Array]:
    """The logarithms of factors that equalize pairs of layers in turn, from ``exponents`` on until none moves."""
    logarithms = {seam: exponents[seam].astype(np.float64) for seam in chosen}
    for _ in range(_SWEEPS):
        moved = 0.0
        for seam in chosen:
            made, read = (_reach(seam, parts, profiles, logarithms) for parts in (seam.makers, seam.readers))
            known = seam.free & (made > 0) & (read > 0)
            step = np.zeros(seam.size)
            step[known] = (np.log2(made[known]) - np.log2(read[known])) / 2
            if seam.free.all() and known.any():  # a factor common to all channels changes nothing
                step[known] -= np.median(step[known])
            logarithms[seam] += step
            moved = max(moved, float(np.abs(step).max(initial=0)))
        if moved < _SETTLED:
            break
    return logarithms


def _reach(seam: Seam, parts: Sequence[Part], profiles: dict[Weight, _Profile], logarithms: dict[Seam, Array]) -> Array:
    """The range of each channel of ``seam`` in the weights of ``parts``: the largest share of any; 0 for none."""
    found = np.zeros(seam.size)
    for part in parts:
        np.maximum.at(found, part.channels, profiles[part.weight].along(part, logarithms))
    return found


def _noise(seam: Seam, profiles: dict[Weight, _Profile], exponents: dict[Seam, Array]) -> float:
    """How much a scale per tensor adds to the energy of rounding errors because channels are uneven.

    The square of the largest range over the geometric mean of all, a mean over the layers at ``seam``; at least 1.
    """
    return float(np.mean([unevenness(profiles[part.weight].along(part, exponents)) ** 2 for part in seam.layers]))
