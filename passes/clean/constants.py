"""Computing ahead what never changes, as long as the file does not grow by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.constants import Array, constant_node, constant_tensor, is_constant, new_constant
from ...ir.dimensions import Dimensions
from ...ir.match import Replacement, rule
from ...ir.ops import operator
from ...ir.packing.decoded import GROWTH, packed_nodes
from ...ir.references import inherit, is_named, replace_all_uses
from ...ir.scopes import Scope, scopes
from ...ir.shapes import Dims, infer_shapes, inferred, static_dims
from ...ir.sparse import stored_bytes
from ...ir.storage import LARGE, Read, StreamedTensor
from ...ir.unused import discard
from ...ir.versions import RUNNABLE
from ..base import Context, Effect, Pass, register
from ..rewrite import Tape, rewrite
from .identities import remove_identities

_LIMIT = 16 << 20  # bytes of any value in what is folded
_AT_ONCE = 16 << 20  # bytes of constants and results of what is computed in one model
_NEVER = ("Constant", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "OptionalHasElement")
_PLAIN = {
    *(ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL),
    *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
    *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
}


@register("fold-constants")
class FoldConstants(Pass):
    """Compute ahead what depends on constants and known shapes only.

    A part of the graph folds only if its results are no larger than the constants that die with it, plus 1 KiB, and
    nothing in it is over 16 MiB; sizes are known before anything is computed. So packed and quantized weights stay
    packed; what decodes a packed weight stays whole. Loop, Scan, If, random operators and Q/DQ are never folded. Also
    writes the target of a Reshape that is computed from the shape of its data as a constant with zeros, which copy. An
    operator that does nothing once another has folded goes too, as by remove-identities.
    """

    def effect(self) -> Effect:
        """Rounding: what computes ahead may be another kernel than what would have run."""
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Folds, lets shapes follow and what does nothing now go, and folds again until nothing more does."""
        changed, skipped, told = True, dict[ir.Node, tuple[str, str]](), len(ctx.ledger.skips)
        while changed:
            skipped.clear()
            del ctx.ledger.skips[told:]
            cast = rewrite(model, [cast_like_a_known_type], ctx)  # each round knows more types
            packed = packed_nodes(model)
            every = list(scopes(model))
            changed = cast + sum(_Folder(model, scope, ctx, skipped, packed).run() for scope in every) > 0
            if changed:
                infer_shapes(model)
                remove_identities(model, ctx)
        for address, reason in skipped.values():
            ctx.skip(address, reason)


@rule("node @ CastLike(x, like)")
def cast_like_a_known_type(tape: Tape, node: ir.Node, x: ir.Value, like: ir.Value) -> Replacement:
    """As a Cast it depends on one value only, which may be a constant."""
    if like.dtype is None:
        return None
    attributes: dict[str, Any] = {**node.attributes, "to": int(like.dtype)}
    return tape.op("", "Cast", x, **attributes)  # type: ignore[no-any-return]


@dataclass
class _Part:
    """Nodes that fold together, in graph order, with the values that something outside reads."""

    nodes: list[ir.Node]
    results: list[ir.Value]


class _Folder:
    """The folding of one graph."""

    def __init__(
        self,
        model: ir.Model,
        scope: Scope,
        ctx: Context,
        skipped: dict[ir.Node, tuple[str, str]],
        packed: set[ir.Node],
    ) -> None:
        self.model = model
        self.scope = scope
        self.ctx = ctx
        self.skipped = skipped
        self.packed = packed
        self.dimensions = Dimensions(model, scope)
        self.sizes: dict[ir.Value, int] = {}  # bytes of what shapes and region inference tell
        self.unsized: dict[ir.Value, str] = {}  # why a value has no such size

    def run(self) -> bool:
        """Whether anything was folded."""
        changed = self.reshapes()
        nodes = self.candidates()
        if not nodes:
            return changed
        self.measure(nodes)
        parts = [part for nodes in _components(nodes) for part in self.shrunk(nodes)]
        for batch in self.batches(parts):
            for part, arrays in self.evaluated(batch):
                self.replace(part, arrays)
                changed = True
        return changed

    def skip(self, node: ir.Node, reason: str) -> None:
        self.skipped.setdefault(node, (self.scope.address(node), f"not folded: {reason}"))

    def candidates(self) -> dict[ir.Node, None]:
        """The nodes whose outputs never change, in graph order."""
        constant: set[ir.Value] = set()
        found: dict[ir.Node, None] = {}
        for node in self.scope.graph:
            known = self.dimensions.known(node)
            if known is None and not self.is_foldable(node, constant):
                continue
            found[node] = None
            constant.update(node.outputs)
        return found

    def is_foldable(self, node: ir.Node, constant: set[ir.Value]) -> bool:
        inputs = [value for value in node.inputs if value is not None]
        if not inputs or node.domain or node.op_type in _NEVER or node in self.packed:
            return False
        for value in inputs:
            if value not in constant and not is_constant(value):
                return False
        about = operator(node)
        if not about.known or about.control or about.random or node.op_identifier() in self.model.functions:
            return False
        if node.device_configurations:
            self.skip(node, "it is assigned to devices")
            return False
        if node.op_type == "Dropout" or any(attribute.is_ref() for attribute in node.attributes.values()):
            return False
        if any(map(_is_text, inputs)):
            self.skip(node, "string is not computed ahead")
            return False
        return True

    def measure(self, nodes: Iterable[ir.Node]) -> None:
        """Bytes of every output, from the shapes on the values, or else from inference on these nodes alone."""
        outputs = [value for node in nodes for value in node.outputs]
        for value in outputs:
            self.note(value, value.type, static_dims(value))
        if any(value not in self.sizes for value in outputs):
            region, originals = self.region(list(nodes), outputs)
            for copy, found in inferred(region).items():
                if copy in originals:
                    self.note(originals[copy], found.type, found.dims)

    def note(self, value: ir.Value, type_: ir.TypeProtocol | None, sizes: Dims | None) -> None:
        if not isinstance(type_, ir.TensorType):
            if type_ is not None:
                self.unsized[value] = "a sequence or optional"
        elif type_.dtype not in _PLAIN:
            self.unsized[value] = f"{type_.dtype.name.lower()} is not computed ahead"
        elif sizes is not None:
            numbers = [size for size in sizes if isinstance(size, int)]
            if len(numbers) == len(sizes):
                self.sizes[value] = math.prod(numbers) * type_.dtype.bitwidth // 8

    def shrunk(self, nodes: dict[ir.Node, None]) -> Iterator[_Part]:
        """The largest parts of one connected component that may fold: what makes it too large is peeled off."""
        waiting = [nodes]
        while waiting:
            nodes = waiting.pop()
            results = [value for node in nodes for value in node.outputs if _is_read_outside(value, nodes)]
            peeled, why = self.obstacle(nodes, results)
            if peeled is None:
                yield _Part(list(nodes), results)
                continue
            self.skip(peeled, why)
            left = _without(nodes, peeled)
            waiting += list(_components(left))

    def obstacle(self, nodes: dict[ir.Node, None], results: list[ir.Value]) -> tuple[ir.Node | None, str]:
        """The node that must not fold with the others, and why; None where all may."""
        for node in nodes:
            inputs = node.inputs if self.dimensions.known(node) is None else ()  # only their shape is read
            for value in chain(node.outputs, inputs):
                size = 0 if value is None or value.name == "" else self.bytes(value, nodes)
                if value is not None and size is None:
                    return node, self.unsized.get(value, "its size is not known before it is computed")
                if size is not None and size > _LIMIT:
                    return node, "over 16 MiB"
        growth = sum(self.sizes[value] for value in results) - self.dying(nodes)
        if growth > GROWTH:
            largest = max(results, key=lambda value: self.sizes[value])
            return largest.producer(), "the result is larger than the constants that it is made of"
        return None, ""

    def bytes(self, value: ir.Value, nodes: dict[ir.Node, None]) -> int | None:
        if value.producer() in nodes:
            return self.sizes.get(value)
        tensor = constant_tensor(value)
        return tensor.nbytes if tensor is not None else 0

    def dying(self, nodes: dict[ir.Node, None]) -> int:
        """Bytes in the file of the constants that nothing else uses."""
        constants = {value: None for node in nodes for value in node.inputs if value is not None and is_constant(value)}
        total = 0
        for value in constants:
            if not value.is_graph_output() and all(node in nodes for node, _ in value.uses()):
                tensor = constant_tensor(value)
                total += 0 if tensor is None else stored_bytes(tensor)
        return total

    def batches(self, parts: list[_Part]) -> Iterator[list[_Part]]:
        """The parts in order, as many at once as take little memory."""
        batch, held = list[_Part](), 0
        for part in parts:
            values = {
                value: None for node in part.nodes for value in (*node.inputs, *node.outputs) if value is not None
            }
            nodes = dict.fromkeys(part.nodes)
            size = sum(self.bytes(value, nodes) or 0 for value in values)
            if batch and held + size > _AT_ONCE:
                yield batch
                batch, held = [], 0
            batch.append(part)
            held += size
        if batch:
            yield batch

    def evaluated(self, parts: list[_Part]) -> Iterator[tuple[_Part, list[Array]]]:
        """The parts in one model, or, where that fails, one by one."""
        try:
            yield from self.evaluate(parts)
            return
        except Exception as error:
            if len(parts) == 1:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self.skip(parts[0].nodes[0], f"computing it failed: {reason}")
                return
        for part in parts:
            yield from self.evaluated([part])

    def evaluate(self, parts: list[_Part]) -> list[tuple[_Part, list[Array]]]:
        known = {value: array for part in parts for value, array in self.from_shapes(part)}
        results = [value for part in parts for value in part.results if value not in known]
        if results:
            region, originals = self.region([node for part in parts for node in part.nodes], results)
            outputs = _run(region, self.ctx)
            known |= {originals[value]: outputs[value.name or ""] for value in region.graph.outputs}
        for value in results:
            if known[value].nbytes != self.sizes[value]:
                raise ValueError(f"{value.name} has not the size that its shape says")
        return [(part, [known[value] for value in part.results]) for part in parts]

    def from_shapes(self, part: _Part) -> Iterator[tuple[ir.Value, Array]]:
        for node in part.nodes:
            array = self.dimensions.known(node)
            if array is not None:
                yield node.outputs[0], array

    def region(self, nodes: list[ir.Node], results: list[ir.Value]) -> tuple[ir.Model, dict[ir.Value, ir.Value]]:
        """A model that computes ``results``, and the original of each of its values.

        Its inputs are the large constants, each the ``const_value`` of its input: so they need not be copied to run it.
        """
        copies: dict[ir.Value, ir.Value] = {}
        inputs: list[ir.Value] = []
        initializers: list[ir.Value] = []
        made = []

        def constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
            copy = ir.Value(
                name=f"v{len(copies)}",
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=_renamed(tensor, f"v{len(copies)}"),
            )
            copies[value] = copy
            (inputs if tensor.nbytes >= LARGE and tensor.dtype in _PLAIN else initializers).append(copy)

        for node in nodes:
            array = self.dimensions.known(node)
            if array is not None:
                constant(node.outputs[0], ir.Tensor(array))
                continue
            for value in node.inputs:
                tensor = constant_tensor(value)
                if value is not None and value not in copies and tensor is not None:
                    constant(value, tensor)
            outputs = []
            for value in node.outputs:
                copies[value] = ir.Value(name=f"v{len(copies)}" if value.name != "" else "")
                copies[value].type, copies[value].shape = value.type, value.shape
                outputs.append(copies[value])
            operands = [None if value is None else copies[value] for value in node.inputs]
            made.append(ir.Node("", node.op_type, operands, node.attributes, outputs=outputs))
        wanted = [copies[value] for value in dict.fromkeys(results) if copies[value].producer() is not None]
        graph = ir.Graph(
            inputs,
            wanted,
            nodes=made,
            initializers=initializers,
            opset_imports=dict(self.scope.opset),
            name="constants",
        )
        region = ir.Model(graph, ir_version=min(self.model.ir_version or 8, RUNNABLE))
        return region, {copy: value for value, copy in copies.items()}

    def replace(self, part: _Part, arrays: list[Array]) -> None:
        """Results become initializers under their names; an output of the graph comes from a Constant node."""
        graph = self.scope.graph
        last = part.nodes[-1]
        held = [self.held(part, value, array) for value, array in zip(part.results, arrays, strict=True)]
        for value, tensor in zip(part.results, held, strict=True):
            name = value.name or ""
            is_output = value.is_graph_output()
            new, node = constant_node(tensor, name) if is_output else new_constant(self.scope, tensor, name)
            producer = value.producer()
            assert producer is not None
            if node is not None:
                node.name = producer.name
                graph.insert_before(producer, node)
            value.name = None
            inherit(value, new)
            replace_all_uses(value, new)
            value.replace_all_uses_with(new, replace_graph_outputs=True)
            if node is None:
                graph.register_initializer(new)
        self.ctx.change(
            self.scope.address(last),
            "computed ahead",
            nodes=len(part.nodes),
            bytes=sum(array.nbytes for array in arrays),
        )
        discard(value for node in part.nodes for value in node.outputs)

    def held(self, part: _Part, value: ir.Value, array: Array) -> ir.TensorProtocol:
        """A result as a tensor; a large one is computed anew when it is read, for many would take all memory."""
        if array.nbytes < LARGE:
            return ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=value.name)
        region, _ = self.region(part.nodes, [value])
        (output,), ctx = region.graph.outputs, self.ctx

        def open() -> Read:
            flat = _run(region, ctx)[output.name or ""].reshape(-1)
            return lambda start, stop: flat[start:stop]

        kind = ir.DataType.from_numpy(array.dtype)
        return StreamedTensor(open, kind, ir.Shape(array.shape), name=value.name, provenance="lazy: fold-constants")

    def reshapes(self) -> bool:
        """Reshape targets that copy dimensions of the data, written as zeros."""
        changed = False
        for node in list(self.scope.graph):
            if node.op_type != "Reshape" or node.domain or node.attributes.get("allowzero") or self.scope.version < 5:
                continue
            target = self.dimensions.reshape_target(node)
            if target is None:
                continue
            old = node.inputs[1]
            assert old is not None
            name = self.dimensions.names.fresh(f"{node.name or node.op_type}_shape")
            new, made = new_constant(self.scope, ir.Tensor(np.array(target, np.int64), name=name), name)
            if made is None:
                self.scope.graph.register_initializer(new)
            else:
                self.scope.graph.insert_before(node, made)
            node.replace_input_with(1, new)
            discard([old])
            self.ctx.change(self.scope.address(node), "its target shape is a constant now")
            changed = True
        return changed


def _components(nodes: dict[ir.Node, None]) -> Iterator[dict[ir.Node, None]]:
    """Nodes joined by values that one of them makes, each in graph order; constants do not join."""
    leader: dict[ir.Node, ir.Node] = {}

    def find(node: ir.Node) -> ir.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in nodes:
        leader[node] = node
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            if maker is not None and maker in leader:
                leader[find(node)] = find(maker)
    found: dict[ir.Node, dict[ir.Node, None]] = {}
    for node in nodes:
        found.setdefault(find(node), {})[node] = None
    yield from found.values()


def _without(nodes: dict[ir.Node, None], peeled: ir.Node) -> dict[ir.Node, None]:
    """``nodes`` without one of them and all that depend on it."""
    gone = {peeled}
    for node in nodes:
        if any(value is not None and value.producer() in gone for value in node.inputs):
            gone.add(node)
    return {node: None for node in nodes if node not in gone}


def _is_text(value: ir.Value) -> bool:
    """Whether ``value`` is a constant of strings."""
    tensor = constant_tensor(value)
    return is_constant(value) if tensor is None else tensor.dtype == ir.DataType.STRING


def _is_read_outside(value: ir.Value, nodes: dict[ir.Node, None]) -> bool:
    return value.is_graph_output() or is_named(value) or any(node not in nodes for node, _ in value.uses())


def _renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The same data under another name; tensors are shared, so theirs must not change."""
    return ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=name)


def _run(region: ir.Model, ctx: Context) -> dict[str, Array]:
    """The outputs of a region, by the runner where there is one, else by ONNX's reference."""
    feed = {
        value.name or "": value.const_value.numpy() for value in region.graph.inputs if value.const_value is not None
    }
    if ctx.has("runner"):
        return dict(next(iter(ctx.runner.run(region, [feed], level="off"))))
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(ir.to_proto(region))
    with np.errstate(all="ignore"):
        arrays = evaluator.run(None, feed)
    return {
        value.name or "": np.asarray(array, value.dtype.numpy() if value.dtype is not None else None)
        for value, array in zip(region.graph.outputs, arrays, strict=True)
    }
