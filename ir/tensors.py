"""Every tensor of a model and the place that holds it: an initializer or a node's attribute, in any graph."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from .address import graphs
from .interrupts import uninterrupted


class StoredTensor(ir.TensorProtoTensor):
    """A tensor of a model file that works out type, shape and size once: passes ask for them over and over.

    ``shape`` is the one to hold, where there is one that says the same.
    """

    __slots__ = ("dtype", "nbytes", "shape", "size")

    def __init__(self, proto: onnx.TensorProto, shape: ir.Shape | None = None) -> None:
        super().__init__(proto)
        self.dtype = ir.DataType(proto.data_type)  # type: ignore[misc]
        self.shape = ir.Shape(proto.dims, frozen=True) if shape is None else shape  # type: ignore[misc]
        self.size = math.prod(proto.dims)  # type: ignore[misc]
        self.nbytes = math.ceil(self.dtype.itemsize * self.size)  # type: ignore[misc]


@dataclass(frozen=True)
class Holder:
    """A place for one tensor: an initializer's value, or a node's attribute (``index``: in a list of tensors)."""

    graph: ir.Graph
    owner: ir.Value | ir.Node
    attribute: str = ""
    index: int = -1

    def put(self, tensor: ir.TensorProtocol) -> None:
        """Hold ``tensor`` from now on. An attribute is replaced by a new one of the same name, type and doc string."""
        if isinstance(self.owner, ir.Value):
            self.owner.const_value = tensor
            return
        old = self.owner.attributes[self.attribute]
        value = tensor if self.index < 0 else [*old.value[: self.index], tensor, *old.value[self.index + 1 :]]
        self.owner.attributes[self.attribute] = ir.Attr(old.name, old.type, value, doc_string=old.doc_string)

    def restorer(self) -> Callable[[], None]:
        """Puts back what is held now, the very same object."""
        owner = self.owner
        if isinstance(owner, ir.Value):
            return functools.partial(setattr, owner, "const_value", owner.const_value)
        return functools.partial(owner.attributes.__setitem__, self.attribute, owner.attributes[self.attribute])


def tensors(model: ir.Model) -> Iterator[tuple[Holder, ir.TensorProtocol]]:
    """In file order: a graph's initializers, then its nodes' attributes, then the bodies in it; functions last."""
    for _, graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield Holder(graph, value), value.const_value
        for node in graph:
            if node.attributes.data:
                yield from held(graph, node)


def held(graph: ir.Graph, node: ir.Node) -> Iterator[tuple[Holder, ir.TensorProtocol]]:
    """The tensors in the attributes of one node of ``graph``."""
    for name, attribute in list(node.attributes.data.items()):
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
            yield Holder(graph, node, name), attribute.value
        elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
            yield from ((Holder(graph, node, name, index), tensor) for index, tensor in enumerate(attribute.value))


def is_external(tensor: ir.TensorProtocol) -> bool:
    """``isinstance(tensor, ir.ExternalTensor)``, asked once a class: the protocol behind it makes that slow."""
    return _is_external(type(tensor))


@functools.cache
def _is_external(kind: type) -> bool:
    return issubclass(kind, ir.ExternalTensor)


@contextlib.contextmanager
def standing_in(pairs: Iterable[tuple[Holder, ir.TensorProtocol]]) -> Iterator[None]:
    """Let other tensors take the holders' places for the length of the block; the very same objects come back after.

    The block is short: an interrupt waits for its end.
    """
    undo: list[Callable[[], None]] = []
    with uninterrupted():
        try:
            for holder, tensor in pairs:
                undo.append(holder.restorer())
                holder.put(tensor)
            yield
        finally:
            for restore in reversed(undo):
                restore()
