"""Which inputs of joined models are one."""

from __future__ import annotations

from typing import Literal

from ...ir.address import printable
from ...ir.errors import UsageError
from ...ir.join import Source, fit
from .plan import Plan

Inputs = Literal["auto", "share", "separate"]


def share_inputs(plan: Plan, mode: Inputs) -> None:
    """Wire the inputs of members that read nothing yet to equal ones of members before them.

    ``auto``: those of equal name, type and shape. ``share``: each one, by name, else by its place among the inputs of
    the first model; raises ``UsageError`` for one that finds none, or does not fit. ``separate``: none. Inputs with
    defaults stay apart.
    """
    for number, (member, reads) in enumerate(zip(plan.members, plan.wires, strict=True)):
        own = [value for value in member.model.graph.inputs if value.name not in reads]
        for place, value in enumerate(own if number else ()):
            name = value.name or ""
            source = _namesake(plan, number, name)
            if mode == "separate":
                if source is not None:
                    plan.left.append((f"{member}/{printable(name)}", "input kept apart by request"))
                continue
            if value.const_value is not None:
                if source is not None:
                    plan.left.append((f"{member}/{printable(name)}", "input kept apart, for it has a default"))
                continue
            if source is None and mode == "share":
                source = _by_place(plan, number, name, place)
            if source is None:
                continue
            try:
                fit(plan.members, number, name, source, plan.symbols)
            except UsageError as error:
                if mode == "share":
                    raise
                plan.left.append((f"{member}/{printable(name)}", f"input kept apart: {error}"))
                continue
            reads[name] = source
            giver = plan.members[source.member]
            plan.said.append(
                (f"{member}/{printable(name)}", f"input shared with '{printable(source.value)}' of {giver}")
            )


def _namesake(plan: Plan, number: int, name: str) -> Source | None:
    """The input of that name of the earliest member that has one, and is given it from outside."""
    for place, (member, reads) in enumerate(zip(plan.members[:number], plan.wires, strict=False)):
        if name not in reads and any(
            value.name == name and value.const_value is None for value in member.model.graph.inputs
        ):
            return Source(place, name)
    return None


def _by_place(plan: Plan, number: int, name: str, place: int) -> Source:
    first = [value for value in plan.members[0].model.graph.inputs if value.const_value is None]
    if place >= len(first):
        raise UsageError(
            f"The input '{printable(name)}' of {plan.members[number]} cannot be shared: {plan.members[0]} has no input "
            f"of that name, and only {len(first)}; keep inputs separate."
        )
    return Source(0, first[place].name or "")
