"""Intervals over samples and seeds, against closed forms and by what they promise: their coverage."""

import math

import numpy as np
import pytest

from crab.study.resample import bootstrap_means, interval


def test_samples_agree_with_the_normal_interval():
    values = np.repeat([1.0, 0.0], [30, 70])
    low, high = interval(bootstrap_means(values, 4000, 0))
    error = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert (low, high) == (pytest.approx(0.3 - error, abs=0.015), pytest.approx(0.3 + error, abs=0.015))


def test_seeds_agree_with_students_interval():
    """Three seeds at .1, .2, .3, every sample alike: .2 +- 4.303 * .1 / sqrt(3), far beyond the range of the three."""
    values = np.repeat([[0.1], [0.2], [0.3]], 8, axis=1)
    low, high = interval(bootstrap_means(values, 60_000, 0))
    assert (low, high) == (pytest.approx(0.2 - 0.2484, abs=0.006), pytest.approx(0.2 + 0.2484, abs=0.006))


def test_draws_are_paired_within_a_stream():
    first, second = np.random.default_rng(0).normal(size=(2, 3, 20))
    draws = [bootstrap_means(v, 50, 7, "ks") for v in (first, second, second - first)]
    assert np.allclose(draws[1] - draws[0], draws[2])


def test_streams_share_seeds_and_not_samples():
    by_seed = np.repeat([[0.1], [0.4]], 5, axis=1)
    assert (bootstrap_means(by_seed, 50, 7, "ks") == bootstrap_means(by_seed, 50, 7, "ave")).all()
    by_sample = np.random.default_rng(0).normal(size=200)
    draws = [bootstrap_means(by_sample, 3000, 7, stream) for stream in ("ks", "ave")]
    assert abs(np.corrcoef(draws)[0, 1]) < 0.06


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match=r"expected non-empty \[samples\] or \[seeds, samples\], got \[1, 0\]"):
        bootstrap_means(np.empty(0), 10, 0)


def covered(seeds: int, of_seed: float, of_sample: float, of_both: float, trials: int = 500) -> float:
    """How often the interval holds the true mean 0 when scores are seed + sample + noise, all normal."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(trials):
        values = rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_sample, (1, 40)) + rng.normal(0, of_both, (seeds, 40))
        low, high = interval(bootstrap_means(values, 400, trial))
        hits += low <= 0 <= high
    return hits / trials


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_sample", "of_both"),
    [(1, 0, 1, 0), (3, 0, 1, 1), (3, 0.2, 1, 1), (3, 1, 0.1, 0.1), (5, 1, 1, 1)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, of_seed, of_sample, of_both):
    assert covered(seeds, of_seed, of_sample, of_both) >= 0.92


def test_intervals_are_not_merely_wide():
    assert covered(1, 0, 1, 0) <= 0.97 and covered(3, 1, 0.1, 0.1) <= 0.98


def test_mean_over_streams_holds_the_truth_though_they_share_seeds():
    """A joint run's seed moves all slots at once; drawn slot by slot it would seem to average out."""
    rng = np.random.default_rng(2)
    hits, apart = 0, 0
    for trial in range(300):
        shared = rng.normal(0, 0.3, (3, 1))
        slots = [shared + rng.normal(size=(3, 20)) for _ in range(4)]
        for together in (True, False):
            draws = np.mean([bootstrap_means(v, 300, trial if together else trial + 1000 * k, str(k)) for k, v in enumerate(slots)], axis=0)
            low, high = interval(draws)
            if together:
                hits += low <= 0 <= high
            else:
                apart += low <= 0 <= high
    assert hits / 300 >= 0.92 and apart < hits
