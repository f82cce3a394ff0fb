"""Where a thing is in a model, in words: ``value``, ``node/then/value`` in a body, ``domain::Function/value``.

A body's part is the name of the node that holds it and the name of its attribute without ``_branch``; a body in a
list of bodies (attribute type GRAPHS) also has its place in the list, ``node/branches.0/``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import onnx_ir as ir

from .errors import BadFile


def graphs(model: ir.Model) -> Iterator[tuple[str, ir.Graph]]:
    """Every graph with its prefix: the main graph (``""``), its bodies in node order, depth first, then functions.

    Each graph comes before the bodies in it, and once. Of two bodies with the same words (nodes may share a name)
    the later one is ``node#2/then/``. The walk keeps its own stack, so only memory bounds the depth of nesting.
    """
    taken: dict[str, int] = {}
    yield from _nested("", model.graph, taken)
    for function in model.functions.values():
        yield from _nested(function_prefix(function), function.graph, taken)


def function_prefix(function: ir.Function) -> str:
    """``domain::Function/``, or ``domain::Function:overload/``."""
    overload = f":{function.overload}" if function.overload else ""
    return f"{function.domain}::{function.name}{overload}/"


def bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The graphs that a node holds, in attribute order, with their words: ``then``, ``else``, ``branches.0``."""
    for attribute in node.attributes.data.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.name.removesuffix("_branch"), attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            word = attribute.name.removesuffix("_branch")
            yield from ((f"{word}.{place}", graph) for place, graph in enumerate(attribute.value))


def addresses(model: ir.Model) -> dict[ir.Value | ir.Node, str]:
    """The address of every node and of every value that a graph defines: inputs, initializers, outputs of nodes."""
    found: dict[ir.Value | ir.Node, str] = {}
    for prefix, graph in graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            found[value] = prefix + (value.name or "")
        for node in graph:
            found[node] = prefix + (node.name or node.op_type)
            for value in node.outputs:
                found[value] = prefix + (value.name or "")
    return found


def printable(name: str) -> str:
    """The name with all that a terminal would act on, or not show, in backslash form; distinct names stay distinct."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def path_text(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """A path as text. Raises ``BadFile`` for one that no system takes."""
    text = os.fsdecode(path)
    if "\0" in text:
        raise BadFile(f"the path '{printable(text)}' holds a zero character; no file can have such a name")
    return text


def inner(prefix: str, node: ir.Node, taken: dict[str, int]) -> Iterator[tuple[str, ir.Graph]]:
    """The graphs that a node holds with their prefixes, given that of its own graph; ``taken`` keeps them apart.

    It holds how far the count of each went, so that many nodes of one name take no longer than as many others.
    """
    name = node.name or node.op_type
    for word, body in bodies(node):
        wanted = address = f"{prefix}{name}/{word}/"
        count = taken.get(wanted, 1)
        while address in taken:
            count += 1
            address = f"{prefix}{name}#{count}/{word}/"
        taken[address] = 1
        taken[wanted] = count
        yield address, body


def _nested(prefix: str, graph: ir.Graph, taken: dict[str, int]) -> Iterator[tuple[str, ir.Graph]]:
    seen: set[ir.Graph] = set()  # a graph held twice, or by itself, is invalid; here it must only end
    stack = [iter([(prefix, graph)])]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif item[1] not in seen:
            seen.add(item[1])
            yield item
            stack.append(_inside(*item, taken))


def _inside(prefix: str, graph: ir.Graph, taken: dict[str, int]) -> Iterator[tuple[str, ir.Graph]]:
    for node in graph:
        if node.attributes.data:
            yield from inner(prefix, node, taken)
