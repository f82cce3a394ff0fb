"""Views of the IR: dataflow and channels in networkx, and the cuts where a model comes apart. Derived, never kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from .address import bodies
from .channels import Tie, channels
from .constants import is_constant
from .ops import is_random

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Tie", "channels", "cuts", "dataflow", "reads"]


def reads(node: ir.Node) -> list[ir.Value]:
    """What ``node`` reads, each value once: its inputs, then what its bodies capture from outside, in their order."""
    found = dict.fromkeys(value for value in node.inputs if value is not None)
    if node.attributes:
        found.update(dict.fromkeys(_captures(node)))
    return list(found)


def dataflow(graph: ir.Graph) -> nx.DiGraph[ir.Node | ir.Value]:
    """Who feeds whom in one graph, bodies folded into the nodes that hold them.

    Vertices, in order: graph inputs and initializers (``ir.Value``), then nodes (``ir.Node``) in graph order, and each
    value captured from an outer graph before its first reader. An edge leads from producer to reader; its ``values``
    are the values that flow along it, in the order of reading.
    """
    import networkx as nx

    view: nx.DiGraph[ir.Node | ir.Value] = nx.DiGraph()
    view.add_nodes_from(graph.inputs)
    view.add_nodes_from(graph.initializers.values())
    for node in graph:
        flows: dict[ir.Node | ir.Value, list[ir.Value]] = {}
        for value in reads(node):
            producer = value.producer()
            here = producer is not None and producer.graph is graph
            flows.setdefault(producer if producer is not None and here else value, []).append(value)
        view.add_nodes_from(flows)
        view.add_node(node)
        for source, values in flows.items():
            view.add_edge(source, node, values=values)
    return view


def cuts(graph: ir.Graph) -> list[ir.Value]:
    """The values, in dataflow order, that every path from the graph's inputs to its outputs passes through.

    At each the graph comes apart in two that run one after the other. A sole input and a sole output are cuts too.
    Constants, what is computed from constants only, and nodes that reach no output lie on no path. In a body, captured
    values that are no constants count as inputs; a random value that is read on both sides of a value keeps that from
    being a cut, since both parts would draw their own. Nodes must be in topological order.

    One sweep over the values that are open (computed, and still to be read), O(nodes + edges): where only one is open,
    it is a cut; and a cut is alone right after it is computed, since all else on a path comes before or after it.
    """
    read = [reads(node) for node in graph]
    born = _born(graph, read)
    ends = _ends(graph, read)
    opening: dict[int, list[ir.Value]] = {}
    closing: dict[int, list[ir.Value]] = {}
    for value, place in born.items():
        if value in ends:
            opening.setdefault(place, []).append(value)
            closing.setdefault(ends[value], []).append(value)
    found: dict[ir.Value, None] = {}
    live: dict[ir.Value, None] = {}
    for place in range(-1, len(read)):
        for value in closing.get(place, ()):
            del live[value]
        live.update(dict.fromkeys(opening.get(place, ())))
        if len(live) == 1:
            found.update(live)
    return list(found)


def _born(graph: ir.Graph, read: list[list[ir.Value]]) -> dict[ir.Value, int]:
    """The place of the node that computes each value that depends on an input; -1 for what is there from the start."""
    born = dict.fromkeys(graph.inputs, -1)
    local = {*graph.inputs, *graph.initializers.values()}
    for place, (node, values) in enumerate(zip(graph, read, strict=True)):
        for value in values:
            if value not in local and not is_constant(value):  # captured
                born[value] = -1
                local.add(value)
        local.update(node.outputs)
        if is_random(node) or any(value in born for value in values):
            born.update(dict.fromkeys(node.outputs, place))
    return born


def _ends(graph: ir.Graph, read: list[list[ir.Value]]) -> dict[ir.Value, int]:
    """The place of the last reader of each value that an output depends on; the number of nodes for an output."""
    ends = dict.fromkeys(graph.outputs, len(read))
    for place, node in zip(reversed(range(len(read))), reversed(graph), strict=True):
        if any(value in ends for value in node.outputs):
            for value in read[place]:
                ends.setdefault(value, place)
    return ends


def _captures(node: ir.Node) -> Iterator[ir.Value]:
    """What the bodies of ``node`` read or return of what none of them defines; a body inside a body included."""
    inner = [body for _, body in bodies(node)]
    for body in inner:
        for member in body:
            inner += [graph for _, graph in bodies(member)]
    defined = {value for body in inner for value in _defined(body)}
    for body in inner:
        for member in body:
            yield from (value for value in member.inputs if value is not None and value not in defined)
        yield from (value for value in body.outputs if value not in defined)


def _defined(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
