"""Where models in a row meet: which output feeds which input, and what stands between where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ...ir.address import printable
from ...ir.cut import cut
from ...ir.errors import UsageError, nearest
from ...ir.join import Member, Source, fit, interface
from ...ir.scopes import scopes, values
from ...ir.shapes import dims, inferred
from ...ir.unify import Symbols, described
from ..base import Array, Context
from .adapters import Adapter, adapter
from .plan import Plan
from .stitch import least_squares, linear_model, require_stitchable

_Joint = tuple[int, str, int, str]  # the number of a model and a value of it, the number of a later one and its input


class Chain:
    """A plan of models in a row, made joint by joint."""

    def __init__(
        self, found: Sequence[Member], mapped: Sequence[str], adapt: Sequence[Adapter], ctx: Context, step: str
    ) -> None:
        self.models, self.adapt, self.ctx, self.step = list(found), adapt, ctx, step
        self.whole = list(found)  # before anything was cut off
        self.entered: set[tuple[int, str]] = set()  # inputs that were values in the middle
        self.mapped = [self._mapped(text) for text in mapped]
        self._refuse_twice()
        self._cut()
        self.opset = max((scope.version for one in found for scope in scopes(one.model)), default=0)

    # What the user maps -----------------------------------------------------------------------------------------------

    def _mapped(self, text: str) -> _Joint:
        """The joint that ``OUTPUT=INPUT`` means; names may hold equals signs, so each may be the one between."""
        splits = [(text[:at], text[at + 1 :]) for at, mark in enumerate(text) if mark == "="]
        splits = [(left, right) for left, right in splits if left and right]
        if not splits:
            raise UsageError(f"{self.step}: map={printable(text)} must be OUTPUT=INPUT.")
        for left, right in splits:
            takers = self._holders(right, range(1, len(self.models)), inputs=True)
            if len(takers) > 1:
                listed = " or ".join(f"{self.models[number]}/{name}" for number, name in takers)
                raise UsageError(f"{self.step}: map={printable(text)} may mean {printable(listed)}; write which.")
            for number, name in takers:
                givers = self._holders(left, range(number - 1, -1, -1), inputs=False)
                if givers:
                    return *givers[0], number, name
        self._refuse_map(text, *splits[0])
        raise AssertionError

    def _holders(self, text: str, places: Sequence[int], *, inputs: bool) -> list[tuple[int, str]]:
        """The models that have a value of this name, and the name: as an input or output, else in the middle."""
        for inner in (False, True):
            found = []
            for number in places:
                member = self.models[number]
                names = [text, *([text[len(member.name) + 1 :]] if text.startswith(f"{member.name}/") else [])]
                ends = member.model.graph.inputs if inputs else member.model.graph.outputs
                known = {value.name for value in (values(member.model.graph) if inner else ends)}
                found += [(number, name) for name in names if name in known][:1]
            if found:
                return found
        return []

    def _refuse_map(self, text: str, left: str, right: str) -> None:
        takers = self._holders(right, range(1, len(self.models)), inputs=True)
        name, word = (left, "output") if takers else (right, "input")
        places = range(takers[0][0]) if takers else range(1, len(self.models))
        graphs = [self.models[number].model.graph for number in places]
        ends = [value.name or "" for graph in graphs for value in (graph.outputs if takers else graph.inputs)]
        known = [value.name or "" for graph in graphs for value in values(graph)]
        if takers and self._holders(left, range(len(self.models)), inputs=False):
            raise UsageError(
                f"{self.step}: map={printable(text)} goes backwards: '{printable(left)}' is not before "
                f"'{printable(right)}' in the row, and a cycle cannot run."
            )
        raise UsageError(
            f"{self.step}: map={printable(text)}: there is no {word} '{printable(name)}', nor a value of that name."
            f"{printable(nearest(name, known))} The {word}s are {', '.join(map(printable, dict.fromkeys(ends)))}."
        )

    def _refuse_twice(self) -> None:
        takers = [(number, name) for _, _, number, name in self.mapped]
        if twice := next((one for one in takers if takers.count(one) > 1), None):
            raise UsageError(
                f"{self.step}: map feeds '{printable(twice[1])}' of {self.models[twice[0]]} twice; feed it once."
            )

    def _cut(self) -> None:
        """Models that are left or entered in the middle, cut there; the whole ones stay in ``whole``."""
        for number, member in enumerate(self.models):
            names = interface(member.model)
            starts = [name for _, _, taker, name in self.mapped if taker == number]
            ends = [name for giver, name, _, _ in self.mapped if giver == number]
            inner = [name for name in starts if name not in (value.name for value in member.model.graph.inputs)]
            left = list(dict.fromkeys(name for name in ends if name not in names))
            if not inner and not left:
                continue
            self.entered |= {(number, name) for name in inner}
            part = member.model.clone()
            part.meta.update(member.model.meta)
            own = [value.name or "" for value in part.graph.inputs]
            outputs = [*(value.name or "" for value in part.graph.outputs), *left]
            place = f"{self.step}: {member}"
            if inner:
                cut(part, [*own, *inner], outputs, place=place)
                idle = [v.name for v in part.graph.inputs if not v.uses() and not v.is_graph_output()]
                cut(part, [v.name or "" for v in part.graph.inputs if v.name not in idle], None, place=place)
            else:
                cut(part, None, outputs, place=place)
            self.models[number] = Member(member.name, part)

    # The joints -------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The members with adapters between them. Raises ``UsageError`` for a joint that does not fit."""
        plan = Plan([], [])
        symbols = plan.symbols
        self.numbers: dict[int, int] = {}  # of a model, its place among the members
        for number, member in enumerate(self.models):
            reads: dict[str, Source] = {}
            for name, giver, given in self._joints(number):
                source = Source(self.numbers[giver], given)
                reads[name] = self._connect(plan, symbols, source, number, name)
                plan.said.append((f"{member}/{printable(name)}", self._told(plan, reads[name], source)))
            self.numbers[number] = len(plan.members)
            plan.members.append(member)
            plan.wires.append(reads)
            for name, source in reads.items():
                fit(plan.members, len(plan.members) - 1, name, source, symbols)
        if "linear" in self.adapt and not plan.adapters:
            raise UsageError(
                f"{self.step}: adapt=linear has nothing to fit to; let map lead to a value in the middle of a partner, "
                "whose first part then says what the values there should be."
            )
        return plan

    def _told(self, plan: Plan, source: Source, origin: Source) -> str:
        between = f", {plan.words[source.member]}" if source.member in plan.words else ""
        return f"reads '{printable(origin.value)}' of {plan.members[origin.member]}{between}"

    def _joints(self, number: int) -> Iterator[tuple[str, int, str]]:
        """For inputs of a model the number of an earlier one, and which value of it they read."""
        if not number:
            return
        inputs = list(self.models[number].model.graph.inputs)
        mapped = {name: (giver, given) for giver, given, taker, name in self.mapped if taker == number}
        found: dict[str, tuple[int, str]] = {}
        for value in inputs:
            name = value.name or ""
            if name in mapped:
                found[name] = mapped[name]
            elif (giver := self._namesake(number, name)) is not None:
                found[name] = giver, name
        if not found:
            given = [value.name or "" for value in self.models[number - 1].model.graph.outputs]
            required = [value.name or "" for value in inputs if value.const_value is None]
            found = {name: (number - 1, output) for name, output in zip(required, given, strict=False)}
        if not found:
            raise UsageError(
                f"{self.step}: {self.models[number]} has no input that {self.models[number - 1]} could feed."
            )
        yield from ((value.name or "", *found[value.name or ""]) for value in inputs if value.name in found)

    def _namesake(self, number: int, name: str) -> int | None:
        """The nearest model before that has an output of that name."""
        for place in range(number - 1, -1, -1):
            outputs = self.models[place].model.graph.outputs
            if any(value.name == name and not value.is_graph_input() for value in outputs):
                return place
        return None

    def _connect(self, plan: Plan, symbols: Symbols, source: Source, number: int, name: str) -> Source:
        """The source itself, or that behind an adapter."""
        taker = self.models[number]
        given, taken = (
            interface(plan.members[source.member].model)[source.value],
            interface(taker.model, inputs_first=True)[name],
        )
        known = _known(plan.members[source.member].model, given)
        linear = "linear" in self.adapt and (number, name) in self.entered
        trial = [*plan.members, taker]
        if not linear:
            try:
                fit(trial, len(plan.members), name, source, Symbols(), known)
            except UsageError:
                made = adapter(known, taken, self.adapt, max(self.opset, 7))
                if made is None:
                    raise self._misfit(trial, name, source, known) from None
                return self._insert(plan, symbols, source, *made)
            return source
        model, words = self._stitched(plan, source, known, number, name, taken)
        return self._insert(plan, symbols, source, model, words)

    def _misfit(self, trial: Sequence[Member], name: str, source: Source, known: ir.Value) -> UsageError:
        try:
            fit(trial, len(trial) - 1, name, source, Symbols(), known)
        except UsageError as error:
            hint = "Map other values with map=OUTPUT=INPUT, or allow an adapter with adapt=cast, reshape or transpose."
            if self.adapt:
                hint = f"No adapter of adapt=({', '.join(self.adapt)}) makes one of the other."
            return UsageError(f"{error} {hint}")
        raise AssertionError

    def _insert(self, plan: Plan, symbols: Symbols, source: Source, model: ir.Model, words: str) -> Source:
        count = len(plan.adapters) + 1
        member = Member("adapter" if count == 1 else f"adapter-{count}", model)
        plan.members.append(member)
        plan.wires.append({"x": source})
        plan.adapters.append(member)
        place = len(plan.members) - 1
        plan.words[place] = words
        fit(plan.members, place, "x", source, symbols)
        return Source(place, "y")

    # Stitching --------------------------------------------------------------------------------------------------------

    def _stitched(
        self, plan: Plan, source: Source, given: ir.Value, number: int, name: str, taken: ir.Value
    ) -> tuple[ir.Model, str]:
        """A linear layer from ``source`` to what the whole model ``number`` computes at ``name``."""
        joint = (
            f"{self.step}: '{printable(source.value)}' ({described(given)}) to '{printable(name)}' ({described(taken)})"
        )
        shape = require_stitchable((dims(given), dims(taken)), (given.dtype, taken.dtype), joint)
        first = self.whole[number].model.clone()
        cut(first, None, [name], place=f"{self.step}: {self.whole[number]}")
        target = first.graph.outputs[0].name or ""
        fitted = least_squares(self._pairs(plan, source, first, target, self.whole[number]))
        if fitted.samples < fitted.weight.shape[1] + 1:
            self.ctx.warn(
                f"The linear adapter has {fitted.weight.shape[1]} inputs and was fitted on {fitted.samples} samples, "
                "which determine it not at all; give more with --fit."
            )
        words = (
            f"through a linear layer fitted on {fitted.samples:,} samples, leaving {fitted.error:.3f} of their spread"
        )
        return linear_model(fitted, shape, max(self.opset, 7)), words

    def _pairs(
        self, plan: Plan, source: Source, first: ir.Model, target: str, member: Member
    ) -> Iterator[tuple[Array, Array]]:
        """Features and targets on the user's data, at the runtime's full optimization in any case."""
        runner, data = self.ctx.runner, self.ctx.data
        wanted = [value.name or "" for value in first.graph.inputs if value.const_value is None]
        names = [value.name or "" for value in self.models[0].model.graph.inputs if value.const_value is None]

        def own(feed: Mapping[str, Any]) -> dict[str, Any]:
            if all(name in feed for name in wanted):
                return {name: feed[name] for name in wanted}
            if len(wanted) > len(names):
                raise UsageError(
                    f"{self.step}: {member} takes {', '.join(map(printable, wanted))} and the data are for "
                    f"{', '.join(map(printable, names))}; the linear adapter is fitted to what both see."
                )
            return {name: feed[other] for name, other in zip(wanted, names, strict=False)}

        features = plan.separately(runner, level="all")(data)
        targets = runner.run(first, map(own, data), [target], level="all")
        for found, seen in zip(features, targets, strict=True):
            yield found[source.member][source.value], seen[target]


def _known(model: ir.Model, value: ir.Value) -> ir.Value:
    """An output with what inference tells of it where the file does not, so that a misfit is seen before any run."""
    declared = dims(value)
    if value.type is not None and declared is not None and None not in declared:
        return value
    try:
        found = inferred(model).get(value)
    except Exception:  # inference refuses some models that are valid
        return value
    if found is None:
        return value
    kind, more = value.type or found.type, found.dims
    if declared is not None and more is not None and len(declared) == len(more):
        more = tuple(two if one is None else one for one, two in zip(declared, more, strict=True))
    shape = declared if more is None else more
    return ir.Value(name=value.name, type=kind, shape=None if shape is None else ir.Shape(shape))
