"""Sample inputs, read from files, folders, functions and arrays, and checked against a model."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir as ir

from ..ir.errors import BadFeeds, one_line
from ..passes.base import Array
from .functions import load_function
from .inputs import Feed, Input, batch_size, common_length, counted, fit, fit_all, match_names, words
from .sizes import machine_bytes

Path_ = str | os.PathLike[str]
Labels = Array | Sequence[int] | Sequence[str] | Path_  # integers or text [samples], or the path of such an .npy


@dataclass(eq=False)
class Feeds:
    """Sample inputs for one model: each walk yields the same runs, one dict of arrays by input name for each.

    ``runs`` and ``samples`` are ``None`` where they are known only after a walk. ``left_out`` counts samples that fill
    no batch. ``labels`` are [samples], int64 or text.
    ``notes`` are sentences about samples that no run holds.
    """

    source: str
    walk: Callable[[], Iterator[Feed]]
    runs: int | None = None
    samples: int | None = None
    left_out: int = 0
    labels: Array | None = None
    random: bool = False
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Feed]:
        return self.walk()

    def describe(self) -> str:
        """What a report says of them: ``300 samples of mnist-validation.npz``, ``3 random feeds (batch=2)``."""
        if self.random:
            return counted(self.runs or 0, "random feed") + self.source
        if self.samples is not None:
            return f"{counted(self.samples, 'sample')} of {self.source}"
        return f"runs of {self.source}" if self.runs is None else f"{counted(self.runs, 'run')} of {self.source}"


def read_feeds(spec: Any, model: ir.Model, *, labels: Labels | None = None) -> Feeds:
    """The samples that ``spec`` names, checked against the inputs of ``model``.

    ``spec`` is the path of an ``x.npz`` (batch first, one array an input; an array without dimensions goes into every
    run), of a folder of ``.npz`` (one run a file, arrays as the inputs take them, in name order), of an ONNX
    ``test_data_set_*`` folder or a folder of them; ``FILE.py:FUNCTION`` or ``module:FUNCTION`` that yields dicts; a
    mapping of arrays (batch first); or an iterable of dicts. Labels are the array ``labels`` in the ``.npz``, or
    ``labels``. Raises ``BadFeeds``, before anything runs, for what does not fit the model.
    """
    inputs = [Input.of(value) for value in model.graph.inputs]
    if isinstance(spec, Feeds):
        feeds = spec
    elif isinstance(spec, Mapping):
        feeds = _batches(dict(spec), "the data", inputs)
    elif callable(spec):
        feeds = _called(spec, getattr(spec, "__name__", "the data"), inputs)
    elif isinstance(spec, str | os.PathLike):
        feeds = _read(os.fspath(spec), inputs)
    elif isinstance(spec, Iterable):
        feeds = _listed(list(spec), inputs)
    else:
        raise BadFeeds(f"The data are {spec!r}; they must be a path, a mapping of arrays or a list of mappings.")
    if labels is not None:
        feeds.labels = _labels(read_labels(labels), feeds, "The labels")
    return feeds


def read_labels(source: Labels) -> Array:
    """Labels [samples], int64 or text, from an ``.npy`` file, an array or a list. Raises ``BadFeeds``."""
    if isinstance(source, str | os.PathLike):
        place, found = os.fspath(source), _load_numpy(Path(source))
    else:
        place, found = "The array of labels", np.asarray(source)
    if not isinstance(found, np.ndarray):
        raise BadFeeds(f"{place} holds several arrays; labels are one array in an .npy file.")
    if found.dtype == object and all(isinstance(one, str) for one in found.flat):
        found = found.astype(np.str_)
    if found.ndim != 1 or found.dtype.kind not in "iuU":
        raise BadFeeds(f"{place} is {words(found)}; labels are integers, one for each sample, or text.")
    if found.dtype.kind == "u" and found.max(initial=0) > np.iinfo(np.int64).max:
        raise BadFeeds(f"{place} holds {found.max()}, which is past int64; labels are classes.")
    return found if found.dtype.kind == "U" else found.astype(np.int64)


def _read(spec: str, inputs: Sequence[Input]) -> Feeds:
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


def _batches(arrays: Mapping[str, Any], place: str, inputs: Sequence[Input], name: str | None = None) -> Feeds:
    """Arrays whose first axis counts samples, cut into runs."""
    given = {key: np.asarray(value) for key, value in arrays.items()}
    labels = None if any(one.name == "labels" for one in inputs) else given.pop("labels", None)
    by_name = match_names(given, place, inputs)
    whole = {key for key, array in given.items() if array.ndim == 0 or by_name[key].dims == ()}
    fitted = {key: fit(array, by_name[key], place, batch=key not in whole) for key, array in given.items()}
    batched = {key: array for key, array in fitted.items() if key not in whole}
    samples = common_length(batched, place)
    size, fixed = batch_size([by_name[key] for key in batched], place)
    used = samples - samples % size if fixed else samples
    if used == 0:
        raise BadFeeds(f"{place} has {counted(samples, 'sample')}, and a run of the model takes {size}.")

    def walk() -> Iterator[Feed]:
        for start in range(0, used, size):
            rows = slice(start, min(start + size, used))
            yield {key: array if key in whole else array[rows] for key, array in fitted.items()}

    feeds = Feeds(name or place, walk, math.ceil(used / size), samples)
    if used < samples:
        left = counted(samples - used, "sample")
        feeds.notes.append(f"The last {left} of {samples} in {place} do not fill a batch of {size} and are left out.")
        feeds.samples, feeds.left_out = used, samples - used
    if labels is not None:
        feeds.labels = _labels(read_labels(labels), feeds, f"The array 'labels' in {place}")
    return feeds


def _folder(folder: Path, inputs: Sequence[Input]) -> Feeds:
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
        return fit_all(found, str(path), inputs), label

    for path in files:
        label = read(path)[1]
        labels += [] if label is None else [read_labels(np.atleast_1d(label))]
    feeds = Feeds(folder.name or str(folder), lambda: (read(path)[0] for path in files), len(files))
    if labels:
        feeds.labels = np.concatenate(labels)
    return feeds


def _called(function: Callable[[], Iterable[Mapping[str, Any]]], name: str, inputs: Sequence[Input]) -> Feeds:
    """What a function yields. The first run is checked now, and must be the same on each walk."""

    def walk() -> Iterator[Feed]:
        try:
            made = iter(function())
        except (Exception, SystemExit) as error:
            raise BadFeeds(f"{name} raised {one_line(error)}") from error
        for number in itertools.count():
            try:
                feed = next(made)
            except StopIteration:
                return
            except (Exception, SystemExit) as error:
                raise BadFeeds(f"{name} raised {one_line(error)} (after {number} runs)") from error
            if not isinstance(feed, Mapping):
                raise BadFeeds(f"{name} gave {type(feed).__name__}; it must yield dicts, one array for each input.")
            yield fit_all(feed, f"run {number} of {name}", inputs)

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


def _listed(feeds: Sequence[Any], inputs: Sequence[Input]) -> Feeds:
    if not feeds:
        raise BadFeeds("The data hold no samples.")
    if wrong := [type(feed).__name__ for feed in feeds if not isinstance(feed, Mapping)]:
        raise BadFeeds(f"The data hold {wrong[0]}; each run is a dict, one array for each input.")
    fitted = [fit_all(feed, f"run {number} of the data", inputs) for number, feed in enumerate(feeds)]
    return Feeds("the data", lambda: iter([dict(feed) for feed in fitted]), len(fitted))


def _load_numpy(path: Path) -> Array | dict[str, Array]:
    """The array of an ``.npy`` or the arrays of an ``.npz``; pickled ones are refused, since they can run code."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            _require_room(file)
            found = np.load(file, allow_pickle=False)
            return found if isinstance(found, np.ndarray) else {key: found[key] for key in found.files}
    except FileNotFoundError as error:
        raise BadFeeds(f"There is no file {path}.") from error
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        if what.startswith("Object arrays"):
            what = "it holds Python objects, which can run code when they are read; save text with .astype(str)"
        raise BadFeeds(f"{path} cannot be read as numpy arrays: {what}") from error


def _require_room(file: IO[bytes]) -> None:
    """Raise ``ValueError`` for an archive that unpacks to more than half of the machine's memory."""
    if zipfile.is_zipfile(file):
        size = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
        if size > machine_bytes() // 2:
            raise ValueError(f"it unpacks to {size / 1e9:,.1f} GB, over half of this machine's memory")
    file.seek(0)


def write_data_set(feed: Mapping[str, Any], model: ir.Model, folder: Path) -> None:
    """Write one run as an ONNX test data set: ``input_<n>.pb`` in the order of the inputs of ``model``."""
    from onnx import numpy_helper

    folder.mkdir(parents=True)
    given = [(value.name or "", value.type) for value in model.graph.inputs if value.name in feed]
    for place, (name, kind) in enumerate(given):
        if isinstance(kind, ir.OptionalType):
            proto: Any = numpy_helper.from_optional(feed[name], name)
        elif isinstance(kind, ir.SequenceType):
            proto = numpy_helper.from_list(feed[name], name)
        else:
            proto = numpy_helper.from_array(np.asarray(feed[name]), name)
        (folder / f"input_{place}.pb").write_bytes(proto.SerializeToString())


def _read_data_set(folder: Path, inputs: Sequence[Input]) -> Feed:
    """``input_<n>.pb`` of one ONNX test data set, by position."""
    files = sorted(folder.glob("input_*.pb"), key=_by_number)
    required = [one for one in inputs if one.required]
    given = required if len(files) <= len(required) else inputs
    if len(files) > len(given):
        raise BadFeeds(f"{folder} has {len(files)} inputs, and the model takes {len(given)}.")
    return {one.name: _read_proto(file, one) for one, file in zip(given, files, strict=False)}


def _read_proto(path: Path, wanted: Input) -> Any:
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


def _labels(labels: Array, feeds: Feeds, place: str) -> Array:
    """Labels of the samples in ``feeds``; those of samples that no run holds may be among them."""
    if feeds.samples is not None and len(labels) not in (feeds.samples, feeds.samples + feeds.left_out):
        raise BadFeeds(f"{place} are {len(labels)}, and {feeds.source} has {counted(feeds.samples, 'sample')}.")
    return read_labels(labels)[: feeds.samples]


def _digest(feed: Feed) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in feed.items():
        plain = isinstance(value, np.ndarray) and value.dtype != object
        digest.update(name.encode() + (value.tobytes() if plain else repr(value).encode()))
    return digest.hexdigest()
