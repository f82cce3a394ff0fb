"""Signal and noise over runs: in all, in the worse class of channels, in the median run, and with their doubt."""

import math

import numpy as np
import pytest

from penjing.passes.deviation import Deviation, Energies


def test_noise_that_comes_from_few_runs_is_in_doubt() -> None:
    signal = np.full(64, 100.0)
    steady, rare = Energies(signal, np.full(64, 1.0)), Energies(signal, np.where(np.arange(64) < 2, 32.0, 0.0))
    assert steady.sqnr == pytest.approx(20) == rare.sqnr
    assert steady.surely == pytest.approx(20)
    assert rare.surely < 18
    assert steady.typical == pytest.approx(0.01)
    assert rare.typical == 0


def test_one_run_has_no_doubt_to_tell() -> None:
    one = Energies(np.array([100.0]), np.array([1.0]))
    assert one.surely == one.sqnr == pytest.approx(20)


def test_boxes_do_not_hide_the_noise_of_scores() -> None:
    rng = np.random.default_rng(0)
    wanted = np.concatenate([rng.uniform(100, 300, (1, 4, 50)), rng.uniform(0, 1, (1, 6, 50))], axis=1)
    found = wanted.copy()
    found[:, 4:] += rng.normal(0, 0.3, (1, 6, 50))
    deviation = Deviation()
    deviation.add(wanted.astype(np.float32), found.astype(np.float32))
    whole, *classes = deviation.energies
    assert whole.sqnr > 40
    assert min(one.sqnr for one in classes) < 8


def test_what_is_lost_is_infinitely_far() -> None:
    deviation = Deviation()
    deviation.add(np.ones((1, 3), np.float32), np.array([[1, math.nan, 1]], np.float32))
    assert deviation.energies[0].sqnr == -math.inf
    assert deviation.error == math.inf


def test_top_1_of_rows_and_integers() -> None:
    deviation = Deviation()
    deviation.add(np.array([[0, 3], [2, 1]], np.float32), np.array([[0, 3], [1, 2]], np.float32))
    assert (deviation.rows, deviation.same) == (2, 1)
    integers = Deviation()
    integers.add(np.array([1, 2, 3]), np.array([1, 2, 4]))
    assert (integers.rows, integers.same, integers.is_float) == (3, 2, False)


def test_each_word_of_a_tagger_counts_where_its_scores_are_probabilities() -> None:
    scores = np.array([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]], np.float32)
    tags = Deviation()
    tags.add(scores, scores[..., ::-1])
    assert (tags.rows, tags.same) == (2, 0)  # the third is a toss-up
    features = Deviation()
    features.add(3 * scores, 3 * scores[..., ::-1])
    assert features.rows == 0
    embeddings = Deviation()
    embeddings.add(np.array([[0.6, -0.8]], np.float32), np.array([[-0.8, 0.6]], np.float32))
    assert embeddings.rows == 0


def test_maps_and_sequences() -> None:
    """A map of class scores, as ZipMap gives, is judged as the floats that it holds."""
    deviation = Deviation()
    deviation.add([{0: 0.25, 1: 0.75}], [{0: 0.25, 1: 0.7500001}])
    assert deviation.is_float
    assert deviation.energies[0].sqnr > 100
    shorter = Deviation()
    shorter.add([np.ones(2, np.float32), np.ones(2, np.float32)], [np.ones(2, np.float32)])
    assert shorter.energies[0].sqnr == -math.inf
    names = Deviation()
    names.add(["cat", "dog"], ["cat", "cow"])
    assert (names.rows, names.same) == (2, 1)
