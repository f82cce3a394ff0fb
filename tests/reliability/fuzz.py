"""Mutated models through load, verify, text, clean, save and load again, each in a folder of its own and watched.

A mutant is refused with a sentence or passes; all else is a fault. ``python -m tests.reliability.fuzz --only NUMBER``
shows one again, ``--count 20000 --jobs 2 --record`` writes fuzz.md.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import resource
import shutil
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import onnx

from penjing.ir.errors import PenjingError
from penjing.ir.files import load, save
from penjing.ir.summary import summarize
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.draws import random_feeds
from penjing.runtime.session import TRIAL_BYTES, limits, open_session, run_feed, why_not_runnable
from penjing.runtime.sizes import GROUPS as MACHINE

from .mutations import Corpus, Sample, mutant
from .record import record
from .specimens import corpus

SEED = 20261122
SECONDS = 20.0  # a mutant that takes longer hangs; the slowest sound sample takes a twentieth
ROOM = 4 << 30  # bytes of address space that a mutant may add
SECRET = b"only a canary in a folder above knows this"
CLEAN = Pipeline.parse("clean")

Journey = Callable[[Path], str]
"""From the path of a model: "passed", or "refused: " and the sentence; what it raises is a fault."""


@dataclass(frozen=True)
class Result:
    """``verdict`` is "passed", "refused" or "fault"; ``peak`` in bytes over what the process had before."""

    number: int
    sample: str
    kinds: str
    verdict: str
    detail: str
    seconds: float = 0.0
    peak: int = 0


def journey(path: Path) -> str:
    """What every command does with a file, and that what is saved is what was there."""
    try:
        model = load(path)
        verify(model, "it")
    except PenjingError as error:
        return f"refused: {error}"
    shown = text(model) + "".join(f"{value}\n" for _, value in summarize(model).lines())
    assert all(line.isprintable() for line in shown.splitlines()), "a control character in the text"
    accepted = _accepted(path)
    CLEAN.run(model, Context())
    target = path.with_name("saved.onnx")
    try:
        save(model, target)
    except PenjingError as error:
        return f"refused: on saving: {error}"
    again = load(target)
    verify(again, "the saved model")
    assert _lines(text(again)) == _lines(text(model)), "the saved model reads otherwise"
    if accepted:
        onnx.checker.check_model(str(target))
    return "passed"


def run_journey(path: Path) -> str:
    """What ``run``, ``compare`` and ``bench`` do before a pass: ONNX Runtime takes the model, and runs random feeds."""
    try:
        model = load(path)
        verify(model, "it")
        if reason := why_not_runnable(model):
            return f"refused: {reason}"
        sessions = [open_session(model, level=level) for level in ("all", "off")]
        for feed in random_feeds(model, 0, seconds=3):
            for session in sessions:
                run_feed(session, feed)
    except PenjingError as error:
        return f"refused: {error}"
    return "passed"


def _lines(words: str) -> list[str]:
    return words.splitlines()[1:]  # the first holds the IR version, which saving may lower


def _accepted(path: Path) -> bool:
    """Whether onnx.checker accepts the file."""
    try:
        onnx.checker.check_model(str(path))
    except Exception:
        return False
    return True


# One mutant -----------------------------------------------------------------------------------------------------------


def trial(number: int, kinds: str, sample: Sample, run: Journey) -> Result:
    """Run one mutant in a fresh folder, and look at what it left there and above."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="penjing-fuzz-") as above:
        before = _laid_out(Path(above), sample)
        path = Path(above, "models", "mutant.onnx")
        _OPENED.clear()
        tempfile.tempdir = str(Path(above, "scratch"))
        with _peak() as peak:
            try:
                verdict, _, detail = run(path).partition(": ")
            except BaseException as error:
                verdict, detail = "fault", _where(error)
        tempfile.tempdir = None
        problem = _control(detail) or _touched(Path(above), before, verdict, detail)
        if verdict != "fault" and (problem or peak[0] > bound(sample) + TRIAL_BYTES * (run is run_journey)):
            verdict, detail = "fault", problem or f"{peak[0] >> 20} MiB of memory for {len(sample.model)} bytes"
    return Result(number, sample.name, kinds, verdict, detail, time.perf_counter() - start, peak[0])


def bound(sample: Sample) -> int:
    """Bytes: twice the file, 500 MB, and 1 KB for each node, of which no more than a sixth of the bytes can be."""
    return 2 * (len(sample.model) + sum(map(len, sample.data.values()))) + 500_000_000 + 1000 * (len(sample.model) // 6)


def _laid_out(above: Path, sample: Sample) -> dict[str, bytes | None]:
    """Write the mutant, and around it what its data file may name: links that lead out, a pipe, and the canary."""
    folder = above / "models"
    (folder / "sub").mkdir(parents=True)
    (above / "scratch").mkdir()
    (above / "canary.bin").write_bytes(SECRET * 1000)
    (folder / "mutant.onnx").write_bytes(sample.model)
    for name, contents in sample.data.items():
        (folder / name).write_bytes(contents)
    if sample.data:
        (folder / "link.bin").symlink_to("../canary.bin")
        (folder / "folder").symlink_to("..")
        (folder / "hard.bin").hardlink_to(above / "canary.bin")
        os.mkfifo(folder / "pipe")
    return _snapshot(above)


def _snapshot(above: Path) -> dict[str, bytes | None]:
    """The files by path; ``None`` for what is no plain file."""
    found: dict[str, bytes | None] = {}
    for path in sorted(above.rglob("*")):
        plain = stat.S_ISREG(path.lstat().st_mode)
        found[str(path.relative_to(above))] = path.read_bytes() if plain else None
    return found


def _touched(above: Path, before: dict[str, bytes | None], verdict: str, detail: str) -> str:
    """What was opened, changed or left that should not have been, as a sentence."""
    if outside := [path for path in _OPENED if _is_outside(path, above)]:
        return f"opened {outside[0]!r}, which is outside the model's folder"
    after = _snapshot(above)
    if changed := [name for name in before if name not in after or after[name] != before[name]]:
        return f"changed {changed[0]}"
    new = set(after) - set(before)
    if verdict == "passed":
        ours = re.compile(r"models/saved\.onnx(\.[0-9a-f]{12}\.data)?")
        new = {name for name in new if not ours.fullmatch(name)}
    if new:
        return f"left {sorted(new)}"
    if any(SECRET in contents for name, contents in after.items() if contents and name not in before):
        return "copied bytes from outside the model's folder"
    return ""


def _control(detail: str) -> str:
    return "" if all(line.isprintable() for line in detail.split("\n")) else f"unescaped control character: {detail!r}"


def _where(error: BaseException) -> str:
    """The error, and the innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else ""
    return ascii(f"{type(error).__name__}{place}: {error}"[:600])


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """A list that holds the peak memory inside the block, in bytes over that at its start."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start, found = _status("VmRSS"), [0]
    try:
        yield found
    finally:
        found[0] = _status("VmHWM") - start


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


_OPENED: list[str] = []
_OWN = ("/proc/self/status", "/proc/self/clear_refs", *MACHINE)


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        _OPENED.append(arguments[0])


def _is_outside(path: str, above: Path) -> bool:
    """Whether a path leads out of the model's folder, and not to a temporary or one of the files that imports read."""
    if os.sep not in path and path != os.pardir:
        return False  # a step down from an open folder, or in the worker's own, which is empty
    real = os.path.realpath(path)
    ours = (str(above / "models"), str(above / "scratch"))
    homes = (*ours, sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), *sys.path[1:])
    return not any(real.startswith(home) for home in homes if home) and path not in _OWN


# Many ----------------------------------------------------------------------------------------------------------------


def fuzz(
    numbers: Sequence[int],
    samples: Corpus,
    run: Journey = journey,
    *,
    seed: int = SEED,
    jobs: int = 1,
    seconds: float = SECONDS,
) -> Iterator[Result]:
    """The mutants of these numbers, in processes that are killed and replaced where one hangs or dies; in any order."""
    waiting = list(reversed(numbers))
    workers = [_Worker(seed, samples, run) for _ in range(min(jobs, len(numbers)))]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while busy := [worker for worker in workers if worker.number is not None]:
            ready = wait([worker.pipe for worker in busy], timeout=max(0.0, min(w.due(seconds) for w in busy)))
            for worker in busy:
                if worker.pipe in ready or worker.due(seconds) <= 0:
                    yield worker.result(seconds)
                    if worker.done >= 1000 or not worker.process.is_alive():
                        worker.restart()
                    worker.give(waiting.pop() if waiting else None)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that runs one mutant after another."""

    def __init__(self, seed: int, samples: Corpus, run: Journey) -> None:
        self.job = (seed, samples, run)
        self.number: int | None = None
        self.restart(first=True)

    def restart(self, first: bool = False) -> None:
        if not first:
            self.stop()
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, *self.job), daemon=True)
        self.process.start()
        other.close()
        self.done = 0

    def give(self, number: int | None) -> None:
        self.number, self.started = number, time.monotonic()
        if number is not None:
            self.pipe.send(number)

    def due(self, seconds: float) -> float:
        """Seconds that the mutant may still take."""
        return self.started + seconds - time.monotonic()

    def result(self, seconds: float) -> Result:
        assert self.number is not None
        self.done += 1
        try:
            if self.pipe.poll():
                found = self.pipe.recv()
                assert isinstance(found, Result)
                return found
            detail = f"hangs for {seconds:g} s"
        except EOFError:
            self.process.join()
            detail = f"died with exit code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        kinds, sample = mutant(self.job[0], self.number, self.job[1])
        return Result(self.number, sample.name, kinds, "fault", detail, time.monotonic() - self.started)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, seed: int, samples: Corpus, run: Journey) -> None:
    used = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_listen)
    folder = tempfile.mkdtemp(prefix="penjing-fuzz-worker-")
    os.chdir(folder)  # what is written to a relative path is found, too
    parent = os.getppid()
    try:
        while os.getppid() == parent:
            if not pipe.poll(1):
                continue
            number = pipe.recv()
            kinds, sample = mutant(seed, number, samples)
            pipe.send(trial(number, kinds, sample, run))
    except EOFError:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# The record -----------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Result], seed: int) -> str:
    """Counts by kind of mutation and outcome, the sentences, the extremes and every fault."""
    verdicts = Counter(result.verdict for result in results)
    lines = [f"{len(results):,} mutants, seed {seed}: " + ", ".join(f"{n:,} {word}" for word, n in verdicts.items())]
    lines += ["", "| mutation | passed | refused | fault |", "|---|--:|--:|--:|"]
    counts = Counter((kind, result.verdict) for result in results for kind in result.kinds.split("+"))
    for kind in sorted({kind for kind, _ in counts}):
        lines.append(f"| {kind} | " + " | ".join(f"{counts[kind, v]:,}" for v in ("passed", "refused", "fault")) + " |")
    slowest, largest = max(results, key=lambda r: r.seconds), max(results, key=lambda r: r.peak)
    lines += ["", "A mutant often has several mutations, and counts for each.", ""]
    lines += [f"Slowest: {slowest.seconds:.2f} s (mutant {slowest.number} of {slowest.sample})."]
    lines += [f"Largest memory: {largest.peak / 1e6:.0f} MB (mutant {largest.number} of {largest.sample})."]
    lines += ["", "| refused | sentence |", "|--:|---|"]
    sentences = Counter(_kind(result.detail) for result in results if result.verdict == "refused")
    lines += [f"| {count:,} | {sentence} |" for sentence, count in sentences.most_common(30)]
    lines += [f"| {sum(sentences.values()):,} | of {len(sentences):,} kinds in all |"]
    faults = sorted((result for result in results if result.verdict == "fault"), key=lambda r: r.number)
    lines += ["", "Faults:" if faults else "No faults."]
    lines += [f"- {result.number} ({result.kinds}; {result.sample}): {result.detail}" for result in faults]
    return "\n".join(lines)


def _kind(sentence: str) -> str:
    """The sentence without names and numbers."""
    line = re.sub(r"^.*?mutant\.onnx", "", sentence.replace("\n", " "))
    line = re.sub(r"b?'.*?'(?![a-z])|b?\".*?\"|\[[^\]]*\]", "…", line)
    line = re.sub(r"-?\d+", "#", line)
    return line.strip(" :")[:110].replace("|", "\\|")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=500)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--seed", type=int, default=SEED)
    options.add_argument("--only", type=int, help="show one mutant again, with its traceback, and keep its files")
    options.add_argument("--runtime", action="store_true", help="through ONNX Runtime instead of clean and save")
    options.add_argument("--record", action="store_true", help="write fuzz.md")
    given = options.parse_args()
    limits()  # imports ONNX Runtime
    samples, run = corpus(), run_journey if given.runtime else journey
    if given.only is not None:
        show(given.seed, given.only, samples, run)
        return
    numbers = range(given.first, given.first + given.count)
    if given.record:
        files = tried(numbers, samples, journey, given.seed, given.jobs)
        runs = tried(numbers[: given.count // 4], samples, run_journey, given.seed + 1, given.jobs)
        told = f"## Load, verify, text, clean, save, load\n\n{files}\n\n## In ONNX Runtime\n\n{runs}"
        record("fuzz", f"python -m tests.reliability.fuzz --count {given.count} --seed {given.seed} --record", told)
    else:
        told = tried(numbers, samples, run, given.seed, given.jobs)
        print(told)
    sys.exit("\nFaults:" in told)


def tried(numbers: Sequence[int], samples: Corpus, run: Journey, seed: int, jobs: int) -> str:
    """The summary of these mutants; faults are also told as they are found."""
    results = []
    for result in fuzz(numbers, samples, run, seed=seed, jobs=jobs):
        results.append(result)
        if result.verdict == "fault":
            print(f"{result.number} ({result.kinds}; {result.sample}): {result.detail}", file=sys.stderr, flush=True)
    return summary(results, seed)


def show(seed: int, number: int, samples: Corpus, run: Journey) -> None:
    """One mutant, in this process: a crash or an error shows where it comes from."""
    kinds, sample = mutant(seed, number, samples)
    above = Path(tempfile.mkdtemp(prefix=f"mutant-{number}-"))
    _laid_out(above, sample)
    print(f"{kinds} of {sample.name}, {len(sample.model)} bytes, in {above}")
    print(run(above / "models" / "mutant.onnx"))


if __name__ == "__main__":
    main()
