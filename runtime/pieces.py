"""A model cut into pieces that run alone, all in one session: values amid it are given, and others are fetched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..ir.edit import Names
from ..ir.view import reads
from ..passes.base import Array, Outputs
from .session import open_session, run_feed

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Cut:
    """A value of the main graph that is given: whatever reads it gets a new input of this type instead.

    Nodes one of whose outputs is in ``keep`` go on reading what the model computes.
    """

    value: str
    dtype: ir.DataType
    dims: Dims | None
    keep: Collection[str] = ()


class Pieces:
    """A session of ``model`` with ``cuts`` that gives the values ``fetched`` of the main graph, none of them an input.

    Without cuts it is the model that lets its values be seen. Raises ``DoesNotRun``.
    """

    def __init__(self, model: ir.Model, cuts: Iterable[Cut], fetched: Sequence[str], *, prepack: bool) -> None:
        model = model.clone()
        graph, names = model.graph, Names(model)
        values = {value.name: value for value in graph.inputs}
        values |= {value.name: value for node in graph for value in node.outputs if value.name}
        self._given: dict[str, str] = {}  # input -> the value that it takes the place of
        for cut in cuts:
            shape = None if cut.dims is None else ir.Shape(cut.dims)
            given = ir.Value(name=names.fresh(f"{cut.value}_given"), type=ir.TensorType(cut.dtype), shape=shape)
            for node, index in values[cut.value].uses():
                if not any(value.name in cut.keep for value in node.outputs):
                    node.replace_input_with(index, given)
            if given.uses():
                graph.inputs.append(given)
                self._given[given.name or ""] = cut.value
        self._fetched = list(fetched)
        graph.outputs.clear()
        graph.outputs.extend(values[name] for name in self._fetched)
        self._session = open_session(model, prepack=prepack)

    def run(self, feed: Mapping[str, Any], values: Mapping[str, Array], place: str) -> Outputs:
        """What is fetched, by name; ``values`` are those of the cuts. Raises ``DoesNotRun``, which names ``place``."""
        given = {name: values[value] for name, value in self._given.items()}
        return run_feed(self._session, {**feed, **given}, self._fetched, place=place)

    def types(self) -> dict[str, tuple[str, Dims | None]]:
        """ONNX Runtime's type of each value that is fetched, ``tensor(float)``, and its dimensions."""
        found = {}
        for output in self._session.get_outputs():
            known = [dim if isinstance(dim, int) else None for dim in output.shape or ()]
            found[output.name] = (output.type, tuple(known) if output.shape is not None else None)
        return found


def piece(value: ir.Value, stops: Collection[ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes that compute ``value`` from ``stops`` and graph inputs, in order, and which of these they read."""
    nodes: dict[ir.Node, None] = {}
    read: set[ir.Value] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes[node] = None
        for source in reads(node):
            if source in stops or (source.is_graph_input() and source.const_value is None):
                read.add(source)
            else:
                waiting.append(source.producer())
    return list(reversed(nodes)), read
