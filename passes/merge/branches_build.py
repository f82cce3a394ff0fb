"""Values of several branches held as one, and the nodes that make them.

A stack of N values [batch, channels, ...] is held in one of two forms, or both:

- *beside*: [batch, N * channels, ...], the branches side by side along axis 1. Grouped convolutions, pools and what is
  elementwise work on it as it is.
- *column*: [1, N * channels, batch, 1], of matrices only: an image of one column, whose pixels are the samples. A layer
  y = x W + b of each branch is then one grouped 1x1 Conv, which ONNX Runtime computes in its own layout of channels,
  with bias and activation in it, and with each weight read once for all samples. From rows and back it is turned as an
  image with its channels last, for ONNX Runtime does that as it reorders channels. (A MatMul with a weight [N, K, M] is
  0.6 to 1.1 times as fast as the separate layers, for a constant of three dimensions is not prepacked.)
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...ir.constants import new_constant
from ...ir.edit import Names
from ...ir.scopes import Scope
from ...ir.shapes import dims
from ...ir.storage import LARGE, Array, Read, StreamedTensor
from .branches import Stack, channels, rank

BLOCK = 16  # channels that ONNX Runtime computes together where there is AVX512; with AVX2 half as many


class Form(enum.Enum):
    BESIDE = "beside"
    COLUMN = "column"


class Builder:
    """New nodes for a graph, in order, and in which forms each stack is held. What all share is a stack of one."""

    def __init__(self, scope: Scope, names: Names, value: ir.Value) -> None:
        self.scope, self.names = scope, names
        self.nodes: list[ir.Node] = []
        self.forms: dict[tuple[Stack, Form], ir.Value] = {((value,), Form.BESIDE): value}

    # Forms ------------------------------------------------------------------------------------------------------------

    def hold(self, stack: Stack, form: Form, value: ir.Value) -> None:
        self.forms[stack, form] = value

    def held(self, stack: Stack) -> tuple[Form, ir.Value]:
        """In the form that costs nothing; the column before the other."""
        for form in (Form.COLUMN, Form.BESIDE):
            if (found := self.forms.get((stack, form))) is not None:
                return form, found
        assert len(stack) == 1
        return Form.BESIDE, stack[0]

    def beside(self, stack: Stack) -> ir.Value:
        form, value = self.held(stack)
        if (stack, Form.BESIDE) not in self.forms:
            if form is Form.COLUMN:
                value = self.rows(value, len(stack) * channels(stack[0]), one_row(stack))
            self.hold(stack, Form.BESIDE, value)
        return self.forms[stack, Form.BESIDE]

    def column(self, stack: Stack) -> ir.Value:
        if (stack, Form.COLUMN) not in self.forms:
            value, count = self.beside(stack), len(stack) * channels(stack[0])
            if one_row(stack):
                value = self.reshape(value, [1, count, -1, 1])
            else:
                value = self.node("Transpose", [self.reshape(value, [1, -1, 1, count])], perm=[0, 3, 1, 2])
            self.hold(stack, Form.COLUMN, value)
        return self.forms[stack, Form.COLUMN]

    def rows(self, value: ir.Value, count: int, one_row: bool) -> ir.Value:
        """[1, count, batch, 1] -> [batch, count]."""
        if not one_row:
            value = self.node("Transpose", [value], perm=[0, 2, 3, 1])
        return self.reshape(value, [-1, count])

    def repeated(self, value: ir.Value, count: int) -> ir.Value:
        """One value for each of ``count`` branches, beside."""
        return self.node("Concat", [value] * count, axis=1)

    def split(self, stack: Stack) -> list[ir.Value]:
        """The values of the branches."""
        value, count, each = self.beside(stack), len(stack), channels(stack[0])
        sizes = [each] * count
        if self.scope.version < 13:
            return self.many("Split", [value], count, axis=1, split=sizes)
        return self.many("Split", [value, self.ints(sizes, "split")], count, axis=1)

    # Nodes ------------------------------------------------------------------------------------------------------------

    def node(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
        return self.many(op_type, inputs, 1, **attributes)[0]

    def many(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes: object
    ) -> list[ir.Value]:
        given = {key: value for key, value in attributes.items() if value is not None}
        made = ir.node(op_type, inputs, given, num_outputs=outputs, name=self.names.fresh(f"branches_{op_type}"))  # type: ignore[arg-type]
        for value in made.outputs:
            value.name = self.names.fresh(f"branches_{op_type}")
        self.nodes.append(made)
        return list(made.outputs)

    def like(self, node: ir.Node, inputs: Sequence[ir.Value | None], **changed: object) -> ir.Value:
        """A node of the same operator and attributes, some ``changed``; ``None`` leaves one out."""
        given = {key: attribute.value for key, attribute in node.attributes.items()}
        return self.node(node.op_type, inputs, **{**given, **changed})

    def reshape(self, value: ir.Value, sizes: Sequence[int]) -> ir.Value:
        return self.node("Reshape", [value, self.ints(sizes, "shape")])

    def ints(self, numbers: Sequence[int], word: str) -> ir.Value:
        return self.constant(ir.Tensor(np.array(numbers, np.int64)), word)

    def array(self, array: Array, word: str) -> ir.Value:
        return self.constant(ir.Tensor(np.ascontiguousarray(array)), word)

    def constant(self, tensor: ir.TensorProtocol, word: str) -> ir.Value:
        name = self.names.fresh(f"branches_{word}")
        tensor.name = name
        value, node = new_constant(self.scope, tensor, name)
        assert node is None
        self.scope.graph.register_initializer(value)
        return value


def one_row(stack: Stack) -> bool:
    """Whether it is known that there is one sample a run: then a column has the order of a row."""
    return (dims(stack[0]) or (None,))[0] == 1 and rank(stack[0]) == 2


# Weights --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Matrices:
    """The weights of a layer of each branch, as matrices [outputs, inputs] that are read when they are needed.

    ``packed`` neighbours share a group: their matrices stand on the diagonal of a greater one, with zeros beside them.
    ``summed``: the outputs of all branches are added up, each times its factor.
    """

    read: tuple[Callable[[], Array], ...]
    outputs: int
    inputs: int
    factors: tuple[float, ...] = ()
    packed: int = 1
    summed: bool = False

    def tensor(self, tail: Sequence[int], provenance: str) -> ir.TensorProtocol:
        """All in one, [rows, ...] with the input axis, of which there are ``tail[1:]`` elements each, last."""
        rows = self.outputs * (1 if self.summed else len(self.read))
        columns = self.inputs * (len(self.read) if self.summed else self.packed)
        shape = ir.Shape([rows, columns // math.prod(tail), *tail])
        if rows * columns * 4 <= LARGE:
            return ir.Tensor(self._open()(0, rows * columns).reshape(shape.numpy()))
        return StreamedTensor(self._open, ir.DataType.FLOAT, shape, name=None, provenance=f"lazy: {provenance}")

    def _open(self) -> Read:
        whole = [read() for read in self.read] if self.summed else []
        last: list[tuple[int, Array]] = []  # the branch that was read last: rows come in order

        def row_range(start: int, stop: int) -> Array:
            if self.summed:
                parts = [matrix[start:stop] * np.float32(by) for matrix, by in zip(whole, self.factors, strict=True)]
                return np.concatenate(parts, axis=1)
            made = np.zeros((stop - start, self.inputs * self.packed), np.float32)
            for branch in range(start // self.outputs, -(-stop // self.outputs)):
                if not last or last[0][0] != branch:
                    last[:] = [(branch, self.read[branch]())]
                low, high = max(start, branch * self.outputs), min(stop, (branch + 1) * self.outputs)
                at = branch % self.packed * self.inputs
                found = last[0][1][low - branch * self.outputs : high - branch * self.outputs]
                made[low - start : high - start, at : at + self.inputs] = found
            return made

        width = self.inputs * (len(self.read) if self.summed else self.packed)

        def flat(start: int, stop: int) -> Array:
            first, end = start // width, -(-stop // width)
            return row_range(first, end).reshape(-1)[start - first * width : stop - first * width]

        return flat


def packing(count: int, outputs: int, inputs: int) -> int:
    """How many neighbours share a group, so that it has whole blocks of channels; 1 where that would take too many."""
    for packed in (1, 2, 4):
        whole = packed * outputs % BLOCK == 0 and packed * inputs % BLOCK == 0
        if whole and count % packed == 0 and (packed == 1 or packed * max(outputs, inputs) <= 3 * BLOCK):
            return packed
    return 1
