"""The program ``penjing``, also ``python -m penjing``: signals are taken before anything slow is imported."""

from __future__ import annotations

import os
import sys

from .runtime.interrupt import Interrupts


def main() -> None:
    """Run the command line of this process. Exit codes: those of ``cli.main``, 130 interrupted, 143 terminated."""
    with Interrupts():
        if not sys.flags.safe_path and sys.path and sys.path[0] == os.getcwd():
            del sys.path[0]  # of ``python -m``: what lies in the current folder must not pass for numpy
        from .cli import main as run

        run()


if __name__ == "__main__":
    main()
