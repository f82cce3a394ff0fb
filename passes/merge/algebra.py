"""What outputs of models are combined by: one set of words, said once in numpy and once in ONNX operators.

A combination that is written in these words is at the same time what the graph computes and what the check expects,
to the bit where the words are exact: Add, Mul, Div, Min, Max, Gather, ArgMax and OneHot round as numpy does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Names
from ...ir.join import Joined
from ...ir.shapes import dims
from ..base import Array

T = TypeVar("T")


class Algebra(Protocol[T]):
    """Element-wise words for two values or a value and a number of its type; the others go along ``axis``."""

    def add(self, one: T, two: T) -> T: ...
    def times(self, one: T, number: float) -> T: ...
    def over(self, one: T, number: float) -> T: ...
    def least(self, one: T, two: T) -> T: ...
    def most(self, one: T, two: T) -> T: ...
    def exp(self, one: T) -> T: ...
    def log(self, one: T) -> T: ...
    def softmax(self, one: T, axis: int) -> T: ...
    def log_softmax(self, one: T, axis: int) -> T: ...
    def take(self, one: T, places: Sequence[int], axis: int) -> T: ...
    def index_of_largest(self, one: T, axis: int) -> T: ...
    def one_hot(self, one: T, axis: int, classes: int) -> T: ...
    def affine(self, values: Sequence[T], weight: Array, bias: Array) -> T: ...


class Numbers:
    """The words in numpy, in the type of the arrays."""

    def add(self, one: Array, two: Array) -> Array:
        return np.asarray(one + two)

    def times(self, one: Array, number: float) -> Array:
        return np.asarray(one * one.dtype.type(number))

    def over(self, one: Array, number: float) -> Array:
        return np.asarray(one / one.dtype.type(number))

    def least(self, one: Array, two: Array) -> Array:
        return np.asarray(np.minimum(one, two))

    def most(self, one: Array, two: Array) -> Array:
        return np.asarray(np.maximum(one, two))

    def exp(self, one: Array) -> Array:
        return np.asarray(np.exp(one))

    def log(self, one: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):  # of zero and below, as the operator gives them
            return np.asarray(np.log(one))

    def softmax(self, one: Array, axis: int) -> Array:
        raised = np.exp(one - one.max(axis=axis, keepdims=True))
        return np.asarray(raised / raised.sum(axis=axis, keepdims=True))

    def log_softmax(self, one: Array, axis: int) -> Array:
        shifted = one - one.max(axis=axis, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))

    def take(self, one: Array, places: Sequence[int], axis: int) -> Array:
        return np.take(one, places, axis=axis)

    def index_of_largest(self, one: Array, axis: int) -> Array:
        return np.asarray(one.argmax(axis=axis), np.int64)

    def one_hot(self, one: Array, axis: int, classes: int) -> Array:
        return np.moveaxis(np.eye(classes, dtype=np.float32)[one], -1, axis)

    def affine(self, values: Sequence[Array], weight: Array, bias: Array) -> Array:
        return np.asarray(np.concatenate(values, axis=1) @ weight.T + bias)


class Operators:
    """The words as nodes at the end of a joined graph. Axes count from the front."""

    def __init__(self, joined: Joined) -> None:
        self.joined = joined

    def add(self, one: ir.Value, two: ir.Value) -> ir.Value:
        return self._like(one, "Add", one, two)

    def times(self, one: ir.Value, number: float) -> ir.Value:
        return self._like(one, "Mul", one, self._number(one, number))

    def over(self, one: ir.Value, number: float) -> ir.Value:
        return self._like(one, "Div", one, self._number(one, number))

    def least(self, one: ir.Value, two: ir.Value) -> ir.Value:
        return self._like(one, "Min", one, two)

    def most(self, one: ir.Value, two: ir.Value) -> ir.Value:
        return self._like(one, "Max", one, two)

    def exp(self, one: ir.Value) -> ir.Value:
        return self._like(one, "Exp", one)

    def log(self, one: ir.Value) -> ir.Value:
        return self._like(one, "Log", one)

    def softmax(self, one: ir.Value, axis: int) -> ir.Value:
        return self._like(one, "Softmax", one, axis=axis)

    def log_softmax(self, one: ir.Value, axis: int) -> ir.Value:
        return self._like(one, "LogSoftmax", one, axis=axis)

    def take(self, one: ir.Value, places: Sequence[int], axis: int) -> ir.Value:
        return self._like(one, "Gather", one, self.constant(np.array(places, np.int64), "classes"), axis=axis)

    def index_of_largest(self, one: ir.Value, axis: int) -> ir.Value:
        shape = dims(one)
        rest = None if shape is None else [dim for place, dim in enumerate(shape) if place != axis]
        return self.node("ArgMax", [one], {"axis": axis, "keepdims": 0}, ir.DataType.INT64, rest)

    def one_hot(self, one: ir.Value, axis: int, classes: int) -> ir.Value:
        shape = dims(one)
        made = None if shape is None else [*shape[:axis], classes, *shape[axis:]]
        depth = self.constant(np.array([classes], np.int64), "depth")
        values = self.constant(np.array([0, 1], np.float32), "off_on")
        return self.node("OneHot", [one, depth, values], {"axis": axis}, ir.DataType.FLOAT, made)

    def look_up(self, words: Sequence[str] | Sequence[int], places: ir.Value) -> ir.Value:
        """The text, or the number, at each place of a list."""
        if not isinstance(words[0], str):
            numbers = self.constant(np.array(words, np.int64), "labels")
            return self.node("Gather", [numbers, places], {"axis": 0}, ir.DataType.INT64, dims(places))
        name = Names(self.joined.model).fresh("labels")
        tensor = ir.StringTensor([str(word).encode() for word in words], shape=ir.Shape([len(words)]), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(words)]), const_value=tensor)
        self.joined.model.graph.initializers[name] = value
        return self.node("Gather", [value, places], {"axis": 0}, ir.DataType.STRING, dims(places))

    def affine(self, values: Sequence[ir.Value], weight: Array, bias: Array) -> ir.Value:
        shape = dims(values[0])
        batch = None if shape is None else shape[0]
        kind = values[0].dtype or ir.DataType.FLOAT
        beside = self.node("Concat", values, {"axis": 1}, kind, [batch, weight.shape[1]])
        constants = [self.constant(weight, "stack_weight"), self.constant(bias, "stack_bias")]
        return self.node("Gemm", [beside, *constants], {"transB": 1}, kind, [batch, len(bias)])

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any],
        dtype: ir.DataType,
        shape: Sequence[int | str | None] | None,
    ) -> ir.Value:
        """One more node at the end; -> its output, of this type and shape."""
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].type = ir.TensorType(dtype)
        node.outputs[0].shape = None if shape is None else ir.Shape(shape)
        return self.joined.append(node)

    def constant(self, array: Array, stem: str) -> ir.Value:
        """An initializer with a name that is free."""
        name = Names(self.joined.model).fresh(stem)
        array = np.ascontiguousarray(array) if array.ndim else array
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.joined.model.graph.initializers[name] = value
        return value

    def _number(self, like: ir.Value, number: float) -> ir.Value:
        dtype = (like.dtype or ir.DataType.FLOAT).numpy()
        return self.constant(np.array(number, dtype), "factor")

    def _like(self, like: ir.Value, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        shape = dims(like)
        return self.node(op_type, inputs, attributes, like.dtype or ir.DataType.FLOAT, shape)
