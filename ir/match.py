"""Patterns over a model, and rules: a pattern with the code that writes its replacement.

    @rule("Add(MatMul(x, w), b)")
    def matmul_add_to_gemm(tape, x, w, b):
        if w.shape is None or w.shape.rank() != 2:
            decline("the weight is no matrix")
        return tape.Gemm(x, w, b)

A pattern is a Python expression:

    Op(...)                     a node of that operator; ``com.microsoft.Gelu(x)`` for another domain
    x                           any value; the same name twice is the same value twice; a parameter of the function
    _                           anything, an omitted input too
    Op(x, *rest)                the remaining inputs, a tuple of values and ``None``; ``*_`` where they do not matter
    Op(x, axis=a, mode="edge")  binds an attribute's value, or tests it; an absent attribute has its schema's default
    conv @ Conv(x, w, *rest)    binds the node itself

Inputs that the pattern does not list must be absent. Commutative operators are tried both ways round. A nested node is
one in the same graph, whose outputs are used inside the match only and are no graph outputs, unless the rule says
``shared=True``: then it stays where something else uses it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import onnx_ir as ir

from .errors import UsageError
from .ops import OPERATORS

__all__ = ["Declined", "Match", "Pattern", "Rule", "attribute", "decline", "rule"]

Binding: TypeAlias = "ir.Value | ir.Node | tuple[ir.Value | None, ...] | Any"
Replacement: TypeAlias = "ir.Value | tuple[ir.Value | None, ...] | None"
_ABSENT = object()


class Declined(Exception):
    """A match that a rule turns down; the message says why."""


def decline(reason: str) -> NoReturn:
    """Turn a match down, with a reason for the ledger."""
    raise Declined(reason)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute; strings as ``str``. Declines where it refers to an attribute of the function."""
    found = node.attributes.get(name)
    if found is None:
        return default
    if found.is_ref():
        decline(f"{name} is set by the caller of the function")
    return found.value


@dataclass(frozen=True, slots=True)
class Pattern:
    """One operator of a pattern with everything below it."""

    domain: str
    op_type: str
    inputs: tuple[Pattern | str, ...] = ()  # a nested operator, a name, or "_"
    rest: str | None = None
    attributes: tuple[tuple[str, str | None, Any], ...] = ()  # name, the name to bind or None, the value to test
    node: str | None = None

    def names(self) -> Iterator[str]:
        """Every name it binds, in the order of the text; "_" too."""
        if self.node:
            yield self.node
        for item in self.inputs:
            yield from item.names() if isinstance(item, Pattern) else (item,)
        if self.rest:
            yield self.rest
        yield from (bound for _, bound, _ in self.attributes if bound)

    def depth(self) -> int:
        """How many operators lie on the longest way from the root to an input."""
        return 1 + max((item.depth() for item in self.inputs if isinstance(item, Pattern)), default=0)

    def nested(self) -> Iterator[tuple[int, str]]:
        """The inputs that are operators themselves, and of which type."""
        return ((place, item.op_type) for place, item in enumerate(self.inputs) if isinstance(item, Pattern))

    def variants(self) -> list[Pattern]:
        """This pattern with the two inputs of each commutative operator in both orders, distinct ones only."""
        below: list[list[Pattern | str]] = [
            [*item.variants()] if isinstance(item, Pattern) else [item] for item in self.inputs
        ]
        found = []
        for inputs in itertools.product(*below):
            found.append(self._with(inputs))
            if len(inputs) == 2 and self.rest is None and self._commutative() and inputs[0] != inputs[1]:
                found.append(self._with((inputs[1], inputs[0])))
        return list(dict.fromkeys(found))

    def _with(self, inputs: tuple[Pattern | str, ...]) -> Pattern:
        return Pattern(self.domain, self.op_type, inputs, self.rest, self.attributes, self.node)

    def _commutative(self) -> bool:
        known = OPERATORS.get((self.domain, self.op_type))
        return known is not None and known.commutative


@dataclass(slots=True)
class Match:
    """What a pattern found: the nodes, root first, and the value of each name."""

    nodes: list[ir.Node] = field(default_factory=list)
    names: dict[str, Binding] = field(default_factory=dict)

    def fits(self, pattern: Pattern, node: ir.Node, opset: Mapping[str, int], shared: bool) -> bool:
        """Whether ``pattern`` matches at ``node``; where it does not, this match is of no more use."""
        if not self._node(pattern, node, opset):
            return False
        return shared or all(map(self._only_here, self.nodes[1:]))

    def _node(self, pattern: Pattern, node: ir.Node, opset: Mapping[str, int]) -> bool:
        if node.op_type != pattern.op_type or node.domain != pattern.domain or node.overload:
            return False
        if pattern.node and not self._bind(pattern.node, node):
            return False
        self.nodes.append(node)
        inputs = node.inputs
        listed = len(pattern.inputs)
        for index, item in enumerate(pattern.inputs):
            value = inputs[index] if index < len(inputs) else None
            if isinstance(item, str):
                if item != "_" and (value is None or not self._bind(item, value)):
                    return False
            elif not self._nested(item, value, node, opset):
                return False
        if pattern.rest is None:
            if len(inputs) > listed and any(value is not None for value in inputs[listed:]):
                return False
        elif not self._bind(pattern.rest, tuple(inputs[listed:])):
            return False
        return not pattern.attributes or all(self._attribute(node, opset, *item) for item in pattern.attributes)

    def _nested(self, pattern: Pattern, value: ir.Value | None, user: ir.Node, opset: Mapping[str, int]) -> bool:
        producer = value.producer() if value is not None else None
        if producer is None or producer.graph is not user.graph or producer.outputs[0] is not value:
            return False
        return self._node(pattern, producer, opset)

    def _attribute(self, node: ir.Node, opset: Mapping[str, int], name: str, bound: str | None, wanted: Any) -> bool:
        found = node.attributes.get(name)
        if found is None:
            value = _default(node.domain, node.op_type, opset.get(node.domain, 0), name)
        elif found.is_ref():
            return False
        else:
            value = found.value
        return self._bind(bound, value) if bound else value == wanted

    def _bind(self, name: str, value: Binding) -> bool:
        if name == "_":
            return True
        known = self.names.get(name, _ABSENT)
        if known is _ABSENT:
            self.names[name] = value
            return True
        return known is value or (not isinstance(value, (ir.Value, ir.Node)) and known == value)

    def _only_here(self, node: ir.Node) -> bool:
        return all(
            not value.is_graph_output() and all(use.node in self.nodes for use in value.uses())
            for value in node.outputs
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern and the function that replaces what it matches.

    The function takes a ``Tape`` and what the names of the pattern stand for. It returns the value that replaces the
    root's output (a tuple for several; ``None`` in it for an output that nothing uses), or ``None`` to decline.
    """

    name: str  # in words, for the ledger
    text: str
    function: Callable[..., Replacement]
    shared: bool = False
    variants: tuple[tuple[Pattern, tuple[tuple[int, str], ...]], ...] = ()  # and the operators nested in it, by place

    @property
    def root(self) -> tuple[str, str]:
        """Domain and type of the operator at which the pattern begins."""
        return self.variants[0][0].domain, self.variants[0][0].op_type

    @property
    def depth(self) -> int:
        """How many operators deep the pattern is."""
        return self.variants[0][0].depth()

    def matches(self, node: ir.Node, opset: Mapping[str, int]) -> Iterator[Match]:
        """Every way in which the pattern matches at ``node``; ``opset`` gives the versions in force there."""
        for variant, nested in self.variants:
            if nested and not _begins(node, nested):
                continue
            match = Match()
            if match.fits(variant, node, opset, self.shared):
                yield match


def _begins(node: ir.Node, nested: tuple[tuple[int, str], ...]) -> bool:
    """Whether the inputs of ``node`` come from operators of these types: a quick no for most nodes."""
    inputs = node.inputs
    for place, op_type in nested:
        value = inputs[place] if place < len(inputs) else None
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != op_type:
            return False
    return True


def rule(text: str, *, shared: bool = False) -> Callable[[Callable[..., Replacement]], Rule]:
    """Make a function the replacement for a pattern; its name, in words, is the rule's.

    Raises ``UsageError`` for a pattern that cannot be read, or whose names are not the function's parameters.
    """

    def enter(function: Callable[..., Replacement]) -> Rule:
        pattern = parse(text)
        names = {name for name in pattern.names() if name != "_"}
        taken = list(inspect.signature(function).parameters)[1:]
        if names != set(taken):
            raise UsageError(
                f"The rule {function.__name__} takes ({', '.join(taken)}) after the tape, but its pattern {text} names "
                f"({', '.join(sorted(names))}); they must be the same."
            )
        words = function.__name__.strip("_").replace("_", " ")
        variants = tuple((variant, tuple(variant.nested())) for variant in pattern.variants())
        return Rule(words, text, function, shared, variants)

    return enter


def parse(text: str) -> Pattern:
    """The pattern that ``text`` says; raises ``UsageError`` where it is none."""
    try:
        pattern = _pattern(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"The pattern {text} cannot be read: {error}.") from None
    if not isinstance(pattern, Pattern):
        raise UsageError(f"The pattern {text} must begin with an operator.")
    return pattern


def _pattern(item: ast.expr) -> Pattern | str:
    if isinstance(item, ast.Name):
        return item.id
    if (
        isinstance(item, ast.BinOp)
        and isinstance(item.op, ast.MatMult)
        and isinstance(item.left, ast.Name)
        and isinstance(item.right, ast.Call)
    ):
        return _operator(item.right, item.left.id)
    if isinstance(item, ast.Call):
        return _operator(item, None)
    raise ValueError(f"'{ast.unparse(item)}' is neither a name nor an operator")


def _operator(call: ast.Call, node: str | None) -> Pattern:
    domain, _, op_type = ast.unparse(call.func).rpartition(".")
    rest, inputs = None, list(call.args)
    if inputs and isinstance(inputs[-1], ast.Starred):
        last = inputs.pop()
        rest = ast.unparse(last.value)  # type: ignore[attr-defined]
    attributes: list[tuple[str, str | None, Any]] = []
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("** has no meaning here")
        if isinstance(keyword.value, ast.Name):
            attributes.append((keyword.arg, keyword.value.id, None))
        else:
            value = ast.literal_eval(keyword.value)
            attributes.append((keyword.arg, None, tuple(value) if isinstance(value, list) else value))
    return Pattern(domain, op_type, tuple(map(_pattern, inputs)), rest, tuple(attributes), node)


@functools.cache
def _default(domain: str, op_type: str, version: int, name: str) -> Any:
    """The default of an attribute by the operator's schema; ``None`` where it has none."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, max_inclusive_version=version, domain=domain)
    except onnx.defs.SchemaError:
        return None
    formal = schema.attributes.get(name)
    if formal is None or not formal.default_value.name:
        return None
    return ir.serde.deserialize_attribute(formal.default_value).value
