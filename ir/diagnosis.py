"""Why onnx_ir could not represent a model, in words."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import GraphProto, ModelProto, NodeProto

from .address import printable


def diagnosis(proto: ModelProto, error: BaseException) -> str:
    """Why onnx_ir could not represent the model, in words; walks the protobuf, so only after a failure."""
    waiting = [proto.graph]
    for function in proto.functions:
        where = f"function '{printable(function.name)}'"
        if found := _clash(function.input, function.node):
            return f": in {where} {found}"
        made = {*function.input, *(name for node in function.node for name in node.output)}
        for name in function.output:
            if name not in made:
                return f": nothing in {where} makes its output '{printable(name)}'"
        waiting += _inner(function.node)
    while waiting:
        graph = waiting.pop()
        given = [entry.name for entry in (*graph.input, *graph.initializer)]
        if found := _clash(given, graph.node):
            return f": in graph '{printable(graph.name)}' {found}"
        waiting += _inner(graph.node)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    return f" cannot be represented: {printable(reason)}"


def _clash(given: Iterable[str], nodes: Iterable[NodeProto]) -> str:
    makers = dict.fromkeys(given, "an input or initializer")
    for node in nodes:
        for name in filter(None, node.output):
            if name in makers:
                return f"two things make the value '{printable(name)}': {makers[name]} and {named(node)}"
            makers[name] = named(node)
    return ""


def _inner(nodes: Iterable[NodeProto]) -> list[GraphProto]:
    return [
        graph
        for node in nodes
        for attribute in node.attribute
        for graph in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ()))
    ]


def named(owner: NodeProto | str) -> str:
    """A node in words, by its name or its outputs; other words as they are."""
    if isinstance(owner, str):
        return owner
    return f"node '{printable(owner.name or ', '.join(owner.output))}' ({printable(owner.op_type)})"
