"""First convolutions on integers, their columns folded into channels; and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import onnx_ir as ir

from ...ir.address import addresses
from ...ir.affine import U8, Affine
from ...ir.constants import constant_ints, is_constant
from ...ir.edit import become
from ...ir.kernels import bounds
from ...ir.match import Replacement, attribute, decline, rule
from ...ir.shapes import infer_shapes
from ...ir.trace import constant
from ..base import NOTHING, Context, Effect, Pass, Selection, register
from ..rewrite import Tape, rewrite
from ..selection import left_out
from .columns import KEY, Array, Folding, folding
from .costs import Table
from .float_operators import attributes, three
from .insertion import Grids
from .placement import gains
from .plan import forget_shapes, known_shapes, sizes_of

_LAST, _FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # to channels last, and back
_ACTIVATIONS = ("Relu", "Clip")


@register("fold-columns")
class FoldColumns(Pass):
    """Fold columns of images into channels, for which first convolutions on int8 have a quick kernel.

    ONNX Runtime's takes channels by fours. A Conv of one to three channels between DequantizeLinear and QuantizeLinear
    has as many once some columns of the image, 4 in most cases, are the channels of one; its weights are copied for
    what that holds of the result, with zeros beside them. On integers it computes the same numbers. The image's width
    has to be known, and a multiple of those columns. Folded is what the cost table for the target predicts to gain.

    ``quantize-static`` and ``quantize-auto`` end with this, where the model grows by little; passes that mend rounding,
    and ``dequantize``, see the convolution as it was.
    """

    target: Literal["cpu-vnni", "cpu-avx2"] = "cpu-vnni"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        """Rounding: without its integer kernels the runtime sums floats in another order."""
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        trial, known = model.clone(), known_shapes(model)
        infer_shapes(trial)
        table, sizes = Table.of(self.target), sizes_of({})

        def how(conv: ir.Node) -> Folding | None:
            found = folding(conv)
            if found is not None and (reason := left_out(conv, self.only, self.keep)):
                decline(reason)
            if found is not None and not gains(table, conv, found, sizes):
                decline("it is predicted to be slower")
            return found

        fold(trial, ctx, how)
        if ctx.ledger.changes:
            forget_shapes(trial, known)
            become(model, trial)
        if not ctx.ledger.changes and not ctx.ledger.skips:
            ctx.skip("model", "it has no first convolution on integers whose columns could be folded")


def foldable(grids: Grids) -> bool:
    """Whether the quick kernel takes such integers: images of uint8, weights of int8."""
    return grids.activations.dtype is ir.DataType.UINT8 and grids.weights.dtype is ir.DataType.INT8


def fold(model: ir.Model, ctx: Context, how: Callable[[ir.Node], Folding | None]) -> None:
    """Fold the convolutions of which ``how`` says how, a line of the ledger each."""

    def columns_folded_into_channels(tape: Tape, root: ir.Node) -> Replacement:
        layer = _Layer.of(root)
        found = None if layer is None or KEY in layer.conv.metadata_props else how(layer.conv)
        return None if layer is None or found is None else layer.folded(tape, found)

    rewrite(model, [rule("root @ QuantizeLinear(*_)", shared=True)(columns_folded_into_channels)], ctx)


def unfold(model: ir.Model, ctx: Context) -> dict[str, Folding]:
    """Write convolutions as they were before their columns were folded; how they were folded, by their addresses."""
    found = dict[str, Folding]()

    def columns_unfolded(tape: Tape, root: ir.Node) -> Replacement:
        before, shape = _reshaped(_turned(root.outputs[0], _FIRST))
        quantize = None if (integers := _turned(before, _LAST)) is None else integers.producer()
        layer = _Layer.of(quantize) if quantize is not None and quantize.op_type == "QuantizeLinear" else None
        how = None if layer is None else Folding.parse(layer.conv.metadata_props.get(KEY, ""))
        made = None if layer is None or how is None else layer.unfolded(tape, how, shape)
        if layer is not None and how is not None and made is not None:
            found[tape.scope.address(layer.conv)] = how
        return made

    rewrite(model, [rule("root @ Transpose(_)", shared=True)(columns_unfolded)], ctx)
    return found


@contextmanager
def plain(model: ir.Model, ctx: Context) -> Iterator[None]:
    """Convolutions as they were before their columns were folded, as long as this lasts."""
    found = unfold(model, ctx.for_step(ctx.step))
    try:
        yield
    finally:
        if found:
            places = addresses(model)
            fold(model, ctx.for_step(ctx.step), lambda conv: found.get(places.get(conv, "")))


# One layer ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A Conv on integers: the nodes that ONNX Runtime makes one kernel of."""

    quantize: ir.Node  # what it computes
    activation: ir.Node | None
    conv: ir.Node
    image: ir.Node  # DequantizeLinear
    weight: ir.Node  # DequantizeLinear
    bias: ir.Node | None  # DequantizeLinear; a bias may be a constant of floats too

    @classmethod
    def of(cls, quantize: ir.Node) -> Self | None:
        """The layer whose result ``quantize`` rounds; None where there is none, or of other types than the quick kernel
        takes: images of uint8, weights of int8 whose zero points are 0."""
        conv, activation = _maker(quantize.inputs[0]), None
        if conv is not None and conv.op_type in _ACTIVATIONS:
            conv, activation = _maker(conv.inputs[0]), conv
        if conv is None or conv.op_type != "Conv" or conv.domain:
            return None
        image, weight, bias = (None if value is None else value.producer() for value in three(conv))
        if image is None or weight is None:
            return None
        decoding = [node for node in (image, weight, bias) if node is not None and node.op_type != "Constant"]
        if {(node.domain, node.op_type) for node in decoding} != {("", "DequantizeLinear")}:
            return None
        found = cls(quantize, activation, conv, image, weight, bias if bias in decoding else None)
        return found if found._is_quick() and found._is_fused() else None

    def _is_quick(self) -> bool:
        stored, scale, zero = map(constant, three(self.weight))
        image, bias = constant(three(self.image)[2]), three(self.conv)[2:] if self.bias is None else self.bias.inputs
        if not all(value is None or is_constant(value) for value in (*self.weight.inputs, *bias)):
            return False
        if stored is None or stored.dtype != np.int8 or scale is None or (zero is not None and zero.any()):
            return False
        by_output = scale.size == 1 or (scale.ndim == 1 and attribute(self.weight, "axis", 1) in (0, -stored.ndim))
        return by_output and image is not None and image.dtype == np.uint8 and _is_number(self.image.inputs[1])

    def _is_fused(self) -> bool:
        """Whether the result is rounded to uint8 by one scale, and the activation function vanishes in that."""
        scale, zero = constant(self.quantize.inputs[1]), constant(three(self.quantize)[2])
        if scale is None or scale.size != 1 or zero is None or zero.dtype != np.uint8:
            return False
        limits = None if self.activation is None else bounds(self.activation)
        made = Affine(scale.astype(np.float32), zero, U8)
        return self.activation is None or (limits is not None and limits.hold(made))

    def folded(self, tape: Tape, how: Folding) -> ir.Value:
        """The same with columns folded; its result is as it was."""
        outputs, inputs = self._stored.shape[:2]
        x = self.image.inputs[0]
        assert x is not None
        rows = how.rows if inputs == 1 else 0  # 0 is as many as there are
        if not rows:  # one channel is last as it is
            x = tape.Transpose(x, perm=_LAST)
        x = _shaped(tape, x, rows, how.columns // how.factor, how.factor * inputs)
        x = tape.Transpose(x, perm=_FIRST)
        pads = [how.top, how.before, how.bottom, how.after]
        made = self._with(tape, x, how.folded(self._stored), lambda part: np.tile(part, how.steps), pads, (1, 1))
        conv = next(node for node in tape.nodes if node.op_type == "Conv")
        conv.metadata_props[KEY] = str(how)
        made = _shaped(tape, tape.Transpose(made, perm=_LAST), 0, how.columns // how.stride, outputs)
        return tape.Transpose(made, perm=_FIRST)  # type: ignore[no-any-return]

    def unfolded(self, tape: Tape, how: Folding, result: tuple[int, ...]) -> ir.Value | None:
        """The inverse of ``folded``, whose result was brought to a shape; None where something changed it since."""
        x, shape = self._image_before(how), self._stored.shape
        if x is None or shape[0] % how.steps or shape[1] % how.factor or shape[3] != how.blocks:
            return None
        if result != (0, 0, how.columns // how.stride, shape[0] // how.steps):
            return None
        weight = how.unfolded(self._stored)
        of_outputs = (part for part in self._parts() if part.size > 1)
        alike = all(np.array_equal(np.tile(part[: len(weight)], how.steps), part) for part in of_outputs)
        if not alike or not np.array_equal(how.folded(weight), self._stored):
            return None
        pads, across = [how.top, how.left, how.bottom, how.right], (how.stride, how.dilation)
        return self._with(tape, x, weight, lambda part: part[: len(weight)], pads, across)

    @property
    def _stored(self) -> Array:
        return _array(self.weight.inputs[0])

    def _parts(self) -> Iterator[Array]:
        """What there is for each output channel, or once for all."""
        bias = three(self.conv)[2] if self.bias is None else self.bias.inputs[0]
        scales = [] if self.bias is None else [self.bias.inputs[1]]
        yield from (_array(value) for value in (self.weight.inputs[1], bias, *scales) if value is not None)

    def _image_before(self, how: Folding) -> ir.Value | None:
        """The image before its columns were folded."""
        channels = self._stored.shape[1]
        rows = how.rows if channels == how.factor else 0
        before, shape = _reshaped(_turned(self.image.inputs[0], _FIRST))
        if shape != (0, rows, how.columns // how.factor, channels):
            return None
        return before if rows else _turned(before, _LAST)

    def _with(
        self,
        tape: Tape,
        x: ir.Value | None,
        weight: Array,
        fit: Callable[[Array], Array],
        pads: Sequence[int],
        across: tuple[int, int],
    ) -> ir.Value:
        """The layer with another image and weight; ``fit`` makes what there is for each output channel as many, and
        ``across`` are stride and dilation of columns."""
        image = tape.DequantizeLinear(x, *self.image.inputs[1:], **attributes(self.image))
        inputs = [image, _decoded(tape, self.weight, weight, fit)]
        if self.bias is not None:
            inputs.append(_decoded(tape, self.bias, fit(_array(self.bias.inputs[0])), fit))
        elif (bias := three(self.conv)[2]) is not None:
            inputs.append(tape.constant(fit(_array(bias)), instead_of=bias))
        conv = self.conv
        down = (attribute(conv, "strides", (1, 1))[0], attribute(conv, "dilations", (1, 1))[0])
        made = tape.Conv(
            *inputs,
            name=conv.name,
            **attributes(conv, "auto_pad", "kernel_shape", "pads", "strides", "dilations"),
            kernel_shape=list(weight.shape[2:]),
            pads=list(pads),
            strides=[down[0], across[0]],
            dilations=[down[1], across[1]],
        )
        kept = {key: text for key, text in conv.metadata_props.items() if key != KEY}
        made.producer().metadata_props.update(kept)
        if (activation := self.activation) is not None:
            made = tape.op("", activation.op_type, made, *activation.inputs[1:], **attributes(activation))
        return tape.QuantizeLinear(made, *self.quantize.inputs[1:], **attributes(self.quantize))  # type: ignore[no-any-return]


def _decoded(tape: Tape, node: ir.Node, stored: Array, fit: Callable[[Array], Array]) -> ir.Value:
    """A constant of integers with the scales of that which ``node`` decodes."""
    parts: list[ir.Value | None] = [tape.constant(stored, instead_of=node.inputs[0])]
    for value in node.inputs[1:]:
        part = constant(value)
        parts.append(value if part is None or part.size == 1 else tape.constant(fit(part), instead_of=value))
    return tape.DequantizeLinear(*parts, **attributes(node))  # type: ignore[no-any-return]


def _shaped(tape: Tape, x: ir.Value, rows: int, columns: int, channels: int) -> ir.Value:
    """Images with channels last, in so many rows, columns and channels."""
    shape = np.array([0, rows, columns, channels], np.int64)
    return tape.Reshape(x, tape.constant(shape, f"{tape.root.name}_shape"))  # type: ignore[no-any-return]


def _maker(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that has one reader."""
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return value.producer() if value is not None and alone else None


def _turned(value: ir.Value | None, order: Sequence[int]) -> ir.Value | None:
    """What a Transpose gives in this order of axes as ``value``; None where nothing does."""
    node = None if value is None else value.producer()
    alike = node is not None and node.op_type == "Transpose" and list(attribute(node, "perm", ())) == list(order)
    return node.inputs[0] if node is not None and alike else None


def _reshaped(value: ir.Value | None) -> tuple[ir.Value | None, tuple[int, ...]]:
    """What a Reshape gives as ``value``, and the shape that it asks for."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Reshape":
        return None, ()
    return node.inputs[0], constant_ints(node.inputs[1]) or ()


def _is_number(value: ir.Value | None) -> bool:
    found = constant(value)
    return found is not None and found.size == 1


def _array(value: ir.Value | None) -> Array:
    found = constant(value)
    assert found is not None
    return found
