"""Bias correction: means of output channels come back, whatever form the bias is stored in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from penjing.ir.errors import NeedsData, UsageError
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.ir.weights import weights
from penjing.models import zoo
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.bias import CorrectBias
from penjing.passes.quantize.original import remember
from penjing.passes.selection import Selection
from penjing.runtime.session import OrtRunner

Array = np.ndarray[Any, Any]
Parse = Callable[[str], ir.Model]
Runs = list[dict[str, Array]]

FEEDS = [{"image": zoo.data("validation")["image"][start : start + 8]} for start in range(0, 64, 8)]
HELD_OUT = [{"image": zoo.data("test")["image"][:200]}]


def correct(model: ir.Model, feeds: Runs, original: ir.Model | None = None, **options: Any) -> Context:
    partners = None if original is None else {"original": original}
    ctx = Context(step="correct-bias", data=feeds, runner=OrtRunner(), models=partners)
    CorrectBias(**options).run(model, ctx)
    verify(model)
    return ctx


def run(model: ir.Model, feeds: Runs, level: str = "off") -> Array:
    return np.concatenate([next(iter(found.values())) for found in OrtRunner().run(model, feeds, level=level)])


def quantized(name: str, steps: str) -> ir.Model:
    model = zoo.load(name)
    remember(model)
    Pipeline.of(steps).run(model, Context(data=FEEDS, runner=OrtRunner()))
    return model


def sqnr(name: str, model: ir.Model) -> float:
    wanted, found = (run(one, HELD_OUT, "all").astype(np.float64) for one in (zoo.load(name), model))
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


# Real models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "gain"),
    [("cnn-a", "quantize-weights{bits=4}", 4), ("mlp", "quantize-weights{bits=3}", 1), ("mlp", "quantize-static", 1)],
)
def test_real_models_gain(name: str, steps: str, gain: float) -> None:
    model = quantized(name, steps)
    before = sqnr(name, model)
    ctx = correct(model, FEEDS)
    assert sqnr(name, model) > before + gain
    assert len(ctx.ledger.changes) == {"cnn-a": 13, "mlp": 4}[name]
    for change in ctx.ledger.changes:
        assert change.numbers["mean_error_after"] < 0.3 * change.numbers["mean_error_before"]


def test_one_sweep_for_layers_that_feed_each_other_may_do_harm_and_is_taken_back() -> None:
    """All at once, each layer corrects what the ones before it corrected already."""
    model = quantized("cnn-a", "quantize-weights{bits=4}")
    before = text(model)
    ctx = correct(model, FEEDS, sweeps=1)
    assert not ctx.ledger.changes
    assert ctx.ledger.reasons() == {"no correction brings the means nearer to the float model's": 13}
    assert text(model) == before


def test_it_is_deterministic() -> None:
    one = quantized("mlp", "quantize-weights{bits=4}")
    other = one.clone()
    correct(one, FEEDS)
    correct(other, FEEDS, zoo.load("mlp"))
    assert [w.array().tobytes() for w in weights(one)] == [w.array().tobytes() for w in weights(other)]


# Forms ---------------------------------------------------------------------------------------------------------------

FORMS = {
    "a float bias of Conv": "y = Conv (x, w, b)",
    "a Conv without a bias": "y = Conv (x, w)",
    "a bias that others share": "u = Conv (x, w, b) k = Mul (b, b) y = Concat <axis: int = 1> (u, u)",
    "a transposed Conv": "y = ConvTranspose (x, w)",
}
CONV = """
    m (float[N,2,4,4] x) => (float[N,C,H,W] y)
    <int8[2,2,1,1] q = {3, -2, 1, 2}, float s = {0.3}, float[2] b = {0.5, -1}>
    { w = DequantizeLinear (q, s) %s }"""
PLAIN = """
    m (float[N,2,4,4] x) => (float[N,C,H,W] y)
    <float[2,2,1,1] w = {1, -0.5, 0.4, 0.5}, float[2] b = {0.5, -1}>
    { %s }"""


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_biases(parse: Parse, form: str) -> None:
    model, original = parse(CONV % FORMS[form]), parse(PLAIN % FORMS[form])
    for one in (model, original):
        for node in one.graph:
            node.name = node.op_type
    feeds = [{"x": np.random.default_rng(0).standard_normal((5, 2, 4, 4)).astype(np.float32) + 2}]
    old = [run(one, feeds).mean(axis=(0, 2, 3)) for one in (model, original)]
    ctx = correct(model, feeds, original)
    assert [change.what for change in ctx.ledger.changes] == ["bias corrected"]
    new = [run(one, feeds).mean(axis=(0, 2, 3)) for one in (model, original)]
    assert np.abs(old[0] - old[1]).max() > 0.1
    np.testing.assert_allclose(new[0], new[1], atol=1e-5)
    if form == "a bias that others share":
        assert next(weight.array().tolist() for weight in weights(model) if weight.address == "b") == [0.5, -1]


MATRICES = {
    "Gemm with beta": ("y = Gemm <beta: float = 0.5> (x, w, b)", True),
    "Gemm without a bias": ("y = Gemm (x, w)", True),
    "Gemm with one number for all": ("y = Gemm (x, w, one)", True),
    "MatMul and Add": ("p = MatMul (x, w) y = Add (b, p)", True),
    "MatMul alone": ("y = MatMul (x, w)", False),
    "MatMul and a computed Add": ("p = MatMul (x, w) y = Add (p, x)", False),
}


@pytest.mark.parametrize("form", MATRICES)
def test_forms_of_products(parse: Parse, form: str) -> None:
    nodes, corrected = MATRICES[form]
    head = "m (float[N,2] x) => (float[N,2] y)"
    rest = "float[2] b = {0.5, -1}, float one = {1}"
    model = parse(
        f"{head} <int8[2,2] q = {{3, -2, 1, 2}}, float s = {{0.3}}, {rest}> {{ w = DequantizeLinear (q, s) {nodes} }}"
    )
    original = parse(f"{head} <float[2,2] w = {{1, -0.5, 0.4, 0.5}}, {rest}> {{ {nodes} }}")
    for one in (model, original):
        for node in one.graph:
            node.name = node.op_type
    feeds = [{"x": np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32) + 2}]
    ctx = correct(model, feeds, original)
    assert bool(ctx.ledger.changes) == corrected
    if corrected:
        # ONNX Runtime rounds inputs too where weights are stored in 8 bits, and that is what was measured.
        np.testing.assert_allclose(run(model, feeds).mean(axis=0), run(original, feeds).mean(axis=0), atol=1e-3)
    else:
        assert ctx.ledger.reasons() == {"a MatMul without an Add of a constant behind it has no bias": 1}


@pytest.mark.parametrize("bias", [", c", ""])
def test_layers_on_integers_keep_biases_of_int32(parse: Parse, bias: str) -> None:
    """In steps of input scale times weight scale, for anything else would leave the integer kernel."""
    model = parse(f"""
        m (float[N,2,4,4] x) => (float[N,2,4,4] y)
        <int8[2,2,1,1] q = {{3, -2, 1, 2}}, float[2] s = {{0.3, 0.2}}, int32[2] i = {{50, -150}},
         float[2] t = {{0.009, 0.006}}, float a = {{0.03}}, uint8 z = {{100}}>
        {{ u = QuantizeLinear (x, a, z) d = DequantizeLinear (u, a, z) w = DequantizeLinear <axis: int = 0> (q, s)
           c = DequantizeLinear <axis: int = 0> (i, t) y = Conv (d, w{bias}) }}""")
    original = parse(f"""
        m (float[N,2,4,4] x) => (float[N,2,4,4] y)
        <float[2,2,1,1] w = {{1, -0.5, 0.3, 0.3}}, float[2] c = {{0.45, -0.9}}> {{ y = Conv (x, w{bias}) }}""")
    for one in (model, original):
        for node in one.graph:
            node.name = node.outputs[0].name
    feeds = [{"x": np.random.default_rng(0).standard_normal((5, 2, 4, 4)).astype(np.float32) + 2}]
    assert correct(model, feeds, original).ledger.changes
    means = [run(one, feeds).mean(axis=(0, 2, 3)) for one in (model, original)]
    assert np.abs(means[0] - means[1]).max() < 0.006  # half a step, and what was rounded
    stored = next(weight for weight in weights(model) if weight.dtype is ir.DataType.INT32 and weight.uses)
    assert stored.quantization is not None
    np.testing.assert_allclose(stored.quantization.scale.ravel(), [0.009, 0.006], rtol=1e-6)


# What it needs and leaves --------------------------------------------------------------------------------------------


def test_what_it_needs() -> None:
    model = quantized("mlp", "quantize-weights{bits=4}")
    with pytest.raises(NeedsData, match="--with original=MODEL"):
        correct(model.clone(), FEEDS)
    with pytest.raises(UsageError, match="sweeps and runs are numbers of at least 1"):
        CorrectBias(sweeps=0)
    ctx = correct(model, FEEDS, keep=Selection(("op:Gemm",)))
    assert ctx.ledger.reasons() == {"kept by request": 4}


def test_nan_is_told(parse: Parse) -> None:
    model, original = parse(CONV % "y = Conv (x, w, b)"), parse(PLAIN % "y = Conv (x, w, b)")
    ctx = correct(model, [{"x": np.full((1, 2, 4, 4), np.nan, np.float32)}], original)
    assert not ctx.ledger.changes
    assert any("NaN" in reason for reason in ctx.ledger.reasons())


def test_few_runs_are_spread_over_the_data() -> None:
    from penjing.passes.feeds import Some
    from penjing.runtime.feeds import Feeds

    runs = [{"x": np.array([number])} for number in range(10)]
    assert [run["x"][0] for run in Some(Feeds("test", lambda: iter(runs), runs=10), 3)] == [0, 4, 8]
    assert [run["x"][0] for run in Some(runs, 3)] == [0, 1, 2]
    assert len(list(Some(runs, 99))) == 10
