"""How sure a small model has to be, so that a big one is not missed."""

from __future__ import annotations

import math

import numpy as np

from ..base import Array


def least_threshold(sure: Array, small_right: Array, big_right: Array, max_drop: float) -> float:
    """The least threshold under which the cascade's accuracy is that of the big model less ``max_drop``, or more.

    ``sure`` float64, ``small_right`` and ``big_right`` bool, all [samples]. Samples on which the big model is right and
    the small one wrong are few, so that what is counted on those at hand says little of others: what is expected has to
    keep to ``max_drop`` too. It is the sum of the chances of such a sample, for which a logistic curve is fitted
    (Platt, Probabilistic outputs for support vector machines, 1999) over the log-odds of the place of its confidence
    among all: of what scale the confidence is does not matter. The threshold lies between two samples.
    """
    order = np.argsort(sure, kind="stable")
    values = sure[order]
    lost = big_right & ~small_right
    # With the first k rows sent on the big model is right on those, the small one on the others.
    sent = np.concatenate([[0], np.cumsum(big_right[order])])
    stayed = np.concatenate([np.cumsum(small_right[order][::-1])[::-1], [0]])
    expected = np.concatenate([np.cumsum(_chances(values, lost[order])[::-1])[::-1], [0]]) / len(sure)
    enough = ((sent + stayed) / len(sure) >= big_right.mean() - max_drop - 1e-9) & (expected <= max_drop)
    for count in np.flatnonzero(enough[:-1]):
        if count == 0:
            return float(np.float32(values[0] - max(abs(values[0]), 1e-3) * 1e-3))
        middle = float(np.float32((values[count - 1] + values[count]) / 2))
        if values[count - 1] < middle <= values[count]:
            return middle
    return float(np.float32(values[-1] + max(abs(values[-1]), 1e-3) * 1e-3))


def _chances(values: Array, lost: Array) -> Array:
    """The chance of a loss for each of the sorted ``values``, by Newton's method.

    Platt's targets keep it finite where none was lost.
    """
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    places = ((np.cumsum(count) - count / 2) / len(values))[group]
    scaled = np.log(places / (1 - places))
    columns = np.stack([np.ones_like(scaled), scaled], axis=1)
    losses = int(lost.sum())
    targets = np.where(lost, (losses + 1) / (losses + 2), 1 / (len(lost) - losses + 2))
    weights = np.array([math.log(targets.mean() / (1 - targets.mean())), 0.0])
    for _ in range(100):
        chances = 1 / (1 + np.exp(-np.clip(columns @ weights, -50, 50)))
        curvature = (columns * (chances * (1 - chances))[:, None]).T @ columns + 1e-9 * np.eye(2)
        weights -= np.clip(np.linalg.solve(curvature, columns.T @ (chances - targets)), -2, 2)
    return np.asarray(1 / (1 + np.exp(-np.clip(columns @ weights, -50, 50))))
