"""Cutting a part out of a model by the names of values, and taking out what its outputs do not need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .address import printable
from .edit import Names
from .errors import UsageError, nearest
from .references import leave, renaming, replace_all_uses
from .scopes import scopes, values
from .shapes import infer_shapes
from .unused import discard, is_idle, take_out


@dataclass(frozen=True)
class Swept:
    """How much was not needed: nodes of all graphs, initializers, functions, and names of inputs."""

    nodes: int
    initializers: int
    functions: int
    inputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = {"node": self.nodes, "constant": self.initializers, "function": self.functions}
        return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for word, count in words.items() if count)


def main_value(model: ir.Model, name: str, place: str) -> ir.Value:
    """The value of the main graph called ``name``. Raises ``UsageError``, which begins with ``place``."""
    known = {value.name: value for value in values(model.graph) if value.name}
    if name in known:
        return known[name]
    inner = next((scope for scope in scopes(model) if any(value.name == name for value in values(scope.graph))), None)
    if inner is not None:
        where = printable(inner.prefix.removesuffix("/"))
        raise UsageError(
            f"{place}: the value '{printable(name)}' is inside '{where}'; name one of the main graph, for a body or a "
            "function is cut nowhere."
        )
    hint = nearest(name, [known_name for known_name in known if known_name])
    raise UsageError(f"{place} has no value '{printable(name)}'.{printable(hint)}")


def cut(
    model: ir.Model, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None, *, place: str
) -> Swept:
    """Keep, in place, what computes the values ``outputs`` from the values ``inputs``, and nothing else.

    Both name values of the main graph, what is captured in bodies included; ``None`` stands for those that the model
    has, of the inputs only those that are needed. An inner value among the inputs becomes an input of its type and
    shape, inferred where the file does not tell. Raises ``UsageError``, which begins with ``place``: an unknown name,
    one twice, an output that needs another input, or one that is an input itself.
    """
    names = [*(inputs or ()), *(outputs or ())]
    found = {name: main_value(model, name, place) for name in names}
    for given, word in ((inputs, "input"), (outputs, "output")):
        if given is not None and (twice := next((name for name in given if given.count(name) > 1), None)) is not None:
            raise UsageError(f"{place}: the {word} '{printable(twice)}' is named twice; name it once.")
    before = {value.name: value for value in model.graph.inputs}
    ends = list(model.graph.outputs) if outputs is None else [found[name] for name in outputs]
    _infer([found[name] for name in inputs or ()] + ends, model)
    with renaming(model):
        fresh = {found[name]: _as_input(model, found[name], place) for name in inputs or () if name not in before}
        model.graph.outputs.clear()
        kept = [fresh.get(value, value) for value in ends]
        _show(model, kept)
    chosen = None if inputs is None else [fresh.get(found[name], found[name]) for name in inputs]
    return _sweep_inputs(model, chosen, place)


def sweep(model: ir.Model) -> Swept:
    """Take out the nodes of all graphs, the initializers and the functions that nothing uses. Inputs and outputs stay.

    Innermost graphs first, each from its end, so that one walk finds everything.
    """
    nodes = initializers = functions = 0
    found = list(scopes(model))
    for scope in reversed(found):
        for node in reversed(scope.graph):
            if all(map(is_idle, node.outputs)):
                take_out(node)
                nodes += 1
    for scope in found:
        initializers += len(discard(reversed(list(scope.graph.initializers.values())))[1])
    called: dict[ir.OperatorIdentifier, None] = {}
    waiting: list[ir.Graph | ir.Function] = [model.graph]
    while waiting and model.functions:
        for node in waiting.pop().all_nodes():
            key = node.op_identifier()
            if key in model.functions and key not in called:
                called[key] = None
                waiting.append(model.functions[key])
    for key in [key for key in model.functions if key not in called]:
        del model.functions[key]
        functions += 1
    return Swept(nodes, initializers, functions)


def _infer(ends: Sequence[ir.Value], model: ir.Model) -> None:
    if any(value.type is None or value.shape is None for value in ends):
        infer_shapes(model)


def _as_input(model: ir.Model, value: ir.Value, place: str) -> ir.Value:
    """A new input under the name of ``value``, which it takes the place of."""
    name, graph = value.name or "", model.graph
    if value.type is None:
        raise UsageError(
            f"{place}: the type of the value '{printable(name)}' is not known, so it cannot become an input; run "
            "infer-shapes first, or cut elsewhere."
        )
    new = ir.Value(type=value.type, shape=None if value.shape is None else value.shape.copy())
    leave(value, graph)
    replace_all_uses(value, new)
    if value.is_initializer():
        for place_, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[place_] = new
        del graph.initializers[name]
    else:
        value.name = Names(model).fresh(name)
    new.name = name
    graph.inputs.append(new)
    return new


def _show(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Let these be the outputs of the main graph. An input or constant, and one that is there, is copied."""
    for value in outputs:
        if value.is_graph_input() or value.is_initializer() or value.is_graph_output():
            name = value.name or ""
            copy = ir.Value(name=Names(model).fresh(f"{name}_output"), type=value.type, shape=value.shape)
            model.graph.append(ir.Node("", "Identity", [value], outputs=[copy], name=copy.name))
            value = copy
        model.graph.outputs.append(value)


def _sweep_inputs(model: ir.Model, chosen: Sequence[ir.Value] | None, place: str) -> Swept:
    done = sweep(model)
    graph = model.graph
    gone = [value for value in graph.inputs if is_idle(value) and value not in (chosen or ())]
    if chosen is not None:
        if needed := [value for value in graph.inputs if value not in chosen and value not in gone]:
            required = [value for value in needed if value.const_value is None]
            if required:
                listed = ", ".join(f"'{printable(value.name or '')}'" for value in required)
                raise UsageError(
                    f"{place}: the outputs also need the input{'s' if len(required) > 1 else ''} {listed}; name "
                    f"{'them' if len(required) > 1 else 'it'} among the inputs, or cut elsewhere."
                )
        kept = [*chosen, *(value for value in needed if value.const_value is not None)]
    else:
        kept = [value for value in graph.inputs if value not in gone]
    for value in gone:
        graph.initializers.pop(value.name or "", None)
    graph.inputs.clear()
    graph.inputs.extend(kept)
    return Swept(done.nodes, done.initializers, done.functions, tuple(value.name or "" for value in gone))
