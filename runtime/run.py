"""The main job: passes over a model, checked against the original, held to the user's bounds, and told in a report."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import onnx_ir as ir

from ..ir.address import printable
from ..ir.edit import become
from ..ir.errors import BadFile, InvalidModel, PenjingError, UsageError
from ..ir.files import load
from ..ir.interrupts import uninterrupted
from ..ir.summary import figures
from ..ir.verify import verify
from ..passes.base import Context, Feeds, Limits
from ..passes.instruments import Instrument, Step
from ..passes.pipeline import Pipeline, Steps
from .asked import Asked
from .check import Breach, Checker, bisect, brings_reference, compare_reference, judge_models, unvisited
from .compare import Comparison
from .draws import NoFeeds, tried
from .feeds import Feeds as FeedSet
from .feeds import Labels, read_labels
from .functions import load_function
from .progress import Progress
from .report import CheckReport, MetricReport, Mode, PassReport, Report, quantized_kernels
from .reproducer import require_room, write_reproducer
from .session import LARGE, OrtRunner, require_runnable, tensor_bytes
from .sizes import too_large

Path_ = str | os.PathLike[str]
NOISY = 0.01  # noise, as a share of max|y|, above which a check is a weak one


class BoundExceeded(PenjingError):
    """A check, bound or metric failed, or a warning under ``strict``; ``report`` tells all, the model is as it was."""

    exit_code = 1

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(report.failure or "a bound was exceeded")


@dataclass(frozen=True)
class Bounds(Limits):
    """The limits of a run, which it is held to at the end."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = value is None or (isinstance(value, int | float) and not math.isnan(value))
            if not number or (name != "min_sqnr" and value is not None and value < 0):
                least = "" if name == "min_sqnr" else " of at least 0"
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be a number{least}.")

    @property
    def on_outputs(self) -> bool:
        return self.max_error is not None or self.min_sqnr is not None

    def exceeded(self, comparison: Comparison | None, metric: MetricReport | None) -> str | None:
        """The first bound that is broken, as a sentence."""
        if comparison is not None and self.max_error is not None and not comparison.max_error <= self.max_error:
            return f"The error max|Δ|/max|y| is {comparison.max_error:.3g}, over the bound of {self.max_error:g}."
        if comparison is not None and self.min_sqnr is not None and not comparison.min_sqnr >= self.min_sqnr:
            return f"The SQNR is {comparison.min_sqnr:.1f} dB, under the bound of {self.min_sqnr:g} dB."
        if metric is None or metric.after is None or self.max_drop is None:
            return None
        drop = metric.before - metric.after
        if drop <= self.max_drop:
            return None
        return (
            f"The metric fell from {metric.before:.6g} to {metric.after:.6g}, by {drop:.3g}, "
            f"over the bound of {self.max_drop:g}."
        )


def run(
    model: ir.Model,
    passes: Steps,
    data: Any = None,
    check_data: Any = None,
    labels: Labels | None = None,
    models: Mapping[str, ir.Model | Path_] | None = None,
    metric: Callable[[Any], float] | str | None = None,
    max_drop: float | None = None,
    max_error: float | None = None,
    min_sqnr: float | None = None,
    check: Mode = "end",
    strict: bool = False,
    seed: int = 0,
    *,
    reproducer: Path_ | None = None,
    instruments: Sequence[Instrument] = (),
    progress: Progress | None = None,
) -> Report:
    """Run ``passes`` over ``model`` in place, prove the result, and report.

    ``data`` and ``check_data`` are what ``--data`` takes, a mapping of arrays (first axis: samples) or a list of
    mappings; ``labels`` are integers or text, [samples], or the path of such an ``.npy``. Where a check, a bound or
    (under ``strict``) a warning fails, ``model`` stays as it was, what fails alone is written into the folder
    ``reproducer`` if one is given, and ``BoundExceeded`` is raised. Raises ``PenjingError`` of other kinds for bad
    input.
    """
    bounds = Bounds(max_drop, max_error, min_sqnr)
    _require_usable(model, check, seed)
    pipeline = Pipeline.of(passes)
    if reproducer is not None:
        require_room(reproducer)
    if max_drop is not None and metric is None:
        raise UsageError("--max-drop bounds the loss of a metric; give one with --metric FILE.py:FUNCTION.")
    place = printable(model.meta.get("penjing.path", "The model"))
    verify(model, place)  # else the first pass would be blamed
    large = too_large(model)
    judged = check != "off" or metric is not None or bounds.on_outputs
    if large is None and judged:
        _require_runnable(model, place)
    elif metric is not None:
        raise UsageError(f"The metric cannot be taken, for the model does not run: {large}.")
    progress = progress or Progress()
    score = load_function(metric, "--metric") if isinstance(metric, str) else metric
    partners = {name: _model(partner) for name, partner in models.items()} if models else None
    # One choice of packing for every session, since packing moves the last bits of a MatMul.
    prepack = sum(map(tensor_bytes, (model, *(partners or {}).values()))) <= LARGE
    runner = OrtRunner(score, metric_name=_name(metric), prepack=prepack, progress=progress)
    asked = Asked(model)
    if data is not None or check_data is not None or judged:
        asked = Asked.of(model, pipeline, Context(seed=seed, models=partners, runner=runner, limits=bounds))
    given = asked.read(data, runner, labels) if data is not None else None
    checked = asked.read(check_data, runner) if check_data is not None else given
    if checked is not None and judged and large is None:
        tried(model, checked)
    ctx = Context(
        seed=seed,
        models=partners,
        data=given,
        check_data=checked,
        labels=read_labels(labels) if given is None and labels is not None else getattr(given, "labels", None),
        metric=score,
        runner=runner,
        limits=bounds,
    )
    report = Report(model.meta.get("penjing.path"), str(pipeline), seed, figures(model), check=CheckReport(check))
    prove = _Proof(model, pipeline, ctx, runner, bounds, report, progress, asked, large)
    try:
        work = prove.run(checked, instruments)
        prove.judge(work, strict)
    except Breach as breach:
        report.failure = str(breach)
        if reproducer is not None:
            try:
                write_reproducer(reproducer, breach, report, vars(bounds), metric, strict, partners or {})
                report.reproducer = os.fspath(reproducer)
            except BadFile as error:
                report.failure += f" Nothing shows it alone: {error}."
        raise BoundExceeded(report) from (breach.__cause__ or breach)
    with uninterrupted():
        become(model, work)
    return report


@dataclass
class _Proof:
    """One run on its way: the model as it was, what is to be done, and the report that fills up."""

    model: ir.Model
    pipeline: Pipeline
    ctx: Context
    runner: OrtRunner
    bounds: Bounds
    report: Report
    progress: Progress
    asked: Asked
    large: str | None = None  # why it cannot be run at all
    feeds: Feeds | None = None
    checker: Checker = field(init=False)

    def run(self, checked: FeedSet | None, instruments: Sequence[Instrument]) -> ir.Model:
        """The passes over a copy of the model, checked on the way; raises ``Breach``."""
        self.feeds = self._choose_feeds(checked)
        if self.runner.metric is not None:
            self.progress.say("the metric before")
            score = self.ctx.metric_before = self.runner.score(self.model)
            self.report.metric = MetricReport(self.runner.metric_name, score, max_drop=self.bounds.max_drop)
        work = self.model.clone()
        work.meta.update(self.model.meta)  # where it came from, and so how it will be saved; onnx_ir drops it
        check = self.report.check
        mode = check.mode if self.feeds is not None else "off"
        self.checker = checker = Checker(self.runner, self.feeds or (), self.ctx, mode)
        recorder = _Recorder()
        try:
            self.pipeline.run(work, self.ctx, [self.progress, recorder, *instruments, checker])
            self.progress.say("checking")
            checker.finish(work)
        except Exception as error:
            if isinstance(error, PenjingError) and not isinstance(error, InvalidModel):
                raise
            passes = [step.pass_ for step in recorder.steps]
            breach = bisect(passes, self.model, [], self.runner, self.ctx)
            raise (breach or self._breach(str(error))) from error
        finally:
            self.report.passes = [PassReport.of(step) for step in recorder.steps]
            check.segments = [segment.as_json() for segment in checker.segments]
        return work

    def judge(self, work: ir.Model, strict: bool) -> None:
        """Measure the result against the original, and hold it to the bounds; raises ``Breach``."""
        report = self.report
        report.output = figures(work)
        if self.feeds is not None:
            self.progress.say("comparing with the original")
            found = self._compare(work, self.feeds)
            if isinstance(found, str):
                passes = [pass_ for pass_, _ in self.pipeline.steps()]
                raise bisect(passes, self.model, self.feeds, self.runner, self.ctx) or self._breach(found)
            report.check.comparison = found
            report.warnings += noisy(found) + unvisited(self.model, self.feeds, self.runner)
        report.kernels = quantized_kernels(work, ran=self.feeds is not None)
        if report.metric is not None:
            self.progress.say("the metric after")
            try:
                report.metric.after = self.runner.score(work)
            except PenjingError as error:
                raise self._breach(f"The metric fails on the result, and did not on the original: {error}") from error
        if exceeded := self.bounds.exceeded(report.check.comparison, None):
            raise self._breach(exceeded, self._worst(work))
        if exceeded := self.bounds.exceeded(None, report.metric):
            raise self._breach(exceeded)
        report.warnings += [f"{entry.name}: {warning}" for entry in report.passes for warning in entry.ledger.warnings]
        report.warnings += unchanged(report.passes)
        if strict and report.warnings:
            raise self._breach(f"Under --strict a warning is an error: {report.warnings[0]}")

    def _compare(self, work: ir.Model, feeds: Feeds) -> Comparison | str:
        """The result beside the original, or beside the reference of a pass that changed the interface.

        That reference is taken from the original model where there is one such pass, whatever other passes lost before
        it, unless it does not take that model; then, and of several the last, it speaks for what it found.
        """
        changers = [pass_ for pass_, _ in self.pipeline.steps() if brings_reference(pass_)]
        last = self.checker.last_change or self.model
        for before in (self.model, last) if len(changers) == 1 else (last,):
            expected = changers[-1].reference(before, self.ctx) if changers else None
            if expected is None:
                break
            self.report.check.beside = changers[-1].name
            try:
                return compare_reference(expected, work, feeds, self.runner)
            except UsageError:
                if before is last:
                    raise
        judge = judge_models(before, work, feeds, self.runner)
        return judge if isinstance(judge, str) else judge.comparison

    def _worst(self, work: ir.Model) -> Feeds:
        """One run that breaks the bounds alone; all of them where none does."""
        for feed in self.feeds or ():
            found = self._compare(work, [feed])
            if isinstance(found, str) or self.bounds.exceeded(found, None):
                return [feed]
        return self.feeds or ()

    def _breach(self, reason: str, feeds: Feeds | None = None) -> Breach:
        return Breach(str(self.pipeline), [reason], self.model, feeds or self.feeds or (), reason)

    def _choose_feeds(self, checked: FeedSet | None) -> Feeds | None:
        """What the check runs on: what was given, else random feeds; ``None`` where there is no check."""
        check, wanted = self.report.check, self.report.check.mode != "off" or self.bounds.on_outputs
        if not wanted:
            return None
        try:
            if self.large is not None:
                raise NoFeeds(self.large)
            feeds = checked or self.asked.draw(self.ctx.seed, self.runner)
        except NoFeeds as error:
            if self.bounds.on_outputs:
                what = "feeds, and random ones do not do" if self.large is None else "a run"
                raise UsageError(f"A bound on the outputs needs {what}: {error}") from error
            check.not_run = str(error)
            self.report.warnings.append(f"check: not run ({error})")
            return None
        check.feeds, check.random = feeds.describe(), feeds.random
        self.report.warnings += feeds.notes
        return self.progress.watched(feeds, "checking")


class _Recorder(Instrument):
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def before(self, step: Step, model: ir.Model) -> None:
        self.steps.append(step)


def noisy(comparison: Comparison) -> list[str]:
    """A warning for each float output that the feeds hardly tell anything about."""
    return [
        f"The check says little of output {name}: on these feeds the unchanged model itself moves by "
        f"{output.noise_share:.1%} of max|y| between the runtime's optimizations on and off. "
        "Give --data that it was made for; of rows that the model sorts or picks by score, a --metric tells more."
        for name, output in comparison.outputs.items()
        if output.noise_share is not None and output.noise_share > NOISY
    ]


def unchanged(passes: Sequence[PassReport]) -> list[str]:
    """A warning for each pass, or named pipeline as a whole, that changed nothing; it names the skips."""
    warnings = []
    for group, members in itertools.groupby(passes, key=lambda report: report.group or id(report)):
        reports = list(members)
        if any(report.ledger.changes for report in reports):
            continue
        reasons = Counter(skip.reason for report in reports for skip in report.ledger.skips)
        why = "; ".join(f"{count} skipped: {reason}" for reason, count in reasons.most_common(5))
        name = group if isinstance(group, str) else reports[0].text
        warnings.append(f"{name} changed nothing ({why or 'it found nothing to do'}).")
    return warnings


def _require_runnable(model: ir.Model, place: str) -> None:
    try:
        require_runnable(model, place)
    except BadFile as error:
        raise BadFile(f"{str(error).rstrip('.')}. With --check off passes run unproven.") from error


def _require_usable(model: Any, check: Any, seed: Any) -> None:
    """Raise ``UsageError`` for arguments that a type checker would have refused."""
    if not isinstance(model, ir.Model):
        raise UsageError(f"The model is {model!r}; it must be a model, as penjing.load gives it.")
    if check not in get_args(Mode):
        raise UsageError(f"check is {check!r}; it must be one of {', '.join(get_args(Mode))}.")
    if not isinstance(seed, int) or seed < 0:
        raise UsageError(f"The seed is {seed!r}; it must be a whole number of at least 0.")


def _name(metric: Any) -> str | None:
    return metric if isinstance(metric, str) else None


def _model(partner: ir.Model | Path_) -> ir.Model:
    return partner if isinstance(partner, ir.Model) else load(partner)
