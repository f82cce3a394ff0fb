"""Constants that hold the same, as they are, transposed, reshaped, or nearly, kept once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_tensor, is_constant, new_constant
from ...ir.edit import Names
from ...ir.errors import UsageError
from ...ir.ops import Kind, operator
from ...ir.references import is_annotated, is_named, replace_all_uses
from ...ir.scopes import Scope, scopes
from ...ir.sparse import SparseTensor
from ...ir.storage import BLOCK, Array, blocks, reader
from ...ir.unused import discard, is_idle
from ..base import Context, Effect, Pass, register
from ..pipeline import Pipeline

_LEAST = 1 << 10  # bytes: a node and its name take some hundred
_SAMPLES = 64  # elements that tell at once that two weights are not near
_UNPACKED = 256 << 20  # bytes of weights from which a Gemm may run on weights as they are stored, not packed

T = TypeVar("T")


@register("tie-weights")
class TieWeights(Pass):
    """Keep one of several constants that hold the same.

    Equal type, shape and bytes: as ``merge-duplicates`` does it, in bodies too, which read the main graph's. In the
    main graph also a matrix that is another one transposed: a Gemm that multiplies by it changes its transB, any other
    reader gets a Transpose of the one that stays; and constants of one content in two shapes, through a Reshape.
    ONNX Runtime computes both as it loads the model. Constants up to 1 KiB are tied only as they are.

    ``tolerance`` above 0 also ties floats of one type and shape that are nearly equal: no element differs by more than
    that share of the greatest magnitude of the one that stays, which is the first.

    Scales and zero points stay apart, for ONNX Runtime fuses quantized operators only where each has its own; so do
    inputs and outputs of the model, strings, and what is in quantization annotations.
    """

    tolerance: float = 0.0

    def validate(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tie-weights: tolerance={self.tolerance:g} is out of range; it is 0 or more, below 1.")

    def effect(self) -> Effect:
        return Effect.LOSSY if self.tolerance else Effect.SAME

    def run(self, model: ir.Model, ctx: Context) -> None:
        for step in Pipeline.of("merge-duplicates").run(model, ctx):
            ctx.ledger.changes += step.ledger.changes
            ctx.ledger.skips += step.ledger.skips
        ties = _Ties(model, ctx)
        ties.reshaped()
        ties.transposed()
        if self.tolerance:
            ties.near(self.tolerance)


@dataclass(eq=False)
class _Constant:
    """A constant that may be tied: an initializer of more than a few bytes that only computing operators read."""

    value: ir.Value
    tensor: ir.TensorProtocol
    scope: Scope

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    @property
    def address(self) -> str:
        return self.scope.address(self.value)


@dataclass
class _Ties:
    model: ir.Model
    ctx: Context
    digests: dict[_Constant, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = Names(self.model)

    def _constants(self, *, main: bool = True) -> list[_Constant]:
        """Those of the main graph, or of all graphs."""
        found = []
        for scope in scopes(self.model):
            if main and scope.graph is not self.model.graph:
                continue
            for value in scope.graph.initializers.values():
                tensor = constant_tensor(value) if is_constant(value) and not is_idle(value) else None
                if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= _LEAST:
                    continue
                if not isinstance(tensor, SparseTensor) and _is_free(value):
                    found.append(_Constant(value, tensor, scope))
        return found

    # The same in another shape ----------------------------------------------------------------------------------------

    def reshaped(self) -> None:
        """Equal bytes in another shape: a Reshape of the first."""
        for alike in _alike(self._constants(), lambda one: (one.tensor.dtype, one.tensor.size)):
            if len({one.shape for one in alike}) == 1:
                continue  # those would be merged already
            for first, *others in _alike(alike, self._digest):
                for other in others:
                    self._derive(first, other, "Reshape", "merged with an equal constant of another shape")

    def transposed(self) -> None:
        """A matrix that is the transpose of another."""

        def kind(one: _Constant) -> Hashable:
            return one.tensor.dtype, tuple(sorted(one.shape))

        matrices = [one for one in self._constants() if len(one.shape) == 2]
        for alike in _alike(matrices, kind):
            left: dict[Hashable, _Constant] = {}
            for one in alike:
                first = left.get((one.shape, _turned(one.tensor)))
                if first is None:
                    left.setdefault((one.shape[::-1], self._digest(one)), one)
                else:
                    self._turn(first, one)

    def _digest(self, one: _Constant) -> bytes:
        if one not in self.digests:
            self.digests[one] = _digest(blocks(one.tensor))
        return self.digests[one]

    def _turn(self, first: _Constant, other: _Constant) -> None:
        """Let what reads ``other`` read ``first``, which is its transpose."""
        uses = list(other.value.uses())
        if not all(_is_gemm_factor(node, index) for node, index in uses):
            self._derive(first, other, "Transpose", "merged with a constant that is its transpose")
        elif sum(one.tensor.nbytes for one in self._constants(main=False)) > _UNPACKED:
            reason = "is the transpose of another, but in a model this large Gemm would round otherwise with it"
            self.ctx.skip(other.address, reason)
        else:
            for node, _ in uses:
                turned = not node.attributes.get_int("transB", False)
                node.attributes["transB"] = ir.AttrInt64("transB", int(turned))
            self._merge(first, other, "merged with a constant that is its transpose, by transB")

    def _derive(self, first: _Constant, other: _Constant, op_type: str, what: str) -> None:
        """Let what reads ``other`` read what ``op_type`` makes of ``first``."""
        graph, name = self.model.graph, other.value.name or "tied"
        stem = self.names.fresh(f"{name}_tied")
        inputs, attributes = [first.value], []
        if op_type == "Reshape":
            shape = ir.Tensor(np.array(other.shape, np.int64), name=self.names.fresh(f"{name}_shape"))
            wanted, _ = new_constant(other.scope, shape, shape.name or stem)
            graph.register_initializer(wanted)
            inputs.append(wanted)
        else:
            attributes.append(ir.AttrInt64s("perm", [1, 0]))
        made = ir.Value(name=stem, type=other.value.type, shape=ir.Shape(other.shape))
        graph.insert_before(graph[0], ir.Node("", op_type, inputs, attributes, outputs=[made], name=stem))
        self._replace(other, made)
        self.ctx.change(other.address, what, bytes=int(other.tensor.nbytes))

    def _merge(self, first: _Constant, other: _Constant, what: str, **numbers: float) -> None:
        address = other.address
        self._replace(other, first.value)
        self.ctx.change(address, what, bytes=int(other.tensor.nbytes), **numbers)

    def _replace(self, other: _Constant, value: ir.Value) -> None:
        replace_all_uses(other.value, value)
        discard([other.value])

    # Nearly the same --------------------------------------------------------------------------------------------------

    def near(self, tolerance: float) -> None:
        """Floats of one type and shape that differ by little: the first of them for all."""
        floats = [one for one in self._constants(main=False) if one.tensor.dtype.is_floating_point()]
        for alike in _alike(floats, lambda one: (one.tensor.dtype, one.shape)):
            kept: list[tuple[_Constant, _Sketch]] = []
            for one in alike:
                sketch = _Sketch.of(one.tensor)
                for first, other in kept:
                    graph = first.value.graph
                    if graph is not one.value.graph and (graph is not self.model.graph or one.scope.function):
                        continue  # out of sight
                    if (found := other.distance(sketch, tolerance)) is not None:
                        self._merge(first, one, "merged with a constant that is nearly equal", difference=found)
                        break
                else:
                    kept.append((one, sketch))


@dataclass(frozen=True, eq=False)
class _Sketch:
    """A tensor with its greatest magnitude, and a few of its elements."""

    tensor: ir.TensorProtocol
    greatest: float
    some: Array

    @classmethod
    def of(cls, tensor: ir.TensorProtocol) -> _Sketch:
        greatest = max((float(np.abs(block.astype(np.float64)).max()) for block in blocks(tensor)), default=0.0)
        first = next(blocks(tensor))
        return cls(tensor, greatest, first[:: max(1, first.size // _SAMPLES)].astype(np.float64))

    def distance(self, other: _Sketch, tolerance: float) -> float | None:
        """The greatest difference as a share of the greatest magnitude; None where it is above ``tolerance``.

        NaN and infinity are near nothing.
        """
        allowed = tolerance * self.greatest
        if not (np.isfinite([self.greatest, other.greatest]).all() and np.abs(self.some - other.some).max() <= allowed):
            return None
        one, two, most = reader(self.tensor), reader(other.tensor), 0.0
        for start in range(0, self.tensor.size, BLOCK):
            stop = min(start + BLOCK, self.tensor.size)
            difference = one(start, stop).astype(np.float64) - two(start, stop).astype(np.float64)
            most = max(most, float(np.abs(difference).max()))
            if most > allowed:
                return None
        return most / self.greatest if self.greatest else 0.0


def _is_free(value: ir.Value) -> bool:
    """Whether a constant may be tied to another."""
    if value.is_graph_output() or is_named(value) or is_annotated(value):
        return False
    kinds = {operator(node).port(index).kind for node, index in value.uses()}
    return not kinds & {Kind.SCALE, Kind.ZERO_POINT, Kind.SHAPE}


def _is_gemm_factor(node: ir.Node, index: int) -> bool:
    return node.op_type == "Gemm" and not node.domain and index == 1


def _alike(constants: Iterable[T], key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Lists of at least two with equal keys, in the given order."""
    found: dict[Hashable, list[T]] = {}
    for one in constants:
        found.setdefault(key(one), []).append(one)
    return (group for group in found.values() if len(group) > 1)


def _turned(tensor: ir.TensorProtocol) -> bytes:
    """The digest of the transpose of a matrix, read some columns at a time."""
    matrix = tensor.numpy()
    step = max(1, BLOCK // matrix.shape[0])
    columns = (matrix[:, start : start + step].T for start in range(0, matrix.shape[1], step))
    return _digest(np.ascontiguousarray(some) for some in columns)


def _digest(parts: Iterable[Array]) -> bytes:
    state = blake2b(digest_size=16)
    for part in parts:
        state.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return state.digest()
