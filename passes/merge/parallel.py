"""Models side by side in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ...ir.address import printable
from ...ir.errors import UsageError
from ...ir.join import Joined, Member, Source
from ...ir.shapes import dims
from ...ir.unify import described, unlike_types
from ..base import Context, Effect, Feeds, Outputs, Pass, register
from ..selection import NOTHING, Selection
from .inputs import Inputs, share_inputs
from .plan import Each, Plan, members, same_models, settle, tidy
from .ties import tie_layers


@register("merge-parallel")
class MergeParallel(Pass):
    """Put models side by side in one.

    ``with`` names the partners; the outputs of all are outputs. Inputs of one name, type and shape are one
    (``inputs=auto``); ``share`` makes every input of the others one of the first model's, by name, else by place, and
    refuses what does not fit; ``separate`` keeps all apart. Equal weights are held once, and what computes the same
    from shared inputs is computed once.

    Names that an earlier model has get the partner's name in front, ``b/logits``; ``prefix`` gives one for each model:
    of outputs that collide the first model's get theirs too, while its inputs keep their names. ``outputs=concat``
    concatenates the outputs that stand at one place along ``axis``. ``share`` selects weights of the first model by
    name: those of equal name, type and shape in the branches become one, their mean, which is no longer exact.
    """

    with_: tuple[str, ...] = ()
    inputs: Inputs = "auto"
    outputs: Literal["separate", "concat"] = "separate"
    axis: int = -1
    prefix: tuple[str, ...] = ()
    share: Selection = NOTHING

    def validate(self) -> None:
        if len(set(self.prefix)) != len(self.prefix) or "" in self.prefix:
            raise UsageError("merge-parallel: the prefixes must differ, and none may be empty.")
        if self.axis != -1 and self.outputs == "separate":
            raise UsageError("merge-parallel: axis is for outputs=concat; add that, or leave axis out.")

    def effect(self) -> Effect:
        return Effect.LOSSY if self.share else Effect.SAME

    def run(self, model: ir.Model, ctx: Context) -> None:
        plan = self._plan(model, ctx)
        joined = plan.join()
        if self.share:
            tie_layers(joined, plan.members, self.share, ctx)
        tidy(joined, ctx)
        self._show(plan, joined)
        for place in joined.members:
            plan.said.append((place.name, "joined side by side"))
        settle(model, plan, joined, ctx)

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]]:
        """The outputs of the models run one by one, concatenated by numpy where that was asked for."""
        plan = self._plan(before, ctx)
        joined = plan.join()
        shown = self._show(plan, joined)

        def combine(each: Each) -> dict[str, Any]:
            found = {name: [each[source.member][source.value] for source in parts] for name, parts in shown}
            return {
                name: parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.axis)
                for name, parts in found.items()
            }

        return plan.reference(ctx.runner, combine, joined)

    def _plan(self, model: ir.Model, ctx: Context) -> Plan:
        found = members(model, self.with_, ctx, self.name)
        said = same_models(found)
        if self.prefix and len(self.prefix) != len(self.with_) + 1:
            raise UsageError(
                f"merge-parallel: {len(self.with_) + 1} models take as many prefixes, and {len(self.prefix)} are given."
            )
        if self.prefix:
            found = [Member(name, member.model) for name, member in zip(self.prefix, found, strict=True)]
        plan = Plan(found, said=said)
        share_inputs(plan, self.inputs)
        return plan

    def _show(self, plan: Plan, joined: Joined) -> list[tuple[str, list[Source]]]:
        """Choose the outputs; -> the name of each, and the outputs of the members that are in it."""
        own = [[value.name or "" for value in member.model.graph.outputs] for member in plan.members]
        if self.outputs == "concat":
            chosen = self._concatenated(plan, joined, own)
        else:
            chosen = [
                Shown(name, [Source(number, name)], joined.members[number].outputs[name])
                for number, names in enumerate(own)
                for name in names
            ]
        count = [one.name for one in chosen]
        for one in chosen:
            if count.count(one.name) > 1 and (one.sources[0].member or self.prefix):
                one.wanted = f"{plan.members[one.sources[0].member].name}/{one.name}"
        joined.show([(one.wanted or one.name, one.value) for one in chosen])
        return [(value.name or "", one.sources) for value, one in zip(joined.model.graph.outputs, chosen, strict=True)]

    def _concatenated(self, plan: Plan, joined: Joined, own: list[list[str]]) -> list[Shown]:
        if len({len(names) for names in own}) > 1:
            counts = ", ".join(f"{member} {len(names)}" for member, names in zip(plan.members, own, strict=True))
            raise UsageError(
                f"merge-parallel: outputs=concat needs equally many outputs, and there are unlike numbers: {counts}."
            )
        found = []
        for names in zip(*own, strict=True):
            sources = [Source(number, name) for number, name in enumerate(names)]
            found.append(Shown(names[0], sources, self._concat(plan, joined, sources)))
        return found

    def _concat(self, plan: Plan, joined: Joined, sources: list[Source]) -> ir.Value:
        values = [joined.value(source) for source in sources]
        first = values[0]
        known = [dims(value) for value in values]
        axis = self.axis
        for value, shape, source in zip(values, known, sources, strict=True):
            where = f"the output '{printable(source.value)}' of {plan.members[source.member]} is {described(value)}"
            if shape is None or not isinstance(value.type, ir.TensorType):
                raise UsageError(f"merge-parallel: outputs=concat needs tensors of known rank, and {where}.")
            if not -len(shape) <= axis < len(shape):
                raise UsageError(f"merge-parallel: there is no axis {axis} to concatenate along: {where}.")
            sizes = zip(shape, known[0] or (), strict=False)
            unlike = any(
                isinstance(one, int) and isinstance(two, int) and one != two
                for place, (one, two) in enumerate(sizes)
                if place != axis % len(shape)
            )
            if unlike or len(shape) != len(known[0] or ()) or unlike_types(first.type, value.type):
                raise UsageError(
                    f"merge-parallel: outputs cannot be concatenated along axis {axis}: that of {plan.members[0]} is "
                    f"{described(first)}, and {where}."
                )
        rank = len(known[0] or ())
        along = [shape[axis] for shape in known if shape is not None]
        made = list(known[0] or ())
        sizes_along = [size for size in along if isinstance(size, int)]
        made[axis] = sum(sizes_along) if len(sizes_along) == len(along) else None
        node = ir.node("Concat", values, {"axis": axis % rank})
        node.outputs[0].type, node.outputs[0].shape = first.type, ir.Shape(made)
        return joined.append(node)


@dataclass
class Shown:
    """An output of the merge: its name in the member, what is in it, and the name it gets if another one."""

    name: str
    sources: list[Source]
    value: ir.Value
    wanted: str = ""
