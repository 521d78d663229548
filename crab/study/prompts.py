"""Other prompts for the same encoded media: the instruction first, or incompatible labelling conventions.

**Instruction first.** A causal model that is asked after the media reads them without knowing for what. With the
question in front, it reads every token of sight and sound in the light of the question. Plain LoRA with such prompts
is the rival of a router that reads the instruction: in both, the task decides how the media are read.

**Conventions** make a conflict of known strength. Each clip is asked k times. Under convention c the word
``words[c]`` stands before the instruction, and label number i means label number i + c (in a fixed shuffled order,
counted round). Two conventions disagree on every clip, and each keeps the balance of the classes. Only bare answers
exist: no reasoning fits an exchanged label.

The frozen encoders are not run again: samples are changed as they are read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from crab import tasks
from crab.models.batches import Sample
from crab.models.protocol import Marks
from crab.samples.slots import SlotData

#: Task families whose answers are one label of a fixed set, and metrics that are the mean of right answers.
LABEL_FAMILIES, LABEL_METRICS = ("emotion recognition", "action recognition"), ("accuracy", "WAR")


def instruction_span(ids: torch.Tensor, marks: Marks) -> tuple[int, int, int]:
    """Index of the first media token, of the first instruction token, and of the end of the instruction.

    ``ids``, int [L], are a prompt: head, media, instruction, end of turn, tail. ValueError on another order.
    """
    opens, closes, ends = (
        torch.isin(ids, torch.tensor(tokens)).nonzero().flatten()
        for tokens in (marks.opening, marks.closing, [marks.end])
    )
    if not (len(opens) and len(closes) and len(ends) and opens[0] < closes[-1] < ends[-1] - 1):
        raise ValueError("prompts: a prompt is not media, instruction, end of turn; run the encode stage again")
    return int(opens[0]), int(closes[-1]) + 1, int(ends[-1])


def instruction_first(sample: Sample, marks: Marks) -> Sample:
    """The sample with its instruction before its media, and the positions [3, L] that the model counts in that order.

    Text counts up by one and media keep their layout. So the media move by the length of the instruction, the
    instruction moves by the extent of the media, and the tail stays.
    """
    ids, positions = sample["input_ids"], sample["position_ids"]
    media, text, stop = instruction_span(ids, marks)
    extent = positions[0, text] - positions[0, media]  # positions that the media take up
    order = torch.cat([
        torch.arange(media), torch.arange(text, stop), torch.arange(media, text), torch.arange(stop, len(ids)),
    ])  # fmt: skip
    moved = positions.clone()
    moved[:, text:stop] -= extent
    moved[:, media:text] += stop - text
    return {**sample, "input_ids": ids[order], "position_ids": moved[:, order]}


def prefixed(sample: Sample, token: int, marks: Marks) -> Sample:
    """The sample with one more token at the head of its instruction. What follows moves on by one position."""
    ids, positions = sample["input_ids"], sample["position_ids"]
    _, text, _ = instruction_span(ids, marks)
    return {
        **sample,
        "input_ids": torch.cat([ids[:text], ids.new_tensor([token]), ids[text:]]),
        "position_ids": torch.cat([positions[:, : text + 1], positions[:, text:] + 1], 1),
    }


def permutations(labels: Sequence[str], conventions: int, seed: int = 0) -> list[dict[str, str]]:
    """For each convention, the new name of each label.

    ValueError on more conventions than labels; two of them would agree somewhere.
    """
    order = sorted(set(labels))
    if not 1 <= conventions <= len(order):
        raise ValueError(
            f"{conventions} conventions of {len(order)} labels ({', '.join(order)}); give 1 to {len(order)}"
        )
    random.Random(seed).shuffle(order)
    return [{label: order[(i + shift) % len(order)] for i, label in enumerate(order)} for shift in range(conventions)]


def renamed(slot: str, record: Mapping[str, Any], names: Mapping[str, str], word: str) -> dict[str, Any]:
    """A record under one convention: its truth and its answer are the new name, its ``id`` ends in the word."""
    entry = tasks.get_slot(slot)
    label = names[tasks.truth(slot, record)]
    return {
        **record,
        "id": f"{record['id']}/{word}",
        entry.truth_fields[0]: label,
        entry.answer_field: tasks.answer(slot, label),
    }


def word_token(tokenizer, word: str) -> int:
    """The token of a convention's word. Raises ValueError if the word is not one known token."""
    tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"experiments.words: {word!r} is not one known token of this base; take a word of its vocabulary"
        )
    return tokens[0]


def check_conventions(slots: Sequence[str], words: Sequence[str]) -> None:
    """ValueError on repeated words, or a slot whose answers are not one label of a fixed set."""
    if len(set(words)) != len(words):
        raise ValueError(f"experiments.words: {list(words)}; give different ones")
    fit = [
        entry.name for entry in tasks.SLOTS.values() if entry.family in LABEL_FAMILIES and entry.metric in LABEL_METRICS
    ]
    for slot in slots:
        if slot not in fit:
            raise ValueError(
                f"experiments.maps: slot {slot} takes no conventions, because its answers are not one label of a fixed "
                f"set; use some of {', '.join(fit)}"
            )


def with_conventions(
    data: SlotData, records: Sequence[Mapping], names: Sequence[Mapping[str, str]], words: Sequence[str],
    convention: int | None, tokenizer, marks: Marks,
) -> tuple[SlotData, list[dict]]:  # fmt: skip
    """Samples and records of a slot under all conventions, or under one. The versions of a clip stand side by side.

    Args:
        records: of the samples, in their order. names: of `permutations`. words: one per convention.
        convention: keep this one alone; None for all. marks: of the model's prompts.
    """
    numbers = list(range(len(words))) if convention is None else [convention]
    versions = [(index, c) for index in range(len(data)) for c in numbers]
    rows = [renamed(data.slot, records[index], names[c], words[c]) for index, c in versions]
    tokens = [word_token(tokenizer, word) for word in words]
    read = _Versions(data, words, tokens, marks, versions, rows)
    return SlotData(
        data.slot, data.split, [row["id"] for row in rows], read, [data.tokens[i] + 1 for i, _ in versions]
    ), rows


@dataclass(frozen=True)
class _Versions:
    """Reads a sample under a convention, by its place in ``versions``: pairs of index and convention."""

    data: SlotData
    words: Sequence[str]
    tokens: Sequence[int]
    marks: Marks
    versions: Sequence[tuple[int, int]]
    records: Sequence[Mapping]

    def __call__(self, place: int) -> Sample:
        (index, convention), record = self.versions[place], self.records[place]
        sample = self.data[index]
        text = {"id": record["id"], "instruction": f"{self.words[convention]} {sample['text']['instruction']}"}
        if self.data.split == "train":
            text["bare"] = tasks.answer(self.data.slot, tasks.truth(self.data.slot, record))
        return {**prefixed(sample, self.tokens[convention], self.marks), "text": text}
