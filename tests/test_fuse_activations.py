"""fuse-activations: the spellings that exporters use, each compared with what it was."""

import numpy as np
import onnx_ir as ir
import pytest

from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.session import OrtRunner

HEAD = '<ir_version: 8, opset_import: ["" : {}]> agraph (float[N, 64] x) => (float[N, 64] y)\n'
NUMBERS = "<float k = {0.044715}, float r = {0.7978845608}, float one = {1}, float half = {0.5}, float three = {3}>\n"
INNER = {
    "products": "a = Mul (x, x) b = Mul (a, x) c = Mul (k, b) d = Add (x, c) e = Mul (d, r)",
    "number first": "a = Mul (k, x) b = Mul (x, a) c = Mul (x, b) d = Add (c, x) e = Mul (r, d)",
    "power": "b = Pow (x, three) c = Mul (b, k) d = Add (x, c) e = Mul (d, r)",
    "factored": "a = Mul (x, r) b = Mul (x, k) c = Mul (b, x) d = Add (c, one) e = Mul (a, d)",
}
OUTER = {
    "half last": "t = Tanh (e) u = Add (t, one) v = Mul (x, u) y = Mul (v, half)",
    "half of x": "t = Tanh (e) u = Add (one, t) v = Mul (x, half) y = Mul (v, u)",
    "half of the sum": "t = Tanh (e) u = Add (t, one) v = Mul (half, u) y = Mul (v, x)",
}


def fused(text: str) -> tuple[ir.Model, ir.Model, Context]:
    model = ir.from_onnx_text(text)
    work, ctx = model.clone(), Context()
    for step in Pipeline.of("fuse-activations").run(work, ctx):
        ctx.ledger.changes += step.ledger.changes
        ctx.ledger.skips += step.ledger.skips
    return model, work, ctx


def difference(model: ir.Model, other: ir.Model) -> float:
    feeds = [{"x": np.linspace(-6, 6, 128, dtype=np.float32).reshape(2, 64)}]
    (wanted,), (found,) = (list(OrtRunner().run(one, feeds, level="off")) for one in (model, other))
    return float(np.abs(wanted["y"] - found["y"]).max())


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_gelu_by_tanh_is_one_operator(inner: str, outer: str) -> None:
    model, work, ctx = fused(HEAD.format(17) + NUMBERS + "{ " + INNER[inner] + " " + OUTER[outer] + " }")
    assert [node.op_type for node in work.graph] == ["Gelu"]
    assert work.opset_imports[""] == 20
    assert any(change.what == "opset 17 to 20, for Gelu" for change in ctx.ledger.changes)
    assert difference(model, work) < 2e-6


def test_where_there_is_no_gelu_the_opset_stays() -> None:
    body = "{ " + INNER["products"].replace("(k, b)", "(one, b)") + " " + OUTER["half last"] + " }"
    model, work, ctx = fused(HEAD.format(17) + NUMBERS + body)
    assert work.opset_imports[""] == 17
    assert [node.op_type for node in work.graph] == [node.op_type for node in model.graph]
    assert not ctx.ledger.changes


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("{ a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, six) }", ["HardSigmoid", "Mul"]),
        ("{ a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Mul (c, sixth) }", ["HardSigmoid", "Mul"]),
        ("{ a = Add (x, three) b = Clip (a, zero, six) y = Div (b, six) }", ["HardSigmoid"]),
        ("{ y = HardSwish (x) }", ["HardSigmoid", "Mul"]),
        ("{ y = Sub (x, six) }", ["Add"]),
        ("{ y = Div (x, six) }", ["Mul"]),
        ("{ y = Div (x, zero) }", ["Div"]),
    ],
)
def test_spellings(body: str, wanted: list[str]) -> None:
    numbers = "<float three = {3}, float zero = {0}, float six = {6}, float sixth = {0.16666667}>\n"
    model, work, _ = fused(HEAD.format(17) + numbers + body)
    assert [node.op_type for node in work.graph] == wanted
    if wanted != ["Div"]:
        assert difference(model, work) < 2e-6


def test_a_number_that_adds_an_axis_stays() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> agraph (float[4] x) => (float[1, 4] y)\n'
    numbers = "<float[1, 1] three = {3}, float zero = {0}, float six = {6}>\n"
    _, work, _ = fused(text + numbers + "{ a = Add (x, three) b = Clip (a, zero, six) y = Div (b, six) }")
    assert "HardSigmoid" not in [node.op_type for node in work.graph]
    (found,) = OrtRunner().run(work, [{"x": np.ones(4, np.float32)}])
    assert found["y"].shape == (1, 4)
