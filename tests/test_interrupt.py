"""Ctrl-C and SIGTERM at any moment: one sentence, exit 130 or 143, the folder as it was or the complete result."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import penjing
from penjing.ir.interrupts import uninterrupted
from penjing.ir.text import text
from penjing.models import zoo

SAID = "penjing: interrupted; nothing was left half-written."
RUN = ("run", "m.onnx", "-p", "prune-magnitude{sparsity=0.5}", "-o", "out.onnx", "--json", "out.json", "--force")
SELF = "import os, signal\ndef stop(): os.kill(os.getpid(), signal.SIGINT)\n"
TEXT = "m (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1,2,3,4}> { h = Relu (x) y = MatMul (h, w) }"
Parse = Callable[[str], ir.Model]


@pytest.fixture
def folder(tmp_path: Path, parse: Parse) -> Path:
    """A folder with a model and what earlier runs left: an output with a data file, a report, a reproducer."""
    found = tmp_path / "work"
    (found / "out.onnx.reproducer").mkdir(parents=True)
    (found / "out.onnx.reproducer" / "run.json").write_text("{}")
    model = parse(TEXT)
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((2, 2), np.float32), name="w")
    penjing.save(model, found / "m.onnx")
    big = ir.Value(name="big", const_value=ir.tensor(np.ones(1000, np.float32), name="big"))
    model.graph.register_initializer(big)
    penjing.save(model, found / "out.onnx", external=True)
    (found / "out.json").write_text("{}")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for what Python caches; what the clock writes into a report taken out."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    clock = rb'"(?:seconds|before_ms|after_ms)": [\d.e-]+'
    return {str(path.relative_to(folder)): re.sub(clock, b"", path.read_bytes()) for path in files}


def start(folder: Path, *arguments: object, wrap: str = "") -> subprocess.Popen[str]:
    """The program in ``folder``, as a group of its own; ``wrap`` is Python that runs in it first."""
    program = f"import sys; sys.argv[0] = 'penjing'; {wrap or 'pass'}\nfrom penjing.__main__ import main; main()"
    temporary = folder.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(child: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """Exit code and standard error; nothing may still run, or lie in the folder for temporary files."""
    _, error = child.communicate(timeout=120)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
        raise AssertionError("a process of the program lives on")
    left = {path.name for path in (folder.parent / "temporary").iterdir()} - {".ses"}  # which is ONNX Runtime's own
    assert not left
    return child.returncode, error.strip()


def wait_for_handlers(child: subprocess.Popen[str]) -> None:
    """Until the program has taken SIGTERM, which Python by itself does not."""
    bit = 1 << (signal.SIGTERM - 1)
    while child.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{child.pid}/status").read_text())
        if caught and int(caught[1], 16) & bit:
            return
        time.sleep(0.002)


@pytest.fixture
def complete(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """The contents of the folder after an undisturbed run."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert end(start(folder, *RUN, wrap=QUICK), folder) == (0, "")
    found = contents(folder)
    assert "out.onnx.reproducer/run.json" not in found
    assert not [name for name in found if name.endswith(".data")]
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    for path, old in before.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(old)
    return found


def test_at_random_moments(folder: Path, complete: dict[str, bytes]) -> None:
    before, moments = contents(folder), random.Random(8)
    for turn in range(10):
        child = start(folder, *RUN)
        wait_for_handlers(child)
        time.sleep(moments.uniform(0, 1.5))
        (os.killpg if turn % 2 else os.kill)(child.pid, signal.SIGINT)
        code, error = end(child, folder)
        if code == 0:
            assert (error, contents(folder)) == ("", complete)
            break
        assert (code, error) == (130, SAID)
        assert contents(folder) in (before, complete)


QUICK = "import penjing.runtime.measure as m; m.latency = lambda *_: {'before_ms': 1.0, 'after_ms': 1.0}\n"
SAVING = """
import os
calls = iter(range(100))
def counted(plain):
    def call(*arguments, **words):
        done = plain(*arguments, **words)
        if next(calls) == {at}: os.kill(os.getpid(), {number})
        return done
    return call
for name in ("fsync", "replace", "unlink", "dup"):
    setattr(os, name, counted(getattr(os, name)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_each_step_of_saving(folder: Path, complete: dict[str, bytes], number: signal.Signals) -> None:
    before, seen = contents(folder), []
    for at in range(0 if number == signal.SIGINT else 2, 100, 1 if number == signal.SIGINT else 4):
        child = start(folder, *RUN, wrap=QUICK + SAVING.format(at=at, number=int(number)))
        code, error = end(child, folder)
        if code == 0:
            break
        word = "interrupted" if number == signal.SIGINT else "terminated"
        assert (code, error) == (128 + number, SAID.replace("interrupted", word))
        seen.append(contents(folder))
        assert seen[-1] in (before, complete)
        if seen[-1] == complete:
            break
    assert complete in seen


def test_in_a_metric(folder: Path) -> None:
    before = contents(folder)
    bodies = {
        "score": "stop(); return 1.0",
        "undone": "\n    try: stop()\n    finally: stop(); print('undone')",
        "dropped": "\n    class Last:\n        def __del__(self): stop()\n    Last()\n    import time; time.sleep(60)",
        "raised": "raise KeyboardInterrupt",
    }
    (folder / "user.py").write_text(SELF + "".join(f"def {name}(session): {body}\n" for name, body in bodies.items()))
    before = contents(folder)
    for name in bodies:
        child = start(folder, *RUN, "--metric", f"user.py:{name}")
        assert end(child, folder) == (130, SAID), name
        assert contents(folder) == before


def test_in_data(folder: Path) -> None:
    (folder / "user.py").write_text(
        SELF + "import numpy\ndef feeds():\n    yield {'x': numpy.ones((1, 2), 'f')}\n    stop()\n"
    )
    before = contents(folder)
    assert end(start(folder, *RUN, "--data", "user.py:feeds"), folder) == (130, SAID)
    assert contents(folder) == before


@pytest.mark.parametrize("at", ["write_data_set", "remove_reproducer"])
def test_while_a_reproducer_is_written(folder: Path, at: str) -> None:
    before = contents(folder)
    wrap = f"""
import os, signal, penjing.runtime.reproducer as r
plain = r.{at}
def call(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    plain(*arguments)
r.{at} = call"""
    (folder / "m.npz").write_bytes(b"")
    np.savez(folder / "m.npz", x=np.ones((4, 2), np.float32))
    before = contents(folder)
    child = start(folder, *RUN, "--data", "m.npz", "--max-error", "1e-9", wrap=wrap)
    assert end(child, folder) == (130, SAID)
    after = contents(folder)
    if at == "remove_reproducer":  # by then it is whole, and takes the old one's place
        kept = {name: after.pop(name) for name in list(after) if name.startswith("out.onnx.reproducer/")}
        assert {"run.json", "model.onnx", "passes.txt", "reproduce.py"} <= {Path(name).name for name in kept}
        before.pop("out.onnx.reproducer/run.json")
    assert after == before


LOOP = """<ir_version: 8, opset_import: ["": 17]>
m (float[2] x, int64 n) => (float[2] y) <bool c = {1}> {
    y = Loop (n, c, x) <body = b (int64 i, bool ci, float[2] a) => (bool co, float[2] r) {
        co = Identity (ci)
        r = Sin (a)
    }>
}"""


@pytest.mark.parametrize("command", ["run", "compare"])
def test_in_a_run_that_does_not_end(folder: Path, command: str) -> None:
    onnx.save(onnx.parser.parse_model(LOOP), folder / "m.onnx")
    (folder / "user.py").write_text(
        "import numpy\ndef feeds():\n    yield {'x': numpy.ones(2, 'f'), 'n': numpy.array(2**62)}\n"
    )
    before = contents(folder)
    wrap = """
import threading, os, signal, onnxruntime
own = os.getpid()  # the first run is tried in a process of its own
plain = onnxruntime.InferenceSession.run
def run(self, names, feed, options=None):
    if int(feed.get('n', 0)) > 1:
        threading.Timer(0.3, os.kill, (own, signal.SIGINT)).start()
    return plain(self, names, feed, options)
onnxruntime.InferenceSession.run = run"""
    words = RUN if command == "run" else ("compare", "m.onnx", "m.onnx")
    assert end(start(folder, *words, "--data", "user.py:feeds", wrap=wrap), folder) == (130, SAID)
    assert contents(folder) == before


def test_bench_ends_the_process_that_it_measures(folder: Path) -> None:
    wrap = """
import os, signal, penjing.runtime.measure as m
m.MemoryMeter.__enter__ = lambda self: os.kill(os.getpid(), signal.SIGINT)"""
    assert end(start(folder, "bench", "m.onnx", wrap=wrap), folder) == (130, SAID)


def test_an_ignored_signal_stays_ignored(folder: Path) -> None:
    (folder / "user.py").write_text(SELF + "def score(session):\n    stop()\n    return 1.0\n")
    wrap = QUICK + "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert end(start(folder, *RUN, "--metric", "user.py:score", wrap=wrap), folder) == (0, "")


@contextlib.contextmanager
def interrupted_at(name: str, monkeypatch: pytest.MonkeyPatch, where: Any = os) -> Iterator[None]:
    """``KeyboardInterrupt`` must leave the block: the signal comes in the call ``name``."""
    plain = getattr(where, name)

    def call(*arguments: Any, **words: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return plain(*arguments, **words)

    raised = False
    with monkeypatch.context() as patch:
        patch.setattr(where, name, call)
        try:
            yield
        except KeyboardInterrupt:
            raised = True
    assert raised


def test_the_library_raises_and_leaves_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = penjing.load(folder / "m.onnx"), contents(folder)
    shown = text(model)
    for name in ("fsync", "urandom"):
        with interrupted_at(name, monkeypatch):
            penjing.save(model, folder / "out.onnx", external=True)
        assert contents(folder) == before

    def score(session: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        penjing.run(model, "prune-magnitude{sparsity=0.5}", metric=score, reproducer=folder / "r")
    assert text(model) == shown
    assert contents(folder) == before


def test_the_library_changes_a_model_whole(folder: Path, parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    model = penjing.load(folder / "m.onnx")
    with interrupted_at("become", monkeypatch, sys.modules["penjing.runtime.run"]):
        penjing.run(model, "prune-magnitude{sparsity=0.5}")
    assert np.count_nonzero(model.graph.initializers["w"].const_value.numpy()) == 2
    with interrupted_at("replace", monkeypatch):
        penjing.save(model, folder / "out.onnx")
    assert text(penjing.load(folder / "out.onnx")) == text(model)
    with interrupted_at("serialize_model", monkeypatch, ir.serde):
        penjing.save(penjing.load(zoo.path("mlp")), folder / "mlp.onnx")


def test_uninterrupted_blocks_nest_and_give_the_handlers_back() -> None:
    handlers, done = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []
    try:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
    except KeyboardInterrupt:
        done.append("raised")
    assert done == ["inner", "outer", "raised"]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
