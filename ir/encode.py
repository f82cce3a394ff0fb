"""Weights stored as integers, decoded by Cast, Sub and Mul with constants, so that no run is slower than with floats.

ONNX Runtime computes that decoding once, when it loads the model; DequantizeLinear it computes in every run, unless it
finds an integer kernel for the operator behind it. What it then runs is the float model, rounded: the same kernels,
the same memory. Decoding takes some 2 ms of loading for each MB of floats, and 0.6 ms a weight. (Measured with 1.31.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .affine import Affine, Grid
from .constants import constant_node
from .edit import Names, insert_after
from .quantization import Quantization
from .ranges import spread
from .storage import BLOCK, LARGE, Array, Read, StreamedTensor, reader
from .weights import Weight

INTEGERS = (
    (2, 25, ir.DataType.INT2, ir.DataType.UINT2),
    (4, 21, ir.DataType.INT4, ir.DataType.UINT4),
    (8, 6, ir.DataType.INT8, ir.DataType.UINT8),
    (16, 6, ir.DataType.INT16, ir.DataType.UINT16),
)
"""Bits, the first opset whose Cast takes them, and the types, narrowest first."""

LEAST_OPSET = 7  # from which Sub and Mul broadcast by themselves
_FOLDED = 1 << 10  # bytes by which fold-constants lets a file grow: less saving than that it would undo


@dataclass(frozen=True, eq=False, slots=True)
class Binary(Affine):
    """Two levels, -scale and +scale: the sign of a number times the mean magnitude of its channel.

    Rastegari et al., 2016 (XNOR-Net, arXiv 1603.05279), section 3.1: the scale that is nearest in least squares.
    """

    def quantized(self, values: Array) -> Array:
        return np.where(values < 0, -1, 1).astype(self.grid.dtype.numpy())


@dataclass(frozen=True, slots=True)
class Distortion:
    """What rounding did to a weight: ``sqnr`` in dB, infinite where it is exact, and how many elements saturated."""

    sqnr: float
    saturated: int


def narrowest(bits: int, opset: int, *, symmetric: bool) -> Grid:
    """The integers of ``bits`` bits, 1 to 16, in the narrowest type that ``opset`` (6 or more) has.

    Symmetric ones are signed and leave out the lowest: -7 to 7 of 4 bits, -1 to 1 of 2 bits, and of 1 bit. Others are
    unsigned.
    """
    signed, unsigned = next(types for width, since, *types in INTEGERS if width >= bits and opset >= since)
    if not symmetric:
        return Grid(unsigned, 0, 2**bits - 1)
    highest = max(1, 2 ** (bits - 1) - 1)
    return Grid(signed, -highest, highest)


# Reckoning ------------------------------------------------------------------------------------------------------------


def saving(weight: Weight, affine: Affine) -> int:
    """At least how many bytes ``encode`` takes off the file; 0 where it would not be worth it.

    Scales, nodes and their names count. It is 0 also where ``fold-constants``, which lets a file grow by 1 KiB, would
    undo it.
    """
    integers = math.ceil(weight.size * affine.grid.dtype.bitwidth / 8)
    shifted = bool(affine.zero_point.any())
    numbers = 4 * affine.scale.size + 4 * affine.zero_point.size * shifted
    saved = weight.nbytes - integers - numbers
    nodes = 2 + shifted + (weight.dtype is not ir.DataType.FLOAT)
    name = len((weight.value.name or "").encode())
    words = nodes * (4 * name + 75) + (1 + shifted) * (name + 40 + 3 * len(weight.shape))
    return max(0, saved - words) if saved > _FOLDED else 0


def distortion(tensor: ir.TensorProtocol, affine: Affine, block: int = 0) -> Distortion:
    """What ``affine`` does to the float ``tensor``; ``block`` as in ``integers``. Reads it once, a part at a time."""
    at, read = _placed(tensor, affine, block), reader(tensor)
    signal, noise, saturated = 0.0, 0.0, 0
    for start in range(0, tensor.size, BLOCK):
        stop = min(start + BLOCK, tensor.size)
        local, values = at(start, stop), read(start, stop).astype(np.float32, copy=False)
        error = np.abs(local.rounded(values) - values)
        signal += float(np.square(values, dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
        saturated += int(np.count_nonzero(error > 0.501 * local.scale))  # else the nearest is half a step away
    sqnr = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
    return Distortion(sqnr, 0 if isinstance(affine, Binary) else saturated)


def integers(tensor: ir.TensorProtocol, affine: Affine, block: int = 0) -> ir.TensorProtocol:
    """The float ``tensor`` in the integers of ``affine``: held where that is under 1 MiB, else made when it is read.

    Scale and zero point broadcast over the tensor; with ``block`` they are [K / block, N] for a matrix [K, N].
    """

    def open() -> Read:
        at, read = _placed(tensor, affine, block), reader(tensor)
        return lambda start, stop: at(start, stop).quantized(read(start, stop))

    kind, shape, name = affine.grid.dtype, ir.Shape(tensor.shape.numpy()), tensor.name
    made = StreamedTensor(open, kind, shape, name=name, provenance=f"lazy: {kind.name.lower()} of {name}")
    return made if made.nbytes >= LARGE else ir.Tensor(made.numpy(), dtype=kind, name=name)


def _placed(tensor: ir.TensorProtocol, affine: Affine, block: int) -> Callable[[int, int], Affine]:
    """``affine`` for the flat elements [start, stop)."""
    shape = tuple(tensor.shape.numpy())

    def along(values: Array) -> Read:
        full = values if block else values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
        if block or sum(size > 1 for size in full.shape) < 2:
            return spread(full, shape, block)
        whole = Quantization(full, full)
        return lambda start, stop: whole.at(full, shape, start, stop)

    scale, zero_point = along(affine.scale), along(affine.zero_point)
    return lambda start, stop: replace(affine, scale=scale(start, stop), zero_point=zero_point(start, stop))


# Writing --------------------------------------------------------------------------------------------------------------


def encode(weight: Weight, affine: Affine, names: Names) -> None:
    """Store a float weight as the integers of ``affine``, with Cast, Sub and Mul behind them that decode it.

    The weight keeps its name and address, and all that read it, in bodies too, read ``NAME_dequantized``, of the
    weight's own type. Scale and zero point broadcast over the stored tensor, along any axis. It must be float, of opset
    ``LEAST_OPSET`` or later, and not an output of the model or an input of it.
    """
    kind = weight.dtype
    weight.replace(integers(weight.tensor, affine))
    for value in weight.values:
        decoder = _Decoder(value, names)
        decoder.op("Cast", "cast", to=ir.DataType.FLOAT)
        if affine.zero_point.any():
            decoder.op("Sub", "shifted", decoder.constant("zero_point", affine.zero_point.astype(np.float32)))
        decoder.op("Mul", "dequantized", decoder.constant("scale", affine.scale))
        if kind is not ir.DataType.FLOAT:
            decoder.op("Cast", "dequantized", to=kind)
        decoder.insert(kind)


def encode_blocks(weight: Weight, affine: Affine, block: int, names: Names) -> None:
    """Store a float matrix [K, N] as integers with a scale [K / block, N] for each ``block`` along K.

    DequantizeLinear (opset 21) decodes it. ONNX Runtime makes one MatMulNBits of it and a MatMul or Gemm that alone
    reads it as B, untransposed, and rounds the activations to 8 bits in there; else it decodes it in every run.
    """
    kind = weight.dtype
    weight.replace(integers(weight.tensor, affine, block))
    for value in weight.values:
        decoder = _Decoder(value, names)
        parameters = [decoder.constant("scale", affine.scale.astype(kind.numpy()))]
        if affine.zero_point.any():
            parameters.append(decoder.constant("zero_point", affine.zero_point, affine.grid.dtype))
        decoder.op("DequantizeLinear", "dequantized", *parameters, axis=0, block_size=block)
        decoder.insert(kind)


class _Decoder:
    """Nodes to stand behind a stored value, each reading the one before; constants live as the value itself does."""

    def __init__(self, value: ir.Value, names: Names) -> None:
        self.value = self.last = value
        self.names = names
        self.stem = value.name or "weight"
        self.nodes: list[ir.Node] = []

    def constant(self, word: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        name, graph = self.names.fresh(f"{self.stem}_{word}"), self.value.graph
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype, name=name)
        if self.value.producer() is not None or graph is None:
            value, node = constant_node(tensor, name)
            self.nodes.append(node)
            return value
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
        return value

    def op(self, op_type: str, word: str, *more: ir.Value, **attributes: int) -> None:
        """One more node on what the last one made."""
        name = self.names.fresh(f"{self.stem}_{word}")
        given = [ir.AttrInt64(key, int(number)) for key, number in attributes.items()]
        made = ir.Value(name=name)
        self.nodes.append(ir.Node("", op_type, [self.last, *more], given, outputs=[made], name=name))
        self.last = made

    def insert(self, dtype: ir.DataType) -> None:
        """Let all that reads the stored value read what the last node makes of it, which is of its shape."""
        self.last.type = ir.TensorType(dtype)
        self.last.shape = None if self.value.shape is None else self.value.shape.copy()
        insert_after(self.value, self.nodes, self.names)
        if self.last.name == self.stem:  # the output of a branch, which keeps its name
            self.names.rename(self.value, self.names.fresh(f"{self.stem}_quantized"))
