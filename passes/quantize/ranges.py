"""The ranges file: what calibration saw of each activation, kept as JSON for later runs, a line a value.

    {"format": 1, "penjing": "0.1.0", "values": {
     "hidden": {"low": -1.5, "high": 3.25, "seen": 4096, "exponent": -9, "first": -768, "counts": [1, 0, 2]}
    }}

A line written by hand may give ``low`` and ``high`` alone: such a range is taken as it stands.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from ...ir.address import path_text, printable
from ...ir.atomic import reason_of, replace_file
from ...ir.constants import is_constant
from ...ir.errors import BadFile, nearest
from ...ir.scopes import scopes, values
from ...ir.shapes import infer_shapes
from ..points import FINEST, Distribution, finest_exponent
from .calibrators import BINS

FORMAT = 1
_HEAD = ("format", "penjing", "source", "data", "values")
_PLAIN = ("low", "high", "seen")
_COUNTED = (*_PLAIN, "exponent", "first", "counts")
_LARGEST = 2.0**127  # a range of more has no float32 scale


def write_ranges(path: str | os.PathLike[str], found: Mapping[str, Distribution], **about: str) -> None:
    """Write what was found of each value, by address, in ``BINS`` bins; the file is whole or as it was before.

    ``about`` says in the head of the file where it comes from: ``penjing``, ``source``, ``data``. Raises ``BadFile``.
    """
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    lines = [f"  {json.dumps(address)}: {json.dumps(_entry(item))}" for address, item in found.items()]
    body = ",\n".join(lines)
    replace_file(path, f'{{\n "format": {FORMAT},\n{head} "values": {{\n{body}\n }}\n}}\n'.encode())


def read_ranges(path: str | os.PathLike[str]) -> dict[str, Distribution]:
    """What a ranges file says of each value, by address; without ``counts`` where it gives a bare range.

    Raises ``BadFile`` with a sentence that names the line's value for what is not as ``write_ranges`` writes it.
    """
    place = printable(path_text(path))
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file, object_pairs_hook=_once, parse_constant=_no_number)
    except OSError as error:
        raise BadFile(f"{place} cannot be read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{place} is no ranges file: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or "format" not in found:
        raise BadFile(f'{place} is no ranges file: it must be {{"format": {FORMAT}, "values": {{...}}}}')
    if found["format"] != FORMAT:
        raise BadFile(
            f"{place} is a ranges file of format {found['format']!r}, and this version reads {FORMAT}; calibrate again"
        )
    _known(found, _HEAD, place)
    if not isinstance(found.get("values"), dict):
        raise BadFile(f"{place} has no 'values', an object with the range of each value by its name")
    return {address: _read(entry, f"{place}: '{printable(address)}'") for address, entry in found["values"].items()}


def activations(model: ir.Model) -> list[str]:
    """Addresses of the float values that change with the inputs, in the main graph and all bodies, in their order.

    Inputs are among them; constants, what is computed of constants alone, and values in functions are not.
    """
    model = model.clone()
    infer_shapes(model)
    fixed: set[ir.Value | None] = {None}
    found = []
    for scope in scopes(model):
        if scope.function is not None:
            continue
        fixed.update(value for value in values(scope.graph) if is_constant(value))
        for node in scope.graph:
            if node.inputs and fixed.issuperset(node.inputs) and not _has_bodies(node):
                fixed.update(node.outputs)
        found += [scope.address(value) for value in values(scope.graph) if value not in fixed and _is_float(value)]
    return list(dict.fromkeys(found))


def _is_float(value: ir.Value) -> bool:
    return bool(value.name) and isinstance(value.type, ir.TensorType) and value.type.dtype.is_floating_point()


def _has_bodies(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )


def _entry(found: Distribution) -> dict[str, Any]:
    if not found.seen:
        return {"seen": 0}
    plain = {"low": float(found.low), "high": float(found.high), "seen": found.seen}
    if not found.counts.size:
        return plain
    found = found.coarse(BINS)
    return plain | {"exponent": found.exponent, "first": found.first, "counts": found.counts.tolist()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has '{printable(double)}' twice")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number that a range may have")


def _known(found: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in found:
        if key not in keys:
            raise BadFile(f"{place} has '{printable(key)}'; it may have {', '.join(keys)}.{nearest(key, keys)}")


def _read(entry: Any, place: str) -> Distribution:
    if not isinstance(entry, dict):
        raise BadFile(f'{place} must be an object like {{"low": -1.0, "high": 1.0}}')
    _known(entry, _COUNTED, place)
    if entry == {"seen": 0}:
        return Distribution(BINS)
    for key in ("low", "high"):
        if not _is_number(entry.get(key)):
            raise BadFile(f"{place} needs '{key}', a finite number of at most 2^127; it has {_short(entry.get(key))}")
    low, high = float(entry["low"]), float(entry["high"])
    if low > high:
        raise BadFile(f"{place} has low {low:g} above high {high:g}; exchange the two")
    seen = entry.get("seen", 1)
    if type(seen) is not int or seen < 1:
        raise BadFile(f"{place} has 'seen' {_short(seen)}; it counts elements, at least 1")
    found = Distribution(BINS, low, high, seen)
    if given := [key for key in _COUNTED if key in entry and key not in _PLAIN]:
        if missing := [key for key in _COUNTED if key not in entry]:
            raise BadFile(f"{place} has '{given[0]}' without '{missing[0]}'; give all of a histogram, or low and high")
        _read_counts(found, entry, place)
    return found


def _read_counts(found: Distribution, entry: Mapping[str, Any], place: str) -> None:
    exponent, first, counts = entry["exponent"], entry["first"], entry["counts"]
    if type(exponent) is not int or not FINEST <= exponent <= 127:
        raise BadFile(f"{place} has 'exponent' {_short(exponent)}; it is a whole number from {FINEST} to 127")
    if not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
        raise BadFile(f"{place}: 'counts' must be a list of whole numbers of at least 0")
    if exponent < finest_exponent(found.low, found.high, BINS):
        raise BadFile(f"{place} has more than {BINS} bins; calibrate again, or give low and high alone")
    wanted = found.spanned(exponent)
    if first != wanted.first or len(counts) != len(wanted.counts):
        raise BadFile(
            f"{place}: bins of 2^{exponent} from low to high are {len(wanted.counts)} from {wanted.first} on, not "
            f"{len(counts)} from {_short(first)}; where low or high were changed by hand, leave out the histogram"
        )
    if sum(counts) != found.seen:
        raise BadFile(f"{place}: 'counts' are {sum(counts)} elements together, and 'seen' says {found.seen}")
    found.exponent, found.first, found.counts = exponent, first, np.array(counts, np.int64)


def _is_number(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number) and abs(number) <= _LARGEST


def _short(thing: Any) -> str:
    return "none" if thing is None else printable(repr(thing))[:40]
