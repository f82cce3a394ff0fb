"""Classifiers whose probabilities come as a sequence of maps (ONNX-ML ZipMap, as skl2onnx writes it), as tensors."""

from __future__ import annotations

import onnx_ir as ir

from ...ir.address import printable
from ...ir.errors import UsageError
from ...ir.join import Member
from ...ir.shapes import dims

Labels = tuple[str | int, ...]

_KEYS = ("classlabels_strings", "classlabels_int64s")


def unzipped(member: Member) -> Member:
    """The member with the tensor [samples, classes] that a ZipMap reads in place of its maps; itself if it has none."""
    if not any(_is_zipmap(value) for value in member.model.graph.outputs):
        return member
    model = member.model.clone()
    model.meta.update(member.model.meta)
    outputs = model.graph.outputs
    for place, value in enumerate(list(outputs)):
        node = value.producer()
        if node is None or not _is_zipmap(value) or node.inputs[0] is None:
            continue
        tensor = node.inputs[0]
        if tensor.type is None:
            tensor.type = ir.TensorType(ir.DataType.FLOAT)
        if dims(tensor) is None:
            tensor.shape = ir.Shape([None, len(_labels(node) or ())])
        outputs[place] = tensor
        model.graph.remove(node, safe=True)
    return Member(member.name, model)


def class_labels(model: ir.Model) -> Labels | None:
    """What a classifier calls its classes, in the order of its scores; ``None`` where the model does not tell."""
    for node in model.graph:
        if node.domain == "ai.onnx.ml" and (found := _labels(node)):
            return found
    return None


def order(first: Labels, other: Labels, names: tuple[str, str]) -> tuple[int, ...] | None:
    """Where the classes of one model are among another's; ``None`` where the order is the same.

    Raises ``UsageError`` where one has classes that the other has not.
    """
    if first == other:
        return None
    if sorted(map(str, first)) != sorted(map(str, other)):
        lists = [", ".join(printable(str(label)) for label in labels[:8]) for labels in (first, other)]
        raise UsageError(
            f"ensemble: {names[0]} tells the classes {lists[0]} apart, and {names[1]} the classes {lists[1]}; they "
            "must be the same, in any order."
        )
    places = {str(label): place for place, label in enumerate(other)}
    return tuple(places[str(label)] for label in first)


def _is_zipmap(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.domain == "ai.onnx.ml" and node.op_type == "ZipMap"


def _labels(node: ir.Node) -> Labels | None:
    for key in _KEYS:
        attribute = node.attributes.get(key)
        if attribute is not None and attribute.value:
            return tuple(attribute.as_strings() if key == _KEYS[0] else attribute.as_ints())
    return None
