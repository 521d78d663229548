"""Run one cell: train, answer, score. Each of the three is done only if its result is not there."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from accelerate import PartialState
from torch.utils.data import ConcatDataset

from crab.core.files import read_json, write_json
from crab.core.pool import give_back_memory
from crab.models.checkpoint import load_base
from crab.samples.slots import SlotData
from crab.study.answer import answer_slot, answered_slot, load_adapter
from crab.study.cells import Cell
from crab.study.score import score_slot, truths
from crab.study.statements import statement_counts
from crab.study.train import RECORD, train

if TYPE_CHECKING:
    from crab.study.store import Store

ANSWERS, SHARDS, SCORES = "answers.json", "answers", "scores.json"


def run_cell(store: Store, cell: Cell) -> None:
    """Do what is missing of one cell: train, answer, score. Runs in a worker, or in all processes of a launch."""
    folder, adapter, state = store.folder(cell), store.adapter(cell), PartialState()
    parts = {slot: scored_part(store, cell, slot) for slot in cell.scored_slots}  # first: files may be damaged
    if adapter is None:
        pairs = [training_pairs(store, cell, slot) for slot in cell.slots]
        lengths = [length for part in pairs for length in part.tokens] if store.group_by_length else None
        adapter = train(
            ConcatDataset(pairs), cell.method, cell.options, store.base_of(cell), folder,
            learning_rate=cell.learning_rate, passes=cell.passes, batch_size=store.batch_size, seed=cell.seed,
            precision=store.precision, lengths=lengths, hardware=store.hardware,
        )  # fmt: skip
        give_back_memory()
    texts, key, size = store.kept_answers(cell), store.answer_key(cell), store.answer["batch_size"]
    if texts is None:
        model, processor = load_base(store.base_of(cell))
        model = load_adapter(model, adapter)
        for part, _ in parts.values():
            answer_slot(model, processor.tokenizer, part, folder / SHARDS, key, size, store.answer["max_new_tokens"])
        state.wait_for_everyone()
    if not state.is_main_process:
        return
    if texts is None:
        texts = {slot: answered_slot(part, folder / SHARDS, key, size) for slot, (part, _) in parts.items()}
        write_json(folder / ANSWERS, {"key": key, "texts": texts})
        shutil.rmtree(folder / SHARDS)
    slots = {}
    for slot, (part, rows) in parts.items():
        rows = rows or truths(store.dataset, slot, cell.split, part.ids)
        slots[slot] = score_slot(slot, rows, texts[slot], store.answer["segmenter"])
        if cell.form == "explicit" and not cell.held_out:
            counts = statement_counts(store.dataset, slot, rows, texts[slot])
            slots[slot] |= {"statements": counts} if counts else {}
    own = folder / "adapter" / RECORD  # the record of a published adapter is without costs
    cost = read_json(own if own.is_file() else adapter / RECORD)
    names = ("samples", "trainable_parameters", "steps", "seconds", "samples_per_second", "resumed_from", "loss")
    write_json(folder / SCORES, {
        "cell": cell.training, "score_key": store.score_key(cell), "cost": {n: cost[n] for n in names if n in cost},
        "slots": slots,
    })  # fmt: skip


def training_pairs(store: Store, cell: Cell, slot: str) -> SlotData:
    """Pairs of sample and answer of a slot, without those held out, and at most as many as the cell asks for.

    ValueError if there are too few training samples.
    """
    data, _ = store.data(cell, slot, "train", store.on_problem)
    versions = store.versions(cell)
    left = len(data) // versions - cell.held_out
    if left < 1 or (cell.samples is not None and cell.samples > left):
        raise ValueError(
            f"{slot}: of {len(data) // versions} training samples {cell.held_out} are held out and "
            f"{cell.samples or 1} are wanted; hold out fewer, or build more (build.train_samples)"
        )
    return data[: (cell.samples or left) * versions].answered(cell.form)


def scored_part(store: Store, cell: Cell, slot: str) -> tuple[SlotData, list[dict]]:
    """The samples that a cell is scored on, and their records where these differ from the ones on disk."""
    data, rows = store.data(cell, slot, cell.split)
    first = -cell.held_out * store.versions(cell)  # 0 means all
    return data[first:], rows[first:]
