"""What models say of labelled samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ...ir.errors import BadFeeds
from ..base import Array, Context


def labelled(rows: Iterable[Sequence[Array]], ctx: Context, classes: int, step: str) -> tuple[list[Array], Array]:
    """The scores of each model, [samples, classes], and the labels, from what the models say in each run.

    Raises ``NeedsData`` without labels, ``BadFeeds`` where they are too few, too many or out of range, or the scores
    are not one row for each sample.
    """
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
    if len(labels) - left_out != count:
        raise BadFeeds(f"{step}: there are {len(labels)} labels, and the data hold {count + left_out} samples.")
    labels = labels[:count]
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        wrong = int(labels[(labels < 0) | (labels >= classes)][0])
        raise BadFeeds(f"{step}: the label {wrong} is none of the classes 0 to {classes - 1}.")
    return scores, labels
