"""What a pass did and what it left alone: nothing is skipped in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

Number = int | float


@dataclass(frozen=True)
class Change:
    """One thing that a pass changed: ``subject`` is an address, ``what`` says how, ``numbers`` measure it."""

    subject: str
    what: str
    numbers: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """One thing that a pass looked at and left alone, and why."""

    subject: str
    reason: str


@dataclass
class Ledger:
    """The changes and skips of one run of one pass, in the order in which they happened, and sentences of warning."""

    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """How many subjects were skipped for each reason, most first."""
        return dict(Counter(skip.reason for skip in self.skips).most_common())

    def deeds(self) -> dict[str, int]:
        """How many subjects underwent each kind of change, most first."""
        return dict(Counter(change.what for change in self.changes).most_common())
