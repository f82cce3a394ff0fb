"""ONNX's own test models go through every exact pass and ``penjing run``: a part of ``reliability/corpus.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from reliability import examination
from reliability.cases import NODE_CASES, NOT_RUN, WHOLE_MODELS, Case, node_cases, whole_models
from reliability.corpus import COUNTS, HEAD, asked, readme, report
from reliability.corpus_runs import Run, clean_passes, run_case, runs_report
from reliability.examination import KEPT, Found, Step, all_steps, examine
from wrong_passes import WrongNumbers

from penjing.ir.errors import UsageError
from penjing.passes.base import Context, Effect, Pass
from penjing.passes.pipeline import Pipeline


def examined(cases: list[Case], folder: Path, steps: Sequence[Step]) -> list[Found]:
    """Every step on every case, with nothing found and nothing left out."""
    found = [examine(case, folder, steps) for case in cases]
    assert [fault for one in found for fault in one.faults] == []
    names = {KEPT, *(step.name for step in steps)}
    for one in found:
        assert set(one.results) == names
        assert one.excluded.get("run") in {None, *NOT_RUN.values()}
        for step, result in one.results.items():
            held = result.refused or all(getattr(result, word) for word in COUNTS if asked(one, word))
            assert held, f"{one.name}: {step}: {result}"
    return found


def share(found: list[Found], word: str) -> float:
    """Of all models the part for which ``word`` can be asked."""
    return sum(asked(one, word) for one in found) / len(found)


def test_every_tenth_model_of_one_node(tmp_path: Path) -> None:
    steps = all_steps()
    assert {"clean", "fold-constants", "lower-ir", "raise-opset", "strip-metadata"} < {step.name for step in steps}
    found = examined(node_cases(every=10), tmp_path, steps)
    assert len(found) > 150
    assert share(found, "checked") == 1
    assert share(found, "compared") > 0.7
    assert share(found, "expected") > 0.7
    assert share(found, "referred") > 0.1
    changed = Counter(step for one in found for step, result in one.results.items() if result.changed)
    assert all(changed[step] > 5 for step in ("clean", "fold-constants", "infer-shapes", "raise-opset", "unify-names"))
    assert f"| clean | {len(found)} | 0 |".replace("clean", "`clean`") in report(found)
    assert f"| {' | '.join(HEAD)} |" in readme(found)


def test_whole_models(tmp_path: Path) -> None:
    """The nine of real architectures, which take as long as all others together, only through ``clean`` here."""
    cases, steps = whole_models(), all_steps()
    large = [case for case in cases if case.name.startswith("light/")]
    found = examined([case for case in cases if case not in large], tmp_path, steps)
    found += examined(large, tmp_path, [step for step in steps if step.name == "clean"])
    assert len(large) == 9
    assert len(found) == WHOLE_MODELS
    assert share(found, "compared") > 0.7
    assert share(found, "expected") > 0.7


def test_penjing_run_of_every_clean_pass(tmp_path: Path) -> None:
    cases, pipelines = [*node_cases(every=120), *whole_models(every=30)], clean_passes()
    runs = [run for case in cases for run in run_case(case, tmp_path, pipelines)]
    assert [run for run in runs if run.outcome == "fault"] == []
    assert len(runs) == len(cases) * len(pipelines)
    assert len(pipelines) >= 9
    counts = Counter(run.outcome for run in runs)
    assert counts["checked"] > 0.6 * len(runs)
    assert counts["refused"] > 0
    assert f"| `clean` | {len(cases)} |" in runs_report(runs)


def test_the_cases_are_all_there() -> None:
    names = [case.name for case in node_cases()]
    assert len(set(names)) == len(names) == NODE_CASES
    assert all(case.feeds and case.expected for case in node_cases(every=10))


class Unsaid(Pass):
    """Renames the graph, and does not say so."""

    name = "unsaid"

    def run(self, model: ir.Model, ctx: Context) -> None:
        model.graph.name = "other"


class Restless(Pass):
    """Changes the model each time."""

    name = "restless"

    def run(self, model: ir.Model, ctx: Context) -> None:
        model.producer_name = (model.producer_name or "") + "!"
        ctx.change("model", "praised")


class Sour(Pass):
    """Refuses, after it has changed something."""

    name = "sour"

    def run(self, model: ir.Model, ctx: Context) -> None:
        model.graph.name = "other"
        raise UsageError("sour: not this one.")


class Same(WrongNumbers):
    """Moves weights by little, and says that they are the same."""

    name = "same"
    by = 1e-7

    def effect(self) -> Effect:
        return Effect.SAME


@pytest.fixture
def layer() -> Case:
    """A model with weights, and of the original's outputs."""
    (case,) = [case for case in whole_models() if case.name == "pytorch-converted/test_Conv2d"]
    return case


@pytest.mark.parametrize(
    ("pass_", "sentence"),
    [
        (WrongNumbers(), "it is not as expected any more: "),
        (WrongNumbers(by=1e-4), "over the bound 1.0e-05 of max|y|"),
        (Same(by=1e-7), "not bit-identical"),
        (Unsaid(), "it changes the model and says that it does not"),
        (Restless(), "a second run changes something"),
        (Sour(), "UsageError: sour: not this one."),
    ],
)
def test_a_wrong_pass_is_caught(layer: Case, tmp_path: Path, pass_: Pass, sentence: str) -> None:
    found = examine(layer, tmp_path, [Step("wrong", Pipeline.of(pass_), Context, may_refuse=True)])
    assert found.results[KEPT].faults == []
    assert any(fault.startswith(f"{layer.name}: wrong: ") and sentence in fault for fault in found.faults), found.faults


def test_a_save_that_loses_something_is_caught(layer: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: ir.Model, path: Path) -> None:
        proto = ir.to_proto(model)
        del proto.graph.node[0].attribute[0]
        path.write_bytes(proto.SerializeToString())

    monkeypatch.setattr(examination, "save", forgetful)
    faults = examine(layer, tmp_path, []).faults
    assert any("is gone" in fault for fault in faults), faults


def test_a_model_that_does_not_run_for_no_known_reason_is_a_fault(
    layer: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "why_not_run", lambda sentence: None)
    broken = onnx.ModelProto()
    broken.CopyFrom(layer.model)
    broken.graph.node[0].domain = "nowhere"
    broken.opset_import.add(domain="nowhere", version=1)
    (fault, *_) = examine(Case("x", broken, layer.feeds, layer.expected), tmp_path, []).faults
    assert "no known reason why it does not run: " in fault


def test_a_run_with_an_unknown_end_is_a_fault(tmp_path: Path) -> None:
    from reliability.corpus_runs import judged

    assert judged("x", "clean", 1, "said", tmp_path / "o", tmp_path / "r").outcome == "fault"
    assert judged("x", "clean", 2, "penjing: sorry", tmp_path / "o", tmp_path / "r").outcome == "fault"
    assert judged("x", "clean", 0, "", tmp_path / "o", tmp_path / "r").outcome == "fault"
    known = judged("x", "clean", 2, "penjing: opset 99 is newer than ONNX Runtime takes", tmp_path, tmp_path)
    assert known == Run("x", "clean", "refused", "newer than the installed ONNX Runtime")
