"""Bad input to every pass that quantizes: each time a sentence, or a model that is right, and never silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from test_quantize_static import Feeds, Net, feeds

import penjing
from penjing.ir.errors import BadFeeds, NeedsData
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.observe import ALIKE, ONE_SAMPLE
from penjing.runtime.calibration import calibrate_model
from penjing.runtime.session import OrtRunner

MEASURING = ["quantize-static{target=any}", "quantize-static", "quantize-auto"]
PASSES = [*MEASURING, "quantize-dynamic", "quantize-weights", "to-float16", "to-float16{mode=compute}", "dequantize"]


def net(*, outlier: float = 1.0) -> ir.Model:
    """Two matrix products of 64 x 64, with biases and a Relu between."""
    made = Net()
    array = made.rng.standard_normal((64, 64)).astype(np.float32) / 8
    array[3, 5] *= outlier
    value = made.op("Relu", made.op("Gemm", "x", made.constant(array), made.weight(64, scale=1)))
    made.op("Gemm", value, made.weight(64, 64), made.weight(64, scale=1))
    return made.model(["n", 64])


def sqnr(model: ir.Model, work: ir.Model, data: Feeds) -> float:
    """In dB, over all outputs; of numbers whose squares float32 does not hold too."""
    signal = noise = 0.0
    for wanted, found in zip(OrtRunner().run(model, data), OrtRunner().run(work, data), strict=True):
        for name in wanted:
            reference = wanted[name].astype(np.float64)
            signal += float((reference**2).sum())
            noise += float(((reference - found[name]) ** 2).sum())
    return 10 * float(np.log10(signal / noise)) if noise else np.inf


def done(pass_: str, model: ir.Model, data: Feeds | None) -> tuple[ir.Model, Context]:
    work = model.clone()
    (step,) = Pipeline.of(pass_).run(work, Context(runner=OrtRunner(), data=data))
    verify(work)
    assert step.ledger.changes or step.ledger.skips or step.ledger.warnings
    ctx = Context()
    ctx.ledger = step.ledger
    return work, ctx


@pytest.mark.parametrize("pass_", PASSES)
def test_no_data(pass_: str) -> None:
    if pass_ in MEASURING:
        with pytest.raises(NeedsData, match="needs --data; none was given"):
            done(pass_, net(), None)
    else:
        work, _ = done(pass_, net(), None)
        assert sqnr(net(), work, feeds(4, 64)) > 30


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("kind", ["one", "equal", "constant", "zeros"])
def test_data_that_tell_little(pass_: str, kind: str) -> None:
    (given,) = feeds(1, 64, count=1)
    content = {"constant": 0.5, "zeros": 0.0}
    if kind in content:
        given = {"x": np.full_like(given["x"], content[kind])}
    data = [given] if kind == "one" else [given, given]
    work, ctx = done(pass_, net(), data)
    (wanted,), (found,) = (list(OrtRunner().run(model, data[:1])) for model in (net(), work))
    assert np.abs(found["v2"] - wanted["v2"]).max() <= 0.03 * np.abs(wanted["v2"]).max()
    words = ONE_SAMPLE if kind == "one" else ALIKE
    assert ctx.ledger.warnings == ([f"{words}."] if pass_ in MEASURING else [])


def test_samples_that_are_all_the_same_in_one_run_are_no_more() -> None:
    row = feeds(1, 64, count=1)[0]["x"]
    same, unlike = [{"x": np.repeat(row, 4, 0)}], [{"x": np.concatenate([row, 2 * row])}]
    assert done(MEASURING[0], net(), same)[1].ledger.warnings == [f"{ALIKE}."]
    assert done(MEASURING[0], net(), unlike)[1].ledger.warnings == []


def test_the_report_warns_of_one_sample() -> None:
    report = penjing.run(net(), "quantize-static", data=feeds(1, 64, count=1))
    assert report.warnings == [f"quantize-static: {ONE_SAMPLE}."]


def test_calibration_warns_of_one_sample() -> None:
    from penjing.runtime.feeds import read_feeds

    for data, words in ((feeds(1, 64, count=1), [f"{ONE_SAMPLE}."]), (feeds(1, 64), [])):
        found = calibrate_model(net(), read_feeds(data, net()))
        assert list(found.warnings) == words
        assert set(found.found) == {"x", "v0", "v1", "v2"}


@pytest.mark.parametrize("pass_", MEASURING)
@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_data_that_are_not_finite(pass_: str, bad: float, word: str) -> None:
    data = feeds(1, 64)
    data[2]["x"][0, 5] = bad
    match = f"The value 'x' holds {word} in .* 2.*leave such samples out, or put a finite number there"
    with pytest.raises(BadFeeds, match=match):
        done(pass_, net(), data)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("outlier", [1e4, 1e30])
def test_a_weight_with_one_huge_outlier(pass_: str, outlier: float) -> None:
    model, data = net(outlier=outlier), feeds(4, 64)
    work, ctx = done(pass_, model, data)
    if outlier > 1e10 and pass_ == "to-float16{mode=compute}":
        assert any("more than the 65504 of float16" in reason for reason in ctx.ledger.reasons())
    else:
        assert sqnr(model, work, data) > 20


@pytest.mark.parametrize(
    "before", ["quantize-static{target=any}", "quantize-dynamic", "quantize-weights", "to-float16"]
)
@pytest.mark.parametrize("pass_", PASSES)
def test_a_quantized_model(before: str, pass_: str) -> None:
    """Each pass takes what another has made, and says what it leaves."""
    model, data = net(), feeds(4, 64)
    once, _ = done(before, model, data)
    twice, _ = done(pass_, once, data)
    assert sqnr(model, twice, data) > 28


def unquantizable(kind: str) -> ir.Model:
    made = Net()
    shape: list[Any] = ["n", 64]
    if kind == "no float weights":
        made.op("Softmax", made.op("Exp", "x"))
    elif kind == "only normalizations":
        value = made.op("LayerNormalization", "x", made.weight(64, scale=1), made.weight(64, scale=1))
        made.op("LayerNormalization", value, made.weight(64, scale=1), made.weight(64, scale=1))
    elif kind == "zero sizes":
        made.op("MatMul", "x", made.weight(64, 0))
    else:
        info = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        graph = helper.make_graph([], "empty", [info], [info])
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    return made.model(shape)


@pytest.mark.parametrize("kind", ["no float weights", "only normalizations", "zero sizes", "empty"])
@pytest.mark.parametrize("pass_", PASSES)
def test_nothing_to_quantize(pass_: str, kind: str) -> None:
    model, data = unquantizable(kind), feeds(4, 64)
    if (kind, pass_) == ("zero sizes", "quantize-auto"):
        with pytest.raises(BadFeeds, match="nothing but empty outputs"):
            done(pass_, model, data)
        return
    work, _ = done(pass_, model, data)
    for wanted, found in zip(OrtRunner().run(model, data), OrtRunner().run(work, data), strict=True):
        for name in wanted:
            assert wanted[name].shape == found[name].shape
            np.testing.assert_allclose(found[name], wanted[name], atol=0.02)


def test_operators_without_a_kernel_are_named_and_counted() -> None:
    _, ctx = done("quantize-static", unquantizable("only normalizations"), feeds(4, 64))
    told = [skip.reason for skip in ctx.ledger.skips if skip.subject == "other operators"]
    assert told == ["ONNX Runtime has no integer kernels for them as they are: 2 LayerNormalization"]


def test_reasons_that_say_the_same_are_counted_together() -> None:
    """A name is the subject's: else a table of reasons has a line for each value."""
    made = Net()
    value = made.op("MatMul", made.op("Log", "x"), made.weight(64, 64))
    made.op("Concat", value, made.op("MatMul", made.op("Sqrt", "x"), made.weight(64, 64)), axis=1)
    _, ctx = done("quantize-static{target=any}", made.model([4, 64]), feeds(4, 64))
    assert max(ctx.ledger.reasons().values()) >= 3
    assert not any(f"'{name}'" in reason for name in ("v0", "v1", "v2") for reason in ctx.ledger.reasons())


def test_ranges_of_names_that_the_model_has_not(tmp_path: Any) -> None:
    path = tmp_path / "ranges.json"
    path.write_text('{"format": 1, "values": {"x": {"low": -4, "high": 4}, "v11": {"low": 0, "high": 6}}}')
    pass_ = "quantize-static{target=any ranges='" + str(path) + "'}"
    _, ctx = done(pass_, net(), None)
    (warning,) = ctx.ledger.warnings
    assert "has a range for 'v11', which the model does not have. Did you mean 'v1'?" in warning
    assert "the ranges file has no range for an activation" in ctx.ledger.reasons()


def test_ranges_of_the_model_as_it_came_are_no_strangers(tmp_path: Any) -> None:
    """Clean takes values out that were calibrated."""
    from penjing.passes.quantize.ranges import write_ranges
    from penjing.runtime.feeds import read_feeds

    made = Net()
    value = made.op("Gemm", made.op("Identity", "x"), made.weight(64, 64), made.weight(64, scale=1))
    made.op("Softsign", value)
    model, data = made.model([4, 64]), feeds(4, 64)
    path = tmp_path / "ranges.json"
    write_ranges(path, calibrate_model(model, read_feeds(data, model)).found)
    work, ctx = done("quantize-static{target=any ranges='" + str(path) + "'}", model, None)
    assert ctx.ledger.warnings == []
    assert sqnr(model, work, data) > 30


def test_half_precision_interfaces_are_checked() -> None:
    """The check gives the model its data in the types that it takes now."""
    for passes in ("to-float16{mode=compute io=float16}", "to-float16{mode=compute io=float16},clean"):
        model = net()
        report = penjing.run(model, passes, data=feeds(4, 64), check="each")
        assert model.graph.inputs[0].dtype is ir.DataType.FLOAT16
        assert report.check.comparison is not None
        assert 0 < report.check.comparison.max_error < 0.01
        (found,) = OrtRunner().run(model, [{"x": np.zeros((1, 64), np.float16)}])
        assert found["v2"].dtype == np.float16
