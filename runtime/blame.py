"""Where a quantized model goes wrong: the error of each value of the float model, injected there and accumulated.

Both models are cut at every value that they share, and each piece runs on the values of the float model: what a piece
then gets wrong is what it injects. All pieces are one model, so this costs two more runs. What a value has accumulated
shows in a run of the whole model. Both are judged at full optimization, where operators run on integers; a value is
looked at as the integers that its QuantizeLinear gives, for any other look would take an integer kernel apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..ir.address import bodies, printable
from ..ir.errors import UsageError
from ..ir.ops import operator
from ..ir.shapes import infer_shapes
from ..passes.base import Array, Outputs
from .compare import Judge, OutputDifference
from .feeds import Feeds
from .inputs import Input, counted
from .origins import Match, floats, match
from .pieces import Cut, Dims, Pieces, piece
from .progress import Progress
from .report import counts
from .session import LARGE, DoesNotRun, open_session, run_feed, tensor_bytes

if TYPE_CHECKING:
    from .kernels import Kernels

SAMPLES = 8  # that go through the models at a time, for all their values are held then
_FLOATS = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Entry:
    """One value of the float model.

    ``operators`` compute it there from other values that were matched, and ``node`` is their layer, or the last of
    them; a model input has neither. ``type`` is that of what was looked at in the quantized model: integers, or a float
    that no QuantizeLinear reads. ``injected`` is the error where all that the operators read is right: what their
    weights and the rounding of their own result add. (Where they read integers, they get the float model's values
    rounded, and are compared with the float operators on the same: no rounding counts twice.) It is None where the
    pieces do not run. ``accumulated`` is the error in a run of the whole model. ``output``: it is one of the model.
    """

    value: str
    node: str
    operators: list[str]
    type: str
    injected: OutputDifference | None
    accumulated: OutputDifference
    output: bool = False

    @property
    def badness(self) -> tuple[float, float]:
        """What entries are sorted by: noise to signal in dB, injected and then accumulated."""
        return _noise(self.injected), _noise(self.accumulated)

    def as_json(self) -> dict[str, Any]:
        """JSON values; what is infinite or not a number is ``null``."""
        errors = {"injected": _figures(self.injected), "accumulated": _figures(self.accumulated)}
        return {name: getattr(self, name) for name in ("value", "output", "node", "operators", "type")} | errors


@dataclass
class Blame:
    """The entries, worst injected error first. ``values`` counts those of the float model, of which they are some.

    ``disturbance`` is how far looking at values moved the quantized model's outputs, as max|Δ|/max|y|: 0 where they
    stayed bit-identical. ``kernels`` is None where they cannot be counted; ``notes`` say why.
    """

    entries: list[Entry]
    values: int
    disturbance: float
    feeds: str
    kernels: Kernels | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "feeds": self.feeds,
            "matched": len(self.entries),
            "of": self.values,
            "disturbance": _finite(self.disturbance),
            "notes": self.notes,
            "kernels": counts(self.kernels),
            "values": [entry.as_json() for entry in self.entries],
        }


def blame_files(a: str, b: str, data: Any = None, seed: int = 0, progress: Progress | None = None) -> Blame:
    """``blame`` for the float model in file ``a`` and its quantized form in ``b``; ``data`` as ``read_feeds`` takes.

    Raises ``PenjingError`` where a file, the data or a run of either model is at fault.
    """
    from .draws import feeds_for
    from .session import load

    model, quantized = (load(path, runnable=True) for path in (a, b))
    for one in (model, quantized):
        infer_shapes(one)
    places = (printable(a), printable(b))
    _require_alike(model, quantized, places)
    return blame(model, quantized, feeds_for(model, data, seed), places, progress)


def blame(
    model: ir.Model,
    quantized: ir.Model,
    feeds: Feeds,
    places: Sequence[str] = ("The float model", "the quantized model"),
    progress: Progress | None = None,
) -> Blame:
    """The error of each value of ``model`` in ``quantized``, over all ``feeds``; ``places`` is what messages call them.

    Values of the main graphs only. One part of one run is held at a time, so memory does not grow with the feeds.
    Raises ``UsageError`` where the models share no value, ``DoesNotRun`` where one of them does not run.
    """
    from .kernels import kernels

    progress = progress or Progress()
    sweep = _Sweep(model, quantized, places)
    for part in _parts(progress.watched(feeds, "comparing values"), model, feeds.samples is not None):
        sweep.add(part)
    result = Blame(sweep.entries(), sum(1 for _ in floats(model.graph)), sweep.disturbance, feeds.describe())
    result.notes = [*feeds.notes, *sweep.notes, *_about_bodies(quantized)]
    progress.say("counting kernels")
    try:
        result.kernels = kernels(quantized)
    except DoesNotRun as error:
        result.notes.append(f"The kernels could not be counted: {error}")
    return result


class _Sweep:
    """The sessions of one comparison, and the sums over the runs so far."""

    def __init__(self, model: ir.Model, quantized: ir.Model, places: Sequence[str]) -> None:
        self.notes: list[str] = []
        self._model, self._quantized, self._places = model, quantized, places
        self._prepack = max(map(tensor_bytes, (model, quantized))) <= LARGE
        self._injected, self._accumulated, self._outputs = Judge(), Judge(), Judge()
        self._matches = [one for one in match(model, quantized) if one.shown is not None]
        self._require_some()
        self._float = self._shown(model, (one.origin for one in self._matches))
        self._types = _types(model, self._float)
        self._matches = [one for one in self._matches if one.name in self._types]
        self._looked = self._shown(quantized, [*quantized.graph.outputs, *(one.value for one in self._matches)])
        self._whole = open_session(quantized, prepack=self._prepack)
        self._pieces: tuple[Pieces, Pieces] | None = None
        self._started = False

    @property
    def disturbance(self) -> float:
        return self._outputs.comparison.max_error

    def add(self, feed: Outputs) -> None:
        """One run of everything on ``feed``."""
        expected = {**feed, **self._float.run(feed, {}, self._places[0])}
        looked = {**feed, **self._looked.run(feed, {}, self._places[1])}
        whole = run_feed(self._whole, feed, place=self._places[1])
        self._outputs.add(whole, None, {name: looked[name] for name in whole})
        if not self._started:
            self._start(expected, looked)
        values = {one.name: expected[one.name] for one in self._matches}
        found = {one.name: _told(one, looked, values) for one in self._matches}
        self._accumulated.add(values, None, found | {name: whole[name] for name in found if name in whole})
        if self._pieces is None:
            return
        try:
            self._injected.add(*self._by_pieces(feed, values))
        except DoesNotRun as error:
            self._give_up(error)

    def entries(self) -> list[Entry]:
        """Worst first."""
        injected, accumulated = (judge.comparison.outputs for judge in (self._injected, self._accumulated))
        stops = {one.origin for one in self._matches}
        changing = set(floats(self._model.graph))
        entries = []
        for one in self._matches:
            nodes, _ = piece(one.origin, stops)
            nodes = [node for node in nodes if node.outputs[0] in changing]
            layer = next((node for node in nodes if operator(node).matrices), nodes[-1] if nodes else None)
            entries.append(
                Entry(
                    one.name,
                    "" if layer is None else layer.name or "",
                    [node.op_type for node in nodes],
                    (self._types[one.name][0] if one.affine is None else one.affine.grid.dtype).numpy().name,
                    None if self._pieces is None else injected[one.name],
                    accumulated[one.name],
                    one.origin.is_graph_output(),
                )
            )
        return sorted(entries, key=lambda entry: entry.badness, reverse=True)

    def _require_some(self) -> None:
        if not self._matches:
            raise UsageError(
                f"{self._places[0]} and {self._places[1]} have no value in common, by name or by node. "
                "Name a float model and the quantized model that was made of it."
            )

    def _shown(self, model: ir.Model, values: Iterable[ir.Value]) -> Pieces:
        names = dict.fromkeys(value.name or "" for value in values if not value.is_graph_input())
        return Pieces(model, (), list(names), prepack=self._prepack)

    def _start(self, expected: Outputs, looked: Outputs) -> None:
        """Leave out what has another shape in the two models, and cut them at what is left."""
        self._started = True
        unlike = [one for one in self._matches if _shape(expected[one.name]) != _shape(looked[one.value.name or ""])]
        if unlike:
            names = ", ".join(printable(one.name) for one in unlike[:3]) + (" ..." if len(unlike) > 3 else "")
            self.notes.append(f"{counted(len(unlike), 'value')} of another shape in the two models left out: {names}")
        self._matches = [one for one in self._matches if one not in unlike]
        self._require_some()
        try:
            self._pieces = self._cut_float(), self._cut_quantized()
        except DoesNotRun as error:
            self._give_up(error)

    def _give_up(self, error: DoesNotRun) -> None:
        self._pieces = None
        self.notes.append(f"Injected errors are not known, for pieces of the models do not run alone: {error}")

    def _cut_float(self) -> Pieces:
        names = [one.name for one in self._matches if not one.origin.is_graph_input()]
        cuts = [Cut(one.name, *self._types[one.name]) for one in self._matches]
        return Pieces(self._model, cuts, names, prepack=self._prepack)

    def _cut_quantized(self) -> Pieces:
        cuts = []
        for one in self._matches:
            dtype, dims = self._types[one.name]
            names = [value.name or "" for value, _ in one.integers]
            cuts += [Cut(value.name or "", affine.grid.dtype, dims) for value, affine in one.integers]
            if one.plain is not None and not one.plain.is_graph_input():
                cuts.append(Cut(one.plain.name or "", one.plain.dtype or dtype, dims, names))
        return Pieces(self._quantized, cuts, [one.value.name or "" for one in self._matches], prepack=self._prepack)

    def _by_pieces(self, feed: Outputs, values: Outputs) -> tuple[Outputs, None, Outputs]:
        """What each piece gives, of the float model and of the quantized one; both read the same."""
        assert self._pieces is not None
        rounded, given = dict(values), dict[str, Array]()
        for one in self._matches:
            value = values[one.name]
            for stands, affine in reversed(one.integers):
                with np.errstate(invalid="ignore"):  # NaN becomes some integer
                    given[stands.name or ""] = integers = affine.quantized(value)
                rounded[one.name] = affine.dequantized(integers).astype(value.dtype)
            if one.plain is not None:
                dtype = one.plain.dtype or self._types[one.name][0]
                given[one.plain.name or ""] = value.astype(dtype.numpy(), copy=False)
        expected = self._pieces[0].run(feed, rounded, self._places[0])
        found = self._pieces[1].run(feed, given, self._places[1])
        reference = {
            one.name: expected[one.name] if one in self._rounded else values[one.name] for one in self._matches
        }
        return reference, None, {one.name: _told(one, found, values) for one in self._matches}

    @cached_property
    def _rounded(self) -> set[Match]:
        """The matches whose operators in the quantized model read nothing but integers, each of one scale."""
        single = {one.integers[0][0] for one in self._matches if len(one.integers) == 1}
        stops = {value for one in self._matches for value, _ in one.integers}
        stops |= {one.plain for one in self._matches if one.plain is not None}
        found = set()
        for one in self._matches:
            _, read = piece(one.value, stops - {one.plain})
            if read and read <= single:
                found.add(one)
        return found


def _told(one: Match, found: Outputs, like: Outputs) -> Array:
    """The floats that the value of ``one`` stands for, in the type of the float model."""
    array = found[one.value.name or ""]
    told = array if one.affine is None else one.affine.dequantized(array)
    return np.asarray(told.astype(like[one.name].dtype, copy=False))


def _parts(feeds: Iterable[Mapping[str, Any]], model: ir.Model, batched: bool) -> Iterator[Mapping[str, Any]]:
    """The runs; ``batched`` ones, whose first axis counts samples, in parts where the model leaves it open."""
    dims = {one.name: one.dims for one in map(Input.of, model.graph.inputs)}
    for feed in feeds:
        rows = {name: len(array) for name, array in feed.items() if np.ndim(array)}
        if not batched or any(isinstance(dim, int) for name in rows for dim in (dims[name] or ())[:1]):
            yield feed
            continue
        for start in range(0, max(rows.values(), default=1), SAMPLES):
            yield {name: array[start : start + SAMPLES] if name in rows else array for name, array in feed.items()}


def _require_alike(model: ir.Model, quantized: ir.Model, places: Sequence[str]) -> None:
    """Raise ``UsageError`` where the two models do not take the same inputs."""
    takes = []
    for one in (model, quantized):
        inputs = (Input.of(value) for value in one.graph.inputs)
        takes.append({given.name: given for given in inputs if given.required})
    if len({tuple(sorted((name, given.dtype) for name, given in inputs.items())) for inputs in takes}) == 1:
        return
    words = [", ".join(printable(str(given)) for given in inputs.values()) or "nothing" for inputs in takes]
    raise UsageError(
        f"{places[0]} takes {words[0]}, and {places[1]} takes {words[1]}. "
        "Name a float model and the quantized model that was made of it."
    )


def _types(model: ir.Model, shown: Pieces) -> dict[str, tuple[ir.DataType, Dims | None]]:
    """Type and dimensions of each float among the inputs of ``model`` and what is ``shown`` of it."""
    found = {name: (dtype, dims) for name, (kind, dims) in shown.types().items() if (dtype := _FLOATS.get(kind))}
    for value in model.graph.inputs:
        if value.dtype is not None and value.dtype in _FLOATS.values():
            dims = None if value.shape is None else tuple(dim if isinstance(dim, int) else None for dim in value.shape)
            found[value.name or ""] = (value.dtype, dims)
    return found


def _about_bodies(model: ir.Model) -> list[str]:
    holders = [node for node in model.graph if any(True for _ in bodies(node))]
    if not holders:
        return []
    names = ", ".join(printable(node.name or node.op_type) for node in holders[:3]) + (" ..." if holders[3:] else "")
    return [
        f"Values in bodies are not looked at, only what the {counted(len(holders), 'node')} with bodies give: {names}"
    ]


def _figures(error: OutputDifference | None) -> dict[str, float | None] | None:
    if error is None:
        return None
    return {
        name: _finite(getattr(error, name)) for name in ("sqnr_db", "max_error", "cosine", "max_abs", "max_reference")
    }


def _noise(error: OutputDifference | None) -> float:
    if error is None or error.sqnr_db is None:
        return -math.inf
    return math.inf if error.nonfinite or error.problems else -error.sqnr_db


def _shape(value: Any) -> tuple[int, ...] | None:
    return value.shape if isinstance(value, np.ndarray) else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
