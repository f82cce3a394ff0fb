"""Constants of the same content, kept once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import onnx_ir as ir

from ...ir.constants import constant_tensor, is_constant
from ...ir.ops import Kind, operator
from ...ir.scopes import Scope, scopes
from ...ir.storage import MadeTensor
from ...ir.unused import discard
from ..base import Context, Pass, register

_HEAD = 1 << 10  # bytes compared as they are; what is larger is told apart by a digest
_BLOCK = 1 << 20
_KEPT_APART = (Kind.SCALE, Kind.ZERO_POINT)


@register("merge-duplicates")
class MergeDuplicates(Pass):
    """Keep one of several constants with equal type, shape and bytes.

    A body may use one of the main graph instead of its own where that saves over 1 KiB. Scales and zero points stay
    apart, for ONNX Runtime fuses quantized operators only where each has its own; so do inputs and outputs.
    """

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Reads only tensors that have a possible twin: one of the same type and shape."""
        outer: dict[str, dict[object, ir.Value]] = {}
        for scope in scopes(model):
            holder = _holder(scope.prefix)
            visible = outer.get(holder, {}) if scope.prefix != holder or scope.function is None else {}
            outer[scope.prefix] = _merge(scope, visible, ctx)


def _holder(prefix: str) -> str:
    """The prefix of the graph around a body."""
    raise NotImplementedError


def _merge(scope: Scope, visible: dict[object, ir.Value], ctx: Context) -> dict[object, ir.Value]:
    raise NotImplementedError
