"""Two rows of a table of scores against each other: differences, intervals and verdicts, slot by slot and over slots.

Works on the score of every sample (:mod:`crab.study.ledger`); needs no model. Intervals over samples come from the
bootstrap (percentile method, Efron 1979), intervals over seeds from Student's t.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

COLUMNS = [
    "comparison", "slot", "baseline", "joint", "difference", "low", "high", "relative",
    "chance", "at_chance", "joint_above_chance", "verdict", "samples", "seeds",
]  # fmt: skip


def bootstrap_means(values: np.ndarray, resamples: int, seed: int, stream: str | None = None) -> np.ndarray:
    """Means as they would come out with other samples and, where there are several, other seeds: float [resamples].

    Samples are drawn again with replacement, the same ones for every seed: all seeds were tested on one test set, so
    drawing for each seed apart would let what is hard about a sample cancel out. Seeds are too few to be drawn again:
    draws from three never leave the range of the three, which misses the truth one time in four. Their part is the
    standard error of the seeds' means times Student's t with seeds - 1 degrees of freedom. With one seed there is no
    such part, and the interval does not know what another seed would change.

    Args:
        values: [samples], or [seeds, samples]; ValueError if there are none.
        seed: of the generators; equal seed, stream and shape draw equal samples, so that calls can be paired.
        stream: names what is drawn. Calls with equal seed and different streams draw their samples apart and their
            seeds together, as for one joint run that is tested on several slots.
    """
    values = np.atleast_2d(np.asarray(values, float))
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"bootstrap: expected non-empty [samples] or [seeds, samples], got {list(values.shape)}")
    seeds, samples = values.shape
    rng = np.random.default_rng(seed if stream is None else [seed, zlib.crc32(stream.encode())])
    each = values.mean(0)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):  # in parts, which bounds memory
        stop = min(start + 500, resamples)
        means[start:stop] = each[rng.integers(samples, size=(stop - start, samples))].mean(1)
    if seeds > 1:
        rng = np.random.default_rng([seed, seeds])
        normal, square = rng.normal(size=(resamples, seeds)), rng.chisquare(seeds - 1, size=resamples)
        # sum_k g_k c_k of the centred means c has variance (seeds - 1) s^2: over all streams one multivariate t
        means += normal @ (values.mean(1) - values.mean()) / np.sqrt(seeds * square)
    return means


def interval(means: Sequence[float]) -> tuple[float, float]:
    """Percentile interval that holds 95% of the resampled ``means``."""
    low, high = np.quantile(np.asarray(means, float), [0.025, 0.975])
    return float(low), float(high)


def verdict(difference: float, margin: float) -> str:
    """``gain`` above +margin, ``loss`` below -margin, else ``tie`` (the margin itself is a tie)."""
    margin += 1e-9  # .52 - .50 is more than .02 in binary
    if difference > margin:
        return "gain"
    return "loss" if difference < -margin else "tie"


def sign_test(gains: int, losses: int) -> float:
    """Two-sided exact sign test (Dixon and Mood, 1946); ties are left out, as is usual."""
    return float(binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's (1979) step-down rule, in the order given."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - rank) * float(p[i])))
        adjusted[i] = least
    return adjusted


def rate(count: int, of: int) -> tuple[float, float, float]:
    """A share and its exact 95% interval (Clopper and Pearson, 1934), the slots taken as drawn from all such tasks."""
    bounds = binomtest(count, of).proportion_ci(0.95, "exact")
    return count / of, float(bounds.low), float(bounds.high)


def _grid(samples: pd.DataFrame, family: str, slot: str) -> pd.DataFrame:
    """Per-sample scores of one row of the table: index seed, columns sample id."""
    part = samples[(samples["family"] == family) & (samples["slot"] == slot)]
    if part.empty:
        raise ValueError(f"transfer: no scores of {family} on {slot}; run the evaluate stage with that run")
    return part.pivot(index="seed", columns="id", values="score").sort_index()


def _compare_slot(
    slot: str, baseline: pd.DataFrame, joint: pd.DataFrame, floor: pd.DataFrame, chance: float, resamples: int
) -> tuple[dict, np.ndarray, np.ndarray]:
    """One slot's row of the table, and its resampled differences and relative changes, each [resamples].

    ``baseline``, ``joint`` and ``floor`` are of `_grid`. ValueError unless the first two have equal samples and seeds.
    """
    if list(baseline.columns) != list(joint.columns) or list(baseline.index) != list(joint.index):
        raise ValueError(
            f"transfer: {slot}: the runs compared hold different samples or seeds "
            f"({baseline.shape[1]} and {joint.shape[1]} samples, "
            f"seeds {list(baseline.index)} and {list(joint.index)}); evaluate both on the same test set, "
            "and train both with the same seeds"
        )
    # Equal streams draw equal samples, so the draws of the two are paired.
    of_baseline, of_joint = (bootstrap_means(runs.to_numpy(), resamples, 0, slot) for runs in (baseline, joint))
    least = interval(bootstrap_means(floor.to_numpy(), resamples, 0, slot))[0]
    mean, mean_joint = float(baseline.to_numpy().mean()), float(joint.to_numpy().mean())
    low, high = interval(of_joint - of_baseline)
    ratio = mean_joint / mean if mean > 0 else float("nan")
    row = {
        "baseline": mean,
        "joint": mean_joint,
        "difference": mean_joint - mean,
        "low": low,
        "high": high,
        "relative": ratio - 1,
        "chance": chance,
        "at_chance": least <= chance,
        "joint_above_chance": interval(of_joint)[0] > chance,
        "samples": baseline.shape[1],
        "seeds": baseline.shape[0],
    }
    # The ratio to first order, so that a draw of the baseline near 0 does not explode.
    relative = ratio - 1 + (of_joint - ratio * of_baseline) / mean if mean > 0 else np.full(resamples, np.nan)
    return row, of_joint - of_baseline, relative


def compare(
    samples: pd.DataFrame, chance: pd.Series, baseline: str, joint: str, margin: float = 0.02, resamples: int = 2000,
    floor: str | None = None,
) -> tuple[pd.DataFrame, dict]:  # fmt: skip
    """Compare one joint row with a baseline on every slot the baseline was scored on.

    Args:
        samples: columns family, seed, slot, id, score in [0, 1] (see `crab.study.ledger.sample_scores`).
        chance: by slot, the score of the best constant answer.
        baseline, joint: families of runs, e.g. ``single-lora-bare`` and ``joint-ilora-explicit``.
        margin: differences up to this size, in score, are ties.
        floor: family that tells whether a slot can be learned; the baseline unless given.

    Returns the table (`COLUMNS`), and the summary over slots. A slot on which the 95% interval of ``floor`` does not
    lie above chance is flagged ``at_chance``: it counts neither for nor against. The joint run has no say in that, so
    that every joint run is judged on the same slots.
    """
    rows, differences, changes = [], [], []
    for slot in dict.fromkeys(samples[samples["family"] == baseline]["slot"]):
        grids = [_grid(samples, family, slot) for family in (baseline, joint, floor or baseline)]
        row, difference, change = _compare_slot(slot, *grids, float(chance[slot]), resamples)
        row |= {"comparison": f"{joint} vs {baseline}", "slot": slot, "verdict": verdict(row["difference"], margin)}
        rows.append(row)
        differences.append(difference)
        changes.append(change)
    if not rows:
        raise ValueError(f"transfer: no scores of the baseline {baseline}; known: {sorted(set(samples['family']))}")
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table, summarise(table, np.stack(differences), np.stack(changes), margin)


def summarise(table: pd.DataFrame, differences: np.ndarray, changes: np.ndarray, margin: float) -> dict:
    """Rates and means over the slots above chance.

    ``differences`` and ``changes`` are resampled differences and relative changes, [slots, resamples].

    Returns counts; ``positive_rate`` and ``negative_rate`` with exact intervals over slots, ``clear_gain`` and
    ``clear_loss`` of them with an interval of their own that leaves out 0; mean difference and mean relative change
    with intervals over samples and seeds. Rates and means are None when no slot is above chance. A slot whose baseline
    is 0 has no relative change, and is left out of that mean.
    """
    counted = ~table["at_chance"].to_numpy(bool)
    kept = table[counted]
    count = {name: int((kept["verdict"] == name).sum()) for name in ("gain", "tie", "loss")}
    summary = {
        "slots": len(table),
        "slots_counted": len(kept),
        "slots_at_chance": int((~counted).sum()),
        "at_chance": list(table["slot"][~counted]),
        "learned_only_jointly": list(table["slot"][~counted & table["joint_above_chance"].to_numpy(bool)]),
        "seeds": int(table["seeds"].min()),
        **count,
        "margin": margin,
        "clear_gain": int(((kept["verdict"] == "gain") & (kept["low"] > 0)).sum()),
        "clear_loss": int(((kept["verdict"] == "loss") & (kept["high"] < 0)).sum()),
    }
    if kept.empty:
        return summary | {"positive_rate": None, "negative_rate": None, "mean_difference": None,
                          "mean_relative_change": None, "sign_test_p": None}  # fmt: skip
    for name, verdicts in (("positive_rate", "gain"), ("negative_rate", "loss")):
        summary[name], *summary[f"{name}_interval"] = rate(count[verdicts], len(kept))
    summary["mean_difference"] = float(kept["difference"].mean())
    summary["mean_difference_interval"] = list(interval(differences[counted].mean(0)))
    known = counted & (table["baseline"].to_numpy() > 0)
    summary["mean_relative_change"] = float(table["relative"][known].mean()) if known.any() else None
    if known.any():
        summary["mean_relative_change_interval"] = list(interval(changes[known].mean(0)))
    return summary | {"sign_test_p": sign_test(count["gain"], count["loss"])}


def correct(summary: Mapping[str, dict]) -> None:
    """Add ``sign_test_holm`` to each row of a table: its sign test's p, corrected for the number of rows."""
    tested = [values for values in summary.values() if values["sign_test_p"] is not None]
    for values, p in zip(tested, holm([values["sign_test_p"] for values in tested]), strict=True):
        values["sign_test_holm"] = p


def judge(
    samples: pd.DataFrame, chance: Mapping[str, float], pairs: Mapping[str, str], floor: str, margin: float,
    resamples: int,
) -> tuple[pd.DataFrame, dict[str, dict]]:  # fmt: skip
    """Compare families with others, slot by slot, on the seeds that both and the floor have.

    Args:
        samples: columns family, seed, slot, id, score. pairs: by family, the one it is compared with.
        floor: family that tells which slots can be learned. Slots that it leaves at chance do not count.

    Returns the tables of `compare` below each other, and the summaries by family, with Holm's correction.
    """
    tables, summaries = [], {}
    for family, other in pairs.items():
        part = samples[samples["family"].isin([family, other, floor])]
        seeds = set.intersection(*(set(group) for _, group in part.groupby("family")["seed"]))
        part = part[part["seed"].isin(seeds)]
        table, summaries[family] = compare(part, pd.Series(chance), other, family, margin, resamples, floor)
        tables.append(table)
    correct(summaries)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS), summaries


def mean_scores(samples: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Mean score of each family on each slot, with its 95% interval over samples and seeds: one row each."""
    rows = []
    for (family, slot), part in samples.groupby(["family", "slot"], sort=False):
        scores = part.pivot(index="seed", columns="id", values="score").to_numpy()
        low, high = interval(bootstrap_means(scores, resamples, 0, slot))
        rows.append([family, slot, scores.mean(), low, high, *scores.shape])
    return pd.DataFrame(rows, columns=["family", "slot", "score", "low", "high", "seeds", "samples"])
