"""What every recorded run begins with and where it goes: date, versions and machine, into a file beside the script."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "numpy", "protobuf")


def header(command: str) -> str:
    """The first lines of a record: the command that made it, the day, versions and cores."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    day = datetime.datetime.now(datetime.UTC).date()
    system = f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores"
    return f"`{command}`, {day}\n\n{system}; {packages}\n"


def record(name: str, command: str, body: str) -> None:
    """Write ``tests/reliability/NAME.md`` and print it."""
    text = f"{header(command)}\n{body.rstrip()}\n"
    Path(__file__).with_name(f"{name}.md").write_text(text)
    print(text)
