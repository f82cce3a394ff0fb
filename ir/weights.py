"""Every constant of a model, wherever it lives, as one ``Weight`` with its uses.

    for weight in weights(model):
        if weight.prunable:
            weight.replace(smaller(weight.array()))

Initializers, Constant nodes, bodies of If, Loop and Scan, functions: all alike. A weight is followed forward from its
storage to the operators that compute with it, through Identity, Cast, Transpose, Reshape and their like,
QuantizeLinear and DequantizeLinear, into functions that are called with it and out of If branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import onnx_ir as ir

from .address import graphs
from .ops import Kind
from .quantization import NARROW, Quantization, count_zeros, magnitude_reader
from .sparse import SparseTensor, stored_bytes
from .storage import Array, MadeTensor, Read, distinct, entropy_bytes
from .trace import Tracer, Use, constant

__all__ = ["Quantization", "Use", "Weight", "constant", "weights"]

Place = Literal["initializer", "constant"]
Home = Literal["main", "body", "function"]


@dataclass(eq=False, slots=True)
class Weight:
    """One constant: its storage, where it lives, and what reads it.

    ``address`` is its name in the main graph, ``node/then/name`` in a body, ``domain::Function/name`` in a function.
    ``values`` has more than one entry where several names share one storage (the same tensor, or the same bytes of
    one file); the address is the first's. ``overridable``: the caller of the model may pass another tensor for it.
    ``output``: it leaves the model unchanged. It describes the model as it was when ``weights`` was called, except
    that ``tensor`` and what follows from it are read afresh.
    """

    address: str
    values: tuple[ir.Value, ...]
    place: Place
    home: Home
    uses: tuple[Use, ...]
    overridable: bool = False
    output: bool = False

    # What it is ---------------------------------------------------------------------------------------------------

    @property
    def value(self) -> ir.Value:
        return self.values[0]

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The storage as it is now."""
        tensor = _tensor(self.value)
        assert tensor is not None
        return tensor

    @property
    def dtype(self) -> ir.DataType:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    @property
    def size(self) -> int:
        return self.tensor.size

    @property
    def nbytes(self) -> int:
        """Bytes in the file; of a sparse one, of what it stores."""
        return stored_bytes(self.tensor)

    @property
    def tied(self) -> bool:
        """Whether more than one operator computes with it."""
        return len(self.uses) > 1

    @property
    def kind(self) -> Kind:
        """What it is to its readers. A matrix that is read otherwise too (an embedding tied to the output layer, say)
        is what the others read it as: changing it as a matrix would change it for them."""
        if self.output:
            return Kind.OUTPUT
        kinds = dict.fromkeys(use.kind for use in self.uses)
        return next((kind for kind in kinds if kind is not Kind.MATRIX), next(iter(kinds), Kind.UNUSED))

    @property
    def quantization(self) -> Quantization | None:
        """Scale and zero point of the stored integers, where all uses agree on constant ones."""
        first = self.uses[0].quantization if self.uses else None
        agree = first is not None and all(first.same(use.quantization) for use in self.uses[1:])
        return first if agree else None

    @property
    def numeric(self) -> bool:
        """Whether it has magnitudes: a real float, or integers with a known scale."""
        if self.dtype in NARROW or self.dtype is ir.DataType.DOUBLE:
            return all(use.quantization is None for use in self.uses) or self.quantization is not None
        return self.quantization is not None

    @property
    def obstacle(self) -> str | None:
        """Why it is not a prunable weight, in words that follow its name; None where it is one."""
        if self.kind is not Kind.MATRIX:
            return f"not a weight of a layer: {self.kind}"
        if len(self.shape) < 2:
            return "a vector, not a matrix"
        if isinstance(self.tensor, SparseTensor):
            return "stored sparse, and would be dense once changed"
        if not self.numeric:
            return "integers without one constant scale, so magnitudes are unknown"
        return None

    @property
    def prunable(self) -> bool:
        """Whether it is a matrix of some layer, and nothing but that."""
        return self.obstacle is None

    @property
    def zero(self) -> Array:
        """What a pruned element becomes, in the stored type: 0, or the zero point, shaped to broadcast over it."""
        quantization = self.quantization
        return np.zeros((), self.dtype.numpy()) if quantization is None else quantization.zero_point

    def axes(self) -> tuple[int | None, int | None]:
        """Output-channel and input-channel axis in the storage, where all uses agree on it; else None."""
        outputs = {use.output_axis for use in self.uses}
        inputs = {use.input_axis for use in self.uses}
        return (outputs.pop() if len(outputs) == 1 else None, inputs.pop() if len(inputs) == 1 else None)

    # Reading ------------------------------------------------------------------------------------------------------

    def array(self) -> Array:
        """The stored array, in numpy's type or ml_dtypes'; not to be written to."""
        return self.tensor.numpy()

    def magnitudes(self) -> Array:
        """|w|, or |(q - zero point) * scale|, in the storage's shape: float32 where that is exact, else float64."""
        return self.magnitude_reader()(0, self.size).reshape(self.shape)

    def magnitude_reader(self, buffer: Array | None = None) -> Read:
        """A function that reads flat parts of ``magnitudes()``.

        ``buffer`` (float32, one dimension) saves allocation: what fits is made in it, and overwritten by the next read.
        """
        return magnitude_reader(self.tensor, self.quantization, buffer)

    def zeros(self) -> int:
        """How many elements are pruned already: equal to zero, or to the zero point."""
        return count_zeros(self.tensor, self.quantization)

    def distinct(self, limit: int = 1 << 16) -> int | None:
        """How many distinct stored values, or None where there are more than ``limit``."""
        return distinct(self.tensor, limit)

    def entropy_bytes(self) -> int:
        """The least bytes that its storage could take; see ``storage.entropy_bytes``."""
        return entropy_bytes(self.tensor, self.zeros())

    # Replacing ----------------------------------------------------------------------------------------------------

    def replace(self, new: Array | ir.TensorProtocol | Callable[[], Array], *, provenance: str = "") -> None:
        """Store ``new``: an array or tensor, or a function that makes an array of the present type and shape.

        A function is called each time the tensor is read, at the latest when the model is saved, and its result is
        dropped; ``provenance`` is a short text that tells how it is made. To make parts at a time, give a
        ``storage.StreamedTensor``. Tensors are never written to, for copies of the model share them.
        """
        old = self.tensor
        if isinstance(new, np.ndarray):
            new = ir.Tensor(new, name=old.name)
        elif callable(new):
            new = MadeTensor(new, old.dtype, _shape(old), name=old.name, provenance=f"lazy: {provenance}")
        self._store(new)

    def _store(self, tensor: ir.TensorProtocol) -> None:
        changed = (tensor.dtype, tensor.shape) != (self.dtype, self.tensor.shape)
        for value in self.values:
            node = value.producer()
            if node is not None:
                node.attributes.clear()
                node.attributes["value"] = ir.AttrTensor("value", tensor)
            if node is None or value.const_value is not None:
                value.const_value = tensor
            if changed:
                value.type = ir.TensorType(tensor.dtype)
                value.shape = _shape(tensor)


def weights(model: ir.Model) -> list[Weight]:
    """Every constant of ``model``, in order of definition: graph by graph, initializers, then Constant nodes.

    Constants that share one storage are one weight. Sparse ones are among them, but not prunable. Not among them are
    those that a function takes from its caller's attributes.
    """
    tracer = Tracer(model)
    found: dict[object, Weight] = {}
    living: list[ir.TensorProtocol] = []  # identities tell tensors apart only while they live
    functions = {function.graph for function in model.functions.values()}
    home: Home = "main"
    for prefix, graph in graphs(model):
        home = "function" if graph in functions or home == "function" else "body" if prefix else "main"
        for value, place in _constants(graph):
            tensor = _tensor(value)
            if tensor is None:
                continue
            living.append(tensor)
            uses, output = tracer.uses(value, tensor)
            weight = Weight(prefix + (value.name or ""), (value,), place, home, uses, value.is_graph_input(), output)
            twin = found.setdefault(_storage(tensor), weight)
            if twin is not weight:
                twin.values += weight.values
                twin.uses += weight.uses
                twin.output |= weight.output
                twin.overridable |= weight.overridable
    return list(found.values())


def _constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, Place]]:
    for value in graph.initializers.values():
        yield value, "initializer"
    for node in graph:
        if node.op_type == "Constant" and node.domain == "":
            yield node.outputs[0], "constant"


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant node; None where there is none to speak of."""
    node = value.producer()
    if node is None or value.const_value is not None:
        return value.const_value
    if len(node.attributes) != 1:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.name == "value" and not attribute.is_ref():
        return cast(ir.TensorProtocol, attribute.value)  # as_tensor() checks a protocol, member by member
    if attribute.name == "sparse_value" or not attribute.name.startswith("value_"):
        return None
    if attribute.type in (ir.AttributeType.STRING, ir.AttributeType.STRINGS) and not attribute.is_ref():
        strings = attribute.value
        encoded = strings.encode() if isinstance(strings, str) else [text.encode() for text in strings]
        return ir.StringTensor(np.array(encoded, object), name=value.name)
    return ir.convenience.get_const_tensor(value)


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tensor.shape.numpy())


def _storage(tensor: ir.TensorProtocol) -> object:
    """A key that is equal for tensors that lie in the same place."""
    if isinstance(tensor, ir.ExternalTensor):
        place = (str(tensor.base_dir), str(tensor.location), tensor.offset or 0)
        return (*place, tensor.dtype, tuple(tensor.shape.numpy()))
    return id(tensor)
