"""What ``penjing calibrate`` does: sample inputs through a model, and what its activations hold into a ranges file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..ir.errors import BadFeeds, UsageError
from ..passes.points import Distribution, Histogram, Point, Range, Shape, Unanswered
from ..passes.quantize.observe import doubts
from ..passes.quantize.ranges import activations, write_ranges
from .feeds import Feeds, read_feeds
from .progress import Progress
from .session import load
from .statistics import collect


@dataclass(frozen=True)
class Calibration:
    """What was found of each activation, by address; ``about`` says of which data.

    ``warnings`` are sentences on values that are left out, or have a range and no histogram.
    """

    found: Mapping[str, Distribution]
    about: str
    warnings: tuple[str, ...]


def calibrate_file(
    model: str, data: Any, output: str | os.PathLike[str], *, threads: int = 1, progress: Progress | None = None
) -> Calibration:
    """Run ``model`` on ``data`` and write what its activations hold. Raises ``PenjingError`` for bad input.

    A value that is not finite is left out with a warning, as an attention mask is; but not an output of the model.
    """
    from .. import __version__

    loaded = load(model, runnable=True)
    feeds = read_feeds(data, loaded)
    found = calibrate_model(loaded, feeds, threads=threads, progress=progress)
    about = {"penjing": __version__, "source": os.path.basename(model), "data": found.about}
    write_ranges(output, found.found, **about)
    return found


def calibrate_model(
    model: ir.Model, feeds: Feeds, *, threads: int = 1, progress: Progress | None = None
) -> Calibration:
    """Histograms of all activations of ``model``; of those in loops that have none, the range."""
    wanted = activations(model)
    if not wanted:
        raise UsageError("The model has no float value that depends on its inputs; there is nothing to calibrate.")
    inputs = [Shape(value.name) for value in model.graph.inputs if value.name in wanted]
    points: list[Point] = [*map(Histogram, wanted), *inputs]
    answers, reasons = _collected(model, points, feeds, threads, progress)
    samples = max((answers.pop(point).seen for point in inputs if point in answers), default=0)
    warnings = tuple(feeds.notes)
    if doubt := doubts(feeds, samples):
        warnings += (f"{doubt}.",)
    if reasons:
        outputs = {value.name for value in model.graph.outputs}
        if refused := [reason for point, reason in reasons.items() if point.value in outputs]:
            raise BadFeeds(refused[0])
        ranges, refusals = _collected(model, [Range(point.value) for point in reasons], feeds, threads, progress)
        answers |= {point: Distribution(low=it.low, high=it.high, seen=it.seen) for point, it in ranges.items()}
        warnings += tuple(
            f"{reason} It has a range and no histogram."
            for point, reason in reasons.items()
            if Range(point.value) in ranges
        )
        warnings += tuple(f"{reason} It is left out." for reason in refusals.values())
    by_address = {point.value: found for point, found in answers.items()}
    return Calibration({it: by_address[it] for it in wanted if it in by_address}, feeds.describe(), warnings)


def _collected(
    model: ir.Model, points: list[Any], feeds: Feeds, threads: int, progress: Progress | None
) -> tuple[dict[Point, Any], dict[Point, str]]:
    try:
        return collect(model, points, feeds, threads=threads, progress=progress), {}
    except Unanswered as error:
        return error.answers, error.reasons
