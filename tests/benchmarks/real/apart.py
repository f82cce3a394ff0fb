"""Tools in processes of their own, with bounds on time and memory: what they took, and what they say when they fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from penjing.runtime.measure import MemoryMeter

from . import tools
from .cases import ROOT, Case


@dataclass
class Made:
    """CPU seconds, and the peak of memory in bytes over that after imports; or the error, in short."""

    path: Path
    seconds: float = 0.0
    peak: int = 0
    error: str | None = None


def quantize(tool: str, case: Case, folder: Path, *, python: str, timeout: float, memory: float) -> Made:
    """Run ``tool`` under the interpreter ``python``, for ``timeout`` seconds and ``memory`` bytes at most."""
    made = Made(folder / f"{len(list(folder.iterdir()))}.onnx")
    words = [python, "-P", tools.__file__, tool, str(case.model), str(case.calibration), str(made.path)]
    where = os.environ | {"PYTHONPATH": str(ROOT)} if python == sys.executable else os.environ
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
            env=where,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory))),
        )
        try:
            _attend(child, made, timeout)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if made.error is None and child.returncode:
            said.seek(0)
            made.error = _last_words(said.read(), child.returncode)
    return made


def _attend(child: subprocess.Popen[str], made: Made, timeout: float) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    if not child.stdout.readline():
        child.wait()
        return
    with MemoryMeter(child.pid) as meter:
        try:
            answer, _ = child.communicate("go\n", timeout)
        except subprocess.TimeoutExpired:
            made.error = f"stopped after {timeout:.0f} s"
            return
    made.peak = meter.peak_bytes or 0
    if not child.returncode:
        made.seconds = float(answer)


def _last_words(said: str, code: int) -> str:
    """The last line that is not blank, which is the exception's where there was one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (lines[-1] if lines and code > 0 else ending)[:160]
