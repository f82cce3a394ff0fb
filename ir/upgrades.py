"""What changed in ONNX's operators from version to version, and how to say the same in the newer one.

Source: the schemas and texts of all versions up to ``NEWEST`` (onnx.defs, and Changelog.md of the ONNX project). A step
that is not in ``RULES`` only takes more types, more optional inputs, or attributes whose defaults say what was so
before. The rules never touch a model: they rewrite a ``Draft`` of a node, or refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from .draft import Draft, Operand, call, constant, refuse

NEWEST = 28
"""The newest version of the ONNX domain whose changes are known here."""

Rule: TypeAlias = Callable[[Draft], None]

_LOWEST = float(np.finfo(np.float32).min)


# Attributes that became inputs --------------------------------------------------------------------------------------


def _to_inputs(**places: int) -> Rule:
    def move(draft: Draft) -> None:
        for name, index in places.items():
            operand = draft.moved(name)
            if operand is not None:
                draft.set_input(index, operand)

    return move


def _axes(draft: Draft) -> None:
    """None listed means all axes, as none given does."""
    axes = draft.attributes.get("axes")
    if axes is not None and not axes.is_ref() and axes.value == ():
        del draft.attributes["axes"]
    _to_inputs(axes=1)(draft)


def _split(draft: Draft) -> None:
    """``num_outputs`` is needed since 18 where no sizes are given."""
    if draft.input(1) is None:
        draft.put(num_outputs=len(draft.node.outputs))


def _top_k(draft: Draft) -> None:
    """K is a list of one number."""
    if draft.attributes["k"].is_ref():
        draft.set_input(1, draft.unsqueeze(draft.moved("k"), [0]))
    else:
        draft.set_input(1, constant(np.asarray([draft.pop("k")], np.int64), "k"))


def _clip(draft: Draft) -> None:
    wide = draft.dtype(0) == ir.DataType.DOUBLE  # the old defaults are those of float32, the new ones of the type
    for index, (name, bound) in enumerate((("min", _LOWEST), ("max", -_LOWEST)), 1):
        if name not in draft.attributes and wide:
            draft.put(**{name: bound})
        draft.set_input(index, draft.like_data(draft.moved(name)))


def _pad(draft: Draft) -> None:
    draft.set_input(1, draft.moved("pads"))
    fill = draft.attributes.get("value")
    if fill is not None and (fill.is_ref() or fill.value):  # it is zero by default, of whatever type
        draft.set_input(2, draft.like_data(draft.moved("value")))
    draft.attributes.pop("value", None)


def _dft(draft: Draft) -> None:
    """The axis was 1 by default, and is -2 since 20."""
    draft.set_input(2, draft.moved("axis") or constant(np.asarray(1, np.int64), "axis"))


# Operators whose meaning changed ------------------------------------------------------------------------------------


def _softmax(draft: Draft) -> None:
    """Until 13 it ran over all axes from ``axis`` on, 1 by default; since 13 over that axis alone, -1 by default."""
    axis, sizes, data = draft.value("axis", 1), draft.dims(0), draft.inputs[0]
    behind = None if sizes is None else sizes[axis % max(len(sizes), 1) + 1 :]
    if axis == -1 or (behind is not None and (0 in behind or set(behind) <= {1})):
        draft.put(axis=axis)
        return
    # Before 14 Reshape cannot make an empty tensor again, should the sizes that are open turn out to be 0.
    flat = call(draft.op_type, call("Flatten", data, axis=axis), axis=-1)
    draft.become("Reshape", flat, call("Shape", data), allowzero=1 if draft.to >= 14 else None)


def _upsample(draft: Draft) -> None:
    """Upsample is Resize of version 10; its scales are at least 1."""
    draft.op_type = "Resize"
    if draft.to >= 11 and draft.value("mode", "nearest") == "nearest":
        draft.put(nearest_mode="floor")


def _resize(draft: Draft) -> None:
    """Version 10 had no choice: x / scale, and the nearest below where an axis grows, above where it shrinks."""
    data, scales = draft.inputs[:2]
    if draft.value("mode", "nearest") == "nearest" and "nearest_mode" not in draft.attributes:
        array = draft.array(1)
        if array is None:
            refuse("its scales are not constant, and nearest rounds up or down by them")
        if (array > 1).any() and (array < 1).any():
            grown = constant(np.maximum(array, 1), "scales")
            data = call("Resize", data, _roi(draft), grown, **_ASYMMETRIC, mode="nearest", nearest_mode="floor")
            scales = constant(np.minimum(array, 1), "scales")
        draft.put(nearest_mode="ceil" if (array < 1).any() else "floor")
    draft.inputs = [data, _roi(draft), scales]
    draft.put(**_ASYMMETRIC)


_ASYMMETRIC = {"coordinate_transformation_mode": "asymmetric"}


def _roi(draft: Draft) -> Operand:
    return None if draft.to >= 13 else constant(np.zeros(0, np.float32), "roi")


def _resize_tensorflow(draft: Draft) -> None:
    """``tf_half_pixel_for_nn`` went in 13. With floor it is half_pixel that rounds halves up."""
    if draft.value("coordinate_transformation_mode") != "tf_half_pixel_for_nn":
        return
    nearest = draft.value("nearest_mode", "round_prefer_floor")
    if draft.value("mode", "nearest") != "nearest" or nearest != "floor":
        refuse("its coordinate_transformation_mode 'tf_half_pixel_for_nn' is no more")
    draft.put(coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil")


def _group_normalization(draft: Draft) -> None:
    """Scale and bias were one number a group, and are one a channel since 21."""
    sizes, groups = draft.dims(0), draft.value("num_groups")
    channels = sizes[1] if sizes is not None and len(sizes) > 1 else None
    if channels == groups:
        return
    if isinstance(channels, int):
        repeats: Operand = constant(np.asarray([1, channels // groups], np.int64), "repeats")
    else:
        size = call("Shape", draft.inputs[0], start=1, end=2)
        each = call("Div", size, constant(np.asarray([groups], np.int64), "groups"))
        repeats = call("Concat", constant(np.asarray([1], np.int64), "one"), each, axis=0)
    column, row = (constant(np.asarray(shape, np.int64), word) for shape, word in (([-1, 1], "column"), ([-1], "row")))
    for index in (1, 2):
        found = draft.dims(index)
        if found is None or found[0] == groups or not isinstance(found[0], int):  # some wrote one a channel before
            spread = call("Expand", call("Reshape", draft.inputs[index], column), repeats)
            draft.inputs[index] = call("Reshape", spread, row)


def _grid_sample(draft: Draft) -> None:
    mode = draft.value("mode", "bilinear")
    draft.put(mode={"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _roi_align(draft: Draft) -> None:
    draft.put(coordinate_transformation_mode="output_half_pixel")


def _batch_normalization_spatial(draft: Draft) -> None:
    """Statistics for each element of a sample are written out; of rank 2 they are those of the channels."""
    if draft.pop("spatial", 1):
        return
    sizes = draft.dims(0)
    if sizes is not None and len(sizes) == 2:
        return
    if len(draft.node.outputs) > 1:
        refuse("it trains")
    data, scale, bias, mean, variance = draft.inputs
    epsilon = draft.like_data(constant(np.asarray(draft.value("epsilon", 1e-5), np.float32), "epsilon"))
    spread = call("Sqrt", call("Add", variance, epsilon))
    normal = call("Div", call("Sub", data, mean), spread)
    draft.become("Add", call("Mul", normal, scale), bias)


def _batch_normalization(draft: Draft) -> None:
    if any(value.name for value in draft.node.outputs[1:]):
        refuse("it has the outputs of training")


def _is_test(draft: Draft) -> None:
    if not draft.pop("is_test", 0):
        refuse("it trains, since is_test is not set")


def _dropout_mask(draft: Draft) -> None:
    if any(value.uses() or value.is_graph_output() for value in draft.node.outputs[1:]):
        refuse("its mask is used, whose type or content changed")
    for mask in draft.node.outputs[1:]:
        if mask.type is not None:
            draft.output_types[mask] = ir.TensorType(ir.DataType.BOOL)


def _dropout(draft: Draft) -> None:
    _dropout_mask(draft)
    draft.set_input(1, draft.moved("ratio"))


def _scatter(draft: Draft) -> None:
    draft.op_type = "ScatterElements"


def _scan(draft: Draft) -> None:
    del draft
    refuse("it runs over batches, of sequences with lengths of their own")


# The first years: opsets 1 to 7 -------------------------------------------------------------------------------------


def _forget(*names: str) -> Rule:
    def drop(draft: Draft) -> None:
        for name in names:
            draft.attributes.pop(name, None)

    return drop


def _broadcast(draft: Draft) -> None:
    """The second operand began at ``axis`` of the first; since 7 the last axes of both meet."""
    wanted, axis = draft.pop("broadcast", 0), draft.pop("axis")
    if not wanted or axis is None:
        return
    left, right = draft.dims(0), draft.dims(1)
    if left is None or right is None:
        refuse("the ranks of its operands are not known")
    behind = len(left) - axis % len(left) - len(right)
    if behind > 0 and right:
        draft.inputs[1] = draft.unsqueeze(draft.inputs[1], range(len(right), len(right) + behind))


def _prelu(draft: Draft) -> None:
    """One slope a channel, until 7 whatever the rank of the data."""
    sizes, slopes = draft.dims(0), draft.dims(1)
    if slopes is None or sizes is None:
        refuse("the ranks of its operands are not known")
    if len(slopes) == 1 and slopes != (1,) and len(sizes) > 2:
        draft.inputs[1] = draft.unsqueeze(draft.inputs[1], range(1, len(sizes) - 1))


def _whole_p(draft: Draft) -> None:
    power = draft.pop("p", 2.0)
    if not math.isfinite(power) or power != int(power):
        refuse(f"its p is {power:g}, and must be whole since 2")
    draft.put(p=int(power))


def _reshape(draft: Draft) -> None:
    _forget("consumed_inputs")(draft)
    draft.set_input(1, draft.moved("shape") or refuse("its shape is not given"))


def _selu(draft: Draft) -> None:
    _forget("consumed_inputs")(draft)
    draft.put(alpha=draft.value("alpha", 1.6732), gamma=draft.value("gamma", 1.0507))


def _cast(draft: Draft) -> None:
    name = str(draft.pop("to")).upper()
    if name not in ir.DataType.__members__:
        refuse(f"there is no element type {name}")
    draft.put(to=int(ir.DataType[name]))


def _concat(draft: Draft) -> None:
    draft.put(axis=draft.value("axis", 1))


def _old_pad(draft: Draft) -> None:
    draft.put(pads=draft.pop("paddings"))


def _old_split(draft: Draft) -> None:
    if "axis" not in draft.attributes:
        refuse("its axis is not given")
    sizes = draft.array(1)
    if sizes is None and draft.input(1) is not None:
        refuse("the sizes of its parts are computed")
    draft.put(split=None if sizes is None else tuple(map(int, sizes.ravel())))
    draft.inputs = draft.inputs[:1]


def _tile(draft: Draft) -> None:
    sizes, tiles, axis = draft.dims(0), draft.array(1), draft.array(2)
    if sizes is None or tiles is None or axis is None:
        refuse("its rank, tiles or axis are not known")
    repeats = np.ones(len(sizes), np.int64)
    repeats[int(axis.item())] = int(tiles.item())
    draft.inputs = [draft.inputs[0], constant(repeats, "repeats")]


def _old_upsample(draft: Draft) -> None:
    draft.put(scales=(1.0, 1.0, draft.pop("height_scale"), draft.pop("width_scale")))
    if draft.value("mode", "nearest") == "bilinear":
        draft.put(mode="linear")


_IN_PLACE = (
    "Abs Add Ceil Clip Div Elu Exp Floor HardSigmoid InstanceNormalization LeakyRelu Log Max Mean Min Mul Neg PRelu "
    "Reciprocal Relu Sigmoid Sqrt Sub Sum Tanh BatchNormalization Dropout"
)
_LIMITED = "Add Sub Mul Div Pow And Or Xor Equal Greater Less"
_REDUCE = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"

RULES: dict[tuple[str, int], Rule] = {
    **{(name, 6): _forget("consumed_inputs") for name in _IN_PLACE.split()},
    **{(name, 7): _broadcast for name in _LIMITED.split()},
    **{(name, 7): _forget("output_sequence") for name in ("RNN", "GRU", "LSTM")},
    **{(name, 13): _softmax for name in ("Softmax", "LogSoftmax", "Hardmax")},
    **{(name, 13): _axes for name in ("Squeeze", "ReduceSum")},
    **{(name, 18): _axes for name in _REDUCE.split()},
    ("BatchNormalization", 7): _is_test,
    ("BatchNormalization", 9): _batch_normalization_spatial,
    ("BatchNormalization", 14): _batch_normalization,
    ("Cast", 6): _cast,
    ("Clip", 11): _clip,
    ("Concat", 4): _concat,
    ("DFT", 20): _dft,
    ("Dropout", 7): _is_test,
    ("Dropout", 10): _dropout_mask,
    ("Dropout", 12): _dropout,
    ("Gemm", 7): _forget("broadcast"),
    ("GlobalLpPool", 2): _whole_p,
    ("GridSample", 20): _grid_sample,
    ("GroupNormalization", 21): _group_normalization,
    ("LpPool", 2): _whole_p,
    ("PRelu", 7): _prelu,
    ("Pad", 2): _old_pad,
    ("Pad", 11): _pad,
    ("Reshape", 5): _reshape,
    ("Resize", 11): _resize,
    ("Resize", 13): _resize_tensorflow,
    ("RoiAlign", 16): _roi_align,
    ("Scan", 9): _scan,
    ("Scatter", 11): _scatter,
    ("Selu", 6): _selu,
    ("Slice", 10): _to_inputs(starts=1, ends=2, axes=3),
    ("Split", 2): _old_split,
    ("Split", 13): _to_inputs(split=1),
    ("Split", 18): _split,
    ("Tile", 6): _tile,
    ("TopK", 10): _top_k,
    ("Unsqueeze", 13): _to_inputs(axes=1),
    ("Upsample", 7): _old_upsample,
    ("Upsample", 9): _to_inputs(scales=1),
    ("Upsample", 10): _upsample,
}
"""How the operators that changed their meaning or form say the same from that version on."""
