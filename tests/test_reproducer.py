"""Reproducer folders fail alone, whatever the pass, metric and inputs were; what cannot be replayed says so."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import penjing
from penjing.passes.base import Context, Effect, Pass

Parse = Callable[[str], ir.Model]

MODEL = "m (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, -2, 3, 4}> { y = MatMul (x, w) }"

PASS = """
import numpy as np, onnx_ir as ir, penjing
{imports}

@penjing.register("{name}")
class Double(penjing.Pass):
    \"\"\"Doubles every weight, and says that it only rounds.\"\"\"

    def effect(self):
        return penjing.Effect.ROUNDING

    def run(self, model, ctx):
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(value.const_value.numpy() * {factor}, name=value.name)
        ctx.change("model", "doubled")
"""


def breached(model: ir.Model, passes: Any, folder: Path, **options: Any) -> penjing.BoundExceeded:
    with pytest.raises(penjing.BoundExceeded) as caught:
        penjing.run(model, passes, reproducer=folder, **options)
    return caught.value


def replayed(folder: Path) -> tuple[int, str]:
    """Exit code and output of the folder's script, run from another place than this test's."""
    command = [sys.executable, folder / "reproduce.py"]
    done = subprocess.run(command, cwd=folder.parent.parent, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    return tmp_path / "sub" / "out.onnx.reproducer"


def module(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(path.parent))
    importlib.import_module(name)


def test_a_pass_of_a_module(parse: Parse, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PASS.format(imports="", name="double-a", factor="2")
    module(tmp_path / "lib" / "double_a.py", monkeypatch, "double_a", text)
    breached(parse(MODEL), "double-a", folder)
    (tmp_path / "lib" / "double_a.py").unlink()
    code, shown = replayed(folder)
    assert code == 1
    assert shown.startswith("double-a broke its promise:")


def test_a_pass_of_a_package_that_imports_its_neighbour(
    parse: Parse, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lib" / "doubling"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "factor.py").write_text("FACTOR = 2\n", encoding="utf-8")
    text = PASS.format(imports="from .factor import FACTOR", name="double-b", factor="FACTOR")
    (package / "double.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    importlib.import_module("doubling.double")
    breached(parse(MODEL), "double-b", folder)
    assert replayed(folder)[0] == 1


def test_a_pass_and_a_metric_of_a_script_which_is_not_run_again(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    text = PASS.format(imports="", name="double-c", factor="FACTOR") + SCRIPT_END
    script.write_text(text.replace("import numpy", "FACTOR = 2\nimport numpy", 1), encoding="utf-8")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert done.stdout == "ran\n", done.stderr
    code, shown = replayed(folder)
    assert code == 1, shown
    assert shown.startswith("double-c broke its promise:")


SCRIPT_END = """
import sys

def score(session):
    return 1.0

print("ran")
text = "m (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, -2, 3, 4}> { y = MatMul (x, w) }"
model = ir.from_onnx_text('<ir_version: 8, opset_import: ["": 17]>' + text)
try:
    penjing.run(model, "double-c", metric=score, reproducer=sys.argv[1])
except penjing.BoundExceeded:
    pass
"""


def test_a_pass_given_as_an_object_cannot_be_replayed_and_says_so(parse: Parse, folder: Path) -> None:
    class Doubles(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            value = model.graph.initializers["w"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * 2, name="w")
            return ir.passes.PassResult(model, modified=True)

    breached(parse(MODEL), [Doubles()], folder, max_error=1e-3)
    code, shown = replayed(folder)
    assert code == 2
    assert "There is no pass 'Doubles'" in shown


def test_a_metric_that_reads_what_lies_beside_it(parse: Parse, folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 2), np.float32))
    text = (
        "import pathlib, numpy as np\nX = np.load(pathlib.Path(__file__).with_name('x.npy'))\n"
        "def score(session):\n    return float(session.run(None, {'x': X})[0].sum())\n"
    )
    (tmp_path / "scoring.py").write_text(text, encoding="utf-8")
    metric = f"{tmp_path / 'scoring.py'}:score"
    breached(parse(MODEL), "prune-magnitude{threshold=1.5}", folder, metric=metric, max_drop=0.5)
    code, shown = replayed(folder)
    assert code == 1
    assert shown.startswith("The metric fell from")


@pytest.mark.parametrize(
    ("text", "feed"),
    [
        (MODEL.replace("x", "file"), {"file": np.ones((1, 2), np.float32)}),
        (
            "m (string[2] s, float[n,2] x) => (float[n,2] y, string[2] t) <float[2,2] w = {1, -2, 3, 4}> "
            "{ y = MatMul (x, w) t = Identity (s) }",
            {"s": np.array(["a", "ü"], object), "x": np.ones((1, 2), np.float32)},
        ),
        (
            "m (seq(float[n,2]) s) => (float[n,2] y) <float[2,2] w = {1, -2, 3, 4}, int64 zero = {0}> "
            "{ x = SequenceAt (s, zero) y = MatMul (x, w) }",
            {"s": [np.ones((1, 2), np.float32)]},
        ),
    ],
    ids=["an input named file", "strings", "a sequence"],
)
def test_inputs_of_any_name_and_type(parse: Parse, folder: Path, text: str, feed: Any) -> None:
    breached(parse(text), "prune-magnitude{threshold=1.5}", folder, data=[feed], max_error=1e-3)
    code, shown = replayed(folder)
    assert code == 1, shown
    assert "over the bound of 0.001" in shown


def test_of_many_runs_the_one_that_shows_it_is_kept(parse: Parse, folder: Path) -> None:
    quiet, loud = np.array([[0, 1]], np.float32), np.array([[1, 0]], np.float32)
    data = [{"x": quiet}, {"x": quiet}, {"x": loud}]
    breached(parse(MODEL), "prune-magnitude{threshold=1}", folder, data=data, max_error=1e-3)
    assert len(list((folder / "feeds").iterdir())) == 1
    assert replayed(folder)[0] == 1


def test_a_warning_under_strict(parse: Parse, folder: Path) -> None:
    breached(parse(MODEL), "remove-identities", folder, strict=True)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["strict"] is True
    assert replayed(folder)[0] == 1


def test_the_bound_holds_for_a_pass_with_a_reference_of_its_own(parse: Parse) -> None:
    @penjing.register("negate-output")
    class NegateOutput(Pass):
        """Gives minus the output, times a factor."""

        factor: float = 1.0

        def effect(self) -> Effect:
            return Effect.SAME if self.factor == 1 else Effect.LOSSY

        def reference(self, before: ir.Model, ctx: Context) -> Any:
            return lambda feeds: ({"y": -outputs["y"]} for outputs in ctx.runner.run(before, feeds))

        def run(self, model: ir.Model, ctx: Context) -> None:
            value = model.graph.initializers["w"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(-self.factor), name="w")
            ctx.change("w", "negated")

    report = penjing.run(parse(MODEL), "negate-output")
    assert report.check.comparison is not None
    assert report.check.comparison.max_error == 0
    with pytest.raises(penjing.BoundExceeded, match="over the bound"):
        penjing.run(parse(MODEL), "negate-output{factor=1.5}", max_error=1e-4)
    measured = penjing.run(parse(MODEL), "negate-output{factor=1.5}")
    assert measured.check.comparison is not None
    assert measured.check.comparison.max_error == pytest.approx(0.5, rel=1e-3)


def test_a_branch_that_no_run_takes_is_said(parse: Parse) -> None:
    text = """m (float[1] x) => (float[1] y) <float[1] zero = {0}> {
        big = Greater (x, zero)
        choice = Squeeze (big)
        [decide] y = If (choice) <
            then_branch = a () => (float[1] p) { p = Neg (x) },
            else_branch = b () => (float[1] q) { q = Identity (x) }
        >
    }"""
    one = {"x": np.ones(1, np.float32)}
    report = penjing.run(parse(text), "unify-names", data=[one])
    assert any("takes the branch decide/else" in warning for warning in report.warnings)
    report = penjing.run(parse(text), "unify-names", data=[one, {"x": -one["x"]}])
    assert not any("takes the branch" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"check": "ends"}, "check is 'ends'; it must be one of off, end, each"),
        ({"seed": -1}, "The seed is -1"),
        ({"min_sqnr": float("nan")}, "--min-sqnr is nan; it must be a number."),
        ({"max_error": "a"}, "--max-error is a; it must be a number of at least 0."),
        ({"data": 5}, "The data are 5; they must be a path"),
    ],
)
def test_arguments_of_the_wrong_kind_are_sentences(parse: Parse, options: Any, sentence: str) -> None:
    with pytest.raises(penjing.PenjingError) as caught:
        penjing.run(parse(MODEL), "clean", **options)
    assert sentence in str(caught.value)


def test_a_path_is_no_model() -> None:
    with pytest.raises(penjing.PenjingError, match="it must be a model"):
        penjing.run("model.onnx", "clean")  # type: ignore[arg-type]


def test_labels_of_samples_that_fill_no_batch_go_with_them(parse: Parse) -> None:
    model = parse("m (float[4,2] x) => (float[4,2] y) { y = Relu (x) }")
    data = {"x": np.ones((10, 2), np.float32)}
    report = penjing.run(model, "clean", data=data, labels=np.arange(10))
    assert any("The last 2 samples of 10" in warning for warning in report.warnings)
