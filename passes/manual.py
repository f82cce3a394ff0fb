"""The manual of the passes, made from their docstrings and fields: one page each, as text and as data."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .base import Pass
from .options import describe, field_types, format_value, keys
from .registry import all_passes, all_pipelines, find


def pages(name: str | None = None) -> dict[str, Any]:
    """The pass or named pipeline ``name``, or all of them, as JSON values."""
    if name in all_pipelines():
        return {"passes": [], "pipelines": {name: all_pipelines()[name]}}
    found = {name: find(name)} if name else all_passes()
    entries = [_entry(key, cls) for key, cls in found.items()]
    return {"passes": entries} | ({} if name else {"pipelines": all_pipelines()})


def listing() -> list[tuple[str, str]]:
    """Name and summary of every pass, then of every named pipeline."""
    rows = [(name, cls.summary()) for name, cls in all_passes().items()]
    return rows + [(name, f"= {text}") for name, text in all_pipelines().items()]


def page(name: str) -> str:
    """The manual page of a pass or named pipeline."""
    if name in all_pipelines():
        return f"{name}\n\n    {all_pipelines()[name]}\n"
    entry = _entry(name, find(name))
    lines = [f"{name} ({entry['effect']})", "", *_indented(entry["about"]), ""]
    for option in entry["options"]:
        lines.append(f"    {option['name']}={option['default']}")
        lines.append(f"        {option['type']}")
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, cls: type[Pass]) -> dict[str, Any]:
    return {
        "name": name,
        "about": inspect.getdoc(cls) or "",
        "effect": _effect(cls),
        "options": [_option(cls, key, field) for key, field in keys(cls).items()],
    }


def _option(cls: type[Pass], key: str, name: str) -> dict[str, str]:
    field = next(item for item in dataclasses.fields(cls) if item.name == name)
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "" if default is dataclasses.MISSING else format_value(default)
    return {"name": key, "type": describe(field_types(cls)[name]), "default": shown}


def _effect(cls: type[Pass]) -> str:
    """The effect with every option at its default, which need not be a combination that can be made."""
    return cls.__new__(cls).effect().value


def _indented(text: str) -> list[str]:
    return ["    " + line if line else "" for line in text.splitlines()]
