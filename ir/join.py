"""Several models in one graph: versions aligned, names kept apart, dimensions unified, inputs wired to earlier values.

    joined = join([Member("model", a), Member("b", b)], [{}, {"x": Source(0, "y")}])
    joined.members[1].outputs["y"]      # where an output of b is in the new graph
    joined.show([("y", joined.members[1].outputs["y"])])

The members stay as they are; weights are shared with them, not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from .address import printable
from .align import align_functions, align_versions, merge_metadata
from .edit import Names
from .errors import UsageError
from .references import inherit, renaming, replace_all_uses
from .scopes import scopes, values
from .unify import Misfit, Symbols, described


@dataclass(frozen=True, eq=False)
class Member:
    """A model that is to be joined with others, under a name that no other member has."""

    name: str
    model: ir.Model

    def __str__(self) -> str:
        return printable(self.name)


@dataclass(frozen=True)
class Source:
    """A value that a member reads: an input or output, by the name that it has there, of an earlier member."""

    member: int
    value: str


Wires: TypeAlias = Sequence[Mapping[str, Source]]
"""For each member, which of its inputs read what; an input that reads nothing stays an input of the whole."""


@dataclass
class Placed:
    """Where a member went: inputs, outputs and initializers by the names they had, and nodes, in the joined graph."""

    name: str
    inputs: dict[str, ir.Value]
    outputs: dict[str, ir.Value]
    constants: dict[str, ir.Value]
    nodes: list[ir.Node]

    def find(self, name: str) -> ir.Value:
        """The output, else the input, that was called ``name``."""
        return self.outputs[name] if name in self.outputs else self.inputs[name]


@dataclass
class Joined:
    """One model made of several. Its outputs are those of all members, until ``show`` chooses.

    ``notes`` are what was changed on the way: the name of a member, and a sentence.
    """

    model: ir.Model
    members: list[Placed]
    notes: list[tuple[str, str]] = field(default_factory=list)

    def value(self, source: Source) -> ir.Value:
        """Where a value of a member is now."""
        return self.members[source.member].find(source.value)

    def show(self, outputs: Iterable[tuple[str, ir.Value]]) -> None:
        """Let these be the outputs, each under the name given with it, in this order.

        An inner value that has such a name gets another; where an input or another output has it, the output's name
        is made free by a number. A value that is an input, a constant, or shown twice is copied by an Identity.
        """
        graph, names = self.model.graph, Names(self.model)
        graph.outputs.clear()
        with renaming(self.model):
            for wanted, value in outputs:
                if value.is_graph_input() or value.is_initializer() or value.is_graph_output():
                    value = self._copied(value, names)
                self._call(value, wanted, names)
                graph.outputs.append(value)

    def append(self, *nodes: ir.Node) -> ir.Value:
        """Put new nodes without names, in their order, at the end of the graph; -> the last one's first output."""
        Names(self.model).give(nodes, "merge")
        self.model.graph.extend(nodes)
        return nodes[-1].outputs[0]

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a value a name that is free."""
        with renaming(self.model):
            self._call(value, name, Names(self.model))

    def _call(self, value: ir.Value, wanted: str, names: Names) -> None:
        if value.name == wanted:
            return
        if wanted in names:
            graphs = [scope.graph for scope in scopes(self.model) if scope.function is None]
            holder = next((other for graph in graphs for other in values(graph) if other.name == wanted), None)
            if holder is None or holder.is_graph_input() or holder.is_graph_output():
                wanted = names.fresh(wanted)
                names.rename(value, wanted)
                return
            names.rename(holder, names.fresh(wanted))
        names.rename(value, wanted)

    def _copied(self, value: ir.Value, names: Names) -> ir.Value:
        copy = ir.Value(type=value.type, shape=None if value.shape is None else value.shape.copy())
        copy.name = names.fresh(f"{value.name}_copy")
        self.model.graph.append(ir.Node("", "Identity", [value], outputs=[copy], name=copy.name))
        return copy


def join(members: Sequence[Member], wires: Wires, opset: int = 0) -> Joined:
    """One model that computes what all ``members`` do, each after those before it.

    Operator sets and IR versions are the newest among the members, the ONNX domain's ``opset`` at least. Functions of
    one name that differ are renamed, metadata of one key that differ are called ``member/key``, values and nodes whose
    name an earlier member has ``member/name``, dimensions likewise where nothing says that they are equal. Raises
    ``UsageError`` for versions that cannot be aligned, and for a wire between values whose types or shapes do not fit,
    with a sentence naming both.
    """
    models = [member.model.clone() for member in members]
    named = [(member.name, model) for member, model in zip(members, models, strict=True)]
    notes = align_versions(named, opset) + align_functions(named)
    symbols = Symbols()
    for number, reads in enumerate(wires):
        for name, source in reads.items():
            fit(members, number, name, source, symbols)
    notes += symbols.write(named)
    placed = [_place(member.name, model) for member, model in zip(members, models, strict=True)]
    _separate_names(named, notes)
    host = models[0]
    for number, (model, reads) in enumerate(zip(models, wires, strict=True)):
        for name, source in reads.items():
            _wire(model, placed[number], name, placed[source.member].find(source.value))
        if number:
            _move(model, host)
    host.graph.outputs.clear()
    host.graph.outputs.extend(dict.fromkeys(value for place in placed for value in place.outputs.values()))
    notes += merge_metadata(named, [member.model for member in members])
    return Joined(host, placed, notes)


def fit(
    members: Sequence[Member],
    number: int,
    name: str,
    source: Source,
    symbols: Symbols,
    known: ir.Value | None = None,
) -> None:
    """Let ``symbols`` know that the input ``name`` of a member reads ``source``. Raises ``UsageError`` for a misfit.

    ``known`` is a value of which more is known than the file tells of the source.
    """
    giver, taker = members[source.member], members[number]
    given, taken = interface(giver.model)[source.value], interface(taker.model, inputs_first=True)[name]
    try:
        symbols.unify((source.member, known or given), (number, taken))
    except Misfit as reason:
        word = "input" if given.is_graph_input() else "output"
        raise UsageError(
            f"The {word} '{printable(source.value)}' of {giver} is {described(known or given)}, and the input "
            f"'{printable(name)}' of {taker} takes {described(taken)}: {reason}."
        ) from None


def interface(model: ir.Model, *, inputs_first: bool = False) -> dict[str, ir.Value]:
    """Inputs and outputs by name. Where one name is both, it is the output, or with ``inputs_first`` the input."""
    parts = (model.graph.outputs, model.graph.inputs) if inputs_first else (model.graph.inputs, model.graph.outputs)
    return {value.name or "": value for part in parts for value in part}


def _place(name: str, model: ir.Model) -> Placed:
    graph = model.graph
    inputs = {value.name or "": value for value in graph.inputs}
    outputs = {value.name or "": value for value in graph.outputs}
    return Placed(name, inputs, outputs, dict(graph.initializers), list(graph))


def _separate_names(models: Sequence[tuple[str, ir.Model]], notes: list[tuple[str, str]]) -> None:
    """Prefix what an earlier model has: values with values, nodes with nodes. Functions have names of their own."""
    known_values: set[str] = set()
    known_nodes: set[str] = set()
    for name, model in models:
        graphs = [scope.graph for scope in scopes(model) if scope.function is None]
        with renaming(model):
            count = _prefix(
                list(dict.fromkeys(value for graph in graphs for value in values(graph))), name, known_values
            )
            count += _prefix([node for graph in graphs for node in graph], name, known_nodes)
        if count:
            notes.append((name, f"{count} name{'s' if count > 1 else ''} prefixed, for others have them"))


def _prefix(things: Sequence[ir.Value] | Sequence[ir.Node], prefix: str, known: set[str]) -> int:
    """Rename what has a name that is ``known``, and know all names then; -> how many were renamed."""
    own = {thing.name for thing in things if thing.name}
    count = 0
    for thing in things:
        if thing.name and thing.name in known:
            stem = new = f"{prefix}/{thing.name}"
            number = 0
            while new in known or new in own:
                number += 1
                new = f"{stem}_{number}"
            thing.name = new
            own.add(new)
            count += 1
    known |= {thing.name for thing in things if thing.name}
    return count


def _wire(model: ir.Model, place: Placed, name: str, value: ir.Value) -> None:
    """Let the member read ``value`` in place of its input."""
    old, graph = place.inputs[name], model.graph
    inherit(old, value)
    replace_all_uses(old, value)
    graph.outputs[:] = []  # an input may be an output too
    place.outputs = {key: value if output is old else output for key, output in place.outputs.items()}
    place.inputs[name] = value
    graph.inputs.remove(old)
    graph.initializers.pop(old.name or "", None)


def _move(model: ir.Model, host: ir.Model) -> None:
    """Take everything out of the graph of ``model`` and put it at the end of that of ``host``."""
    graph, target = model.graph, host.graph
    graph.outputs.clear()
    inputs, initializers, nodes = list(graph.inputs), list(graph.initializers.values()), list(graph)
    graph.inputs.clear()
    graph.initializers.clear()
    graph.remove(nodes)
    target.inputs.extend(inputs)
    for value in initializers:
        target.initializers[value.name or ""] = value
    target.extend(nodes)
