"""What a routed index is made of: axes of keys, k-means, nearest centroids, and codes, by faiss and torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retro.common.devices import find_device
from retro.retrieval.search.engines.faiss import faiss_gpus, one_thread


@contextmanager
def one_fast_thread() -> Iterator[None]:
    """One thread, and float32 products by the library that is the faster here."""
    from retro.common.products import fast_products

    with one_thread(), fast_products():
        yield


def k_means(keys: Float32[np.ndarray, "c d"], count: int, rounds: int) -> Float32[np.ndarray, "k d"]:
    """Centroids; where there are fewer keys than these, keys are given more than once."""
    import faiss

    if len(keys) <= count:
        return np.resize(keys, (count, keys.shape[1]))
    if count == 1:
        return keys.mean(0, keepdims=True)
    sizes = {"min_points_per_centroid": 1, "max_points_per_centroid": 1 << 30}
    count_gpus = len(gpus) if (gpus := faiss_gpus()) == list(range(len(gpus))) else 0  # it takes the first ones only
    means = faiss.Kmeans(keys.shape[1], count, niter=rounds, seed=1, gpu=count_gpus, **sizes)
    means.train(np.ascontiguousarray(keys))
    return means.centroids


def places_of_distinct(keys: Float32[np.ndarray, "c d"]) -> Int64[np.ndarray, " n"]:
    """Where each key is there first: trained on all its copies, many centroids would be alike, and most of their lists
    empty."""
    whole = np.ascontiguousarray(keys).view(np.dtype((np.void, keys.shape[1] * keys.itemsize)))
    return np.sort(np.unique(whole[:, 0], return_index=True)[1])


def trained_codec(keys: Float32[np.ndarray, "c a"], codes: int) -> Any:
    """A product quantizer of so many codes of 4 bits."""
    import faiss

    codec = faiss.ProductQuantizer(keys.shape[1], codes, 4)
    codec.cp.min_points_per_centroid = 1
    codec.train(np.resize(keys, (max(len(keys), 1 << codec.nbits), keys.shape[1])))
    return codec


def codebook_of(codec: Any) -> Float32[np.ndarray, "codes 16 a"]:
    """What each code of a product quantizer stands for."""
    import faiss

    return faiss.vector_to_array(codec.centroids).reshape(codec.M, -1, codec.dsub)


def principal_axes(keys: Float32[np.ndarray, "c d"], codes: int) -> Float32[np.ndarray, "a d"]:
    """The axes along which keys vary most, two for each code, in an order that gives all codes about as much."""
    import faiss

    width = keys.shape[1]
    count = min(2 * codes, width)
    found = faiss.PCAMatrix(width, count)
    found.balanced_bins = codes
    found.train(np.resize(keys, (max(len(keys), width), width)))
    return faiss.vector_to_array(found.A).reshape(-1, width)[:count].copy()


def project(keys: Float32[np.ndarray, "c d"], axes: Float32[np.ndarray, "a d"]) -> Float32[np.ndarray, "c a"]:
    """The coordinates of keys on the axes: the same of a key whatever others are with it."""
    import torch

    least = 8 * torch.get_num_threads()  # the products of fewer would be rounded otherwise
    padded = np.zeros((max(len(keys), least), keys.shape[1]), np.float32)
    padded[: len(keys)] = keys
    return (torch.from_numpy(padded) @ torch.from_numpy(axes).T).numpy()[: len(keys)]


def nearest(
    keys: Float32[np.ndarray, "c d"], centroids: Float32[np.ndarray, "k d"], count: int
) -> tuple[Int64[np.ndarray, "c n"], Float32[np.ndarray, "c n"]]:
    """The nearest centroids of each key, and key . centroid - |centroid|^2 / 2 of them, largest first."""
    import torch

    device = find_device()
    device = device if device.type == "cuda" else torch.device("cpu")
    table, asked = (torch.from_numpy(np.array(array)).to(device) for array in (centroids, keys))
    scores = torch.addmm(-table.square().sum(1) / 2, asked, table.T)
    count = min(count, len(table))
    if device.type == "cuda":
        top, places = scores.topk(count, dim=1)
        return places.cpu().numpy(), top.cpu().numpy()
    scores, lines = scores.numpy(), np.arange(len(keys))
    places, top = np.empty((len(keys), count), np.int64), np.empty((len(keys), count), np.float32)
    for rank in range(count):  # several times as fast as partial sorts
        places[:, rank] = scores.argmax(1)
        top[:, rank] = scores[lines, places[:, rank]]
        scores[lines, places[:, rank]] = -np.inf
    return places, top
