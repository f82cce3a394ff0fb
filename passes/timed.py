"""Decisions by the clock, as a report keeps them: what was timed, and how long it took.

A change of the report whose ``what`` is ``timed`` says what something took: its ``subject`` is all that its time
depends on, its ``numbers`` are nanoseconds by form, as ``float_ns``. A later run decides by these, without a clock.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from ..ir.address import path_text, printable
from ..ir.atomic import reason_of
from ..ir.errors import BadFile

TIMED = "timed"

Times = Mapping[str, float]  # nanoseconds by form


def read_times(path: str, step: str, needed: Collection[str], others: Collection[str], words: str) -> dict[str, Times]:
    """What the report of a run with ``timing=measure`` says that things took in its passes of this name.

    ``needed`` and ``others`` are the forms that each must, and may, have; ``words`` name them. Raises ``BadFile``.
    """
    place = printable(path_text(path))
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
    except OSError as error:
        raise BadFile(f"{place} cannot be read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{place} is no report: {' '.join(str(error).split())}") from error
    found: dict[str, Times] = {}
    for entry in _entries(report, step):
        subject, numbers = entry.get("subject"), entry.get("numbers")
        if not isinstance(subject, str) or not isinstance(numbers, dict) or not _are_times(numbers, needed, others):
            raise BadFile(
                f"{place}: what was timed of '{printable(str(subject))}' must be nanoseconds above 0, {words}."
            )
        found.setdefault(subject, {name.removesuffix("_ns"): float(spent) for name, spent in numbers.items()})
    if not found:
        raise BadFile(
            f"{place} holds nothing that {step} has timed; it must be the report (--json) of a run with "
            f"{step}{{timing=measure}} that changed the model."
        )
    return found


def rounded(number: float) -> float:
    """To three digits, as reports keep it."""
    return float(f"{number:.3g}")


def _entries(report: Any, step: str) -> list[dict[str, Any]]:
    """The changes of the passes of one name that say what was timed."""
    passes = report.get("passes") if isinstance(report, dict) else None
    entries = [
        entry
        for one in (passes if isinstance(passes, list) else [])
        if isinstance(one, dict) and one.get("name") == step and isinstance(one.get("changed"), list)
        for entry in one["changed"]
    ]
    return [entry for entry in entries if isinstance(entry, dict) and entry.get("what") == TIMED]


def _are_times(numbers: dict[str, Any], needed: Collection[str], others: Collection[str]) -> bool:
    plain = all(type(spent) in (int, float) and 0 < spent < math.inf for spent in numbers.values())
    forms = {name.removesuffix("_ns") for name in numbers if name.endswith("_ns")}
    return plain and len(forms) == len(numbers) and forms.issuperset(needed) and forms <= {*needed, *others}
