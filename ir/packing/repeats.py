"""Tensors that are one value, or repeat a block: the block, stretched."""

from __future__ import annotations

import onnx_ir as ir

from ..storage import reader
from .census import Census
from .streams import Flow
from .tape import Tape


class Repeats:
    """The block once, and an Expand."""

    word, opset = "repeat", 8

    def nodes(self, census: Census) -> int:
        return 2

    def bytes(self, census: Census) -> int | None:
        found = census.repeat
        return None if found is None else found.before * found.block * census.bits.itemsize

    def build(self, tape: Tape, census: Census) -> ir.Value:
        found = census.repeat
        assert found is not None

        def once() -> Flow:
            read, step = reader(census.tensor), found.times * found.block
            return (read(start, start + found.block) for start in range(0, census.size, step))

        stored = tape.stored("block", once, found.before * found.block, census.dtype)
        block = tape.op("Reshape", stored, tape.dims(found.before, 1, found.block))
        shape = tape.dims(found.before, found.times, found.block)
        return tape.op("Expand", block, shape, length=census.size, rows=True)
