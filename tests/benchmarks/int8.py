"""int8 by penjing and by others, side by side on real models: same data, one run.

    python -m tests.benchmarks.int8 [--only NAME ...] [--tools NAME ...] [--nncf-python PYTHON] [--data FOLDER]

Each tool runs in a process of its own. The metric is that of data that no tool has seen. Latency is the median ratio
of CPU time to the float model's at one thread, interleaved by turns of ``--turn`` seconds, for one sample a run and,
where samples are of one shape, for 64; ``ms`` is that of one sample. Bytes are of the files without exporter's
metadata, on both sides. CPU seconds and peak memory are what quantizing took, over what importing the tool took; those
of penjing contain its checks. ``+`` stands beside what meets its bar, ``MISS`` beside what does not. Further passes can
be named as tools: ``--tools 'quantize-static{calibrator=mse}'``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from penjing.ir.files import load, save
from penjing.passes.base import Context
from penjing.passes.clean.metadata import StripMetadata
from penjing.runtime.inputs import BATCH
from penjing.runtime.measure import interleave
from penjing.runtime.session import open_session

from .real import cases
from .real.apart import Made, quantize
from .real.tools import NAMES

SECONDS = 2.0  # of the clock, for each model
TURN = 0.02  # seconds: so a small model mostly finds the caches as it left them, as where it runs by itself
_FEEDS = 4  # samples that are timed, in turn


@dataclass
class Row:
    """One model file judged: ``milliseconds`` of CPU for one sample, ``latency`` as ratios to float, ``size`` in bytes.

    The ratios are by samples a run.
    """

    tool: str
    made: Made
    metric: float = math.nan
    size: float = math.nan
    milliseconds: float = math.nan
    latency: dict[int, float] = field(default_factory=dict)


def judge(case: cases.Case, tools: list[str], arguments: argparse.Namespace) -> list[Row]:
    """The float model, and what each tool makes of it."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [Row("float", Made(case.model))]
        for tool in tools:
            python = arguments.nncf_python if tool == "nncf" else sys.executable
            bounds = {"timeout": arguments.timeout, "memory": arguments.memory * 1e9}
            rows.append(Row(tool, quantize(tool, case, Path(scratch), python=python, **bounds)))
        for row in rows:
            _score(row, case)
        sound = [row for row in rows if row.made.error is None]
        for row in sound:
            row.size = stripped_bytes(row.made.path)
        _time(sound, case, arguments.turn)
        return rows


def _time(rows: list[Row], case: cases.Case, turn: float) -> None:
    runs = {1: case.feeds(_FEEDS)}
    if case.calibration.is_file():
        batch = case.feeds(BATCH)
        runs[BATCH] = [{name: np.concatenate([feed[name] for feed in batch]) for name in batch[0]}]
    for count, feeds in runs.items():
        sessions = [open_session(row.made.path) for row in rows]
        clocks = interleave(sessions, feeds, seconds=SECONDS * len(rows), turn=turn)
        for row, cpu in zip(rows, clocks.cpu, strict=True):
            row.latency[count] = float(np.median(cpu / clocks.cpu[0]))
            row.milliseconds = 1e3 * float(np.median(cpu)) if count == 1 else row.milliseconds


def _score(row: Row, case: cases.Case) -> None:
    if row.made.error is None:
        try:
            row.metric = case.score(open_session(row.made.path))
        except Exception as error:
            row.made.error = f"does not run: {error}".splitlines()[0][:160]


def stripped_bytes(path: Path) -> int:
    """Bytes of the model's file without exporter's metadata."""
    model = load(path)
    StripMetadata().run(model, Context())
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "stripped.onnx", external=False)
        return (Path(folder) / "stripped.onnx").stat().st_size


def show(case: cases.Case, rows: list[Row], console: Console) -> None:
    """Print the table of one case."""
    table = Table(title=f"{case.name}: {case.measure}", title_justify="left")
    table.add_column("tool")
    for heading in ("metric", "ms", "of 1", f"of {BATCH}", "MB", "bytes", "CPU s", "peak MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.tool, *_cells(row, rows[0], case.bars))
        if row.made.error:
            console.print(f"{case.name}, {row.tool}: {row.made.error}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def _cells(row: Row, base: Row, bars: cases.Bars) -> list[str]:
    if row.made.error:
        return ["fails"]
    metric, size = f"{row.metric:.4f}", f"{row.size / 1e6:.3f}"
    if row is base:
        return [metric, f"{row.milliseconds:.3f}", "", "", size]
    if bars.loss is not None:
        metric = _marked(metric, round(base.metric - row.metric, 6), bars.loss)
    if bars.megabytes:
        size = _marked(size, row.size / 1e6, bars.megabytes)
    ratios = [row.latency.get(count) for count in (1, BATCH)]
    latency = ["" if ratio is None else _marked(f"{ratio:.2f}", round(ratio, 2), bars.latency) for ratio in ratios]
    part = _marked(f"{row.size / base.size:.3f}", round(row.size / base.size, 3), bars.size)
    spent = f"{row.made.seconds:.1f}", f"{row.made.peak / 1e6:.0f}"
    return [metric, f"{row.milliseconds:.3f}", *latency, size, part, *spent]


def _marked(text: str, found: float, bar: float) -> str:
    return f"{text} [green]+[/]" if found <= bar else f"{text} [red]MISS[/]"


def summary(judged: dict[str, list[Row]], console: Console) -> None:
    """The geometric mean of each tool's latencies for one sample, and on how many models it failed."""
    for tool in dict.fromkeys(row.tool for rows in judged.values() for row in rows[1:]):
        found = [row for rows in judged.values() for row in rows if row.tool == tool]
        ratios = [row.latency[1] for row in found if not row.made.error]
        mean = f"latency {math.exp(np.log(ratios).mean()):.2f} in geometric mean" if ratios else "nothing"
        console.print(f"{tool}: {mean}; fails on {len(found) - len(ratios)} of {len(found)}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=cases.NAMES, default=cases.NAMES, metavar="NAME", help="models")
    parser.add_argument("--tools", nargs="+", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--nncf-python", metavar="PYTHON", help="an interpreter whose environment has nncf")
    parser.add_argument("--data", default=cases.FOLDER, metavar="FOLDER", help="where the data are made and kept")
    parser.add_argument("--turn", type=float, default=TURN, metavar="SECONDS", help="each model's; 0 is run by run")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for each tool and model")
    parser.add_argument("--memory", type=float, default=8, metavar="GB", help="for each tool and model")
    arguments = parser.parse_args()
    console, tools, judged = Console(width=120), list(arguments.tools), {}
    if arguments.nncf_python is None and importlib.util.find_spec("nncf"):
        arguments.nncf_python = sys.executable
    if "nncf" in tools and arguments.nncf_python is None:
        tools.remove("nncf")
        console.print("nncf is left out: it is not installed here; name an interpreter with --nncf-python.")
    for name in arguments.only:
        try:
            case = cases.load(name, arguments.data)
        except (ImportError, OSError, ValueError) as error:
            console.print(f"{name} is left out: {error}", markup=False)
            continue
        judged[name] = judge(case, tools, arguments)
        show(case, judged[name], console)
    summary(judged, console)


if __name__ == "__main__":
    main()
