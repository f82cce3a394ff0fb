"""Models in a row: what feeds what, what is checked at the joint, adapters, and the proof against separate models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from merging import ends, merged, refused

from penjing.ir.errors import NeedsData, PenjingError
from penjing.ir.files import load, save
from penjing.ir.verify import problems
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.report import Report
from penjing.runtime.run import run
from penjing.runtime.session import OrtRunner, open_session, run_feed

MODELS = Path(__file__).parents[1] / "models"
Parse = Callable[[str], ir.Model]

A = "a (float[N,4] x) => (float[N,3] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { h = MatMul(x,w) y = Tanh(h) }"
B = "b (float[batch,3] x) => (float[batch,2] y) <float[3,2] w = {1,2,3,4,5,6}> { h = MatMul(x,w) y = Tanh(h) }"


def changes(report: Report) -> list[str]:
    return [f"{change.subject}: {change.what}" for change in report.passes[0].ledger.changes]


def test_by_order_with_colliding_names(parse: Parse) -> None:
    model = parse(A)
    report = merged(model, "merge-sequence{with=b}", b=parse(B))
    assert ends(model) == (["x[N,4]"], ["y[N,2]"])
    assert "b/x: reads 'y' of model" in changes(report)
    assert "b: 4 names prefixed, for others have them" in changes(report)
    feed = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}
    (found,) = OrtRunner().run(model, [feed], level="off")
    (first,) = OrtRunner().run(parse(A), [feed], level="off")
    (second,) = OrtRunner().run(parse(B), [{"x": first["y"]}], level="off")
    assert np.array_equal(found["y"], second["y"])


def test_partners_stay_as_they_are(parse: Parse) -> None:
    from penjing.ir.text import text

    b = parse(B)
    before = text(b)
    merged(parse(A), "merge-sequence{with=b}", b=b)
    assert text(b) == before


def test_by_name_before_order(parse: Parse) -> None:
    model = parse("a (float[N] x) => (float[N] p, float[N] q) { p = Neg(x) q = Exp(x) }")
    b = parse("b (float[M] q) => (float[M] z) { z = Sqrt(q) }")
    report = merged(model, "merge-sequence{with=b}", b=b)
    assert "b/q: reads 'q' of model" in changes(report)
    assert ends(model)[1] == ["z[N]"]
    assert [skip.reason for skip in report.passes[0].ledger.skips] == ["output left out; keep-outputs keeps it"]


def test_keep_outputs(parse: Parse) -> None:
    model = parse(A)
    merged(model, "merge-sequence{with=b keep-outputs=true}", b=parse(B))
    assert ends(model)[1] == ["y[N,2]", "model/y[N,3]"]


def test_by_map_between_four_in_a_row(parse: Parse) -> None:
    step = "m (float[K,3] x) => (float[K,3] y, float[K,3] z) {{ y = {}(x) z = {}(x) }}"
    partners = {
        name: parse(step.format(*ops))
        for name, ops in {"b": ("Sin", "Cos"), "c": ("Tanh", "Abs"), "d": ("Neg", "Exp")}.items()
    }
    model = parse(A)
    merged(model, "merge-sequence{with=(b, c, d) map=('b/z=c/x', 'c/z=d/x')}", **partners)
    assert [node.op_type for node in model.graph] == ["MatMul", "Tanh", "Cos", "Abs", "Neg", "Exp"]
    assert ends(model) == (["x[N,4]"], ["y[N,3]", "z[N,3]"])


def test_a_shared_input(parse: Parse) -> None:
    model = parse("a (float[N,3] x, float[N,1] mask) => (float[N,3] y) { y = Mul(x, mask) }")
    b = "b (float[K,3] y, float[K,1] mask) => (float[K,3] z) { z = Add(y, mask) }"
    merged(model, "merge-sequence{with=b}", b=parse(b))
    assert ends(model) == (["x[N,3]", "mask[N,1]"], ["z[N,3]"])
    model = parse("a (float[N,3] x, float[N,1] mask) => (float[N,3] y) { y = Mul(x, mask) }")
    merged(model, "merge-sequence{with=b inputs=separate}", b=parse(b))
    assert ends(model) == (["x[N,3]", "mask[N,1]", "b/mask[N,1]"], ["z[N,3]"])


@pytest.mark.parametrize("swap", [False, True])
def test_opset_11_and_17_ir_7_and_10(swap: bool) -> None:
    """Softmax of rank 3 means another thing from 13 on."""
    old = ir.from_onnx_text(
        '<ir_version: 7, opset_import: ["": 11]> a (float[N,2,3] x) => (float[N,2,3] y) { y = Softmax(x) }'
    )
    new = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 17]> b (float[N,2,3] x) => (float[N,2,3] y) { y = Softmax(x) }'
    )
    first, second = (new, old) if swap else (old, new)
    model = first.clone()
    report = merged(model, "merge-sequence{with=b}", b=second)
    assert (model.opset_imports[""], model.ir_version) == (17, 10)
    assert f"{'b' if swap else 'model'}: raised from opset 11 to 17" in changes(report)


def test_fixed_batch_narrows_an_open_one(parse: Parse) -> None:
    model = parse(A)
    report = merged(model, "merge-sequence{with=b}", b=parse(B.replace("batch", "2")))
    assert ends(model) == (["x[2,4]"], ["y[2,2]"])
    assert "model: its dimension 'N' is 2 now, for what it is joined with is so" in changes(report)


@pytest.mark.parametrize(
    ("b", "sentence"),
    [
        (
            "b (int64[batch,3] x) => (int64[batch,3] y) { y = Identity(x) }",
            "'y' of model is float32 [N, 3], and the input 'x' of b takes int64 [batch, 3]: one is float32, the other",
        ),
        (
            "b (float[batch,7] x) => (float[batch,7] y) { y = Neg(x) }",
            "'y' of model is float32 [N, 3], and the input 'x' of b takes float32 [batch, 7]: dimension 1 is 3",
        ),
        ("b (float[batch,3,1] x) => (float[batch,3,1] y) { y = Neg(x) }", "one has 2 dimensions, the other 3"),
    ],
)
def test_what_does_not_fit_is_refused(parse: Parse, b: str, sentence: str) -> None:
    assert sentence in refused(parse(A), "merge-sequence{with=b}", b=parse(b))


def test_static_4_into_5_is_refused(parse: Parse) -> None:
    a, b = (f"m (float[{size},3] x) => (float[{size},3] y) {{ y = Neg(x) }}" for size in (4, 5))
    assert "dimension 0 is 4 in one and 5 in the other" in refused(parse(a), "merge-sequence{with=b}", b=parse(b))


def test_a_misfit_that_only_inference_sees(parse: Parse) -> None:
    a = parse(A.replace("float[N,3] y", "float[N,?] y"))
    b = parse("b (float[batch,7] x) => (float[batch,7] y) { y = Neg(x) }")
    assert "dimension 1 is 3 in one and 7" in refused(a, "merge-sequence{with=b}", b=b)


def test_misfit_over_two_joints(parse: Parse) -> None:
    """N is 2 by one joint, and cannot be 3 by another."""
    a = parse("a (float[N] x) => (float[N] p, float[N] q) { p = Neg(x) q = Exp(x) }")
    b = parse("b (float[2] p, float[3] q) => (float[2] z, float[3] r) { z = Neg(p) r = Neg(q) }")
    assert "'N', which is 2," in refused(a, "merge-sequence{with=b}", b=b)


ADAPTERS = [
    ("cast", "m (int64[batch,3] x) => (int64[batch,3] z) { z = Neg(x) }", "cast from float32 to int64"),
    ("reshape", "m (float[batch,3,1,1] x) => (float[batch,3,1,1] z) { z = Neg(x) }", "reshaped to [-1, 3, 1, 1]"),
    ("transpose", "m (float[3,batch] x) => (float[3,batch] z) { z = Neg(x) }", "transposed by [1, 0]"),
]


@pytest.mark.parametrize(("adapt", "b", "words"), ADAPTERS)
def test_adapters_stand_only_where_asked_for(parse: Parse, adapt: str, b: str, words: str) -> None:
    a = A.replace("[N,", "[5,") if adapt == "transpose" else A
    assert "allow an adapter" in refused(parse(a), "merge-sequence{with=b}", b=parse(b))
    others = [name for name, _, _ in ADAPTERS if name != adapt]
    assert "No adapter of" in refused(parse(a), f"merge-sequence{{with=b adapt=({', '.join(others)})}}", b=parse(b))
    report = merged(parse(a), f"merge-sequence{{with=b adapt={adapt}}}", b=parse(b))
    assert f"b/x: reads 'y' of model, {words}" in changes(report)


def test_a_reshape_that_would_mix_samples_is_refused(parse: Parse) -> None:
    a = parse("a (float[N,6] x) => (float[N,6] y) { y = Neg(x) }")
    b = parse("b (float[M,3] x) => (float[M,3] y) { y = Neg(x) }")
    assert "No adapter of adapt=(reshape)" in refused(a, "merge-sequence{with=b adapt=reshape}", b=b)


def test_images_to_channels_first(parse: Parse) -> None:
    model = parse("a (float[N,8,9,3] x) => (float[N,8,9,3] y) { y = Neg(x) }")
    b = parse("b (float[batch,3,H,W] x) => (float[batch,3,H,W] z) { z = Exp(x) }")
    merged(model, "merge-sequence{with=b adapt=transpose}", b=b)
    assert ends(model)[1] == ["z[N,3,8,9]"]


def test_values_in_the_middle(parse: Parse) -> None:
    model = parse(A)
    head = "b (float[M,5] x) => (float[M,3] y) <float[5,3] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}> "
    head += "{ h = MatMul(x,w) y = Exp(h) }"
    merged(model, "merge-sequence{with=b map='h=h'}", b=parse(head))
    assert [node.op_type for node in model.graph] == ["MatMul", "Exp"]
    assert list(model.graph.initializers) == ["w"]


def test_linear_adapter_carries_the_head_of_another_model() -> None:
    """The backbone of one CNN, a fitted layer, the head of the other: nearly as good as either."""
    model = load(MODELS / "cnn-a.onnx")
    text = "merge-sequence{with=b map='view=view' adapt=linear}"
    report = merged(model, text, str(MODELS / "mnist-validation.npz"), b=load(MODELS / "cnn-b.onnx"))
    assert any("through a linear layer fitted on 300 samples" in change for change in changes(report))
    test = np.load(MODELS / "mnist-test.npz")
    found = run_feed(open_session(model), {"image": test["image"][:500]})["logits"]
    assert (found.argmax(1) == test["labels"][:500]).mean() > 0.98


def test_linear_conv_between_feature_maps(parse: Parse) -> None:
    a = parse("a (float[N,2,3,3] x) => (float[N,2,3,3] y) { y = Tanh(x) }")
    weight = ",".join(str(number) for number in range(1, 9))
    b = parse(
        "b (float[M,2,3,3] x) => (float[M,4,3,3] z) <float[4,2,1,1] w = {" + weight + "}> "
        "{ t = Tanh(x) h = Conv(t, w) z = Neg(h) }"
    )
    data = {"x": np.random.default_rng(0).standard_normal((20, 2, 3, 3)).astype(np.float32)}
    expected = run_feed(open_session(b), data)["z"]
    model = a.clone()
    merged(model, "merge-sequence{with=b map='y=h' adapt=linear}", data, b=b)
    assert [node.op_type for node in model.graph] == ["Tanh", "Conv", "Neg"]
    assert np.allclose(run_feed(open_session(model), data)["z"], expected, rtol=1e-4, atol=1e-4)


def test_linear_needs_data_and_a_value_in_the_middle(parse: Parse) -> None:
    with pytest.raises(NeedsData, match="merge-sequence needs --data"):
        run(
            parse(A),
            "merge-sequence{with=b map='y=h' adapt=linear}",
            models={
                "b": parse(
                    B.replace("3,2", "3,3")
                    .replace("[batch,2]", "[batch,3]")
                    .replace("{1,2,3,4,5,6}", "{1,2,3,4,5,6,7,8,9}")
                )
            },
        )
    assert "adapt=linear has nothing to fit to" in refused(parse(A), "merge-sequence{with=b adapt=linear}", b=parse(B))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("merge-sequence", "name them"),
        ("merge-sequence{with=bb}", "no partner is called 'bb'. Did you mean 'b'?"),
        ("merge-sequence{with=b map='z=x'}", "there is no output 'z', nor a value of that name"),
        ("merge-sequence{with=b map='y=xx'}", "there is no input 'xx', nor a value of that name. Did you mean 'x'?"),
        ("merge-sequence{with=b map=y}", "map=y must be OUTPUT=INPUT"),
        ("merge-sequence{with=b map='b/y=b/x'}", "a cycle cannot run"),
        ("merge-sequence{with=(b, c) map='y=x'}", "may mean b/x or c/x; write which"),
        ("merge-sequence{with=b map=('y=x', 'h=x')}", "map feeds 'x' of b twice"),
        ("merge-sequence{with=b adapt=glue}", "adapt=glue is not valid"),
    ],
)
def test_bad_input(parse: Parse, text: str, sentence: str) -> None:
    assert sentence in refused(parse(A), text, b=parse(B), c=parse(B.replace("[batch,3]", "[batch,2]")))


def test_without_partners(parse: Parse) -> None:
    with pytest.raises(PenjingError, match="needs --with NAME=MODEL"):
        run(parse(A), "merge-sequence{with=b}")


def test_a_model_four_times_holds_its_weights_once(tmp_path: Path) -> None:
    """The file is at most the weights once, four graphs, and 64 KB."""
    rng = np.random.default_rng(0)
    weight = ir.tensor(rng.standard_normal((128, 128)).astype(np.float32), name="w")
    x = ir.val("x", ir.DataType.FLOAT, ["N", 128])
    w = ir.val("w", ir.DataType.FLOAT, [128, 128], const_value=weight)
    node = ir.node("MatMul", [x, w])
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    node.outputs[0].shape = ir.Shape(["N", 128])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 17}), ir_version=8)
    save(model, tmp_path / "one.onnx")
    one = (tmp_path / "one.onnx").stat().st_size
    model = load(tmp_path / "one.onnx")
    partner = load(tmp_path / "one.onnx")
    report = merged(model, "merge-sequence{with=(b, b, b)}", b=partner)
    save(model, tmp_path / "four.onnx")
    assert (tmp_path / "four.onnx").stat().st_size <= weight.nbytes + 4 * (one - weight.nbytes) + 65536
    assert len(model.graph.initializers) == 1
    assert "b-2: the same model as model" in changes(report)


def test_same_bytes_again(parse: Parse, tmp_path: Path) -> None:
    files = [tmp_path / "1.onnx", tmp_path / "2.onnx"]
    for file in files:
        model = load(MODELS / "mlp.onnx")
        context = Context(models={"b": load(MODELS / "vit.onnx"), "c": load(MODELS / "cnn-a-legacy.onnx")})
        Pipeline.parse("merge-parallel{with=(b, c)}").run(model, context)
        save(model, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_pairs_of_bundled_models_that_fit(parse: Parse) -> None:
    """Logits fit no image, so each model meets one that reads logits, and one that makes images."""
    reads = parse("r (float[M,10] p) => (float[M,10] q) { q = Softmax(p) }")
    makes = parse(
        "m (float[M,784] flat) => (float[M,1,28,28] i) <int64[4] s = {-1, 1, 28, 28}> { i = Reshape(flat, s) }"
    )
    for path in sorted(MODELS.glob("*.onnx")):
        model = makes.clone()
        partners = {"b": load(path), "c": reads}
        Pipeline.parse("merge-sequence{with=(b, c)}").run(model, Context(models=partners))
        assert problems(model) == []
        assert ends(model) == (["flat[M,784]"], ["q[M,10]"])
        found = run_feed(open_session(model), {"flat": np.zeros((2, 784), np.float32)})["q"]
        assert np.allclose(found.sum(1), 1, atol=1e-5)


def test_the_check_sees_a_wrong_joint(parse: Parse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A merge that lies is a breach, and its reproducer holds the partners."""
    from penjing.passes.merge import sequence
    from penjing.runtime.reproducer import replay
    from penjing.runtime.run import BoundExceeded

    settle = sequence.settle

    def wrong(model: ir.Model, *rest: Any) -> None:
        settle(model, *rest)
        last = next(node for node in reversed(model.graph) if node.op_type == "Tanh")
        last.op_type = "Sigmoid"

    monkeypatch.setattr(sequence, "settle", wrong)
    with pytest.raises(BoundExceeded, match="broke its promise"):
        run(parse(A), "merge-sequence{with=b}", models={"b": parse(B)}, reproducer=tmp_path / "r")
    assert (tmp_path / "r" / "partner-0.onnx").is_file()
    assert replay(tmp_path / "r") == 1
    monkeypatch.undo()
    assert replay(tmp_path / "r") == 0
