"""Weights in the smallest exact storage that ONNX Runtime decodes as it loads the model."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from ...ir.errors import UsageError
from ...ir.files import saved_bytes
from ...ir.opset import NoConversion, raise_opset
from ...ir.packing.census import Census
from ...ir.packing.choose import LEAST, SMALL, TABLES, Storage, obstacle, slow, smallest
from ...ir.packing.decoded import decoders
from ...ir.packing.write import Packer
from ...ir.scopes import scopes
from ...ir.weights import Weight, weights
from ..base import Context, Pass, register
from ..selection import NOTHING, Selection, left_out


@register("pack-weights")
class PackWeights(Pass):
    """Store each weight exactly in the fewest bytes that standard operators decode.

    ``encoding=auto`` takes the smallest for each: ``palette`` (numbers in a table of the distinct values, 1 to 16 bits
    each), ``bitmask`` or ``gaps`` (the places of what is not the most frequent value; the values are then a palette
    themselves, where that is smaller), ``narrow`` (float16, bfloat16 or fewer bytes of an integer, where that loses
    nothing), ``repeat`` (one value, or a block that repeats), ``dense``. One that is named is used where it applies,
    the others not; ``int4`` is a palette of at most 16 values, ``fp16`` is narrow to float16.

    Every bit survives, of -0.0, NaN and denormals too. ONNX Runtime computes the decoders once, as it loads the model,
    in some 1 to 8 ms for each MB; it then runs the same kernels on the same numbers. A bitmask for elements of one byte
    takes 16, so ``auto`` leaves that. With its optimizations off it decodes in every run; a model that it saves
    optimized, or in its own format, holds dense weights again.

    Weights stay dense where decoders would take what is saved, and below ``min-bytes``. ``opset=raise`` raises an
    opset that is too old for the encodings (11 for palettes and gaps, 12 for bitmasks) where they save bytes by
    it, ``keep`` takes what the opset has. unpack-weights is the way back.
    """

    encoding: Literal["auto", "dense", "palette", "int4", "bitmask", "gaps", "narrow", "fp16", "repeat"] = "auto"
    min_bytes: int = SMALL
    opset: Literal["raise", "keep"] = "raise"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def validate(self) -> None:
        if self.min_bytes < 0:
            raise UsageError(f"pack-weights: min-bytes={self.min_bytes} is out of range; it is 0 or more.")

    def run(self, model: ir.Model, ctx: Context) -> None:
        found, small = list[tuple[Weight, Census]](), 0
        packed = {leaf for decoder in decoders(model) for leaf in decoder.leaves}
        for weight in weights(model):
            if weight.value in packed:
                continue
            if weight.nbytes < self.min_bytes:
                small += 1
            elif (reason := left_out(weight, self.only, self.keep) or obstacle(weight)) is not None:
                ctx.skip(weight, reason)
            else:
                found.append((weight, Census.of(weight.tensor)))
        if small:
            ctx.skip(f"{small} constants", f"under {self.min_bytes} bytes")
        self._raise(model, found, ctx)
        self._pack(model, found, ctx)

    def _pack(self, model: ir.Model, found: list[tuple[Weight, Census]], ctx: Context) -> None:
        """Store each weight as the opset allows, if all together save more than the tables that they share take."""
        every = list(scopes(model))
        versions = {scope.graph: scope.version for scope in every}
        chosen, saved = list[tuple[Weight, Census, Storage]](), 0
        for weight, census in found:
            assert weight.value.graph is not None
            storage = self._smallest(census, versions[weight.value.graph])
            saving = 0 if storage is None else storage.saves(census, weight.value.name or "")
            if storage is None or not saving:
                ctx.skip(weight, self._reason(census, storage))
            else:
                chosen.append((weight, census, storage))
                saved += saving
        if saved <= TABLES:
            for weight, _, _ in chosen:
                ctx.skip(weight, "all that could be packed would save no more than the tables that decode it take")
            return
        packer = Packer(model, every)
        for weight, census, storage in chosen:
            packer.pack(weight, census, storage)
            ctx.change(weight, f"stored as {storage.word}", bytes_before=census.bytes, bytes=storage.bytes)
        packer.finish()

    def _smallest(self, census: Census, opset: int | None) -> Storage | None:
        return None if self.encoding == "dense" else smallest(census, self.encoding, opset)

    def _reason(self, census: Census, storage: Storage | None) -> str:
        if self.encoding == "dense":
            return "asked to stay dense"
        masked = smallest(census, "bitmask") if self.encoding == "auto" and slow("bitmask", census) else None
        if masked is not None and masked.bytes + LEAST < census.bytes:
            return f"encoding=bitmask would take {masked.bytes} bytes, but elements of one byte load slowly from it"
        if storage is None:
            return "no encoding takes it" if self.encoding == "auto" else f"{self.encoding} cannot hold it"
        if storage.bytes >= census.bytes:
            return "no encoding takes fewer bytes"
        return f"too small: {storage.word} would save less than its decoder takes"

    def _raise(self, model: ir.Model, found: list[tuple[Weight, Census]], ctx: Context) -> None:
        """Raise the opset where that saves bytes, and say so; where it cannot be, say why."""
        versions = [scope.version for scope in scopes(model) if scope.version]
        if self.opset == "keep" or not versions:
            return
        least = min(versions)
        gain, to = 0, least
        for weight, census in found:
            best, now = (self._smallest(census, opset) for opset in (None, least))
            if best is not None and best.opset > least:
                name = weight.value.name or ""
                more = best.saves(census, name) - (now.saves(census, name) if now is not None else 0)
                gain, to = gain + more, max(to, best.opset if more else 0)
        if not gain:
            return
        to = max(to, *versions)
        newest = ctx.runner.newest_opset() if ctx.has("runner") else to
        if to > newest:
            ctx.skip(
                "the opset", f"not raised to {to}, which would save {gain} bytes: ONNX Runtime here takes {newest}"
            )
            return
        try:
            trial = model.clone()
            raise_opset(trial, to)
            grown = saved_bytes(trial) - saved_bytes(model)
            if grown >= gain:
                ctx.skip("the opset", f"not raised to {to}: that takes {grown} bytes, and saves {gain}")
                return
            raised = raise_opset(model, to)
        except NoConversion as error:
            ctx.skip("the opset", f"not raised to {to}, which would save {gain} bytes: {error}")
            return
        for place, version in raised.stamps:
            ctx.change(place, f"opset {version} to {raised.to}, whose operators decode weights")
        for address, what in raised.rewritten:
            ctx.change(address, f"rewritten: {what}")
