"""Calibrators against brute force on samples; the ranges file and the command that writes it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import penjing
from penjing.cli import main
from penjing.ir.affine import S8, U8, Grid, affine
from penjing.ir.errors import BadFile, UsageError
from penjing.passes.points import Distribution, Histogram
from penjing.passes.quantize.calibrators import calibrate
from penjing.passes.quantize.ranges import activations, read_ranges, write_ranges

Parse = Callable[[str], ir.Model]
METHODS = ("minmax", "percentile", "entropy", "mse")


def samples(name: str) -> np.ndarray:
    random = np.random.default_rng(0)
    normal = random.standard_normal(30_000)
    student = random.standard_t(3, 30_000)
    found = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "student": student,
        "relu of student": np.maximum(student, 0),
        "silu": 3 * normal / (1 + np.exp(-3 * normal)),
        "relu6": np.clip(3 * normal, 0, 6),
        "attention": random.beta(0.05, 2, 30_000),
        "outliers": np.concatenate((normal, [1000, -300])),
        "far from zero": 5 + normal / 10,
        "negative": -np.abs(normal),
    }
    return found[name].astype(np.float32)


NAMES = (
    "normal",
    "relu",
    "student",
    "relu of student",
    "silu",
    "relu6",
    "attention",
    "outliers",
    "far from zero",
    "negative",
)
KINDS = [pytest.param(U8, False, id="u8"), pytest.param(S8, True, id="s8 symmetric")]


def histogram(array: np.ndarray) -> Distribution:
    found = Histogram("x").start()
    found.update(array)
    return found


def squared_error(x: np.ndarray, low: float, high: float, grid: Grid, symmetric: bool) -> float:
    return float(np.square(affine(low, high, grid, symmetric=symmetric).rounded(x) - x, dtype=np.float64).mean())


def kept(x: np.ndarray, low: float, high: float) -> float:
    return float(((x >= low) & (x <= high)).mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("grid", "symmetric"), KINDS)
def test_mse_is_as_good_as_trying_all_ranges(name: str, grid: Grid, symmetric: bool) -> None:
    x = samples(name)
    low, high = calibrate("mse", histogram(x), grid, symmetric)
    shares = np.geomspace(1, 0.05, 14)
    pairs = ((share, share) for share in shares) if symmetric else itertools.product(shares, shares)
    ends = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    tried = [squared_error(x, ends[0] * a, ends[1] * b, grid, symmetric) for a, b in pairs]
    assert squared_error(x, low, high, grid, symmetric) <= 1.03 * min(tried)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("grid", "symmetric"), KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_ranges_hold_zero_and_stay_within_the_data(method: Any, name: str, grid: Grid, symmetric: bool) -> None:
    x = samples(name)
    low, high = calibrate(method, histogram(x), grid, symmetric)
    assert low <= 0 <= high
    assert low < high
    bound = np.abs(x).max()
    assert (low == -high) if symmetric else (min(x.min(), 0) <= low and high <= max(x.max(), 0))
    assert high <= bound
    if method == "minmax":
        assert (low, high) == ((-bound, bound) if symmetric else (min(x.min(), 0), max(x.max(), 0)))


@pytest.mark.parametrize("name", ["normal", "relu", "student", "silu", "attention", "negative"])
@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentiles_clip_as_many_as_they_say(name: str, percentile: float) -> None:
    x = samples(name)
    wanted = 1 - percentile / 100
    for symmetric in (False, True):
        low, high = calibrate("percentile", histogram(x), U8, symmetric, percentile=percentile)
        assert 0.4 * wanted - 1e-4 <= 1 - kept(x, low, high) <= wanted + 1e-4
    if x.min() < 0 < x.max() and name != "silu":  # as many at either end
        low, high = calibrate("percentile", histogram(x), U8, False, percentile=percentile)
        assert [1 - kept(x, low, np.inf), 1 - kept(x, -np.inf, high)] == pytest.approx(
            [wanted / 2] * 2, rel=0.3, abs=1e-4
        )


def divergence(x: np.ndarray, high: float, levels: int) -> float:
    """Of Migacz' talk, bin by bin: for x of at least 0, zeros left out."""
    counts, edges = np.histogram(x[x > 0], 2048, (0, x.max()))
    bins = round(high / (edges[1] - edges[0]))
    actual = counts[:bins].astype(float)
    actual[-1] += counts[bins:].sum()
    known = np.zeros(bins)
    for part in np.array_split(np.arange(bins), levels):
        filled = part[counts[part] > 0]
        known[filled] = counts[part].sum() / max(len(filled), 1)
    actual, known = actual / actual.sum(), np.maximum(known / known.sum(), 1e-9)
    return float(sum(p * np.log(p / q) for p, q in zip(actual, known, strict=True) if p))


def test_entropy_is_about_the_least_of_all_thresholds() -> None:
    x = np.abs(np.random.default_rng(3).laplace(size=300_000)).astype(np.float32)
    low, high = calibrate("entropy", histogram(x), U8, False)
    thresholds = x.max() * np.arange(520, 2049, 16) / 2048
    tried = [divergence(x, threshold, 256) for threshold in thresholds]
    assert low == 0
    assert divergence(x, high, 256) <= min(tried) + 0.2 * (max(tried) - min(tried))


@pytest.mark.parametrize("zeros", [0, 10, 1000])
def test_a_spike_at_zero_moves_nothing(zeros: int) -> None:
    x = np.abs(samples("student"))
    with_zeros = np.concatenate((x, np.zeros(zeros * len(x) // 10, np.float32)))
    for method in ("mse", "entropy"):
        expected, found = (calibrate(method, histogram(array), U8, False)[1] for array in (x, with_zeros))
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_constant_and_empty_values(method: Any) -> None:
    for value in (0.0, 0.3, -2.0):
        low, high = calibrate(method, histogram(np.full(9, value, np.float32)), U8, False)
        assert (low, high) == pytest.approx((min(value, 0), max(value, 0)))
    with pytest.raises(ValueError, match="never seen"):
        calibrate(method, Distribution(), U8, False)
    by_hand = Distribution(low=-1.0, high=3.0, seen=1)
    assert calibrate(method, by_hand, U8, False) == (-1, 3)
    assert calibrate(method, by_hand, S8, True) == (-3, 3)


def test_an_unknown_calibrator_has_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no calibrator 'entropie'.* Did you mean 'entropy'"):
        calibrate("entropie", histogram(samples("normal")), U8, False)  # type: ignore[arg-type]


# The ranges file ----------------------------------------------------------------------------------------------------


def test_what_is_read_calibrates_as_what_was_written(tmp_path: Path) -> None:
    found = {name: histogram(samples(name)) for name in NAMES} | {
        'a/then/b "é\n': Distribution(),
        "hand": Distribution(8192, -1, 2, 5),
    }
    found["clipped"] = found["student"].clipped(0, np.inf)
    path = tmp_path / "ranges.json"
    write_ranges(path, found, penjing="0.1.0", source="m.onnx", data="x.npz")
    read = read_ranges(path)
    assert list(read) == list(found)
    for name, method, (grid, symmetric) in itertools.product(NAMES, METHODS, [(U8, False), (S8, True)]):
        assert calibrate(method, read[name], grid, symmetric) == calibrate(method, found[name], grid, symmetric)
    assert read["hand"].counts.size == 0
    assert (read["hand"].low, read["hand"].high, read["hand"].seen) == (-1, 2, 5)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7 + len(found) + 1
    write_ranges(tmp_path / "again.json", read, penjing="0.1.0", source="m.onnx", data="x.npz")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_range_by_hand_needs_no_more_than_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"format": 1, "values": {"x": {"low": 0, "high": 6}}}', encoding="utf-8")
    assert (read_ranges(path)["x"].low, read_ranges(path)["x"].high, read_ranges(path)["x"].seen) == (0, 6, 1)


WHOLE = {"low": -1.0, "high": 1.0, "seen": 3, "exponent": -1, "first": -2, "counts": [1, 0, 1, 0, 1]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"low": None}, "'x' needs 'low', a finite number of at most 2\\^127; it has none"),
        ({"high": "1"}, "'x' needs 'high', a finite number .* it has '1'"),
        ({"low": 2.0}, "'x' has low 2 above high 1; exchange the two"),
        ({"high": 1e300}, "'x' needs 'high'"),
        ({"lowest": 1}, "'x' has 'lowest'; it may have low, .* Did you mean 'low'"),
        (
            {"high": 3.0},
            "bins of 2\\^-1 from low to high are 9 from -2 on, not 5 from -2; where low or high were changed",
        ),
        ({"counts": [1, 0, 1, 0, 2]}, "'counts' are 4 elements together, and 'seen' says 3"),
        ({"counts": [1, 0, 1, 0, -1]}, "'counts' must be a list of whole numbers of at least 0"),
        ({"exponent": -40}, "'x' has more than 2048 bins; calibrate again"),
        ({"exponent": 9.5}, "'x' has 'exponent' 9.5; it is a whole number from -115 to 127"),
        ({"seen": 0}, "'x' has 'seen' 0; it counts elements, at least 1"),
    ],
)
def test_a_file_edited_by_hand_is_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"format": 1, "values": {"x": WHOLE}}), encoding="utf-8")
    assert read_ranges(path)["x"].counts.tolist() == WHOLE["counts"]
    path.write_text(json.dumps({"format": 1, "values": {"x": WHOLE | change}}), encoding="utf-8")
    with pytest.raises(BadFile, match=sentence):
        read_ranges(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no ranges file: Expecting property name"),
        ("[]", "is no ranges file: it must be"),
        ('{"format": 2, "values": {}}', "is a ranges file of format 2, and this version reads 1"),
        ('{"format": 1}', "has no 'values'"),
        ('{"format": 1, "valuse": {}}', "has 'valuse'; it may have .* Did you mean 'values'"),
        ('{"format": 1, "values": {"x": 3}}', "'x' must be an object like"),
        ('{"format": 1, "values": {"x": {"low": NaN, "high": 1}}}', "NaN is no number that a range may have"),
        ('{"format": 1, "values": {"x": {"low": 0, "high": 1}, "x": {}}}', "it has 'x' twice"),
        ('{"format": 1, "values": {"x": {"low": 0, "high": 1, "first": 1}}}', "has 'first' without 'seen'"),
        ("\0", "is no ranges file"),
        ("[" * 100_000, "is no ranges file"),
    ],
)
def test_what_is_no_ranges_file_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadFile, match=sentence):
        read_ranges(path)
    with pytest.raises(BadFile, match=r"none\.json cannot be read: no such file"):
        read_ranges(tmp_path / "none.json")


MODEL = """m (float[n,2] x, bool c) => (float[n,2] y, int64 k) <float[2,2] w = {1,2,3,4}> {
    half = Constant<value = float {0.5}>()
    v = Mul(w, half)
    h = MatMul(x, v)
    y = If(c) <then_branch = t () => (float[n,2] ty) { ty = Relu(h) },
               else_branch = e () => (float[n,2] ey) { ey = Neg(h) }>
    k = Size(y)
}"""


def test_activations_are_the_floats_that_change(parse: Parse) -> None:
    model = parse(MODEL)
    next(node for node in model.graph if node.op_type == "If").name = "if"
    assert activations(model) == ["x", "h", "y", "if/then/ty", "if/else/ey"]


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def small(tmp_path: Path, parse: Parse) -> Path:
    text = "m (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1,2,3,4}> { m = Log(x)  h = Relu(x)  y = MatMul(h, w) }"
    penjing.save(parse(text), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def data(folder: Path, array: np.ndarray) -> Path:
    np.savez(folder / "x.npz", x=array.astype(np.float32))
    return folder / "x.npz"


def test_calibrate_writes_ranges(call: Any, small: Path, tmp_path: Path) -> None:
    feeds = data(tmp_path, np.arange(1, 41).reshape(20, 2))
    out = tmp_path / "ranges.json"
    code, shown, error = call("calibrate", small, "--data", feeds, "-o", out)
    assert (code, error) == (0, "")
    assert shown == f"4 values on 20 samples of x.npz, written to {out}\n"
    found = read_ranges(out)
    assert list(found) == ["x", "m", "h", "y"]
    assert (found["x"].low, found["x"].high, found["x"].counts.sum()) == (1, 40, 40)
    assert json.loads(out.read_text(encoding="utf-8"))["source"] == "small.onnx"
    first = out.read_bytes()
    code, _, error = call("calibrate", small, "--data", feeds, "-o", out)
    assert code == 2
    assert "exists already; name another output, or add --force" in error
    assert call("calibrate", small, "--data", feeds, "-o", out, "--force")[0] == 0
    assert out.read_bytes() == first


def test_what_is_not_finite_inside_is_left_out_with_a_warning(call: Any, small: Path, tmp_path: Path) -> None:
    feeds = data(tmp_path, np.array([[1, 2], [0, 3]]))
    out = tmp_path / "ranges.json"
    code, _, error = call("calibrate", small, "--data", feeds, "-o", out)
    assert code == 0
    assert "warning: The value 'm' holds infinity in sample 1; leave such samples out" in error
    assert list(read_ranges(out)) == ["x", "h", "y"]
    feeds = data(tmp_path, np.array([[1, 2], [3e38, 3e38]]))
    code, _, error = call("calibrate", small, "--data", feeds, "-o", out, "--force")
    assert code == 2
    assert error.startswith("penjing: The value 'y' holds infinity in sample 1; leave such samples out")


def test_bad_input_is_one_sentence(call: Any, small: Path, tmp_path: Path) -> None:
    out, feeds = tmp_path / "r.json", data(tmp_path, np.ones((3, 2)))
    cases: list[tuple[tuple[object, ...], str]] = [
        ((small, "-o", out), "Missing option '--data'"),
        ((small, "--data", tmp_path / "none.npz", "-o", out), "none.npz is not there"),
        ((tmp_path / "none.onnx", "--data", feeds, "-o", out), "none.onnx"),
        ((small, "--data", feeds, "-o", feeds), "-o and --data are the same file"),
        ((small, "--data", feeds, "-o", small), "-o and MODEL are the same file"),
        ((small, "--data", feeds, "-o", tmp_path / "no" / "r.json"), "does not exist; create it first"),
    ]
    for arguments, sentence in cases:
        code, _, error = call("calibrate", *arguments)
        assert code == 2, error
        assert sentence in error
    np.savez(tmp_path / "nan.npz", x=np.array([[1, np.nan]], np.float32))
    assert "'x' holds NaN in sample 0" in call("calibrate", small, "--data", tmp_path / "nan.npz", "-o", out)[2]
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 2), np.float32))
    code, _, error = call("calibrate", small, "--data", tmp_path / "empty.npz", "-o", out)
    assert (code, "0 samples" in error) == (2, True), error
    assert not out.exists()
