"""The one place that knows ONNX Runtime: its options, what the installed version takes, and the passes' runner."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import onnx
import onnx_ir as ir

from ..ir import files
from ..ir.address import bodies, printable
from ..ir.apart import Gone, apart
from ..ir.errors import BadFile, PenjingError, UsageError, nearest, one_line
from ..ir.interrupts import uninterrupted
from ..ir.tensors import standing_in, tensors
from ..ir.text import text
from ..ir.versions import greatest_need, needed_ir_version
from ..passes.base import Array, Feeds, Outputs
from ..passes.points import Point
from .interrupt import stoppable
from .sizes import too_large

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from .progress import Progress

Level = Literal["off", "basic", "extended", "all"]
Metric = Callable[["InferenceSession"], float]

LARGE = 256 * 2**20  # bytes of weights above which a model is memory-mapped, not copied into a session
TRIAL_BYTES = 2**30  # activations that a trial run may take
WHOLE = 1536 * 2**20  # bytes of weights up to which a model can be held as one protobuf message, some times over
OPENING_SECONDS = 300  # that opening a session may take at first
_GROWTH = 2**24  # bytes by which their memory grows at most, where one value does not ask for more
_INLINE = 32 * 2**20  # bytes of weights that go beside mapped ones: they are held three times on the way
_FOLDED = 2**20  # bytes of what ONNX Runtime computes ahead in a mapped model
_COPYING = (
    "NchwcTransformer;TransposeOptimizer;ConvBNFusion;ConvMulFusion;ConvAddFusion;MatMul_BatchNormalization_Fusion"
)
"""ONNX Runtime's optimizations that write weights anew, into memory: not for a mapped model."""
_LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_PROBED_FROM = (17, 8)  # opset and IR version that every supported ONNX Runtime takes
# Element types that ONNX Runtime's Python interface cannot hand over as a numpy array of the right dtype.
_UNREADABLE = "FLOAT8E8M0 BFLOAT16 FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ INT4 UINT4 INT2 UINT2"
_TENSOR_TYPES = {f"tensor({name.lower()})": ir.DataType[name] for name in _UNREADABLE.split()}


class DoesNotRun(PenjingError):
    """ONNX Runtime refuses a model, or fails to run it; the message is its reason in one sentence."""


@functools.cache
def _ort() -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # its errors reach us as exceptions; the log would say them twice
    return onnxruntime


def version() -> str:
    """The version of the installed ONNX Runtime."""
    return str(_ort().__version__)


@functools.cache
def limits() -> tuple[int, int]:
    """The newest (opset, IR version) that the installed ONNX Runtime takes, found by trying."""
    opset, ir_version = _PROBED_FROM
    newest_opset = next(n for n in itertools.count(opset) if n > 200 or not _takes(n + 1, ir_version))
    newest_ir = next(n for n in itertools.count(ir_version) if n > 200 or not _takes(opset, n + 1))
    return newest_opset, newest_ir


def load(path: str | os.PathLike[str], *, runnable: bool = False) -> ir.Model:
    """Read an ONNX model as ``ir.files.load`` does; ``runnable`` refuses what the installed ONNX Runtime does not take.

    Raises ``BadFile``.
    """
    model = files.load(path)
    if runnable:
        require_runnable(model, printable(os.fspath(path)))
    return model


def why_not_runnable(model: ir.Model) -> str | None:
    """The reason, as a clause, why the installed ONNX Runtime does not take ``model``, or ``None`` where it does."""
    if reason := _too_new(model) or too_large(model):
        return reason

    def opened() -> str:
        try:
            open_session(model)
        except DoesNotRun as error:
            return str(error)
        return ""

    try:
        return trial(opened, model, seconds=OPENING_SECONDS) or None
    except DoesNotRun as error:
        return str(error)


def trial(function: Callable[[], str], model: ir.Model, *, seconds: float, room: int | None = None) -> str:
    """What ``function``, which opens or runs ``model``, says: asked in a process of its own, for ONNX Runtime crashes
    on some models that it takes. Raises ``DoesNotRun`` where that crashes, or takes more than ``seconds`` or ``room``
    bytes of memory (None: some times the weights, and as much again as activations of a trial may take).
    """
    limits()  # imports ONNX Runtime and asks it, which a process that ends cannot keep

    def run(folder: bytes) -> bytes:
        before, tempfile.tempdir = tempfile.tempdir, os.fsdecode(folder)
        try:
            return function().encode()
        finally:
            tempfile.tempdir = before

    with tempfile.TemporaryDirectory(prefix="penjing-") as folder:  # goes with what a process that was killed left
        try:
            room = 2 * TRIAL_BYTES + 4 * tensor_bytes(model) if room is None else room
            return apart(run, os.fsencode(folder), seconds=seconds, room=room).decode()
        except Gone as error:
            raise DoesNotRun(f"ONNX Runtime was tried in a process of its own, and {error}.") from error


def require_runnable(model: ir.Model, place: str) -> None:
    """Raise ``BadFile``, which names ``place``, where the installed ONNX Runtime does not take ``model``."""
    if reason := why_not_runnable(model):
        raise BadFile(f"{place} does not run here: {reason}")


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all weights of ``model``, once decoded from its file: initializers, bodies and Constant nodes."""
    return sum(tensor.nbytes for _, tensor in tensors(model))


def open_session(
    model: ir.Model | str | os.PathLike[str],
    *,
    level: str = "all",
    threads: int = 1,
    prepack: bool | None = None,
    bounded: bool = False,
    planned: bool = True,
) -> InferenceSession:
    """A session on the CPU that logs nothing.

    ``prepack=None`` packs the weights of a model up to ``LARGE`` bytes (and of any file given by its path), and maps
    those of a larger one without a copy; where they are not to be packed they are mapped from ``_INLINE`` bytes on.
    Packing changes the last bits of a MatMul: two sessions that are compared need the same choice. ``bounded`` makes a
    run fail that wants more than ``TRIAL_BYTES`` for activations. ``planned`` lets a run take its memory in one piece
    where one before had equal shapes; until then there is that of both.

    Raises ``DoesNotRun`` with ONNX Runtime's reason, ``UsageError`` for an unknown level.
    """
    if isinstance(model, ir.Model):
        if reason := _too_new(model):
            raise DoesNotRun(reason)
        size = tensor_bytes(model)
        options = _options(level, threads, size <= LARGE if prepack is None else prepack, bounded)
        options.enable_mem_pattern = planned
        mapped = size > LARGE or (prepack is False and size > _INLINE)
        return _open_mapped(model, options) if mapped else _open(_inline(model), options)
    return _open(os.fspath(model), _options(level, threads, prepack is not False, bounded))


def optimized(model: ir.Model) -> ir.Model:
    """The graph that ONNX Runtime makes of ``model`` at level all, with its own operators, to look at; not to be saved.

    Raises ``DoesNotRun`` with ONNX Runtime's reason, or where the weights are past ``WHOLE`` bytes: they are copied.
    """
    size = tensor_bytes(model)
    if reason := _too_new(model):
        raise DoesNotRun(reason)
    if size > WHOLE:
        raise DoesNotRun(f"its weights take {size / 1e9:.1f} GB, and only of a smaller model can the kernels be seen.")
    options = _options("all", 1, True, False)
    # Into blocks of channels it would put float convolutions last of all, and they would lose their names.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "NchwcTransformer")
    with tempfile.TemporaryDirectory(prefix="penjing-", ignore_cleanup_errors=True) as folder:
        options.optimized_model_filepath = os.path.join(folder, "model.onnx")
        _open(_inline(model), options)
        return ir.from_proto(onnx.load(options.optimized_model_filepath))


def run_feed(
    session: InferenceSession,
    feed: Mapping[str, Any],
    outputs: Sequence[str] | None = None,
    *,
    place: str = "",
    options: Any = None,
) -> dict[str, Any]:
    """The outputs of one run, by name: arrays, lists (sequences), dicts (maps) and ``None`` (empty optionals).

    Types that numpy lacks come as ``ml_dtypes``. Raises ``DoesNotRun`` with ONNX Runtime's reason; it names ``place``.
    """
    types = {output.name: output.type for output in session.get_outputs()}
    names = list(types) if outputs is None else list(outputs)
    unreadable = [name for name in names if types.get(name) in _TENSOR_TYPES]
    plain = [name for name in names if name not in unreadable]
    options = options or _run_options()
    try:
        given = {name: _ort_input(value) for name, value in feed.items()}
        found = dict(zip(plain, session.run(plain, given, options), strict=True)) if plain else {}
        if unreadable:
            values = {name: _ort_value(value) for name, value in given.items()}
            raw = session.run_with_ort_values(unreadable, values, options)
            found |= {name: _array(value) for name, value in zip(unreadable, raw, strict=True)}
    except Exception as error:
        reason = f"{_reason(error)}{_hint(session, feed)}"
        raise DoesNotRun(f"{place} fails: {reason}" if place else reason) from error
    return {name: found[name] for name in names}


def _hint(session: InferenceSession, feed: Mapping[str, Any]) -> str:
    """What to try where several samples ran together, and each input leaves open how many."""
    counts = {array.shape[0] if isinstance(array, np.ndarray) and array.ndim else 0 for array in feed.values()}
    taken = [one.shape for one in session.get_inputs() if one.name in feed]
    if len(counts) != 1 or max(counts) < 2 or any(not shape or isinstance(shape[0], int) for shape in taken):
        return ""
    return " If it takes one sample at a time, whatever its inputs say, give a folder of .npz with one in each."


def bounded_run(model: ir.Model, *, seconds: float) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that runs one feed, within ``seconds`` for all its calls together and ``TRIAL_BYTES`` of activations.

    Raises ``DoesNotRun``; so does each call whose run fails, is cut short by the clock, or wants too much memory.
    """
    session = open_session(model, bounded=True)
    deadline = time.monotonic() + seconds

    def run(feed: Mapping[str, Any]) -> dict[str, Any]:
        options = _run_options(shrink=True)
        clock = threading.Timer(max(0.0, deadline - time.monotonic()), setattr, (options, "terminate", True))
        clock.daemon = True
        clock.start()
        try:
            return run_feed(session, feed, options=options)
        except DoesNotRun as error:
            _release_arena()
            if time.monotonic() >= deadline:
                raise DoesNotRun(f"it does not end within {seconds:g} s.") from error
            raise
        finally:
            clock.cancel()

    return run


def bare_run(session: InferenceSession, feed: Mapping[str, Any]) -> Callable[[], Any]:
    """A call that runs ``feed`` and does nothing else, for clocks."""
    given = {name: _ort_input(value) for name, value in feed.items()}
    if any(output.type in _TENSOR_TYPES for output in session.get_outputs()):
        values = {name: _ort_value(value) for name, value in given.items()}
        return functools.partial(session.run_with_ort_values, None, values, _run_options())
    return functools.partial(session.run, None, given, _run_options())


@dataclass(frozen=True)
class Taken:
    """What ``model`` takes of ``feeds``: passes may change the inputs, and feeds then hold those before and after."""

    feeds: Feeds
    model: ir.Model

    @property
    def runs(self) -> int | None:
        """How many feeds there are, where that is known."""
        return getattr(self.feeds, "runs", None)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        names = {value.name for value in self.model.graph.inputs}
        return ({name: value for name, value in feed.items() if name in names} for feed in self.feeds)


class OrtRunner:
    """Runs models with ONNX Runtime, on one thread by default: the ``Runner`` of ``passes.base``.

    ``metric`` maps a session to a float, higher is better; ``metric_name`` is what messages call it.
    ``prepack`` as in ``open_session``; give one choice for models whose outputs are compared. ``progress`` is told of
    walks over the data.
    """

    def __init__(
        self,
        metric: Metric | None = None,
        *,
        metric_name: str | None = None,
        threads: int = 1,
        prepack: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.metric = metric
        self.metric_name = str(metric_name or getattr(metric, "__name__", "metric"))
        self.threads = threads
        self.prepack = prepack
        self.progress = progress
        self.exact = False
        self._scores: dict[str, float] = {}

    def session(self, model: ir.Model, level: str = "all") -> InferenceSession:
        """A session with this runner's threads and packing."""
        return open_session(model, level=level, threads=self.threads, prepack=self.prepack)

    def run(
        self, model: ir.Model, feeds: Feeds, outputs: Sequence[str] | None = None, level: str = "all"
    ) -> Iterator[Outputs]:
        """The outputs of each feed, as they are computed; ``outputs`` may name any values of the main graph.

        A feed may hold more than the model takes. Raises ``DoesNotRun``, or ``UsageError`` for a name that the main
        graph lacks.
        """
        session = self.session(model if outputs is None else _with_outputs(model, outputs), level)
        return (run_feed(session, feed, outputs) for feed in Taken(feeds, model))

    def statistics(self, model: ir.Model, points: Iterable[Point], feeds: Feeds) -> dict[Point, Any]:
        """What each point asks for, from one sweep over the feeds; see ``statistics.collect``."""
        from .statistics import collect

        return collect(model, points, Taken(feeds, model), threads=self.threads, progress=self.progress)

    def score(self, model: ir.Model) -> float:
        """The metric of ``model``, taken once for models that are equal in every bit.

        Raises ``UsageError`` where it raises or returns anything but a finite number.
        """
        if self.metric is None:
            raise UsageError("No metric was given; name one with --metric FILE.py:FUNCTION.")
        whole = blake2b(text(model, digests=True).encode()).hexdigest()
        if whole not in self._scores:
            self._scores[whole] = self._scored(model, self.metric)
        return self._scores[whole]

    def _scored(self, model: ir.Model, metric: Metric) -> float:
        session = self.session(model)
        try:
            found = metric(session)
        except (Exception, SystemExit) as error:
            raise UsageError(f"The metric {self.metric_name} raised {one_line(error)}") from error
        try:
            number = float(found)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(found, str) or not math.isfinite(number):
            raise UsageError(f"The metric {self.metric_name} returned {found!r}; it must return a finite number.")
        return number

    def newest_opset(self) -> int:
        """The newest version of the ONNX domain that the installed ONNX Runtime takes."""
        return limits()[0]

    def time(self, models: Sequence[ir.Model], feeds: Feeds, seconds: float = 1.0) -> list[float]:
        """Median seconds a run of each model, interleaved; CPU seconds where this runner has one thread."""
        from .measure import median_seconds

        sessions = [open_session(model, threads=self.threads, prepack=True) for model in models]
        return median_seconds(sessions, feeds, threads=self.threads, seconds=seconds)


def _takes(opset: int, ir_version: int) -> bool:
    try:
        _open(_identity(opset, ir_version), _options("off", 1, False, False))
    except DoesNotRun:
        return False
    return True


def _identity(opset: int, ir_version: int) -> bytes:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    return bytes(model.SerializeToString())


def _too_new(model: ir.Model) -> str | None:
    opset, ir_version = limits()
    stamps = [model.opset_imports, *(function.opset_imports for function in model.functions.values())]
    found = max(stamp.get("", 0) for stamp in stamps)
    takes, remedy = f"newer than ONNX Runtime {version()} takes", "or install a newer onnxruntime."
    if found > opset:
        return f"opset {found} is {takes} ({opset}); export the model at opset {opset}, {remedy}"
    if model.ir_version > ir_version and (need := greatest_need(model)).version > ir_version:
        return f"IR version {need.version} is {takes} ({ir_version}), and {need.reason}, which needs it; {remedy[3:]}"
    return None


def _options(level: str, threads: int, prepack: bool, bounded: bool) -> Any:
    if level not in _LEVELS:
        known = ", ".join(_LEVELS)
        raise UsageError(f"There is no optimization level '{level}'; the levels are {known}.{nearest(level, _LEVELS)}")
    ort = _ort()
    options = stoppable(ort.SessionOptions())
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("optimization.disable_specified_optimizers", _COPYING)
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(_FOLDED))
        options.enable_cpu_mem_arena = False  # it would keep what a run took
    if bounded:
        _bound_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _bound_arena() -> None:
    ort = _ort()
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # It grows by powers of two and then in steps: each growth is a region, and a million of them take for ever to free.
    arena = ort.OrtArenaCfg({"max_mem": TRIAL_BYTES, "max_power_of_two_extend_bytes": _GROWTH})
    ort.create_and_register_allocator(where, arena)


def _release_arena() -> None:
    """Give back what a failed run left in the bounded arena: only a run that ends well shrinks it."""
    session = _open(_identity(*_PROBED_FROM), _options("off", 1, False, bounded=True))
    run_feed(session, {"x": np.zeros(1, np.float32)}, options=_run_options(shrink=True))


def _run_options(shrink: bool = False) -> Any:
    options = stoppable(_ort().RunOptions())
    options.log_severity_level = 4
    if shrink:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _open(source: str | bytes, options: Any) -> InferenceSession:
    try:
        session = _ort().InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DoesNotRun(_reason(error)) from error
    return cast("InferenceSession", session)


def _open_mapped(model: ir.Model, options: Any) -> InferenceSession:
    """With the weights mapped from the file that they are in, or from a temporary one."""
    model = _constants_first(model)
    _give_back()
    if (folder := _only_folder(model)) is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return _open(_serialized(model), options)
    with uninterrupted():  # its own finalizer removes the folder, wherever an interrupt comes later
        scratch = tempfile.TemporaryDirectory(prefix="penjing-", ignore_cleanup_errors=True)
    path = os.path.join(scratch.name, "model.onnx")
    try:
        files.save(model, path, external=True)
        _give_back()
        return _open(path, options)
    finally:
        scratch.cleanup()  # what is mapped stays readable, and a process that is killed leaves nothing behind


def _constants_first(model: ir.Model) -> ir.Model:
    """The model with the nodes that only constants feed, such as decoders of weights, before all others.

    ONNX Runtime goes back from the outputs, and of what a node reads it makes that last which has the lowest number:
    so what a node computes from constants is made right before that node, and not all of it before the first.
    """
    if not any(node.inputs for node in _made_of_constants(model)):
        return model
    model = model.clone()
    first, graph = list(_made_of_constants(model)), model.graph
    graph.remove(first)
    if len(graph):
        graph.insert_before(graph[0], first)
    else:
        graph.extend(first)
    return model


def _made_of_constants(model: ir.Model) -> dict[ir.Node, None]:
    """The nodes of the main graph that read nothing but constants, and what such nodes make of them."""
    found: dict[ir.Node, None] = {}
    for node in model.graph:
        made = (read is None or read.is_initializer() or read.producer() in found for read in node.inputs)
        if all(made) and not any(bodies(node)):
            found[node] = None
    return found


def _give_back() -> None:
    """Return to the system what was freed: glibc keeps tens of MiB, and the run of a large model will want as much."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _inline(model: ir.Model) -> bytes:
    """The model as protobuf with every weight in it."""
    mapped = ((holder, tensor) for holder, tensor in tensors(model) if isinstance(tensor, ir.ExternalTensor))
    pairs = [(holder, ir.Tensor(tensor.numpy(), tensor.dtype, name=tensor.name)) for holder, tensor in mapped]
    with standing_in(pairs):
        return _serialized(model)


def _serialized(model: ir.Model) -> bytes:
    """As protobuf, under an IR version that ONNX Runtime takes where the contents allow it: a stamp alone is no bar."""
    proto = ir.serde.serialize_model(model)
    proto.ir_version = max(needed_ir_version(model), min(model.ir_version, limits()[1]))
    return bytes(proto.SerializeToString())


def _only_folder(model: ir.Model) -> str | None:
    """The folder of all external weights, where it is one, its files are still there, and little else is to be read."""
    inline, folders = 0, []
    for _, tensor in tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            inline += tensor.nbytes
        elif not os.path.isfile(tensor.path):
            return None
        else:
            folders.append(os.path.abspath(tensor.base_dir))
    return folders[0] if len(set(folders)) == 1 and inline <= _INLINE else None


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    model = model.clone()
    graph = model.graph
    known = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    known |= {value.name: value for node in graph for value in node.outputs if value.name}
    for name in names:
        if name not in known:
            hint = nearest(name, [found for found in known if found])
            raise UsageError(f"The main graph has no value '{name}' to fetch.{hint}")
        if known[name] not in graph.outputs:
            graph.outputs.append(known[name])
    return model


def _ort_input(value: Any) -> Any:
    """ONNX Runtime takes numpy's own dtypes; others go in as their bits, those of less than 8 bits packed."""
    if not isinstance(value, np.ndarray) or value.dtype.isbuiltin == 1 or value.dtype.itemsize > 2:
        return value
    dtype = ir.DataType.from_numpy(value.dtype)
    bits = np.array(value, order="C").view(f"u{value.dtype.itemsize}")
    if dtype.bitwidth < 8:  # the array gives the shape, so the packed bytes are followed by some that nobody reads
        packed = ir.Tensor(value, dtype).tobytes()
        bits.reshape(-1)[: len(packed)] = np.frombuffer(packed, np.uint8)
    return _ort().OrtValue.ortvalue_from_numpy_with_onnx_type(bits, dtype.value)


def _ort_value(value: Any) -> Any:
    return _ort().OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Array:
    """The array of an ``OrtValue`` whose element type numpy lacks, from its memory."""
    dtype, shape = _TENSOR_TYPES[value.data_type()], value.shape()
    shape = [shape] if isinstance(shape, int) else shape
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    proto = onnx.TensorProto(data_type=dtype.value, dims=shape, raw_data=raw)
    return ir.serde.deserialize_tensor(proto).numpy()


def _reason(error: Exception) -> str:
    """ONNX Runtime's message without its codes, C++ places and assertions."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    text = re.sub(r"^Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: ", _at, text)
    text = re.sub(r"/\S+\.(?:h|hpp|cc|cpp):\d+ .*?\)>? (?:.*? was false\. (?=\S))?", "", text)
    text = re.sub(r"^(?:This is an invalid model\. |Load model from .*? failed:|Fatal error: )+", "", text)
    text = re.sub(r"^In Node, .* Error (?=\S)", "", text)
    text = re.sub(r"^Unsupported model (IR version): (\d+), max supported IR version: (\d+)", _lowered, text)
    text = text.replace(" node with name ''", "").strip().rstrip(".")
    text = printable(text)  # it repeats names as the file has them
    return f"{text}." if len(text) <= 300 else f"{text[:297]}..."


def _lowered(found: re.Match[str]) -> str:
    return f"{found[1]} {found[2]} is newer than ONNX Runtime takes ({found[3]}); `penjing run -p lower-ir` lowers it"


def _at(found: re.Match[str]) -> str:
    operator, name = found.groups()
    return f"{operator} node '{name}': " if name else f"a node {operator}: "
