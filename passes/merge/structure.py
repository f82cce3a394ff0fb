"""Models of one architecture, matched by what their graphs compute and not by what anything is called.

Both graphs are walked in parallel, from their outputs back. What reads what has to agree, with operators, attributes,
shapes and element types; names may all differ, and so may whether a constant is an initializer or a Constant node.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import onnx.defs
import onnx_ir as ir

from ...ir.address import graphs, printable
from ...ir.constants import constant_tensor
from ...ir.errors import UsageError
from ...ir.join import Member
from ...ir.shapes import dims
from ...ir.storage import blocks
from ...ir.unify import described, dtype_name, unlike_types

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_ENDS = -1  # the order of what is about inputs and outputs: before all nodes
_COMMUTATIVE = frozenset(("Add", "Mul", "And", "Or", "Xor", "Equal"))


def counterparts(first: Member, other: Member) -> dict[ir.Value, ir.Value]:
    """For each constant that ``first`` reads, the one of ``other`` in its place.

    Constants may differ in content only where they are floats. Raises ``UsageError`` with the first difference, in the
    order of the nodes of ``first``; it names both sides.
    """
    walk = _Walk(first, other)
    walk.run()
    if walk.found:
        _, sentence = min(walk.found, key=lambda pair: pair[0])
        raise UsageError(f"soup needs models of one architecture, and {other} is not built as {first} is: {sentence}.")
    return walk.constants


def stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant; of an initializer that a caller may override, its default."""
    tensor = constant_tensor(value)
    return value.const_value if tensor is None and value.is_initializer() else tensor


def equal(one: ir.TensorProtocol, two: ir.TensorProtocol) -> bool:
    """Whether two tensors of equal type and shape hold the same bits."""
    if one is two:
        return True
    if one.dtype == ir.DataType.STRING:
        return bool(np.array_equal(one.numpy(), two.numpy()))
    return all(a.tobytes() == b.tobytes() for a, b in zip(blocks(one), blocks(two), strict=True))


class _Walk:
    """Pairs of values to compare, and those that were; differences with the order of the node where they are."""

    def __init__(self, first: Member, other: Member) -> None:
        self.first, self.other = first, other
        self.order = {node: place for place, node in enumerate(_nodes(first.model))}
        self.pairs: dict[ir.Value, ir.Value] = {}
        self.back: dict[ir.Value, ir.Value] = {}
        self.constants: dict[ir.Value, ir.Value] = {}
        self.found: list[tuple[int, str]] = []
        self.todo: list[tuple[ir.Value | None, ir.Value | None, ir.Node | None]] = []
        self.functions: set[Hashable] = set()

    def run(self) -> None:
        self._graph(self.first.model.graph, self.other.model.graph, None)
        while self.todo:
            self._value(*self.todo.pop())

    def _differ(self, node: ir.Node | None, sentence: str) -> None:
        self.found.append((_ENDS if node is None else self.order[node], sentence))

    def _graph(self, one: ir.Graph, two: ir.Graph, node: ir.Node | None) -> None:
        """Inputs are paired by place, and outputs are to be compared so."""
        where = "" if node is None else f" in a body of {_called(node)}"
        inputs = [[value for value in graph.inputs if not value.is_initializer()] for graph in (one, two)]
        for what, mine, theirs in (("inputs", *inputs), ("outputs", list(one.outputs), list(two.outputs))):
            if len(mine) != len(theirs):
                sides = f"{len(mine)} in {self.first}, and {len(theirs)} in {self.other}"
                self._differ(node, f"the number of {what}{where}: {sides}")
        for a, b in zip(*inputs, strict=False):
            self._pair(a, b)
            if unlike_types(a.type, b.type) or _unlike_shapes(a, b):
                self._differ(
                    node,
                    f"shape: the input '{printable(a.name or '')}' of {self.first}{where} is {described(a)}, and "
                    f"'{printable(b.name or '')}' of {self.other} {described(b)}",
                )
        self.todo += [(a, b, node) for a, b in zip(one.outputs, two.outputs, strict=False)]

    def _pair(self, one: ir.Value, two: ir.Value) -> None:
        self.pairs[one], self.back[two] = two, one

    def _value(self, one: ir.Value | None, two: ir.Value | None, reader: ir.Node | None) -> None:
        """Compare what a node reads, or a graph gives, at one place."""
        if one is None or two is None:
            if one is not two:
                lacks, has = (self.first, self.other) if one is None else (self.other, self.first)
                self._differ(reader, f"connection: {_read(reader)} an input in {has} that it lacks in {lacks}")
            return
        tensors = stored(one), stored(two)
        if tensors[0] is not None and tensors[1] is not None:
            self._constant(one, two, reader)
            return
        known = self.pairs.get(one), self.back.get(two)
        if known == (two, one):
            return
        made = one.producer(), two.producer()
        if known != (None, None) or None in made or tensors != (None, None) or one.index() != two.index():
            self._differ(
                reader,
                f"connection: {_read(reader)} {_origin(one, tensors[0])} in {self.first}, and in {self.other} "
                f"{_origin(two, tensors[1])}",
            )
            return
        assert made[0] is not None
        assert made[1] is not None
        self._node(made[0], made[1])

    def _constant(self, one: ir.Value, two: ir.Value, reader: ir.Node | None) -> None:
        mine, theirs = stored(one), stored(two)
        assert mine is not None
        assert theirs is not None
        sides = (
            f"'{printable(one.name or '')}' {_described(mine)} in {self.first}, and '{printable(two.name or '')}' "
            f"{_described(theirs)} in {self.other}"
        )
        if mine.dtype != theirs.dtype or tuple(mine.shape.numpy()) != tuple(theirs.shape.numpy()):
            self._differ(reader, f"shape: {_read(reader)} {sides}")
            return
        known = self.constants.get(one)
        if known is two:
            return
        if known is not None:
            if not equal(stored(known) or theirs, theirs):
                again = f"'{printable(known.name or '')}' and '{printable(two.name or '')}'"
                self._differ(
                    reader,
                    f"connection: one constant, '{printable(one.name or '')}', stands in {self.first} where {again}, "
                    f"which are not equal, stand in {self.other}",
                )
            return
        self.constants[one] = two
        quantized = reader is not None and _is_quantized(reader.op_type)
        if (quantized or not mine.dtype.is_floating_point()) and not equal(mine, theirs):
            if quantized:
                raise UsageError(
                    f"soup averages floats, and {_read(reader)} quantized numbers that differ: {sides}. "
                    "Bring all models to float first, with the pass dequantize."
                )
            narrow = mine.dtype.bitwidth <= 8 and mine.dtype.is_integer()
            remedy = "; if they are quantized, bring all models to float first, with the pass dequantize"
            self._differ(
                reader,
                f"constant: {_read(reader)} {sides}; they differ, and only floats are averaged{remedy * narrow}",
            )

    def _node(self, one: ir.Node, two: ir.Node) -> None:
        for a, b in zip(one.outputs, two.outputs, strict=False):
            self._pair(a, b)
        functions = [
            member.model.functions.get(node.op_identifier()) for member, node in ((self.first, one), (self.other, two))
        ]
        if functions[0] is not None and functions[1] is not None:
            if (key := tuple(map(id, functions))) not in self.functions:
                self.functions.add(key)
                self._graph(functions[0].graph, functions[1].graph, one)
        elif functions != [None, None] or one.op_identifier() != two.op_identifier():
            self._differ(one, f"operator: {_called(one)} in {self.first}, and {_called(two)} in {self.other}")
            return
        self._attributes(one, two)
        mine, theirs = _inputs(one), _inputs(two)
        if len(mine) != len(theirs) or len(one.outputs) != len(two.outputs):
            counts = [f"{len(ins)} and {len(node.outputs)}" for ins, node in ((mine, one), (theirs, two))]
            sides = f"{counts[0]} in {self.first}, and {counts[1]} in {self.other}"
            self._differ(one, f"connection: the numbers of inputs and outputs of {_called(one)} are {sides}")
            return
        looks = [[_look(value) for value in values] for values in (mine, theirs)]
        if one.op_type in _COMMUTATIVE and not one.domain and looks[0] != looks[1] and looks[0] == looks[1][::-1]:
            theirs = theirs[::-1]
        self.todo += [(a, b, one) for a, b in zip(mine, theirs, strict=True)]

    def _attributes(self, one: ir.Node, two: ir.Node) -> None:
        for name in sorted({*one.attributes, *two.attributes}):
            mine, theirs = (_attribute(node, name) for node in (one, two))
            if mine is not None and theirs is not None and mine.type == theirs.type and mine.type in _GRAPHS:
                if mine.is_ref() or theirs.is_ref():
                    continue
                pairs = [[found.value] if found.type == _GRAPHS[0] else list(found.value) for found in (mine, theirs)]
                for body, twin in zip(*pairs, strict=False):
                    self._graph(body, twin, one)
            elif _plain(mine) != _plain(theirs):
                self._differ(
                    one,
                    f"attribute: {printable(name)} of {_called(one)} is {_shown(mine)} in {self.first}, and "
                    f"{_shown(theirs)} in {self.other}, of {_called(two)}",
                )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for _, graph in graphs(model):
        yield from graph


def _inputs(node: ir.Node) -> list[ir.Value | None]:
    """Without those that are left out at the end."""
    found = list(node.inputs)
    while found and found[-1] is None:
        found.pop()
    return found


def _look(value: ir.Value | None) -> Hashable:
    """What tells the operands of an addition apart at a glance: constants by shape, others by what makes them."""
    if value is None:
        return None
    if (tensor := stored(value)) is not None:
        return tuple(tensor.shape.numpy())
    node = value.producer()
    return "input" if node is None else node.op_identifier()


def _unlike_shapes(one: ir.Value, two: ir.Value) -> bool:
    mine, theirs = dims(one), dims(two)
    if mine is None or theirs is None:
        return False
    sizes = zip(mine, theirs, strict=False)
    return len(mine) != len(theirs) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)


def _attribute(node: ir.Node, name: str) -> ir.Attr | None:
    """The attribute, or what its operator takes for it where there is none."""
    if (found := node.attributes.get(name)) is not None:
        return found
    version = node.version or (node.graph.opset_imports.get(node.domain) if node.graph is not None else None)
    try:
        schema = onnx.defs.get_schema(node.op_type, version or onnx.defs.onnx_opset_version(), node.domain)
        default = schema.attributes[name].default_value
    except (onnx.defs.SchemaError, KeyError, TypeError):
        return None
    return ir.serde.deserialize_attribute(default) if default.type else None


def _plain(attribute: ir.Attr | None) -> Hashable:
    if attribute is None:
        return None
    if attribute.is_ref():
        return "ref", attribute.ref_attr_name
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return tensor.dtype, tuple(tensor.shape.numpy()), tensor.numpy().tobytes()
    return attribute.type.name, repr(attribute.value)


def _shown(attribute: ir.Attr | None) -> str:
    if attribute is None:
        return "not set"
    if attribute.is_ref():
        return f"set by the caller as {printable(attribute.ref_attr_name or '')}"
    if attribute.type in (ir.AttributeType.TENSOR, *_GRAPHS):
        return "another one"
    text = str(attribute.value)
    return printable(text if len(text) <= 60 else text[:57] + "...")


def _described(tensor: ir.TensorProtocol) -> str:
    return f"{dtype_name(tensor.dtype)} [{', '.join(map(str, tensor.shape.numpy()))}]"


def _called(node: ir.Node) -> str:
    name = node.name or next((value.name for value in node.outputs if value.name), "")
    return f"{printable(node.op_type)} '{printable(name or '')}'"


def _read(node: ir.Node | None) -> str:
    return "an output of the model is" if node is None else f"{_called(node)} reads"


def _origin(value: ir.Value, tensor: ir.TensorProtocol | None) -> str:
    name = printable(value.name or "")
    if tensor is not None:
        return f"the constant '{name}'"
    node = value.producer()
    return f"the input '{name}'" if node is None else f"'{name}', made by {_called(node)}"


def _is_quantized(op_type: str) -> bool:
    return op_type.startswith(("Q", "DynamicQ")) or any(word in op_type for word in ("uantize", "Integer", "NBits"))
