"""Every variant of the method that was tried, each against plain LoRA of its size and against an adapter a slot.

A *variant* is a set of options of the adapter's config, given in params.yaml. All get the same tries for their learning
rate, the same samples, passes and seeds, and all stay in the table, losers too. The *rival* of a variant is made for it:
joint plain LoRA of the smallest rank that has at least as many parameters, with the same form of answer and passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from crab.data.files import atomic_file, read_json, write_json
from crab.study.compare import compare, correct
from crab.study.deciding import deciding
from crab.study.grid import run_grid
from crab.study.keys import key_of
from crab.study.prompt_order import reordered
from crab.study.resample import interval
from crab.study.runs import FORMS, SETTINGS
from crab.study.sweep import cells_of, slot_draws
from crab.study.tuned import Tuned, Tuning, adapter_parameters, plain_rank, tuned

ORDERS = ("media", "instruction")  # what comes first in a prompt
ROWS = [
    "variant", "kind", "parameters", "adapters", "rate", "tries", "inside", "passes", "seeds", "score", "low", "high", "rival", "seconds",
    "key",
]  # fmt: skip
#: Modules that decide, with functions of this one, what comes out for a variant.
DECIDING = "import crab.study.compare, crab.study.encode, crab.study.grid, crab.study.prompt_order, crab.study.tuned"
KINDS = ("routed", "unrouted heads", "plain", "own adapters", "instruction first")


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        name: unique.
        method: ``lora`` or ``ilora``.
        options: of its PEFT config, and ``router_rate``; without ``lora_alpha`` that is 2 r, as published.
        passes: over every slot's training samples. seeds: how many, counted from 0.
        setting: ``joint``, or ``single``: an adapter of its own for each slot, which knows the task (the ceiling of routing).
        form: of the answers. order: ``media`` first, as the base learned it, or ``instruction`` first.

    Raises:
        ValueError: naming the variant, on what cannot be trained.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    passes: int
    seeds: int
    setting: str = "joint"
    form: str = "bare"
    order: str = "media"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("method", self.method, ("lora", "ilora")), ("setting", self.setting, SETTINGS), ("form", self.form, FORMS),
            ("order", self.order, ORDERS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"ablation.variants: {self.name}: {what} is {value!r}; use {' or '.join(known)}")
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or self.seeds < 1:
            raise ValueError(f"ablation.variants: {self.name}: seeds is {self.seeds!r}; give their number, at least 1")

    @property
    def row(self) -> str:
        return f"{self.setting}-{self.form}"

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.setting == "single":
            return "own adapters"
        if self.order == "instruction":
            return "instruction first"
        if self.method == "lora":
            return "plain"
        return "unrouted heads" if self.options.get("router") == "uniform" else "routed"


def expand(variants: Mapping[str, Mapping[str, Any]], passes: int, seeds: int) -> list[Variant]:
    """Variants as given in params.yaml: an option that is a list stands for a variant a member, all lists crossed.

    Args:
        passes, seeds: of variants that do not say.

    Raises:
        ValueError: on a variant that is none.
    """
    found = []
    for name, given in variants.items():
        crossed = {option: values for option, values in given.items() if isinstance(values, list)}
        for values in product(*crossed.values()):
            chosen = dict(zip(crossed, values, strict=True))
            all_of = {"method": None, "passes": passes, "seeds": seeds, **given, **chosen}
            own = {key: all_of.pop(key) for key in ("method", "passes", "seeds", "setting", "form", "order") if key in all_of}
            if isinstance(all_of.get("r"), int):
                all_of.setdefault("lora_alpha", 2 * all_of["r"])
            found.append(Variant(" ".join([name, *(f"{k}={v}" for k, v in chosen.items())]), options=all_of, **own))
    return found


def check(variants: Sequence[Variant], slots: Sequence[str], tuning: Tuning, baseline: str) -> None:
    """ValueError on the first thing that would stop the study half way: before anything is trained."""
    names = [v.name for v in variants]
    if len(set(names)) != len(names):
        raise ValueError(f"ablation.variants: two are called {sorted(n for n in names if names.count(n) > 1)[0]!r}; rename one")
    if names and baseline not in names:
        raise ValueError(f"ablation.baseline: {baseline!r} is no variant; use one of {', '.join(names)}")
    for v in variants:
        try:
            cells_of(v.method, v.row, tuning.rates[0], v.options, slots, range(v.seeds), v.passes, 0)
        except ValueError as error:
            raise ValueError(f"ablation.variants: {v.name}: {error}") from None


def with_rivals(variants: Sequence[Variant], size: Callable[[str, Mapping[str, Any]], int]) -> tuple[list[Variant], dict[str, str]]:
    """The variants, each followed by its rival where that is not among those given; and by name the rival of each.

    Plain joint LoRA has none: it is what the others are held against.

    Args:
        size: parameters of an adapter, by method and options.
    """

    def what(v: Variant) -> tuple | None:
        """What tells plain LoRAs apart; None for anything else, and for one with options of its own."""
        usual = {"r": v.options.get("r"), "lora_alpha": 2 * v.options.get("r", 0)}
        return (v.options["r"], v.form, v.passes) if v.kind == "plain" and dict(v.options) == usual else None

    plain = {what(v): v for v in variants if what(v)}
    of_rank_one = size("lora", {"r": 1, "lora_alpha": 2}) if variants else 0
    rows: dict[str, Variant] = {}
    rivals: dict[str, str] = {}
    for v in variants:
        rows.setdefault(v.name, v)
        if v.kind == "plain":
            continue
        rank = plain_rank(size(v.method, v.options), of_rank_one)
        key = (rank, v.form, v.passes)
        if key not in plain:
            said = [f"passes={v.passes}"] if len({v.passes for v in variants}) > 1 else []
            name = " ".join([f"plain LoRA r={rank}", *([v.form] if v.form != "bare" else []), *said])
            plain[key] = Variant(name, "lora", {"r": rank, "lora_alpha": 2 * rank}, v.passes, v.seeds, form=v.form)
        rival = plain[key]
        if rival.name not in rows or rows[rival.name].seeds < v.seeds:
            plain[key] = rival = replace(rival, seeds=max(rival.seeds, v.seeds))
            rows[rival.name] = rival
        rivals[v.name] = rival.name
    return list(rows.values()), rivals


@dataclass
class Ablation:
    """What came out.

    Attributes:
        rows: a row a variant (`ROWS`), in the order given, each rival where it is first needed; ``inside`` is None where no
            rate was swept, ``rival`` where there is none; ``key``: of what decided the row and its comparisons.
        slots: a row a comparison and slot, of `crab.study.compare.compare`; ``comparison`` says which two.
        against_baseline, against_rival: summaries by variant, of `crab.study.compare.summarise`, with ``sign_test_holm``.
        baseline: the variant that all are compared with.
    """

    rows: pd.DataFrame
    baseline: str
    slots: pd.DataFrame = field(default_factory=pd.DataFrame)
    against_baseline: dict[str, dict] = field(default_factory=dict)
    against_rival: dict[str, dict] = field(default_factory=dict)


def judge(
    samples: pd.DataFrame, chance: Mapping[str, float], pairs: Mapping[str, str], floor: str, margin: float, resamples: int
) -> tuple[dict[str, dict], list[pd.DataFrame]]:
    """Compare variants with others, slot by slot, on the seeds that both and the floor have: summaries by variant, and tables.

    Args:
        samples: as of a grid, ``family`` the variant's name. pairs: by variant, what it is compared with.
        floor: variant that tells whether a slot can be learned; slots that it leaves at chance are not counted.
    """
    summaries, tables = {}, []
    for name, other in pairs.items():
        part = samples[samples["family"].isin([name, other, floor])]
        least = min(part.loc[part["family"] == family, "seed"].nunique() for family in {name, other, floor})
        table, summaries[name] = compare(part[part["seed"] < least], pd.Series(chance), other, name, margin, resamples, 0, floor)
        tables.append(table)
    return summaries, tables


def ablation(
    variants: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str,
    slots: Sequence[str],
    passes: int,
    seeds: int,
    tuning: Mapping[str, Any],
    margin: float,
    resamples: int,
    encoded: str | Path,
    base: str | Path,
    work: str | Path,
    chance: Mapping[str, float],
    out: str | Path,
    dataset: str | Path,
    run=run_grid,
    size=adapter_parameters,
    **where: Any,
) -> Ablation:
    """Train, score and compare all variants and their rivals, in the order given; ``out`` is written anew after each.

    What ``out`` already has of a variant, decided by the same settings, data, base and code, is taken over as it is: only new
    ones are trained, and those they are compared with, at the rate of their row.

    Args:
        variants, passes, seeds: see `expand`. tuning: see `crab.study.tuned.Tuning`.
        baseline: name of the variant (after expansion) that all are compared with; it also tells which slots can be learned.
        slots: of the joint runs, those without a test split too.
        chance: score of the best constant answer, by slot. encoded, dataset, base: of the encode, build and base stages.
        run, where: what trains and scores cells, and its further arguments; see `crab.study.grid.run_grid`.
        size: parameters of an adapter on ``base``, by method and options.

    Raises:
        ValueError: on variants that cannot be trained, before anything is.
    """
    given, tuning = expand(variants, passes, seeds), Tuning.of(tuning)
    check(given, slots, tuning, baseline)
    rows, rivals = with_rivals(given, partial(size, base))
    place = {"media": Path(encoded)}
    if any(v.order == "instruction" for v in rows):
        place["instruction"] = reordered(encoded, base, Path(work).parent / "trees", slots)
    same = []
    if rows:
        same = deciding(encoded, dataset, base, slots, [DECIDING, judge], baseline, tuning, margin, resamples, chance, where)
    of_name = {v.name: v for v in rows}
    keys = {
        v.name: key_of([[vars(of_name[name]) for name in (v.name, rivals.get(v.name), baseline) if name], *same]) for v in rows
    }
    result = _left_in(out, baseline, keys, rivals)
    wanted = [name for name in keys if name not in set(result.rows["variant"])]
    needed = {*wanted, *(rivals[name] for name in wanted if name in rivals), *([baseline] if wanted else [])}
    found: dict[str, Tuned] = {}
    _write(result, out)
    for number, v in enumerate(rows, 1):
        if v.name not in needed:
            continue
        known = result.rows.loc[result.rows["variant"] == v.name, "rate"].tolist() if v.name not in wanted else []
        t = found[v.name] = tuned(
            v.method, v.row, v.options, slots, range(v.seeds), v.passes, replace(tuning, rates=known) if known else tuning, run,
            f"{v.name} ({number} of {len(rows)})", encoded=place[v.order], dataset=dataset, base=base, work=work, **where,
        )  # fmt: skip
        if v.name in wanted:
            score, draws = slot_draws(t.samples, resamples)
            result.rows.loc[len(result.rows)] = [
                v.name, v.kind, t.parameters, t.adapters, t.rate, t.tries, t.inside, v.passes, v.seeds, score, *interval(draws),
                rivals.get(v.name), t.seconds, keys[v.name],
            ]  # fmt: skip
        samples = pd.concat([f.samples.assign(family=name) for name, f in found.items()], ignore_index=True)
        for done, asked in ((result.against_baseline, dict.fromkeys(found, baseline)), (result.against_rival, rivals)):
            pairs = {n: o for n, o in asked.items() if {n, o, baseline} <= set(found) and n != o and n not in done}
            summaries, tables = judge(samples, chance, pairs, baseline, margin, resamples)
            done.update(summaries)
            correct(done)
            result.slots = pd.concat([result.slots, *tables], ignore_index=True)
        _in_order(result, list(keys))
        _write(result, out)
    return result


def _left_in(out: str | Path, baseline: str, keys: Mapping[str, str], rivals: Mapping[str, str]) -> Ablation:
    """What an earlier run left in ``out`` of the variants that these keys still hold for, with all their comparisons."""
    result = Ablation(pd.DataFrame(columns=ROWS), baseline)
    paths = {name: Path(out) / name for name in ("variants.csv", "slots.csv", "metrics.json")}
    # an empty slots.csv, of one line break: the run was killed before anything could be compared
    if not all(path.is_file() and path.stat().st_size > 1 for path in paths.values()):
        return result
    rows = pd.read_csv(paths["variants.csv"], keep_default_na=False).astype({"inside": str})
    if list(rows.columns) != ROWS:
        return result
    before = read_json(paths["metrics.json"])
    whole = [
        name for name in rows["variant"]
        if (name == baseline or name in before["against_baseline"]) and (name not in rivals or name in before["against_rival"])
    ]  # fmt: skip
    holds = [name in whole and keys.get(name) == key for name, key in zip(rows["variant"], rows["key"], strict=True)]
    rows = rows[pd.Series(holds, dtype=bool)]  # typed, or no rows would pass for no columns
    rows["inside"] = rows["inside"].map({"True": True, "False": False, "": None}).astype(object)
    rows["rival"] = rows["rival"].replace("", None)
    rows["score"] = rows["variant"].map(before["score"])  # to the last digit
    if len(rows):
        result.rows = rows.reset_index(drop=True).astype({"rival": object})
    names = set(rows["variant"])
    result.against_baseline, result.against_rival = (
        {name: values for name, values in before[field].items() if name in names} for field in ("against_baseline", "against_rival")
    )
    pairs = {f"{name} vs {other}" for name in names for other in (baseline, rivals.get(name))}
    for summaries in (result.against_baseline, result.against_rival):
        correct(summaries)  # for the number of those that are left
    slots = pd.read_csv(paths["slots.csv"])
    result.slots = slots[slots["comparison"].isin(pairs)].reset_index(drop=True)
    _in_order(result, list(keys))
    return result


def _in_order(result: Ablation, names: Sequence[str]) -> None:
    """Rows and summaries in the order in which the variants are given."""
    result.rows = result.rows.sort_values("variant", key=lambda column: column.map(names.index), ignore_index=True)
    result.against_baseline, result.against_rival = (
        {name: summaries[name] for name in names if name in summaries} for summaries in (result.against_baseline, result.against_rival)
    )


def _write(result: Ablation, out: str | Path) -> None:
    """``variants.csv``, ``slots.csv`` and ``metrics.json``."""
    for name, table in (("variants", result.rows), ("slots", result.slots)):
        with atomic_file(Path(out) / f"{name}.csv") as path:
            table.to_csv(path, index=False, float_format="%.6g")
    write_json(Path(out) / "metrics.json", {
        "baseline": result.baseline, "against_baseline": result.against_baseline, "against_rival": result.against_rival,
        "score": {row.variant: row.score for row in result.rows.itertuples()},
    })  # fmt: skip


def rivals_of(result: Ablation) -> dict[str, str]:
    """By variant that has one, and that was compared with it, its rival."""
    return {row.variant: row.rival for row in result.rows.itertuples() if row.variant in result.against_rival}


def _on_all(result: Ablation, name: str) -> float:
    """Mean difference of a variant to its rival over all slots, those at chance too."""
    return float(result.slots.loc[result.slots["comparison"] == f"{name} vs {rivals_of(result)[name]}", "difference"].mean())


def _difference(values: Mapping | None) -> str:
    if values is None:
        return ""
    if values["mean_difference"] is None:
        return "no slot above chance"
    low, high = values["mean_difference_interval"]
    return f"{values['mean_difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(result: Ablation) -> pd.DataFrame:
    """A row a variant as text, ready to show."""
    rows = []
    for row in result.rows.itertuples():
        beside, against = result.against_baseline.get(row.variant), result.against_rival.get(row.variant)
        rows.append({
            "variant": row.variant,
            "parameters": f"{row.parameters:,}" + (f" x {row.adapters}" if row.adapters > 1 else ""),
            "learning rate": f"{row.rate:g}" + {True: "", False: " (edge)"}.get(row.inside, " (not swept)"),
            "seeds": row.seeds,
            "passes": row.passes,
            "score, all slots": f"{row.score:.3f} [{row.low:.3f}, {row.high:.3f}]",
            f"less {result.baseline}": _difference(beside),
            "gain / tie / loss": _counts(beside),
            "rival": against and row.rival or "",
            "less its rival": _difference(against),
            "on all slots": "" if against is None else f"{_on_all(result, row.variant):+.3f}",
            "gain / tie / loss ": _counts(against),
            "sign test, Holm": f"{against['sign_test_holm']:.3f}" if against and against["sign_test_p"] is not None else "",
        })  # fmt: skip
    return pd.DataFrame(rows)


def _counts(values: Mapping | None) -> str:
    return "" if values is None else f"{values['gain']} / {values['tie']} / {values['loss']}"


def clear(values: Mapping) -> int:
    """1 where the interval of the mean difference lies above zero, -1 where below, else 0."""
    if values["mean_difference"] is None:
        return 0
    low, high = values["mean_difference_interval"]
    return 1 if low > 0 else -1 if high < 0 else 0


def finding(result: Ablation, slots_to_win: float = 0.75) -> str:
    """What the table says, in a few sentences that can come out either way.

    Args:
        slots_to_win: share of the counted slots that a variant must gain on, beside a mean clearly above zero, to be
            said to beat its rival (12 of 16).
    """
    if result.rows.empty:
        return "No variant is given in this profile, so nothing was tried."
    kind = result.rows.set_index("variant")["kind"]
    tried = {name: values for name, values in result.against_rival.items() if kind[name] == "routed"}
    routed = {name: values for name, values in tried.items() if values["mean_difference"] is not None}
    said = []
    if not tried:
        said.append("No routed variant was tried.")
    elif not routed:
        said.append("No variant can be judged: own adapters lift no slot above chance.")
    else:
        above, below = ([n for n, v in routed.items() if clear(v) == sign] for sign in (1, -1))
        wins = [n for n in above if routed[n]["gain"] >= slots_to_win * routed[n]["slots_counted"]]
        best = max(routed, key=lambda n: routed[n]["mean_difference"])
        said.append(
            f"Of {len(routed)} routed variants{' that can be judged' if len(routed) < len(tried) else ''} {len(above)} score clearly "
            f"above plain LoRA of their size and {len(below)} clearly below; "
            + (f"{len(wins)} also gain on {slots_to_win:.0%} of the slots or more: {_names(wins)}." if wins else
               f"none also gains on {slots_to_win:.0%} of the slots, which is what beating it was to mean.")
        )  # fmt: skip
        more = "; being the best of several, it is flattered by the choice" if len(routed) > 1 else ""
        said.append(f"The best of them against its rival is `{best}`, {_difference(routed[best])} "
                    f"on {routed[best]['slots_counted']} slots above chance ({_on_all(result, best):+.3f} on all){more}.")  # fmt: skip
    for which, words in (("own adapters", "An adapter for each slot, which knows the task,"),
                         ("instruction first", "An adapter that reads the instruction before the media")):  # fmt: skip
        for name, values in result.against_rival.items():
            if kind[name] == which and values["mean_difference"] is not None:
                verb = {1: "is clearly above", -1: "is clearly below", 0: "is not clearly apart from"}[clear(values)]
                said.append(f"{words} (`{name}`) {verb} joint LoRA of the same size: {_difference(values)}.")
    edge = result.rows[result.rows["inside"].isin([False])]["variant"].tolist()
    unswept = result.rows[result.rows["inside"].isna()]["variant"].tolist()
    if unswept:
        said.append(f"The learning rates of {'all' if len(unswept) == len(kind) else len(unswept)} of these were given, not swept: what learns "
                    "best at another rate is held back, and nothing is settled by them.")  # fmt: skip
    if edge:
        said.append(f"The best learning rate of {_names(edge)} lies at the edge of those tried, so a better one may lie beyond.")
    alone = result.rows[result.rows["seeds"] == 1]["variant"].tolist()
    if alone:
        of_all = len(alone) == len(kind)
        said.append(f"One seed{'' if of_all else ' of ' + _names(alone)}: {'the' if of_all else 'these'} intervals hold for it alone.")
    return " ".join(said)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
