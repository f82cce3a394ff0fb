"""Where channels of activations may be scaled for free: divided where they are made, multiplied where they are read.

A seam is what lies between layers: values whose channels pass through nothing but functions f with f(x / s) = f(x) / s
for s > 0 (Relu, pooling, sums, reshapes, Concat ...). Constants at its edges take the factors: weights and biases of
the layers that make it, scales and shifts of normalizations, and weights of the layers that read it. With powers of
two as factors nothing is rounded, and the model computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.storage import LARGE, Read, StreamedTensor, reader
from ...ir.weights import Weight

Array = np.ndarray[Any, Any]
Vertex = tuple[ir.Value, int]  # a value, and the axis of its channels

NO_SEAM = "nowhere in it do two layers meet so that channels between them could be scaled for free"
NOT_FINITE = "a constant beside it holds NaN or infinity"
LIMIT = 24  # factors lie between 2^-LIMIT and 2^LIMIT: beyond, a channel is as good as dead
_ROOM = 64  # only constants between 2^-_ROOM and 2^_ROOM take them: then neither these nor the values overflow or round
LEAST = float(np.finfo(np.float64).tiny)
NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "BatchNormalization"}
NORMS |= {"InstanceNormalization"}


@dataclass(frozen=True, eq=False)
class Part:
    """A constant at the edge of a seam: index i along ``axis`` goes with the seam's channel ``channels[i]``.

    ``power`` is -1 where it is divided by the factors, 1 where it is multiplied; ``node`` reads it, ``layer`` tells
    whether as a layer does its weight.
    """

    node: ir.Node
    weight: Weight
    axis: int
    power: int
    layer: bool
    channels: Array

    @property
    def norm(self) -> bool:
        return self.node.op_type in NORMS

    def scale(self, exponents: Array, provenance: str) -> None:
        """Scale it as the division of the seam's channels by 2^``exponents`` asks."""
        change = self.power * exponents[self.channels].astype(np.int64)
        if change.any():
            self.weight.replace(_scaled(self.weight.tensor, self.axis, change, provenance))


@dataclass(eq=False)
class Seam:
    """Values whose ``size`` channels share factors, and the constants that take them.

    ``pins`` holds for each value and axis that must stay as it is the reason; ``free`` [size] tells the channels that
    no such value holds. ``vertices`` gives the seam's channel of each index along a value's axis, ``ranks`` how many
    axes the value has.
    """

    address: str
    vertices: dict[Vertex, Array] = field(default_factory=dict)
    ranks: dict[Vertex, int] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    pins: dict[Vertex, str] = field(default_factory=dict)
    free: Array = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def size(self) -> int:
        return int(self.free.size)

    @property
    def layers(self) -> list[Part]:
        """The weights of the layers on both sides."""
        return [part for part in self.parts if part.layer]

    @property
    def makers(self) -> list[Part]:
        """The weights of the layers that make it."""
        return [part for part in self.parts if part.layer and part.power < 0]

    @property
    def readers(self) -> list[Part]:
        """The weights of the layers that read it."""
        return [part for part in self.parts if part.layer and part.power > 0]

    def inputs(self) -> dict[Vertex, Array]:
        """The values that its layers read, with the seam's channel of each index along the axis."""
        nodes = dict.fromkeys(part.node for part in self.readers)
        return {vertex: ids for vertex, ids in self.vertices.items() if any(vertex[0] in n.inputs for n in nodes)}

    def hold_extremes(self) -> str | None:
        """Hold the channels that factors might push out of what floats can tell; why, where none is left free."""
        for part in self.parts:
            largest = _largest(part.weight.magnitudes(), part.axis)
            if not np.isfinite(largest).all():
                self.free[:] = False
                return NOT_FINITE
            extreme = largest > 2.0**_ROOM
            if part.layer:
                extreme |= (largest < 2.0**-_ROOM) & (largest > 0)
            self.free[part.channels[extreme]] = False
        return None if self.free.any() else "its channels are too large or too small to be scaled without a loss"

    def scale(self, exponents: Array, provenance: str) -> None:
        """Divide the channels [size] of its values by 2^``exponents``."""
        for part in self.parts:
            part.scale(exponents, provenance)


def reach(parts: Iterable[Part], size: int) -> Array:
    """The largest |w| of any of ``parts`` for each of ``size`` channels of a seam, each as a share of its weight's
    largest; float64, 0 for a channel that none of them holds."""
    found = np.zeros(size)
    for part in parts:
        np.maximum.at(found, part.channels, along(part.weight.magnitudes(), part.axis))
    return found


def along(magnitudes: Array, axis: int) -> Array:
    """The largest for each index along ``axis``, as a share of the largest of all; float64."""
    found = _largest(magnitudes, axis)
    with np.errstate(invalid="ignore"):  # of infinity, which is not scaled
        return np.asarray(found / max(float(found.max(initial=0)), LEAST))


def _largest(magnitudes: Array, axis: int) -> Array:
    """The largest for each index along ``axis``, float64."""
    return np.asarray(magnitudes.max(axis=tuple(a for a in range(magnitudes.ndim) if a != axis), initial=0), np.float64)


def powers(logarithms: Array, free: Array) -> Array:
    """The exponents of the powers of two nearest to 2^``logarithms``, int64; NaN and what is not ``free`` gives 0.

    Where all channels are free a factor common to all changes nothing that matters, so the middle one is taken out.
    """
    known = free & np.isfinite(logarithms)
    if not known.any():
        return np.zeros(free.shape, np.int64)
    middle = float(np.median(logarithms[known])) if free.all() else 0.0
    exponents = np.rint(np.where(known, logarithms - middle, 0.0))
    return np.clip(exponents, -LIMIT, LIMIT).astype(np.int64)


def unevenness(ranges: Array) -> float:
    """How many times the largest of ``ranges`` exceeds their geometric mean; zeros do not count, 1 of nothing."""
    known = ranges[ranges > 0]
    return float(known.max() / np.exp(np.log(known).mean())) if known.size else 1.0


def _scaled(tensor: ir.TensorProtocol, axis: int, exponents: Array, provenance: str) -> Array | ir.TensorProtocol:
    """``tensor`` times 2^``exponents`` along ``axis``; from ``LARGE`` bytes on computed when it is read."""
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy()
    factors = np.exp2(exponents.astype(np.float64)).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    if tensor.nbytes < LARGE:
        return np.asarray((tensor.numpy().astype(np.float64) * factors).astype(dtype))

    def open() -> Read:
        read, wide = reader(tensor), np.broadcast_to(factors, shape).flat
        return lambda start, stop: (read(start, stop).astype(np.float64) * wide[start:stop]).astype(dtype)

    return StreamedTensor(open, tensor.dtype, ir.Shape(shape), name=tensor.name, provenance=f"lazy: {provenance}")
