"""Models side by side: shared inputs, weights and branches once, names, functions, bodies, versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from merging import ends, merged, refused

from penjing.ir.errors import UsageError
from penjing.ir.files import load, save
from penjing.ir.text import text
from penjing.runtime.report import Report
from penjing.runtime.run import run
from penjing.runtime.session import open_session, run_feed

MODELS = Path(__file__).parents[1] / "models"
Parse = Callable[[str], ir.Model]

A = "a (float[N,4] x) => (float[N,3] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { h = MatMul(x,w) y = Tanh(h) }"
BODY = """m (float[N,3] x, bool c) => (float[N,3] y) <float[3] w = {1,2,3}> { h = Relu(x)
 y = If (c) <then_branch = t () => (float[N,3] a) { a = Add(h, w) },
             else_branch = e () => (float[N,3] b) <float[3] v = {4,5,6}> { b = Mul(h, v) }> }"""


def said(report: Report) -> list[str]:
    ledger = report.passes[-1].ledger
    return [f"{one.subject}: {one.what}" for one in ledger.changes] + [f"{s.subject}: {s.reason}" for s in ledger.skips]


def test_three_models_on_one_input() -> None:
    """Opset 18 and 13, IR 10 and 7, names that collide, weights that differ."""
    model = load(MODELS / "mlp.onnx")
    report = merged(
        model, "merge-parallel{with=(b, c)}", b=load(MODELS / "cnn-a.onnx"), c=load(MODELS / "cnn-a-legacy.onnx")
    )
    assert ends(model) == (["image[batch,1,28,28]"], ["logits[batch,10]", "b/logits[batch,10]", "c/logits[batch,10]"])
    assert "c: raised from opset 13 to 18" in said(report)
    assert "b/image: input shared with 'image' of model" in said(report)


def test_one_model_twice_is_computed_once(tmp_path: Path) -> None:
    model = load(MODELS / "mlp.onnx")
    report = merged(model, "merge-parallel{with=b}", b=load(MODELS / "mlp.onnx"))
    assert [node.op_type for node in model.graph].count("Gemm") == 4
    assert "b: all of it is computed once with an equal branch before it" in said(report)
    save(model, tmp_path / "two.onnx")
    assert (tmp_path / "two.onnx").stat().st_size < (MODELS / "mlp.onnx").stat().st_size + 4096


def test_one_model_three_times_with_inputs_of_its_own(tmp_path: Path) -> None:
    """Weight bytes once; three graphs; batches that need not be equal."""
    model, weights = load(MODELS / "mlp.onnx"), 4 * 566_528
    report = merged(model, "merge-parallel{with=(b, b) inputs=separate}", b=load(MODELS / "mlp.onnx"))
    assert ends(model)[0] == ["image[batch,1,28,28]", "b/image[b/batch,1,28,28]", "b-2/image[b-2/batch,1,28,28]"]
    assert "b-2/image: input kept apart by request" in said(report)
    save(model, tmp_path / "three.onnx")
    own = (MODELS / "mlp.onnx").stat().st_size - weights
    assert (tmp_path / "three.onnx").stat().st_size <= weights + 3 * own + 65536
    feed = {
        name: np.zeros((size, 1, 28, 28), np.float32) for name, size in (("image", 1), ("b/image", 2), ("b-2/image", 5))
    }
    assert len(run_feed(open_session(model), feed)["b-2/logits"]) == 5


def test_dims_of_shared_inputs_are_one(parse: Parse) -> None:
    model = parse(A)
    merged(model, "merge-parallel{with=b}", b=parse(A.replace("N", "K").replace("Tanh", "Exp")))
    assert ends(model) == (["x[N,4]"], ["y[N,3]", "b/y[N,3]"])
    model = parse(A)
    report = merged(model, "merge-parallel{with=b}", b=parse(A.replace("N", "2").replace("Tanh", "Exp")))
    assert ends(model) == (["x[2,4]"], ["y[2,3]", "b/y[2,3]"])
    assert "model: its dimension 'N' is 2 now, for what it is joined with is so" in said(report)


def test_inputs_that_do_not_fit_stay_apart_or_are_refused(parse: Parse) -> None:
    other = "b (float[N,5] x) => (float[N,5] z) { z = Neg(x) }"
    model = parse(A)
    report = merged(model, "merge-parallel{with=b}", b=parse(other))
    assert ends(model)[0] == ["x[N,4]", "b/x[b/N,5]"]
    assert any(line.startswith("b/x: input kept apart: The input 'x' of model is float32") for line in said(report))
    assert "dimension 1 is 4 in one and 5 in the other" in refused(
        parse(A), "merge-parallel{with=b inputs=share}", b=parse(other)
    )


def test_inputs_shared_by_place(parse: Parse) -> None:
    model = parse(A)
    merged(model, "merge-parallel{with=b inputs=share}", b=parse(A.replace("x", "other").replace("Tanh", "Exp")))
    assert ends(model)[0] == ["x[N,4]"]
    two = "b (float[N,4] x, float[N,4] u) => (float[N,4] z) { z = Add(x, u) }"
    assert "has no input of that name, and only 1" in refused(
        parse(A), "merge-parallel{with=b inputs=share}", b=parse(two)
    )


def test_outputs_concatenated(parse: Parse) -> None:
    model = parse(A)
    merged(model, "merge-parallel{with=b outputs=concat}", b=parse(A.replace("Tanh", "Exp")))
    assert ends(model) == (["x[N,4]"], ["y[N,6]"])
    model = parse(A)
    merged(model, "merge-parallel{with=b outputs=concat axis=0}", b=parse(A.replace("Tanh", "Exp")))
    assert [node.op_type for node in model.graph][-1] == "Concat"
    wide = A.replace("N,3", "N,3,1").replace("y = Tanh(h)", "i = Constant<value_ints=[2]>() y = Unsqueeze(h, i)")
    assert "outputs cannot be concatenated along axis -1" in refused(
        parse(A), "merge-parallel{with=b outputs=concat}", b=parse(wide)
    )
    assert "there is no axis 2" in refused(parse(A), "merge-parallel{with=b outputs=concat axis=2}", b=parse(A))


def test_prefixes(parse: Parse) -> None:
    model = parse(A)
    merged(model, "merge-parallel{with=b prefix=(left, right)}", b=parse(A.replace("Tanh", "Exp")))
    assert ends(model)[1] == ["left/y[N,3]", "right/y[N,3]"]
    assert "2 models take as many prefixes, and 1 are given" in refused(
        parse(A), "merge-parallel{with=b prefix=left}", b=parse(A)
    )
    assert "the prefixes must differ" in refused(parse(A), "merge-parallel{with=b prefix=(l, l)}", b=parse(A))


def test_layers_shared_on_purpose(parse: Parse) -> None:
    model = parse(A)
    other = parse(A.replace("{1,2,3,", "{3,2,3,").replace("Tanh", "Exp"))
    report = merged(model, "merge-parallel{with=b share=w}", b=other)
    assert list(model.graph.initializers) == ["w"]
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy()[0, 0] == 2
    (change,) = [one for one in report.passes[0].ledger.changes if one.subject == "w"]
    assert change.numbers["distance"] == pytest.approx(1 / np.linalg.norm([2, *range(2, 13)]))
    assert report.check.comparison is not None
    assert report.check.comparison.max_error > 0


def test_bodies(parse: Parse) -> None:
    model = parse(BODY)
    merged(model, "merge-parallel{with=b}", b=parse(BODY))
    assert [node.op_type for node in model.graph] == ["Relu", "If", "Identity"]
    model = parse(BODY)
    merged(model, "merge-parallel{with=b inputs=separate}", b=parse(BODY))
    assert [node.op_type for node in model.graph] == ["Relu", "If", "Relu", "If"]
    model = parse(BODY)
    merged(model, "merge-parallel{with=b}", b=parse(BODY.replace("{4,5,6}", "{4,5,7}")))
    assert [node.op_type for node in model.graph] == ["Relu", "If", "If"]  # the bodies differ


def test_large_constants_of_bodies_are_held_once(parse: Parse) -> None:
    numbers = ",".join(map(str, range(300)))
    body = BODY.replace("{4,5,6}", "{" + numbers + "}").replace("float[3] v", "float[300,1] v")
    body = (
        body.replace("Mul(h, v)", "MatMul(h, s) ")
        .replace("float[300,1] v", "float[3,100] v")
        .replace(
            "b = MatMul(h, s) ", "k = MatMul(h, v) i = Constant<value_ints=[-1]>() j = ReduceSum(k, i) b = Mul(h, j)"
        )
    )
    model = parse(body)
    merged(model, "merge-parallel{with=b inputs=separate}", b=parse(body))
    held = [v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size == 300]
    assert len(held) == 1
    assert all(
        not attribute.value.initializers
        for node in model.graph
        if node.op_type == "If"
        for attribute in node.attributes.values()
    )


def test_functions_alike_and_unlike() -> None:
    one = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
m (float[N,3] x) => (float[N,3] y) { y = local.outer (x) }
<opset_import: ["": 17, "local": 1], domain: "local"> outer (a) => (b) { b = local.inner (a) }
<opset_import: ["": 17], domain: "local"> inner (a) => (b) { c = Relu(a) b = Tanh(c) }"""
    model = ir.from_onnx_text(one)
    other = ir.from_onnx_text(one.replace("Tanh", "Sigmoid").replace("17", "11"))
    report = merged(model, "merge-parallel{with=(b, c)}", b=ir.from_onnx_text(one), c=other)
    assert [function.name for function in model.functions.values()] == ["outer", "inner", "c_outer", "c_inner"]
    assert "c: its function local::inner is c_inner now" in said(report)
    assert [node.op_type for node in model.graph] == ["outer", "c_outer", "Identity"]


def test_random_operators_stay_apart(parse: Parse) -> None:
    noisy = "m (float[2,3] x) => (float[2,3] y) { n = RandomNormalLike<seed=1.0>(x) y = Add(x, n) }"
    model = parse(noisy)
    run(model, "merge-parallel{with=b}", models={"b": parse(noisy)}, check="off")
    assert [node.op_type for node in model.graph] == ["RandomNormalLike", "Add"] * 2


def test_quantized_branches_keep_scales_of_their_own(parse: Parse) -> None:
    """What is equal as a whole is one; where it parts, the DequantizeLinear before stays with its reader."""
    net = """m (float[N,4] x) => (float[N,4] y) <float s = {0.1}, uint8 z = {128}> {
 q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }"""
    model = parse(net)
    merged(model, "merge-parallel{with=b}", b=parse(net))
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 1
    model = parse(net)
    merged(model, "merge-parallel{with=b}", b=parse(net.replace("Relu", "Tanh")))
    found = [node.op_type for node in model.graph]
    assert (found.count("QuantizeLinear"), found.count("DequantizeLinear")) == (1, 2)


def test_metadata(parse: Parse) -> None:
    a, b = parse(A), parse(A.replace("Tanh", "Exp"))
    a.metadata_props.update({"author": "one", "same": "s"})
    b.metadata_props.update({"author": "two", "same": "s", "more": "m"})
    report = merged(a, "merge-parallel{with=b}", b=b)
    assert a.metadata_props == {"author": "one", "same": "s", "b/author": "two", "more": "m"}
    assert "b: its metadata 'author' differ, and are 'b/author'" in said(report)


def test_unlike_versions_of_another_domain() -> None:
    source = '<ir_version: 8, opset_import: ["": 17, "{}": {}]> m (float[N] x) => (float[N] y) {{ y = {}(x) }}'

    def model(domain: str, version: int, op: str) -> ir.Model:
        return ir.from_onnx_text(source.format(domain, version, op))

    one, two = model("my.own", 1, "my.own.Op"), model("my.own", 2, "my.own.Op")
    with pytest.raises(UsageError, match="Op may have changed between; bring both to one version first"):
        run(one, "merge-parallel{with=b}", models={"b": two}, check="off")
    one, two = model("ai.onnx.ml", 2, "Neg"), model("ai.onnx.ml", 3, "Exp")
    merged(one, "merge-parallel{with=b}", b=two)
    assert one.opset_imports["ai.onnx.ml"] == 3


def test_data_for_inputs_of_both(parse: Parse) -> None:
    model = parse(A)
    data = {"x": np.ones((4, 4), np.float32), "b/x": np.zeros((4, 4), np.float32)}
    report = merged(model, "merge-parallel{with=b inputs=separate}", data, b=parse(A))
    assert report.check.feeds == "4 samples of the data"


def test_as_text(parse: Parse) -> None:
    model = parse(A)
    merged(model, "merge-parallel{with=b}", b=parse(A.replace("Tanh(h)", "Exp(h)")))
    assert text(model).splitlines()[1:] == [
        "graph a(%x: float32[N,4]) -> (%y: float32[N,3], %b/y: float32[N,3])",
        "  %w: float32[4,3] = #a26c900f70b3",
        "  %h = MatMul(%x, %w)",
        "  %y = Tanh(%h)",
        "  %b/y = Exp(%h)",
    ]


def test_external_data(parse: Parse, tmp_path: Path) -> None:
    """Both models keep their weights in files; the merge names neither, and holds them once."""
    for name in ("a", "b"):
        save(load(MODELS / "mlp.onnx"), tmp_path / f"{name}.onnx", external=True)
    model = load(tmp_path / "a.onnx")
    merged(model, "merge-parallel{with=b inputs=separate}", b=load(tmp_path / "b.onnx"))
    save(model, tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert data.stat().st_size < 1.1 * 4 * 566_528
    for name in ("a", "b"):
        for file in tmp_path.glob(f"{name}.onnx*"):
            file.unlink()
    assert (
        len(
            run_feed(
                open_session(tmp_path / "out.onnx"),
                {"image": np.zeros((1, 1, 28, 28), np.float32), "b/image": np.zeros((1, 1, 28, 28), np.float32)},
            )
        )
        == 2
    )


LISTED = """<ir_version: {}, opset_import: ["": 9]>
m (float[N,2] x, float[2,2] w) => (float[N,2] y) <float[2,2] w = {{1,2,3,4}}> {{ y = MatMul(x, w) }}"""


def test_weights_that_ir_version_3_lists_as_inputs_are_held_once() -> None:
    """ONNX Runtime lets nobody set them; in a newer version they would be open to callers, and slow."""
    model, partner = (ir.from_onnx_text(LISTED.format(3)) for _ in range(2))
    report = merged(model, "merge-parallel{with=b inputs=separate}", b=partner)
    assert ends(model) == (["x[N,2]", "b/x[b/N,2]"], ["y[N,2]", "b/y[b/N,2]"])
    assert (list(model.graph.initializers), model.ir_version) == (["w"], 4)
    told = [change.what for change in report.passes[0].ledger.changes if change.subject == "b"]
    assert "its 1 weight is no input any more; IR version 3 had to list them" in told
    model, partner = (ir.from_onnx_text(LISTED.format(3)) for _ in range(2))
    merged(model, "ensemble{with=b}", b=partner)
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_weights_that_a_caller_may_set_are_held_apart() -> None:
    model, partner = (ir.from_onnx_text(LISTED.format(8)) for _ in range(2))
    report = merged(model, "merge-parallel{with=b}", b=partner)
    assert ends(model)[0] == ["x[N,2]", "w[2,2]", "b/w[2,2]"]
    assert list(model.graph.initializers) == ["w", "b/w"]
    reasons = [(skip.subject, skip.reason) for skip in report.passes[0].ledger.skips]
    assert ("b", "1 weight held apart, being inputs that a caller may set") in reasons


def test_equal_constants_within_a_model_hide_no_twin(parse: Parse) -> None:
    """Two computed constants of one model are equal, and each is that of the other model."""
    text = """m (float[2] x) => (float[2] y) <int64[1] s = {2}> {
 a = ConstantOfShape(s) b = ConstantOfShape(s) h = Add(x, a) d = Dropout(h) y = Mul(d, b) }"""
    model = parse(text)
    merged(model, "merge-parallel{with=b}", b=parse(text))
    assert [node.op_type for node in model.graph].count("Mul") == 1
