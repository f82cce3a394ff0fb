"""What sample data say of values, and why they say nothing of some."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from .base import Context, Feeds
from .points import Point, Unanswered


def answers(
    model: ir.Model, points: Iterable[Point], ctx: Context, data: Feeds | None = None
) -> tuple[Mapping[Point, Any], Mapping[Point, str]]:
    """What ``data``, else the sample data, say to ``points``; for those without an answer (NaN, say) the reason, a
    clause without the value's name."""
    try:
        return ctx.runner.statistics(model, points, ctx.data if data is None else data), {}
    except Unanswered as error:
        return error.answers, {point: clause(reason) for point, reason in error.reasons.items()}


def clause(sentence: str) -> str:
    """What is wrong with a value, without its name: lines of a ledger that say the same are counted together."""
    return "an activation " + re.sub(r"^The value '.*?' (?=holds|is|has)", "", sentence).removesuffix(".")
