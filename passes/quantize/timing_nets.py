"""Small nets that tell what a part of a model takes by itself, in float and on integers.

A net holds several copies of a part, side by side; another all of it but the part in all copies but one. What the first
takes more is the part's: what happens once at the ends of a chain of kernels of one kind does not count. A part that
follows a convolution stands behind one here too, for there both runtimes of a net keep to layouts of channels of their
own, and in float merge activation functions and additions with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_tensor, is_constant
from ...ir.edit import Names
from ..base import Array, Context
from ..selection import Selection
from .columns import Folding
from .dynamic import GRIDS as DYNAMIC_GRIDS
from .dynamic import QuantizeDynamic
from .fold_columns import fold
from .insertion import Grids, Inserter
from .placement import Sizes
from .plan import Plan, scales
from .units import Unit

_COPIES = (5, 3, 2)
_BYTES = (1 << 22, 1 << 25, 1 << 28)  # of a part's weights, up to which there are so many copies
_CHANNELS = 16  # of what the convolution reads that stands before a part
_RANGE = (-1.0, 1.0)
_KEEPING = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Add", "Mul", "Concat", "MaxPool", "AveragePool")
_KEEPING_INTEGERS = ("Relu", "Clip", "MaxPool")  # for sure: elsewhere a MaxPool of integers is many times slower
_NEAR = 8  # of these between a convolution and what follows it, at most
_FLOAT = ir.DataType.FLOAT
_OPSET = 17


class Untimed(ValueError):
    """A part does not stand by itself."""


@dataclass(frozen=True, eq=False)
class Part:
    """Operators one after the other, and the activations that they read; ``dims`` says how big values are."""

    nodes: Sequence[ir.Node]
    sources: Sequence[ir.Value]
    dims: Sizes
    opset: int

    @classmethod
    def of_unit(cls, unit: Unit, dims: Sizes) -> Part:
        return cls(unit.nodes, unit.sources, dims, unit.scope.version)

    @classmethod
    def of_layer(cls, node: ir.Node, dims: Sizes) -> Part:
        """A matrix product or recurrent layer, which are the same in all opsets; its first input is its activation."""
        return cls([node], [value for value in node.inputs[:1] if value is not None], dims, _OPSET)

    @property
    def is_conv(self) -> bool:
        return self.nodes[0].op_type == "Conv"

    @property
    def behind_conv(self) -> bool:
        """Whether it follows a convolution."""
        return not self.is_conv and len(self.dims(self.sources[0])) > 2 and _follows_conv(self.nodes[0], self.dims)

    @property
    def forks(self) -> bool:
        """Whether something else reads its first source too."""
        users = {node for node in self.sources[0].consumers() if node not in self.nodes}
        return bool(users) or self.sources[0].is_graph_output()

    @property
    def constants(self) -> list[ir.Value]:
        made = {value for node in self.nodes for value in node.outputs}
        read = (value for node in self.nodes for value in node.inputs if value is not None)
        return [value for value in dict.fromkeys(read) if value not in made and value not in self.sources]

    def __str__(self) -> str:
        """All that its time depends on: operators with attributes, sizes, and where it stands."""
        kinds = " ".join(_kind(node) for node in self.nodes)
        shapes = [*map(self._size, self.sources), *(self._size(value) for value in self.constants)]
        where = " behind Conv" + " that others read" * self.forks if self.behind_conv else ""
        return f"{kinds} of {' '.join(shapes)} to {self._size(self.nodes[-1].outputs[0])}{where}"

    def _size(self, value: ir.Value) -> str:
        tensor = constant_tensor(value)
        return "x".join(map(str, self.dims(value) if tensor is None else tensor.shape.numpy())) or "1"


def _follows_conv(node: ir.Node, dims: Sizes) -> bool:
    """Whether there is nothing but what keeps a layout of channels between a convolution and ``node``."""
    keeping = _KEEPING if node.op_type != "MaxPool" else _KEEPING_INTEGERS
    for _ in range(_NEAR):
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if source is None or source.op_type == "Conv":
            return source is not None
        sizes = {dims(value) for value in source.inputs if value is not None and not is_constant(value)}
        if source.op_type not in keeping or len(sizes) > 1:
            return False
        node = source
    return False


def _kind(node: ir.Node) -> str:
    given = {name: _plain(node.attributes[name].value) for name in sorted(node.attributes)}
    options = " ".join(f"{name}={value}" for name, value in given.items())
    return f"{node.op_type}({options})" if options else node.op_type


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# Nets -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Nets with ``more`` copies of a part, and with ``less``; ``feed`` is for both."""

    more: ir.Model
    less: ir.Model
    copies: int  # by how many they differ
    feed: Mapping[str, Array]


def in_float(part: Part) -> Pair:
    """Raises ``Untimed``."""
    copies = _copies(part)
    more, less = (_Net(part, copies, whole) for whole in (copies, 1))
    return Pair(more.model(), less.model(), copies - 1, more.feed)


def on_integers(part: Part, grids: Grids, folding: Folding | None) -> Pair | None:
    """The same between integers, columns folded if ``folding`` says how; None where there is no integer kernel."""
    pair = in_float(part)
    done = [_quantized(model, grids, folding) for model in (pair.more, pair.less)]
    return pair if all(done) else None


def dynamic(part: Part, grids: Grids) -> Pair | None:
    """The same with the inputs quantized in each run; None where that cannot be."""
    weights = next((name for name, grid in DYNAMIC_GRIDS.items() if grid == grids.weights), None)
    if weights is None:
        return None
    pair = in_float(part)
    step = QuantizeDynamic(weights=weights, only=Selection(("node:part_*",)))  # type: ignore[arg-type]
    for model, count in ((pair.more, pair.copies + 1), (pair.less, 1)):
        ctx = Context(step=step.name)
        step.run(model, ctx)
        if len(ctx.ledger.changes) != count:
            return None
    return pair


def _quantized(model: ir.Model, grids: Grids, folding: Folding | None) -> bool:
    """Put all of a net on integers; whether the part is."""
    plan = Plan.of(model)
    ((scope, units),) = plan.units
    found = scales(units, dict.fromkeys(plan.values, _RANGE), grids)
    parts = {node for node in model.graph if (node.name or "").startswith("part_")}
    inserter = Inserter(model, grids, found, Names(model))
    inserter.write(scope, units)
    inserter.finish()
    fold(model, Context(), lambda conv: folding if conv in parts else None)
    return parts <= {node for unit in units for node in unit.nodes} | {
        node
        for node in parts
        if node.graph is None  # a HardSigmoid, which became a table
    }


def _copies(part: Part) -> int:
    size = 0
    for value in part.constants:
        tensor = constant_tensor(value)
        size += 0 if tensor is None else int(tensor.nbytes)
    for copies, limit in zip(_COPIES, _BYTES, strict=True):
        if size <= limit:
            return copies
    raise Untimed("its weights are too large to be copied")


class _Net:
    """A net under construction."""

    def __init__(self, part: Part, copies: int, whole: int) -> None:
        self.part = part
        self.random = np.random.default_rng(0)
        self.feed: dict[str, Array] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": part.opset}, name="net")
        self.shared: list[ir.Value] = []  # behind a convolution: what of the sources is there once
        self.ends = 0
        for copy in range(copies):
            sources = self._sources(copy)
            values = self._part(copy, sources) if copy < whole else sources[:1]
            for value in [*values, *(sources[:1] if part.behind_conv and part.forks else [])]:
                self._end(value)

    def model(self) -> ir.Model:
        for value in self.inputs.values():
            self.graph.inputs.append(value)
        return ir.Model(self.graph, ir_version=8 if self.part.opset < 21 else 10)

    def _sources(self, copy: int) -> list[ir.Value]:
        """A convolution reads what the others do, with weights of its own; other parts what they alone read, or else
        ONNX Runtime would compute equal copies once."""
        part = self.part
        if not part.behind_conv:
            of = 0 if part.is_conv else copy
            return [self._input(f"x{of}_{place}", value, part.dims(value)) for place, value in enumerate(part.sources)]
        self.shared = self.shared or [self._conv(f"shared_{place}", part.sources[place]) for place in self._others()]
        return [self._conv(f"conv_{copy}", part.sources[0]), *self.shared]

    def _others(self) -> range:
        return range(1, len(self.part.sources))

    def _conv(self, name: str, like: ir.Value) -> ir.Value:
        """A value as a convolution makes it."""
        batch, channels, *sides = self.part.dims(like)
        x = self._input(f"image_{len(sides)}", like, (batch, _CHANNELS, *sides))
        weight = self.random.standard_normal((channels, _CHANNELS, *[1] * len(sides)), np.float32) / 4
        return self._node("Conv", [x, self._constant(f"{name}_w", weight)], name, self.part.dims(like))

    def _part(self, copy: int, sources: Sequence[ir.Value]) -> list[ir.Value]:
        known: dict[ir.Value, ir.Value] = dict(zip(self.part.sources, sources, strict=True))
        for place, value in enumerate(self.part.constants):
            known[value] = self._operand(f"c{copy}_{place}", value)
        for place, node in enumerate(self.part.nodes):
            made = ir.node(
                node.op_type,
                [None if value is None else known[value] for value in node.inputs],
                dict(node.attributes),
                domain=node.domain,
                num_outputs=len(node.outputs),
                name=f"part_{copy}_{place}",
            )
            for port, (old, new) in enumerate(zip(node.outputs, made.outputs, strict=True)):
                new.name = f"{made.name}_{port}" if old.name else ""
                new.type, new.shape = ir.TensorType(old.dtype or _FLOAT), ir.Shape(self.part.dims(old))
                known[old] = new
            self.graph.append(made)
        outputs = [value for value in self.part.nodes[-1].outputs if value.uses() or value.is_graph_output()]
        return [known[value] for value in outputs]

    def _operand(self, name: str, value: ir.Value) -> ir.Value:
        tensor = constant_tensor(value)
        if tensor is not None:
            return self._constant(name, tensor.numpy())
        if value.dtype is not _FLOAT:
            raise Untimed("it reads what is computed at run time")
        return self._input(name, value, self.part.dims(value))

    def _end(self, value: ir.Value) -> None:
        """Give out a little of a value: what it costs to give out all of it is not the part's."""
        self.ends += 1  # for ONNX Runtime would merge equal ends of one value
        sizes = tuple(value.shape.numpy()) if value.shape is not None else ()
        image = len(sizes) > 2 and value.dtype is _FLOAT and (self.part.is_conv or self.part.behind_conv)
        if image:  # one pixel by a pool, which keeps the layout of channels
            strides = [side + self.ends for side in sizes[2:]]
            attributes = {"kernel_shape": [1] * len(strides), "strides": strides}
            value = self._node("MaxPool", [value], f"end_{self.ends}", (*sizes[:2], *[1] * len(strides)), attributes)
        elif sizes:  # by a Gather, for over a Slice ONNX Runtime moves a DequantizeLinear
            axis = max(range(len(sizes)), key=lambda place: sizes[place])
            few = self._constant(f"end_{self.ends}_few", np.arange(min(self.ends, sizes[axis])))
            some = (*sizes[:axis], min(self.ends, sizes[axis]), *sizes[axis + 1 :])
            value = self._node("Gather", [value, few], f"end_{self.ends}", some, {"axis": axis}, dtype=value.dtype)
        self.graph.outputs.append(value)

    def _node(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        name: str,
        sizes: Sequence[int],
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        made = ir.node(kind, inputs, dict(attributes or {}), name=name)
        value = made.outputs[0]
        value.name, value.type, value.shape = f"{name}_value", ir.TensorType(dtype or _FLOAT), ir.Shape(sizes)
        self.graph.append(made)
        return value

    def _constant(self, name: str, array: Any) -> ir.Value:
        tensor = ir.Tensor(np.asarray(array), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _input(self, name: str, like: ir.Value, sizes: Sequence[int]) -> ir.Value:
        if name not in self.inputs:
            dtype = like.dtype or _FLOAT
            self.inputs[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(sizes))
            values = self.random.standard_normal(tuple(sizes), np.float32)
            self.feed[name] = values if dtype is _FLOAT else (values * 40 + 128).astype(dtype.numpy())
        return self.inputs[name]


# What goes between floats and integers --------------------------------------------------------------------------------


def crossings(elements: Sequence[int], opset: int = _OPSET) -> Iterator[tuple[str, int, Part]]:
    """QuantizeLinear, DequantizeLinear, and a Transpose of bytes to channels-last, of so many elements each."""
    kinds = (("QuantizeLinear", _FLOAT), ("DequantizeLinear", ir.DataType.UINT8), ("Transpose", ir.DataType.UINT8))
    for kind, dtype in kinds:
        for count in elements:
            channels = 16 if count < 65536 else 64
            sizes = (1, channels, math.ceil(count / channels))
            x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(sizes))
            scale = [_number("scale", np.float32(0.02)), _number("zero_point", np.uint8(100))]
            attributes = {"perm": [0, 2, 1]} if kind == "Transpose" else {}
            node = ir.node(kind, [x, *([] if attributes else scale)], attributes)
            out = node.outputs[0]
            to = _FLOAT if kind == "DequantizeLinear" else ir.DataType.UINT8
            out.name, out.type = "y", ir.TensorType(to)
            ir.Graph([x], [out], nodes=[node], initializers=scale, name=kind)
            after = (1, sizes[2], channels) if attributes else sizes
            yield kind, count, Part([node], [x], _fixed({x: sizes, out: after}), opset)


def _fixed(sizes: Mapping[ir.Value, tuple[int, ...]]) -> Sizes:
    return lambda value: sizes.get(value, ())


def _number(name: str, number: Any) -> ir.Value:
    return ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(np.asarray(number).dtype)),
        shape=ir.Shape(()),
        const_value=ir.Tensor(np.asarray(number), name=name),
    )
