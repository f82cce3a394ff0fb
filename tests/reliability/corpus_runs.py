"""``penjing run`` of every clean pass, and of ``clean``, over ONNX's own test models, with the check on.

The command line is called within this process, for its start would take most of the time, and does not time the models
(up to two seconds each). Inputs are those of the case, written as an ONNX test data set where they are not in files;
random ones where those of the case hold NaN.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from penjing import cli
from penjing.ir.files import load
from penjing.passes.registry import all_passes
from penjing.runtime.feeds import write_data_set

from .cases import Case, why_not_run
from .tables import by_reason, table

FAMILY = "penjing.passes.clean."

WARNINGS = {
    "changed nothing": "the pass changed nothing",
    "check: not run": "the check was not run",
    "The check says little of output": "the runtime's own optimizations move an output by more than 1 %",
    "No run on these feeds takes the branch": "a branch that no run takes",
}
"""Words of a warning, and what kind of warning it is."""

OUTCOMES = {
    "checked": "exit 0, checked on its inputs",
    "random": "exit 0, checked on random inputs",
    "not checked": "exit 0, `check: not run`",
    "refused": "exit 2, refused",
    "fault": "faults",
}

UNCHECKED = {
    "no random feed ran": "no random feed runs",
    "of a type that no random feed is drawn for": "an input of a type that no random feed is drawn for",
    "all outputs are NaN": "all outputs are NaN",
}
"""Words of ``check: not run``, and the kind of reason."""


@dataclass(frozen=True)
class Run:
    """One run: ``outcome`` is one of ``OUTCOMES``, and ``why`` gives the reason of all but "checked"."""

    case: str
    pipeline: str
    outcome: str
    why: str = ""
    warnings: tuple[str, ...] = ()


def clean_passes() -> list[str]:
    """The passes of the family that cleans, and the pipeline of that name."""
    return [*(name for name, cls in all_passes().items() if cls.__module__.startswith(FAMILY)), "clean"]


def run_case(case: Case, folder: Path, pipelines: Sequence[str]) -> Iterator[Run]:
    """Every pipeline over one case, each by ``penjing run`` into a new file."""
    source = folder / "model.onnx"
    source.write_bytes(case.model.SerializeToString())
    shutil.rmtree(folder / "data", ignore_errors=True)
    data = [] if _holds_nan(case.feeds) else ["--data", str(case.folder or _written(case, folder / "data"))]
    for pipeline in pipelines:
        target, report = folder / "out.onnx", folder / "report.json"
        for file in (target, report):
            file.unlink(missing_ok=True)
        code, said = invoke(["run", str(source), "-p", pipeline, "-o", str(target), "--json", str(report), *data])
        yield judged(case.name, pipeline, code, said, target, report)


def invoke(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command line and what it says on standard error."""
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
        mock.patch.object(cli, "_latency", return_value=None),
    ):
        try:
            cli.main(arguments)
        except SystemExit as error:
            return int(error.code or 0), said.getvalue().strip()
    raise AssertionError("the command line does not exit")


def judged(case: str, pipeline: str, code: int, said: str, target: Path, report: Path) -> Run:
    """What one run came to; it is a fault where neither the model nor a known reason is there."""
    if code == 2:
        why = why_not_run(said)
        return Run(case, pipeline, "refused" if why else "fault", why or said)
    if code or not target.is_file() or not report.is_file():
        return Run(case, pipeline, "fault", f"exit {code}: {said}")
    load(target)
    found = json.loads(report.read_text())
    warnings = tuple(_kind(warning, WARNINGS) for warning in found["warnings"])
    if unknown := [warning for warning in warnings if warning not in WARNINGS.values()]:
        return Run(case, pipeline, "fault", f"an unknown warning: {unknown[0]}", warnings)
    if reason := found["check"]["not_run"]:
        return Run(case, pipeline, "not checked", _kind(reason, UNCHECKED), warnings)
    if found["check"]["max_error"] is None and not found["check"]["outputs"]:
        return Run(case, pipeline, "fault", "the report holds no check", warnings)
    return Run(case, pipeline, "random" if found["check"]["random"] else "checked", "", warnings)


def _kind(sentence: str, kinds: dict[str, str]) -> str:
    return next((kind for words, kind in kinds.items() if words in sentence), sentence)


def _holds_nan(value: Any) -> bool:
    """Whether there is NaN in any array, which ``--data`` takes for a fault of the data."""
    if isinstance(value, list | dict):
        return any(map(_holds_nan, value.values() if isinstance(value, dict) else value))
    return value is not None and value.dtype.kind not in "OUSiub" and bool(np.isnan(value.astype(complex)).any())


def _written(case: Case, folder: Path) -> Path:
    """The inputs of a case as ``test_data_set_<n>`` in ``folder``."""
    source = load(folder.parent / "model.onnx")
    for number, feed in enumerate(case.feeds):
        write_data_set(feed, source, folder / f"test_data_set_{number}")
    return folder


def runs_report(runs: Sequence[Run]) -> str:
    """Counts by pass, then the reasons and kinds of warnings with their counts."""
    rows = []
    for pipeline in dict.fromkeys(run.pipeline for run in runs):
        counts = Counter(run.outcome for run in runs if run.pipeline == pipeline)
        rows.append([f"`{pipeline}`", counts.total(), *(counts[word] for word in OUTCOMES)])
    parts = [table(["`penjing run -p`", "models", *OUTCOMES.values()], rows)]
    for word, title in list(OUTCOMES.items())[2:]:
        parts.append(by_reason(title, [(run.why, run.case) for run in runs if run.outcome == word]))
    kinds = Counter(kind for run in runs for kind in run.warnings)
    parts.append(table(["warnings", "runs"], kinds.most_common()))
    return "\n".join(parts)
