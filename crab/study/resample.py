"""Intervals by resampling: over samples by the bootstrap (percentile method, Efron 1979), over seeds by Student's t."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def bootstrap_means(values: np.ndarray, resamples: int, seed: int, stream: str | None = None, chunk: int = 500) -> np.ndarray:
    """Means as they would come out with other samples and, where there are several, other seeds.

    Samples are drawn again with replacement, the same ones for every seed: all seeds were tested on one test set, so
    drawing for each seed apart would let what is hard about a sample cancel out. Seeds are too few to be drawn again:
    draws from three never leave the range of the three, which misses the truth one time in four. Their part is the
    standard error of the seeds' means times Student's t with seeds - 1 degrees of freedom. With one seed there is no
    such part, and the interval does not know what another seed would change.

    Args:
        values: [samples], or [seeds, samples].
        resamples: number of draws.
        seed: of the generators; equal seed, stream and shape draw equal samples, so that calls can be paired.
        stream: names what is drawn. Calls with equal seed and different streams draw their samples apart and their
            seeds together, as for one joint run that is tested on several slots.

    Returns:
        float [resamples].

    Raises:
        ValueError: when there is nothing to draw from.
    """
    values = np.atleast_2d(np.asarray(values, float))
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"bootstrap: expected non-empty [samples] or [seeds, samples], got {list(values.shape)}")
    seeds, samples = values.shape
    rng = np.random.default_rng(seed if stream is None else [seed, zlib.crc32(stream.encode())])
    each = values.mean(0)
    means = np.empty(resamples)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        means[start:stop] = each[rng.integers(samples, size=(stop - start, samples))].mean(1)
    if seeds > 1:
        rng = np.random.default_rng([seed, seeds])
        normal, square = rng.normal(size=(resamples, seeds)), rng.chisquare(seeds - 1, size=resamples)
        # sum_k g_k c_k of the centred means c has variance (seeds - 1) s^2: over all streams one multivariate t
        means += normal @ (values.mean(1) - values.mean()) / np.sqrt(seeds * square)
    return means


def interval(means: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval that holds ``level`` of the resampled ``means``."""
    low, high = np.quantile(np.asarray(means, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
