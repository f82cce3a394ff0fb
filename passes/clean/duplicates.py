"""Constants of the same content, kept once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import onnx_ir as ir

from ...ir.constants import constant_tensor, is_constant
from ...ir.ops import Kind, operator
from ...ir.references import is_annotated, is_named, replace_all_uses
from ...ir.scopes import Scope, scopes
from ...ir.shapes import static_dims
from ...ir.sparse import SparseTensor, stored_bytes
from ...ir.storage import MadeTensor, StreamedTensor, blocks
from ...ir.unused import discard, is_idle
from ..base import Context, Pass, register

_SMALL = 1 << 10  # bytes
_KEPT_APART = (Kind.SCALE, Kind.ZERO_POINT)

Constant = tuple[ir.Value, ir.TensorProtocol]


@register("merge-duplicates")
class MergeDuplicates(Pass):
    """Keep one of several constants with equal type, shape and bytes.

    A body gives up its own constant for an initializer of the main graph where that saves over 1 KiB. Scales and zero
    points stay apart, for ONNX Runtime fuses quantized operators only where each has its own; so do inputs and outputs,
    and strings.
    """

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Reads only tensors that may have a twin: those that share type and shape, then those that begin alike."""
        content = _Content()
        main: list[Constant] = []
        for scope in scopes(model):
            own = list(_constants(scope))
            outer = main if scope.function is None else []
            kinds = {_kind(constant) for constant in own if stored_bytes(constant[1]) > _SMALL} if outer else set()
            seen = [constant for constant in outer if _kind(constant) in kinds]
            for twins in _groups([*seen, *own], content):
                free = []
                for value, tensor in twins:
                    reason = _why_apart(value, tensor)
                    if reason is None:
                        free.append((value, tensor))
                    elif value.graph is scope.graph:
                        ctx.skip(scope.address(value), f"has an equal twin, but {reason}")
                for value, tensor in free[1:]:
                    if value.graph is scope.graph:
                        address = scope.address(value)
                        replace_all_uses(value, free[0][0])
                        discard([value])
                        ctx.change(address, "merged with an equal constant", bytes=stored_bytes(tensor))
            if scope.graph is model.graph:
                main = [constant for constant in own if constant[0].is_initializer()]


class _Content:
    """What a tensor holds, read once: its first bytes, and a digest of all."""

    def __init__(self) -> None:
        self._digests: dict[Hashable, Hashable] = {}

    def head(self, tensor: ir.TensorProtocol) -> Hashable:
        if isinstance(tensor, MadeTensor) and not isinstance(tensor, StreamedTensor):
            return tensor  # not made only to be compared
        if isinstance(tensor, SparseTensor):
            return tuple(entry[:8].tobytes() for entry in tensor.entries())
        if tensor.dtype == ir.DataType.STRING:
            return tuple(bytes(word) for word in tensor.numpy().flat)
        if tensor.nbytes <= _SMALL:
            return tensor.tobytes()
        return next(blocks(tensor))[:_SMALL].tobytes()

    def digest(self, tensor: ir.TensorProtocol) -> Hashable:
        if isinstance(tensor, SparseTensor):
            return tuple(hashlib.blake2b(entry.tobytes(), digest_size=16).digest() for entry in tensor.entries())
        made = isinstance(tensor, MadeTensor) and not isinstance(tensor, StreamedTensor)
        if made or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= _SMALL:
            return None
        place: Any = tensor
        if isinstance(tensor, ir.ExternalTensor):
            place = (tensor.path, tensor.offset, tensor.length)
        if place not in self._digests:
            state = hashlib.blake2b(digest_size=16)
            for block in blocks(tensor):
                state.update(block.tobytes())
            self._digests[place] = state.digest()
        return self._digests[place]


def _groups(constants: list[Constant], content: _Content) -> Iterator[list[Constant]]:
    """Lists of equal constants, in the given order."""
    for alike in _alike(constants, _kind):
        for near in _alike(alike, lambda constant: content.head(constant[1])):
            yield from _alike(near, lambda constant: content.digest(constant[1]))


def _alike(constants: list[Constant], key: Callable[[Constant], Hashable]) -> Iterator[list[Constant]]:
    found: dict[Hashable, list[Constant]] = {}
    for constant in constants:
        found.setdefault(key(constant), []).append(constant)
    return (group for group in found.values() if len(group) > 1)


def _kind(constant: Constant) -> Hashable:
    """A sparse constant is a twin of sparse ones only, for it is smaller in the file than a dense one."""
    value, tensor = constant
    return tensor.dtype, static_dims(value) or tuple(tensor.shape.numpy()), type(tensor) is SparseTensor


def _constants(scope: Scope) -> Iterator[Constant]:
    """Those that something uses: initializers first, for they are visible everywhere in the graph."""
    nodes = (node.outputs[0] for node in scope.graph if node.op_type == "Constant")
    for value in (*scope.graph.initializers.values(), *nodes):
        if is_constant(value) and not is_idle(value) and (tensor := constant_tensor(value)) is not None:
            yield value, tensor


def _why_apart(value: ir.Value, tensor: ir.TensorProtocol) -> str | None:
    """Why a constant is not merged with its twins; ``None`` where it may be."""
    if value.is_graph_output():
        return "is an output"
    if tensor.dtype == ir.DataType.STRING:
        return "holds strings"
    if is_named(value) or is_annotated(value):
        return "is in a quantization annotation"
    if any(operator(node).port(index).kind in _KEPT_APART for node, index in value.uses()):
        return "is a scale or zero point, which ONNX Runtime fuses only where each has its own"
    return None
