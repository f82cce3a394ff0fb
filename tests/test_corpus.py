"""ONNX's own test models: they load, are cleaned, are saved, and compute in ONNX Runtime what they computed before.

Each is cleaned twice, with ONNX's reference and with ONNX Runtime to fold constants, and is verified after each pass.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from penjing.ir.files import load, save
from penjing.ir.text import text
from penjing.ir.versions import RUNNABLE
from penjing.passes.base import Context, Effect, Outputs
from penjing.passes.pipeline import Pipeline
from penjing.runtime.compare import Judge
from penjing.runtime.feeds import read_feeds
from penjing.runtime.session import DoesNotRun, OrtRunner, open_session, run_feed

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
CLEAN = Pipeline.parse("clean")
ROUNDING = sum(pass_.effect() is Effect.ROUNDING for pass_, _ in CLEAN.steps())
GIVEN: list[dict[str, Any]] = [{}, {"runner": OrtRunner()}]

NOT_RUN = {  # words of ONNX Runtime's about a case as it comes: why nothing can be compared after cleaning it
    "only *guarantees* support for models stamped with official": "newer than the installed ONNX Runtime",
    "Could not find an implementation": "no CPU kernel for these types or this version",
    "Failed to find kernel": "no CPU kernel for these types or this version",
    "is not a registered function/op": "an operator of a preview domain",
    "Unrecognized attribute": "a newer revision of an operator",
    "Type parameter (T) of Optype": "types that ONNX Runtime checks more strictly",
    "Failed to construct locale": "the locale of the case is not installed",
    "Batchwise recurrent operations": "layout=1",
    "inconsistent total_sequence_length": "a newer revision of Attention",
    "Non per-tensor quantization": "ConvInteger with many zero points",
    "not defined for empty set": "ReduceMax of no booleans",
    "non-string": "strings together with outputs that numpy lacks a type for",
    "can't be converted to MLDataType": "inputs that numpy lacks a type for",
}


@dataclass(frozen=True)
class Case:
    """A model with the inputs that come with it."""

    name: str
    model: onnx.ModelProto
    feeds: list[dict[str, Any]]


def node_cases(every: int = 1) -> Iterator[Case]:
    """The models of one node, or those of them whose name has a hash that ``every`` divides."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        found = collect_testcases(None)
    for case in found:
        if zlib.crc32(case.name.encode()) % every == 0:
            names = [value.name for value in case.model.graph.input]
            feeds = [dict(zip(names, map(_fed, given), strict=False)) for given, _ in case.data_sets]
            yield Case(case.name, case.model, feeds)


def whole_models() -> Iterator[Case]:
    """The models in files, with the inputs beside them; a ramp from 0 to 1 where there are none."""
    for path in sorted(DATA.rglob("*.onnx")):
        model = onnx.load(path)
        if path.name == "model.onnx":
            yield Case(path.parent.name, model, [dict(feed) for feed in read_feeds(path.parent, load(path))])
        else:
            constants = {tensor.name for tensor in model.graph.initializer}
            feed = {value.name: _ramp(value) for value in model.graph.input if value.name not in constants}
            yield Case(path.stem, model, [feed])


def _fed(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _ramp(value: onnx.ValueInfoProto) -> np.ndarray:
    shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    return np.linspace(0, 1, math.prod(shape), dtype=np.float32).reshape(shape)


def faults(cases: Iterable[Case], folder: Path) -> tuple[int, int, list[str]]:
    """How many cases there were, how many ran in ONNX Runtime, and a sentence for each that does not hold."""
    count = ran = 0
    found = []
    for case in cases:
        count += 1
        try:
            ran += holds(case, folder)
        except Exception as error:
            found.append(f"{case.name}: {type(error).__name__}: {error}")
    return count, ran, found


def holds(case: Case, folder: Path) -> bool:
    """Whether ONNX Runtime runs the case; raises where cleaning does not keep what it promises."""
    original, cleaned = folder / "original.onnx", folder / "cleaned.onnx"
    original.write_bytes(case.model.SerializeToString())
    runnable = onnx.ModelProto.FromString(original.read_bytes())
    runnable.ir_version = min(runnable.ir_version, RUNNABLE)  # newer onnx stamps more than is in the model
    (folder / "runnable.onnx").write_bytes(runnable.SerializeToString())
    opens, expected = run(folder / "runnable.onnx", case)
    if isinstance(expected, str):
        assert any(words in expected for words in NOT_RUN), expected
    seen = []
    for given in GIVEN:
        model = load(original)
        CLEAN.run(model, Context(**given))
        once = text(model, digests=True)
        steps = CLEAN.run(model, Context(**given))
        assert text(model, digests=True) == once, "a second run changes something"
        assert not any(step.changed for step in steps), "a second run says that it changed something"
        if once not in seen:
            seen.append(once)
            save(model, cleaned)
            still_opens, found = run(cleaned, case)
            assert still_opens or not opens, "ONNX Runtime takes it no more"
            if not isinstance(expected, str):
                assert not isinstance(found, str), f"it runs no more: {found}"
                judge(expected, found)
    return not isinstance(expected, str)


def run(path: Path, case: Case) -> tuple[bool, list[list[Outputs]] | str]:
    """Whether ONNX Runtime takes a file; its outputs at full optimization and at none, or the reason that it says."""
    try:
        sessions = [open_session(path, level=level) for level in ("all", "off")]
    except DoesNotRun as error:
        return False, str(error)
    try:
        return True, [[run_feed(session, feed) for feed in case.feeds] for session in sessions]
    except DoesNotRun as error:
        return True, str(error)


def judge(expected: list[list[Outputs]], found: list[list[Outputs]]) -> None:
    for level in (0, 1):
        verdict = Judge()
        for old, plain, new in zip(expected[level], expected[1 - level], found[level], strict=True):
            verdict.add(old, plain, new)
        assert verdict.breaches("rounding", ROUNDING) == []


def test_every_tenth_model_of_one_node(tmp_path: Path) -> None:
    count, ran, found = faults(node_cases(every=10), tmp_path)
    assert found == []
    assert count > 150
    assert ran > 0.7 * count


def test_whole_models(tmp_path: Path) -> None:
    count, ran, found = faults(whole_models(), tmp_path)
    assert found == []
    assert count == 149
    assert ran > 100
