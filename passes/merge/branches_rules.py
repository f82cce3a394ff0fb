"""Which operators work on stacks, and how: a rule for each kind, which checks first and builds when it is asked to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_ints, constant_tensor
from ...ir.ops import operator
from ...ir.shapes import dims
from ...ir.sparse import SparseTensor
from ...ir.storage import Array
from ...ir.unify import dtype_name
from .branches import Site, Stack, Step, Unlike, channels, rank
from .branches_build import Builder, Form, Matrices, packing

_POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
_SHAPE_ONLY = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


class Action(Protocol):
    """What a step does when it is built: the stack of its outputs, in some form."""

    def build(self, builder: Builder) -> tuple[Form, ir.Value]: ...


@dataclass(frozen=True, eq=False)
class Plain:
    """An action that is a function."""

    build: Callable[[Builder], tuple[Form, ir.Value]]


def rule(site: Site) -> Step:
    """The step that the nodes of a site are. Raises ``Unlike`` where they are none."""
    node = site.node
    site.only_output()
    if node.domain:
        raise Unlike(f"{node.op_type} of another domain, which may do anything with what is held together")
    if node.op_type in _RULES:
        return _RULES[node.op_type](site)
    if operator(node).elementwise is not None:
        return _elementwise(site)
    raise Unlike(f"{node.op_type} is not done for several branches at once")


# Layers ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution, or a matrix product as one. ``sizes`` are for the cost: pixels, inputs, outputs of one branch."""

    node: ir.Node
    source: Stack
    matrices: Matrices
    biases: list[Callable[[], Array]]  # each [outputs]
    tail: tuple[int, ...]  # of the weight, after inputs
    groups: int  # of one branch
    image: bool
    factors: tuple[float, ...] = field(default=())  # where outputs are summed

    def summed(self, factors: tuple[float, ...]) -> Layer | None:
        """The same with the sum of all branches, each times its factor, as output; ``None`` where that is no layer."""
        if self.groups > 1 or len(self.source) == 1:
            return None
        return replace(self, factors=factors)

    def build(self, builder: Builder) -> tuple[Form, ir.Value]:
        count, shared = len(self.matrices.read), len(self.source) == 1
        source = builder.beside(self.source) if self.image else builder.column(self.source)
        groups, packed = count * self.groups, 1
        if self.factors or (shared and self.groups == 1):
            groups = 1
        elif shared:
            source = builder.repeated(source, count)
        elif self.groups == 1:
            packed = packing(count, self.matrices.outputs, self.matrices.inputs // math.prod(self.tail))
            groups //= packed
        matrices = replace(self.matrices, factors=self.factors, packed=packed, summed=bool(self.factors))
        name = f"fuse-branches({count} like {self.node.inputs[1].name})"  # type: ignore[union-attr]
        inputs: list[ir.Value | None] = [source, builder.constant(matrices.tensor(self.tail, name), "weight")]
        if self.biases:
            inputs.append(builder.array(self._bias(), "bias"))
        if not self.image:
            return Form.COLUMN, builder.node("Conv", inputs, group=groups, kernel_shape=[1, 1])
        return Form.BESIDE, builder.like(self.node, inputs, group=groups)

    def _bias(self) -> Array:
        found = [read() for read in self.biases]
        if not self.factors:
            return np.concatenate(found)
        total = sum(np.float64(by) * bias for by, bias in zip(self.factors, found, strict=True))
        return np.asarray(total, np.float32)


def _weights(site: Site) -> list[ir.TensorProtocol]:
    found = site.constants(1)
    if found is None:
        if site.constants(0) is not None:
            raise Unlike("its weight is on the left")
        made = site.node.inputs[1]
        by = made.producer() if made is not None else None
        if by is not None and by.op_type == "DequantizeLinear":
            raise Unlike("its weight is quantized, and integer kernels are not made for several branches at once")
        raise Unlike(f"its weight is computed as the model runs{site.hint(1)}")
    if found[0].dtype != ir.DataType.FLOAT:
        raise Unlike(f"its numbers are {dtype_name(found[0].dtype)}, and only float32 is fused")
    if any(isinstance(tensor, SparseTensor) for tensor in found):
        raise Unlike("its weight is stored sparse, and would be dense")
    if any(tensor.size == 0 for tensor in found):
        raise Unlike("its weight has no elements")
    return found


def _conv(site: Site) -> Step:
    weights, source = _weights(site), site.stack(0)
    shape = tuple(weights[0].shape.numpy())
    if len(shape) < 3 or rank(site.output) != len(shape):
        raise Unlike("its weight is no kernel of known rank")
    if rank(source[0]) != len(shape):
        raise Unlike("the rank of what it reads is unknown")
    groups = site.attribute("group")
    if not isinstance(groups, int):
        raise Unlike("its group is unknown")
    channels(source[0])
    biases = _constants(site, 2)
    read = tuple(_reader(tensor, (shape[0], -1)) for tensor in weights)
    matrices = Matrices(read, shape[0], math.prod(shape[1:]))
    layer = Layer(site.node, source, matrices, [_reader(one, (-1,)) for one in biases], shape[2:], groups, True)
    return Step(site.nodes, layer)


def _product(site: Site) -> Step:
    """Gemm, and MatMul with or without an Add behind it, on a matrix of samples."""
    weights, source, gemm = _weights(site), site.stack(0), site.node.op_type == "Gemm"
    if rank(source[0]) != 2 or len(weights[0].shape) != 2:
        raise Unlike("what it reads is no matrix of samples")
    if gemm and site.attribute("transA"):
        raise Unlike("it reads its input transposed")
    turned = bool(site.attribute("transB")) if gemm else False
    rows, columns = weights[0].shape.numpy()
    outputs, inputs = (rows, columns) if turned else (columns, rows)
    alpha, beta = (float(site.attribute(key)) if gemm else 1.0 for key in ("alpha", "beta"))  # type: ignore[arg-type]
    also, biases = ((), _constants(site, 2)) if gemm else _added(site, outputs)
    if any(tensor.size not in (1, outputs) or tensor.shape[-1:] not in ((), (tensor.size,)) for tensor in biases):
        raise Unlike("its bias is not one number for each output")
    read = tuple(_matrix(tensor, turned, alpha) for tensor in weights)
    layer = Layer(
        site.node,
        source,
        Matrices(read, outputs, inputs),
        [_vector(one, outputs, beta) for one in biases],
        (1, 1),
        1,
        False,
    )
    return Step(site.nodes, layer, also)


def _added(site: Site, outputs: int) -> tuple[tuple[ir.Node, ...], list[ir.TensorProtocol]]:
    """The Adds of biases behind MatMuls, and these; none where that is not so for each."""
    adds, biases = [], []
    for node in site.nodes:
        uses = list(node.outputs[0].uses())
        add, port = uses[0] if len(uses) == 1 else (None, 0)
        if add is None or add.op_type != "Add" or add.domain or node.outputs[0].is_graph_output():
            return (), []
        tensor = constant_tensor(add.inputs[1 - port])
        if (
            add.graph is not node.graph
            or tensor is None
            or tuple(tensor.shape.numpy()) not in ((outputs,), (1, outputs))
        ):
            return (), []
        adds.append(add)
        biases.append(tensor)
    return tuple(adds), biases


def _constants(site: Site, port: int) -> list[ir.TensorProtocol]:
    if not site.has(port):
        return []
    found = site.constants(port)
    if found is None:
        raise Unlike(f"its input {port} is computed as the model runs{site.hint(port)}")
    return found


def _reader(tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> Callable[[], Array]:
    return lambda: tensor.numpy().reshape(shape)


def _matrix(tensor: ir.TensorProtocol, turned: bool, factor: float) -> Callable[[], Array]:
    """[outputs, inputs]; a view of the stored array where there is no factor."""

    def read() -> Array:
        found = tensor.numpy() if turned else tensor.numpy().T
        return found if factor == 1 else found * np.float32(factor)

    return read


def _vector(tensor: ir.TensorProtocol, outputs: int, factor: float) -> Callable[[], Array]:
    def read() -> Array:
        found = tensor.numpy().reshape(-1) * np.float32(factor)
        return np.broadcast_to(found, (outputs,))

    return read


# What goes along ------------------------------------------------------------------------------------------------------


def _elementwise(site: Site) -> Step:
    """Operands are stacks, values that all share, and constants, which are stacked too unless they are equal."""
    places = site.ports
    fixed = {port: found for port in places if (found := site.constants(port)) is not None}
    moving = {port: site.stack(port) for port in places if port not in fixed}
    each, axes = channels(site.output), rank(site.output)
    for source in moving.values():
        if rank(source[0]) != axes or channels(source[0]) != each:
            raise Unlike("what it reads has other channels than what it makes")
    if all(len(source) == 1 for source in moving.values()):
        raise Unlike("nothing that it reads is held together")
    stacked = {port: _operand(found, axes, each) for port, found in fixed.items()}
    if operator(site.node).elementwise == "unary" and any(array is not None for array in stacked.values()):
        raise Unlike("its settings are not the same in all branches")

    def build(builder: Builder) -> tuple[Form, ir.Value]:
        forms = {builder.held(source)[0] for source in moving.values() if len(source) > 1}
        form = Form.COLUMN if axes == 2 and forms == {Form.COLUMN} and _all_stacks(moving.values()) else Form.BESIDE
        inputs: list[ir.Value | None] = [None] * len(site.node.inputs)
        for port, source in moving.items():
            value = builder.column(source) if form is Form.COLUMN else builder.beside(source)
            inputs[port] = value if len(source) > 1 else builder.repeated(value, site.count)
        for port, array in stacked.items():
            if array is None:
                inputs[port] = site.node.inputs[port]
            else:
                inputs[port] = builder.array(array.reshape(1, -1, 1, 1) if form is Form.COLUMN else array, "operand")
        return form, builder.like(site.node, inputs)

    return Step(site.nodes, Plain(build))


def _dropout(site: Site) -> Step:
    """Where it does nothing. Before opset 7 an attribute said whether it trains."""
    told = site.constants(2) if site.has(2) else []
    if site.version < 7 or told is None or any(tensor.numpy().any() for tensor in told):
        raise Unlike("it is a Dropout that may be told to train")
    return _elementwise(site)


def _all_stacks(sources: object) -> bool:
    return all(len(source) > 1 for source in sources)  # type: ignore[attr-defined]


def _operand(found: list[ir.TensorProtocol], axes: int, each: int) -> Array | None:
    """The constants of the branches beside each other; ``None`` where one number serves all."""
    arrays = [tensor.numpy() for tensor in found]
    if arrays[0].size == 1 and all(array.tobytes() == arrays[0].tobytes() for array in arrays):
        return None
    if arrays[0].ndim > axes:
        raise Unlike("a constant that it reads has more dimensions than what it makes")
    shape = (1,) * (axes - arrays[0].ndim) + arrays[0].shape
    if shape[0] != 1 or shape[1] not in (1, each):
        raise Unlike("a constant that it reads differs from sample to sample")
    full = (1, each, *shape[2:])
    return np.concatenate([np.broadcast_to(array.reshape(shape), full) for array in arrays], axis=1)


def _beside(site: Site, least: int, inputs: Sequence[int] = ()) -> Stack:
    """What it reads, of ``least`` dimensions or more; its other inputs must be constants that are equal."""
    source = site.stack(0)
    if len(source) == 1:
        raise Unlike("what it reads is not held together")
    if rank(source[0]) < least:
        raise Unlike("what it reads has too few dimensions")
    channels(source[0])
    for port in inputs:
        if site.has(port):
            tensors = _constants(site, port)
            if any(tensor.tobytes() != tensors[0].tobytes() for tensor in tensors):
                raise Unlike(f"its input {port} is not the same in all branches")
    return source


def _as_it_is(site: Site, source: Stack) -> Step:
    rest = site.node.inputs[1:]
    return Step(
        site.nodes, Plain(lambda builder: (Form.BESIDE, builder.like(site.node, [builder.beside(source), *rest])))
    )


def _pool(site: Site) -> Step:
    return _as_it_is(site, _beside(site, 3))


def _reduction(site: Site) -> Step:
    """Over axes behind the channels."""
    source = _beside(site, 3, (1,))
    given = constant_ints(site.node.inputs[1]) if site.has(1) else site.attribute("axes")
    axes = rank(source[0])
    if not isinstance(given, tuple) or not given or any(axis % axes < 2 for axis in given):
        raise Unlike("it goes over the batch or the channels too")
    return _as_it_is(site, source)


def _normalization(site: Site) -> Step:
    """BatchNormalization and InstanceNormalization: one number a channel."""
    source = _beside(site, 3 if site.node.op_type == "InstanceNormalization" else 2)
    if site.attribute("training_mode"):
        raise Unlike("it is in training mode")
    parts = [_constants(site, port) for port in site.ports[1:]]

    def build(builder: Builder) -> tuple[Form, ir.Value]:
        form, value = builder.held(source)
        numbers = [np.concatenate([tensor.numpy() for tensor in part]) for part in parts]
        return form, builder.like(site.node, [value, *(builder.array(one, "norm") for one in numbers)])

    return Step(site.nodes, Plain(build))


def _shape_only(site: Site) -> Step:
    """What keeps samples apart: its result is one of shape only, for branches beside each other too."""
    node, source = site.node, _beside(site, 2, (1,))
    numbers = constant_ints(node.inputs[1]) if site.has(1) else None
    channels(site.output)
    if node.op_type == "Flatten" and site.attribute("axis") != 1:
        raise Unlike("it flattens other axes than those behind the batch")
    if node.op_type in ("Squeeze", "Unsqueeze"):
        axes = site.attribute("axes") if numbers is None else numbers
        most = max(rank(source[0]), rank(site.output))
        if not isinstance(axes, tuple) or any(axis % most < 2 for axis in axes):
            raise Unlike("it changes axes before those behind the channels")
    if node.op_type != "Reshape":
        return _as_it_is(site, source)
    if numbers is None or (site.attribute("allowzero") and 0 in numbers) or not _keeps_rows(source[0], numbers):
        raise Unlike("its shape may mix samples")
    wanted = [numbers[0], numbers[1] * site.count if numbers[1] > 0 else numbers[1], *numbers[2:]]

    def build(builder: Builder) -> tuple[Form, ir.Value]:
        return Form.BESIDE, builder.reshape(builder.beside(source), wanted)

    return Step(site.nodes, Plain(build))


def _keeps_rows(source: ir.Value, shape: tuple[int, ...]) -> bool:
    """Whether each sample stays one."""
    before = dims(source) or ()
    if shape[0] == 0 or (shape[0] > 0 and shape[0] == before[0]):
        return True
    rest = [before[place] if size == 0 and place < len(before) else size for place, size in enumerate(shape)][1:]
    if shape[0] != -1 or not all(isinstance(size, int) and size > 0 for size in (*before[1:], *rest)):
        return False
    return math.prod(before[1:]) == math.prod(rest)  # type: ignore[arg-type]


def _softmax(site: Site) -> Step:
    """Over the classes of a matrix: an axis of its own for the branches, and back."""
    source = _beside(site, 2)
    if rank(source[0]) != 2 or site.attribute("axis") not in (1, -1):
        raise Unlike("it goes over other axes than the classes of a matrix")
    each = channels(source[0])

    def build(builder: Builder) -> tuple[Form, ir.Value]:
        apart = builder.reshape(builder.beside(source), [-1, site.count, each])
        made = builder.node(site.node.op_type, [apart], axis=2)
        return Form.BESIDE, builder.reshape(made, [-1, site.count * each])

    return Step(site.nodes, Plain(build))


_RULES: dict[str, Callable[[Site], Step]] = {
    "Conv": _conv,
    "Gemm": _product,
    "MatMul": _product,
    "BatchNormalization": _normalization,
    "InstanceNormalization": _normalization,
    "Dropout": _dropout,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_SHAPE_ONLY, _shape_only),
    **dict.fromkeys((f"Reduce{kind}" for kind in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare")), _reduction),
}
