"""A weight as numbers to cluster, and the weight with each of its elements replaced by a shared value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...ir.quantization import Quantization
from ...ir.storage import LARGE, Array, Read, StreamedTensor, entropy, reader
from ...ir.weights import Weight
from ..base import Context
from .clustering import STEP, Clusters, Codebook, Part, Points, Sweep, in_steps, points
from .outputs import Outputs


@dataclass(frozen=True, eq=False)
class Source:
    """What a weight held, and the energies of the inputs that its elements meet; None where all weigh the same.

    ``outputs``: what its layer computes, where the values are to be chosen for that.
    """

    tensor: ir.TensorProtocol
    energy: Array | None = None
    outputs: Outputs | None = None

    @classmethod
    def read_for(cls, tensor: ir.TensorProtocol, outputs: Outputs) -> Source:
        return cls(tensor, outputs.energy, outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape.numpy())

    @property
    def size(self) -> int:
        return self.tensor.size

    def parts(self) -> Iterator[Part]:
        """All elements, as float32 or float64, in order, with their weights."""
        read, weigh = reader(self.tensor), self._weigher()
        for start in range(0, self.size, STEP):
            stop = min(start + STEP, self.size)
            yield _floats(read(start, stop)), weigh(start, stop)

    def _weigher(self) -> Callable[[int, int], Array | None]:
        if self.energy is None:
            return lambda start, stop: None
        energy, shape = self.energy, self.shape
        placed = Quantization(energy, energy)
        return lambda start, stop: np.broadcast_to(placed.at(energy, shape, start, stop), (stop - start,))

    def channels(self, axis: int, first: int, last: int) -> Sweep:
        """The elements of the channels [first, last) along ``axis``; the tensor is held while they are read."""
        some = [slice(None)] * axis + [slice(first, last)]
        array = _floats(self.tensor.numpy()[tuple(some)])
        if self.energy is None:
            return lambda: in_steps(array)
        weights = np.ascontiguousarray(np.broadcast_to(self.energy, self.shape)[tuple(some)]).reshape(-1)
        return lambda: in_steps(array, weights)


def _floats(array: Array) -> Array:
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Outcome:
    """What sharing does to a weight: how many values it takes, the squared error over the energy of the weight, the
    entropy of the choice of values in bits, and how many elements are 0."""

    values: int
    noise: float
    entropy: float
    zeros: int
    of_outputs: bool = False  # whether error and energy are those of the layer's outputs

    @property
    def sqnr(self) -> float:
        """In dB; infinite where nothing was lost."""
        return -10 * math.log10(self.noise) if self.noise > 0 else math.inf

    @classmethod
    def of(cls, found: Sequence[tuple[Points, Codebook]]) -> Outcome:
        """That of parts of a weight, each with the codebook of its own."""
        figures = [(book, *book.figures(own)) for own, book in found]
        energy = sum(own.energy for own, _ in found)
        error = sum(lost for _, lost, _ in figures)
        total = sum(own.size for own, _ in found)
        spread = sum(entropy(counts) * counts.sum() for _, _, counts in figures) / max(1, total)
        zeros = sum(int(counts[book.values == 0].sum()) for book, _, counts in figures)
        noise = error / energy if energy else 0.0
        # Below what float32 resolves there is only the rounding of sums.
        return cls(sum(len(book.values) for book, _, _ in figures), noise if noise > 1e-13 else 0.0, spread, zeros)

    @classmethod
    def in_outputs(cls, source: Source, made: Array) -> Outcome:
        """That of ``made``, which took the place of ``source``, for the outputs of its layer."""
        assert source.outputs is not None
        counts = np.unique(made, return_counts=True)[1]
        zeros = made.size - int(np.count_nonzero(made))
        return cls(len(counts), source.outputs.noise(source.tensor.numpy(), made), entropy(counts), zeros, True)


def outcomes(source: Source, found: Points, books: Sequence[Codebook]) -> list[Outcome]:
    """What each of ``books`` does to a weight, whose numbers are ``found``."""
    if source.outputs is None:
        return [Outcome.of([(found, book)]) for book in books]
    return [Outcome.in_outputs(source, made) for made in source.outputs.each(source.tensor.numpy(), books)]


def codebook(found: Points, clusters: int, dtype: ir.DataType) -> Codebook:
    """The best values for ``found``, rounded to the stored type."""
    return codebooks(found, [clusters], dtype)[0]


def codebooks(found: Points, counts: Sequence[int], dtype: ir.DataType) -> list[Codebook]:
    """Those of so many values each."""
    clusters = Clusters(found, max(counts))
    return [Codebook(clusters.values(count), dtype.numpy(), found.size) for count in counts]


def shared(source: Source, book: Codebook, provenance: str) -> ir.TensorProtocol:
    """The weight with each element replaced: held where it is small, or chosen for outputs, else made when read."""
    if source.outputs is not None:
        array = source.outputs.apply(source.tensor.numpy(), [book])
        return ir.Tensor(array, dtype=source.tensor.dtype, name=source.tensor.name)

    def open() -> Read:
        read = reader(source.tensor)
        return lambda start, stop: book.apply(_floats(read(start, stop)))

    like = source.tensor
    made = StreamedTensor(open, like.dtype, ir.Shape(source.shape), name=like.name, provenance=f"lazy: {provenance}")
    return (
        made if made.nbytes >= LARGE and _is_lazy(like) else ir.Tensor(made.numpy(), dtype=like.dtype, name=like.name)
    )


def _is_lazy(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor))


def shared_by_group(source: Source, axis: int, group: int, books: Sequence[Codebook]) -> Callable[[], Array]:
    """A function that makes the weight with a codebook for each ``group`` of channels along ``axis``."""

    if source.outputs is not None:
        outputs = source.outputs
        return lambda: outputs.apply(source.tensor.numpy(), books, group)

    def make() -> Array:
        stored = np.moveaxis(source.tensor.numpy(), axis, 0)
        made = np.empty(source.shape, source.tensor.dtype.numpy())
        place = np.moveaxis(made, axis, 0)
        for number, book in enumerate(books):
            some = slice(number * group, (number + 1) * group)
            part = np.ascontiguousarray(stored[some])
            place[some] = book.apply(_floats(part).reshape(-1)).reshape(part.shape)
        return made

    return make


def grouped(source: Source, axis: int, group: int) -> Iterator[Points]:
    """The numbers of each ``group`` of channels along ``axis``."""
    channels, each = source.shape[axis], source.size // source.shape[axis]
    for first in range(0, channels, group):
        last = min(first + group, channels)
        yield points(source.channels(axis, first, last), each * (last - first))


def together(sources: Sequence[Source]) -> Points:
    """The numbers of several weights."""

    def sweep() -> Iterator[Part]:
        for source in sources:
            yield from source.parts()

    return points(sweep, sum(source.size for source in sources))


def tell(weight: Weight, source: Source, outcome: Outcome, ctx: Context, **more: int) -> None:
    """Write down what became of ``weight``, which held ``source``; nearest values would be as ``outcome`` says."""
    if source.outputs is not None:
        outcome = Outcome.in_outputs(source, weight.array())
    figures: dict[str, float] = {"values": outcome.values, **more, "entropy_bits": round(outcome.entropy, 3)}
    if math.isfinite(outcome.sqnr):
        figures["output_sqnr_db" if outcome.of_outputs else "sqnr_db"] = round(outcome.sqnr, 2)
    ctx.change(weight, "takes shared values", **figures)
