"""The ways to make one output of several, each written once, in the words of ``algebra``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, TypeVar

from ..base import Array
from .algebra import Algebra

T = TypeVar("T")

How = Literal["mean", "weighted", "sum", "median", "geometric", "min", "max", "soft-vote", "hard-vote", "stack"]
PER_CLASS: tuple[How, ...] = ("soft-vote", "hard-vote", "stack")  # what needs to know which axis holds the classes


@dataclass
class Combination:
    """How one output is made. ``axis`` of the classes counts from the front; ``weights`` are one for each member.

    ``logits`` says of each member whether its values still need the softmax. ``orders`` says for each member where the
    classes of the first one are among its own, ``None`` where it has them in that order.
    """

    how: How
    axis: int = -1
    classes: int = 0
    weights: Sequence[float] = ()
    divisor: float | None = None
    logits: Sequence[bool] = ()
    orders: Sequence[Sequence[int] | None] = ()
    stack: tuple[Array, Array] | None = field(default=None, repr=False)

    def ordered(self, algebra: Algebra[T], values: Sequence[T]) -> list[T]:
        """The values with the classes of all in the order of the first."""
        return [
            value if order is None else algebra.take(value, order, self.axis)
            for value, order in zip(values, self.orders, strict=True)
        ]

    def of(self, algebra: Algebra[T], values: Sequence[T]) -> T:
        """The combined output; for a hard vote the share of the votes that each class has."""
        values = self.ordered(algebra, values)
        if self.how == "stack":
            assert self.stack is not None
            return algebra.affine(values, *self.stack)
        if self.how in ("min", "max"):
            return reduce(algebra.least if self.how == "min" else algebra.most, values)
        if self.how == "median":
            return _median(algebra, values)
        if self.how == "hard-vote":
            chosen = [algebra.index_of_largest(value, self.axis) for value in values]
            values = [algebra.one_hot(index, self.axis, self.classes) for index in chosen]
        if self.how == "soft-vote":
            values = [
                algebra.softmax(value, self.axis) if raw else value
                for value, raw in zip(values, self.logits, strict=True)
            ]
        if self.how == "geometric":
            values = [
                algebra.log_softmax(value, self.axis) if raw else algebra.log(value)
                for value, raw in zip(values, self.logits, strict=True)
            ]
        found = self._sum(algebra, values)
        return algebra.exp(found) if self.how == "geometric" else found

    def _sum(self, algebra: Algebra[T], values: Sequence[T]) -> T:
        """((w1 y1 + w2 y2) + ...), in member order, over the divisor; without weights the mean, or the plain sum."""
        if self.weights:
            parts = [algebra.times(value, weight) for value, weight in zip(values, self.weights, strict=True)]
            total = reduce(algebra.add, parts)
            return total if self.divisor is None else algebra.over(total, self.divisor)
        total = reduce(algebra.add, values)
        return total if self.how == "sum" else algebra.times(total, 1 / len(values))


def _median(algebra: Algebra[T], values: Sequence[T]) -> T:
    """The middle value, or the mean of the two in the middle, by a network that sorts: odd-even transposition.

    Knuth, The Art of Computer Programming, volume 3, section 5.3.4. What the middle does not need is swept later.
    """
    row = list(values)
    for turn in range(len(row)):
        for place in range(turn % 2, len(row) - 1, 2):
            one, two = row[place : place + 2]
            row[place], row[place + 1] = algebra.least(one, two), algebra.most(one, two)
    half = len(row) // 2
    return row[half] if len(row) % 2 else algebra.times(algebra.add(row[half - 1], row[half]), 0.5)
