"""Options of passes as text: a field's annotation says how its value is read, checked and printed.

    value = word | 'quoted' | (value, value)

A quote inside quotes is doubled. A ``word`` holds no space, comma, brace, parenthesis, quote or equals sign.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from ..ir.errors import UsageError, nearest
from .selection import Selection

Raw = str | tuple["Raw", ...]  # a value as it was written, before its field's type gives it meaning


class Quoted(str):
    """Text that was written in quotes: never ``none``."""


WORD = re.compile(r"[^\s,{}()'=]+")


def keys(cls: type[Any]) -> dict[str, str]:
    """The options of a pass: the key as it is written (kebab-case) and the name of the field.

    A field that would be a word of Python's ends in ``_``, which is not written: ``with_`` is ``with``.
    """
    return {_key(item.name): item.name for item in dataclasses.fields(cls) if item.init}


def _key(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def field_types(cls: Any) -> dict[str, Any]:
    """The resolved types of the fields of ``cls``."""
    return typing.get_type_hints(cls)


def read_options(cls: Any, name: str, written: dict[str, Raw]) -> dict[str, Any]:
    """Keyword arguments for ``cls`` from options as written; raises ``UsageError`` for an unknown key or bad value."""
    known, result = keys(cls), {}
    for key, raw in written.items():
        if key not in known:
            listed = ", ".join(known) or "none"
            raise UsageError(f"{name} has no option '{key}'.{nearest(key, known)} Its options: {listed}.")
        annotation = field_types(cls)[known[key]]
        try:
            result[known[key]] = _read(raw, annotation)
        except ValueError:
            raise UsageError(
                f"{name}: {key}={format_value(raw)} is not valid; it takes {describe(annotation)}."
            ) from None
    return result


def check_fields(instance: Any) -> None:
    """Hold every option of a frozen dataclass to its type; lists become tuples, text becomes a ``Selection``.

    Raises ``UsageError`` for a value of another type, so that Python callers and pipeline texts meet the same words.
    """
    for key, name in keys(type(instance)).items():
        annotation = field_types(type(instance))[name]
        try:
            object.__setattr__(instance, name, _coerce(getattr(instance, name), annotation))
        except ValueError:
            found = getattr(instance, name)
            raise UsageError(
                f"{instance.name}: {key}={found!r} is not valid; it takes {describe(annotation)}."
            ) from None


def format_options(instance: Any) -> str:
    """``{key=value key=value}`` for the options that differ from their defaults, in field order; else nothing."""
    shown = []
    for item in dataclasses.fields(instance):
        default = item.default_factory() if callable(item.default_factory) else item.default
        value = getattr(instance, item.name)
        if item.init and value != default:
            shown.append(f"{_key(item.name)}={format_value(value)}")
    return "{" + " ".join(shown) + "}" if shown else ""


def format_value(value: Any) -> str:
    """One value as text that reads back as itself."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, Selection):
        value = value.patterns if len(value.patterns) != 1 else value.patterns[0]
    if isinstance(value, tuple):
        return "(" + ", ".join(format_value(item) for item in value) + ")"
    text = str(value)
    return text if WORD.fullmatch(text) and text != "none" else "'" + text.replace("'", "''") + "'"


def describe(annotation: Any) -> str:
    """A type in words: ``a number``, ``tensor or model``, ``a list of ...``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(item) for item in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(item) for item in arguments if item is not type(None))
    if origin is tuple:
        return f"a list (a, b) of {describe(arguments[0])}"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Selection: "names, globs, op:TYPE or node:NAME",
    }
    return words.get(annotation, str(annotation))


def _read(raw: Raw, annotation: Any) -> Any:
    """The value that ``raw`` means under ``annotation``; ``ValueError`` where it means none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        none_first = sorted(arguments, key=lambda option: option is not type(None))
        return _first(lambda option: _read(raw, option), none_first)
    if annotation is type(None):
        return None if raw == "none" and not isinstance(raw, Quoted) else _refuse()
    if annotation is Selection:
        return Selection((raw,) if isinstance(raw, str) else tuple(_read(item, str) for item in raw))
    if origin is tuple:
        items = (raw,) if isinstance(raw, str) else raw
        return tuple(_read(item, arguments[0]) for item in items)
    if not isinstance(raw, str):
        _refuse()
    if origin is Literal:
        return _first(lambda option: option if str(option) == raw else _refuse(), arguments)
    if annotation is bool:
        return {"true": True, "false": False}[raw] if raw in ("true", "false") else _refuse()
    if annotation is float:
        number = float(raw)
        return number if math.isfinite(number) else _refuse()
    return str(raw) if annotation is str else annotation(raw)


def _coerce(value: Any, annotation: Any) -> Any:
    """``value`` if it is of the annotated type, or its plain conversion; ``ValueError`` otherwise."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _first(lambda option: _coerce(value, option), arguments)
    if origin is Literal:
        return value if value in arguments else _refuse()
    if annotation is Selection:
        if isinstance(value, str):
            return Selection((value,))
        return Selection(tuple(value)) if isinstance(value, (list, tuple)) else _instance(value, Selection)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            _refuse()
        return tuple(_coerce(item, arguments[0]) for item in value)
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _refuse()
    if annotation is int and isinstance(value, bool):
        _refuse()
    return _instance(value, annotation)


def _instance(value: Any, kind: Any) -> Any:
    return value if isinstance(value, kind) else _refuse()


def _first(attempt: Any, candidates: Iterable[Any]) -> Any:
    for candidate in candidates:
        try:
            return attempt(candidate)
        except ValueError:
            continue
    return _refuse()


def _refuse() -> typing.NoReturn:
    raise ValueError
