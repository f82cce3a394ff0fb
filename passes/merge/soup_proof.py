"""The proof of a soup: its weights made a second time, plainly, and shown to come from the right places.

That one constant stands where another does is told by the structure of two graphs. Whether that is so can be run: the
first model with the weights of a member in their places has to compute what that member computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.address import graphs
from ...ir.errors import InvalidModel
from ...ir.join import Member
from ...ir.ops import is_random
from ...ir.shapes import Dims, dims
from ...ir.storage import MadeTensor
from ..base import Array, Feeds, Outputs, Runner
from .soup_batchnorm import store
from .soup_rules import Mix, Place

_RUNS = 8  # feeds on which each member is run


def plainly(place: Place, mix: Mix) -> ir.TensorProtocol:
    """What ``mix`` makes of whole tensors by numpy in float64, made when it is read."""
    first = place.tensors[0]

    def make() -> Array:
        rows = np.stack([tensor.numpy().astype(np.float64).reshape(-1) for tensor in place.all])
        return mix(rows, 0).astype(first.dtype.numpy()).reshape(first.shape.numpy())

    return MadeTensor(make, first.dtype, first.shape, name=place.value.name, provenance="lazy: soup")  # type: ignore[arg-type]


def prove_places(
    model: ir.Model, everyone: Sequence[Member], places: Sequence[Place], feeds: Feeds, runner: Runner
) -> None:
    """Run each member beside the first with its weights in their places, on the first feeds, by an exact ``runner``.

    ``model`` is the first of ``everyone`` and ends with its own. Nothing is shown of a model with random operators.
    Raises ``InvalidModel`` where bits differ.
    """
    if any(is_random(node) for _, graph in graphs(model) for node in graph):
        return
    told = list(islice(feeds, _RUNS))
    for number, member in enumerate(everyone[1:], 1):
        _put(places, number)
        pairs = zip(_inputs(model), _inputs(member.model), strict=True)
        inputs = [(own.name or "", their.name or "", dims(their)) for own, their in pairs]
        cut = [{own: _cut(feed[own], sizes) for own, _, sizes in inputs if own in feed} for feed in told]
        renamed = [{their: feed[own] for own, their, _ in inputs if own in feed} for feed in cut]
        runs = zip(runner.run(model, cut), runner.run(member.model, renamed), strict=True)
        if name := next(filter(None, (_unlike(found, wanted) for found, wanted in runs)), None):
            raise InvalidModel(
                "The soup",
                [f"with the weights of {member} in what was taken for their places, '{name}' is not what {member} has"],
            )
    _put(places, 0)


def _put(places: Sequence[Place], number: int) -> None:
    for place in places:
        store(place.value, place.all[number])


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _cut(array: Any, sizes: Dims | None) -> Any:
    """As much of ``array`` as an input of these ``sizes`` takes, where they are fixed and fewer."""
    if not isinstance(array, np.ndarray) or not sizes or len(sizes) != array.ndim:
        return array
    return array[tuple(slice(size if isinstance(size, int) else None) for size in sizes)]


def _unlike(found: Outputs, wanted: Outputs) -> str | None:
    """The first output that is not the same in both, outputs paired by place."""
    for (name, one), other in zip(found.items(), wanted.values(), strict=True):
        if not _same(one, other):
            return name
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and bool(np.all((one == other) | ((one != one) & (other != other))))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)
