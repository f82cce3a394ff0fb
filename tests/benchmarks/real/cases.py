"""Models with data to calibrate on, other data to judge by, a metric, and the bars that int8 is held to.

``load("ppocr-rec")`` makes the data where they are not there yet. On the command line a case serves as

    penjing run CASE.model -p quantize-auto --data CASE.calibration --metric CASE.metric -o OUT
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.models import zoo

from . import filetypes, ocr, photographs, rendering, writing
from .tools import read

FOLDER = Path(tempfile.gettempdir()) / "penjing-benchmark"
ROOT = Path(__file__).parents[3]
_METRIC = """import sys

sys.path.append({root!r})
from tests.benchmarks.real import cases


def metric(session):
    return cases.load({name!r}, {folder!r}).score(session)
"""


@dataclass(frozen=True)
class Bars:
    """How much of the metric int8 may lose, and its greatest latency and bytes as ratios to those of float.

    None: no bar. ``megabytes`` is one on the file itself, of 10^6 bytes.
    """

    loss: float | None = None
    latency: float = 1.0
    size: float = 0.30
    megabytes: float | None = None


@dataclass(frozen=True)
class Case:
    """``calibration`` is what ``--data`` takes, ``score`` maps a session to the metric, higher is better."""

    name: str
    model: Path
    calibration: Path
    measure: str
    score: Callable[[Any], float]
    bars: Bars
    metric: str

    def feeds(self, count: int | None = None) -> list[dict[str, Any]]:
        """The calibration data, one sample a feed: all, or the first ``count``."""
        return read(self.calibration, count)


@dataclass(frozen=True)
class _Source:
    """``prepare`` fills a folder; ``code`` are the modules that it depends on. None: the data lie in the repository."""

    measure: str
    score: Callable[[Path, Any], float]
    bars: Bars
    prepare: Callable[[Path], None] | None = None
    model: Callable[[Path], Path] = lambda folder: folder / "model.onnx"
    code: Sequence[Any] = ()


def _digits(name: str, bars: Bars) -> _Source:
    return _Source("top-1", lambda _, session: zoo.accuracy(session), bars, model=lambda _: zoo.path(name))


def _ocr(kind: str, measure: str, bars: Bars) -> _Source:
    prepare, score = functools.partial(ocr.prepare, kind), functools.partial(ocr.score, kind)
    return _Source(measure, score, bars, prepare, lambda _: ocr.model(kind), (ocr, rendering, writing))


def _photographs(kind: str, bars: Bars) -> _Source:
    prepare = functools.partial(photographs.prepare, kind)
    return _Source("SQNR, dB", photographs.score, bars, prepare, code=(photographs, photographs.nets))


_CNN = Bars(0.002, 0.60, 0.36)
_SOURCES = {
    "mlp": _digits("mlp", Bars(0.002, 0.50)),
    "cnn-a": _digits("cnn-a", _CNN),
    "cnn-a-legacy": _digits("cnn-a-legacy", _CNN),
    "teacher": _digits("teacher", Bars(0.002, 0.60)),
    "vit": _digits("vit", Bars(0.004, 1.00, 0.36)),
    "magika": _Source(
        "top-1",
        filetypes.score,
        Bars(0.004, 0.50),
        filetypes.prepare,
        lambda _: filetypes.model(),
        (filetypes,),
    ),
    "ppocr-rec": _ocr("rec", "characters", Bars(0.005, 0.76, megabytes=3.3)),
    "ppocr-det": _ocr("det", "hmean", Bars(0.005, 0.70)),
    "ppocr-cls": _ocr("cls", "accuracy", Bars(0.005, 1.00, 0.36)),
    "resnet18": _photographs("resnet18", Bars(latency=1 / 2.8)),
    "mobilenetv2": _photographs("mobilenetv2", Bars(latency=1 / 1.8)),
}
NAMES = tuple(_SOURCES)


def load(name: str, folder: str | os.PathLike[str] = FOLDER) -> Case:
    """The case called ``name``, one of ``NAMES``, its data in a folder of its own under ``folder``.

    What is there is used again unless the code that makes it changed. Raises ``PackageNotFoundError`` or
    ``FileNotFoundError`` where a package or font is not installed.
    """
    source = _SOURCES[name]
    code = b"".join(Path(module.__file__).read_bytes() for module in source.code)
    home = Path(folder) / f"{name}-{hashlib.sha256(code).hexdigest()[:8]}"
    if not home.exists():
        _make(home, source, name, Path(folder))
    calibration = next(iter(sorted(home.glob("calibration*"))), zoo.FOLDER / "mnist-validation.npz")
    score = functools.partial(source.score, home)
    return Case(
        name, source.model(home), calibration, source.measure, score, source.bars, f"{home / 'metric.py'}:metric"
    )


def _make(home: Path, source: _Source, name: str, folder: Path) -> None:
    """Fill a folder beside ``home``, and only then call it so: another process may be at the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        if source.prepare:
            source.prepare(made)
        (made / "metric.py").write_text(_METRIC.format(root=str(ROOT), name=name, folder=str(folder.resolve())))
        try:
            made.rename(home)
        except OSError:
            if not home.exists():
                raise


if __name__ == "__main__":
    for chosen in sys.argv[1:] or NAMES:
        print(load(chosen))
