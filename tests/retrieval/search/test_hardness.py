"""How search grows: the fit, what is measured on nested parts of a sample, and forecasts from it."""

import numpy as np
import pytest

from retro.retrieval.search import hardness
from retro.retrieval.search.engines.routed import ROWS_OF_A_LIST
from retro.retrieval.search.exact import exact_search
from retro.retrieval.search.hardness import (
    HELD_OUT,
    Cost,
    Growth,
    KeySample,
    fit,
    measure,
    measure_growth,
    nested_sizes,
    sample_keys,
)


def test_a_power_is_found_with_its_interval():
    rows = nested_sizes(8192)
    assert (rows[0], rows[-1], len(rows)) == (1024, 8192, 7)
    exact = fit(rows, [3 * n**0.25 for n in rows])
    assert (exact.factor, exact.exponent) == (pytest.approx(3), pytest.approx(0.25))
    assert exact.high - exact.low < 1e-6 and exact.at(1e9) == pytest.approx(3 * 1e9**0.25)
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal((2000, 7)))
    fits = [fit(rows, (np.power(rows, 0.25) * factors).tolist()) for factors in noise]
    assert np.mean([found.low < 0.25 < found.high for found in fits]) == pytest.approx(0.95, abs=0.02)


def test_growth_is_measured_on_nested_stores(monkeypatch):
    """Keys of little dimension: few lists find them, and however many there are, all of them are all."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(hardness, "FEWEST_KEYS", 2048 + HELD_OUT)
    monkeypatch.setattr(hardness, "_HALF_OCTAVES", 2)
    draw = np.random.default_rng(0)
    keys = draw.standard_normal((3072, 3)).astype(np.float32) @ draw.standard_normal((3, 8)).astype(np.float32)
    growth = measure_growth(keys, 0.9)
    assert growth.largest.rows == 2048 and growth.largest.recall >= 0.9
    assert growth.largest.rows_compared < 1024 and growth.rows_compared.exponent < 0.8
    costs = [cost for cost, _, _ in measure(["exact"], keys, 0.9)]
    assert [cost.rows for cost in costs] == [2048, 1448, 1024]
    assert fit([c.rows for c in costs], [c.rows_compared for c in costs]).exponent == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 3,072 keys, not 50"):
        measure_growth(keys[:50], 0.9)


def test_a_sample_in_memory_is_searched_like_a_store(tmp_path):
    draw = np.random.default_rng(0)
    keys = draw.standard_normal((300, 5)).astype(np.float32)
    rows, scores, _ = exact_search(KeySample(tmp_path, keys, [100, 300], "float32"), keys[:9], 2, rows=(0, 100))
    distances = np.square(keys[:9, None] - keys[None, :100]).sum(2)
    assert np.array_equal(rows, np.argsort(distances, 1)[:, :2])
    assert np.allclose(-scores, np.sort(distances, 1)[:, :2], atol=1e-5)


def test_a_sample_of_a_store_is_in_drawn_runs(tmp_path):
    store = KeySample(tmp_path, np.arange(1000, dtype=np.float32)[:, None], [1000], "float32")
    found = sample_keys(store, 200)[:, 0]
    assert len(found) == 200 and len(set(found.tolist())) == 200
    assert (np.diff(found) == 1).sum() >= 196 and not (np.diff(found) == 1).all()
    assert sorted(sample_keys(store, 5000)[:, 0]) == list(range(1000))


def test_milliseconds_are_carried_on_by_what_is_compared():
    power = fit([1000, 8000], [100.0, 200.0])  # a third
    growth = Growth(
        Cost("routed", 8000, 0.95, 200.0, 0.5, 0.001), Cost("exact", 8000, 1.0, 8e3, 8.0, 0.002), power, power
    )
    assert growth.cpu_ms_at(8000, 8000 // ROWS_OF_A_LIST) == pytest.approx(0.5)
    assert growth.cpu_ms_at(64000, 8000 // ROWS_OF_A_LIST) == pytest.approx(0.5 + 0.001 * 200)
    assert growth.cpu_ms_at(8000, 40 * 40) == pytest.approx(0.5 + (0.002 + 16 * 0.001) * (40 - 7))


def test_keys_of_a_tree_are_the_same_in_any_order():
    from benchmarks.synthetic import TreeKeys

    keys = TreeKeys(8, seed=1)
    whole = keys.rows(0, 2 << 16)
    assert np.array_equal(keys.rows(65530, 65540), whole[65530:65540])
    assert np.allclose(np.linalg.norm(whole[:99], axis=1), 1, atol=1e-5)
    near = np.square(whole[:200, None] - whole[None, :2000]).sum(2)
    assert np.quantile(np.partition(near, 1)[:, 1], 0.5) < 0.3 * np.median(near)  # topics: some are much nearer
