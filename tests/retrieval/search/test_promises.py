"""Promises about what goes wrong elsewhere, as far as no other test of this folder holds the library to them."""

import numpy as np
import pytest

from retro.retrieval import build_index
from retro.retrieval.search.exact import as_hits, merge, no_hits
from tests.stand_ins import HashingEmbedder, make_store, words


def test_scores_of_several_sources_are_ordered_as_numbers():
    """As strings, 10 and 100 come before 9."""
    rows, distances = no_hits(1, 3)
    for row, distance in ((5, 100.0), (3, 9.0), (8, 10.0), (2, 1000.0)):
        rows, distances = merge(rows, distances, np.array([[row]]), np.array([[distance]]), 3)
    found, scores, mask = as_hits(rows, distances)
    assert found.tolist() == [[3, 8, 5]] and scores.tolist() == [[-9.0, -10.0, -100.0]] and mask.all()


class TwoPlaces(HashingEmbedder):
    """Texts that begin with w1 lie far from the others."""

    def embed(self, texts, is_query=False):
        keys = super().embed(texts)
        keys[:, 0] = [10.0 if text.startswith("w1 ") else -10.0 for text in texts]
        return keys


def test_an_index_is_trained_on_a_uniform_sample(tmp_path, tokenizer):
    """Two thirds of the rows come later than a sample of the first rows would reach, and are of another kind."""
    faiss = pytest.importorskip("faiss")
    texts = [f"{'w1' if n < 200 else 'w2'} {words(2, n)}" for n in range(600)]
    store = make_store(tmp_path, texts, tokenizer, TwoPlaces())
    index = build_index(store, "faiss:ivf-flat", lists=4, training_sample=160)
    written = faiss.read_index(str(index.folders[0] / "faiss.index"))
    centroids = faiss.extract_index_ivf(written).quantizer.reconstruct_n(0, 4)
    assert (centroids[:, 0] < -5).any() and (centroids[:, 0] > 5).any()
