"""Sample inputs: read from files, folders, functions and arrays, checked against a model, or drawn at random."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ..ir.errors import BadFeeds, PenjingError, UsageError, nearest
from ..passes.base import Array, Outputs
from .session import TRIAL_BYTES, DoesNotRun, bounded_run

Feed = dict[str, Any]  # arrays by input name; lists for sequences, None for empty optionals
Path_ = str | os.PathLike[str]

BATCH = 64  # samples a run, where the model leaves the batch open
SIZES = (16, 32, 64, 96, 224, 320, 16000, 1)  # tried for open dimensions; 1 last, since it shows the least of a model
RATES = (1, 8000, 16000)  # tried for integer scalars and vectors: a count, or a sampling rate in Hz
RANDOM_BYTES = TRIAL_BYTES // 4  # a random feed may take: what is computed from it must fit as well


class NoFeeds(PenjingError):
    """No random feed runs in the model; the message is the reason."""


@dataclass(eq=False)
class Feeds:
    """Sample inputs for one model: each walk yields the same runs, one dict of arrays by input name for each.

    ``runs`` and ``samples`` are ``None`` where they are known only after a walk. ``labels`` are int64 [samples].
    ``notes`` are sentences about samples that no run holds.
    """

    source: str
    walk: Callable[[], Iterator[Feed]]
    runs: int | None = None
    samples: int | None = None
    labels: Array | None = None
    random: bool = False
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Feed]:
        return self.walk()

    def describe(self) -> str:
        """What a report says of them: ``300 samples of mnist-validation.npz``, ``3 random feeds (batch=2)``."""
        if self.random:
            return _count(self.runs or 0, "random feed") + self.source
        if self.samples is not None:
            return f"{_count(self.samples, 'sample')} of {self.source}"
        return f"runs of {self.source}" if self.runs is None else f"{_count(self.runs, 'run')} of {self.source}"


def read_feeds(spec: Any, model: ir.Model, *, labels: Array | Path_ | None = None) -> Feeds:
    """The samples that ``spec`` names, checked against the inputs of ``model``.

    ``spec`` is the path of an ``x.npz`` (batch first, one array an input; an array without dimensions goes into every
    run), of a folder of ``.npz`` (one run a file, arrays as the inputs take them, in name order), of an ONNX
    ``test_data_set_*`` folder or a folder of them; ``FILE.py:FUNCTION`` or ``module:FUNCTION`` that yields dicts; a
    mapping of arrays (batch first); or an iterable of dicts. Labels are the array ``labels`` in the ``.npz``, or
    ``labels``. Raises ``BadFeeds``, before anything runs, for what does not fit the model.
    """
    inputs = [_Input.of(value) for value in model.graph.inputs]
    if isinstance(spec, Feeds):
        feeds = spec
    elif isinstance(spec, Mapping):
        feeds = _batches(dict(spec), "the data", inputs)
    elif callable(spec):
        feeds = _called(spec, getattr(spec, "__name__", "the data"), inputs)
    elif isinstance(spec, str | os.PathLike):
        feeds = _read(os.fspath(spec), inputs)
    else:
        feeds = _listed(list(spec), inputs)
    if labels is not None:
        given = labels if isinstance(labels, np.ndarray) else read_labels(labels)
        feeds.labels = _labels(given, feeds, "The labels")
    return feeds


def feeds_for(model: ir.Model, data: Any = None, seed: int = 0) -> Feeds:
    """What ``read_feeds`` makes of ``data``, or random feeds where there are none. Raises ``BadFeeds``, ``NoFeeds``."""
    if data is not None:
        return read_feeds(data, model)
    try:
        return random_feeds(model, seed)
    except NoFeeds as error:
        raise NoFeeds(f"This needs sample inputs, give them with --data: {error}") from error


def read_labels(source: Array | Path_) -> Array:
    """Labels, int64 [samples], from an ``.npy`` file or an array. Raises ``BadFeeds``."""
    place = "The array of labels" if isinstance(source, np.ndarray) else os.fspath(source)
    found = source if isinstance(source, np.ndarray) else _load_numpy(Path(source))
    if not isinstance(found, np.ndarray):
        raise BadFeeds(f"{place} holds several arrays; labels are one array in an .npy file.")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise BadFeeds(f"{place} is {_words(found)}; labels are integers, one for each sample: int64 [samples].")
    return found.astype(np.int64)


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``FILE.py:FUNCTION`` or ``module:FUNCTION`` names; ``what`` is the option that asks for it.

    The folder of the file (for a module, the current one) joins the end of the import path. Raises ``UsageError``.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise UsageError(f"{what} takes FILE.py:FUNCTION or module:FUNCTION, not '{spec}'.")
    is_file = source.endswith(".py") or os.sep in source
    if is_file and not Path(source).is_file():
        raise UsageError(f"{what} {spec}: there is no file {source}.")
    try:
        module = _run_file(Path(source)) if is_file else _import(source)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} {spec}: importing {source} raised {type(error).__name__}: {error}") from error
    functions = [key for key, value in vars(module).items() if callable(value)]
    if name not in functions:
        raise UsageError(f"{what} {spec}: {source} has no function '{name}'.{nearest(name, functions)}")
    found: Callable[..., Any] = getattr(module, name)
    return found


def random_feeds(
    model: ir.Model,
    seed: int,
    run: Callable[[Feed], Outputs] | None = None,
    *,
    count: int = 3,
    seconds: float = 10.0,
) -> Feeds:
    """Up to ``count`` random feeds of one shape, the first shape found that ``model`` runs with.

    Symbolic dimensions of one name get one size: a first dimension 2, else 1, the others of ``SIZES`` all the same,
    else mixed. Floats are drawn from N(0, 1), integers of rank ≥ 2 from {0, 1}; integer scalars and vectors are 1, else
    a rate; booleans true, strings empty. ``run`` tells whether a feed runs by raising ``DoesNotRun``; the default runs
    the model within ``seconds`` and 1 GiB. Raises ``NoFeeds``.
    """
    inputs = [given for value in model.graph.inputs if (given := _Input.of(value)).required]
    if odd := [given for given in inputs if given.dtype is None]:
        raise NoFeeds(f"the input {odd[0]} is of a type that no random feed is drawn for")
    deadline = time.monotonic() + seconds
    try:
        run = run or bounded_run(model, seconds=seconds)
    except DoesNotRun as error:
        raise NoFeeds(f"the model does not run: {error}") from error
    first, tried = "", 0
    for sizes, rate in _candidates(inputs):
        if time.monotonic() > deadline:
            raise NoFeeds(f"no random feed ran within {seconds:g} s; of {tried} tried, the first failed: {first}")
        draws = (_draw(inputs, sizes, rate, seed, number) for number in range(count))
        reason = _too_big(inputs, sizes) or _why_not(run, next(draws))
        if reason is None:
            kept = [0, *(number for number, feed in enumerate(draws, 1) if _why_not(run, feed) is None)]
            return _drawn(inputs, sizes, rate, seed, kept)
        first, tried = first or reason, tried + 1
    raise NoFeeds(f"no random feed ran; of {tried} tried, the first failed: {first}")


@dataclass(frozen=True)
class _Input:
    """A model input. Dimensions are sizes, names, or ``None``; ``dims`` is ``None`` where the rank is not known."""

    name: str
    type: ir.TypeProtocol | None
    dims: tuple[int | str | None, ...] | None
    required: bool

    @classmethod
    def of(cls, value: ir.Value) -> _Input:
        dims = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)
        return cls(value.name or "", value.type, dims, value.const_value is None)

    @property
    def dtype(self) -> ir.DataType | None:
        """The element type, or ``None`` for maps and sparse tensors."""
        dtype = getattr(self.type, "dtype", None)
        return dtype if isinstance(dtype, ir.DataType) and not isinstance(self.type, ir.SparseTensorType) else None

    @property
    def optional(self) -> bool:
        return isinstance(self.type, ir.OptionalType)

    @property
    def sequence(self) -> bool:
        inner = self.type.elem_type if isinstance(self.type, ir.OptionalType) else self.type
        return isinstance(inner, ir.SequenceType)

    def axes(self) -> list[int | str]:
        """Its dimensions, each open one under a name; an open one without a name gets its own."""
        dims: tuple[int | str | None, ...] = (None, None) if self.dims is None else self.dims
        return [f"{self.name}.{axis}" if dim is None else dim for axis, dim in enumerate(dims)]

    def __str__(self) -> str:
        shape = "" if self.dims is None else " " + _shape("?" if dim is None else dim for dim in self.dims)
        dtype = _dtype_name(self.dtype) if self.dtype else "of an unknown type"
        return f"'{self.name}' ({'sequence of ' if self.sequence else ''}{dtype}{shape})"


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    """Some exporters write an open dimension as -1 or ``?``, which is no name."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim.value if dim.value not in ("", "?") else None


# --- files, folders, functions ---


def _read(spec: str, inputs: Sequence[_Input]) -> Feeds:
    path = Path(spec)
    if path.is_dir():
        return _folder(path, inputs)
    if path.is_file() and path.suffix == ".npz":
        arrays = _load_numpy(path)
        if isinstance(arrays, np.ndarray):
            raise BadFeeds(f"{spec} is not an .npz archive; write it with numpy.savez.")
        return _batches(arrays, spec, inputs, name=path.name)
    if not path.exists() and ":" in spec:
        return _called(load_function(spec, "--data"), spec, inputs)
    found = "is not one" if path.exists() else "is not there"
    kinds = "an .npz file, a folder of .npz, an ONNX test_data_set_* folder, or FILE.py:FUNCTION"
    raise BadFeeds(f"Feeds are {kinds}; {spec} {found}.")


def _batches(arrays: Mapping[str, Any], place: str, inputs: Sequence[_Input], name: str | None = None) -> Feeds:
    """Arrays whose first axis counts samples, cut into runs."""
    given = {key: np.asarray(value) for key, value in arrays.items()}
    labels = None if any(one.name == "labels" for one in inputs) else given.pop("labels", None)
    by_name = _match_names(given, place, inputs)
    whole = {key for key, array in given.items() if array.ndim == 0 or by_name[key].dims == ()}
    fitted = {key: _fit(array, by_name[key], place, batch=key not in whole) for key, array in given.items()}
    batched = {key: array for key, array in fitted.items() if key not in whole}
    samples = _common_length(batched, place)
    size, fixed = _batch_size([by_name[key] for key in batched], place)
    used = samples - samples % size if fixed else samples
    if used == 0:
        raise BadFeeds(f"{place} has {_count(samples, 'sample')}, and a run of the model takes {size}.")

    def walk() -> Iterator[Feed]:
        for start in range(0, used, size):
            rows = slice(start, min(start + size, used))
            yield {key: array if key in whole else array[rows] for key, array in fitted.items()}

    feeds = Feeds(name or place, walk, math.ceil(used / size), samples)
    if labels is not None:
        feeds.labels = _labels(read_labels(labels), feeds, f"The array 'labels' in {place}")
    if used < samples:
        left = _count(samples - used, "sample")
        feeds.notes.append(f"The last {left} of {samples} in {place} do not fill a batch of {size} and are left out.")
        feeds.samples, feeds.labels = used, None if feeds.labels is None else feeds.labels[:used]
    return feeds


def _folder(folder: Path, inputs: Sequence[_Input]) -> Feeds:
    """One run for each ``.npz``, or for each ONNX data set."""
    sets = [folder] if (folder / "input_0.pb").is_file() else sorted(folder.glob("test_data_set_*"), key=_by_number)
    files = sets or sorted(folder.glob("*.npz"))
    if not files:
        raise BadFeeds(f"{folder} holds neither .npz files nor ONNX test_data_set_* folders.")
    has_labels = not sets and all(one.name != "labels" for one in inputs)
    labels: list[Array] = []

    def read(path: Path) -> tuple[Feed, Any]:
        found = _read_data_set(path, inputs) if sets else _load_numpy(path)
        if isinstance(found, np.ndarray):
            raise BadFeeds(f"{path} is not an .npz archive; write it with numpy.savez.")
        label = found.pop("labels", None) if has_labels else None
        return _fit_all(found, str(path), inputs), label

    for path in files:
        label = read(path)[1]
        labels += [] if label is None else [read_labels(np.atleast_1d(label))]
    feeds = Feeds(folder.name or str(folder), lambda: (read(path)[0] for path in files), len(files))
    if labels:
        feeds.labels = np.concatenate(labels)
    return feeds


def _called(function: Callable[[], Iterable[Mapping[str, Any]]], name: str, inputs: Sequence[_Input]) -> Feeds:
    """What a function yields. The first run is checked now, and must be the same on each walk."""

    def walk() -> Iterator[Feed]:
        try:
            made = iter(function())
        except Exception as error:
            raise BadFeeds(f"{name} raised {type(error).__name__}: {error}") from error
        for number in itertools.count():
            try:
                feed = next(made)
            except StopIteration:
                return
            except Exception as error:
                raise BadFeeds(f"{name} raised {type(error).__name__} after {number} runs: {error}") from error
            if not isinstance(feed, Mapping):
                raise BadFeeds(f"{name} gave {type(feed).__name__}; it must yield dicts, one array for each input.")
            yield _fit_all(feed, f"run {number} of {name}", inputs)

    first = next(walk(), None)
    if first is None:
        raise BadFeeds(f"{name} yields no samples.")
    digest = _digest(first)

    def steady() -> Iterator[Feed]:
        for number, feed in enumerate(walk()):
            if number == 0 and _digest(feed) != digest:
                raise BadFeeds(f"{name} gives other arrays each time it is called; seed its random numbers.")
            yield feed

    return Feeds(name, steady)


def _listed(feeds: Sequence[Any], inputs: Sequence[_Input]) -> Feeds:
    if not feeds:
        raise BadFeeds("The data hold no samples.")
    if wrong := [type(feed).__name__ for feed in feeds if not isinstance(feed, Mapping)]:
        raise BadFeeds(f"The data hold {wrong[0]}; each run is a dict, one array for each input.")
    fitted = [_fit_all(feed, f"run {number} of the data", inputs) for number, feed in enumerate(feeds)]
    return Feeds("the data", lambda: iter([dict(feed) for feed in fitted]), len(fitted))


def _load_numpy(path: Path) -> Array | dict[str, Array]:
    """The array of an ``.npy`` or the arrays of an ``.npz``; pickled ones are refused, since they can run code."""
    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            return found if isinstance(found, np.ndarray) else {key: found[key] for key in found.files}
    except FileNotFoundError as error:
        raise BadFeeds(f"There is no file {path}.") from error
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadFeeds(f"{path} cannot be read as numpy arrays: {what}") from error


def _read_data_set(folder: Path, inputs: Sequence[_Input]) -> Feed:
    """``input_<n>.pb`` of one ONNX test data set, by position."""
    files = sorted(folder.glob("input_*.pb"), key=_by_number)
    required = [one for one in inputs if one.required]
    given = required if len(files) <= len(required) else inputs
    if len(files) > len(given):
        raise BadFeeds(f"{folder} has {len(files)} inputs, and the model takes {len(given)}.")
    return {one.name: _read_proto(file, one) for one, file in zip(given, files, strict=False)}


def _read_proto(path: Path, wanted: _Input) -> Any:
    from onnx import numpy_helper

    try:
        data = path.read_bytes()
        if wanted.optional:
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
        if wanted.sequence:
            return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
        return numpy_helper.to_array(onnx.TensorProto.FromString(data))
    except Exception as error:
        raise BadFeeds(f"{path} is not the protobuf of {wanted}: {error}") from error


def _by_number(path: Path) -> tuple[int, str]:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1, path.name


def _run_file(path: Path) -> Any:
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"penjing_user_{path.stem}"  # never the name of a module that someone else imports
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


# --- fitting arrays to inputs ---


def _fit_all(given: Mapping[str, Any], place: str, inputs: Sequence[_Input]) -> Feed:
    by_name = _match_names(given, place, inputs)
    return {key: _fit(value, by_name[key], place) for key, value in given.items()}


def _match_names(given: Mapping[str, Any], place: str, inputs: Sequence[_Input]) -> dict[str, _Input]:
    by_name = {one.name: one for one in inputs}
    takes = ", ".join(map(str, inputs)) or "none"
    if unknown := [key for key in given if key not in by_name]:
        hint = nearest(unknown[0], by_name)
        raise BadFeeds(f"{place} has '{unknown[0]}', which is no input of the model.{hint} Its inputs are {takes}.")
    if missing := [one for one in inputs if one.required and not one.optional and one.name not in given]:
        raise BadFeeds(f"{place} has no array for the input {missing[0]}; it has {', '.join(given) or 'nothing'}.")
    return by_name


def _fit(value: Any, wanted: _Input, place: str, batch: bool = False) -> Any:
    """``value`` as a session takes it. ``batch``: its first axis counts samples, whatever the model's dimension."""
    if value is None and wanted.optional:
        return None
    if wanted.sequence:
        if not isinstance(value, list | tuple):
            raise BadFeeds(f"{place}: {wanted} takes a list of arrays, one list a run; a function can yield it.")
        return [_fit_array(np.asarray(item), wanted, None, place, False) for item in value]
    return _fit_array(np.asarray(value), wanted, wanted.dims, place, batch)


def _fit_array(
    array: Array, wanted: _Input, dims: tuple[int | str | None, ...] | None, place: str, batch: bool
) -> Array:
    array = _fit_dtype(array, wanted, place)
    if dims is not None:
        expected = (None, *dims[1:]) if batch else dims
        fits = len(expected) == array.ndim and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(expected, array.shape, strict=True)
        )
        if not fits:
            first = ", the first axis counting samples" if batch else ""
            raise BadFeeds(
                f"{place}: '{wanted.name}' has shape {_shape(array.shape)}; the model takes {wanted}{first}."
            )
    if array.dtype.kind in "fcV" and (nan := array != array).any():
        where = f" in sample {int(np.argwhere(nan)[0][0])}" if batch else ""
        raise BadFeeds(f"{place}: '{wanted.name}' holds NaN{where}; leave such samples out.")
    return array


def _fit_dtype(array: Array, wanted: _Input, place: str) -> Array:
    if wanted.dtype is None:
        return array
    expected = wanted.dtype.numpy()
    if array.dtype == expected or (wanted.dtype is ir.DataType.STRING and array.dtype.kind in "UO"):
        return array.astype(object) if array.dtype.kind == "U" else array
    if array.dtype == np.dtype(f"V{expected.itemsize}") and expected.kind == "V":
        return array.view(expected)  # .npz keeps the bits of bfloat16 and its like, not the type
    name = _dtype_name(wanted.dtype)
    found = "strings" if array.dtype.kind in "OUS" else array.dtype.name
    remedy = "" if wanted.dtype is ir.DataType.STRING else f"; convert it with .astype('{name}')"
    raise BadFeeds(f"{place}: '{wanted.name}' is {found}, the model takes {name}{remedy}.")


def _common_length(batched: Mapping[str, Array], place: str) -> int:
    lengths = {key: len(array) for key, array in batched.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"'{key}' {length}" for key, length in lengths.items())
        remedy = "A folder of .npz files, one a run, takes arrays of any length."
        raise BadFeeds(f"{place}: the arrays hold unlike numbers of samples: {counts}. {remedy}")
    return next(iter(lengths.values()), 1)


def _batch_size(inputs: Sequence[_Input], place: str) -> tuple[int, bool]:
    """Samples a run, and whether the model insists on that number."""
    fixed = {one.name: one.dims[0] for one in inputs if one.dims and isinstance(one.dims[0], int)}
    if len(set(fixed.values())) > 1:
        sizes = ", ".join(f"'{name}' {size}" for name, size in fixed.items())
        remedy = "Give a folder of .npz files, one a run."
        raise BadFeeds(f"{place}: the model takes unlike numbers of samples a run: {sizes}. {remedy}")
    return (max(1, next(iter(fixed.values()))), True) if fixed else (BATCH, False)


def _labels(labels: Array, feeds: Feeds, place: str) -> Array:
    if feeds.samples is not None and len(labels) != feeds.samples:
        raise BadFeeds(f"{place} are {len(labels)}, and {feeds.source} has {_count(feeds.samples, 'sample')}.")
    return read_labels(labels)


def _digest(feed: Feed) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in feed.items():
        plain = isinstance(value, np.ndarray) and value.dtype != object
        digest.update(name.encode() + (value.tobytes() if plain else repr(value).encode()))
    return digest.hexdigest()


# --- random feeds ---


def _candidates(inputs: Sequence[_Input]) -> Iterator[tuple[dict[str, int], int]]:
    """Sizes of the open dimensions, and the value of integer scalars, in the order in which they are tried."""
    axes = [one.axes() for one in inputs]
    batch = dict.fromkeys(first[0] for first in axes if first and isinstance(first[0], str))
    others = list(dict.fromkeys(key for one in axes for key in one if isinstance(key, str) and key not in batch))
    rates = RATES if any(_is_rate(one) for one in inputs) else RATES[:1]
    for pick in (_alike, _mixed):
        for rate, lead in itertools.product(rates, (2, 1) if batch else (1,)):
            for sizes in pick(others):
                yield dict.fromkeys(batch, lead) | sizes, rate


def _alike(names: Sequence[str]) -> Iterator[dict[str, int]]:
    return (dict.fromkeys(names, size) for size in (SIZES if names else SIZES[:1]))


def _mixed(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Unlike sizes, those whose largest is small first, since drawing large ones takes long."""
    for count, largest in enumerate(SIZES[1:], 2):
        for sizes in itertools.product(SIZES[:count], repeat=len(names)):
            if largest in sizes and len(set(sizes)) > 1:
                yield dict(zip(names, sizes, strict=True))


def _is_rate(one: _Input) -> bool:
    return one.dtype is not None and one.dtype.is_integer() and one.dims is not None and len(one.dims) < 2


def _resolve(one: _Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[key] if isinstance(key, str) else key for key in one.axes())


def _too_big(inputs: Sequence[_Input], sizes: Mapping[str, int]) -> str | None:
    total = sum(math.prod(_resolve(one, sizes)) * _item_bytes(one.dtype) for one in inputs)
    return f"its inputs take {total / 2**20:,.0f} MiB" if total > RANDOM_BYTES else None


def _item_bytes(dtype: ir.DataType | None) -> float:
    return 8 if dtype is None or dtype is ir.DataType.STRING else dtype.itemsize


def _draw(inputs: Sequence[_Input], sizes: Mapping[str, int], rate: int, seed: int, number: int) -> Feed:
    rng = np.random.default_rng([seed, number])
    drawn = {one.name: _draw_one(one, _resolve(one, sizes), rate, rng) for one in inputs}
    return {one.name: [drawn[one.name]] if one.sequence else drawn[one.name] for one in inputs}


def _draw_one(one: _Input, shape: tuple[int, ...], rate: int, rng: np.random.Generator) -> Array:
    assert one.dtype is not None
    dtype = one.dtype.numpy()
    if one.dtype is ir.DataType.STRING:
        return np.full(shape, "", object)
    if one.dtype is ir.DataType.BOOL:
        return np.ones(shape, dtype)
    if one.dtype.is_integer():
        return rng.integers(0, 2, shape).astype(dtype) if len(shape) >= 2 else np.full(shape, rate).astype(dtype)
    if dtype.kind == "c":
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape, np.float64 if dtype == np.float64 else np.float32)).astype(dtype)


def _why_not(run: Callable[[Feed], Outputs], feed: Feed) -> str | None:
    try:
        outputs = run(feed)
    except DoesNotRun as error:
        return str(error)
    return "all outputs are NaN" if _all_nan(outputs) else None


def _all_nan(outputs: Outputs) -> bool:
    arrays = [value for value in outputs.values() if isinstance(value, np.ndarray) and value.size]
    floats = [array.astype(np.float32) for array in arrays if array.dtype.kind in "fV"]
    return bool(floats) and len(floats) == len(arrays) and all(np.isnan(array).all() for array in floats)


def _drawn(inputs: Sequence[_Input], sizes: Mapping[str, int], rate: int, seed: int, kept: Sequence[int]) -> Feeds:
    words = [f"{key}={size}" for key, size in sizes.items()]
    words += [f"{one.name}={rate}" for one in inputs if _is_rate(one)]
    source = f" ({', '.join(words)})" if words else ""

    def walk() -> Iterator[Feed]:
        return (_draw(inputs, sizes, rate, seed, number) for number in kept)

    return Feeds(source, walk, len(kept), random=True)


# --- words ---


def _dtype_name(dtype: ir.DataType) -> str:
    return "string" if dtype is ir.DataType.STRING else dtype.numpy().name


def _shape(sizes: Iterable[int | str]) -> str:
    return f"[{','.join(map(str, sizes))}]"


def _words(array: Array) -> str:
    return f"{array.dtype.name} {_shape(array.shape)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
