"""How sure a model is of its answer, and the If that hands what it is not sure of to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...ir.edit import Names
from ...ir.join import Placed
from ...ir.references import replace_all_uses
from ...ir.shapes import dims
from .algebra import Operators

Confidence = Literal["max-prob", "margin", "entropy"]

_BOOL, _INT = ir.DataType.BOOL, ir.DataType.INT64
_TINY = 1e-30  # in place of a probability of zero, whose logarithm there is none


def confidence(algebra: Operators, scores: ir.Value, kind: Confidence, *, logits: bool) -> ir.Value:
    """How sure each row of ``scores`` [samples, classes] is, [samples]: more is surer.

    ``max-prob`` is the largest probability, ``margin`` what the second one is less, ``entropy`` the entropy in nats,
    negated.
    """
    batch, dtype = (dims(scores) or (None,))[0], scores.dtype or ir.DataType.FLOAT
    if kind == "entropy":
        if logits:
            chances, logs = algebra.softmax(scores, 1), algebra.log_softmax(scores, 1)
        else:
            least = algebra.constant(np.array(_TINY, dtype.numpy()), "tiny")
            chances, logs = scores, algebra.log(algebra.most(scores, least))
        product = algebra.node("Mul", [chances, logs], {}, dtype, dims(scores))
        axes = algebra.constant(np.array([1], np.int64), "axes")
        return algebra.node("ReduceSum", [product, axes], {"keepdims": 0}, dtype, [batch])
    chances = algebra.softmax(scores, 1) if logits else scores
    if kind == "max-prob" and logits:  # quicker than TopK; given probabilities may be partly NaN, which it passes over
        if algebra.joined.model.opset_imports[""] < 18:
            return algebra.node("ReduceMax", [chances], {"axes": [1], "keepdims": 0}, dtype, [batch])
        axes = algebra.constant(np.array([1], np.int64), "axes")
        return algebra.node("ReduceMax", [chances, axes], {"keepdims": 0}, dtype, [batch])
    count = 1 if kind == "max-prob" else 2
    top = algebra.node("TopK", [chances, algebra.constant(np.array([count], np.int64), "k")], {"axis": 1}, dtype, None)
    indices = ir.Value(type=ir.TensorType(_INT))
    node = top.producer()
    assert node is not None
    node.resize_outputs(2)
    node.outputs[1].type = indices.type
    node.outputs[1].name = Names(algebra.joined.model).fresh("top_indices")
    first, *second = (
        algebra.node("Gather", [top, algebra.constant(np.array(place, np.int64), "place")], {"axis": 1}, dtype, [batch])
        for place in range(count)
    )
    return algebra.node("Sub", [first, *second], {}, dtype, [batch]) if second else first


def route(
    algebra: Operators,
    sure: ir.Value,
    threshold: float,
    big: Placed,
    feeds: Mapping[str, ir.Value],
    pairs: Sequence[tuple[ir.Value, ir.Value]],
    *,
    by_sample: bool,
) -> list[ir.Value]:
    """Move ``big`` into an If that runs where ``sure`` is less than ``threshold``, or not a number.

    ``feeds`` are what its inputs read, ``pairs`` the answers of the small model beside those of the big one. With
    ``by_sample`` only the unsure rows are run, and take the place of those in the small model's answer; else all rows,
    whose answers are all taken. -> the outputs of the If.
    """
    joined = algebra.joined
    graph = joined.model.graph
    dtype = (sure.dtype or ir.DataType.FLOAT).numpy()
    limit = algebra.constant(np.array(threshold, dtype), "threshold")
    known = algebra.node("GreaterOrEqual", [sure, limit], {}, _BOOL, dims(sure))
    unsure = algebra.node("Not", [known], {}, _BOOL, dims(sure))
    places = algebra.node("NonZero", [unsure], {}, _INT, [1, None])
    count = algebra.node("Size", [places], {}, _INT, [])
    any_unsure = algebra.node("Greater", [count, algebra.constant(np.array(0, np.int64), "zero")], {}, _BOOL, [])
    before: list[ir.Node] = []
    after: list[ir.Node] = []
    names = Names(joined.model)
    rows = columns = places
    if by_sample:
        axes = algebra.constant(np.array([0], np.int64), "axes")
        before = [ir.node("Squeeze", [places, axes]), ir.node("Transpose", [places], {"perm": [1, 0]})]
        rows, columns = (node.outputs[0] for node in before)
    for name, value in feeds.items():
        own, given = big.inputs[name], value
        if by_sample:
            before.append(ir.node("Gather", [value, rows], {"axis": 0}))
            given = before[-1].outputs[0]
            given.type = value.type
            given.shape = own.shape
        graph.inputs.remove(own)
        replace_all_uses(own, given)
    graph.remove(big.nodes)
    for small, found in pairs:
        inputs = [small, columns, found] if by_sample else [found]
        after.append(ir.node("ScatterND" if by_sample else "Identity", inputs))
    otherwise = [ir.node("Identity", [small]) for small, _ in pairs]
    for nodes in (before, after, otherwise):
        names.give(nodes, "cascade")
    for nodes in (after, otherwise):
        for node, (small, _) in zip(nodes, pairs, strict=True):
            node.outputs[0].type, node.outputs[0].shape = small.type, small.shape
    branches = {
        "then_branch": ir.Graph(
            [], [node.outputs[0] for node in after], nodes=[*before, *big.nodes, *after], name="big"
        ),
        "else_branch": ir.Graph([], [node.outputs[0] for node in otherwise], nodes=otherwise, name="small"),
    }
    choice = ir.node("If", [any_unsure], branches, num_outputs=len(pairs))
    for output, (small, _) in zip(choice.outputs, pairs, strict=True):
        output.type, output.shape = small.type, small.shape
    joined.append(choice)
    _settle_weights(branches["then_branch"], graph, big)
    return list(choice.outputs)


def _settle_weights(branch: ir.Graph, graph: ir.Graph, big: Placed) -> None:
    """Let weights that only the branch reads be its own: ONNX Runtime lays out anew, for its faster kernels, only
    those that are in one graph with the nodes that read them."""
    outside = set(graph.outputs) | set(graph.inputs)
    inside = set(branch)
    for value in dict.fromkeys(big.constants.values()):
        name = value.name or ""
        if graph.initializers.get(name) is value and value not in outside:
            users = [user for user, _ in value.uses()]
            if users and all(user in inside for user in users):
                graph.initializers.pop(name)
                branch.initializers[name] = value
