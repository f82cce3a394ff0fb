"""Dynamic quantization: the kernels that ONNX Runtime makes of it, its arithmetic, and what it leaves alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from penjing.ir.files import load, save
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.dynamic import QuantizeDynamic

Array = np.ndarray[Any, Any]
Parse = Callable[[str], ir.Model]
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def given(parse: Parse, text: str, **constants: Array) -> ir.Model:
    """A model from text, with its large constants as initializers."""
    model = parse(text)
    for name, array in constants.items():
        tensor = ir.Tensor(array, name=name)
        value = next(
            value
            for node in model.graph.all_nodes()
            for value in node.inputs
            if value is not None and value.name == name
        )
        value.const_value, value.shape, value.type = tensor, ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        if value.name not in model.graph.initializers:
            model.graph.register_initializer(value)
    return model


def quantize(model: ir.Model, **options: Any) -> Context:
    ctx = Context()
    QuantizeDynamic(**options).run(model, ctx)
    verify(model)
    return ctx


def run(model: ir.Model, feed: dict[str, Array], tmp_path: Path) -> tuple[list[Array], Counter[str]]:
    """The outputs, and the operators of the model as ONNX Runtime optimized it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    save(model, tmp_path / "model.onnx")
    outputs = ort.InferenceSession(tmp_path / "model.onnx", options).run(None, feed)
    return outputs, Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def sqnr(wanted: Array, found: Array) -> float:
    error = wanted.astype(np.float64) - found
    return float(10 * np.log10(np.square(wanted, dtype=np.float64).sum() / max(1e-30, np.square(error).sum())))


def reasons(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


PLAIN = "m (float[N,64] x) => (float[N,96] y) <float[1] w = {0}> { [mm] y = MatMul (x, w) }"


# Kernels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["s8", "s8-7bit", "u8"])
def test_a_product_becomes_one_kernel(parse: Parse, tmp_path: Path, weights: str) -> None:
    w, x = normal(64, 96) * np.linspace(0.01, 3, 96, dtype=np.float32), normal(5, 64)
    model = given(parse, PLAIN, w=w)
    ctx = quantize(model, weights=weights)
    (y,), kernels = run(model, {"x": x}, tmp_path)
    assert kernels == {"DynamicQuantizeMatMul": 1}
    assert sqnr(x @ w, y) > 35
    (change,) = ctx.ledger.changes
    assert change.subject == "mm"
    assert 35 < change.numbers["sqnr"] < 60


def test_the_arithmetic_is_that_of_the_operators(parse: Parse, tmp_path: Path) -> None:
    w, x = normal(64, 96), normal(5, 64)
    model = given(parse, PLAIN, w=w)
    quantize(model)
    (y,), _ = run(model, {"x": x}, tmp_path)
    scale = np.abs(w).max(axis=0) / np.float32(127)
    integers = np.rint(w / scale)
    step = np.float32((max(x.max(), 0) - min(x.min(), 0)) / 255)
    zero = np.rint(-min(x.min(), 0) / step)
    rounded = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    np.testing.assert_allclose(y, (rounded @ integers) * step * scale, rtol=1e-5, atol=1e-5)


def test_products_of_one_input_quantize_it_once(parse: Parse, tmp_path: Path) -> None:
    model = given(
        parse,
        """m (float[B,S,64] x) => (float[B,S,64] q, float[B,S,64] k, float[B,S,64] v)
        <float[1] a = {0}, float[1] b = {0}, float[1] c = {0}, float[64] bias = {0}>
        { q0 = MatMul (x, a) q = Add (q0, bias) k = MatMul (x, b) v = MatMul (x, c) }""",
        a=(a := normal(64, 64)),
        b=normal(64, 64),
        c=normal(64, 64),
        bias=(bias := normal(64)),
    )
    quantize(model)
    x = normal(2, 3, 64)
    (q, _, _), kernels = run(model, {"x": x}, tmp_path)
    assert kernels == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}  # the bias is in the first of them
    assert sqnr(x @ a + bias, q) > 35


def test_a_tied_weight_is_stored_once(parse: Parse, tmp_path: Path) -> None:
    model = given(
        parse,
        """m (float[N,64] x) => (float[N,64] y)
        <float[1] w = {0}> { a = MatMul (x, w) b = Tanh (a) i = Identity (w) y = MatMul (b, i) }""",
        w=(w := normal(64, 64)),
    )
    quantize(model)
    assert list(model.graph.initializers) == ["w_scale", "w_quantized"]
    (y,), kernels = run(model, {"x": (x := normal(3, 64))}, tmp_path)
    assert kernels == {"DynamicQuantizeMatMul": 2, "Tanh": 1}
    assert sqnr(np.tanh(x @ w) @ w, y) > 25


@pytest.mark.parametrize(
    "options", ["", "transB=1", "alpha=0.5", "beta=2.0", "transA=1", "transA=1, transB=1, alpha=2.0, beta=0.5"]
)
@pytest.mark.parametrize("constant", [True, False])
def test_gemm_with_all_its_options(parse: Parse, tmp_path: Path, options: str, constant: bool) -> None:
    w, c = normal(64, 64), normal(64)
    x = normal(64, 64)
    inputs, init = ("", ", float[1] c = {0}") if constant else (", float[64] c", "")
    text = (
        f"m (float[64,64] x{inputs}) => (float[64,64] y) <float[1] w = {{0}}{init}> {{ y = Gemm <OPTIONS> (x, w, c) }}"
    )
    text = text.replace("<OPTIONS>", f"<{options}>" if options else "")
    constants = {"w": w, **({"c": c} if constant else {})}
    model, feed = given(parse, text, **constants), {"x": x, **({} if constant else {"c": c})}
    (wanted,), _ = run(model, feed, tmp_path)
    quantize(model)
    (found,), kernels = run(model, feed, tmp_path)
    assert kernels["DynamicQuantizeMatMul"] == 1
    assert kernels["Gemm"] + kernels["MatMul"] == 0
    assert sqnr(wanted, found) > 35


@pytest.mark.parametrize(("shape", "b"), [((64,), (64, 96)), ((2, 4, 64), (2, 64, 96)), ((4, 64), (3, 64, 96))])
def test_vectors_and_batches_of_weights(
    parse: Parse, tmp_path: Path, shape: tuple[int, ...], b: tuple[int, ...]
) -> None:
    dims = ",".join(map(str, shape))
    w, x = normal(*b), normal(*shape)
    w[0] *= 5
    model = given(parse, f"m (float[{dims}] x) => (float y) <float[1] w = {{0}}> {{ y = MatMul (x, w) }}", w=w)
    model.graph.outputs[0].shape = ir.Shape((x @ w).shape)
    quantize(model)
    (y,), kernels = run(model, {"x": x}, tmp_path)
    assert kernels == {"DynamicQuantizeMatMul": 1}
    assert sqnr(x @ w, y) > 30


def test_a_weight_behind_transpose_and_cast(parse: Parse, tmp_path: Path) -> None:
    w, x = normal(96, 64).astype(np.float16), normal(5, 64)
    model = given(
        parse,
        """m (float[N,64] x) => (float[N,96] y) <float16[1] w = {0}>
        { c = Cast <to=1> (w) t = Transpose <perm=[1,0]> (c) y = MatMul (x, t) }""",
        w=w,
    )
    quantize(model)
    (y,), kernels = run(model, {"x": x}, tmp_path)
    assert kernels == {"DynamicQuantizeMatMul": 1}
    assert sqnr(x @ w.T.astype(np.float32), y) > 35


# Recurrent ------------------------------------------------------------------------------------------------------------


def lstm(parse: Parse, directions: int, hidden: int, peepholes: bool, options: str = "") -> ir.Model:
    direction = "bidirectional" if directions == 2 else "forward"
    return given(
        parse,
        f"""m (float[7,3,40] x) => (float[7,{directions},3,{hidden}] y, float[{directions},3,{hidden}] h)
        <float[1] w = {{0}}, float[1] r = {{0}}, float[1] b = {{0}}, float[1] p = {{0}}>
        {{ y, h = LSTM <hidden_size={hidden}, direction="{direction}"{options}>
          (x, w, r, b{", , , , p" if peepholes else ""}) }}""",
        w=normal(directions, 4 * hidden, 40) / 6,
        r=normal(directions, 4 * hidden, hidden) / 6,
        b=normal(directions, 8 * hidden) / 10,
        **({"p": normal(directions, 3 * hidden) / 3} if peepholes else {}),
    )


@pytest.mark.parametrize(
    ("directions", "peepholes", "options"), [(1, False, ""), (2, False, ""), (1, True, ", clip=2.0")]
)
@pytest.mark.parametrize("weights", ["s8", "u8"])
def test_lstm(parse: Parse, tmp_path: Path, directions: int, peepholes: bool, options: str, weights: str) -> None:
    model = lstm(parse, directions, 48, peepholes, options)
    feed = {"x": normal(7, 3, 40)}
    wanted, _ = run(model, feed, tmp_path)
    quantize(model, weights=weights)
    found, kernels = run(model, feed, tmp_path)
    assert kernels == {"DynamicQuantizeLSTM": 1}
    assert model.opset_imports["com.microsoft"] == 1
    assert all(sqnr(one, other) > 30 for one, other in zip(wanted, found, strict=True))


def test_a_small_lstm_and_other_recurrences_stay_float(parse: Parse) -> None:
    model = lstm(parse, 1, 8, peepholes=False)
    small = quantize(model)
    assert not small.ledger.changes
    assert [skip.reason for skip in small.ledger.skips] == [
        "so few weights that quantizing the input costs more than they save"
    ]
    gru = given(
        parse,
        """m (float[7,3,40] x) => (float[7,1,3,48] y) <float[1] w = {0}, float[1] r = {0}>
        { y = GRU <hidden_size=48> (x, w, r) }""",
        w=normal(1, 144, 40),
        r=normal(1, 144, 48),
    )
    assert list(reasons(quantize(gru)).values()) == ["ONNX Runtime has no integer GRU"]


# Left alone -----------------------------------------------------------------------------------------------------------


def test_convolutions_are_skipped_with_the_reason(parse: Parse) -> None:
    model = given(
        parse,
        "m (float[1,3,8,8] x) => (float[1,32,6,6] y) <float[1] w = {0}> { [conv] y = Conv (x, w) }",
        w=normal(32, 3, 3, 3),
    )
    assert reasons(quantize(model)) == {"conv": "a convolution: ConvInteger takes five times as long as float"}


def test_a_weight_that_others_read_too_stays(parse: Parse) -> None:
    text = """m (int64[N] i) => (float[N,128] y) <float[1] w = {0}>
    { e = Gather (w, i) t = Transpose <perm=[1,0]> (w) [head] y = MatMul (e, t) }"""
    found = reasons(quantize(given(parse, text, w=normal(128, 64))))
    assert found == {"head": "its weight is read as float too, by Gather, and would be stored twice"}


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        ("y = MatMul (x, x)", {}, "its weight is no constant"),
        ("y = MatMul (w, x)", {"w": normal(64, 64)}, "its weight is no constant"),
        ("y = MatMul (x, w)", {"w": normal(64)}, "its weight is a vector"),
        (
            "c = Cast <to=1> (w) d = Mul (c, c) [layer] y = MatMul (x, d)",
            {"w": np.ones((64, 96), np.int8)},
            "dequantize",
        ),
        ("y = MatMul (x, w)", {"w": normal(64, 8)}, "fewer than 16 output channels save less"),
        ("y = MatMul (x, w)", {"w": normal(64, 20)}, "so few weights that"),
        ("y = MatMul (x, w)", {"w": np.full((64, 96), np.nan, np.float32)}, "its weight holds NaN or infinity"),
        ("y = Gemm <alpha=-1.0> (x, w)", {"w": normal(64, 96)}, "its alpha is not positive"),
        ('y = Einsum <equation="ij,jk->ik"> (x, w)', {"w": normal(64, 96)}, "no dynamic integer form of Einsum"),
    ],
)
def test_what_is_left_alone_and_why(parse: Parse, body: str, constants: dict[str, Array], reason: str) -> None:
    header = "m (float[64,64] x) => (float[64,M] y)" + ("<float[1] w = {0}>" if constants else "")
    code = body if "[layer]" in body else f"[layer] {body}"
    model = given(parse, f"{header} {{ {code} }}", **constants)
    before = [node.op_type for node in model.graph]
    ctx = quantize(model)
    assert reason in reasons(ctx)["layer"]
    assert not ctx.ledger.changes
    assert [node.op_type for node in model.graph] == before


def test_what_is_computed_in_half_precision_stays(parse: Parse) -> None:
    text = "m (float16[N,64] x) => (float16[N,96] y) <float16[1] w = {0}> { [mm] y = MatMul (x, w) }"
    assert reasons(quantize(given(parse, text, w=normal(64, 96).astype(np.float16)))) == {
        "mm": "it computes in float16"
    }


def test_a_column_that_a_sum_widens_stays(parse: Parse, tmp_path: Path) -> None:
    """ONNX Runtime takes the addend for a bias of one column, and fails when it runs."""
    model = given(
        parse,
        """m (float[3,4096] x) => (float[3,5] y) <float[1] w = {0}, float[5] b = {1,2,3,4,5}>
        { [mm] p = MatMul (x, w) y = Add (p, b) }""",
        w=normal(4096, 1),
    )
    assert "one column" in reasons(quantize(model, only="mm"))["mm"]
    run(model, {"x": normal(3, 4096)}, tmp_path)


def test_only_asks_for_small_ones_and_keep_leaves_large_ones(parse: Parse) -> None:
    text = """m (float[N,64] x) => (float[N,64] y) <float[1] a = {0}, float[1] b = {0}>
    { [one] h = MatMul (x, a) [two] y = MatMul (h, b) }"""
    small = {"a": normal(64, 8), "b": normal(8, 64)}
    ctx = quantize(given(parse, text, **small), only="node:one")
    assert [change.subject for change in ctx.ledger.changes] == ["one"]
    assert reasons(ctx) == {"two": "not among those asked for"}
    large = {"a": normal(64, 64), "b": normal(64, 64)}
    ctx = quantize(given(parse, text, **large), keep="b")
    assert [change.subject for change in ctx.ledger.changes] == ["one"]
    assert reasons(ctx) == {"two": "kept by request"}


# Models ---------------------------------------------------------------------------------------------------------------


def test_old_opsets_are_raised_first(parse: Parse, tmp_path: Path) -> None:
    model = given(parse, '<ir_version: 4, opset_import: ["": 9]>' + PLAIN, w=(w := normal(64, 96)))
    ctx = quantize(model)
    assert ctx.ledger.changes[0].what == "opset 9 to 11"
    (y,), kernels = run(model, {"x": (x := normal(2, 64))}, tmp_path)
    assert kernels == {"DynamicQuantizeMatMul": 1}
    assert sqnr(x @ w, y) > 35


def test_bodies_and_captured_weights(parse: Parse, tmp_path: Path) -> None:
    model = given(
        parse,
        """m (bool b, float[3,64] x) => (float[3,64] y) <float[1] w = {0}> {
            y = If (b) <
                then_branch = yes () => (float[3,64] s) { s = MatMul (x, w) },
                else_branch = no () => (float[3,64] t) { r = Relu (x) t = MatMul (r, w) }
            >
        }""",
        w=(w := normal(64, 64)),
    )
    ctx = quantize(model)
    assert [change.subject for change in ctx.ledger.changes] == ["If/then/MatMul", "If/else/MatMul"]
    assert list(model.graph.initializers) == ["w_scale", "w_quantized"]
    x = normal(3, 64)
    for choice in (True, False):
        (y,), _ = run(model, {"b": np.array(choice), "x": x}, tmp_path)
        assert sqnr((x if choice else np.maximum(x, 0)) @ w, y) > 35


def test_large_weights_of_a_file_are_quantized_when_read(tmp_path: Path) -> None:
    w = normal(1024, 1536)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", 1024]))
    value = ir.val("w", const_value=ir.Tensor(w, name="w"))
    node = ir.node("MatMul", [x, value], name="mm")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, ir.Shape(["n", 1536])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 17}, name="g")
    ir.save(ir.Model(graph, ir_version=8), tmp_path / "large.onnx", external_data="large.data")
    model = load(tmp_path / "large.onnx")
    quantize(model)
    stored = model.graph.initializers["w_quantized"].const_value
    assert isinstance(stored, ir.LazyTensor)
    scale = np.abs(w).max(axis=0) / np.float32(127)
    np.testing.assert_array_equal(stored.numpy(), np.rint(w / scale).astype(np.int8))
    (y,), _ = run(model, {"x": (x0 := normal(2, 1024))}, tmp_path)
    assert sqnr(x0 @ w, y) > 35


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_bundled_models(name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "models"
    images = np.load(folder / "mnist-test.npz")
    x = next(images[key] for key in images.files if key != "labels")[:100]
    model = load(folder / f"{name}.onnx")
    feed = {model.graph.inputs[0].name or "": x}
    (wanted,), before = run(model, feed, tmp_path)
    quantize(model)
    (found,), after = run(model, feed, tmp_path)
    assert sqnr(wanted, found) > 35
    assert (wanted.argmax(1) == found.argmax(1)).mean() >= 0.99
    assert after["DynamicQuantizeMatMul"] + after["MatMulIntegerToFloat"] >= 3
    assert (tmp_path / "model.onnx").stat().st_size < 0.5 * (folder / f"{name}.onnx").stat().st_size
    assert (
        before["MatMul"] + before["Gemm"] + before["FusedGemm"] > after["MatMul"] + after["Gemm"] + after["FusedGemm"]
    )


def test_twice_gives_the_same_bytes_and_changes_nothing_more(parse: Parse) -> None:
    w = normal(64, 96)
    one, two = given(parse, PLAIN, w=w), given(parse, PLAIN, w=w)
    for model in (one, two):
        Pipeline.parse("quantize-dynamic{weights=s8-7bit}").run(model)
    first, second = (ir.to_proto(model).SerializeToString(deterministic=True) for model in (one, two))
    assert first == second
    ctx = quantize(one)
    assert not ctx.ledger.changes
    assert list(reasons(ctx).values()) == ["it computes on integers already"]
