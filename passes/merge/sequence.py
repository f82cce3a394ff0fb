"""Models in a row: what one computes, the next one reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from ...ir.address import printable
from ...ir.join import Source
from ..base import Context, Feeds, Outputs, Pass, register
from .adapters import Adapter
from .inputs import Inputs, share_inputs
from .joints import Chain
from .plan import Each, Plan, members, same_models, settle, tidy


@register("merge-sequence")
class MergeSequence(Pass):
    """Put models in a row: outputs of each feed inputs of the next.

    ``with`` names those after the first, in order. An input reads the output that ``map`` says (``'y=x'``, or
    ``'b/y=c/x'`` with the partners' names), else the output of its name, of the nearest model before; where neither
    finds any, the outputs of the model before feed the inputs in their order. Each joint is checked for type, rank and
    sizes. Inputs that read nothing stay inputs, one for those of equal name, type and shape (``inputs``, as in
    ``merge-parallel``). The outputs are those of the last model, with ``keep-outputs`` those of the others too, after
    them.

    A ``map`` may also name values in the middle of a model: the chain leaves the one there, or enters the other there,
    and what is not needed is cut off. So the backbone of one carries the head of another.

    ``adapt`` allows adapters where a joint does not fit: ``cast``, ``transpose``, ``reshape``. ``linear`` puts a linear
    layer (Gemm, or a 1x1 Conv) before each value in the middle of a model that is fed, fitted by least squares on the
    data to what that model computes there by itself, with its inputs fed by name, else in the first model's order.
    """

    with_: tuple[str, ...] = ()
    map: tuple[str, ...] = ()
    inputs: Inputs = "auto"
    keep_outputs: bool = False
    adapt: tuple[Adapter, ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> None:
        plan = self._plan(model, ctx)
        joined = plan.join()
        tidy(joined, ctx)
        shown = self._outputs(plan)
        joined.show([(name, joined.value(source)) for name, source in shown])
        settle(model, plan, joined, ctx)

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]]:
        """The models run one by one, the arrays of each handed to the next."""
        plan = self._plan(before, ctx)
        joined = plan.join()
        wanted = self._outputs(plan)
        joined.show([(name, joined.value(source)) for name, source in wanted])
        shown = [value.name or "" for value in joined.model.graph.outputs]

        def combine(each: Each) -> Outputs:
            return {name: each[source.member][source.value] for name, (_, source) in zip(shown, wanted, strict=True)}

        return plan.reference(ctx.runner, combine, joined)

    def _plan(self, model: ir.Model, ctx: Context) -> Plan:
        found = members(model, self.with_, ctx, self.name)
        chain = Chain(found, self.map, self.adapt, ctx, self.name)
        plan = chain.plan()
        share_inputs(plan, self.inputs)
        plan.said[:0] = same_models(found)
        return plan

    def _outputs(self, plan: Plan) -> list[tuple[str, Source]]:
        """Those of the last model, then those of the others, or of these a line in the ledger."""
        last = len(plan.members) - 1
        found = [(value.name or "", Source(last, value.name or "")) for value in plan.members[last].model.graph.outputs]
        read = {source for reads in plan.wires for source in reads.values()}
        taken = {name for name, _ in found}
        for number, member in enumerate(plan.members[:last]):
            if member in plan.adapters:
                continue
            for name in (value.name or "" for value in member.model.graph.outputs):
                source = Source(number, name)
                if self.keep_outputs:
                    wanted = name if name not in taken else f"{member.name}/{name}"
                    found.append((wanted, source))
                    taken.add(wanted)
                elif source not in read:
                    plan.left.append((f"{member}/{printable(name)}", "output left out; keep-outputs keeps it"))
        return found
