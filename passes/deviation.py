"""How far the outputs of one model are from those of another, over many runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Array

_MOST_CHANNELS = 256
_CLEAR = 0.1  # by which the first of several probabilities is ahead of the second, where a model does not waver
_MASK, _BESIDE = 100.0, 1e-3  # the least that hides what is not to be picked, and what is no more than beside it
_APART = 8.0  # the ratio of magnitudes of neighbours in order from which there are two classes of scale


@dataclass(frozen=True, slots=True)
class Energies:
    """Signal and noise of each run, float64 [runs]."""

    signal: Array
    noise: Array

    @property
    def sqnr(self) -> float:
        """In dB."""
        return _decibels(self._ratio)

    @property
    def surely(self) -> float:
        """The SQNR in dB if noise over signal is one standard error more than it was in these runs (of a ratio of two
        sums: Cochran, Sampling Techniques, 1977, section 6.4)."""
        runs, total = len(self.signal), float(self.signal.sum())
        if runs < 2 or not total or not math.isfinite(self._ratio):
            return self.sqnr
        rest = self.noise - self._ratio * self.signal
        return _decibels(self._ratio + math.sqrt(float(np.square(rest).sum()) * runs / (runs - 1)) / total)

    @property
    def typical(self) -> float:
        """Noise over signal in the run of the median."""
        ratios = self.noise / np.where(self.signal, self.signal, 1.0)
        return float(np.median(ratios)) if len(ratios) else 0.0

    @property
    def _ratio(self) -> float:
        signal, noise = float(self.signal.sum()), float(self.noise.sum())
        return noise / signal if signal else (math.inf if noise else 0.0)


class Deviation:
    """Signal and noise of one output over runs, and how often the largest of a row, or an integer, is the same.

    Some outputs hold quantities of unlike scale side by side, the boxes and scores of a detector say, and in one ratio
    the noise of the small ones would not show. So signal and noise are kept by channel too. Rows of ``features`` are no
    scores of classes. Where an output may be ``masked``, with large numbers in place of what is not to be picked, the
    others count by themselves too.
    """

    def __init__(self, *, features: bool = False, masked: bool = False) -> None:
        self.features, self.masked = features, masked
        self.is_float = False
        self.rows = self.same = 0
        self.greatest = self.farthest = 0.0
        self.runs: list[tuple[float, float]] = []
        self.beside: list[tuple[float, float]] = []  # a mask
        self.channels: dict[int, list[tuple[Array, Array, Array]]] = {}  # by axis: signal, noise, greatest magnitude

    @property
    def energies(self) -> list[Energies]:
        """Those of all channels, and where these fall into two classes of scale those of each class."""
        found = [Energies(*np.array(runs, np.float64).T) for runs in (self.runs, self.beside) if runs]
        return [*found, *itertools.chain.from_iterable(map(_classes, self.channels.values()))]

    @property
    def error(self) -> float:
        """max|Δ| / max|y|."""
        return self.farthest / self.greatest if self.greatest else (math.inf if self.farthest else 0.0)

    def add(self, wanted: Any, found: Any) -> None:
        """Take in what the first model gave and what the other did."""
        if isinstance(wanted, np.ndarray) and isinstance(found, np.ndarray):
            self._array(wanted, found)
        elif isinstance(wanted, Sequence) and isinstance(found, Sequence) and not isinstance(wanted, str):
            for pair in itertools.zip_longest(wanted, found):
                self.add(*pair)
        elif isinstance(wanted, Mapping) and isinstance(found, Mapping) and wanted.keys() == found.keys():
            self._array(np.array(list(wanted.values())), np.array(list(found.values())))
        elif isinstance(wanted, np.ndarray) and wanted.dtype.kind in "fV":
            self.is_float = True
            self.runs.append((1.0, math.inf))
            self.farthest = math.inf
        else:
            self.rows += 1
            self.same += type(wanted) is type(found) and bool(np.array_equal(wanted, found))

    def _array(self, wanted: Array, found: Array) -> None:
        if wanted.dtype.kind not in "fV":
            self.rows += wanted.size
            self.same += int((wanted == found).sum()) if wanted.shape == found.shape else 0
            return
        self.is_float = True
        signal = wanted.astype(np.float64)
        finite = np.isfinite(signal)
        power = np.where(finite, np.square(np.where(finite, signal, 0)), 0)
        if wanted.shape != found.shape:
            self.runs.append((float(power.sum()), float(power.sum()) or 1.0))
            self.farthest = math.inf
            return
        other = found.astype(np.float64)
        if not np.isfinite(other[finite]).all() or not np.array_equal(signal[~finite], other[~finite], equal_nan=True):
            self.runs.append((float(power.sum()), math.inf))
            self.farthest = math.inf
            return
        noise = np.square(np.subtract(other, signal, out=np.zeros_like(signal), where=finite))
        self.runs.append((float(power.sum()), float(noise.sum())))
        self.greatest = max(self.greatest, math.sqrt(power.max(initial=0)))
        self.farthest = max(self.farthest, math.sqrt(noise.max(initial=0)))
        self._by_channel(power, noise)
        if self.masked:
            self._beside(power, noise)
        if signal.ndim > 1 and signal.shape[-1] > 1 and not self.features and _are_scores(signal):
            same = (signal.argmax(-1) == other.argmax(-1))[_are_sure(signal)]
            self.rows += same.size
            self.same += int(same.sum())

    def _beside(self, power: Array, noise: Array) -> None:
        """What is small beside a mask, where nothing is in between."""
        greatest = power.max(initial=0)
        small = power <= _BESIDE**2 * greatest
        if greatest >= _MASK**2 and small.any() and not (~small & (power < greatest / 4)).any():
            self.beside.append((float(power[small].sum()), float(noise[small].sum())))

    def _by_channel(self, power: Array, noise: Array) -> None:
        for axis in range(1, power.ndim) if power.ndim > 2 else ():
            if 1 < power.shape[axis] <= _MOST_CHANNELS:
                others = tuple(other for other in range(power.ndim) if other != axis)
                sums = power.sum(others), noise.sum(others), np.sqrt(power.max(others, initial=0))
                known = self.channels.setdefault(axis, [])
                if known and known[0][0].shape != sums[0].shape:
                    known.clear()
                known.append(sums)


def _classes(runs: Sequence[tuple[Array, Array, Array]]) -> list[Energies]:
    """Those of the two classes of channels, where there are two: one is past 2, so that it holds no probabilities, and
    all of it is ``_APART`` times the greatest of the other."""
    signal, noise, greatest = (np.array(part) for part in zip(*runs, strict=True))
    greatest = greatest.max(axis=0)
    order = np.argsort(-greatest, kind="stable")
    ranked = greatest[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = ranked[:-1] / ranked[1:]
    gaps[~np.isfinite(gaps)] = 0
    place = int(np.argmax(gaps)) + 1
    if gaps[place - 1] < _APART or ranked[place - 1] < 2:
        return []
    return [Energies(signal[:, part].sum(1), noise[:, part].sum(1)) for part in (order[:place], order[place:])]


def _are_scores(array: Array) -> bool:
    """Whether the last axis holds scores of classes, of which the largest counts.

    So it is taken to be in [N, classes], but for rows of length 1 that hold negative numbers, as embeddings have; with
    more axes, those of a tagger say, where each row holds probabilities that sum to 1.
    """
    if array.ndim > 2:
        return bool((array >= 0).all()) and bool(np.all(np.abs(array.sum(-1) - 1) < 1e-3))
    return not (np.all(np.abs(np.square(array).sum(1) - 1) < 1e-3) and (array < 0).any())


def _are_sure(scores: Array) -> Array:
    """Which rows tell an answer: all of [N, classes]; of probabilities along a sequence those with a clear first."""
    if scores.ndim == 2:
        return np.ones(len(scores), bool)
    second, first = np.moveaxis(np.partition(scores, -2, axis=-1)[..., -2:], -1, 0)
    return np.asarray(first - second >= _CLEAR)


def _decibels(ratio: float) -> float:
    """The SQNR of noise over signal."""
    if ratio == 0:
        return math.inf
    return -10 * math.log10(ratio) if ratio < math.inf else -math.inf
