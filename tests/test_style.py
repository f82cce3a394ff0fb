"""Lint, format and types are tests like any other, so that one command tells whether the tree is green."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _clean(*command: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint() -> None:
    _clean("ruff", "check", ".")


def test_format() -> None:
    _clean("ruff", "format", "--check", ".")


def test_types(tmp_path: Path) -> None:
    # The repository root is the package, and a clone may have a name that no package can: mypy sees it through a link.
    (tmp_path / "penjing").symlink_to(ROOT, target_is_directory=True)
    packages = ("penjing.ir", "penjing.passes", "penjing.runtime", "penjing.models", "penjing.__main__")
    _clean("mypy", *(word for package in packages for word in ("-p", package)), MYPYPATH=str(tmp_path))
