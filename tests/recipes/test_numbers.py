"""The numbers of the front page and of the findings are those of the files that they come from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
REPORTS = REPOSITORY / "reports"
#: "+.026 (+.005 to +.049)" and "+.026, +.005 to +.049", with an interval.
INTERVAL = re.compile(r"([+-]\.\d{3}),? \(?([+-]\.\d{3}) to ([+-]\.\d{3})\)?")
#: Of runs whose files are not in git: another processor's.
ELSEWHERE = {
    ("+.001", "-.014", "+.015"), ("+.012", "-.002", "+.026"), ("+.012", "-.002", "+.025"),  # tiny on an Intel Xeon
    ("+.017", "+.001", "+.032"),
}  # fmt: skip


def text_of(name: str) -> str:
    return re.sub(r"\s+", " ", (REPOSITORY / name).read_text(encoding="utf-8").replace("\n> ", " "))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def short(value: float, digits: int = 3) -> str:
    """As the findings write it: +.026."""
    return f"{value:+.{digits}f}".replace("0.", ".", 1)


def triples(value) -> Iterator[tuple[float, float, float]]:
    """Every mean with its interval, anywhere in a metrics file."""
    if isinstance(value, dict):
        if (interval := value.get("mean_difference_interval")) is not None:
            yield (value["mean_difference"], *interval)
        if {"mean", "low", "high"} <= set(value) and value["mean"] is not None:
            yield value["mean"], value["low"], value["high"]
        for part in value.values():
            yield from triples(part)
    elif isinstance(value, list):
        for part in value:
            yield from triples(part)


@cache
def measured() -> set[tuple[str, str, str]]:
    """All means with intervals that a file in reports holds, as the findings write them."""
    known = [t for path in REPORTS.rglob("*.json") for t in triples(json.loads(path.read_text(encoding="utf-8")))]
    for path in REPORTS.rglob("*.csv"):
        rows = rows_of(path)
        for keys in (("mean", "low", "high"), ("difference", "low", "high"), ("mean", "mean_low", "mean_high")):
            known += [tuple(float(row[key]) for key in keys) for row in rows if all(row.get(key) for key in keys)]
    return {tuple(map(short, triple)) for triple in known}


@pytest.mark.parametrize("name", ["README.md", "reports/README.md", "reports/earlier/README.md"])
def test_every_interval_is_one_that_a_file_holds(name):
    stated = set(INTERVAL.findall(text_of(name))) - ELSEWHERE
    assert stated and not stated - measured()


ROWS = {
    "LoRA": "joint-lora-bare",
    "LoRA of I-LoRA's size": "joint-lora_matched-bare",
    "LoRA of I-LoRA's size + reasoning": "joint-lora_matched-explicit",
    "I-LoRA": "joint-ilora-bare",
    "I-LoRA + reasoning": "joint-ilora-explicit",
}


def metrics_of(stage: str, profile: str = "study") -> dict:
    return json.loads((REPORTS / profile / stage / "metrics.json").read_text(encoding="utf-8"))


def interval(row: dict) -> str:
    low, high = row["mean_difference_interval"]
    return f"{short(row['mean_difference'])} ({short(low)} to {short(high)})"


@pytest.mark.parametrize("profile, size", [("study", r"[\d.]+ x \|"), ("bridge", "")])
@pytest.mark.parametrize("words", ROWS)
def test_the_tables_of_both_kinds_of_model(words, profile, size):
    metrics = metrics_of("transfer", profile)
    row, rival = metrics[ROWS[words]], metrics["against_rival"].get(ROWS[words])
    text = (REPORTS / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| {re.escape(words)} \| {size} ?(\d+ / \d+ / \d+ \|[^/]*)\|$", text, re.M)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[:2] == [f"{row['gain']} / {row['tie']} / {row['loss']}", interval(row)]
    assert cells[2] == (interval(rival) if rival else "")


def test_what_the_front_page_says():
    metrics, text = metrics_of("transfer"), text_of("README.md")
    joint = metrics["joint-lora-bare"]
    count = joint["slots_counted"]
    assert f"joint LoRA loses on {joint['loss']} of {count} slots and gains on {joint['gain']}" in text
    assert f"over {count} slots and" in text and interval(joint) in text
    assert interval(metrics["against_rival"]["joint-ilora-bare"]) in text
    base = json.loads((REPOSITORY / "models/base/training.json").read_text(encoding="utf-8"))
    assert f"{base['parameters'] / 1e6:.1f} million parameters" in text


def test_shares_and_mechanism_in_the_findings():
    text, transfer, mechanism = text_of("reports/README.md"), metrics_of("transfer"), metrics_of("mechanism")
    for family, name, form in (
        ("joint-lora-bare", "negative_rate", "({:.0f}%, {:.0f}% to {:.0f}%; the paper: nearly 55%)"),
        ("joint-ilora-explicit", "positive_rate", "{:.0f}% ({:.0f}% to {:.0f}%; the paper: nearly 88%)"),
    ):
        row = transfer[family]
        assert form.format(*(100 * v for v in (row[name], *row[f"{name}_interval"]))) in text
    cost = mechanism["cost"]
    assert f"{cost['uniform routing']['cost']:.2f} nats per token, of the {cost['adapter off']['cost']:.1f}" in text
    half = [mechanism["conflict"][f"{family}, half-way, all"]["clear_negative"] for family in
            ("joint-lora-bare", "joint-lora_matched-bare", "joint-ilora-bare")]  # fmt: skip
    assert "{} (LoRA), {} (LoRA of I-LoRA's size) and {} (I-LoRA)".format(*half) in text


def span(rows, column):
    shares = [float(row[column]) for row in rows]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def test_bases_of_four_strengths_at_ranks_1_and_32():
    rows = rows_of(REPORTS / "strength/strength/points.csv")
    rows = [row for row in rows if row["other"] == "single-task LoRA"]
    front, findings = text_of("README.md"), text_of("reports/README.md")
    for one, name, verb in (
        ("joint LoRA", "joint LoRA", "joint LoRA loses on {}"),
        ("I-LoRA", "I-LoRA", "I-LoRA loses on {}"),
        ("joint LoRA, I-LoRA's size", "LoRA of I-LoRA's size", "plain LoRA with at least as many parameters on {}"),
    ):
        part = [row for row in rows if row["one"] == one]
        assert [row["rank"] for row in part] == ["1"] * 4 + ["32"] * 4
        assert {row["seeds"] for row in part} == {"3"}, "README and findings say three seeds"
        weak, wide = part[:4], part[4:]
        assert verb.format(span(weak, "losses")) in front and span(weak, "losses") in findings
        for bases in (weak, wide):
            counts = " | ".join(f"{row['gain']} / {row['tie']} / {row['loss']}" for row in bases)
            assert f"| {name}: gain / tie / loss | {counts} |" in findings
        if one == "joint LoRA":
            losses, gains = span(wide, "losses"), span(wide, "gains")
            assert f"it loses on {losses} and gains on {gains} (three seeds, four bases)" in front
            assert f"joint LoRA loses on {losses} and gains on {gains}" in findings


def test_the_pretrained_language_model():
    metrics, text = metrics_of("transfer", "bridge"), text_of("reports/README.md")
    rows = [metrics[family] for family in ROWS.values()]
    assert all(f"of the {row['slots_counted']} slots" in text and row["seeds"] == 1 for row in rows)
    assert "rank 4, one seed" in text and "(one seed, six slots)" in text_of("README.md")


def test_how_many_statements_are_true_in_the_reasons_of_i_lora():
    shares, text = {}, text_of("reports/README.md")
    for profile in ("bridge", "study"):
        rows = rows_of(REPORTS / profile / "evaluate/faithfulness.csv")
        rows = [row for row in rows if row["measure"] == "statements true"]
        shares[profile] = {r["slot"]: float(r["value"]) for r in rows if r["family"] == ROWS["I-LoRA + reasoning"]}
    own, small = shares["bridge"], [shares["study"][slot] for slot in shares["bridge"]]
    assert len(small) == 9 and f"[{min(own.values()):.0%} to {max(own.values()):.0%} are" in text
    assert f"of the small base's, {min(small):.0%} to {max(small):.0%}" in text
