"""To and from onnx-graphsurgeon, so that a function written for it edits a model held here.

graphsurgeon's own importer and exporter lose metadata, types of sequences and optionals, inputs with defaults, and
everything but float32 among the rarer dtypes. So its objects are built from the IR and read back into it directly.
Weights are lent, not copied: a ``Constant`` holds a ``Lent`` tensor, read only when a function asks for its values,
and an untouched one comes back as the very tensor that went. What graphsurgeon has no word for (metadata, doc
strings, denotations) is restored by name from the model that went.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.util.misc import convert_to_onnx_attr_type

from .address import addresses, graphs
from .edit import become
from .errors import UsageError
from .lend import PLAIN, Lent, lent_attribute, lent_dtype, lent_shape, lent_tensor, to_surgeon
from .verify import verify

__all__ = ["from_surgeon", "round_trips", "surgeon_step", "to_surgeon"]

_Thing = TypeVar("_Thing", ir.Node, ir.Value, ir.Graph, ir.Model)


def surgeon_step(function: Callable[[Any], Any], model: ir.Model) -> None:
    """Applies ``function``, which takes a ``gs.Graph`` and edits it or returns another, to ``model`` in place.

    Nodes left out of order are sorted. On an error the model is as it was.

    Raises:
        UsageError: the function raises, returns something else, or graphsurgeon cannot carry the model.
        InvalidModel: what the function made breaks an invariant.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if lost := round_trips(model):
        raise UsageError(f"graphsurgeon function '{name}' was not run: {lost}")
    graph = to_surgeon(model)
    try:
        result = function(graph)
    except Exception as error:
        raise UsageError(
            f"graphsurgeon function '{name}' raised {type(error).__name__}: {error}."
            " The model is as it was; mend the function."
        ) from error
    result = graph if result is None else result
    if not isinstance(result, gs.Graph):
        raise UsageError(
            f"graphsurgeon function '{name}' returned {type(result).__name__};"
            " return an onnx_graphsurgeon Graph, or None after editing the one given."
        )
    try:
        edited = from_surgeon(result, model)
        for scope in (edited.graph, *(f.graph for f in edited.functions.values())):
            scope.sort()
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"graphsurgeon function '{name}' made a graph that is no ONNX model: {error}.") from error
    verify(edited, f"what graphsurgeon function '{name}' made")
    become(model, edited)


def round_trips(model: ir.Model) -> str | None:
    """None where ``from_surgeon(to_surgeon(model), model)`` is the same model; else a sentence naming the first loss.

    Tensors are compared by identity, so weights are not read.
    """
    names = [(function.domain, function.name) for function in model.functions.values()]
    for domain, name in names:
        if names.count((domain, name)) > 1:
            return f"function '{domain}::{name}' has overloads, which graphsurgeon cannot tell apart; inline them."
    for prefix, graph in graphs(model):
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPHS:
                    return (
                        f"attribute '{attribute.name}' of node '{prefix}{node.name}' is a list of graphs,"
                        " which graphsurgeon cannot hold."
                    )
    after = from_surgeon(to_surgeon(model), model)
    nothing: tuple[str, dict[str, Any]] = ("nothing", {})
    for was, now in zip_longest(_facts(model), _facts(after), fillvalue=nothing):
        if was[0] != now[0]:
            return f"graphsurgeon cannot carry {was[0]}: {now[0]} comes back in its place."
        for word, value in was[1].items():
            if value != now[1][word]:
                return f"graphsurgeon cannot carry the {word} of {was[0]}: {value!r} comes back as {now[1][word]!r}."
    return None


def _facts(model: ir.Model) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything of a model that a file keeps: place, then each property by its name. Tensors stand for themselves."""
    where = addresses(model)
    yield (
        "the model",
        {
            "IR version": model.ir_version,
            "producer": (model.producer_name, model.producer_version),
            "version": (model.domain, model.model_version),
            "functions": [*model.functions],
            "function attributes": [[*f.attributes.items()] for f in model.functions.values()],
            **_notes(model),
        },
    )
    for prefix, graph in graphs(model):
        known = {
            "name": graph.name,
            "opset imports": graph.opset_imports,
            "inputs": [value.name for value in graph.inputs],
            "initializers": [*graph.initializers],
            "outputs": [value.name for value in graph.outputs],
        }
        yield f"graph '{prefix}'" if prefix else "the main graph", {**known, **_notes(graph)}
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values += node.outputs
            properties: dict[str, Any] = {
                "operator": (node.domain, node.op_type, node.overload, node.version),
                "inputs": [value and where.get(value, value.name) for value in node.inputs],
                "outputs": [value.name for value in node.outputs],
                "attributes": [
                    (a.name, a.type, a.ref_attr_name, a.doc_string, None if _is_body(a) else a.value)
                    for a in node.attributes.values()
                ],
                "device configurations": node.device_configurations,
            }
            yield f"node '{where[node]}'", {**properties, **_notes(node)}
        for value in values:
            yield (
                f"value '{where[value]}'",
                {"type": value.type, "shape": value.shape, "data": value.const_value, **_notes(value)},
            )


def _notes(thing: ir.Node | ir.Value | ir.Graph | ir.Model) -> dict[str, Any]:
    return {"doc string": thing.doc_string, "metadata": thing.metadata_props, "meta": dict(thing.meta)}


def _is_body(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref()


def from_surgeon(graph: gs.Graph, like: ir.Model) -> ir.Model:
    """``graph`` as a model; what graphsurgeon does not hold is taken by name from ``like``, which it was made from.

    Names tie tensors, as in graphsurgeon: two objects of one name are one value. Opset imports are those of ``like``,
    as changed in ``graph``; a new domain enters as version 1. The result is not verified.

    Raises:
        ValueError, TypeError: an attribute, a dtype or a graph has no ONNX form.
    """
    known = {(f.domain, f.name): f for f in like.functions.values()}
    functions = [_function_in(f, known.get((f.domain, f.name))) for f in graph.functions]
    main = _Reader(graph, like.graph, ChainMap()).read()
    main.opset_imports.update(_opsets_in(graph, like.opset_imports))
    model = ir.Model(
        main,
        ir_version=like.ir_version if graph.ir_version is None else graph.ir_version,
        producer_name=like.producer_name,
        producer_version=like.producer_version,
        domain=like.domain,
        model_version=like.model_version,
        functions=functions,
        device_configurations=like.device_configurations,
    )
    return _remember(model, like)


def _function_in(function: gs.Function, like: ir.Function | None) -> ir.Function:
    old = like.attributes if like else {}
    attributes = [
        ir.Attr(name, ir.AttributeType.UNDEFINED, None) if value is None else _attribute_in(name, value, old.get(name))
        for name, value in function.attrs.items()
    ]
    graph = _Reader(function, like.graph if like else None, ChainMap(), constants_as_nodes=True).read()
    graph.opset_imports.update(_opsets_in(function, like.opset_imports if like else {}))
    overload = like.overload if like else ""
    return ir.Function(function.domain or "", function.name, overload, graph=graph, attributes=attributes)


class _Reader:
    """Reads one graph back. ``scope`` maps the names in sight to values; ``like`` is what the graph was, if it was."""

    def __init__(
        self,
        graph: gs.Graph,
        like: ir.Graph | None,
        outer: ChainMap[str, ir.Value],
        constants_as_nodes: bool = False,
    ) -> None:
        self.graph, self.outer, self.scope = graph, outer, outer.new_child()
        self.constants_as_nodes = constants_as_nodes  # a function has no initializers
        self.like = ir.Graph([], [], nodes=[]) if like is None else like
        self.values = {v.name: v for v in (*self.like.inputs, *self.like.initializers.values())}
        self.nodes: dict[str | None, ir.Node] = {}
        for node in self.like:
            self.values.update({value.name: value for value in node.outputs})
            self.nodes.update({value.name: node for value in node.outputs if value.name})

    def read(self) -> ir.Graph:
        inputs = [self.define(tensor) for tensor in self.graph.inputs]
        constants = self.constants()
        produced = [[self.define(tensor) for tensor in node.outputs] for node in self.graph.nodes]
        initializers = self.initializers(constants)
        nodes = [self.node(node, outputs) for node, outputs in zip(self.graph.nodes, produced, strict=True)]
        if self.constants_as_nodes:
            nodes = [_constant_node(value) for value in initializers] + nodes
            initializers = []
        defaults = {*initializers} - {*inputs}
        for place, value in enumerate(self.like.inputs):
            default = self.scope.get(value.name or "")
            if value.name in self.like.initializers and default in defaults:
                inputs.insert(min(place, len(inputs)), default)
        graph = ir.Graph(
            inputs,
            self.outputs(),
            nodes=nodes,
            initializers=initializers,
            doc_string=self.graph.doc_string or None,
            opset_imports=dict(self.like.opset_imports),
            name=self.like.name if self.constants_as_nodes else self.graph.name or self.like.name,
        )
        return _remember(graph, self.like)

    def define(self, tensor: gs.Tensor) -> ir.Value:
        """A new value for a tensor that this graph defines, with all that is known of the old one of its name."""
        value = ir.Value(name=tensor.name)
        if not tensor.name:
            return value
        old = self.values.get(tensor.name)
        if isinstance(tensor, gs.Constant):
            was = old.const_value if old is not None and old.is_initializer() else None
            value.const_value = _tensor_in(tensor, was)
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(value.const_value.shape.numpy())
            same = old is not None and old.dtype == value.dtype
        else:
            value.type, value.shape = _type_in(tensor), _shape_in(tensor)
            shown = None if old is None else (lent_dtype(old.dtype), lent_shape(old.shape))
            same = shown == (tensor.dtype, None if tensor.shape is None else list(tensor.shape))
        if old is not None:
            if same and (value.const_value is None or old.shape == value.shape):
                value.type, value.shape = old.type, old.shape and old.shape.copy()
            _remember(value, old)
        self.scope[tensor.name] = value
        return value

    def constants(self) -> dict[str, gs.Constant]:
        """The constants that live in this graph: its own, and those that only its bodies read but ``like`` has here."""
        found = {name: t for name, t in _constants(self.graph) if name not in self.outer}
        for body in self.graph.subgraphs(recursive=True):
            for name, tensor in _constants(body):
                if name in self.like.initializers and name not in self.outer:
                    found.setdefault(name, tensor)
        return found

    def initializers(self, constants: dict[str, gs.Constant]) -> list[ir.Value]:
        """In the order of ``like``, then of appearance. One that nothing ever read was not shown, so it stays."""
        found = []
        for name, old in self.like.initializers.items():
            if name in constants:
                found.append(self.initializer(constants.pop(name)))
            elif name not in self.scope and not old.uses() and not old.is_graph_output():
                found.append(self.define(lent_tensor(old)))
        return found + [self.initializer(tensor) for tensor in constants.values()]

    def initializer(self, tensor: gs.Constant) -> ir.Value:
        value = self.scope.maps[0].get(tensor.name)
        return self.define(tensor) if value is None or value.const_value is None else value

    def node(self, node: gs.Node, outputs: list[ir.Value]) -> ir.Node:
        old = next((self.nodes[value.name] for value in outputs if value.name in self.nodes), None)
        attributes = []
        for name, value in node.attrs.items():
            was = old.attributes.get(name) if old else None
            if isinstance(value, gs.Graph):
                like = was.value if was and was.type == ir.AttributeType.GRAPH else None
                attributes.append(ir.AttrGraph(name, _Reader(value, like, self.scope).read()))
            else:
                attributes.append(_attribute_in(name, value, was))
        new = ir.Node(
            node.domain or "",
            node.op,
            [self.use(tensor) for tensor in node.inputs],
            attributes,
            outputs=outputs,
            name=node.name or (old.name if old else outputs[0].name if outputs else None),
        )
        if old is None:
            return new
        new.version, new.device_configurations = old.version, old.device_configurations
        if new.op_type == old.op_type:
            new.overload = old.overload
        return _remember(new, old)

    def use(self, tensor: gs.Tensor) -> ir.Value | None:
        """The value of this name; where nothing defines it a stray one, for the verifier to report."""
        if not tensor.name:
            return None
        if tensor.name not in self.scope:
            self.scope[tensor.name] = ir.Value(name=tensor.name)
        return self.scope[tensor.name]

    def outputs(self) -> list[ir.Value]:
        found = []
        for tensor in self.graph.outputs:
            value = self.use(tensor)
            if value is None:
                raise ValueError("a graph output has no name")
            if value.type is None and isinstance(tensor, gs.Variable):
                value.type, value.shape = _type_in(tensor), _shape_in(tensor)
            found.append(value)
        return found


def _constants(graph: gs.Graph) -> Iterator[tuple[str, gs.Constant]]:
    ties: Iterable[gs.Tensor] = (t for node in graph.nodes for t in (*node.inputs, *node.outputs))
    for tensor in (*graph.inputs, *ties, *graph.outputs):
        if isinstance(tensor, gs.Constant) and tensor.name:
            yield tensor.name, tensor


def _constant_node(value: ir.Value) -> ir.Node:
    tensor, value.const_value = value.const_value, None
    assert tensor is not None
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value])


def _attribute_in(name: str, value: Any, old: ir.Attr | None) -> ir.Attr:
    """The old attribute where its value is unchanged; its type decides between integers and floats, and for ``[]``."""
    if isinstance(value, ir.Attr):
        return value if value.name == name else ir.Attr(name, value.type, value.value)
    if isinstance(value, gs.Node.AttributeRef):
        if old is not None and old.is_ref() and old.ref_attr_name == value.name:
            return old
        return ir.RefAttr(name, value.name, ir.AttributeType(convert_to_onnx_attr_type(value.type)))
    if isinstance(value, gs.Tensor):
        was = old.value if old is not None and old.type == ir.AttributeType.TENSOR else None
        tensor = _tensor_in(value, was)
        return old if old is not None and tensor is was else ir.AttrTensor(name, tensor)
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, type | np.dtype):
        value = int(_dtype_in(value))
    if isinstance(value, list | tuple):
        value = list(value)
    kind = old.type if old is not None and old.type in PLAIN else None
    if old is not None and kind is not None and not old.is_ref() and lent_attribute(old) == value:
        return old
    if kind == ir.AttributeType.FLOAT and isinstance(value, int):
        value = float(value)
    if kind == ir.AttributeType.FLOATS and isinstance(value, list) and all(isinstance(v, int) for v in value):
        value = [float(v) for v in value]
    if value == []:
        return ir.Attr(name, kind or ir.AttributeType.INTS, ())
    return ir.convenience.convert_attribute(name, value)


def _tensor_in(constant: gs.Tensor, old: ir.TensorProtocol | None) -> ir.TensorProtocol:
    """The lent tensor itself if it was not read, or read and not changed; else a new one of the array."""
    if not isinstance(constant, gs.Constant):
        raise TypeError(f"'{constant.name}' must be a Constant where an attribute is a tensor")
    values = constant._values
    if isinstance(values, Lent):
        return values.held
    if isinstance(values, gs.ir.tensor.SparseValues):
        raise TypeError(f"constant '{constant.name}' is sparse, which onnx_ir cannot hold; make it dense")
    if isinstance(values, gs.ir.tensor.LazyValues):
        return ir.serde.deserialize_tensor(values.tensor)
    array = np.asarray(values)
    dtype = _dtype_in(array.dtype)
    if constant.export_dtype is not None and (target := _dtype_in(constant.export_dtype)) != dtype:
        array, dtype = array.astype(target.numpy()), target
    if dtype == ir.DataType.STRING:
        strings = [s.encode() if isinstance(s, str) else bytes(s) for s in array.ravel().tolist()]
        return ir.StringTensor(strings, shape=ir.Shape(array.shape), name=constant.name)
    if old is not None and old.dtype == dtype and old.shape == array.shape and _same_bits(old.numpy(), array):
        return old
    return ir.Tensor(array, dtype=dtype, name=constant.name)


def _same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _type_in(tensor: gs.Tensor) -> ir.TypeProtocol | None:
    if tensor.dtype is None:
        return None
    dtype = _dtype_in(tensor.dtype)
    if tensor.type == "sequence_type":
        return ir.SequenceType(ir.TensorType(dtype))
    if tensor.type == "optional_type":
        return ir.OptionalType(ir.TensorType(dtype))
    return ir.SparseTensorType(dtype) if tensor.type == "sparse_tensor_type" else ir.TensorType(dtype)


def _dtype_in(dtype: Any) -> ir.DataType:
    return ir.DataType(dtype) if isinstance(dtype, int) else ir.DataType.from_numpy(np.dtype(dtype))


def _shape_in(tensor: gs.Tensor) -> ir.Shape | None:
    """Negative dimensions are graphsurgeon's way to say unknown."""
    if tensor.shape is None:
        return None
    return ir.Shape([d if isinstance(d, str) or d is None else int(d) if d >= 0 else None for d in tensor.shape])


def _opsets_in(graph: gs.Graph, old: dict[str, int]) -> dict[str, int]:
    imports = dict(old)
    imports.update({entry.domain: entry.version for entry in graph.import_domains or ()})
    if graph.opset is not None and "" in imports and graph.opset != old.get("", graph.opset):
        imports[""] = graph.opset
    nodes = [n for g in (graph, *graph.subgraphs(recursive=True)) for n in g.nodes]
    for node in nodes:
        imports.setdefault(node.domain or "", 1 if node.domain else graph.opset)
    return imports


def _remember(new: _Thing, old: _Thing) -> _Thing:
    """What graphsurgeon does not hold."""
    if new.doc_string is None:
        new.doc_string = old.doc_string
    if old.metadata_props:
        new.metadata_props.update(old.metadata_props)
    if old.meta:
        new.meta.update(old.meta)
    return new
