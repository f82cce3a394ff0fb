"""Branches of one architecture: layers side by side that read one value, and all that goes on alike behind them.

    for value, nodes in starts(scope):      # nodes that read the value and are built alike
        region = Region.grown(value, nodes, ...)

A *stack* is one value of each branch, in order: what a fused graph holds as one value. A region begins with layers
that share their input, and grows by every set of nodes, one of each branch, whose inputs are stacks, constants, or
values that all of them share. Nothing here changes the graph.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx.defs
import onnx_ir as ir

from ...ir.address import printable
from ...ir.constants import constant_tensor, is_constant
from ...ir.ops import is_random, operator
from ...ir.scopes import Scope
from ...ir.shapes import dims
from ...ir.unify import dtype_name

Stack: TypeAlias = "tuple[ir.Value, ...]"
Nodes: TypeAlias = "tuple[ir.Node, ...]"

LAYERS = ("Conv", "Gemm", "MatMul")
_QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear")
_APART = ("ConvTranspose", "LSTM", "GRU", "RNN")  # have weights, and no rule
_NOTHING, _COMPUTED = "nothing", "what is computed"
_WHERE_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class Unlike(Exception):
    """These nodes cannot be one; the message says why, in words that follow the name of the first of them."""


@dataclass(frozen=True, eq=False)
class Site:
    """Nodes of the branches that are to be one, and what they read: ``stacks`` are those held together already."""

    nodes: Nodes
    version: int
    stacks: dict[Stack, int]

    @property
    def node(self) -> ir.Node:
        return self.nodes[0]

    @property
    def count(self) -> int:
        return len(self.nodes)

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    def attribute(self, name: str) -> object:
        """What the nodes set, or what their operator takes for it; ``None`` where there is no default."""
        return attributes(self.node, self.version).get(name)

    @property
    def ports(self) -> list[int]:
        """The inputs that are there. Raises ``Unlike`` where only some branches have one."""
        return [port for port in range(max(len(node.inputs) for node in self.nodes)) if self.has(port)]

    def has(self, port: int) -> bool:
        """Raises ``Unlike`` where only some branches have that input."""
        absent = self._read(port).count(None)
        if 0 < absent < self.count:
            raise Unlike(f"only some branches have its input {port}")
        return not absent

    def constants(self, port: int) -> list[ir.TensorProtocol] | None:
        """What each branch holds there; ``None`` where one computes it."""
        found = [constant_tensor(value) for value in self._read(port)]
        return None if None in found else [tensor for tensor in found if tensor is not None]

    def stack(self, port: int) -> Stack:
        """What the branches read there: a stack, or one value that is the same for all. Raises ``Unlike``."""
        read = tuple(value for value in self._read(port) if value is not None)
        if read in self.stacks:
            return read
        if len(read) == self.count and len(set(read)) == 1 and not is_constant(read[0]):
            return read[:1]
        raise Unlike(
            f"what it reads as input {port} is not held together with that of the other branches{self.hint(port)}"
        )

    def hint(self, port: int) -> str:
        """What to do where an input that is computed could be a constant; for the end of a reason."""
        return hint(self._read(port))

    def _read(self, port: int) -> list[ir.Value | None]:
        return [node.inputs[port] if port < len(node.inputs) else None for node in self.nodes]

    def only_output(self) -> None:
        if any(value.name for value in self.node.outputs[1:]):
            raise Unlike("it has more than one output")


@dataclass(frozen=True, eq=False)
class Step:
    """One node of each branch, and those that are part of it: of a MatMul the Add of its bias."""

    nodes: Nodes
    action: object  # an ``Action`` of branches_rules
    also: tuple[ir.Node, ...] = ()

    @property
    def outputs(self) -> Stack:
        return tuple(node.outputs[0] for node in self.also or self.nodes)

    @property
    def all(self) -> Nodes:
        return self.nodes + self.also


Rule = Callable[[Site], Step]


@dataclass(eq=False)
class Region:
    """What can be fused, from a value on. ``left`` says where it ends, and why."""

    value: ir.Value
    steps: list[Step]
    left: list[tuple[ir.Node | ir.Value, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.steps[0].nodes)

    @property
    def nodes(self) -> set[ir.Node]:
        return {node for step in self.steps for node in step.all}

    @property
    def layers(self) -> list[Step]:
        return [step for step in self.steps if step.nodes[0].op_type in LAYERS]

    @property
    def subject(self) -> str:
        """The layers with which it begins: the same in each run."""
        names = [name(node) for node in self.steps[0].nodes]
        return ", ".join(names) if len(names) <= 4 else f"{names[0]}, ..., {names[-1]}"

    def __str__(self) -> str:
        kinds = Counter(node.op_type for step in self.steps for node in step.all[:: self.count])
        return ", ".join(f"{kind} {number}" for kind, number in kinds.items())

    @classmethod
    def grown(cls, value: ir.Value, nodes: Nodes, scope: Scope, rule: Rule) -> Region:
        """From the layers ``nodes``, as far as the branches are alike. Raises ``Unlike`` where these do not begin."""
        first = rule(Site(nodes, scope.version, {}))
        region = cls(value, [first])
        stacks, taken, why = {first.outputs: 0}, {*first.all}, dict[ir.Node, str]()
        waiting = [first.outputs]
        while waiting:
            values = waiting.pop(0)
            for found in _matching(values, scope, taken):
                try:
                    step = rule(Site(found, scope.version, stacks))
                except Unlike as reason:
                    why[found[0]] = str(reason)
                    continue
                region.steps.append(step)
                taken.update(step.all)
                stacks[step.outputs] = len(stacks)
                waiting.append(step.outputs)
        for stack in stacks:
            region.left += _ends(stack, scope, taken, why)
        return region


def starts(scope: Scope) -> Iterator[tuple[ir.Value, list[Nodes], list[Nodes]]]:
    """Values that several layers read: those that are built alike, in sets, and those that are like no other.

    Of values in the order in which they are first read; the graph may change in between.
    """
    read = [value for node in scope.graph for value in node.inputs if value is not None]
    for value in dict.fromkeys(read):
        if is_constant(value):
            continue
        classes: dict[Hashable, list[ir.Node]] = {}
        for node, port in value.uses():
            layer = node.op_type in LAYERS and not node.domain and len(node.inputs) > 1
            if node.graph is scope.graph and layer and port == 0:
                classes.setdefault(likeness(node, 0, scope.version), []).append(node)
        if sum(map(len, classes.values())) > 1:
            sets = [tuple(nodes) for nodes in classes.values()]
            yield value, [nodes for nodes in sets if len(nodes) > 1], [nodes for nodes in sets if len(nodes) == 1]


def quantized(scope: Scope) -> Iterator[tuple[ir.Value, int]]:
    """Values that several QuantizeLinear read: branches on integers begin there."""
    read = [node.inputs[0] for node in scope.graph if node.op_type in _QUANTIZERS and node.inputs]
    counts = Counter(value for value in read if value is not None)
    yield from ((value, count) for value, count in counts.items() if count > 1)


def unhandled(scope: Scope) -> Iterator[tuple[ir.Value, str, int]]:
    """Values that several layers of a kind read for which there is no rule: the value, the kind and their number."""
    counts: Counter[tuple[ir.Value, str]] = Counter()
    for node in scope.graph:
        first, second = (*node.inputs, None, None)[:2]
        if node.domain:
            continue
        if node.op_type in _APART and first is not None and not is_constant(first) and is_constant(second):
            counts[first, node.op_type] += 1
        if node.op_type in ("MatMul", "Gemm") and is_constant(first) and second is not None and not is_constant(second):
            counts[second, f"{node.op_type} with the weight on the left"] += 1
    yield from ((value, kind, count) for (value, kind), count in counts.items() if count > 1)


def _matching(values: Stack, scope: Scope, taken: set[ir.Node]) -> Iterator[Nodes]:
    """Sets of nodes, one of each branch, that read the values and are built alike."""
    readers: list[dict[Hashable, list[ir.Node]]] = []
    for value in values:
        found: dict[Hashable, list[ir.Node]] = {}
        for node, port in value.uses():
            if node.graph is scope.graph and node not in taken:
                found.setdefault(likeness(node, port, scope.version), []).append(node)
        readers.append(found)
    for key, first in readers[0].items():
        others = [found.get(key, []) for found in readers[1:]]
        for nodes in zip(first, *others, strict=False):
            if len(set(nodes)) == len(values) and taken.isdisjoint(nodes):
                yield nodes


def _ends(
    stack: Stack, scope: Scope, taken: set[ir.Node], why: dict[ir.Node, str]
) -> Iterator[tuple[ir.Node | ir.Value, str]]:
    """Why a stack goes no further."""
    readers = [[node for node, _ in value.uses() if node not in taken] for value in stack]
    told = {node: why[node] for node in readers[0] if node in why}
    yield from told.items()
    kinds = [sorted(node.op_type for node in nodes) for nodes in readers]
    if told or not any(kinds):
        return
    if any(node.graph is not scope.graph for nodes in readers for node in nodes):
        yield stack[0], "read in a body, for which the branches are split"
        return
    for place, other in enumerate(readers[1:], 1):
        if kinds[place] != kinds[0]:
            sides = [" and ".join(dict.fromkeys(kind)) or "nothing" for kind in (kinds[0], kinds[place])]
            yield (
                stack[0],
                f"the branches go on differently: it is read by {sides[0]}, '{_of(stack[place])}' by {sides[1]}",
            )
            return
        for one, two in zip(readers[0], other, strict=True):
            if one is not two and (found := difference(one, two, scope.version)):
                yield one, found
                return
    return


def _of(value: ir.Value) -> str:
    return printable(value.name or "")


# How nodes are built --------------------------------------------------------------------------------------------------


def name(node: ir.Node) -> str:
    return printable(node.name or next((value.name for value in node.outputs if value.name), "") or node.op_type)


def attributes(node: ir.Node, version: int) -> dict[str, object]:
    """The plain attributes of a node, with its operator's defaults for what it does not set."""
    found: dict[str, object] = {}
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        for key, attribute in schema.attributes.items():
            if attribute.default_value.type:
                found[key] = ir.serde.deserialize_attribute(attribute.default_value).value
    except (onnx.defs.SchemaError, TypeError):
        pass
    found |= {key: attribute.value for key, attribute in node.attributes.items()}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def likeness(node: ir.Node, port: int, version: int) -> Hashable:
    """Equal for nodes that do the same with what they read at ``port``, if their constants may differ."""
    if any(one.is_ref() or one.type in _WHERE_BODIES for one in node.attributes.values()):
        return node
    plain = tuple(sorted((key, repr(value)) for key, value in attributes(node, version).items()))
    kinds = _kinds(node)
    side = None if operator(node).commutative and kinds == kinds[::-1] else port
    return node.domain, node.op_type, side, plain, kinds, tuple(bool(value.name) for value in node.outputs)


def difference(one: ir.Node, two: ir.Node, version: int) -> str | None:
    """In what two nodes of one operator are not alike."""
    mine, theirs = attributes(one, version), attributes(two, version)
    for key in sorted({*mine, *theirs}):
        if repr(mine.get(key)) != repr(theirs.get(key)):
            sides = f"{_short(mine.get(key))}, and of '{name(two)}' {_short(theirs.get(key))}"
            return f"unlike its counterpart: its {printable(key)} is {sides}"
    kinds = itertools.zip_longest(_kinds(one), _kinds(two), fillvalue=_NOTHING)
    for port, (a, b) in enumerate(kinds):
        if a != b:
            more = hint([*one.inputs[port : port + 1], *two.inputs[port : port + 1]])
            return f"unlike its counterpart: as input {port} it reads {a}, and '{name(two)}' {b}{more}"
    return None


def _kinds(node: ir.Node) -> tuple[str, ...]:
    """Of each input; what is left out at the end is as what is not there."""
    kinds = list(map(_kind, node.inputs))
    while kinds and kinds[-1] == _NOTHING:
        kinds.pop()
    return tuple(kinds)


def _kind(value: ir.Value | None) -> str:
    """Type and shape of a constant, in words; that there is nothing is something else than what is computed."""
    if value is None:
        return _NOTHING
    tensor = constant_tensor(value)
    return _COMPUTED if tensor is None else f"{dtype_name(tensor.dtype)} [{', '.join(map(str, tensor.shape.numpy()))}]"


def hint(values: Sequence[ir.Value | None]) -> str:
    """For the end of a reason: what would help where one of the values is computed, and of constants only."""
    helps = any(value is not None and not is_constant(value) and _of_constants(value) for value in values)
    return "; it depends on constants only, so fold-constants before this pass would help" if helps else ""


def _of_constants(value: ir.Value) -> bool:
    """False where that takes more than 64 steps to find out."""
    waiting: list[ir.Value | None] = [value]
    for _ in range(64):
        if not waiting:
            return True
        value_or_none = waiting.pop()
        if value_or_none is None or is_constant(value_or_none):
            continue
        node = value_or_none.producer()
        if node is None or node.domain or is_random(node) or node.op_type == "DequantizeLinear":
            return False
        if any(attribute.type in _WHERE_BODIES for attribute in node.attributes.values()):
            return False
        waiting.extend(node.inputs)
    return False


def _short(value: object) -> str:
    text = "not set" if value is None else str(value)
    return printable(text if len(text) <= 40 else text[:37] + "...")


# Sizes ----------------------------------------------------------------------------------------------------------------


def rank(value: ir.Value) -> int:
    """Raises ``Unlike`` where it is not known, or below 2."""
    found = dims(value)
    if found is None or len(found) < 2:
        raise Unlike("it has no batch and channels of known number" if found is not None else "its shape is unknown")
    if 0 in found:
        raise Unlike("it has no elements")
    return len(found)


def channels(value: ir.Value) -> int:
    """The size of axis 1. Raises ``Unlike`` where it is not known."""
    rank(value)
    found = (dims(value) or ())[1]
    if not isinstance(found, int):
        raise Unlike("its number of channels is unknown")
    return found


def sizes(value: ir.Value, unknown: int = 1) -> tuple[int, ...]:
    """With ``unknown`` for what is not known."""
    return tuple(size if isinstance(size, int) and size > 0 else unknown for size in dims(value) or ())
