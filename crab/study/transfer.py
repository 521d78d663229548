"""Does joint training help or hurt? Joint runs against single-task runs, slot by slot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from crab.data.files import atomic_file, write_json
from crab.study.compare import COLUMNS, compare, correct
from crab.study.runs import METHODS

#: Crab+ (arXiv 2603.04128): share of tasks that get worse by joint training with plain LoRA, and better with Crab+.
PAPER = {"negative": 0.55, "positive": 0.88}


def bare(family: str) -> str:
    """The same runs with bare answers, e.g. ``joint-ilora-bare`` of ``joint-ilora-explicit``; of a bare family itself."""
    return family.rpartition("-")[0] + "-bare"


def transfer(
    samples: pd.DataFrame,
    scores: pd.DataFrame,
    out: str | Path,
    baseline: str = "single-lora-bare",
    rival: str = "lora_matched",
    margin: float = 0.02,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[tuple[pd.DataFrame, dict], ...]:
    """Compare every joint row with the baseline and with a joint rival, and explicit answers with bare ones; write all to ``out``.

    ``transfer.csv``, ``rival.csv`` and ``forms.csv`` hold the tables, ``metrics.json`` the summaries.

    Args:
        samples, scores: as `crab.study.score` writes them.
        baseline: family of single-task runs.
        rival: method whose joint runs, on the same form of answers, the other methods' are compared with as well.

    Returns:
        Three pairs of table and summaries (by the family compared): joint runs against the baseline, the same against the
        rival, and runs with explicit answers against their like with bare ones. The last two may be empty.

    Raises:
        ValueError: no joint run, no baseline, or a rival that is no method.
    """
    families = list(dict.fromkeys(samples["family"]))
    joint = [family for family in families if family.startswith("joint-")]
    if not joint:
        raise ValueError(f"transfer: no joint run among {sorted(families)}; add one to a method's runs")
    if rival not in METHODS:
        raise ValueError(f"transfer.rival: {rival!r} is no method; choose one of {', '.join(METHODS)}")
    rivals = {family: f"joint-{rival}-{family.rpartition('-')[2]}" for family in joint}
    asked = {
        "transfer": dict.fromkeys(joint, baseline),
        "rival": {family: other for family, other in rivals.items() if other in joint and other != family},
        "forms": {family: bare(family) for family in families if bare(family) != family and bare(family) in families},
    }
    chance = scores[scores["primary"]].groupby("slot", sort=False)["chance"].first()
    made = {}
    for name, pairs in asked.items():
        tables, summary = [], {}
        for family, other in pairs.items():
            table, summary[family] = compare(samples, chance, other, family, margin, resamples, seed, baseline)
            tables.append(table)
        correct(summary)
        made[name] = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS), summary
        with atomic_file(Path(out) / f"{name}.csv") as path:
            made[name][0].to_csv(path, index=False, float_format="%.6g")
    against, explicit = made["rival"][1], made["forms"][1]
    write_json(Path(out) / "metrics.json", {
        "baseline": baseline, **made["transfer"][1], "rival": rival, "against_rival": against, "explicit_against_bare": explicit,
    })  # fmt: skip
    return tuple(made.values())


def summary_table(summary: Mapping[str, Mapping]) -> pd.DataFrame:
    """A row a joint family: what was counted, and the rates and means with their intervals."""

    def cell(values: Mapping, name: str, form: str) -> str:
        if values[name] is None:
            return "none above chance"
        low, high = values[f"{name}_interval"]
        return f"{values[name]:{form}} [{low:{form}}, {high:{form}}]"

    rows = [
        {
            "joint run": family,
            "seeds": values["seeds"],
            "slots": values["slots"],
            "at chance, not counted": values["slots_at_chance"],
            "of these learned jointly": len(values["learned_only_jointly"]),
            "gain / tie / loss": f"{values['gain']} / {values['tie']} / {values['loss']}",
            "clear gain / loss": f"{values['clear_gain']} / {values['clear_loss']}",
            "gains": cell(values, "positive_rate", ".0%"),
            "losses": cell(values, "negative_rate", ".0%"),
            "mean difference": cell(values, "mean_difference", "+.3f"),
            "mean relative change": cell(values, "mean_relative_change", "+.1%"),
            "sign test p": values["sign_test_p"],
            "Holm": values.get("sign_test_holm"),
        }
        for family, values in summary.items()
    ]
    return pd.DataFrame(rows).set_index("joint run") if rows else pd.DataFrame()


def _sense(values: Mapping, gain: str, loss: str, neither: str) -> str:
    low, high = values["mean_difference_interval"]
    said = gain if low > 0 else loss if high < 0 else neither
    return f"{values['mean_difference']:+.3f} [{low:+.3f}, {high:+.3f}], {said}"


def finding(
    summary: Mapping[str, Mapping],
    against: Mapping[str, Mapping],
    plain: str = "joint-lora-bare",
    routed: str = "joint-ilora-explicit",
) -> str:
    """The result in two sentences: whether ``plain`` loses, and whether ``routed`` gains and beats its rival.

    What the method of ``routed`` does against its rival with bare answers stands beside it: the better of two forms alone would
    be a choice made after the fact.

    Args:
        summary, against: against the baseline and against the rival, of `transfer`.
    """

    def share(values: Mapping, count: str, name: str, verb: str) -> str:
        low, high = (100 * bound for bound in values[f"{name}_rate_interval"])
        return (
            f"{verb} on {values[count]} of {values['slots_counted']} slots ({100 * values[f'{name}_rate']:.0f} %, "
            f"interval {low:.0f} to {high:.0f} %; the paper: nearly {100 * PAPER[name]:.0f} %)"
        )

    def one(family: str, count: str, name: str, verb: str) -> str:
        values = summary.get(family)
        if values is None:
            return f"`{family}` was not run"
        if values["positive_rate"] is None:
            return f"`{family}` cannot be judged, since single-task training lifts no slot above chance"
        sense = _sense(values, "a gain overall", "a loss overall", "no clear difference overall")
        return f"`{family}` {share(values, count, name, verb)}, mean difference {sense}"

    first = one(plain, "loss", "negative", "loses")
    second = one(routed, "gain", "positive", "gains")
    said = [
        f"that of `{family}` is " + _sense(against[family], "in its favour", "against it", "which favours neither")
        for family in dict.fromkeys((routed, bare(routed)))
        if family in against and against[family]["mean_difference"] is not None
    ]
    if said:
        second += f"; of the differences from plain joint LoRA of its size {', and '.join(said)}"
    return f"Of the slots that single-task training lifts above chance, {first}. {second[0].upper()}{second[1:]}."
