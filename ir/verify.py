"""The invariants of a model, each breach told in a sentence with an address.

onnx_ir keeps uses up to date but accepts a node that feeds itself, two values of one name, or a value of another
graph. Checked here is what the ONNX IR specification asks (static single assignment, names, nested scopes) and what
onnx.checker and ONNX Runtime refuse, and that values and nodes agree on who makes and who reads what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from .address import function_prefix, graphs, inner, printable
from .errors import InvalidModel
from .schemas import form, misfit

Identifier = tuple[str, str, str]
_GRAPH_TYPES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def verify(model: ir.Model, place: str = "the model") -> None:
    """Raises ``InvalidModel``, whose message begins with ``place``, if the model breaks an invariant."""
    if found := problems(model):
        raise InvalidModel(place, found)


def problems(model: ir.Model) -> list[str]:
    """One sentence for each breach, in the order of the graphs; empty for a valid model. Takes O(nodes + edges)."""
    walk = _Walk(model)
    walk.graph("", model.graph, model.opset_imports, None)
    for key, function in model.functions.items():
        walk.function(key, function)
    walk.links()
    return walk.problems + _recursion(walk.calls)


@dataclass(slots=True, eq=False)
class _Scope:
    """A graph being walked; what it defines goes out of sight when it ends."""

    graph: ir.Graph
    prefix: str
    nodes: Iterator[ir.Node]
    entered: bool = False
    holder: ir.Node | None = None  # the node whose bodies are being walked; its outputs are defined after them
    values: list[ir.Value] = field(default_factory=list)
    hidden: list[ir.Value] = field(default_factory=list)  # outer values whose names this body's inputs take


class _Walk:
    """All graphs in order. ``visible`` maps the names in sight to values, ``defined`` is the set of these values."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.problems: list[str] = []
        self.stack: list[_Scope] = []
        self.visible: dict[str, ir.Value] = {}
        self.defined: set[ir.Value | None] = {None}  # None is an input left out
        self.places: dict[ir.Graph, str] = {}
        self.taken: dict[str, int] = {}
        self.nodes: set[ir.Node] = set()
        self.inputs: list[ir.Value | None] = []
        self.values: list[tuple[str, list[ir.Value]]] = []
        self.unnamed: list[tuple[str, ir.Value]] = []
        self.calls: dict[Identifier, dict[Identifier, None]] = {}

    def report(self, address: str, sentence: str) -> None:
        self.problems.append(f"{printable(address) or 'the main graph'}: {sentence}")

    def function(self, key: Identifier, function: ir.Function) -> None:
        prefix = function_prefix(function)
        if key != function.identifier():
            self.report(prefix, f"the model lists this function as {_called(key)}.")
        if function.graph.initializers:
            names = ", ".join(printable(name) for name in function.graph.initializers)
            self.report(prefix, f"a function cannot hold initializers, found {names}; use Constant nodes.")
        self.graph(prefix, function.graph, function.opset_imports, function)

    def graph(self, prefix: str, graph: ir.Graph, imports: Mapping[str, int], function: ir.Function | None) -> None:
        """Walks a graph and the bodies in it, on a stack of its own since bodies nest to any depth."""
        versions = {"" if domain == "ai.onnx" else domain: version for domain, version in imports.items()}
        domains = set(versions)
        functions = self.model.functions
        calls = self.calls.setdefault(function.identifier(), {}) if function else {}
        defined, seen, used, stack = self.defined, self.nodes, self.inputs, self.stack
        fitting: set[object] = set()  # what nodes are like that fit their operators' schemas
        self.visible.clear()
        defined.clear()
        defined.add(None)
        stack.append(_Scope(graph, prefix, iter(graph)))
        while stack:
            scope = stack[-1]
            if not scope.entered and not self.enter(scope):
                stack.pop()
                continue
            if scope.holder is not None:
                self.define(scope, scope.holder)
                scope.holder = None
            this = scope.graph
            for node in scope.nodes:
                seen.add(node)
                inputs = node.inputs
                used += inputs
                if not defined.issuperset(inputs):
                    self.unseen(scope, node)
                if node.graph is not this or node.domain not in domains or not node.op_type:
                    self.node(scope, node, domains, function)
                if functions and (callee := functions.get(node.op_identifier())) is not None:
                    calls[node.op_identifier()] = None
                    self.call(scope, node, callee)
                elif (likeness := _likeness(node)) not in fitting:
                    schema = form(node.domain, node.op_type, versions.get(node.domain, 0))
                    if schema is not None and (found := misfit(node, schema)):
                        self.report(scope.prefix + _name(node), f"{found}.")
                    else:
                        fitting.add(likeness)
                if node.attributes.data and (held := self.attributes(scope, node, function)):
                    scope.holder = node
                    stack += reversed(held)
                    break
                self.define(scope, node)
            else:
                self.leave(scope)

    def enter(self, scope: _Scope) -> bool:
        """Defines the graph's inputs and initializers; false for a graph that was entered before."""
        graph = scope.graph
        if graph in self.places:
            where = printable(self.places[graph]) or "the main graph"
            self.report(scope.prefix, f"this graph is already in the model as {where}; give each place a clone.")
            return False
        self.places[graph] = scope.prefix
        scope.entered = True
        for value in graph.inputs:
            if value.producer() is not None:
                self.report(scope.prefix + (value.name or ""), "a graph input cannot be the output of a node.")
            self.bring(scope, value)
        inputs = set(graph.inputs)
        for name, value in graph.initializers.data.items():
            self.initializer(scope.prefix + name, name, value)
            if value not in inputs:
                self.bring(scope, value)
        return True

    def bring(self, scope: _Scope, value: ir.Value) -> None:
        """Defines an input or initializer of a graph.

        In a body it may take a name of an outer scope: onnx.checker and ONNX Runtime accept that, not so for outputs
        of nodes. The outer value is out of sight then, for a use of it would be saved as a use of this one.
        """
        name = value.name
        other = self.visible.get(name) if name else None
        if not name:
            self.report(scope.prefix, "a graph input or initializer has no name.")
        elif other is not None and any(other is own for own in scope.values):
            self.report(scope.prefix + name, "two graph inputs or initializers have this name; rename one.")
        elif other is not None:
            self.defined.discard(other)
            scope.hidden.append(other)
        self.visible[name or ""] = value
        self.defined.add(value)
        scope.values.append(value)

    def initializer(self, address: str, key: str, value: ir.Value) -> None:
        tensor = value.const_value
        if value.name != key:
            self.report(address, f"the initializer of this name calls itself '{printable(value.name or '')}'.")
        if value.producer() is not None:
            self.report(address, "an initializer cannot be the output of a node.")
        if tensor is None:
            self.report(address, "the initializer has no tensor; set its const_value.")
            return
        type_, shape, dtype, actual = value.type, value.shape, tensor.dtype, tensor.shape
        if type_ is not None and (type_.dtype != dtype or not isinstance(type_, ir.TensorType)):
            self.report(address, f"the value says {type_}, its tensor is {dtype}.")
        if shape is not None and shape is not actual and shape != actual and not _fits(shape, actual):
            self.report(address, f"the value says shape {shape}, its tensor has {actual}.")

    def define(self, scope: _Scope, node: ir.Node) -> None:
        visible, outputs = self.visible, node.outputs
        scope.values += outputs
        self.defined.update(outputs)
        for index, value in enumerate(outputs):
            name = value.name
            if value.producer() is not node or value.index() != index:
                self.report(
                    scope.prefix + (name or ""),
                    f"it is output {index} of {_named(node)}, but its own link names another node or place.",
                )
            if not name:
                self.unnamed.append((f"{scope.prefix}{_name(node)}", value))
            elif visible.setdefault(name, value) is not value:
                self.clash(scope, node, name)

    def clash(self, scope: _Scope, node: ir.Node, name: str) -> None:
        other = self.visible[name]
        if any(other is own for own in scope.values):
            sentence = "two values have this name, the later is an output of"
        else:
            sentence = "this name is that of a value visible from an outer graph, and of an output of"
        self.report(scope.prefix + name, f"{sentence} {_named(node)}; rename one.")

    def leave(self, scope: _Scope) -> None:
        for value in scope.graph.outputs:
            self.output(scope, value)
        self.stack.pop()
        self.values.append((scope.prefix, scope.values))
        if not self.stack:
            return
        self.defined.difference_update(scope.values)
        for value in scope.values:
            if self.visible.get(value.name or "") is value:
                del self.visible[value.name or ""]
        for value in scope.hidden:
            self.visible[value.name or ""] = value
            self.defined.add(value)

    def output(self, scope: _Scope, value: ir.Value) -> None:
        """A body cannot return an outer value as it is: onnx.checker and ONNX Runtime refuse that (an Identity can)."""
        address = scope.prefix + (value.name or "")
        producer = value.producer()
        if not value.name:
            self.report(address, "a graph output has no name.")
        elif value not in self.defined:
            self.report(address, "the graph output is not defined by any node, input or initializer of the graph.")
        elif (producer.graph if producer is not None else value.graph) is not scope.graph:
            self.report(address, "the graph output is a value of an outer graph; put an Identity in between.")

    def node(self, scope: _Scope, node: ir.Node, domains: set[str], function: ir.Function | None) -> None:
        address = scope.prefix + _name(node)
        if node.graph is not scope.graph:
            self.report(address, "the node is listed in this graph but says that it is in another, or in none.")
        if not node.op_type:
            self.report(address, "the node has no operator type.")
        if node.domain not in domains:
            owner = "function" if function else "model"
            domain = printable(node.domain) or "ai.onnx"
            self.report(address, f"the {owner} imports no opset for the domain '{domain}' of {_operator(node)}.")

    def call(self, scope: _Scope, node: ir.Node, callee: ir.Function) -> None:
        for what, given, formal in (
            ("input", node.inputs, callee.inputs),
            ("output", node.outputs, callee.outputs),
        ):
            if len(given) > len(formal):
                self.report(
                    scope.prefix + _name(node),
                    f"the call has {len(given)} {what}s, the function {_operator(node)} takes {len(formal)}.",
                )

    def attributes(self, scope: _Scope, node: ir.Node, function: ir.Function | None) -> list[_Scope]:
        """The bodies that the node holds, still to be walked."""
        holds = False
        for attribute in node.attributes.data.values():
            if attribute.ref_attr_name is None:
                holds = holds or attribute.type in _GRAPH_TYPES
            elif function is None:
                name, reference = printable(attribute.name), printable(attribute.ref_attr_name)
                self.report(
                    scope.prefix + _name(node),
                    f"the attribute '{name}' is '@{reference}', but in no function.",
                )
        if not holds:
            return []
        return [_Scope(body, prefix, iter(body)) for prefix, body in inner(scope.prefix, node, self.taken)]

    def unseen(self, scope: _Scope, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value not in self.defined:
                reason = self.reason(node, value)
                subject = f"input {index} '{printable(value.name or '')}'"
                self.report(scope.prefix + _name(node), f"{subject} {reason}")

    def reason(self, node: ir.Node, value: ir.Value) -> str:
        """Why a value that the node reads is not in sight there."""
        producer = value.producer()
        home = value.graph if producer is None else producer.graph
        if producer is node:
            return "is an output of the node itself."
        if any(value is other for outer in self.stack for other in outer.hidden):
            return "is hidden by an input or initializer of a body with the same name; rename one."
        if home is None and producer is None:
            return "is neither the output of a node nor an input or initializer of a graph."
        if home is None:
            return f"comes from {_named(producer)}, which is in no graph."
        if any(outer.graph is home for outer in self.stack):
            return f"is used before {_named(producer)} defines it: the order is wrong, or there is a cycle."
        return f"is a value of {self.place(home)}, which cannot be seen from here."

    def place(self, home: ir.Graph) -> str:
        for prefix, graph in graphs(self.model):
            if graph is home:
                return f"the graph {printable(prefix)}" if prefix else "the main graph"
        return "a graph of another model"

    def links(self) -> None:
        """The uses that each value lists are the places that read it: all of them, and nothing else.

        Every listed use is a read, and there are as many as reads: so each read is listed.
        """
        nodes, listed = self.nodes, 0
        broken: dict[ir.Value, None] = {}
        for _, values in self.values:
            for value in values:
                uses = value.uses()
                listed += len(uses)
                for node, index in uses:
                    inputs = node.inputs
                    if index >= len(inputs) or inputs[index] is not value or node not in nodes:
                        broken[value] = None
        if broken or listed != len(self.inputs) - self.inputs.count(None):
            counts = Counter(self.inputs)
            for prefix, values in self.values:
                for value in values:
                    if value in broken or len(value.uses()) != counts[value]:
                        self.link(prefix + (value.name or ""), value)
        for address, value in self.unnamed:
            if value.name is None:
                self.report(address, f"output {value.index()} has no name; '' stands for an output left out.")
            elif value.uses():
                self.report(address, f"output {value.index()} has no name but is used.")

    def link(self, address: str, value: ir.Value) -> None:
        uses = set(value.uses())
        for node, index in value.uses():
            if node not in self.nodes:
                self.report(address, f"it lists a use by {_named(node)}, which is in no graph of the model.")
            elif index >= len(node.inputs) or node.inputs[index] is not value:
                self.report(
                    address,
                    f"it lists a use as input {index} of {_named(node)}, which reads another value there.",
                )
        for graph, prefix in self.places.items():
            for node in graph:
                for index, other in enumerate(node.inputs):
                    if other is value and (node, index) not in uses:
                        place = printable(prefix + _name(node))
                        self.report(address, f"it does not list its use as input {index} of node '{place}'.")


def _recursion(calls: Mapping[Identifier, Mapping[Identifier, None]]) -> list[str]:
    """A sentence for each function that reaches itself, with the calls on the way."""
    found: list[str] = []
    done: set[Identifier] = set()
    for start in calls:
        path: dict[Identifier, None] = {}  # in order
        stack = [iter([start])]
        while stack:
            callee = next(stack[-1], None)
            if callee is None:
                stack.pop()
                if path:
                    done.add(path.popitem()[0])
            elif callee in path:
                loop = list(path)
                way = " -> ".join(_called(key) for key in (*loop[loop.index(callee) :], callee))
                found.append(f"{_called(callee)}/: a function must not call itself, found {way}.")
            elif callee not in done:
                path[callee] = None
                stack.append(iter(calls.get(callee, ())))
    return found


def _fits(shape: ir.Shape, actual: ir.ShapeProtocol) -> bool:
    return shape.rank() == actual.rank() and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(shape.dims, actual.dims, strict=True)
    )


def _likeness(node: ir.Node) -> object:
    """All that a schema asks of a node; most nodes of a model are like one before."""
    inputs, given = node.inputs, node.attributes.data
    likeness = (node.domain, node.op_type, len(inputs), len(node.outputs))
    if not given and None not in inputs:
        return likeness
    left_out = [place for place, value in enumerate(inputs) if value is None]
    return (*likeness, *left_out, *((name, attribute.type) for name, attribute in given.items()))


def _name(node: ir.Node) -> str:
    return node.name or node.op_type


def _named(node: ir.Node | None) -> str:
    return f"node '{printable(_name(node))}'" if node is not None else "no node"


def _operator(node: ir.Node) -> str:
    return _called(node.op_identifier()) if node.domain else printable(node.op_type)


def _called(key: Identifier) -> str:
    domain, name, overload = key
    return printable(f"{domain}::{name}" + f":{overload}" * bool(overload))
