"""Equal constants of several bodies, lifted into the main graph, where one will do for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from .constants import constant_tensor, is_constant
from .edit import Names
from .references import is_annotated, is_named, replace_all_uses
from .scopes import scopes, values
from .sparse import SparseTensor
from .storage import blocks
from .unused import discard

_LEAST = 1 << 10  # bytes that pay for a capture


def lift_twins(model: ir.Model) -> int:
    """Move a constant of a body that another body holds too to the main graph; -> how many were moved.

    The bodies of functions see nothing around them, so theirs stay. The other twins stay where they are, for
    ``merge-duplicates`` to merge. Reads what shares type and shape.
    """
    alike: dict[Hashable, list[ir.Value]] = {}
    for scope in scopes(model):
        if scope.function is None and scope.graph is not model.graph:
            for value in values(scope.graph):
                tensor = constant_tensor(value) if is_constant(value) else None
                if tensor is None or tensor.nbytes <= _LEAST or tensor.dtype == ir.DataType.STRING:
                    continue
                if not (isinstance(tensor, SparseTensor) or value.is_graph_output() or is_named(value)):
                    alike.setdefault((tensor.dtype, tuple(tensor.shape.numpy())), []).append(value)
    firsts = []
    for group in alike.values():
        by_content: dict[bytes, list[ir.Value]] = {}
        for value in group if len(group) > 1 else ():
            by_content.setdefault(_digest(value), []).append(value)
        firsts += [twins[0] for twins in by_content.values() if len({twin.graph for twin in twins}) > 1]
    names = Names(model) if firsts else None
    for value in firsts:
        tensor = constant_tensor(value)
        if names is None or tensor is None or is_annotated(value):
            continue
        shape = ir.Shape(tensor.shape.numpy())
        name = names.fresh(value.name or "constant")
        new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        model.graph.register_initializer(new)
        replace_all_uses(value, new)
        discard([value])
    return len(firsts)


def _digest(value: ir.Value) -> bytes:
    tensor = constant_tensor(value)
    assert tensor is not None
    state = hashlib.blake2b(digest_size=16)
    for block in blocks(tensor):
        state.update(np.ascontiguousarray(block).view(np.uint8).data)
    return state.digest()
