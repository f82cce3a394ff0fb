"""Quantized models, ours and others', as float models again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.constants import is_constant
from ...ir.match import Replacement, Rule, attribute, decline, rule
from ...ir.ops import Kind, operator
from ...ir.scopes import scopes
from ...ir.trace import constant
from ..base import Context, Effect, Pass, register
from ..rewrite import Tape, rewrite
from ..selection import NOTHING, Selection, left_out
from .clamps import clamp_rules
from .float_constants import Constants, constant_integers
from .float_operators import (
    DEQUANTIZE,
    DOMAINS,
    MICROSOFT,
    QUANTIZE,
    attributes,
    named,
    operator_rules,
    three,
)
from .fold_columns import plain
from .integer_moves import move_rules

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@register("dequantize")
class Dequantize(Pass):
    """Write a quantized model in floats again: the inverse of quantization, up to the rounding.

    Understands QuantizeLinear and DequantizeLinear (of ONNX and of ONNX Runtime, per tensor, per channel, in blocks, of
    any width), operators on integers (QLinearConv, QLinearMatMul, ONNX Runtime's QLinear*, QGemm, QAttention), dynamic
    quantization (MatMulInteger, ConvInteger, DynamicQuantizeMatMul, DynamicQuantizeLSTM), packed blocks (MatMulNBits,
    GatherBlockQuantized), and weights that Cast, Sub and Mul decode.

    A weight becomes exactly the floats that its integers stand for; what rounding took away does not come back.
    Activations are no longer rounded. Where integers also clamped them, because an exporter merged Relu or Relu6 into
    the rounding, that operator stands there again. Integer inputs and outputs of the model stay integer. What is not
    understood stays as it is.
    """

    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        return Effect.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        with plain(model, ctx):
            self._run(model, ctx)

    def _run(self, model: ir.Model, ctx: Context) -> None:
        made = Constants()
        rewrite(model, self._asked([*operator_rules(made), *move_rules(), *dynamic_rules(made)]), ctx)
        rewrite(model, self._asked(_rounding_rules(made)), ctx)
        made.give_names(model)
        told = {skip.subject for skip in ctx.ledger.skips}
        for scope in scopes(model):
            for node in scope.graph:
                address = scope.address(node)
                if address not in told and (reason := _left(node)):
                    ctx.skip(address, reason)
        if not ctx.ledger.changes and not ctx.ledger.skips:
            ctx.skip("model", "nothing in it is quantized")

    def _asked(self, rules: Iterable[Rule]) -> list[Rule]:
        """The rules, each declining for nodes and weights that ``only`` and ``keep`` exclude."""
        return [replace(item, function=self._guarded(item.function)) for item in rules]

    def _guarded(self, function: Callable[..., Replacement]) -> Callable[..., Replacement]:
        if not (self.only or self.keep):
            return function

        def guarded(tape: Tape, **names: Any) -> Replacement:
            subjects = list(_subjects(tape.root, names.values()))
            if any(subject in self.keep for subject in subjects):
                decline("kept by request")
            if self.only and not any(subject in self.only for subject in subjects):
                decline(left_out(tape.root, self.only, NOTHING) or "")
            return function(tape, **names)

        return guarded


def _subjects(root: ir.Node, names: Iterable[Any]) -> Iterator[ir.Node | ir.Value]:
    """What a rewrite is about: the nodes that it matched, their constants, and the layers around a rounding."""
    nodes = dict.fromkeys([root, *(name for name in names if isinstance(name, ir.Node))])
    if root.op_type == DEQUANTIZE:
        around = list(root.outputs[0].consumers())
        source = root.inputs[0].producer() if root.inputs[0] is not None else None
        if source is not None and source.op_type == QUANTIZE and source.inputs[0] is not None:
            around += [maker for maker in (source.inputs[0].producer(),) if maker is not None]
        nodes |= dict.fromkeys(around)
    for node in nodes:
        yield node
        yield from (value for value in node.inputs if value is not None and is_constant(value))


# Dynamic quantization -------------------------------------------------------------------------------------------------


def dynamic_rules(made: Constants) -> Iterator[Rule]:
    """Products of integers that Cast and Mul bring to float."""
    for name, target, axis in (("MatMulInteger", "MatMul", -1), ("ConvInteger", "Conv", 0)):
        text = f"Mul(cast @ Cast(product @ {name}(a, b, *zeros)), factor)"
        yield replace(rule(text)(_dynamic(made, target, axis)), name=f"{name} in float")


def _dynamic(made: Constants, target: str, axis: int) -> Callable[..., Replacement]:
    def lower(
        tape: Tape, cast: ir.Node, product: ir.Node, a: ir.Value, b: ir.Value, zeros: Any, factor: ir.Value
    ) -> Replacement:
        scale, zero = _parameters_of(a)
        if not _same(zeros[0] if zeros else None, zero):
            decline("its input's zero point is not that of its input's rounding")
        stored = constant_integers(b)
        if stored is None:
            decline("its weight is no constant")
        rank = len(stored.shape)
        scales = _along(_weight_scale(factor, scale), rank, axis)
        zero_point = constant(zeros[1]) if len(zeros) > 1 and zeros[1] is not None else None
        weight = made.restored(tape, b, scales, zero_point, axis=axis, dtype=ir.DataType.FLOAT)
        x = tape.DequantizeLinear(a, scale, zero)
        return tape.op("", target, x, weight, **attributes(product))  # type: ignore[no-any-return]

    return lower


def _parameters_of(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Scale and zero point of integers that DynamicQuantizeLinear or QuantizeLinear made."""
    maker = value.producer()
    if maker is None or maker.op_type not in (QUANTIZE, "DynamicQuantizeLinear") or maker.inputs[0] is None:
        decline("the scale of its input is not known")
    if maker.op_type == "DynamicQuantizeLinear":
        return maker.outputs[1], maker.outputs[2]
    _, scale, zero = three(maker)
    assert scale is not None
    return scale, zero


def _weight_scale(factor: ir.Value, scale: ir.Value) -> np.ndarray[Any, Any]:
    """What remains of the factor behind a product once the input's scale is taken out."""
    if factor is scale:
        return np.ones((), np.float32)
    maker = factor.producer()
    others = list(maker.inputs) if maker is not None and maker.op_type == "Mul" else []
    if scale in others:
        others.remove(scale)
    found = constant(others[0]) if len(others) == 1 else None
    if found is None:
        decline("what its product is multiplied by is not its input's scale and its weight's")
    return found


def _along(scale: np.ndarray[Any, Any], rank: int, axis: int) -> np.ndarray[Any, Any]:
    """Scales that broadcast over a product, as scales along the output channels of a weight of ``rank``.

    A convolution's product has its channels on axis 1, a matrix product's on the last. Declines for others.
    """
    if scale.size == 1:
        return scale.reshape(())
    place = scale.ndim - rank + 1 if axis == 0 else scale.ndim - 1
    if axis != 0 and scale.ndim == rank > 2 and scale.shape[-2] == 1:
        return scale
    if place < 0 or scale.size != scale.shape[place]:
        decline("its weight's scales are not along the output channels")
    return scale.reshape(-1)


# Rounding -------------------------------------------------------------------------------------------------------------


def _rounding_rules(made: Constants) -> Iterator[Rule]:
    yield from clamp_rules()
    for domain in DOMAINS:
        text = f"node @ {domain + '.' if domain else ''}{DEQUANTIZE}(*_)"
        yield named("integers as the float weight", text, _constant_rule(made))
        yield named("an activation no longer rounded", text, _unrounded)
    for text in ("Mul(Cast(q), s)", "Mul(Sub(Cast(q), z), s)"):
        yield named("integers as the float weight", text, _decoded_rule(made, shifted="Sub" in text))
    yield named("a float weight in its own type", "Cast(x, to=to)", lambda tape, x, to: _cast(made, tape, x, to))


def _constant_rule(made: Constants) -> Callable[..., Replacement]:
    def restore(tape: Tape, node: ir.Node) -> Replacement:
        """DequantizeLinear of a constant."""
        stored, scale, zero = three(node)
        if stored is None or constant_integers(stored) is None:
            return None
        scales, zeros = constant(scale), constant(zero)
        if scales is None or (zeros is None and zero is not None):
            decline("its scale or zero point is no constant")
        number = attribute(node, "output_dtype", 0)
        dtype = ir.DataType(number) if number else ir.DataType.from_numpy(scales.dtype)
        if dtype not in FLOATS:
            decline(f"it makes {dtype.name.lower()}")
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        value = made.restored(tape, stored, scales, zeros, axis=axis, block=block, dtype=dtype)
        return tape.Identity(value) if node.outputs[0].is_graph_output() else value

    return restore


def _unrounded(tape: Tape, node: ir.Node) -> Replacement:
    """DequantizeLinear of QuantizeLinear or DynamicQuantizeLinear of x is x."""
    q, *read = three(node)
    maker = q.producer() if q is not None else None
    if maker is None or maker.op_type not in (QUANTIZE, "DynamicQuantizeLinear") or q is not maker.outputs[0]:
        return None
    x = maker.inputs[0]
    written = list(maker.outputs[1:]) if maker.op_type != QUANTIZE else three(maker)[1:]
    settings = (("axis", 1), ("block_size", 0))
    if (
        x is None
        or not all(map(_same, written, read))
        or any(attribute(maker, name, default) != attribute(node, name, default) for name, default in settings)
    ):
        decline("it reads integers by another scale or zero point than they were made with")
    number, scale = attribute(node, "output_dtype", 0), read[0]
    wanted = ir.DataType(number) if number else scale.dtype if scale is not None else None
    return _as_output(tape, node, x, wanted)


def _as_output(tape: Tape, node: ir.Node, x: ir.Value, wanted: ir.DataType | None) -> ir.Value:
    """``x``, in the type wanted, so that it can take the place of the node's output."""
    if x.dtype is not None and wanted is not None and x.dtype is not wanted:
        return tape.Cast(x, to=int(wanted))  # type: ignore[no-any-return]
    fixed = x.producer() is None or x.is_graph_output() or x.graph is not tape.scope.graph
    return tape.Identity(x) if node.outputs[0].is_graph_output() and fixed else x


def _same(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two scales or zero points are equal; an absent one is 0."""
    if one is other:
        return True
    found = [np.zeros((), np.uint8) if value is None else constant(value) for value in (one, other)]
    first, second = found
    return first is not None and second is not None and np.array_equal(first.ravel(), second.ravel())


# Decoded weights ------------------------------------------------------------------------------------------------------


def _decoded_rule(made: Constants, *, shifted: bool) -> Callable[..., Replacement]:
    def restore(tape: Tape, q: ir.Value, s: ir.Value, z: ir.Value | None = None) -> Replacement:
        """(Cast(q) - z) * s of constants, q integers of at most 16 bits."""
        tensor, scale, zero = constant_integers(q), constant(s), constant(z)
        if tensor is None or scale is None or (shifted and zero is None):
            return None
        if not tensor.dtype.is_integer() or tensor.dtype.bitwidth > 16 or scale.dtype != np.float32:
            return None
        shape, numbers = tuple(tensor.shape.numpy()), [scale, *([] if zero is None else [zero])]
        if not all(_broadcasts(array.shape, shape) for array in numbers):
            return None
        value = made.decoded(tape, q, scale, zero)
        return tape.Identity(value) if tape.root.outputs[0].is_graph_output() else value

    if shifted:
        return lambda tape, q, z, s: restore(tape, q, s, z)
    return lambda tape, q, s: restore(tape, q, s)


def _broadcasts(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(over), strict=False)
    return len(shape) <= len(over) and all(size in (1, full) for size, full in ends)


def _cast(made: Constants, tape: Tape, x: ir.Value, to: int) -> Replacement:
    """Cast of a weight that was restored."""
    dtype = ir.DataType(to)
    if tape.root.outputs[0].is_graph_output() or not dtype.is_floating_point():
        return None
    return made.cast(tape, x, dtype)


# What is left ---------------------------------------------------------------------------------------------------------


def _left(node: ir.Node) -> str | None:
    """Why a node that is about quantization is still there; ``None`` for others."""
    if node.op_type == QUANTIZE:
        if any(value.is_graph_output() for value in node.outputs):
            return "an integer output, which stays as it is"
        readers = {user.op_type for user in node.outputs[0].consumers()} - {DEQUANTIZE}  # which says why itself
        return f"its integers are read by {', '.join(sorted(readers))}" if readers else None
    if node.op_type == DEQUANTIZE:
        source = node.inputs[0]
        if source is None or source.producer() is None:
            return "an integer input, which stays as it is"
        return f"its integers come from {source.producer().op_type}"  # type: ignore[union-attr]
    quantized = any(port.kind in (Kind.SCALE, Kind.ZERO_POINT, Kind.PACKED) for port in operator(node).ports)
    if quantized or node.op_type == "DynamicQuantizeLinear" or (node.domain == MICROSOFT and node.op_type[:1] == "Q"):
        return f"there is no float form of {node.op_type} here"
    return None
