"""How far two models' outputs are apart: a report over all runs, and a judge that holds it to a pass's effect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..passes.base import Array, Outputs

ROUNDING = 1e-5  # of max|y|, for float32 and float64; narrower types have 4 eps of the type
_BLOCK = 2**18  # entries compared at a time, so that the float64 copies stay in cache


@dataclass
class OutputDifference:
    """One output over all runs, ``y`` the reference and ``d`` what the other model adds to it.

    Figures of floats hold over the entries that are finite in both, and are ``None`` for other types: ``max_abs`` is
    max|d|, ``max_reference`` max|y|, ``max_error`` their ratio, ``sqnr_db`` 10·log10(Σy²/Σd²), ``cosine`` the
    similarity, ``noise`` max|y_off - y_all| of the unchanged model, ``tolerance`` the share of max|y| that one pass may
    take. ``top1`` is the share of rows (along the last axis,
    for rank ≥ 2) whose largest entry is at the same place. ``different`` counts entries that are not bit-identical,
    ``nonfinite`` those where NaN or an infinity is not matched, ``flips`` those where the unchanged model differs from
    itself with optimizations off, and ``excused`` the different ones among them (types other than float).
    ``problems`` are sentences about shape, type and structure.
    """

    name: str
    dtype: str
    count: int = 0
    different: int = 0
    nonfinite: int = 0
    flips: int = 0
    excused: int = 0
    max_abs: float | None = None
    max_reference: float | None = None
    max_error: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    top1: float | None = None
    noise: float | None = None
    tolerance: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def noise_share(self) -> float | None:
        """``noise`` as a share of max|y|; ``None`` where either is unknown or max|y| is 0."""
        return None if self.noise is None or not self.max_reference else self.noise / self.max_reference

    @property
    def equal(self) -> bool:
        """Whether every entry of every run is bit-identical (any NaN equals any other)."""
        return not (self.different or self.problems)

    def breaches(self, effect: Literal["same", "rounding"], passes: int = 1) -> list[str]:
        """A sentence for each way in which this output is not what ``passes`` passes of this effect may leave."""
        place, found = f"output {self.name}", [f"output {self.name} {problem}" for problem in self.problems]
        if self.nonfinite:
            found.append(f"{place}: {self.nonfinite} of {self.count} values are NaN or infinite in one model only")
        broken = self.different - (self.excused if effect == "rounding" else 0)
        if self.max_abs is None or self.max_reference is None:
            if broken:
                also = f" ({self.excused} more flip in the unchanged model, too)" if broken < self.different else ""
                found.append(f"{place}: {broken} of {self.count} values differ{also}")
        elif effect == "same":
            if self.different > self.nonfinite:
                size = f"max|d| {self.max_abs:.3g} of max|y| {self.max_reference:.3g}"
                found.append(f"{place}: {self.different} of {self.count} values are not bit-identical, {size}")
        elif self.max_abs > self._bound(passes):
            found.append(f"{place}: {self._over_bound(passes)}")
        return found

    def _bound(self, passes: int) -> float:
        return passes * ((self.tolerance or 0.0) * (self.max_reference or 0.0) + 4 * (self.noise or 0.0))

    def _over_bound(self, passes: int) -> str:
        ratio = "" if not self.max_reference else f" is {self.max_error:.1e}"
        share = passes * (self.tolerance or 0.0)
        noise = f"4 · noise {self.noise or 0.0:.1e}" if passes == 1 else f"{passes} · 4 · noise {self.noise or 0.0:.1e}"
        return (
            f"max|d| {self.max_abs:.3g} of max|y| {self.max_reference:.3g}{ratio}, "
            f"over the bound {share:.1e} of max|y| (+ {noise})"
        )


@dataclass
class Comparison:
    """Every output over ``runs`` runs; ``missing`` and ``extra`` name outputs that only one of the two models has."""

    outputs: dict[str, OutputDifference]
    runs: int
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    @property
    def max_error(self) -> float:
        """The largest max|d|/max|y| of the float outputs; infinite where shapes or NaN and infinities do not match."""
        return max((_worst(output) for output in self.outputs.values()), default=0.0)

    @property
    def min_sqnr(self) -> float:
        """The smallest SQNR of the float outputs, in dB; infinite where all are equal, -infinite as ``max_error``."""
        values = self.outputs.values()
        if any(output.problems or output.nonfinite for output in values):
            return -math.inf
        return min((output.sqnr_db for output in values if output.sqnr_db is not None), default=math.inf)

    @property
    def equal(self) -> bool:
        """Whether every output of every run is bit-identical."""
        return not (self.missing or self.extra) and all(output.equal for output in self.outputs.values())

    def as_json(self) -> dict[str, Any]:
        """JSON values; what is infinite or not a number is ``null``."""
        summary = {"equal": self.equal, "max_error": _finite(self.max_error), "min_sqnr": _finite(self.min_sqnr)}
        outputs = {
            name: {key: _finite(value) for key, value in vars(output).items()} for name, output in self.outputs.items()
        }
        return summary | {"runs": self.runs, "outputs": outputs, "missing": self.missing, "extra": self.extra}


class Judge:
    """Takes the outputs of one run after another, keeps only sums, and says whether a pass kept its effect.

    ``least`` is the least tolerance of any float output: more than that of its own type where the model computes in a
    narrower one on the way.
    """

    def __init__(self, least: float = 0.0) -> None:
        self._least = least
        self._outputs: dict[str, _Sums] = {}
        self._missing: dict[str, None] = {}
        self._extra: dict[str, None] = {}
        self._runs = 0

    def add(self, reference: Outputs, plain: Outputs | None, new: Outputs) -> None:
        """One run: ``reference`` of the unchanged model, ``plain`` the same without optimizations, and ``new``."""
        self._runs += 1
        expected, found = dict(_leaves(reference)), dict(_leaves(new))
        noisy = expected if plain is reference or plain is None else dict(_leaves(plain))
        self._missing |= dict.fromkeys(name for name in expected if name not in found)
        self._extra |= dict.fromkeys(name for name in found if name not in expected)
        for name, value in expected.items():
            if name in found:
                sums = self._outputs.setdefault(name, _Sums(name, self._least))
                sums.add(value, noisy.get(name, value), found[name])

    @property
    def comparison(self) -> Comparison:
        """The report over the runs so far."""
        outputs = {name: sums.difference() for name, sums in self._outputs.items()}
        return Comparison(outputs, self._runs, list(self._missing), list(self._extra))

    def breaches(self, effect: Literal["same", "rounding"], k: int = 1) -> list[str]:
        """A sentence for each way in which the runs break the promise of ``k`` passes; none where it was kept.

        ``same``: bit-identical. ``rounding``: max|d| ≤ k·(1e-5·max|y| + 4·noise) for each float output (4 eps of the
        type for float16 and narrower), NaN and infinities in the same places, all else equal but for what the unchanged
        model itself flips.
        """
        comparison = self.comparison
        found = [f"output {name} is missing" for name in comparison.missing]
        found += [f"output {name} was not there before" for name in comparison.extra]
        return found + [breach for output in comparison.outputs.values() for breach in output.breaches(effect, k)]


def compare(reference: Iterable[Outputs], new: Iterable[Outputs]) -> Comparison:
    """Compare the runs of two models, in step. Raises ``ValueError`` where one has more runs than the other."""
    judge = Judge()
    for expected, found in zip(reference, new, strict=True):
        judge.add(expected, None, found)
    return judge.comparison


def compare_files(a: str, b: str, data: Any = None, seed: int = 0) -> tuple[Comparison, str]:
    """Compare the model in file ``b`` with that in ``a``, and say on what: ``data`` as ``read_feeds`` takes, or random.

    Raises ``PenjingError`` where a file, the data or a run of either model is at fault.
    """
    from .draws import feeds_for
    from .session import LARGE, load, open_session, run_feed, tensor_bytes

    models = [load(path, runnable=True) for path in (a, b)]
    feeds = feeds_for(models[0], data, seed)
    prepack = max(map(tensor_bytes, models)) <= LARGE
    sessions = [open_session(model, prepack=prepack) for model in models]
    judge = Judge()
    for feed in feeds:
        expected, found = (run_feed(session, feed, place=path) for session, path in zip(sessions, (a, b), strict=True))
        judge.add(expected, None, found)
    return judge.comparison, feeds.describe()


class _Sums:
    """What is kept of one output from run to run."""

    def __init__(self, name: str, least: float) -> None:
        self.found = OutputDifference(name, "none")
        self.least = least
        self.signal = self.error = self.dot = self.other = 0.0
        self.rows = self.agreeing = 0

    def add(self, expected: Array | None, noisy: Array | None, new: Array | None) -> None:
        if expected is None or new is None:
            if (expected is None) != (new is None):
                self._problem("is empty" if new is None else "is not empty, and was")
            return
        self.found.dtype = dtype = _word(expected)
        self.found.count += expected.size * (2 if expected.dtype.kind == "c" else 1)
        if _word(new) != dtype:
            self._problem(f"has type {_word(new)}, expected {dtype}")
        same_noisy = noisy is not None and noisy.shape == expected.shape
        if new.shape != expected.shape:
            self._problem(f"has shape {list(new.shape)}, expected {list(expected.shape)}")
        elif _is_float(expected.dtype) and _is_float(new.dtype):
            self._add_floats(expected, noisy if noisy is not None and same_noisy else expected, new)
        else:
            self._add_exact(expected, noisy if noisy is not None and same_noisy else expected, new)

    def difference(self) -> OutputDifference:
        found = self.found
        if found.max_abs is None or found.max_reference is None:
            return found
        found.tolerance = max(self.least, tolerance(found.dtype))
        found.max_error = 0.0 if found.max_abs == 0 else _ratio(found.max_abs, found.max_reference)
        power = _ratio(self.signal, self.error)
        found.sqnr_db = math.inf if self.error == 0 else -math.inf if power == 0 else 10 * math.log10(power)
        norms = math.sqrt(self.signal) * math.sqrt(self.other)
        both_zero = self.signal == self.other == 0
        found.cosine = 1.0 if found.max_abs == 0 or both_zero else self.dot / norms if norms else 0.0
        found.top1 = self.agreeing / self.rows if self.rows else None
        return found

    def _add_exact(self, expected: Array, noisy: Array, new: Array) -> None:
        differs = np.asarray(expected != new)
        self.found.different += int(np.count_nonzero(differs))
        if noisy is not expected:
            flips = np.asarray(expected != noisy)
            self.found.flips += int(np.count_nonzero(flips))
            self.found.excused += int(np.count_nonzero(differs & flips))

    def _add_floats(self, expected: Array, noisy: Array, new: Array) -> None:
        found = self.found
        found.max_abs, found.max_reference = found.max_abs or 0.0, found.max_reference or 0.0
        found.noise = found.noise or 0.0
        if expected.ndim >= 2 and expected.shape[-1] >= 2 and expected.size and expected.dtype.kind != "c":
            agree = _argmax(expected) == _argmax(new)
            self.rows, self.agreeing = self.rows + agree.size, self.agreeing + int(np.count_nonzero(agree))
        flat = [_real(array) for array in (expected, new, noisy)]
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, flat[0].size, _BLOCK):
                block = slice(start, start + _BLOCK)
                self._add_block(flat[0][block], flat[1][block])
                if noisy is not expected:
                    found.noise = max(found.noise, _largest_error(flat[0][block], flat[2][block]))

    def _add_block(self, expected: Array, new: Array) -> None:
        found, y, x = self.found, expected.astype(np.float64), new.astype(np.float64)
        same = (x == y) & (np.signbit(x) == np.signbit(y)) | np.isnan(x) & np.isnan(y)
        found.different += int(np.count_nonzero(~same))
        finite = np.isfinite(y) & np.isfinite(x)
        if not finite.all():
            found.nonfinite += int(np.count_nonzero(~finite & ~same))
            x, y = x[finite], y[finite]
        d = x - y
        found.max_abs = max(found.max_abs or 0.0, _peak(d))
        found.max_reference = max(found.max_reference or 0.0, _peak(y))
        self.signal += _dot(y, y)
        self.error += _dot(d, d)
        self.dot += _dot(x, y)
        self.other += _dot(x, x)

    def _problem(self, sentence: str) -> None:
        if sentence not in self.found.problems and len(self.found.problems) < 3:
            self.found.problems.append(sentence)


def _leaves(outputs: Mapping[Any, Any]) -> Iterator[tuple[str, Array | None]]:
    """Arrays with their paths: ``out``, ``out[0]`` in a sequence, ``out['a']`` in a map; ``None`` for what is empty.

    A sequence of maps from the same keys to numbers, as ZipMap makes of a batch, is one array a key: ``out[*]['a']``.
    """
    for name, value in outputs.items():
        yield from _nested(str(name), value)


def _nested(path: str, value: Any) -> Iterator[tuple[str, Array | None]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nested(f"{path}[{key!r}]", item)
    elif isinstance(value, list | tuple) and _is_table(value):
        for key in value[0]:
            yield f"{path}[*][{key!r}]", np.asarray([row[key] for row in value])
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _nested(f"{path}[{place}]", item)
    else:
        yield path, None if value is None else np.asarray(value)


def _is_table(rows: list[Any] | tuple[Any, ...]) -> bool:
    return len(rows) > 1 and all(
        isinstance(row, Mapping) and row.keys() == rows[0].keys() and all(map(np.isscalar, row.values()))
        for row in rows
    )


def _is_float(dtype: np.dtype[Any]) -> bool:
    if dtype.kind != "V":
        return dtype.kind in "fc"
    return ir.DataType.from_numpy(dtype).is_floating_point()


def _word(array: Array) -> str:
    return "string" if array.dtype.kind in "OUS" else array.dtype.name


def tolerance(dtype: str) -> float:
    """What one ROUNDING pass may move an output of this float type by, as a share of max|y|."""
    if dtype in ("float32", "float64", "complex64", "complex128"):
        return ROUNDING
    kind: Any = ml_dtypes.finfo
    return 4 * float(kind(dtype).eps)


def _real(array: Array) -> Array:
    """All entries in a row; complex ones as their two parts."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _argmax(array: Array) -> Array:
    plain = array.astype(np.float32) if array.dtype.kind == "V" else array
    return np.asarray(plain.argmax(axis=-1))


def _largest_error(expected: Array, noisy: Array) -> float:
    difference = noisy.astype(np.float64) - expected.astype(np.float64)
    return _peak(difference[np.isfinite(difference)])


def _peak(values: Array) -> float:
    return float(max(values.max(), -values.min())) if values.size else 0.0


def _dot(x: Array, y: Array) -> float:
    """The dot product without the threads of a BLAS, which on a busy machine wait for each other 20 times as long."""
    return float(np.einsum("i,i->", x, y))


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf


def _worst(output: OutputDifference) -> float:
    if output.problems or output.nonfinite:
        return math.inf
    return output.max_error or 0.0


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
