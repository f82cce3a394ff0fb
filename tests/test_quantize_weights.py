"""Weights in few bits: exactly the numbers that numpy computes, wherever they live, and what stays float."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import penjing
from penjing.ir.affine import S8, affine
from penjing.ir.edit import Names
from penjing.ir.encode import distortion, encode, narrowest, saving
from penjing.ir.errors import UsageError
from penjing.ir.files import load, save, saved_bytes
from penjing.ir.ops import Kind
from penjing.ir.ranges import block_range, channel_range, mean_magnitude, spread
from penjing.ir.shapes import infer_shapes, static_dims
from penjing.ir.storage import BLOCK, StreamedTensor
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.ir.weights import Weight, weights
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.weights import QuantizeWeights
from penjing.runtime.session import OrtRunner, open_session

Parse = Callable[[str], ir.Model]
Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def one_layer(op_type: str, *arrays: Array, x: Array, opset: int = 21, **attributes: object) -> ir.Model:
    """A model of one node that reads ``x`` and initializers ``w``, ``w1`` ... (an empty array: left out)."""
    given = ir.val("x", dtype=ir.DataType.from_numpy(x.dtype), shape=ir.Shape(x.shape))
    tensors = [ir.tensor(array, name="w" + str(place or "")) for place, array in enumerate(arrays)]
    values = [ir.val(t.name, const_value=t, dtype=t.dtype, shape=ir.Shape(t.shape.numpy())) for t in tensors]
    inputs = [values[0], given] if op_type == "Gather" else [given, *values]
    node = ir.node(op_type, inputs, attributes=attributes, name="layer")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.from_numpy(arrays[0].dtype)
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=values, opset_imports={"": opset}, name="g")
    model = ir.Model(graph, ir_version=10)
    infer_shapes(model)
    return model


LAYERS = {
    "MatMul": (0, lambda: ([random(40, 30)], random(3, 40), {})),
    "Gemm": (1, lambda: ([random(40, 30)], random(3, 40), {})),
    "GemmT": (1, lambda: ([random(30, 40)], random(3, 40), {"transB": 1})),
    "Conv": (1, lambda: ([random(16, 8, 3, 3)], random(1, 8, 5, 5), {})),
    "ConvTranspose": (0, lambda: ([random(8, 16, 3, 3)], random(1, 8, 5, 5), {})),
    "LSTM": (0, lambda: ([random(1, 64, 24), random(1, 64, 16, seed=1)], random(4, 1, 24), {"hidden_size": 16})),
    "Gather": (1, lambda: ([random(60, 20)], np.array([5, 0, 59, 5]), {})),
}
AXES = {"MatMul": 1, "Gemm": 1, "GemmT": 0, "Conv": 0, "ConvTranspose": 1, "LSTM": 1, "Gather": 0}


def layer(name: str, opset: int = 21) -> tuple[ir.Model, Array]:
    arrays, x, attributes = LAYERS[name][1]()
    return one_layer(name.removesuffix("T"), *arrays, x=x, opset=opset, **attributes), x


def quantize(model: ir.Model, **options: object) -> Context:
    ctx = Context()
    QuantizeWeights(**options).run(model, ctx)  # type: ignore[arg-type]
    verify(model)
    return ctx


def run(model: ir.Model, **feeds: Array) -> list[Array]:
    return list(open_session(model).run(None, feeds))


def find(model: ir.Model, address: str) -> Weight:
    return next(weight for weight in weights(model) if weight.address == address)


def skips(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


def others(array: Array, axis: int) -> tuple[int, ...]:
    return tuple(place for place in range(array.ndim) if place != axis)


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs, all optimizations on."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


# The numbers ----------------------------------------------------------------------------------------------------------


def symmetric(array: Array, axis: int, bits: int) -> Array:
    """The definition, in plain numpy."""
    if bits == 1:
        scale = np.abs(array.astype(np.float64)).mean(others(array, axis), keepdims=True).astype(np.float32)
        return np.where(array < 0, -scale, scale)
    most = 2 ** (bits - 1) - 1
    scale = (np.abs(array).max(others(array, axis), keepdims=True).astype(np.float64) / most).astype(np.float32)
    return np.clip(np.rint(array / scale), -most, most) * scale


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8, 16])
def test_outputs_are_those_of_the_rounded_weights(name: str, bits: int, tmp_path: Path) -> None:
    model, x = layer(name)
    rounded, _ = layer(name)
    for weight in weights(rounded):
        weight.replace(symmetric(weight.array(), AXES[name], bits))
    before = saved_bytes(model)
    ctx = quantize(model, bits=bits)
    assert len(ctx.ledger.changes) - (bits < 3) == len(LAYERS[name][1]()[0])
    np.testing.assert_array_equal(run(model, x=x)[0], run(rounded, x=x)[0])
    assert saved_bytes(model) < before
    assert kernels(model, tmp_path) == kernels(rounded, tmp_path)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_ranges_that_are_not_symmetric(bits: int) -> None:
    array = random(40, 30) + np.float32(0.7)
    model = one_layer("MatMul", array, x=random(3, 40))
    quantize(model, bits=bits, range="minmax")
    low, high = np.minimum(array.min(0), 0).astype(np.float64), np.maximum(array.max(0), 0).astype(np.float64)
    scale = ((high - low) / (2**bits - 1)).astype(np.float32)
    zero = np.rint(-low / scale)
    rounded = (np.clip(np.rint(array / scale) + zero, 0, 2**bits - 1) - zero).astype(np.float32) * scale
    expected = run(one_layer("MatMul", rounded, x=random(3, 40)), x=random(3, 40))
    np.testing.assert_array_equal(run(model, x=random(3, 40))[0], expected[0])
    found = find(model, "w").quantization
    assert found is not None
    np.testing.assert_array_equal(found.zero_point.astype(int)[0], zero)


def test_powers_of_two() -> None:
    array = random(40, 30)
    model = one_layer("MatMul", array, x=random(3, 40))
    quantize(model, scale="power-of-two")
    scale = np.exp2(np.ceil(np.log2(np.abs(array).max(0) / 127)))
    found = find(model, "w")
    assert found.quantization is not None
    np.testing.assert_array_equal(found.quantization.scale[0], scale)
    np.testing.assert_array_equal(found.array(), np.rint(array / scale))


def test_a_given_factor_is_the_inverse_of_the_step_and_saturates() -> None:
    array = np.clip(random(40, 30), -1, 1)
    array[0, :3] = [9, -9, 9]
    model = one_layer("MatMul", array, x=random(3, 40))
    ctx = quantize(model, scale=100)
    np.testing.assert_array_equal(find(model, "w").array(), np.clip(np.rint(array * np.float32(100)), -127, 127))
    (change,) = ctx.ledger.changes
    assert change.numbers["saturated"] == 3
    assert "saturated" not in quantize(one_layer("MatMul", array, x=random(3, 40)), scale=10).ledger.changes[0].numbers


def test_one_bit_of_zeros_and_of_a_channel_of_zeros() -> None:
    array = random(40, 30)
    array[:, 3] = 0
    array[0, 0] = 0
    model = one_layer("MatMul", array, x=random(3, 40), opset=25)
    quantize(model, bits=1)
    found = find(model, "w")
    assert set(np.unique(found.array().astype(int))) == {-1, 1}
    values = found.magnitudes()
    assert not values[:, 3].any()
    np.testing.assert_allclose(values[0, 0], np.abs(array[:, 0]).mean(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_other_floats(dtype: type, bits: int) -> None:
    array = random(60, 70).astype(dtype)
    model = one_layer("MatMul", array, x=random(3, 60).astype(dtype))
    ctx = quantize(model, bits=bits)
    if bits == 16 and np.dtype(dtype).itemsize == 2:
        assert skips(ctx)["w"].startswith("too small")
        return
    made = next(value for node in model.graph for value in node.outputs if value.name == "w_dequantized_1")
    assert made.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    found = find(model, "w")
    assert found.quantization is not None
    q, scale = found.array().astype(np.float32), found.quantization.scale
    expected = one_layer("MatMul", (q * scale).astype(dtype), x=random(3, 60).astype(dtype))
    if dtype is not ml_dtypes.bfloat16:  # which ONNX Runtime does not multiply
        x = random(3, 60).astype(dtype)
        np.testing.assert_array_equal(run(model, x=x)[0], run(expected, x=x)[0])


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "opset", "to", "kind"),
    [
        (8, 6, 7, "INT8"),
        (8, 9, 9, "INT8"),
        (5, 13, 13, "INT8"),
        (4, 13, 21, "INT4"),
        (3, 21, 21, "INT4"),
        (2, 21, 25, "INT2"),
        (1, 25, 25, "INT2"),
        (16, 13, 13, "INT16"),
    ],
)
def test_the_opset_is_raised_where_the_bits_need_it(bits: int, opset: int, to: int, kind: str) -> None:
    model = one_layer("MatMul", random(40, 30), x=random(3, 40), opset=opset)
    ctx = quantize(model, bits=bits)
    assert (model.opset_imports[""], find(model, "w").dtype.name) == (to, kind)
    assert (to > opset) == any("opset" in change.what for change in ctx.ledger.changes)
    run(model, x=random(3, 40))


def test_an_opset_that_the_runtime_does_not_take() -> None:
    class Old(OrtRunner):
        def newest_opset(self) -> int:
            return 22

    model = one_layer("MatMul", random(40, 30), x=random(3, 40), opset=17)
    ctx = Context(runner=Old())
    QuantizeWeights(bits=2).run(model, ctx)
    assert (model.opset_imports[""], find(model, "w").dtype.name) == (21, "INT4")
    assert skips(ctx)["the opset"].endswith("ONNX Runtime here takes 22")


def test_an_opset_that_cannot_be_raised(parse: Parse) -> None:
    model = parse("""<ir_version: 4, opset_import: ["": 9]> g (float[2,40] x) => (float[2,30] y, float[2,30] m)
        <float[40,30] w = {1}> { h = MatMul (x, w) [drop] y, m = Dropout (h) }""")
    find(model, "w").replace(random(40, 30))
    ctx = quantize(model, bits=4)
    assert (model.opset_imports[""], find(model, "w").dtype.name) == (9, "INT8")
    assert np.abs(find(model, "w").array()).max() == 7
    assert "not raised to 21, for the bits asked for: drop: Dropout of opset 9" in skips(ctx)["the opset"]


def test_a_model_too_small_for_it_keeps_its_opset() -> None:
    model = one_layer("MatMul", random(8, 8), x=random(3, 8), opset=13)
    before = text(model)
    ctx = quantize(model, bits=4)
    assert text(model) == before
    assert skips(ctx) == {"w": "too small: scales and the nodes that decode it would take what it saves"}


# Places ---------------------------------------------------------------------------------------------------------------

EVERYWHERE = """
    <ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (float[2,32] x, bool c, int64 n) => (float[?,?] z, float[?,?] l, float[?,?] f, float[?,?] r, float[?,?] h)
    <float[32,32] w = {1}> {
        [branch] z = If (c) <
            then_branch = yes () => (float[?,?] t) {
                inner = Constant <value = float[32,32] {1}> ()
                t = MatMul (x, inner)
            },
            else_branch = no () => (float[?,?] e) { e = MatMul (x, w) }
        >
        [loop] l = Loop (n, c, x) <body = step (int64 i, bool go, float[2,32] s) => (bool go2, float[2,32] k)
            <float[32,32] b = {1}> {
            go2 = Identity (go)
            k0 = MatMul (s, b)
            k = MatMul (k0, w)
        }>
        wt = Transpose (w)
        call = local.Project (x, wt)
        f = Tanh (call)
        m = If (c) <
            then_branch = yes2 () => (float[32,32] a) { a = Constant <value = float[32,32] {1}> () },
            else_branch = no2 () => (float[32,32] d) { d = Transpose (w) }
        >
        r = MatMul (x, m)
        flat = Constant <value = float[1024] {1}> ()
        square = Constant <value_ints = [32, 32]> ()
        shaped = Reshape (flat, square)
        h = MatMul (x, shaped)
    }
    <opset_import: ["": 21], domain: "local">
    Project (a, p) => (q) {
        own = Constant <value = float[32,32] {1}> ()
        d = MatMul (a, own)
        q = MatMul (d, p)
    }
"""
PLACES = {"w", "branch/then/inner", "loop/body/b", "local::Project/own", "If/then/a"}
STORED = PLACES - {"If/then/a"} | {"If/then/a_quantized"}  # the output of a branch keeps its name, so this has another


def everywhere(parse: Parse) -> ir.Model:
    model = parse(EVERYWHERE)
    for seed, weight in enumerate(weights(model)):
        if weight.size == 1024:
            weight.replace(random(*weight.shape, seed=seed) / np.float32(6))
    return model


@pytest.mark.parametrize("way", [{}, {"bits": 4, "range": "minmax"}])
@pytest.mark.parametrize("choice", [True, False])
def test_every_place(parse: Parse, way: dict[str, object], choice: bool, tmp_path: Path) -> None:
    model, feeds = everywhere(parse), {"x": random(2, 32), "c": np.array(choice), "n": np.array(2)}
    ctx = quantize(model, **way)
    assert {change.subject for change in ctx.ledger.changes} == PLACES
    assert skips(ctx)["flat"] == "a vector, not a matrix"
    found = {weight.address: weight for weight in weights(model)}
    rounded = everywhere(parse)
    for weight in weights(rounded):
        if weight.address in PLACES:
            stored = found.get(weight.address) or found[f"{weight.address}_quantized"]
            assert stored.kind is Kind.MATRIX
            told = stored.quantization
            assert told is not None
            steps = stored.array().astype(np.float32) - told.zero_point.astype(np.float32)
            weight.replace(np.asarray(steps * told.scale, np.float32))
    for one, other in zip(run(model, **feeds), run(rounded, **feeds), strict=True):
        np.testing.assert_array_equal(one, other)
    assert kernels(model, tmp_path)["Mul"] == 0
    save(model, tmp_path / "q.onnx")
    again = load(tmp_path / "q.onnx")
    assert text(again) == text(model)


def test_the_main_graph_of_a_body_may_be_empty_of_nodes_before_it(parse: Parse) -> None:
    """A tied weight is stored and decoded once, and what captured it captures the decoded one."""
    model = everywhere(parse)
    quantize(model)
    assert [node.op_type for node in model.graph][:3] == ["Cast", "Mul", "If"]
    assert len([name for name in model.graph.initializers if name.startswith("w")]) == 2


def test_two_names_of_one_storage(parse: Parse) -> None:
    model = parse("""g (float[2,32] x) => (float[2,32] y) <float[32,32] v = {1}, float[32,32] w = {1}> {
        h = MatMul (x, v) y = MatMul (h, w) }""")
    tensor = ir.tensor(random(32, 32), name="v")
    for value in model.graph.initializers.values():
        value.const_value = tensor
    ctx = quantize(model)
    assert [change.subject for change in ctx.ledger.changes] == ["v"]
    assert [weight.address for weight in weights(model) if weight.prunable] == ["v"]
    assert find(model, "v").tied
    kept = find(model, "v")
    assert kept.quantization is not None
    rounded = kept.array().astype(np.float32) * kept.quantization.scale
    np.testing.assert_allclose(run(model, x=random(2, 32))[0], random(2, 32) @ rounded @ rounded, rtol=1e-4, atol=1e-3)


def test_other_passes_see_one_weight_and_leave_it_stored(parse: Parse) -> None:
    model = everywhere(parse)
    quantize(model, range="minmax")
    stored = {weight.address: weight.array().tobytes() for weight in weights(model) if weight.prunable}
    assert set(stored) == STORED
    Pipeline.parse("clean").run(model)
    verify(model)
    cleaned = {weight.address: weight.array().tobytes() for weight in weights(model) if weight.prunable}
    assert {*cleaned.values()} > {*stored.values()}  # and what was a vector, which is a matrix now
    Pipeline.parse("prune-magnitude{sparsity=0.5}").run(model)
    for weight in weights(model):
        if weight.prunable and weight.dtype.is_integer():
            assert weight.quantization is not None
            assert weight.zeros() >= 512
            assert (weight.array() == weight.quantization.zero_point).sum() == weight.zeros()


def test_equal_weights_merge_once_stored(parse: Parse) -> None:
    model = parse("""g (float[2,32] x) => (float[2,32] y) <float[32,32] v = {1}, float[32,32] w = {1}> {
        h = MatMul (x, v) y = MatMul (h, w) }""")
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(random(32, 32), name=value.name)
    Pipeline.parse("quantize-weights,merge-duplicates").run(model)
    assert list(model.graph.initializers) == ["v", "v_scale"]
    found = find(model, "v")
    assert found.prunable
    assert len(found.uses) == 2


def test_a_decoding_that_is_none(parse: Parse) -> None:
    """Integers that are shifted by what they cannot hold, or scaled by what is not constant, are not weights."""
    model = parse("""g (float[2,2] x, float s) => (float[2,2] y, float[2,2] z, float[2,2] u)
        <int8[2,2] a = {1,2,3,4}, int8[2,2] b = {1,2,3,4}, int8[2,2] d = {1,2,3,4}, float z0 = {0.5}, float k = {2}> {
        af = Cast <to = 1> (a)
        am = Mul (af, s)
        y = MatMul (x, am)
        bf = Cast <to = 1> (b)
        bs = Sub (bf, z0)
        bm = Mul (bs, k)
        z = MatMul (x, bm)
        df = Cast <to = 1> (d)
        dm = Mul (k, df)
        u = MatMul (x, dm)
    }""")
    assert [weight.address for weight in weights(model) if weight.prunable] == ["d"]


# What is left alone ---------------------------------------------------------------------------------------------------


def test_what_is_left_alone(parse: Parse) -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 17]>
    g (float[2,32] x, float[32,32] given) => (float[2,32] y, float[32,32] out)
    <float[32,32] given = {1}, float[32,32] out = {1}, float[32,32] nan = {1}, float[32,32] fake = {1},
     int8[32,32] q = {1}, float[32] bias = {1}, float[1024] vector = {1}, float one = {1}, float[4,4] small = {1},
     float[32,32] kept = {1}, float[32,32] far = {1}> {
        h0 = MatMul (x, given) h1 = MatMul (h0, out) h2 = MatMul (h1, nan)
        fq = QuantizeLinear (fake, one) fd = DequantizeLinear (fq, one) h3 = MatMul (h2, fd)
        qd = DequantizeLinear (q, one) h4 = MatMul (h3, qd) h5 = Add (h4, bias)
        h6 = MatMul (h5, kept) y = MatMul (h6, far)
    }""")
    for name, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(random(*static_dims(value)), name=name)
    broken = np.array(model.graph.initializers["nan"].const_value.numpy())
    broken[3, 3] = np.nan
    model.graph.initializers["nan"].const_value = ir.tensor(broken, name="nan")
    model.graph.initializers["far"].const_value = ir.tensor(np.full((32, 32), np.inf, np.float32), name="far")
    before = text(model)
    found = skips(quantize(model, keep="kept"))
    assert text(model) == before
    assert found == {
        "given": "the model's caller may pass another tensor for it",
        "out": "not a weight of a layer: output",
        "nan": "holds NaN, infinity, or values beyond float32",
        "far": "holds NaN, infinity, or values beyond float32",
        "fake": "quantized already, by QuantizeLinear behind it",
        "q": "quantized already",
        "bias": "not a weight of a layer: operand",
        "vector": "not a weight of a layer: unused",
        "small": "not a weight of a layer: unused",
        "one": "not a weight of a layer: scale",
        "kept": "kept by request",
    }


def test_selections() -> None:
    model, _ = layer("LSTM")
    assert skips(quantize(model, only="w1"))["w"] == "not among those asked for"
    model, _ = layer("LSTM")
    with pytest.raises(UsageError, match="Did you mean 'w1'"):
        Pipeline.parse("quantize-weights{only=w11}").run(model)


def test_sparse_weights_and_double_quantization(parse: Parse) -> None:
    model = one_layer("MatMul", random(40, 30), x=random(3, 40))
    quantize(model)
    before = text(model)
    assert skips(quantize(model))["w"] == "quantized already"
    assert text(model) == before


def test_an_outlier_shows_in_the_ledger() -> None:
    array = random(40, 30)
    array[7, 7] = 1e4
    model = one_layer("MatMul", array, x=random(3, 40))
    (change,) = quantize(model).ledger.changes
    rounded = symmetric(array, 1, 8)
    assert not np.delete(rounded[:, 7], 7).any()  # the column's other numbers are lost, and no other column's
    error = np.square(rounded[:, :7] - array[:, :7]).sum() / np.square(array[:, :7]).sum()
    assert error < 1e-4
    sqnr = 10 * np.log10(np.square(array.astype(float)).sum() / np.square((rounded - array).astype(float)).sum())
    assert change.numbers["sqnr_db"] == pytest.approx(sqnr, abs=0.01)
    assert change.numbers["bits"] == 8
    assert change.numbers["bytes_before"] == 4800
    assert change.numbers["bytes"] == 1200 + 120


@pytest.mark.parametrize("way", [{}, {"range": "minmax"}, {"bits": 1}, {"bits": 2, "scale": "power-of-two"}])
def test_constant_weights_and_channels_of_zeros(way: dict[str, object]) -> None:
    array = np.full((40, 30), 0.25, np.float32)
    array[:, 4] = 0
    model = one_layer("MatMul", array, x=random(3, 40), opset=25)
    (change,) = quantize(model, **way).ledger.changes
    found = find(model, "w")
    np.testing.assert_allclose(found.magnitudes(), array, rtol=1e-6)
    assert change.numbers.get("sqnr_db", 200) > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("bits=9", "bits=9 is out of range; it is 1 to 8, or 16"),
        ("bits=0", "out of range"),
        ("scale=0", "scale=0 is out of range"),
        ("scale=wide", "it takes float or power-of-two or a number"),
        ("scale=10 range=minmax", "leaves no range to choose"),
        ("bits=1 range=minmax", "one bit stores the sign"),
        ("block=64", "it takes none or 32 or 128"),
        ("block=32 bits=16", "it goes with bits=2 to 8"),
        ("block=32 scale=10", "it goes with bits=2 to 8"),
    ],
)
def test_options_that_are_refused(options: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Pipeline.parse(f"quantize-weights{{{options}}}")


def test_options_print_as_they_read() -> None:
    line = "quantize-weights{bits=4 scale=power-of-two block=32},quantize-weights{scale=64.0}"
    assert str(Pipeline.parse(line)) == line
    assert str(Pipeline.parse("quantize-weights{block=none scale=float}")) == "quantize-weights"


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize(
    ("bits", "way"), [(4, "symmetric"), (4, "minmax"), (8, "symmetric"), (8, "minmax"), (2, "symmetric")]
)
def test_blocks_become_one_kernel(op_type: str, bits: int, way: str, tmp_path: Path) -> None:
    array, x = random(768, 768), random(2, 768)
    model = one_layer(op_type, array, x=x)
    ctx = quantize(model, bits=bits, block=32, range=way)
    kind = ("U" * (way == "minmax")) + f"INT{bits}"
    what = f"stored as {kind.lower()}, in blocks of 32, with activations rounded to 8 bits"
    assert what in [change.what for change in ctx.ledger.changes]
    assert kernels(model, tmp_path) == {"MatMulNBits": 1}
    found = find(model, "w")
    assert found.dtype.name == kind
    assert found.quantization is not None
    assert (found.quantization.block, found.quantization.axis) == (32, 0)
    scale = np.repeat(found.quantization.scale, 32, axis=0)
    zero = found.quantization.zero_point
    zero = np.repeat(zero, 32, axis=0) if zero.size > 1 else zero
    exact = x @ ((found.array().astype(np.float32) - zero.astype(np.float32)) * scale)
    np.testing.assert_allclose(run(model, x=x)[0], exact, atol=0.02 * np.abs(exact).max())


def test_blocks_that_would_be_slower_are_not_made() -> None:
    reason = "ONNX Runtime's MatMulNBits may be slower with this many rows of input, or so small a matrix"
    for model in (
        one_layer("MatMul", random(768, 768), x=random(200, 768)),
        one_layer("MatMul", random(64, 64), x=random(2, 64)),
    ):
        ctx = quantize(model, bits=4, block=32)
        assert skips(ctx)["w"] == f"no blocks of 32: {reason}"
        assert [change.what for change in ctx.ledger.changes] == ["stored as int4, decoded when loaded"]
    model = one_layer("MatMul", random(768, 768), x=random(200, 768))
    assert "in blocks of 128" in quantize(model, bits=4, block=128).ledger.changes[0].what


def test_blocks_need_a_plain_matmul_and_a_divisor() -> None:
    def told(model: ir.Model, block: int) -> str:
        return skips(quantize(model, bits=4, block=block))["w"]

    turned = one_layer("Gemm", random(768, 768), x=random(1, 768), transB=1)
    assert "needs a MatMul by this matrix alone" in told(turned, 32)
    assert "needs a MatMul by this matrix alone" in told(layer("Conv")[0], 32)
    assert "do not divide" in told(one_layer("MatMul", random(720, 768), x=random(1, 720)), 128)


# The storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("long", ["", "/a/module/with/a/long/name/of/its/own/"])
def test_the_saving_is_no_less_than_promised(name: str, long: str, tmp_path: Path) -> None:
    for way in ("symmetric", "minmax"):
        model, _ = layer(name)
        for value in list(model.graph.initializers.values()):
            value.name = long + (value.name or "")
        found = next(weight for weight in weights(model) if weight.address == f"{long}w")
        low, high = channel_range(found.tensor, AXES[name])
        grid = narrowest(8, 21, symmetric=way == "symmetric")
        made = affine(low, high, grid, symmetric=way == "symmetric")
        before, promised = saved_bytes(model), saving(found, made)
        encode(found, made, Names(model))
        verify(model)
        assert 0 < promised <= before - saved_bytes(model) <= promised + 400


@pytest.mark.parametrize("shape", [(3, BLOCK + 5), (BLOCK + 5, 3), (300, 7, 300), (2, 3, 4), (1, 1), (2, 0, 3)])
def test_ranges_and_scales_are_read_in_parts(shape: tuple[int, ...]) -> None:
    array = random(*shape)
    tensor = ir.tensor(array)
    for axis in (None, *range(len(shape))):
        kept = tuple(place for place in range(len(shape)) if place != axis)
        low, high = channel_range(tensor, axis)
        if not array.size:
            assert np.isinf(low).all()
            continue
        np.testing.assert_array_equal(low, array.min(kept, keepdims=True))
        np.testing.assert_array_equal(high, array.max(kept, keepdims=True))
        mean = np.abs(array.astype(np.float64)).mean(kept, keepdims=True)
        np.testing.assert_allclose(mean_magnitude(tensor, axis), mean)
        values = np.arange(low.size).reshape(low.shape)
        whole, part = np.broadcast_to(values, shape).reshape(-1), spread(values, shape)
        for start, stop in ((0, array.size), (array.size // 3, array.size // 2 + 1), (array.size - 1, array.size)):
            np.testing.assert_array_equal(np.broadcast_to(part(start, stop), stop - start), whole[start:stop])


def test_ranges_of_blocks_are_read_in_parts() -> None:
    array = random(96, 3000)
    low, high = block_range(ir.tensor(array), 32)
    np.testing.assert_array_equal(low, array.reshape(3, 32, 3000).min(1))
    np.testing.assert_array_equal(high, array.reshape(3, 32, 3000).max(1))
    part = spread(low, (96, 3000), 32)
    np.testing.assert_array_equal(part(5, 280_000), np.repeat(low, 32, 0).reshape(-1)[5:280_000])


def test_scales_along_several_axes() -> None:
    """What ``encode`` takes from others: any scale that broadcasts over the weight."""
    model = one_layer("MatMul", random(40, 30), x=random(3, 40))
    scale = np.abs(random(40, 30, seed=1)) / 100 + np.float32(0.01)
    made = affine(-127 * scale, 127 * scale, S8, symmetric=True)
    told = distortion(find(model, "w").tensor, made)
    assert 0 < told.saturated < 1200
    encode(find(model, "w"), made, Names(model))
    rounded = np.clip(np.rint(random(40, 30) / made.scale), -127, 127) * made.scale
    np.testing.assert_array_equal(
        run(model, x=random(3, 40))[0], run(one_layer("MatMul", rounded, x=random(3, 40)), x=random(3, 40))[0]
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_large_weights_are_made_when_they_are_read(bits: int, tmp_path: Path) -> None:
    array = random(1500, 1501)
    save(one_layer("Gemm", array, x=random(1, 1501), transB=1), tmp_path / "f.onnx", external=True)
    model = load(tmp_path / "f.onnx")
    quantize(model, bits=bits)
    assert isinstance(find(model, "w").tensor, StreamedTensor)
    save(model, tmp_path / "q.onnx")
    expected = np.rint(symmetric(array, 0, bits) / (np.abs(array).max(1, keepdims=True) / (2 ** (bits - 1) - 1)))
    np.testing.assert_array_equal(find(load(tmp_path / "q.onnx"), "w").array().astype(np.float32), expected)
    size = sum(file.stat().st_size for file in tmp_path.glob("q.onnx*"))
    assert size < array.size * bits / 8 + 20_000
    assert math.isclose(saved_bytes(model), size, rel_tol=1e-3)


def test_through_the_front_door() -> None:
    model = load("models/cnn-a.onnx")
    before = saved_bytes(model)
    accuracy = "penjing.models.zoo:accuracy"
    line = "quantize-weights{bits=4 range=minmax}"
    report = penjing.run(model, line, data="models/mnist-validation.npz", metric=accuracy, max_drop=0.02)
    assert saved_bytes(model) < 0.25 * before
    assert report.metric is not None
    assert report.metric.before - report.metric.after < 0.02
    assert report.passes[0].ledger.deeds()["stored as uint4, decoded when loaded"] == 13


@pytest.mark.parametrize("package", ["magika", "rapidocr_onnxruntime"])
def test_real_models_run_the_same_kernels_on_weights_of_eight_bits(package: str, tmp_path: Path) -> None:
    paths = [str(file.locate()) for file in files(package) or () if file.name.endswith(".onnx")]
    for path in (path for path in paths if "det" not in path and "rec" not in path):
        model = load(path)
        Pipeline.parse("strip-metadata,clean").run(model)
        before, kinds = saved_bytes(model), kernels(model, tmp_path)
        ctx = quantize(model)
        assert min(change.numbers["sqnr_db"] for change in ctx.ledger.changes) > 30
        assert saved_bytes(model) < 0.4 * before
        assert kernels(model, tmp_path) == kinds
