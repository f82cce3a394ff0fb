"""Weights in few bits; activations stay float."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NoReturn

import numpy as np
import onnx_ir as ir

from ...ir.affine import Affine, affine
from ...ir.edit import Names
from ...ir.encode import LEAST_OPSET, Binary, distortion, encode, encode_blocks, narrowest, saving
from ...ir.errors import UsageError
from ...ir.ops import Kind
from ...ir.opset import NoConversion, raise_opset
from ...ir.ranges import block_range, channel_range, mean_magnitude
from ...ir.references import is_annotated
from ...ir.scopes import scopes
from ...ir.sparse import SparseTensor
from ...ir.trace import Use
from ...ir.weights import Weight, weights
from ..base import Context, Effect, Pass, register
from ..selection import NOTHING, Selection, left_out
from .original import remember

TOO_SMALL = "too small: scales and the nodes that decode it would take what it saves"
SMALLEST = 1 << 10  # bytes: no saving of less is worth it
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

BLOCKED_OPSET = 21
LEAST_BLOCKED = 1 << 19  # elements: below it the calls of MatMulNBits take longer than a float MatMul
MOST_ROWS: dict[tuple[int, int], float] = {
    (2, 32): 4,
    (2, 128): 32,
    (4, 32): 32,
    (8, 32): 32,
    (4, 128): math.inf,
    (8, 128): math.inf,
}
"""By stored bits and block: up to how many rows of activations MatMulNBits was never slower than a float MatMul.

Measured with ONNX Runtime 1.31 on AVX512-VNNI, one thread, weights from [768, 768] on."""


@register("quantize-weights")
class QuantizeWeights(Pass):
    """Store the weights of layers, and embeddings, in few bits; the activations stay float.

    ``bits`` from 1 to 8, or 16. Each output channel (each row of an embedding) has a scale of its own: the finest that
    spans it, with ``scale=power-of-two`` the next greater 2^-p (fixed point). ``scale=NUMBER`` is one factor for all:
    q = round(w * NUMBER), so that one step is 1 / NUMBER; what does not fit saturates, and the ledger says how many
    elements did. ``range=symmetric`` has as many steps below 0 as above it; ``minmax`` spans from the least to the
    greatest with a zero point. ``bits=1`` stores the sign, and as the scale the mean magnitude of the channel.

    ONNX Runtime decodes the integers once, as it loads the model, and runs at the speed of floats, in their memory. The
    file holds them in the narrowest type that the opset has: 4 bits from opset 21 on, 2 bits from 25 on, else 8 bits
    each. An opset that is too old for the bits asked for is raised if all operators can be converted exactly.

    ``block=32`` or ``128``: each that many weights along the input channels of a MatMul, or of a Gemm without
    transB, have a scale of their own, where ONNX Runtime makes one MatMulNBits of that and is no slower. It rounds the
    activations there to 8 bits, and keeps the weights small in memory too. All others are stored as without ``block``.

    Each line of the ledger has the signal-to-noise ratio of the weight in dB (none where it is exact). Weights stay
    float where that is smaller, biases and other constants always.
    """

    bits: int = 8
    scale: Literal["float", "power-of-two"] | float = "float"
    range: Literal["symmetric", "minmax"] = "symmetric"
    block: Literal["none", 32, 128] = "none"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        return Effect.LOSSY

    def validate(self) -> None:
        given = isinstance(self.scale, (int, float))
        if self.bits not in (*range(1, 9), 16):
            _refuse(f"bits={self.bits} is out of range; it is 1 to 8, or 16.")
        if isinstance(self.scale, (int, float)) and self.scale <= 0:
            _refuse(f"scale={self.scale:g} is out of range; the factor of q = round(w * factor) is above 0.")
        if given and self.range == "minmax":
            _refuse("a scale that is given leaves no range to choose; leave range=minmax out.")
        if self.bits == 1 and self.range == "minmax":
            _refuse("one bit stores the sign, which is symmetric; leave range=minmax out.")
        if self.block != "none" and (given or not 2 <= self.bits <= 8):
            _refuse("block gives each block a scale of its own; it goes with bits=2 to 8 and no scale that is given.")

    def run(self, model: ir.Model, ctx: Context) -> None:
        if any(reason is None for _, reason in self._judged(model)):
            self._raise(model, ctx)
            remember(model)
        names = Names(model)
        versions = {scope.graph: scope.version for scope in scopes(model)}
        for weight, reason in list(self._judged(model)):
            opset = min(versions[value.graph] for value in weight.values if value.graph is not None)
            if reason is None and opset < LEAST_OPSET:
                reason = f"opset {opset} has no operators to decode it with; {LEAST_OPSET} has"
            if reason is None:
                reason = self._quantize(weight, opset, names, ctx)
            if reason is not None:
                ctx.skip(weight, reason)
        if not ctx.ledger.changes and not ctx.ledger.skips:
            ctx.skip("model", "it has no constants")

    # Which ------------------------------------------------------------------------------------------------------------

    def _judged(self, model: ir.Model) -> Iterator[tuple[Weight, str | None]]:
        """Every constant, and why it cannot be quantized."""
        for weight in weights(model):
            yield weight, _obstacle(weight) or left_out(weight, self.only, self.keep)

    def _raise(self, model: ir.Model, ctx: Context) -> None:
        """Raise the opset where these bits or blocks need that, and say so; where it cannot be, say why."""
        found = [scope.version for scope in scopes(model) if scope.version]
        wanted = [25, 21] if self.bits < 3 else [21] if self.bits < 5 or self.block != "none" else [LEAST_OPSET]
        newest = ctx.runner.newest_opset() if ctx.has("runner") else wanted[0]
        for to in wanted:
            if min(found, default=to) >= to:
                return
            if to > newest:
                ctx.skip("the opset", f"not raised to {to}, for the bits asked for: ONNX Runtime here takes {newest}")
                continue
            try:
                raised = raise_opset(model, max(to, *found))
            except NoConversion as error:
                ctx.skip("the opset", f"not raised to {to}, for the bits asked for: {error}")
            else:
                for place, version in raised.stamps:
                    ctx.change(place, f"opset {version} to {raised.to}, which has the types for {self.bits} bits")
                for address, what in raised.rewritten:
                    ctx.change(address, f"rewritten: {what}")
                return

    # How --------------------------------------------------------------------------------------------------------------

    def _quantize(self, weight: Weight, opset: int, names: Names, ctx: Context) -> str | None:
        """Store one weight; returns why it was left as it is."""
        blocked = self._blocks(weight, opset)
        block = self.block if self.block != "none" and blocked is None else 0
        found = self._affine(weight, opset, block)
        if found is None:
            return "holds NaN, infinity, or values beyond float32"
        if not block and not saving(weight, found):
            return TOO_SMALL
        before, old = weight.nbytes, weight.tensor
        told = distortion(old, found, block)
        numbers = {"bits": self.bits, "bytes_before": before}
        if block:
            encode_blocks(weight, found, block, names)
        else:
            encode(weight, found, names)
        numbers["bytes"] = weight.nbytes + 4 * found.scale.size
        if math.isfinite(told.sqnr):
            numbers["sqnr_db"] = round(told.sqnr, 2)  # type: ignore[assignment]
        if told.saturated:
            numbers["saturated"] = told.saturated
        kind = found.grid.dtype.name.lower()
        how = f"in blocks of {block}, with activations rounded to 8 bits" if block else "decoded when loaded"
        ctx.change(weight, f"stored as {kind}, {how}", **numbers)
        if blocked is not None:
            ctx.skip(weight, f"no blocks of {self.block}: {blocked}")
        return None

    def _affine(self, weight: Weight, opset: int, block: int) -> Affine | None:
        """Scale and zero point; None where the weight's range is not finite."""
        symmetric, fixed = self.range == "symmetric", self.scale == "power-of-two"
        grid = narrowest(self.bits, opset, symmetric=symmetric)
        axis = _axis(weight)
        low, high = block_range(weight.tensor, block) if block else channel_range(weight.tensor, axis)
        if not (np.abs([low.min(), high.max()]) <= np.finfo(np.float32).max).all():
            return None
        if isinstance(self.scale, (int, float)):
            step = np.asarray(1 / self.scale, np.float32)
            found = Affine(step, np.zeros((), grid.dtype.numpy()), grid)
        elif self.bits == 1:
            mean = mean_magnitude(weight.tensor, axis)
            found = affine(-mean, mean, grid, symmetric=True, power_of_two=fixed)
            found = Affine(np.where(mean > 0, found.scale, np.float32(0)), found.zero_point, grid)
        else:
            return affine(low, high, grid, symmetric=symmetric, power_of_two=fixed)
        return Binary(found.scale, found.zero_point, grid) if self.bits == 1 else found

    def _blocks(self, weight: Weight, opset: int) -> str | None:
        """Why the weight cannot be stored in blocks for MatMulNBits, or would be slower; None where it can."""
        if self.block == "none":
            return None
        if opset < BLOCKED_OPSET:
            return f"DequantizeLinear has them from opset {BLOCKED_OPSET} on"
        use = weight.uses[0]
        if weight.tied or len(weight.values) > 1 or not _is_plain_factor(weight, use):
            return "only ONNX Runtime's MatMulNBits is fast with them, which needs a MatMul by this matrix alone"
        if weight.shape[0] % self.block:
            return "they do not divide its input channels"
        bits = narrowest(self.bits, opset, symmetric=True).dtype.bitwidth
        most, rows = MOST_ROWS[bits, self.block], _rows(use)
        if weight.size < LEAST_BLOCKED or rows > most:
            return "ONNX Runtime's MatMulNBits may be slower with this many rows of input, or so small a matrix"
        return None


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"quantize-weights: {message}")


def _obstacle(weight: Weight) -> str | None:
    """Why a constant is no float weight of a layer, or cannot be stored otherwise."""
    if weight.kind not in (Kind.MATRIX, Kind.EMBEDDING):
        return f"not a weight of a layer: {weight.kind}"
    if weight.quantization is not None or weight.dtype.is_integer():
        return "quantized already"
    if any(node.op_type == "QuantizeLinear" for use in weight.uses for node in use.path):
        return "quantized already, by QuantizeLinear behind it"
    if weight.dtype not in FLOATS:
        return f"{weight.dtype.name.lower()}, not float, float16, bfloat16 or double"
    if len(weight.shape) < 2:
        return "a vector, not a matrix"
    if isinstance(weight.tensor, SparseTensor):
        return "stored sparse, and would be dense once changed"
    if weight.overridable:
        return "the model's caller may pass another tensor for it"
    if any(map(is_annotated, weight.values)):
        return "it has a quantization annotation"
    return TOO_SMALL if weight.nbytes <= SMALLEST else None


def _axis(weight: Weight) -> int | None:
    """An axis whose elements may have scales of their own: any would do, for decoding yields plain floats."""
    for use in weight.uses:
        if use.kind is Kind.EMBEDDING and not use.path:
            axis = use.node.attributes.get_int("axis", 0) if use.node.op_type == "Gather" else 0
            return axis % len(weight.shape)
        if use.output_axis is not None:
            return use.output_axis
    return None


def _is_plain_factor(weight: Weight, use: Use) -> bool:
    """Whether the use is as the second factor of a MatMul or Gemm, as it is stored."""
    node = use.node
    if node.domain or node.op_type not in ("MatMul", "Gemm") or use.port != 1 or use.path or len(weight.shape) != 2:
        return False
    if weight.dtype is not ir.DataType.FLOAT or weight.value.graph is not node.graph or weight.place != "initializer":
        return False
    plain = not node.attributes.get_int("transA", 0) and not node.attributes.get_int("transB", 0)
    return plain and all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))


def _rows(use: Use) -> float:
    """How many rows of activations meet the weight in a run; infinite where that is not known."""
    value = use.node.inputs[0]
    sizes = None if value is None or value.shape is None else list(value.shape)[:-1]
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return math.inf
    return math.prod(size for size in sizes if isinstance(size, int))
