"""What points at values besides the inputs of nodes: quantization annotations and device configurations.

A graph's ``quantization_annotation`` names, for a value, those that hold its scale and zero point. onnx_ir keeps the
names as text in the ``meta`` of the annotated value. Here ``mark`` counts, for each value, how many annotations name
it; while there are any it is not idle, and what renames or replaces values lets the text follow. A node's device
configurations hold values themselves, and follow their replacement.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import onnx_ir as ir

from .address import bodies

ANNOTATION = "quant_parameter_tensor_names"
"""onnx_ir's key in an annotated value's meta: a mapping from roles such as ``SCALE_TENSOR`` to names of values."""

_COUNT = "penjing.named"  # in the meta of a value: how many annotations name it; in that of the main graph: in all
_Scope: TypeAlias = "tuple[dict[str, ir.Value], _Scope | None]"  # the values of a graph by name, and the scope around


def mark(model: ir.Model) -> None:
    """Count what annotations name; once, when a model has been read. Names of no value stay mere text."""
    for _, _, value in _annotated(model):
        value.meta[_COUNT] = value.meta.get(_COUNT, 0) + 1
        model.graph.meta[_COUNT] = True


def mark_alike(graph: ir.Graph, other: ir.Graph) -> None:
    """Let a main graph know that the annotations of ``other``, whose nodes it takes in, are now in it."""
    if _COUNT in other.meta:
        graph.meta[_COUNT] = True


def is_named(value: ir.Value) -> bool:
    """Whether an annotation names ``value``."""
    return _COUNT in value.meta.data


def is_annotated(value: ir.Value) -> bool:
    """Whether ``value`` has an annotation."""
    return ANNOTATION in value.meta.data


def inherit(old: ir.Value, new: ir.Value) -> None:
    """Let ``new``, which holds the same, have what annotations say of ``old``; it takes its name if one names it."""
    if is_annotated(old) and not is_annotated(new) and new.graph in (None, old.graph):
        new.meta[ANNOTATION] = old.meta.pop(ANNOTATION)
    if is_named(old):
        new.meta[_COUNT] = old.meta.pop(_COUNT)


def leave(value: ir.Value, graph: ir.Graph | None) -> list[ir.Value]:
    """Drop the annotation of ``value``, which leaves ``graph``; returns the initializers that none names any more."""
    freed = []
    for name in (value.meta.data.pop(ANNOTATION, None) or {}).values():
        named = graph.initializers.get(name) if graph is not None else None
        if named is not None and is_named(named):
            named.meta[_COUNT] -= 1
            if not named.meta[_COUNT]:
                del named.meta[_COUNT]
                freed.append(named)
    return freed


@contextlib.contextmanager
def renaming(model: ir.Model) -> Iterator[None]:
    """Let annotations follow values that are renamed in the block."""
    found = list(_annotated(model)) if _COUNT in model.graph.meta else []
    yield
    for owner, role, value in found:
        names = owner.meta[ANNOTATION]
        if names[role] != value.name:
            owner.meta[ANNOTATION] = {**names, role: value.name}  # copies of the model share the old one


def replace_all_uses(old: ir.Value, new: ir.Value) -> None:
    """Let nodes in all graphs read ``new`` instead of ``old``, and be assigned to devices by it."""
    for node, index in old.uses():
        replace_sharded(node, old, new)
        node.replace_input_with(index, new)


def replace_sharded(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let the device configurations of ``node`` mean ``new`` where they mean ``old``.

    To be called before the input is replaced, for then onnx_ir drops what they say of ``old``.
    """
    if node.device_configurations:
        node.device_configurations = tuple(
            dataclasses.replace(
                configuration,
                sharding_specs=tuple(
                    dataclasses.replace(spec, value=new) if spec.value is old else spec
                    for spec in configuration.sharding_specs
                ),
            )
            for configuration in node.device_configurations
        )


def _annotated(model: ir.Model) -> Iterator[tuple[ir.Value, str, ir.Value]]:
    """Each annotated value, role, and the value that is named for it, where there is one in sight."""
    waiting: list[tuple[ir.Graph, _Scope | None]] = [(model.graph, None)]
    while waiting:
        graph, around = waiting.pop()
        own = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        scope: _Scope = ({value.name: value for value in own if value.name}, around)
        for value in dict.fromkeys(own):
            for role, name in value.meta.get(ANNOTATION, {}).items():
                if (named := _seen(name, scope)) is not None:
                    yield value, role, named
        waiting += [(body, scope) for node in graph if node.attributes.data for _, body in bodies(node)]


def _seen(name: str, scope: _Scope | None) -> ir.Value | None:
    while scope is not None:
        if name in scope[0]:
            return scope[0][name]
        scope = scope[1]
    return None
