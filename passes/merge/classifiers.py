"""Classifiers as others write them: what they call their classes, whether they give probabilities, ZipMap as a tensor.

skl2onnx writes a label and scores [samples, classes], or these as a sequence of maps behind a ZipMap (ONNX-ML). The
scores come from an operator that knows the classes (LinearClassifier, SVMClassifier, TreeEnsembleClassifier), or from
plain ones, and then the label is looked up in a list of the classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ...ir.address import printable
from ...ir.constants import constant_tensor
from ...ir.errors import UsageError
from ...ir.join import Member
from ...ir.references import renaming

Labels = tuple[str, ...] | tuple[int, ...]

_ML = "ai.onnx.ml"
_KEYS = ("classlabels_strings", "classlabels_int64s", "classlabels_ints")
_PASSED = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")
_NORMALIZED = ("Softmax", "Sigmoid", "HardSigmoid")
_KEPT = (*_PASSED, *_NORMALIZED, "LogSoftmax", "Normalizer", "Exp", "Log", "Sub", "Div")
_TRANSFORMS = ("SOFTMAX", "SOFTMAX_ZERO", "LOGISTIC", "PROBIT")
_DEPTH = 6  # nodes between a quotient and a sum


@dataclass(frozen=True)
class Classifier:
    """A member whose maps have become tensors, and ``named``: what they called their classes, by output."""

    member: Member
    named: Mapping[str, Labels] = field(default_factory=dict)

    def classes(self, output: str) -> Labels | None:
        """What the classes of an output are called, in its order; ``None`` where the model does not tell."""
        if output in self.named:
            return self.named[output]
        graph = self.member.model.graph
        value = next(value for value in graph.outputs if value.name == output)
        columns = list(_columns(value))
        for one in columns:
            node = one.producer()
            scored = node is not None and one is not node.outputs[0] and not _is_of_pairs(node)
            if found := _listed(node if scored else _voted(one)):
                return found
        labels = [other for other in graph.outputs if other is not value]
        return next((found for one in labels if (found := _looked_up(one, set(columns)))), None)


def classifier(member: Member) -> Classifier:
    """The member with the tensor [samples, classes] that a ZipMap reads in place of its maps, under their name."""
    if not any(_is_zipmap(value) for value in member.model.graph.outputs):
        return Classifier(member)
    model = member.model.clone()
    model.meta.update(member.model.meta)
    named: dict[str, Labels] = {}
    outputs, kept = list(model.graph.outputs), []
    model.graph.outputs.clear()
    for value in outputs:
        node = value.producer()
        if node is None or not _is_zipmap(value) or (scores := node.inputs[0]) is None:
            kept.append(value)
            continue
        name, labels = value.name or "", _listed(node) or ()
        model.graph.remove(node, safe=True)
        if scores in outputs or scores in kept:  # the tensor is an output too
            name = scores.name or ""
        else:
            kept.append(scores)
            with renaming(model):
                scores.name = name
        scores.type = scores.type or ir.TensorType(ir.DataType.FLOAT)
        scores.shape = scores.shape or ir.Shape([None, len(labels) or None])
        if labels:
            named[name] = labels
    model.graph.outputs.extend(kept)
    return Classifier(Member(member.name, model), named)


def order(first: Labels, other: Labels, names: tuple[str, str], step: str) -> tuple[int, ...] | None:
    """Where the classes of one model are among another's; ``None`` where the order is the same.

    Raises ``UsageError`` where one has classes that the other has not.
    """
    if first == other:
        return None
    if sorted(map(str, first)) != sorted(map(str, other)):
        lists = [_shown(labels) for labels in (first, other)]
        raise UsageError(
            f"{step}: {names[0]} tells the classes {lists[0]} apart, and {names[1]} the classes {lists[1]}; they "
            "must be the same, in any order."
        )
    places = {str(label): place for place, label in enumerate(other)}
    found = tuple(places[str(label)] for label in first)
    return None if found == tuple(range(len(found))) else found


def gives_probabilities(value: ir.Value) -> bool:
    """Whether an output is made by a softmax or sigmoid, by division by a sum, or by a classifier that does so."""
    node = _maker(value)
    if node is None:
        return False
    if node.domain == _ML:
        return _classifies(node)
    first, *rest = node.inputs or (None,)
    if first is None or node.op_type in _NORMALIZED:
        return node.op_type in _NORMALIZED
    if node.op_type == "Concat":  # of one class: 1 - p beside p
        return all(one is not None and _is_share(one) for one in node.inputs)
    if node.op_type == "Div" and rest and rest[0] is not None:
        return _sums_up(rest[0], first, ("ReduceSum", "ReduceL1"))
    if node.op_type == "Exp":
        inner = _maker(first)
        if inner is not None and inner.op_type == "LogSoftmax":
            return True
        if inner is not None and inner.op_type == "Sub" and None not in inner.inputs:
            one, two = inner.inputs
            return one is not None and two is not None and _sums_up(two, one, ("ReduceLogSumExp",))
    return False


def _is_share(value: ir.Value) -> bool:
    node = _maker(value)
    if node is not None and node.op_type == "Sub" and node.inputs[1] is not None:
        value = node.inputs[1]
    return gives_probabilities(value)


def _sums_up(divisor: ir.Value, what: ir.Value, reductions: Sequence[str]) -> bool:
    """Whether the divisor is a sum of the dividend; something small may have been added to either."""
    wanted = {value for value, _ in _sum_of(what)}
    for value, node in _sum_of(divisor):
        if node is not None and node.op_type in reductions and node.inputs[0] is not None:
            return value not in wanted and not wanted.isdisjoint(_behind(node.inputs[0]))
    return False


def _sum_of(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """The value and what it is a copy or a sum of, each with the node that makes it, a few nodes deep."""
    waiting = [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        node = value.producer()
        yield value, node
        if node is not None and depth < _DEPTH and node.op_type in (*_PASSED, "Add", "Max", "Where"):
            waiting += [(one, depth + 1) for one in node.inputs if one is not None]


def _classifies(node: ir.Node) -> bool:
    """Whether an operator of ONNX-ML gives probabilities."""

    def given(name: str) -> ir.Attr | None:
        return node.attributes.get(name)

    if node.op_type == "Normalizer":
        norm = given("norm")
        return norm is not None and norm.as_string() == "L1"
    transform = given("post_transform")
    if transform is not None and transform.as_string() in _TRANSFORMS:
        return True
    if node.op_type == "SVMClassifier":
        return given("prob_a") is not None
    weights = given("class_weights")
    if node.op_type != "TreeEnsembleClassifier" or weights is None:
        return False
    return _are_shares(node, np.array(weights.as_floats()))


def _are_shares(node: ir.Node, weights: np.ndarray[tuple[int], np.dtype[np.float64]]) -> bool:
    """Whether what the leaves of trees add is never negative, and of no more than one in all: a forest's shares."""
    ids = [node.attributes.get(f"class_{key}") for key in ("treeids", "nodeids")]
    if any(one is None for one in ids) or weights.min(initial=0) < 0:
        return False
    trees, leaves = (np.array(one.as_ints()) for one in ids if one is not None)
    _, place = np.unique(np.stack([trees, leaves]), axis=1, return_inverse=True)
    sums = np.bincount(place.reshape(-1), weights)
    most = np.zeros(int(trees.max(initial=0)) + 1)
    np.maximum.at(most, trees, sums[place.reshape(-1)])
    return bool(most.sum() <= 1.001)


def _looked_up(label: ir.Value, columns: set[ir.Value]) -> Labels | None:
    """The list that a label is looked up in, at the place of the largest of what the scores are made of."""
    node = _maker(label)
    if node is None or node.op_type not in ("ArrayFeatureExtractor", "Gather") or None in node.inputs[:2]:
        return None
    words, place = node.inputs[:2]
    chosen = None if place is None else _maker(place)
    tensor = None if words is None else constant_tensor(words)
    if tensor is None or chosen is None or chosen.op_type != "ArgMax" or chosen.inputs[0] is None:
        return None
    if columns.isdisjoint(_behind(chosen.inputs[0])) or tensor.size > 1 << 16:
        return None
    if tensor.dtype == ir.DataType.STRING:
        return tuple(bytes(one).decode(errors="replace") for one in tensor.numpy().flat)
    return tuple(int(one) for one in tensor.numpy().flat) if tensor.dtype.is_integer() else None


def _voted(value: ir.Value) -> ir.Node | None:
    """The SVMClassifier between pairs of classes, where nothing else goes into the votes that each class gets."""
    node = value.producer()
    makers = [one.producer() for one in (node.inputs if node is not None else ()) if one is not None]
    if node is None or node.op_type != "Add" or all(one is None or one.op_type != "Concat" for one in makers):
        return None
    waiting, seen, found = [value], set[ir.Value](), set[ir.Node]()
    while waiting:
        one = waiting.pop()
        node = one.producer()
        if one.is_graph_input() and one.const_value is None:
            return None
        if node is not None and _is_of_pairs(node):
            found.add(node)
        elif node is not None and one not in seen:
            waiting += [source for source in node.inputs if source is not None]
        seen.add(one)
    return found.pop() if len(found) == 1 else None


def _is_of_pairs(node: ir.Node) -> bool:
    """Whether the scores are decisions between two classes each, of three classes or more."""
    counts = node.attributes.get("vectors_per_class")
    if node.domain != _ML or node.op_type != "SVMClassifier" or node.attributes.get("prob_a") is not None:
        return False
    return counts is not None and len(counts.as_ints()) > 2


def _columns(value: ir.Value) -> Iterator[ir.Value]:
    """The value, and those whose classes it keeps: what it is a copy of, or normalized from, as in x / sum(x)."""
    yield value
    while (node := value.producer()) is not None and node.op_type in _KEPT and node.inputs[0] is not None:
        value = node.inputs[0]
        yield value


def _behind(value: ir.Value) -> Iterator[ir.Value]:
    """The value, and those that it is a cast or reshaped copy of."""
    yield value
    while (node := value.producer()) is not None and node.op_type in _PASSED and node.inputs[0] is not None:
        value = node.inputs[0]
        yield value


def _maker(value: ir.Value) -> ir.Node | None:
    """The node that makes a value, past casts and the like."""
    *_, last = _behind(value)
    return last.producer()


def _is_zipmap(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.domain == _ML and node.op_type == "ZipMap"


def _listed(node: ir.Node | None) -> Labels | None:
    for key in _KEYS if node is not None and node.domain == _ML else ():
        assert node is not None
        attribute = node.attributes.get(key)
        if attribute is not None and attribute.value:
            return tuple(attribute.as_strings()) if key == _KEYS[0] else tuple(attribute.as_ints())
    return None


def _shown(labels: Sequence[Hashable]) -> str:
    return ", ".join(printable(str(label)) for label in labels[:8])
