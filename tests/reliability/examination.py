"""One of ONNX's own test models on its way through all passes, and what must hold of it.

- load -> save: no difference but explained ones (``differences.py``), and the same outputs, bit for bit.
- a pass: the verifier finds nothing; ``onnx.checker`` passes what it passed before, with shape inference (full check)
  too; ONNX Runtime takes what it took before, gives the outputs that the case expects where it did before, and moves
  no output by more than the effect of the pass allows; a second run changes nothing. Where ONNX Runtime does not run
  the model as it comes, ONNX's reference gives the expected outputs where it did before.

Of what cannot be asked of the original the reason is kept.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from penjing.ir.errors import PenjingError, one_line
from penjing.ir.files import load, save
from penjing.ir.text import text
from penjing.ir.verify import problems
from penjing.ir.versions import RUNNABLE
from penjing.passes.base import Context, Effect, Outputs, Pass
from penjing.passes.pipeline import Pipeline
from penjing.passes.registry import all_passes
from penjing.runtime.check import half_tolerance
from penjing.runtime.compare import Judge
from penjing.runtime.session import DoesNotRun, OrtRunner, open_session, run_feed

from .cases import Case, why_not_run
from .differences import differences

KEPT = "load -> save"
PACKAGE = "penjing.passes."
LEVELS = ("all", "off")

TEXTS = {
    "prune-magnitude": ["prune-magnitude{sparsity=0.5}"],
    "raise-opset": ["raise-opset", "raise-opset{to=26}"],
}
"""How passes are run that do not run with their default options, or for which there is more to try than these."""

NEED_PARTNERS = "penjing.passes.merge."
"""Modules of passes that take other models, or names of values; their own tests pair the corpus."""

MAY_REFUSE = ("penjing.passes.convert.",)
"""Modules of passes that may refuse a model with a sentence, if they leave it as it was. Others may not."""


KNOWN = {
    ("raise-opset{to=26}", "test_swish"): "ONNX Runtime 1.31 takes Swish in models of opset 24 only",
}
"""What ONNX Runtime does not take after a pass, by step and case; a fault where it does."""


@dataclass(frozen=True)
class Step:
    """A way to change a model. ``rounding`` counts its passes that may round."""

    name: str
    pipeline: Pipeline
    context: Callable[[], Context]
    may_refuse: bool = False

    @property
    def rounding(self) -> int:
        return sum(pass_.effect() is Effect.ROUNDING for pass_, _ in self.pipeline.steps())


@dataclass(frozen=True)
class Behaviour:
    """What is known of one file: outputs by level and run, or why there are none; ``None`` where nothing is wrong."""

    opens: bool
    outputs: list[list[Outputs]] | None
    not_run: str | None
    unexpected: str | None
    unreferred: str | None  # of those without outputs: why ONNX's reference does not give the expected ones
    unchecked: str | None
    half_checked: str | None  # by the full check of onnx.checker


@dataclass
class Result:
    """What was found of one model at one step. ``refused`` says why the pass, or ONNX Runtime after it, does not do."""

    changed: bool = False
    verified: bool = False
    checked: bool = False
    full: bool = False
    expected: bool = False
    referred: bool = False
    compared: bool = False
    refused: str | None = None
    faults: list[str] = field(default_factory=list)


@dataclass
class Found:
    """All about one case: results by step, and for each thing that cannot be asked of the original the reason."""

    name: str
    whole: bool
    results: dict[str, Result] = field(default_factory=dict)
    explained: Counter[str] = field(default_factory=Counter)
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """A sentence for each thing that does not hold."""
        found = [f"{self.name}: {step}: {fault}" for step, result in self.results.items() for fault in result.faults]
        return found + [f"{self.name}: {self.excluded[word]}" for word in self.excluded if word == "unknown"]


def exact_passes() -> list[tuple[str, Pass]]:
    """Every registered pass of penjing's own that is SAME or ROUNDING with the options it is run with, as text."""
    own = {name: cls.__module__ for name, cls in all_passes().items() if cls.__module__.startswith(PACKAGE)}
    names = [name for name, module in own.items() if not module.startswith(NEED_PARTNERS)]
    texts = [text for name in names for text in TEXTS.get(name, [name])]
    passes = [(text, pass_) for text in texts for pass_, _ in Pipeline.parse(text).steps()]
    return [(text, pass_) for text, pass_ in passes if pass_.effect() is not Effect.LOSSY]


def all_steps() -> list[Step]:
    """Each exact pass alone, then ``clean`` with ONNX Runtime to fold constants, and without."""
    steps = [
        Step(text, Pipeline.of(pass_), _running, type(pass_).__module__.startswith(MAY_REFUSE))
        for text, pass_ in exact_passes()
    ]
    clean = Pipeline.parse("clean")
    return [*steps, Step("clean", clean, _running), Step("clean without a runner", clean, Context)]


def _running() -> Context:
    return Context(runner=_runner())


@functools.cache
def _runner() -> OrtRunner:
    return OrtRunner()


class Examination:
    """One case on its way through all steps; files with equal bytes are looked at once."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.found = Found(case.name, case.whole)
        self.known: dict[bytes, Behaviour] = {}
        self.original = folder / "original.onnx"
        self.original.write_bytes(case.model.SerializeToString())
        runnable = onnx.ModelProto.FromString(self.original.read_bytes())
        runnable.ir_version = min(runnable.ir_version, RUNNABLE)  # newer onnx stamps more than is in the model
        (folder / "runnable.onnx").write_bytes(runnable.SerializeToString())
        self.refer = True
        self.before = self.behaviour(folder / "runnable.onnx")
        self.refer = self.before.outputs is None and self.before.unreferred is None
        self._exclude()

    def keep(self) -> None:
        """Load and save: nothing is lost, and nothing moves."""
        result = self.found.results[KEPT] = Result()
        model = load(self.original)
        self.start, self.half = text(model, digests=True), half_tolerance(model)
        result.faults += problems(model)
        result.verified = not result.faults
        self.saved = self.folder / "saved.onnx"
        save(model, self.saved)
        found = differences(self.case.model, onnx.load(self.saved, load_external_data=False))
        result.changed = any(difference.why is None for difference in found)
        result.faults += [f"differs: {difference}" for difference in found if difference.why is None]
        self.found.explained.update(difference.why.value for difference in found if difference.why)
        self.judge(result, self.saved, rounding=0)

    def take(self, step: Step) -> None:
        """Run one step on a fresh copy, and a second time on what it leaves."""
        result = self.found.results[step.name] = Result()
        model = load(self.original)
        try:
            done = step.pipeline.run(model, step.context())
        except PenjingError as error:
            if not step.may_refuse or text(model, digests=True) != self.start:
                raise
            result.refused = str(error)
            return
        result.verified = True
        once = text(model, digests=True)
        result.changed = any(one.changed for one in done)
        if once != self.start and not result.changed:
            result.faults.append("it changes the model and says that it does not")
        if not result.changed:  # it is as it was saved before
            kept = self.found.results[KEPT]
            result.checked, result.full = kept.checked, kept.full
            result.expected, result.referred, result.compared = kept.expected, kept.referred, kept.compared
            return
        output = self.folder / "changed.onnx"
        save(model, output)
        result.faults += [f"the saved model: {problem}" for problem in problems(load(output))]
        if any(one.changed for one in step.pipeline.run(model, step.context())):
            result.faults.append("a second run says that it changed something")
        if text(model, digests=True) != once:
            result.faults.append("a second run changes something")
        self.judge(result, output, step.rounding)
        if reason := KNOWN.get((step.name, self.case.name)):
            result.faults = [] if result.faults else [f"known not to hold, and does: {reason}"]
            result.refused = reason

    def judge(self, result: Result, path: Path, rounding: int) -> None:
        """Hold a file to what the original does, ``rounding`` the passes that may round on the way."""
        before, after = self.before, self.behaviour(path)
        for word, was, now in (
            ("onnx.checker refuses it now", before.unchecked, after.unchecked),
            ("the full check of onnx.checker refuses it now", before.half_checked, after.half_checked),
            ("it is not as expected any more", before.unexpected, after.unexpected),
            ("ONNX's reference does not give what is expected any more", before.unreferred, after.unreferred),
        ):
            if was is None and now is not None:
                result.faults.append(f"{word}: {now}")
        if before.opens and not after.opens:
            result.faults.append(f"ONNX Runtime takes it no more: {after.not_run}")
        elif before.outputs and after.outputs is None:
            result.faults.append(f"it runs no more: {after.not_run}")
        elif before.outputs and after.outputs:
            result.compared = True
            result.faults += self._breaches(before.outputs, after.outputs, rounding)
        result.checked = before.unchecked is None and after.unchecked is None
        result.full = before.half_checked is None and after.half_checked is None
        result.expected = before.unexpected is None and after.unexpected is None
        result.referred = before.outputs is None and before.unreferred is None and after.unreferred is None

    def _breaches(self, before: list[list[Outputs]], after: list[list[Outputs]], rounding: int) -> list[str]:
        """By the effect's own strength: SAME is bit-identical without optimizations, and one rounding with them."""
        found = []
        for level, word in enumerate(LEVELS):
            exact = word == "off" and not rounding and not self.half
            verdict = Judge(0.0 if exact else self.half)
            for old, other, new in zip(before[level], before[1 - level], after[level], strict=True):
                verdict.add(old, other, new)
            breaches = verdict.breaches("same") if exact else verdict.breaches("rounding", max(rounding, 1))
            found += [f"{breach} (optimizations {word})" for breach in breaches]
        return found

    def behaviour(self, path: Path) -> Behaviour:
        content = path.read_bytes()
        if content not in self.known:
            opens, outputs, reason = _run(path, self.case)
            unexpected = reason if outputs is None else self.case.unlike(outputs[0])
            unreferred = _unlike_reference(content, self.case) if self.refer and outputs is None else None
            checks = [_check(content, full) for full in (False, True)]
            self.known[content] = Behaviour(opens, outputs, reason, unexpected, unreferred, *checks)
        return self.known[content]

    def _exclude(self) -> None:
        before, excluded = self.before, self.found.excluded
        if before.not_run:
            known = why_not_run(before.not_run)
            excluded["run" if known else "unknown"] = known or f"no known reason why it does not run: {before.not_run}"
            if before.unreferred:
                excluded["reference"] = before.unreferred
        elif before.unexpected:
            excluded["expected"] = before.unexpected
        if before.unchecked:
            excluded["checker"] = before.unchecked
        elif before.half_checked:
            excluded["full check"] = before.half_checked


def examine(case: Case, folder: Path, steps: Sequence[Step]) -> Found:
    """Everything that is asked of one case. Whatever is raised on the way is a fault of the step it happened in."""
    examination = Examination(case, folder)
    taken: list[tuple[str, Callable[[], None]]] = [(KEPT, examination.keep)]
    taken += [(step.name, functools.partial(examination.take, step)) for step in steps]
    for name, take in taken:
        try:
            take()
        except Exception as error:
            examination.found.results.setdefault(name, Result()).faults.append(one_line(error))
            if name == KEPT:
                break
    return examination.found


def _run(path: Path, case: Case) -> tuple[bool, list[list[Outputs]] | None, str | None]:
    """Whether ONNX Runtime takes a file; its outputs at each level, or the reason that it says."""
    try:
        sessions = [open_session(path, level=level) for level in LEVELS]
    except DoesNotRun as error:
        return False, None, str(error)
    try:
        return True, [[run_feed(session, feed) for feed in case.feeds] for session in sessions], None
    except DoesNotRun as error:
        return True, None, str(error)


def _check(content: bytes, full: bool) -> str | None:
    try:
        onnx.checker.check_model(content, full_check=full)
    except Exception as error:
        return one_line(error)
    return None


def _unlike_reference(content: bytes, case: Case) -> str | None:
    """Why ONNX's reference does not give the expected outputs of a model; ``None`` where it does."""
    from onnx.reference import ReferenceEvaluator

    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            evaluator = ReferenceEvaluator(onnx.ModelProto.FromString(content))
            outputs = [dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True)) for feed in case.feeds]
    except Exception as error:
        return f"it fails: {one_line(error)}"
    return case.unlike(outputs)
