"""An onnx_ir model as a graphsurgeon graph, weights lent and not copied; ``surgeon.py`` tells why, and reads back."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.importers.onnx_importer import get_numpy_type
from onnx_graphsurgeon.util.misc import convert_from_onnx_attr_type

PLAIN = {
    ir.AttributeType.FLOAT,
    ir.AttributeType.INT,
    ir.AttributeType.STRING,
    ir.AttributeType.FLOATS,
    ir.AttributeType.INTS,
    ir.AttributeType.STRINGS,
}


class Lent(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """A tensor of the model, lent to graphsurgeon: read, as a copy, when a function asks for its values."""

    def __init__(self, held: ir.TensorProtocol) -> None:
        self.held = held
        self.shape = list(held.shape.numpy())
        self.dtype = lent_dtype(held.dtype)
        self.nbytes = held.nbytes

    @property
    def tensor(self) -> onnx.TensorProto:
        """A fresh protobuf with the data, for graphsurgeon's own exporter (constant folding runs it)."""
        if self.held.dtype == ir.DataType.STRING:
            return ir.serde.serialize_tensor(self.held)
        whole = ir.Tensor(self.held.numpy(), dtype=self.held.dtype, name=self.held.name)
        return ir.serde.serialize_tensor(whole)

    def load(self) -> np.ndarray[Any, Any]:
        array = np.array(self.held.numpy())
        if self.held.dtype == ir.DataType.STRING:
            return np.vectorize(bytes.decode, otypes=[object])(array) if array.size else array
        return array


def to_surgeon(model: ir.Model) -> gs.Graph:
    """``model`` as a ``gs.Graph``; weights are lent, nothing of the model is shared that graphsurgeon could edit.

    An initializer that is also a graph input (a default) is a ``Constant`` and no input, as in graphsurgeon's importer.
    An attribute that graphsurgeon has no type for is the ``onnx_ir.Attr`` itself.
    """
    functions = [_function_out(function) for function in model.functions.values()]
    return _graph_out(
        model.graph,
        {},
        _opsets_out(model.opset_imports),
        functions=functions,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        ir_version=model.ir_version,
    )


def _graph_out(graph: ir.Graph, tensors: dict[ir.Value, gs.Tensor], opsets: dict[str, Any], **words: Any) -> gs.Graph:
    """``tensors`` gathers what each value became, for the bodies inside to capture."""
    return gs.Graph(
        **_parts_out(graph, tensors, opsets),
        name=graph.name or "",
        doc_string=graph.doc_string or "",
        **opsets,
        **words,
    )


def _function_out(function: ir.Function) -> gs.Function:
    opsets = _opsets_out(function.opset_imports)
    return gs.Function(
        function.name,
        function.domain,
        attrs={a.name: None if a.value is None else lent_attribute(a) for a in function.attributes.values()},
        doc_string=function.doc_string or "",
        **_parts_out(function.graph, {}, opsets),
        **opsets,
    )


def _parts_out(graph: ir.Graph, tensors: dict[ir.Value, gs.Tensor], opsets: dict[str, Any]) -> dict[str, list[Any]]:
    outputs = (value for node in graph for value in node.outputs if value.name)
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        tensors[value] = lent_tensor(value)
    nodes = [
        gs.Node(
            node.op_type,
            node.name or "",
            {a.name: _attribute_out(a, tensors, opsets) for a in node.attributes.values()},
            [gs.Variable.empty() if value is None else tensors[value] for value in node.inputs],
            [tensors[value] if value.name else gs.Variable.empty() for value in node.outputs],
            node.domain or None,
        )
        for node in graph
    ]
    inputs = [tensors[value] for value in graph.inputs if value.name not in graph.initializers]
    return {"nodes": nodes, "inputs": inputs, "outputs": [tensors[value] for value in graph.outputs]}


def lent_tensor(value: ir.Value) -> gs.Tensor:
    if value.is_initializer() and value.const_value is not None:
        return gs.Constant(value.name, Lent(value.const_value))
    return gs.Variable(value.name, lent_dtype(value.dtype), lent_shape(value.shape), _kind_out(value.type))


def _attribute_out(attribute: ir.Attr, tensors: dict[ir.Value, gs.Tensor], opsets: dict[str, Any]) -> Any:
    if attribute.is_ref():
        return gs.Node.AttributeRef(attribute.ref_attr_name, convert_from_onnx_attr_type(attribute.type.value))
    if attribute.type == ir.AttributeType.GRAPH:
        return _graph_out(attribute.value, tensors, opsets)
    return lent_attribute(attribute)


def lent_attribute(attribute: ir.Attr) -> Any:
    """The attribute's value as graphsurgeon holds it; the attribute itself where graphsurgeon has no type for it."""
    if attribute.type == ir.AttributeType.TENSOR:
        return gs.Constant(attribute.value.name or "", Lent(attribute.value))
    if attribute.type not in PLAIN:
        return attribute
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _opsets_out(imports: dict[str, int]) -> dict[str, Any]:
    domains = [onnx.helper.make_opsetid(domain, version) for domain, version in imports.items()]
    return {"opset": imports.get(""), "import_domains": domains}


@cache
def lent_dtype(dtype: ir.DataType | None) -> Any:
    """A numpy dtype, or the ONNX number where graphsurgeon keeps that (bfloat16, float8)."""
    if dtype is None:
        return None
    numpy_dtype = get_numpy_type(int(dtype))
    return int(dtype) if numpy_dtype is None else numpy_dtype


def lent_shape(shape: ir.Shape | None) -> list[int | str | None] | None:
    return None if shape is None else [dim if isinstance(dim, int) else dim.value for dim in shape]


def _kind_out(kind: ir.TypeProtocol | None) -> str:
    if isinstance(kind, ir.SequenceType):
        return "sequence_type"
    if isinstance(kind, ir.OptionalType):
        return "optional_type"
    return "sparse_tensor_type" if isinstance(kind, ir.SparseTensorType) else "tensor_type"
