"""What a run did, as data: the JSON report, whose schema is ``report.schema.json``, and the table read off it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from ..ir.address import graphs
from ..ir.atomic import replace_file
from ..ir.errors import PenjingError, one_line
from ..ir.summary import Figures
from ..passes.instruments import Step
from ..passes.ledger import Ledger
from .compare import Comparison

if TYPE_CHECKING:
    from .kernels import Kernels

Mode = Literal["off", "end", "each"]

SCHEMA = 1  # raised when a reader of an older report would misread a newer one
_QUANTIZED = re.compile(r"Q(?!uickGelu)|.*[Qq]uantize|.*Integer|.*NBits")
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
    """How the result was checked: ``feeds`` says on what, ``segments`` the verdicts, ``comparison`` the whole.

    ``beside`` names the pass with whose reference it was compared, ``None`` where that was the original model.
    """

    mode: Mode
    feeds: str | None = None
    random: bool = False
    not_run: str | None = None
    beside: str | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    comparison: Comparison | None = None

    def as_json(self) -> dict[str, Any]:
        found = {} if self.comparison is None else self.comparison.as_json()
        return {
            "mode": self.mode,
            "feeds": self.feeds,
            "random": self.random,
            "not_run": self.not_run,
            "beside": self.beside,
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
    kernels: Kernels | str | None = None  # see ``quantized_kernels``

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
                "kernels": counts(self.kernels),
                "warnings": self.warnings,
                "failure": self.failure,
                "reproducer": self.reproducer,
            }
        )
        return found

    def write(self, path: str | Path) -> None:
        """Write the report as JSON, all of it or nothing. Raises ``BadFile``."""
        replace_file(path, (json.dumps(self.as_json(), indent=2) + "\n").encode())


def quantized_kernels(model: ir.Model, ran: bool) -> Kernels | str | None:
    """The kernels of ``model``, or why they are not counted: it is large, or it never ``ran`` here.

    None for a model without operators that make, read or compute with quantized numbers.
    """
    from .kernels import kernels
    from .session import LARGE, tensor_bytes

    if not any(_QUANTIZED.match(node.op_type) for _, graph in graphs(model) for node in graph):
        return None
    if not ran:
        return "not counted: nothing was run"
    if tensor_bytes(model) > LARGE:
        return "not counted: a large model"
    try:
        return kernels(model)
    except Exception as error:  # no run fails for what is only told beside it
        return f"not counted: {error if isinstance(error, PenjingError) else one_line(error)}"


def counts(found: Kernels | str | None) -> dict[str, Any] | None:
    """Kernels as JSON values: how many layers there are, and run on integers, and which operators do not and why."""
    if found is None:
        return None
    if isinstance(found, str):
        return {"not_counted": found.removeprefix("not counted: ")}
    return {
        "layers": found.layers,
        "fused": found.fused,
        "integer": dict(found.integer),
        "quantizers": dict(found.quantizers),
        "floating": [one._asdict() for one in found.floating],
        "others": [one._asdict() for one in found.others],
    }


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
