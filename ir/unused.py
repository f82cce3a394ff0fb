"""Taking out what nothing uses. ONNX operators have no side effects: a node that nothing reads need not run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from .address import bodies
from .edit import drop
from .references import is_named, leave


def take_out(node: ir.Node) -> list[ir.Value]:
    """Drop a node; returns the values that it used, and those of outer graphs that its bodies used, or that the
    quantization annotations of its outputs named.

    Raises ``ValueError`` where an output of it is still used.
    """
    freed = [value for value in node.inputs if value is not None]
    freed += [value for _, body in bodies(node) for value in _used(body) if value.graph is not body]
    freed += [named for value in node.outputs for named in leave(value, node.graph)]
    drop(node)
    return freed


def discard(values: Iterable[ir.Value | None]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Remove the nodes and initializers behind ``values`` that nothing uses any more, and so on upwards.

    Inputs and outputs of graphs always stay. Returns what was removed: nodes, and initializers.
    """
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    waiting = [value for value in values if value is not None]
    while waiting:
        value = waiting.pop()
        node, graph = value.producer(), value.graph
        if graph is None:
            continue
        if node is not None:
            if all(map(is_idle, node.outputs)):
                waiting += take_out(node)
                nodes.append(node)
        elif value.is_initializer() and not value.is_graph_input() and is_idle(value):
            del graph.initializers[value.name or ""]
            initializers.append(value)
            waiting += leave(value, graph)
    return nodes, initializers


def is_idle(value: ir.Value) -> bool:
    """Whether no node uses ``value``, no quantization annotation names it, and it is no output of a graph."""
    return not value.is_graph_output() and not value.uses() and not is_named(value)


def _used(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value that the nodes of a graph, and of the bodies in it, use."""
    stack = [graph]
    while stack:
        for node in stack.pop():
            yield from (value for value in node.inputs if value is not None)
            stack += [body for _, body in bodies(node)]
