"""Wall seconds until penjing is imported, its face is reached, and ``penjing passes`` is done, beside onnx_ir's import.

    python tests/benchmarks/start.py

The goals: ``import penjing`` under 0.6 s, ``penjing passes`` under 1 s.
"""

import subprocess
import sys
import time

JOBS = {
    "import onnx_ir": ["-c", "import onnx_ir"],
    "import penjing": ["-c", "import penjing"],
    "penjing.load, run, save": ["-c", "import penjing; penjing.load, penjing.run, penjing.save"],
    "penjing passes": ["-m", "penjing", "passes"],
}


def main() -> None:
    empty = least(["-c", "pass"])
    first = least(JOBS["import onnx_ir"]) - empty
    for name, words in JOBS.items():
        spent = least(words) - empty
        print(f"{name:24} {spent:.2f} s over an empty interpreter, {spent / first:.2f} of import onnx_ir")


def least(words: list[str]) -> float:
    """The quickest of five fresh interpreters."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
