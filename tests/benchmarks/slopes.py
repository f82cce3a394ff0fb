"""Nets of one operator, many times over, to measure what it costs by itself: see ``costs.py``."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROUNDS = 11
SAMPLE = 1e-3  # seconds of a sample
MANY = 5
LEAST = 20.0  # nanoseconds that an operator takes: a difference below that is noise
BOTH = ("float", "integer")

Run = Callable[[], Any]
Build = Callable[["Net", int], None]


class Net:
    """A net under construction: in float, or of integer kernels, with Q and DQ around every operator."""

    def __init__(self, *, integer: bool) -> None:
        self.integer = integer
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.feed: dict[str, Any] = {}
        self.random = np.random.default_rng(0)

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n{name}", domain=domain, **attributes))
        return name

    def input(self, shape: Sequence[int], *, quantized: bool | None = None) -> str:
        """A graph input: of floats, or of integers that a DequantizeLinear reads."""
        name = f"x{len(self.inputs)}"
        quantized = self.integer if quantized is None else quantized
        dtype = TensorProto.UINT8 if quantized else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        values = self.random.random(shape, np.float32)
        self.feed[name] = (values * 255).astype(np.uint8) if quantized else values
        return self.dequantized(name) if quantized else name

    def quantized(self, value: str, scale: float = 0.02) -> str:
        return self.node("QuantizeLinear", [value, self.constant(np.float32(scale)), self.constant(np.uint8(100))])

    def dequantized(self, value: str, scale: float = 0.02) -> str:
        return self.node("DequantizeLinear", [value, self.constant(np.float32(scale)), self.constant(np.uint8(100))])

    def weight(self, shape: Sequence[int], axis: int) -> str:
        if not self.integer:
            return self.constant(self.random.standard_normal(shape, np.float32) / 10)
        stored = self.constant(self.random.integers(-127, 128, shape, np.int8))
        scale = self.constant(self.random.uniform(0.001, 0.002, shape[axis]).astype(np.float32))
        zero = self.constant(np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", [stored, scale, zero], axis=axis)

    def operator(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        value = self.node(operator, inputs, **attributes)
        return self.dequantized(self.quantized(value)) if self.integer else value

    def conv(self, x: str, shape: Sequence[int], stride: int = 1, group: int = 1) -> str:
        """A convolution that keeps the size but for its stride; ``shape`` is that of its weight."""
        window = list(shape[2:])
        pads, strides = [side // 2 for side in window] * 2, [stride] * len(window)
        inner = [x, self.weight(shape, 0), self.constant(np.zeros(shape[0], np.float32))]
        return self.operator("Conv", inner, group=group, pads=pads, strides=strides, kernel_shape=window)

    def output(self, value: str, dtype: int = TensorProto.FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(value, dtype, None))

    def end(self, value: str, dtype: int = TensorProto.FLOAT) -> None:
        """Give out a little of a value, in its own type: what it costs to give out all of it is not the operator's."""
        number = len(self.outputs) + 1  # for equal Slices of one value would be merged
        ends = [self.constant(np.array([end])) for end in (0, number, 0)]
        make = self.operator if dtype == TensorProto.FLOAT else self.node
        self.output(make("Slice", [value, *ends]), dtype)

    def corner(self, value: str, sides: Sequence[int]) -> None:
        """As ``end``, of an image: a pool that reads one pixel, which keeps the layout of channels."""
        strides = [side + len(self.outputs) for side in sides]
        pooled = self.operator("MaxPool", [value], kernel_shape=[1] * len(sides), strides=strides)
        self.output(pooled)

    def session(self, opset: int = 17) -> Run:
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return opened(model.SerializeToString(), self.feed)


def opened(model: bytes | str, feed: dict[str, Any]) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)


def seconds(runs: Sequence[Run], rounds: int = ROUNDS) -> list[float]:
    """The least CPU seconds of one call of each, taken in turns."""
    repeats = []
    for run in runs:
        run()
        start = time.thread_time()
        run()
        repeats.append(max(1, min(200, int(SAMPLE / max(time.thread_time() - start, 1e-6)))))
    least = [math.inf] * len(runs)
    for _ in range(rounds):
        for index, (run, count) in enumerate(zip(runs, repeats, strict=True)):
            start = time.thread_time()
            for _ in range(count):
                run()
            least[index] = min(least[index], (time.thread_time() - start) / count)
    return least


def slopes(build: Build, kinds: Sequence[bool] = (False, True), less: Sequence[float] = (0.0, 0.0)) -> list[float]:
    """Nanoseconds of one operator, in float and on int8, in nets that ``build`` makes with a number of it."""
    runs = []
    for integer, count in itertools.product(kinds, (1, MANY)):
        net = Net(integer=integer)
        build(net, count)
        runs.append(net.session())
    found = seconds(runs)
    pairs = zip(found[::2], found[1::2], less, strict=False)
    return [max((many - one) / (MANY - 1) * 1e9 - ending, LEAST) for one, many, ending in pairs]


def differences(one: Build, other: Build, kinds: Sequence[bool] = (False, True), extra: float = 0) -> list[float]:
    """Nanoseconds of what ``one`` has more of than ``other``; ``extra`` counts the pools that only the other has."""
    runs = []
    for integer, build in itertools.product(kinds, (one, other)):
        net = Net(integer=integer)
        build(net, MANY)
        runs.append(net.session())
    found = seconds(runs, 2 * ROUNDS)
    pairs = zip(found[::2], found[1::2], ending(2), strict=False)
    return [max((more - less) / MANY * 1e9 + extra * pool, LEAST) for more, less, pool in pairs]


@functools.cache
def ending(dims: int = 0, *, fed: bool = False) -> list[float]:
    """Nanoseconds of what ends an operator: a Slice, or where it has ``dims`` of space a pool of one pixel.

    ``fed``: and of an input of its own before it.
    """

    def build(net: Net, count: int) -> None:
        if not dims:
            value = net.input([64])
            for _ in range(count):
                net.end(net.input([64]) if fed else value)
        else:
            value = net.conv(net.input([1, 16, *[4] * dims]), [16, 16, *[1] * dims])
            for _ in range(count):
                net.corner(value, [4] * dims)

    return slopes(build)


def rounded(number: float) -> float:
    return float(f"{number:.3g}")
