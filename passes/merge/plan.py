"""What all merges share: members by name, how they are wired, the graph that joins them, and the proof that it does.

A merge says what it wants as a ``Plan``. ``plan.join()`` makes the graph; ``plan.separately(runner)`` runs the members
one by one, as its users would without the merge. A pass combines the members' outputs in the graph by operators, in
``reference`` by numpy, and the check compares the two:

    def run(self, model, ctx):
        plan = self.plan(model, ctx)
        joined = plan.join()
        tidy(joined, ctx)                                     # equal weights and branches once
        joined.show([("y", mean of joined.members[i].outputs["y"])])
        settle(model, plan, joined, ctx)                      # model becomes it, the ledger tells

    def reference(self, before, ctx):
        return plan.reference(ctx.runner, combine)            # combine(outputs of each member) -> outputs of the merge
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import onnx_ir as ir

from ...ir.address import printable
from ...ir.collapse import collapse
from ...ir.cut import sweep
from ...ir.edit import become
from ...ir.errors import PenjingError, UsageError, nearest
from ...ir.join import Joined, Member, Source, join
from ...ir.lift import lift_twins
from ...ir.unify import Symbols
from ...ir.verify import verify
from ..base import Context, Feeds, Level, Outputs, Runner
from ..pipeline import Pipeline

_CONSTANTS = 4  # the first IR version in which a weight need not be an input
_LISTED = "penjing.listed"  # where a copy has the number of its weights that were inputs

FIRST = "model"  # what the model that a merge begins with is called among its members

Each = Sequence[Outputs]  # the outputs of each member, by the names that they have there


@dataclass
class Plan:
    """Members in the order in which they run, and for each which of its inputs read what of those before it.

    ``said`` and ``left`` are for the ledger: what was done and what was left alone, each with its subject.
    ``adapters`` are members that stand between others, and ``words`` say, by their places, what they do. ``symbols``
    know which dimensions are one by what is wired so far. ``opset`` is the least that what joins them needs.
    """

    members: list[Member]
    wires: list[dict[str, Source]] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    adapters: list[Member] = field(default_factory=list)
    words: dict[int, str] = field(default_factory=dict)
    symbols: Symbols = field(default_factory=Symbols)
    opset: int = 0

    def __post_init__(self) -> None:
        self.wires += [{} for _ in self.members[len(self.wires) :]]

    def join(self) -> Joined:
        """The members in one graph, with the outputs of all. Raises ``UsageError`` where they do not fit."""
        return join(self.members, self.wires, self.opset)

    def separately(
        self, runner: Runner, joined: Joined | None = None, level: Level | None = None
    ) -> Callable[[Feeds], Iterator[list[Outputs]]]:
        """A function from feeds, by the names of the joined graph's inputs, to the outputs of each member run alone.

        A feed may hold more than what is read. ``level`` is the runner's default where it is not given. One session is
        opened for each distinct model, when the walk begins.
        """
        inputs = [[value.name or "" for value in member.model.graph.inputs] for member in self.members]
        # Inputs keep names and values through what is tidied later, so a graph joined anew tells what they are called.
        places = (joined or self.join()).members
        called = [
            {name: place.inputs[name].name or "" for name in own} for own, place in zip(inputs, places, strict=True)
        ]

        def walk(feeds: Feeds) -> Iterator[list[Outputs]]:
            opened: dict[int, Callable[[Mapping[str, Any]], Outputs]] = {}
            for member in self.members:
                if id(member.model) not in opened:
                    opened[id(member.model)] = _caller(runner, member, level)
            for feed in feeds:
                given: list[dict[str, Any]] = []
                found: list[Outputs] = []
                for member, own, names, reads in zip(self.members, inputs, called, self.wires, strict=True):
                    given.append({})
                    for name in own:
                        if (source := reads.get(name)) is not None:
                            outputs = found[source.member]
                            held = outputs if source.value in outputs else given[source.member]
                            if source.value in held:
                                given[-1][name] = held[source.value]
                        elif names[name] in feed:
                            given[-1][name] = feed[names[name]]
                    found.append(opened[id(member.model)](given[-1]))
                yield found

        return walk

    def reference(
        self, runner: Runner, combine: Callable[[Each], Outputs], joined: Joined | None = None
    ) -> Callable[[Feeds], Iterator[Outputs]]:
        """What a merge that combines its members' outputs by ``combine`` has to compute.

        ``joined`` tells what the inputs are called, where a pass renamed some after ``join``.
        """
        walk = self.separately(runner, joined)
        return lambda feeds: map(combine, walk(feeds))


def _caller(runner: Runner, member: Member, level: Level | None) -> Callable[[Mapping[str, Any]], Outputs]:
    """A function that runs one feed, in one session for all calls. Raises ``UsageError`` where the member fails."""
    waiting: list[Mapping[str, Any]] = []

    def feeds() -> Iterator[Mapping[str, Any]]:
        while True:
            yield waiting.pop()

    def refuse(error: PenjingError) -> NoReturn:
        raise UsageError(f"{member}, run by itself, does not take what it is fed: {error}") from error

    try:
        kind = {} if level is None else {"level": level}
        found = runner.run(member.model, feeds(), **kind)
    except PenjingError as error:
        refuse(error)

    def call(feed: Mapping[str, Any]) -> Outputs:
        waiting.append(feed)
        try:
            return next(found)
        except PenjingError as error:
            refuse(error)

    return call


def members(model: ir.Model, names: Sequence[str], ctx: Context, step: str, *, whole: bool = False) -> list[Member]:
    """The model itself, called ``model``, and the partners ``names``. One named again is ``name-2``.

    Of IR version 3, which lists each weight as an input, they are copies without these inputs, unless ``whole``.

    Raises ``UsageError`` where no partner is named, or none has that name; ``InvalidModel`` for a broken one.
    """
    if not names:
        raise UsageError(f"{step} merges the model with others; name them: {step}{{with=(b, c)}} --with b=MODEL ...")
    partners = ctx.models
    found = [Member(FIRST, model)]
    for name in names:
        if name not in partners:
            given = ", ".join(map(printable, partners))
            raise UsageError(
                f"{step}: no partner is called '{printable(name)}'.{nearest(name, partners)} Given: {given}."
            )
        if all(partners[name] is not member.model for member in found):
            verify(partners[name], f"The partner '{printable(name)}'")
        taken = {member.name for member in found}
        fresh = next(new for number in range(1, len(names) + 3) if (new := _numbered(name, number)) not in taken)
        found.append(Member(fresh, partners[name]))
    if whole:
        return found
    closed = {id(member.model): _closed(member.model) for member in found}
    return [Member(member.name, closed[id(member.model)]) for member in found]


def _closed(model: ir.Model) -> ir.Model:
    """A model of IR version 3 as a copy whose weights are no inputs; ONNX Runtime lets nobody set them there, but
    does so, and cannot compute ahead with them, where they are inputs in a newer version. Any other model itself."""
    listed = [value for value in model.graph.inputs if value.is_initializer()]
    if model.ir_version >= _CONSTANTS or not listed:
        return model
    made = model.clone()
    made.meta.update(model.meta)
    made.meta[_LISTED] = len(listed)
    kept = [value for value in made.graph.inputs if not value.is_initializer()]
    made.graph.inputs.clear()
    made.graph.inputs.extend(kept)
    made.ir_version = _CONSTANTS
    return made


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def tidy(joined: Joined, ctx: Context) -> None:
    """Hold equal constants once, and compute equal branches once; ``joined.members`` follow. Before ``show``."""
    lift_twins(joined.model)
    for step in Pipeline.of("merge-duplicates").run(joined.model, ctx):
        count = len(step.ledger.changes)
        if count:
            size = sum(change.numbers.get("bytes", 0) for change in step.ledger.changes)
            ctx.change("constants", f"{_counted(count, 'constant')} held once with an equal one", bytes=size)
        for reason, number in step.ledger.reasons().items():
            ctx.skip("constants", f"{_counted(number, 'constant')}: {reason}")
    for place in joined.members:
        place.nodes = [node for node in place.nodes if node.graph is not None]
    before = [len(place.nodes) for place in joined.members]
    moved = collapse(joined.model, [place.nodes for place in joined.members])
    for place, count in zip(joined.members, before, strict=True):
        place.outputs = {name: moved.get(value, value) for name, value in place.outputs.items()}
        place.nodes = [node for node in place.nodes if node.graph is not None]
        if len(place.nodes) < count:
            left = "all of it is" if not place.nodes else f"{_counted(count - len(place.nodes), 'node')} of {count} are"
            ctx.change(place.name, f"{left} computed once with an equal branch before it")


def settle(model: ir.Model, plan: Plan, joined: Joined, ctx: Context) -> None:
    """Let ``model`` become the joined one, without what nothing uses, and write down what was done on the way."""
    between = {member.name for member in plan.adapters}
    for name, sentence in plan.said + [note for note in joined.notes if note[0] not in between]:
        ctx.change(name, sentence)
    for name, sentence in plan.left:
        ctx.skip(name, sentence)
    for place in joined.members[1:]:
        if open_ := [value for value in place.constants.values() if value.is_graph_input()]:
            ctx.skip(place.name, f"{_counted(len(open_), 'weight')} held apart, being inputs that a caller may set")
    gone = str(sweep(joined.model))
    if gone:
        ctx.change("main graph", f"removed, for no output needs them: {gone}")
    become(model, joined.model)


def same_models(found: Sequence[Member]) -> list[tuple[str, str]]:
    """Which members are one model, and whose weights were inputs, for the ledger."""
    said = []
    for place, member in enumerate(found):
        path = member.model.meta.get("penjing.path")
        for other in found[:place]:
            if other.model is member.model or (path is not None and other.model.meta.get("penjing.path") == path):
                said.append((member.name, f"the same model as {other}"))
                break
        if count := member.model.meta.get(_LISTED):
            words = "weight is no input" if count == 1 else "weights are no inputs"
            said.append((member.name, f"its {count:,} {words} any more; IR version 3 had to list them"))
    return said


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
