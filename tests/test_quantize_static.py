"""Static int8: which kernels ONNX Runtime makes of it, how near the outputs stay, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from penjing.ir.errors import BadFeeds, BadFile, NeedsData, UsageError
from penjing.ir.files import load
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.static import QuantizeStatic
from penjing.passes.selection import Selection
from penjing.runtime.kernels import kernels
from penjing.runtime.session import OrtRunner

Array = np.ndarray[Any, Any]
Feeds = list[dict[str, Array]]
MODELS = Path(__file__).parents[1] / "models"
ANY = {"target": "any"}


class Net:
    """A model under construction: each call of ``op`` adds a node and returns its output."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def weight(self, *shape: int, scale: float | None = None) -> str:
        fan = int(np.prod(shape[1:])) or 1
        array = self.rng.standard_normal(shape) * (fan**-0.5 if scale is None else scale)
        return self.constant(array.astype(np.float32))

    def constant(self, array: Array) -> str:
        name = f"w{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def model(self, shape: list[Any], opset: int = 17, output: str | None = None) -> ir.Model:
        last = output or self.nodes[-1].output[0]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
            self.constants,
        )
        return ir.from_proto(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8),
        )


def feeds(*shape: int, count: int = 4) -> Feeds:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def convs(count: int = 3, channels: int = 16, activation: str = "Relu", opset: int = 17) -> ir.Model:
    net = Net()
    value = "x"
    for _ in range(count):
        value = net.op("Conv", value, net.weight(channels, channels, 3, 3), net.weight(channels, scale=1), pads=[1] * 4)
        value = net.op(activation, value)
    return net.model([1, channels, 12, 12], opset)


def quantized(model: ir.Model, data: Feeds, **options: Any) -> tuple[ir.Model, Context]:
    work, ctx = model.clone(), Context(runner=OrtRunner(), data=data, step="quantize-static")
    QuantizeStatic(**options).run(work, ctx)
    verify(work)
    return work, ctx


def sqnr(model: ir.Model, work: ir.Model, data: Feeds) -> float:
    runner = OrtRunner()
    pairs = list(zip(runner.run(model, data), runner.run(work, data), strict=True))
    signal = sum(float((wanted[name] ** 2).sum()) for wanted, _ in pairs for name in wanted)
    noise = sum(float(((wanted[name] - found[name]) ** 2).sum()) for wanted, found in pairs for name in wanted)
    return 10 * float(np.log10(signal / noise))


@pytest.mark.parametrize("opset", [9, 12, 13, 17, 21])
def test_a_chain_of_convolutions_runs_on_integers(opset: int) -> None:
    """Below opset 13 the model is raised first, for scales of channels."""
    model, data = convs(opset=opset), feeds(1, 16, 12, 12)
    work, ctx = quantized(model, data, **ANY)
    found = kernels(work)
    assert (found.fused, found.layers) == (3, 3)
    assert found.integer["QLinearConv"] == 3
    assert found.quantizers == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert sqnr(model, work, data) > 30
    assert work.opset_imports[""] == max(opset, 13)
    assert any("raised" in change.what or "opset" in change.what for change in ctx.ledger.changes) == (opset < 13)


@pytest.mark.parametrize("name", ["cnn-a", "cnn-a-legacy", "teacher", "mlp"])
def test_each_layer_that_is_placed_on_integers_runs_there(name: str) -> None:
    model = load(MODELS / f"{name}.onnx")
    with np.load(MODELS / "mnist-validation.npz") as arrays:
        images = next(arrays[key] for key in arrays.files if key != "labels")
    data = [{model.graph.inputs[0].name or "": images[start : start + 8]} for start in range(0, 64, 8)]
    work, ctx = quantized(model, data)
    placed = sum(change.what.endswith("on integers") for change in ctx.ledger.changes)
    assert kernels(work).fused == placed > 0
    assert sqnr(model, work, data) > 28


def test_hard_swish_is_a_table_and_a_product_of_integers() -> None:
    """HardSigmoid is a change of scale that saturates: no float in between, and within the rounding of both steps."""
    model, data = convs(activation="HardSwish"), feeds(1, 16, 12, 12)
    work, _ = quantized(model, data, **ANY)
    found = kernels(work)
    assert (found.integer["QLinearConv"], found.integer["QLinearLeakyRelu"], found.integer["QLinearMul"]) == (3, 3, 3)
    assert found.quantizers == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert sqnr(model, work, data) > 30


def test_a_matrix_product_with_bias_is_no_float_gemm() -> None:
    net = Net()
    value = "x"
    for _ in range(2):
        value = net.op("MatMul", value, net.weight(32, 32))
        value = net.op("Add", value, net.weight(32, scale=1))
        value = net.op("Tanh", value)
    model, data = net.model([1, 6, 32]), feeds(1, 6, 32)
    work, _ = quantized(model, data, **ANY)
    found = kernels(work)
    assert found.fused == found.layers == 2
    assert sqnr(model, work, data) > 30


def test_values_that_are_only_moved_share_one_scale() -> None:
    net = Net()
    value = net.op("Relu", net.op("Conv", "x", net.weight(16, 16, 1, 1)))
    value = net.op("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])
    value = net.op("Transpose", value, perm=[0, 1, 3, 2])
    value = net.op("Conv", value, net.weight(16, 16, 1, 1))
    model, data = net.model([1, 16, 8, 8]), feeds(1, 16, 8, 8)
    work, _ = quantized(model, data, **ANY)
    pairs = [node for node in work.graph if node.op_type == "QuantizeLinear"]
    numbers = {node.inputs[0].name: (number(node.inputs[1]), number(node.inputs[2])) for node in pairs}
    assert numbers["v1"] == numbers["v2"] == numbers["v3"]
    assert len({id(value) for node in pairs for value in node.inputs[1:]}) == 2 * len(pairs)  # none of them is shared
    assert kernels(work).quantizers == {"QuantizeLinear": 1, "DequantizeLinear": 1}


def number(value: ir.Value | None) -> float:
    assert value is not None
    assert value.const_value is not None
    return float(value.const_value.numpy())


def test_an_output_that_is_used_inside_too_stays_an_output() -> None:
    net = Net()
    inner = net.op("Conv", "x", net.weight(16, 16, 1, 1), output="inner")
    net.op("Conv", net.op("Relu", inner), net.weight(16, 16, 1, 1))
    model, data = net.model([1, 16, 8, 8], output="inner"), feeds(1, 16, 8, 8)
    work, _ = quantized(model, data, **ANY)
    assert [value.name for value in work.graph.outputs] == ["inner"]
    assert sqnr(model, work, data) > 30


def branches() -> ir.Model:
    """x goes through a layer in either branch of an If; the second is taken by none of the feeds below."""
    net, yes, no = Net(), Net(1), Net(2)
    net.constants += [numpy_helper.from_array(np.float32(-1e9), "limit")]
    outer = net.weight(16, 16)
    yes.op("Relu", yes.op("MatMul", "x", outer, output="p"), output="a")
    inner = helper.make_node(
        "Constant", [], ["c"], value=numpy_helper.from_array(yes.rng.standard_normal((16, 16)).astype(np.float32), "c")
    )
    yes.nodes.append(inner)
    yes.op("MatMul", "a", "c", output="y1")
    no.op("MatMul", "x", outer, output="y2")
    graphs = [
        helper.make_graph(part.nodes, name, [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, [4, 16])])
        for part, name, out in ((yes, "yes", "y1"), (no, "no", "y2"))
    ]
    total = net.op("ReduceSum", "x", keepdims=0)
    chosen = net.op("Greater", total, "limit")
    net.op("If", chosen, then_branch=graphs[0], else_branch=graphs[1])
    return net.model([4, 16])


def test_bodies_are_quantized_with_ranges_of_their_own() -> None:
    model, data = branches(), feeds(4, 16)
    work, ctx = quantized(model, data, **ANY)
    changed = [change.subject for change in ctx.ledger.changes if change.what.endswith("MatMul on integers")]
    assert len(changed) == 2
    assert all("/then/" in subject for subject in changed)
    (skipped,) = [skip for skip in ctx.ledger.skips if "/else/" in skip.subject and "MatMul" not in skip.reason]
    assert "no sample reaches" in skipped.reason
    assert sqnr(model, work, data) > 30


# Options --------------------------------------------------------------------------------------------------------------


def test_powers_of_two_are_fixed_point() -> None:
    model, data = convs(), feeds(1, 16, 12, 12)
    work, _ = quantized(model, data, scale="power-of-two", **ANY)
    scales = [
        node.inputs[1].const_value.numpy()
        for node in work.graph
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.inputs[1].const_value is not None
    ]
    assert scales
    for scale in scales:
        assert np.all(np.log2(scale) == np.rint(np.log2(scale)))
    assert sqnr(model, work, data) > 25


def test_seven_bits_of_weights_cannot_overflow_sixteen() -> None:
    """VPMADDUBSW adds two products of u8 and s8 in 16 bits, saturating: emulated here on the model's own weights."""
    model, data = convs(channels=32), feeds(1, 32, 12, 12)
    worst = {}
    for target in ("cpu-vnni", "cpu-avx2"):
        work, _ = quantized(model, data, target=target)
        weights = [
            tensor.numpy().reshape(len(tensor.numpy()), -1).astype(np.int32)
            for value in work.graph.initializers.values()
            if (tensor := value.const_value) is not None and tensor.dtype is ir.DataType.INT8 and tensor.size > 64
        ]
        assert weights
        worst[target] = max(
            int((255 * np.maximum(w[:, ::2], 0) + 255 * np.maximum(w[:, 1::2], 0)).max()) for w in weights
        )
    assert worst["cpu-vnni"] > 2**15 - 1 >= worst["cpu-avx2"]


@pytest.mark.parametrize("activations", ["s8", "u16", "s16"])
def test_other_integers_of_activations(activations: str) -> None:
    model, data = convs(), feeds(1, 16, 12, 12)
    work, _ = quantized(model, data, activations=activations, **ANY)
    kinds = {node.inputs[2].dtype for node in work.graph if node.op_type == "QuantizeLinear"}
    assert kinds == {{"s8": ir.DataType.INT8, "u16": ir.DataType.UINT16, "s16": ir.DataType.INT16}[activations]}
    assert sqnr(model, work, data) > 30


def test_sixteen_bits_need_another_target() -> None:
    with pytest.raises(UsageError, match="target=any"):
        QuantizeStatic(activations="u16")


def test_keep_and_only() -> None:
    model, data = convs(), feeds(1, 16, 12, 12)
    work, ctx = quantized(model, data, keep="node:n2", **ANY)
    assert kernels(work).fused == 2
    assert any(skip.subject == "n2" and skip.reason == "kept by request" for skip in ctx.ledger.skips)
    work, _ = quantized(model, data, only="node:n2", **ANY)
    assert kernels(work).fused == 1


def test_ranges_from_a_file_need_no_data(tmp_path: Path) -> None:
    model = convs(1)
    path = tmp_path / "ranges.json"
    path.write_text('{"format": 1, "values": {"x": {"low": -4, "high": 4}, "v1": {"low": 0, "high": 6.375}}}')
    work, ctx = model.clone(), Context(runner=OrtRunner())
    QuantizeStatic(ranges=str(path), target="any").run(work, ctx)
    scales = {node.inputs[0].name: number(node.inputs[1]) for node in work.graph if node.op_type == "QuantizeLinear"}
    assert scales == {"x": np.float32(8 / 255), "v1_float": np.float32(6.375 / 255)}
    assert kernels(work).fused == 1


def test_the_same_bytes_twice() -> None:
    model, data = convs(), feeds(1, 16, 12, 12)
    first, second = (ir.to_proto(quantized(model, data)[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


# Bad input ------------------------------------------------------------------------------------------------------------


def test_no_data() -> None:
    with pytest.raises(NeedsData, match="quantize-static needs --data"):
        QuantizeStatic().run(convs(), Context(runner=OrtRunner(), step="quantize-static"))


def test_nan_in_the_data_names_value_and_sample() -> None:
    data = feeds(1, 16, 12, 12)
    data[2]["x"][0, 3, 4, 5] = np.nan
    with pytest.raises(BadFeeds, match=r"x.*NaN|NaN.*x"):
        quantized(convs(), data)


@pytest.mark.parametrize("content", [0.0, 2.5])
def test_one_sample_of_one_number(content: float) -> None:
    model, data = convs(), [{"x": np.full((1, 16, 12, 12), content, np.float32)}]
    work, _ = quantized(model, data, **ANY)
    (found,), (wanted,) = OrtRunner().run(work, data), OrtRunner().run(model, data)
    largest = np.abs(wanted["v5"]).max()
    assert np.abs(found["v5"] - wanted["v5"]).max() <= 0.05 * largest


def test_a_weight_with_one_huge_outlier_and_a_dead_channel() -> None:
    net = Net()
    array = net.rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
    array[3, 2, 1, 1] = 1e6
    array[5] = 0
    bias = np.linspace(-2, 2, 16).astype(np.float32)
    net.op("Conv", "x", net.constant(array), net.constant(bias), pads=[1] * 4)
    model, data = net.model([1, 16, 12, 12]), feeds(1, 16, 12, 12)
    work, _ = quantized(model, data, calibrator="minmax", **ANY)
    runner = OrtRunner()
    for wanted, found in zip(runner.run(model, data), runner.run(work, data), strict=True):
        step = np.ptp(wanted["v0"]) / 255
        assert np.abs(found["v0"] - wanted["v0"]).max() <= 3 * step


def test_no_float_weights_and_quantized_already() -> None:
    net = Net()
    net.op("Exp", "x")
    work, ctx = quantized(net.model([1, 16]), feeds(1, 16))
    assert [node.op_type for node in work.graph] == ["Exp"]
    assert not [change for change in ctx.ledger.changes if "integers" in change.what]
    model, data = convs(), feeds(1, 16, 12, 12)
    once, _ = quantized(model, data, **ANY)
    twice, ctx = quantized(once, data, **ANY)
    assert kernels(twice).fused == 3
    assert any("quantized already" in skip.reason for skip in ctx.ledger.skips)


# Traps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 2.0), (0.5, -0.3), (-0.5, 1.7), (0.0, 0.5), (0.2, 1.0)])
def test_a_hard_sigmoid_that_no_scale_can_say_stays_float(alpha: float, beta: float) -> None:
    net = Net()
    value = net.op("HardSigmoid", net.op("Conv", "x", net.weight(16, 16, 1, 1)), alpha=alpha, beta=beta)
    net.op("Conv", value, net.weight(16, 16, 1, 1))
    model, data = net.model([1, 16, 8, 8]), feeds(1, 16, 8, 8)
    work, _ = quantized(model, data, **ANY)
    assert ("HardSigmoid" in [node.op_type for node in work.graph]) == (not 0 <= beta <= 1 or alpha <= 0)
    assert sqnr(model, work, data) > 30


def test_a_body_reads_what_a_unit_outside_makes() -> None:
    net, yes, no = Net(), Net(1), Net(2)
    first = net.op("Relu", net.op("MatMul", "x", net.weight(16, 16), output="made"), output="r")
    weight = net.weight(16, 16)
    yes.op("MatMul", first, weight, output="y1")
    no.op("Add", no.op("MatMul", first, weight, output="q"), first, output="y2")
    graphs = [
        helper.make_graph(part.nodes, name, [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, [4, 16])])
        for part, name, out in ((yes, "yes", "y1"), (no, "no", "y2"))
    ]
    limit = net.constant(np.float32(0))
    chosen = net.op("Greater", net.op("ReduceSum", "x", keepdims=0), limit)
    net.op("If", chosen, then_branch=graphs[0], else_branch=graphs[1])
    model, data = net.model([4, 16]), feeds(4, 16, count=8)
    work, _ = quantized(model, data, **ANY)
    assert kernels(work).fused == 3
    assert sqnr(model, work, data) > 30


def test_a_tied_weight_is_stored_apart_where_a_bias_would_overflow() -> None:
    """One channel is all but zero: without a bias to mind its scale is too fine for 32 bits of bias."""
    net = Net()
    array = net.rng.standard_normal((16, 16)).astype(np.float32)
    array[:, 3] = 1e-30
    weight = net.constant(array)
    value = net.op("Tanh", net.op("MatMul", "x", weight))
    net.op("Gemm", value, weight, net.weight(16, scale=3))
    model, data = net.model([4, 16]), feeds(4, 16)
    work, _ = quantized(model, data, **ANY)
    assert kernels(work).fused == 2
    assert sqnr(model, work, data) > 30


@pytest.mark.parametrize("content", [np.inf, -np.inf, np.nan])
def test_constants_that_are_not_finite_stay_float(content: float) -> None:
    """A mask that no sample brings out."""
    net = Net()
    always = net.op("Greater", "x", net.constant(np.float32(-1e9)))
    value = net.op("Where", always, net.op("MatMul", "x", net.weight(16, 16)), net.constant(np.float32(content)))
    net.op("MatMul", value, net.weight(16, 16))
    model, data = net.model([4, 16]), feeds(4, 16)
    work, _ = quantized(model, data, **ANY)
    assert sqnr(model, work, data) > 30


@pytest.mark.parametrize(("high", "sign"), [(6.0, -1), (0.0, 1), (-1.0, 1), (6.0, 1)])
@pytest.mark.parametrize("scale", ["float", "power-of-two"])
def test_a_clip_of_nothing_but_zeros(high: float, sign: int, scale: str) -> None:
    net = Net()
    weight = net.constant(sign * np.abs(net.rng.standard_normal((16, 16, 1, 1))).astype(np.float32))
    ends = [net.constant(np.float32(end)) for end in (0, high)]
    value = net.op("Clip", net.op("Conv", "x", weight), *ends)
    net.op("Conv", value, net.weight(16, 16, 1, 1), net.weight(16, scale=1))
    model = net.model([1, 16, 8, 8])
    data = [{"x": np.abs(feed["x"])} for feed in feeds(1, 16, 8, 8)]
    work, _ = quantized(model, data, scale=scale, **ANY)
    assert sqnr(model, work, data) > 25


@pytest.mark.parametrize("other", [(16,), (4, 16)])
def test_a_matrix_product_and_a_residual_are_no_float_gemm(other: tuple[int, ...]) -> None:
    net = Net()
    residual = (
        net.op("Tanh", "x") if len(other) == 2 else net.op("ReduceMean", net.op("Tanh", "x"), axes=[0], keepdims=0)
    )
    value = net.op("MatMul", "x", net.weight(16, 16))
    net.op("Softsign", net.op("Add", value, residual))
    model, data = net.model([4, 16]), feeds(4, 16)
    work, _ = quantized(model, data, keep="op:Add", **ANY)
    assert kernels(work).integer["QLinearMatMul"] == 1
    assert sqnr(model, work, data) > 30


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("shape", [(4, 16), (2, 4, 16)])
def test_signed_activations_and_a_bias_load(opset: int, shape: tuple[int, ...]) -> None:
    net = Net()
    value = net.op("Tanh", net.op("Add", net.op("MatMul", "x", net.weight(16, 16)), net.weight(16, scale=1)))
    net.op("Add", net.op("MatMul", value, net.weight(16, 16)), net.weight(16, scale=1))
    model, data = net.model([*shape], opset), feeds(*shape)
    work, _ = quantized(model, data, activations="s8", **ANY)
    assert sqnr(model, work, data) > 30


def test_an_input_with_a_default_may_be_left_out_of_the_data() -> None:
    net = Net()
    net.op("Add", net.op("MatMul", "x", net.weight(16, 16)), net.weight(16, scale=1))
    model = net.model([4, 16])
    model.graph.inputs.append(model.graph.initializers["w1"])
    data = feeds(4, 16)
    work, _ = quantized(model, data, **ANY)
    assert sqnr(model, work, data) > 30


def test_the_other_name_of_the_domain() -> None:
    model, data = convs(), feeds(1, 16, 12, 12)
    model.opset_imports["ai.onnx"] = model.opset_imports.pop("")
    work, _ = quantized(model, data, activations="u16", **ANY)
    assert work.opset_imports["ai.onnx"] == 21
    assert sqnr(model, work, data) > 30


def test_clean_keeps_what_keeps_a_layer_in_float() -> None:
    model, data = convs(), feeds(1, 16, 12, 12)
    work, _ = quantized(model, data, keep="node:n2", **ANY)
    Pipeline.of("clean").run(work)
    assert kernels(work).fused == 2


def test_ranges_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text('{"format": 1, "values": {"other": {"low": -4, "high": 4}}}')
    with pytest.raises(BadFile, match="another model"):
        QuantizeStatic(ranges=str(path)).run(convs(1), Context(runner=OrtRunner()))


# The truth about kernels ----------------------------------------------------------------------------------------------


def fanned(operator: str = "Conv") -> ir.Model:
    """Layers one after the other, and two that read one value; then one that reads both."""
    net = Net()

    def layer(value: str, channels: int = 16) -> str:
        if operator == "Conv":
            return net.op("Relu", net.op("Conv", value, net.weight(16, channels, 3, 3), pads=[1] * 4))
        return net.op("Sigmoid", net.op("MatMul", value, net.weight(channels, 16)))

    shared = layer(layer("x"))
    both = net.op("Concat", layer(shared), layer(shared), axis=1)
    layer(net.op("Tanh", layer(both, 32)))
    return net.model([1, 16, 12, 12] if operator == "Conv" else [4, 16])


@pytest.mark.parametrize("activations", ["u8", "s8", "u16", "s16"])
@pytest.mark.parametrize("operator", ["Conv", "MatMul"])
def test_the_ledger_says_on_integers_where_the_runtime_does_so(activations: str, operator: str) -> None:
    """int8 that several operators read stays int8, for which there is no kernel; nor is there for 16 bits."""
    model = fanned(operator)
    data = feeds(1, 16, 12, 12) if operator == "Conv" else feeds(4, 16)
    work, ctx = quantized(model, data, activations=activations, **ANY)
    found = kernels(work)
    told = [change.subject for change in ctx.ledger.changes if change.what == f"{operator} on integers"]
    if activations.endswith("16"):
        assert told == [name for name in found.integer if name.startswith("QLinear")] == []
    else:
        assert len(told) == found.fused > 2
        assert (found.fused == found.layers) == (activations == "u8")
        assert {one.address for one in found.floating}.isdisjoint(told)
    others = [what for what in ctx.ledger.deeds() if "as QDQ, for which ONNX Runtime has no integer kernel" in what]
    assert bool(others) == (activations != "u8")
    assert sqnr(model, work, data) > 25


def test_a_clip_that_no_power_of_two_ends_with_stays_float() -> None:
    net = Net()
    ends = [net.constant(np.float32(end)) for end in (0, 6)]
    value = net.op(
        "Clip", net.op("Conv", "x", net.weight(16, 16, 3, 3), net.constant(np.full(16, 9, np.float32))), *ends
    )
    net.op("Relu", net.op("Conv", value, net.weight(16, 16, 3, 3)))
    model, data = net.model([1, 16, 12, 12]), feeds(1, 16, 12, 12)
    work, ctx = quantized(model, data, scale="power-of-two", **ANY)
    assert kernels(work).fused == sum(change.what == "Conv on integers" for change in ctx.ledger.changes) == 1
    assert "no power of two ends where Clip does, so ONNX Runtime has no kernel for both" in ctx.ledger.reasons()
    assert sqnr(model, work, data) > 25


def normalized(kind: str, number: Array) -> ir.Model:
    """An image of which a number is taken away, and that is divided or multiplied by another, before a convolution."""
    net = Net()
    value = net.op(kind, net.op("Sub", "x", net.constant(np.float32([0.4]))), net.constant(number))
    net.op("Relu", net.op("Conv", value, net.weight(16, 3, 3, 3), net.weight(16), pads=[1] * 4))
    return net.model([2, 3, 12, 12])


@pytest.mark.parametrize(("kind", "number"), [("Div", 0.25), ("Mul", -3.0), ("Mul", [[[3.0]]])])
def test_a_factor_of_the_image_goes_into_the_weight(kind: str, number: Any) -> None:
    model, data = normalized(kind, np.asarray(number, np.float32)), feeds(2, 3, 12, 12)
    work, _ = quantized(model, data, target="any")
    assert "Mul" not in {node.op_type for node in work.graph}
    assert sqnr(model, work, data) > 30


@pytest.mark.parametrize(("kind", "number"), [("Mul", 0.0), ("Mul", [[[[3.0]]], [[[2.0]]]]), ("Mul", [1.0, 2.0] * 6)])
def test_other_factors_stay(kind: str, number: Any) -> None:
    model, data = normalized(kind, np.asarray(number, np.float32)), feeds(2, 3, 12, 12)
    work, _ = quantized(model, data, keep=Selection(("op:Conv",)))
    assert "Mul" in {node.op_type for node in work.graph}


def test_a_factor_within_the_model_stays_for_it_may_be_half_of_an_activation_function() -> None:
    net = Net()
    value = net.op("Tanh", net.op("Conv", "x", net.weight(16, 3, 3, 3)))
    net.op("Conv", net.op("Mul", value, net.constant(np.float32(0.5))), net.weight(16, 16, 3, 3))
    work, _ = quantized(net.model([2, 3, 12, 12]), feeds(2, 3, 12, 12), keep=Selection(("op:Conv",)))
    assert "Mul" in {node.op_type for node in work.graph}


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_mean_over_pixels_is_pooled_on_integers(opset: int, keepdims: int) -> None:
    """As exporters write adaptive pooling, and the squeeze of a squeeze-and-excitation block."""
    net = Net()
    value = net.op("Relu", net.op("Conv", "x", net.weight(32, 32, 3, 3), pads=[1] * 4))
    if opset < 18:
        mean = net.op("ReduceMean", value, axes=[-1, 2], keepdims=keepdims)
    else:
        mean = net.op("ReduceMean", value, net.constant(np.array([-1, 2])), keepdims=keepdims)
    if keepdims:
        net.op("Conv", mean, net.weight(32, 32, 1, 1))
    else:
        net.op("Gemm", mean, net.weight(32, 32))
    model, data = net.model([2, 32, 24, 24], opset), feeds(2, 32, 24, 24)
    work, _ = quantized(model, data, target="any")
    assert kernels(work).integer["QLinearGlobalAveragePool"] == 1
    assert kernels(work).fused == 2
    assert sqnr(model, work, data) > 30


@pytest.mark.parametrize("shape", [(1, 32), (32,), (1,), (), (1, 1)])
@pytest.mark.parametrize("turned", [0, 1])
def test_the_bias_of_a_gemm_becomes_flat(shape: tuple[int, ...], turned: int) -> None:
    net = Net()
    weight = net.weight(32, 16) if turned else net.weight(16, 32)
    net.op("Tanh", net.op("Gemm", "x", weight, net.weight(*shape, scale=1), transB=turned))
    model, data = net.model([4, 16]), feeds(4, 16)
    work, _ = quantized(model, data, **ANY)
    assert kernels(work).fused == 1
    assert sqnr(model, work, data) > 30


def in_a_body(operator: str, *, typed: bool) -> ir.Model:
    """h' = tanh(h W), five times over; the body does not say the types of its inputs unless ``typed``."""
    net, body = Net(), Net(1)

    def info(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape) if typed else onnx.ValueInfoProto(name=name)

    weight = net.weight(16, 16)
    body.op("Tanh", body.op("MatMul", "h", weight), output="next")
    if operator == "Loop":
        body.op("Identity", "go", output="on")
        inputs = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
        inputs += [helper.make_tensor_value_info("go", TensorProto.BOOL, []), info("h", TensorProto.FLOAT, [4, 16])]
        outputs = [helper.make_tensor_value_info("on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, [4, 16])]
        graph = helper.make_graph(body.nodes, "body", inputs, outputs)
        net.op("Loop", net.constant(np.array(5)), net.constant(np.array(True)), "x", body=graph)
        return net.model([4, 16])
    body.op("Add", "next", "e", output="sum")
    inputs = [info("h", TensorProto.FLOAT, [1, 16]), info("e", TensorProto.FLOAT, [1, 16])]
    outputs = [info("next", TensorProto.FLOAT, [1, 16]), info("sum", TensorProto.FLOAT, [1, 16])]
    graph = helper.make_graph(body.nodes, "body", inputs, outputs)
    start = net.constant(np.ones((1, 16), np.float32))
    net.nodes.append(
        helper.make_node("Scan", [start, "x"], ["last", "all"], name="scan", body=graph, num_scan_inputs=1)
    )
    return net.model([5, 1, 16], output="all")


@pytest.mark.parametrize("operator", ["Loop", "Scan"])
@pytest.mark.parametrize("typed", [True, False])
def test_inputs_of_bodies_need_not_say_their_types(operator: str, typed: bool) -> None:
    model = in_a_body(operator, typed=typed)
    data = feeds(4, 16) if operator == "Loop" else feeds(5, 1, 16)
    work, _ = quantized(model, data, **ANY)
    assert kernels(work).fused == 1
    assert sqnr(model, work, data) > 25


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("quantize-weights", "its weight is decoded from integers; dequantize it first"),
        ("quantize-dynamic", "quantized already"),
        ("to-float16", "its weight is stored in half precision"),
    ],
)
def test_what_another_pass_stored_is_not_quantized_twice(before: str, reason: str) -> None:
    """Nor are the operators that decode it, or that put an integer product back to scale."""
    net = Net()
    value = net.op("Tanh", net.op("MatMul", "x", net.weight(64, 64)))
    net.op("Tanh", net.op("MatMul", value, net.weight(64, 64)))
    model, data = net.model([4, 64]), feeds(4, 64)
    Pipeline.of(before).run(model, Context(runner=OrtRunner()))
    work, ctx = quantized(model, data, **ANY)
    assert ctx.ledger.reasons()[reason] >= 2
    for wanted, found in zip(OrtRunner().run(model, data), OrtRunner().run(work, data), strict=True):
        rounding = 0.03 if before == "to-float16" else 1e-6  # whose weights are stored smaller still
        np.testing.assert_allclose(found["v3"], wanted["v3"], atol=rounding)


def test_no_logarithm_of_what_was_rounded() -> None:
    """Small numbers and zero lie far apart in a logarithm, and a step from each other on integers."""
    net = Net()
    value = net.op("Softmax", net.op("Mul", net.op("MatMul", "x", net.weight(32, 32)), net.constant(np.float32(4))))
    net.op("Log", net.op("Add", value, net.constant(np.float32(1e-6))))
    model, data = net.model([4, 32]), feeds(4, 32)
    work, ctx = quantized(model, data, **ANY)
    assert kernels(work).fused == 1
    assert any("a logarithm is taken of it" in skip.reason for skip in ctx.ledger.skips)
    assert sqnr(model, work, data) > 30


def test_an_input_that_masks_with_infinity_is_no_fault() -> None:
    net = Net()
    query, key = (net.op("MatMul", "x", net.weight(32, 32)) for _ in range(2))
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[1, 0]))
    masked = net.op("Add", scores, net.op("Unsqueeze", "mask", net.constant(np.array([0]))))
    net.op("MatMul", net.op("Softmax", masked), "x")
    shapes = {"x": [8, 32], "mask": [8]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(net.nodes[-1].output[0], TensorProto.FLOAT, None)]
    graph = helper.make_graph(net.nodes, "net", inputs, outputs, net.constants)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = [{**feed, "mask": np.where(np.arange(8) < 5, 0, -np.inf).astype(np.float32)} for feed in feeds(8, 32)]
    work, ctx = quantized(model, data, **ANY)
    assert kernels(work).fused >= 3
    assert any("holds infinity in run 0" in reason for reason in ctx.ledger.reasons())
    assert sqnr(model, work, data) > 20
