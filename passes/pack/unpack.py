"""Packed and sparse weights as plain tensors again."""

from __future__ import annotations

import onnx_ir as ir

from ...ir.edit import Names
from ...ir.errors import one_line
from ...ir.packing.decoded import Decoder, decoders
from ...ir.packing.write import unpack
from ...ir.scopes import scopes
from ...ir.sparse import DENSE_LIMIT, SparseTensor
from ...ir.weights import weights
from ..base import Context, Pass, register
from ..selection import NOTHING, Selection


@register("unpack-weights")
class UnpackWeights(Pass):
    """Store weights as plain tensors again: what pack-weights packed, and sparse ones.

    A packed weight is known by what computes it: a Reshape of operators that move and count elements of constants, and
    give more bytes than those hold. Names play no part, so those that ``clean`` has touched, or another tool made, are
    found too. Each gets the bits that it had. Large ones are computed as the model is saved.

    The opset stays where pack-weights raised it.
    """

    only: Selection = NOTHING
    keep: Selection = NOTHING

    def run(self, model: ir.Model, ctx: Context) -> None:
        every = {scope.graph: scope for scope in scopes(model)}
        found = list[tuple[Decoder, ir.TensorProtocol]]()
        for decoder in decoders(model):
            assert decoder.value.graph is not None
            address = every[decoder.value.graph].address(decoder.value)
            if (reason := self._left_out(decoder.value)) is not None:
                ctx.skip(address, reason)
                continue
            try:
                tensor = decoder.tensor()
            except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
                ctx.skip(address, f"it cannot be computed: {one_line(error)}")
                continue
            found.append((decoder, tensor))
            ctx.change(address, "stored plainly again", bytes_before=decoder.bytes, bytes=tensor.nbytes)
        unpack(found, Names(model))
        self._fill(model, ctx)

    def _left_out(self, subject: object) -> str | None:
        if subject in self.keep:
            return "kept by request"
        return "not among those asked for" if self.only and subject not in self.only else None

    def _fill(self, model: ir.Model, ctx: Context) -> None:
        """Sparse constants as dense ones."""
        for weight in weights(model):
            tensor = weight.tensor
            if not isinstance(tensor, SparseTensor):
                continue
            reason = self._left_out(weight)
            if reason is None and max(tensor.nbytes, tensor.size) > DENSE_LIMIT:
                reason = f"it would take {tensor.nbytes} bytes dense, past the limit of {DENSE_LIMIT}"
            if reason is not None:
                ctx.skip(weight, reason)
                continue
            weight.replace(ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name))
            ctx.change(weight, "sparse no more", bytes_before=tensor.stored_bytes, bytes=tensor.nbytes)
