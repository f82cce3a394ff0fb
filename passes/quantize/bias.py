"""Biases that take back how far quantization moved the mean of each output channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses, graphs
from ...ir.constants import new_constant
from ...ir.edit import Names, become
from ...ir.errors import UsageError
from ...ir.match import attribute
from ...ir.scopes import scopes
from ...ir.trace import Use, constant
from ...ir.view import reads
from ...ir.weights import Weight, weights
from ..answers import answers
from ..base import Array, Context, Effect, Feeds, Pass, register
from ..feeds import Some
from ..points import Mean
from ..selection import NOTHING, Selection, left_out
from .fold_columns import plain
from .original import Layer, original, quantized_layers

_CHANNELS = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}
"""The axis of output channels."""
Holder = tuple[Weight, Use]


@register("correct-bias")
class CorrectBias(Pass):
    """Put into each bias what quantization took from the mean of its output channel.

    For Conv, ConvTranspose, Gemm and MatMul with integer weights, after a pass that quantized them (or with the float
    model given as ``--with original=MODEL``). The mean of each output channel over the sample data is compared with
    that of the float model, and the bias takes the difference (Nagel et al. 2019, arXiv 1906.04721, section 4.2, by
    measurement). Layers are corrected in the order of the graph, each measured with all before it corrected, in up to
    ``sweeps`` sweeps over ``runs`` of the sample data; in a deeper model neighbours share a sweep, which corrects less
    well. Biases of int32 move by whole steps; a layer without one gets one, but a MatMul has to have an Add of a
    constant behind it. If the means are no nearer in the end, all biases stay as they were.
    """

    sweeps: int = 64
    runs: int = 64
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def validate(self) -> None:
        if self.sweeps < 1 or self.runs < 1:
            raise UsageError("correct-bias: sweeps and runs are numbers of at least 1.")

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` without sample data or the float model."""
        with plain(model, ctx):
            self._run(model, ctx)

    def _run(self, model: ir.Model, ctx: Context) -> None:
        float_model, trial = original(model, ctx), model.clone()
        found = self._biases(trial, float_model, ctx)
        data = Some(ctx.data, self.runs)
        wanted = _means(float_model, {bias: bias.wanted for bias in found}, data, ctx)
        before = _means(trial, {bias: bias.output for bias in wanted}, data, ctx)
        names, means = Names(trial), before
        for number, group in enumerate(_groups(trial, list(before), self.sweeps)):
            if number:
                means = _means(trial, {bias: bias.output for bias in group}, data, ctx)
            for bias in group:
                if bias in means:
                    bias.shift(wanted[bias] - means[bias], trial, names)
        after = _means(trial, {bias: bias.output for bias in before}, data, ctx)
        errors = {bias: (_error(wanted[bias], before[bias]), _error(wanted[bias], after[bias])) for bias in after}
        better = sum(new**2 for _, new in errors.values()) < sum(old**2 for old, _ in errors.values())
        if better and len(after) == len(before):
            become(model, trial)
            for bias, (old, new) in errors.items():
                ctx.change(bias.layer.address, "bias corrected", mean_error_before=old, mean_error_after=new)
        else:
            for bias in before:
                ctx.skip(bias.layer.address, "no correction brings the means nearer to the float model's")

    def _biases(self, model: ir.Model, float_model: ir.Model, ctx: Context) -> list[_Bias]:
        """The biases of quantized layers; a line in the ledger for a layer without."""
        holders = {(use.node, use.port): (weight, use) for weight in weights(model) for use in weight.uses}
        twins = {place: node for node, place in addresses(float_model).items() if isinstance(node, ir.Node)}
        known, found = addresses(model), list[_Bias]()
        for layer in quantized_layers(model, float_model):
            if isinstance(layer, tuple):
                ctx.skip(*layer)
                continue
            bias: _Bias | str | None = left_out(layer.use.node, self.only, self.keep)
            if bias is None:
                place = _place(layer, holders)
                twin = layer.twin_use.node if place[0] is layer.use.node else twins.get(known[place[0]])
                bias = _bias(layer, place, twin, holders)
            if isinstance(bias, str):
                ctx.skip(layer.address, bias)
            else:
                found.append(bias)
        return found


@dataclass(eq=False)
class _Bias:
    """The bias of a quantized layer: input ``port`` of ``node``.

    ``wanted`` is the value of the float model that holds the sum. ``holder``: the constant that is the bias and nothing
    else; None where there is none, or others share it: then it is ``start`` [...], and becomes one of its own.
    """

    layer: Layer
    node: ir.Node
    port: int
    wanted: ir.Value
    holder: Holder | None
    start: Array

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    def shift(self, by: Array, model: ir.Model, names: Names) -> None:
        """Add ``by`` [channels] to it."""
        if self.node.op_type == "Gemm":
            by = by / float(attribute(self.node, "beta", 1.0))
        if self.holder is None:
            self._write(self.start + by, model, names)
            return
        weight, use = self.holder
        array, quantization = weight.array(), use.quantization
        if quantization is None:
            weight.replace((array.astype(np.float64) + _along(by, array.ndim)).astype(array.dtype))
            return
        steps = np.rint(array.astype(np.float64) + _along(by, array.ndim) / quantization.scale.astype(np.float64))
        limits = np.iinfo(array.dtype)
        weight.replace(np.clip(steps, limits.min, limits.max).astype(array.dtype))

    def _write(self, array: Array, model: ir.Model, names: Names) -> None:
        """A new constant: int32 in steps of the layer's two scales where it runs on integers, else float."""
        scope = next(scope for scope in scopes(model) if scope.graph is self.node.graph)
        stem = names.fresh(f"{self.node.name or self.node.op_type}_bias")
        dtype = self.output.dtype or ir.DataType.FLOAT
        scale, nodes = _product_scale(self.layer, array.size), list[ir.Node]()

        def store(content: Array, name: str) -> ir.Value:
            value, node = new_constant(scope, ir.Tensor(content, name=name), name)
            if node is None:
                scope.graph.register_initializer(value)
            else:
                nodes.append(node)
            return value

        if scale is None:
            bias = store(array.astype(dtype.numpy()), stem)
        else:
            steps = np.clip(np.rint(array / scale.astype(np.float64)), -(2**31) + 1, 2**31 - 1).astype(np.int32)
            parameters = [store(steps, names.fresh(f"{stem}_quantized")), store(scale, names.fresh(f"{stem}_scale"))]
            node = ir.node("DequantizeLinear", parameters, {"axis": 0}, name=names.fresh(f"{stem}_DequantizeLinear"))
            bias, made = node.outputs[0], ir.TensorType(ir.DataType.FLOAT)
            bias.name, bias.type, bias.shape = names.fresh(f"{stem}_dequantized"), made, ir.Shape([array.size])
            nodes.append(node)
        scope.graph.insert_before(self.node, nodes)
        self.node.resize_inputs(max(self.port + 1, len(self.node.inputs)))
        self.node.replace_input_with(self.port, bias)
        self.holder = next(
            (weight, use)
            for weight in weights(model)
            for use in weight.uses
            if (use.node, use.port) == (self.node, self.port)
        )


def _bias(
    layer: Layer, place: tuple[ir.Node, int], twin: ir.Node | None, holders: Mapping[tuple[ir.Node, int], Holder]
) -> _Bias | str:
    """The bias at ``place``; ``twin`` is the same node of the float model. Else why it cannot be corrected."""
    node, port = place
    if layer.use.node.domain or layer.use.node.op_type not in _CHANNELS:
        return f"the bias of {layer.use.node.op_type} is not corrected here"
    matrix = layer.use.node.op_type in ("Gemm", "MatMul")
    if matrix and (layer.use.port != 1 or len(layer.weight.shape) != 2):
        return "its weight is not one matrix on the right"
    if node.op_type == "MatMul":
        return "a MatMul without an Add of a constant behind it has no bias"
    if twin is None or twin.op_type != node.op_type:
        return "the float model adds no bias there"
    channels = layer.weight.size if layer.use.output_axis is None else layer.weight.shape[layer.use.output_axis]
    if layer.use.node.op_type == "ConvTranspose":
        channels *= attribute(layer.use.node, "group", 1)
    if port >= len(node.inputs) or node.inputs[port] is None:
        return _Bias(layer, node, port, twin.outputs[0], None, np.zeros(channels))
    holder = holders.get(place)
    if holder is None or holder[0].overridable or holder[0].output:
        return "its bias is computed, or given by the model's caller"
    weight, use = holder
    alone = len(weight.uses) == 1 and len(weight.values) == 1
    if use.quantization is None:
        array = weight.array().astype(np.float64)
        if array.shape[-1:] == (channels,) and alone:
            return _Bias(layer, node, port, twin.outputs[0], holder, array)
        return _Bias(layer, node, port, twin.outputs[0], None, array + np.zeros(channels))
    if not alone or weight.shape[-1:] != (channels,):
        return "its bias is stored in integers that others share, or not one for each channel"
    return _Bias(layer, node, port, twin.outputs[0], holder, np.zeros(channels))


def _place(layer: Layer, holders: Mapping[tuple[ir.Node, int], Holder]) -> tuple[ir.Node, int]:
    """The node and port that add the bias; the MatMul itself where nothing does."""
    node = layer.use.node
    if node.op_type != "MatMul" or node.domain:
        return node, 2
    value = node.outputs[0]
    while len(uses := tuple(value.uses())) == 1 and not value.is_graph_output():
        reader, port = uses[0]
        if reader.op_type == "Add" and not reader.domain and (reader, 1 - port) in holders:
            return reader, 1 - port
        if reader.op_type not in ("QuantizeLinear", "DequantizeLinear", "Identity") or port != 0:
            break
        value = reader.outputs[0]
    return node, 2


def _product_scale(layer: Layer, channels: int) -> Array | None:
    """The scale of the layer's sums [channels], float32; None where its input does not come from integers."""
    read, quantization = layer.use.node.inputs[layer.data], layer.use.quantization
    source = None if read is None else read.producer()
    if source is None or source.op_type != "DequantizeLinear" or quantization is None or quantization.block:
        return None
    scale = constant(source.inputs[1])
    if scale is None or scale.size != 1 or quantization.scale.size not in (1, channels):
        return None
    return np.ones(channels, np.float32) * scale.reshape(()) * quantization.scale.reshape(-1)


def _means(model: ir.Model, values: Mapping[_Bias, ir.Value], data: Feeds, ctx: Context) -> dict[_Bias, Array]:
    """The mean of each output channel in the sample data; a line in the ledger for a layer that has none."""
    if not values:
        return {}
    known = addresses(model)
    points = {bias: Mean(known[value], _CHANNELS[bias.layer.use.node.op_type]) for bias, value in values.items()}
    found, reasons = answers(model, list(points.values()), ctx, data)
    means = {}
    for bias, point in points.items():
        if point in reasons or not found[point].seen:
            ctx.skip(bias.layer.address, reasons.get(point, "no sample reaches it"))
        else:
            means[bias] = np.asarray(found[point].mean)
    return means


def _groups(model: ir.Model, found: Sequence[_Bias], most: int) -> Iterator[list[_Bias]]:
    """``found`` by how many of them lie before each, in at most ``most`` groups of neighbours."""
    owners = {bias.node: bias for bias in found}
    depth: dict[ir.Value, int] = {}
    levels: dict[int, list[_Bias]] = {}
    for _, graph in graphs(model):
        for node in graph:
            before = max((depth.get(value, 0) for value in reads(node)), default=0)
            if node in owners:
                levels.setdefault(before, []).append(owners[node])
            depth.update((value, before + (node in owners)) for value in node.outputs)
    order = sorted(levels)
    parts = min(most, len(order))
    for number in range(parts):
        part = order[number * len(order) // parts : (number + 1) * len(order) // parts]
        yield [bias for level in part for bias in levels[level]]


def _along(by: Array, rank: int) -> Array:
    """``by`` along the last of ``rank`` axes, where biases have their channels."""
    return by.reshape((1,) * (rank - 1) + (-1,))


def _error(wanted: Array, found: Array) -> float:
    """The root mean square of ``found`` - ``wanted``, as a share of that of ``wanted``."""
    scale = float(np.sqrt(np.square(wanted).mean()))
    return float(np.sqrt(np.square(found - wanted).mean())) / max(scale, float(np.finfo(np.float32).tiny))
