"""Values that no run can hold, told from the shapes before anything runs: a few bytes can ask for any amount."""

from __future__ import annotations

import math
import os
from pathlib import Path

import onnx_ir as ir

from ..ir.address import graphs, printable
from ..ir.calls import overgrown
from ..ir.shapes import inferred

GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def too_large(model: ir.Model, available: int | None = None) -> str | None:
    """Why ``model`` cannot run in ``available`` bytes (None: what the machine has), as a clause; ``None`` if it may.

    Too large are also functions that stand for more nodes than ``ir.calls`` allows. A value counts with each unknown
    dimension as 1, so one that is named is too large on any input. What bodies of functions compute is not looked at.
    """
    if reason := overgrown(model):
        return reason
    available = machine_bytes() if available is None else available
    try:
        found = {value: (item.type, item.dims) for value, item in inferred(model).items()}
    except Exception:  # a model that inference does not take: what it says itself is all that is known
        found = {}
    for prefix, graph in graphs(model):
        inputs = (value for value in graph.inputs if value.const_value is None)
        for value in (*inputs, *(value for node in graph for value in node.outputs)):
            type_, dims = found.get(value, (value.type, value.shape))
            size = _least_bytes(type_, () if dims is None else tuple(dims))
            if size > available:
                return (
                    f"value '{printable(prefix + (value.name or ''))}' would take {_words(size)}, and this machine has "
                    f"{_words(available)}"
                )
    return None


def machine_bytes() -> int:
    """Bytes of memory of this machine, or that the control group of this process may have, if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [1 << 34]
    for file in map(Path, GROUPS):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _least_bytes(type_: ir.TypeProtocol | None, dims: tuple[object, ...]) -> int:
    """Bytes of a tensor; 0 for other types."""
    if not isinstance(type_, ir.TensorType):
        return 0
    bits = 8 if type_.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED) else type_.dtype.bitwidth
    return math.prod(max(dim, 0) if isinstance(dim, int) else 1 for dim in dims) * bits // 8


def _words(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1 << 64 else "over 2^64 bytes"
