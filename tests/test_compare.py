import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from penjing.runtime.compare import Judge, compare

Y = np.array([[1.0, -4.0, 2.0], [0.5, 3.0, -2.0]], np.float32)


def judged(reference: Any, plain: Any, new: Any) -> Judge:
    judge = Judge()
    judge.add({"out": reference}, {"out": plain}, {"out": new})
    return judge


def test_equal_outputs_are_equal() -> None:
    found = compare([{"out": Y}, {"out": Y}], [{"out": Y}, {"out": Y.copy()}])
    out = found.outputs["out"]
    assert found.equal
    assert (found.runs, out.count, out.different) == (2, 12, 0)
    assert (out.max_error, out.sqnr_db, out.cosine, out.top1) == (0.0, math.inf, 1.0, 1.0)
    assert (found.max_error, found.min_sqnr) == (0.0, math.inf)


def test_figures_are_those_of_all_runs_together() -> None:
    rng = np.random.default_rng(0)
    runs = [rng.standard_normal((5, 7)).astype(np.float32) for _ in range(3)]
    noisy = [y + rng.standard_normal(y.shape).astype(np.float32) / 8 for y in runs]
    out = compare([{"out": y} for y in runs], [{"out": x} for x in noisy]).outputs["out"]
    y, x = np.stack(runs).astype(np.float64), np.stack(noisy).astype(np.float64)
    assert out.max_abs == np.abs(x - y).max()
    assert out.max_error == np.abs(x - y).max() / np.abs(y).max()
    assert out.sqnr_db == pytest.approx(10 * np.log10((y**2).sum() / ((x - y) ** 2).sum()))
    assert out.cosine == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))
    assert out.top1 == (x.argmax(-1) == y.argmax(-1)).mean()
    assert dataclasses.asdict(out)["name"] == "out"


def test_blocks_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    whole = compare([{"out": y}], [{"out": y[::-1].copy()}]).outputs["out"]
    monkeypatch.setattr("penjing.runtime.compare._BLOCK", 7)
    parts = compare([{"out": y}], [{"out": y[::-1].copy()}]).outputs["out"]
    assert (whole.max_abs, whole.different, whole.top1) == (parts.max_abs, parts.different, None)
    assert whole.sqnr_db == pytest.approx(parts.sqnr_db)


def test_top1_needs_rank_two_and_two_entries() -> None:
    assert compare([{"out": Y[0]}], [{"out": Y[0]}]).outputs["out"].top1 is None
    assert compare([{"out": Y[:, :1]}], [{"out": Y[:, :1]}]).outputs["out"].top1 is None
    assert compare([{"out": Y}], [{"out": Y[:, ::-1].copy()}]).outputs["out"].top1 == 0.5


def test_rounding_bound_is_a_share_of_the_largest_plus_noise() -> None:
    moved = Y + np.float32(3e-5)
    assert judged(Y, Y, moved).breaches("rounding") == []
    [breach] = judged(Y, Y, Y + np.float32(1e-4)).breaches("rounding")
    assert breach == (
        "output out: max|d| 0.0001 of max|y| 4 is 2.5e-05, over the bound 1.0e-05 of max|y| (+ 4 · noise 0.0e+00)"
    )
    assert judged(Y, Y + np.float32(3e-5), Y + np.float32(1e-4)).breaches("rounding") == []
    assert judged(Y, Y, Y + np.float32(1e-4)).breaches("rounding", 3) == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_have_four_eps(dtype: Any) -> None:
    y, eps = Y.astype(dtype), float(ml_dtypes.finfo(dtype).eps)
    new = y.copy()
    new[0, 1] = -4 * (1 + 2 * eps)
    assert judged(y, y, new).breaches("rounding") == []
    new[0, 1] = -4 * (1 + 6 * eps)
    assert len(judged(y, y, new).breaches("rounding")) == 1


def test_same_means_bits() -> None:
    zero = np.zeros(3, np.float32)
    assert judged(Y, Y, Y.copy()).breaches("same") == []
    assert judged(zero, zero, -zero).breaches("same") == [
        "output out: 3 of 3 values are not bit-identical, max|d| 0 of max|y| 0"
    ]
    assert judged(zero, zero, -zero).breaches("rounding") == []


def test_all_zero_reference_has_no_room() -> None:
    zero = np.zeros(3, np.float32)
    judge = judged(zero, zero, zero + np.float32(1e-9))
    assert judge.comparison.max_error == math.inf
    assert judge.breaches("rounding")[0].startswith("output out: max|d| 1e-09 of max|y| 0, over the bound")


def test_nan_and_infinities_must_sit_in_the_same_places() -> None:
    y = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert judged(y, y, y.copy()).breaches("same") == []
    for new in ([1.0, np.inf, -np.inf, 1.0], [np.nan, -np.inf, -np.inf, 1.0], [np.nan, np.inf, -np.inf, np.nan]):
        judge = judged(y, y, np.array(new, np.float32))
        expected = ["output out: 1 of 4 values are NaN or infinite in one model only"]
        assert judge.breaches("rounding") == judge.breaches("same") == expected
        assert (judge.comparison.max_error, judge.comparison.min_sqnr) == (math.inf, -math.inf)


@pytest.mark.parametrize("y", [np.array([1, 2, 3]), np.array(["a", "b", "c"], object), np.array([True, False, True])])
def test_other_types_are_equal_but_for_what_flips_itself(y: Any) -> None:
    flipped = y.copy()
    flipped[0] = y[1]
    assert judged(y, y, flipped).breaches("rounding") == ["output out: 1 of 3 values differ"]
    judge = judged(y, flipped, flipped)
    assert judge.breaches("rounding") == []
    assert judge.breaches("same") == ["output out: 1 of 3 values differ"]
    out = judge.comparison.outputs["out"]
    assert (out.different, out.flips, out.excused, out.max_error) == (1, 1, 1, None)


def test_shape_type_and_structure_are_said() -> None:
    assert judged(Y, Y, Y[0]).breaches("rounding") == ["output out has shape [3], expected [2, 3]"]
    assert judged(Y, Y, Y.astype(np.float64)).breaches("same") == ["output out has type float64, expected float32"]
    assert judged([Y, Y], [Y, Y], [Y]).breaches("same") == ["output out[1] is missing"]
    assert judged([Y], [Y], [Y, Y]).breaches("same") == ["output out[1] was not there before"]
    assert judged(Y, Y, None).breaches("same") == ["output out is empty"]
    assert judged(None, None, None).breaches("same") == []
    assert judged(Y, Y, Y[0]).comparison.max_error == math.inf
    assert not judged(Y, Y, Y[0]).comparison.equal


def test_sequences_and_maps_go_element_by_element() -> None:
    found = compare([{"out": [{"a": 1.0, 3: 2.0}], "seq": [Y, Y]}], [{"out": [{"a": 1.0, 3: 2.5}], "seq": [Y, 2 * Y]}])
    assert list(found.outputs) == ["out[0]['a']", "out[0][3]", "seq[0]", "seq[1]"]
    assert [output.equal for output in found.outputs.values()] == [True, False, True, False]
    assert found.max_error == 1.0


def test_more_runs_on_one_side_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare([{"out": Y}], [])


def test_complex_and_empty_outputs() -> None:
    y = np.array([1 + 2j, 3 - 4j], np.complex64)
    out = compare([{"out": y}], [{"out": y + np.complex64(1j)}]).outputs["out"]
    assert (out.count, out.different, out.max_abs, out.max_reference) == (4, 2, 1.0, 4.0)
    empty = np.zeros((0, 3), np.float32)
    assert judged(empty, empty, empty.copy()).breaches("same") == []
