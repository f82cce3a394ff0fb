"""Weights for the members of an ensemble, fitted to labels.

``on_simplex`` minimizes the cross-entropy of the weighted sum over weights that are not negative and sum to one, by
exponentiated gradient (Kivinen and Warmuth, 1997), which stays among such weights. The loss is convex in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...ir.errors import UsageError
from ..base import Array

Solver = Literal["least-squares", "logistic"]

_STEPS = 2000
_GRAIN = 10_000  # fitted weights are multiples of 1 / _GRAIN, so that they read well and rounding does not move them
_RIDGES = np.logspace(-6, 2, 33)  # of the mean square of the features' singular values


def on_simplex(scores: Sequence[Array], labels: Array, *, probabilities: bool) -> tuple[list[float], float]:
    """Weights for the members' scores, each [samples, classes], and the cross-entropy in nats that they leave."""
    stacked = np.stack([one.astype(np.float64) for one in scores])
    rows = np.arange(len(labels))
    picked = stacked[:, rows, labels]

    def loss(weights: Array) -> tuple[float, Array]:
        mixed = np.tensordot(weights, stacked, 1)
        if probabilities:
            own = np.maximum(mixed[rows, labels], 1e-12)
            return float(-np.log(own).mean()), -(picked / own).mean(axis=1)
        shifted = mixed - mixed.max(axis=1, keepdims=True)
        raised = np.exp(shifted)
        sums = raised.sum(axis=1, keepdims=True)
        slope = (stacked * (raised / sums)).sum(axis=2).mean(axis=1) - picked.mean(axis=1)
        return float((np.log(sums[:, 0]) - shifted[rows, labels]).mean()), slope

    weights = np.full(len(scores), 1 / len(scores))
    (best, slope), rate = loss(weights), 1.0
    for _ in range(_STEPS):
        trial = weights * np.exp(-rate * (slope - slope.min()))
        trial /= trial.sum()
        found, new = loss(trial)
        if found < best:
            moved = float(np.abs(trial - weights).max())
            weights, best, slope, rate = trial, found, new, rate * 1.5
            if moved < 1e-7:
                break
        elif (rate := rate / 2) < 1e-9:
            break
    rounded = _rounded(weights)
    return rounded, loss(np.array(rounded))[0]


def _rounded(weights: Array) -> list[float]:
    """To multiples of ``1 / _GRAIN`` that sum to one: the largest remainders are rounded up."""
    whole = np.floor(weights * _GRAIN).astype(int)
    short = _GRAIN - int(whole.sum())
    whole[np.argsort(-(weights * _GRAIN - whole), kind="stable")[:short]] += 1
    return [int(one) / _GRAIN for one in whole]


def linear_layer(scores: Sequence[Array], labels: Array, classes: int, solver: Solver) -> tuple[Array, Array]:
    """``weight`` [classes, members * classes] and ``bias`` [classes], float32, over the scores side by side.

    ``least-squares`` fits the one-hot labels by ridge regression. ``logistic`` is multinomial logistic regression by
    scikit-learn. Raises ``UsageError`` where that is not installed, or the labels do not hold every class.
    """
    features = np.concatenate([one.astype(np.float64) for one in scores], axis=1)
    if solver == "least-squares":
        return _least_squares(features, np.eye(classes)[labels])
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UsageError(
            "solver=logistic needs scikit-learn, which is not installed: pip install 'penjing[stack]'; or take "
            "solver=least-squares."
        ) from error
    seen = np.unique(labels)
    if len(seen) < classes or classes < 3:
        raise UsageError(
            f"solver=logistic needs samples of every class, of three or more, and the labels hold {len(seen)} of "
            f"{classes}; give more, or take solver=least-squares."
        )
    spread = features.std(axis=0).mean() or 1.0
    found = LogisticRegression(max_iter=2000).fit(features / spread, labels)
    return (found.coef_ / spread).astype(np.float32), found.intercept_.astype(np.float32)


def _least_squares(features: Array, targets: Array) -> tuple[Array, Array]:
    """Ridge regression, the ridge by the errors that leaving out each sample makes: the largest one whose mean squared
    error is within a standard error of the least (Breiman et al., Classification and Regression Trees, 1984)."""
    means = features.mean(axis=0), targets.mean(axis=0)
    left, sizes, right = np.linalg.svd(features - means[0], full_matrices=False)
    aimed = left.T @ (targets - means[1])
    ridges = _RIDGES * ((sizes**2).mean() or 1.0)
    errors = []
    for ridge in ridges:
        kept = sizes**2 / (sizes**2 + ridge)
        leverage = ((left * kept) * left).sum(axis=1) + 1 / len(features)
        missed = targets - means[1] - (left * kept) @ aimed
        errors.append(((missed / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).sum(axis=1))
    average = np.mean(errors, axis=1)
    best = int(average.argmin())
    allowed = average[best] + errors[best].std() / len(features) ** 0.5
    ridge = max(one for one, error in zip(ridges, average, strict=True) if error <= allowed)
    weight = (right.T @ ((sizes / (sizes**2 + ridge))[:, None] * aimed)).T
    return weight.astype(np.float32), (means[1] - weight @ means[0]).astype(np.float32)
