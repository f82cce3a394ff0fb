"""Magnitude pruning: the smallest weights become zero, anywhere in the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NoReturn

import numpy as np
import onnx_ir as ir

from ...ir.errors import UsageError
from ...ir.ops import Kind
from ...ir.quantization import count_zeros
from ...ir.storage import BLOCK, Array, StreamedTensor
from ...ir.weights import Weight, weights
from ..base import Context, Effect, Pass, register
from ..selection import NOTHING, Selection, left_out
from .apply import Stored, hard, n_of_m, pruned, soft
from .budget import Budget, least_step
from .threshold import Cut, NotANumber, at_most, cut, smallest

HAS_NAN = "holds NaN, which has no magnitude"
SMALL = 64 << 10  # bytes: a weight of a mapped file up to this size is kept in memory once pruned
LARGEST_GROUP = 64

NOUNS = {
    Kind.BIAS: ("bias", "biases"),
    Kind.NORM: ("parameter of a normalization", "parameters of normalizations"),
    Kind.EMBEDDING: ("embedding", "embeddings"),
    Kind.TABLE: ("lookup table", "lookup tables"),
    Kind.INDEX: ("index", "indices"),
    Kind.SHAPE: ("shape, axis or setting", "shapes, axes and settings"),
    Kind.SCALE: ("scale", "scales"),
    Kind.ZERO_POINT: ("zero point", "zero points"),
    Kind.PACKED: ("packed weight", "packed weights"),
    Kind.OPERAND: ("operand of other operators", "operands of other operators"),
    Kind.OUTPUT: ("output of the model", "outputs of the model"),
    Kind.UNKNOWN: ("input of an unknown operator", "inputs of unknown operators"),
    Kind.UNUSED: ("unused constant", "unused constants"),
}


@register("prune-magnitude")
class PruneMagnitude(Pass):
    """Set the smallest weights of layers to zero.

    Exactly one of four options says how many. ``sparsity``: the share of zeros to reach, from 0 to 1, to the nearest
    element; zeros that are there already count. ``threshold``: every |w| up to it. ``pattern=N:M``: of each M
    neighbours along the input-channel axis the N largest stay; a remainder stays dense. ``target-bytes``: the least
    sparsity with which the model, each weight in its best storage by entropy and all else as it is, takes no more
    bytes than that.

    ``scope=model`` ranks the weights of all layers together, ``scope=tensor`` those of each alone. Equal magnitudes
    fall in order of address, then place. ``granularity=tensor`` (with ``scope=model``) sets whole weights to zero in
    order of their root mean square, while they fit into the ``sparsity``, stopping at the first that does not;
    ``threshold`` then bounds the root mean square. ``mode=soft`` also moves the weights that stay towards zero by the
    threshold (w - a sign(w)), though never onto it.

    Weights are what layers contract with their input (Conv, Gemm, MatMul, Einsum, LSTM, attention ...), wherever
    they live, whatever their type: integers fall to their zero point and count as |(q - zero point) * scale|. Tied
    ones are pruned once. Biases, normalizations and other constants are left alone, and embeddings (also those tied
    to a layer) unless ``only`` matches them. Weights on disk are pruned as the model is saved, a part at a time.
    """

    sparsity: float | None = None
    threshold: float | None = None
    pattern: str | None = None
    target_bytes: int | None = None
    scope: Literal["tensor", "model"] = "tensor"
    granularity: Literal["element", "tensor"] = "element"
    mode: Literal["hard", "soft"] = "hard"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        return Effect.LOSSY

    def validate(self) -> None:
        options = ("sparsity", "threshold", "pattern", "target-bytes")
        given = [option for option in options if getattr(self, option.replace("-", "_")) is not None]
        if len(given) != 1:
            found = " and ".join(given) + " exclude each other" if given else "none was given"
            _refuse(f"it takes exactly one of sparsity, threshold, pattern and target-bytes; {found}.")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            _refuse(f"sparsity={self.sparsity:g} is out of range; it is a share from 0 to 1.")
        if self.threshold is not None and self.threshold < 0:
            _refuse(f"threshold={self.threshold:g} is out of range; magnitudes are 0 or more.")
        if self.target_bytes is not None and self.target_bytes < 0:
            _refuse(f"target-bytes={self.target_bytes} is out of range; it is 0 or more.")
        if self.pattern is not None:
            self._group()
            if (self.scope, self.granularity, self.mode) != ("tensor", "element", "hard"):
                _refuse("pattern works within groups of neighbours; leave scope, granularity and mode out.")
        if self.granularity == "tensor" and self.scope != "model":
            _refuse("granularity=tensor ranks whole weights against each other; add scope=model.")
        if self.granularity == "tensor" and self.mode == "soft":
            _refuse("mode=soft moves elements; leave granularity=tensor out.")

    def run(self, model: ir.Model, ctx: Context) -> None:
        chosen = self._choose(weights(model), ctx)
        if self.pattern is not None:
            for weight in chosen:
                self._prune_groups(weight, ctx)
        elif self.granularity == "tensor":
            self._prune_layers(model, chosen, ctx)
        elif self.scope == "model":
            self._prune_together(model, chosen, ctx)
        else:
            self._prune_each(model, chosen, ctx)

    # Which ------------------------------------------------------------------------------------------------------------

    def _choose(self, found: Sequence[Weight], ctx: Context) -> list[Weight]:
        """The weights to prune; a line in the ledger for each other matrix, and for each other kind of constant."""
        chosen, others = [], Counter[Kind]()
        for weight in found:
            asked = bool(self.only) and weight in self.only
            if not asked and all(use.kind is not Kind.MATRIX for use in weight.uses):
                others[weight.kind] += 1
                continue
            reason = left_out(weight, self.only, self.keep) or _obstacle(weight, asked)
            if reason is None:
                chosen.append(weight)
            else:
                ctx.skip(weight, reason)
        for kind, count in others.items():
            reason = "not weights of a layer" + (", and not asked for" if kind is Kind.EMBEDDING else "")
            ctx.skip(f"{count} {NOUNS[kind][count > 1]}", reason)
        return chosen

    # How many ---------------------------------------------------------------------------------------------------------

    def _prune_each(self, model: ir.Model, chosen: list[Weight], ctx: Context) -> None:
        """Scope ``tensor``: each weight by itself."""
        share = self.sparsity or 0.0
        if self.target_bytes is not None:
            chosen = _without_nan(chosen, ctx)
            budget, total = Budget(model, chosen), _total(chosen)

            def cuts(step: int) -> list[Cut]:
                counts = [round(weight.size * step / total) for weight in chosen]
                return [
                    smallest([weight], count) if coded else Cut(np.nan, (count,), (0,))
                    for weight, count, coded in zip(chosen, counts, budget.coded, strict=True)
                ]

            share = least_step(budget, cuts, total, self.target_bytes) / max(1, total)
        for weight in chosen:
            try:
                made = self._cut([weight], round(weight.size * share))
            except NotANumber:
                ctx.skip(weight, HAS_NAN)
            else:
                self._apply(weight, made, ctx)

    def _prune_together(self, model: ir.Model, chosen: list[Weight], ctx: Context) -> None:
        """Scope ``model``: all weights in one ranking."""
        count = 0
        if self.target_bytes is not None:
            chosen = _without_nan(chosen, ctx)
            budget, total = Budget(model, chosen), _total(chosen)
            count = least_step(budget, lambda step: _each(smallest(chosen, step)), total, self.target_bytes)
        while True:
            if self.sparsity is not None:
                count = round(self.sparsity * _total(chosen))
            try:
                made = self._cut(chosen, count)
            except NotANumber as error:
                ctx.skip(chosen.pop(error.place), HAS_NAN)
            else:
                break
        for weight, part in zip(chosen, _each(made), strict=True):
            self._apply(weight, part, ctx)

    def _prune_layers(self, model: ir.Model, chosen: list[Weight], ctx: Context) -> None:
        """Granularity ``tensor``: whole weights in order of their root mean square."""
        norms = {weight: _root_mean_square(weight) for weight in _without_nan(chosen, ctx)}
        ranked = sorted(norms, key=norms.__getitem__)
        fitting = len(ranked)
        if self.target_bytes is not None:
            whole = [Cut(np.inf, (weight.size,), (weight.size,)) for weight in ranked]
            none = [Cut(0.0, (0,), (0,)) for _ in ranked]
            budget = Budget(model, ranked)
            fitting = least_step(budget, lambda step: whole[:step] + none[step:], len(ranked), self.target_bytes)
        elif self.threshold is not None:
            fitting = sum(norm <= self.threshold for norm in norms.values())
        elif self.sparsity is not None:
            reached = np.cumsum([weight.size for weight in ranked])
            fitting = int(np.searchsorted(reached, round(self.sparsity * _total(ranked)), "right"))
        for place, weight in enumerate(ranked):
            if place >= fitting:
                ctx.skip(weight, "its root mean square is above the cut")
            elif norms[weight] == 0:
                ctx.skip(weight, "zero already")
            else:
                stored = Stored.of(weight)
                self._store(weight, pruned(stored, hard(stored, np.inf, weight.size), str(self)))
                ctx.change(weight, "the whole weight set to zero", root_mean_square=norms[weight], sparsity=1.0)

    def _cut(self, chosen: Sequence[Weight], count: int) -> Cut:
        return smallest(chosen, count) if self.threshold is None else at_most(chosen, self.threshold)

    def _prune_groups(self, weight: Weight, ctx: Context) -> None:
        """Pattern N:M along the input-channel axis."""
        keep, group = self._group()
        axis = weight.axes()[1]
        if axis is None:
            ctx.skip(weight, "its input-channel axis is not known, or its uses disagree on it")
        elif weight.shape[axis] < group:
            ctx.skip(weight, f"fewer than {group} input channels")
        elif _has_nan(weight):
            ctx.skip(weight, HAS_NAN)
        else:
            stored = Stored.of(weight)
            made = pruned(stored, n_of_m(stored, keep, group, axis), str(self))
            zeros = count_zeros(made, stored.quantization)
            if zeros == weight.zeros():
                ctx.skip(weight, "has the pattern already")
                return
            self._store(weight, made)
            ctx.change(weight, f"{keep} of {group} input channels kept", sparsity=zeros / weight.size, zeros=zeros)
            if weight.shape[axis] % group:
                ctx.skip(weight, f"input channels that do not fill a group of {group} stay dense")

    def _group(self) -> tuple[int, int]:
        """N and M of the pattern."""
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern or "")
        if match is None or not 0 < int(match[1]) < int(match[2]) <= LARGEST_GROUP:
            _refuse(f"pattern={self.pattern} is not valid; it is N:M with 0 < N < M <= {LARGEST_GROUP}, such as 2:4.")
        return int(match[1]), int(match[2])

    # The weight -------------------------------------------------------------------------------------------------------

    def _apply(self, weight: Weight, made: Cut, ctx: Context) -> None:
        """Prune one weight by its own part of a cut."""
        threshold, count, until = made.threshold, made.counts[0], made.until[0]
        soft_moves = self.mode == "soft" and threshold > 0
        if count == 0 and not soft_moves:
            ctx.skip(weight, "none of its elements is small enough")
            return
        if not soft_moves and not _moves(weight, threshold, until):
            ctx.skip(weight, "its smallest elements are zero already")
            return
        stored = Stored.of(weight)
        way = soft if self.mode == "soft" else hard
        self._store(weight, pruned(stored, way(stored, threshold, until), str(self)))
        what = "smallest elements set to zero" + (", the others moved towards it" if self.mode == "soft" else "")
        ctx.change(weight, what, sparsity=count / weight.size, threshold=threshold, zeros=count)

    def _store(self, weight: Weight, made: StreamedTensor) -> None:
        """Give ``weight`` its new elements: when they are read where the weight lies in a file, else at once."""
        in_file = isinstance(weight.tensor, (ir.ExternalTensor, ir.LazyTensor)) and weight.nbytes > SMALL
        weight.replace(made if in_file else made.numpy())


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"prune-magnitude: {message}")


def _total(chosen: Sequence[Weight]) -> int:
    return sum(weight.size for weight in chosen)


def _each(made: Cut) -> list[Cut]:
    """A cut of several weights as one for each."""
    parts = zip(made.counts, made.until, strict=True)
    return [Cut(made.threshold, (count,), (until,)) for count, until in parts]


def _obstacle(weight: Weight, asked: bool) -> str | None:
    """Why a weight that is a matrix to some operator, or that was asked for by name, cannot be pruned."""
    if weight.overridable:
        return "the model's caller may pass another tensor for it"
    if weight.size == 0:
        return "empty"
    if weight.kind is not Kind.EMBEDDING:
        return weight.obstacle
    if not asked:
        return "an embedding too, and not asked for by name"
    return None if weight.numeric else weight.obstacle


def _without_nan(chosen: Sequence[Weight], ctx: Context) -> list[Weight]:
    fit = []
    for weight in chosen:
        if _has_nan(weight):
            ctx.skip(weight, HAS_NAN)
        else:
            fit.append(weight)
    return fit


def _magnitudes(weight: Weight) -> Iterator[Array]:
    """The weight's magnitudes, a block at a time."""
    read, size = weight.magnitude_reader(), weight.size
    return (read(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def _has_nan(weight: Weight) -> bool:
    return any(bool(np.isnan(block.max())) for block in _magnitudes(weight))


def _root_mean_square(weight: Weight) -> float:
    total = sum(float(np.square(block.astype(np.float64)).sum()) for block in _magnitudes(weight))
    return math.sqrt(total / weight.size)


def _moves(weight: Weight, threshold: float, until: int) -> bool:
    """Whether anything that is cut is not zero yet."""
    starts = range(0, weight.size, BLOCK)
    return threshold > 0 and any(
        bool((block[cut(block, start, threshold, until)] > 0).any())
        for start, block in zip(starts, _magnitudes(weight), strict=True)
    )
