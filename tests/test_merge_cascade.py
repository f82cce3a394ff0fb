"""Cascades: which rows go on, by sample and by batch, fitted thresholds, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from merging import merged, refused

from penjing.cli import main
from penjing.ir.files import load
from penjing.models import zoo
from penjing.passes.merge.thresholds import least_threshold
from penjing.runtime.run import run
from penjing.runtime.session import open_session, run_feed

MODELS = Path(__file__).parents[1] / "models"
Parse = Callable[[str], ir.Model]

SMALL = "s (float[N,3] x) => (float[N,3] y) { y = Identity(x) }"
BIG = "b (float[N,3] x) => (float[N,3] y) { h = Exp(x) y = Neg(h) }"
X = np.array([[5, 0, 0], [1, 1, 0.9], [0, 4, 0], [0.3, 0.2, 0.1], [0, 0, 9]], np.float32)


def answers(model: ir.Model, x: Any = X) -> Any:
    return run_feed(open_session(model), {"x": x})["y"]


def softmax(array: Any) -> Any:
    raised = np.exp(array - array.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def test_unsure_rows_go_on(parse: Parse) -> None:
    chances = softmax(X.astype(np.float64))
    top = np.sort(chances, axis=1)
    for kind, sure, threshold in (
        ("max-prob", top[:, -1], 0.6),
        ("margin", top[:, -1] - top[:, -2], 0.5),
        ("entropy", (chances * np.log(chances)).sum(1), -0.7),
    ):
        model = parse(SMALL)
        report = merged(model, f"cascade{{with=big confidence={kind} threshold={threshold}}}", {"x": X}, big=parse(BIG))
        unsure = sure < threshold
        assert unsure.tolist() == [False, True, False, True, False]
        np.testing.assert_allclose(answers(model), np.where(unsure[:, None], -np.exp(X), X), rtol=1e-6)
        (told, *_) = report.passes[0].ledger.changes
        assert told.what.startswith("60.0% of the samples stop early")
        assert told.numbers["stop_early"] == pytest.approx(0.6)


def test_no_row_and_every_row(parse: Parse) -> None:
    for threshold, wanted in ((0.1, X), (1.001, -np.exp(X))):  # what a fit sets where all have to go on
        model = parse(SMALL)
        merged(model, f"cascade{{with=big threshold={threshold}}}", {"x": X}, big=parse(BIG))
        np.testing.assert_allclose(answers(model), wanted, rtol=1e-6)
        assert answers(model, X[:0]).shape == (0, 3)
        np.testing.assert_allclose(answers(model, X[:1]), wanted[:1], rtol=1e-6)


def test_what_is_not_a_number_goes_on(parse: Parse) -> None:
    model = parse(SMALL)
    constant = parse("b (float[N,3] x) => (float[N,3] y) { s = Shape(x) y = ConstantOfShape(s) }")
    merged(model, "cascade{with=big threshold=0.6}", {"x": X}, big=constant)
    assert answers(model, np.full((1, 3), np.nan, np.float32)).tolist() == [[0, 0, 0]]


def test_by_batch(parse: Parse) -> None:
    model = parse(SMALL)
    merged(model, "cascade{with=big threshold=0.6 route=batch}", {"x": X}, big=parse(BIG))
    np.testing.assert_allclose(answers(model), -np.exp(X), rtol=1e-6)
    np.testing.assert_array_equal(answers(model, X[[0, 2, 4]]), X[[0, 2, 4]])


def test_a_fixed_batch_is_routed_as_one(parse: Parse) -> None:
    small, big = SMALL.replace("[N", "[2"), BIG.replace("[N", "[2")
    model = parse(small)
    merged(model, "cascade{with=big threshold=0.6}", big=parse(big))
    assert "ScatterND" not in [node.op_type for node in model.graph.all_nodes()]
    np.testing.assert_array_equal(answers(model, X[[0, 2]]), X[[0, 2]])
    np.testing.assert_allclose(answers(model, X[[0, 1]]), -np.exp(X[[0, 1]]), rtol=1e-6)
    assert "route=sample needs a symbolic batch" in refused(
        parse(small), "cascade{with=big threshold=0.6 route=sample}", big=parse(big)
    )


def test_probabilities_get_no_softmax(parse: Parse) -> None:
    """Also zeros, whose logarithm is infinite."""
    small = """s (float[N,3] x) => (float[N,3] y) {
 t = Constant<value_floats=[0.0,0.0,200.0]>() h = Add(x,t) y = Softmax(h) }"""
    for kind, threshold in (("max-prob", 0), ("entropy", -0.1)):
        model = parse(small)
        merged(model, f"cascade{{with=big confidence={kind} threshold={threshold}}}", {"x": X}, big=parse(BIG))
        assert [node.op_type for node in model.graph].count("Softmax") == 1
        assert answers(model)[:, 2].tolist() == [1] * 5


def test_names_opsets_and_several_outputs(parse: Parse) -> None:
    source = '<ir_version: 8, opset_import: ["": {}]> '
    small = ir.from_onnx_text(
        source.format(11) + "s (float[N,3] x) => (float[N,3] y, float[N,3] z) { y = Identity(x) z = Neg(x) }"
    )
    big = ir.from_onnx_text(
        source.format(17) + "b (float[M,3] in) => (float[M,3] p, float[M,3] q) { p = Exp(in) q = Abs(in) }"
    )
    merged(small, "cascade{with=big threshold=0.6}", {"x": X}, big=big)
    assert [value.name for value in small.graph.inputs] == ["x"]
    found = run_feed(open_session(small), {"x": X})
    np.testing.assert_array_equal(found["z"], np.where([[False], [True], [False], [True], [False]], np.abs(X), -X))


def test_a_big_model_with_bodies_and_shared_weights(parse: Parse) -> None:
    """Captured values, weights that both read, and an inner name that both have."""
    small = "s (float[N,3] x) => (float[N,3] y) <float[3,3] w = {1,0,0,0,1,0,0,0,1}> { y = MatMul(x, w) }"
    big = """b (float[N,3] x) => (float[N,3] y) <float[3,3] w = {1,0,0,0,1,0,0,0,1}, bool c = {1}> {
 h = MatMul(x, w) y = If (c) <then_branch = t () => (float[N,3] a) { a = Sub(h, x) },
 else_branch = e () => (float[N,3] b) { b = Identity(x) }> }"""
    model = parse(small)
    merged(model, "cascade{with=big threshold=0.6}", {"x": X}, big=parse(big))
    unsure = np.array([[False], [True], [False], [True], [False]])
    np.testing.assert_allclose(answers(model), np.where(unsure, 0, X), atol=1e-6)


@pytest.mark.parametrize("confidence", ["max-prob", "margin", "entropy"])
@pytest.mark.parametrize("name", ["cnn-a", "cnn-b"])
def test_bundled_models_reach_the_bar(name: str, confidence: str) -> None:
    """MLP to CNN, fitted on the 300 validation images: within 0.003 on the 1,000 test images, 25 % at most go on."""
    fit, test = zoo.data("validation"), zoo.data("test")
    model, big = zoo.load("mlp"), zoo.load(name)
    wanted = run_feed(open_session(big), {"image": test["image"]})["logits"].argmax(1) == test["labels"]
    small = np.sort(softmax(run_feed(open_session(model), {"image": test["image"]})["logits"]), axis=1)
    text = f"cascade{{with=big max-drop=0.003 confidence={confidence}}}"
    report = merged(model, text, {"image": fit["image"]}, fit["labels"], big=big)
    found = run_feed(open_session(model), {"image": test["image"]})["logits"].argmax(1) == test["labels"]
    assert found.mean() >= wanted.mean() - 0.003
    threshold = report.passes[0].ledger.changes[0].numbers["threshold"]
    sure = {
        "max-prob": small[:, -1],
        "margin": small[:, -1] - small[:, -2],
        "entropy": (small * np.log(small)).sum(axis=1),
    }
    assert (sure[confidence] < threshold).mean() <= 0.25


def test_weights_of_the_big_model_lie_with_its_nodes() -> None:
    """Elsewhere ONNX Runtime does not lay them out for its faster convolutions."""
    model = load(MODELS / "mlp.onnx")
    run(model, "cascade{with=big threshold=0.9}", models={"big": load(MODELS / "cnn-a.onnx")}, check="off")
    (choice,) = [node for node in model.graph if node.op_type == "If"]
    branch = choice.attributes["then_branch"].as_graph()
    convolutions = [node for node in branch if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.name in branch.initializers


def test_thresholds() -> None:
    sure = np.linspace(0, 1, 1001)
    wrong = sure < 0.2
    small, big = ~wrong, np.full(1001, True)
    assert least_threshold(sure, small, big, 0.01) == pytest.approx(0.2, abs=0.02)  # with the share that the curve adds
    assert least_threshold(sure, big, big, 0.01) < 0  # the small one is never wrong
    assert least_threshold(sure, ~big, big, 0.01) > 0.98  # it is always wrong
    assert least_threshold(np.full(9, 0.5), ~big[:9], big[:9], 0.01) > 0.5  # and says nothing of it


def test_a_threshold_lies_between_the_same_samples_whatever_the_scale_of_the_confidence() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 400)
    small = rng.uniform(0.5, 1, 400) < sure**0.1
    big = np.full(400, True)
    found = [int((one < least_threshold(one, small, big, 0.01)).sum()) for one in (sure, -np.log(1 - sure), sure**9)]
    assert 0 < found[0] < 400
    assert len(set(found)) == 1


def test_bad_input(parse: Parse) -> None:
    for options, words in {
        "with=big": "needs --data",
        "with=(big, big) threshold=0.5": "one model stands behind the first",
        "with=big threshold=nan": "is not valid",
        "with=big threshold=1.5": "threshold=1.5 is out of range; by confidence=max-prob it is from 0 to 1.",
        "with=big threshold=-0.5": "it is from 0 to 1",
        "with=big confidence=margin threshold=2": "by confidence=margin it is from 0 to 1",
        "with=big confidence=entropy threshold=0.5": "it is at most 0, for the entropy is negated: write -0.5",
        "with=big max-drop=1": "is a share of the samples",
        "with=big threshold=0.5 max-drop=0.1": "leave one out",
        "with=big threshold=0.5 scores=yy": "Did you mean 'y'",
        "with=big threshold=0.5 map='x=big/z'": "there is no input 'big/z'",
        "threshold=0.5": "name them",
    }.items():
        assert words in refused(parse(SMALL), f"cascade{{{options}}}", big=parse(BIG)), options
    data = {"x": X}
    assert "needs --labels" in refused(parse(SMALL), "cascade{with=big}", data, big=parse(BIG))
    assert "the label 7 is none" in refused(parse(SMALL), "cascade{with=big}", data, [0, 1, 7, 0, 1], big=parse(BIG))
    wide = parse(
        BIG.replace("(float[N,3] y)", "(float[N,4] y)").replace(
            "y = Neg(h)", "p = Constant<value_ints=[0,0,0,1]>() y = Pad(h, p)"
        )
    )
    assert "is 3 in one and 4 in the other" in refused(parse(SMALL), "cascade{with=big threshold=0.5}", big=wide)
    single = "s (float[N,1] x) => (float[N,1] y) { y = Neg(x) }"
    assert "there must be two or more" in refused(parse(single), "cascade{with=big threshold=0.5}", big=parse(single))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(MODELS / f"{name}.onnx") for name in ("mlp", "cnn-a")]

    def penjing(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main(["cascade", *arguments, "-o", str(tmp_path / "out.onnx"), "--force"])
        printed = capsys.readouterr()
        return int(done.value.code or 0), " ".join((printed.out + printed.err).split())

    code, text = penjing(*paths, "--threshold", "0.9", "--confidence", "margin")
    assert code == 0, text
    assert "confidence=margin" in text
    for words, arguments in {
        "Give --threshold T": paths,
        "not both": [*paths, "--threshold", "0.5", "--fit", "x.npz"],
        "takes two models": [*paths, paths[0], "--threshold", "0.5"],
        "merges two models or more": [paths[0], "--threshold", "0.5"],
        "is negated: write -0.5": [*paths, "--threshold", "0.5", "--confidence", "entropy"],
    }.items():
        code, text = penjing(*arguments)
        assert code, text
        assert words in text
    code, text = penjing(*paths, "--fit", str(MODELS / "mnist-validation.npz"))  # with the labels in it
    assert code == 0, text
    assert "of the samples stop early" in text


def test_the_big_model_takes_another_layout_under_another_name(parse: Parse) -> None:
    """By rows: what goes on is picked before it is transposed and cast."""
    small = "s (float[N,2,3] x) => (float[N,3] y) { a = Constant<value_ints=[1]>() y = ReduceMax<keepdims=0>(x, a) }"
    small = small.replace("ReduceMax<keepdims=0>(x, a)", "ReduceSum<keepdims=0>(x, a)")
    big = """b (double[M,3,2] data) => (float[M,3] out) {
 a = Constant<value_ints=[2]>() h = ReduceSum<keepdims=0>(data, a) n = Neg(h) out = Cast<to=1>(n) }"""
    x = np.stack([X, np.zeros_like(X)], axis=1)
    model = parse(small)
    assert "An adapter may stand between" in refused(model.clone(), "cascade{with=big threshold=0.6}", big=parse(big))
    text = "cascade{with=big threshold=0.6 map='x=big/data' adapt=(cast, transpose)}"
    report = merged(model, text, {"x": x}, big=parse(big))
    unsure = np.array([[False], [True], [False], [True], [False]])
    np.testing.assert_allclose(answers(model, x), np.where(unsure, -X, X), rtol=1e-6)
    (choice,) = [node for node in model.graph if node.op_type == "If"]
    assert "Transpose" not in [node.op_type for node in model.graph]
    assert [node.op_type for node in choice.attributes["then_branch"].as_graph()].count("Transpose") == 2
    told = [change.what for change in report.passes[0].ledger.changes if change.subject == "big/data"]
    assert told == ["reads the input 'x' of model, cast from float32 to float64, transposed by [0, 2, 1]"]


def test_old_opsets_are_raised_to_what_is_needed(parse: Parse) -> None:
    del parse
    source = '<ir_version: 7, opset_import: ["": 9]> '
    small, big = (ir.from_onnx_text(source + text) for text in (SMALL, BIG))
    merged(small, "cascade{with=big threshold=0.6}", {"x": X}, big=big)
    assert small.opset_imports[""] == 13
