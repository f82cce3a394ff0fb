"""What operators cost that work element by element, or move elements: the rows of ``costs.py`` by number of elements.

Operators on images are measured where they stand in real nets, behind a convolution and before another: there both
float and integer kernels keep to a layout of channels of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto
from slopes import BOTH, Build, Net, differences, ending, rounded, slopes

ELEMENTS = (256, 4096, 65536, 1048576)
ALONE = ("Relu", "HardSwish", "HardSigmoid", "Tanh", "Erf", "Exp", "Sqrt", "Neg", "Softplus", "Elu", "Abs", "Log")
ALONE_PAIRS = ("Sub", "Div", "Max", "Pow")
FLOAT = (False,)
PLANE = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}  # a pool that keeps the size
FLOOR = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "half_pixel"}
LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
TWICE = np.array([1, 1, 2, 2], np.float32)

Row = tuple[int, list[float]]  # elements; nanoseconds in float, on int8


def image(elements: int) -> list[int]:
    """[1, channels, side, side] of about as many elements."""
    channels = 16 if elements < 65536 else 64
    side = max(1, math.isqrt(elements // channels))
    return [1, channels, side, side]


def chain(
    operator: str, shape: Sequence[int], *tensors: Any, pair: bool = False, conv: bool = False, **attributes: Any
) -> Build:
    """Operators that keep the shape, one after the other; ``pair``: with a second operand, ``conv``: behind a Conv."""

    def build(net: Net, count: int) -> None:
        value, second = net.input(shape), [net.input(shape)] if pair else []
        value = net.conv(value, [shape[1], shape[1], 1, 1]) if conv else value
        for _ in range(count):
            value = net.operator(operator, [value, *second, *map(net.constant, tensors)], **attributes)
        if conv:
            net.corner(value, shape[2:])
        else:
            net.output(value)

    return build


def beside(operator: str, shape: Sequence[int], *tensors: Any, **attributes: Any) -> Build:
    """Operators that do not keep the shape, each of an input of its own."""

    def build(net: Net, count: int) -> None:
        for _ in range(count):
            net.end(net.operator(operator, [net.input(shape), *map(net.constant, tensors)], **attributes))

    return build


def residual(shape: Sequence[int], *, add: bool) -> Build:
    """Convolutions one after the other, each with an Add behind it or without."""

    def build(net: Net, count: int) -> None:
        value = skip = net.conv(net.input(shape), [shape[1], shape[1], 1, 1])
        for _ in range(count):
            value = net.conv(value, [shape[1], shape[1], 1, 1])
            if add:
                value = net.operator("Add", [value, skip])
        net.corner(value, shape[2:])

    return build


def between(operator: str, shape: Sequence[int], after: Sequence[int], *tensors: Any, **attributes: Any) -> Build:
    """An operator between two convolutions each; ``after`` is the shape it gives. Without one: each ends by itself."""

    def build(net: Net, count: int) -> None:
        x, wide = net.input([1, 16, *shape[2:]]), net.conv(net.input([1, 16, *after[2:]]), [after[1], 16, 1, 1])
        for _ in range(count):
            y = net.conv(x, [shape[1], 16, 1, 1])
            if operator:
                constants = ["" if tensor is None else net.constant(tensor) for tensor in tensors]
                y = net.operator(operator, [y, *constants], **attributes)
            else:
                net.corner(y, shape[2:])
                y = wide
            net.corner(net.conv(y, [16, after[1], 1, 1]), after[2:])

    return build


def joined(shape: Sequence[int], *, join: bool) -> Build:
    """Pairs of convolutions, joined along the channels or not."""

    def build(net: Net, count: int) -> None:
        x = net.input([1, 16, *shape[2:]])
        for _ in range(count):
            pair = [net.conv(x, [shape[1], 16, 1, 1]) for _ in range(2)]
            for value in [net.operator("Concat", pair, axis=1)] if join else pair:
                net.corner(value, shape[2:])

    return build


def quantize(shape: Sequence[int]) -> Build:
    def build(net: Net, count: int) -> None:
        value = net.input(shape, quantized=False)
        for number in range(count):
            net.end(net.quantized(value, 0.02 + number / 1000), TensorProto.UINT8)

    return build


def dequantize(shape: Sequence[int]) -> Build:
    def build(net: Net, count: int) -> None:
        stored = net.quantized(net.input(shape, quantized=False))
        for number in range(count):
            net.end(net.dequantized(stored, 0.02 + number / 1000))

    return build


def within(operator: str, shape: Sequence[int], after: Sequence[int], *tensors: Any, **attributes: Any) -> list[float]:
    """Nanoseconds of an operator between two convolutions."""
    kinds = FLOAT if attributes.get("mode") == "linear" else (False, True)
    return differences(between(operator, shape, after, *tensors, **attributes), between("", shape, after), kinds, 1)


def of_size(size: int) -> dict[str, Row]:
    """The rows at one size."""
    shape, fed = image(size), ending(fed=True)
    count, width, twice = math.prod(shape), shape[-1], [*shape[:2], 2 * shape[2], 2 * shape[3]]
    norm = [np.ones(width, np.float32), np.zeros(width, np.float32)]
    limits = [np.float32(0.2), np.float32(0.8)]
    found = {name: slopes(chain(name, shape), FLOAT) for name in ALONE}
    found |= {name: slopes(chain(name, shape, pair=True), FLOAT) for name in ALONE_PAIRS}
    found |= {name: slopes(chain(name, shape, pair=True)) for name in ("Add", "Mul")}
    found |= {name: slopes(chain(name, shape)) for name in ("Sigmoid", "LeakyRelu")}
    found["Softmax"] = slopes(chain("Softmax", shape, axis=-1))
    found["Clip"] = slopes(chain("Clip", shape, *limits), FLOAT)
    found["residual Add"] = differences(residual(shape, add=True), residual(shape, add=False))
    found["MaxPool"] = slopes(chain("MaxPool", shape, conv=True, **PLANE))
    found["MaxPool apart"] = slopes(chain("MaxPool", shape, **PLANE))
    found["AveragePool"] = slopes(chain("AveragePool", shape, conv=True, **PLANE))
    found["GlobalAveragePool"] = within("GlobalAveragePool", shape, [*shape[:2], 1, 1])
    found["Transpose"] = slopes(beside("Transpose", shape, perm=[0, 2, 3, 1]), less=fed)
    found["LayerNormalization"] = slopes(beside("LayerNormalization", shape, *norm, axis=-1), FLOAT, fed)
    found["ReduceMean"] = slopes(beside("ReduceMean", shape, axes=[2, 3]), FLOAT, fed)
    found["QuantizeLinear"] = slopes(quantize(shape), FLOAT, ending())
    found["DequantizeLinear"] = slopes(dequantize(shape), FLOAT, ending())
    made = {name: (count, times) for name, times in found.items()}
    for name, attributes in (("Resize floor", FLOOR), ("Resize", NEAREST), ("Resize linear", LINEAR)):
        made[name] = (4 * count, within("Resize", shape, twice, None, TWICE, **attributes))
    made["Concat"] = (2 * count, differences(joined(shape, join=True), joined(shape, join=False), extra=1))
    return made


def rows() -> dict[str, dict[str, list[float]]]:
    """By operator and column the nanoseconds per element at ``ELEMENTS``; ``other`` stands for all not measured."""
    table: dict[str, dict[str, list[float]]] = {}
    for size in ELEMENTS:
        for name, (count, times) in of_size(size).items():
            print("   ", name, count, " ".join(f"{spent / 1e3:.2f}" for spent in times), "us", flush=True)
            for column, spent in zip(BOTH, times, strict=False):
                table.setdefault(name, {}).setdefault(column, []).append(rounded(spent / count))
    table["other"] = {"float": table["Sub"]["float"], "integer": table["Transpose"]["integer"]}
    return table
