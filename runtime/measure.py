"""Latency interleaved in one run, load time, bytes and peak memory of models.

``python -m penjing.runtime.measure`` is the fresh process in which ``bench`` measures the memory of one model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..ir.errors import BadFeeds
from ..ir.files import disk_bytes
from ..passes.base import Array
from .draws import feeds_for
from .session import DoesNotRun, bare_run, load, open_session, run_feed, version
from .sizes import too_large

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SECONDS = 2.5  # the clock's budget for each model
ROUNDS = (5, 1000)  # fewest, and most, whatever the budget
LOADS = 5  # sessions opened at most for the load time
_TURN_SECONDS = 2e-3  # small models run several times in a turn, for at first each fills the caches anew
_FEEDS = 4  # runs of the data that are timed, in turn

Feed = Mapping[str, Any]


@dataclass
class Timing:
    """One model measured beside others. Milliseconds are wall time of one run, on ``threads`` threads.

    ``latency_ms`` is the median, ``spread_ms`` half the way from the 10th to the 90th percentile. ``ratio`` is the
    median over rounds of this model's time to the first model's, in CPU time for one thread, which holds on a busy
    machine, else in wall time. ``load_ms`` is the quickest opening of a session. ``file_bytes`` counts the model and
    its external data. ``peak_bytes`` is the peak of anonymous and shared memory while a fresh process opens and runs
    the model, over what it had before (mapped file pages do not count); ``None`` where the system does not tell.
    """

    name: str
    latency_ms: float
    spread_ms: float
    ratio: float
    load_ms: float
    file_bytes: int
    peak_bytes: int | None
    rounds: int
    threads: int

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


@dataclass
class Clocks:
    """Seconds a run, each [models, rounds]: ``wall``, and ``cpu`` of the calling thread."""

    wall: Array
    cpu: Array


class MemoryMeter:
    """Samples RssAnon + RssShmem of a process (this one by default) from entry to exit, every ``interval`` seconds.

    ``peak_bytes`` is the highest value over that at entry, ``None`` where there is no /proc/PID/status.
    """

    def __init__(self, pid: int | None = None, interval: float = 0.005) -> None:
        self.peak_bytes: int | None = None
        self._status = f"/proc/{pid or 'self'}/status"
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._start = _private_bytes(self._status)
        self.peak_bytes = None if self._start is None else 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        now = _private_bytes(self._status)
        if now is not None and self._start is not None:
            self.peak_bytes = max(self.peak_bytes or 0, now - self._start)


def bench_files(
    models: Sequence[str], data: Any = None, threads: int = 1, *, seed: int = 0, seconds: float = SECONDS
) -> tuple[list[Timing], str]:
    """Measure the models in ``models`` (paths) on the same feeds, and say which: ``data``, or random ones.

    Feeds are read or drawn for the first model. Raises ``PenjingError`` for a file, data or a run at fault.
    """
    loaded = [load(path, runnable=True) for path in models]
    feeds = feeds_for(loaded[0], data, seed)
    sizes = [disk_bytes(model, path) for model, path in zip(loaded, models, strict=True)]
    del loaded
    return bench(models, feeds, sizes, threads=threads, seconds=seconds), feeds.describe()


def bench(
    models: Sequence[str], feeds: Iterable[Feed], sizes: Sequence[int], *, threads: int = 1, seconds: float = SECONDS
) -> list[Timing]:
    """Measure models by path, whose files have ``sizes`` bytes. Raises ``DoesNotRun``, ``BadFeeds`` for no feeds."""
    runs = _first(feeds)
    sessions, loads = _load_times(models, threads)
    for path, session in zip(models, sessions, strict=True):
        run_feed(session, runs[0], place=path)
    clocks = interleave(sessions, runs, seconds=seconds * len(models))
    del sessions, session
    ratios = _ratios(clocks, threads)
    peaks = [_peak(path, runs[:1], threads) for path in models]
    low, middle, high = (1e3 * np.percentile(clocks.wall, share, axis=1) for share in (10, 50, 90))
    return [
        Timing(
            name=path,
            latency_ms=float(middle[place]),
            spread_ms=float(high[place] - low[place]) / 2,
            ratio=float(ratios[place]),
            load_ms=1e3 * loads[place],
            file_bytes=sizes[place],
            peak_bytes=peaks[place],
            rounds=clocks.wall.shape[1],
            threads=threads,
        )
        for place, path in enumerate(models)
    ]


def latency(
    before: str | os.PathLike[str], after: ir.Model | str | os.PathLike[str], data: Any = None, *, seconds: float = 1.0
) -> dict[str, float]:
    """``before_ms`` and ``after_ms``, median wall milliseconds a run of two models, interleaved."""
    model = load(before)
    if reason := too_large(model):
        raise DoesNotRun(reason)
    runs = _first(feeds_for(model, data))
    clocks = interleave([open_session(model), open_session(after)], runs, seconds=2 * seconds)
    middle = 1e3 * np.median(clocks.wall, axis=1)
    return {"before_ms": float(middle[0]), "after_ms": float(middle[1])}


def load_bytes(path: str, threads: int = 1) -> int | None:
    """Peak memory of opening one model, in a fresh process; ``None`` where it does not open or the system is silent."""
    return _peak(path, (), threads)


def median_seconds(
    sessions: Sequence[InferenceSession], feeds: Iterable[Feed], *, threads: int = 1, seconds: float = 1.0
) -> list[float]:
    """Median seconds a run of each session, interleaved; CPU seconds for one thread. Raises ``DoesNotRun``."""
    clocks = interleave(sessions, _first(feeds), seconds=seconds * len(sessions))
    return [float(median) for median in np.median(clocks.cpu if threads == 1 else clocks.wall, axis=1)]


def interleave(
    sessions: Sequence[InferenceSession], runs: Sequence[Feed], *, seconds: float, turn: float = _TURN_SECONDS
) -> Clocks:
    """Run the sessions in turn on the same feeds, forwards and backwards by turns, for about ``seconds``.

    Each turn is one run, or as many as the quickest model makes in ``turn`` seconds.
    """
    calls = [[bare_run(session, feed) for feed in runs] for session in sessions]
    started = time.perf_counter()
    try:
        quickest = min(min(_timed(call, 1)[0] for _ in range(2)) for (call, *_) in calls)
    except Exception as error:
        raise DoesNotRun(f"A model fails while it is timed: {error}") from error
    repeats = max(1, math.ceil(min(1000.0, turn / max(quickest, 1e-7))))
    rounds: list[list[tuple[float, float]]] = []
    for number in itertools.count():
        spent = time.perf_counter() - started
        if number >= ROUNDS[1] or (spent > seconds and number >= ROUNDS[0]):
            break
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        found = {place: _timed(calls[place][number % len(runs)], repeats) for place in order}
        rounds.append([found[place] for place in range(len(calls))])
    wall, cpu = np.moveaxis(np.array(rounds), (2, 1, 0), (0, 1, 2))
    return Clocks(wall, cpu)


def _timed(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - wall) / repeats, (time.thread_time() - cpu) / repeats


def _ratios(clocks: Clocks, threads: int) -> Array:
    times = clocks.cpu if threads == 1 else clocks.wall
    return np.asarray(np.median(times / np.maximum(times[0], 1e-9), axis=1))


def _load_times(models: Sequence[str], threads: int) -> tuple[list[InferenceSession], list[float]]:
    """A session of each file, and the quickest opening in seconds; by turns, for about a second each."""
    best = [math.inf] * len(models)
    started = time.perf_counter()
    for _ in range(LOADS):
        sessions = []
        for place, path in enumerate(models):
            start = time.perf_counter()
            sessions.append(open_session(path, threads=threads))
            best[place] = min(best[place], time.perf_counter() - start)
        if time.perf_counter() - started > len(models):
            break
    return sessions, best


def _first(feeds: Iterable[Feed]) -> list[Feed]:
    runs = list(itertools.islice(feeds, _FEEDS))
    if not runs:
        raise BadFeeds("There are no samples to time the models on.")
    return runs


def _private_bytes(status: str) -> int | None:
    """RssAnon + RssShmem: what a process has for itself, without the pages of mapped files."""
    try:
        fields = dict(line.split(":", 1) for line in Path(status).read_text().splitlines() if ":" in line)
        return 1024 * sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem"))
    except (OSError, KeyError):
        return None


def _peak(path: str, runs: Sequence[Feed], threads: int) -> int | None:
    """Peak memory of opening and running one model, in a process that has done all imports and holds the feeds."""
    job = pickle.dumps((os.path.abspath(path), threads, [dict(run) for run in runs]))
    command = [sys.executable, "-P", "-m", __spec__.name if __spec__ else "penjing.runtime.measure"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(job)
            child.stdin.flush()
            if child.stdout.readline() != b"ready\n":
                return None
            with MemoryMeter(child.pid, interval=0.002) as meter:
                child.stdin.write(b"go\n")
                child.stdin.flush()
                done = child.wait()
            return meter.peak_bytes if done == 0 else None
        except BrokenPipeError:
            return None
        except BaseException:
            child.kill()  # an interrupt need not reach it
            raise


def _serve() -> None:
    """The fresh process: take a job, tell that all is ready, wait for the word, open the model and run it."""
    path, threads, runs = pickle.load(sys.stdin.buffer)
    version()  # imports ONNX Runtime
    print("ready", flush=True)
    sys.stdin.buffer.readline()
    session = open_session(path, threads=threads)
    for run in runs:
        run_feed(session, run)


if __name__ == "__main__":
    _serve()
