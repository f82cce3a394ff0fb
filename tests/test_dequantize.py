"""Models that other tools quantized, and our own, in floats again: what comes back, exactly, and what stays."""

import importlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader

from penjing.ir.dequantize import Blocks, dequantized, quantization, unpacked
from penjing.ir.files import load, save
from penjing.ir.storage import StreamedTensor
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.dequantize import Dequantize

Array = np.ndarray[Any, Any]
Parse = Callable[[str], ir.Model]
MODELS = Path(__file__).parents[1] / "models"
RANDOM = np.random.default_rng(0)
NEW = '<ir_version: 10, opset_import: ["": 21]> '
INTEGER = ("Quant", "QLinear", "QGemm", "Integer", "NBits", "QAttention")


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def dequantize(model: ir.Model, **options: Any) -> Context:
    ctx = Context()
    Dequantize(**options).run(model, ctx)
    verify(model)
    return ctx


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def constants(model: ir.Model) -> dict[str, Array]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def run(model: ir.Model | Path, feed: dict[str, Array], tmp_path: Path) -> list[Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if isinstance(model, ir.Model):
        save(model, tmp_path / "ran.onnx")
        model = tmp_path / "ran.onnx"
    return list(ort.InferenceSession(model, options).run(None, feed))


def sqnr(wanted: Array, found: Array) -> float:
    error = wanted.astype(np.float64) - found
    return float(10 * np.log10(np.square(wanted, dtype=np.float64).sum() / max(1e-30, np.square(error).sum())))


def reasons(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


# What ONNX Runtime's tools wrote --------------------------------------------------------------------------------------


def images() -> Array:
    held = np.load(MODELS / "mnist-test.npz")
    return next(held[key] for key in held.files if key != "labels")[:64]


class Reader(CalibrationDataReader):
    """Calibration data, as ``quantize_static`` takes them."""

    def __init__(self, name: str) -> None:
        self.left = [{name: images()[:32]}]

    def get_next(self) -> dict[str, Array] | None:
        return self.left.pop() if self.left else None


def quantized(name: str, way: str, tmp_path: Path) -> tuple[ir.Model, ir.Model, str]:
    """The float model, as ONNX Runtime's tool quantized it, and the name of the input."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    source, target = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    proto = onnx.load(MODELS / f"{name}.onnx")
    del proto.graph.value_info[:]  # else its own shape inference contradicts it
    onnx.save(proto, source)
    model = load(source)
    given = model.graph.inputs[0].name or ""
    if way == "dynamic":
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
    else:
        form = QuantFormat.QDQ if way.startswith("QDQ") else QuantFormat.QOperator
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(source, target, Reader(given), quant_format=form, per_channel="channel" in way, **kinds)
    return model, load(target), given


@pytest.mark.parametrize(
    ("name", "way", "least"),
    [
        ("cnn-a", "QDQ per channel", 40),
        ("cnn-a-legacy", "QDQ per tensor", 28),
        ("cnn-a-legacy", "QOperator", 28),
        ("cnn-a-legacy", "dynamic", 28),
        ("mlp", "QOperator per channel", 38),
        ("vit", "QDQ per channel", 45),
        ("vit", "QOperator", 42),
        ("vit", "dynamic", 42),
    ],
)
def test_models_of_onnx_runtimes_tools(name: str, way: str, least: float, tmp_path: Path) -> None:
    original, model, given = quantized(name, way, tmp_path)
    ctx = dequantize(model)
    assert not ctx.ledger.skips
    assert not [op_type for op_type in operators(model) if any(word in op_type for word in INTEGER)]
    feed = {given: images()}
    (wanted,), (rounded,), (found,) = (
        run(item, feed, tmp_path) for item in (original, tmp_path / "quantized.onnx", model)
    )
    assert sqnr(wanted, found) > max(least, sqnr(wanted, rounded))
    if "Q" in way:  # Relu and all else is back
        Pipeline.parse("clean").run(original)
        Pipeline.parse("clean").run(model)
        assert Counter(operators(model)) == Counter(operators(original))


def test_weights_come_back_within_half_a_step(tmp_path: Path) -> None:
    original, model, _ = quantized("cnn-a", "QDQ per channel", tmp_path)
    scales = {name.removesuffix("_scale"): held for name, held in constants(model).items() if name.endswith("_scale")}
    dequantize(model)
    before, after = constants(original), constants(model)
    convolutions = [name for name, array in before.items() if array.ndim == 4]
    assert len(convolutions) == 12
    for name in convolutions:
        step = scales[name].reshape(-1, 1, 1, 1)
        assert np.all(np.abs(before[name] - after[name]) <= 0.5001 * step)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_matmul(parse: Parse, tmp_path: Path, bits: int, symmetric: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    w, x = normal(80, 40), normal(5, 80)  # 80: two blocks and a half
    text = "m (float[N,80] x, float[80,40] w) => (float[N,40] y) { y = MatMul (x, w) }"
    proto = ir.to_proto(parse(NEW + text))
    del proto.graph.input[1]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    tool = MatMulNBitsQuantizer(proto, bits=bits, block_size=32, is_symmetric=symmetric, accuracy_level=1)
    tool.process()
    model = ir.from_proto(tool.model.model)
    (before,) = run(model, {"x": x}, tmp_path)
    ctx = dequantize(model)
    assert [change.what for change in ctx.ledger.changes] == ["MatMulNBits in float"]
    assert operators(model) == ["MatMul"]
    (after,) = run(model, {"x": x}, tmp_path)
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)
    (restored,) = constants(model).values()
    assert np.abs(restored - w).max() <= 1.01 * np.ptp(w) / (2**bits - 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_gather(parse: Parse, tmp_path: Path, symmetric: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    w, i = normal(50, 64), np.arange(50)[::-1].copy()
    text = "m (int64[N] i, float[50,64] w) => (float[N,64] y) { y = Gather (w, i) }"
    proto = ir.to_proto(parse(NEW + text))
    del proto.graph.input[1]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    tool = MatMulNBitsQuantizer(proto, block_size=32, is_symmetric=symmetric, op_types_to_quantize=("Gather",))
    tool.process()
    model = ir.from_proto(tool.model.model)
    (before,) = run(model, {"i": i}, tmp_path)
    dequantize(model)
    assert operators(model) == ["Gather"]
    np.testing.assert_array_equal(before, run(model, {"i": i}, tmp_path)[0])


# Operators on integers ------------------------------------------------------------------------------------------------

X = "xq, xs, xz"
KINDS = {
    "conv": ("QLinearConv <pads=[1,1,1,1]> (xq, xs, xz, w, ws, wz, ys, yz, b)", "Conv", (2, 8, 6, 6)),
    "depthwise": ("QLinearConv <group=8, pads=[1,1,1,1]> (xq, xs, xz, d, ws, wz, ys, yz, b)", "Conv", (2, 8, 6, 6)),
    "matmul": ("QLinearMatMul (xq, xs, xz, m, ms, wz, ys, yz)", "MatMul", (2, 8)),
    "gemm": ("com.microsoft.QGemm <transB=1> (xq, xs, xz, t, ws, zs, b, ys, yz)", "Gemm", (2, 8)),
    "gemm alpha": ("com.microsoft.QGemm <alpha=0.5> (xq, xs, xz, m, ms, wz1, , ys, yz)", "Gemm", (2, 8)),
    "add": ("com.microsoft.QLinearAdd (xq, xs, xz, xq, xs, xz, ys, yz)", "Add", (2, 8)),
    "mul": ("com.microsoft.QLinearMul (xq, xs, xz, c, xs, xz, ys, yz)", "Mul", (2, 8)),
    "concat": ("com.microsoft.QLinearConcat <axis=0> (ys, yz, xq, xs, xz, xq, xs, xz)", "Concat", (2, 8)),
    "average": (f"com.microsoft.QLinearAveragePool <kernel_shape=[2,2]> ({X}, ys, yz)", "AveragePool", (2, 8, 6, 6)),
    "global": (f"com.microsoft.QLinearGlobalAveragePool ({X}, ys, yz)", "GlobalAveragePool", (2, 8, 6, 6)),
    "sigmoid": (f"com.microsoft.QLinearSigmoid ({X}, ys, yz)", "Sigmoid", (2, 8)),
    "leaky": (f"com.microsoft.QLinearLeakyRelu <alpha=0.2> ({X}, ys, yz)", "LeakyRelu", (2, 8)),
    "softmax": (f"com.microsoft.QLinearSoftmax <axis=-1, opset=17> ({X}, ys, yz)", "Softmax", (2, 8)),
    "where": ("com.microsoft.QLinearWhere (choose, xq, xs, xz, c, xs, xz, ys, yz)", "Where", (2, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_operator_on_integers_is_within_a_step_of_its_float_form(kind: str, parse: Parse, tmp_path: Path) -> None:
    call, op_type, shape = KINDS[kind]
    dims = ",".join(map(str, shape))
    arrays = {
        "w": RANDOM.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        "d": RANDOM.integers(-127, 128, (8, 1, 3, 3)).astype(np.int8),
        "m": RANDOM.integers(-127, 128, (8, 8)).astype(np.int8),
        "t": RANDOM.integers(-127, 128, (8, 8)).astype(np.int8),
        "c": RANDOM.integers(0, 256, shape).astype(np.uint8),
        "b": RANDOM.integers(-2000, 2000, 8).astype(np.int32),
        "ws": np.linspace(0.001, 0.003, 8, dtype=np.float32),
        "ms": np.full(1, 0.002, np.float32),
        "zs": np.zeros(8, np.int8),
        "choose": np.array([True, False] * 4),
    }
    names = [name for name in arrays if name in re.findall(r"\w+", call)]
    step = 0.05
    text = f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    m (float[{dims}] x) => (float y)
    <float xs = {{0.03}}, uint8 xz = {{100}}, int8 wz = {{0}}, int8[1] wz1 = {{0}},
     float ys = {{{step}}}, uint8 yz = {{120}}>
    {{ xq = QuantizeLinear (x, xs, xz) yq = {call} y = DequantizeLinear (yq, ys, yz) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(arrays[name], name) for name in names)
    model = ir.from_proto(proto)
    x = np.clip(normal(*shape), -2.9, 4.5)
    x = np.rint(x / np.float32(0.03)).astype(np.float32) * np.float32(0.03)  # what the input's rounding keeps
    (before,) = run(model, {"x": x}, tmp_path)
    ctx = dequantize(model)
    assert operators(model) == [op_type]
    assert not ctx.ledger.skips
    (after,) = run(model, {"x": x}, tmp_path)
    clipped = np.clip(after, (0 - 120) * step, (255 - 120) * step)
    assert np.abs(before - clipped).max() <= 1.01 * step


def test_integers_that_are_moved_about(parse: Parse, tmp_path: Path) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[1,4,6,6] x) => (float[1,M] y, int64[1,1,6,6] best)
        <int64[1] one = {1}, int64[1] three = {3}, int64[1] axis = {1}, float[4] scales = {1,1,2,2},
         float s = {0.02}, uint8 z = {128}, int64[8] p = {0,0,1,1,0,0,1,1}, int64[2] flat = {1,-1},
         float s2 = {0.02}, uint8 z2 = {128}> {
            q = QuantizeLinear (x, s, z)
            best = ArgMax <axis=1> (q)
            pool = MaxPool <kernel_shape=[2,2], strides=[3,3]> (q)
            pad = Pad (pool, p, z)
            a, b = Split <axis=1> (pad)
            back = Concat <axis=1> (b, a)
            turned = Transpose <perm=[0,2,3,1]> (back)
            cut = Slice (turned, one, three, axis)
            big = Resize <mode="nearest"> (cut, , scales)
            row = Reshape (big, flat)
            y = DequantizeLinear (row, s2, z2)
        }"""
    )
    x = np.rint(np.clip(normal(1, 4, 6, 6), -2, 2) / np.float32(0.02)).astype(np.float32) * np.float32(0.02)
    before = run(model, {"x": x}, tmp_path)
    dequantize(model)
    assert "DequantizeLinear" not in operators(model)
    after = run(model, {"x": x}, tmp_path)
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)
    np.testing.assert_array_equal(before[1], after[1])


def test_rows_of_an_integer_table(parse: Parse) -> None:
    model = parse(
        """m (int64[N] i) => (float[N,2] y) <int8[3,2] w = {1,2,3,4,5,6}, float s = {0.5}, int8 z = {1}>
        { rows = Gather (w, i) y = DequantizeLinear (rows, s, z) }"""
    )
    dequantize(model)
    assert operators(model) == ["Gather"]
    np.testing.assert_array_equal(constants(model)["w"], [[0, 0.5], [1, 1.5], [2, 2.5]])


def test_attention_of_integers(parse: Parse, tmp_path: Path) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> m (float[2,6,32] x) => (float[2,6,32] y)
        <float xs = {0.03}, uint8 xz = {100}, float ws = {0.002}, int8 wz = {0}> {
            q = QuantizeLinear (x, xs, xz)
            y = com.microsoft.QAttention <num_heads=4> (q, w, b, xs, ws, , xz, wz)
        }"""
    )
    proto = ir.to_proto(model)
    weight, bias = RANDOM.integers(-127, 128, (32, 96)).astype(np.int8), normal(96)
    proto.graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")])
    model = ir.from_proto(proto)
    x = np.clip(normal(2, 6, 32), -2.9, 4.5)
    (before,) = run(model, {"x": x}, tmp_path)
    dequantize(model)
    assert operators(model) == ["Attention"]
    assert sqnr(before, run(model, {"x": x}, tmp_path)[0]) > 35


# Our own --------------------------------------------------------------------------------------------------------------


def test_dynamic_quantization_and_back_gives_the_integers_exactly() -> None:
    model = load(MODELS / "mlp.onnx")
    shapes = Counter(operators(model))
    Pipeline.parse("quantize-dynamic").run(model)
    held = constants(model)
    stems = [name.removesuffix("_quantized") for name in held if name.endswith("_quantized")]
    integers = {stem: held[f"{stem}_quantized"].astype(np.float32) * held[f"{stem}_scale"] for stem in stems}
    dequantize(model)
    after = constants(model)
    assert len(stems) >= 3
    for stem in stems:
        np.testing.assert_array_equal(after[stem], integers[stem])
    assert shapes["Gemm"] - len(stems) == operators(model).count("Gemm")
    assert operators(model).count("MatMul") == len(stems)


def test_an_lstm_and_back(parse: Parse, tmp_path: Path) -> None:
    proto = ir.to_proto(
        parse(
            """m (float[7,3,40] x) => (float[7,2,3,48] y)
            { y = LSTM <hidden_size=48, direction="bidirectional"> (x, w, r) }"""
        )
    )
    arrays = {"w": normal(2, 192, 40) / 6, "r": normal(2, 192, 48) / 6}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.from_proto(proto)
    x = normal(7, 3, 40)
    (wanted,) = run(model, {"x": x}, tmp_path)
    Pipeline.parse("quantize-dynamic").run(model)
    assert operators(model) == ["DynamicQuantizeLSTM"]
    dequantize(model)
    assert operators(model) == ["LSTM"]
    for name, array in arrays.items():
        scale = np.abs(array).max(axis=2, keepdims=True) / np.float32(127)
        np.testing.assert_array_equal(constants(model)[name], np.rint(array / scale) * scale)
    assert sqnr(wanted, run(model, {"x": x}, tmp_path)[0]) > 40


@pytest.mark.parametrize("options", ["{bits=8}", "{bits=4 range=minmax}", "{bits=4 block=32}", "{bits=1}", "{bits=16}"])
def test_stored_weights_and_back_give_the_same_outputs(options: str, tmp_path: Path) -> None:
    model = load(MODELS / "mlp.onnx")
    names, shapes = set(model.graph.initializers), operators(model)
    Pipeline.parse(f"quantize-weights{options}").run(model)
    feed = {model.graph.inputs[0].name or "": images()}
    (before,) = run(model, feed, tmp_path)
    dequantize(model)
    assert operators(model) == shapes
    assert set(model.graph.initializers) == names
    np.testing.assert_array_equal(run(model, feed, tmp_path)[0], before)


@pytest.mark.parametrize("shifted", [True, False])
def test_weights_that_cast_and_mul_decode(parse: Parse, shifted: bool) -> None:
    code = "c = Cast <to=1> (q) d = Sub (c, z) w = Mul (d, s)" if shifted else "c = Cast <to=1> (q) w = Mul (c, s)"
    model = parse(
        f"""m (float[N,3] x) => (float[N,2] y)
        <int8[3,2] q = {{1,2,3,4,5,6}}, float[1,2] s = {{0.1,0.2}}, float[2] z = {{1,2}}>
        {{ {code} y = MatMul (x, w) }}"""
    )
    ctx = dequantize(model)
    assert operators(model) == ["MatMul"]
    integers = np.arange(1, 7, dtype=np.float32).reshape(3, 2) - (np.float32([1, 2]) if shifted else 0)
    np.testing.assert_array_equal(constants(model)["q"], integers * np.float32([[0.1, 0.2]]))
    assert [change.what for change in ctx.ledger.changes] == ["integers as the float weight"]


def test_half_precision_weights_come_back_in_their_type(parse: Parse) -> None:
    model = parse(
        """m (float16[N,3] x) => (float16[N,2] y) <int8[3,2] q = {1,2,3,4,5,6}, float s = {0.1}>
        { c = Cast <to=1> (q) f = Mul (c, s) w = Cast <to=10> (f) y = MatMul (x, w) }"""
    )
    dequantize(model)
    assert operators(model) == ["MatMul"]
    (weight,) = constants(model).values()
    assert weight.dtype == np.float16


# DequantizeLinear of constants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "dtype", "shape", "scale", "attributes"),
    [
        (10, np.int8, (4, 6), (), {}),
        (13, np.uint8, (4, 6), (6,), {"axis": -1}),
        (13, np.int32, (4,), (4,), {"axis": 0}),
        (19, ml_dtypes.float8_e4m3fn, (4, 6), (4,), {"axis": 0}),
        (21, np.int16, (4, 6), (), {}),
        (21, ml_dtypes.int4, (4, 6), (2, 6), {"axis": 0, "block_size": 2}),
        (21, ml_dtypes.uint4, (3, 64), (3, 2), {"axis": 1, "block_size": 32}),
        (25, ml_dtypes.uint2, (4, 8), (8,), {"axis": 1}),
    ],
)
def test_constants_of_every_width(
    opset: int, dtype: Any, shape: tuple[int, ...], scale: tuple[int, ...], attributes: dict[str, int]
) -> None:
    stored = RANDOM.integers(0, 4, shape).astype(dtype)
    integer = "float8" not in np.dtype(dtype).name
    scales = (RANDOM.random(scale) + 0.1).astype(np.float32)
    zeros = np.ones(scale, dtype) if integer and dtype is not np.int32 else None
    arrays = {"w": stored, "s": scales, **({} if zeros is None else {"z": zeros})}
    inputs = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    node = ir.node("DequantizeLinear", inputs, attributes)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
    add = ir.node("Add", [x, node.outputs[0]])
    add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph([x], add.outputs, nodes=[node, add], initializers=inputs, opset_imports={"": opset}, name="g")
    model = ir.Model(graph, ir_version=13)
    dequantize(model)
    assert operators(model) == ["Add"]
    full = scales
    if "block_size" in attributes:
        full = np.repeat(scales, attributes["block_size"], axis=attributes["axis"])
    elif scales.ndim and len(shape) > 1:
        full = np.expand_dims(scales, 1 if attributes["axis"] == 0 else 0)
    shift = 0 if zeros is None else 1
    np.testing.assert_array_equal(constants(model)["w"], (stored.astype(np.float32) - shift) * full)


def test_tied_constants_come_back_once(parse: Parse) -> None:
    model = parse(
        """m (float[N,2] x) => (float[N,2] y)
        <int8[2,2] w_quantized = {1,2,3,4}, float s = {0.5}, float t = {0.5}> {
            a = DequantizeLinear (w_quantized, s) i = Identity (w_quantized) b = DequantizeLinear (i, t)
            h = MatMul (x, a) y = MatMul (h, b)
        }"""
    )
    dequantize(model)
    assert list(constants(model)) == ["w"]


def test_a_vendors_operators_are_read_alike(parse: Parse) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> m (float[2,2] x) => (float[2,2] y)
        <uint16[2,2] w = {1,2,3,4}, float s = {0.5}, uint16 z = {2}, float xs = {0.01}, uint16 xz = {9}> {
            q = com.microsoft.QuantizeLinear (x, xs, xz) r = com.microsoft.DequantizeLinear (q, xs, xz)
            f = com.microsoft.DequantizeLinear (w, s, z) y = MatMul (r, f)
        }"""
    )
    dequantize(model)
    assert operators(model) == ["MatMul"]
    np.testing.assert_array_equal(constants(model)["w"], [[-0.5, 0], [0.5, 1]])


def test_large_weights_are_made_when_they_are_read() -> None:
    stored = ir.tensor(RANDOM.integers(-128, 128, (700, 512)).astype(np.int8))
    scales = (RANDOM.random(512) + 0.1).astype(np.float32)
    made = dequantized(stored, quantization((700, 512), scales, None, 1), ir.DataType.FLOAT)
    assert isinstance(made, StreamedTensor)
    np.testing.assert_array_equal(made.numpy(), stored.numpy().astype(np.float32) * scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packed_blocks_of_every_width(bits: int) -> None:
    numbers = RANDOM.integers(0, 2**bits, (600, 20, 32)).astype(np.uint8)
    single = (numbers[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(single.reshape(600, 20, -1).astype(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(unpacked(packed, bits), numbers)
    scales = (RANDOM.random((600, 20)) + 0.1).astype(np.float32)
    zeros = RANDOM.integers(0, 2**bits, (600, 20)).astype(np.uint8)
    made = Blocks(ir.tensor(packed), scales, zeros, bits, 32, 630).weight()
    assert isinstance(made, StreamedTensor)
    wanted = (numbers.astype(np.float32) - zeros[..., None]) * scales[..., None]
    np.testing.assert_array_equal(made.numpy(), wanted.reshape(600, -1)[:, :630].T)


# Clamping -------------------------------------------------------------------------------------------------------------

CLAMPED = """<ir_version: 8, opset_import: ["": OPSET]> m (float[2,2] x) => (float[2,2] y)
<float[2,2] w = {1,-2,3,-4}, float s = {SCALE}, uint8 z = {ZERO}, float t = {1}> {
    BEFORE
    q = QuantizeLinear (h, s, z) r = DequantizeLinear (q, s, z) y = Mul (r, t)
}"""


@pytest.mark.parametrize(
    ("opset", "scale", "zero", "before", "expected"),
    [
        (13, 0.02, 0, "h = MatMul (x, w)", ["MatMul", "Relu", "Mul"]),
        (13, 0.02, 1, "h = MatMul (x, w)", ["MatMul", "Mul"]),
        (13, 0.0235294122248888, 0, "h = MatMul (x, w)", ["MatMul", "Clip", "Mul"]),
        (10, 0.0235294122248888, 0, "h = MatMul (x, w)", ["MatMul", "Clip", "Mul"]),
        (13, 0.02, 0, "g = MatMul (x, w) h = Relu (g)", ["MatMul", "Relu", "Mul"]),
        (13, 0.02, 0, "g = Sigmoid (x) h = Transpose (g)", ["Sigmoid", "Transpose", "Mul"]),
        (13, 0.02, 0, "g = Erf (x) h = Add (g, t)", ["Erf", "Add", "Mul"]),
        (13, 0.02, 0, "g = Sin (x) h = Mul (g, t)", ["Sin", "Mul", "Relu", "Mul"]),
        (20, 0.5, 0, "h = Gelu (x)", ["Gelu", "Mul"]),
        (13, 0.6, 0, "g = Sigmoid (x) h = Mul (g, x)", ["Sigmoid", "Mul", "Mul"]),
    ],
)
def test_relu_stands_again_where_the_rounding_clamped(
    parse: Parse, tmp_path: Path, opset: int, scale: float, zero: int, before: str, expected: list[str]
) -> None:
    text = CLAMPED.replace("OPSET", str(opset)).replace("SCALE", str(scale)).replace("ZERO", str(zero))
    model = parse(text.replace("BEFORE", before))
    x = np.float32([[0.5, -1.5], [1, 0.3]])
    (wanted,) = run(model, {"x": x}, tmp_path)
    dequantize(model)
    assert operators(model) == expected
    if zero == 0:
        (found,) = run(model, {"x": x}, tmp_path)
        assert np.abs(np.minimum(found, 255 * np.float32(scale)) - wanted).max() <= 0.51 * scale


def test_an_input_is_not_clamped(parse: Parse) -> None:
    model = parse(
        """m (float[2] x) => (float[2] y) <float s = {0.02}, uint8 z = {0}>
        { q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }"""
    )
    dequantize(model)
    assert operators(model) == ["Identity"]


# What stays -----------------------------------------------------------------------------------------------------------


def test_an_integer_interface_stays(parse: Parse, tmp_path: Path) -> None:
    model = parse(
        """m (uint8[2,8] x) => (uint8[2,8] y) <float xs = {0.03}, uint8 xz = {100}, int8[8,8] w = {WEIGHT},
        float ws = {0.01}, int8 wz = {0}, float ys = {0.1}, uint8 yz = {128}>
        { y = QLinearMatMul (x, xs, xz, w, ws, wz, ys, yz) }""".replace("WEIGHT", ",".join(map(str, range(-32, 32))))
    )
    x = RANDOM.integers(0, 256, (2, 8)).astype(np.uint8)
    (before,) = run(model, {"x": x}, tmp_path)
    ctx = dequantize(model)
    assert operators(model) == ["DequantizeLinear", "MatMul", "QuantizeLinear"]
    (after,) = run(model, {"x": x}, tmp_path)
    assert after.dtype == np.uint8
    assert np.abs(before.astype(int) - after).max() <= 1
    assert sorted(reasons(ctx).values()) == [
        "an integer input, which stays as it is",
        "an integer output, which stays as it is",
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, t, z)", "by another scale or zero point"),
        ("q = QuantizeLinear (x, s, z) c = Cast <to=1> (q) y = Mul (c, s)", "its integers are read by Cast"),
        ("y = com.microsoft.MatMulBnb4 <K=2, N=2, block_size=16, quant_type=1> (x, z, s)", "no float form of MatMulB"),
        ("q, a, b = DynamicQuantizeLinear (x) y = Add (a, s)", "no float form of DynamicQuantizeLinear"),
    ],
)
def test_what_is_not_understood_stays_with_a_line(parse: Parse, body: str, reason: str) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> m (float[2,2] x) => (float[2,2] y)
        <float s = {{0.1}}, float t = {{0.2}}, uint8 z = {{3}}> {{ {body} }}"""
    )
    before = operators(model)
    ctx = dequantize(model)
    assert operators(model) == before
    assert not ctx.ledger.changes
    assert reason in " ".join(reasons(ctx).values())


def test_only_and_keep(parse: Parse) -> None:
    text = """m (float[2,2] x) => (float[2,2] y)
    <int8[2,2] a = {1,2,3,4}, int8[2,2] b = {1,2,3,4}, float s = {0.5}, float t = {0.25},
     float u = {1}, uint8 z = {7}> {
        q = QuantizeLinear (x, u, z) r = DequantizeLinear (q, u, z)
        fa = DequantizeLinear (a, s) [one] h = MatMul (r, fa)
        p = QuantizeLinear (h, u, z) o = DequantizeLinear (p, u, z)
        fb = DequantizeLinear (b, t) [two] y = MatMul (o, fb)
    }"""
    model = parse(text)
    ctx = dequantize(model, keep="node:two")
    assert operators(model) == ["MatMul", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert all(why.endswith("kept by request") for why in reasons(ctx).values())
    model = parse(text)
    dequantize(model, only="a")
    assert operators(model).count("DequantizeLinear") == 3


def test_bodies_read_what_outer_graphs_rounded(parse: Parse, tmp_path: Path) -> None:
    model = parse(
        """m (bool b, float[2] x) => (float[2] y) <float s = {0.01}, uint8 z = {100}, int8[2] w = {1,2}> {
            h = Neg (x)
            q = QuantizeLinear (h, s, z)
            y = If (b) <
                then_branch = yes () => (float[2] a) { a = DequantizeLinear (q, s, z) },
                else_branch = no () => (float[2] c) {
                    f = DequantizeLinear (w, s) r = DequantizeLinear (q, s, z) c = Mul (r, f)
                }
            >
        }"""
    )
    x = np.float32([0.5, -0.25])
    before = [run(model, {"b": np.array(choice), "x": x}, tmp_path)[0] for choice in (True, False)]
    ctx = dequantize(model)
    assert not ctx.ledger.skips
    assert operators(model) == ["Neg", "If"]
    for choice, wanted in zip((True, False), before, strict=True):
        np.testing.assert_allclose(run(model, {"b": np.array(choice), "x": x}, tmp_path)[0], wanted, atol=1e-6)


def test_constants_in_functions(parse: Parse, tmp_path: Path) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]> m (float[2] x) => (float[2] y) { y = local.f (x) }
        <opset_import: ["": 17], domain: "local"> f (x) => (y) {
            w = Constant <value = int8[2] {1, 2}> () s = Constant <value = float {0.5}> ()
            r = DequantizeLinear (w, s) y = Mul (x, r)
        }"""
    )
    dequantize(model)
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Constant", "Mul"]
    np.testing.assert_array_equal(run(model, {"x": np.float32([1, 1])}, tmp_path)[0], [0.5, 1])
    verify(model)


def test_a_float_model_stays_as_it_is() -> None:
    model = load(MODELS / "vit.onnx")
    ctx = dequantize(model)
    assert not ctx.ledger.changes
    assert [skip.reason for skip in ctx.ledger.skips] == ["nothing in it is quantized"]


def test_the_node_cases_of_onnx(tmp_path: Path) -> None:
    """QLinearMatMul and QLinearConv with all inputs given from outside: the same integers come out."""
    from onnx.backend.test.case import node as cases

    for name in ("qlinearconv", "qlinearmatmul"):  # these alone, for all of them take long to draw
        importlib.import_module(f"{cases.__name__}.{name}")
    found = [case for case in cases._NodeTestCases if case.name.startswith("test_qlinear")]
    assert len(found) == 9
    for case in found:
        model = ir.from_proto(case.model)
        names = [value.name or "" for value in model.graph.inputs]
        dequantize(model)
        assert not any("QLinear" in op_type for op_type in operators(model))
        for inputs, outputs in case.data_sets:
            (given,) = run(model, dict(zip(names, map(np.asarray, inputs), strict=True)), tmp_path)
            assert np.abs(given.astype(int) - outputs[0].astype(int)).max() <= 1
