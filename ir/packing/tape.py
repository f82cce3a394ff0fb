"""The nodes and constants of a decoder, while they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..constants import constant_node
from ..edit import Names
from ..storage import Array
from .streams import Make, tensor_of


@dataclass
class Shared:
    """A table that several decoders read; ``made`` is None until one needs it."""

    made: ir.Value | None = None


@dataclass
class Home:
    """Where shared tables live: the main graph, for all but functions, which see nothing outside."""

    in_nodes: bool
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    tables: dict[str, Shared] = field(default_factory=dict)


_LONGEST = 24


def stem(name: str) -> str:
    """What names in a decoder begin with: the name of the weight, or the end of a long one."""
    return name[-_LONGEST:] or "weight"


class Tape:
    """Makes one decoder: nodes in order, and constants as the weight's own are: initializers, or Constant nodes."""

    def __init__(self, name: str, names: Names, home: Home, *, in_nodes: bool, lazy: bool) -> None:
        self.stem, self.names, self.home, self.in_nodes, self.lazy = stem(name), names, home, in_nodes, lazy
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.payload: list[ir.Value] = []
        self.lengths: dict[ir.Value, int] = {}  # how many elements a value has, where that matters
        self.rows: set[ir.Value] = set()  # those of two dimensions
        self.count = 0

    def op(
        self, op_type: str, *inputs: ir.Value, length: int | None = None, rows: bool = False, **attributes: int
    ) -> ir.Value:
        """The output of one more node, of ``length`` elements; ``rows``: not flat."""
        self.count += 1
        name = self.names.fresh(f"{self.stem}_{self.count}")
        made, given = ir.Value(name=name), [ir.AttrInt64(key, int(number)) for key, number in attributes.items()]
        self.nodes.append(ir.Node("", op_type, inputs, given, outputs=[made], name=name))
        if length is not None:
            self.lengths[made] = length
        if rows:
            self.rows.add(made)
        return made

    def picked(self, table: ir.Value, index: ir.Value) -> ir.Value:
        """The elements of a flat table at a flat index: by GatherElements, which takes a fifth of Gather's time."""
        return self.op("GatherElements", table, index, length=self.lengths.get(index), axis=0)

    def filled(self, value: Array, *sizes: int) -> ir.Value:
        """A tensor of these sizes, of one value [1] everywhere."""
        made = self.op("ConstantOfShape", self.dims(*sizes))
        node = made.producer()
        assert node is not None
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(value, name=None))
        return made

    def flat(self, value: ir.Value) -> ir.Value:
        """The value in one dimension."""
        return self.op("Reshape", value, self.dims(-1), length=self.lengths[value]) if value in self.rows else value

    def first(self, value: ir.Value, count: int) -> ir.Value:
        """The first ``count`` elements of a value, in one dimension."""
        value = self.flat(value)
        if self.lengths[value] == count:
            return value
        return self.op("Slice", value, self.dims(0), self.dims(count), length=count)

    def axis(self) -> ir.Value:
        """int32 0."""
        return self._single("zero", np.zeros((), np.int32))

    def dims(self, *sizes: int) -> ir.Value:
        """int64 [rank]; what has it already shares it."""
        return self._single("x".join(map(str, sizes)), np.array(sizes, np.int64))

    def _single(self, name: str, array: Array) -> ir.Value:
        with self.sharing(name) as shared:
            shared.made = shared.made or self._constant(ir.Tensor(array, name=self.names.fresh(self.stem)))
            return shared.made

    def constant(self, word: str, array: Array) -> ir.Value:
        """A constant in the model."""
        return self._constant(ir.Tensor(array, name=self.names.fresh(f"{self.stem}_{word}")))

    def stored(self, word: str, make: Make, size: int, dtype: ir.DataType) -> ir.Value:
        """A flat constant of what a flow yields: what the decoder decodes."""
        name = self.names.fresh(f"{self.stem}_{word}")
        made = self._constant(tensor_of(make, size, dtype, name, lazy=self.lazy))
        self.lengths[made] = size
        self.payload.append(made)
        return made

    def numbers(self, count: int) -> ir.Value:
        """int32 [count, 1]: 0 to ``count`` - 1."""
        with self.sharing(f"below_{count}") as shared:
            if shared.made is None:
                ones = self.filled(np.ones(1, np.int32), count, 1)
                shared.made = self.op("CumSum", ones, self.axis(), exclusive=1)
            return shared.made

    @contextlib.contextmanager
    def sharing(self, name: str) -> Iterator[Shared]:
        """What is made within is put before all decoders of the model, or function, for others to read too."""
        own = self.stem, self.nodes, self.initializers, self.in_nodes, self.count
        home = self.home
        self.stem, self.nodes, self.initializers = f"packed_{name}", home.nodes, home.initializers
        self.in_nodes, self.count = home.in_nodes, 0
        try:
            yield home.tables.setdefault(name, Shared())
        finally:
            self.stem, self.nodes, self.initializers, self.in_nodes, self.count = own

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        if self.in_nodes:
            value, node = constant_node(tensor, tensor.name or "")
            self.nodes.append(node)
            return value
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor)
        self.initializers.append(value)
        return value
