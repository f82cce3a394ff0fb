"""A part of a model: from some of its values to others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from ...ir.cut import cut
from ...ir.edit import become
from ...ir.errors import UsageError
from ..base import Context, Feeds, Outputs, Pass, register


@register("extract")
class Extract(Pass):
    """Cut a part out of the model: a backbone, a head.

    What computes ``outputs`` from ``inputs`` stays. Both are names of values of the main graph; where one of the two is
    not given, it is that of the model. A value in the middle that is named among the inputs becomes an input of its
    type and shape; bodies that captured it read that. Inputs, nodes, constants and functions that the outputs do not
    need go. The check runs the whole model, and compares its values with what the part makes of them.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def validate(self) -> None:
        if not self.inputs and not self.outputs:
            raise UsageError("extract needs inputs=..., outputs=... or both: the names of the values to cut at.")

    def run(self, model: ir.Model, ctx: Context) -> None:
        work = model.clone()  # a name that is not there leaves the model as it was
        work.meta.update(model.meta)
        nodes = len(work.graph)
        done = cut(work, self.inputs or None, self.outputs or None, place="extract")
        inside = len(work.graph)
        for name in done.inputs:
            ctx.change(name, "removed from the inputs, for the outputs do not need it")
        if gone := str(done):
            ctx.change("main graph", f"cut out {inside} of its {nodes} nodes; removed: {gone}")
        elif not done.inputs and _interface(work) != _interface(model):
            ctx.change("main graph", "other inputs and outputs chosen, all nodes kept")
        elif not done.inputs:
            ctx.skip("main graph", "the part asked for is all of it")
        become(model, work)

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]]:
        """The values of the whole model, on feeds for it."""
        names = list(self.outputs) or [value.name or "" for value in before.graph.outputs]
        part = before.clone()
        cut(part, self.inputs or None, self.outputs or None, place="extract")
        shown = [value.name or "" for value in part.graph.outputs]

        def expected(feeds: Feeds) -> Iterator[Outputs]:
            known = {value.name for value in before.graph.inputs}
            asked = [name for name in dict.fromkeys(names) if name not in known]
            kept: list[dict[str, Any]] = []

            def walk() -> Iterator[dict[str, Any]]:
                for feed in feeds:
                    kept.append(dict(feed))
                    yield {name: array for name, array in feed.items() if name in known}

            for found in ctx.runner.run(before, walk(), asked):
                values = {**kept.pop(), **found}
                yield {new: values[name] for new, name in zip(shown, names, strict=True)}

        return expected


def _interface(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs]
