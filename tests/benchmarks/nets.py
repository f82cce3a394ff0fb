"""ResNet-18 and MobileNetV2 for images of 224 x 224 with random weights, as exporters write them.

He et al., 2016 (arXiv 1512.03385) and Sandler et al., 2018 (arXiv 1801.04381), with BatchNormalization as nodes of its
own. Weights are He-initialised; running means and variances are those that the layer's inputs have in expectation, so
that activations keep a sane scale from end to end. The first dimension is open: ``image`` is float32
[batch, 3, size, size], ``logits`` float32 [batch, 1000].
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 1000


class _Builder:
    """A chain of layers under construction: ``x`` names a value, ``channels`` says how many it has.

    ``power`` is the mean square of a value to expect, from which the statistics of the next normalization follow.
    """

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.channels = {"image": 3}
        self.power = {"image": 1.0}

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def node(
        self, op_type: str, inputs: list[str], name: str, channels: int, power: float = 1.0, **attributes: object
    ) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        self.channels[name], self.power[name] = channels, power
        return name

    def convolution(self, x: str, name: str, channels: int, kernel: int, stride: int = 1, group: int = 1) -> str:
        """Conv without a bias, and BatchNormalization."""
        shape = (channels, self.channels[x] // group, kernel, kernel)
        weight = self.random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        sides = [kernel // 2] * 4
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": sides, "group": group}
        made = self.node("Conv", [x, self.constant(f"{name}.weight", weight)], name, channels, **attributes)
        spread = math.sqrt(2 * self.power[x])
        statistics = {
            "scale": self.random.uniform(0.5, 1.5, channels),
            "bias": 0.3 * self.random.standard_normal(channels),
            "mean": 0.2 * spread * self.random.standard_normal(channels),
            "var": spread**2 * self.random.uniform(0.7, 1.4, channels),
        }
        given = [self.constant(f"{name}.norm.{key}", array) for key, array in statistics.items()]
        return self.node("BatchNormalization", [made, *given], f"{name}.norm", channels)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], f"{x}.relu", self.channels[x], self.power[x] / 2)

    def relu6(self, x: str) -> str:
        return self.node("Clip", [x, "zero", "six"], f"{x}.relu6", self.channels[x], self.power[x] / 2)

    def add(self, x: str, y: str, name: str) -> str:
        return self.node("Add", [x, y], name, self.channels[x], self.power[x] + self.power[y])

    def model(self, x: str, name: str, size: int) -> onnx.ModelProto:
        """The classifier behind ``x``, and all of it as a model."""
        channels = self.channels[x]
        pooled = self.node("GlobalAveragePool", [x], "pool", channels)
        flat = self.node("Flatten", [pooled], "flat", channels)
        weight = self.random.standard_normal((CLASSES, channels)) * math.sqrt(1 / channels)
        given = [self.constant("head.weight", weight), self.constant("head.bias", np.zeros(CLASSES))]
        self.node("Gemm", [flat, *given], "logits", CLASSES, transB=1)
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
        graph = helper.make_graph(self.nodes, name, [image], [logits], self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resnet18(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """ResNet-18: 20 convolutions, 11.7 million weights, 1.8 G multiplications at 224."""
    net = _Builder(seed)
    x = net.relu(net.convolution("image", "stem", 64, 7, 2))
    x = net.node("MaxPool", [x], "stem.pool", 64, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, channels in enumerate((64, 128, 256, 512)):
        for place in range(2):
            name, stride = f"stage{stage}.{place}", 2 if stage and not place else 1
            y = net.relu(net.convolution(x, f"{name}.conv1", channels, 3, stride))
            y = net.convolution(y, f"{name}.conv2", channels, 3)
            if stride > 1:
                x = net.convolution(x, f"{name}.skip", channels, 1, stride)
            x = net.relu(net.add(y, x, f"{name}.sum"))
    return net.model(x, "resnet18", size)


# Expansion, channels, repeats and first stride of each stage; table 2 of the paper.
_MOBILENETV2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """MobileNetV2 at width 1: 52 convolutions, 17 of them depthwise, 3.5 million weights, 0.3 G multiplications."""
    net = _Builder(seed)
    net.constant("zero", np.zeros(()))
    net.constant("six", np.full((), 6.0))
    x = net.relu6(net.convolution("image", "stem", 32, 3, 2))
    for stage, (expansion, channels, repeats, first) in enumerate(_MOBILENETV2):
        for place in range(repeats):
            x = _inverted(net, x, f"stage{stage}.{place}", expansion, channels, 1 if place else first)
    return net.model(net.relu6(net.convolution(x, "last", 1280, 1)), "mobilenetv2", size)


def _inverted(net: _Builder, x: str, name: str, expansion: int, channels: int, stride: int) -> str:
    """An inverted residual: wide by 1 x 1, depthwise 3 x 3, narrow by 1 x 1 without an activation."""
    wide = net.channels[x] * expansion
    y = net.relu6(net.convolution(x, f"{name}.wide", wide, 1)) if expansion > 1 else x
    y = net.relu6(net.convolution(y, f"{name}.depth", wide, 3, stride, group=wide))
    y = net.convolution(y, f"{name}.narrow", channels, 1)
    return net.add(x, y, f"{name}.sum") if stride == 1 and net.channels[x] == channels else y
