"""Ensembles: what each combination computes, members that differ, fitted weights, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from merging import merged, refused

from penjing.cli import main
from penjing.ir.files import load, save
from penjing.models import zoo
from penjing.passes.merge.fits import linear_layer, on_simplex
from penjing.runtime.report import Report
from penjing.runtime.run import run
from penjing.runtime.session import open_session, run_feed

MODELS = Path(__file__).parents[1] / "models"
Parse = Callable[[str], ir.Model]

A = "a (float[N,2] x) => (float[N,3] y) <float[2,3] w = {1,-2,3,-1,2,0.5}> { y = MatMul(x, w) }"
B = A.replace("1,-2,3", "0.3,1,-1")
C = A.replace("1,-2,3", "-0.7,2,2")
X = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)


def said(report: Report) -> list[str]:
    ledger = report.passes[-1].ledger
    return [f"{one.subject}: {one.what}" for one in ledger.changes] + [f"{s.subject}: {s.reason}" for s in ledger.skips]


def members(parse: Parse) -> list[np.ndarray[Any, Any]]:
    return [run_feed(open_session(parse(text), level="off"), {"x": X})["y"] for text in (A, B, C)]


def softmax(array: Any) -> Any:
    raised = np.exp(array - array.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def ensemble(parse: Parse, options: str) -> dict[str, Any]:
    model = parse(A)
    merged(model, f"ensemble{{with=(b, c) {options}}}", b=parse(B), c=parse(C))
    return run_feed(open_session(model, level="off"), {"x": X})


def test_exact_combinations_to_the_bit(parse: Parse) -> None:
    a, b, c = members(parse)
    third, w = np.float32(1 / 3), np.array([0.5, 0.3, 0.2], np.float32)
    two, one = np.float32(2), np.float32(1)
    for options, wanted in {
        "": (a + b + c) * third,
        "combine=sum": a + b + c,
        "combine=median": np.median(np.stack([a, b, c]), axis=0),
        "combine=min": np.minimum(np.minimum(a, b), c),
        "combine=max": np.maximum(np.maximum(a, b), c),
        "combine=weighted weights=(0.5, 0.3, 0.2)": (w[0] * a + w[1] * b) + w[2] * c,
        "combine=weighted weights=(2, 1, 1) normalize=true": (two * a + one * b + one * c) / np.float32(4),
    }.items():
        np.testing.assert_array_equal(ensemble(parse, options)["y"], wanted, err_msg=options)


def test_votes_and_the_geometric_mean(parse: Parse) -> None:
    each = members(parse)
    soft = sum(map(softmax, each)) / 3
    np.testing.assert_allclose(ensemble(parse, "combine=soft-vote")["y"], soft, rtol=1e-5)
    logs = np.exp(sum(np.log(softmax(one)) for one in each) / 3)
    np.testing.assert_allclose(ensemble(parse, "combine=geometric")["y"], logs, rtol=1e-5)
    found = ensemble(parse, "combine=hard-vote")
    votes = sum(np.eye(3, dtype=np.float32)[one.argmax(1)] for one in each)
    np.testing.assert_array_equal(found["y"], votes * np.float32(1 / 3))
    np.testing.assert_array_equal(found["label"], votes.argmax(1))
    assert found["label"].dtype == np.int64


def test_ties_go_to_the_lowest_index(parse: Parse) -> None:
    one = "m (float[N,3] x) => (float[N,3] y) { y = Identity(x) }"
    other = "m (float[N,3] x) => (float[N,3] y) { y = Neg(x) }"
    model = parse(one)
    merged(model, "ensemble{with=b combine=hard-vote}", b=parse(other))
    feed = np.array([[0, 1, 2], [2, 1, 0], [1, 1, 1]], np.float32)
    assert run_feed(open_session(model), {"x": feed})["label"].tolist() == [0, 0, 0]


def test_softmax_is_added_to_logits_only(parse: Parse) -> None:
    made = B.replace("y = MatMul(x, w)", "h = MatMul(x, w) y = Softmax(h)")
    model = parse(A)
    report = merged(model, "ensemble{with=b combine=soft-vote}", b=parse(made))
    assert [node.op_type for node in model.graph].count("Softmax") == 2
    assert "model/y: softmax added, for the output is taken for logits" in said(report)
    assert not any(line.startswith("b/y: softmax") for line in said(report))
    model = parse(A)
    report = merged(model, "ensemble{with=b}", b=parse(made))
    assert "combine=soft-vote brings them to one scale" in report.passes[0].ledger.warnings[0]


def test_median_of_an_even_number_and_of_many(parse: Parse) -> None:
    for count in (2, 4, 5):
        texts = [A.replace("1,-2,3", f"{number},-{number},0.{number}") for number in range(1, count + 1)]
        each = [run_feed(open_session(parse(text), level="off"), {"x": X})["y"] for text in texts]
        model = parse(texts[0])
        names = "bcde"[: count - 1]
        merged(
            model,
            f"ensemble{{with=({', '.join(names)}) combine=median}}",
            **dict(zip(names, map(parse, texts[1:]), strict=True)),
        )
        wanted = np.median(np.stack(each), axis=0)
        np.testing.assert_array_equal(run_feed(open_session(model, level="off"), {"x": X})["y"], wanted)


def test_members_that_differ() -> None:
    """Input names, layout, batch, opset, IR version, class order."""
    source = '<ir_version: {}, opset_import: ["": {}]> '
    a = source.format(10, 17) + (
        "a (float[N,3,4,4] image) => (float[N,3] y) { p = GlobalAveragePool(image) y = Flatten(p) }"
    )
    b = source.format(7, 11) + (
        "b (float[2,4,4,3] pixels) => (float[2,3] out) { t = Transpose<perm=[0,3,1,2]>(pixels) "
        "m = GlobalMaxPool(t) out = Flatten(m) }"
    )
    model, other = ir.from_onnx_text(a), ir.from_onnx_text(b)
    report = merged(model, "ensemble{with=b adapt=transpose classes='b=2 0 1'}", b=other)
    lines = said(report)
    assert "b/pixels: reads the input 'image' of model, transposed by [0, 2, 3, 1]" in lines
    assert "b: raised from opset 11 to 17" in lines
    assert "b: its classes are taken in the order 2, 0, 1" in lines
    image = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    found = run_feed(open_session(model), {"image": image})["y"]
    wanted = (image.mean((2, 3)) + image.max((2, 3))[:, [2, 0, 1]]) / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_inputs_mapped(parse: Parse) -> None:
    one = "m (float[N] x, float[N] u) => (float[N] y) { y = Sub(x, u) }"
    other = "m (float[N] p, float[N] q) => (float[N] z) { z = Sub(p, q) }"
    model = parse(one)
    merged(model, "ensemble{with=b map=('u=b/p', 'x=b/q') combine=sum}", b=parse(other))
    feed = {"x": np.array([3], np.float32), "u": np.array([1], np.float32)}
    assert run_feed(open_session(model), feed)["y"].tolist() == [0]
    assert "Did you mean 'b/p'" in refused(parse(one), "ensemble{with=b map='x=b/pp'}", b=parse(other))
    assert "must be INPUT=MEMBER/INPUT" in refused(parse(one), "ensemble{with=b map=x}", b=parse(other))
    assert "twice" in refused(parse(one), "ensemble{with=b map=('x=b/p', 'u=b/p')}", b=parse(other))


CLASSIFIER = """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
m (float[N,2] x) => (string[N] label, seq(map(string, float)) maps) {
 label, scores = ai.onnx.ml.LinearClassifier <classlabels_strings=["a","b","c"],
  coefficients=[1.0,2.0,-1.0,0.5,0.3,-2.0], intercepts=[0.0,0.1,0.2], multi_class=1, post_transform="SOFTMAX"> (x)
 p = ai.onnx.ml.Normalizer <norm="L1"> (scores)
 maps = ai.onnx.ml.ZipMap <classlabels_strings=["a","b","c"]> (p) }"""


def test_classifiers_with_maps_and_names_of_classes(parse: Parse) -> None:
    """As skl2onnx writes them: a label and a ZipMap; classes in another order; beside a network."""
    weight = np.array([[1, 2], [-1, 0.5], [0.3, -2]], np.float32)
    one = softmax(X @ weight.T + np.array([0, 0.1, 0.2], np.float32))
    other = ir.from_onnx_text(CLASSIFIER.replace('"a","b","c"', '"c","a","b"'))
    model = ir.from_onnx_text(CLASSIFIER)
    report = merged(model, "ensemble{with=b combine=soft-vote}", b=other)
    assert "b: its classes are taken in the order of model" in said(report)
    assert [value.name for value in model.graph.outputs] == ["label", "maps"]
    assert "model/maps: the tensor before its ZipMap is taken" in said(report)
    wanted = (one + one[:, [1, 2, 0]]) / 2
    np.testing.assert_allclose(run_feed(open_session(model), {"x": X})["maps"], wanted, rtol=1e-4)
    model = parse(A)
    merged(model, "ensemble{with=b combine=soft-vote}", b=ir.from_onnx_text(CLASSIFIER))
    network = softmax(run_feed(open_session(parse(A)), {"x": X})["y"])
    np.testing.assert_allclose(run_feed(open_session(model), {"x": X})["y"], (network + one) / 2, rtol=1e-4)
    model = ir.from_onnx_text(CLASSIFIER)
    merged(model, "ensemble{with=b combine=hard-vote}", b=other)
    found = run_feed(open_session(model), {"x": X})["label"].tolist()
    votes = np.eye(3)[one.argmax(1)] + np.eye(3)[one[:, [1, 2, 0]].argmax(1)]
    assert found == ["abc"[place] for place in votes.argmax(1)]
    foreign = ir.from_onnx_text(CLASSIFIER.replace('"a","b","c"', '"a","b","d"'))
    assert "they must be the same" in refused(ir.from_onnx_text(CLASSIFIER), "ensemble{with=b}", b=foreign)


def test_a_source_model_with_a_correction(parse: Parse) -> None:
    model = parse(A)
    correction = parse("d (float[N,2] x) => (float[N,3] dy) <float[2,3] v = {0.1,0,0,0,0,0.1}> { dy = MatMul(x, v) }")
    merged(model, "ensemble{with=d combine=sum}", d=correction)
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_one_model_many_times_holds_its_weights_once(tmp_path: Path) -> None:
    model = load(MODELS / "mlp.onnx")
    report = merged(model, "ensemble{with=(b, b, b)}", b=load(MODELS / "mlp.onnx"))
    assert "b: all of it is computed once with an equal branch before it" in said(report)
    save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < (MODELS / "mlp.onnx").stat().st_size + 65536


def test_several_outputs_and_those_left_out(parse: Parse) -> None:
    two = "m (float[N] x) => (float[N] y, float[N] z) { y = Exp(x) z = Neg(x) }"
    other = two.replace("Exp", "Sin")
    model = parse(two)
    merged(model, "ensemble{with=b}", b=parse(other))
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    model = parse(two)
    report = merged(model, "ensemble{with=b outputs=y}", b=parse(other))
    assert "b/z: output left out of the ensemble" in said(report)
    assert "Did you mean 'y'" in refused(parse(two), "ensemble{with=b outputs=yy}", b=parse(other))


def test_bundled_models_reach_the_bars() -> None:
    """The two CNN seeds, the MLP and the ViT: fitted on the 300 validation images, judged on the 1,000 test images."""
    names, test, fit = ("mlp", "cnn-a", "cnn-b", "vit"), zoo.data("test"), zoo.data("validation")
    each = {
        name: run_feed(open_session(zoo.load(name)), {"image": test["image"]})["logits"].argmax(1) for name in names
    }
    best = max(float((one == test["labels"]).mean()) for one in each.values())
    found = {}
    for options in ("mean", "weighted", "hard-vote", "soft-vote", "stack"):
        model = zoo.load("mlp")
        partners = {name: zoo.load(name) for name in names[1:]}
        text = f"ensemble{{with=(cnn-a, cnn-b, vit) combine={options}}}"
        fitted = options in ("weighted", "stack")
        run(
            model,
            text,
            models=partners,
            data={"image": fit["image"]} if fitted else None,
            labels=fit["labels"] if fitted else None,
            check="off",
        )
        scores = run_feed(open_session(model), {"image": test["image"]})["logits"]
        found[options] = float((scores.argmax(1) == test["labels"]).mean())
    assert found["mean"] >= best - 0.0021
    assert found["weighted"] >= found["mean"] - 0.003
    assert min(found["hard-vote"], found["soft-vote"], found["stack"]) >= best - 0.0051


def test_fitted_weights_sum_to_one_and_choose_the_better() -> None:
    labels = np.arange(300) % 3
    rng = np.random.default_rng(0)
    good = np.eye(3)[labels] * 3 + rng.normal(size=(300, 3))
    noise = rng.normal(size=(300, 3)) * 3
    weights, loss = on_simplex([good, noise], labels, probabilities=False)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert weights[0] > 0.9
    assert min(weights) >= 0
    near = [on_loss([good, noise], labels, (one, 1 - one)) for one in np.linspace(0, 1, 101)]
    assert loss <= min(near) + 1e-5


def on_loss(scores: Any, labels: Any, weights: Any) -> float:
    mixed = softmax(sum(w * s for w, s in zip(weights, scores, strict=True)))
    return float(-np.log(mixed[np.arange(len(labels)), labels]).mean())


def test_solvers_of_the_stack() -> None:
    labels = np.arange(300) % 3
    rng = np.random.default_rng(0)
    scores = [np.eye(3)[(labels + 1) % 3] * 3 + rng.normal(size=(300, 3)), rng.normal(size=(300, 3))]
    for solver in ("least-squares", "logistic"):
        if solver == "logistic":
            pytest.importorskip("sklearn")
        weight, bias = linear_layer(scores, labels, 3, solver)  # type: ignore[arg-type]
        assert (weight.shape, bias.shape) == ((3, 6), (3,))
        right = ((np.concatenate(scores, 1) @ weight.T + bias).argmax(1) == labels).mean()
        assert right > 0.9, solver


def test_bad_weights(parse: Parse) -> None:
    for options, words in {
        "weights=(0.5, 0.5)": "combine=mean takes none",
        "combine=weighted weights=(0.5, 0.3, 0.2)": "2 models take as many weights; given: 3",
        "combine=weighted weights=(0.5, 0.6)": "the weights sum to 1.1, not to one",
        "combine=weighted weights=(1.5, -0.5)": "must be numbers of zero or more",
        "combine=weighted weights=(0, 0) normalize=true": "all zero",
        "combine=weighted weights=(nan, 1)": "is not valid",
        "combine=stack": "needs --data",
        "combine=weighted": "needs --data",
        "solver=logistic": "solver is for combine=stack",
        "normalize=true": "give weights, or leave it out",
        "combine=avg": "is not valid",
        "classes='b=0 0 1' combine=hard-vote": "each once",
        "classes='q=0 1 2' combine=hard-vote": "no member is called 'q'",
        "axis=4 combine=hard-vote": "the classes must lie along axis 4",
    }.items():
        assert words in refused(parse(A), f"ensemble{{with=b {options}}}", b=parse(B)), options


def test_bad_labels(parse: Parse) -> None:
    text, data = "ensemble{with=b combine=weighted}", {"x": X}
    for labels, words in {
        None: "needs --labels, or an array 'labels' in the .npz of the data",
        (0, 1): "The labels are 2",
        (0, 1, 2, 0, 1, 2, 3): "the label 3 is none of the classes 0 to 2",
    }.items():
        assert words in refused(parse(A), text, data, None if labels is None else list(labels), b=parse(B))


def test_bad_members(parse: Parse) -> None:
    assert "name them" in refused(parse(A), "ensemble")
    wide = parse(A.replace("[N,3]", "[N,4]").replace("[2,3]", "[2,4]").replace("0.5}", "0.5,1,1}"))
    assert "dimension 1 is 3 in one and 4 in the other" in refused(parse(A), "ensemble{with=b}", b=wide)
    whole = parse("b (float[N,2] x) => (int64[N,2] y) { y = Cast<to=7>(x) }")
    assert "float tensors can be combined" in refused(parse(A), "ensemble{with=b}", b=whole)
    more = parse("b (float[N,2] x, float[N,2] u) => (float[N,2] y) { y = Add(x, u) }")
    assert "has no input for 'u'" in refused(parse(A), "ensemble{with=b}", b=more)
    moved = parse("b (float[N,2,1] x) => (float[N,2,1] y) { y = Neg(x) }")
    assert "An adapter may stand between" in refused(parse(A), "ensemble{with=b}", b=moved)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    paths = [str(MODELS / f"{name}.onnx") for name in ("mlp", "mlp")]
    out = str(tmp_path / "out.onnx")

    def penjing(*extra: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main(["ensemble", *paths, "-o", out, "--force", *extra])
        printed = capsys.readouterr()
        return int(done.value.code or 0), printed.out + printed.err

    code, text = penjing("--combine", "weighted", "--weights", "0.5,0.5")
    assert code == 0, text
    assert "computed once with an equal" in text
    for words, extra in {
        "nothing to fit": ("--fit", "x.npz"),
        "is fitted to data": ("--combine", "stack"),
        "is no number": ("--combine", "weighted", "--weights", "a,b"),
        "nothing.npz is not there": ("--combine", "weighted", "--fit", str(MODELS / "nothing.npz")),
    }.items():
        code, text = penjing(*extra)
        assert code, text
        assert words in " ".join(text.split()), text
    fit = MODELS / "mnist-validation.npz"
    code, text = penjing("--combine", "weighted", "--fit", str(fit))  # with the labels in it
    assert code == 0, text
    assert "weights fitted on 300 samples" in text
    np.savez(tmp_path / "bare.npz", image=np.load(fit)["image"])
    code, text = penjing("--combine", "weighted", "--fit", str(tmp_path / "bare.npz"))
    assert code, text
    assert "needs --labels, or an array 'labels' in the .npz" in " ".join(text.split())
