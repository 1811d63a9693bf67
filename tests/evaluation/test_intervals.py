"""The bootstrap over documents: a case that can be counted out, and draws that go together."""

import numpy as np
import pytest

from retro.evaluation.intervals import interval, ratio, resampled_sums


def test_two_documents_counted_out():
    """Drawn twice from two: (a, a) and (b, b) a quarter of the time each, (a, b) half of it."""
    sums = resampled_sums(np.array([[1.0, 1.0], [6.0, 2.0]]), samples=4000, seed=1)
    values, counts = np.unique(ratio(sums[:, 0], sums[:, 1]), return_counts=True)
    assert values == pytest.approx([1, 7 / 3, 3])
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert [float(end) for end in interval(ratio(sums[:, 0], sums[:, 1]))] == pytest.approx([1, 3])
    assert [float(end) for end in interval(ratio(sums[:, 0], sums[:, 1]), level=0.2)] == pytest.approx([7 / 3, 7 / 3])


def test_draws_are_a_function_of_seed_and_number_of_documents(monkeypatch):
    values = np.random.default_rng(0).random((50, 3))
    sums = resampled_sums(values, samples=30, seed=7)
    assert (sums == resampled_sums(values, samples=30, seed=7)).all()
    assert not (sums == resampled_sums(values, samples=30, seed=8)).all()
    np.testing.assert_allclose(resampled_sums(2 * values[:, 1], samples=30, seed=7), 2 * sums[:, 1])
    monkeypatch.setattr("retro.evaluation.intervals._DRAWN", 120)  # a few samples at a time
    np.testing.assert_allclose(resampled_sums(values, samples=30, seed=7), sums)


def test_no_figure_is_nan():
    assert np.isnan(interval(ratio(np.array([0.0]), np.array([0.0])))).all()
    assert np.isnan(resampled_sums(np.ones((1, 2)), samples=3)).all(), "one document says nothing about others"
