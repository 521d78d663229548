"""The loop of HF Trainer as this study runs it: batches of samples with answers, their order, and checkpoints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from crab.core.files import read_json, write_json
from crab.models.batches import Sample, adapts_encoders, answer_loss, answer_tokens, batch, instruction_shown
from crab.models.protocol import IGNORE

WHOLE = "whole.json"  # in a checkpoint, written last: which processes wrote it


def delete_checkpoints(folder: Path, but: str | None = None) -> None:
    """Delete all checkpoints in a folder, ``but`` one."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if str(path) != but:
            shutil.rmtree(path)


def last_checkpoint(folder: Path, note: Mapping[str, Any]) -> str | None:
    """The latest checkpoint that was written to its end. ``note`` is that of `crab.study.hardware.Hardware.note`.

    ValueError if it was written by another number of processes, or in other parts; samples then come in another order,
    or weights lie in it in another way.
    """
    whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / WHOLE).exists()]
    if not whole:
        return None
    path = max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for name, value in read_json(path / WHOLE).items():
        if value != note.get(name):
            raise ValueError(
                f"{path}: {name.replace('_', ' ')} was {value} when this checkpoint was written, and is "
                f"{note.get(name)} now; set shared.hardware back, or delete {folder} to train anew"
            )
    return str(path)


class AnswerTrainer(Trainer):
    """HF Trainer on pairs of sample and answer. The loss counts answer tokens only, their end included."""

    def __init__(self, base, tokenizer, lengths: Sequence[int] | None = None, **options: Any) -> None:
        super().__init__(**options, data_collator=partial(_collate, tokenizer))
        self.base, self.tokenizer, self.lengths = base, tokenizer, lengths
        self.adapted = adapts_encoders(base)
        self.loss_is_scaled_for_ga = True  # the loss of a part is divided by the answer tokens of the whole batch

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:  # on the first process; weights were gathered by all of them
            # Without the last option, PEFT looks the base up on the network to decide about embeddings.
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        parts = self.args.world_size * self.args.gradient_accumulation_steps
        return LengthGrouped(self.lengths, self.args.train_batch_size * parts, self.args.seed)

    def floating_point_ops(self, inputs) -> int:
        return 0  # the estimate of transformers needs token ids in `inputs`

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()  # adapted encoders have dropout, and checkpoints
        samples, answers = zip(*inputs["pairs"].content, strict=True)
        with self.accelerator.autocast() if self.adapted else nullcontext():
            inputs = batch(self.base, self.tokenizer, samples, answers, embed=False)
        with instruction_shown(self.model, inputs):  # also while checkpointed layers are computed again
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = answer_loss(model, inputs, num_items_in_batch, self.model)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes
        return (loss, outputs) if return_outputs else loss


@dataclass
class _Pairs:
    """Keeps pairs of sample and answer, as tokens, out of sight of code that moves batches to a device."""

    content: list[tuple[Sample, list[int]]]


def _collate(tokenizer, pairs: list[tuple]) -> dict[str, Any]:
    """The pairs, and the tokens that are learned, [samples, longest answer + 1], which Trainer counts."""
    samples, answers = zip(*pairs, strict=True)
    answers = answer_tokens(tokenizer, answers)
    labels = torch.full((len(answers), max(map(len, answers)) + 1), IGNORE)  # Trainer leaves out the first
    for row, tokens in zip(labels, answers, strict=True):
        row[1 : len(tokens) + 1] = torch.tensor(tokens)
    return {"pairs": _Pairs(list(zip(samples, answers, strict=True))), "labels": labels}


class LengthGrouped(Sampler):
    """Shuffled samples, in batches of similar length. The order follows from seed and pass, so it can be resumed."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint each time that ``minutes`` have passed, and marks each once all of it is written."""

    def __init__(self, minutes: float, note: Mapping[str, int]):
        self.minutes, self.note, self.saved = minutes, note, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.minutes:
            due = [time.monotonic() - self.saved > 60 * self.minutes]
            control.should_save |= broadcast_object_list(due)[0]  # the first process decides

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            write_json(folder / WHOLE, self.note)
