"""Runs Python on a processor that seems to have AVX2, and neither AVX512, VNNI nor AMX.

    python tests/benchmarks/avx2.py SCRIPT.py [arguments]     # or: -c CODE

ONNX Runtime then takes its kernels for AVX2, with their speed, and with products of 8 bits that saturate. Needs Linux
on x86-64 with ``cpuid_fault`` among the flags of /proc/cpuinfo, and gcc. How: see ``avx2.c``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("avx2.c")
TUNABLES = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL"  # for the C library, which asks before anything can be loaded


def obstacle() -> str | None:
    """Why this cannot be done here."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if " cpuid_fault" not in flags or " avx2" not in flags:
        return "no Linux on a processor with AVX2 and cpuid_fault"
    return None if shutil.which("gcc") else "no gcc"


def run(arguments: Sequence[str]) -> int:
    """Python with these arguments; its exit code."""
    if reason := obstacle():
        print(f"avx2.py: {reason}", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "avx2.so")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "GLIBC_TUNABLES": TUNABLES}
        return subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
