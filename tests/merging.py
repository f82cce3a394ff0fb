"""What tests of merges share: a run that its check has proven, and one that is refused."""

from typing import Any

import onnx_ir as ir
import pytest

from penjing.ir.errors import PenjingError
from penjing.runtime.report import Report
from penjing.runtime.run import run


def merged(model: ir.Model, text: str, data: Any = None, labels: Any = None, **partners: ir.Model) -> Report:
    """The run, every segment of which was checked and holds; ``model`` is its result."""
    report = run(model, text, models=partners, data=data, labels=labels)
    assert report.check.not_run is None
    assert report.check.segments
    assert all(segment["breaches"] == [] for segment in report.check.segments)
    return report


def refused(model: ir.Model, text: str, data: Any = None, labels: Any = None, **partners: ir.Model) -> str:
    """The sentence with which the run is refused."""
    with pytest.raises(PenjingError) as error:
        run(model, text, models=partners, data=data, labels=labels)
    return str(error.value)


def ends(model: ir.Model) -> tuple[list[str], list[str]]:
    """Inputs and outputs with their shapes, as text."""
    graph = model.graph
    return [f"{v.name}{v.shape}" for v in graph.inputs], [f"{v.name}{v.shape}" for v in graph.outputs]
