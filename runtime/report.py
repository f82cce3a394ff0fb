"""What a run did, as data: the JSON report, whose schema is ``report.schema.json``, and the table read off it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..ir.atomic import replace_file
from ..ir.summary import Figures
from ..passes.instruments import Step
from ..passes.ledger import Ledger
from .compare import Comparison

Mode = Literal["off", "end", "each"]

SCHEMA = 1  # raised when a reader of an older report would misread a newer one
SHOWN_ENTRIES = 1000  # changes and skips listed one by one for each pass; beyond, only counted


@dataclass
class PassReport:
    """One pass: its text, the named pipeline it came from, wall seconds, and its ledger."""

    name: str
    text: str
    group: str | None
    seconds: float
    ledger: Ledger

    @classmethod
    def of(cls, step: Step) -> PassReport:
        return cls(step.pass_.name or str(step.pass_), str(step.pass_), step.group, step.seconds, step.ledger)

    def as_json(self) -> dict[str, Any]:
        changes, skips = self.ledger.changes, self.ledger.skips
        return {
            "name": self.name,
            "text": self.text,
            "group": self.group,
            "seconds": round(self.seconds, 6),
            "changed_count": len(changes),
            "skipped_count": len(skips),
            "changed": [dataclasses.asdict(change) for change in changes[:SHOWN_ENTRIES]],
            "skipped": [dataclasses.asdict(skip) for skip in skips[:SHOWN_ENTRIES]],
        }


@dataclass
class CheckReport:
    """How the result was checked: ``feeds`` says on what, ``segments`` the verdicts, ``comparison`` the whole."""

    mode: Mode
    feeds: str | None = None
    random: bool = False
    not_run: str | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    comparison: Comparison | None = None

    def as_json(self) -> dict[str, Any]:
        found = {} if self.comparison is None else self.comparison.as_json()
        return {
            "mode": self.mode,
            "feeds": self.feeds,
            "random": self.random,
            "not_run": self.not_run,
            "segments": self.segments,
            **{key: found.get(key) for key in ("max_error", "min_sqnr", "outputs")},
        }


@dataclass
class MetricReport:
    """The user's metric before and after (``None`` where the run did not come so far).

    ``max_drop`` is the bound on the loss, if one was given.
    """

    name: str
    before: float
    after: float | None = None
    max_drop: float | None = None


@dataclass
class Report:
    """Everything about one run of a pipeline. ``failure`` says why it failed, in a sentence; else it is ``None``."""

    source: str | None
    passes_text: str
    seed: int
    input: Figures
    output: Figures | None = None
    target: str | None = None
    passes: list[PassReport] = field(default_factory=list)
    check: CheckReport = field(default_factory=lambda: CheckReport("off"))
    metric: MetricReport | None = None
    latency: dict[str, float] | None = None
    warnings: list[str] = field(default_factory=list)
    failure: str | None = None
    reproducer: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values, by ``report.schema.json``; infinities and NaN become ``null``."""
        found: dict[str, Any] = _finite(
            {
                "schema": SCHEMA,
                "versions": versions(),
                "source": self.source,
                "target": self.target,
                "pipeline": self.passes_text,
                "seed": self.seed,
                "input": self.input.as_json(),
                "output": None if self.output is None else self.output.as_json(),
                "passes": [report.as_json() for report in self.passes],
                "check": self.check.as_json(),
                "metric": None if self.metric is None else dataclasses.asdict(self.metric),
                "latency": self.latency,
                "warnings": self.warnings,
                "failure": self.failure,
                "reproducer": self.reproducer,
            }
        )
        return found

    def write(self, path: str | Path) -> None:
        """Write the report as JSON, all of it or nothing. Raises ``BadFile``."""
        replace_file(path, (json.dumps(self.as_json(), indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("penjing", "onnx", "onnx-ir", "onnxruntime", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
