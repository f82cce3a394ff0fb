"""Which layers are lifted from integers to float, and how exactly those then keep their weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .candidates import Bench, Candidate
from .treatments import Choice, Treatment

_STORING = 0.8  # of what is allowed: the rest is for keeping the weights of what was lifted in 8 bits
_GROUPS = 32  # of neighbouring units whose effects are measured apart
_CHEAP = 0.005  # of the predicted time: what costs less counts as much


@dataclass(frozen=True)
class Group:
    """Neighbouring units, the noise over signal at the outputs that is lost by lifting them, and what that costs."""

    addresses: Sequence[str]
    harm: float
    cost: float

    @property
    def worth(self) -> float:
        return self.harm / self.cost


class Lifting:
    """From a choice that is too far from the float model to one that is near enough, and the fastest that was found."""

    def __init__(self, bench: Bench, start: Choice) -> None:
        self.bench, self.start = bench, replace(start, mended=False)
        self.units = [one for one in bench.subject.addresses() if start.of(one) is Treatment.FAST]

    def run(self) -> Candidate:
        for treatment, bound in ((Treatment.STORED, 1.0), (Treatment.HALF, _STORING), (Treatment.FLOAT, _STORING)):
            lifted = self.bench.whole(self.start.lifted(self.units, treatment))
            if lifted.distance <= bound:
                break
        if lifted.distance > 1:  # even in float: which units are on integers does not matter
            return lifted
        groups = self._by_worth(lifted)
        best, count = self._least(groups, lifted.choice.treatments, self.start, bound, lifted)
        best = self._given_back(self._recalibrated(best), groups[: count - 1], bound)
        return best if treatment is Treatment.STORED else self._stored(best)

    def _by_worth(self, lifted: Candidate) -> list[Group]:
        """Groups of neighbours, first those that put most noise in on integers for the time that they gain there.

        Each is measured while all others are in float.
        """
        start, bench = self.start, self.bench
        base, floor = bench.treat(start), bench.noise(lifted.choice)
        groups = []
        for part in _parts(self.units):
            forced = frozenset(address for address in part if address in base.static)
            harm = 0.0
            if forced or any(address in bench.subject.layers for address in part):
                alone = replace(lifted.choice.lifted(part, Treatment.FAST), forced=forced)
                harm = max(0.0, bench.noise(alone) - floor)
            cost = bench.subject.predicted(start.with_(_some(lifted.choice.treatments, part)), bench.costs) - base.cost
            groups.append(Group(part, harm, max(cost, _CHEAP * base.cost, 1.0)))
        return _ranked(groups)

    def _stored(self, best: Candidate) -> Candidate:
        """The same with the weights of what was lifted in 8 bits; in more where 8 do most harm, if they do too much."""
        lifted = [one for one in self.units if one in self.bench.subject.layers]
        lifted = [one for one in lifted if best.choice.of(one) is not Treatment.FAST]
        low = best.choice.lifted(lifted, Treatment.STORED)
        found = self.bench.whole(low)
        if found.distance <= 1:
            return found
        floor = self.bench.noise(best.choice)
        groups = []
        for part in _parts(lifted):
            noise = self.bench.noise(best.choice.lifted(part, Treatment.STORED)) - floor
            groups.append(Group(part, max(0.0, noise), sum(self._size(address) for address in part)))
        return self._least(_ranked(groups), best.choice.treatments, low, 1.0, best)[0]

    def _size(self, address: str) -> int:
        """How many constants a layer reads."""
        values = self.bench.subject.layers[address].inputs
        return (
            sum(value.const_value.size for value in values if value is not None and value.const_value is not None) or 1
        )

    def _recalibrated(self, best: Candidate) -> Candidate:
        """The same under another calibrator, if that is nearer: what had to clip may do without, once the worst is
        lifted."""
        if not best.treated.static:
            return best
        nearest = self.bench.calibrated(best.choice)
        if nearest.calibrator == best.choice.calibrator:
            return best
        found = self.bench.whole(nearest)
        return found if found.distance < best.distance else best

    def _given_back(self, best: Candidate, groups: Sequence[Group], bound: float) -> Candidate:
        """The same with as many of the lifted ``groups`` back on integers, the least harmful first, as there is room
        for."""
        low, high = 0, len(groups)
        while low < high:
            middle = (low + high + 1) // 2
            some = [address for group in groups[len(groups) - middle :] for address in group.addresses]
            found = self.bench.whole(best.choice.lifted(some, Treatment.FAST))
            if found.distance <= bound:
                best, low = found, middle
            else:
                high = middle - 1
        return best

    def _least(
        self,
        groups: Sequence[Group],
        to: Mapping[str, Treatment],
        choice: Choice,
        bound: float,
        best: Candidate | None = None,
    ) -> tuple[Candidate, int]:
        """``choice`` with the least number of ``groups``, taken in order, treated as in ``to`` for which the distance
        is within ``bound``, and that number; with all of them, which is ``best`` where that is known, if none is."""

        def build(count: int) -> Candidate:
            some = [address for group in groups[:count] for address in group.addresses]
            return self.bench.whole(choice.with_(_some(to, some)))

        low, high = 1, len(groups)
        best = best or build(high)
        while low < high and best.distance <= bound:
            middle = (low + high) // 2
            found = build(middle)
            if found.distance <= bound:
                best, high = found, middle
            else:
                low = middle + 1
        return best, high


def _parts(addresses: Sequence[str]) -> list[Sequence[str]]:
    """Neighbours together, in parts of about the same size."""
    size = math.ceil(len(addresses) / _GROUPS) or 1
    return [addresses[start : start + size] for start in range(0, len(addresses), size)]


def _ranked(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: -group.worth)


def _some(treatments: Mapping[str, Treatment], addresses: Iterable[str]) -> dict[str, Treatment]:
    return {address: treatments[address] for address in addresses}
