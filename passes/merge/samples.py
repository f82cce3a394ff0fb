"""What models say of labelled samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ...ir.address import printable
from ...ir.errors import BadFeeds, NeedsData, nearest
from ..base import Array, Context
from .classifiers import Labels


def labelled(
    rows: Iterable[Sequence[Array]], ctx: Context, classes: int, step: str, names: Labels | None = None
) -> tuple[list[Array], Array]:
    """The scores of each model, [samples, classes], and the labels, from what the models say in each run.

    Labels are int64 places among the classes; given as their ``names``, text or numbers, they are looked up there.
    Raises ``NeedsData`` without labels, ``BadFeeds`` where they are too few, too many or no classes, or the scores are
    not one row for each sample.
    """
    if not ctx.has("labels"):
        raise NeedsData(f"{step} needs --labels, or an array 'labels' in the .npz of the data; none was given.")
    labels = ctx.labels
    parts = [list(row) for row in rows]
    if not parts:
        raise BadFeeds(f"{step}: the data hold no samples, and it is fitted on them.")
    scores = [np.concatenate(one) for one in zip(*parts, strict=True)]
    for one in scores:
        if one.ndim != 2:
            raise BadFeeds(f"{step}: it is fitted on scores [samples, classes], and the outputs have {one.ndim} axes.")
    count = len(scores[0])
    left_out = getattr(ctx.data, "left_out", 0)
    if len(labels) not in (count, count + left_out):
        raise BadFeeds(f"{step}: there are {len(labels)} labels, and the data hold {count + left_out} samples.")
    return scores, _places(labels[:count], classes, step, names)


def _places(labels: Array, classes: int, step: str, names: Labels | None) -> Array:
    """The place of each label among the classes."""
    text = labels.dtype.kind in "US"
    if names is None or len(names) != classes or (not text and isinstance(names[0], str)):
        if text:
            raise BadFeeds(
                f"{step}: the labels are text, as '{printable(str(labels[0]))}', and no member names its classes; give "
                f"numbers from 0 to {classes - 1}."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            wrong = int(labels[(labels < 0) | (labels >= classes)][0])
            raise BadFeeds(f"{step}: the label {wrong} is none of the classes 0 to {classes - 1}.")
        return labels
    known = {str(name): place for place, name in enumerate(names)}
    found = [known.get(str(label), -1) for label in labels.tolist()]
    if -1 in found:
        missing = str(labels[found.index(-1)])
        shown = ", ".join(printable(name) for name in list(known)[:8])
        hint = printable(nearest(missing, list(known))) if text else ""
        raise BadFeeds(f"{step}: the label '{printable(missing)}' is none of the classes {shown}.{hint}")
    return np.array(found, np.int64)
