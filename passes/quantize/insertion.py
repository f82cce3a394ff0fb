"""Writing QuantizeLinear and DequantizeLinear into a graph, so that the units chosen run on integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from ...ir.affine import LEAST_SCALE, Affine, Grid, affine
from ...ir.constants import constant_tensor, new_constant
from ...ir.edit import Names, insert_after, insert_before
from ...ir.match import attribute
from ...ir.ops import operator
from ...ir.scopes import Scope, scopes
from ...ir.unused import discard
from .units import Port, Role, Unit

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

_FLOAT = ir.DataType.FLOAT
_ALMOST = 1 - 1e-6  # for what is lost where a scale becomes float32
_LARGEST_BIAS = 2**30  # a bias of more steps could overflow the sum of products, 32 bits


@dataclass(frozen=True, slots=True)
class Grids:
    """The integers of activations and weights, and whether scales are powers of two."""

    activations: Grid
    weights: Grid
    power_of_two: bool = False


@dataclass(slots=True)
class Inserter:
    """Writes the integer form of units, graph by graph; ``scales`` holds the scale of each activation."""

    model: ir.Model
    grids: Grids
    scales: Mapping[ir.Value, Affine]
    names: Names
    _weights: dict[tuple[ir.Value, int], tuple[ir.Value, Affine]] = field(default_factory=dict)
    _freed: list[ir.Value] = field(default_factory=list)
    _made: dict[ir.Value, Affine] = field(default_factory=dict)  # what stands behind integers; bodies may read it

    def write(self, scope: Scope, units: Iterable[Unit]) -> None:
        """Put ``units`` of one graph on integers."""
        units = list(units)
        made = {value: unit for unit in units for value in unit.outputs}
        read: dict[ir.Value, list[Port]] = {}
        for unit in units:
            for port in unit.inputs:
                value = unit.node.inputs[port]
                assert value is not None
                read.setdefault(value, []).append((unit.node, port))
        for unit in units:
            if unit.weight is not None:
                self._layer(scope, unit)
            for port in unit.constants:
                self._operand(scope, unit, port)
        for value in dict.fromkeys((*read, *made)):
            maker = made.get(value)
            if maker is None:
                self._into(scope, value, read[value])
            elif value in read or maker.needs_output:
                self._behind(value, maker)
        for unit in units:
            if unit.role is Role.CLAMP:
                self._clamp(unit)

    def finish(self) -> None:
        """Keep in float what is to stay there, and take out the constants that nothing reads any more."""
        for scope in scopes(self.model):
            for node in scope.graph:
                if _would_be_quantized(node) or _would_pool_integers(node):
                    self._guard(node)
        discard(self._freed)

    def _guard(self, node: ir.Node) -> None:
        """Put what ONNX Runtime does not move a scale over before ``node``: a Max, which of one operand is a copy."""
        guard = ir.node("Max", [node.inputs[0]], name=self.names.fresh(f"{node.name}_guard"))
        guard.outputs[0].name, guard.outputs[0].type = self.names.fresh(f"{node.name}_float"), ir.TensorType(_FLOAT)
        assert node.inputs[0] is not None
        guard.outputs[0].shape = node.inputs[0].shape
        insert_before(node, guard, self.names)
        node.replace_input_with(0, guard.outputs[0])

    # Activations ------------------------------------------------------------------------------------------------------

    def _behind(self, value: ir.Value, unit: Unit) -> None:
        """Everything reads what the unit makes through integers."""
        into = out = self.scales[value]
        if unit.role is Role.CLAMP:
            into, out = clamp_scales(unit.node, self.grids.activations)
        nodes, constants = self._pair(value.name or "", into, out)
        _read(nodes[0], value)
        assert value.graph is not None
        if value.is_graph_output():  # the new value takes its name, and it the new one's
            nodes[-1].outputs[0].name = self.names.fresh(f"{value.name}_float")
        _register(value.graph, constants)
        self._made[insert_after(value, nodes, self.names)] = out

    def _into(self, scope: Scope, value: ir.Value, ports: list[Port]) -> None:
        """Some ports read ``value``, made in float, through integers; all others as it is."""
        scale = self._scale(value)
        nodes, constants = self._pair(value.name or "", scale, scale)
        _read(nodes[0], value)
        _register(scope.graph, constants)
        first = next(node for node in scope.graph if any(node is reader for reader, _ in ports))
        insert_before(first, nodes, self.names)
        if _made_by(value) == "MaxPool":  # else ONNX Runtime would pool integers, with a kernel that is far slower
            self._guard(nodes[0])
        for node, port in ports:
            node.replace_input_with(port, nodes[1].outputs[0])

    def _scale(self, value: ir.Value) -> Affine:
        """The scale of ``value``, or of what it was made from by a unit of an outer graph."""
        return self._made[value] if value in self._made else self.scales[value]

    def _pair(self, stem: str, into: Affine, out: Affine) -> tuple[list[ir.Node], list[ir.Value]]:
        """A QuantizeLinear, whose input is yet to be set, and a DequantizeLinear, with their scales and zero points."""
        constants = self._parameters(stem, into)
        quantize = ir.node("QuantizeLinear", [None, *constants], name=self.names.fresh(f"{stem}_QuantizeLinear"))
        integers = quantize.outputs[0]
        integers.name, integers.type = self.names.fresh(f"{stem}_quantized"), ir.TensorType(into.grid.dtype)
        others = constants if out is into else self._parameters(stem, out)
        dequantize = ir.node("DequantizeLinear", [integers, *others], name=self.names.fresh(f"{stem}_DequantizeLinear"))
        floats = dequantize.outputs[0]
        floats.name, floats.type = self.names.fresh(f"{stem}_dequantized"), ir.TensorType(_FLOAT)
        return [quantize, dequantize], constants if out is into else [*constants, *others]

    def _clamp(self, unit: Unit) -> None:
        """A HardSigmoid becomes the identity that ONNX Runtime can run on integers; the scales behind it do the work.

        The quantization to steps of 1/(255 alpha) saturates where alpha x + beta leaves [0, 1].
        """
        node = unit.node
        identity = ir.node("LeakyRelu", [node.inputs[0]], {"alpha": 1.0}, name=node.name, num_outputs=1)
        identity.metadata_props.update(node.metadata_props)
        old, new = node.outputs[0], identity.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        assert node.graph is not None
        node.graph.insert_before(node, identity)
        old.replace_all_uses_with(new)
        node.graph.remove(node, safe=True)
        unit.nodes[0] = identity

    # Constants --------------------------------------------------------------------------------------------------------

    def _layer(self, scope: Scope, unit: Unit) -> None:
        """The weight as integers with a scale for each output channel, the bias in steps of the product's scale."""
        node, port = unit.node, unit.weight
        assert port is not None
        value = node.inputs[port]
        tensor = constant_tensor(value)
        assert value is not None
        assert tensor is not None
        axis = operator(node).port(port).axes(node, len(tensor.shape)).output
        assert axis is not None  # the output channels, on no other axis are scales right in ONNX Runtime
        source = self._scale(unit.sources[0])
        bias = None if unit.bias is None else _bias(unit.bias)
        integers, weight = self._integers(value, tensor, axis, source, bias)
        # Those of a Conv ONNX Runtime looks at in every run, and needs none where they are 0; for a Gemm it needs them.
        shifted = node.op_type != "Conv" or bool(np.any(weight.zero_point))
        nodes = [self._dequantize(scope, value.name or "", integers, weight, axis, with_zero_point=shifted)]
        node.replace_input_with(port, nodes[0].outputs[0])
        self._freed.append(value)
        if unit.bias is not None and bias is not None:
            nodes.append(self._bias(scope, unit, bias, source, weight))
        insert_before(node, nodes, self.names)

    def _integers(
        self, value: ir.Value, tensor: ir.TensorProtocol, axis: int, source: Affine, bias: Array | None
    ) -> tuple[ir.Value, Affine]:
        """The integers of a weight, once for all layers that read it along this axis and whose bias they can take."""
        least = None if bias is None else np.abs(bias) / (np.float64(source.scale) * _LARGEST_BIAS)
        known = self._weights.get((value, axis))
        if known is not None and (least is None or np.all(known[1].scale.reshape(-1) >= least * _ALMOST)):
            return known
        array = np.asarray(tensor.numpy(), np.float32)
        others = tuple(other for other in range(array.ndim) if other != axis)
        made = weight_affine(array, others, self.grids, least)
        stored = ir.Tensor(made.quantized(array), name=self.names.fresh(f"{value.name}_quantized"))
        constant = ir.Value(
            name=stored.name, type=ir.TensorType(stored.dtype), shape=ir.Shape(array.shape), const_value=stored
        )
        assert value.graph is not None
        value.graph.register_initializer(constant)
        self._weights[value, axis] = constant, made
        return constant, made

    def _bias(self, scope: Scope, unit: Unit, bias: Array, source: Affine, weight: Affine) -> ir.Node:
        assert unit.bias is not None
        node, port = unit.bias
        value = node.inputs[port]
        assert value is not None
        scale = (weight.scale.reshape(-1) * source.scale).astype(np.float32)
        steps = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
        grid = Grid.of(ir.DataType.INT32)
        stem, axis = value.name or "", 0
        if self._fails_as_gemm(scope, unit):
            steps, axis = steps[None], 1  # a row, of which ONNX Runtime makes no Gemm
        constant = self._constant(scope, steps, f"{stem}_quantized")
        made = Affine(scale, np.zeros(scale.shape, np.int32), grid)
        dequantize = self._dequantize(scope, stem, constant, made, axis, with_zero_point=False)
        node.replace_input_with(port, dequantize.outputs[0])
        self._freed.append(value)
        return dequantize

    def _fails_as_gemm(self, scope: Scope, unit: Unit) -> bool:
        """Whether the model would not load: ONNX Runtime mixes up int8 and uint8 where it reshapes a product to add a
        flat bias, from opset 21 on."""
        shape = unit.node.outputs[0].shape
        signed = self.grids.activations.dtype is ir.DataType.INT8 and scope.version >= 21
        return signed and unit.node.op_type == "MatMul" and shape is not None and len(shape) > 2

    def _operand(self, scope: Scope, unit: Unit, port: int) -> None:
        """A constant operand of arithmetic, in the integers of activations."""
        value = unit.node.inputs[port]
        tensor = constant_tensor(value)
        assert value is not None
        assert tensor is not None
        array = np.asarray(tensor.numpy(), np.float32)
        low, high = (array.min(), array.max()) if array.size else (0.0, 0.0)
        made = affine(low, high, self.grids.activations, power_of_two=self.grids.power_of_two)
        constant = self._constant(scope, made.quantized(array), f"{value.name}_quantized")
        node = self._dequantize(scope, value.name or "", constant, made, None)
        insert_before(unit.node, node, self.names)
        unit.node.replace_input_with(port, node.outputs[0])
        self._freed.append(value)

    def _dequantize(
        self,
        scope: Scope,
        stem: str,
        integers: ir.Value,
        made: Affine,
        axis: int | None,
        *,
        with_zero_point: bool = True,
    ) -> ir.Node:
        flat = made if axis is None else replace(made, scale=made.scale.ravel(), zero_point=made.zero_point.ravel())
        parameters = self._parameters(stem, flat) if with_zero_point else self._parameters(stem, flat)[:1]
        _register(scope.graph, parameters)
        attributes = {} if axis is None else {"axis": axis}
        node = ir.node(
            "DequantizeLinear",
            [integers, *parameters],
            attributes,
            name=self.names.fresh(f"{stem}_DequantizeLinear"),
        )
        output = node.outputs[0]
        output.name, output.type = self.names.fresh(f"{stem}_dequantized"), ir.TensorType(_FLOAT)
        output.shape = integers.shape
        return node

    def _parameters(self, stem: str, made: Affine) -> list[ir.Value]:
        """A scale and a zero point, of this pair of nodes alone: ONNX Runtime fuses only what is not shared."""
        parts = (("scale", np.asarray(made.scale, np.float32)), ("zero_point", np.asarray(made.zero_point)))
        found = []
        for word, array in parts:
            name = self.names.fresh(f"{stem}_{word}")
            tensor = ir.Tensor(array, dtype=made.grid.dtype if word == "zero_point" else None, name=name)
            found.append(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
            )
        return found

    def _constant(self, scope: Scope, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], stem: str) -> ir.Value:
        name = self.names.fresh(stem)
        value, _ = new_constant(scope, ir.Tensor(array, name=name), name)
        _register(scope.graph, [value])
        return value


def _would_be_quantized(node: ir.Node) -> bool:
    """Whether ONNX Runtime takes a float layer between integers for one whose weight somebody forgot to quantize."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or _made_by(node.inputs[0]) != "DequantizeLinear":
        return False
    if _made_by(node.inputs[1]) == "DequantizeLinear":
        return False
    reader = _only_reader(node.outputs[0])
    if reader is not None and reader.op_type in ("Relu", "Clip"):
        reader = _only_reader(reader.outputs[0])
    return reader is not None and reader.op_type == "QuantizeLinear"


def _would_pool_integers(node: ir.Node) -> bool:
    """Whether ONNX Runtime moves the DequantizeLinear before a float MaxPool behind it."""
    if node.op_type != "MaxPool" or _made_by(node.inputs[0]) != "DequantizeLinear":
        return False
    reader = _only_reader(node.outputs[0])
    return reader is None or reader.op_type != "QuantizeLinear"


def _made_by(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "" if node is None else node.op_type


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 else None


def weight_affine(
    array: Array, others: tuple[int, ...], grids: Grids, least: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None
) -> Affine:
    """A symmetric scale for each channel of a weight: over all axes but the one that ``others`` lacks.

    No scale is below ``least`` (one number a channel).
    """
    extent = np.abs(array).max(axis=others, keepdims=True, initial=0.0)
    made = affine(-extent, extent, grids.weights, symmetric=True, power_of_two=grids.power_of_two)
    if least is None:
        return made
    floor = np.maximum(least.reshape(made.scale.shape), LEAST_SCALE)
    if grids.power_of_two:
        floor = np.exp2(np.ceil(np.log2(floor)))
    return replace(made, scale=np.maximum(made.scale, floor.astype(np.float32)))


def clamp_scales(node: ir.Node, grid: Grid) -> tuple[Affine, Affine]:
    """HardSigmoid(x) = min(max(alpha x + beta, 0), 1) in two scales: that of x going in, that of [0, 1] coming out."""
    alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
    dtype = grid.dtype.numpy()
    offset = int(np.clip(np.floor(grid.steps * beta + 0.5), 0, grid.steps))
    into = Affine(np.asarray(1 / (grid.steps * alpha), np.float32), np.asarray(grid.lowest + offset, dtype), grid)
    out = Affine(np.asarray(1 / grid.steps, np.float32), np.asarray(grid.lowest, dtype), grid)
    return into, out


def _bias(place: Port) -> Array | None:
    node, port = place
    tensor = constant_tensor(node.inputs[port])
    return None if tensor is None else np.asarray(tensor.numpy(), np.float32).reshape(-1)


def _read(node: ir.Node, value: ir.Value) -> None:
    node.replace_input_with(0, value)


def _register(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    for value in values:
        graph.register_initializer(value)
