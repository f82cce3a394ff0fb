"""Float16: in the file only, or also in computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ...ir.edit import Names, insert_after
from ...ir.errors import UsageError
from ...ir.ops import Kind
from ...ir.references import is_annotated
from ...ir.scopes import scopes
from ...ir.weights import Weight, weights
from ..base import Context, Effect, Feeds, Outputs, Pass, register
from ..selection import NOTHING, Selection, left_out
from .half import FLOAT, fault, halved, to_half

LEAST_OPSET = 6  # from which Cast names its type by a number
_KEPT = (Kind.SCALE, Kind.ZERO_POINT, Kind.SHAPE, Kind.INDEX, Kind.OUTPUT, Kind.UNUSED)
_FOLDED = 1 << 10  # bytes by which fold-constants lets a file grow: less saving than that it would undo


@register("to-float16")
class ToFloat16(Pass):
    """Hold the weights in float16, which halves the file; compute in float32 still, or in float16 too.

    ``mode=store``: each float32 constant that is large enough to pay is held in float16, with a Cast to float32 behind
    it, which ONNX Runtime computes once, as it loads the model. Runs are as fast as before, inputs and outputs the
    same. Constants beyond the range of float16 (65504), or so small that it would lose more than rounding does, stay
    float32; scales, zero points, shapes and what is computed with in integers too.

    ``mode=compute``: layers, and the elementwise and moving operators around them, compute in float16, for hardware
    that gains from that. ONNX Runtime's CPU does not: it casts to float32 and back around most of them, and is slower.
    What may lose too much stays float32, with Casts around it: norms, Softmax, exponentials, powers, divisions,
    reductions, recurrent and resizing operators, all others that are not known to be safe, and the bodies of If, Loop
    and Scan and functions. Values past 65504 become infinite; constants past it stay float32, and what is computed from
    them is clipped. Inputs and outputs stay float32 unless ``io=float16``.
    """

    mode: Literal["store", "compute"] = "store"
    io: Literal["keep", "float16"] = "keep"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        return Effect.LOSSY

    def validate(self) -> None:
        if self.io == "float16" and self.mode == "store":
            raise UsageError("to-float16: io=float16 changes what the model computes with; add mode=compute.")

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]] | None:
        """With io=float16: the outputs of ``before`` for the same numbers in float32, rounded to float16."""
        if self.io == "keep":
            return None

        def expected(feeds: Feeds) -> Iterator[Outputs]:
            wide = ({name: _as(array, np.float16, np.float32) for name, array in feed.items()} for feed in feeds)
            for found in ctx.runner.run(before, wide):
                yield {name: _as(array, np.float32, np.float16) for name, array in found.items()}

        return expected

    def run(self, model: ir.Model, ctx: Context) -> None:
        oldest = min((scope.version for scope in scopes(model) if scope.version), default=LEAST_OPSET)
        if oldest < LEAST_OPSET:
            ctx.skip("main graph", f"its opset {oldest} has no Cast to float16 by number; raise-opset first")
            return
        names = Names(model)
        if self.mode == "compute":
            to_half(model, names, self.only, self.keep, ctx, interface=self.io == "float16")
        for weight in weights(model):
            if weight.dtype in (FLOAT, ir.DataType.DOUBLE):
                reason = left_out(weight, self.only, self.keep) or _obstacle(weight)
                if reason is None:
                    _store(weight, names, ctx)
                else:
                    ctx.skip(weight, reason)
        if not ctx.ledger.changes and not ctx.ledger.skips:
            ctx.skip("model", "it has no constants of floats")


def _obstacle(weight: Weight) -> str | None:
    """Why a constant stays as it is."""
    if weight.dtype is not FLOAT:
        return f"{weight.dtype.name.lower()}, not float32"
    kinds = {use.kind for use in weight.uses} or {weight.kind}
    if weight.output or kinds & {*_KEPT}:
        return f"not a weight: {weight.kind}"
    if weight.overridable:
        return "the model's caller may pass another tensor for it"
    if any(map(is_annotated, weight.values)):
        return "it has a quantization annotation"
    if any(node.op_type == "QuantizeLinear" for use in weight.uses for node in use.path):
        return "quantized already, by QuantizeLinear behind it"
    saved, node = weight.nbytes // 2, 4 * len((weight.value.name or "").encode()) + 75
    pays = saved > max(_FOLDED, node)
    return fault(weight.tensor) or (None if pays else "too small: the Cast behind it would take what it saves")


def _store(weight: Weight, names: Names, ctx: Context) -> None:
    before, old = weight.nbytes, weight.tensor
    weight.replace(halved(old))
    for value in weight.values:
        stem = value.name or "weight"
        name = names.fresh(f"{stem}_float32")
        made = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=value.shape.copy() if value.shape else None)
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(FLOAT))], outputs=[made], name=name)
        insert_after(value, node, names)
        if made.name == stem:  # the output of a branch, which keeps its name
            names.rename(value, names.fresh(f"{stem}_float16"))
    ctx.change(weight, "stored as float16, cast when loaded", bytes_before=before, bytes=weight.nbytes)


def _as(array: Any, old: type, new: type) -> Any:
    return array.astype(new) if isinstance(array, np.ndarray) and array.dtype == old else array
