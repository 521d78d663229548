"""Conflict of a known strength: k incompatible ways to answer about the same clips, told apart by one word.

Each clip of a slot is asked k times. Under convention c the word ``words[c]`` stands before the instruction and label
number i stands for label number i + c of the slot (numbers in a fixed shuffled order, counted round). So any two conventions
disagree on every clip, no convention but the first keeps a label, and each has the original's class balance: what is
a majority stays one under another name. With one convention nothing is changed, and there is no word.

Only bare answers are made: a chain gives reasons, and there is none for a convention.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from crab import tasks
from crab.data import records
from crab.data.files import atomic_folder, file_digest
from crab.models import checkpoint
from crab.study.dataset import Sample, read_slot, write_slot
from crab.study.grid import truths
from crab.study.keys import code_digest, key_of
from crab.study.prompt_order import instruction_span, marks

#: Forms of answer that are one label of a fixed set, and metrics that are the mean of right answers.
MODULES, METRICS = ("action", "emotion"), ("accuracy", "WAR")


@dataclass(frozen=True)
class Tree:
    """Encoded samples, and the records they belong to.

    Attributes:
        encoded, dataset: as the encode and build stages leave them.
        versions: how many samples stand for each clip, side by side.
    """

    encoded: Path
    dataset: Path
    versions: int = 1


def permutations(labels: Sequence[str], conventions: int, seed: int = 0) -> list[dict[str, str]]:
    """For each convention the label that each label is called by.

    Raises:
        ValueError: on more conventions than labels, of which two would agree somewhere.
    """
    order = sorted(set(labels))
    if not 1 <= conventions <= len(order):
        raise ValueError(f"{conventions} conventions of {len(order)} labels ({', '.join(order)}); give 1 to {len(order)}")
    random.Random(seed).shuffle(order)
    return [{label: order[(i + shift) % len(order)] for i, label in enumerate(order)} for shift in range(conventions)]


def prefixed(sample: Sample, token: int, opening: Sequence[int], closing: Sequence[int], end: int) -> Sample:
    """The sample with one more word at the head of its instruction; what follows moves on by one position."""
    ids, positions = sample["input_ids"], sample["position_ids"]
    _, text, _ = instruction_span(ids, opening, closing, end)
    return {
        **sample,
        "input_ids": torch.cat([ids[:text], ids.new_tensor([token]), ids[text:]]),
        "position_ids": torch.cat([positions[:, : text + 1], positions[:, text:] + 1], 1),
    }


def renamed(slot: str, record: Mapping[str, Any], names: Mapping[str, str], word: str) -> dict[str, Any]:
    """A record (with its ``id``) as it is under one convention: its truth and its answer are the new name."""
    entry = tasks.get_slot(slot)
    label = names[tasks.truth(slot, record)]
    return {**record, "id": f"{record['id']}/{word}", entry.truth_fields[0]: label, entry.answer_field: tasks.answer(slot, label)}


def word_token(tokenizer, word: str) -> int:
    """The one token of a convention's word. Raises ValueError where it is none, or not in the vocabulary."""
    found = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(found) != 1 or found[0] == tokenizer.unk_token_id:
        raise ValueError(f"regime.words: {word!r} is not one known token of this base; take a word of its vocabulary")
    return found[0]


def check_slots(slots: Sequence[str]) -> None:
    """ValueError on a slot whose answers are not one label of a fixed set."""
    for entry in map(tasks.get_slot, slots):
        if entry.module not in MODULES or entry.metric not in METRICS:
            known = [s.name for s in tasks.SLOTS.values() if s.module in MODULES and s.metric in METRICS]
            raise ValueError(f"regime.maps: slot {entry.name} takes no conventions, its answers are not scored as one label of a "
                             f"fixed set; use some of {', '.join(known)}")  # fmt: skip


def conventions(
    encoded: str | Path, dataset: str | Path, base: str | Path, out: str | Path, slots: Sequence[str], words: Sequence[str],
    only: int | None = None, seed: int = 0,
) -> Tree:  # fmt: skip
    """The slots under as many conventions as there are words, as a tree of their own under ``out``.

    The versions of a clip stand side by side, so that the last samples held out, or the first taken, are whole clips.

    Args:
        words: one a convention; a single one leaves everything as it is, and nothing is written.
        only: keep this convention alone, for an adapter of its own.

    Raises:
        ValueError: on a slot, word or number of conventions that cannot be.
    """
    if len(set(words)) != len(words) or not words:
        raise ValueError(f"regime.words: {list(words)}; give different ones, at least 1")
    if len(words) == 1:
        return Tree(Path(encoded), Path(dataset))
    check_slots(slots)
    kept = list(range(len(words))) if only is None else [only]
    data = {(slot, split): read_slot(encoded, slot, split) for slot in slots for split in tasks.SPLITS}
    files = [file_digest(Path(dataset) / tasks.json_path(*which)) for which in data]
    code = code_digest("import crab.study.conventions")
    what = [code, list(slots), list(words), only, seed, [d.digest for d in data.values()], files]
    folder = Path(out) / f"conventions-{key_of(what)}"
    tree = Tree(folder / "encoded", folder / "dataset", len(kept))
    if folder.is_dir():
        return tree
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.resolve(base) or base)
    which, tokens = marks(tokenizer), [word_token(tokenizer, word) for word in words]
    with atomic_folder(folder) as temporary:
        for slot in slots:
            of_split = {split: truths(dataset, slot, split, data[slot, split].ids) for split in tasks.SPLITS}
            names = permutations([tasks.truth(slot, r) for found in of_split.values() for r in found], len(words), seed)
            for split, found in of_split.items():
                d = data[slot, split]
                pairs = [(sample, record, c) for sample, record in zip(d.samples, found, strict=True) for c in kept]
                made = [renamed(slot, record, names[c], words[c]) for _, record, c in pairs]
                write_slot(
                    temporary / "encoded", slot, split, [prefixed(sample, tokens[c], *which) for sample, _, c in pairs],
                    [r["id"] for r in made], [f"{words[c]} {tasks.instruction(slot, r)}" for _, r, c in pairs],
                    {"bare": [tasks.answer(slot, tasks.truth(slot, r)) for r in made if split == "train"]},  # as the encode stage does
                )  # fmt: skip
                records.write(temporary / "dataset", slot, split, made, ids=True)
    return tree
