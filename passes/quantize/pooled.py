"""What flattens the pixel that a pool of integers leaves, written so that ONNX Runtime need not turn it first.

Integer kernels keep channels last, and what reads another order gets it from a Transpose. Of one pixel the order of
axes does not matter: a Transpose written here meets the runtime's own, and both vanish.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_ints
from ...ir.match import Replacement, Rule, attribute, rule
from ...ir.shapes import Dims, dims
from ..base import Context
from ..rewrite import Tape, rewrite
from .columns import unrounded

_FLATTENING = ("Flatten", "Reshape", "Squeeze")


def turn_pixels(model: ir.Model, ctx: Context) -> None:
    """Rewrite what flattens a pool of integers, a line of the ledger each."""
    rewrite(model, list(_rules()), ctx)


def _rules() -> Iterator[Rule]:
    for name in _FLATTENING:
        pixel = "DequantizeLinear(QuantizeLinear(GlobalAveragePool(image), *_), *_)"
        yield rule(f"node @ {name}({pixel}, *rest)")(pixel_of_integers_flattened)


def pixel_of_integers_flattened(
    tape: Tape, node: ir.Node, image: ir.Value, rest: tuple[ir.Value | None, ...]
) -> Replacement:
    """[N, C, 1, 1] to [N, C] by way of [N, 1, 1, C]."""
    sizes, pixel = dims(unrounded(image)), node.inputs[0]
    maker = image.producer()
    if sizes is None or len(sizes) != 4 or maker is None or maker.op_type != "DequantizeLinear":
        return None
    if not _flattens(node, constant_ints(rest[0]) if rest else None, sizes):
        return None
    return tape.Squeeze(tape.Transpose(pixel, perm=[0, 2, 3, 1]), tape.constant(np.array([1, 2])))  # type: ignore[no-any-return]


def _flattens(node: ir.Node, given: tuple[int, ...] | None, sizes: Dims) -> bool:
    """Whether ``node`` makes [N, C] of [N, C, 1, 1]."""
    if node.op_type == "Flatten":
        return attribute(node, "axis", 1) in (1, -3)
    if given is None:
        return False
    if node.op_type == "Squeeze":
        return {axis % 4 for axis in given} == {2, 3}
    batch, channels = sizes[:2]
    if len(given) != 2 or (0 in given and attribute(node, "allowzero", 0)):
        return False
    return given[1] == channels or (given[1] == -1 and given[0] in (0, batch))
