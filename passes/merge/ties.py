"""Layers of branches that share one weight on purpose: the mean of theirs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.join import Joined, Member
from ...ir.references import replace_all_uses
from ...ir.storage import Array, Read, StreamedTensor, blocks, reader
from ..base import Context
from ..selection import Selection


def tie_layers(joined: Joined, members: Sequence[Member], chosen: Selection, ctx: Context) -> None:
    """Give float initializers that are ``chosen`` by their name in the first model, and those of equal name, type and
    shape of the others, their mean; says how far each was from it, as a share of its norm."""
    for name, first in joined.members[0].constants.items():
        source = members[0].model.graph.initializers[name]
        if source not in chosen or source.const_value is None:
            continue
        if not source.const_value.dtype.is_floating_point() or source.is_graph_input():
            ctx.skip(name, "not shared, for it is no constant of floats")
            continue
        alike: list[ir.Value] = [first]
        for place in joined.members[1:]:
            other = place.constants.get(name)
            tensor = None if other is None or other.is_graph_input() else other.const_value
            if other is not None and tensor is not None and _kind(tensor) == _kind(source.const_value):
                alike.append(other)
            else:
                ctx.skip(f"{place.name}/{name}", "not shared, for it has no constant of this name, type and shape")
        if len(alike) > 1:
            _tie(name, alike, ctx)


def _tie(name: str, alike: Sequence[ir.Value], ctx: Context) -> None:
    tensors = [value.const_value for value in alike if value.const_value is not None]
    first = tensors[0]
    mean = StreamedTensor(
        lambda: _mean(tensors), first.dtype, ir.Shape(first.shape.numpy()), name=alike[0].name, provenance="mean"
    )
    squares, distances = 0.0, [0.0] * len(tensors)
    for middle, *parts in zip(blocks(mean), *map(blocks, tensors), strict=True):
        centre = middle.astype(np.float64)
        squares += float((centre**2).sum())
        for place, part in enumerate(parts):
            distances[place] += float(((part.astype(np.float64) - centre) ** 2).sum())
    far = max(distances) ** 0.5 / squares**0.5 if squares else 0.0
    for value in alike[1:]:
        replace_all_uses(value, alike[0])
    alike[0].const_value = mean
    ctx.change(name, f"one weight for {len(alike)} branches, their mean", distance=far, bytes=int(first.nbytes))


def _mean(tensors: Sequence[ir.TensorProtocol]) -> Read:
    reads = [reader(tensor) for tensor in tensors]
    kind = tensors[0].dtype.numpy()

    def read(start: int, stop: int) -> Array:
        total = reads[0](start, stop).astype(np.float64)
        for one in reads[1:]:
            total += one(start, stop).astype(np.float64)
        return np.asarray(total / len(reads)).astype(kind)

    return read


def _kind(tensor: ir.TensorProtocol) -> tuple[ir.DataType, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape.numpy())
