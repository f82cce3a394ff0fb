"""What wrecks quantizers, each as a small model: the search and the plain pass, judged on data not seen before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from test_quantize_auto import auto
from test_quantize_static import Array, Feeds, Net, quantized, sqnr

from penjing.ir.files import saved_bytes
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.observe import MASKED
from penjing.runtime.kernels import kernels
from penjing.runtime.session import OrtRunner

Draw = Callable[[np.random.Generator], dict[str, Array]]
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


@dataclass
class Wrecker:
    """A model, a sample of its inputs at a time, and what ``quantize-static{target=any}`` keeps, in dB, at least.

    ``alone`` are values that quantization must keep exact.
    """

    model: ir.Model
    draw: Draw
    least: float = 20.0

    def feeds(self, seed: int, count: int = 24) -> Feeds:
        rng = np.random.default_rng(seed)
        return [self.draw(rng) for _ in range(count)]


def model(net: Net, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, int], opset: int = 17) -> ir.Model:
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        net.constants,
    )
    opsets = [helper.make_opsetid("", opset)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset > 9 else 4))


def normal(*shape: int) -> Draw:
    return lambda rng: {"x": rng.standard_normal(shape).astype(np.float32)}


def dense(net: Net, value: str, width: int, to: int, output: str | None = None) -> str:
    made = net.op(
        "MatMul", value, net.constant((net.rng.standard_normal((width, to)) * width**-0.5).astype(np.float32))
    )
    return net.op("Add", made, net.weight(to, scale=0.1), output=output)


def conv(net: Net, value: str, channels: int = 32, to: int = 32, output: str | None = None) -> str:
    return net.op("Conv", value, net.weight(to, channels, 3, 3), net.weight(to, scale=0.2), pads=[1] * 4, output=output)


def attention(mask: float | None = None, where: bool = False, outlier: float = 1.0) -> Wrecker:
    """A layer of a transformer: LayerNorm, two heads, a causal mask, residuals; ``outlier`` scales one channel."""
    net, width, length, heads = Net(), 64, 12, 2
    scale = np.ones(width, np.float32)
    scale[7] = outlier
    normed = net.op("LayerNormalization", "x", net.constant(scale), net.weight(width, scale=0.1))

    def split() -> str:
        value = dense(net, normed, width, width)
        value = net.op("Reshape", value, net.constant(np.array([0, 0, heads, width // heads])))
        return net.op("Transpose", value, perm=[0, 2, 1, 3])

    query, key, value = split(), split(), split()
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = net.op("Mul", scores, net.constant(np.float32((width // heads) ** -0.5 / outlier)))
    hidden = np.triu(np.ones((1, 1, length, length), np.float32), 1)
    if mask is not None and where:
        scores = net.op("Where", net.constant(hidden > 0), net.constant(np.float32(mask)), scores)
    elif mask is not None:
        scores = net.op("Add", scores, net.constant(hidden * np.float32(mask)))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), value)
    mixed = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), net.constant(np.array([0, 0, width])))
    value = net.op("Add", "x", dense(net, mixed, width, width))
    net.op("Add", value, dense(net, net.op("Relu", dense(net, value, width, 2 * width)), 2 * width, width), output="y")
    made = model(net, {"x": (FLOAT, ["n", length, width])}, {"y": FLOAT})
    return Wrecker(made, normal(1, length, width), 20 if outlier == 1 else 8)


def embeddings() -> Wrecker:
    net = Net()
    value = net.op("Gather", net.weight(200, 64, scale=1), "x")
    dense(net, net.op("Tanh", dense(net, value, 64, 64)), 64, 64, output="y")
    made = model(net, {"x": (INT, ["n", "length"])}, {"y": FLOAT})
    return Wrecker(made, lambda rng: {"x": rng.integers(0, 200, (1, int(rng.integers(3, 12))))})


def integers_inside() -> Wrecker:
    """What the largest of some scores picks goes on; the index is an output too."""
    net = Net()
    value = net.op("Relu", dense(net, "x", 64, 64))
    picked = net.op("ArgMax", net.op("Mul", dense(net, value, 64, 8), net.constant(np.float32(10))), axis=1, keepdims=0)
    net.op("Identity", picked, output="index")
    rows = net.op("Gather", net.weight(8, 64, scale=1), picked)
    net.op("Add", dense(net, value, 64, 64), rows, output="y")
    made = model(net, {"x": (FLOAT, ["n", 64])}, {"y": FLOAT, "index": INT})
    return Wrecker(made, normal(1, 64), 0)


def detector() -> Wrecker:
    """Boxes of hundreds of pixels beside scores, of which few are large."""
    net = Net()
    value = net.op("Relu", conv(net, net.op("Relu", conv(net, "x"))))
    boxes = net.op("Mul", conv(net, value, to=4), net.constant(np.float32(200)))
    spread = net.op("Mul", conv(net, value, to=4), net.constant(np.array([1, 1, 1, 8], np.float32).reshape(1, 4, 1, 1)))
    scores = net.op("Sigmoid", net.op("Sub", spread, net.constant(np.float32(4))))
    net.op("Concat", boxes, scores, axis=1, output="y")
    made = model(net, {"x": (FLOAT, ["n", 32, 16, 16])}, {"y": FLOAT})
    return Wrecker(made, normal(1, 32, 16, 16))


def unrolled() -> Wrecker:
    """Six steps that share their weights, half of them through Identity."""
    net = Net()
    shared = net.constant((net.rng.standard_normal((64, 64)) * 0.12).astype(np.float32))
    same = net.op("Identity", shared)
    value = "x"
    for step in range(6):
        value = net.op("Tanh", net.op("Add", net.op("MatMul", value, (shared, same)[step % 2]), "x"))
    dense(net, value, 64, 64, output="y")
    return Wrecker(model(net, {"x": (FLOAT, ["n", 64])}, {"y": FLOAT}), normal(4, 64))


def defaults() -> Wrecker:
    """Old exporters list initializers among the inputs; callers may pass other weights."""
    net = Net()
    value = net.op("Relu", conv(net, "x"))
    conv(net, value, output="y")
    made = model(net, {"x": (FLOAT, ["n", 32, 8, 8])}, {"y": FLOAT})
    made.graph.inputs.extend(made.graph.initializers.values())
    return Wrecker(made, normal(1, 32, 8, 8))


def channels_last() -> Wrecker:
    net = Net()
    value = net.op("Transpose", "x", perm=[0, 3, 1, 2])
    for _ in range(3):
        value = net.op("Clip", conv(net, value), net.constant(np.float32(0)), net.constant(np.float32(6)))
    net.op("Transpose", conv(net, value), perm=[0, 2, 3, 1], output="y")
    return Wrecker(model(net, {"x": (FLOAT, ["n", 12, 12, 32])}, {"y": FLOAT}), normal(1, 12, 12, 32))


def several_inputs() -> Wrecker:
    """Three inputs of unlike scales; lengths differ from run to run."""
    net = Net()
    left, right = dense(net, "x", 64, 64), dense(net, "other", 64, 64)
    value = net.op("Relu", net.op("Add", left, right))
    value = net.op("Concat", value, net.op("Mul", dense(net, value, 64, 64), "gain"), axis=2)
    dense(net, value, 128, 64, output="y")
    inputs = {"x": (FLOAT, ["n", "t", 64]), "other": (FLOAT, ["n", "t", 64]), "gain": (FLOAT, [])}

    def draw(rng: np.random.Generator) -> dict[str, Array]:
        shape = (1, int(rng.integers(2, 20)), 64)
        arrays = [rng.standard_normal(shape).astype(np.float32) * scale for scale in (1, 30)]
        return {"x": arrays[0], "other": arrays[1], "gain": np.array(rng.uniform(0.5, 1.5), np.float32)}

    return Wrecker(model(net, inputs, {"y": FLOAT}), draw)


def old(opset: int) -> Wrecker:
    """Attributes where newer opsets have inputs."""
    net = Net()
    value = net.op("Relu", conv(net, "x"))
    if opset < 11:
        value = net.op("Clip", conv(net, value), min=0.0, max=6.0)
    else:
        value = net.op("Clip", conv(net, value), net.constant(np.float32(0)), net.constant(np.float32(6)))
    value = net.op("Squeeze", net.op("Unsqueeze", value, axes=[0]), axes=[0])
    value = net.op("Pad", value, pads=[0] * 8) if opset < 11 else value
    conv(net, value, output="y")
    return Wrecker(model(net, {"x": (FLOAT, [1, 32, 12, 12])}, {"y": FLOAT}, opset), normal(1, 32, 12, 12))


def outputs_inside() -> Wrecker:
    """A pyramid of features, each of which is an output and goes on."""
    net = Net()
    value = "x"
    for level in range(3):
        value = net.op("Relu", conv(net, value), output=f"y{level}")
    made = model(net, {"x": (FLOAT, ["n", 32, 12, 12])}, {f"y{level}": FLOAT for level in range(3)})
    return Wrecker(made, normal(1, 32, 12, 12))


def partly_quantized() -> Wrecker:
    """The first half went through ``quantize-static`` before."""
    net = Net()
    value = "x"
    for level in range(4):
        value = net.op("Relu", conv(net, value), output="y" if level == 3 else None)
    found = Wrecker(model(net, {"x": (FLOAT, ["n", 32, 12, 12])}, {"y": FLOAT}), normal(1, 32, 12, 12))
    Pipeline.of("quantize-static{target=any keep=(node:n4,node:n6)}").run(
        found.model, Context(runner=OrtRunner(), data=found.feeds(3))
    )
    return found


MASKS = (-1e4, -1e9, float(np.finfo(np.float32).min))
WRECKERS: dict[str, Callable[[], Wrecker]] = {
    "attention": attention,
    **{f"attention, mask {mask:.2g}": lambda mask=mask: attention(mask) for mask in MASKS},  # type: ignore[misc]
    **{f"attention, masked {mask:.2g}": lambda mask=mask: attention(mask, True) for mask in (*MASKS, -np.inf)},  # type: ignore[misc]
    "outliers behind a LayerNorm": lambda: attention(-1e9, outlier=40.0),
    "embeddings": embeddings,
    "ArgMax inside": integers_inside,
    "a detector": detector,
    "weights shared by steps": unrolled,
    "initializers that are inputs": defaults,
    "NHWC": channels_last,
    "several inputs of many lengths": several_inputs,
    **{f"opset {opset}": lambda opset=opset: old(opset) for opset in (9, 10, 11, 12)},  # type: ignore[misc]
    "outputs inside": outputs_inside,
    "partly int8": partly_quantized,
}


@pytest.mark.parametrize("name", WRECKERS)
def test_the_search_holds_its_bounds_on_other_data(name: str) -> None:
    found = WRECKERS[name]()
    work, _ = auto(found.model, found.feeds(0))
    fresh = found.feeds(1)
    floats = [value.name for value in found.model.graph.outputs if value.dtype is ir.DataType.FLOAT]
    assert decibels(found.model, work, fresh, floats) > 19
    assert saved_bytes(work) <= saved_bytes(found.model)
    assert agreement(found.model, work, fresh) >= 0.95


@pytest.mark.parametrize("name", WRECKERS)
def test_static_int8_is_as_right_as_eight_bits_are(name: str) -> None:
    found = WRECKERS[name]()
    work, _ = quantized(found.model, found.feeds(0), target="any")
    fresh = found.feeds(1)
    floats = [value.name for value in found.model.graph.outputs if value.dtype is ir.DataType.FLOAT]
    assert decibels(found.model, work, fresh, floats) > found.least


def decibels(before: ir.Model, after: ir.Model, data: Feeds, names: list[str | None]) -> float:
    """The SQNR of the worst float output."""
    pairs = list(zip(OrtRunner().run(before, data), OrtRunner().run(after, data), strict=True))
    found = []
    for name in names:
        assert name is not None
        signal = sum(float((wanted[name].astype(np.float64) ** 2).sum()) for wanted, _ in pairs)
        noise = sum(float(((wanted[name].astype(np.float64) - got[name]) ** 2).sum()) for wanted, got in pairs)
        found.append(10 * float(np.log10(signal / noise)) if noise else np.inf)
    return min(found)


def agreement(before: ir.Model, after: ir.Model, data: Feeds) -> float:
    """The share of equal integers among the outputs."""
    same = total = 0
    for wanted, got in zip(OrtRunner().run(before, data), OrtRunner().run(after, data), strict=True):
        for name, array in wanted.items():
            if array.dtype.kind == "i":
                same, total = same + int((array == got[name]).sum()), total + array.size
    return same / total if total else 1.0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("where", [False, True])
def test_a_mask_stays_float_and_is_named_and_all_else_does_not(mask: float, where: bool) -> None:
    found = attention(mask, where)
    work, ctx = quantized(found.model, found.feeds(0), target="any")
    assert ctx.ledger.reasons()[MASKED] == 2  # what puts it on, and Softmax
    assert kernels(work).fused == kernels(work).layers == 8


def test_gates_and_activations_are_no_masks() -> None:
    """Near 0 or 1, or with a rare outlier, a value is quantized as ever."""
    net = Net()
    value = net.op("Sigmoid", net.op("Mul", dense(net, "x", 64, 64), net.constant(np.float32(200))))
    dense(net, net.op("Mul", value, "x"), 64, 64, output="y")
    found = Wrecker(model(net, {"x": (FLOAT, ["n", 64])}, {"y": FLOAT}), normal(8, 64))
    _, ctx = quantized(found.model, found.feeds(0), target="any")
    assert MASKED not in ctx.ledger.reasons()


def test_filters_stay_exact_and_what_comes_behind_does_not() -> None:
    """A transform to frequencies and bands of a mel scale, logarithms of which go into a network."""
    net, window, bands = Net(), 128, 32
    time, half = np.arange(window), window // 2
    waves = [
        wave(2 * np.pi * time * line / window) * np.hanning(window) for wave in (np.cos, np.sin) for line in range(half)
    ]
    spectrum = net.op("Conv", "x", net.constant(np.array(waves, np.float32)[:, None]), strides=[64])
    power = net.op("Mul", spectrum, spectrum)
    parts = [
        net.op("Slice", power, *(net.constant(np.array([end])) for end in (start, start + half, 1)))
        for start in (0, half)
    ]
    power = net.op("Transpose", net.op("Add", *parts), perm=[0, 2, 1])
    triangles = np.maximum(0, 1 - np.abs(np.arange(half)[:, None] - 2 * np.arange(bands) - 1) / 2).astype(np.float32)
    logarithm = net.op(
        "Log", net.op("Add", net.op("MatMul", power, net.constant(triangles)), net.constant(np.float32(1e-6)))
    )
    dense(net, net.op("Relu", dense(net, logarithm, bands, 128)), 128, 64, output="y")
    found = Wrecker(model(net, {"x": (FLOAT, ["n", 1, 1024])}, {"y": FLOAT}), quiet_and_loud)
    filters = [
        node.inputs[1].name for node in found.model.graph if node.op_type == "Conv" and node.inputs[1] is not None
    ]
    for work, ctx in (auto(found.model, found.feeds(0)), quantized(found.model, found.feeds(0), target="any")):
        assert decibels(found.model, work, found.feeds(1), ["y"]) > 19
        assert "a bank of fixed filters, which stays exact" in ctx.ledger.reasons()
        kept = work.graph.initializers[filters[0] or ""].const_value
        assert kept is not None
        assert np.array_equal(kept.numpy(), np.array(waves, np.float32)[:, None])


def quiet_and_loud(rng: np.random.Generator) -> dict[str, Array]:
    tone = np.sin(np.arange(1024) * rng.uniform(0.05, 2)) + 0.01 * rng.standard_normal(1024)
    return {"x": (tone * 10 ** rng.uniform(-2, 0)).astype(np.float32)[None, None]}


def test_a_state_that_keeps_errors_is_judged_over_sequences() -> None:
    """h' = 0.97 h + 0.03 tanh(W x + U h): what a step loses is still there fifty steps on."""
    net = Net()
    update = net.op("Tanh", net.op("Add", dense(net, "x", 64, 64), dense(net, "h", 64, 64)))
    kept, new = (
        net.op("Mul", *pair)
        for pair in (("h", net.constant(np.float32(0.97))), (update, net.constant(np.float32(0.03))))
    )
    net.op("Add", kept, new, output="state")
    dense(net, "state", 64, 64, output="y")
    made = model(net, {"x": (FLOAT, [1, 64]), "h": (FLOAT, [1, 64])}, {"y": FLOAT, "state": FLOAT})

    def sequences(seed: int, count: int = 3, steps: int = 30) -> list[Feeds]:
        rng, session = np.random.default_rng(seed), OrtRunner()
        found = []
        for _ in range(count):
            state, offset, feeds = np.zeros((1, 64), np.float32), rng.standard_normal((1, 64)), list[dict[str, Array]]()
            for _ in range(steps):
                feeds.append({"x": (offset + rng.standard_normal((1, 64))).astype(np.float32), "h": state})
                (out,) = session.run(made, feeds[-1:])
                state = out["state"]
            found.append(feeds)
        return found

    work, _ = auto(made, [feed for feeds in sequences(0) for feed in feeds])
    signal = noise = 0.0
    for feeds in sequences(1):
        state = np.zeros((1, 64), np.float32)
        for feed in feeds:
            (wanted,) = OrtRunner().run(made, [feed])
            (got,) = OrtRunner().run(work, [{**feed, "h": state}])
            state = got["state"]
            signal += float((wanted["y"] ** 2).sum())
            noise += float(((wanted["y"] - got["y"]) ** 2).sum())
    assert 10 * np.log10(signal / max(noise, 1e-30)) > 19


def test_what_was_quantized_before_stays_as_it_was() -> None:
    found = partly_quantized()
    before = kernels(found.model).fused
    work, ctx = quantized(found.model, found.feeds(0), target="any")
    assert (before, kernels(work).fused) == (2, 4)
    assert ctx.ledger.reasons()["quantized already"] >= 2
    assert sqnr(found.model, work, found.feeds(1)) > 25
