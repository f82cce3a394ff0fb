"""Outputs behind TopK and its like: what they are judged by, and that nothing is left of that in the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from penjing.passes.deviation import Deviation
from penjing.passes.picks import picks
from penjing.runtime.run import run
from penjing.runtime.session import OrtRunner

Parse = Callable[[str], ir.Model]

DETECTOR = """<ir_version: 8, opset_import: ["": 17]>
m (float[n,16,24,24] x) => (float[n,5,1] best, float[n,5,4] rows, float[n,8,24,24] features) <
    float[64,16,3,3] w = {0}, float[4,64,1,1] v = {0}, float[1,64,1,1] u = {0}, float[8,64,1,1] s = {0},
    int64[3] four = {0, 4, 576}, int64[3] one = {0, 1, 576}, int64[1] k = {5}, int64[1] last = {2},
    int64[3] each = {1, 1, 4}
> {
    c = Conv<pads=[1,1,1,1]>(x, w)
    h = Relu(c)
    features = Conv(h, s)
    b = Conv(h, v)
    b3 = Reshape(b, four)
    boxes = Transpose<perm=[0,2,1]>(b3)
    a = Conv(h, u)
    a3 = Reshape(a, one)
    a1 = Transpose<perm=[0,2,1]>(a3)
    scores = Sigmoid(a1)
    best, index = TopK<axis=1>(scores, k)
    wide = Tile(index, each)
    rows = GatherElements<axis=1>(boxes, wide)
}"""

GATHER = "GatherElements<axis=1>(boxes, wide)"


def detector(parse: Parse, text: str = DETECTOR) -> ir.Model:
    model, draw = parse(text), np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if value.dtype is ir.DataType.FLOAT and value.shape is not None:
            array = draw.standard_normal(value.shape.numpy()).astype(np.float32)
            value.const_value = ir.Tensor(array / np.float32(array[0].size ** 0.5), name=value.name)
    return model


def images(count: int = 24) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((count, 16, 24, 24)).astype(np.float32)}


def test_what_is_picked_from_and_by_is_found(parse: Parse) -> None:
    found = picks(detector(parse))
    assert found is not None
    assert found.outputs == {"best", "rows"}
    assert set(found.values) == {"scores", "boxes"}
    assert str(found).startswith("judged by ")
    assert "before TopK 'best'" in str(found)


def test_it_is_quantized_though_rows_move_and_nothing_more_is_given_out(parse: Parse) -> None:
    model, data = detector(parse), images()
    before = OrtRunner()
    wanted = next(iter(before.run(model, [data])))
    report = run(model, "quantize-auto", data=data)
    assert [value.name for value in model.graph.outputs] == ["best", "rows", "features"]
    assert any(node.op_type == "QuantizeLinear" for node in model.graph)
    ledger = report.passes[-1].ledger
    assert any(change.subject == "best, rows" and change.what.startswith("judged by") for change in ledger.changes)
    found = next(iter(before.run(model, [data])))
    assert np.abs(np.sort(found["best"], 1) - np.sort(wanted["best"], 1)).max() < 0.05
    made = {value for node in model.graph for value in node.outputs}
    assert all(value.uses() or value.is_graph_output() for value in made if value.producer().op_type != "TopK")  # type: ignore[union-attr]


def test_a_bound_on_the_outputs_is_held_whatever_they_hold(parse: Parse) -> None:
    """Rows that move are then too far off."""
    model, data = detector(parse), images()
    report = run(model, "quantize-auto", data=data, min_sqnr=40)
    assert not any("judged by" in change.what for change in report.passes[-1].ledger.changes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rows = GatherElements<axis=1>(boxes, wide)", f"kept = {GATHER} rows = MatMul(kept, q)"),
        ("best, index = TopK<axis=1>(scores, k)", "best = Slice(scores, last, k) index = Shape(best)"),
        ("scores = Sigmoid(a1)", "scores = Sigmoid(fixed)"),
    ],
    ids=["a layer behind", "no pick", "nothing that a layer made"],
)
def test_what_is_judged_as_it_is(parse: Parse, old: str, new: str) -> None:
    text = DETECTOR.replace("float[4,64,1,1] v", "float[4,4] q = {0}, float[1,576,1] fixed = {0}, float[4,64,1,1] v")
    assert old in text
    assert picks(detector(parse, text.replace(old, new))) is None


def test_the_classes_of_a_classifier_are_told_from_the_scores_of_a_detector(parse: Parse) -> None:
    """Of the first five classes the first is to be the same; the best row of a detector may be another."""
    text = """<ir_version: 8, opset_import: ["": 17]> m (float[n,64] x) => (float[n,5] best, int64[n,5] index) <
        float[64,256] w = {0}, float[256,20] v = {0}, int64[1] k = {5}
    > { h = MatMul(x, w) r = Relu(h) scores = MatMul(r, v) best, index = TopK(scores, k) }"""
    model, found = detector(parse, text), picks(detector(parse))
    assert found is not None
    assert found.gathers
    report = run(model, "quantize-auto", data={"x": np.random.default_rng(1).standard_normal((200, 64), np.float32)})
    assert any("of 200 cases the same" in change.what for change in report.passes[-1].ledger.changes)


@pytest.mark.parametrize(
    "behind",
    [
        "u = Transpose(t) y = MatMul(best, u)",
        "h = Cast<to=10>(t) g = Cast<to=1>(h) y = MatMul(best, g)",
        "y = own.Layer(best)",
        "y = Gather(t, index)",
    ],
    ids=["weight turned", "weight decoded", "layer in a function", "embedding"],
)
def test_weights_behind_a_pick_are_seen(parse: Parse, behind: str) -> None:
    """Else they would be quantized, and nobody would look at what that does."""
    text = f"""<ir_version: 8, opset_import: ["": 17, "own": 1]> m (float[n,64] x) => (float[n,m] y) <
        float[64,20] w = {{0}}, float[20,20] t = {{0}}, int64[1] k = {{20}}
    > {{ scores = MatMul(x, w) best, index = TopK(scores, k) {behind} }}
    <domain: "own", opset_import: ["": 17]> Layer (a) => (b) {{ b = Relu(a) }}"""
    assert picks(detector(parse, text)) is None


def test_a_mask_does_not_hide_what_is_beside_it() -> None:
    """10,000 places of -1e9 are all of the signal; the scores beside them count by themselves."""
    wanted = np.concatenate([np.full(10_000, -1e9), np.linspace(-5, 5, 100)]).astype(np.float32)
    lost = np.where(wanted > -1e9, 0, wanted)
    found = {}
    for masked in (False, True):
        deviation = Deviation(features=True, masked=masked)
        deviation.add(wanted, lost)
        found[masked] = min(one.sqnr for one in deviation.energies)
    assert found[False] > 100
    assert found[True] == 0


def test_thresholds_lead_to_floats(parse: Parse) -> None:
    """NonZero reads truths; what these are made of is compared."""
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]> m (float[n,4] x) => (int64[2,m] places) <float[4,4] w = {0}> {
            scores = MatMul(x, w)
            zero = Constant<value = float {0.0}>()
            truths = Greater(scores, zero)
            places = NonZero(truths)
        }"""
    )
    found = picks(model)
    assert found is not None
    assert found.values == ("scores",)
