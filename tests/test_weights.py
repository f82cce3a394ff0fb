"""Every place where a weight can live, what it is told to be, and what replacing it touches."""

import io
import math
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from penjing.ir import storage
from penjing.ir.files import load, save
from penjing.ir.ops import Kind
from penjing.ir.weights import Weight, weights

Parse = Callable[[str], ir.Model]

EVERYWHERE = """
    <ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (float[2,3] x, bool c) => (float[?,?] y, float[?,?] z, float[?,?] u, float[?,?] r)
    <float[3,4] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4] b = {1,2,3,4}> {
        [first] h = Gemm (x, w, b)
        k = Constant <value = float[4,2] {1,0,3,4,5,6,7,8}> ()
        k2 = Identity (k)
        [second] y = MatMul (h, k2)
        [branch] z = If (c) <
            then_branch = yes () => (float[?,?] t) {
                inner = Constant <value = float[3,2] {1,2,3,4,5,6}> ()
                t = MatMul (x, inner)
            },
            else_branch = no () => (float[?,?] e) { e = MatMul (x, w) }
        >
        [call] u = local.Project (h, k)
        once = local.Pick ()
        r = MatMul (h, once)
    }
    <opset_import: ["": 21], domain: "local">
    Project (a, p) => (q) {
        own = Constant <value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> ()
        d = MatMul (a, own)
        q = MatMul (d, p)
    }
    <opset_import: ["": 21], domain: "local">
    Pick () => (o) { o = Constant <value = float[4,1] {1,2,3,4}> () }
"""


def counted(text: str) -> str:
    """``float[2,3] w = {*}`` with the numbers 1 to 6."""

    def fill(match: re.Match[str]) -> str:
        size = math.prod(int(size) for size in match[1].split(","))
        return f"[{match[1]}] {match[2]} = {{{','.join(str(n) for n in range(1, size + 1))}}}"

    return re.sub(r"\[([\d,]+)\] (\w+) = \{\*\}", fill, text)


def by_address(model: ir.Model) -> dict[str, Weight]:
    return {weight.address: weight for weight in weights(model)}


def told(weight: Weight) -> list[tuple[str, int, int | None, int | None]]:
    return [(use.node.op_type, use.port, use.output_axis, use.input_axis) for use in weight.uses]


def test_every_place(parse: Parse) -> None:
    found = by_address(parse(EVERYWHERE))
    assert {address: (weight.place, weight.home, str(weight.kind)) for address, weight in found.items()} == {
        "w": ("initializer", "main", "matrix"),
        "b": ("initializer", "main", "bias"),
        "k": ("constant", "main", "matrix"),
        "branch/then/inner": ("constant", "body", "matrix"),
        "local::Project/own": ("constant", "function", "matrix"),
        "local::Pick/o": ("constant", "function", "matrix"),
    }
    assert told(found["w"]) == [("Gemm", 1, 1, 0), ("MatMul", 1, 1, 0)]  # the second in a body that captures it
    assert told(found["k"]) == [("MatMul", 1, 1, 0), ("MatMul", 1, 1, 0)]  # through Identity, and through a call
    assert told(found["local::Pick/o"]) == [("MatMul", 1, 1, 0)]  # out of the function
    assert [address for address, weight in found.items() if weight.tied] == ["w", "k"]
    assert [address for address, weight in found.items() if not weight.prunable] == ["b"]


def test_axes_are_those_of_the_storage(parse: Parse) -> None:
    found = by_address(
        parse(
            counted("""g (float[2,6] x) => (float[2,4] a, float[2,4] b, float[2,6] c, float[?,?,?] d)
        <float[4,6] w = {*}, float[4,3,2,1] r = {*}, float[1,6,6] s = {*}, float[4,3,2,1] mixed = {*}> {
            wt = Transpose (w)
            a = MatMul (x, wt)
            shape = Constant <value_ints = [4, -1]> ()
            flat = Reshape (r, shape)
            b = Gemm <transB = 1> (x, flat)
            zero = Constant <value_ints = [0]> ()
            s2 = Squeeze (s, zero)
            s3 = Transpose <perm = [1, 0]> (s2)
            c = MatMul (x, s3)
            m2 = Flatten <axis = 2> (mixed)
            d = MatMul (m2, x)
        }""")
        )
    )
    assert told(found["w"]) == [("MatMul", 1, 0, 1)]
    assert told(found["r"]) == [("Gemm", 1, 0, None)]  # three axes merged into the input channels
    assert told(found["s"]) == [("MatMul", 1, 1, 2)]
    assert told(found["mixed"]) == [("MatMul", 0, None, 2)]  # [4, 3, 2, 1] as [12, 2]
    assert [made.op_type for made in found["s"].uses[0].path] == ["Squeeze", "Transpose"]


def test_embeddings_tables_and_ties(parse: Parse) -> None:
    found = by_address(
        parse(
            counted("""g (int64[2] ids, float[2,3] x) => (float[2,3] e, float[2,3] t, float[2,5] y, float[2,5] p)
        <float[5,3] plain = {*}, float[5,3] tied = {*}, float[7,3] table = {*}, float[4] palette = {*}> {
            e = Gather (plain, ids)
            t = Gather (tied, ids)
            y = Gemm <transB = 1> (x, tied)
            fixed = Constant <value_ints = [1, 2]> ()
            rows = Gather (table, fixed)
            codes = Constant <value = int64[3,5] {0,1,2,3,0,1,2,3,0,1,2,3,0,1,2}> ()
            decoded = Gather (palette, codes)
            p = MatMul (rows, decoded)
        }""")
        )
    )
    assert found["plain"].kind is Kind.EMBEDDING
    assert found["tied"].kind is Kind.EMBEDDING  # pruning it as a matrix would prune it as an embedding
    assert found["tied"].tied
    assert found["table"].kind is Kind.TABLE
    assert found["palette"].kind is Kind.TABLE
    assert found["codes"].kind is Kind.INDEX
    assert not any(weight.prunable for weight in found.values())


def test_outputs_unused_and_overridable() -> None:
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "o"], ["z"])],
            "g",
            [value("x", TensorProto.FLOAT, [1, 2]), value("w", TensorProto.FLOAT, [2, 2])],
            [value("z", TensorProto.FLOAT, [1, 2]), value("o", TensorProto.FLOAT, [2, 2])],
            [helper.make_tensor(name, TensorProto.FLOAT, [2, 2], [1, 2, 3, 4]) for name in ("w", "o", "dead")],
        )
    )
    found = by_address(ir.from_proto(model))
    assert found["w"].overridable
    assert found["w"].prunable
    assert found["o"].kind is Kind.OUTPUT
    assert found["dead"].kind is Kind.UNUSED


QUANTIZED = """g (float[2,3] x) => (float[2,4] y)
    <int8[3,4] q = {0,1,2,3,4,5,6,7,8,9,10,11}, float[4] s = {1,2,3,0.5}, int8[4] z = {0,1,2,3}> {
        w = DequantizeLinear <axis = 1> (q, s, z)
        y = MatMul (x, w)
    }"""


def test_dequantized_weights(parse: Parse) -> None:
    found = by_address(parse(QUANTIZED))
    q = found["q"]
    assert q.prunable
    assert q.quantization is not None
    assert q.quantization.axis == 1
    stored = np.arange(12).reshape(3, 4)
    expected = np.abs((stored - [0, 1, 2, 3]) * np.array([1, 2, 3, 0.5]))
    np.testing.assert_array_equal(q.magnitudes(), expected)
    np.testing.assert_array_equal(q.zero, [[0, 1, 2, 3]])
    assert q.zero.dtype == np.int8
    assert q.zeros() == 4
    assert (found["s"].kind, found["z"].kind) == (Kind.SCALE, Kind.ZERO_POINT)


def test_blocked_and_transposed_scales(parse: Parse) -> None:
    found = by_address(
        parse(
            counted("""<ir_version: 10, opset_import: ["": 21]>
        g (float[2,4] x) => (float[2,2] y, float[2,4] v)
        <uint4[4,2] q = {*}, float[2,2] s = {1,10,100,1000}, int8[4,2] t = {*}, float[4] ts = {*}> {
            w = DequantizeLinear <axis = 0, block_size = 2> (q, s)
            y = MatMul (x, w)
            turned = Transpose (t)
            tw = DequantizeLinear <axis = 1> (turned, ts)
            v = MatMul (y, tw)
        }""")
        )
    )
    q, turned = found["q"], found["t"].quantization
    q.replace(np.arange(1, 9).reshape(4, 2).astype(ml_dtypes.uint4))  # the text syntax has no packed numbers
    np.testing.assert_array_equal(q.magnitudes(), [[1, 20], [3, 40], [500, 6000], [700, 8000]])
    assert q.quantization is not None
    assert (q.quantization.axis, q.quantization.block) == (0, 2)
    assert turned is not None
    assert (turned.axis, turned.scale.shape) == (0, (4, 1))


def test_integer_operators(parse: Parse) -> None:
    found = by_address(
        parse("""<ir_version: 8, opset_import: ["": 17]>
        g (uint8[1,2,4,4] x, uint8[2,3] a, float sa) => (uint8[1,2,4,4] y, float[2,2] m, int32[2,2] bare)
        <float xs = {1.0}, uint8 xz = {0}, int8[2,2,1,1] w = {1,2,3,4}, float[2] ws = {1,2}, int8[2] wz = {1,0},
         int8[3,2] b = {1,2,3,4,5,6}, float[2] bs = {2,3}, int8[3,2] c = {1,2,3,4,5,6}> {
            y = QLinearConv (x, xs, xz, w, ws, wz, xs, xz)
            i = MatMulInteger (a, b, xz)
            f = Cast <to = 1> (i)
            sab = Mul (sa, bs)
            m = Mul (f, sab)
            bare = MatMulInteger (a, c, xz)
        }""")
    )
    np.testing.assert_array_equal(found["w"].magnitudes().reshape(2, 2), [[0, 1], [6, 8]])
    np.testing.assert_array_equal(found["b"].magnitudes(), [[2, 6], [6, 12], [10, 18]])  # the scale after the product
    assert found["b"].prunable
    assert found["c"].obstacle == "integers without one constant scale, so magnitudes are unknown"


def test_a_float_weight_through_quantize_and_dequantize_stays_float(parse: Parse) -> None:
    found = by_address(
        parse("""g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,-2,3,-4}, float s = {0.5}, int8 z = {3}> {
            q = QuantizeLinear (w, s, z)
            d = DequantizeLinear (q, s, z)
            y = MatMul (x, d)
        }""")
    )
    assert found["w"].prunable
    assert found["w"].quantization is None
    np.testing.assert_array_equal(found["w"].magnitudes(), [[1, 2], [3, 4]])


def test_uses_that_dequantize_differently_have_no_magnitude(parse: Parse) -> None:
    found = by_address(
        parse(
            counted("""g (float[2,2] x) => (float[2,2] y, float[2,2] v)
        <int8[2,2] q = {*}, float s = {0.5}, float t = {2.0}> {
            a = DequantizeLinear (q, s)
            b = DequantizeLinear (q, t)
            y = MatMul (x, a)
            v = MatMul (x, b)
        }""")
        )
    )
    assert found["q"].quantization is None
    assert found["q"].obstacle == "integers without one constant scale, so magnitudes are unknown"


def test_forms_of_constant_nodes(parse: Parse) -> None:
    found = by_address(
        parse("""g () => (float a, float[2] b, int64 c, int64[2] d, string e) {
            a = Constant <value_float = 1.5> ()
            b = Constant <value_floats = [1.0, 2.0]> ()
            c = Constant <value_int = 3> ()
            d = Constant <value_ints = [3, 4]> ()
            e = Constant <value_string = "x"> ()
        }""")
    )
    assert {address: (str(weight.dtype), weight.shape) for address, weight in found.items()} == {
        "a": ("FLOAT", ()),
        "b": ("FLOAT", (2,)),
        "c": ("INT64", ()),
        "d": ("INT64", (2,)),
        "e": ("STRING", ()),
    }
    found["b"].replace(np.array([7, 8, 9], np.float32))
    assert found["b"].array().tolist() == [7, 8, 9]
    assert list(found["b"].value.producer().attributes) == ["value"]  # type: ignore[union-attr]


def test_replacing_leaves_copies_alone(parse: Parse) -> None:
    model = parse(EVERYWHERE)
    copy = model.clone()
    for weight in weights(model):
        weight.replace(np.zeros(weight.shape, weight.dtype.numpy()))
    assert all(weight.zeros() == weight.size for weight in weights(model))
    assert [weight.zeros() for weight in weights(copy)] == [0, 0, 1, 0, 0, 0]


def test_lazy_replacement_is_made_at_each_reading(parse: Parse) -> None:
    weight = by_address(parse(EVERYWHERE))["w"]
    calls = []

    def make() -> storage.Array:
        calls.append(1)
        return np.full((3, 4), 2, np.float32)

    weight.replace(make, provenance="twos")
    assert not calls
    assert weight.tensor.provenance == "lazy: twos"  # type: ignore[attr-defined]
    assert weight.array().sum() == 24
    assert len(calls) == 1


def test_storage_shared_by_two_names_is_one_weight(tmp_path: object) -> None:
    folder = str(tmp_path)
    with open(f"{folder}/d", "wb") as file:
        file.write(np.arange(400, dtype=np.float32).tobytes())
    tensors = []
    for name, offset in (("v", 0), ("w", 0), ("u", 400)):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[10, 10], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": "d", "offset": offset, "length": 400}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    nodes = [helper.make_node("MatMul", [a, b], [c]) for a, b, c in (("x", "v", "p"), ("p", "w", "q"), ("q", "u", "y"))]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 10]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), f"{folder}/m.onnx")
    model = load(f"{folder}/m.onnx")
    found = by_address(model)
    assert list(found) == ["v", "u"]
    assert found["v"].tied
    assert [value.name for value in found["v"].values] == ["v", "w"]
    found["v"].replace(np.ones((10, 10), np.float32))
    save(model, f"{folder}/o.onnx")
    sums = [weight.array().sum() for weight in weights(load(f"{folder}/o.onnx"))]
    assert sums == [100, 100, found["u"].array().sum()]  # small tensors go into the model, each by itself


def test_recursive_functions_end() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "l": 1]>
    g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> { y = l.F (x, w) }
    <opset_import: ["": 21, "l": 1], domain: "l"> F (a, b) => (c) { c = l.F (a, b) }"""
    assert by_address(ir.from_onnx_text(text))["w"].kind is Kind.UNKNOWN
    text = """<ir_version: 10, opset_import: ["": 21, "l": 1]>
    g (float[2,2] x) => (float[2,2] y) { y = l.F (x) }
    <opset_import: ["": 21, "l": 1], domain: "l"> F (a) => (c) {
        k = Constant <value = float[2] {1,2}> ()
        c = Identity (k)
        d = l.F (a)
    }"""
    assert by_address(ir.from_onnx_text(text))["l::F/k"].kind is Kind.OUTPUT


def test_constants_that_leave_bodies(parse: Parse) -> None:
    found = by_address(
        parse("""g (float[2,2] x, bool c, int64 n) => (float[2,2] y, float[2,2] z) {
            w = If (c) <
                then_branch = yes () => (float[2,2] a) { a = Constant <value = float[2,2] {1,2,3,4}> () },
                else_branch = no () => (float[2,2] b) { b = Constant <value = float[2,2] {5,6,7,8}> () }
            >
            y = MatMul (x, w)
            [loop] z = Loop (n, c, x) <body = step (int64 i, bool go, float[2,2] s) => (bool go2, float[2,2] k) {
                go2 = Identity (go)
                k = Constant <value = float[2,2] {1,2,3,4}> ()
            }>
        }""")
    )
    assert told(found["If/then/a"]) == told(found["If/else/b"]) == [("MatMul", 1, 1, 0)]
    assert told(found["loop/body/k"]) == [("Loop", -1, None, None)]
    assert found["loop/body/k"].kind is Kind.OPERAND


# Storage --------------------------------------------------------------------------------------------------------------

TYPES = [
    np.float32,
    np.float64,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4,
    ml_dtypes.uint2,
    np.int8,
    np.uint16,
    np.int64,
    np.bool_,
]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_counting_in_every_type(dtype: type) -> None:
    array = np.array([0, 1, 0, 1, 1, 3, 0], np.float32).astype(dtype)
    tensor = ir.tensor(array)
    values, counts = storage.value_counts(tensor) or ([], [])
    assert dict(zip(np.asarray(values, np.float64), counts, strict=True)) == {
        float(value): int((array == value).sum()) for value in set(array.tolist())
    }
    assert storage.distinct(tensor, limit=1) is None
    assert storage.distinct(tensor) == len(set(array.tolist()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_survive_collisions(dtype: type) -> None:
    array = np.random.default_rng(0).integers(0, 40_000, 300_000).astype(dtype) * dtype(0.1)
    expected_values, expected = np.unique(array, return_counts=True)
    values, counts = storage.value_counts(ir.tensor(array)) or ([], [])
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(counts, expected)
    assert storage.distinct(ir.tensor(np.arange(70_000, dtype=dtype))) is None


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_streamed_tensor_writes_what_it_reads(dtype: type) -> None:
    array = (np.arange(150_001) % 2).astype(np.float32).astype(dtype)
    plain = ir.tensor(array)
    shape = ir.Shape(array.shape)
    tensor = storage.StreamedTensor(
        lambda: lambda start, stop: array[start:stop], plain.dtype, shape, name="t", provenance="lazy: t"
    )
    file = io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == plain.tobytes() == tensor.tobytes()
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_entropy_bounds() -> None:
    noise = np.random.default_rng(0).normal(size=80_000).astype(np.float32)
    half = ir.tensor(noise * (np.arange(80_000) % 2).astype(np.float32))
    assert storage.entropy_bytes(half, 40_000) == 10_000 + 160_000  # a bit each for the mask, 4 bytes a non-zero
    four = ir.tensor((np.arange(80_000) % 4 + 1).astype(np.float32))
    assert storage.entropy_bytes(four, 0) == 20_000 + 16  # two bits each, and a table of four
    assert storage.entropy_bytes(ir.tensor(np.ones(8, np.float32)), 0) == 4


@given(st.lists(st.integers(0, 15), max_size=50), st.integers(0, 50), st.integers(0, 50))
def test_packed_parts(values: list[int], start: int, length: int) -> None:
    array = np.array(values, np.uint8).astype(ml_dtypes.uint4)
    packed = ir.PackedTensor(
        np.frombuffer(ir.tensor(array).tobytes(), np.uint8), ir.DataType.UINT4, shape=[len(values)]
    )
    start = min(start, len(values))
    stop = min(start + length, len(values))
    assert storage.reader(packed)(start, stop).tolist() == array[start:stop].tolist()
