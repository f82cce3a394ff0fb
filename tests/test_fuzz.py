"""Mutated models are refused with a sentence or pass whole, and the harness that says so finds what it looks for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from reliability.fuzz import SECRET, Journey, Result, fuzz, journey, run_journey, summary
from reliability.mutations import MUTATIONS, Sample, mutant
from reliability.specimens import corpus, external

from penjing.runtime.session import limits

SEED = 3


def faults(results: list[Result]) -> str:
    """Each fault in a line; empty where there is none."""
    return "\n".join(
        f"{result.number} ({result.kinds}; {result.sample}): {result.detail}"
        for result in results
        if result.verdict == "fault"
    )


def test_500_mutants() -> None:
    results = list(fuzz(range(500), corpus(), seed=SEED, jobs=2))
    assert faults(results) == ""
    assert len(results) == 500
    assert sum(result.verdict == "passed" for result in results) > 100
    assert sum(result.verdict == "refused" for result in results) > 100
    assert {kind for result in results for kind in result.kinds.split("+")} == set(MUTATIONS)
    assert "No faults." in summary(results, SEED)


def test_100_mutants_in_onnx_runtime() -> None:
    limits()  # imports it before the fork
    results = list(fuzz(range(100), corpus(), run_journey, seed=SEED, jobs=2))
    assert faults(results) == ""
    assert any(result.verdict == "passed" for result in results)


def test_a_mutant_is_the_same_each_time() -> None:
    for number in range(50):
        assert mutant(SEED, number, corpus()) == mutant(SEED, number, corpus())
    assert mutant(SEED, 1, corpus()) != mutant(SEED + 1, 1, corpus())


# Planted faults -------------------------------------------------------------------------------------------------------

SAMPLE: list[Sample] = [external()]


def result_of(run: Journey, seconds: float = 20) -> Result:
    """What the harness says of the one mutant that it gives to ``run``."""
    [found] = fuzz([7], SAMPLE, run, seed=SEED, seconds=seconds)
    return found


def test_sound_journeys() -> None:
    assert result_of(lambda path: "passed").verdict == "passed"
    refused = result_of(lambda path: "refused: it is: bad")
    assert (refused.verdict, refused.detail) == ("refused", "it is: bad")
    assert result_of(journey).verdict in ("passed", "refused")


def _raises(path: Path) -> str:
    raise KeyError("to")


def _crashes(path: Path) -> str:
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs(path: Path) -> str:
    time.sleep(60)
    return "passed"


def _leaves_a_file(path: Path) -> str:
    path.with_name("saved.onnx.12345678.partial").touch()
    return "passed"


def _leaves_a_refused_model(path: Path) -> str:
    path.with_name("saved.onnx").touch()
    return "refused: no"


def _changes_its_input(path: Path) -> str:
    path.write_bytes(b"")
    return "passed"


def _writes_above(path: Path) -> str:
    (path.parents[1] / "canary.bin").write_bytes(b"")
    return "passed"


def _reads_above(path: Path) -> str:
    (path.parents[1] / "canary.bin").read_bytes()
    return "passed"


def _reads_a_device(path: Path) -> str:
    with open("/dev/zero", "rb") as file:
        file.read(1)
    return "passed"


def _copies_a_secret(path: Path) -> str:
    path.with_name("saved.onnx").write_bytes(b"..." + SECRET)
    return "passed"


def _takes_memory(path: Path) -> str:
    assert bytearray(700_000_000)[-1] == 0
    return "passed"


def _takes_all_memory(path: Path) -> str:
    assert len(bytearray(64 << 30))
    return "passed"


def _says_an_escape(path: Path) -> str:
    return "refused: \x1b[2J"


@pytest.mark.parametrize(
    ("run", "detail"),
    [
        (_raises, "KeyError at test_fuzz.py"),
        (_crashes, "died with exit code -9"),
        (_hangs, "hangs for 1 s"),
        (_leaves_a_file, "left ['models/saved.onnx.12345678.partial']"),
        (_leaves_a_refused_model, "left ['models/saved.onnx']"),
        (_changes_its_input, "changed models/mutant.onnx"),
        (_writes_above, "canary.bin"),
        (_reads_above, "outside the model's folder"),
        (_reads_a_device, "opened '/dev/zero', which is outside the model's folder"),
        (_copies_a_secret, "copied bytes from outside the model's folder"),
        (_takes_memory, "MiB of memory for"),
        (_takes_all_memory, "MemoryError"),
        (_says_an_escape, "unescaped control character: '\\x1b[2J'"),
    ],
)
def test_a_planted_fault_is_found(run: Journey, detail: str) -> None:
    found = result_of(run, seconds=1 if run is _hangs else 20)
    assert found.verdict == "fault"
    assert detail in found.detail
    assert found.number == 7


def test_what_comes_after_a_fault_is_still_run() -> None:
    def run(path: Path) -> str:
        return _crashes(path) if path.stat().st_size % 2 else "passed"

    results = list(fuzz(range(20), SAMPLE, run, seed=SEED, jobs=2))
    assert sorted(result.number for result in results) == list(range(20))
    assert {result.verdict for result in results} == {"passed", "fault"}
