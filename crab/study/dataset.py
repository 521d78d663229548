"""Encoded samples on disk, and as batches for the language model.

``<root>/<slot>/<split>.safetensors`` holds, for N samples laid end to end:
    ids        int32 [tokens]           the prompt's tokens, media placeholders expanded
    positions  int32 [3, tokens]        time, height and width positions
    features   float16 [media, hidden]  the frozen encoders' outputs, one row a placeholder, in order
    lengths    int32 [N, 2]             tokens and media rows of each sample
``<split>.json`` beside it holds ids, instructions and both targets; it is written last, and marks the pair as whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crab.data.files import atomic_file, read_json, write_json
from crab.models import checkpoint, omni

SEGMENTS = ("text", "video", "audio", "answer")
PADDING = -1
Sample = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SlotData:
    """One slot and split, encoded.

    Attributes:
        slot, split: e.g. ``ave`` and ``train``.
        samples: dicts of input_ids [L], position_ids [3, L], features [M, hidden], as `omni.collate` takes.
        ids, instructions: of each sample.
        targets: by form (``bare``, ``explicit``), the answers to learn.
        digest: of both files, so that a run knows when its data changed.
    """

    slot: str
    split: str
    samples: list[Sample]
    ids: list[str]
    instructions: list[str]
    targets: dict[str, list[str]]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def answered(self, form: str) -> list[tuple[Sample, str]]:
        """Pairs of sample and answer, for training. Raises ValueError on an unknown form."""
        if form not in self.targets:
            raise ValueError(f"{self.slot}: no {form!r} targets; known: {', '.join(self.targets)}")
        return list(zip(self.samples, self.targets[form], strict=True))


def write_slot(
    root: str | Path,
    slot: str,
    split: str,
    samples: Sequence[Sample],
    ids: Sequence[str],
    instructions: Sequence[str],
    targets: Mapping[str, Sequence[str]],
) -> None:
    """Store one slot and split."""
    folder = Path(root) / slot
    (folder / f"{split}.json").unlink(missing_ok=True)
    tensors = {
        "ids": torch.cat([s["input_ids"] for s in samples]).to(torch.int32),
        "positions": torch.cat([s["position_ids"] for s in samples], 1).to(torch.int32),
        "features": torch.cat([s["features"] for s in samples]).to(torch.float16),
        "lengths": torch.tensor([[len(s["input_ids"]), len(s["features"])] for s in samples], dtype=torch.int32),
    }
    with atomic_file(folder / f"{split}.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    meta = {"ids": list(ids), "instructions": list(instructions), "targets": {k: list(v) for k, v in targets.items()}}
    write_json(folder / f"{split}.json", meta)


def read_slot(root: str | Path, slot: str, split: str) -> SlotData:
    """Read what `write_slot` stored.

    Raises:
        ValueError: when a file is missing or damaged, or the two do not belong together.
    """
    folder = Path(root) / slot
    path = folder / f"{split}.safetensors"
    meta = read_json(folder / f"{split}.json")
    try:
        tensors = load_file(path)
        tokens, rows = tensors["lengths"].T.tolist()
        if len(tokens) != len(meta["ids"]):
            raise KeyError(f"{len(tokens)} samples for {len(meta['ids'])} ids")
        samples = [
            {"input_ids": ids, "position_ids": positions, "features": features}
            for ids, positions, features in zip(
                tensors["ids"].long().split(tokens),
                tensors["positions"].long().split(tokens, 1),
                tensors["features"].split(rows),
                strict=True,
            )
        ]
        instructions, targets = meta["instructions"], meta["targets"]
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); run the encode stage again") from None
    digest = hashlib.sha256(path.read_bytes() + (folder / f"{split}.json").read_bytes()).hexdigest()
    return SlotData(slot, split, samples, meta["ids"], instructions, targets, digest)


def batch(model, tokenizer, samples: Sequence[Sample], answers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """`omni.collate` on the model's device, after a check that the features fit the model.

    Raises:
        ValueError: when they were encoded with another base.
    """
    width = model.get_input_embeddings().weight.shape[1]
    found = samples[0]["features"].shape[1]
    if found != width:
        raise ValueError(f"stored features are {found} wide, the model {width}; run the encode stage with this base")
    made = omni.collate(model, tokenizer, samples, answers)
    return {name: value.to(model.device) for name, value in made.items()}


def segments(config, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which of `SEGMENTS` each token of a batch belongs to, int [B, L]; `PADDING` where there is none.

    A picture counts as video; the answer is what is learned, its end token included.
    """
    ids = made["input_ids"]
    kinds = torch.zeros_like(ids)
    kinds[(ids == config.video_token_id) | (ids == config.image_token_id)] = SEGMENTS.index("video")
    kinds[ids == config.audio_token_id] = SEGMENTS.index("audio")
    if "labels" in made:
        kinds[made["labels"] != omni.IGNORE] = SEGMENTS.index("answer")
    kinds[made["attention_mask"] == 0] = PADDING
    return kinds


def load_base(path: str | Path):
    """A fresh copy of the frozen base on the device that computes, and its processor: ``(model, processor)``.

    Fresh each time, since PEFT puts adapters into the model it is given. A published checkpoint (`crab.models.checkpoint`)
    is loaded in bfloat16 on a GPU, half the memory; all else in float32.
    """
    gpu = torch.cuda.is_available()
    published = checkpoint.resolve(path)
    model, processor = omni.load(published or path, torch.bfloat16 if published and gpu else torch.float32)
    model.requires_grad_(False)
    return model.eval().to("cuda" if gpu else "cpu"), processor


def benchmarks(root: str | Path, slots: Sequence[str]) -> list[str]:
    """Those of ``slots`` that have an encoded test split, in their order; the others are only trained on.

    Read from disk, so that training does not hang on the code that knows the tasks.

    Raises:
        ValueError: when the encode stage did not finish a slot.
    """
    found = []
    for slot in slots:
        folder = Path(root) / slot
        tested = (folder / "test.json").is_file()
        if not (folder / "train.json").is_file() or (folder / "test.safetensors").exists() != tested:
            raise ValueError(f"{folder}: not encoded, or not to the end; run the encode stage again")
        if tested:
            found.append(slot)
    return found


def overview(root: str | Path, slots: Sequence[str]) -> pd.DataFrame:
    """Table of what is encoded: samples, mean tokens of a prompt and of its media, and an answer's words by form."""
    rows, tested = [], benchmarks(root, slots)
    for slot in slots:
        for split in ("train", "test") if slot in tested else ("train",):
            data = read_slot(root, slot, split)
            row = {
                "slot": slot,
                "split": split,
                "samples": len(data),
                "prompt tokens": sum(len(s["input_ids"]) for s in data.samples) / len(data),
                "of media": sum(len(s["features"]) for s in data.samples) / len(data),
            }
            for form, texts in data.targets.items():
                row[f"{form} words"] = sum(len(t.split()) for t in texts) / len(texts) if texts else None
            rows.append(row)
    return pd.DataFrame(rows).round(1)


def examples(root: str | Path, slots: Sequence[str]) -> pd.DataFrame:
    """First training sample of each slot, as the model reads and learns it."""
    rows = []
    for slot in slots:
        data = read_slot(root, slot, "train")
        rows.append({"slot": slot, "instruction": data.instructions[0], **{f: t[0] for f, t in data.targets.items()}})
    return pd.DataFrame(rows)
