"""Bins of equal width, in which many numbers are counted and looked up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.storage import Array

BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class Grid:
    """Bins of one width: number x is in bin floor((x - base) · scale) + shift, computed in ``kind``."""

    base: float
    scale: float
    shift: int
    bins: int
    kind: type[np.floating[Any]]

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """``BINS`` bins over [low, high]. Zero, where it lies within, is an edge, so that no bin has both signs."""
        kind = np.float32 if max(-low, high) > 1e-30 and high - low < 1e30 else np.float64
        inside = low <= 0 <= high
        scale = (BINS - 2) / (high - low) if high > low else 1.0
        if not math.isfinite(scale):
            scale = 1.0
        base = 0.0 if inside else low
        shift = math.ceil(-low * scale) if inside else 0
        return cls(base, scale, shift, BINS, kind)

    def index(self, numbers: Array) -> Array:
        """The bins of flat floats; beyond those that there are for floats outside of its range."""
        found = numbers.astype(self.kind)
        if self.base:
            found -= self.kind(self.base)
        found *= self.kind(self.scale)
        index = np.floor(found, out=found).astype(np.intp)
        index += self.shift
        return index

    def centers(self) -> Array:
        """The middle of each bin, float64."""
        middles: Array = self.base + (np.arange(self.bins) - self.shift + 0.5) / self.scale
        return middles
