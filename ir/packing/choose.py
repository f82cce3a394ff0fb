"""Which exact storage of a tensor is the smallest, and how many bytes it takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ..ops import Kind
from ..references import is_annotated, is_named
from ..weights import Weight
from .census import Census
from .places import PLACES, Pairs
from .repeats import Repeats
from .tape import Tape, stem
from .values import VALUES

_NODE = 55  # bytes of a node and its settings, less the names in it
_NAMES = 3.7  # times that the weight's name is in it, or in a constant of its own
LEAST = 1 << 10  # bytes: what saves less is not worth its nodes
SMALL = 2 << 10  # bytes of a tensor that is not worth any
TABLES = 2 << 10  # bytes of the tables that decoders of a model share
_SETTINGS = (Kind.SHAPE, Kind.SCALE, Kind.ZERO_POINT)
_NIBBLE = 16  # values that four bits tell apart


@dataclass(frozen=True, slots=True)
class Storage:
    """A way to store a tensor: ``word`` says it, ``bytes`` are those of its constants, ``opset`` the least it needs,
    ``nodes`` about how many decode it; ``made`` makes them, but for the last."""

    word: str
    bytes: int
    opset: int
    nodes: int
    made: Callable[[Tape, Census], ir.Value]

    def build(self, tape: Tape, census: Census) -> ir.Value:
        """Nodes whose last gives the tensor, in its shape."""
        made = self.made(tape, census)
        if tape.lengths[made] != census.size:
            made = tape.first(made, census.size)
        return tape.op("Reshape", made, tape.dims(*census.shape))

    def saves(self, census: Census, name: str) -> int:
        """At least how many bytes it takes off the file; 0 where it is not worth it."""
        less = census.bytes - self.bytes
        return max(0, less - self.overhead(name)) if less > LEAST else 0

    def overhead(self, name: str = "") -> int:
        """About the bytes of the nodes, with the names that they take from that of the weight."""
        return math.ceil(self.nodes * (_NODE + _NAMES * len(stem(name).encode())))


def storages(census: Census) -> Iterator[Storage]:
    """Every way to store a tensor exactly, other than as it is."""
    if census.obstacle is not None:
        return
    for whole in (Repeats(), Pairs()):
        if (size := whole.bytes(census)) is not None:
            yield Storage(whole.word, size, whole.opset, whole.nodes(census) + 1, whole.build)
    for places in PLACES:
        for values in VALUES:
            word = " over ".join(filter(None, (places.word, values.word * (values.word != "dense"))))
            size = places.bytes(census, values) if word else None
            if size is not None:
                opset, nodes = max(places.opset, values.opset(census)), places.nodes(census, values) + 1
                yield Storage(word, size, opset, nodes, functools.partial(places.build, values=values))


def smallest(census: Census, encoding: str = "auto", opset: int | None = None) -> Storage | None:
    """The smallest of them; None where there is none.

    ``encoding``: a word of ``pack-weights``, which it then uses, or ``auto``: of all but those that are ``slow``;
    ``opset``: the newest that it may need.
    """
    found = [
        storage
        for storage in storages(census)
        if _wanted(encoding, storage.word, census) and (opset is None or storage.opset <= opset)
    ]
    return min(found, key=lambda storage: storage.bytes + storage.overhead(), default=None)


def _wanted(encoding: str, word: str, census: Census) -> bool:
    if encoding == "fp16":
        return "narrow" in word and census.narrow is ir.DataType.FLOAT16
    if encoding == "int4":
        return "palette" in word and census.counts is not None and len(census.counts[0]) <= _NIBBLE
    return encoding in word or (encoding == "auto" and not slow(word, census))


def slow(word: str, census: Census) -> bool:
    """Whether it takes long to load for what it saves: a bitmask takes some 4 ms for a million elements, so 14 ms for a
    MB of those of one byte, which it makes a sixth smaller, say, where gaps could not."""
    return "bitmask" in word and census.dtype.itemsize == 1


def obstacle(weight: Weight) -> str | None:
    """Why a constant cannot be computed when the model is loaded, or not be stored otherwise; None where it can."""
    if weight.overridable:
        return "the model's caller may pass another tensor for it"
    if weight.output or weight.value.is_graph_output():
        return "an output"
    if len(weight.values) > 1:
        return "several names share its storage; tie-weights makes them one"
    if any(use.kind in _SETTINGS for use in weight.uses):
        return "a shape, setting, scale or zero point, which ONNX Runtime wants as a constant"
    if any(use.kind is Kind.UNKNOWN for use in weight.uses):
        return "an unknown operator may want it as a constant"
    if not weight.uses:
        return "nothing reads it"
    if any(map(is_annotated, weight.values)) or any(map(is_named, weight.values)):
        return "it is in a quantization annotation"
    return Census(weight.tensor, None).obstacle
