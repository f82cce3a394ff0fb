"""Which passes and named pipelines there are: the families in this folder, and those of third parties.

Every module in a family's folder is imported when a pass is first looked up, so a new file there is all it takes.
A third party names a module, or a pass class, under the entry-point group ``penjing.passes``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar, cast, dataclass_transform

from ..ir.errors import UsageError, nearest, one_line
from .options import WORD

if TYPE_CHECKING:
    from .base import Pass

P = TypeVar("P", bound="type[Pass]")

_PASSES: dict[str, type[Pass]] = {}
_PIPELINES: dict[str, str] = {}
_BROKEN: dict[str, str] = {}  # plug-ins that do not import, and why


@dataclass_transform(frozen_default=True)
def register(name: str) -> Callable[[P], P]:
    """Make a class a frozen dataclass, and let pipeline texts call it ``name`` (kebab-case).

    Raises ``UsageError`` where the name is taken or no text can say it, the class is no ``Pass``, or it has no
    docstring of its own.
    """

    def enter(cls: P) -> P:
        from .base import Pass

        if not (inspect.isclass(cls) and issubclass(cls, Pass)):
            raise UsageError(f"What is registered as '{name}' is {cls!r}; it must be a subclass of penjing.Pass.")
        if not WORD.fullmatch(name):
            raise UsageError(f"No pipeline text can say the pass name {name!r}; use letters, digits and dashes.")
        if not cls.__module__.startswith(f"{__package__}."):
            _import_families()  # so that a name of penjing's own is known to be taken
        known = _PASSES.get(name)
        if name in _PIPELINES or (known and not _same(known, cls)):
            raise UsageError(f"The pass name '{name}' is taken by {known or 'a named pipeline'}; choose another.")
        if not cls.__dict__.get("__doc__"):
            raise UsageError(f"The pass '{name}' has no docstring; it is the pass's manual page, so write one.")
        cls.name = name
        _PASSES[name] = dataclass(frozen=True)(cls)
        return _PASSES[name]  # type: ignore[return-value]

    return enter


def _same(known: type[Pass], cls: type[Pass]) -> bool:
    """Whether ``cls`` is ``known`` imported anew: of the same module, or of a copy of its source."""
    if (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
        return True
    try:
        return inspect.getsource(known) == inspect.getsource(cls)
    except (OSError, TypeError):
        return False


def register_pipeline(name: str, text: str) -> None:
    """Let ``name`` stand for the steps of ``text`` in every pipeline text."""
    _PIPELINES[name] = text


def find(name: str) -> type[Pass]:
    """The pass called ``name``; raises ``UsageError`` with the nearest name."""
    _look_up(name)
    if name not in _PASSES:
        hint = nearest(name, [*_PASSES, *_PIPELINES]) + "".join(f" {sentence}" for sentence in _BROKEN.values())
        raise UsageError(f"There is no pass '{name}'.{hint} `penjing passes` lists them all.")
    return _PASSES[name]


def named_pipeline(name: str) -> str | None:
    """The steps that ``name`` stands for, or ``None`` where it is no named pipeline."""
    _look_up(name)
    return _PIPELINES.get(name)


def all_passes() -> dict[str, type[Pass]]:
    """Every pass there is, by name, in alphabetical order."""
    _import_families()
    _import_plugins()
    return dict(sorted(_PASSES.items()))


def all_pipelines() -> dict[str, str]:
    """Every named pipeline there is, with its steps, in alphabetical order."""
    _import_families()
    _import_plugins()
    return dict(sorted(_PIPELINES.items()))


def broken_plugins() -> list[str]:
    """A sentence for each plug-in that does not import."""
    _import_plugins()
    return list(_BROKEN.values())


def _look_up(name: str) -> None:
    """Import what may define ``name``, third parties last."""
    _import_families()
    if name not in _PASSES and name not in _PIPELINES:
        _import_plugins()


@functools.cache
def _import_families() -> None:
    package = importlib.import_module(__package__)
    for family in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        if family.ispkg:
            for module in pkgutil.iter_modules(importlib.import_module(family.name).__path__, f"{family.name}."):
                importlib.import_module(module.name)


@functools.cache
def _import_plugins() -> None:
    for point in entry_points(group="penjing.passes"):
        try:
            loaded = point.load()
            if inspect.isclass(loaded) and loaded.__dict__.get("name") not in _PASSES:
                register(point.name)(cast("type[Pass]", loaded))
        except Exception as error:  # one broken plug-in must not take the others, or penjing's own, with it
            _BROKEN[point.name] = f"The plug-in '{point.name}' ({point.value}) does not import: {one_line(error)}."
