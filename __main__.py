"""The program ``penjing``, also ``python -m penjing``: signals are taken before anything slow is imported."""

from __future__ import annotations

import os
import sys

from .runtime.interrupt import Interrupts


def main() -> None:
    """Run the command line of this process. Exit codes: those of ``cli.main``, 130 interrupted, 143 terminated."""
    _open_standard_streams()
    with Interrupts():
        if not sys.flags.safe_path and sys.path and sys.path[0] == os.getcwd():
            del sys.path[0]  # of ``python -m``: what lies in the current folder must not pass for numpy
        from .cli import main as run

        run()


def _open_standard_streams() -> None:
    """Services start programs with these closed; a file that is opened then must not pass for one of them."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    main()
