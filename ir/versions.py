"""Which IR version a model's contents need, by the history in onnx.proto."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .address import graphs
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


def needed_ir_version(model: ir.Model) -> int:
    """The lowest IR version, from 3, whose readers understand all that is in the model.

    3: operator sets; 4: initializers that are not inputs, bfloat16; 8: functions, optional and sparse types;
    9: defaults of function attributes, float8; 10: int4, overloads; 11: float4, device configurations; 12: float8e8m0;
    13: int2; 14: float6. Metadata and quantization annotations count for nothing: older readers skip them.
    """
    return max([3, *_needs(model)])


def _needs(model: ir.Model) -> Iterator[int]:
    if model.device_configurations:
        yield 11
    for function in model.functions.values():
        yield 8
        if function.overload:
            yield 10
        if any(attribute.value is not None for attribute in function.attributes.values()):
            yield 9
    kinds: set[ir.DataType] = set()
    for _, graph in graphs(model):
        if any(not value.is_graph_input() for value in graph.initializers.values()):
            yield 4
        types = [value.type for value in (*graph.inputs, *graph.initializers.values())]
        for node in graph:
            if node.overload:
                yield 10
            if node.device_configurations:
                yield 11
            types += [value.type for value in node.outputs]
            if node.attributes.data:
                kinds.update(tensor.dtype for _, tensor in held(graph, node))
        for form in types:
            if type(form) is ir.TensorType:  # isinstance would go through a protocol, member by member
                kinds.add(form.dtype)
            elif form is not None:
                yield from _nested(form, kinds)
    yield from (_KINDS.get(kind, 3) for kind in kinds)


def _nested(form: ir.TypeProtocol | None, kinds: set[ir.DataType]) -> Iterator[int]:
    """What a type that is no plain tensor needs; the element types it ends in go to ``kinds``."""
    while form is not None:
        if isinstance(form, ir.OptionalType | ir.SparseTensorType):
            yield 8
        if not isinstance(form, ir.SequenceType | ir.OptionalType):
            kinds.add(form.dtype)
            return
        form = form.elem_type
