"""Which test samples the gallery shows, and what each method answers to them.

The samples are chosen by rules that look at scores alone. Their answers are kept in git, in ``answers.json``: a fresh
clone has the scores of all cells, but not their answers, and would have to train to get them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from crab import tasks
from crab.core.files import read_json, write_json
from crab.study.cells import Cell
from crab.study.faithfulness import is_right
from crab.study.ledger import sample_scores
from crab.study.store import Store
from crab.tasks.labels import LABELS

#: Families of runs that the gallery shows, in this order, if the profile has them.
SHOWN = ("single-lora-bare", "joint-lora-bare", "joint-ilora-bare", "joint-ilora-explicit")
ANY, ALL, APART = "the first of all", "the first that every method gets right", "the first that the first two divide"

Texts = dict[str, dict[str, dict[str, str]]]  # family -> slot -> sample id -> raw answer


class Pick(NamedTuple):
    """A sample of the gallery.

    Attributes:
        slot, id: of the sample. rule: which it was chosen by, one of `ANY`, `ALL` and `APART`.
        matching: how many of the slot's ``total`` test samples the rule fits. If it is 0, or if all of them are taken,
            the sample is the next in order, and ``fits`` is False.
    """

    slot: str
    id: str
    rule: str
    matching: int
    total: int
    fits: bool


def graded(slot: str) -> bool:
    """Whether the score tells more than right or wrong: the score of a label is nothing or all."""
    return tasks.get_slot(slot).kind not in LABELS


def right(slot: str, score: float) -> bool:
    """Whether an answer of this score counts as right (`crab.study.faithfulness.is_right`)."""
    return bool(is_right(slot, [score])[0])


def place(name: str) -> str:
    """Where a sample stands in the order of the rules: the SHA-256 of its id, so chance decides."""
    return hashlib.sha256(name.encode()).hexdigest()


def choose(slot: str, scores: Mapping[str, Sequence[float]], count: int = 3) -> list[Pick]:
    """The samples to show of a slot: the first in order that fits each rule in turn, and is not taken.

    ``scores`` of each sample, by its id, are one per method. The first two methods are those that `APART` compares.
    """
    verdicts = {name: [right(slot, score) for score in scores[name]] for name in sorted(scores, key=place)}
    rules = [(ANY, lambda marks: True), (ALL, all), (APART, lambda marks: len(marks) > 1 and marks[0] != marks[1])]
    rules += rules[:1] * (count - len(rules))
    picks: list[Pick] = []
    for rule, fits in rules[:count]:
        taken = {pick.id for pick in picks}
        left = [name for name in verdicts if name not in taken]
        matching = [name for name, marks in verdicts.items() if fits(marks)]
        fitting = [name for name in left if name in matching]
        if left:
            picks.append(Pick(slot, (fitting or left)[0], rule, len(matching), len(verdicts), bool(fitting)))
    return picks


@dataclass(frozen=True)
class Gallery:
    """What the gallery shows.

    Attributes:
        picks: by slot. families: of the methods, in order.
        texts: raw answer by family, slot and sample id. scores: score by (family, slot, sample id).
    """

    picks: dict[str, list[Pick]]
    families: list[str]
    texts: Texts
    scores: dict[tuple[str, str, str], float]


def shown_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the families in `SHOWN`, of the lowest seed of each. ValueError: there are none."""
    chosen: list[Cell] = []
    for family in SHOWN:
        own = [cell for cell in cells if cell.family == family]
        chosen += [cell for cell in own if cell.seed == min(other.seed for other in own)]
    if not chosen:
        raise ValueError(f"gallery: none of the runs {', '.join(SHOWN)}; add one of them to train.methods")
    return chosen


def gather(store: Store, cells: Sequence[Cell], kept: Path, count: int = 3) -> Gallery:
    """Choose samples by the scores of ``cells`` (keyed and scored, one per family and slot), and find the answers.

    Answers are those of this machine, else those in the file ``kept``, if the keys of training and answering still hold
    and the ledger has the scores of the same run (another machine may answer a few samples otherwise). Only cells that
    have neither are run. Then ``kept`` is written anew.
    """
    before = read_json(kept) if kept.is_file() else {}
    while True:
        table = sample_scores(store.ledger, cells)
        families = list(dict.fromkeys(cell.family for cell in cells))
        wide = table.pivot(index=["slot", "id"], columns="family", values="score")[families]
        if wide.isna().any(axis=None):
            raise ValueError("gallery: the runs were scored on different samples; run the train stage again")
        slots = [slot for slot in tasks.SLOTS if slot in wide.index.unique("slot")]
        picks = {slot: choose(slot, wide.loc[slot].T.to_dict("list"), count) for slot in slots}
        ids = {slot: [pick.id for pick in picks[slot]] for slot in slots}
        scores = {(row.family, row.slot, row.id): row.score for row in table.itertuples()}
        entries = {cell.key: _entry(store, cell, ids, before, scores) for cell in cells}
        missing = [cell for cell in cells if entries[cell.key] is None]
        if not missing:
            break
        store.run(missing, "answers", need="answers")  # scores may change, so the samples are chosen again
    write_json(kept, dict(sorted(entries.items())))
    texts: Texts = {family: {} for family in families}
    for cell in cells:
        texts[cell.family] |= entries[cell.key]["texts"]
    return Gallery(picks, families, texts, scores)


def _entry(
    store: Store, cell: Cell, ids: Mapping[str, Sequence[str]], kept: Mapping[str, dict],
    scores: Mapping[tuple[str, str, str], float],
) -> dict | None:  # fmt: skip
    """The answers of a cell to these samples, as the file keeps them; None if they are nowhere."""
    key, texts = store.answer_key(cell), store.kept_answers(cell)
    wanted = {slot: {name: scores[cell.family, slot, name] for name in ids[slot]} for slot in cell.scored_slots}
    if texts is None:
        entry = kept.get(cell.key, {})
        if entry.get("answers") != key or entry["scores"] != wanted:
            return None
        texts = entry["texts"]
    chosen = {slot: {name: texts[slot][name] for name in names} for slot, names in wanted.items()}
    return {"cell": cell.name, "answers": key, "scores": wanted, "texts": chosen}
