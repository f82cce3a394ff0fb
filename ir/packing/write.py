"""Decoders put into a model and taken out again: a weight keeps its name, and what reads it reads it still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from ..constants import constant_node
from ..edit import Names, insert_before, replace_uses
from ..references import inherit
from ..scopes import Scope
from ..storage import LARGE
from ..unused import discard
from ..weights import Weight
from .census import Census
from .choose import Storage
from .decoded import Decoder
from .tape import Home, Tape


class Packer:
    """Packs weights of one model; ``finish`` puts what all of them made into its graphs."""

    def __init__(self, model: ir.Model, scopes: list[Scope]) -> None:
        self.model, self.names = model, Names(model)
        self.scopes = {scope.graph: scope for scope in scopes}
        self.homes = {scope.graph: Home(scope.function is not None) for scope in scopes}
        self.nodes: dict[ir.Graph, list[ir.Node]] = {}
        self.order = {scope.graph: list(scope.graph.initializers.values()) for scope in scopes}
        self.replaced: dict[ir.Graph, dict[ir.Value, list[ir.Value]]] = {}

    def pack(self, weight: Weight, census: Census, storage: Storage) -> None:
        """Store a weight that is one value, no input or output of its graph."""
        value = weight.value
        graph = value.graph
        assert graph is not None
        function = self.scopes[graph].function
        home = self.homes[self.model.graph if function is None else function.graph]
        producer, tensor = value.producer(), census.tensor
        in_file = isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) and tensor.nbytes >= LARGE
        tape = Tape(value.name or "", self.names, home, in_nodes=producer is not None, lazy=in_file)
        made = storage.build(tape, census)
        last = made.producer()
        assert last is not None
        made.type, made.shape = ir.TensorType(tensor.dtype), ir.Shape(census.shape)
        if producer is not None:
            self._in_place_of_node(producer, value, tape)
            return
        self.replaced.setdefault(graph, {})[value] = tape.initializers
        del graph.initializers[value.name or ""]
        value.const_value = None
        value.type, value.shape = made.type, made.shape
        tape.nodes[-1] = ir.Node("", last.op_type, last.inputs, outputs=[value], name=last.name)
        for place in range(len(last.inputs)):
            last.replace_input_with(place, None)
        self.nodes.setdefault(graph, []).extend(tape.nodes)

    def _in_place_of_node(self, producer: ir.Node, value: ir.Value, tape: Tape) -> None:
        """The decoder stands where the Constant node stood."""
        last = tape.nodes[-1]
        made, name = last.outputs[0], value.name or ""
        made.type, made.shape = value.type, value.shape
        insert_before(producer, tape.nodes, self.names)
        replace_uses(value, made, self.names)
        inherit(value, made)
        discard([value])
        made.name, last.name = name, producer.name

    def finish(self) -> None:
        """Insert shared tables, then decoders, before all other nodes of their graphs."""
        for graph, home in self.homes.items():
            nodes = [*home.nodes, *self.nodes.get(graph, [])]
            if nodes and len(graph):
                graph.insert_before(graph[0], nodes)
            elif nodes:
                graph.extend(nodes)
            replaced = self.replaced.get(graph, {})
            if replaced or home.initializers:
                order = [new for value in self.order[graph] for new in replaced.get(value, [value])]
                _reorder(graph, [*order, *home.initializers])


def unpack(found: Sequence[tuple[Decoder, ir.TensorProtocol]], names: Names) -> None:
    """Put tensors in the places of decoders: initializers, or Constant nodes where leaves are such."""
    after: dict[ir.Graph, dict[ir.Value, ir.Value]] = {}
    owned = {decoder.value.graph: None for decoder, _ in found if decoder.value.graph is not None}
    order = {value: place for graph in owned for place, value in enumerate(graph.initializers.values())}
    for decoder, tensor in found:
        old, leaf = decoder.value, _own_leaf(decoder, order)
        node, graph, name = old.producer(), old.graph, old.name or ""
        assert node is not None
        assert graph is not None
        old.name = names.fresh(f"{name}_decoded")
        if leaf.producer() is not None:
            new, constant = constant_node(tensor, name)
            new.type, new.shape = old.type, old.shape
            insert_before(node, constant, names)
            constant.name = node.name
        else:
            shape, kind = ir.Shape(decoder.shape), ir.TensorType(tensor.dtype)
            new = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
            graph.register_initializer(new)
            after.setdefault(graph, {})[leaf] = new
        replace_uses(old, new, names)
        inherit(old, new)
    for graph, placed in after.items():
        _reorder(graph, _in_places(graph, placed))
    discard([decoder.value for decoder, _ in found])


def _own_leaf(decoder: Decoder, order: dict[ir.Value, int]) -> ir.Value:
    """The leaf that is where the weight was. Those that decoders share, which may be larger, are behind all weights'
    own, in the main graph where the weight is in a body, and no Constant nodes but in functions."""
    nodes = [leaf for leaf in decoder.leaves if leaf.producer() is not None]
    near = [leaf for leaf in decoder.leaves if leaf.graph is decoder.value.graph and leaf in order]
    return next(iter(nodes), min(near, key=lambda leaf: order[leaf], default=decoder.leaves[0]))


def _in_places(graph: ir.Graph, placed: dict[ir.Value, ir.Value]) -> Iterator[ir.Value]:
    """The initializers, each new one after the leaf that it was made of."""
    new = set(placed.values())
    seen = set(graph.initializers.values())
    for value in graph.initializers.values():
        if value not in new:
            yield value
        if value in placed:
            yield placed[value]
    yield from (value for leaf, value in placed.items() if leaf not in seen)


def _reorder(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Let the graph have these initializers, in this order."""
    values = list(values)
    graph.initializers.clear()
    for value in values:
        graph.register_initializer(value)
