"""Running rules over a model until none applies any more.

Rules are looked up by the operator at their root. The rewriter moves the root's name, type, shape and place among the
outputs to what replaces it, takes out the nodes that died, and lets new nodes remember the rule in their ``meta``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.constants import Array, constant_node
from ..ir.edit import Names
from ..ir.errors import PenjingError
from ..ir.match import Declined, Match, Rule, attribute, decline
from ..ir.references import inherit, is_named, replace_all_uses
from ..ir.scopes import Scope, scopes
from ..ir.unused import discard, take_out
from ..ir.versions import needed_ir_version
from .base import Context

__all__ = ["Tape", "rewrite"]

_FEW = 4
RULE = "penjing.rule"  # the key in a new node's meta


class Tape:
    """What a rule writes its replacement on.

    ``tape.Gemm(x, w, b, transB=1)`` makes a node of the ONNX domain and returns its output, or a tuple of them where
    ``outputs`` is more than 1. Nothing enters the graph before the rule returns.
    """

    def __init__(self, scope: Scope, match: Match, names: Callable[[], Names]) -> None:
        self.scope = scope
        self.root = match.nodes[0]
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.heirs: list[tuple[ir.Value, ir.Value]] = []  # a new constant, and the one whose name it may take
        self._names = names

    @property
    def version(self) -> int:
        """The version of the ONNX domain in force."""
        return self.scope.version

    def attribute(self, node: ir.Node, name: str, default: Any = None) -> Any:
        """The value of an attribute; declines where it refers to an attribute of the function."""
        return attribute(node, name, default)

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **options: self.op("", op_type, *inputs, **options)

    def op(
        self,
        domain: str,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        name: str | None = None,
        **attributes: Any,
    ) -> Any:
        """A node of any domain. Attributes are Python values, or ``ir.Attr`` as they are; ``None`` leaves one out."""
        given = [
            value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(key, value)
            for key, value in attributes.items()
            if value is not None
        ]
        node = ir.Node(domain, op_type, inputs, given, num_outputs=outputs, name=name)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(
        self, content: Array | ir.TensorProtocol, stem: str = "", *, instead_of: ir.Value | None = None
    ) -> ir.Value:
        """A constant of the dtype and shape of an array or tensor, under a free name that begins with ``stem``.

        A tensor takes that name too.

        It takes the name of the constant ``instead_of`` where nothing uses that one after the rewrite.
        """
        if instead_of is not None:
            stem = instead_of.name or stem
        name = self._names().fresh(stem or f"{self.root.name or self.root.op_type}_constant")
        tensor = ir.Tensor(content, name=name) if isinstance(content, np.ndarray | np.generic) else content
        tensor.name = name
        value = self._constant(tensor, name)
        if instead_of is not None:
            self.heirs.append((value, instead_of))
        return value

    def _constant(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        if self.scope.function is not None:
            value, node = constant_node(tensor, name)
            self.nodes.append(node)
            return value
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.constants.append(value)
        return value

    def undo(self) -> None:
        """Let go of what the nodes here use, so that they count as no users of it."""
        for node in self.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def rewrite(model: ir.Model, rules: Iterable[Rule], ctx: Context) -> int:
    """Apply ``rules`` in every graph of ``model`` until none applies; the first in order that accepts a match wins.

    Returns the number of rewrites. Each is a change in the ledger, each match that a rule declined with a reason a
    skip. Raises ``PenjingError`` where the rules go round in circles.
    """
    return _Rewriter(model, list(rules), ctx).run()


_INPUTS_ONLY = 3  # the IR version in which every initializer is an input too, which a new constant is not


class _Rewriter:
    def __init__(self, model: ir.Model, rules: list[Rule], ctx: Context) -> None:
        self.model = model
        self.ctx = ctx
        self.rules: dict[tuple[str, str], list[Rule]] = {}
        for item in rules:
            self.rules.setdefault(item.root, []).append(item)
        self.applied: Counter[str] = Counter()
        self.declined: dict[ir.Node, tuple[str, str]] = {}
        self.seen: set[ir.Node] = set()  # never walked, so its order does not matter
        self.again: dict[ir.Node, None] = {}
        self.depth = max((item.depth for item in rules), default=1) - 1
        self.walking = True
        self.limit = 0

    @cached_property
    def names(self) -> Names:
        """Made when the first name is needed; most rules need none."""
        return Names(self.model)

    def run(self) -> int:
        """A walk over all graphs meets what a rewrite enables downstream; what it enables elsewhere comes again."""
        found = list(scopes(self.model))
        self.limit = 10 * sum(len(scope.graph) for scope in found) + 1000
        for scope in found:
            for node in scope.graph:  # new nodes come after the root, so that the walk meets them too
                if (node.domain, node.op_type) in self.rules:
                    self.visit(scope, node)
        self.walking = False
        places = {scope.graph: scope for scope in found}
        while self.again:
            nodes, self.again = list(self.again), {}
            for node in nodes:
                if node.graph in places:
                    self.visit(places[node.graph], node)
        for node, (address, reason) in self.declined.items():
            if node.graph is not None:
                self.ctx.skip(address, reason)
        if self.applied and self.model.ir_version == _INPUTS_ONLY:
            self.model.ir_version = needed_ir_version(self.model)
        return self.applied.total()

    def visit(self, scope: Scope, node: ir.Node) -> None:
        candidates = self.rules.get((node.domain, node.op_type))
        if candidates is not None and not self.rewritten(scope, node, candidates):
            self.seen.add(node)

    def rewritten(self, scope: Scope, node: ir.Node, candidates: list[Rule]) -> bool:
        for item in candidates:
            for match in item.matches(node, scope.opset):
                tape = Tape(scope, match, lambda: self.names)
                try:
                    found = item.function(tape, **match.names)
                    if found is not None:
                        _check_devices(match.nodes)
                        self.apply(item, tape, match, found if isinstance(found, tuple) else (found,))
                        return True
                except Declined as reason:
                    self.declined[node] = (scope.address(node), f"{item.name}: {reason}")
                tape.undo()
        return False

    def apply(self, item: Rule, tape: Tape, match: Match, found: tuple[ir.Value | None, ...]) -> None:
        root, graph = tape.root, tape.scope.graph
        if len(found) != len(root.outputs):
            raise PenjingError(
                f"The rule '{item.name}' gave {len(found)} values for the {len(root.outputs)} outputs of "
                f"{tape.scope.address(root)}; give one for each, None for one that nothing uses."
            )
        pairs = list(zip(root.outputs, found, strict=True))
        _check_outputs(pairs, tape)
        address = tape.scope.address(root)
        for node in tape.nodes:
            node.meta[RULE] = item.name
        if tape.nodes:
            self.names_of_nodes(tape, found)
        for value in tape.constants:
            graph.register_initializer(value)
        new = {value for node in tape.nodes for value in node.outputs}
        for old, heir in pairs:
            if heir is not None and _move(old, heir, heir in new) and (maker := heir.producer()) in self.seen:
                self.again[maker] = None
        if tape.nodes:
            self.names_of_values(tape)
            graph.insert_after(root, tape.nodes)
        freed = take_out(root)
        self.seen.discard(root)
        for node in match.nodes[1:]:
            if node.graph is not None:
                freed += node.outputs
        freed = list(dict.fromkeys(freed))  # a constant may be freed many times, and each look at its uses copies them
        discard(freed)
        for value, old in tape.heirs:
            if not _is_there(old):
                value.name = old.name
        self.come_again(freed)
        self.come_again(value for value in found if value is not None)
        if not self.walking:
            self.again.update(dict.fromkeys(tape.nodes))
        self.declined.pop(root, None)
        self.applied[item.name] += 1
        self.ctx.change(address, item.name)
        if self.applied.total() > self.limit:
            self.refuse()

    def come_again(self, values: Iterable[ir.Value]) -> None:
        """Visit once more the nodes near ``values`` that were visited before: a rule may fit them now.

        A value with many uses, often a constant, is inside no match that cares for how many it has.
        """
        seen, again = self.seen, self.again
        for value in values:
            near = value.uses()
            if len(near) > _FEW:
                continue
            for _ in range(self.depth):
                again.update((node, None) for node, _ in near if node in seen)
                near = [use for node, _ in near for output in node.outputs for use in output.uses()]

    def names_of_values(self, tape: Tape) -> None:
        for node in tape.nodes:
            for value in node.outputs:
                if value.name is None:
                    value.name = self.names.fresh(f"{tape.root.name or tape.root.op_type}_{node.op_type}")

    def names_of_nodes(self, tape: Tape, found: tuple[ir.Value | None, ...]) -> None:
        """The node that takes the root's place takes its metadata, and its name if the rule gave none; others are named
        after it."""
        root = tape.root
        heir = next((value.producer() for value in found if value is not None and value.producer() in tape.nodes), None)
        for place, node in enumerate(tape.nodes):
            if node is heir:
                node.name = node.name or root.name
                node.metadata_props.update(root.metadata_props)
            elif node.name is None:
                node.name = self.names.fresh(f"{root.name or root.op_type}_{node.op_type}_{place}")

    def refuse(self) -> None:
        name = self.applied.most_common(1)[0][0]
        raise PenjingError(
            f"The rules go round in circles: {self.applied.total()} rewrites, most by '{name}'. A rule must not match "
            "what it wrote; let it decline there."
        )


def _check_outputs(pairs: list[tuple[ir.Value, ir.Value | None]], tape: Tape) -> None:
    """Decline where a value that must stay what it is would have to become an output of the graph."""
    taken: set[ir.Value] = set()
    for old, value in pairs:
        if value is None:
            if old.is_graph_output() or old.uses():
                decline("an output that is used has no replacement")
            continue
        lost = value if old.is_graph_output() else None if value.producer() in tape.nodes else old
        if lost is not None and is_named(lost):
            decline("a quantization annotation names a value that would be gone")
        if not old.is_graph_output():
            continue
        if value.is_graph_output() or value in taken:
            decline("two outputs would be one value")
        if value.producer() is None:
            decline("an output would be an input or a constant")
        if value.producer() not in tape.nodes and value.graph is not tape.scope.graph:
            decline("an output would be a value of an outer graph")
        taken.add(value)


def _check_devices(nodes: Iterable[ir.Node]) -> None:
    """Decline where a node says on which devices it runs: there is no telling where what replaces it should."""
    if any(node.device_configurations for node in nodes):
        decline("it is assigned to devices")


def _is_there(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() or value.is_graph_input() or (node is not None and node.graph is not None)


def _move(old: ir.Value, value: ir.Value, new: bool) -> bool:
    """Let ``value`` take the place of ``old``: uses, type, shape, and among the outputs of the graph the name too.

    Whether more is known of ``value`` now, so that a rule may fit the node that makes it.
    """
    known = value.type, value.shape
    if value.type is None:
        value.type = old.type
    graph = old.graph
    if new or old.is_graph_output():
        value.name = old.name
        value.shape = value.shape if old.shape is None else old.shape
        value.metadata_props.update(old.metadata_props)
        value.doc_string = value.doc_string or old.doc_string
    elif value.shape is None:
        value.shape = old.shape
    inherit(old, value)
    if old.is_graph_output() and graph is not None:
        for place, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[place] = value
    replace_all_uses(old, value)
    return known != (value.type, value.shape)
