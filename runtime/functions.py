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


def split(spec: str) -> tuple[str, str] | None:
    """The file or module and the function that ``spec`` names; ``None`` where it has not the form of either."""
    source, _, name = spec.rpartition(":")
    named = bool(source) if is_file(source) else all(word.isidentifier() for word in source.split("."))
    return (source, name) if named and name.isidentifier() else None


def is_file(source: str) -> bool:
    """Whether what stands before the colon is a file; else it is a module."""
    return source.endswith(".py") or os.sep in source


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``FILE.py:FUNCTION`` or ``module:FUNCTION`` names; ``what`` is the option that asks for it.

    The folder of the file (for a module, the current one) joins the end of the import path. Raises ``UsageError``.
    """
    source, name = _parts(spec, what)
    try:
        module = _run_file(Path(source)) if is_file(source) else _import(source)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} {spec}: importing {source} raised {one_line(error)}") from error
    functions = [key for key, value in vars(module).items() if callable(value)]
    if name not in functions:
        raise UsageError(f"{what} {spec}: {source} has no function '{name}'.{nearest(name, functions)}")
    found: Callable[..., Any] = getattr(module, name)
    return found


def code_files(spec: str, what: str) -> list[str]:
    """The files whose code ``load_function`` would run, the last that of the function; nothing is imported here.

    Absolute paths, with links followed; ``built into Python`` for a module without a file. Packages around a module
    count, unless they are imported already. Raises ``UsageError`` where there is no such file or module.
    """
    source, _ = _parts(spec, what)
    if is_file(source):
        return [os.path.realpath(source)]
    words, path = source.split("."), [*sys.path, os.getcwd()]
    files = []
    for count in range(1, len(words) + 1):
        name = ".".join(words[:count])
        place = _place(name, path)
        if place is None:
            raise UsageError(f"{what} {spec}: there is no module {name}.")
        if name == source or name not in sys.modules:
            files.append(place[0])
        path = place[1]
    return [os.path.realpath(file) for file in files if file] or ["built into Python"]


def _place(name: str, path: list[str]) -> tuple[str | None, list[str]] | None:
    """The file of a module and the folders of what is in it; ``path`` are the folders of the package around it.

    ``importlib.util.find_spec`` would import that package, and so run it.
    """
    module = sys.modules.get(name)
    if module is not None:
        return getattr(module, "__file__", None), list(getattr(module, "__path__", ()))
    found = (finder.find_spec(name, path, None) for finder in sys.meta_path)
    spec = next((answer for answer in found if answer is not None), None)
    if spec is None:
        return None
    return spec.origin if spec.has_location else None, list(spec.submodule_search_locations or ())


def _parts(spec: str, what: str) -> tuple[str, str]:
    parts = split(spec)
    if parts is None:
        raise UsageError(f"{what} takes FILE.py:FUNCTION or module:FUNCTION, not '{spec}'.")
    source = parts[0]
    if is_file(source) and not os.path.isfile(source):
        raise UsageError(f"{what} {spec}: there is no file {source}.")
    if is_file(source) and not source.endswith(".py"):
        raise UsageError(f"{what} {spec}: {source} must be a Python file, FILE.py.")
    return parts


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
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is written beside the user's file
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def _import(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)
