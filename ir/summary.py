"""What is in a model, without running it: operators, versions, weights and how small they could be, dimensions."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .address import bodies, graphs, printable
from .files import saved_bytes
from .packing.census import Census
from .packing.choose import SMALL, TABLES, obstacle, smallest
from .packing.decoded import GROWTH, decoders
from .sparse import SparseTensor
from .storage import DISTINCT_LIMIT, least_bytes, value_counts
from .text import dtype_text, type_text
from .weights import Weight, weights

FLOATS = {kind for kind in ir.DataType if kind.is_floating_point()}


@dataclass(frozen=True)
class Figures:
    """A model in numbers.

    ``bytes`` is its size on disk, external data included. ``weights`` counts the elements of prunable weights, of
    which ``zeros`` are zero (or at their zero point); ``floats`` and ``float_zeros`` the same for all float constants.
    ``packed`` counts the elements of what is decoded when the model is loaded, which are among neither.
    """

    bytes: int
    nodes: int
    initializers: int
    weights: int
    zeros: int
    floats: int
    float_zeros: int
    packed: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def float_sparsity(self) -> float:
        return self.float_zeros / self.floats if self.floats else 0.0

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"sparsity": self.sparsity, "float_sparsity": self.float_sparsity}


@dataclass(frozen=True)
class WeightSummary:
    """One constant. ``distinct`` is None above 65,536 values; ``entropy_bytes`` bounds any element-wise storage.

    ``storage`` is what pack-weights would make of it, as ``palette``: ``packed`` is what it has made already.
    ``storage_bytes`` is what that takes, nodes that decode it included.
    """

    address: str
    type: str
    place: str
    used_by: str
    prunable: bool
    elements: int
    zeros: int
    distinct: int | None
    bytes: int
    entropy_bytes: int
    storage: str
    storage_bytes: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def distinct_text(self) -> str:
        return f"> {DISTINCT_LIMIT}" if self.distinct is None else str(self.distinct)


@dataclass(frozen=True)
class Summary:
    """A model as ``penjing inspect`` tells it; ``by_place``: kind -> [weights, elements, bytes]."""

    source: str | None
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    dimensions: list[str]
    operators: dict[str, int]
    bodies: int
    functions: list[str]
    metadata: dict[str, str]
    figures: Figures
    by_place: dict[str, list[int]]
    weights: list[WeightSummary]

    @property
    def entropy_bytes(self) -> int:
        """What the file could shrink to if each weight were stored at its entropy."""
        return self.figures.bytes - sum(weight.bytes - weight.entropy_bytes for weight in self.weights)

    @property
    def storage_bytes(self) -> int:
        """What the file would take once pack-weights has run."""
        return self.figures.bytes - sum(weight.bytes - weight.storage_bytes for weight in self.weights)

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each fact, as text that is safe to print."""
        figures = self.figures
        lines = [
            ("model", self.source or "in memory"),
            ("producer", self.producer or "unknown"),
            ("IR version", str(self.ir_version)),
            ("opsets", ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in self.opsets.items())),
            *(("input", f"{name}: {kind}") for name, kind in self.inputs.items()),
            *(("output", f"{name}: {kind}") for name, kind in self.outputs.items()),
            ("dynamic dimensions", ", ".join(self.dimensions) or "none"),
            ("operators", ", ".join(f"{name} {count}" for name, count in self.operators.items())),
            (
                "nodes",
                f"{figures.nodes:,}, in {self.bodies} bodies and {len(self.functions)} functions besides the graph",
            ),
            *(("weights", _place_line(place, *counts)) for place, counts in self.by_place.items()),
            (
                "sparsity",
                f"{figures.sparsity:.4%} of {figures.weights:,} prunable weights ({figures.zeros:,} are zero)",
            ),
            ("of all floats", f"{figures.float_sparsity:.4%} of {figures.floats:,}"),
            (
                "bytes",
                f"{figures.bytes:,} on disk; {self.storage_bytes:,} once pack-weights has run; "
                f"{self.entropy_bytes:,} with every weight at its entropy",
            ),
            *(("metadata", f"{key} = {_short(value)}") for key, value in self.metadata.items()),
        ]
        return [(name, printable(value)) for name, value in lines]

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self) | {"figures": self.figures.as_json(), "entropy_bytes": self.entropy_bytes}
        found["storage_bytes"] = self.storage_bytes
        for weight, entry in zip(self.weights, found["weights"], strict=True):
            entry["sparsity"] = weight.sparsity
        return {"schema": 1} | found


def figures(model: ir.Model, size: int | None = None) -> Figures:
    """The numbers of ``model``, in one pass over its weights; ``size`` in bytes is what saving gives if not said."""
    return _figures(model, weights(model), Weight.zeros, saved_bytes(model) if size is None else size)


def _figures(model: ir.Model, constants: list[Weight], zeros_of: Callable[[Weight], int], size: int) -> Figures:
    matrices, floats = ([0, 0], [0, 0])
    for weight in constants:
        is_float, prunable = weight.dtype in FLOATS, weight.prunable
        if is_float or prunable:
            zeros = zeros_of(weight)
            for counts, counted in ((matrices, prunable), (floats, is_float)):
                counts[0] += weight.size * counted
                counts[1] += zeros * counted
    every = [graph for _, graph in graphs(model)]
    return Figures(
        size,
        sum(map(len, every)),
        sum(len(graph.initializers) for graph in every),
        weights=matrices[0],
        zeros=matrices[1],
        floats=floats[0],
        float_zeros=floats[1],
        packed=sum(math.prod(decoder.shape) for decoder in decoders(model) if decoder.saves > GROWTH),
    )


def summarize(model: ir.Model, size: int | None = None) -> Summary:
    """Everything about ``model`` that can be told without running it; ``size`` as in ``figures``."""
    constants = weights(model)
    packed = {leaf for decoder in decoders(model) for leaf in decoder.leaves}
    read = _stored({weight: _Contents.of(weight, weight.value in packed) for weight in constants})
    nodes = [node for _, graph in graphs(model) for node in graph]
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    return Summary(
        source=model.meta.get("penjing.path"),
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        ir_version=model.ir_version,
        opsets=dict(model.opset_imports),
        inputs={value.name or "": type_text(value.type, value.shape) for value in model.graph.inputs},
        outputs={value.name or "": type_text(value.type, value.shape) for value in model.graph.outputs},
        dimensions=_dimensions(model),
        operators=dict(operators.most_common()),
        bodies=sum(1 for node in nodes for _ in bodies(node)),
        functions=[f"{function.domain}::{function.name}" for function in model.functions.values()],
        metadata=dict(model.metadata_props),
        figures=_figures(
            model, constants, lambda weight: read[weight].zeros, saved_bytes(model) if size is None else size
        ),
        by_place=_by_place(constants),
        weights=[_summary(weight, read[weight]) for weight in constants if weight.size > 1],
    )


@dataclass(frozen=True)
class _Contents:
    """What reading a weight tells: in one sweep where its values are few, else in little more."""

    zeros: int
    distinct: int | None
    least_bytes: int
    storage: str
    storage_bytes: int

    @classmethod
    def of(cls, weight: Weight, packed: bool) -> _Contents:
        """``packed``: it is a part of what a decoder decodes."""
        if weight.dtype is ir.DataType.STRING:
            return cls(0, None, weight.nbytes, "dense", weight.nbytes)
        tensor, zero = weight.tensor, weight.zero
        found = value_counts(tensor)
        storage = ("packed", weight.nbytes) if packed else _storage(weight, Census(tensor, found))
        if found is None:
            zeros = weight.zeros()
            return cls(zeros, None, min(weight.nbytes, least_bytes(tensor, zeros, None)), *storage)
        values, counts = found
        zeros = int(counts[values == zero.reshape(())].sum()) if zero.size == 1 else weight.zeros()
        return cls(zeros, len(values), min(weight.nbytes, least_bytes(tensor, zeros, counts)), *storage)


def _storage(weight: Weight, census: Census) -> tuple[str, int]:
    """What pack-weights would make of it, and the bytes of that: the smallest exact storage, where it may and that
    saves more than its decoder takes."""
    found = smallest(census) if weight.nbytes >= SMALL and obstacle(weight) is None else None
    if found is not None and (saved := found.saves(census, weight.value.name or "")):
        return found.word, weight.nbytes - saved
    return _unpacked(weight)


def _unpacked(weight: Weight) -> tuple[str, int]:
    return "sparse" if isinstance(weight.tensor, SparseTensor) else "dense", weight.nbytes


def _stored(read: dict[Weight, _Contents]) -> dict[Weight, _Contents]:
    """The same with all as they are, where all together would save no more than the tables that they share take."""
    if sum(weight.nbytes - one.storage_bytes for weight, one in read.items()) > TABLES:
        return read
    return {
        weight: one if one.storage == "packed" else dataclasses.replace(one, storage=word, storage_bytes=size)
        for weight, one in read.items()
        for word, size in [_unpacked(weight)]
    }


def _summary(weight: Weight, read: _Contents) -> WeightSummary:
    users = Counter(use.node.op_type for use in weight.uses)
    return WeightSummary(
        address=weight.address,
        type=type_text(ir.TensorType(weight.dtype), ir.Shape(weight.shape)),
        place=weight.place if weight.home == "main" else f"{weight.place} in {weight.home}",
        used_by=", ".join(f"{name} x{count}" if count > 1 else name for name, count in users.items()),
        prunable=weight.prunable,
        elements=weight.size,
        zeros=read.zeros,
        distinct=read.distinct,
        bytes=weight.nbytes,
        entropy_bytes=read.least_bytes,
        storage=read.storage,
        storage_bytes=read.storage_bytes,
    )


def _by_place(constants: list[Weight]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for weight in constants:
        home = "" if weight.home == "main" else f" in {weight.home}"
        counts = found.setdefault(f"{weight.place}{home}, {dtype_text(weight.dtype)}", [0, 0, 0])
        for index, number in enumerate((1, weight.size, weight.nbytes)):
            counts[index] += number
    return found


def _dimensions(model: ir.Model) -> list[str]:
    """The symbolic dimensions of inputs and outputs, each with where it stands."""
    found: dict[str, list[str]] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                found.setdefault(str(dim.value or "?"), []).append(f"{value.name}[{axis}]")
    return [f"{name} ({', '.join(places)})" for name, places in found.items()]


def _place_line(place: str, count: int, elements: int, size: int) -> str:
    return f"{place}: {count} with {elements:,} elements, {size:,} bytes"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
