"""ONNX's own test models, loaded and saved, and after every exact pass alone and after ``clean``.

``python -m tests.reliability.corpus --jobs 2 --record`` writes corpus.md: what ``examination.py`` asks of each model;
with ``--runs`` corpus-runs.md: ``penjing run`` of every clean pass on each. ``--every N`` takes a part of the models by
a fixed hash, ``--readme`` prints a short summary only. Exits 1 where there is a fault.

Nothing is skipped in silence: a model of which something cannot be asked is in a table with its reason and name.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .cases import NEWER, Case, node_cases, whole_models
from .corpus_runs import OUTCOMES, Run, clean_passes, run_case, runs_report
from .examination import KEPT, Found, all_steps, examine
from .record import record
from .tables import by_reason, table

T = TypeVar("T")

COUNTS = {
    "verified": ("verified", ()),
    "checked": ("onnx.checker", ("checker",)),
    "full": ("full check", ("checker", "full check")),
    "expected": ("expected outputs, ONNX Runtime", ("run", "unknown", "expected")),
    "referred": ("expected outputs, reference", ("reference",)),
    "compared": ("compared with the original", ("run", "unknown")),
}
"""What is counted: its title, and for which reasons it is not asked of a model."""

EXCLUDED = {
    "run": "ONNX Runtime does not run the original",
    "reference": "nor does ONNX's reference give its expected outputs",
    "expected": "ONNX Runtime runs the original, and gives other outputs than expected",
    "checker": "onnx.checker refuses the original",
    "full check": "the full check of onnx.checker refuses the original",
}


def in_parallel(work: Callable[[Case, Path], T], cases: Sequence[Case], jobs: int) -> list[T]:
    """``work`` on each case with a folder of its own, in order; the processes are forked, so that none need be told."""
    global _work
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        _work = functools.partial(_numbered, work, cases, Path(folder))
        if jobs == 1:
            return [_work(number) for number in range(len(cases))]
        # A process that has run large models is slow to fork, and every check forks: each serves 40 cases.
        with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=10) as pool:
            return list(pool.imap(_call, range(len(cases)), chunksize=4))


_work: Callable[[int], Any]


def _call(number: int) -> Any:
    return _work(number)


def _numbered(work: Callable[[Case, Path], T], cases: Sequence[Case], folder: Path, number: int) -> T:
    if number % 100 == 99:
        print(f"{number + 1} of {len(cases)}", file=sys.stderr, flush=True)
    own = folder / str(os.getpid())
    own.mkdir(exist_ok=True)
    return work(cases[number], own)


# The record -----------------------------------------------------------------------------------------------------------


def asked(one: Found, word: str) -> bool:
    """Whether the original of a model is such that ``word`` can be asked after a pass."""
    if word == "referred" and "run" not in one.excluded:
        return False
    return not any(reason in one.excluded for reason in COUNTS[word][1])


def cells(found: Sequence[Found], steps: Sequence[str]) -> list[str]:
    """Models, refused, changed, what ``COUNTS`` counts, and faults; summed over steps, and as shortfalls if any."""
    pairs = [(one, one.results[step]) for one in found for step in steps if step in one.results]
    taken = [(one, result) for one, result in pairs if result.refused is None]
    row = [len(pairs), len(pairs) - len(taken), sum(result.changed for _, result in taken)]
    texts = [f"{number:,}" for number in row]
    for word in COUNTS:
        wanted = [result for one, result in taken if asked(one, word)]
        held = sum(getattr(result, word) for result in wanted)
        texts.append(f"{held:,}" if held == len(wanted) else f"{held:,} of {len(wanted):,}")
    return [*texts, f"{sum(len(result.faults) for _, result in pairs):,}"]


HEAD = ["models", "refused", "changed", *(title for title, _ in COUNTS.values()), "faults"]


def steps_of(found: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(step for one in found for step in one.results))


def report(found: Sequence[Found]) -> str:
    """All tables of the examinations."""
    whole = sum(one.whole for one in found)
    rows = [[step if step == KEPT else f"`{step}`", *cells(found, [step])] for step in steps_of(found)]
    explained: Counter[str] = sum((one.explained for one in found), Counter())
    holders = Counter(reason for one in found for reason in one.explained)
    kept = [(reason, f"{count:,}", holders[reason]) for reason, count in explained.most_common()]
    refused = [
        (f"`{step}`: {_kind(result.refused)}", one.name)
        for one in found
        for step, result in one.results.items()
        if result.refused
    ]
    parts = [
        f"{len(found):,} models: {len(found) - whole:,} of one node, {whole:,} in files.\n",
        "Counts are of models that the step does not refuse, and of which the original held the same; a shortfall "
        "would be shown as `n of m`.\n",
        table(["step", *HEAD], rows),
        "".join(f"- {fault}\n" for one in found for fault in one.faults) or "No faults.\n",
        table(["what load -> save changes, and why it means the same", "fields", "models"], kept),
        by_reason("passes that refuse, or ONNX Runtime after them", refused),
    ]
    for word, title in EXCLUDED.items():
        pairs = [(_kind(one.excluded[word]), one.name) for one in found if word in one.excluded]
        parts.append(by_reason(title, pairs))
    return "\n".join(parts)


def _kind(sentence: str) -> str:
    """A sentence without the names and numbers that are one model's own."""
    return re.sub(r"at opset \d+, above", "at a newer opset than", sentence)


def readme(found: Sequence[Found]) -> str:
    """The table for README.md."""
    steps = steps_of(found)
    passes = [step for step in steps if step != KEPT and not step.startswith("clean")]
    names = dict.fromkeys(step.partition("{")[0] for step in passes)
    rows = [
        (KEPT, *cells(found, [KEPT])),
        (f"{len(names)} exact passes, each alone", *cells(found, passes)),
        ("`clean`", *cells(found, ["clean"])),
    ]
    newer = sum(one.excluded.get("run") == NEWER for one in found)
    text = table(["ONNX corpus", *HEAD], rows)
    return f"{text}\n{newer} of the {len(found):,} models are newer than the installed ONNX Runtime takes.\n"


def readme_of_runs(runs: Sequence[Run]) -> str:
    """The sentence for README.md."""
    counts = Counter(run.outcome for run in runs)
    outcomes = ", ".join(f"{counts[word]:,} {title}" for word, title in OUTCOMES.items())
    return f"`penjing run` of each of the clean passes, {len(runs):,} runs: {outcomes}.\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, metavar="N")
    parser.add_argument("--jobs", type=int, default=1)
    for flag in ("record", "runs", "readme"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args()
    cases, started = [*node_cases(given.every), *whole_models(given.every)], time.monotonic()
    if given.runs:
        pipelines = clean_passes()
        runs = in_parallel(lambda case, folder: [*run_case(case, folder, pipelines)], cases, given.jobs)
        flat = [run for group in runs for run in group]
        summary, details, faulty = readme_of_runs(flat), runs_report(flat), any(run.outcome == "fault" for run in flat)
    else:
        steps = all_steps()
        found = in_parallel(lambda case, folder: examine(case, folder, steps), cases, given.jobs)
        summary, details, faulty = readme(found), report(found), any(one.faults for one in found)
    name = "corpus-runs" if given.runs else "corpus"
    body = f"# ONNX corpus\n\n{summary}\n{details}\n{time.monotonic() - started:.0f} s with {given.jobs} jobs\n"
    if given.record:
        record(name, "python -m tests.reliability.corpus " + " ".join(sys.argv[1:]), body)
    else:
        print(summary if given.readme else body)
    sys.exit(faulty)


if __name__ == "__main__":
    main()
