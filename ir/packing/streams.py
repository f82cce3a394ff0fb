"""Flows of arrays that are made anew each time they are read, and tensors that write themselves from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from ..storage import LARGE, Array, StreamedTensor

Flow: TypeAlias = Iterator[Array]
Make: TypeAlias = Callable[[], Flow]


def tensor_of(make: Make, size: int, dtype: ir.DataType, name: str, *, lazy: bool) -> ir.TensorProtocol:
    """A flat tensor of what a flow yields: made when it is read where it is large and ``lazy``, else now."""
    if lazy and size * dtype.itemsize >= LARGE:
        shape = ir.Shape((size,))
        return StreamedTensor(lambda: _Sweep(make).read, dtype, shape, name=name, provenance="lazy: pack-weights")
    parts = list(make())
    whole = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype.numpy()), *parts])
    assert whole.shape == (size,), (name, whole.shape, size)
    return ir.Tensor(np.ascontiguousarray(whole), dtype=dtype, name=name)


class _Sweep:
    """One reading of a flow by places: forwards, or again from the start."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.flow, self.at, self.rest = make(), 0, np.zeros(0)

    def read(self, start: int, stop: int) -> Array:
        if start < self.at:
            self.flow, self.at, self.rest = self.make(), 0, np.zeros(0)
        while self.at < start:
            self._take(start - self.at)
        parts = []
        while self.at < stop:
            parts.append(self._take(stop - self.at))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _take(self, most: int) -> Array:
        while not self.rest.size:
            self.rest = next(self.flow)
        part, self.rest = self.rest[:most], self.rest[most:]
        self.at += part.size
        return part
