"""Recipes: the words of a command line in a TOML file.

A key is an option of the command by its long name, without the dashes, or an argument by its name: whatever the command
takes, a recipe can say, and nothing else. Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from .ir.errors import BadFile, UsageError, nearest
from .runtime.functions import code_files, is_file, split

MOST_BYTES = 2**14  # the parser takes a second for the worst that fits in them, by the square of the bytes


class Text(click.types.StringParamType):
    """Text that a recipe may also give as a list of its parts, which commas join."""


class Code(click.types.StringParamType):
    """A function of the user's: ``FILE.py:FUNCTION`` or ``module:FUNCTION``. With ``or_path``: or the path of data."""

    def __init__(self, or_path: bool = False) -> None:
        self.or_path = or_path

    def is_code(self, value: str) -> bool:
        """Whether Python runs where ``value`` is used."""
        return not self.or_path or (not os.path.exists(value) and split(value) is not None)


class Partner(click.types.StringParamType):
    """``NAME=PATH``; in a recipe, a line of the option's table."""


def read_recipe(path: str, command: click.Command) -> dict[str, Any]:
    """What the recipe at ``path`` says, as ``default_map`` for a context of ``command``.

    Nothing that it names is opened, and no Python is run. Raises ``BadFile`` for a file that cannot be read, and
    ``UsageError`` for what is no TOML, an unknown key, or a value of another type than the option's.
    """
    from .ir.address import printable

    place, folder = printable(path), os.path.dirname(path)
    known = keys(command)
    found = {}
    for key, value in _parse(path, place).items():
        if key not in known:
            raise UsageError(f"{place}: {_unknown(key, value, known, command)}")
        try:
            found[known[key].name or ""] = _value(known[key], value, folder, known)
        except ValueError as error:
            raise UsageError(f"{place}: {key} {error}") from None
    return found


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """The keys of a recipe for ``command``: all that is not about the command line itself, or the recipe."""
    return {_key(one): one for one in command.params if one.expose_value and not one.is_eager}


def allow_code(context: click.Context, recipe: str, allowed: bool) -> None:
    """Print the files of all Python that the recipe (not the command line) names.

    Nothing of it has run. Raises ``UsageError`` where it is not ``allowed``.
    """
    from .ir.address import printable

    for key, param in keys(context.command).items():
        value = context.params[param.name or ""]
        from_recipe = context.get_parameter_source(param.name or "") is ParameterSource.DEFAULT_MAP
        if not from_recipe or not isinstance(param.type, Code) or not param.type.is_code(value):
            continue
        files = ", ".join(map(printable, code_files(value, f"{printable(recipe)}: {key}")))
        if not allowed:
            raise UsageError(
                f"{printable(recipe)}: {key} = '{printable(value)}' runs Python, {files}; read it, and add "
                "--allow-python if you trust it."
            )
        click.echo(f"penjing: {key} of {printable(recipe)} runs {files}", err=True)


def _parse(path: str, place: str) -> dict[str, Any]:
    import tomllib

    try:
        text = _read(path, place).decode("utf-8-sig")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{place} is not UTF-8 text (byte {error.start}); a recipe is a TOML file.") from None
    except RecursionError:
        raise UsageError(f"{place} nests its values too deeply; a recipe has no more than one table.") from None
    except ValueError as error:  # TOMLDecodeError, and what Python says of a number with too many digits
        raise UsageError(f"{place} is not TOML: {error}.") from None


def _read(path: str, place: str) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not wait
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadFile(f"{place} is not a regular file; a recipe is a TOML file.")
            contents = os.read(handle, MOST_BYTES + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise BadFile(f"{place} does not exist; a recipe is a TOML file.") from None
    except (OSError, ValueError) as error:
        raise BadFile(f"{place} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(contents) > MOST_BYTES:
        raise BadFile(f"{place} is too large; a recipe takes at most {MOST_BYTES} bytes.")
    return contents


def _key(param: click.Parameter) -> str:
    return max(param.opts, key=len).lstrip("-")


def _unknown(key: str, value: Any, known: dict[str, click.Parameter], command: click.Command) -> str:
    from .ir.address import printable

    if any(f"--{key}" in param.opts for param in command.params):
        return f"--{key} is said on the command line, not in a recipe."
    if isinstance(value, dict):
        inside = next((name for name in value if name in known), None)
        where = f" Write {inside} at the top, before any table." if inside else ""
        return f"there is no table '{printable(key)}'.{where or nearest(key, _tables(known))}"
    return f"there is no key '{printable(key)}'.{nearest(key, known)} The keys are {', '.join(known)}."


def _tables(known: dict[str, click.Parameter]) -> list[str]:
    return [key for key, param in known.items() if isinstance(param.type, Partner)]


def _value(param: click.Parameter, value: Any, folder: str, known: dict[str, click.Parameter]) -> Any:
    """The value as the command takes it; ``ValueError`` with the rest of a sentence that began with its key."""
    kind = param.type
    if isinstance(kind, Partner):
        return _partners(value, folder, known)
    if isinstance(kind, Text):
        return _joined(value)
    if isinstance(kind, click.types.BoolParamType):
        return value if isinstance(value, bool) else _refuse(value, "true or false")
    if isinstance(kind, click.types.IntParamType):
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**64:
            _refuse(value, "a whole number of at most 64 bits")
    elif isinstance(kind, click.types.FloatParamType):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            _refuse(value, "a number")
    elif isinstance(kind, click.Choice):
        choices = [str(choice) for choice in kind.choices]
        if value not in choices:
            _refuse(value, "one of " + ", ".join(choices), nearest(str(value), choices))
    elif isinstance(kind, click.Path):
        return _path(value, folder)
    elif isinstance(kind, Code):
        return _code(kind, value, folder)
    else:
        _text(value)
    try:
        return kind.convert(value, param, None)
    except OverflowError:
        return _refuse(value, "a number")
    except click.BadParameter as error:
        raise ValueError(f"is not valid: {error.message.rstrip('.')}.") from None


def _partners(value: Any, folder: str, known: dict[str, click.Parameter]) -> list[str]:
    if not isinstance(value, dict):
        _refuse(value, 'a table: a line [with], and under it NAME = "model.onnx" for each partner')
    for name, path in value.items():
        if name in known:
            raise ValueError(f"holds {name}, which is a key of its own; write it at the top, before any table.")
        if not isinstance(path, str):
            raise ValueError(f"holds {_shown(name)}, which is {_words(path)}; it must be the path of a model.")
        if "=" in _text(name):
            raise ValueError(f"holds the name {_shown(name)}; a name has no equals sign.")
    return [f"{name}={_path(path, folder)}" for name, path in value.items()]


def _joined(value: Any) -> str:
    expected = "text, or a list of texts"
    if isinstance(value, list):
        if not value:
            raise ValueError(f"is an empty list; it must be {expected}.")
        return ",".join(_line(part, "text, as every part of the list") for part in value)
    return _line(value, expected)


def _path(value: Any, folder: str) -> str:
    return os.path.normpath(os.path.join(folder, _text(value, "the text of a path")))


def _code(kind: Code, value: Any, folder: str) -> str:
    """A file is found from the recipe's folder; a module is no path."""
    expected = "FILE.py:FUNCTION, as text"
    parts = split(_text(value, f"a path or {expected}" if kind.or_path else expected))
    path = _path(value, folder)
    if kind.or_path and (parts is None or os.path.exists(path)):
        return path
    return value if parts is None or not is_file(parts[0]) else path


def _line(value: Any, expected: str) -> str:
    """Text over several lines, as one."""
    return _text(" ".join(value.split("\n")).replace("\t", " ") if isinstance(value, str) else value, expected)


def _text(value: Any, expected: str = "text") -> str:
    if not isinstance(value, str):
        _refuse(value, expected)
    if not value.strip():
        raise ValueError(f"is empty; it must be {expected}.")
    if odd := [character for character in value if unicodedata.category(character) == "Cc"]:
        raise ValueError(f"holds the control character {_shown(odd[0])}; leave it out.")
    return str(value)


def _refuse(value: Any, expected: str, hint: str = "") -> NoReturn:
    raise ValueError(f"is {_words(value)}; it must be {expected}.{hint}")


def _words(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {_shown(value)}"
    if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**64):
        return str(value).lower()
    kinds = {int: "a number of many digits", list: "a list", dict: "a table"}
    return kinds.get(type(value), "a date or time")


def _shown(text: str) -> str:
    from .ir.address import printable

    return f"'{printable(text[:60])}'"
