"""Every graph of a model with what holds in it: its address, operator versions, and whether it is in a function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from .address import graphs


@dataclass(frozen=True, slots=True)
class Scope:
    """A graph: the main one, a body, or a function's. ``opset`` maps domains to the versions in force there."""

    prefix: str
    graph: ir.Graph
    opset: Mapping[str, int]
    function: ir.Function | None = None  # the function that it is of, or is nested in

    @property
    def version(self) -> int:
        """The version of the ONNX domain; 0 where it is not imported."""
        return self.opset.get("", self.opset.get("ai.onnx", 0))

    def address(self, thing: ir.Node | ir.Value) -> str:
        """The address of a node or value of this graph."""
        return self.prefix + (thing.name or (thing.op_type if isinstance(thing, ir.Node) else ""))


def scopes(model: ir.Model) -> Iterator[Scope]:
    """The main graph, its bodies, then each function with its bodies; a graph comes before the bodies in it."""
    functions = {function.graph: function for function in model.functions.values()}
    function, opset = None, model.opset_imports
    for prefix, graph in graphs(model):
        if graph in functions:
            function = functions[graph]
            opset = function.opset_imports
        yield Scope(prefix, graph, opset, function)


def values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that a graph defines: inputs, other initializers, outputs of nodes."""
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())
    for node in graph:
        yield from node.outputs
