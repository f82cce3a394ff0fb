"""Integers as the floats that they stand for: what QuantizeLinear and ONNX Runtime's block formats stored, read back.

Every function gives a tensor: held where it is small, from ``storage.LARGE`` bytes on made anew at each reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .quantization import Array, Quantization
from .storage import LARGE, MadeTensor, Read, StreamedTensor, reader

PROVENANCE = "lazy: dequantize"


def quantization(
    shape: tuple[int, ...], scale: Array, zero_point: Array | None, axis: int = 1, block: int = 0
) -> Quantization:
    """Scale and zero point as DequantizeLinear takes them (a scalar, a vector along ``axis``, blocks along it), for
    integers of ``shape``; also at the rank of ``shape``, with size 1 where they do not vary.

    ``zero_point`` may be ``None``: 0. Raises ``ValueError`` where they do not fit the shape.
    """
    rank = len(shape)
    if zero_point is None:
        zero_point = np.zeros((), np.int8)
    if scale.size == 1:
        return Quantization(scale.reshape((1,) * rank), _broad(zero_point, (1,) * rank))
    axis += rank if axis < 0 else 0
    wanted = [1] * rank
    if block:
        wanted = [-(-size // block) if place == axis else size for place, size in enumerate(shape)]
    elif scale.ndim == rank > 1:
        wanted = [size if given > 1 else 1 for size, given in zip(shape, scale.shape, strict=True)]
    elif 0 <= axis < rank:
        wanted[axis] = shape[axis]
    if scale.size != math.prod(wanted):
        raise ValueError(f"scales of shape {list(scale.shape)} do not fit integers of shape {list(shape)}")
    return Quantization(scale.reshape(wanted), _broad(zero_point, wanted), axis, block)


def _broad(zero_point: Array, shape: list[int] | tuple[int, ...]) -> Array:
    given = zero_point.reshape(shape) if zero_point.size == math.prod(shape) else zero_point.reshape(())
    return np.broadcast_to(given, shape)


def dequantized(stored: ir.TensorProtocol, found: Quantization, dtype: ir.DataType) -> ir.TensorProtocol:
    """(q - zero point) * scale for each element: the product in float32, as ONNX Runtime has it, then in ``dtype``.

    Integers of any width, and float8.
    """
    shape, target = tuple(stored.shape.numpy()), dtype.numpy()

    def open() -> Read:
        read = reader(stored)

        def part(start: int, stop: int) -> Array:
            steps = found.steps(read(start, stop), shape, start).astype(np.float32)
            steps *= found.at(found.scale, shape, start, stop).astype(np.float32)
            return steps.astype(target)

        return part

    return _held(StreamedTensor(open, dtype, ir.Shape(shape), name=None, provenance=PROVENANCE))


def converted(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """The tensor in another float type."""
    target = dtype.numpy()

    def open() -> Read:
        read = reader(tensor)
        return lambda start, stop: read(start, stop).astype(target)

    return _held(StreamedTensor(open, dtype, ir.Shape(tensor.shape.numpy()), name=None, provenance=PROVENANCE))


def swapped(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor with its last two axes exchanged."""
    *outer, rows, columns = tensor.shape.numpy()
    return _made(lambda: np.swapaxes(tensor.numpy(), -1, -2), tensor.dtype, (*outer, columns, rows))


def _made(make: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    whole = lambda: np.ascontiguousarray(make())  # noqa: E731
    return _held(MadeTensor(whole, dtype, ir.Shape(shape), name=None, provenance=PROVENANCE))


def _held(made: MadeTensor) -> ir.TensorProtocol:
    return made if made.nbytes >= LARGE else ir.Tensor(made.numpy(), dtype=made.dtype)


# Packed blocks --------------------------------------------------------------------------------------------------------


def unpacked(packed: Array, bits: int) -> Array:
    """The numbers of ``bits`` each in the bytes of the last axis, lowest bits first: uint8, of the same rank."""
    if bits == 8:
        return packed
    single = np.unpackbits(packed, axis=-1, bitorder="little")
    single = single[..., : single.shape[-1] // bits * bits]
    grouped = single.reshape(*packed.shape[:-1], -1, bits)
    return np.packbits(grouped, axis=-1, bitorder="little")[..., 0]


@dataclass(frozen=True, eq=False, slots=True)
class Blocks:
    """The weight of ONNX Runtime's MatMulNBits: bytes [N, blocks, block * bits / 8], one scale a block of K.

    ``scales`` and ``zero_points`` (integers, or floats of their own type): [N, blocks].
    """

    packed: ir.TensorProtocol
    scales: Array
    zero_points: Array
    bits: int
    block: int
    inputs: int  # K

    def weight(self) -> ir.TensorProtocol:
        """The floats [K, N], in the type of the scales."""
        outputs, dtype = len(self.scales), ir.DataType.from_numpy(self.scales.dtype)

        def open() -> Read:
            last: tuple[int, Array] = (-1, np.empty(0))

            def rows(block: int) -> Array:
                nonlocal last
                if last[0] != block:
                    last = (block, self._rows(block))
                return last[1]

            def part(start: int, stop: int) -> Array:
                size = self.block * outputs  # a block of K for every output is one stretch of [K, N]
                pieces = [
                    rows(block)[max(start - block * size, 0) : stop - block * size]
                    for block in range(start // size, -(-stop // size))
                ]
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

            return part

        shape = ir.Shape((self.inputs, outputs))
        return _held(StreamedTensor(open, dtype, shape, name=None, provenance=PROVENANCE))

    def _rows(self, block: int) -> Array:
        """Flat floats of one block of K for all outputs."""
        outputs, blocks = self.scales.shape
        held = self.packed.numpy().reshape(outputs, blocks, -1)[:, block]
        numbers = unpacked(held, self.bits)[:, : self.block].astype(np.float32)
        numbers -= self.zero_points[:, block, None].astype(np.float32)
        numbers *= self.scales[:, block, None].astype(np.float32)
        return np.ascontiguousarray(numbers.T).astype(self.scales.dtype).reshape(-1)
