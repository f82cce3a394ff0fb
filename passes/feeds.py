"""Some of the sample data, for passes that need not see all of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .base import Array, Feeds


@dataclass(frozen=True)
class Some:
    """At most ``count`` runs of ``feeds``, evenly spaced where it is known how many there are."""

    feeds: Feeds
    count: int

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        total = getattr(self.feeds, "runs", None)
        step = -(-total // self.count) if total else 1
        return itertools.islice(self.feeds, 0, step * self.count, step)
