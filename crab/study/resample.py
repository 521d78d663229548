"""Bootstrap intervals (percentile method, Efron 1979) over samples and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_means(values: np.ndarray, resamples: int, seed: int, chunk: int = 500) -> np.ndarray:
    """Means of draws with replacement.

    Args:
        values: [samples], or [seeds, samples] where seeds and samples are both drawn again.
        resamples: number of draws.
        seed: of the generator; the same seed and shape draw the same indices.

    Returns:
        float [resamples].

    Raises:
        ValueError: when there is nothing to draw from.
    """
    values = np.atleast_2d(np.asarray(values, float))
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"bootstrap: expected non-empty [samples] or [seeds, samples], got {list(values.shape)}")
    seeds, samples = values.shape
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        columns = rng.integers(samples, size=(stop - start, samples))
        rows = rng.integers(seeds, size=(stop - start, seeds))
        means[start:stop] = values[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    return means


def interval(means: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval that holds ``level`` of the resampled ``means``."""
    low, high = np.quantile(np.asarray(means, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
