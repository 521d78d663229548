"""The ledger: scores of every sample of every finished cell, in one file that is kept in git.

The tables of the study are made from it. A fresh clone needs no model for them.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from crab import tasks
from crab.core.files import atomic_file
from crab.study.cells import Cell
from crab.study.statements import COUNTS

SAMPLE_COLUMNS = ["cell", "family", "seed", "slot", "id", "score"]


class Ledger:
    """Scores of finished cells in one file: ``cells`` by training key, ``references`` (chance, oracle) by score key."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            content = json.loads(lzma.decompress(self.path.read_bytes())) if self.path.is_file() else {}
        except (lzma.LZMAError, ValueError) as error:
            raise ValueError(
                f"{self.path}: damaged ({error}); restore it from git, or delete it to train again"
            ) from None
        self.cells: dict[str, dict] = content.get("cells", {})
        self.references: dict[str, dict] = content.get("references", {})

    def add(self, cells: Mapping[str, dict], references: Mapping[str, dict] | None = None) -> None:
        """Add entries and write the file. An entry replaces older ones of the same description with another key."""
        fresh = {key: entry for key, entry in cells.items() if self.cells.get(key) != entry}
        new = {key: entry for key, entry in (references or {}).items() if key not in self.references}
        if not fresh and not new:
            return
        described = {json.dumps(entry["cell"], sort_keys=True) for entry in fresh.values()}
        older = [key for key, e in self.cells.items() if json.dumps(e["cell"], sort_keys=True) in described]
        self.cells = {key: entry for key, entry in self.cells.items() if key not in older} | fresh
        self.references |= new
        content = {"cells": dict(sorted(self.cells.items())), "references": dict(sorted(self.references.items()))}
        with atomic_file(self.path) as temporary:
            text = json.dumps(content, separators=(",", ":"), allow_nan=False)
            temporary.write_bytes(lzma.compress(text.encode()))


def sample_scores(ledger: str | Path, cells: Sequence[Cell], statements: bool = False) -> pd.DataFrame:
    """Primary score of every sample of keyed cells, one row each (`SAMPLE_COLUMNS`), from the ledger alone.

    ``statements`` adds the columns of `crab.study.statements.COUNTS`; NaN for bare answers.
    """
    names = [*SAMPLE_COLUMNS, *(COUNTS if statements else ())]
    frames = []
    for head, slot, result in _results(ledger, cells):
        frame = pd.DataFrame({"id": result["ids"], "score": result["scores"]}).assign(**head, slot=slot)
        if statements and "statements" in result:
            frame[COUNTS] = result["statements"]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True).reindex(columns=names)


def metric_table(ledger: str | Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """Every metric of every keyed cell and slot, with the counts of answers: one row each."""
    rows = []
    for head, slot, result in _results(ledger, cells):
        counts = {name: value for name, value in result.items() if name.startswith("n_")}
        primary = tasks.get_slot(slot).metric
        rows += [
            {**head, "slot": slot, "metric": metric, "primary": metric == primary, "value": value, **counts}
            for metric, value in result["metrics"].items()
        ]
    return pd.DataFrame(rows)


def cost_table(ledger: str | Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """What each keyed cell trained and what it cost, one row each; ``loss`` is a list of [step, loss]."""
    return pd.DataFrame([
        {**head, "learning_rate": cell.learning_rate, **entry["cost"]} for head, cell, entry in _entries(ledger, cells)
    ])  # fmt: skip


def _entries(ledger: str | Path, cells: Sequence[Cell]) -> list[tuple[dict[str, Any], Cell, dict]]:
    """Of each keyed cell, the columns that name it, itself, and its entry. ValueError if one is not finished."""
    entries = Ledger(ledger).cells
    if absent := [cell.name for cell in cells if cell.key not in entries]:
        raise ValueError(f"{ledger}: no scores of {absent[0]}; run the stage that trains it")
    return [({"cell": c.name, "family": c.family, "seed": c.seed}, c, entries[c.key]) for c in cells]


def _results(ledger: str | Path, cells: Sequence[Cell]) -> Iterator[tuple[dict[str, Any], str, dict]]:
    """Of each slot of each keyed cell, the columns that name the cell, the slot, and its scores."""
    for head, _, entry in _entries(ledger, cells):
        for slot, result in entry["slots"].items():
            yield head, slot, result
