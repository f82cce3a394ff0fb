"""Integer matrix products whose activations are quantized anew in every run: no calibration data is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...ir.affine import S8, S8_7BIT, U8, Grid, affine
from ...ir.constants import Array, constant_array, new_constant
from ...ir.dequantize import swapped
from ...ir.edit import Names, insert_before
from ...ir.encode import distortion, integers
from ...ir.match import Declined, attribute, decline
from ...ir.ops import operator
from ...ir.opset import NoConversion, raise_opset
from ...ir.ranges import channel_range
from ...ir.scopes import Scope, scopes
from ...ir.unused import discard
from ...ir.weights import Weight, weights
from ..base import Context, Effect, Pass, register
from ..selection import NOTHING, Selection, left_out
from .dynamic_layers import Layer
from .original import remember
from .recurrent import become_dynamic

GRIDS = {"s8": S8, "s8-7bit": S8_7BIT, "u8": U8}
OPSET = 11  # the first with DynamicQuantizeLinear


@register("quantize-dynamic")
class QuantizeDynamic(Pass):
    """Run matrix products and LSTMs on int8, with activations quantized in each run by their own range.

    MatMul and Gemm with a constant weight become DynamicQuantizeLinear, MatMulInteger, Cast and Mul, which ONNX Runtime
    fuses into one kernel; products of one input quantize it once. LSTM becomes ONNX Runtime's DynamicQuantizeLSTM.
    Weights are symmetric with one scale for each output channel: ``s8``, ``s8-7bit`` (cannot saturate on processors
    without VNNI) or ``u8``. Activations are uint8 over the whole range of the tensor, so large outliers cost accuracy.

    Convolutions stay float, for ConvInteger is slower than that; so do weights that other operators read too, which
    would then be stored twice, and layers too small to gain, unless ``only`` names them. Below opset 11 the model is
    raised to it first.
    """

    weights: Literal["s8", "s8-7bit", "u8"] = "s8"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        if any(0 < scope.version < OPSET for scope in scopes(model)):
            layers = self._layers(model, ctx.for_step(ctx.step))
            if not _raise(model, layers, ctx):
                return
        remember(model)
        writer = _Writer(model, GRIDS[self.weights])
        for layer in self._layers(model, ctx):
            try:
                number = writer.write(layer)
            except Declined as reason:
                ctx.skip(layer.address, str(reason))
            else:
                ctx.change(layer.address, layer.deed, sqnr=number)
        writer.finish()
        if not ctx.ledger.changes and not ctx.ledger.skips:
            ctx.skip("model", "it has no matrix product and no recurrent layer")

    def _layers(self, model: ir.Model, ctx: Context) -> list[Layer]:
        """What can and shall be quantized; a line in the ledger for each other layer with a constant weight."""
        constants = {value: weight for weight in weights(model) for value in weight.values}
        chosen: list[Layer] = []
        for scope in scopes(model):
            for node in scope.graph:
                if not operator(node).matrices:
                    continue
                layer = Layer(scope, node)
                try:
                    layer.read(constants)
                    self._check(layer)
                    chosen.append(layer)
                except Declined as reason:
                    ctx.skip(layer.address, str(reason))
        return list(_unshared(chosen, ctx))

    def _check(self, layer: Layer) -> None:
        subjects = [layer.node, *layer.weights]
        if any(subject in self.keep for subject in subjects):
            decline("kept by request")
        if self.only and not any(subject in self.only for subject in subjects):
            decline(left_out(layer.node, self.only, NOTHING) or "")
        if not self.only and (reason := layer.loss()):
            decline(reason)


def _unshared(chosen: list[Layer], ctx: Context) -> Iterator[Layer]:
    """The layers whose weights only layers read that are quantized as well."""
    while True:
        nodes = {layer.node for layer in chosen}
        lost = {
            layer: user
            for layer in chosen
            for weight in layer.weights
            if (user := "the model, as an output" if weight.output else _other_user(weight, nodes))
        }
        if not lost:
            yield from chosen
            return
        for layer, user in lost.items():
            ctx.skip(layer.address, f"its weight is read as float too, by {user}, and would be stored twice")
        chosen = [layer for layer in chosen if layer not in lost]


def _other_user(weight: Weight, nodes: set[ir.Node]) -> str | None:
    return next((use.node.op_type for use in weight.uses if use.node not in nodes), None)


def _raise(model: ir.Model, layers: list[Layer], ctx: Context) -> bool:
    """Bring the model to the opset that the new operators need; False where it cannot be."""
    if all(layer.is_lstm or layer.scope.version >= OPSET for layer in layers):
        return True
    to = max(OPSET, *(scope.version for scope in scopes(model)))
    try:
        report = raise_opset(model, to)
    except NoConversion as error:
        ctx.skip("main graph", f"it needs opset {OPSET}: {error}")
        return False
    for place, version in report.stamps:
        ctx.change(place, f"opset {version} to {to}")
    for address, what in report.rewritten:
        ctx.change(address, f"rewritten: {what}")
    return True


@dataclass(frozen=True, eq=False, slots=True)
class _Stored:
    """A quantized weight in the model: its integers, scales and zero point."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    sqnr: float


class _Writer:
    """Writes layers in integers; inputs and weights that several of them read are quantized once."""

    def __init__(self, model: ir.Model, grid: Grid) -> None:
        self.model, self.grid = model, grid
        self.names = Names(model)
        self.scopes = {scope.graph: scope for scope in scopes(model)}
        self.inputs: dict[tuple[ir.Graph, ir.Value, bool], tuple[ir.Value, ...]] = {}
        self.stored: dict[tuple[ir.Value, bool, float], _Stored] = {}  # by value, layout and alpha
        self.freed: list[ir.Value] = []

    def write(self, layer: Layer) -> float:
        """Let the layer's node compute on integers; returns the SQNR of its weights in dB. Declines for NaN."""
        pairs = zip(layer.weights, layer.swapped, strict=True)
        made = [self._weight(layer, weight, turned) for weight, turned in pairs]
        self.freed += [value for value in layer.node.inputs if value is not None]
        if layer.is_lstm:
            become_dynamic(layer.node, [(item.integers, item.scale, item.zero_point) for item in made])
            _import_microsoft(self.model, layer.scope)
        else:
            self._product(layer, made[0])
        return float(np.clip(round(min(item.sqnr for item in made), 2), -200, 200))

    def finish(self) -> None:
        """Take out what nothing reads any more."""
        made = [value for item in self.stored.values() for value in (item.integers, item.scale, item.zero_point)]
        discard(dict.fromkeys([*self.freed, *made]))

    # Weights ----------------------------------------------------------------------------------------------------------

    def _weight(self, layer: Layer, weight: Weight, turned: bool) -> _Stored:
        key = (weight.value, turned, layer.alpha)
        if key not in self.stored:
            self.stored[key] = self._store(layer, weight, turned)
        return self.stored[key]

    def _store(self, layer: Layer, weight: Weight, turned: bool) -> _Stored:
        """Integers [..., K, N] with a scale for each N: of an LSTM [directions, N], else it broadcasts over them."""
        *outer, rows, columns = weight.shape
        flat = weight.tensor
        if turned and outer:
            flat = ir.Tensor(flat.numpy().reshape(-1, columns))
        try:
            chosen = affine(*channel_range(flat, 0 if turned else len(outer) + 1), self.grid, symmetric=True)
        except ValueError:
            decline("its weight holds NaN or infinity")
        made, scale = integers(flat, chosen), chosen.scale * np.float32(layer.alpha)
        if turned:
            made = swapped(made if not outer else ir.Tensor(made.numpy().reshape(weight.shape)))
            scale = scale.reshape(*outer, 1, rows)
        scale = np.broadcast_to(scale, (*outer, 1, made.shape.numpy()[-1])).copy()
        scale = np.squeeze(scale, -2) if layer.is_lstm or not outer else scale
        zero = np.asarray(self.grid.middle, self.grid.dtype.numpy())
        return self._named(layer, weight, made, scale, zero, distortion(flat, chosen).sqnr)

    def _named(
        self, layer: Layer, weight: Weight, made: ir.TensorProtocol, scale: Array, zero: Array, sqnr: float
    ) -> _Stored:
        stem, zero_point = weight.value.name or "weight", None
        if layer.is_lstm:
            zero_point = self._constant(weight, ir.Tensor(np.full(scale.shape, zero)), f"{stem}_zero_point")
        elif zero:
            zero_point = self._constant(weight, ir.Tensor(zero), f"{stem}_zero_point")
        scales = self._constant(weight, ir.Tensor(scale), f"{stem}_scale")
        return _Stored(self._constant(weight, made, f"{stem}_quantized"), scales, zero_point, sqnr)

    def _constant(self, weight: Weight, tensor: ir.TensorProtocol, stem: str) -> ir.Value:
        """A constant where the weight lives, so that all that read it see it."""
        graph = weight.value.graph
        assert graph is not None
        name = self.names.fresh(stem)
        tensor.name = name
        value, node = new_constant(self.scopes[graph], tensor, name)
        if node is None:
            graph.register_initializer(value)
        else:
            graph.insert_before(graph[0], node)
        return value

    # Products ---------------------------------------------------------------------------------------------------------

    def _product(self, layer: Layer, weight: _Stored) -> None:
        """Let the node be the last of: integer product, Cast, scaling, and for Gemm adding C."""
        node = layer.node
        stem, name = node.name or node.op_type, node.outputs[0].name or "product"
        numbers, scale, zero_point = self._input(layer)
        operands = [numbers, weight.integers, zero_point, *([weight.zero_point] if weight.zero_point else [])]
        product = self._node("MatMulInteger", operands, f"{name}_integers")
        cast = self._node("Cast", product.outputs, f"{name}_unscaled", {"to": ir.DataType.FLOAT})
        factor = self._node("Mul", [scale, weight.scale], f"{name}_scale")
        last = ("Mul", cast.outputs[0], factor.outputs[0])
        made = [product, cast, factor]
        addend = self._addend(layer) if node.op_type == "Gemm" else None
        if addend is not None:
            scaled = self._node("Mul", [cast.outputs[0], factor.outputs[0]], f"{name}_scaled")
            made.append(scaled)
            last = ("Add", scaled.outputs[0], addend)
        self.names.give(made, stem)
        insert_before(node, made, self.names)
        node.op_type = last[0]
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(0, last[1])
        node.replace_input_with(1, last[2])

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, attributes: dict[str, int] | None = None
    ) -> ir.Node:
        made = ir.node(op_type, inputs, attributes)
        made.outputs[0].name = self.names.fresh(name)
        return made

    def _input(self, layer: Layer) -> tuple[ir.Value, ...]:
        """The layer's input as uint8, its scale and its zero point; made before the first layer that reads it."""
        value = layer.node.inputs[0]
        assert value is not None
        swapped = layer.node.op_type == "Gemm" and bool(attribute(layer.node, "transA", 0))
        key = (layer.scope.graph, value, swapped)
        if key not in self.inputs:
            name = value.name or "input"
            made = [ir.node("Transpose", [value], {"perm": [1, 0]})] if swapped else []
            source = made[0].outputs[0] if made else value
            quantize = ir.node("DynamicQuantizeLinear", [source], num_outputs=3)
            for output, role in zip(quantize.outputs, ("quantized", "scale", "zero_point"), strict=True):
                output.name = self.names.fresh(f"{name}_{role}")
            insert_before(layer.node, [*made, quantize], self.names)
            self.inputs[key] = tuple(quantize.outputs)
        return self.inputs[key]

    def _addend(self, layer: Layer) -> ir.Value | None:
        """Gemm's beta * C."""
        node = layer.node
        value = node.inputs[2] if len(node.inputs) > 2 else None
        beta = float(attribute(node, "beta", 1.0))
        if value is None or beta == 0:
            return None
        if beta == 1:
            return value
        name, array = value.name or "bias", constant_array(value)
        if array is not None:
            return self._new(layer, array * array.dtype.type(beta), f"{name}_scaled")
        scaled = ir.node("Mul", [value, self._new(layer, np.asarray(beta, np.float32), f"{name}_beta")])
        insert_before(node, scaled, self.names)
        return scaled.outputs[0]

    def _new(self, layer: Layer, array: Array, stem: str) -> ir.Value:
        value, node = new_constant(layer.scope, ir.Tensor(array), self.names.fresh(stem))
        if node is None:
            layer.scope.graph.register_initializer(value)
        else:
            insert_before(layer.node, node, self.names)
        return value


def _import_microsoft(model: ir.Model, scope: Scope) -> None:
    places = [model.opset_imports, *([scope.function.opset_imports] if scope.function is not None else [])]
    for place in places:
        place.setdefault("com.microsoft", 1)
