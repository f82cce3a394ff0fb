"""How many elements to prune for a model to fit into a number of bytes, counted by entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ...ir.errors import UsageError
from ...ir.files import saved_bytes
from ...ir.storage import mask_bytes, value_bytes, value_counts
from ...ir.weights import Weight
from .apply import Stored, hard, pruned
from .threshold import Cut

Cuts = Callable[[int], Sequence[Cut]]  # the cuts at a step of pruning, one for each weight on its own


class Budget:
    """The bytes of a model whose ``weights`` have been cut, each in its best storage and the rest as it is.

    The storages are those of ``ir.storage.entropy_bytes``. ``coded[i]``: weight i repeats its values, so that coding
    them may be best, and then its size depends on which elements are cut, not only on how many.
    """

    def __init__(self, model: ir.Model, weights: Sequence[Weight]) -> None:
        self.weights = weights
        self.rest = saved_bytes(model) - sum(weight.nbytes for weight in weights)
        self.coded = [2 * (weight.distinct() or weight.size) <= weight.size for weight in weights]
        self.zeros = [weight.zeros() for weight in weights]

    def bytes(self, cuts: Sequence[Cut]) -> int:
        """The size of the model with these cuts, one for each weight."""
        return self.rest + sum(self._weight_bytes(place, cut) for place, cut in enumerate(cuts))

    def _weight_bytes(self, place: int, cut: Cut) -> int:
        weight, zeros = self.weights[place], max(self.zeros[place], cut.counts[0])
        bits = weight.dtype.bitwidth
        best = min(weight.nbytes, mask_bytes(weight.size, zeros, bits))
        if not self.coded[place]:
            return best
        stored = Stored.of(weight)
        counts = value_counts(pruned(stored, hard(stored, cut.threshold, cut.until[0])))
        return best if counts is None else min(best, value_bytes(counts[1], bits))


def least_step(budget: Budget, cuts: Cuts, steps: int, target: int) -> int:
    """The least step from 0 to ``steps``, each of which prunes more, at which the model takes ``target`` bytes at most.

    Raises ``UsageError`` where not even the last does.
    """
    least = budget.bytes(cuts(steps))
    if least > target:
        raise UsageError(
            f"prune-magnitude: target-bytes={target} is out of reach: with every weight it may touch at zero the "
            f"model still takes {least} bytes. Ask for at least that."
        )
    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        if budget.bytes(cuts(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return high
