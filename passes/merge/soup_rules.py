"""How the weights that stand at one place in several models become one: arithmetic on blocks of them, in float64."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...ir.address import printable
from ...ir.errors import UsageError
from ...ir.storage import BLOCK, LARGE, Array, Read, StreamedTensor, blocks, reader

_STRAIGHT = 0.9995  # cosine from which an arc is a line but for rounding
_LOW = 16  # bits of a float32 that the second sweep tells apart


@dataclass(eq=False)
class Place:
    """A constant of the first model and what each member, and the base where there is one, has there.

    ``gram`` is float64 [tensors, tensors]: the inner product of each with each, the base last.
    """

    value: ir.Value
    tensors: list[ir.TensorProtocol]
    base: ir.TensorProtocol | None
    gram: Array
    alike: bool

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def all(self) -> list[ir.TensorProtocol]:
        return self.tensors if self.base is None else [*self.tensors, self.base]

    def rows(self) -> Iterator[Array]:
        """float64 [tensors, elements], a block at a time; the base last."""
        for parts in zip(*map(blocks, self.all), strict=True):
            yield np.stack([part.astype(np.float64) for part in parts])


def survey(
    value: ir.Value, tensors: list[ir.TensorProtocol], base: ir.TensorProtocol | None, names: Sequence[str]
) -> Place:
    """Read all that stands at one place, once. ``names`` are the members', then the base's.

    Raises ``UsageError`` for NaN or infinity where not all hold the same.
    """
    place = Place(value, tensors, base, np.zeros((len(tensors) + (base is not None),) * 2), True)
    broken = np.zeros(len(place.all), bool)
    if any(tensor is not tensors[0] for tensor in place.all):
        for rows in place.rows():
            place.alike &= all(row.tobytes() == rows[0].tobytes() for row in rows[1:])
            broken |= ~np.isfinite(rows).all(axis=1)
            if not broken.any():
                place.gram += rows @ rows.T
    if broken.any() and not place.alike:
        name = printable(names[int(np.argmax(broken))])
        raise UsageError(
            f"soup cannot average '{printable(place.name)}': it holds NaN or infinity in {name}, and the others hold "
            "something else. Leave that model out."
        )
    return place


# Rules --------------------------------------------------------------------------------------------------------------


class Rule:
    """What becomes of one place; ``at`` gives the function for a place, with the number that it has."""

    @abstractmethod
    def at(self, place: Place, number: int) -> Mix:
        """The function from [tensors, elements] and the first element's place to [elements]."""


class Mix:
    """float64 [tensors, elements] -> [elements]; ``start`` is where in the tensor the first element stands."""

    @abstractmethod
    def __call__(self, rows: Array, start: int) -> Array: ...


class Everywhere(Rule, Mix):
    """A rule that is the same function in all places."""

    def at(self, place: Place, number: int) -> Mix:
        del place, number
        return self


@dataclass
class Linear(Everywhere):
    """The sum of the members, each times its weight."""

    weights: Sequence[float]

    def __call__(self, rows: Array, start: int) -> Array:
        del start
        total = rows[0] * self.weights[0]
        for row, weight in zip(rows[1:], self.weights[1:], strict=True):
            total += row * weight
        return np.asarray(total)


@dataclass
class Slerp(Rule):
    """The way along the arc between two tensors as vectors (Shoemake 1985), ``share`` of it gone.

    ``straight`` collects the names of those without an arc: parallel, opposite, or zero. They get the linear mean.
    """

    share: float
    straight: list[str]

    def at(self, place: Place, number: int) -> Mix:
        del number
        norms = math.sqrt(place.gram[0, 0] * place.gram[1, 1])
        cosine = place.gram[0, 1] / norms if norms else 1.0
        if abs(cosine) > _STRAIGHT:
            self.straight.append(place.name)
            return Linear((1 - self.share, self.share))
        angle = math.acos(cosine)
        return Linear([math.sin(part * angle) / math.sin(angle) for part in (1 - self.share, self.share)])


@dataclass
class TaskArithmetic(Everywhere):
    """The base and the sum of what each member changed in it, times its weight (Ilharco et al. 2022)."""

    weights: Sequence[float]

    def __call__(self, rows: Array, start: int) -> Array:
        del start
        change = (rows[0] - rows[-1]) * self.weights[0]
        for row, weight in zip(rows[1:-1], self.weights[1:], strict=True):
            change += (row - rows[-1]) * weight
        return np.asarray(rows[-1] + change)


@dataclass
class Dare(Rule):
    """Task arithmetic on changes of which a random share is dropped and the others are scaled up (Yu et al. 2023).

    What is dropped depends on ``seed``, the number of the place, the member and the element alone.
    """

    weights: Sequence[float]
    density: float
    seed: int

    def at(self, place: Place, number: int) -> Mix:
        del place
        return _Dropped(self.weights, self.density, self.seed, number)


@dataclass
class _Dropped(Mix):
    weights: Sequence[float]
    density: float
    seed: int
    number: int

    def __call__(self, rows: Array, start: int) -> Array:
        result: Array = rows[-1].copy()
        for member, (row, weight) in enumerate(zip(rows[:-1], self.weights, strict=True)):
            kept = self._kept(member, start, rows.shape[1])
            result += np.where(kept, (row - rows[-1]) * (weight / self.density), 0.0)
        return result

    def _kept(self, member: int, start: int, size: int) -> Array:
        first, last = start // BLOCK, (start + max(size, 1) - 1) // BLOCK
        drawn = [
            np.random.default_rng([self.seed, self.number, member, block]).random(BLOCK, np.float32)
            for block in range(first, last + 1)
        ]
        return np.asarray(np.concatenate(drawn)[start - first * BLOCK :][:size] < self.density)


@dataclass
class Ties(Everywhere):
    """Trim, elect sign and merge (Yadav et al. 2023): of each member's changes the largest, of those the ones with the
    sign that has more weight in sum, and of those the mean, times ``scale``.

    ``least`` is, for each member, the least magnitude of a change that counts.
    """

    scale: float
    least: Array

    def __call__(self, rows: Array, start: int) -> Array:
        del start
        changes = rows[:-1] - rows[-1]
        changes[np.abs(changes).astype(np.float32) < self.least[:, None]] = 0.0
        changes[np.sign(changes) != np.sign(changes.sum(axis=0))] = 0.0
        count = np.maximum(np.count_nonzero(changes, axis=0), 1)
        return np.asarray(rows[-1] + self.scale * changes.sum(axis=0) / count)


def least_kept(places: Sequence[Place], members: int, density: float) -> Array:
    """For each member the magnitude, float32, of the last of the ``density`` largest changes, all places together.

    Found in two sweeps by the upper and then the lower bits of the float32, so that no vector is held whole.
    """
    total = sum(place.tensors[0].size for place in places)
    wanted = max(1, math.ceil(density * total))
    upper = _counts(places, members, None)
    bins, rest = zip(*(_nth(counts, wanted) for counts in upper), strict=True)
    lower = _counts(places, members, bins)
    last = [_nth(counts, left)[0] for counts, left in zip(lower, rest, strict=True)]
    bits = [high << _LOW | low for high, low in zip(bins, last, strict=True)]
    return np.array(bits, np.uint32).view(np.float32)


def _counts(places: Sequence[Place], members: int, bins: Sequence[int] | None) -> Array:
    """How many magnitudes have each pattern of upper bits; with ``bins``, of lower bits among those of that bin."""
    counts = np.zeros((members, 1 << _LOW), np.int64)
    for place in places:
        for rows in place.rows():
            patterns = np.abs(rows[:-1] - rows[-1]).astype(np.float32).view(np.uint32)
            for member, row in enumerate(patterns):
                high = row >> _LOW
                keys = high if bins is None else row[high == bins[member]] & ((1 << _LOW) - 1)
                counts[member] += np.bincount(keys, minlength=1 << _LOW)
    return counts


def _nth(counts: Array, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th greatest, and which of that bin, from the greatest, it is."""
    above = np.cumsum(counts[::-1])
    place = min(int(np.searchsorted(above, wanted)), len(counts) - 1)
    return len(counts) - 1 - place, wanted - int(above[place] - counts[::-1][place])


# Making -------------------------------------------------------------------------------------------------------------


def mixed(place: Place, mix: Mix) -> ir.TensorProtocol:
    """The tensor that ``mix`` makes, rounded once to the type of the place; a large one is made when it is read.

    Raises ``UsageError`` where a number does not fit into the type.
    """
    first, tensors = place.tensors[0], place.all
    kind = first.dtype.numpy()

    def open() -> Read:
        reads = [reader(tensor) for tensor in tensors]

        def read(start: int, stop: int) -> Array:
            rows = np.stack([one(start, stop).astype(np.float64) for one in reads])
            with np.errstate(over="ignore"):
                return mix(rows, start).astype(kind)

        return read

    made = StreamedTensor(
        open, first.dtype, ir.Shape(first.shape.numpy()), name=place.value.name, provenance="lazy: soup"
    )
    held: ir.TensorProtocol = made
    if first.nbytes < LARGE:
        held = ir.Tensor(made.numpy(), dtype=first.dtype, name=place.value.name)
    if first.nbytes < LARGE or first.dtype.bitwidth < 32:  # a wider type holds any sum of its numbers, in earnest
        for block in blocks(held):
            if not np.isfinite(block).all():
                raise UsageError(
                    f"soup: the mean of '{printable(place.name)}' does not fit into {first.dtype.name.lower()}; "
                    "give smaller weights or scale."
                )
    return held
