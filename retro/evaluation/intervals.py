"""How sure a figure over documents is: the bootstrap.

Chunks of one document resemble each other, so that documents are drawn, with all their chunks, never chunks.
Source: Efron and Tibshirani 1993.
"""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float

SAMPLES = 1000
LEVEL = 0.95
_DRAWN = 2**24  # counts held at a time


def resampled_sums(
    values: Float[np.ndarray, "d *x"], samples: int = SAMPLES, seed: int = 0
) -> Float[np.ndarray, "s *x"]:
    """Sums over as many documents as there are, drawn with replacement, once per sample.

    The draws are a function of the number of documents and the seed: sums of different values go together. One document
    says nothing about others: NaN.
    """
    generator, documents = np.random.default_rng(seed), len(values)
    if documents < 2:
        return np.full((samples, *values.shape[1:]), np.nan)
    flat = values.reshape(documents, -1).astype(np.float64)
    step = max(1, _DRAWN // documents)
    sums = [
        generator.multinomial(documents, np.full(documents, 1 / documents), min(step, samples - start)) @ flat
        for start in range(0, samples, step)
    ]
    return np.concatenate(sums).reshape(samples, *values.shape[1:])


def interval(
    resampled: Float[np.ndarray, "s *x"], level: float = LEVEL
) -> tuple[Float[np.ndarray, "*x"], Float[np.ndarray, "*x"]]:
    """Low and high percentile of a resampled figure; NaN where no sample has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of columns without any number
        low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low, np.float64), np.asarray(high, np.float64)


def ratio(above: Float[np.ndarray, "*x"], below: Float[np.ndarray, "*x"]) -> Float[np.ndarray, "*x"]:
    """above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)


def mean(values: Float[np.ndarray, " d"], seed: int = 0) -> list[float]:
    """The mean over documents with the ends of its interval."""
    return quotient(values, np.ones(len(values)), seed)


def quotient(above: Float[np.ndarray, " d"], below: Float[np.ndarray, " d"], seed: int = 0) -> list[float]:
    """sum(above) / sum(below) over documents, and the low and high end over documents drawn anew (95%)."""
    sums = np.stack([above, below], axis=1).astype(np.float64)
    drawn = resampled_sums(sums, seed=seed)
    of_all = ratio(*sums.sum(0)[:, None])
    return [float(of_all[0]), *map(float, interval(ratio(drawn[:, 0], drawn[:, 1])))]
