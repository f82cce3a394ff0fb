"""Saves that are killed, refused space or raced: the old model or the new one is there, whole, and nothing else.

    python -m tests.reliability.kills [--record]

A child saves two models by turns over one path and is killed with SIGKILL at random moments (seeded). Then the file
must load and be one of the two, each byte of its tensors, and the next save must leave the model and its one data file.
Apart from chance, a child is killed before and after *every* call of its that changes a file, and each of these calls
fails once with ENOSPC. ``--job`` runs one such job and prints what was found as JSON; the tests use it, for it forks,
which a process with threads should not.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from penjing.ir import atomic
from penjing.ir.errors import BadFile
from penjing.ir.files import load, save
from penjing.ir.tensors import tensors

SEED = 20
WIDTH = 1024  # a weight is WIDTH x WIDTH float32: 4 MiB
PIPELINE = "prune-magnitude{sparsity=0.5}"
Digests = dict[str, str]
Child = Callable[[], object]


def model(seed: int, weights: int, width: int = WIDTH) -> ir.Model:
    """A chain of MatMuls with random weights; its digests tell it from one of another seed."""
    generator, tape = np.random.default_rng(seed), ir.tape.Tape()
    value = x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, width]))
    for place in range(weights):
        array = generator.standard_normal((width, width), np.float32) / np.float32(width**0.5)
        value = tape.op("MatMul", [value, tape.initializer(ir.tensor(array, name=f"w{place}"))])
    value.name, value.dtype, value.shape = "y", x.dtype, x.shape
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="m")
    return ir.Model(graph, ir_version=8)


def digests(found: ir.Model) -> Digests:
    """What tells two models apart: the digest of each tensor, by its name."""
    return {
        tensor.name or "": hashlib.blake2b(tensor.tobytes(), digest_size=16).hexdigest() for _, tensor in tensors(found)
    }


def which(path: Path, known: dict[str, Digests]) -> str:
    """Which of the known models the file holds; raises where it does not load or is none of them."""
    found = digests(load(path))
    return next(name for name, expected in known.items() if expected == found)


# Children -------------------------------------------------------------------------------------------------------------


def fork(work: Child) -> int:
    """Begin ``work`` in a child; -> its pid. It ends with 0, or 1 where ``work`` raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def end(pid: int) -> int:
    """Wait for a child; -> its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Random moments -------------------------------------------------------------------------------------------------------


def phase(path: Path) -> str:
    """How far the killed save had come, by what it left in the folder."""
    partial = len(list(path.parent.glob(f"{path.name}.*.partial")))
    data = len(list(path.parent.glob(f"{path.name}.*.data")))
    if data == 0:
        return "while writing" if partial else "between saves"
    return {
        (1, 1): "while writing data",
        (2, 1): "while writing the model",
        (1, 2): "between the renames",
        (0, 2): "before sweeping",
    }.get((partial, data), "between saves" if not partial else f"{partial} partial, {data} data")


def random_kills(folder: Path, count: int, external: bool, weights: int = 8) -> dict[str, Any]:
    """Kill a process that saves A and B by turns over one path, ``count`` times."""
    generator, path = random.Random(SEED + external), folder / "m.onnx"
    models = {"A": model(1, weights), "B": model(2, weights)}
    known = {name: digests(item) for name, item in models.items()}
    save(models["A"], path, external=external)
    start = time.perf_counter()
    for item in models.values():
        save(item, path, external=external)
    span = time.perf_counter() - start

    def turns() -> None:
        while True:
            for item in (models["A"], models["B"]):
                save(item, path, external=external)

    phases, held = Counter[str](), Counter[str]()
    for number in range(count):
        pid = fork(turns)
        time.sleep(generator.uniform(0, 2 * span))
        os.kill(pid, signal.SIGKILL)
        assert end(pid) == -signal.SIGKILL
        phases[phase(path)] += 1
        held[which(path, known)] += 1
        after = "AB"[number % 2]
        save(models[after], path, external=external)
        check_tidy(path, external)
        assert which(path, known) == after
    return {"kills": count, "bytes": size(path), "save seconds": span / 2, "phases": phases, "held": held}


def cli_kills(folder: Path, count: int, weights: int = 8) -> dict[str, Any]:
    """Kill ``penjing run m.onnx -o m.onnx --force``, whose output is its input, ``count`` times, while it saves."""
    generator, path, original = random.Random(SEED), folder / "m.onnx", folder / "original"
    original.mkdir()
    save(model(1, weights), original / "m.onnx", external=True)
    restore(original, path)
    known = {"before": digests(load(path))}
    _import_all()
    spans = []
    for _ in range(3):
        restore(original, path)
        child = fork_run(path)
        os.read(child[1], 1)
        start = time.perf_counter()
        assert end(child[0]) == 0
        spans.append(time.perf_counter() - start)
    known["after"] = digests(load(path))
    assert known["after"] != known["before"]
    phases, held = Counter[str](), Counter[str]()
    for _ in range(count):
        restore(original, path)
        code = _after_save_begins(fork_run(path), generator.uniform(0, min(spans)))
        assert code in (0, -signal.SIGKILL)
        phases["after the run" if code == 0 else phase(path).replace("between saves", "before or after")] += 1
        held[which(path, known)] += 1
        assert _after_save_begins(fork_run(path), None) == 0
        assert which(path, known) == "after"
        check_tidy(path, True, "original")
    return {"kills": count, "bytes": size(path), "phases": phases, "held": held}


def _import_all() -> None:
    """What the command line imports when it needs it, so that children need not."""
    import onnxruntime  # noqa: F401

    import penjing.cli
    import penjing.runtime.run
    import penjing.runtime.show  # noqa: F401


def fork_run(path: Path) -> tuple[int, int]:
    """Begin the command line over ``path`` in a child; -> its pid, and a pipe that tells when it begins to save."""
    reader, writer = os.pipe()
    enter = atomic.Replacement.__enter__

    def told(replacement: atomic.Replacement) -> atomic.Replacement:
        os.write(writer, b".")
        return enter(replacement)

    def run() -> None:
        from penjing import cli

        atomic.Replacement.__enter__ = told  # type: ignore[method-assign]
        cli._latency = lambda *_: None  # type: ignore[assignment]  # it takes seconds
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what it says on stderr is for whoever reads a failure
        try:
            cli.main(["run", str(path), "-o", str(path), "--force", "-p", PIPELINE, "--check", "off"])
        except SystemExit as done:
            os._exit(int(done.code or 0))

    pid = fork(run)
    os.close(writer)
    return pid, reader


def _after_save_begins(child: tuple[int, int], seconds: float | None) -> int:
    """Kill the child so long after it began to save, or never; -> its exit code."""
    pid, reader = child
    os.read(reader, 1)
    os.close(reader)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return end(pid)


def restore(original: Path, path: Path) -> None:
    """Put the original model, and nothing else of its name, at ``path``."""
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    for item in original.iterdir():
        shutil.copy(item, path.parent / item.name)


def check_tidy(path: Path, external: bool, *others: str) -> None:
    """The folder holds the model, its one data file if it has one, and nothing else."""
    names = set(os.listdir(path.parent)) - set(others)
    data = {name for name in names if name.startswith(f"{path.name}.") and name.endswith(".data")}
    assert names == {path.name} | data, names
    assert len(data) == external, names
    check_no_orphans(path)


def check_no_orphans(path: Path) -> float:
    """Tensors and padding fill the data file; -> the padding's share of the tensors."""
    found = [tensor for _, tensor in tensors(load(path)) if isinstance(tensor, ir.ExternalTensor)]
    if not found:
        return 0.0
    ranges = sorted({(tensor.offset or 0, tensor.nbytes) for tensor in found})
    reached = held = 0
    for offset, length in ranges:
        assert reached <= offset < reached + (64 << 10), (reached, offset)
        reached, held = offset + length, held + length
    assert reached == os.path.getsize(found[0].path)
    assert (reached - held) * 16 < held
    return (reached - held) / held


def size(path: Path) -> int:
    return sum(item.stat().st_size for item in path.parent.glob(f"{path.name}*"))


# Every step -----------------------------------------------------------------------------------------------------------


class Steps:
    """Counts the calls of this process that change files, and lets one of them be its last, or fail.

    ``at``: the number of the call, from 0. ``how``: ``before`` or ``after`` it the process kills itself; an ``errno``
    is what the call fails with.
    """

    def __init__(self, at: int = -1, how: str | int = "before") -> None:
        self.at, self.how, self.made = at, how, list[str]()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch ``os`` and the files that ``ir.atomic`` opens."""
        real = {name: getattr(os, name) for name in ("replace", "fsync", "unlink", "fchmod")}
        try:
            for name, function in real.items():
                setattr(os, name, self._watched(name, function))
            atomic.open = self._open  # type: ignore[attr-defined]
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            del atomic.open  # type: ignore[attr-defined]

    def _open(self, name: str, mode: str) -> io.BufferedWriter:
        steps = self

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                written = steps._watched("write", super().write)(data)
                assert isinstance(written, int)
                return written

        return io.BufferedWriter(self._watched("create", lambda: Raw(name, mode.replace("b", "")))())

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **words: Any) -> Any:
            mine = len(self.made) == self.at
            self.made.append(name)
            if mine and isinstance(self.how, int):
                raise OSError(self.how, os.strerror(self.how))
            if mine and self.how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **words)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def every_step(folder: Path, external: bool, how: str | int) -> dict[str, Any]:
    """Save B over A once for each call on the way, and let that call be the last, or fail."""
    path = folder / "m.onnx"
    a, b = model(1, 3, 256), model(2, 2, 300)
    known = {"A": digests(a), "B": digests(b)}
    save(a, path, external=external)
    steps = Steps()
    with steps.watching():
        save(b, path, external=external)
    calls, held = list(steps.made), []
    for number, name in enumerate(calls):
        save(a, path, external=external)
        code = end(fork(lambda number=number: _saved_so(b, path, external, Steps(number, how))))  # type: ignore[misc]
        assert code == (-signal.SIGKILL if isinstance(how, str) else 0), (number, name, code)
        held.append(which(path, known))
        if isinstance(how, int) and name != "unlink":  # that one fails to remove what is no longer needed
            check_tidy(path, external) if held[-1] == "A" else check_no_orphans(path)
        save(b, path, external=external)
        assert which(path, known) == "B"
        check_tidy(path, external)
    # There is one moment of change; but a model that could not take the old one's permissions is saved nevertheless.
    changes = [name for number, name in enumerate(held) if how != errno.ENOSPC or calls[number] != "fchmod"]
    assert changes == sorted(changes), held
    return {"calls": calls, "held": "".join(held)}


def _saved_so(item: ir.Model, path: Path, external: bool, steps: Steps) -> None:
    with steps.watching():
        try:
            save(item, path, external=external)
        except BadFile as error:
            sentence = str(error)
            assert "\n" not in sentence
            assert "disk" in sentence, sentence
            held = which(path, {"old": digests(load(path))} | {"new": digests(item)})
            assert held in ("old", "new")
        else:
            assert steps.made[steps.at] in ("unlink", "fchmod"), steps.made


def race(folder: Path, processes: int = 4, rounds: int = 10) -> dict[str, Any]:
    """Processes that save over one path at the same time, each its own model."""
    path, external = folder / "m.onnx", True
    models = [model(seed, 2 + seed, 256) for seed in range(processes)]
    known = {str(seed): digests(item) for seed, item in enumerate(models)}

    def saves(item: ir.Model) -> None:
        for _ in range(rounds):
            save(item, path, external=external)

    save(models[0], path, external=external)
    pids = [fork(lambda item=item: saves(item)) for item in models]  # type: ignore[misc]
    seen = Counter[str]()
    while pids:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            assert status == 0
            pids.remove(ended)
        seen[which(path, known)] += 1  # whoever reads meanwhile gets one of them whole
    check_tidy(path, external)
    which(path, known)
    return {"saves": processes * rounds, "seen": seen}


# Runs -----------------------------------------------------------------------------------------------------------------

JOBS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "external": lambda folder, count: random_kills(folder, count, True),
    "inline": lambda folder, count: random_kills(folder, count, False),
    "cli": lambda folder, count: cli_kills(folder, count),
    "few": lambda folder, count: {
        "external": random_kills(_made(folder, "e"), count // 2, True, 3),
        "inline": random_kills(_made(folder, "i"), count // 5, False, 3),
        "cli": cli_kills(_made(folder, "c"), count - count // 2 - count // 5, 3),
    },
    "external-before": lambda folder, _: every_step(folder, True, "before"),
    "external-after": lambda folder, _: every_step(folder, True, "after"),
    "external-full": lambda folder, _: every_step(folder, True, errno.ENOSPC),
    "inline-before": lambda folder, _: every_step(folder, False, "before"),
    "inline-after": lambda folder, _: every_step(folder, False, "after"),
    "inline-full": lambda folder, _: every_step(folder, False, errno.ENOSPC),
    "race": lambda folder, _: race(folder),
}


def _made(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def run_apart(name: str, count: int = 0) -> dict[str, Any]:
    """Run one job in a fresh process; -> what it found."""
    command = [sys.executable, "-m", "tests.reliability.kills", "--job", name, "--count", str(count)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{name}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def job(name: str, count: int) -> dict[str, Any]:
    """Run one job in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return JOBS[name](Path(folder), count)


def table(found: dict[str, dict[str, Any]]) -> str:
    """The record: how many kills fell where, and what was found after them."""
    lines = ["| killed process | kills | bytes | when | afterwards |", "| --- | --- | --- | --- | --- |"]
    names = {
        "external": "saves with a data file",
        "inline": "saves without one",
        "cli": f"`penjing run m.onnx -o m.onnx --force -p {PIPELINE}`",
    }
    for key, name in names.items():
        one = found[key]
        when = ", ".join(f"{count} {word}" for word, count in sorted(one["phases"].items(), key=lambda item: -item[1]))
        held = ", ".join(f"{word} {count}" for word, count in sorted(one["held"].items()))
        lines.append(f"| {name} | {one['kills']} | {one['bytes']:,} | {when} | {held} |")
    total = sum(found[key]["kills"] for key in names)
    lines += [
        "",
        f"{total} kills at random moments: every file loaded and was one of the two models, byte for byte; the",
    ]
    lines += ["next save left the model and its one data file.", ""]
    for form in ("external", "inline"):
        one = found[f"{form}-before"]
        counts = ", ".join(f"{count} {call}" for call, count in Counter(one["calls"]).items())
        lines += [
            f"- {form}: killed before and after each of {len(one['calls'])} calls ({counts}), and each failed",
            f"  once with ENOSPC. The old model (A) or the new one (B), killed before each: `{one['held']}`.",
        ]
    raced = found["race"]
    lines += [
        f"- {raced['saves']} saves by 4 processes over one path at once, and a fifth that loads all the while",
        f"  ({sum(raced['seen'].values())} times): always a whole model, and nothing left over at the end.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write kills.md beside this script")
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--count", type=int, default=0)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(job(given.job, given.count)))
        return
    counts = {"external": 100, "inline": 40, "cli": 60}
    found = {name: job(name, counts.get(name, 0)) for name in JOBS if name != "few"}
    if given.record:
        from .record import record

        record("kills", "python -m tests.reliability.kills --record", table(found))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
