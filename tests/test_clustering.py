"""k-means in one dimension: as good as trying everything, zeros kept, odd numbers, and many of them."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.passes.share import clustering
from penjing.passes.share.clustering import Codebook, NotFinite, Points, in_steps, kmeans, points
from penjing.passes.share.grid import BINS

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def counted(array: Array, weights: Array | None = None) -> Points:
    return points(lambda: in_steps(array, weights), array.size)


def book(array: Array, clusters: int, weights: Array | None = None) -> Codebook:
    return Codebook(kmeans(counted(array, weights), clusters), array.dtype, array.size)


def inertia(array: Array, found: Array, weights: Array | None = None) -> float:
    errors = np.square(found.astype(np.float64) - array.astype(np.float64))
    return float((errors if weights is None else errors * weights).sum())


def least(array: Array, clusters: int, weights: Array) -> float:
    """The least inertia of all ways to cut the sorted numbers; one cluster is at 0 where there are zeros."""
    order = np.argsort(array)
    values, mass = array[order].astype(np.float64), weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, values.size), min(clusters, values.size) - 1):
        edges = [0, *cuts, values.size]
        free, fixed = [], []
        for start, stop in itertools.pairwise(edges):
            own, weigh = values[start:stop], mass[start:stop]
            center = (own * weigh).sum() / weigh.sum()
            free.append((np.square(own - center) * weigh).sum())
            fixed.append((np.square(own) * weigh).sum())
        if (values == 0).any():
            best = min(best, *(sum(free) - free[k] + fixed[k] for k in range(len(free))))
        else:
            best = min(best, sum(free))
    return float(best)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-40, 40), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=9),
    st.integers(2, 5),
    st.floats(0, 1),
)
def test_no_cut_is_better(pairs: list[tuple[int, float]], clusters: int, shift: float) -> None:
    array = np.array([number + (shift if number else 0) for number, _ in pairs], np.float64)
    weights = np.array([weight for _, weight in pairs])
    found = book(array, clusters, weights).apply(array)
    assert inertia(array, found, weights) <= least(array, clusters, weights) + 1e-9
    assert (found[array == 0] == 0).all()
    assert len(np.unique(found)) <= clusters


@pytest.mark.parametrize("clusters", [2, 16, 256])
@pytest.mark.parametrize("pruned", [False, True])
def test_as_good_as_the_program_over_all_places(clusters: int, pruned: bool) -> None:
    array = np.random.default_rng(1).standard_t(4, 6000).astype(np.float32)
    if pruned:
        array[np.abs(array) < 0.8] = 0
    found = counted(array)
    whole = pytest.MonkeyPatch()
    whole.setattr(clustering, "_PLACES", BINS)
    best = inertia(array, book(array, clusters).apply(array))
    whole.undo()
    coarse = pytest.MonkeyPatch()
    coarse.setattr(clustering, "_PLACES", 64)
    reached = inertia(array, book(array, clusters).apply(array))
    coarse.undo()
    assert reached <= best * 1.0001
    assert found.size == array.size


def test_many_numbers_go_through_bins() -> None:
    array = np.random.default_rng(2).standard_normal(300_000).astype(np.float32)
    array[:1000] = 0
    found = counted(array)
    assert found.zeros == 1000
    assert found.size == array.size
    assert found.values.size <= BINS
    one = book(array, 16)
    replaced = one.apply(array)
    error, counts = one.figures(found)
    assert error == pytest.approx(inertia(array, replaced), rel=1e-4)
    assert counts.sum() == array.size
    order = np.sort(array.astype(np.float64))
    exact = inertia(order, Codebook(kmeans(_exact(order), 16), np.dtype(np.float64), 1).apply(order))
    assert inertia(array, replaced) <= exact * 1.0001
    assert (replaced[:1000] == 0).all()


def _exact(order: Array) -> Points:
    values, counts = np.unique(order[order != 0], return_counts=True)
    energy = float(np.square(order).sum())
    return Points(values, counts.astype(np.float64), counts, int((order == 0).sum()), energy)


def test_weights_move_the_values() -> None:
    array = np.array([1.0, 2.0, 10.0, 11.0])
    assert book(array, 2, np.array([1.0, 3.0, 1.0, 1.0])).values.tolist() == [1.75, 10.5]
    assert book(array, 2).values.tolist() == [1.5, 10.5]


def test_weights_of_zero_and_few_numbers() -> None:
    array = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = book(array, 2, np.zeros(5)).apply(array)
    assert np.isfinite(found).all()
    assert book(array[:0], 4).values.size == 0
    assert book(array[:2], 4).values.tolist() == [1, 2]
    assert book(np.full(7, 3.0), 4).values.tolist() == [3]
    assert book(np.array([0.0, -0.0, 1.0]), 2).values.tolist() == [0, 1]


@pytest.mark.parametrize("size", [100, 2 * BINS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(size: int, bad: float) -> None:
    array = np.ones(size, np.float32)
    array[size // 2] = bad
    with pytest.raises(NotFinite):
        counted(array)


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (1e-42, 0.0), (1e37, 0.0), (1e-3, 100.0), (0.0, 5.0), (1e-30, 0.0)]
)
def test_odd_ranges(scale: float, shift: float) -> None:
    array = (np.random.default_rng(3).uniform(-1, 1, 2 * BINS) * scale + shift).astype(np.float32)
    found = book(array, 16).apply(array)
    assert np.isfinite(found).all()
    assert np.abs(found - array).max() <= max((array.max() - array.min()) / 8, np.spacing(np.float32(shift)) * 2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_are_of_the_stored_type(dtype: type) -> None:
    array = np.random.default_rng(4).standard_normal(3 * BINS).astype(dtype)
    one = Codebook(kmeans(counted(array.astype(np.float32)), 16), array.dtype, array.size)
    found = one.apply(array.astype(np.float32))
    assert found.dtype == dtype
    assert len(np.unique(found.astype(np.float64))) == 16


def test_parts_are_replaced_alike_however_they_are_cut() -> None:
    array = np.random.default_rng(5).standard_normal(2 * BINS).astype(np.float32)
    one = book(array, 16)
    assert np.array_equal(one.apply(array), np.concatenate([one.apply(part) for part in np.array_split(array, 7)]))
