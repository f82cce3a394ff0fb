"""A small model that answers, and a big one where the small one is not sure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ...ir.address import printable
from ...ir.cut import sweep
from ...ir.errors import BadFeeds, UsageError, nearest
from ...ir.join import Placed
from ...ir.shapes import dims
from ...ir.unify import Misfit, described
from ..base import Array, Context, Feeds, Outputs, Pass, Runner, register
from .adapters import Adapter
from .algebra import Numbers, Operators
from .classifiers import Classifier, Labels, classifier, gives_probabilities, order
from .feeding import absorbed, feed_alike
from .plan import Plan, members, settle, tidy
from .routing import Confidence, confidence, route
from .samples import labelled
from .thresholds import least_threshold

_NEEDED = 13  # the first opset with ReduceSum, Squeeze and Softmax as they are used here
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_SURE = "cascade_confidence"
_MAX_DROP = 0.003
_RANGES = {"max-prob": (0.0, 1.0), "margin": (0.0, 1.0), "entropy": (-math.inf, 0.0)}  # of thresholds
_BEYOND = 1e-3  # what a fitted threshold may lie outside, so that all rows go on, or none


@register("cascade")
class Cascade(Pass):
    """Let the model answer, and a bigger one, ``with``, where the model is not sure.

    Its confidence in each sample is the largest probability (``max-prob``), what the second largest is less
    (``margin``), or the entropy in nats, negated (``entropy``), of the output ``scores``, else the first one, after a
    softmax where that gives logits. What is less sure than ``threshold`` goes on. With ``route=sample`` only these rows
    do, and none where all are sure; with ``route=batch`` all rows as soon as one is unsure. ``auto`` is ``sample``
    where the batch of both models is symbolic.

    Without ``threshold`` it is the least one that keeps the accuracy of the big model but for ``max-drop`` (0.003): as
    counted on the data and labels, and as a curve fitted to them expects of others.

    The big model's inputs read those of the small one by name, else by place, else as ``map`` says:
    ``'image=big/data'``; ``adapt`` allows a ``cast``, ``transpose`` or ``reshape`` in between. Outputs are paired by
    name, else by place; those without a counterpart are left out. Of classifiers that name their classes (skl2onnx)
    the order is known, the tensor before a ZipMap is taken, and where only one of the two has a label, ``label`` names
    the class with the largest score. Where data are given the ledger says how many samples stop early, and what a run
    takes.
    """

    with_: tuple[str, ...] = ()
    confidence: Confidence = "max-prob"
    route: Literal["auto", "sample", "batch"] = "auto"
    threshold: float | None = None
    max_drop: float | None = None
    scores: str | None = None
    map: tuple[str, ...] = ()
    adapt: tuple[Adapter, ...] = ()

    def validate(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"cascade: threshold={self.threshold} must be a finite number.")
        least, most = _RANGES[self.confidence]
        if self.threshold is not None and not least - _BEYOND <= self.threshold <= most + _BEYOND:
            remedy = "at most 0, for the entropy is negated: write -0.5" if least == -math.inf else "from 0 to 1"
            raise UsageError(
                f"cascade: threshold={self.threshold:g} is out of range; by confidence={self.confidence} it is "
                f"{remedy}."
            )
        if self.max_drop is not None and not 0 < self.max_drop < 1:
            raise UsageError(f"cascade: max-drop={self.max_drop} is a share of the samples: more than 0, less than 1.")
        if self.threshold is not None and self.max_drop is not None:
            raise UsageError("cascade: max-drop is for fitting the threshold, and a threshold is given; leave one out.")

    def run(self, model: ir.Model, ctx: Context) -> None:
        pair = self._pair(model, ctx)
        threshold = self._threshold(pair, ctx)
        small = model.clone()
        joined = Plan(pair.plan.members, opset=_NEEDED).join()
        tidy(joined, ctx)
        algebra = Operators(joined)
        first, second = joined.members
        sure = confidence(algebra, first.outputs[pair.scores], self.confidence, logits=pair.logits)
        feeds = {name: first.inputs[source.value] for name, source in pair.plan.wires[1].items()}
        pairs = [(first.outputs[one], pair.answer(algebra, second, two)) for one, two in pair.outputs]
        found = route(algebra, sure, threshold, second, feeds, pairs, by_sample=pair.by_sample)
        shown = [(name, value) for (name, _), value in zip(pair.outputs, found, strict=True)]
        if pair.labels is not None:
            scores = dict(shown)[pair.scores]
            shown.append((pair.label, algebra.look_up(pair.labels, algebra.index_of_largest(scores, 1))))
        joined.show(shown)
        what = "rows less sure" if pair.by_sample else "batches with a row less sure"
        pair.plan.said.append((pair.scores, f"{what} than {threshold:g} by {self.confidence} go on to {pair.big}"))
        if pair.logits:
            pair.plan.said.append((pair.scores, "softmax added for the confidence, for the output is taken for logits"))
        settle(model, pair.plan, joined, ctx)
        if ctx.has("data"):
            self._tell(pair, small, model, threshold, ctx)

    def reference(self, before: ir.Model, ctx: Context) -> Callable[[Feeds], Iterator[Outputs]]:
        """The small model run alone with its confidence, the big one alone on the rows that are less sure."""
        pair = self._pair(before, ctx)
        threshold = self._threshold(pair, ctx)

        def walk(feeds: Feeds) -> Iterator[Outputs]:
            small, big = _stepwise(ctx.runner, pair.judge), _stepwise(ctx.runner, pair.plan.members[1].model)
            for feed in feeds:
                found = dict(small({name: feed[name] for name in pair.inputs if name in feed}))
                sure = found.pop(_SURE)
                answers = {one: np.array(found[one]) for one, _ in pair.outputs}
                unsure = ~(sure >= sure.dtype.type(threshold))
                if unsure.any():
                    rows = unsure if pair.by_sample else np.full(len(unsure), True)
                    given = pair.big_feed(feed)
                    better = big({name: array[rows] for name, array in given.items()} if pair.by_sample else given)
                    for one, two in pair.outputs:
                        answers[one][rows] = pair.ordered(two, better[two])
                if pair.labels is not None:
                    answers[pair.label] = np.array(pair.labels)[answers[pair.scores].argmax(1)]
                yield answers

        return walk

    # What and where ---------------------------------------------------------------------------------------------------

    def _pair(self, model: ir.Model, ctx: Context) -> Pair:
        if len(self.with_) > 1:
            raise UsageError(f"cascade: one model stands behind the first, and {len(self.with_)} are named in with.")
        found = [classifier(member) for member in members(model, self.with_, ctx, self.name)]
        plan, places = feed_alike([one.member for one in found], self.map, self.adapt, self.name)
        plan = absorbed(plan, places[1])
        plan.opset = _NEEDED
        pair = Pair(plan, [], "", False, True, model)
        self._match(pair)
        scores = next(value for value in plan.members[0].model.graph.outputs if value.name == pair.scores)
        shape = dims(scores)
        if shape is None or len(shape) != 2 or scores.dtype not in _FLOATS or not isinstance(shape[1], int):
            raise UsageError(
                f"cascade: confidence is told by scores [samples, classes] of known classes, and the output "
                f"'{printable(pair.scores)}' of {plan.members[0]} is {described(scores)}; name another with scores."
            )
        if shape[1] < 2:
            raise UsageError(f"cascade: '{printable(pair.scores)}' has {shape[1]} class; there must be two or more.")
        pair.classes, pair.logits = shape[1], not gives_probabilities(scores)
        self._name_classes(pair, found)
        pair.by_sample = self._by_sample(pair)
        pair.judge = self._judge(pair)
        return pair

    def _match(self, pair: Pair) -> None:
        """Choose the scores, and pair the outputs of the two models: by name, else by place, the scores first."""
        small, big = (list(member.model.graph.outputs) for member in pair.plan.members)
        known = [value.name or "" for value in small]
        floats = [[value for value in values if value.dtype in _FLOATS] for values in (small, big)]
        pair.scores = self.scores if self.scores is not None else ((floats[0] or small)[0].name or "")
        if pair.scores not in known:
            raise UsageError(
                f"cascade: {pair.plan.members[0]} has no output '{printable(pair.scores)}'."
                f"{printable(nearest(pair.scores, known))} Its outputs are {', '.join(map(printable, known))}."
            )
        free = {value.name or "": value for value in big}
        partners: dict[str, str] = {}
        for value in sorted(small, key=lambda one: one.name != pair.scores):
            name, place = value.name or "", small.index(value)
            wanted = name in free or name == pair.scores  # must fit
            other = free.get(name)
            if other is None and wanted:
                place = floats[0].index(value) if value in floats[0] else place
                rest = floats[1] if value in floats[0] else big
                other = rest[min(place, len(rest) - 1)] if rest else None
            elif other is None and place < len(big):
                other = free.get(big[place].name or "")
            reason = "no output in its place" if other is None else self._misfit(pair, value, other)
            if other is None or reason:
                if wanted:
                    raise UsageError(
                        f"cascade: the output '{printable(name)}' of {pair.plan.members[0]} is {described(value)}, and "
                        + (f"'{printable(other.name or '')}' of {pair.big} is {described(other)}: " if other else "")
                        + f"{reason if other else f'{pair.big} has {reason}'}."
                    )
                pair.plan.left.append((name, f"left out, for {pair.big} has no output like it"))
                continue
            partners[name] = other.name or ""
            free.pop(partners[name], None)
        pair.outputs += [(name, partners[name]) for name in known if name in partners]

    def _misfit(self, pair: Pair, one: ir.Value, two: ir.Value) -> str:
        try:
            pair.plan.symbols.unify((0, one), (1, two))
        except Misfit as reason:
            return str(reason)
        return ""

    def _name_classes(self, pair: Pair, found: Sequence[Classifier]) -> None:
        """The order of the big model's classes, and what they are called where a label is to be made of the scores."""
        other = dict(pair.outputs)[pair.scores]
        small, big = found[0].classes(pair.scores), found[1].classes(other)
        small, big = (one if one and len(one) == pair.classes else None for one in (small, big))
        for one in found:
            for name in one.named:
                pair.plan.said.append((f"{one.member}/{printable(name)}", "the tensor before its ZipMap is taken"))
        if small and big:
            names = str(pair.plan.members[0]), pair.big
            if (places := order(small, big, names, self.name)) is not None:
                pair.order = other, places
                pair.plan.said.append((pair.plan.members[1].name, f"its classes are taken in the order of {names[0]}"))
        pair.names = small or big
        outputs = {value.name: value for value in pair.plan.members[0].model.graph.outputs}
        kinds = [outputs[name].dtype for name, _ in pair.outputs]
        if ir.DataType.INT64 not in kinds and ir.DataType.STRING not in kinds:
            pair.labels = pair.names

    def _by_sample(self, pair: Pair) -> bool:
        paired = [set(names) for names in zip(*pair.outputs, strict=True)]
        fixed = [
            f"'{printable(value.name or '')}' of {member} is {described(value)}"
            for member, outputs in zip(pair.plan.members, paired, strict=True)
            for value in (*member.model.graph.inputs, *member.model.graph.outputs)
            if (value.is_graph_input() or value.name in outputs)
            and value.const_value is None
            and ((shape := dims(value)) is None or not shape or isinstance(shape[0], int))
        ]
        if fixed and self.route == "sample":
            raise UsageError(
                f"cascade: route=sample needs a symbolic batch, first of all dimensions, and {fixed[0]}; take "
                "route=batch."
            )
        return self.route != "batch" and not fixed

    def _judge(self, pair: Pair) -> ir.Model:
        """The small model with its confidence for one more output."""
        joined = Plan(pair.plan.members, opset=_NEEDED).join()  # both, so that the opset is that of the cascade
        place = joined.members[0]
        sure = confidence(Operators(joined), place.outputs[pair.scores], self.confidence, logits=pair.logits)
        joined.show([*((one, place.outputs[one]) for one, _ in pair.outputs), (_SURE, sure)])
        sweep(joined.model)
        inputs = joined.model.graph.inputs
        for value in [one for one in inputs if one.name not in pair.inputs and not one.uses()]:
            inputs.remove(value)
        return joined.model

    # The threshold ----------------------------------------------------------------------------------------------------

    def _threshold(self, pair: Pair, ctx: Context) -> float:
        if self.threshold is not None:
            return self.threshold
        small, big, sure = pair.seen(ctx)
        other = dict(pair.outputs)[pair.scores]
        (mine, theirs, confidences), labels = labelled(
            (
                [one[pair.scores], pair.ordered(other, two[other]), three[:, None]]
                for one, two, three in zip(small, big, sure, strict=True)
            ),
            ctx,
            pair.classes,
            self.name,
            pair.names,
        )
        if not np.isfinite(confidences).all():
            raise BadFeeds("cascade: on these data the confidence is not a finite number; no threshold fits.")
        right = mine.argmax(1) == labels, theirs.argmax(1) == labels
        allowed = self.max_drop or _MAX_DROP
        found = least_threshold(confidences[:, 0].astype(np.float64), *right, allowed)
        if found > confidences.max():
            ctx.warn(
                f"On these {len(labels):,} samples no threshold is known to lose at most {allowed:g}, "
                "so that all of them go on; give more samples, or allow more with max-drop."
            )
        return found

    def _tell(self, pair: Pair, small: ir.Model, model: ir.Model, threshold: float, ctx: Context) -> None:
        outputs = ctx.runner.run(pair.judge, ctx.data, [_SURE], level="all")
        sure = [found[_SURE] >= threshold for found in outputs]
        kept = [one if pair.by_sample else np.full(len(one), one.all()) for one in sure]
        stop = float(np.concatenate(kept).mean())
        runs = list(ctx.data)[:8]
        own, merged = ctx.runner.time([small, model], runs, 0.2)
        (other,) = ctx.runner.time([pair.plan.members[1].model], list(map(pair.big_feed, runs)), 0.2)
        numbers = {"small_ms": 1e3 * own, "big_ms": 1e3 * other, "mean_ms": 1e3 * merged}
        sentence = f"{stop:.1%} of the samples stop early; a run takes {numbers['mean_ms']:.3g} ms"
        sentence += f", the small model {numbers['small_ms']:.3g}, the big one {numbers['big_ms']:.3g}"
        ctx.change("cascade", sentence, stop_early=stop, threshold=threshold, **numbers)
        ctx.ledger.changes.insert(0, ctx.ledger.changes.pop())  # what a cascade is judged by comes first


@dataclass
class Pair:
    """The small model and the big one: which outputs are one, which tells the confidence, and how rows go on.

    ``judge`` is the small model with its confidence for one more output. ``names`` are what the classes are called,
    ``labels`` the same where a label is to be made of the scores; ``order`` says of an output of the big model where
    the small one's classes are in it.
    """

    plan: Plan
    outputs: list[tuple[str, str]]
    scores: str
    logits: bool
    by_sample: bool
    judge: ir.Model
    classes: int = 0
    names: Labels | None = None
    labels: Labels | None = None
    order: tuple[str, Sequence[int]] | None = None

    @property
    def label(self) -> str:
        """A name for the label that is made."""
        taken, name, number = {*dict(self.outputs), *self.inputs}, "label", 0
        while name in taken:
            number += 1
            name = f"label_{number}"
        return name

    def ordered(self, name: str, array: Array) -> Array:
        """An output of the big model with its classes in the order of the small one's."""
        if self.order is None or self.order[0] != name:
            return array
        return Numbers().take(array, self.order[1], 1)

    def answer(self, algebra: Operators, big: Placed, name: str) -> ir.Value:
        """The same in the graph, where the node that orders them is one of the big model's."""
        value = big.outputs[name]
        if self.order is None or self.order[0] != name:
            return value
        made = algebra.take(value, self.order[1], 1)
        node = made.producer()
        assert node is not None
        big.nodes.append(node)
        return made

    @property
    def big(self) -> str:
        return str(self.plan.members[1])

    @property
    def inputs(self) -> list[str]:
        return [value.name or "" for value in self.plan.members[0].model.graph.inputs]

    def big_feed(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """What the big model takes of a feed for the small one."""
        wires = self.plan.wires[1]
        return {name: feed[source.value] for name, source in wires.items() if source.value in feed}

    def seen(self, ctx: Context) -> tuple[list[Outputs], list[Outputs], list[Array]]:
        """What both say on the data, and how sure the small one is, for each run."""
        small = list(ctx.runner.run(self.judge, ctx.data, level="all"))
        big = list(ctx.runner.run(self.plan.members[1].model, map(self.big_feed, ctx.data), level="all"))
        return small, big, [np.asarray(one[_SURE]) for one in small]


def _stepwise(runner: Runner, model: ir.Model) -> Callable[[Mapping[str, Any]], Outputs]:
    """A function that runs one feed, in one session for all calls."""
    waiting: list[Mapping[str, Any]] = []

    def feeds() -> Iterator[Mapping[str, Any]]:
        while True:
            yield waiting.pop()

    found = runner.run(model, feeds())

    def call(feed: Mapping[str, Any]) -> Outputs:
        waiting.append(feed)
        return next(found)

    return call
