"""A folder that fails alone: the model, the pipeline text, the feeds, the seed and the versions of a breach.

OUT.reproducer/
    reproduce.py       run me: exit code 1 where the breach shows again
    run.json           pipeline text, seed, bounds, versions, what was found
    model.onnx         the model that the bad pass was given
    feeds/*.npz        the runs that show it
    pass_*.py          sources of passes that are not penjing's own; metric.py, the user's metric
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import PenjingError
from ..ir.files import load, save
from ..passes.registry import find
from .report import Report, versions

if TYPE_CHECKING:
    from .check import Breach

MOST_FEED_BYTES = 64 * 2**20

SCRIPT = '''\
"""Run the bad pass again, on the model and the feeds beside this file. Exit code 1: the breach shows again."""

import sys
from pathlib import Path

from penjing.runtime.reproducer import replay

sys.exit(replay(Path(__file__).parent))
'''


def write_reproducer(
    folder: str | os.PathLike[str],
    breach: Breach,
    report: Report,
    bounds: Mapping[str, float | None],
    metric: Callable[[Any], float] | str | None,
) -> None:
    """Write what shows ``breach`` again into ``folder``, in place of an older reproducer of the same name."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "feeds").mkdir(parents=True)
    if breach.before is not None:
        save(breach.before, folder / "model.onnx")
    room = MOST_FEED_BYTES
    for index, feed in enumerate(breach.feeds):
        room -= sum(np.asarray(value).nbytes for value in feed.values())
        if index and room < 0:
            break
        _write_feed(folder / "feeds" / f"{index:03}.npz", feed)
    passes = sorted({report.name for report in report.passes})
    facts = {
        "found": breach.reasons,
        "pipeline": breach.pass_,
        "seed": report.seed,
        "bounds": dict(bounds),
        "metric": _copy_metric(metric, folder),
        "modules": _copy_modules(passes, folder),
        "versions": versions(),
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "reproduce.py").write_text(SCRIPT, encoding="utf-8")


def replay(folder: Path) -> int:
    """Run a reproducer folder: 1 where the breach shows again (the reason is printed), 0 where it does not."""
    from .run import BoundExceeded, run

    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for module in facts["modules"]:
        _import(folder / module)
    feeds = folder / "feeds" if any((folder / "feeds").iterdir()) else None
    metric = facts["metric"]
    if metric and metric.startswith("metric.py:"):
        metric = str(folder / metric)
    try:
        run(
            load(folder / "model.onnx"),
            facts["pipeline"],
            data=feeds,
            metric=metric,
            seed=facts["seed"],
            check="each",
            **facts["bounds"],
        )
    except BoundExceeded as error:
        print(error)
        return 1
    print("The breach does not show again with these versions: " + json.dumps(versions()))
    return 0


def _write_feed(path: Path, feed: Mapping[str, Any]) -> None:
    """An ``.npz`` of one run; unlike ``np.savez`` for inputs of any name, ``file`` too."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in feed.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)


def _copy_modules(names: Iterable[str], folder: Path) -> list[str]:
    """Copies of the source files of passes that are not penjing's own, so that the folder needs nothing else."""
    copied: dict[str, str] = {}
    for name in names:
        try:
            source = inspect.getsourcefile(find(name))
        except (PenjingError, TypeError, OSError):
            continue
        if source and not find(name).__module__.startswith(f"{__package__.partition('.')[0]}."):
            copied.setdefault(source, f"pass_{Path(source).stem}.py")
    for source, target in copied.items():
        shutil.copyfile(source, folder / target)
    return list(copied.values())


def _copy_metric(metric: Callable[[Any], float] | str | None, folder: Path) -> str | None:
    """The metric as ``metric.py:FUNCTION`` in the folder; a module's metric stays named by its module."""
    if isinstance(metric, str):
        path, _, function = metric.rpartition(":")
        if not path.endswith(".py"):
            return metric
    elif metric is None or not (path := inspect.getsourcefile(metric) or ""):
        return None
    else:
        function = metric.__name__
    shutil.copyfile(path, folder / "metric.py")
    return f"metric.py:{function}"


def _import(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
