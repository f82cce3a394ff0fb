"""``penjing blame``: values are found again whatever a tool named them, and the layer that errs comes first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import penjing
from penjing.cli import main
from penjing.ir.errors import UsageError
from penjing.models import zoo
from penjing.runtime.blame import Blame, Entry, blame, blame_files
from penjing.runtime.compare import compare_files
from penjing.runtime.feeds import read_feeds
from penjing.runtime.origins import match

SAMPLES = 16
FEEDS = {"image": zoo.data("validation")["image"][:SAMPLES]}
SCHEMA = json.loads((Path(penjing.__file__).parent / "runtime" / "report.schema.json").read_text(encoding="utf-8"))


class Calibration:
    """What onnxruntime.quantization reads its samples from."""

    def __init__(self) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter([FEEDS])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A bundled model quantized by onnxruntime.quantization, per channel, in one of its two forms or dynamically."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    folder = tmp_path_factory.mktemp("quantized")
    logging.getLogger().setLevel(logging.ERROR)

    def make(name: str, form: str) -> Path:
        path = folder / f"{name}-{form}.onnx"
        if not path.exists() and form == "dynamic":
            bare = onnx.load(zoo.path(name))
            del bare.graph.value_info[:]
            quantize_dynamic(bare, path, weight_type=QuantType.QInt8)
        elif not path.exists():
            quantize_static(
                zoo.path(name),
                path,
                Calibration(),
                quant_format=QuantFormat[form],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        return path

    return make


def scaled(path: Path, initializer: str, factor: float) -> Path:
    """A copy of the model with one initializer multiplied."""
    model = onnx.load(path)
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == initializer]
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((array * factor).astype(array.dtype), initializer))
    wrecked = path.with_name(f"{initializer}-{factor}.onnx")
    onnx.save(model, wrecked)
    return wrecked


def told(name: str, path: Path, data: Any = FEEDS) -> Blame:
    return blame_files(str(zoo.path(name)), str(path), data)


def by_value(found: Blame) -> dict[str, Entry]:
    return {entry.value: entry for entry in found.entries}


def decibels(entry: Entry) -> tuple[float, float]:
    """Injected and accumulated."""
    assert entry.injected is not None
    assert entry.injected.sqnr_db is not None
    assert entry.accumulated.sqnr_db is not None
    return entry.injected.sqnr_db, entry.accumulated.sqnr_db


def test_both_forms_of_a_model_tell_the_same(quantized: Any) -> None:
    forms = [told("cnn-a", quantized("cnn-a", form)) for form in ("QDQ", "QOperator")]
    for found in forms:
        assert len(found.entries) == 20
        assert found.disturbance == 0
        assert not found.notes
        assert found.kernels is not None
        assert (found.kernels.fused, found.kernels.layers) == (13, 13)
        assert min(decibels(entry)[0] for entry in found.entries) > 30
    assert list(by_value(forms[0])) == list(by_value(forms[1]))
    for one, other in zip(*(found.entries for found in forms), strict=True):
        assert decibels(one) == pytest.approx(decibels(other))
        assert one.operators == other.operators
    entry = by_value(forms[0])["relu_5"]
    assert (entry.operators, entry.node, entry.type) == (["Conv", "Relu"], "node_Conv_192", "uint8")


def test_what_an_output_has_accumulated_is_what_compare_says(quantized: Any) -> None:
    path = quantized("cnn-a", "QDQ")
    [output] = [entry for entry in told("cnn-a", path).entries if entry.output]
    comparison, _ = compare_files(str(zoo.path("cnn-a")), str(path), FEEDS)
    assert output.value == "logits"
    assert output.accumulated.sqnr_db == pytest.approx(comparison.outputs["logits"].sqnr_db, abs=0.01)


@pytest.mark.parametrize(
    ("initializer", "factor"), [("8.branch.0.weight_scale", 50.0), ("relu_5_scale", 0.05)], ids=["weight", "range"]
)
def test_a_wrecked_layer_comes_first_and_those_behind_it_are_not_blamed(
    quantized: Any, initializer: str, factor: float
) -> None:
    path = quantized("cnn-a", "QDQ")
    before, after = by_value(told("cnn-a", path)), told("cnn-a", scaled(path, initializer, factor))
    assert after.entries[0].value == "relu_5"
    assert decibels(after.entries[0])[0] < 5
    found = by_value(after)
    for name in ("getitem_21", "relu_7", "relu_8", "relu_9", "logits"):  # computed from relu_5
        assert decibels(found[name])[0] > min(25, decibels(before[name])[0] - 1)
    for name in ("relu_6", "getitem_21", "logits"):
        assert decibels(found[name])[1] < 15
    for name in ("div", "relu", "relu_4"):  # computed before it
        assert decibels(found[name]) == pytest.approx(decibels(before[name]), abs=0.01)


def test_a_transformer(quantized: Any) -> None:
    found = told("vit", quantized("vit", "QDQ"))
    assert (len(found.entries), found.values, found.disturbance) == (137, 138, 0)
    assert all(decibels(entry)[0] > 28 for entry in found.entries)
    assert sum(decibels(entry)[1] < 28 for entry in found.entries) > 40
    wrecked = scaled(quantized("vit", "QOperator"), "linear_7_scale", 0.02)
    assert told("vit", wrecked).entries[0].value == "linear_7"


def test_dynamic_quantization(quantized: Any) -> None:
    found = told("vit", quantized("vit", "dynamic"))
    assert len(found.entries) == 137
    assert found.disturbance < 1e-5  # floats are looked at here, and what is looked at is not fused
    worst = found.entries[:16]
    assert {operator for entry in worst for operator in entry.operators} == {"Conv", "MatMul"}
    assert all(entry.type == "float32" for entry in found.entries)
    exact = by_value(found)["layer_norm_1"]
    assert decibels(exact)[0] > 100 > decibels(exact)[1]


def test_figures_do_not_depend_on_the_parts(quantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = quantized("cnn-a", "QDQ")
    whole = told("cnn-a", path)
    monkeypatch.setattr("penjing.runtime.blame.SAMPLES", 3)
    parts = told("cnn-a", path)
    assert [entry.value for entry in whole.entries] == [entry.value for entry in parts.entries]
    for one, other in zip(whole.entries, parts.entries, strict=True):
        assert decibels(one) == pytest.approx(decibels(other))


FLOAT = """m (float[n,4] x) => (float[n,2] y)
    <float[4,3] w = {1,-2,3,-4,5,-6,7,-8,9,-10,11,-12}, float[3,2] v = {1,2,3,4,5,6}> {
    [first] h = MatMul (x, w)
    [act] r = Relu (h)
    [last] y = MatMul (r, v)
}"""
SCALES = """float sx = {0.05}, uint8 zx = {128}, float sw = {0.1}, int8 zw = {0}, float sh = {0.4}, uint8 zh = {0},
    float sy = {4}, uint8 zy = {128}, float sv = {0.05}"""
WEIGHTS = "int8[4,3] wq = {10,-20,30,-40,50,-60,70,-80,90,-100,110,-120}, int8[3,2] vq = {20,40,60,80,100,120}"


def qdq(body: str, parse: Callable[[str], ir.Model]) -> ir.Model:
    return parse(f"m (float[n,4] x) => (float[n,2] y) <{SCALES}, {WEIGHTS}> {{ {body} }}")


def values(model: ir.Model, other: ir.Model) -> dict[str, str | None]:
    """Values of the float model, and the name of what is looked at in the other."""
    return {one.name: None if one.shown is None else one.shown[0].name for one in match(model, other)}


def test_values_are_found_again_by_their_names(parse: Any) -> None:
    other = qdq(
        """x_quantized = QuantizeLinear (x, sx, zx)
        x_dequantized = DequantizeLinear (x_quantized, sx, zx)
        w = DequantizeLinear (wq, sw, zw)
        h = MatMul (x_dequantized, w)
        r = Relu (h)
        r_quantized = QuantizeLinear (r, sh, zh)
        r_dequantized = DequantizeLinear (r_quantized, sh, zh)
        v = DequantizeLinear (vq, sv, zw)
        y_1 = MatMul (r_dequantized, v)
        y_quantized = QuantizeLinear (y_1, sy, zy)
        y = DequantizeLinear (y_quantized, sy, zy)""",
        parse,
    )
    assert values(parse(FLOAT), other) == {"x": "x_quantized", "h": None, "r": "r_quantized", "y": "y_quantized"}


def test_values_are_found_again_by_what_gives_them(parse: Any) -> None:
    """Other names throughout, and no Relu, whose work the zero point does; ``h`` is then ``r``."""
    other = qdq(
        """a = QuantizeLinear (x, sx, zx)
        [first_quant] b = QLinearMatMul (a, sx, zx, wq, sw, zw, sh, zh)
        [last_quant] c = QLinearMatMul (b, sh, zh, vq, sv, zw, sy, zy)
        [back] d = DequantizeLinear (c, sy, zy)
        y = Identity (d)""",
        parse,
    )
    model = parse(FLOAT)
    assert values(model, other) == {"x": "a", "r": "b", "y": "c"}
    rng = np.random.default_rng(0)
    found = blame(model, other, read_feeds({"x": rng.standard_normal((40, 4)).astype(np.float32)}, model))
    assert {entry.value: entry.operators for entry in found.entries} == {
        "x": [],
        "r": ["MatMul", "Relu"],
        "y": ["MatMul"],
    }
    assert all(decibels(entry)[0] > 30 for entry in found.entries)


def test_a_range_that_begins_below_zero_is_no_relu(parse: Any) -> None:
    other = qdq(
        """f = DequantizeLinear (wq, sw, zw)
        g = DequantizeLinear (vq, sv, zw)
        [first] a = MatMul (x, f)
        h_quantized = QuantizeLinear (a, sy, zy)
        b = DequantizeLinear (h_quantized, sy, zy)
        [last] y = MatMul (b, g)""",
        parse,
    )
    assert values(parse(FLOAT), other) == {"x": None, "h": "h_quantized", "y": "y"}


def test_values_of_another_shape_are_left_out_with_a_note(parse: Any) -> None:
    model = parse("m (float[2,3] x) => (float[2,3] y) { a = Transpose (x) b = Exp (a) y = Transpose (b) }")
    other = parse("m (float[2,3] x) => (float[2,3] y) { a = Relu (x) b = Exp (x) y = Abs (b) }")
    found = blame(model, other, read_feeds([{"x": np.ones((2, 3), np.float32)}], model))
    assert [entry.value for entry in found.entries] == ["y"]
    assert found.notes == ["2 values of another shape in the two models left out: a, b"]


def test_bodies_are_seen_from_outside(parse: Any) -> None:
    model = parse("""m (float[2] x, bool c) => (float[2] y) {
        a = Relu (x)
        [branch] b = If (c) <then_branch = t () => (float[2] p) { p = Exp (a) },
                             else_branch = e () => (float[2] q) { q = Neg (a) }>
        y = Abs (b)
    }""")
    found = blame(model, model.clone(), read_feeds([{"x": np.ones(2, np.float32), "c": np.array(True)}], model))
    assert {entry.value for entry in found.entries} == {"a", "b", "y"}
    assert found.notes == ["Values in bodies are not looked at, only what the 1 node with bodies give: branch"]


def test_models_that_are_no_pair(parse: Any) -> None:
    model = parse("m (float[2] x) => (float[2] y) { y = Relu (x) }")
    other = parse("m (float[2] x) => (float[2] z) { z = Exp (x) }")
    with pytest.raises(UsageError, match="have no value in common, by name or by node"):
        blame(model, other, read_feeds({"x": np.ones((1, 2), np.float32)[0]}, model))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_the_command(call: Any, quantized: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **FEEDS)
    pair = zoo.path("cnn-a"), scaled(quantized("cnn-a", "QDQ"), "8.branch.0.weight_scale", 50.0)
    code, shown, error = call("blame", *pair, "--data", tmp_path / "x.npz", "--top", 3)
    assert code == 0, error
    lines = shown.splitlines()
    assert lines[1].split()[:4] == ["relu_5", "Conv+Relu", "node_Conv_192", "uint8"]
    assert lines[4].startswith("logits")  # the outputs are there, whatever their place
    assert "20 of 33 values matched; the outputs, and the 3 worst; on 16 samples of x.npz" in shown
    assert "looking at them moved no output" in shown
    assert "12 of 13 layers in integer kernels" in shown
    assert "the scale of its bias" in shown
    code, shown, error = call("blame", *pair, "--json")
    found = json.loads(shown)
    assert code == 0, error
    assert "random feed" in found["feeds"]
    assert len(found["values"]) == found["matched"] == 20
    assert found["values"][0]["value"] == "relu_5"
    assert found["values"][0]["injected"]["sqnr_db"] < 5
    assert found["kernels"]["floating"][0]["operator"] == "Conv"


def test_bad_input_is_a_sentence(call: Any, parse: Any, tmp_path: Path) -> None:
    penjing.save(parse("m (float[2] x) => (float[2] y) { y = Relu (x) }"), tmp_path / "a.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    for other, sentence in {
        zoo.path("mlp"): "'image' (float32 [batch,1,28,28]). Name a float model and",
        tmp_path / "junk.onnx": "junk.onnx",
        tmp_path / "none.onnx": "none.onnx does not exist",
    }.items():
        code, _, error = call("blame", tmp_path / "a.onnx", other)
        assert (code, sentence in error, len(error.splitlines())) == (2, True, 1), error
    code, _, error = call("blame", tmp_path / "a.onnx", tmp_path / "a.onnx", "--data", tmp_path / "none.npz")
    assert (code, "none.npz" in error) == (2, True)


def test_a_run_reports_the_integer_kernels_of_a_quantized_result(call: Any, quantized: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("-p", "remove-dead-code", "-o", tmp_path / "out.onnx", "--json", report)
    code, shown, error = call("run", quantized("mlp", "QDQ"), *options)
    assert code == 0, error
    assert "integer kernels" in shown
    assert "4 of 4 layers in integer kernels" in shown
    found = json.loads(report.read_text(encoding="utf-8"))
    jsonschema.validate(found, SCHEMA)
    assert (found["kernels"]["fused"], found["kernels"]["layers"]) == (4, 4)


def test_other_runs_report_none(quantized: Any) -> None:
    unchecked = penjing.run(penjing.load(quantized("mlp", "QDQ")), "remove-dead-code", check="off")
    jsonschema.validate(unchecked.as_json(), SCHEMA)
    assert unchecked.kernels == "not counted: nothing was run"
    plain = penjing.run(zoo.load("mlp"), "remove-dead-code")
    assert plain.kernels is plain.as_json()["kernels"] is None


def test_no_run_fails_for_kernels_that_cannot_be_counted(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: ir.Model) -> None:
        raise ValueError("an operator\nof tomorrow")

    monkeypatch.setattr("penjing.runtime.kernels.kernels", broken)
    report = penjing.run(penjing.load(quantized("mlp", "QDQ")), "remove-dead-code", data=FEEDS)
    jsonschema.validate(report.as_json(), SCHEMA)
    assert report.kernels == "not counted: ValueError: an operator of tomorrow"
    assert report.as_json()["kernels"] == {"not_counted": "ValueError: an operator of tomorrow"}
