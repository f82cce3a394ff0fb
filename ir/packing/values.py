"""How the values of elements are held, wherever the elements are. Each kind: its bytes, and the nodes that read it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir

from ..storage import Array
from . import digits
from .census import Census
from .streams import Flow, Make
from .tape import Tape


class Values(Protocol):
    """A storage of values."""

    word: str

    def nodes(self, census: Census, count: int) -> int:
        """About how many nodes read them."""
        ...

    def opset(self, census: Census) -> int:
        """The least that its operators need."""
        ...

    def bytes(self, census: Census, count: int) -> int | None:
        """What they take; None where they cannot be held so."""
        ...

    def build(self, tape: Tape, census: Census, count: int, patterns: Make) -> ir.Value:
        """Nodes whose last gives them, in order, in the tensor's type; maybe more after the last.

        They come as patterns, the bits of elements.
        """
        ...


class Plain:
    """As they are."""

    word = "dense"

    def nodes(self, census: Census, count: int) -> int:
        return 0

    def opset(self, census: Census) -> int:
        return 1

    def bytes(self, census: Census, count: int) -> int | None:
        return count * census.bits.itemsize

    def build(self, tape: Tape, census: Census, count: int, patterns: Make) -> ir.Value:
        kind = census.dtype.numpy()
        return tape.stored("values", lambda: (block.view(kind) for block in patterns()), count, census.dtype)


class Narrow:
    """In a narrower type that a Cast brings every value back from."""

    word = "narrow"

    def nodes(self, census: Census, count: int) -> int:
        return 1

    def opset(self, census: Census) -> int:
        return 13 if census.narrow is ir.DataType.BFLOAT16 else 9

    def bytes(self, census: Census, count: int) -> int | None:
        return None if census.narrow is None else int(count * census.narrow.itemsize)

    def build(self, tape: Tape, census: Census, count: int, patterns: Make) -> ir.Value:
        assert census.narrow is not None
        kind, narrow = census.dtype.numpy(), census.narrow.numpy()
        stored = tape.stored(
            "narrow", lambda: (block.view(kind).astype(narrow) for block in patterns()), count, census.narrow
        )
        return tape.op("Cast", stored, length=count, to=census.dtype)


class Palette:
    """As numbers in a table of the distinct ones."""

    word = "palette"

    def nodes(self, census: Census, count: int) -> int:
        limit = 0 if census.palette is None else len(census.palette)
        plane, *more = digits.planes(limit, count)
        if more or not plane.needs_table:
            return 1 + digits.nodes(limit, count)
        return 3 + 2 * (digits.padded(limit, count) > count)

    def opset(self, census: Census) -> int:
        return 11

    def bytes(self, census: Census, count: int) -> int | None:
        if census.palette is None:
            return None
        limit = len(census.palette)
        return digits.stored_bytes(limit, count) + limit * census.bits.itemsize if limit > 1 else None

    def build(self, tape: Tape, census: Census, count: int, patterns: Make) -> ir.Value:
        palette = census.palette
        assert palette is not None
        limit = len(palette)

        def codes() -> Flow:
            return (numbers(palette, block) for block in patterns())

        stored, full = digits.write(tape, "codes", limit, count, codes), digits.padded(limit, count)
        plane, *more = digits.planes(limit, count)
        if more or plane.digits == 1:
            table = tape.constant("palette", palette.view(census.dtype.numpy()))
            return tape.picked(table, digits.read(tape, limit, count, stored))
        filled = np.concatenate([palette, np.repeat(palette[-1:], plane.base - limit)])  # a row for every digit
        table = tape.constant("palette", filled.view(census.dtype.numpy()))
        rows = tape.op("Gather", table, plane.table(tape, 0))
        index = tape.op("Cast", stored[0], to=ir.DataType.INT32)
        return tape.op("Gather", rows, index, length=full, rows=True)


def numbers(palette: Array, patterns: Array) -> Array:
    """The place of each pattern in the palette."""
    if patterns.itemsize > 2:
        return np.searchsorted(palette, patterns)
    places = np.zeros(1 << (8 * patterns.itemsize), np.int64)
    places[palette] = np.arange(len(palette))
    return places[patterns]


VALUES: tuple[Values, ...] = (Plain(), Narrow(), Palette())
