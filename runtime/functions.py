"""Functions that the user names: ``FILE.py:FUNCTION`` or ``module:FUNCTION``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..ir.errors import UsageError, nearest, one_line


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``FILE.py:FUNCTION`` or ``module:FUNCTION`` names; ``what`` is the option that asks for it.

    The folder of the file (for a module, the current one) joins the end of the import path. Raises ``UsageError``.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise UsageError(f"{what} takes FILE.py:FUNCTION or module:FUNCTION, not '{spec}'.")
    is_file = source.endswith(".py") or os.sep in source
    if is_file and not Path(source).is_file():
        raise UsageError(f"{what} {spec}: there is no file {source}.")
    try:
        module = _run_file(Path(source)) if is_file else _import(source)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} {spec}: importing {source} raised {one_line(error)}") from error
    functions = [key for key, value in vars(module).items() if callable(value)]
    if name not in functions:
        raise UsageError(f"{what} {spec}: {source} has no function '{name}'.{nearest(name, functions)}")
    found: Callable[..., Any] = getattr(module, name)
    return found


def _run_file(path: Path) -> Any:
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"penjing_user_{path.stem}"  # never the name of a module that someone else imports
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
