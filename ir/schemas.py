"""What an operator's schema asks of a node: as many inputs and outputs as it takes, and attributes of the right types.

The schemas are those of the installed onnx, at the version of the operator set that the node's graph imports.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import onnx.defs
import onnx_ir as ir

from .address import printable

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_Single = onnx.defs.OpSchema.FormalParameterOption.Single


@dataclass(frozen=True, slots=True)
class Form:
    """An operator's schema: fewest and most inputs and outputs, the places of inputs that cannot be left out, and its
    attributes with their types."""

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    needed: tuple[int, ...]
    required: frozenset[str]
    attributes: dict[str, ir.AttributeType]


@functools.lru_cache(4096)
def form(domain: str, op_type: str, version: int) -> Form | None:
    """What the operator asks; ``None`` where the installed onnx does not know it."""
    if not onnx.defs.has(op_type, domain=domain):
        return None
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except (onnx.defs.SchemaError, TypeError):  # none of that version, or one past a C int
        return None
    return Form(
        op_type,
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        tuple(place for place, formal in enumerate(schema.inputs) if formal.option == _Single),
        frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
        {name: ir.AttributeType[str(one.type).rpartition(".")[2]] for name, one in schema.attributes.items()},
    )


def misfit(node: ir.Node, form: Form) -> str | None:
    """The first way, as a clause, in which a node is not what its operator's schema asks."""
    inputs = node.inputs
    for what, values, (fewest, most) in (("input", inputs, form.inputs), ("output", node.outputs, form.outputs)):
        if not fewest <= len(values) <= most:
            takes = fewest if fewest == most else f"{fewest} to {most}" if most < 2**31 - 1 else f"at least {fewest}"
            return f"{form.name} has {len(values)} {what}s, and takes {takes}"
    if None in inputs:
        for place in form.needed:
            if place < len(inputs) and inputs[place] is None:
                return f"input {place} of {form.name} cannot be left out"
    given = node.attributes.data
    if missing := sorted(name for name in form.required if name not in given):
        return f"{form.name} lacks the attribute '{missing[0]}'"
    for name, attribute in given.items():
        expected = form.attributes.get(name)
        if expected is None and attribute.type in _GRAPHS:
            return f"{form.name} has no attribute '{printable(name)}', and so no use for a graph in it"
        if expected is not None and attribute.type != expected:
            return f"the attribute '{printable(name)}' of {form.name} has the type {attribute.type}, not {expected}"
    if form.name == "Constant" and (len(given) != 1 or next(iter(given)) not in form.attributes):
        return f"Constant has {len(given)} attributes, and takes one, its value"
    return None
