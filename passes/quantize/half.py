"""A graph that computes in float16 where that is safe, with Casts where it meets what stays float32."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir

from ...ir.address import bodies
from ...ir.constants import constant_tensor
from ...ir.edit import Names
from ...ir.ops import is_random
from ...ir.references import is_annotated, is_named, renaming, replace_sharded
from ...ir.scopes import values
from ...ir.shapes import inferred
from ...ir.sparse import SparseTensor
from ...ir.storage import BLOCK, LARGE, Read, StreamedTensor, reader
from ..base import Context
from ..selection import Selection, left_out

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
GREATEST = float(np.finfo(np.float16).max)  # 65504
LARGEST_ERROR = 2.0**-9
"""Of a constant, in the norm: four times what rounding makes at most. Past it, what is lost is more than rounding."""

PAST = "holds more than the 65504 of float16"
_INDIFFERENT = ("Cast", "Constant", "Shape", "Size")  # they take either, and what they make does not depend on it

_LAYERS = "Conv ConvTranspose Gemm MatMul Einsum"
_MOVING = """
    Identity Reshape Transpose Flatten Squeeze Unsqueeze Concat Split Slice Expand Tile DepthToSpace SpaceToDepth
    Gather GatherElements GatherND Pad Where ScatterElements ScatterND Trilu
"""
_PLAIN = """
    Add Sub Mul Neg Abs Min Max Relu LeakyRelu PRelu Clip Sigmoid Tanh HardSigmoid HardSwish Elu Selu Gelu Erf Mish
    Swish Softsign ThresholdedRelu MaxPool AveragePool GlobalAveragePool GlobalMaxPool Dropout
"""
LAYERS = frozenset(_LAYERS.split())
SAFE = LAYERS | frozenset((_MOVING + _PLAIN).split())
"""Operators of the ONNX domain whose float16 results are those of float32, rounded, on numbers that fit.

Not among them: what squares, exponentiates, divides, sums or counts up (norms, Softmax, Pow, Exp, Div, reductions,
Range, CumSum, recurrent layers), what compares, sorts or rounds to whole numbers, and what ONNX Runtime's CPU has no
float16 for.
"""


def to_half(model: ir.Model, names: Names, only: Selection, keep: Selection, ctx: Context, *, interface: bool) -> None:
    """Let the main graph compute in float16; ``interface``: its inputs and outputs of float32 become float16 too.

    Bodies and functions stay as they are, and what they capture and are called with stays float32 for them.
    """
    chosen = _Choice(model, only, keep, ctx)
    _Writer(chosen, names, interface).run()
    for op_type, count in Counter(node.op_type for node in chosen.nodes).items():
        ctx.change(f"{count} {op_type}", "computes in float16", nodes=count)


def fault(tensor: ir.TensorProtocol) -> str | None:
    """Why a float32 tensor cannot be held in float16, as a clause; None where it can."""
    if isinstance(tensor, SparseTensor):
        return "is stored sparse, and would be dense once changed"
    signal, noise, read = 0.0, 0.0, reader(tensor)
    for start in range(0, tensor.size, BLOCK):
        part = read(start, min(start + BLOCK, tensor.size))
        largest = np.abs(part).max()
        if not np.isfinite(largest):
            part = part[np.isfinite(part)]  # NaN and infinities stay what they are
            largest = np.abs(part).max(initial=0)
        if largest > GREATEST:
            return f"{PAST} ({largest:.3g})"
        error = part.astype(np.float16) - part
        signal += float(np.square(part, dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
    lost = noise > LARGEST_ERROR**2 * signal
    return "is too small for float16, which would change it by more than rounding" if lost else None


def put_half(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Store ``tensor``, the float32 constant that ``value`` is, in float16."""
    made = halved(tensor)
    node = value.producer()
    if node is not None:
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", made)
    if node is None or value.const_value is not None:
        value.const_value = made
    value.type = ir.TensorType(HALF)


def halved(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """``tensor`` in float16: held where that is under 1 MiB, else made when it is read."""

    def open() -> Read:
        read = reader(tensor)
        return lambda start, stop: read(start, stop).astype(np.float16)

    shape = ir.Shape(tensor.shape.numpy())
    made = StreamedTensor(open, HALF, shape, name=tensor.name, provenance=f"lazy: float16 of {tensor.name}")
    return made if made.nbytes >= LARGE else ir.Tensor(made.numpy(), name=tensor.name)


class _Choice:
    """Which nodes of the main graph compute in float16, in graph order; the ledger says why others do not."""

    def __init__(self, model: ir.Model, only: Selection, keep: Selection, ctx: Context) -> None:
        self.model, self.graph, self.only, self.keep = model, model.graph, only, keep
        self.version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        self.kinds = self._known_types()
        self.unbounded: set[ir.Node] = set()  # nodes with a constant past float16: so may be what they compute
        self._faults: dict[ir.Value, str | None] = {}
        why: dict[ir.Node, str] = {}
        safe: dict[ir.Node, None] = {}
        fixed: set[ir.Value] = set()  # computed from constants alone
        for node in self.graph:
            if self._is_fixed(node, fixed):
                fixed.update(node.outputs)
            elif self._is_float(node):
                reason = self._reason(node)
                if reason is None:
                    safe[node] = None
                else:
                    why[node] = reason
        self.nodes = self._worthwhile(safe)
        kept = set(self.nodes)
        why |= {node: "no layer computes with it in float16" for node in safe if node not in kept}
        for node in self.graph:
            if node in why:
                ctx.skip(node.name or node.op_type, f"stays float32: {why[node]}")

    def ports(self, node: ir.Node) -> tuple[list[ir.Value], list[ir.Value]]:
        """The float32 inputs that the schema lets be float16, and the outputs that are float16 with them."""
        names, made, free = _half_types(node.op_type, self.version)
        given = [(_formal(names, index), value) for index, value in enumerate(node.inputs) if value is not None]
        inputs = [(name, value) for name, value in given if name in free and self.kinds.get(value) is FLOAT]
        bound = {name for name, _ in inputs}
        outputs = [
            value
            for index, value in enumerate(node.outputs)
            if _formal(made, index) in bound and self.kinds.get(value) is FLOAT
        ]
        return [value for _, value in inputs], outputs

    def _known_types(self) -> dict[ir.Value, ir.DataType]:
        found: dict[ir.Value, ir.DataType] = {}
        with contextlib.suppress(Exception):  # inference refuses some models that are valid
            types = ((value, item.type) for value, item in inferred(self.model).items())
            found = {value: form.dtype for value, form in types if isinstance(form, ir.TensorType)}
        for value in values(self.graph):
            if isinstance(value.type, ir.TensorType):
                found[value] = value.type.dtype
            if (tensor := constant_tensor(value)) is not None:
                found[value] = tensor.dtype
        return found

    def _is_fixed(self, node: ir.Node, fixed: set[ir.Value]) -> bool:
        """Whether a node computes with constants alone: that is done once, and best in float32."""
        given = [value for value in node.inputs if value is not None]
        if any(True for _ in bodies(node)) or is_random(node):
            return False
        return all(value in fixed or constant_tensor(value) is not None for value in given)

    def _is_float(self, node: ir.Node) -> bool:
        """Whether a node takes or makes float32, or what may be, and its type matters to it."""
        if node.op_type in _INDIFFERENT and not node.domain:
            return False
        found = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name != ""]
        return any(self.kinds.get(value, FLOAT) is FLOAT for value in found) or any(True for _ in bodies(node))

    def _reason(self, node: ir.Node) -> str | None:
        """Why a node stays float32."""
        if any(True for _ in bodies(node)) or node.op_identifier() in self.model.functions:
            return "bodies and functions do"
        if node.domain or node.op_type not in SAFE:
            return f"{node.op_type} may lose too much in float16, or has none"
        given = [value for value in node.inputs if value is not None]
        reason = left_out(node, self.only, self.keep)
        if reason or any(value in self.keep for value in given):
            return reason or "kept by request"
        if any(value not in self.kinds for value in (*given, *node.outputs) if value.name != ""):
            return "the type of an input or output is not known"
        if any(is_annotated(value) or is_named(value) for value in (*given, *node.outputs)):
            return "it has a quantization annotation"
        inputs, outputs = self.ports(node)
        if not outputs:
            return "its floats cannot be float16"
        for value in inputs:
            found = self._fault(value)
            if found is not None:
                if found.startswith(PAST):
                    self.unbounded.add(node)
                return f"a constant of it {found}"
        return None

    def _fault(self, value: ir.Value) -> str | None:
        if value not in self._faults:
            tensor = constant_tensor(value)
            self._faults[value] = None if tensor is None else fault(tensor)
        return self._faults[value]

    def _worthwhile(self, safe: dict[ir.Node, None]) -> list[ir.Node]:
        """Those that hang together with a layer: others would but add Casts, and round what stands between them."""
        found: set[ir.Node] = set()
        for start in safe:
            if start.op_type not in LAYERS or start in found:
                continue
            waiting = [start]
            while waiting:
                node = waiting.pop()
                if node in found:
                    continue
                found.add(node)
                inputs, outputs = self.ports(node)
                near = [value.producer() for value in inputs] + [user for value in outputs for user, _ in value.uses()]
                waiting += [other for other in near if other in safe]
        return [node for node in safe if node in found]


class _Writer:
    """Puts a choice into the graph: float16 values and constants, and Casts where they meet float32."""

    def __init__(self, choice: _Choice, names: Names, interface: bool) -> None:
        self.choice, self.graph, self.names, self.interface = choice, choice.graph, names, interface
        self.needed: dict[ir.Value, list[tuple[ir.Node, int]]] = {}  # float32 values and where they are to be float16

    def run(self) -> None:
        halves: dict[ir.Value, None] = {}  # what becomes float16 itself
        for node in self.choice.nodes:
            inputs, outputs = self.choice.ports(node)
            halves |= dict.fromkeys(outputs)
            halves |= dict.fromkeys(value for value in inputs if constant_tensor(value) is not None)
            for index, value in enumerate(node.inputs):
                if value is not None and value in inputs:
                    self.needed.setdefault(value, []).append((node, index))
        if self.interface:
            own = (value for value in self.graph.inputs if not value.is_initializer())
            halves |= dict.fromkeys(value for value in own if self.choice.kinds.get(value) is FLOAT)
        for value, places in self.needed.items():
            if value not in halves:
                _read(places, self._cast(value, HALF))
        for value in halves:
            self._become_half(value)
        if self.interface:
            for output in [output for output in self.graph.outputs if output.dtype is FLOAT]:
                self._output(output, self._cast(output, HALF))

    def _become_half(self, value: ir.Value) -> None:
        """Let a value be float16; what needs float32 reads a Cast of it."""
        if (tensor := constant_tensor(value)) is not None:
            put_half(value, tensor)
        elif value.type is not None:
            value.type = ir.TensorType(HALF)
        halves = set(self.needed.get(value, ()))
        others = [use for use in value.uses() if tuple(use) not in halves and not self._is_indifferent(use[0])]
        leaves = value.is_graph_output() and not self.interface
        if others or leaves:
            made = self._cast(value, FLOAT)
            _read([(node, index) for node, index in others], made)
            if leaves:
                self._output(value, made)

    def _is_indifferent(self, node: ir.Node) -> bool:
        return not node.domain and node.op_type in _INDIFFERENT

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """A new value behind ``value``; what may be past float16 is clipped first, so that it is not infinite."""
        nodes, stem, last = list[ir.Node](), value.name or "value", value
        if to is HALF and value.producer() in self.choice.unbounded:
            for op_type, number in (("Max", -GREATEST), ("Min", GREATEST)):
                bound = self._number(f"{stem}_{op_type.lower()}", number)
                nodes.append(self._node(op_type, [last, bound], f"{stem}_clipped", FLOAT, value.shape))
                last = nodes[-1].outputs[0]
        word = "float16" if to is HALF else "float32"
        nodes.append(self._node("Cast", [last], f"{stem}_{word}", to, value.shape))
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, nodes)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.extend(nodes)
        return nodes[-1].outputs[0]

    def _node(
        self, op_type: str, inputs: list[ir.Value], stem: str, kind: ir.DataType, shape: ir.Shape | None
    ) -> ir.Node:
        name = self.names.fresh(stem)
        made = ir.Value(name=name, type=ir.TensorType(kind), shape=None if shape is None else shape.copy())
        given = [ir.AttrInt64("to", int(kind))] if op_type == "Cast" else []
        return ir.Node("", op_type, inputs, given, outputs=[made], name=name)

    def _number(self, stem: str, number: float) -> ir.Value:
        name = self.names.fresh(stem)
        tensor = ir.Tensor(np.array(number, np.float32), name=name)
        value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(()), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _output(self, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` be the output that ``old`` was, under its name."""
        name = old.name or ""
        with renaming(self.choice.model):
            self.names.rename(old, self.names.fresh(f"{name}_{'float32' if self.interface else 'float16'}"))
            self.names.rename(new, name)
        for place, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[place] = new


def _read(places: Iterable[tuple[ir.Node, int]], made: ir.Value) -> None:
    for node, index in places:
        if (old := node.inputs[index]) is not None:
            replace_sharded(node, old, made)
        node.replace_input_with(index, made)


def _formal(names: tuple[str, ...], index: int) -> str:
    """The type of input or output ``index``; the last one of a variadic operator repeats."""
    return names[min(index, len(names) - 1)] if names else ""


@functools.lru_cache(1024)
def _half_types(op_type: str, version: int) -> tuple[tuple[str, ...], tuple[str, ...], frozenset[str]]:
    """The type variables of an operator's inputs and outputs, and those that may be float16 as well as float32."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return (), (), frozenset()
    both = {"tensor(float16)", "tensor(float)"}
    free = {one.type_param_str for one in schema.type_constraints if both <= set(one.allowed_type_strs)}
    inputs, outputs = ([formal.type_str for formal in formals] for formals in (schema.inputs, schema.outputs))
    return tuple(inputs), tuple(outputs), frozenset(free)
