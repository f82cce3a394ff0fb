"""The floats that a model's integers stand for, as constants in the integers' place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_tensor
from ...ir.dequantize import converted, dequantized, quantization
from ...ir.edit import scope_names
from ...ir.match import decline
from ...ir.quantization import Quantization
from ..base import Array
from ..rewrite import Tape


class Constants:
    """Float constants for integer ones, made once for all nodes of a graph that read the same."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], ir.Value] = {}
        self._wishes: dict[ir.Value, str] = {}

    def restored(
        self,
        tape: Tape,
        stored: ir.Value,
        scale: Array,
        zero_point: Array | None,
        *,
        axis: int = 1,
        block: int = 0,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """The floats that the constant ``stored`` stands for. Declines where scale or zero point do not fit it."""
        tensor = constant_integers(stored)
        assert tensor is not None
        try:
            found = quantization(tuple(tensor.shape.numpy()), scale, zero_point, axis, block)
        except ValueError as error:
            decline(str(error))
        dtype = dtype or ir.DataType.from_numpy(scale.dtype)
        zero = None if zero_point is None else zero_point.tobytes()
        key = (scale.tobytes(), scale.shape, zero, axis, block, dtype)
        return self.once(tape, key, stored, lambda: dequantized(tensor, found, dtype))

    def decoded(self, tape: Tape, stored: ir.Value, scale: Array, zero: Array | None) -> ir.Value:
        """(q - zero) * scale, each of which broadcasts over the constant ``stored``."""
        tensor = constant_integers(stored)
        assert tensor is not None
        rank = len(tensor.shape)
        given = (scale, np.zeros((), np.float32) if zero is None else zero)
        scales, zeros = (part.reshape((1,) * (rank - part.ndim) + part.shape) for part in given)
        key = (scale.tobytes(), scale.shape, None if zero is None else zero.tobytes())
        return self.once(tape, key, stored, lambda: dequantized(tensor, Quantization(scales, zeros), ir.DataType.FLOAT))

    def cast(self, tape: Tape, made: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        """A constant that was restored, in another type; ``None`` for other values."""
        tensor = made.const_value
        if made not in self._made.values() or tensor is None:
            return None
        return self.once(tape, (dtype,), made, lambda: converted(tensor, dtype))

    def once(
        self, tape: Tape, key: tuple[Any, ...], stored: ir.Value, make: Callable[[], ir.TensorProtocol]
    ) -> ir.Value:
        """The float constant for ``stored`` and what else is in ``key``: the one in the graph, or a new one."""
        stored = _storage(stored)
        key = (tape.scope.graph, stored, *key)
        known = self._made.get(key)
        if known is not None and known.graph is tape.scope.graph and known.is_initializer():
            return known
        self._made[key] = value = tape.constant(make(), _plain_name(stored))
        self.wish(value, stored)
        return value

    def wish(self, value: ir.Value, integers: ir.Value) -> None:
        """Let ``value`` have the name of what was quantized to ``integers``, if it is free in the end."""
        self._wishes[value] = self._wishes.get(integers) or _plain_name(integers)

    def give_names(self, model: ir.Model) -> None:
        """Names of the weights and activations before they were integers, where the integers have left them free."""
        taken = scope_names(model)
        for value, name in self._wishes.items():
            maker = value.producer()
            there = value.is_initializer() or (maker is not None and maker.graph is not None)
            if there and name not in taken and not value.is_graph_output():
                taken.add(name)
                value.name = name
                if value.const_value is not None:
                    value.const_value.name = name


def _plain_name(integers: ir.Value) -> str:
    return (integers.name or "value").removesuffix("_quantized")


def constant_integers(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant, through Identity; ``None`` where there is none."""
    return None if value is None else constant_tensor(_storage(value))


def _storage(value: ir.Value) -> ir.Value:
    """What ``value`` is an Identity of."""
    while (maker := value.producer()) is not None and maker.op_type == "Identity" and maker.inputs[0] is not None:
        value = maker.inputs[0]
    return value
