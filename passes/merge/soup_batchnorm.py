"""Means and variances of BatchNormalization, estimated anew where the weights before it have changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import onnx_ir as ir

from ...ir.address import graphs
from ...ir.constants import constant_tensor
from ...ir.match import attribute
from ..base import Array, Context
from ..points import ChannelMeans, Point, floats


@dataclass(frozen=True)
class Moments(Point):
    """Mean and variance of each channel along axis 1. The answer is a ``ChannelMoments``."""

    checks = True

    def start(self) -> ChannelMoments:
        return ChannelMoments(ChannelMeans(1), ChannelMeans(1))


@dataclass
class ChannelMoments:
    """``means`` of the elements and of their ``squares``, in float64."""

    means: ChannelMeans
    squares: ChannelMeans

    @property
    def seen(self) -> int:
        return self.means.seen

    @property
    def mean(self) -> Array:
        return self.means.mean

    @property
    def variance(self) -> Array:
        """Of the population; never below zero."""
        return np.asarray(np.maximum(self.squares.mean - self.means.mean**2, 0.0))

    def update(self, array: Array) -> None:
        self.means.update(array)
        self.squares.update(np.square(floats(array), dtype=np.float64))

    def merge(self, other: Self) -> None:
        self.means.merge(other.means)
        self.squares.merge(other.squares)


def reestimate(model: ir.Model, ctx: Context) -> None:
    """Give every BatchNormalization the mean and variance of what it reads on ``ctx.data``.

    From the inputs on: nodes that have as many others before them are measured in one sweep, with those before them
    set already (Izmailov et al. 2018, section 3.2, for weights that were averaged).
    """
    for _, graph in graphs(model):
        for node in graph if graph is not model.graph else ():
            if node.op_type == "BatchNormalization":
                ctx.skip(node, "mean and variance are averages, not estimated anew: it is in a body or function")
    for level in _levels(model.graph):
        able = [node for node in level if _able(node, ctx)]
        points = {node: Moments(node.inputs[0].name or "") for node in able if node.inputs[0] is not None}
        found = ctx.runner.statistics(model, dict.fromkeys(points.values()), ctx.data) if points else {}
        for node, point in points.items():
            moments = found[point]
            if not moments.seen:
                ctx.skip(node, "mean and variance are averages, not estimated anew: no sample reached it")
                continue
            for place, array in ((3, moments.mean), (4, moments.variance)):
                value = node.inputs[place]
                assert value is not None
                old = constant_tensor(value)
                assert old is not None
                store(value, ir.Tensor(array.astype(old.dtype.numpy()), name=old.name))
            ctx.change(node, "mean and variance estimated anew", elements=moments.seen)


def store(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let a constant hold ``tensor``, of its type and shape."""
    node = value.producer()
    if node is not None:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", tensor)
    if node is None or value.const_value is not None:
        value.const_value = tensor


def _levels(graph: ir.Graph) -> list[list[ir.Node]]:
    """The BatchNormalization nodes of the main graph, by how many there are before them on the longest way."""
    depth: dict[ir.Value, int] = {}
    levels: list[list[ir.Node]] = []
    for node in graph:
        before = max((depth.get(value, 0) for value in _reads(node)), default=0)
        if node.op_type == "BatchNormalization" and not node.domain:
            levels += [[] for _ in range(before + 1 - len(levels))]
            levels[before].append(node)
            before += 1
        for value in node.outputs:
            depth[value] = before
    return levels


def _reads(node: ir.Node) -> list[ir.Value]:
    found = [value for value in node.inputs if value is not None]
    for one in node.attributes.values():
        if one.is_ref() or one.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        for body in [one.value] if one.type == ir.AttributeType.GRAPH else one.value:
            found += [value for inner in body.all_nodes() for value in inner.inputs if value is not None]
    return found


def _able(node: ir.Node, ctx: Context) -> bool:
    reason = None
    held = node.inputs[3:5]
    if attribute(node, "training_mode", 0):
        reason = "it computes them itself"
    elif any(constant_tensor(value) is None for value in held):
        reason = "they are no constants"
    elif any(value is not None and len(value.uses()) > 1 for value in held):
        reason = "they are shared with another node"
    if reason is not None:
        ctx.skip(node, f"mean and variance not estimated anew: {reason}")
    return reason is None
