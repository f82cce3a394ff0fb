"""Float16 in the file, and in computing: what it becomes, where it must not, and that ONNX Runtime runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.metadata import files

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import penjing
from penjing.ir.errors import UsageError
from penjing.ir.files import load, save, saved_bytes
from penjing.ir.ops import operator
from penjing.ir.shapes import infer_shapes
from penjing.ir.sparse import SparseTensor
from penjing.ir.storage import StreamedTensor
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.ir.weights import Weight, weights
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.float16 import ToFloat16
from penjing.passes.quantize.half import SAFE
from penjing.runtime.session import OrtRunner, open_session

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Parse = Callable[[str], ir.Model]
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def half(model: ir.Model, **options: object) -> Context:
    ctx = Context()
    ToFloat16(**options).run(model, ctx)  # type: ignore[arg-type]
    verify(model)
    return ctx


def fill(model: ir.Model, **arrays: Array) -> ir.Model:
    """Give weights other numbers, by name; all other float matrices random ones."""
    for seed, weight in enumerate(weights(model)):
        given = arrays.get(weight.value.name or "")
        if given is not None or (weight.dtype is FLOAT and weight.size > 500):
            weight.replace(random(*weight.shape, seed=seed) if given is None else given)
    return model


def run(model: ir.Model, **feeds: Array) -> list[Array]:
    return list(open_session(model).run(None, feeds))


def find(model: ir.Model, address: str) -> Weight:
    return next(weight for weight in weights(model) if weight.address == address)


def skips(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


def kinds(model: ir.Model) -> dict[str, ir.DataType | None]:
    """The type that each operator computes in, by that of its first input."""
    infer_shapes(model)
    found = {node.op_type: node.inputs[0] for node in model.graph if node.inputs and node.op_type != "Cast"}
    return {name: value.dtype for name, value in found.items() if value is not None}


def changed(ctx: Context) -> dict[str, str]:
    return {change.subject: change.what for change in ctx.ledger.changes}


# In the file ----------------------------------------------------------------------------------------------------------

EVERYWHERE = """
    <ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (float[2,32] x, bool c, int64 n) => (float[?,?] z, float[?,?] l, float[?,?] f, float[?,?] r)
    <float[32,32] w = {1}> {
        [branch] z = If (c) <
            then_branch = yes () => (float[?,?] t) {
                inner = Constant <value = float[32,32] {1}> ()
                t = MatMul (x, inner)
            },
            else_branch = no () => (float[?,?] e) { e = MatMul (x, w) }
        >
        [loop] l = Loop (n, c, x) <body = step (int64 i, bool go, float[2,32] s) => (bool go2, float[2,32] k)
            <float[32,32] b = {1}> { go2 = Identity (go) k = MatMul (s, b) }>
        wt = Transpose (w)
        f = local.Project (x, wt)
        m = If (c) <
            then_branch = yes2 () => (float[32,32] a) { a = Constant <value = float[32,32] {1}> () },
            else_branch = no2 () => (float[32,32] d) { d = Transpose (w) }
        >
        r = MatMul (x, m)
    }
    <opset_import: ["": 21], domain: "local">
    Project (a, p) => (q) {
        own = Constant <value = float[32,32] {1}> ()
        d = MatMul (a, own)
        q = MatMul (d, p)
    }
"""
PLACES = {"w", "branch/then/inner", "loop/body/b", "local::Project/own", "If/then/a"}


@pytest.mark.parametrize("choice", [True, False])
def test_every_place(parse: Parse, choice: bool) -> None:
    model, rounded = fill(parse(EVERYWHERE)), fill(parse(EVERYWHERE))
    before = saved_bytes(model)
    assert changed(half(model)) == dict.fromkeys(PLACES, "stored as float16, cast when loaded")
    for weight in weights(rounded):
        if weight.size > 500:
            weight.replace(weight.array().astype(np.float16).astype(np.float32))
    feeds = {"x": random(2, 32), "c": np.array(choice), "n": np.array(2)}
    for one, other in zip(run(model, **feeds), run(rounded, **feeds), strict=True):
        np.testing.assert_array_equal(one, other)
    assert saved_bytes(model) < 0.6 * before
    stored = {weight.address for weight in weights(model) if weight.dtype is HALF and weight.prunable}
    assert stored == PLACES - {"If/then/a"} | {"If/then/a_float16"}
    Pipeline.parse("clean").run(model)
    assert {weight.address for weight in weights(model) if weight.dtype is HALF} == stored


@pytest.mark.parametrize(("opset", "done"), [(5, False), (6, True), (9, True), (13, True), (23, True)])
def test_versions(parse: Parse, opset: int, done: bool) -> None:
    model = fill(parse(f'<ir_version: 4, opset_import: ["": {opset}]> g (float[2,32] x) => (float[2,32] y) '
                       "<float[32,32] w = {1}> { y = MatMul (x, w) }"))  # fmt: skip
    ctx = half(model)
    assert (find(model, "w").dtype is HALF) == done
    if done:
        run(model, x=random(2, 32))
    else:
        assert skips(ctx) == {"main graph": "its opset 5 has no Cast to float16 by number; raise-opset first"}


def test_what_stays_float(parse: Parse) -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 17]>
    g (float[2,32] x, float[32,32] given) => (float[2,32] y, float[32,32] out, double[2,32] wide)
    <float[32,32] given = {1}, float[32,32] out = {1}, float[32,32] far = {1}, float[32,32] faint = {1},
     float[32,32] odd = {1}, float[32,32] fake = {1}, float one = {1}, float[32,32] kept = {1},
     float[1024] large = {1}, float[600] scales = {1}, double[32,32] long = {1}> {
        h0 = MatMul (x, given) h1 = MatMul (h0, out) h2 = MatMul (h1, far)
        fq = QuantizeLinear (fake, one) fd = DequantizeLinear (fq, one) h3 = MatMul (h2, fd)
        h4 = MatMul (h3, kept) h5 = MatMul (h4, faint) y = MatMul (h5, odd)
        xd = Cast <to = 11> (x) wide = MatMul (xd, long)
    }""")
    odd = random(32, 32)
    odd[0, :3] = [np.nan, np.inf, 1e-30]
    find(model, "long").replace(np.ones((32, 32)))
    fill(model, far=random(32, 32) * np.float32(1e5), faint=random(32, 32) * np.float32(1e-7), odd=odd)
    ctx = half(model, keep="kept")
    assert changed(ctx) == {"odd": "stored as float16, cast when loaded"}
    found = skips(ctx)
    assert found.pop("far").startswith("holds more than the 65504 of float16 (3")
    assert found == {
        "given": "the model's caller may pass another tensor for it",
        "out": "not a weight: output",
        "faint": "is too small for float16, which would change it by more than rounding",
        "fake": "quantized already, by QuantizeLinear behind it",
        "one": "not a weight: scale",
        "kept": "kept by request",
        "large": "not a weight: unused",
        "scales": "not a weight: unused",
        "long": "double, not float32",
    }
    np.testing.assert_array_equal(find(model, "odd").array()[0, :3], np.array([np.nan, np.inf, 0], np.float16))


def test_sparse_and_small_and_selected(parse: Parse) -> None:
    source = """g (float[2,32] x) => (float[2,32] y) <float[32,32] v = {1}, float[32,32] w = {1}, float[4] b = {1}> {
        h = MatMul (x, v) i = MatMul (h, w) y = Add (i, one) one = Constant <value = float {1}> () }"""
    source = source.replace("y = Add (i, one) one = Constant <value = float {1}> ()", "y = Relu (i)")
    model = fill(parse(source))
    values = onnx.helper.make_tensor("v", 1, [1], [2.0])
    places = onnx.helper.make_tensor("i", 7, [1], [5])
    model.graph.initializers["v"].const_value = SparseTensor(onnx.helper.make_sparse_tensor(values, places, [32, 32]))
    ctx = half(model)
    assert skips(ctx)["v"] == "is stored sparse, and would be dense once changed"
    assert list(changed(ctx)) == ["w"]
    model = fill(parse(source))
    assert skips(half(model, only="v"))["w"] == "not among those asked for"
    with pytest.raises(UsageError, match="Did you mean"):
        Pipeline.parse("to-float16{keep=vv}").run(model)


def test_large_weights_are_made_when_they_are_read(parse: Parse, tmp_path: object) -> None:
    model = fill(parse("g (float[1,900] x) => (float[1,700] y) <float[900,700] w = {1}> { y = MatMul (x, w) }"))
    save(model, f"{tmp_path}/f.onnx", external=True)
    model = load(f"{tmp_path}/f.onnx")
    half(model)
    assert isinstance(find(model, "w").tensor, StreamedTensor)
    save(model, f"{tmp_path}/h.onnx")
    np.testing.assert_array_equal(find(load(f"{tmp_path}/h.onnx"), "w").array(), random(900, 700).astype(np.float16))


# In computing ---------------------------------------------------------------------------------------------------------

NET = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,3,8,8] x, bool c) => (float[N,10] y, float[N,4,8,8] features, int64[4] size, float[N,10] p)
    <float[4,3,3,3] k = {1}, float[4] s = {1,2,3,4}, float[4] b = {1,2,3,4}, float[4] m = {1,2,3,4},
     float[4] v = {1,2,3,4}, float[4,10] w = {1}, float[1,4,1,1] shift = {1,2,3,4}, float[10] norm = {1}> {
        conv = Conv <pads = [1,1,1,1]> (x, k)
        bn = BatchNormalization (conv, s, b, m, v)
        act = Relu (bn)
        features = Add (act, shift)
        size = Shape (features)
        pooled = GlobalAveragePool (features)
        flat = Flatten (pooled)
        y = MatMul (flat, w)
        z = If (c) <then_branch = yes () => (float[?,10] t) { t = Mul (y, y) },
                    else_branch = no () => (float[?,10] e) { e = Neg (y) }>
        p = Softmax (z)
    }"""


def net(parse: Parse) -> ir.Model:
    return fill(parse(NET), k=random(4, 3, 3, 3) / 5, w=random(4, 10), norm=np.ones(10, np.float32))


@pytest.mark.parametrize("choice", [True, False])
def test_layers_compute_in_half_and_the_rest_does_not(parse: Parse, choice: bool) -> None:
    model = net(parse)
    feeds = {"x": random(2, 3, 8, 8), "c": np.array(choice)}
    expected = run(model, **feeds)
    ctx = half(model, mode="compute")
    found = kinds(model)
    assert [found[name] for name in ("Conv", "Add", "GlobalAveragePool", "Flatten", "MatMul", "Shape")] == [HALF] * 6
    assert [found[name] for name in ("BatchNormalization", "Softmax")] == [FLOAT] * 2
    assert find(model, "k").dtype is HALF
    assert [value.dtype for value in model.graph.outputs] == [FLOAT, FLOAT, ir.DataType.INT64, FLOAT]
    assert [value.name for value in model.graph.outputs] == ["y", "features", "size", "p"]
    for one, other in zip(run(model, **feeds), expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=5e-3 * np.abs(other).max())
    assert skips(ctx)["BatchNormalization"] == (
        "stays float32: BatchNormalization may lose too much in float16, or has none"
    )
    assert skips(ctx)["If"] == "stays float32: bodies and functions do"
    assert changed(ctx)["1 Conv"] == "computes in float16"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_as_few_casts_as_there_are_borders(parse: Parse) -> None:
    """x, conv -> BatchNormalization, bn -> Relu, features and y as outputs and to the If."""
    model = net(parse)
    half(model, mode="compute")
    assert Counter(node.op_type for node in model.graph)["Cast"] == 5
    again = text(model)
    half(model, mode="compute")
    assert text(model) == again


def test_what_stands_between_floats_stays(parse: Parse) -> None:
    """The variance of a norm that an exporter wrote out is not rounded, nor is its epsilon lost."""
    model = fill(parse("""g (float[N,32] x) => (float[N,32] y, float[N,32] z)
        <float[32,32] w = {1}, float eps = {1e-12}, float two = {2}> {
        h = MatMul (x, w)
        m = ReduceMean <axes = [-1]> (h)
        d = Sub (h, m)
        q = Pow (d, two)
        v = ReduceMean <axes = [-1]> (q)
        e = Add (v, eps)
        e2 = Identity (e)
        r = Sqrt (e2)
        y = Div (d, r)
        s = Softmax (x)
        z = Neg (s)
    }"""))  # fmt: skip
    expected = run(model, x=random(3, 32))
    ctx = half(model, mode="compute")
    assert skips(ctx)["Add"].startswith("stays float32: a constant of it is too small for float16")
    assert skips(ctx)["Identity"] == skips(ctx)["Neg"] == "stays float32: no layer computes with it in float16"
    for one, other in zip(run(model, x=random(3, 32)), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2 * np.abs(other).max())


def test_numbers_past_half_do_not_become_infinite(parse: Parse) -> None:
    """A mask of -3e38 in an attention: rows that are masked whole stay numbers."""
    model = fill(parse("""g (float[4,32] x, float[4,4] mask) => (float[4,32] y)
        <float[32,32] w = {1}, float one = {1}, float lowest = {-3e38}> {
        q = MatMul (x, w)
        t = Transpose (q)
        scores = MatMul (x, t)
        hidden = Sub (one, mask)
        far = Mul (hidden, lowest)
        masked = Add (scores, far)
        p = Softmax (masked)
        y = MatMul (p, x)
    }"""))  # fmt: skip
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    expected = run(model, x=random(4, 32), mask=mask)[0]
    ctx = half(model, mode="compute")
    assert "holds more than the 65504 of float16" in skips(ctx)["Mul"]
    found = run(model, x=random(4, 32), mask=mask)[0]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[[0, 1, 3]], expected[[0, 1, 3]], atol=2e-2 * np.abs(expected).max())


def test_the_interface_in_half(parse: Parse) -> None:
    model = net(parse)
    pass_ = ToFloat16(mode="compute", io="float16")
    feeds = {"x": random(2, 3, 8, 8).astype(np.float16), "c": np.array(True)}
    reference = pass_.reference(model.clone(), Context(runner=OrtRunner()))
    assert reference is not None
    (expected,) = reference([feeds])
    half(model, mode="compute", io="float16")
    assert [value.dtype for value in model.graph.inputs] == [HALF, ir.DataType.BOOL]
    assert [value.dtype for value in model.graph.outputs] == [HALF, HALF, ir.DataType.INT64, HALF]
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    for name, found in zip(names, session.run(None, feeds), strict=True):
        assert found.dtype == expected[name].dtype
        np.testing.assert_allclose(found, expected[name], rtol=1e-2, atol=1e-2 * np.abs(expected[name]).max())
    assert ToFloat16().reference(model, Context()) is None
    with pytest.raises(UsageError, match="add mode=compute"):
        Pipeline.parse("to-float16{io=float16}")


def test_nodes_and_weights_that_are_kept(parse: Parse) -> None:
    model = net(parse)
    ctx = half(model, mode="compute", keep=("op:Conv", "w"))
    assert skips(ctx)["Conv"] == "stays float32: kept by request"
    assert skips(ctx)["MatMul"] == "stays float32: kept by request"
    assert not any(what == "computes in float16" for what in changed(ctx).values())


def test_models_without_layers_and_with_unknown_types(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { h = Relu (x) y = Neg (h) }")
    before = text(model)
    half(model, mode="compute")
    assert text(model) == before
    model = parse("""<ir_version: 8, opset_import: ["": 17, "own": 1]> g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {1,2,3,4}> { h = own.What (x) i = Relu (h) y = MatMul (i, w) }""")
    ctx = half(model, mode="compute")
    assert skips(ctx)["What"] == "stays float32: What may lose too much in float16, or has none"
    assert skips(ctx)["Relu"] == "stays float32: the type of an input or output is not known"


def test_shared_constants_and_constant_arithmetic(parse: Parse) -> None:
    """A constant that half and float nodes read is stored once; what is computed from constants stays float32."""
    model = parse("""g (float[2,4] x) => (float[2,4] y, float[2,4] z) <float[4,4] w = {1}, float[4] b = {1,2,3,4}> {
        t = Transpose (w)
        h = MatMul (x, t)
        y = Add (h, b)
        z = Div (x, b)
    }""")
    fill(model, w=random(4, 4))
    expected = run(model, x=random(2, 4))
    half(model, mode="compute")
    assert find(model, "b").dtype is HALF
    for one, other in zip(run(model, x=random(2, 4)), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


FORMS = {
    "Gemm": "(h, h)",
    "Einsum": '<equation = "ij,jk->ik"> (h, h)',
    "Conv": "(image, k)",
    "ConvTranspose": "(image, k)",
    "MaxPool": "<kernel_shape = [2,2]> (image)",
    "AveragePool": "<kernel_shape = [2,2]> (image)",
    "GlobalAveragePool": "(image)",
    "GlobalMaxPool": "(image)",
    "Concat": "<axis = 0> (h, h)",
    "Reshape": "(h, long)",
    "Transpose": "(h)",
    "Flatten": "<axis = 0> (h)",
    "Squeeze": "(image)",
    "Unsqueeze": "(h, zero)",
    "Split": "<num_outputs = 1> (h)",
    "Slice": "(h, zero, two)",
    "Expand": "(h, cube)",
    "Tile": "(h, twice)",
    "DepthToSpace": "<blocksize = 2> (deep)",
    "SpaceToDepth": "<blocksize = 2> (image)",
    "Gather": "(h, two)",
    "GatherElements": "(h, places)",
    "GatherND": "(h, places)",
    "ScatterElements": "(h, places, some)",
    "ScatterND": "(h, places, row)",
    "Pad": "(h, pads)",
    "Where": "(c, h, h)",
    "Trilu": "(h)",
    "Clip": "(h, low, high)",
} | dict.fromkeys(["Add", "Sub", "Mul", "Min", "Max", "PRelu", "MatMul"], "(h, h)")
UNARY = {name for name in SAFE - set(FORMS) if operator(ir.node(name, [])).elementwise == "unary"}
OPERATORS = FORMS | dict.fromkeys(UNARY, "(h)")


def test_every_safe_operator_has_a_form() -> None:
    assert set(OPERATORS) == SAFE


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_safe_operator_runs_in_half(name: str, parse: Parse) -> None:
    """The table against the installed runtime: each operator behind a MatMul, and as its last."""
    version = 24 if name == "Swish" else 21
    model = parse(f"""<ir_version: 10, opset_import: ["": {version}]> g (float[4,4] x, bool[4,4] c) => (float[] y)
        <float[4,4] w = {{1}}, float[1,1,2,2] k = {{1,2,3,4}}, int64[1] long = {{16}}, int64[1] zero = {{0}},
         int64[1] two = {{2}}, int64[3] cube = {{2,4,4}}, int64[2] twice = {{2,1}}, int64[1,1] places = {{1}},
         int64[4] pads = {{1,0,0,1}}, float low = {{-1}}, float high = {{1}}, float[1,1] some = {{3}},
         float[1,4] row = {{1,2,3,4}}, int64[4] four = {{1,1,4,4}}, int64[4] square = {{1,4,2,2}}> {{
            h = MatMul (x, w)
            image = Reshape (h, four)
            deep = Reshape (h, square)
            [last] y = {name} {OPERATORS[name]}
        }}""")
    fill(model, w=random(4, 4))
    model.graph.outputs[0].shape = None
    feeds = {"x": random(4, 4), "c": random(4, 4) > 0}
    expected = run(model, **feeds)[0]
    assert "last" not in skips(half(model, mode="compute"))
    last = next(node for node in model.graph if node.name == "last")
    assert last.outputs[0].dtype is HALF
    np.testing.assert_allclose(run(model, **feeds)[0], expected, rtol=0.02, atol=0.02)


REAL = [str(file.locate()) for package in ("magika", "rapidocr_onnxruntime") for file in files(package) or ()
        if str(file).endswith(".onnx") and "rec" not in str(file)]  # fmt: skip


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.rpartition("/")[2])
def test_real_models_run_in_half(path: str) -> None:
    model = load(path)
    given = model.graph.inputs[0]
    image = np.random.default_rng(0).random((1, 3, 64 if "det" in path else 48, 192)).astype(np.float32)
    feed = {"x": image} if given.name == "x" else {given.name: np.full((1, 2048), 65, given.dtype.numpy())}
    expected = run(model, **feed)
    half(model, mode="compute")
    for one, other in zip(run(model, **feed), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.05)


def test_through_the_front_door() -> None:
    for mode, most in (("store", 2e-3), ("compute", 2e-3)):
        model = load("models/vit.onnx")
        report = penjing.run(model, f"to-float16{{mode={mode}}}", data="models/mnist-validation.npz")
        assert report.check.comparison.max_error < most
