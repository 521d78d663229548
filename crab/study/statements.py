"""Statements of explicit answers, checked against the scene graph of generated data. The ledger keeps their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from crab.world import verify

#: Statements of one answer: true, unreadable, all of them, and how many are true of another sample's scene.
COUNTS = ["true", "unreadable", "stated", "true_by_chance"]


def statement_counts(dataset: Path, slot: str, records: Sequence[Mapping], texts: Mapping[str, str]) -> list[list[int]]:
    """`COUNTS` of the answer to each of all test records of a slot; an empty list if no scene graph is known.

    RecordError on a record that is not what the generator makes today. ``texts`` are answers by sample id.
    """
    shown = _shown(dataset, slot, records)
    half = len(shown) // 2  # half a turn away no record shares its clip
    rows = []
    for record, scene, other in zip(records, shown, [*shown[half:], *shown[:half]], strict=False):
        own, by_chance = (
            [v.verdict for v in verify.verify_answer(slot, texts[record["id"]], s)] for s in (scene, other)
        )
        rows.append([own.count(verify.TRUE), own.count(verify.UNREADABLE), len(own), by_chance.count(verify.TRUE)])
    return rows


def judged(dataset: Path, slot: str, records: Sequence[Mapping], texts: Mapping[str, str]) -> pd.DataFrame:
    """One row per statement of the answers to the first test records, with its verdict; empty without scene graphs."""
    rows = [
        {"slot": slot, "id": record["id"], "statement": statement, "verdict": verdict}
        for record, scene in zip(records, _shown(dataset, slot, records), strict=False)
        for statement, verdict in verify.verify_answer(slot, texts[record["id"]], scene)
    ]
    return pd.DataFrame(rows, columns=["slot", "id", "statement", "verdict"])


def _shown(dataset: Path, slot: str, records: Sequence[Mapping]) -> list[verify.Evidence]:
    """What each record shows and plays; empty without scene graphs."""
    return verify.read_evidence(dataset, slot, "test", records) if verify.known(dataset) else []
