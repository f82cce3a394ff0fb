"""ONNX's own test models with their inputs and the outputs that ONNX says they give."""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from penjing.ir.files import load
from penjing.passes.base import Outputs
from penjing.runtime.feeds import read_feeds

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
NODE_CASES, WHOLE_MODELS = 1884, 149  # of onnx 1.23.2
BFLOAT16 = 2**-6  # the least relative tolerance of ONNX's own runner for this type: two units in the last place


NEWER = "newer than the installed ONNX Runtime"
NOT_RUN = {
    "only *guarantees* support for models stamped with official": NEWER,
    "is newer than ONNX Runtime": NEWER,
    "Could not find an implementation": "no CPU kernel for these types or this version",
    "Failed to find kernel": "no CPU kernel for these types or this version",
    "is not a registered function/op": "an operator of a preview domain",
    "Unrecognized attribute": "a newer revision of an operator",
    "Type parameter (T) of Optype": "types that ONNX Runtime checks more strictly",
    "Failed to construct locale": "the locale of the case is not installed",
    "Batchwise recurrent operations": "recurrent operators with layout=1",
    "inconsistent total_sequence_length": "a newer revision of an operator",
    "Non per-tensor quantization": "ConvInteger with many zero points",
    "not defined for empty set": "ReduceMax of no booleans",
}
"""Words about a model as it comes, of ONNX Runtime's and of penjing's, and why it gives no outputs to compare with."""


def why_not_run(sentence: str) -> str | None:
    """The reason in ``NOT_RUN`` that ``sentence`` is about; ``None`` where it is no known one."""
    return next((reason for words, reason in NOT_RUN.items() if words in sentence), None)


@dataclass(frozen=True)
class Case:
    """A model, the inputs that come with it (one mapping a run) and the outputs expected of each run.

    ``rtol`` and ``atol`` hold as in ``numpy.allclose``. ``folder`` has ``test_data_set_*``, for models in files.
    """

    name: str
    model: onnx.ModelProto
    feeds: list[dict[str, Any]]
    expected: list[dict[str, Any]]
    rtol: float = 1e-3
    atol: float = 1e-7
    folder: Path | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a model in a file, not one of a node."""
        return "/" in self.name

    def unlike(self, found: Sequence[Outputs]) -> str | None:
        """The first way in which outputs are not as expected, a sentence; ``None`` where all are."""
        for wanted, given in zip(self.expected, found, strict=True):
            for name, value in wanted.items():
                if reason := _unlike(value, given[name], self.rtol, self.atol):
                    return f"{name} {reason}"
        return None


def node_cases(every: int = 1) -> list[Case]:
    """The models of one node, or those of them whose name has a hash that ``every`` divides."""
    found = []
    for case in _collected():
        if zlib.crc32(case.name.encode()) % every == 0:
            takes, gives = (
                [value.name for value in side] for side in (case.model.graph.input, case.model.graph.output)
            )
            runs = [[[_plain(value) for value in side] for side in run] for run in case.data_sets]
            feeds = [dict(zip(takes, given, strict=True)) for given, _ in runs]
            expected = [dict(zip(gives, wanted, strict=True)) for _, wanted in runs]
            found.append(Case(case.name, case.model, feeds, expected, case.rtol, case.atol))
    return found


def whole_models(every: int = 1) -> list[Case]:
    """The models in files, with the data beside them; ``every`` as for the models of one node."""
    paths = {_file_name(path): path for path in sorted(DATA.rglob("*.onnx"))}
    return [_whole(name, path) for name, path in paths.items() if zlib.crc32(name.encode()) % every == 0]


@functools.cache
def _collected() -> list[Any]:
    """Many cases draw random inputs where they are defined, so the first drawing is seeded."""
    from onnx.backend.test.case.node import collect_testcases

    state = np.random.get_state()
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        found = collect_testcases(None)
    np.random.set_state(state)
    return list(found)


def _file_name(path: Path) -> str:
    return str(path.relative_to(DATA).parent if path.name == "model.onnx" else path.relative_to(DATA).with_suffix(""))


def _whole(name: str, path: Path) -> Case:
    model = onnx.load(path)
    if path.name != "model.onnx":  # its input is a ramp, as in ONNX's own runner
        constants = {tensor.name for tensor in model.graph.initializer}
        feed = {value.name: _ramp(value) for value in model.graph.input if value.name not in constants}
        (output,) = model.graph.output
        wanted = {output.name: _read(path.with_name(f"{path.stem}_output_0.pb"), output.type)}
        return Case(name, model, [feed], [wanted])
    feeds = [dict(feed) for feed in read_feeds(path.parent, load(path))]
    sets = sorted(path.parent.glob("test_data_set_*"))
    expected = [
        {value.name: _read(place / f"output_{index}.pb", value.type) for index, value in enumerate(model.graph.output)}
        for place in sets
    ]
    return Case(name, model, feeds, expected, folder=path.parent)


def _ramp(value: onnx.ValueInfoProto) -> np.ndarray:
    shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    size = math.prod(shape)
    return (np.arange(size).reshape(shape) / size).astype(np.float32)


def _read(path: Path, kind: onnx.TypeProto) -> Any:
    data = path.read_bytes()
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _plain(value: Any) -> Any:
    """Arrays, lists of arrays and ``None``, from what the cases hold."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _unlike(wanted: Any, found: Any, rtol: float, atol: float) -> str | None:
    if isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            return f"is {_kind(found)}, expected {_kind(wanted)}"
        pairs = zip(wanted, found, strict=True)
        return next((f"[{at}] {why}" for at, pair in enumerate(pairs) if (why := _unlike(*pair, rtol, atol))), None)
    if wanted is None or found is None:
        return None if wanted is found else f"is {_kind(found)}, expected {_kind(wanted)}"
    wanted, found = np.asarray(wanted), np.asarray(found)
    if wanted.shape != found.shape or _word(wanted) != _word(found):
        return f"is {_kind(found)}, expected {_kind(wanted)}"
    if wanted.dtype.kind in "OUS":
        return None if (wanted.astype(str) == found.astype(str)).all() else "holds other strings"
    if wanted.dtype.name == "bfloat16":
        rtol = max(rtol, BFLOAT16)
    if wanted.dtype.kind not in "fiubc":  # types of ml_dtypes, all of which float32 holds exactly
        wanted, found = wanted.astype(np.float32), found.astype(np.float32)
    close = np.isclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if close.all():
        return None
    place = tuple(np.argwhere(~close)[0].tolist())
    count = np.count_nonzero(~close)
    return f"differs in {count} of {close.size} places, at {list(place)}: {found[place]} for {wanted[place]}"


def _word(array: np.ndarray) -> str:
    return "string" if array.dtype.kind in "OUS" else array.dtype.name


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list | tuple):
        return f"a sequence of {len(value)}"
    return f"{_word(np.asarray(value))}{list(np.shape(value))}"
