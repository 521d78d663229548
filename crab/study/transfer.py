"""Does joint training help or hurt? Joint runs against single-task runs, slot by slot.

Works on the per-sample scores that `crab.study.score` writes; needs no model.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from crab.data.files import aside, write_json
from crab.study.resample import bootstrap_means, interval

COLUMNS = [
    "comparison", "slot", "single", "joint", "difference", "low", "high", "relative",
    "chance", "at_chance", "verdict", "samples", "seeds",
]  # fmt: skip


def verdict(difference: float, margin: float) -> str:
    """``gain`` above +margin, ``loss`` below -margin, else ``tie`` (the margin itself is a tie)."""
    if difference > margin:
        return "gain"
    return "loss" if difference < -margin else "tie"


def sign_test(gains: int, losses: int) -> float:
    """Two-sided exact sign test (Dixon and Mood, 1946); ties are left out, as is usual."""
    trials = gains + losses
    tail = sum(math.comb(trials, k) for k in range(min(gains, losses) + 1)) / 2**trials
    return min(1.0, 2 * tail)


def _grid(samples: pd.DataFrame, family: str, slot: str) -> pd.DataFrame:
    """Per-sample scores of one row of the table: index seed, columns sample id."""
    part = samples[(samples["family"] == family) & (samples["slot"] == slot)]
    if part.empty:
        raise ValueError(f"transfer: no scores of {family} on {slot}; run the evaluate stage with that run")
    return part.pivot(index="seed", columns="id", values="score").sort_index()


def compare_slot(
    single: pd.DataFrame, joint: pd.DataFrame, chance: float, margin: float, resamples: int, seed: int
) -> tuple[dict, np.ndarray]:
    """One slot's row of the table and its resampled differences [resamples].

    Args:
        single, joint: scores in [0, 1], index seed, columns sample id; both must hold the same ones.
        chance: score of the best constant answer.

    Raises:
        ValueError: when the two were not scored on the same samples and seeds.
    """
    if list(single.columns) != list(joint.columns) or list(single.index) != list(joint.index):
        raise ValueError("transfer: single and joint hold different samples or seeds; evaluate both on the same test set")
    difference = (joint - single).to_numpy()
    draws = bootstrap_means(difference, resamples, seed)
    low, high = interval(draws)
    mean_single, mean_joint = float(single.to_numpy().mean()), float(joint.to_numpy().mean())
    floors = [interval(bootstrap_means(runs.to_numpy(), resamples, seed))[0] for runs in (single, joint)]
    row = {
        "single": mean_single,
        "joint": mean_joint,
        "difference": mean_joint - mean_single,
        "low": low,
        "high": high,
        "relative": (mean_joint - mean_single) / mean_single if mean_single > 0 else float("nan"),
        "chance": chance,
        "at_chance": max(floors) <= chance,
        "verdict": verdict(mean_joint - mean_single, margin),
        "samples": single.shape[1],
        "seeds": single.shape[0],
    }
    return row, draws


def compare(
    samples: pd.DataFrame,
    chance: pd.Series,
    baseline: str,
    joint: str,
    margin: float = 0.02,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict]:
    """Compare one joint row with the single-task baseline on every slot both were scored on.

    Args:
        samples: columns family, seed, slot, id, score (see `crab.study.score.load_samples`).
        chance: chance score by slot.
        baseline, joint: families of runs, e.g. ``single-lora-bare`` and ``joint-ilora-explicit``.
        margin: differences up to this size, in score, are ties.

    Returns:
        The table (`COLUMNS`), and the summary over slots. A slot where neither run's 95 % interval
        lies above chance is flagged ``at_chance``: it counts neither for nor against.
    """
    rows, draws = [], []
    wanted = samples[samples["family"] == baseline]["slot"]
    for slot in dict.fromkeys(wanted):
        row, resampled = compare_slot(
            _grid(samples, baseline, slot),
            _grid(samples, joint, slot),
            float(chance[slot]),
            margin,
            resamples,
            # every slot draws from its own stream: slots are independent, runs within one are paired
            seed + zlib.crc32(slot.encode()),
        )
        rows.append({"comparison": f"{joint} vs {baseline}", "slot": slot, **row})
        draws.append(resampled)
    if not rows:
        raise ValueError(f"transfer: no scores of the baseline {baseline}; known: {sorted(set(samples['family']))}")
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table, summarise(table, np.stack(draws), margin)


def summarise(table: pd.DataFrame, draws: np.ndarray, margin: float) -> dict:
    """Rates over the slots above chance. ``draws`` [slots, resamples] gives their intervals.

    Rates are None when no slot is above chance. ``mean_relative_change`` is the mean over slots of
    (joint - single) / single, leaving out slots whose single score is 0 (they have no relative change).
    """
    counted = ~table["at_chance"].to_numpy(bool)
    kept, draws = table[counted], draws[counted]
    count = {name: int((kept["verdict"] == name).sum()) for name in ("gain", "tie", "loss")}
    summary = {
        "slots": len(table),
        "slots_counted": len(kept),
        "slots_at_chance": int((~counted).sum()),
        "at_chance": list(table["slot"][~counted]),
        **count,
        "margin": margin,
        "clear_gain": int((kept["low"] > 0).sum()),
        "clear_loss": int((kept["high"] < 0).sum()),
    }
    if kept.empty:
        return summary | {"positive_rate": None, "negative_rate": None, "mean_difference": None,
                          "mean_relative_change": None, "sign_test_p": None}  # fmt: skip
    relative = kept["relative"].dropna()
    summary |= {
        "positive_rate": count["gain"] / len(kept),
        "positive_rate_interval": list(interval((draws > margin).mean(0))),
        "negative_rate": count["loss"] / len(kept),
        "negative_rate_interval": list(interval((draws < -margin).mean(0))),
        "mean_difference": float(kept["difference"].mean()),
        "mean_difference_interval": list(interval(draws.mean(0))),
        "mean_relative_change": float(relative.mean()) if len(relative) else None,
        "sign_test_p": sign_test(count["gain"], count["loss"]),
    }
    return summary


def transfer(
    samples: pd.DataFrame,
    scores: pd.DataFrame,
    out: str | Path,
    baseline: str = "single-lora-bare",
    joint: Sequence[str] | None = None,
    margin: float = 0.02,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict]:
    """Compare every joint row with the baseline; write ``transfer.csv`` and ``metrics.json`` to ``out``.

    Args:
        samples, scores: as `crab.study.score` writes them.
        joint: families to compare; by default every joint one scored.
    """
    families = [f for f in dict.fromkeys(samples["family"]) if f.startswith("joint-")]
    joint = families if joint is None else list(joint)
    if not joint:
        raise ValueError(f"transfer: no joint run among {sorted(set(samples['family']))}")
    chance = scores[scores["primary"]].groupby("slot", sort=False)["chance"].first()
    tables, summary = [], {}
    for family in joint:
        table, summary[family] = compare(samples, chance, baseline, family, margin, resamples, seed)
        tables.append(table)
    result = pd.concat(tables, ignore_index=True)
    with aside(Path(out) / "transfer.csv") as path:
        result.to_csv(path, index=False, float_format="%.6g")
    write_json(Path(out) / "metrics.json", {"baseline": baseline, **summary})
    return result, summary


def summary_table(summary: Mapping[str, Mapping]) -> pd.DataFrame:
    """A row a joint family: what was counted, and the rates with their intervals."""

    def cell(values: Mapping, name: str, form: str) -> str:
        if values.get(name) is None:
            return "none above chance"
        low, high = values[f"{name}_interval"]
        return f"{values[name]:{form}} [{low:{form}}, {high:{form}}]"

    rows = [
        {
            "joint run": family,
            "slots": values["slots"],
            "at chance, not counted": values["slots_at_chance"],
            "gain / tie / loss": f"{values['gain']} / {values['tie']} / {values['loss']}",
            "gains": cell(values, "positive_rate", ".0%"),
            "losses": cell(values, "negative_rate", ".0%"),
            "mean difference": cell(values, "mean_difference", "+.3f"),
            "mean relative change": None if values["mean_relative_change"] is None else f"{values['mean_relative_change']:+.1%}",
            "sign test p": values["sign_test_p"],
        }
        for family, values in summary.items()
    ]
    return pd.DataFrame(rows).set_index("joint run")


def headline(summary: Mapping[str, Mapping], baseline: str) -> str:
    """The result in words, a Markdown list with a line a joint family."""
    lines = [f"Against single-task training (`{baseline}`), of the slots on which either is above chance:", ""]
    for family, values in summary.items():
        if values["positive_rate"] is None:
            lines.append(f"- `{family}`: no slot is above chance, so nothing can be said.")
            continue
        low, high = values["mean_difference_interval"]
        sense = "a gain" if low > 0 else "a loss" if high < 0 else "no clear difference"
        lines.append(
            f"- `{family}`: {values['gain']} of {values['slots_counted']} gain, {values['loss']} lose by more than "
            f"{values['margin']:g}; mean difference {values['mean_difference']:+.3f} [{low:+.3f}, {high:+.3f}], {sense} overall."
        )
    return "\n".join(lines)
