"""Weight sharing: how many values, for which weights, of every type, and the choice of bits within bounds."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import penjing
from penjing.ir.errors import NeedsData, UsageError
from penjing.ir.files import load, save
from penjing.ir.text import text
from penjing.ir.weights import Weight, weights
from penjing.passes.base import Context
from penjing.passes.judge import Judge
from penjing.passes.meter import Meter
from penjing.passes.share.energy import energies
from penjing.passes.share.share import ShareWeights
from penjing.runtime.session import OrtRunner

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def chain(*arrays: Array, bias: int = 0) -> ir.Model:
    """A model that multiplies its input by each of the arrays in turn, with a bias of that size after the first."""
    tape = ir.tape.Tape()
    x = value = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", arrays[0].shape[0]]))
    for place, array in enumerate(arrays):
        weight = tape.initializer(ir.tensor(array, name=f"w{place}"))
        if array.dtype != np.float32:
            weight = tape.op("Cast", [weight], {"to": ir.DataType.FLOAT})
        value = tape.op("MatMul", [value, weight])
        if place == 0 and bias:
            value = tape.op("Add", [value, tape.initializer(ir.tensor(np.ones(bias, np.float32), name="bias"))])
    value.name, value.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def share(model: ir.Model, ctx: Context | None = None, **options: object) -> Context:
    ctx = ctx or Context()
    ShareWeights(**options).run(model, ctx)  # type: ignore[arg-type]
    return ctx


def named(model: ir.Model) -> dict[str, Weight]:
    return {weight.address: weight for weight in weights(model)}


def skips(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


def with_data(model: ir.Model, samples: Array, **given: object) -> Context:
    return Context(step="share-weights", data=[{"x": samples}], runner=OrtRunner(), **given)


# How many values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "count"), [({}, 16), ({"bits": 3}, 8), ({"values": 5}, 5), ({"bits": 8}, 256)])
def test_each_weight_takes_so_many_values(options: dict[str, object], count: int) -> None:
    model = chain(random(40, 50), random(50, 30, seed=1) + 3)
    ctx = share(model, **options)
    assert [weight.distinct() for weight in weights(model)] == [count, count]
    assert [change.numbers["values"] for change in ctx.ledger.changes] == [count, count]


def test_zeros_stay_zero_and_negative_zero_too() -> None:
    array = random(60, 60)
    array[np.abs(array) < 1] = 0
    array[0, 0] = -0.0
    model = chain(array)
    share(model, bits=2)
    found = named(model)["w0"].array()
    assert (found[array == 0] == 0).all()
    assert len(np.unique(found)) == 4


def test_the_ledger_tells_what_was_lost() -> None:
    array = random(80, 80)
    model = chain(array)
    change = share(model).ledger.changes[0]
    found = named(model)["w0"].array()
    lost = 10 * math.log10(np.square(array).sum() / np.square(array - found).sum())
    _, counts = np.unique(found, return_counts=True)
    bits = -(counts / counts.sum() * np.log2(counts / counts.sum())).sum()
    assert change.numbers["sqnr_db"] == pytest.approx(lost, abs=0.02)
    assert change.numbers["entropy_bits"] == pytest.approx(bits, abs=0.002)
    assert lost == pytest.approx(20.2, abs=0.6)  # 16 levels for a normal distribution: Max, 1960


def test_scopes() -> None:
    low, high = random(32, 48), random(48, 32, seed=1) * 10
    model = chain(low, high)
    share(model, scope="model")
    both = np.concatenate([weight.array().reshape(-1) for weight in weights(model)])
    assert len(np.unique(both)) == 16
    model = chain(low, high)
    share(model, scope="layer-kind")
    assert np.array_equal(np.concatenate([weight.array().reshape(-1) for weight in weights(model)]), both)
    model = chain(low, high)
    ctx = share(model, scope="channel-group", group=16, bits=2)
    found = named(model)["w0"].array()
    assert [len(np.unique(found[:, start : start + 16])) for start in (0, 16, 32)] == [4, 4, 4]
    assert len(np.unique(found)) == 12
    assert ctx.ledger.changes[0].numbers["groups"] == 3


def test_groups_leave_less_error_than_one_codebook() -> None:
    array = random(64, 64) * np.repeat(10.0 ** np.arange(4), 16).astype(np.float32)
    errors = []
    for scope in ("tensor", "channel-group"):
        model = chain(array)
        share(model, scope=scope, bits=2)
        errors.append(np.square(named(model)["w0"].array()[:, :16] - array[:, :16]).sum())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [30, 300])
def test_other_floats(dtype: type, size: int) -> None:
    model = chain(random(size, 300).astype(dtype))
    share(model)
    assert named(model)["w0"].array().dtype == dtype
    assert named(model)["w0"].distinct() == 16


def test_weights_of_a_file_are_replaced_as_they_are_read(tmp_path: Path) -> None:
    array = random(600, 600)
    save(chain(array), tmp_path / "m.onnx", external=True)
    model = load(tmp_path / "m.onnx")
    share(model)
    tensor = named(model)["w0"].tensor
    assert "share-weights" in getattr(tensor, "provenance", "")
    save(model, tmp_path / "out.onnx")
    again = chain(array)
    share(again)
    assert np.array_equal(load(tmp_path / "out.onnx").graph.initializers["w0"].const_value.numpy(), tensor.numpy())  # type: ignore[union-attr]
    assert np.array_equal(named(again)["w0"].array(), tensor.numpy())


def test_the_same_bytes_each_time() -> None:
    found = []
    for _ in range(2):
        model = chain(random(300, 300), random(300, 40))
        share(model)
        found.append(text(model))
    assert found[0] == found[1]


# What is left alone ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_says_why() -> None:
    bad, few = random(20, 20), np.ones((20, 20), np.float32)
    bad[3, 3] = np.nan
    infinite = random(20, 20)
    infinite[1, 1] = -np.inf
    model = chain(bad, few, infinite, random(20, 20), random(20, 20), bias=20)
    given = model.graph.initializers["w3"]
    model.graph.inputs.append(given)
    for scope in ("tensor", "model", "channel-group"):
        ctx = share(model.clone(), scope=scope, keep="w4", bits=4)
        found = skips(ctx)
        assert found["w0"] == found["w2"] == "holds NaN or infinity"
        assert found["bias"] == "not a weight of a layer: operand"
        assert found["w3"] == "the model's caller may pass another tensor for it"
        assert found["w4"] == "kept by request"
    assert "values already" in skips(share(model.clone()))["w1"]


def test_empty_integer_string_shape_and_output_constants() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 21]>
        m (float[N,4] x) => (float[N,4] y, float[4,4] out, float[2,8] shaped, float[N,0] nothing, float[N,4] i)
        <float[4,4] out = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, int64[2] shape = {2, 8}, float scale = {0.5},
         int8[4,4] q = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4,0] empty = {}>
        {
            y = MatMul (x, out)
            shaped = Reshape (out, shape)
            nothing = MatMul (x, empty)
            d = DequantizeLinear (q, scale)
            i = MatMul (x, d)
        }"""
    )
    text_before = text(model)
    found = skips(share(model, bits=1))
    assert text(model) == text_before
    assert found["out"] == "not a weight of a layer: output of the model" or "not a weight" in found["out"]
    assert found["empty"] == "empty"
    assert found["q"].startswith("integers")
    assert found["shape"].startswith("not a weight of a layer")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 17},
        {"values": 1},
        {"bits": 4, "values": 16},
        {"group": 0},
        {"bits": "auto", "scope": "model"},
        {"bits": "many"},
        {"scope": "layer"},
    ],
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="share-weights"):
        ShareWeights(**options)  # type: ignore[arg-type]


def test_options_as_text() -> None:
    for words in ("{bits=auto}", "{values=16}", "{bits=3 scope=channel-group group=8}", ""):
        assert str(penjing.Pipeline.parse(f"share-weights{words}")) == f"share-weights{words}"


# Weighted by activations ----------------------------------------------------------------------------------------------


def test_energies_of_the_inputs() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[N,4,5,5] x) => (float[N,25,2] y)
        <float[6,2,1,1] conv = {1,2,3,4,5,6,7,8,9,10,11,12}, int64[3] shape = {-1, 25, 6},
         float[6,2] dense = {1,2,3,4,5,6,7,8,9,10,11,12}>
        {
            c = Conv <group = 2> (x, conv)
            flat = Reshape (c, shape)
            y = MatMul (flat, dense)
        }"""
    )
    samples = random(7, 4, 5, 5) * np.array([1, 2, 3, 4], np.float32).reshape(4, 1, 1)
    found = named(model)
    known = energies(model, [found["conv"], found["dense"]], with_data(model, samples))
    mean = np.square(samples.astype(np.float64)).mean(axis=(0, 2, 3))
    conv, dense = known[found["conv"]], known[found["dense"]]
    assert isinstance(conv, np.ndarray)
    assert isinstance(dense, np.ndarray)
    expected = np.repeat(mean.reshape(2, 2), 3, axis=0)
    np.testing.assert_allclose(conv.reshape(6, 2), expected / expected.mean(), rtol=1e-5)
    assert dense.shape == (6, 1)
    assert dense.mean() == pytest.approx(1)


def test_weighing_by_activations_helps_the_outputs() -> None:
    scale = np.logspace(-1, 1, 64, dtype=np.float32)
    array, samples = random(64, 64) / scale[:, None], random(200, 64, seed=1) * scale
    errors = []
    for weighting in ("none", "activations"):
        model = chain(array)
        share(model, with_data(model, samples), bits=2, weighting=weighting)
        errors.append(np.square(samples @ named(model)["w0"].array() - samples @ array).sum())
    assert errors[1] < 0.9 * errors[0]


def test_weighing_needs_data() -> None:
    with pytest.raises(NeedsData):
        share(chain(random(30, 30)), weighting="activations")


# Chosen for the outputs -----------------------------------------------------------------------------------------------


def mixed(count: int, width: int, seed: int) -> Array:
    """Inputs that occur together: a quarter as many causes as inputs, and some noise."""
    return random(count, width // 4, seed=seed) @ random(width // 4, width, seed=9) + 0.3 * random(
        count, width, seed=seed + 1
    )


def test_errors_are_carried_on_to_inputs_that_occur_together() -> None:
    array, seen, unseen = random(64, 48), mixed(400, 64, 1), mixed(400, 64, 5)
    noise = {}
    for weighting in ("none", "activations", "outputs"):
        model = chain(array)
        ctx = share(model, with_data(model, seen), bits=3, weighting=weighting)
        made = named(model)["w0"].array()
        assert len(np.unique(made)) <= 8
        noise[weighting] = np.square(unseen @ (made - array)).sum() / np.square(unseen @ array).sum()
        told = ctx.ledger.changes[0].numbers
        assert ("output_sqnr_db" in told) == (weighting == "outputs")
        assert ("sqnr_db" in told) == (weighting != "outputs")
    assert told["output_sqnr_db"] == pytest.approx(-10 * np.log10(noise["outputs"]), abs=1.5)
    assert noise["outputs"] < 0.3 * min(noise["none"], noise["activations"])


def test_zeros_stay_and_groups_have_values_of_their_own_where_errors_are_carried() -> None:
    array = np.where(np.abs(random(64, 48)) < 0.5, 0, random(64, 48)).astype(np.float32)
    model = chain(array)
    ctx = share(
        model, with_data(model, mixed(200, 64, 1)), bits=2, weighting="outputs", scope="channel-group", group=16
    )
    made = named(model)["w0"].array()
    assert np.all(made[array == 0] == 0)
    assert [len(np.unique(made[:, first : first + 16])) for first in (0, 16, 32)] == [4, 4, 4]
    assert len(np.unique(made)) == 10
    assert ctx.ledger.changes[0].numbers["groups"] == 3


LAYERS = {
    "Conv": ("Conv <pads = [1, 1, 1, 1]> (x, w)", "float[6,8,3,3]", "float[N,8,7,7]"),
    "grouped": ("Conv <group = 4> (x, w)", "float[16,2,3,3]", "float[N,8,7,7]"),
    "depthwise": ("Conv <group = 8> (x, w)", "float[8,1,5,5]", "float[N,8,7,7]"),
    "Gemm": ("Gemm <transB = 1> (x, w)", "float[12,64]", "float[N,64]"),
    "transposed": ("Gemm <transA = 1> (x, w)", "float[64,12]", "float[64,N]"),
    "weight first": ("MatMul (w, x)", "float[12,64]", "float[64,N]"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layout_of_a_layer_gains(kind: str) -> None:
    """Each is one layer, whose outputs are compared on other data."""
    node, weight, taken = LAYERS[kind]
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["": 17]> m ({taken} x, {weight} w) => (float y) {{y = {node}}}'
    )
    w = model.graph.inputs.pop()
    w.const_value = ir.tensor(random(*(int(size) for size in weight[6:-1].split(","))), name="w")
    model.graph.register_initializer(w)
    seen, unseen = (mixed(7 * 64, 64, seed) for seed in (1, 5))
    if "Conv" in node:
        seen, unseen = (
            np.repeat(part, 7, axis=0).reshape(-1, 7, 7, 64)[:64].transpose(0, 3, 1, 2)[:, :8]
            for part in (seen, unseen)
        )
    elif taken == "float[64,N]":
        seen, unseen = seen.T, unseen.T
    noise, expected = [], None
    for options in ({"bits": 16}, {"bits": 2}, {"bits": 2, "weighting": "outputs"}):
        copy = model.clone()
        share(copy, with_data(copy, np.ascontiguousarray(seen)), **options)
        found = OrtRunner().session(copy).run(None, {"x": np.ascontiguousarray(unseen)})[0]
        expected = found if expected is None else expected
        noise.append(float(np.square(found - expected).sum()))
    assert noise[2] < 0.8 * noise[1]


def test_what_is_not_a_matrix_of_a_layer_takes_the_nearest_values_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[N,8] x, int64[N] i, float[9,8] table, float[2,8,6] pair, float[8,5] wide)
        => (float[N,8] y, float[2,N,6] z, float[N,5] r) {
            row = Gather (table, i)  y = Add (row, x)  z = MatMul (x, pair)  r = MatMul (x, wide)
        }"""
    )
    for value in model.graph.inputs[2:]:
        model.graph.inputs.remove(value)
        assert value.shape is not None
        value.const_value = ir.tensor(random(*value.shape.numpy()), name=value.name)
        model.graph.register_initializer(value)
    samples = {"x": random(20, 8), "i": np.arange(20) % 9}
    monkeypatch.setattr("penjing.passes.share.outputs._WIDEST", 7)
    ctx = Context(step="share-weights", data=[samples], runner=OrtRunner())
    share(model, ctx, bits=2, weighting="outputs")
    reasons = skips(ctx)
    assert reasons["table"] == "it takes the nearest values: which inputs it meets is not known"
    assert reasons["wide"] == "it takes the nearest values: its layer contracts 8 inputs, more than 7"
    assert reasons["pair"].startswith("it takes the nearest values: ")
    assert {change.subject for change in ctx.ledger.changes} == {"table", "wide", "pair"}


@pytest.mark.parametrize(
    ("stored", "moved"),
    [
        ("float[16,8]", "axes = Constant <value_ints = [2, 3]> ()  v = Unsqueeze (w, axes)"),
        ("float[16,8,9]", "shape = Constant <value_ints = [16, 8, 3, 3]> ()  v = Reshape (w, shape)"),
        ("float[16,8,3,2]", "v = Transpose <perm = [0, 1, 3, 2]> (w)"),
    ],
)
def test_a_kernel_that_is_laid_out_otherwise_takes_the_nearest_values(stored: str, moved: str) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        m (float[N,8,7,7] x, {stored} w) => (float y) {{ {moved}  y = Conv (x, v) }}"""
    )
    w = model.graph.inputs.pop()
    assert w.shape is not None
    w.const_value = ir.tensor(random(*w.shape.numpy()), name="w")
    model.graph.register_initializer(w)
    samples = mixed(64, 8 * 49, 1).reshape(64, 8, 7, 7)
    nearest = model.clone()
    share(nearest, with_data(nearest, samples), bits=2, weighting="activations")
    ctx = share(model, with_data(model, samples), bits=2, weighting="outputs")
    assert skips(ctx)["w"] == "it takes the nearest values: it is stored in another layout than its layer takes"
    np.testing.assert_array_equal(named(model)["w"].array(), named(nearest)["w"].array())


def test_a_vector_that_a_matrix_is_multiplied_with() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[64] x, float[12,64] w) => (float[12] y) { y = MatMul (w, x) }"""
    )
    w = model.graph.inputs.pop()
    w.const_value = ir.tensor(random(12, 64), name="w")
    model.graph.register_initializer(w)
    feeds = [{"x": row} for row in mixed(200, 64, 1)]
    ctx = share(model, Context(step="share-weights", data=feeds, runner=OrtRunner()), bits=2, weighting="outputs")
    assert ctx.ledger.changes[0].numbers["output_sqnr_db"] > 12


def test_rows_do_not_depend_on_how_many_are_carried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for together in (1 << 21, 64 * 7, 1):
        monkeypatch.setattr("penjing.passes.share.outputs._TOGETHER", together)
        for options in ({"bits": 3}, {"bits": 2, "scope": "channel-group", "group": 5}):
            model = chain(random(64, 48))
            share(model, with_data(model, mixed(200, 64, 1)), weighting="outputs", **options)
            found.append(named(model)["w0"].array())
    for place in (2, 4):
        np.testing.assert_array_equal(found[place], found[0])
        np.testing.assert_array_equal(found[place + 1], found[1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-100, 1e100])
def test_inputs_of_any_size_say_the_same(size: float) -> None:
    found = []
    for scale in (1.0, size):
        model = ir.from_onnx_text(
            """<ir_version: 8, opset_import: ["": 17]>
            m (double[N,64] x, double[64,48] w) => (double[N,48] y) { y = MatMul (x, w) }"""
        )
        w = model.graph.inputs.pop()
        w.const_value = ir.tensor(random(64, 48).astype(np.float64), name="w")
        model.graph.register_initializer(w)
        share(model, with_data(model, scale * mixed(200, 64, 1).astype(np.float64)), bits=2, weighting="outputs")
        found.append(named(model)["w"].array())
    assert np.mean(np.isclose(found[0], found[1])) > 0.99


# Bits within bounds ---------------------------------------------------------------------------------------------------


def test_auto_keeps_20_db_without_bounds() -> None:
    model, samples = chain(random(64, 128), random(128, 256, seed=1), random(256, 16, seed=2)), random(50, 64, seed=3)
    report = penjing.run(model, "share-weights{bits=auto}", data={"x": samples})
    comparison = report.check.comparison
    assert comparison is not None
    assert 20 <= comparison.min_sqnr < 30
    values = [change.numbers["values"] for change in report.passes[0].ledger.changes if "values" in change.numbers]
    assert len(values) == 3
    assert max(values) <= 256


@pytest.mark.parametrize("bound", [{"min_sqnr": 35.0}, {"max_error": 0.01}])
def test_auto_keeps_the_bounds_of_the_run(bound: dict[str, float]) -> None:
    model, samples = chain(random(64, 128), random(128, 64, seed=1)), random(50, 64, seed=3)
    report = penjing.run(model, "share-weights{bits=auto}", data={"x": samples}, **bound)  # type: ignore[arg-type]
    assert report.failure is None
    assert report.passes[0].ledger.changes


def test_auto_by_a_metric_alone_and_where_nothing_may_be_lost() -> None:
    model = chain(random(64, 128), random(128, 64, seed=1))
    samples = random(50, 64, seed=3)
    wanted = samples @ random(64, 128) @ random(128, 64, seed=1)

    def metric(session: object) -> float:
        found = session.run(None, {"x": samples})[0]  # type: ignore[attr-defined]
        return float(-np.square(found - wanted).mean() / np.square(wanted).mean())

    report = penjing.run(model, "share-weights{bits=auto}", metric=metric, max_drop=0.01)
    assert report.metric is not None
    assert report.metric.after is not None
    assert report.metric.before - report.metric.after <= 0.01
    assert report.passes[0].ledger.changes
    model = chain(random(64, 128))
    wanted = samples @ random(64, 128)
    report = penjing.run(model, "share-weights{bits=auto}", metric=metric, max_drop=0.0)
    assert not report.passes[0].ledger.changes
    assert named(model)["w0"].distinct() == named(chain(random(64, 128)))["w0"].distinct()


def test_auto_needs_data() -> None:
    with pytest.raises(NeedsData, match="share-weights"):
        share(chain(random(64, 64)), Context(step="share-weights", runner=OrtRunner()), bits="auto")


def test_auto_leaves_what_is_too_small() -> None:
    model = chain(random(8, 8))
    ctx = share(model, with_data(model, random(4, 8)), bits="auto")
    assert skips(ctx)["w0"].startswith("too small")


def test_auto_leaves_what_passes_before_have_lost() -> None:
    samples = random(50, 64, seed=3)
    wanted = samples @ random(64, 128) @ random(128, 64, seed=1)

    def metric(session: object) -> float:
        found = session.run(None, {"x": samples})[0]  # type: ignore[attr-defined]
        return float(-np.square(found - wanted).mean() / np.square(wanted).mean())

    model = chain(random(64, 128), random(128, 64, seed=1))
    steps = "prune-magnitude{sparsity=0.1},share-weights{bits=auto}"
    report = penjing.run(model, steps, metric=metric, max_drop=0.02)
    assert report.metric is not None
    assert report.metric.after is not None
    assert report.metric.before - report.metric.after <= 0.02
    assert report.passes[1].ledger.changes


def test_auto_of_a_model_that_gives_labels_only() -> None:
    model, samples = chain(random(64, 128), random(128, 3, seed=1)), random(300, 64, seed=3)
    scores = model.graph.outputs[0]
    last = ir.node("ArgMax", [scores], {"axis": 1, "keepdims": 0}, outputs=[ir.val("label", ir.DataType.INT64, ["n"])])
    scores.name = "scores"
    model.graph.append(last)
    model.graph.outputs[0] = last.outputs[0]
    ctx = with_data(model, samples)
    wanted = next(iter(OrtRunner().run(model, ctx.data)))["label"]
    share(model, ctx, bits="auto")
    found = next(iter(OrtRunner().run(model, ctx.data)))["label"]
    assert ctx.ledger.changes
    assert (wanted != found).mean() <= 0.01


def test_noise_is_measured_before_what_an_exporter_made_of_softmax() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[4,16] x) => (float[4,16] y, int64[4] label)
        <int64[1] axis = {1}>
        {
            logits = Mul (x, x)
            e = Exp (logits)
            sum = ReduceSum (e, axis)
            y = Div (e, sum)
            label = ArgMax <axis = 1, keepdims = 0> (logits)
        }"""
    )
    assert Meter(model, Judge(model, with_data(model, random(4, 16))), 4).names == ["logits"]


def test_auto_gives_a_weight_that_does_more_harm_more_values() -> None:
    """The second weight meets a hundredth of the signal that its sum with the first has."""
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[n,64] x) => (float[n,64] y)
        <float tenth = {0.01}>
        {
            a = MatMul (x, w0)
            b = MatMul (x, w1)
            small = Mul (b, tenth)
            y = Add (a, small)
        }""",
        initializers=[ir.tensor(random(64, 64), name="w0"), ir.tensor(random(64, 64, seed=1), name="w1")],
    )
    share(model, with_data(model, random(50, 64, seed=3)), bits="auto")
    values = [named(model)[name].distinct() for name in ("w0", "w1")]
    assert values[0] is not None
    assert values[1] == 2 < values[0]
