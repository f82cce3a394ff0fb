"""Several models as one that gives what they say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.address import printable
from ...ir.errors import BadFeeds, UsageError, nearest
from ...ir.join import Joined
from ...ir.shapes import dims
from ...ir.unify import Misfit, described, dtype_name
from ..base import Array, Context, Effect, Feeds, Outputs, Pass, register
from .adapters import Adapter
from .algebra import Numbers, Operators
from .classifiers import Classifier, Labels, classifier, gives_probabilities, order
from .combine import PER_CLASS, Combination, How
from .feeding import feed_alike
from .fits import Solver, linear_layer, on_simplex
from .plan import Each, Plan, members, settle, tidy
from .samples import labelled

_KINDS = ("logits", "probabilities")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_NEEDED = 7  # the first opset with broadcasting as it is used here
_NEEDED_PER_CLASS = 13  # before, Softmax and its kin flatten what comes after the axis


@register("ensemble")
class Ensemble(Pass):
    """Let several models answer as one: their outputs are combined into one.

    ``with`` names the partners. Their inputs read those of the model, by name, else by place, else as ``map`` says:
    ``'image=b/data'``; ``adapt`` allows a ``cast``, ``transpose`` or ``reshape`` in between. Each output, or those that
    ``outputs`` names, is combined with the partners' of its name, else in its place. ``classes`` tells where a
    partner's classes lie in another order: ``'b=2 0 1'`` says that the first class of the model is number 2 of ``b``.
    They lie along ``axis``. Of classifiers that name their classes (skl2onnx) the order is known, the tensor before a
    ZipMap is taken, and ``label`` is one more output: the name of the class with the largest value.

    ``combine``: ``mean`` is (y1 + ... + yN) * float32(1/N); ``weighted`` is (w1 y1 + w2 y2) + ..., in order, over the
    sum of the weights with ``normalize``; ``sum``, ``median``, ``min`` and ``max`` are of each element. ``geometric``
    is the mean of logarithms, raised again. ``soft-vote`` is the mean of probabilities. ``hard-vote`` gives the share
    of the members that chose each class, and in ``label`` the class with most votes; of equal ones, of a member or of
    the vote, the lowest index is taken. ``stack`` is a linear layer over the outputs of all.

    ``soft-vote`` and ``geometric`` put a softmax after outputs that are logits: those that no softmax, sigmoid or
    classifier makes, or as ``scores`` says of all, or of one: ``'b=logits'``. Without ``weights``, those of
    ``weighted`` are fitted to data and labels: not negative, of sum one, least cross-entropy. Labels are places among
    the classes, or their names where a member names them. ``stack`` is fitted by ``solver``: least squares to the
    labels, or logistic regression (by scikit-learn: pip install 'penjing[stack]').
    """

    with_: tuple[str, ...] = ()
    combine: How = "mean"
    weights: tuple[float, ...] = ()
    normalize: bool = False
    outputs: tuple[str, ...] = ()
    map: tuple[str, ...] = ()
    adapt: tuple[Adapter, ...] = ()
    classes: tuple[str, ...] = ()
    axis: int = -1
    scores: tuple[str, ...] = ()
    solver: Solver = "least-squares"

    def validate(self) -> None:
        if self.weights and self.combine not in ("weighted", "soft-vote", "hard-vote"):
            raise UsageError(
                f"ensemble: weights are for combine=weighted and the votes; combine={self.combine} takes none."
            )
        if self.normalize and not self.weights:
            raise UsageError("ensemble: normalize divides by the sum of the weights; give weights, or leave it out.")
        if self.solver != "least-squares" and self.combine != "stack":
            raise UsageError("ensemble: solver is for combine=stack; add that, or leave solver out.")
        if self.with_ and self.weights and len(self.weights) != len(self.with_) + 1:
            raise UsageError(
                f"ensemble: {len(self.with_) + 1} models take as many weights; given: {len(self.weights)}."
            )
        for text in self.scores:
            if text.rpartition("=")[2] not in _KINDS:
                raise UsageError(f"ensemble: scores={printable(text)} must be {' or '.join(_KINDS)}, or MEMBER=logits.")
        if any(not math.isfinite(one) or one < 0 for one in self.weights):
            raise UsageError(
                f"ensemble: weights=({', '.join(map(str, self.weights))}) must be numbers of zero or more; a member "
                "with a correction is added by combine=sum."
            )
        total = math.fsum(self.weights)
        if self.weights and not self.normalize and abs(total - 1) > 1e-6:
            raise UsageError(
                f"ensemble: the weights sum to {total:.6g}, not to one; change them, or add normalize=true."
            )
        if self.weights and not total > 0:
            raise UsageError("ensemble: the weights are all zero; one at least must be more.")

    def effect(self) -> Effect:
        # Exp, Log, Softmax and Gemm of the runtime round otherwise than those of numpy.
        inexact = self.combine in ("geometric", "soft-vote", "stack")
        return Effect.ROUNDING if inexact else Effect.SAME

    def run(self, model: ir.Model, ctx: Context) -> None:
        team = self._team(model, ctx)
        joined = team.plan.join()
        tidy(joined, ctx)
        team.show(joined)
        for subject, sentence, numbers in team.told:
            ctx.change(subject, sentence, **numbers)
        settle(model, team.plan, joined, ctx)

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]]:
        """The models run one by one, their outputs combined by numpy in the type that they have."""
        team = self._team(before, ctx)
        joined = team.plan.join()
        names = team.show(joined)
        return team.plan.reference(ctx.runner, lambda each: dict(zip(names, team.numbers(each), strict=True)), joined)

    # How --------------------------------------------------------------------------------------------------------------

    def _team(self, model: ir.Model, ctx: Context) -> Team:
        found = [classifier(member) for member in members(model, self.with_, ctx, self.name)]
        plan, places = feed_alike([one.member for one in found], self.map, self.adapt, self.name)
        plan.opset = _NEEDED
        team = Team(plan, places, found, [], [])
        for one in found:
            for name in one.named:
                plan.said.append((f"{one.member}/{printable(name)}", "the tensor before its ZipMap is taken"))
        matched = self._matched(team)
        if len(matched) > 1 and self.combine in ("stack", "hard-vote"):
            raise UsageError(f"ensemble: combine={self.combine} makes one output; choose it with outputs=NAME.")
        team.joints += [self._joint(team, names, ctx) for names in matched]
        wanted = {pair for joint in team.joints for pair in enumerate(joint.names)}
        for number, place in enumerate(places):
            member = plan.members[place]
            for value in member.model.graph.outputs:
                if (number, value.name or "") not in wanted:
                    plan.left.append((f"{member}/{printable(value.name or '')}", "output left out of the ensemble"))
        self._fit(team, ctx)
        return team

    def _matched(self, team: Team) -> list[list[str]]:
        """For each output of the ensemble what it is called in each member."""
        own = [[value.name or "" for value in model.graph.outputs] for model in team.models]
        floats = [
            [name for name in names if _is_float(_output(model, name))]
            for model, names in zip(team.models, own, strict=True)
        ]
        for name in self.outputs:
            if name not in own[0]:
                raise UsageError(
                    f"ensemble: {team.member(0)} has no output '{printable(name)}'.{printable(nearest(name, own[0]))} "
                    f"Its outputs are {', '.join(map(printable, own[0]))}."
                )
        found = []
        for name in dict.fromkeys(self.outputs or floats[0] or own[0]):
            names = [name]
            place = floats[0].index(name) if name in floats[0] else 0
            for number in range(1, len(own)):
                if name not in own[number] and place >= len(floats[number]):
                    raise UsageError(
                        f"ensemble: {team.member(number)} has no output for '{printable(name)}': none of that name, "
                        f"and {len(floats[number])} of floats; choose with outputs what all have."
                    )
                names.append(name if name in own[number] else floats[number][place])
            found.append(names)
        return found

    def _joint(self, team: Team, names: list[str], ctx: Context) -> Joint:
        values = [_output(model, name) for model, name in zip(team.models, names, strict=True)]
        first = values[0]
        for number, (value, name) in enumerate(zip(values, names, strict=True)):
            where = f"the output '{printable(name)}' of {team.member(number)} is {described(value)}"
            if not _is_float(value):
                raise UsageError(f"ensemble: float tensors can be combined, and {where}; choose others with outputs.")
            try:
                team.plan.symbols.unify((team.places[0], first), (team.places[number], value))
            except Misfit as reason:
                raise UsageError(
                    f"ensemble: the output '{printable(names[0])}' of {team.member(0)} is {described(first)}, and "
                    f"{where}: {reason}."
                ) from None
        kinds = self._kinds(team, values)
        if len(set(kinds)) > 1 and self.combine not in ("soft-vote", "hard-vote", "geometric"):
            ctx.warn(
                f"Of what is combined into '{printable(names[0])}' some are probabilities and some may be logits; "
                "combine=soft-vote brings them to one scale."
            )
        known = [one.classes(name) for one, name in zip(team.classifiers, names, strict=True)]
        combination = self._combination(team, values, kinds, names, known)
        if self.combine in ("soft-vote", "geometric"):
            for number, (raw, name) in enumerate(zip(combination.logits, names, strict=True)):
                if raw:
                    team.plan.said.append(
                        (
                            f"{team.member(number)}/{printable(name)}",
                            "softmax added, for the output is taken for logits",
                        )
                    )
        labels = next((one for one in known if one and len(one) == combination.classes), None)
        return Joint(names, values, combination, labels)

    def _kinds(self, team: Team, values: Sequence[ir.Value]) -> list[bool]:
        """Of each member whether its output is probabilities."""
        kinds = [gives_probabilities(value) for value in values]
        names = [team.plan.members[place].name for place in team.places]
        for text in self.scores:
            name, mark, kind = text.rpartition("=")
            if mark and name not in names:
                raise UsageError(f"ensemble: no member is called '{printable(name)}'.{printable(nearest(name, names))}")
            for number in [names.index(name)] if mark else range(len(kinds)):
                kinds[number] = kind == "probabilities"
        return kinds

    def _combination(
        self,
        team: Team,
        values: Sequence[ir.Value],
        kinds: Sequence[bool],
        names: Sequence[str],
        known: Sequence[Labels | None],
    ) -> Combination:
        per_class = self.combine in PER_CLASS or bool(self.classes) or (self.combine == "weighted" and not self.weights)
        per_class = per_class or (self.combine == "geometric" and not all(kinds))
        shape = next((shape for shape in map(dims, values) if shape is not None), None)
        along = -len(shape or ()) <= self.axis < len(shape or ())
        sizes = [shape[self.axis] for shape in map(dims, values) if along and shape is not None]
        classes = next((size for size in sizes if isinstance(size, int)), 0)
        per_class = per_class or any(one is not None and len(one) == classes for one in known)
        divisor = float(np.float32(math.fsum(self.weights))) if self.normalize else None
        made = Combination(self.combine, weights=self.weights, divisor=divisor, logits=[not one for one in kinds])
        made.orders = [None] * len(values)
        if not per_class:
            return made
        where = f"the output '{printable(names[0])}' of {team.member(0)} is {described(values[0])}"
        if not shape or not along:
            raise UsageError(f"ensemble: the classes must lie along axis {self.axis}, and {where}.")
        made.axis, made.classes = self.axis % len(shape), classes
        if not made.classes:
            raise UsageError(f"ensemble: combine={self.combine} needs to know how many classes there are, and {where}.")
        if self.combine == "stack" and (len(shape) != 2 or made.axis != 1):
            raise UsageError(f"ensemble: combine=stack takes outputs [batch, classes], and {where}.")
        team.plan.opset = _NEEDED_PER_CLASS
        made.orders = self._orders(team, made.classes, known)
        return made

    def _orders(self, team: Team, classes: int, known: Sequence[Labels | None]) -> list[tuple[int, ...] | None]:
        """For each member where the classes of the first one that names them are among its own."""
        found: list[tuple[int, ...] | None] = [None] * len(team.places)
        names = [team.plan.members[place].name for place in team.places]
        tellers = [number for number, labels in enumerate(known) if labels and len(labels) == classes]
        for number in tellers[1:]:
            first, other = known[tellers[0]], known[number]
            assert first is not None
            assert other is not None
            pair = team.member(tellers[0]), team.member(number)
            found[number] = order(first, other, pair, "ensemble")
            if found[number] is not None:
                team.plan.said.append((names[number], f"its classes are taken in the order of {pair[0]}"))
        for text in self.classes:
            name, mark, listed = text.partition("=")
            words = listed.split()
            if not mark or not all(word.isdecimal() for word in words):
                raise UsageError(f"ensemble: classes={printable(text)} must be 'MEMBER=2 0 1'.")
            if name not in names:
                raise UsageError(f"ensemble: no member is called '{printable(name)}'.{nearest(name, names)}")
            places = tuple(map(int, words))
            if sorted(places) != list(range(classes)):
                raise UsageError(
                    f"ensemble: classes of {printable(name)} must be an order of the numbers 0 to {classes - 1}, each "
                    f"once; found {listed.strip() or 'nothing'}."
                )
            found[names.index(name)] = places
            team.plan.said.append((name, f"its classes are taken in the order {', '.join(words)}"))
        return found

    # Fitting ----------------------------------------------------------------------------------------------------------

    def _fit(self, team: Team, ctx: Context) -> None:
        if self.combine != "stack" and (self.combine != "weighted" or self.weights):
            return
        if len(team.joints) > 1:
            raise UsageError("ensemble: weights are fitted to one output; choose it with outputs=NAME.")
        (joint,) = team.joints
        how = joint.combination
        rows = team.plan.separately(ctx.runner, level="all")(ctx.data)
        scores, labels = labelled(map(team.picker(joint), rows), ctx, how.classes, "ensemble", joint.labels)
        for number, one in enumerate(scores):
            if not np.isfinite(one).all():
                raise BadFeeds(f"On these data {team.member(number)} gives numbers that are not finite; nothing fits.")
        if self.combine == "stack":
            how.stack = linear_layer(scores, labels, how.classes, self.solver)
            right = float((Numbers().affine(scores, *how.stack).argmax(axis=1) == labels).mean())
            words = f"linear layer over all outputs, fitted by {self.solver} on {len(labels):,} samples"
            how.stack = (how.stack[0].astype(scores[0].dtype), how.stack[1].astype(scores[0].dtype))
            team.told.append((joint.names[0], words, {"accuracy": right}))
            if len(labels) < how.stack[0].shape[1] + 1:
                ctx.warn(
                    f"The stack has {how.stack[0].shape[1]} inputs and was fitted on {len(labels)} samples; give more."
                )
            return
        how.weights, loss = on_simplex(scores, labels, probabilities=not any(how.logits))
        shown = ", ".join(f"{team.member(number)} {weight:g}" for number, weight in enumerate(how.weights))
        team.told.append(
            (joint.names[0], f"weights fitted on {len(labels):,} samples: {shown}", {"cross_entropy": loss})
        )


@dataclass
class Joint:
    """An output of the ensemble: what it is called in each member, what it is there, and how they are combined.

    ``labels`` are what its classes are called, where a member tells.
    """

    names: list[str]
    values: list[ir.Value]
    combination: Combination
    labels: Labels | None

    @property
    def is_labelled(self) -> bool:
        """Whether the class with the largest value is an output too."""
        how = self.combination.how  # of equal classes of a geometric mean, rounding chooses one
        return how == "hard-vote" or (self.labels is not None and how != "geometric")

    @property
    def looked_up(self) -> Labels | None:
        """What labels are looked up in; ``None`` where they are the numbers of the classes."""
        return None if self.labels == tuple(range(self.combination.classes)) else self.labels


@dataclass
class Team:
    """The members of an ensemble, with their places in the plan, and what is made of their outputs."""

    plan: Plan
    places: list[int]
    classifiers: list[Classifier]
    joints: list[Joint]
    told: list[tuple[str, str, dict[str, Any]]]

    @property
    def models(self) -> list[ir.Model]:
        return [self.plan.members[place].model for place in self.places]

    def member(self, number: int) -> str:
        return str(self.plan.members[self.places[number]])

    def picker(self, joint: Joint) -> Callable[[Each], list[Array]]:
        """A function from the outputs of all that runs to those that are combined, classes in one order."""

        def pick(each: Each) -> list[Array]:
            return joint.combination.ordered(Numbers(), self._arrays(joint, each))

        return pick

    def _arrays(self, joint: Joint, each: Each) -> list[Array]:
        return [np.asarray(each[place][name]) for place, name in zip(self.places, joint.names, strict=True)]

    def numbers(self, each: Each) -> list[Array]:
        """The outputs of the ensemble, computed by numpy."""
        found = []
        for joint in self.joints:
            made = joint.combination.of(Numbers(), self._arrays(joint, each))
            if joint.is_labelled:
                chosen = Numbers().index_of_largest(made, joint.combination.axis)
                words = joint.looked_up
                found.append(chosen if words is None else np.array(words)[chosen])
            found.append(made)
        return found

    def show(self, joined: Joined) -> list[str]:
        """Put the combination into the graph; -> the names of the outputs."""
        algebra, shown = Operators(joined), []
        for joint in self.joints:
            values = [
                _known(joined.members[place].outputs[name], joint.values[number])
                for number, (place, name) in enumerate(zip(self.places, joint.names, strict=True))
            ]
            made = joint.combination.of(algebra, values)
            if joint.is_labelled:
                chosen = algebra.index_of_largest(made, joint.combination.axis)
                words = joint.looked_up
                shown.append(("label", chosen if words is None else algebra.look_up(words, chosen)))
            how = joint.combination.how
            self.plan.said.append(
                (
                    joint.names[0],
                    f"{how} of {len(values)} members, {dtype_name(joint.values[0].dtype or ir.DataType.FLOAT)}",
                )
            )
            shown.append((joint.names[0], made))
        joined.show(shown)
        return [value.name or "" for value in joined.model.graph.outputs]


def _output(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.outputs if value.name == name)


def _is_float(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype in _FLOATS


def _known(value: ir.Value, declared: ir.Value) -> ir.Value:
    """A value of the joined graph, with the type that the member declares where it has none."""
    if value.type is None:
        value.type = declared.type
    return value
