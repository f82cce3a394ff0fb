"""The moves that a pass makes. Each takes a valid model to a valid one, bodies included.

onnx_ir names what has no name when it enters a graph, but knows the names of that graph only; a body's new ``val_0``
may then hide an outer one. So moves that make names take a ``Names``, which knows those of the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import deepcopy

import onnx_ir as ir

from .address import addresses, bodies, graphs, printable
from .errors import UsageError
from .references import renaming, replace_sharded

_FIELDS = (
    "ir_version",
    "producer_name",
    "producer_version",
    "domain",
    "model_version",
    "doc_string",
    "device_configurations",
)


class Names:
    """Every name in a model, to make new ones that clash with none in any scope.

    Made in O(nodes); a new name then takes O(1). It knows of names given through it and through the moves here, so
    make one in each run of a pass and keep it no longer.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        found = [graph for _, graph in graphs(model)]
        self._counts = Counter(_value_names(found))
        self._counts.update([node.name for graph in found for node in graph if node.name])
        self._next: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return self._counts[name] > 0

    def fresh(self, stem: str) -> str:
        """The stem itself, or ``stem_1``, ``stem_2`` ... where it is taken."""
        name, number = stem, self._next.get(stem, 0)
        while self._counts.get(name):
            number += 1
            name = f"{stem}_{number}"
        self._next[stem] = number
        self._counts[name] += 1
        return name

    def give(self, nodes: Iterable[ir.Node], stem: str) -> None:
        """Names the nodes and outputs that have no name yet: ``stem_Operator``, numbered where that is taken."""
        for node in nodes:
            if node.name is None:
                node.name = self.fresh(f"{stem}_{node.op_type}")
            for value in node.outputs:
                if value.name is None:
                    value.name = self.fresh(f"{stem}_{node.op_type}")

    def rename(self, value: ir.Value, name: str) -> None:
        self._counts[value.name or ""] -= 1
        self._counts[name] += 1
        value.name = name


def scope_names(model: ir.Model) -> set[str]:
    """The names of all values, in every scope."""
    return set(_value_names(graph for _, graph in graphs(model)))


def fresh_name(where: ir.Model | Names, stem: str) -> str:
    """A name that no value and no node has in any scope. With a model O(nodes): for many names make one ``Names``."""
    return (where if isinstance(where, Names) else Names(where)).fresh(stem)


def insert_before(node: ir.Node, nodes: ir.Node | Sequence[ir.Node], names: Names) -> None:
    """Puts new nodes, in their order, before a node of a graph."""
    nodes = [nodes] if isinstance(nodes, ir.Node) else list(nodes)
    names.give(nodes, node.name or node.op_type)
    _graph(node).insert_before(node, nodes)


def insert_after(value: ir.Value, nodes: ir.Node | Sequence[ir.Node], names: Names) -> ir.Value:
    """Puts new nodes, in their order, behind a value; what read it now reads the first output of the last of them.

    The new nodes themselves keep reading ``value``. They stand right after its producer, or first in the graph where it
    is an input or initializer. Returns the new value; where ``value`` was a graph output, that has its name now.
    Raises ``UsageError`` for a value that is input and output of a graph.
    """
    nodes = [nodes] if isinstance(nodes, ir.Node) else list(nodes)
    producer, graph = value.producer(), value.graph
    if graph is None:
        raise UsageError(f"The value '{printable(value.name or '')}' is in no graph; nothing can stand behind it.")
    names.give(nodes, value.name or "value")
    if producer is not None:
        graph.insert_after(producer, nodes)
    elif len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)
    new = nodes[-1].outputs[0]
    replace_uses(value, new, names, but=nodes)
    return new


def replace_uses(old: ir.Value, new: ir.Value, names: Names, *, but: Collection[ir.Node] = ()) -> None:
    """Lets all that reads ``old``, in bodies too, read ``new``, except the nodes ``but`` and the bodies in them.

    Where ``old`` is an output of a graph, ``new`` becomes it, under the same name, so that the interface stays; an
    Identity stands between where ``new`` cannot take that name (a graph input, initializer, another output, or a value
    of an outer graph). An output of no known type takes that of ``old``. ``new`` must be defined before all uses of
    ``old``. Raises ``UsageError`` where ``old`` is input and output of one graph: its name cannot stand for two values.
    """
    if old is new:
        return
    if old.is_graph_output():
        _move_output(old, new, names)
    kept = set(but) | {inner for node in but for inner in _inside(node)}
    for node, index in old.uses():
        if node not in kept:
            replace_sharded(node, old, new)
            node.replace_input_with(index, new)


def drop(node: ir.Node) -> None:
    """Takes a node, with its bodies, out of its graph; it no longer counts as a user of anything.

    Raises ``ValueError`` if something still reads an output of it or an output is an output of the graph.
    """
    _graph(node).remove(node, safe=True)
    for inner in list(_inside(node)):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)


def rename(value: ir.Value, name: str, names: Names) -> None:
    """Gives a value a name that is free in every scope. Raises ``UsageError`` that says what has it."""
    if value.name == name:
        return
    if not name:
        raise UsageError(f"The value '{printable(value.name or '')}' cannot have an empty name.")
    if name in names:
        holders = (address for thing, address in addresses(names.model).items() if thing.name == name)
        place = f", of '{printable(holder)}'" if (holder := next(holders, None)) else ""
        raise UsageError(
            f"The value '{printable(value.name or '')}' cannot be renamed to '{printable(name)}': "
            f"the name is taken{place}. Choose another, for example '{printable(fresh_name(names.model, name))}'."
        )
    with renaming(names.model):
        names.rename(value, name)


def prefix(model: ir.Model, text: str) -> None:
    """Puts ``text`` before every name of a node or value in every graph, the model's inputs and outputs included."""
    values: dict[ir.Value, None] = {}
    for _, graph in graphs(model):
        values.update(dict.fromkeys(_values(graph)))
        for node in graph:
            if node.name:
                node.name = text + node.name
    named = [value for value in values if value.name]
    with renaming(model):
        ir.convenience.rename_values(named, [f"{text}{value.name}" for value in named])


def become(model: ir.Model, other: ir.Model) -> None:
    """Lets ``model`` hold, in place, all that ``other`` holds, which is not to be used after."""
    functions, metadata = dict(other.functions), dict(other.metadata_props)
    model.graph = other.graph
    model.functions.clear()
    model.functions.update(functions)
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.meta.update(other.meta)
    for field in _FIELDS:
        setattr(model, field, getattr(other, field))


def _move_output(old: ir.Value, new: ir.Value, names: Names) -> None:
    graph, name = old.graph, old.name or ""
    assert graph is not None
    if old.is_graph_input():
        raise UsageError(
            f"The value '{printable(name)}' is input and output of a graph; its name cannot stand for two values. "
            "Put an Identity before the output first."
        )
    fixed = new.is_graph_input() or new.is_initializer() or new.is_graph_output()
    if fixed or new.graph is not graph:
        identity = ir.node("Identity", [new], name=names.fresh("Identity"))
        identity.outputs[0].name = names.fresh(name)
        graph.append(identity)
        new = identity.outputs[0]
    if new.type is None or new.type == old.type:  # the interface says what it said: "batch", not 2
        new.type = deepcopy(old.type)
        new.shape = new.shape if old.shape is None else old.shape.copy()
    new.doc_string = new.doc_string or old.doc_string
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = new
    ir.convenience.rename_values([old, new], [new.name or names.fresh(name), name])


def _graph(node: ir.Node) -> ir.Graph:
    if node.graph is None:
        raise UsageError(f"The node '{printable(node.name or node.op_type)}' is in no graph.")
    return node.graph


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    """All nodes in the bodies of a node."""
    stack = [node]
    while stack:
        for _, body in bodies(stack.pop()):
            yield from body
            stack += body


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _value_names(found: Iterable[ir.Graph]) -> list[str]:
    names: list[str | None] = []
    for graph in found:
        names += [value.name for value in graph.inputs]
        names += graph.initializers
        names += [value.name for node in graph for value in node.outputs]
    return [name for name in names if name]
