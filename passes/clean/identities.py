"""Operators that do nothing, as a table of rules. Each holds bit for bit: x + 0, which turns -0 to 0, is left."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_array, constant_ints, constant_tensor
from ...ir.match import Replacement, Rule, decline, rule
from ...ir.scopes import scopes
from ...ir.shapes import Dims, dims, infer_shapes
from ...ir.unused import is_idle
from ..base import Context, Pass, register
from ..rewrite import Tape, rewrite

_END = 2**31 - 1  # exporters write this, or the largest int64, for "to the end"


@register("remove-identities")
class RemoveIdentities(Pass):
    """Remove operators that provably change nothing.

    Identity, Cast to the type it has or there and back without loss, Dropout at inference, Transpose that keeps or
    restores the order, Concat, Sum, Max, Min, Mean and Split of one, Reshape and its like to the same shape or of a
    Reshape, Expand, Tile, Slice and Pad that take or add nothing, x*1, x/1, x-0.
    Inputs and outputs keep their names: an Identity from an input to an output, for one, stays.
    """

    def run(self, model: ir.Model, ctx: Context) -> None:
        remove_identities(model, ctx)


def remove_identities(model: ir.Model, ctx: Context) -> None:
    """Rewrites every graph, to a fixed point; infers shapes that an operator stood in the way of, and goes on."""
    told = len(ctx.ledger.skips)
    while rewrite(model, RULES, ctx) and _has_unknown_shapes(model) and infer_shapes(model).improved:
        del ctx.ledger.skips[told:]  # the next round tells them again


@rule("Identity(x)")
def identity(tape: Tape, x: ir.Value) -> Replacement:
    del tape
    return x


@rule("Cast(x, to=to)")
def cast_to_the_same_type(tape: Tape, x: ir.Value, to: int) -> Replacement:
    del tape
    return x if x.dtype is not None and int(x.dtype) == to else None


@rule("CastLike(x, like)")
def cast_to_the_like_type(tape: Tape, x: ir.Value, like: ir.Value) -> Replacement:
    del tape
    return x if x.dtype is not None and x.dtype == like.dtype else None


@rule("Cast(Cast(x, to=wide), to=to)", shared=True)
def cast_there_and_back(tape: Tape, x: ir.Value, wide: int, to: int) -> Replacement:
    del tape
    return x if x.dtype is not None and int(x.dtype) == to and _holds(ir.DataType(wide), x.dtype) else None


@rule("node @ Dropout(x, *rest)")
def dropout_at_inference(tape: Tape, node: ir.Node, x: ir.Value, rest: tuple[ir.Value | None, ...]) -> Replacement:
    if tape.version < 7:
        return None  # is_test says, and says training where it is absent
    training = rest[1] if len(rest) > 1 else None
    if training is not None:
        told = constant_array(training)
        if told is None:
            decline("whether it trains is known only when it runs")
        if told.any():
            decline("it is told to train")
    if not all(map(is_idle, node.outputs[1:])):
        decline("its mask is used")
    return (x, *(None for _ in node.outputs[1:]))


@rule("Transpose(x, perm=perm)")
def transpose_in_order(tape: Tape, x: ir.Value, perm: tuple[int, ...] | None) -> Replacement:
    del tape
    if perm is None:
        return x if x.shape is not None and x.shape.rank() < 2 else None
    return x if list(perm) == list(range(len(perm))) else None


@rule("Transpose(inner @ Transpose(x, perm=first), perm=second)", shared=True)
def transpose_twice(
    tape: Tape, inner: ir.Node, x: ir.Value, first: tuple[int, ...] | None, second: tuple[int, ...] | None
) -> Replacement:
    if first is None and second is None:
        return x
    count = len(first or second or ())
    first, second = (perm or tuple(reversed(range(count))) for perm in (first, second))
    perm = [first[axis] for axis in second]
    if perm == list(range(count)):
        return x
    return tape.Transpose(x, perm=perm) if _only_use(inner) else None


def only_one_operand(tape: Tape, x: ir.Value) -> Replacement:
    if tape.root.op_type == "Max" and _guards(tape.root):
        decline("it keeps a float operator apart from integers")
    return x if len(tape.root.outputs) == 1 else None


@rule("Reshape(x, shape, allowzero=allowzero)")
def reshape_to_the_same_shape(tape: Tape, x: ir.Value, shape: ir.Value, allowzero: int | None) -> Replacement:
    if _same_shape(x, tape.root.outputs[0], same_size=True):
        return x
    wanted, found = constant_ints(shape), dims(x)
    if wanted is None or found is None or len(wanted) != len(found) or wanted.count(-1) > 1:
        return None
    zero = None if allowzero else 0
    return x if all(want in (zero, -1, size) for want, size in zip(wanted, found, strict=True)) else None


def reshape_once(tape: Tape, inner: ir.Node, x: ir.Value, shape: ir.Value, allowzero: int | None) -> Replacement:
    """A zero in the outer shape copies a dimension of the inner result, so it stands in the way."""
    wanted = constant_ints(shape)
    if wanted is None or (0 in wanted and not allowzero) or not _only_use(inner):
        return None
    return tape.Reshape(x, shape, allowzero=allowzero or None)  # type: ignore[no-any-return]


def same_shape_as_before(tape: Tape, x: ir.Value) -> Replacement:
    return x if _same_shape(x, tape.root.outputs[0], same_size=tape.root.op_type in _KEEP_SIZE) else None


@rule("node @ Slice(x, *rest)")
def slice_of_everything(tape: Tape, node: ir.Node, x: ir.Value, rest: tuple[ir.Value | None, ...]) -> Replacement:
    if tape.version < 10:
        starts, ends = tape.attribute(node, "starts", ()), tape.attribute(node, "ends", ())
        steps: tuple[int, ...] | None = (1,)
    else:
        starts, ends = constant_ints(rest[0]), constant_ints(rest[1])
        steps = constant_ints(rest[3]) if len(rest) > 3 and rest[3] is not None else (1,)
    if steps is None or any(step < 1 for step in steps):
        return None
    whole = starts is not None and ends is not None and not any(starts) and all(end >= _END for end in ends)
    whole = whole and set(steps) <= {1}
    return x if whole or _same_shape(x, node.outputs[0]) else None


@rule("node @ Pad(x, *rest)")
def pad_by_nothing(tape: Tape, node: ir.Node, x: ir.Value, rest: tuple[ir.Value | None, ...]) -> Replacement:
    if tape.version < 11:
        pads = tape.attribute(node, "pads" if tape.version > 1 else "paddings")
    else:
        pads = constant_ints(rest[0])
    return x if pads is not None and not any(pads) else None


@rule("Mul(x, one)")
def times_one(tape: Tape, x: ir.Value, one: ir.Value) -> Replacement:
    return x if _all_are(one, 1) and _spreads_over(one, x) else None


@rule("Div(x, one)")
def divided_by_one(tape: Tape, x: ir.Value, one: ir.Value) -> Replacement:
    return x if _all_are(one, 1) and _spreads_over(one, x) else None


@rule("Sub(x, zero)")
def minus_zero(tape: Tape, x: ir.Value, zero: ir.Value) -> Replacement:
    return x if _all_are(zero, 0) and not _signs(zero) and _spreads_over(zero, x) else None


@rule("Add(x, zero)")
def plus_zero(tape: Tape, x: ir.Value, zero: ir.Value) -> Replacement:
    """Exact for integers; for floats only where the zero is -0, for -0 + 0 is 0."""
    exact = _all_are(zero, 0) and (zero.dtype is None or not zero.dtype.is_floating_point() or _signs(zero) == 1)
    return x if exact and zero.dtype is not None and _spreads_over(zero, x) else None


def _guards(node: ir.Node) -> bool:
    """Whether ``node`` reads from a DequantizeLinear or a QuantizeLinear reads it: without it ONNX Runtime would run
    what is on its other side on integers."""
    source = None if node.inputs[0] is None else node.inputs[0].producer()
    readers = [use.node.op_type for use in node.outputs[0].uses()]
    return (source is not None and source.op_type == "DequantizeLinear") or "QuantizeLinear" in readers


_KEEP_SIZE = ("Squeeze", "Unsqueeze", "Flatten")

RULES: list[Rule] = [
    identity,
    cast_to_the_same_type,
    cast_to_the_like_type,
    cast_there_and_back,
    dropout_at_inference,
    transpose_in_order,
    transpose_twice,
    *(rule(f"{name}(x)")(only_one_operand) for name in ("Concat", "Sum", "Max", "Min", "Mean", "Split")),
    reshape_to_the_same_shape,
    *(
        rule(f"Reshape(inner @ {name}, shape, allowzero=allowzero)", shared=True)(reshape_once)
        for name in ("Reshape(x, _)", "Flatten(x)", "Squeeze(x, *_)", "Unsqueeze(x, *_)")
    ),
    *(rule(f"{name}(x, *_)")(same_shape_as_before) for name in (*_KEEP_SIZE, "Expand", "Tile")),
    slice_of_everything,
    pad_by_nothing,
    times_one,
    divided_by_one,
    minus_zero,
    plus_zero,
]


def _has_unknown_shapes(model: ir.Model) -> bool:
    shapes = (value.shape for scope in scopes(model) for node in scope.graph for value in node.outputs)
    return any(shape is None or shape.has_unknown_dim() for shape in shapes)


def _only_use(node: ir.Node) -> bool:
    return len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()


def _same_shape(x: ir.Value, y: ir.Value, same_size: bool = False) -> bool:
    """Whether two values always have one shape: equal numbers or equal names.

    Values of the same size may have one dimension of which nothing is known, where all others are positive numbers.
    """
    left, right = dims(x), dims(y)
    if left is None or right is None or len(left) != len(right):
        return False
    unlike = [(a, b) for a, b in zip(left, right, strict=True) if a is None or a != b]
    if not unlike:
        return True
    others: Dims = tuple(a for a, b in zip(left, right, strict=True) if a is not None and a == b)
    return same_size and len(unlike) == 1 and all(isinstance(size, int) and size > 0 for size in others)


def _spreads_over(small: ir.Value, x: ir.Value) -> bool:
    """Whether broadcasting the constant ``small`` leaves the shape of ``x`` as it is."""
    tensor = constant_tensor(small)
    found = dims(x)
    if tensor is None:
        return False
    sizes = tensor.shape.numpy()
    if not sizes:
        return True
    if found is None or len(sizes) > len(found):
        return False
    return all(size in (1, own) for size, own in zip(reversed(sizes), reversed(found), strict=False))


def _all_are(value: ir.Value, number: int) -> bool:
    array = constant_array(value)
    return array is not None and array.size > 0 and array.dtype.kind in "iufV" and bool(np.all(array == number))


def _signs(value: ir.Value) -> float:
    """How many of the elements have the sign bit set: a fraction."""
    array = constant_array(value)
    return 0.0 if array is None or array.dtype.kind in "iu" else float(np.mean(np.signbit(array)))


def _holds(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Whether every value of ``narrow`` survives a cast to ``wide`` and back."""
    if narrow == ir.DataType.BOOL:
        return wide.is_integer() or wide.is_floating_point()
    if narrow.is_integer() and wide.is_integer():
        signed = narrow.is_signed() and not wide.is_signed()
        grows = wide.is_signed() and not narrow.is_signed()
        return not signed and wide.bitwidth >= narrow.bitwidth + grows
    exact = {
        ir.DataType.FLOAT: {ir.DataType.FLOAT16, ir.DataType.BFLOAT16},
        ir.DataType.DOUBLE: {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT},
    }
    if narrow.is_integer() and wide.is_floating_point():
        return narrow.bitwidth <= {ir.DataType.FLOAT: 16, ir.DataType.DOUBLE: 32}.get(wide, 0)
    return narrow in exact.get(wide, ())
