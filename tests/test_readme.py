"""The README tells the truth: its commands and code run, its tables are what the registry says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from penjing.passes.manual import pages
from penjing.passes.registry import all_passes, all_pipelines

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(penjing .*?)```", README, re.DOTALL)
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder in which the bundled models are where the README has them."""
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=["holds", "breaks a bound", "int8", "packed"])
def test_commands(command: str, folder: Path) -> None:
    breaks = "smaller.onnx" in command
    words = [sys.executable, "-m", *shlex.split(command.replace("\\\n", " "))]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"COLUMNS": "112"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == (1 if breaks else 0), done.stderr
    shown = done.stderr if breaks else done.stdout
    for line in shown.splitlines():
        if not re.search(r"latency|\d\.\d\d$", line):  # the clock's lines differ from run to run
            assert line.rstrip() in README


def test_python(folder: Path) -> None:
    (folder / "readme.py").write_text(PYTHON, encoding="utf-8")
    done = subprocess.run([sys.executable, "readme.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.994 0.98")


def test_tables_of_passes() -> None:
    own = {name for name, cls in all_passes().items() if cls.__module__.startswith("penjing.")}
    for entry in pages()["passes"]:
        if entry["name"] in own:
            summary = entry["about"].splitlines()[0]
            assert f"| `{entry['name']}` | {entry['effect'].upper()} | {summary} |" in README
    for name, steps in all_pipelines().items():
        assert f"`{name}` stands for `{steps}`." in README


def test_the_test_command_is_the_gate() -> None:
    assert "python3 dev.py test" in README
    assert "python3 dev.py test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_demo(folder: Path) -> None:
    words = [sys.executable, "-m", "penjing", "demo", "-o", "small.onnx"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"zoo:accuracy +0\.994 +0\.98", done.stdout)
    for fact in ("bytes", "sparsity", "latency ms a run"):
        assert re.search(rf"^{fact} +\S+ +\S+", done.stdout, re.MULTILINE)
    assert (folder / "small.onnx").exists()
