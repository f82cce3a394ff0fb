"""Which IR version a model's contents need, by the history in onnx.proto."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .address import function_prefix, graphs, printable
from .maps import MapType
from .sparse import SparseTensor
from .tensors import held

RUNNABLE = 13
"""The newest IR version that ONNX Runtime 1.31 takes; newer onnx packages stamp more by default."""

_KINDS = {
    ir.DataType.BFLOAT16: 4,
    ir.DataType.FLOAT8E4M3FN: 9,
    ir.DataType.FLOAT8E4M3FNUZ: 9,
    ir.DataType.FLOAT8E5M2: 9,
    ir.DataType.FLOAT8E5M2FNUZ: 9,
    ir.DataType.UINT4: 10,
    ir.DataType.INT4: 10,
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.UINT2: 13,
    ir.DataType.INT2: 13,
    ir.DataType.FLOAT6E2M3: 14,
    ir.DataType.FLOAT6E3M2: 14,
}


def saved_ir_version(model: ir.Model) -> int:
    """The version to write: the model's own, lowered to 13 where nothing in the model needs more (so that ONNX Runtime
    takes it), raised to what the contents need where a pass brought something newer."""
    return max(needed_ir_version(model), min(model.ir_version, RUNNABLE))


@dataclass(frozen=True, slots=True)
class Need:
    """An IR version, and what in a model needs it, as a clause: ``initializer 'w' is int4``."""

    version: int
    reason: str


def needed_ir_version(model: ir.Model) -> int:
    """The lowest IR version, from 3, whose readers understand all that is in the model.

    3: operator sets; 4: initializers that are not inputs, bfloat16; 6: sparse constants; 8: functions, optional and
    sparse types;
    9: defaults of function attributes, float8; 10: int4, overloads; 11: float4, device configurations; 12: float8e8m0;
    13: int2; 14: float6. Metadata and quantization annotations count for nothing: older readers skip them.
    """
    return greatest_need(model).version


def greatest_need(model: ir.Model) -> Need:
    """The lowest IR version that ``model`` can have, and the first thing in it that needs that."""
    found = max(_needs(model), key=lambda need: need[0], default=None)
    if found is None:
        return Need(3, "operators have versions")
    version, prefix, thing, words = found
    if thing is None:
        return Need(version, words)
    name = printable(prefix + (thing.name or (thing.op_type if isinstance(thing, ir.Node) else "")))
    if isinstance(thing, ir.Node):
        return Need(version, f"node '{name}' {words}")
    return Need(version, f"{'initializer' if thing.is_initializer() else 'value'} '{name}' {words}")


_Found = tuple[int, str, ir.Value | ir.Node | None, str]  # version, prefix of the graph, what is in it, words
_Kinds = dict[ir.DataType, tuple[str, ir.Value | ir.Node, str]]  # element types, and where each is first met
_TYPES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")  # attributes that number an element type
_NUMBERS = frozenset(int(kind) for kind in _KINDS)


def _needs(model: ir.Model) -> Iterator[_Found]:
    if model.device_configurations:
        yield 11, "", None, "the model has device configurations"
    for function in model.functions.values():
        yield from _function_needs(function)
    kinds: _Kinds = {}
    for prefix, graph in graphs(model):
        own = next((value for value in graph.initializers.values() if not value.is_graph_input()), None)
        if own is not None:
            yield 4, prefix, own, "is no input"
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            if node.op_type == "Optional" and not node.domain:
                yield 8, prefix, node, "makes an optional"
            if node.overload:
                yield 10, prefix, node, "calls an overload"
            if node.device_configurations:
                yield 11, prefix, node, "has device configurations"
            values += node.outputs
            if node.attributes.data:
                for _, tensor in held(graph, node):
                    kinds.setdefault(tensor.dtype, (prefix, node, "holds"))
                    if isinstance(tensor, SparseTensor):
                        yield 6, prefix, node, "holds a sparse tensor"
                yield from _named(node, prefix, kinds)
        for value in graph.initializers.values():
            if isinstance(value.const_value, SparseTensor):
                yield 6, prefix, value, "is sparse"
        for value in values:
            form = value.type
            if type(form) is ir.TensorType:  # isinstance would go through a protocol, member by member
                if form.dtype not in kinds:
                    kinds[form.dtype] = prefix, value, "is"
            elif form is not None:
                yield from _nested(form, prefix, value, "is", kinds)
    for kind, (prefix, thing, verb) in kinds.items():
        if kind in _KINDS:
            yield _KINDS[kind], prefix, thing, f"{verb} {kind.name.lower()}"


def _function_needs(function: ir.Function) -> Iterator[_Found]:
    name = printable(function_prefix(function).removesuffix("/"))
    yield 8, "", None, f"there is the function {name}"
    if function.overload:
        yield 10, "", None, f"the function {name} is an overload"
    if any(attribute.value is not None for attribute in function.attributes.values()):
        yield 9, "", None, f"an attribute of the function {name} has a default"


def _named(node: ir.Node, prefix: str, kinds: _Kinds) -> Iterator[_Found]:
    """What the types need that a node names: Cast's ``to``, the ``type`` of an Optional."""
    for name, attribute in node.attributes.data.items():
        if attribute.is_ref():
            continue
        if name in _TYPES and attribute.type == ir.AttributeType.INT and attribute.value in _NUMBERS:
            kinds.setdefault(ir.DataType(attribute.value), (prefix, node, "names"))
        elif attribute.type == ir.AttributeType.TYPE_PROTO:
            yield from _nested(attribute.value.type, prefix, node, "names", kinds)
        elif attribute.type == ir.AttributeType.TYPE_PROTOS:
            for form in attribute.value:
                yield from _nested(form.type, prefix, node, "names", kinds)


def _nested(
    form: ir.TypeProtocol | None, prefix: str, thing: ir.Value | ir.Node, verb: str, kinds: _Kinds
) -> Iterator[_Found]:
    """What a type that is no plain tensor needs; the element types it ends in go to ``kinds``."""
    while form is not None:
        if isinstance(form, ir.OptionalType | ir.SparseTensorType):
            word = "optional" if isinstance(form, ir.OptionalType) else "a sparse tensor"
            yield 8, prefix, thing, f"{verb} {word}"
        if not isinstance(form, ir.SequenceType | ir.OptionalType | MapType):
            kinds.setdefault(form.dtype, (prefix, thing, verb))
            return
        form = form.elem_type
