"""Values that loops hand from one iteration to the next without changing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from ...ir.address import bodies
from ...ir.edit import Names
from ...ir.references import inherit, is_named, leave, renaming, replace_all_uses
from ...ir.scopes import Scope, scopes
from ...ir.shapes import dims, infer_shapes
from ...ir.unused import discard, is_idle, take_out
from ..base import Context, Pass, register
from .identities import remove_identities


@register("hoist-loop-invariants")
class HoistLoopInvariants(Pass):
    """Let the body of a Loop or Scan read from outside what the loop carries around unchanged.

    Unchanged is what the body hands on as it came, or through Identity. All that read it, in the body and behind the
    loop, read the initial value instead, so a weight becomes a constant of the operators in the body. Inner loops
    first, until nothing more is found; a loop that carried nothing else goes, and so do operators that now provably
    change nothing, as by remove-identities. A name in a body that would hide the initial value is changed.
    """

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Hoists, lets shapes follow, which a carried value had none of, and hoists what that made plain."""
        told = len(ctx.ledger.skips)
        while _Hoister(model, ctx).run():
            del ctx.ledger.skips[told:]  # the next round tells them again
            infer_shapes(model)
            own = ctx.for_step(ctx.step)
            remove_identities(model, own)
            ctx.ledger.changes += own.ledger.changes


@dataclass(frozen=True, slots=True)
class _Carried:
    """A value that a loop carries: ``place`` among the outputs of the loop, ``offset`` more among those of the body."""

    body: ir.Graph
    place: int
    offset: int
    initial: ir.Value
    entry: ir.Value  # input of the body
    handed: ir.Value  # output of the body
    exit: ir.Value | None  # output of the loop, if it has it

    @property
    def is_invariant(self) -> bool:
        return _origin(self.handed) in (self.entry, _origin(self.initial))

    @property
    def needs_identity(self) -> bool:
        """Whether an output of a graph, in the place of this, has to be a copy of the initial value."""
        others = sum(output is self.entry for output in self.body.outputs) - (self.handed is self.entry)
        return others > 0 or (self.exit is not None and self.exit.is_graph_output())


class _Hoister:
    """One walk over all loops of a model."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self.model = model
        self.ctx = ctx
        self.scopes = {scope.graph: scope for scope in scopes(model)}
        self.around = {body: graph for graph in self.scopes for node in graph for _, body in bodies(node)}

    @cached_property
    def names(self) -> Names:
        return Names(self.model)

    @cached_property
    def own(self) -> dict[str, list[ir.Value]]:
        """Inputs and initializers of bodies by name: these, unlike outputs of nodes, may hide an outer value."""
        found: dict[str, list[ir.Value]] = {}
        for body in self.around:
            for value in dict.fromkeys((*body.inputs, *body.initializers.values())):
                found.setdefault(value.name or "", []).append(value)
        return found

    def run(self) -> bool:
        """Whether anything was hoisted."""
        changed = False
        for scope in reversed(self.scopes.values()):  # the innermost first
            for node in list(scope.graph):
                if node.graph is not None and (found := self.invariants(scope, node)):
                    self.hoist(scope, node, found)
                    changed = True
        return changed

    def invariants(self, scope: Scope, node: ir.Node) -> list[_Carried]:
        found = []
        for carried in _carried(scope, node) if node.op_identifier() not in self.model.functions else ():
            if not carried.is_invariant:
                continue
            if reason := _why_not(scope, node, carried):
                self.ctx.skip(self.scopes[carried.body].address(carried.entry), f"carried unchanged, but {reason}")
            else:
                found.append(carried)
        return found

    def hoist(self, scope: Scope, node: ir.Node, found: Sequence[_Carried]) -> None:
        body = found[0].body
        for carried in reversed(found):  # what is popped leaves the places of those before it
            body.outputs.pop(carried.place + carried.offset)
        for carried in found:
            self.ctx.change(self.scopes[body].address(carried.entry), "carried unchanged, now read from outside")
            body.inputs.remove(carried.entry)
            self.uncover(carried.initial)
            _know(carried.initial, carried.entry)
            self.capture(body, carried)
        freed = [value for carried in found for value in leave(carried.entry, body)]
        discard([*freed, *(carried.handed for carried in found), *(carried.entry for carried in found)])
        self.shorten(scope, node, found)
        discard(carried.initial for carried in found)

    def uncover(self, initial: ir.Value) -> None:
        """Rename what hides ``initial`` in any body."""
        for value in list(self.own.get(initial.name or "", ())):
            around = self.around.get(value.graph) if value.graph is not None else None
            while around is not None and around is not initial.graph:
                around = self.around.get(around)
            if around is not None:
                self.own[initial.name or ""].remove(value)
                with renaming(self.model):
                    value.name = self.names.fresh(f"{value.name}_inner")

    def capture(self, body: ir.Graph, carried: _Carried) -> None:
        """Let the body read the initial value; an output of the body that is its input as it is needs an Identity."""
        entry = carried.entry
        if entry.is_graph_output():
            copy = ir.Value(name=self.names.fresh(entry.name or ""), type=entry.type, shape=entry.shape)
            body.append(self.identity(carried.initial, copy))
            for place, output in enumerate(body.outputs):
                if output is entry:
                    body.outputs[place] = copy
        replace_all_uses(entry, carried.initial)

    def identity(self, value: ir.Value, copy: ir.Value) -> ir.Node:
        return ir.Node("", "Identity", [value], outputs=[copy], name=self.names.fresh("Identity"))

    def shorten(self, scope: Scope, node: ir.Node, found: Sequence[_Carried]) -> None:
        """Put in the place of ``node`` one without the inputs and outputs of what it no longer carries."""
        graph, gone = scope.graph, {carried.place for carried in found}
        for carried in found:
            if carried.exit is None:
                continue
            if carried.exit.is_graph_output():
                copy = _copy(carried.exit)
                graph.insert_before(node, self.identity(carried.initial, copy))
                _move(carried.exit, copy)
            else:
                inherit(carried.exit, carried.initial)
                replace_all_uses(carried.exit, carried.initial)
        kept = [value for place, value in enumerate(node.outputs) if place not in gone]
        if all(map(is_idle, kept)):
            self.ctx.change(scope.address(node), "removed, for it carried nothing else that is used")
            discard(take_out(node))
            return
        inputs = [value for place, value in enumerate(node.inputs) if place - _before(node) not in gone]
        copies = [_copy(value) for value in kept]
        new = ir.Node("", node.op_type, inputs, node.attributes, outputs=copies, version=node.version, name=node.name)
        new.doc_string = node.doc_string
        new.metadata_props.update(node.metadata_props)
        new.meta.update(node.meta)
        graph.insert_before(node, new)
        for value, copy in zip(kept, copies, strict=True):
            _move(value, copy)
        discard(freed for value in node.outputs for freed in leave(value, graph))
        graph.remove(node, safe=True)


def _carried(scope: Scope, node: ir.Node) -> Iterator[_Carried]:
    """What a Loop carries, or a Scan: its state. Not that of the first Scan, whose bodies see one part of a batch."""
    if node.domain or node.op_type not in ("Loop", "Scan") or (body := _body(node)) is None:
        return
    if node.op_type == "Loop":
        count, offset = len(node.inputs) - _before(node), 1
    else:
        scanned = node.attributes.get("num_scan_inputs")
        if scope.version < 9 or scanned is None or scanned.is_ref():
            return
        count, offset = len(node.inputs) - scanned.as_int(), 0
    if len(body.inputs) != len(node.inputs) or len(body.outputs) < count + offset:
        return  # not a valid loop
    for place in range(count):
        initial = node.inputs[place + _before(node)]
        if initial is not None:
            entry, handed = body.inputs[place + _before(node)], body.outputs[place + offset]
            exit_ = node.outputs[place] if place < len(node.outputs) else None
            yield _Carried(body, place, offset, initial, entry, handed, exit_)


def _body(node: ir.Node) -> ir.Graph | None:
    return next((body for word, body in bodies(node) if word == "body"), None)


def _before(node: ir.Node) -> int:
    """Inputs before the initial values: the number of trips and the condition of a Loop."""
    return 2 if node.op_type == "Loop" else 0


def _origin(value: ir.Value) -> ir.Value:
    """What ``value`` is a copy of."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and not node.domain and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _why_not(scope: Scope, node: ir.Node, carried: _Carried) -> str | None:
    """Why an unchanged value must be carried on; ``None`` where it need not be."""
    if node.device_configurations:
        return "the loop is assigned to devices"
    if is_named(carried.entry) or (carried.exit is not None and is_named(carried.exit)):
        return "a quantization annotation names it"
    is_sequence = isinstance(carried.initial.type or carried.entry.type, ir.SequenceType)
    if scope.version == 13 and is_sequence and carried.needs_identity:
        return "as an output it needs an Identity, which takes sequences from opset 14 on"
    return None


def _know(value: ir.Value, entry: ir.Value) -> None:
    """Write down what the body says of a value; its names of dimensions may mean others outside."""
    value.type = value.type or entry.type
    if value.shape is None and (sizes := dims(entry)) is not None:
        value.shape = ir.Shape([size if isinstance(size, int) else None for size in sizes])


def _copy(value: ir.Value) -> ir.Value:
    copy = ir.Value(name=value.name, type=value.type, shape=value.shape, doc_string=value.doc_string)
    copy.metadata_props.update(value.metadata_props)
    return copy


def _move(old: ir.Value, new: ir.Value) -> None:
    """Let ``new``, which is in the graph and holds the same, be read and handed out in the place of ``old``."""
    old.name = None
    inherit(old, new)
    replace_all_uses(old, new)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
