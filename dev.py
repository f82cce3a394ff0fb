"""Set up a virtual environment beside this file and work in it: ``python3 dev.py demo`` or ``python3 dev.py test``.

``demo`` installs penjing and runs its demo; ``test`` installs it with what its tests need and runs them, lint and types
included. Further words go to the demo or to pytest. Needs Python 3.11 or newer and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent.resolve()
HOME = HERE / ".venv"
PYTHON = HOME / ("Scripts" if os.name == "nt" else "bin") / "python"
JOBS = {"demo": ("-m", "penjing", "demo"), "test": ("-m", "pytest")}


def main(words: list[str]) -> int:
    if not words or words[0] not in JOBS:
        print(f"usage: python3 dev.py {'|'.join(JOBS)} [more words]")
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one is told so
        print(f"penjing needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
        return 2
    job, *more = words
    if not PYTHON.exists():
        try:
            venv.create(HOME, with_pip=True)
        except subprocess.CalledProcessError:
            print(f"No virtual environment could be made in {HOME}; on Debian and Ubuntu, install python3-venv first.")
            return 2
    extra = "[test]" if job == "test" else ""
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--editable", f"{HERE}{extra}"], check=True)
    return subprocess.run([PYTHON, *JOBS[job], *more], cwd=HERE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
