"""Second moments of what a layer contracts with its weight: all that its output error depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from ..ir.trace import Use
from .points import Array, Point, Unfit

_LAYING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_PART = 1 << 23  # elements that are multiplied at a time


@dataclass(frozen=True)
class Window:
    """How a Conv slides over its input: sizes for each spatial axis, and ``groups`` of channels.

    ``pads`` are the begins, then the ends; None where ``auto_pad`` (SAME_UPPER or SAME_LOWER) decides.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    groups: int = 1
    same_upper: bool = True

    @classmethod
    def of(cls, node: ir.Node, kernel: Sequence[int]) -> Window:
        """That of a Conv whose weight has these spatial sizes."""
        rank, attributes = len(kernel), node.attributes
        auto_pad = attributes.get_string("auto_pad", "NOTSET")
        pads = tuple(attributes.get_ints("pads", (0,) * 2 * rank)) if auto_pad == "NOTSET" else (0,) * 2 * rank
        return cls(
            tuple(kernel),
            tuple(attributes.get_ints("strides", (1,) * rank)),
            tuple(attributes.get_ints("dilations", (1,) * rank)),
            None if auto_pad.startswith("SAME") else pads,
            attributes.get_int("group", 1),
            auto_pad != "SAME_LOWER",
        )

    def margins(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """How many zeros go before and behind each spatial axis of an input of these sizes."""
        rank = len(self.kernel)
        if self.pads is not None:
            return [(self.pads[axis], self.pads[axis + rank]) for axis in range(rank)]
        found = []
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.same_upper else (more, less))
        return found

    def patches(self, sample: Array, positions: int) -> Array:
        """At most ``positions`` patches of one ``sample`` [C, sizes...]: [groups, positions, C/groups · kernel]."""
        rank = len(self.kernel)
        padded = np.pad(sample, [(0, 0), *self.margins(sample.shape[1:])])
        reach = [(kernel - 1) * dilation + 1 for kernel, dilation in zip(self.kernel, self.dilations, strict=True)]
        if any(size < least for size, least in zip(padded.shape[1:], reach, strict=True)):
            return np.zeros((self.groups, 0, len(sample) // self.groups * math.prod(self.kernel)), sample.dtype)
        view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(1, rank + 1)))
        view = view[_index(slice(None, None, step) for step in (1, *self.strides, *self.dilations))]
        sizes = view.shape[1 : rank + 1]
        chosen = np.unravel_index(_spaced(math.prod(sizes), positions), sizes)
        found = view[_index((slice(None), *chosen))]  # [C, positions, kernel...]
        found = found.reshape(self.groups, -1, found.shape[1], math.prod(self.kernel)).swapaxes(1, 2)
        return np.asarray(found.reshape(self.groups, found.shape[1], -1))


@dataclass(frozen=True)
class Gram(Point):
    """The sum of x xᵀ over the vectors x [K] that a layer multiplies its weight with, for each group.

    ``axis`` of the value is contracted; with a ``window`` (for Conv) x is a patch of one group, in the order of its
    weight [M, C/groups, k1, k2, ...]. Of each sample (index of the first of three or more axes) at most ``positions``
    vectors count, evenly spaced, whatever else is in the run.
    """

    axis: int = -1
    window: Window | None = None
    positions: int = 256

    @classmethod
    def of(cls, place: str, node: ir.Node, data: int, kernel: Sequence[int], positions: int) -> Gram:
        """What a Conv, whose weight has the spatial sizes ``kernel``, a Gemm or MatMul contracts of its input ``data``,
        whose address is ``place``."""
        if node.op_type == "Conv":
            return cls(place, window=Window.of(node, kernel), positions=positions)
        axis = -1 if data == 0 else -2
        turned = node.op_type == "Gemm" and node.attributes.get_int("transA" if data == 0 else "transB", False)
        return cls(place, axis=-3 - axis if turned else axis, positions=positions)

    def start(self) -> GramStatistic:
        return GramStatistic(self)

    def vectors(self, array: Array) -> Iterator[Array]:
        """The vectors in ``array``, [groups, n, K], some at a time."""
        if self.window is None:
            if not -array.ndim <= self.axis < array.ndim and array.ndim != 1:
                raise Unfit(f"has {array.ndim} dimensions, and so no axis {self.axis}")
            moved = np.moveaxis(array, self.axis if array.ndim > 1 else -1, -1)
            width = moved.shape[-1]
            if moved.ndim > 2:
                moved = moved.reshape(len(moved), -1, width)
                moved = moved[:, _spaced(moved.shape[1], self.positions)]
            rows = moved.reshape(1, -1, width)
            step = max(1, _PART // max(1, width))
            yield from (rows[:, start : start + step] for start in range(0, rows.shape[1], step))
        else:
            step = max(1, _PART // max(1, self.positions * array.shape[1] * math.prod(self.window.kernel)))
            for start in range(0, len(array), step):
                patches = [self.window.patches(sample, self.positions) for sample in array[start : start + step]]
                yield np.concatenate(patches, axis=1)


class GramStatistic:
    """``total`` [groups, K, K], float64: the sum of x xᵀ; None of no vectors. ``count``: how many x a group.

    Sums of floats depend on their order, in the last bits.
    """

    def __init__(self, point: Gram) -> None:
        self.point = point
        self.total: Array | None = None
        self.count = 0

    def update(self, array: Array) -> None:
        if not array.size:
            return
        for part in self.point.vectors(array):
            vectors = part.astype(np.float64)
            one = len(vectors) == 1  # numpy computes half of a matrix times its own transpose, but not of a stack
            self._add((vectors[0].T @ vectors[0])[None] if one else vectors.swapaxes(1, 2) @ vectors, vectors.shape[1])

    def merge(self, other: Self) -> None:
        if other.total is not None:
            self._add(other.total, other.count)

    def _add(self, product: Array, count: int) -> None:
        if self.total is None:
            self.total = np.zeros_like(product)
        if self.total.shape != product.shape:
            raise Unfit(
                f"has {self.total.shape[-1]} inputs of its layer in one run, and {product.shape[-1]} in another"
            )
        self.total += product
        self.count += count


def in_its_layout(use: Use) -> bool:
    """Whether a layer takes the elements of its weight in the order in which they are stored: of a matrix, whatever was
    transposed, its axes tell; of a Conv's weight they do not tell the kernel's."""
    return use.node.op_type != "Conv" or all(node.op_type not in _LAYING for node in use.path)


def _index(parts: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(parts)


def _spaced(count: int, most: int) -> Array:
    """At most ``most`` of range(``count``), evenly spaced."""
    return np.arange(min(count, most)) * count // max(1, min(count, most))
