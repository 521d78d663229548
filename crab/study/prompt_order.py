"""Prompts with the instruction before the media, made from encoded ones.

A causal model that is asked after it has looked must look without knowing for what; with the question in front, every
token of sight and sound is read in its light. Plain LoRA in that order is the rival of a router that reads the
instruction: both let the task decide how the media are read. The frozen encoders' work stays the same, so the encoded
samples are re-ordered, and nothing is encoded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from crab import tasks
from crab.data.files import atomic_folder
from crab.models import checkpoint
from crab.models.omni import END, SPECIAL
from crab.study.dataset import Sample, read_slot, write_slot
from crab.study.keys import code_digest, key_of

OPENING, CLOSING = ("vision_bos_token", "audio_bos_token"), ("vision_eos_token", "audio_eos_token")


def marks(tokenizer) -> tuple[list[int], list[int], int]:
    """Tokens that open media, that close media, and that end a turn."""
    token = tokenizer.convert_tokens_to_ids
    return [token(SPECIAL[name]) for name in OPENING], [token(SPECIAL[name]) for name in CLOSING], token(END)


def instruction_span(ids: torch.Tensor, opening: Sequence[int], closing: Sequence[int], end: int) -> tuple[int, int, int]:
    """Where a prompt's media begin, where its instruction begins, and where that ends.

    Args:
        ids: int [L], a prompt of `crab.models.omni.prompt_text`: head, media, instruction, end of turn, tail.

    Raises:
        ValueError: when it is not of that order.
    """
    opens, closes, ends = (torch.isin(ids, torch.tensor(which)).nonzero().flatten() for which in (opening, closing, [end]))
    if not (len(opens) and len(closes) and len(ends) and opens[0] < closes[-1] < ends[-1] - 1):
        raise ValueError("prompt_order: a prompt is not media, instruction, end of turn; run the encode stage again")
    return int(opens[0]), int(closes[-1]) + 1, int(ends[-1])


def instruction_first(sample: Sample, opening: Sequence[int], closing: Sequence[int], end: int) -> Sample:
    """The sample with its instruction moved before its media; positions as the model would count them in that order.

    Text counts up by one and media keep their own layout, so the media move by the instruction's length, the instruction
    by the media's extent, and the tail stays where it is.

    Args:
        sample: input_ids [L], position_ids [3, L], features [media, hidden]; see `marks` for the others.
    """
    ids, positions = sample["input_ids"], sample["position_ids"]
    media, text, stop = instruction_span(ids, opening, closing, end)
    extent = positions[0, text] - positions[0, media]  # positions the media take up
    order = torch.cat([torch.arange(media), torch.arange(text, stop), torch.arange(media, text), torch.arange(stop, len(ids))])
    moved = positions.clone()
    moved[:, text:stop] -= extent
    moved[:, media:text] += stop - text
    return {**sample, "input_ids": ids[order], "position_ids": moved[:, order]}


def reordered(encoded: str | Path, base: str | Path, out: str | Path, slots: Sequence[str]) -> Path:
    """A copy of the encoded ``slots``, instruction first, under ``out``; made once for the same samples and code."""
    data = {(slot, split): read_slot(encoded, slot, split) for slot in slots for split in tasks.get_slot(slot).splits}
    code = code_digest("import crab.study.prompt_order")
    key = key_of([code, [d.digest for d in data.values()]])
    folder = Path(out) / f"instruction_first-{key}"
    if not folder.is_dir():
        which = marks(AutoTokenizer.from_pretrained(checkpoint.resolve(base) or base))
        with atomic_folder(folder) as temporary:
            for (slot, split), d in data.items():
                samples = [instruction_first(sample, *which) for sample in d.samples]
                write_slot(temporary, slot, split, samples, d.ids, d.instructions, d.targets)
    return folder
