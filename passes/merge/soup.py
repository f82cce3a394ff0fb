"""One model whose weights are made of those of several: soups, arcs between two, and arithmetic with tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from ...ir.address import graphs, printable
from ...ir.align import align_versions
from ...ir.errors import PenjingError, UsageError, nearest
from ...ir.join import Member
from ...ir.verify import verify
from ..base import Array, Context, Feeds, Outputs, Pass, register
from .plan import members, same_models
from .soup_batchnorm import reestimate, store
from .soup_proof import plainly, prove_places
from .soup_rules import Dare, Linear, Mix, Place, Rule, Slerp, TaskArithmetic, Ties, least_kept, mixed, survey
from .structure import counterparts, stored

_FAR = 0.5  # cosine of two models' weights below which their mean is not likely to be near either
_WITH_BASE = ("task-arithmetic", "ties", "dare")
_SHARES = ("weighted", "slerp")  # methods whose weights are parts of one
_SCALES = {"task-arithmetic": 0.4, "ties": 1.0, "dare": 0.4}  # Yadav et al. 2023, section 4, where nothing is known
_DENSITIES = {"ties": 0.2, "dare": 0.5}

Make: TypeAlias = Callable[[Place, Mix], ir.TensorProtocol]


@register("soup")
class Soup(Pass):
    """Make the weights of one model of those of several of its architecture.

    ``with`` names the partners. Constants are matched by the structure of the graphs, not by name, and two graphs that
    differ in more than names and float constants are refused. Sums are made in float64 and rounded once.

    ``method=uniform`` is the mean, ``weighted`` the sum with ``weights`` that sum to one, the model's own first.
    ``greedy`` starts from the model of the best ``--metric`` and goes through the others from the best to the worst,
    adding each with which the metric of the mean is not lower than before (Wortsman et al. 2022). ``slerp`` goes along
    the arc between two, tensor by tensor, to the share of the second in ``weights`` (half the way; Shoemake 1985).

    The others start from ``base``, a partner too, and add what each model changed in it: ``task-arithmetic`` the sum of
    the changes times ``scale`` (0.4) and times ``weights`` (1 each; Ilharco et al. 2022); ``ties`` the mean of those of
    the largest ``density`` (0.2) of the changes of each model, over all its weights, that agree with the sign of their
    sum, times ``scale`` (1; Yadav et al. 2023); ``dare`` as task-arithmetic, with changes of which a random
    ``density`` (0.5) is kept and scaled up, by ``--seed`` (Yu et al. 2023).

    Where ``--data`` are given, means and variances of BatchNormalization are estimated on them anew.
    """

    keeps_inputs: ClassVar[bool] = True
    with_: tuple[str, ...] = ()
    method: Literal["uniform", "weighted", "greedy", "slerp", "task-arithmetic", "ties", "dare"] = "uniform"
    base: str | None = None
    weights: tuple[float, ...] = ()
    scale: float | None = None
    density: float | None = None

    def validate(self) -> None:
        method = self.method
        if method in _WITH_BASE and self.base is None:
            raise UsageError(f"soup: method={method} starts from the model that all were trained from; add base=NAME.")
        for option, methods in (("base", _WITH_BASE), ("scale", tuple(_SCALES)), ("density", tuple(_DENSITIES))):
            if getattr(self, option) is not None and method not in methods:
                raise UsageError(f"soup: {option} is for method={' or '.join(methods)}, and method is {method}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"soup: density={self.density:g} is not a share; it is more than 0 and at most 1.")
        if method == "slerp" and len(self.with_) > 1:
            raise UsageError(
                f"soup: method=slerp goes from one model to one other, and {len(self.with_)} partners are named."
            )
        self._validate_weights()

    def _validate_weights(self) -> None:
        count, given = len(self.with_) + 1, len(self.weights)
        if not given:
            if self.method == "weighted":
                raise UsageError(
                    f"soup: method=weighted needs weights, {count} that sum to one, the model's own first."
                )
            return
        if self.method not in (*_SHARES, "task-arithmetic", "dare"):
            raise UsageError(f"soup: method={self.method} takes no weights; leave them out, or say method=weighted.")
        if self.with_ and given != count:
            raise UsageError(f"soup: {count} models take {count} weights, the model's own first; given: {given}.")
        if not all(map(math.isfinite, self.weights)):
            raise UsageError("soup: a weight is not a finite number.")
        if self.method in _SHARES:
            if (least := min(self.weights)) < 0:
                raise UsageError(f"soup: the weight {least:g} is negative; weights of method={self.method} are not.")
            if abs((total := math.fsum(self.weights)) - 1) > 1e-6:
                raise UsageError(f"soup: the weights sum to {total:.6g}; they have to sum to 1.")

    def run(self, model: ir.Model, ctx: Context) -> None:
        everyone, places = self._gather(model, ctx)
        self._cook(model, everyone, places, ctx, mixed)

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]]:
        """The first model with weights made by numpy of whole tensors; by an exact runner after ``prove_places``."""

        def expected(feeds: Feeds) -> Iterator[Outputs]:
            work, own = before.clone(), ctx.for_step(ctx.step)
            everyone, places = self._gather(work, own)
            if ctx.runner.exact:
                prove_places(work, everyone, places, feeds, ctx.runner)
            self._cook(work, everyone, places, own, plainly)
            yield from ctx.runner.run(work, feeds)

        return expected

    def _gather(self, model: ir.Model, ctx: Context) -> tuple[list[Member], list[Place]]:
        """The members, of one opset, the base last where there is one; and the constants in which they differ."""
        found = members(model, self.with_, ctx, self.name, whole=True)
        if self.method == "greedy" and not ctx.has("metric"):
            _ = ctx.metric  # refuses
        base = self._base(ctx)
        everyone = found if base is None else [*found, base]
        for name, sentence in same_models(everyone):
            ctx.change(name, sentence)
        everyone = _of_one_version(everyone, ctx)
        return everyone, _places(everyone, base is not None, ctx)

    def _cook(
        self, model: ir.Model, everyone: Sequence[Member], places: Sequence[Place], ctx: Context, make: Make
    ) -> None:
        """Put into ``model``, the first of ``everyone``, what the method makes of the weights."""
        found = everyone[: len(self.with_) + 1]
        scores = _scores(found, ctx)
        chosen = list(range(len(found)))
        if self.method == "greedy":
            chosen = self._greedy(model, places, scores, [str(member) for member in found], ctx, make)
        _warn_of_distance(places, everyone, chosen + [len(found)] * (len(everyone) > len(found)), ctx)
        self._settle(model, places, self._rule(places, chosen, ctx), len(chosen), ctx, make)
        if scores:
            self._tell_score(ctx.runner.score(model), min(scores[number] for number in chosen), ctx)

    def _base(self, ctx: Context) -> Member | None:
        if self.base is None:
            return None
        partners = ctx.models
        if self.base not in partners:
            given = ", ".join(map(printable, partners))
            raise UsageError(
                f"soup: no partner is called '{printable(self.base)}', which is to be the base."
                f"{nearest(self.base, partners)} Given: {given}."
            )
        verify(partners[self.base], f"The partner '{printable(self.base)}'")
        return Member("base", partners[self.base])

    def _rule(self, places: Sequence[Place], chosen: Sequence[int], ctx: Context) -> Rule:
        count = len(self.with_) + 1
        scale = self.scale if self.scale is not None else _SCALES.get(self.method, 1.0)
        density = self.density if self.density is not None else _DENSITIES.get(self.method, 1.0)
        factors = [scale * weight for weight in self.weights or (1.0,) * count]
        if self.method == "weighted":
            return Linear(self.weights)
        if self.method == "slerp":
            return Slerp(self.weights[1] if self.weights else 0.5, [])
        if self.method == "task-arithmetic":
            return TaskArithmetic(factors)
        if self.method == "dare":
            return Dare(factors, density, ctx.seed)
        if self.method == "ties":
            return Ties(scale, least_kept(places, count, density))
        return _mean(chosen, count)

    def _greedy(
        self,
        model: ir.Model,
        places: Sequence[Place],
        scores: Sequence[float],
        names: Sequence[str],
        ctx: Context,
        make: Make,
    ) -> list[int]:
        """The members, by number, that are in the soup; ``model`` is left with some trial's weights."""
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        chosen, best = order[:1], scores[order[0]]
        for number in order[1:]:
            trial = sorted([*chosen, number])
            self._settle(model, places, _mean(trial, len(scores)), len(trial), ctx.for_step(ctx.step), make)
            found = ctx.runner.score(model)
            if found >= best:
                ctx.change(names[number], "taken into the soup", metric=found, before=best)
                chosen, best = trial, found
            else:
                ctx.skip(names[number], f"not taken: with it the metric would fall from {best:.6g} to {found:.6g}")
        return chosen

    def _settle(
        self, model: ir.Model, places: Sequence[Place], rule: Rule, count: int, ctx: Context, make: Make
    ) -> None:
        """Put what ``rule`` makes into the model; a tensor that several constants share stays one."""
        made: dict[tuple[int, ...], ir.TensorProtocol] = {}
        for number, place in enumerate(places):
            key = tuple(map(id, place.all))
            if key not in made:
                made[key] = make(place, rule.at(place, number))
            store(place.value, made[key])
            ctx.change(place.value, f"{self.method} of {count}", cosine=_least_cosine(place.gram))
        if isinstance(rule, Slerp):
            for name in rule.straight:
                ctx.skip(name, "no arc to go along, for the two are parallel, opposite or zero: the linear mean")
        if places and count > 1 and ctx.has("data") and ctx.has("runner"):
            reestimate(model, ctx)

    def _tell_score(self, found: float, worst: float, ctx: Context) -> None:
        ctx.change("soup", "its metric", metric=found)
        if found < worst:
            remedy = (
                "an ensemble of them may serve better, for what lies between them is not good"
                if self.base is None
                else "another scale, density or method may serve better"
            )
            ctx.warn(f"The metric of the soup, {found:.6g}, is below that of its worst member, {worst:.6g}: {remedy}.")


def _mean(chosen: Sequence[int], count: int) -> Linear:
    return Linear([1 / len(chosen) if number in chosen else 0.0 for number in range(count)])


def _of_one_version(everyone: Sequence[Member], ctx: Context) -> list[Member]:
    """The members with opsets raised to one: the first in place, the others as copies where that takes a change."""
    imports = [sorted(member.model.opset_imports.items()) for member in everyone]
    if all(one == imports[0] for one in imports):
        return list(everyone)
    copies = [everyone[0], *(Member(member.name, member.model.clone()) for member in everyone[1:])]
    for name, sentence in align_versions([(member.name, member.model) for member in copies]):
        ctx.change(name, sentence)
    return copies


def _places(everyone: Sequence[Member], based: bool, ctx: Context) -> list[Place]:
    """What stands at each constant of floats that is not the same in all, in the order of the first model."""
    first, *others = everyone
    twins = [counterparts(first, other) for other in others]
    found, alike = [], 0
    for value in _constants(first.model):
        if any(value not in pairs for pairs in twins):
            if value.name and value.is_initializer():
                ctx.skip(value, "left as it is, for no output needs it")
            continue
        tensors = [tensor for one in (value, *(pairs[value] for pairs in twins)) if (tensor := stored(one)) is not None]
        if not tensors[0].dtype.is_floating_point():
            continue
        base = tensors.pop() if based else None
        place = survey(value, tensors, base, [member.name for member in everyone])
        if place.alike:
            alike += 1
        else:
            found.append(place)
    if alike:
        ctx.skip("constants", f"{alike:,} of floats are equal in all models, and stay")
    return found


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    for _, graph in graphs(model):
        yield from graph.initializers.values()
        for node in graph:
            if node.op_type == "Constant" and not node.domain:
                yield node.outputs[0]


def _scores(found: Sequence[Member], ctx: Context) -> list[float]:
    """The metric of each member; nothing where there is no metric."""
    if not ctx.has("metric"):
        return []
    known: dict[int, float] = {}
    for member in found:
        if id(member.model) not in known:
            try:
                known[id(member.model)] = ctx.runner.score(member.model)
            except PenjingError as error:
                raise UsageError(f"soup takes the metric of each member, and of {member} it fails: {error}") from error
        ctx.change(member.name, "its own metric", metric=known[id(member.model)])
    return [known[id(member.model)] for member in found]


def _warn_of_distance(places: Sequence[Place], everyone: Sequence[Member], chosen: Sequence[int], ctx: Context) -> None:
    """Warn where the weights of two of the ``chosen`` point in unlike directions; matrices tell, where there are any.

    Vectors are scales and shifts, which are alike in all models.
    """
    matrices = [place for place in places if len(place.value.shape or ()) > 1] or list(places)
    if not matrices:
        return
    gram = np.sum([place.gram for place in matrices], axis=0)[np.ix_(chosen, chosen)]
    cosines = _cosines(gram)
    one, two = np.unravel_index(int(np.argmin(cosines)), cosines.shape)
    names = [str(everyone[number]) for number in chosen]
    ctx.change("soup", f"made of {', '.join(names)}", cosine=float(cosines[one, two]))
    if cosines[one, two] < _FAR:
        pair = sorted((int(one), int(two)))
        ctx.warn(
            f"The members {names[pair[0]]} and {names[pair[1]]} are far apart: the cosine of their weights is "
            f"{cosines[one, two]:.2f}, and below {_FAR:g} what lies between two models is rarely a good one. Weights "
            "of one run, or tuned from one model, are near each other."
        )


def _cosines(gram: Array) -> Array:
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    return np.divide(gram, scale, out=np.ones_like(gram), where=scale > 0)


def _least_cosine(gram: Array) -> float:
    return float(_cosines(gram).min())
