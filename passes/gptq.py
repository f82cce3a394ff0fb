"""Weights that take given values one input after another, each error carried on to inputs that are still free.

So the outputs of a layer, not its weight, stay nearest to what they were (GPTQ: Frantar et al. 2022, arXiv 2210.17323;
written as Babai's nearest plane on a Cholesky factor, which is the same without an inverse).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .base import Array

_BLOCK = 128  # inputs between which errors are carried at once
_AT_ONCE = 1 << 21  # elements that are multiplied at once

Take = Callable[[Array, Array], Array]  # an input for each group [G], values wanted there [G, N]; -> those taken


@dataclass(frozen=True)
class Rows:
    """How a weight of ``shape`` is read as [groups, N / groups, K]: K inputs, which its layer contracts.

    The outputs are along axis 0, and all other axes are K; or along the last axis of a matrix.
    """

    shape: tuple[int, ...]
    output_axis: int
    groups: int = 1

    def of(self, array: Array) -> Array:
        """The rows of the weight, or of what broadcasts over it."""
        whole = np.broadcast_to(array, self.shape)
        if self.output_axis == 0:
            return whole.reshape(self.groups, self.shape[0] // self.groups, -1)
        return whole.T[None]

    def back(self, rows: Array) -> Array:
        """What ``of`` made rows of, in its shape."""
        return np.ascontiguousarray(rows.reshape(self.shape) if self.output_axis == 0 else rows[0].T)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a layer's inputs: ``gram`` [G, K, K], for each group the sum or mean of x xᵀ of ``count`` x.

    ``damping``, a share of the mean moment, is added to the diagonal; of few inputs (``count``, 0 where not known) as
    much more as the estimate of Chen et al. 2010 (arXiv 0907.4698, OAS) asks. Raises ``ValueError`` for a ``gram`` that
    is not finite.
    """

    gram: Array
    count: int = 0
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not np.isfinite(self.gram).all():
            raise ValueError("moments that are not finite say nothing about rounding")

    @property
    def diagonal(self) -> Array:
        """The moment of each input, float64 [G, K]."""
        return np.diagonal(self.gram, axis1=1, axis2=2).astype(np.float64)

    def energy(self, rows: Array) -> Array:
        """r G rᵀ for each row r of [G, N, K], float64 [G, N]: the energy of the outputs of a weight, or of an error."""
        step = max(1, _AT_ONCE // (rows.shape[0] * rows.shape[2]))
        parts = (rows[:, first : first + step] for first in range(0, rows.shape[1], step))
        found = [np.einsum("gnk,gnk->gn", part @ self.gram, part) for part in parts]
        return np.asarray(np.maximum(np.concatenate(found, axis=1), 0))

    def carried(self, weight: Array, nearest: Array, take: Take) -> Array:
        """``weight`` [G, N, K], all in values that ``take`` gives, such that the outputs change little; float64.

        Inputs with the largest moments come first, and each error is carried to those that are left. A row that would
        change its output more than the ``nearest`` values takes those.
        """
        order, factor = self._factored
        target = np.take_along_axis(weight.astype(np.float64), order[:, None], axis=2)
        taken, error = np.empty(target.shape), np.zeros(target.shape)
        for stop in range(target.shape[2], 0, -_BLOCK):
            start = max(0, stop - _BLOCK)
            carried = error[..., stop:] @ factor[:, stop:, start:stop]
            for place in range(stop - 1, start - 1, -1):
                inner = error[..., place + 1 : stop] @ factor[:, place + 1 : stop, place, None]
                shift = (carried[..., place - start] + inner[..., 0]) / factor[:, place, place, None]
                taken[..., place] = take(order[:, place], target[..., place] + shift)
                error[..., place] = target[..., place] - taken[..., place]
        found = np.empty(target.shape)
        np.put_along_axis(found, order[:, None], taken, axis=2)
        worse = self.energy(weight - found) >= self.energy(weight - nearest)
        found[worse] = nearest[worse]
        return found

    @functools.cached_property
    def _factored(self) -> tuple[Array, Array]:
        """The inputs of each group by their moments, ascending [G, K], and the lower Cholesky factors of the moments in
        that order; those of a group whose inputs are all zero carry nothing."""
        moments = self.diagonal
        ridge = np.maximum(self.damping, self._shrinkage) * moments.mean(axis=1)
        order = np.argsort(moments, axis=1, kind="stable")
        groups = np.arange(len(order))[:, None]
        damped = self.gram[groups[:, :, None], order[:, :, None], order[:, None]]
        damped[groups, np.arange(order.shape[1]), np.arange(order.shape[1])] += np.where(ridge > 0, ridge, 1.0)[:, None]
        return order, np.linalg.cholesky(damped)

    @property
    def _shrinkage(self) -> Array:
        """How much of the mean moment belongs on the diagonal of what was estimated from so few vectors, [G]."""
        groups, width = self.gram.shape[:2]
        if self.count <= 0:
            return np.zeros(groups)
        trace, square = self.diagonal.sum(axis=1), np.square(self.gram).sum(axis=(1, 2))
        spread = (self.count + 1 - 2 / width) * (square - trace**2 / width)
        most = (1 - 2 / width) * square + trace**2
        share = np.minimum(1.0, np.divide(most, spread, out=np.ones(groups), where=spread > 0))
        return np.asarray(share / np.maximum(1 - share, 1e-3))
