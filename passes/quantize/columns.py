"""Columns of an image as channels: the same convolution, of a shape that integer kernels like better.

A first convolution reads one to three channels. ONNX Runtime's quick integer kernel takes channels by fours; for others
it copies each window of the image out and keeps sums of 32 bits. Where ``factor`` columns next to each other become the
channels of one block, those are enough. The columns of the result that lie in a block are then computed together, by
copies of the weights that stand ``stride`` columns apart, with zeros beside them (a SpaceToDepth, as TResNet begins
with, of columns alone: Ridnik et al. 2020, arXiv 2003.13630). With channels last in memory both are nothing but another
shape.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from ...ir.shapes import dims, static_dims
from ..gram import Window

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

KEY = "penjing.columns"  # of a folded Conv's metadata, which goes into the file: how its columns were folded
MOST_CHANNELS = 3  # that are folded: the fourth fills them up
_TOGETHER = 4  # input channels that ONNX Runtime's kernel takes at once
_OUTPUTS, _LEAST_OUTPUTS = 8, 16  # output channels: a multiple, and how many at least
_STEPS = 4  # columns of the result that are computed together, at most
_SHARE = 16  # one part of so many is what a model may grow by
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Folding:
    """How the columns of one Conv are folded: ``factor`` of them in a block.

    ``rows`` (0 where unknown) and ``columns`` are those of the image; ``stride``, ``dilation`` and ``width`` of the
    window and the padding around the image, in rows and columns, are those of the Conv before.
    """

    rows: int
    columns: int
    factor: int
    stride: int
    dilation: int
    width: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def steps(self) -> int:
        """Columns of the result in a block."""
        return self.factor // self.stride

    @property
    def before(self) -> int:
        """Blocks that a window reaches to the left of its own."""
        return -(-self.left // self.factor)

    @property
    def after(self) -> int:
        """Blocks that a window reaches to the right of its own."""
        reach = (self.steps - 1) * self.stride + (self.width - 1) * self.dilation - self.left
        return max(reach // self.factor, 0)

    @property
    def blocks(self) -> int:
        """The window's width in blocks."""
        return self.before + 1 + self.after

    def folded(self, weight: Array) -> Array:
        """[M, C, K, width] as [steps · M, factor · C, K, blocks]."""
        outputs, inputs, height, width = weight.shape
        made = np.zeros((self.steps, outputs, self.factor, inputs, height, self.blocks), weight.dtype)
        for step in range(self.steps):
            for place in range(width):
                block, column = self._place(step, place)
                made[step, :, column, :, :, block] = weight[..., place]
        return made.reshape(self.steps * outputs, self.factor * inputs, height, self.blocks)

    def unfolded(self, weight: Array) -> Array:
        """The inverse of ``folded``, by the first column of the result."""
        outputs, inputs, height, _ = weight.shape
        parts = weight[: outputs // self.steps].reshape(-1, self.factor, inputs // self.factor, height, self.blocks)
        places = (self._place(0, place) for place in range(self.width))
        return np.stack([parts[:, column, ..., block] for block, column in places], axis=-1)

    def _place(self, step: int, place: int) -> tuple[int, int]:
        """The block, and the column in it, that a column of the window reads for a column of the result."""
        return divmod(step * self.stride + place * self.dilation - self.left + self.before * self.factor, self.factor)

    def __str__(self) -> str:
        return " ".join(map(str, astuple(self)))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What ``str`` printed; None where it is anything else."""
        words = text.split()
        if len(words) != len(fields(cls)) or not all(word.isascii() and word.isdigit() for word in words):
            return None
        found = cls(*map(int, words))
        whole = found.factor and found.stride and found.width and found.factor % found.stride == 0
        return found if whole and found.columns % found.factor == 0 else None


def folding(conv: ir.Node) -> Folding | None:
    """How ONNX Runtime's quick integer kernel can have ``conv``, whose weight [M, C, K, width] is of known sizes; None
    where it cannot, or need not be folded for it."""
    sizes, kernel = (None if value is None else dims(unrounded(value)) for value in conv.inputs[:2])
    if kernel is None or len(kernel) != 4 or not all(isinstance(size, int) and size for size in kernel):
        return None
    outputs, inputs, *window = map(int, kernel)  # type: ignore[arg-type]
    slide = Window.of(conv, window)
    if sizes is None or len(sizes) != 4 or conv.outputs[0].shape is None:
        return None
    if inputs > MOST_CHANNELS or slide.groups != 1:
        return None
    height, width = sizes[2:]
    if not isinstance(width, int) or (slide.pads is None and not isinstance(height, int)):
        return None
    rows = height if isinstance(height, int) else 0
    if slide.pads is None and not all(map(_is_padded, (rows, width), window, slide.strides, slide.dilations)):
        return None
    (top, bottom), (left, right) = slide.margins((rows, width))
    stride, dilation = slide.strides[1], slide.dilations[1]
    made = (width + left + right - (window[1] - 1) * dilation - 1) // stride + 1
    if min(top, bottom, left, right) < 0 or made * stride != width:
        return None
    for steps in range(1, _STEPS + 1):
        factor, total = steps * stride, steps * outputs
        fits = width % factor == 0 and factor * inputs % _TOGETHER == 0
        if fits and total >= _LEAST_OUTPUTS and total % _OUTPUTS == 0:
            return Folding(rows, width, factor, stride, dilation, window[1], top, left, bottom, right)
    return None


def _is_padded(size: int, kernel: int, stride: int, dilation: int) -> bool:
    """Whether ``auto_pad`` does not cut off what a window of a large stride would never read."""
    return (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 >= size


def is_small(conv: ir.Node, found: Folding) -> bool:
    """Whether the weight grows by no more than a sixteenth of all constants of the graph."""
    graph, weight = conv.graph, conv.inputs[1]
    kernel = None if weight is None else static_dims(unrounded(weight))
    if graph is None or kernel is None:
        return True
    grown = math.prod(kernel[:3]) * (found.steps * found.factor * found.blocks - found.width)
    constants = (value.const_value for value in graph.initializers.values())
    return _SHARE * grown <= sum(tensor.size for tensor in constants if tensor is not None)


def unrounded(value: ir.Value) -> ir.Value:
    """What a value was quantized from."""
    while (node := value.producer()) is not None and node.op_type in _ROUNDING and node.inputs[0] is not None:
        value = node.inputs[0]
    return value
