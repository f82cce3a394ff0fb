"""Classifiers and regressors of scikit-learn, as skl2onnx writes them, in ensembles and cascades with others."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from merging import merged, refused
from skl2onnx import to_onnx
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    AdaBoostClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from penjing.ir.join import Member
from penjing.passes.merge.classifiers import classifier, gives_probabilities
from penjing.runtime.report import Report
from penjing.runtime.session import open_session, run_feed

Array = np.ndarray[Any, Any]

DATA, TRUE = load_iris(return_X_y=True)
X = DATA.astype(np.float32)
NAMES = np.array(["setosa", "versicolor", "virginica"])
OTHERS = np.array(["b", "c", "a"])  # sorted by scikit-learn: the same three in another order
KINDS = {
    "logistic": LogisticRegression(max_iter=500),
    "pipeline": make_pipeline(StandardScaler(), LogisticRegression()),
    "forest": RandomForestClassifier(5, random_state=0),
    "boosted": GradientBoostingClassifier(n_estimators=5, random_state=0),
    "svc": SVC(probability=True, random_state=0),
    "network": MLPClassifier((8,), max_iter=50, random_state=0),
    "neighbours": KNeighborsClassifier(),
    "bayes": GaussianNB(),
    "stages": AdaBoostClassifier(n_estimators=3, random_state=0),
    "gradient": SGDClassifier(loss="log_loss", random_state=0),
    "scores-svc": SVC(random_state=0),
    "scores-linear": LinearSVC(random_state=0),
}
EMBEDDED = """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
m (float[N,4] x) => (string[N] label, float[N,3] sc, float[N,3] raw, float[N,3] xyz, float[N,3] mixed)
<float[4,3] w = {1,-2,3,-1,2,0.5,0,1,-1,0.1,-0.2,0.3}, float[3,3] v = {1,2,3,4,5,6,7,8,10}> {
 label, raw = ai.onnx.ml.LinearClassifier <classlabels_strings=[NAMES], intercepts=[0.0,0.1,0.2],
  coefficients=[1.0,2.0,-1.0,0.5,0.3,-2.0,0.1,0.2,0.3,-0.4,0.5,0.6]> (x)
 sc = Softmax(raw)
 xyz = MatMul(x, w)
 mixed = MatMul(sc, v) }"""
NETWORK = """<ir_version: 8, opset_import: ["": 17]>
m (float[N,4] x) => (float[N,3] logits) <float[4,3] w = {1,-2,3,-1,2,0.5,0,1,-1,0.1,-0.2,0.3}> {
 logits = MatMul(x, w) }"""


@functools.cache
def trained(kind: str, words: tuple[str, ...] | tuple[int, ...] | None) -> Any:
    labels = TRUE if words is None else np.array(words)[TRUE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clone(KINDS[kind]).fit(X, labels)


@functools.cache
def written(kind: str, words: tuple[str, ...] | tuple[int, ...] | None, zipmap: bool) -> bytes:
    found = trained(kind, words)
    given = None if zipmap or kind == "scores-linear" else {id(found): {"zipmap": False}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bytes(to_onnx(found, X[:1], options=given).SerializeToString())


def model(kind: str, words: Any = None, *, zipmap: bool = True) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(written(kind, None if words is None else tuple(words), zipmap)))


def chances(kind: str, words: Any = None) -> Array:
    """What scikit-learn says, classes in its own order."""
    return np.asarray(trained(kind, None if words is None else tuple(words)).predict_proba(X))


def outputs(merged: ir.Model) -> dict[str, Any]:
    return run_feed(open_session(merged), {merged.graph.inputs[0].name or "": X})


def said(report: Report) -> list[str]:
    return [f"{one.subject}: {one.what}" for one in report.passes[-1].ledger.changes]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_of_a_classifier(kind: str) -> None:
    for words in (None, (2, 7, 12), NAMES):
        for zipmap in (True, False):
            found = classifier(Member("m", model(kind, words, zipmap=zipmap)))
            label, scores = found.member.model.graph.outputs
            assert found.classes(scores.name or "") == tuple([0, 1, 2] if words is None else words)
            assert scores.dtype == ir.DataType.FLOAT
            assert label.dtype == (ir.DataType.STRING if words is NAMES else ir.DataType.INT64)
            assert gives_probabilities(scores) == (not kind.startswith("scores")), (kind, words, zipmap)


@pytest.mark.parametrize("zipmap", [True, False])
@pytest.mark.parametrize("words", [None, (2, 7, 12), NAMES], ids=["places", "numbers", "text"])
def test_soft_votes(words: Any, zipmap: bool) -> None:
    kinds = ["logistic", "forest", "boosted", "svc", "pipeline"]
    made = model(kinds[0], words, zipmap=zipmap)
    partners = {kind: model(kind, words, zipmap=not zipmap) for kind in kinds[1:]}
    merged(made, f"ensemble{{with=({', '.join(kinds[1:])}) combine=soft-vote}}", {"X": X}, **partners)
    wanted = sum(chances(kind, words) for kind in kinds) / len(kinds)
    found = outputs(made)
    assert list(found) == ["label", "output_probability" if zipmap else "probabilities"]
    np.testing.assert_allclose(next(reversed(found.values())), wanted, atol=1e-5)
    named = np.arange(3) if words is None else np.array(words)
    assert found["label"].tolist() == named[wanted.argmax(1)].tolist()


def test_orders_of_classes_follow_their_names() -> None:
    """NAMES of one are sorted as the data have them, OTHERS are not."""
    plain = OTHERS[np.argsort(OTHERS)]
    made, other = model("logistic", OTHERS), model("forest", OTHERS, zipmap=False)
    tree = next(node for node in other.graph if node.op_type == "TreeEnsembleClassifier")
    turned = [2, 0, 1]  # its first class is the third one of the other's
    names = [str(plain[place]) for place in turned]
    ids = tree.attributes["class_ids"].as_ints()
    places = {old: turned.index(old) for old in range(3)}
    tree.attributes["class_ids"] = ir.AttrInt64s("class_ids", [places[one] for one in ids])
    tree.attributes["classlabels_strings"] = ir.AttrStrings("classlabels_strings", names)
    wanted = (chances("logistic", OTHERS) + chances("forest", OTHERS)) / 2
    report = merged(made, "ensemble{with=b combine=soft-vote}", {"X": X}, b=other)
    assert "b: its classes are taken in the order of model" in said(report)
    found = outputs(made)
    np.testing.assert_allclose(found["output_probability"], wanted, atol=1e-5)
    assert found["label"].tolist() == plain[wanted.argmax(1)].tolist()
    made = model("logistic", OTHERS)
    report = merged(made, "cascade{with=b threshold=0.9}", {"X": X}, b=other)
    assert "b: its classes are taken in the order of model" in said(report)
    unsure = chances("logistic", OTHERS).max(1) < 0.9
    wanted = np.where(unsure[:, None], chances("forest", OTHERS), chances("logistic", OTHERS))
    np.testing.assert_allclose(outputs(made)["output_probability"], wanted, atol=1e-5)
    assert "must be the same" in refused(model("logistic"), "ensemble{with=b combine=soft-vote}", b=model("svc", NAMES))


@pytest.mark.parametrize("first", [True, False])
def test_with_a_network_of_logits(first: bool) -> None:
    network, other = ir.from_onnx_text(NETWORK), model("forest", NAMES)
    made, partner = (network, other) if first else (other, network)
    logits = outputs(ir.from_onnx_text(NETWORK))["logits"]
    raised = np.exp(logits - logits.max(1, keepdims=True))
    wanted = (raised / raised.sum(1, keepdims=True) + chances("forest", NAMES)) / 2
    report = merged(made, "ensemble{with=b combine=soft-vote}", None, b=partner)
    name = "model/logits" if first else "b/logits"
    assert [line for line in said(report) if "softmax added" in line] == [
        f"{name}: softmax added, for the output is taken for logits"
    ]
    found = outputs(made)
    np.testing.assert_allclose(found["logits" if first else "output_probability"], wanted, atol=1e-5)
    assert found["label"].tolist() == NAMES[wanted.argmax(1)].tolist()


@pytest.mark.parametrize(
    "combine",
    ["mean", "median", "min", "max", "geometric", "hard-vote", "weighted", "stack"],
)
def test_each_combination(combine: str) -> None:
    made = model("bayes", NAMES)
    partners = {"b": model("gradient", NAMES, zipmap=False), "c": model("neighbours", NAMES)}
    fitted = combine in ("weighted", "stack")
    text = f"ensemble{{with=(b, c) combine={combine}}}"
    merged(made, text, {"X": X}, NAMES[TRUE] if fitted else None, **partners)
    found = outputs(made)
    assert found["output_probability"].shape == (150, 3)
    assert ("label" in found) == (combine != "geometric")
    if combine in ("weighted", "stack", "hard-vote"):
        assert (found["label"] == NAMES[TRUE]).mean() > 0.93


def test_regressors() -> None:
    kinds = [LinearRegression(), RandomForestRegressor(5, random_state=0), GradientBoostingRegressor(n_estimators=5)]
    found = [kind.fit(X[:, :3], DATA[:, 3]) for kind in kinds]
    made, *others = (
        ir.from_proto(to_onnx(kind, X[:1, :3], target_opset={"": 15, "ai.onnx.ml": 1 if number else 3}))
        for number, kind in enumerate(found)
    )
    merged(made, "ensemble{with=(b, c)}", {"X": X[:, :3]}, b=others[0], c=others[1])
    wanted = sum(kind.predict(X[:, :3]) for kind in found) / 3
    result = run_feed(open_session(made), {"X": X[:, :3]})["variable"]
    np.testing.assert_allclose(result[:, 0], wanted, rtol=1e-4, atol=1e-5)


def test_cascade_from_a_classifier_to_a_network() -> None:
    for words in (None, NAMES):
        made = model("forest", words)
        report = merged(made, "cascade{with=net threshold=0.9}", {"X": X}, net=ir.from_onnx_text(NETWORK))
        skips = [(skip.subject, skip.reason) for skip in report.passes[-1].ledger.skips]
        assert ("output_label", "left out, for net has no output like it") in skips
        unsure = chances("forest", words).max(1) < 0.9
        scores = np.where(unsure[:, None], outputs(ir.from_onnx_text(NETWORK))["logits"], chances("forest", words))
        found = outputs(made)
        np.testing.assert_allclose(found["output_probability"], scores, rtol=1e-4, atol=1e-5)
        assert found["label"].tolist() == (np.arange(3) if words is None else NAMES)[scores.argmax(1)].tolist()


def test_cascade_of_two_classifiers_fitted_to_names() -> None:
    made = model("forest", NAMES)
    merged(made, "cascade{with=b max-drop=0.02}", {"X": X}, NAMES[TRUE], b=model("logistic", NAMES))
    found = outputs(made)
    assert list(found) == ["output_label", "output_probability"]
    assert (found["output_label"] == NAMES[TRUE]).mean() > 0.93


def test_labels_that_are_no_classes() -> None:
    text = "ensemble{with=b combine=weighted}"

    def answer(words: Any, labels: Any) -> str:
        return refused(model("forest", words), text, {"X": X}, labels, b=model("logistic", words))

    assert "the label 'setsa' is none of the classes setosa, versicolor, virginica. Did you mean 'setosa'?" in answer(
        NAMES, np.where(NAMES[TRUE] == "setosa", "setsa", NAMES[TRUE])
    )
    assert "the label '0' is none of the classes 2, 7, 12" in answer((2, 7, 12), TRUE)
    assert "the label 'setosa' is none of the classes 0, 1, 2" in answer(None, NAMES[TRUE])
    assert "labels are integers, one for each sample, or text" in answer(NAMES, TRUE / 2)
    assert "The labels are 149" in answer(NAMES, NAMES[TRUE][:149])
    merged(model("forest", NAMES), text, {"X": X}, TRUE.astype(np.uint8), b=model("logistic", NAMES))  # places do too
    plain = refused(ir.from_onnx_text(NETWORK), text, {"x": X}, NAMES[TRUE], b=ir.from_onnx_text(NETWORK))
    assert "and no member names its classes; give numbers from 0 to 2" in plain


def test_kinds_of_scores_said_for_one_member() -> None:
    made, twin = ir.from_onnx_text(NETWORK), ir.from_onnx_text(NETWORK)
    report = merged(made, "ensemble{with=b combine=soft-vote scores='b=probabilities'}", None, b=twin)
    assert "model/logits: softmax added, for the output is taken for logits" in said(report)
    assert not any(line.startswith("b/logits: softmax") for line in said(report))
    for scores, words in {"q=logits": "no member is called 'q'", "b=odds": "must be logits or probabilities"}.items():
        sentence = refused(ir.from_onnx_text(NETWORK), f"ensemble{{with=b scores='{scores}'}}", b=twin)
        assert words in sentence


def test_outputs_that_are_not_scores_keep_their_order() -> None:
    """As wide as there are classes: an embedding of the input, and one of the scores."""
    made, other = (ir.from_onnx_text(EMBEDDED.replace("NAMES", names)) for names in ('"a","b","c"', '"c","a","b"'))
    one = outputs(made)
    found = classifier(Member("m", made))
    assert [found.classes(name) for name in ("sc", "raw", "xyz", "mixed")] == [tuple("abc")] * 2 + [None] * 2
    merged(made, "ensemble{with=b}", {"x": X}, b=other)
    found_outputs = outputs(made)
    turned = [1, 2, 0]
    np.testing.assert_array_equal(found_outputs["xyz"], one["xyz"])
    np.testing.assert_array_equal(found_outputs["mixed"], one["mixed"])
    np.testing.assert_array_equal(found_outputs["sc"], (one["sc"] + one["sc"][:, turned]) * np.float32(0.5))
    assert list(found_outputs) == ["label", "sc", "label_2", "raw", "xyz", "mixed"]


def test_scores_of_pairs_have_no_names_of_classes() -> None:
    made = model("scores-svc", NAMES, zipmap=False)
    pairs = next(node for node in made.graph if node.op_type == "SVMClassifier").outputs[1]
    pairs.type, pairs.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, 3])
    made.graph.outputs.append(pairs)
    found = classifier(Member("m", made))
    assert found.classes(pairs.name or "") is None
    assert found.classes(made.graph.outputs[1].name or "") == tuple(NAMES)
