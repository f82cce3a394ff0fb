"""Members that all read what the first one reads, under whatever names and in whatever layouts they take it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ...ir.address import printable
from ...ir.errors import UsageError, nearest
from ...ir.join import Member, Source, fit, interface
from ...ir.scopes import scopes
from ...ir.unify import Symbols
from .adapters import Adapter, adapter
from .plan import Plan, same_models


def feed_alike(
    found: Sequence[Member], mapped: Sequence[str], adapt: Sequence[Adapter], step: str
) -> tuple[Plan, list[int]]:
    """A plan in which each input of a later member reads one of the first, and the places of the members in it.

    ``mapped`` are ``FIRST=MEMBER/INPUT``; what they do not tell goes by name, else by place. ``adapt`` allows adapters
    in between. Raises ``UsageError`` for an input that finds nothing, or does not fit.
    """
    pairs = [_pair(text, found, step) for text in mapped]
    if twice := next((taker for _, taker in pairs if [one for _, one in pairs].count(taker) > 1), None):
        raise UsageError(f"{step}: map feeds '{printable(twice[1])}' of {found[twice[0]]} twice; feed it once.")
    given = {taker: name for name, taker in pairs}
    plan = Plan([found[0]], said=same_models(found))
    places = [0]
    opset = max((scope.version for one in found for scope in scopes(one.model)), default=0)
    own = _required(found[0])
    for number, member in enumerate(found[1:], 1):
        reads: dict[str, Source] = {}
        required = _required(member)
        for place, name in enumerate(required):
            wanted = given.get((number, name)) or (name if name in own else None)
            if wanted is None:
                if place >= len(own):
                    raise UsageError(
                        f"{step}: {found[0]} has no input for '{printable(name)}' of {member}; say which one feeds it "
                        f"with map='INPUT={printable(member.name)}/{printable(name)}'."
                    )
                wanted = own[place]
            reads[name] = _connected(plan, Source(0, wanted), member, name, adapt, max(opset, 7))
            plan.said.append((f"{member}/{printable(name)}", _told(plan, reads[name], wanted)))
        plan.members.append(member)
        plan.wires.append(reads)
        places.append(len(plan.members) - 1)
        for name, source in reads.items():
            fit(plan.members, places[-1], name, source, plan.symbols)
    return plan, places


def absorbed(plan: Plan, place: int) -> Plan:
    """The plan of two with the adapters before the second, at ``place``, made a part of it."""
    first, second = plan.members[0], plan.members[place]
    if len(plan.members) == 2:
        return plan
    wires = [
        {name: Source(one.member - 1, one.value) for name, one in reads.items() if one.member}
        for reads in plan.wires[1:]
    ]
    joined = Plan(plan.members[1:], wires).join()
    last = joined.members[place - 1]
    joined.show(list(last.outputs.items()))
    reads = {
        one.inputs[name].name or "": source
        for one, own in zip(joined.members, plan.wires[1:], strict=True)
        for name, source in own.items()
        if not source.member
    }
    made = Plan([first, Member(second.name, joined.model)], [{}, reads], plan.said, plan.left)
    made.said += [note for note in joined.notes if note[0] == second.name]
    for name, source in reads.items():
        fit(made.members, 1, name, source, made.symbols)
    return made


def _required(member: Member) -> list[str]:
    return [value.name or "" for value in member.model.graph.inputs if value.const_value is None]


def _pair(text: str, found: Sequence[Member], step: str) -> tuple[str, tuple[int, str]]:
    """The input of the first member and the number and input of another that ``FIRST=MEMBER/INPUT`` means."""
    own = [value.name or "" for value in found[0].model.graph.inputs]
    takers = {
        f"{member.name}/{value.name}": (number, value.name or "")
        for number, member in enumerate(found)
        if number
        for value in member.model.graph.inputs
    }
    splits = [(text[:at], text[at + 1 :]) for at, mark in enumerate(text) if mark == "="]
    for left, right in splits:
        if left in own and right in takers:
            return left, takers[right]
    if not splits:
        raise UsageError(f"{step}: map={printable(text)} must be INPUT=MEMBER/INPUT.")
    left, right = splits[0]
    name, known = (right, list(takers)) if left in own else (left, own)
    raise UsageError(
        f"{step}: map={printable(text)}: there is no input '{printable(name)}'.{printable(nearest(name, known))} "
        f"The inputs are {', '.join(map(printable, known))}."
    )


def _connected(plan: Plan, source: Source, member: Member, name: str, adapt: Sequence[Adapter], opset: int) -> Source:
    """The source itself, or that behind an adapter. Raises ``UsageError`` where neither fits."""
    trial = [*plan.members, member]
    try:
        fit(trial, len(trial) - 1, name, source, Symbols())
    except UsageError as error:
        given, taken = (
            interface(plan.members[0].model, inputs_first=True)[source.value],
            interface(member.model, inputs_first=True)[name],
        )
        made = adapter(ir.Value(name=given.name, type=given.type, shape=given.shape), taken, adapt, opset)
        if made is None:
            hint = "An adapter may stand between with adapt=cast, transpose or reshape."
            if adapt:
                hint = f"No adapter of adapt=({', '.join(adapt)}) makes one of the other."
            raise UsageError(f"{error} {hint}") from None
        model, words = made
        count = len(plan.adapters) + 1
        between = Member("adapter" if count == 1 else f"adapter-{count}", model)
        plan.members.append(between)
        plan.wires.append({"x": source})
        plan.adapters.append(between)
        place = len(plan.members) - 1
        plan.words[place] = words
        fit(plan.members, place, "x", source, plan.symbols)
        return Source(place, "y")
    return source


def _told(plan: Plan, source: Source, origin: str) -> str:
    between = f", {plan.words[source.member]}" if source.member in plan.words else ""
    return f"reads the input '{printable(origin)}' of {plan.members[0]}{between}"
