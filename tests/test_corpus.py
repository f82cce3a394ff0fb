"""ONNX's own test models: they load, are cleaned, are saved, and compute in ONNX Runtime what they computed before.

Each is cleaned twice, with ONNX's reference and with ONNX Runtime to fold constants, and is verified after each pass.
"""

from __future__ import annotations

import functools
import logging
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from penjing.ir.files import load, save
from penjing.ir.text import text
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.compare import Judge
from penjing.runtime.session import DoesNotRun, OrtRunner, open_session, run_feed

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
CLEAN = Pipeline.parse("clean")
ROUNDING_STEPS = 2  # fold-constants and fold-batchnorm

RANDOM = "random: two runs of the unchanged model differ"
EXCLUDED: dict[str, str] = {}


@dataclass(frozen=True)
class Case:
    """A model with the inputs that ONNX gives with it; none where only random ones would do."""

    name: str
    model: onnx.ModelProto
    feeds: list[dict[str, Any]]


@dataclass
class Outcome:
    """What became of some cases: how many ran in ONNX Runtime, and a sentence for each fault."""

    cases: int
    ran: int
    faults: list[str]


def node_cases(every: int = 1) -> Iterator[Case]:
    """The models of one node, or those of them whose name has a hash that ``every`` divides."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        found = collect_testcases(None)
    for case in found:
        if zlib.crc32(case.name.encode()) % every == 0:
            names = [value.name for value in case.model.graph.input]
            yield Case(case.name, case.model, [dict(zip(names, given, strict=False)) for given, _ in case.data_sets])


def whole_models() -> Iterator[Case]:
    """The models in files, with the inputs beside them or, where there are none, a ramp from 0 to 1."""
    for path in sorted(DATA.rglob("*.onnx")):
        model = onnx.load(path)
        sets = sorted(path.parent.glob("test_data_set_*")) if path.name == "model.onnx" else []
        feeds = [{value.name: _read(folder / f"input_{at}.pb", value) for at, value in enumerate(_inputs(model))}
                 for folder in sets]
        name = path.parent.name if sets else path.stem
        yield Case(name, model, feeds or [{value.name: _ramp(value) for value in _inputs(model)}])


def outcome(cases: Iterator[Case], folder: Path) -> Outcome:
    done = Outcome(0, 0, [])
    for case in cases:
        done.cases += 1
        if case.name not in EXCLUDED:
            try:
                done.ran += holds(case, folder)
            except Exception as error:
                done.faults.append(f"{case.name}: {type(error).__name__}: {error}")
    return done


def holds(case: Case, folder: Path) -> bool:
    """Whether ONNX Runtime runs the case; raises where cleaning does not keep what it promises."""
    path = folder / "model.onnx"
    path.write_bytes(case.model.SerializeToString())
    expected = runs(path, case.feeds)
    texts: dict[str, None] = {}
    for given in ({}, {"runner": OrtRunner()}):
        model = load(path)
        CLEAN.run(model, Context(**given))
        once = text(model, digests=True)
        assert CLEAN_AGAIN(model, given) == once, "a second run changes something"
        if once not in texts:
            texts[once] = None
            save(model, folder / "clean.onnx")
            assert text(load(folder / "clean.onnx"), digests=True) == once, "saving and loading change something"
            judge(expected, runs(folder / "clean.onnx", case.feeds))
    return expected is not None
