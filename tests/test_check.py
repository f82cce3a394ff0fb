"""Wrong passes are caught: structure by the verifier, numbers by the check; bisected, and reproduced alone."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import onnx_ir as ir
import onnxruntime
import pytest
from rich.console import Console

import penjing
from penjing.ir.errors import UsageError
from penjing.ir.text import text
from penjing.models import zoo
from penjing.runtime.run import BoundExceeded
from penjing.runtime.show import show_report

METRIC = Path(__file__).with_name("wrong_passes.py")
SCHEMA = json.loads((Path(penjing.__file__).parent / "runtime" / "report.schema.json").read_text(encoding="utf-8"))

spec = importlib.util.spec_from_file_location("wrong_passes", Path(__file__).with_name("wrong_passes.py"))
assert spec is not None
assert spec.loader is not None
wrong_passes = importlib.util.module_from_spec(spec)
sys.modules["wrong_passes"] = wrong_passes
spec.loader.exec_module(wrong_passes)


@pytest.fixture
def model(parse: Callable[[str], ir.Model]) -> ir.Model:
    return parse("""
        m (float[n,3] x) => (float[n,2] y)
        <float[3,2] w = {0.5, -1.0, 2.0, 0.25, -0.125, 1.0}, float[2] b = {0.1, -0.2}>
        { h = MatMul (x, w)
          s = Add (h, b)
          y = Relu (s) }
    """)


def run_breached(model: ir.Model, passes: Any, **options: Any) -> BoundExceeded:
    before = text(model)
    with pytest.raises(BoundExceeded) as caught:
        penjing.run(model, passes, **options)
    assert text(model) == before, "a broken bound leaves the model as it was"
    jsonschema.validate(caught.value.report.as_json(), SCHEMA)
    return caught.value


@pytest.mark.parametrize("mode", ["end", "each"])
def test_wrong_numbers_are_bisected_to_the_first_bad_pass(model: ir.Model, mode: str) -> None:
    error = run_breached(model, "right-rename,wrong-numbers{by=0.02},right-rename,wrong-numbers", check=mode)
    assert str(error).startswith("wrong-numbers{by=0.02} broke its promise:")
    assert "y" in str(error)


def test_numbers_within_rounding_pass(model: ir.Model) -> None:
    report = penjing.run(model, "right-rename,wrong-numbers{by=1e-9}")
    assert report.failure is None
    assert [segment["effect"] for segment in report.check.segments] == ["rounding"]
    assert report.check.random
    jsonschema.validate(report.as_json(), SCHEMA)


def test_without_a_check_the_report_says_so(model: ir.Model) -> None:
    report = penjing.run(model, "wrong-numbers", check="off")
    assert report.check.mode == "off"
    assert report.check.segments == []
    assert report.check.comparison is None


def test_wrong_structure_is_caught_by_the_verifier(model: ir.Model, tmp_path: Path) -> None:
    error = run_breached(model, "right-rename,wrong-structure", check="off", reproducer=tmp_path / "r")
    assert "wrong-structure broke its promise" in str(error)
    assert "nowhere" in str(error)


def test_a_pass_that_crashes_is_named(model: ir.Model) -> None:
    error = run_breached(model, "right-rename,wrong-crash")
    assert "wrong-crash broke its promise" in str(error)
    assert "IndexError: the pass fell over" in str(error)


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        ("right-rename,wrong-numbers", {}),
        ("right-rename,wrong-structure", {}),
        ("right-rename,wrong-crash", {}),
        ("right-rename,lossy-nudge{by=0.5}", {"max_error": 0.01}),
        ("lossy-nudge{by=0.5}", {"metric": f"{METRIC}:sum_of_outputs", "max_drop": -0.0}),
    ],
)
def test_the_reproducer_fails_alone(model: ir.Model, tmp_path: Path, passes: str, options: Any) -> None:
    folder = tmp_path / "out.onnx.reproducer"
    error = run_breached(model, passes, reproducer=folder, **options)
    assert error.report.reproducer == str(folder)
    done = subprocess.run(
        [sys.executable, folder / "reproduce.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.strip(), "it says what it found"
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts["versions"]["onnxruntime"] == onnxruntime.__version__


def test_a_lossy_pass_is_measured_and_bounded(model: ir.Model) -> None:
    report = penjing.run(model.clone(), "lossy-nudge{by=0.001}")
    assert report.check.comparison is not None
    found = report.check.comparison.max_error
    assert found is not None
    assert 1e-5 < found < 1e-2
    penjing.run(model.clone(), "lossy-nudge{by=0.001}", max_error=0.01, min_sqnr=30)
    assert "over the bound" in str(run_breached(model, "lossy-nudge{by=0.5}", max_error=0.01))
    assert "under the bound" in str(run_breached(model, "lossy-nudge{by=0.5}", min_sqnr=60))
    assert "over the bound" in str(run_breached(model, "lossy-nudge{by=0.5}", max_error=0.01, check="off"))


def test_a_pass_that_changed_nothing_is_a_warning_and_an_error_under_strict(model: ir.Model) -> None:
    report = penjing.run(model.clone(), "remove-identities")
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith("remove-identities changed nothing")
    assert "--strict" in str(run_breached(model, "remove-identities", strict=True))


def test_metric_before_and_after(model: ir.Model) -> None:
    report = penjing.run(model.clone(), "lossy-nudge{by=0.5}", metric=wrong_passes.sum_of_outputs, max_drop=100)
    assert report.metric is not None
    assert report.metric.after is not None
    assert report.metric.after < report.metric.before
    error = run_breached(model, "lossy-nudge{by=0.5}", metric=wrong_passes.sum_of_outputs, max_drop=0.1)
    assert "The metric fell from" in str(error)
    with pytest.raises(UsageError, match="give one with --metric"):
        penjing.run(model, "clean", max_drop=0.1)


def test_what_was_not_measured_is_not_reported(model: ir.Model, capsys: pytest.CaptureFixture[str]) -> None:
    error = run_breached(model, "wrong-structure", metric=wrong_passes.sum_of_outputs)
    assert error.report.output is None
    assert error.report.metric is not None
    assert error.report.metric.after is None
    show_report(error.report, Console(width=120))
    shown = capsys.readouterr().out
    assert re.search(r"^bytes +[\d,]+ +- *$", shown, re.MULTILINE)
    assert re.search(r"^sum_of_outputs +\S+ +- *$", shown, re.MULTILINE)


def test_a_model_that_fails_after_passes_is_a_breach(model: ir.Model) -> None:
    from penjing.passes.registry import register

    @register("wrong-shape")
    class WrongShape(penjing.Pass):
        """Cuts a row off every matrix."""

        def effect(self) -> penjing.Effect:
            return penjing.Effect.LOSSY

        def run(self, model: ir.Model, ctx: penjing.Context) -> None:
            value = model.graph.initializers["w"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy()[:2], name="w")
            value.shape = ir.Shape([2, 2])
            ctx.change("w", "cut")

    error = run_breached(model, "right-rename,wrong-shape")
    assert "wrong-shape broke its promise" in str(error)
    assert "runs no more" in str(error)


def test_a_run_on_a_real_model_holds_and_is_the_same_each_time(tmp_path: Path) -> None:
    data = zoo.data("validation")
    written = []
    for name in ("a", "b"):
        model = zoo.load("cnn-a-legacy")
        report = penjing.run(
            model,
            "clean,prune-magnitude{sparsity=0.3}",
            data={"image": data["image"]},
            metric="penjing.models.zoo:validation_accuracy",
            max_drop=0.02,
        )
        assert report.output is not None
        assert abs(report.output.sparsity - 0.3) < 1e-3
        penjing.save(model, tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
