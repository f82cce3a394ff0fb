"""Which value of a float model each value of its quantized model stands for, whatever tool quantized it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from ..ir.address import bodies
from ..ir.affine import Affine, Grid
from ..ir.kernels import bounds, fused_activation, matmul_bias
from ..ir.ops import Kind, is_random, operator
from ..ir.trace import constant
from ..ir.view import reads
from ..passes.quantize.columns import KEY as COLUMNS

_SUFFIXES = (  # what tools add to the name of a value
    "_quantized",
    "_dequantized",
    "_QuantizeLinear_Output",
    "_DequantizeLinear_Output",
    "_QuantizeLinear_Input",
)
_NODE_SUFFIXES = ("_quant", "_quantized")


@dataclass(frozen=True, eq=False)
class Match:
    """A value of the float model, and what stands for it in the quantized one: integers, and the float itself.

    ``integers`` are values with the numbers they stand for; more than one where several QuantizeLinear read it.
    ``plain`` is None where no operator there gives or takes it as a float.
    """

    origin: ir.Value
    integers: tuple[tuple[ir.Value, Affine], ...]
    plain: ir.Value | None

    @property
    def name(self) -> str:
        """Of the value in the float model."""
        return self.origin.name or ""

    @cached_property
    def shown(self) -> tuple[ir.Value, Affine | None] | None:
        """The value to look at, and what it stands for: integers, for there what was rounded and cut off shows.

        None where there is but an input, or a float that ONNX Runtime never computes, amid one of its integer kernels.
        """
        if self.integers:
            return self.integers[0]
        unseen = self.plain is None or self.plain.is_graph_input() or _inside(self.plain)
        return None if unseen or self.plain is None else (self.plain, None)

    @property
    def value(self) -> ir.Value:
        """What to look at. Raises ``ValueError`` where there is nothing."""
        return self._seen[0]

    @property
    def affine(self) -> Affine | None:
        """What its integers stand for; None where it is a float. Raises ``ValueError`` where there is nothing."""
        return self._seen[1]

    @property
    def _seen(self) -> tuple[ir.Value, Affine | None]:
        if self.shown is None:
            raise ValueError(f"nothing of {self.name} can be looked at")
        return self.shown


def match(model: ir.Model, quantized: ir.Model) -> list[Match]:
    """The values of the main graph of ``model`` that ``quantized`` has too, in the order they are computed in.

    Values are floats that depend on an input. Matched are equal names first; then what a QuantizeLinear or
    DequantizeLinear reads or gives; then names but for what tools add to them; then outputs of nodes of one name.
    """
    wanted = {value.name or "": value for value in floats(model.graph)}
    grids = _grids(quantized.graph)
    search = _Search(wanted, {node.name: node for node in model.graph if node.name}, grids)
    known = [(value, found) for value in varying(quantized.graph) if (found := search.origin(value)) is not None]
    taken = {found for _, found in known} | {value.name for value in varying(quantized.graph)}
    integers: dict[str, list[tuple[ir.Value, Affine]]] = {}
    plain: dict[str, ir.Value] = {}
    for value, found in known:
        if (affine := grids.get(value)) is not None:
            integers.setdefault(_after_activation(wanted[found], affine, taken), []).append((value, affine))
        elif _may_be_float(value) and not _shows_integers(value, grids):
            plain.setdefault(found, value)
    return [
        Match(value, tuple(integers.get(name, ())), plain.get(name))
        for name, value in wanted.items()
        if name in integers or name in plain
    ]


def varying(graph: ir.Graph) -> Iterator[ir.Value]:
    """The inputs of ``graph`` that have no default, and all that is computed from them or by chance, in order."""
    seen = {value for value in graph.inputs if value.const_value is None}
    yield from (value for value in graph.inputs if value in seen)
    for node in graph:
        if is_random(node) or any(True for _ in bodies(node)) or any(value in seen for value in reads(node)):
            found = [value for value in node.outputs if value.name]
            seen.update(found)
            yield from found


def floats(graph: ir.Graph) -> Iterator[ir.Value]:
    """Those of ``varying`` that are tensors of floats, or of no known type."""
    return (value for value in varying(graph) if _may_be_float(value))


@dataclass
class _Search:
    wanted: dict[str, ir.Value]
    nodes: dict[str, ir.Node]  # of the float model
    grids: dict[ir.Value, Affine]

    def origin(self, value: ir.Value) -> str | None:
        """The name in the float model of what ``value`` stands for."""
        name, node = value.name or "", value.producer()
        given = [node.outputs[0].name or "" for node, _ in value.uses() if _is(node, "DequantizeLinear")]
        read = _source(value) if _is(node, "QuantizeLinear", "DequantizeLinear") else None
        if name in self.wanted:
            return name
        if read is not None and (found := self.origin(read)) is not None and node is not None:
            return found
        if value in self.grids and (found := next(filter(self.wanted.__contains__, given), None)) is not None:
            return found
        if (found := self._stripped(name)) is not None:
            return found
        return self._twin(value, node)

    def _stripped(self, name: str) -> str | None:
        return next(
            (stem for end in _SUFFIXES if (stem := name.removesuffix(end)) != name and stem in self.wanted), None
        )

    def _twin(self, value: ir.Value, node: ir.Node | None) -> str | None:
        """The output of the float model's node of the same name, if that is the same operator, or it on integers."""
        if node is None or not node.name or COLUMNS in node.metadata_props:  # whose output has another shape
            return None
        names = (node.name, *(node.name.removesuffix(end) for end in _NODE_SUFFIXES))
        twin = next((self.nodes[name] for name in names if name in self.nodes), None)
        place = value.index() or 0
        if twin is None or place >= len(twin.outputs):
            return None
        integer = operator(twin).integer
        alike = node.op_type in (twin.op_type, None if integer is None else integer.kernel, f"QLinear{twin.op_type}")
        name = twin.outputs[place].name or ""
        return name if alike and name in self.wanted else None


def _after_activation(value: ir.Value, affine: Affine, taken: set[str | None]) -> str:
    """The name of what integers stand for whose range cuts off as much as the activation function behind ``value``.

    Tools remove such a function; then what they named after ``value`` holds its output.
    """
    uses = tuple(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        node = uses[0].node
        limits = bounds(node)
        if limits is not None and affine.scale.size == 1 and limits.hold(affine) and node.outputs[0].name not in taken:
            return node.outputs[0].name or ""
    return value.name or ""


def _inside(value: ir.Value) -> bool:
    """Whether ONNX Runtime may compute ``value`` in the midst of an integer kernel, which looking at it would break."""
    producer, uses = value.producer(), tuple(value.uses())
    if producer is None or value.is_graph_output():
        return False
    if not any(_is(read.producer(), "DequantizeLinear") for read in producer.inputs if read is not None):
        return False
    if any(_is(node, "QuantizeLinear") for node, _ in uses):
        return True
    return len(uses) == 1 and _merges(producer, uses[0].node)


def _merges(producer: ir.Node, node: ir.Node) -> bool:
    """Whether ``node`` may become a part of the kernel of ``producer`` that ends in a QuantizeLinear."""
    bias = matmul_bias(producer)
    if fused_activation(producer, node) is None and (bias is None or bias.add is not node):
        return False
    following = [use.node for use in node.outputs[0].uses()]
    return bool(following) and all(_is(one, "QuantizeLinear") or _merges(node, one) for one in following)


# What integers stand for ----------------------------------------------------------------------------------------------


def _grids(graph: ir.Graph) -> dict[ir.Value, Affine]:
    """The scale and zero point of each integer value that has constant ones."""
    grids: dict[ir.Value, Affine] = {}
    for node in graph:
        entry = operator(node)
        if entry.moves or (entry.integer is not None and entry.integer.kernel == "itself"):
            held = next((grids.get(value) for value in node.inputs if value is not None), None)
            found = held if held is not None and held.scale.size == 1 else None
            grids.update((value, found) for value in node.outputs[:1] if found is not None)
        elif (found := _given(node)) is not None:
            grids[node.outputs[0]] = found
    return grids


def _given(node: ir.Node) -> Affine | None:
    """The scale and zero point of the integers that ``node`` gives; None where it gives none, or they are not one."""
    place = _output_scale(node)
    if place is None or place >= len(node.inputs) or (scale := constant(node.inputs[place])) is None:
        return None
    given = node.inputs[place + 1] if place + 1 < len(node.inputs) else None
    dtype = ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8.value)
    zero_point = np.zeros((), dtype.numpy()) if given is None else constant(given)
    if zero_point is None or scale.size > 1 or zero_point.size > 1:
        return None
    dtype = ir.DataType.from_numpy(zero_point.dtype)
    scalars = scale.reshape(()).astype(np.float32), zero_point.reshape(())
    return Affine(*scalars, Grid.of(dtype)) if dtype.is_integer() else None


def _output_scale(node: ir.Node) -> int | None:
    """The input that holds the scale of what ``node`` gives, the zero point next to it; None where there is none."""
    if node.op_type == "QuantizeLinear":
        return 1
    if node.op_type == "QLinearConcat":
        return 0
    if not node.op_type.startswith("QLinear") and node.op_type != "QGemm":
        return None
    return max((port.index for port in operator(node).ports if port.kind is Kind.SCALE), default=None)


def _may_be_float(value: ir.Value) -> bool:
    """Whether ``value`` is a tensor of floats, or of no known type."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    return value.dtype in (None, ir.DataType.UNDEFINED) or bool(value.dtype and value.dtype.is_floating_point())


def _shows_integers(value: ir.Value, grids: Mapping[ir.Value, Affine]) -> bool:
    """Whether ``value`` only shows what ``grids`` has already, or is integers that nobody can tell the scale of."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "DequantizeLinear":
        return node.inputs[0] in grids
    return node.op_type.startswith("QLinear") or node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")


def _source(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    return None if node is None else node.inputs[0]


def _is(node: ir.Node | None, *names: str) -> bool:
    return node is not None and node.op_type in names
