"""A folder that fails alone: the model, the pipeline text, the feeds, the seed and the versions of a breach.

OUT.reproducer/
    reproduce.py              run me: exit code 1 where the breach shows again, 2 where it cannot be run
    passes.txt                the pipeline text
    run.json                  check, seed, bounds, versions, what was found
    model.onnx                the model that the bad pass was given
    partner-*.onnx            the models that it merges with
    feeds/test_data_set_*/    the runs that show it, as ONNX keeps test data (feeds/*.npz where a pass adds inputs)
    pass_*.py, metric.py      sources of passes that are not penjing's own, and of the user's metric
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..ir.address import printable
from ..ir.errors import BadFile, PenjingError, UsageError
from ..ir.files import load, save
from ..ir.interrupts import uninterrupted
from ..ir.scopes import values
from ..passes.pipeline import Pipeline
from ..passes.registry import find
from .feeds import write_data_set
from .functions import load_function
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
    strict: bool,
    partners: Mapping[str, ir.Model] = {},
) -> None:
    """Write what shows ``breach`` again into ``folder``, whole, in place of an older reproducer of the same name."""
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.partial")
    try:
        _write(partial, breach, report, bounds, metric, strict, partners)
        with uninterrupted():
            remove_reproducer(folder, partial)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_room(folder: str | os.PathLike[str]) -> None:
    """Raise ``BadFile`` where something else than an earlier reproducer is in the place of ``folder``."""
    folder = Path(folder)
    if os.path.lexists(folder) and (folder.is_symlink() or not (folder / "run.json").is_file()):
        raise BadFile(
            f"{printable(str(folder))} is in the way: what shows a failed check would go there; move it, or name "
            "another output."
        )


def remove_reproducer(folder: str | os.PathLike[str], but: Path | None = None) -> None:
    """Remove the reproducer ``folder``, if it is one, and what a killed process left of others, ``but`` excepted."""
    folder = Path(folder)
    partial = re.compile(re.escape(folder.name) + r"\.[0-9a-f]{8}\.partial")
    left = [path for path in folder.parent.iterdir() if partial.fullmatch(path.name) and path != but]
    for path in [folder, *left] if (folder / "run.json").exists() else left:
        shutil.rmtree(path, ignore_errors=True)


def _write(
    folder: Path,
    breach: Breach,
    report: Report,
    bounds: Mapping[str, float | None],
    metric: Callable[[Any], float] | str | None,
    strict: bool,
    partners: Mapping[str, ir.Model],
) -> None:
    (folder / "feeds").mkdir(parents=True)
    save(breach.before, folder / "model.onnx")
    room = MOST_FEED_BYTES
    for index, feed in enumerate(breach.feeds):
        room -= sum(int(getattr(value, "nbytes", 0)) for value in feed.values())
        if index and room < 0:
            break
        _write_feed(feed, breach.before, folder / "feeds", index)
    files = {name: f"partner-{number}.onnx" for number, name in enumerate(partners)}
    for name, file in files.items():
        save(partners[name], folder / file)
    obstacles: list[str] = []
    facts = {
        "found": breach.reasons,
        "pipeline": breach.pass_,
        "check": report.check.mode,
        "strict": strict,
        "seed": report.seed,
        "bounds": dict(bounds),
        "metric": _keep_metric(metric, folder, obstacles),
        "partners": files,
        "modules": _keep_modules([entry.name for entry in report.passes], folder),
        "versions": versions(),
    }
    try:
        Pipeline.parse(breach.pass_)
    except PenjingError as error:
        obstacles.append(f"no text says its passes: {error}")
    facts["obstacles"] = obstacles
    (folder / "passes.txt").write_text(breach.pass_ + "\n", encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "reproduce.py").write_text(SCRIPT, encoding="utf-8")


def _write_feed(feed: Mapping[str, Any], before: ir.Model, folder: Path, index: int) -> None:
    """As an ONNX data set; as .npz where it holds inputs that the model only has after the pass."""
    known = {value.name for value in values(before.graph)}  # values in the middle are computed again
    if all(name in known for name in feed):
        write_data_set(feed, before, folder / f"test_data_set_{index}")
        return
    inputs = {value.name for value in before.graph.inputs}
    np.savez(folder / f"{index:06d}.npz", **{k: v for k, v in feed.items() if k in inputs or k not in known})


def replay(folder: Path) -> int:
    """Run a reproducer folder: 1 where the breach shows again, 0 where it does not, 2 where it cannot be run.

    What was found is printed.
    """
    from .run import BoundExceeded, run

    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if facts["obstacles"]:
            raise UsageError(f"It was not written down whole: {'; '.join(facts['obstacles'])}")
        for module in facts["modules"]:
            _import(folder, **module)
        feeds = folder / "feeds" if any((folder / "feeds").iterdir()) else None
        metric = facts["metric"] and _metric(folder, **facts["metric"])
        model, bounds = load(folder / "model.onnx"), facts["bounds"]
        options = {name: facts[name] for name in ("check", "strict", "seed")}
        partners = {name: folder / file for name, file in facts["partners"].items()}
        run(model, facts["pipeline"], feeds, metric=metric, models=partners, **options, **bounds)
    except BoundExceeded as error:
        print(error)
        return 1
    except PenjingError as error:
        print(f"This reproducer cannot be run here. {error}")
        return 2
    print("The breach does not show again with these versions: " + json.dumps(versions()))
    return 0


def _keep_modules(names: Iterable[str], folder: Path) -> list[dict[str, str]]:
    """Copies of the modules of passes that are not penjing's own, each with its name and where it is imported from."""
    kept: dict[str, dict[str, str]] = {}
    for name in names:
        try:
            module = find(name).__module__
            source = inspect.getsourcefile(sys.modules[module])
        except (PenjingError, KeyError, TypeError):
            continue
        if source is None or module.startswith(f"{__package__.partition('.')[0]}."):
            continue
        root = str(Path(source).resolve().parents[module.count(".")])
        kept[module] = {"name": module, "root": root, "file": f"pass_{module.strip('_').replace('.', '_')}.py"}
        (folder / kept[module]["file"]).write_text(_source(source, module), encoding="utf-8")
    return list(kept.values())


def _keep_metric(
    metric: Callable[[Any], float] | str | None, folder: Path, obstacles: list[str]
) -> dict[str, str] | None:
    """Where the metric is, and a copy of its file for when that is gone."""
    if metric is None:
        return None
    if callable(metric):
        name, module = getattr(metric, "__qualname__", ""), getattr(metric, "__module__", "__main__")
        try:
            source = inspect.getsourcefile(sys.modules[module])
        except (KeyError, TypeError):
            source = None
        if not name.isidentifier() or source is None:
            obstacles.append("the metric is no function of a file, but part of a running program")
            return None
        if module == "__main__":
            (folder / "metric.py").write_text(_source(source, module), encoding="utf-8")
            return {"spec": f"metric.py:{name}", "root": os.getcwd(), "copy": f"metric.py:{name}"}
        metric = f"{os.path.abspath(source)}:{name}"
    path, _, function = metric.rpartition(":")
    if not os.path.isfile(path):
        return {"spec": metric, "root": os.getcwd(), "copy": ""}
    shutil.copyfile(path, folder / "metric.py")
    return {"spec": f"{os.path.abspath(path)}:{function}", "root": os.getcwd(), "copy": f"metric.py:{function}"}


def _source(path: str, module: str) -> str:
    """The text of a module; of a script its imports, definitions and constants, since running it would do more."""
    text = Path(path).read_text(encoding="utf-8")
    if module != "__main__":
        return text
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assigned = (ast.Assign, ast.AnnAssign)
    kept: list[ast.stmt] = [
        node
        for node in ast.parse(text).body
        if isinstance(node, kinds)
        or (isinstance(node, assigned) and not any(isinstance(part, ast.Call) for part in ast.walk(node)))
    ]
    return "\n\n".join(ast.unparse(node) for node in kept) + "\n"


def _metric(folder: Path, spec: str, root: str, copy: str) -> Callable[[Any], float]:
    """The metric from where it was, since it may read what lies beside it; else its copy."""
    sys.path.append(root)
    try:
        return load_function(spec, "the metric")
    except PenjingError:
        if not copy:
            raise
    return load_function(str(folder / copy), "the metric")


def _import(folder: Path, name: str, root: str, file: str) -> None:
    """The copy of a module, which needs nothing else; else, where it imports its neighbours, the module itself."""
    try:
        spec = importlib.util.spec_from_file_location(Path(file).stem, folder / file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[Path(file).stem] = module
        spec.loader.exec_module(module)
    except Exception as first:
        sys.path.append(root)
        try:
            importlib.import_module(name)
        except Exception as second:
            raise UsageError(f"{file} does not import ({first}), nor does the module {name} ({second}).") from second
