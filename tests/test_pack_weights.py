"""Weights in fewer bytes: what each encoding gives in ONNX Runtime, bit by bit, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from penjing.ir.files import load, save, saved_bytes
from penjing.ir.packing import digits
from penjing.ir.packing.census import TYPES, Census
from penjing.ir.packing.choose import smallest, storages
from penjing.ir.packing.decoded import decoders
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Array, Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.session import OrtRunner

ENCODINGS = ("palette", "bitmask", "gaps", "narrow", "repeat")
RNG = np.random.default_rng(0)


def gather(array: Array, *, opset: int = 17, dtype: ir.DataType | None = None) -> ir.Model:
    """y = rows of the weight ``w``, which are picked at run time."""
    tensor = ir.Tensor(array, dtype=dtype, name="w")
    w = ir.Value(name="w", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    i = ir.val("i", dtype=ir.DataType.INT64, shape=ir.Shape(["n"]))
    node = ir.node("Gather", [i, i], name="pick")
    node.replace_input_with(0, w)
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(tensor.dtype)
    y.shape = ir.Shape(["n", *array.shape[1:]])
    return ir.Model(
        ir.Graph([i], [y], nodes=[node], initializers=[w], opset_imports={"": opset}, name="g"), ir_version=8
    )


def run(model: ir.Model, pipeline: str = "pack-weights") -> Context:
    """Run one pass on a model; what it wrote down."""
    *_, step = Pipeline.parse(pipeline).run(model, Context(runner=OrtRunner()))
    verify(model)
    found = Context()
    found.ledger.changes += step.ledger.changes
    found.ledger.skips += step.ledger.skips
    return found


def deeds(ctx: Context) -> dict[str, str]:
    return {change.subject: change.what for change in ctx.ledger.changes}


def reasons(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


def kernels(model: ir.Model, folder: Path) -> list[str]:
    """The operators that ONNX Runtime runs, at full optimization."""
    import onnxruntime

    save(model, folder / "kernels.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(folder / "kernels.onnx", options)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def rows(model: ir.Model, count: int) -> Array:
    """What ONNX Runtime has for ``w``."""
    (found,) = OrtRunner().run(model, [{"i": np.arange(count)}])
    return np.asarray(found["y"])


def bits(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def sparse(share: float, *shape: int) -> Array:
    array = RNG.standard_normal(shape).astype(np.float32)
    array.reshape(-1)[RNG.permutation(array.size)[: round(share * array.size)]] = 0
    return array


def shared(count: int, *shape: int) -> Array:
    return RNG.standard_normal(count).astype(np.float32)[RNG.integers(0, count, shape)]


# Each encoding --------------------------------------------------------------------------------------------------------

SPECIAL = np.array([0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800001, 1, 0x80000001, 0x7F800000, 0], np.uint32)
CASES = {
    "palette": shared(16, 60, 101),
    "palette of 3": shared(3, 67, 73),
    "palette of 6": shared(6, 67, 73),
    "palette of 7": shared(7, 67, 101),
    "palette of 17": shared(17, 67, 101),
    "palette of 100": shared(100, 67, 101),
    "palette of 256": shared(256, 67, 101),
    "palette of 300": shared(300, 100, 101),
    "palette of 40000": shared(40_000, 400, 1001),
    "palette of bits": SPECIAL.view(np.float32)[RNG.integers(0, 8, (67, 99))],
    "bitmask": sparse(0.6, 100, 67),
    "gaps": sparse(0.97, 300, 67),
    "gaps, from the first on": np.where(np.arange(9000).reshape(90, 100) % 97, 0, sparse(0, 90, 100)),
    "gaps, none of which can be bridged by more than it needs": np.where(
        np.arange(40_001) < 20_001, RNG.integers(1, 256, 40_001), 0
    ).astype(np.uint8)[:, None],
    "gaps of nine, five in two bytes": np.where(
        RNG.random((1000, 1001)) < 0.7, 0, RNG.integers(1, 256, (1000, 1001))
    ).astype(np.uint8),
    "gaps over palette, one of all": np.where(
        np.arange(200_000).reshape(400, 500) == 150_001, np.float32(2), np.float32(0)
    ),
    "bitmask over palette": np.where(RNG.random((170, 101)) < 0.5, np.float32(0), shared(15, 170, 101)),
    "gaps paired with palette": np.where(RNG.random((70, 101)) < 0.9, np.float32(0), shared(15, 70, 101)),
    "bitmask over narrow": sparse(0.6, 200, 67).astype(np.float16).astype(np.float32),
    "gaps over narrow": sparse(0.95, 500, 167).astype(ml_dtypes.bfloat16).astype(np.float32),
    "narrow": RNG.standard_normal((67, 101)).astype(np.float16).astype(np.float32),
    "narrow, bfloat16": (RNG.standard_normal((67, 101)) * 1e30).astype(ml_dtypes.bfloat16).astype(np.float32),
    "repeat": np.full((67, 101), 0.1, np.float32),
    "repeat of -0": np.full((67, 101), -0.0, np.float32),
    "repeat of rows": np.tile(RNG.standard_normal((1, 101)).astype(np.float32), (67, 1)),
    "repeat of blocks": np.tile(RNG.standard_normal((20, 101)).astype(np.float32), (3, 1)),
    "repeat along the last": np.repeat(RNG.standard_normal((201, 1)).astype(np.float32), 8, axis=1),
    "bitmask of nan": np.where(
        RNG.random((80, 101)) < 0.6,
        np.float32(0),
        RNG.integers(0x7F800000, 0x7FFFFFFF, (80, 101), np.uint32).view(np.float32),
    ),
    "bitmask of -0": np.where(RNG.random((80, 101)) < 0.6, np.float32(-0.0), RNG.random((80, 101)).astype(np.float32)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_bit_comes_back(name: str, tmp_path: Path) -> None:
    array, word = CASES[name], name.partition(",")[0].partition(" of ")[0].partition(" along ")[0]
    model = gather(array)
    before, start = saved_bytes(model), text(model, digests=True)
    ctx = run(model)
    assert deeds(ctx) == {"w": f"stored as {word}"}
    assert saved_bytes(model) < before
    assert kernels(model, tmp_path) == ["Gather"]
    assert bits(rows(model, len(array))) == bits(array)
    again = run(model)
    assert deeds(again) == {}, "a second run finds nothing"
    assert deeds(run(model, "unpack-weights")) == {"w": "stored plainly again"}
    assert text(model, digests=True) == start


@pytest.mark.parametrize("name", [name for name in CASES if "40000" not in name])
def test_every_storage_that_is_not_the_smallest_is_exact_too(name: str) -> None:
    array = CASES[name]
    for storage in storages(Census.of(ir.Tensor(array))):
        model = gather(array)
        packed(model, storage)
        assert bits(rows(model, len(array))) == bits(array), storage.word
        for decoder in decoders(model):
            assert bits(decoder.tensor().numpy()) == bits(array), storage.word


# What versions before wrote: a bit that is not set has no rank; Max makes it that of the background, the first value.
OLD = """
<ir_version: 8, opset_import: ["": 17]>
m (int64[n] i) => (float[n,64] y)
<float[1] w_values = {0}, uint8[512] w_mask = {0}, uint8[256,1] each = {0}, int32[8] powers = {1,2,4,8,16,32,64,128},
 int32 base = {2}, int32 along = {1}, int32 far = {1073741824}, int32[1] last = {7}, int32 zero = {0},
 int64[1] flat = {-1}, int64[2] shape = {64, 64}>
{
  bytes = Cast <to = 6> (each)  shifted = Div (bytes, powers)  bits = Mod (shifted, base)
  running = CumSum (bits, along)  high = Mul (bits, far)  unset = Sub (high, far)  ranks = Add (running, unset)
  counts = Gather <axis = 1> (running, last)
  index = Cast <to = 6> (w_mask)  count = Gather (counts, index)  before = CumSum <exclusive = 1> (count, zero)
  own = Gather (ranks, index)  rank = Add (own, before)  clamped = Max (rank, zero)  places = Reshape (clamped, flat)
  elements = GatherElements <axis = 0> (w_values, places)  w = Reshape (elements, shape)
  y = Gather (w, i)
}"""


def test_decoders_of_before_are_understood() -> None:
    array = sparse(0.6, 64, 64)
    model = ir.from_onnx_text(OLD)
    for name, stored in {
        "w_values": np.concatenate([np.zeros(1, np.float32), array[array != 0]]),
        "w_mask": np.packbits(array.reshape(-1) != 0, bitorder="little"),
        "each": np.arange(256, dtype=np.uint8).reshape(256, 1),
    }.items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(stored, name=name)
        value.shape = ir.Shape(stored.shape)
    assert bits(rows(model, 64)) == bits(array)
    assert deeds(run(model)) == {}, "it is packed"
    assert deeds(run(model, "unpack-weights")) == {"w": "stored plainly again"}
    assert bits(rows(model, 64)) == bits(array)
    assert [node.op_type for node in model.graph] == ["Gather"]


def packed(model: ir.Model, storage: Any) -> None:
    """Store ``w`` so, whether or not that saves anything."""
    from penjing.ir.packing.write import Packer
    from penjing.ir.scopes import scopes
    from penjing.ir.weights import weights

    packer = Packer(model, list(scopes(model)))
    (weight,) = weights(model)
    packer.pack(weight, Census.of(weight.tensor), storage)
    packer.finish()
    verify(model)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.name)
def test_every_type(dtype: ir.DataType, tmp_path: Path) -> None:
    numbers = RNG.integers(0, 2 if dtype is ir.DataType.BOOL else 5, (150, 101))
    numbers[RNG.random(numbers.shape) < 0.9] = 0
    array = numbers.astype(dtype.numpy())
    model = gather(array, dtype=dtype)
    before = saved_bytes(model)
    run(model)
    assert saved_bytes(model) < before
    assert kernels(model, tmp_path) == ["Gather"]
    if dtype is not ir.DataType.BFLOAT16:  # which ONNX Runtime does not give to Python
        assert bits(rows(model, 150)) == bits(array)
    run(model, "unpack-weights")
    assert bits(model.graph.initializers["w"].const_value.numpy()) == bits(array)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("dtype", "word"), [(np.float64, "narrow"), (np.int64, "narrow"), (np.int32, "narrow"), (np.int8, "palette")]
)
def test_narrower_types(dtype: Any, word: str) -> None:
    if dtype is np.int8:
        array = RNG.integers(-8, 8, (67, 101)).astype(dtype)
    else:
        array = (
            (RNG.standard_normal((67, 101)) * 9000)
            .astype(np.float32 if dtype is np.float64 else np.int16)
            .astype(dtype)
        )
    model = gather(array)
    assert deeds(run(model)) == {"w": f"stored as {word}"}
    assert bits(rows(model, 67)) == bits(array)


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 6, 7, 9, 12, 16, 17, 31, 32, 100, 256, 257, 4096, 65536])
def test_digits_hold_every_number(limit: int) -> None:
    planes = digits.planes(limit, 100_000)
    assert np.prod([plane.base for plane in planes]) >= limit
    assert np.log2(limit) <= digits.bits(limit, 100_000) <= max(1.7, np.log2(limit) * 1.3)
    assert digits.stored_bytes(limit, 1000) <= 1000 * digits.bits(limit, 1000) / 8 + 64


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "most"),
    [
        (sparse(0.5, 1024, 1024), 8.50 / 16),
        (sparse(0.7, 1024, 1024), 5.30 / 16),
        (sparse(0.9, 1024, 1024), 2.00 / 16),
        (shared(16, 1024, 1024), 1 / 8),
        (np.where(RNG.random((1024, 1024)) < 0.9, np.float32(0), shared(15, 1024, 1024)), 0.034 / 1.03),
        (np.where(RNG.random((1024, 1024)) < 0.7, 0, RNG.integers(-127, 128, (1024, 1024))).astype(np.int8), 0.43),
    ],
    ids=["50 %", "70 %", "90 %", "16 values", "90 % and 16 values", "int8 70 %"],
)
def test_sizes(array: Array, most: float) -> None:
    """Within 3 % of what was asked for, of four such weights in a file."""
    found = smallest(Census.of(ir.Tensor(array)))
    assert found is not None
    assert found.bytes + 2048 <= 1.03 * most * array.nbytes


# Where weights live ---------------------------------------------------------------------------------------------------

PLACES = """
<ir_version: 8, opset_import: ["": 17, "my": 1]>
m (float[1,96] x, bool p, int64 n) => (float[1,96] y)
<float[96,96] captured = {0}>
{
  y0 = If (p) <
    then_branch = then () => (float[1,96] t) <float[96,96] owned = {0}>
      { t0 = MatMul (x, captured) t = MatMul (t0, owned) },
    else_branch = else () => (float[1,96] e) { c = Constant <value = float[1] {1}> () e = MatMul (x, c) }
  >
  y1 = Loop (n, , y0) <
    body = body (int64 i, bool k, float[1,96] s) => (bool k1, float[1,96] s1) <float[96,96] looped = {0}>
      { s1 = MatMul (s, looped) k1 = Identity (k) }
  >
  h = Constant <value = float[1] {1}> ()
  y2 = MatMul (y1, h)
  y = my.F (y2)
}
<domain: "my", opset_import: ["": 17]>
F (u) => (v) { g = Constant <value = float[1] {1}> () v = MatMul (u, g) }
"""


PACKED = {"captured", "h", "If/then/owned", "If/else/c", "Loop/body/looped", "my::F/g"}


def everywhere() -> ir.Model:
    """Weights of one kind in the main graph, in bodies, in a function; initializers and Constant nodes."""
    from penjing.ir.address import graphs

    model = ir.from_onnx_text(PLACES)
    for _, graph in graphs(model):
        for value in graph.initializers.values():
            value.const_value = ir.Tensor(shared(16, 96, 96) / 9, name=value.name)
        for node in graph:
            if node.op_type == "Constant":
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(shared(16, 96, 96) / 9))
                node.outputs[0].const_value = None
    return model


def all_operators(graph: onnx.GraphProto) -> list[str]:
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            found += all_operators(attribute.g) if attribute.HasField("g") else []
    return found


def test_bodies_and_functions(tmp_path: Path) -> None:
    import onnxruntime

    model = everywhere()
    save(model, tmp_path / "dense.onnx")
    model = load(tmp_path / "dense.onnx")
    start, before = text(model, digests=True), saved_bytes(model)
    assert set(deeds(run(model))) == PACKED
    assert saved_bytes(model) < before / 5
    save(model, tmp_path / "packed.onnx")
    feeds = [
        {"x": np.ones((1, 96), np.float32), "p": np.array(way), "n": np.array(2, np.int64)} for way in (True, False)
    ]
    runner = OrtRunner()
    for dense, small in zip(
        runner.run(load(tmp_path / "dense.onnx"), feeds), runner.run(load(tmp_path / "packed.onnx"), feeds), strict=True
    ):
        assert bits(dense["y"]) == bits(small["y"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "packed.onnx", options)
    assert set(all_operators(onnx.load(tmp_path / "optimized.onnx").graph)) <= {"If", "Loop", "MatMul", "Identity"}
    found = load(tmp_path / "packed.onnx")
    assert len(deeds(run(found, "unpack-weights"))) == 6
    assert text(found, digests=True) == start


@pytest.mark.parametrize(("zeros", "word"), [(0.3, "bitmask"), (0.7, "gaps")])
def test_int8_weights_stay_in_integer_kernels(zeros: float, word: str) -> None:
    from penjing.runtime.kernels import kernels as counted

    weight = np.where(RNG.random((256, 128)) < zeros, 0, RNG.integers(-127, 128, (256, 128))).astype(np.int8)
    model = ir.from_onnx_text("""
<ir_version: 8, opset_import: ["": 17]>
m (float[4,256] x) => (float[4,128] y)
<float s = {0.05}, uint8 z = {128}, int8[256,128] w = {0}, float[128] ws = {0}, int8[128] wz = {0}>
{
  xq = QuantizeLinear (x, s, z)
  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear <axis = 1> (w, ws, wz)
  m = MatMul (xd, wd)
  mq = QuantizeLinear (m, s, z)
  y = DequantizeLinear (mq, s, z)
}""")
    for name, array in {"w": weight, "ws": np.full(128, 0.01, np.float32), "wz": np.zeros(128, np.int8)}.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    dense = model.clone()
    if word == "bitmask":
        assert "elements of one byte load slowly" in reasons(run(model.clone()))["w"]
    assert deeds(run(model, f"pack-weights{{encoding={word}}}")) == {"w": f"stored as {word}"}
    feeds = [{"x": RNG.standard_normal((4, 256)).astype(np.float32)}]
    (before,), (after,) = (list(OrtRunner().run(one, feeds)) for one in (dense, model))
    assert bits(before["y"]) == bits(after["y"])
    assert counted(model).integer == counted(dense).integer
    assert "QLinearMatMul" in counted(model).integer


def test_clean_keeps_it_packed_and_unpacking_finds_it_still() -> None:
    names = (
        "palette",
        "bitmask",
        "gaps",
        "bitmask over palette",
        "gaps paired with palette",
        "narrow",
        "repeat of rows",
    )
    for name in names:
        array = CASES[name]
        model = gather(array)
        start = saved_bytes(model)
        run(model)
        small = saved_bytes(model)
        Pipeline.parse("clean,strip-metadata,clean").run(model, Context(runner=OrtRunner()))
        assert saved_bytes(model) < small + (start - small) * 0.2, name
        assert bits(rows(model, len(array))) == bits(array)
        run(model, "unpack-weights")
        (found,) = (value for value in model.graph.initializers.values() if value.shape == array.shape)
        assert found.const_value is not None
        assert bits(found.const_value.numpy()) == bits(array), name


# Options and reasons --------------------------------------------------------------------------------------------------


def test_opset_is_raised_only_where_that_saves() -> None:
    def old(array: Array) -> ir.Model:
        return gather(array, opset=9)

    model = old(CASES["palette"])
    assert deeds(run(model)) == {
        "main graph": "opset 9 to 11, whose operators decode weights",
        "w": "stored as palette",
    }
    model = old(CASES["bitmask"])
    assert deeds(run(model))["main graph"] == "opset 9 to 12, whose operators decode weights"
    model = old(CASES["bitmask"])
    assert deeds(run(model, "pack-weights{opset=keep}")) == {}
    assert model.opset_imports[""] == 9
    model = old(CASES["repeat"])
    assert deeds(run(model)) == {"w": "stored as repeat"}
    model = old(RNG.standard_normal((80, 80)).astype(np.float32))
    assert deeds(run(model)) == {}
    assert model.opset_imports[""] == 9


@pytest.mark.parametrize("encoding", ["palette", "bitmask", "gaps", "repeat", "narrow", "dense"])
def test_one_encoding(encoding: str) -> None:
    array = CASES["gaps paired with palette"]
    done = run(gather(array), f"pack-weights{{encoding={encoding}}}")
    if encoding in ("repeat", "dense"):
        assert deeds(done) == {}
        assert reasons(done)["w"] == ("asked to stay dense" if encoding == "dense" else "repeat cannot hold it")
    else:
        assert encoding in deeds(done).get("w", encoding)


def test_reasons() -> None:
    model = gather(CASES["palette"])
    assert reasons(run(model, "pack-weights{keep=w}")) == {"w": "kept by request"}
    assert reasons(run(model, "pack-weights{min-bytes=100000}")) == {"1 constants": "under 100000 bytes"}
    dense = run(gather(RNG.standard_normal((80, 80)).astype(np.float32)))
    assert reasons(dense) == {"w": "no encoding takes fewer bytes"}
    assert reasons(run(gather(sparse(0.37, 34, 44))))["w"].startswith("all that could be packed would save no more")
    assert reasons(run(gather(sparse(0.2, 34, 44))))["w"].startswith("too small: bitmask would save less")
    model = gather(CASES["palette"])
    model.graph.inputs.append(model.graph.initializers["w"])
    assert reasons(run(model)) == {"w": "the model's caller may pass another tensor for it"}
    model = gather(CASES["palette"])
    model.graph.outputs.append(model.graph.initializers["w"])
    assert reasons(run(model)) == {"w": "an output"}


@pytest.mark.parametrize(
    "array", [np.array([["a"] * 3000], object), np.zeros((0, 5000), np.float32)], ids=["text", "empty"]
)
def test_what_cannot_be_packed_is_left(array: Array) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["": 17]> m (float[1] x) => (float[1] y) { y = Identity (x) }'
    )
    if array.dtype == object:
        tensor: ir.TensorProtocol = ir.StringTensor([b"a"] * 3000, shape=ir.Shape([3000]), name="w")
    else:
        tensor = ir.Tensor(array, name="w")
    w = ir.Value(name="w", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
    model.graph.register_initializer(w)
    shape = ir.node("Shape", [w])
    shape.outputs[0].name, shape.outputs[0].type = "n", ir.TensorType(ir.DataType.INT64)
    model.graph.append(shape)
    model.graph.outputs.append(shape.outputs[0])
    assert deeds(run(model, "pack-weights{min-bytes=0}")) == {}


def test_a_shape_stays() -> None:
    model = ir.from_onnx_text("""
<ir_version: 8, opset_import: ["": 17]>
m (float[4096] x) => (float y)
<int64[4096] shape = {0}>
{ e = Expand (x, shape) y = ReduceSum <keepdims = 0> (e) }""")
    model.graph.initializers["shape"].const_value = ir.Tensor(np.ones(4096, np.int64), name="shape")
    assert reasons(run(model))["shape"].startswith("a shape, setting, scale or zero point")


def test_sparse_initializers_come_out_plain(tmp_path: Path) -> None:
    array = sparse(0.95, 200, 100)
    model = gather(array)
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    places = np.flatnonzero(array)
    values = onnx.numpy_helper.from_array(array.reshape(-1)[places], "w")
    proto.graph.sparse_initializer.add().CopyFrom(
        onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(places, "i"), array.shape)
    )
    onnx.save(proto, tmp_path / "sparse.onnx")
    model = load(tmp_path / "sparse.onnx")
    assert deeds(run(model)) == {"w": "stored as gaps"}
    assert bits(rows(model, 200)) == bits(array)
    for found in (model, load(tmp_path / "sparse.onnx")):
        run(found, "unpack-weights")
        save(found, tmp_path / "plain.onnx")
        (stored,) = onnx.load(tmp_path / "plain.onnx").graph.initializer
        assert bits(onnx.numpy_helper.to_array(stored)) == bits(array)


def test_what_is_no_decoder_is_left_alone() -> None:
    """Storage in a narrower type, and quantized, by other passes; what computes with floats."""
    model = ir.from_onnx_text("""
<ir_version: 8, opset_import: ["": 17]>
m (float[1,4] x) => (float[1,4] y)
<float16[4,4] h = {0}, float[4] f = {0}, int64[2] shape = {4, 4}, float[2] big = {1, 2}, int64[2] wide = {2, 2}>
{
  hc = Cast <to = 1> (h)
  a = MatMul (x, hc)
  b = Add (f, big)
  r = Reshape (b, wide)
  y = Add (a, x)
}""")
    model.graph.initializers["h"].const_value = ir.Tensor(np.ones((4, 4), np.float16), name="h")
    model.graph.initializers["f"].const_value = ir.Tensor(np.ones(4, np.float32), name="f")
    assert decoders(model) == []


def test_a_decoder_that_does_not_compute_is_told(parse: Any) -> None:
    model = parse("""
m (float[64,64] x) => (float[64,64] y)
<uint8[64] codes = {0}, float[2] palette = {1, 2}, int64[2] shape = {64, 64}>
{ i = Cast <to = 6> (codes) g = Gather (palette, i) w = Reshape (g, shape) y = Add (x, w) }""")
    model.graph.initializers["codes"].const_value = ir.Tensor(np.full(64, 7, np.uint8), name="codes")
    assert "it cannot be computed: IndexError" in reasons(run(model, "unpack-weights"))["w"]


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ("c = ConstantOfShape (vast) w = Reshape (c, small)", "ConstantOfShape to 1099511627776 elements is no step"),
        ("c = ConstantOfShape (vast) w = Reshape (c, vast)", "it would take 4398046511104 bytes, past the limit of"),
        ("e = Expand (one, vast) w = Reshape (e, small)", "Expand to 1099511627776 elements is no step"),
        ("e = Reshape (one, small) w = Reshape (e, small)", "cannot reshape"),
    ],
)
def test_a_few_bytes_ask_for_too_much(parse: Any, made: str, sentence: str) -> None:
    values = "float[1] one = {1}, int64[1] vast = {1099511627776}, int64[2] small = {64, 64}"
    model = parse(f"m (float[64,64] x) => (float[64,64] y) <{values}> {{ {made} y = Add (x, w) }}")
    told = reasons(run(model, "unpack-weights"))
    assert told.get("w", told.get("e", "")).startswith("it cannot be computed: ValueError: " + sentence), told


def test_large_weights_are_streamed(tmp_path: Path) -> None:
    """Made when they are saved, and the same as if they were held."""
    array = np.concatenate([sparse(0.9, 700, 1024), sparse(1.0, 300, 1024), sparse(0.6, 24, 1024)])
    save(gather(array), tmp_path / "dense.onnx", external=True)
    model = load(tmp_path / "dense.onnx")
    run(model)
    save(model, tmp_path / "lazy.onnx", external=False)
    held = gather(array)
    run(held)
    save(held, tmp_path / "held.onnx")
    assert (tmp_path / "lazy.onnx").stat().st_size <= (tmp_path / "held.onnx").stat().st_size + 200
    found = load(tmp_path / "lazy.onnx")
    assert bits(rows(found, len(array))) == bits(array)
    run(found, "unpack-weights")
    save(found, tmp_path / "back.onnx", external=False)
    value = load(tmp_path / "back.onnx").graph.initializers["w"].const_value
    assert value is not None
    assert bits(value.numpy()) == bits(array)


def test_the_corpus_is_never_larger_and_comes_back(tmp_path: Path) -> None:
    from reliability.cases import node_cases, whole_models

    for case in [*whole_models(every=20), *node_cases(every=150)]:
        (tmp_path / "m.onnx").write_bytes(case.model.SerializeToString())
        model = load(tmp_path / "m.onnx")
        start, before = text(model, digests=True), saved_bytes(model)
        packed = model.clone()
        Pipeline.parse("pack-weights{opset=keep}").run(packed, Context())
        assert saved_bytes(packed) <= before, case.name
        Pipeline.parse("unpack-weights").run(packed, Context())
        assert text(packed, digests=True) == start, case.name


def test_inspect_tells_what_packing_would_save() -> None:
    from penjing.ir.summary import summarize

    model = gather(CASES["gaps paired with palette"])
    told = summarize(model)
    (weight,) = told.weights
    assert weight.storage == "gaps paired with palette"
    assert weight.entropy_bytes < weight.storage_bytes < weight.bytes
    assert told.entropy_bytes < told.storage_bytes < told.figures.bytes
    before = told.storage_bytes
    run(model)
    told = summarize(model)
    assert abs(told.figures.bytes - before) < 3000
    assert {weight.storage for weight in told.weights} <= {"packed", "dense"}


def test_inspect_tells_what_stays_dense() -> None:
    """Nothing that pack-weights would leave alone: small, an output, or too little in all."""
    from penjing.ir.summary import summarize

    model = gather(CASES["palette"][:4])
    assert [weight.storage for weight in summarize(model).weights] == ["dense"]
    model = gather(sparse(0.37, 34, 44))
    told = summarize(model)
    assert [weight.storage for weight in told.weights] == ["dense"]
    assert told.storage_bytes == told.figures.bytes
    model = gather(CASES["palette"])
    model.graph.outputs.append(model.graph.initializers["w"])
    assert [weight.storage for weight in summarize(model).weights] == ["dense"]


def test_the_check_proves_it_where_packing_for_a_kernel_moves_bits() -> None:
    """A Gemm with a weight that is decoded in each run is not packed for its kernel, and rounds in another way."""
    import penjing

    model = load(Path(__file__).parent.parent / "models" / "mlp.onnx")
    report = penjing.run(model, "share-weights{bits=4},pack-weights")
    assert [segment["breaches"] for segment in report.check.segments] == [[]]
    assert report.output is not None
    assert report.output.packed == report.input.weights
    penjing.run(model, "clean,unpack-weights")
    assert "ScatterElements" not in {node.op_type for node in model.graph}
    assert not decoders(model)


@pytest.mark.parametrize("way", ["initializers", "nodes"])
def test_weights_smaller_than_their_shapes_come_back_to_their_places(way: str) -> None:
    """One value, or a few bytes: fewer than the constants that decoders share."""
    model = ir.from_onnx_text("""
<ir_version: 8, opset_import: ["": 17]>
m (float[40,60] x) => (float[40,60] y)
<float[40,60] a = {0}, float[40,60] b = {0}, float[40,60] c = {0}>
{ n = Constant <value = float[1] {1}> () p = Add (x, a) q = Mul (p, b) r = Add (q, n) y = Add (r, c) }""")
    few = np.where(np.arange(2400).reshape(40, 60) == 2000, np.float32(3), np.float32(0))
    for name, array in {"a": np.full((40, 60), 2, np.float32), "b": few, "c": CASES["palette"][:40, :60]}.items():
        model.graph.initializers[name].const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
    if way == "nodes":
        model.graph[0].attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.full((40, 60), 4, np.float32)))
    start = text(model, digests=True)
    assert len(deeds(run(model, "pack-weights{opset=keep}"))) == 3 + (way == "nodes")
    run(model, "unpack-weights")
    assert text(model, digests=True) == start


def test_clean_adds_nothing_to_decoders() -> None:
    model = load(Path(__file__).parent.parent / "models" / "cnn-a.onnx")
    run(model, "strip-metadata,clean,share-weights{bits=4}")
    run(model)
    before = saved_bytes(model)
    run(model, "clean")
    assert saved_bytes(model) == before


def test_a_mapped_model_decodes_each_weight_when_it_is_read() -> None:
    from penjing.runtime.session import _constants_first

    model = gather(CASES["palette"])
    assert _constants_first(model) is model
    run(model)
    last = model.graph[-1]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], [other := ir.node("Neg", [model.graph.inputs[0]], name="other")])
    other.outputs[0].name = "negative"
    model.graph.append(last)
    found = [node.name for node in _constants_first(model).graph]
    assert found[-2:] == ["other", "pick"]


@pytest.mark.parametrize("later", ["prune-magnitude{sparsity=0.5}", "quantize-weights", "share-weights{bits=2}"])
def test_passes_that_change_weights_tell_how_to_reach_packed_ones(later: str) -> None:
    model = gather(CASES["palette"])
    *_, last = Pipeline.parse(f"pack-weights,{later}").run(model, Context(runner=OrtRunner()))
    assert last.ledger.skips[0].subject == "1 packed weights"
    assert "put unpack-weights before" in last.ledger.skips[0].reason
    *_, last = Pipeline.parse(f"unpack-weights,{later}").run(model, Context(runner=OrtRunner()))
    assert all("packed" not in skip.subject for skip in last.ledger.skips)


def test_encodings_by_the_type_that_they_store() -> None:
    few, many = shared(16, 96, 48), shared(17, 96, 48)
    half = RNG.standard_normal((96, 48)).astype(np.float16).astype(np.float32)
    for array, encoding, word in (
        *((few, "int4", "palette"), (many, "int4", None), (half, "fp16", "narrow"), (half, "int4", None)),
        (RNG.standard_normal((96, 48)).astype(np.float32), "fp16", None),
    ):
        done = run(gather(array), f"pack-weights{{encoding={encoding}}}")
        assert deeds(done) == ({"w": f"stored as {word}"} if word else {})
        assert word or reasons(done)["w"] == f"{encoding} cannot hold it"


def test_a_weight_in_another_shape_is_no_decoder() -> None:
    """As exporters write one weight for two layers: it is packed, stays tied, and unpacking leaves it alone."""
    array = shared(12, 96, 48)
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[N,96] x, float[N,48] z) => (float[N,48] y, float[N,96] t)
        <float[96,48] w = {0}, int64[2] shape = {48, 96}> {
            y = MatMul (x, w)
            v = Reshape (w, shape)
            t = MatMul (z, v)
        }"""
    )
    model.graph.initializers["w"].const_value = ir.Tensor(array, name="w")
    start = text(model, digests=True)
    assert deeds(run(model, "unpack-weights")) == {}
    assert text(model, digests=True) == start
    assert deeds(run(model)) == {"w": "stored as palette"}
    assert list(deeds(run(model, "unpack-weights")).values()) == ["stored plainly again"]
    assert text(model, digests=True) == start
