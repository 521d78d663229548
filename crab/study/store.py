"""Train, answer and score cells, and keep what comes out. Nothing that is finished is done twice.

A cell has one key with two scopes. The *training key* covers what decides its weights: options, data, base and code.
The *score key* covers what decides its scores: test data, answer settings and code. Keys are the same on every
machine, because data count by what they are made from, and not by how features are rounded.

Results lie in three places:

- ``runs/<profile>/cells/<training key>/``: adapter, answers and scores, on this machine. Safe to delete.
- the *ledger*, ``reports/<profile>/cells.json.xz``, in git: the score of every sample of every finished cell. A fresh
  clone trains only what is not in it.
- ``models/<profile>/adapters/<name>``, in git for some profiles: the adapters that the analyses show.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from crab import tasks
from crab.core.code import code_digest
from crab.core.files import atomic_folder, digest_of, read_json, write_json
from crab.core.pool import run_pool
from crab.models.checkpoint import base_digest, load_processor, weaker_folder
from crab.models.protocol import model_of, module_name
from crab.samples.reading import read_manifest, read_slot
from crab.samples.shards import Shards
from crab.samples.slots import SlotData
from crab.study import prompts
from crab.study.answer import kept_texts
from crab.study.cells import Cell
from crab.study.hardware import Hardware
from crab.study.imported import import_published, weights_digest
from crab.study.launch import check, launch
from crab.study.ledger import Ledger
from crab.study.run import ANSWERS, SCORES, run_cell
from crab.study.score import reference, truths
from crab.study.train import RECORD, WARMUP, adapter_config, adapts_encoders, warn_of_emulation

#: Modules that decide the weights of an adapter, its answers, and what these are worth; with the model's own.
TRAINING = ("crab.study.train", "crab.samples.shards", "crab.samples.slots")
ANSWERING = ("crab.study.answer", "crab.samples.shards")
SCORING = ("crab.study.score", "crab.models.segment")
REASONING = ("crab.study.statements",)
PROMPTS = ("crab.study.prompts",)


@dataclass(frozen=True)
class Store:
    """Where cells find their data, and where their results are kept.

    Args:
        encoded, dataset, base: outputs of the encode, build and base stages.
        cells: folder for results on this machine. ledger: file of scores. published: folder of published adapters.
        batch_size: samples per training step. precision: ``fp32`` or ``bf16``.
        answer: ``batch_size`` and ``max_new_tokens`` of generation, and ``segmenter``, which cuts predicted masks.
        group_by_length: batches hold samples of similar length, which saves padding and changes what is learned.
        on_problem: where features are not cached, ``skip`` replaces a sample that cannot be decoded by the next one in
            training. A sample that is scored is never replaced.
        hardware: processes, memory and checkpoints.
    """

    encoded: Path
    dataset: Path
    base: Path
    cells: Path
    ledger: Path
    published: Path
    batch_size: int
    precision: str
    answer: Mapping[str, Any]
    group_by_length: bool = False
    on_problem: str = "error"
    hardware: Hardware = field(default_factory=Hardware)

    @classmethod
    def of(cls, paths, **settings: Any) -> Store:
        """A store in the folders of `crab.pipeline.paths.Paths`; ``hardware`` may be a map."""
        settings["hardware"] = Hardware(**settings.get("hardware", {}))
        return cls(paths.encoded, paths.dataset, paths.base, paths.cells, paths.ledger, paths.adapters, **settings)

    @cached_property
    def manifest(self) -> dict[str, dict]:
        return read_manifest(self.encoded)

    def base_of(self, cell: Cell) -> Path:
        """The base that the cell trains on. ValueError if it is a weaker one that is not there."""
        if cell.base_steps is None:
            return self.base
        folder = weaker_folder(self.base, cell.base_steps)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such base; add {cell.base_steps} to base.weaker and run the base stage")
        return folder

    @cached_property
    def _module(self) -> str:
        return module_name(self.base)

    # ---- keys

    def _data(self, slot: str, split: str) -> str:
        try:
            return self.manifest[f"{slot}/{split}"]["digest"]
        except KeyError:
            raise ValueError(
                f"{self.encoded}: {slot}/{split} is not encoded; add {slot} to encode.slots and run the encode stage"
            ) from None

    def key(self, cell: Cell) -> str:
        """Digest of all that decides the weights of the cell's adapter."""
        changed = cell.order != "media" or cell.words
        return digest_of({
            **cell.training,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "group_by_length": self.group_by_length,
            "warmup": WARMUP,
            "data": [self._data(slot, "train") for slot in cell.slots],
            "base": base_digest(self.base_of(cell)),
            "code": code_digest(*TRAINING, self._module, *(PROMPTS if changed else ())),
            **({"weights": weights_digest(cell.options["weights"])} if cell.options.get("weights") else {}),
        })  # fmt: skip

    def answer_key(self, cell: Cell) -> str:
        """Digest of all that decides the cell's answers, given its adapter."""
        data = [self._data(slot, cell.split) for slot in cell.scored_slots]
        code = code_digest(*ANSWERING, self._module)
        return digest_of([data, self.answer["batch_size"], self.answer["max_new_tokens"], code])

    def score_key(self, cell: Cell) -> str:
        """Digest of all that decides the cell's scores, given its adapter."""
        code = code_digest(*SCORING, *(REASONING if cell.form == "explicit" else ()))
        return digest_of([self.answer_key(cell), self.answer["segmenter"], code])

    def keyed(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells, each with its training key."""
        return [replace(cell, key=self.key(cell)) for cell in cells]

    def folder(self, cell: Cell) -> Path:
        """Where the cell's results lie on this machine."""
        return Path(self.cells) / (cell.key or self.key(cell))

    def adapter(self, cell: Cell) -> Path | None:
        """The folder of the cell's trained adapter: here, or among the published ones. None if there is none."""
        key = cell.key or self.key(cell)
        published = Path(self.published) / cell.name
        if (published / RECORD).is_file() and read_json(published / RECORD).get("key") == key:
            return published
        local = self.folder(cell) / "adapter"
        return local if (local / RECORD).is_file() else None

    # ---- work

    def run(self, cells: Sequence[Cell], label: str, need: str = "scores") -> list[Cell]:
        """Do whatever is missing of the cells, the longest first, and return them with their keys.

        ValueError, before anything is trained, on what cannot be. RuntimeError, naming the cell that failed.

        Args:
            label: stands before the progress bar.
            need: ``scores`` (the ledger is enough), ``answers`` (texts are wanted too) or ``adapter`` (weights are).
        """
        for cell in cells:
            adapter_config(cell.method, cell.options, model_of(self.base).TARGETS)
            if adapts_encoders(cell.options) and (cached := [slot for slot in cell.slots if self.cached(slot)]):
                raise ValueError(
                    f"{cell.name}: its adapter changes the encoders, but features of {cached[0]} are cached in "
                    f"{self.encoded}; set encode.cache to false, and run the encode stage again"
                )
            if cell.words:
                prompts.check_conventions(cell.slots, cell.words)
        cells = self.keyed(cells)
        missing = self.missing(cells, need)
        if any(self.adapter(cell) is None for cell in missing.values()):
            warn_of_emulation(self.precision)

        def cost(cell: Cell) -> int:
            return -cell.passes * sum(self.manifest[f"{slot}/train"]["samples"] for slot in cell.slots)

        self.hardware.micro_batch(self.batch_size)  # an error, if it does not divide
        together = [cell for cell in missing.values() if self.hardware.processes > 1 and len(cell.slots) > 1]
        alone = [cell for cell in missing.values() if cell not in together]
        for cell in missing.values():
            if self.adapter(cell) is None:
                check(self, cell, self.hardware.processes if cell in together else 1)
        for cell in missing.values():
            if cell.options.get("weights") and self.adapter(cell) is None:
                import_published(cell.options, self.base, self.folder(cell))
        jobs = [
            (f"{number}: {cell.name}", partial(run_cell, self, cell))
            for number, cell in enumerate(sorted(alone, key=cost), 1)
        ]
        try:
            for cell in together:
                launch(self, cell)
            if jobs:
                run_pool(jobs, self.hardware.workers, label)
        finally:  # what is finished is in the ledger even if a later cell fails
            entries = {cell.key: self._local(cell) for cell in cells}
            Ledger(self.ledger).add({key: entry for key, entry in entries.items() if entry})
        return cells

    def missing(self, cells: Sequence[Cell], need: str = "scores") -> dict[str, Cell]:
        """By key, the keyed cells of which `run` would do something; ``need`` is that of `run`."""
        ledger = Ledger(self.ledger)
        return {cell.key: cell for cell in cells if not self._finished(cell, ledger, need)}

    def cached(self, slot: str) -> bool:
        """Whether the features of a slot are stored."""
        return Shards(Path(self.encoded) / slot / "train").cached

    def _local(self, cell: Cell) -> dict | None:
        """The ledger entry of a cell whose scores are on this machine and still hold."""
        path = self.folder(cell) / SCORES
        entry = read_json(path) if path.is_file() else None
        return entry if entry and entry["score_key"] == self.score_key(cell) else None

    def _finished(self, cell: Cell, ledger: Ledger, need: str) -> bool:
        if need == "adapter" and self.adapter(cell) is None:
            return False
        if need == "answers" and self.kept_answers(cell) is None:
            return False
        entry = ledger.cells.get(cell.key)
        return (entry is not None and entry["score_key"] == self.score_key(cell)) or self._local(cell) is not None

    def kept_answers(self, cell: Cell) -> dict[str, dict[str, str]] | None:
        """Raw answers by slot and sample id, if they are on this machine and still hold."""
        return kept_texts(self.folder(cell) / ANSWERS, self.answer_key(cell))

    # ---- results

    def answers(self, cell: Cell, slot: str) -> dict[str, str]:
        """Raw answers by sample id. Raises ValueError unless the cell was run with ``need="answers"``."""
        texts = self.kept_answers(cell)
        if texts is None:
            raise ValueError(f"{cell.name}: no answers here; run it with need='answers'")
        return texts[slot]

    def publish(self, cells: Sequence[Cell]) -> None:
        """Copy the adapters of these cells to the folder of published ones, and delete any others there."""
        names = {cell.name for cell in cells}
        for cell in cells:
            source, target = self.adapter(cell), Path(self.published) / cell.name
            if source is None:
                raise ValueError(f"{cell.name}: no adapter here; run it with need='adapter'")
            if source != target:
                with atomic_folder(target) as temporary:
                    shutil.copytree(source, temporary, dirs_exist_ok=True)
                    record = {"key": cell.key, "name": cell.name, **cell.training}
                    write_json(temporary / RECORD, record)  # without times, so that equal adapters are equal files
        Path(self.published).mkdir(parents=True, exist_ok=True)
        for folder in Path(self.published).iterdir():
            if folder.is_dir() and folder.name not in names:
                shutil.rmtree(folder)

    def references(self, slots: Sequence[str], held_out: int = 0) -> dict[str, dict]:
        """By slot, chance and oracle (`crab.study.score.reference`) on the samples that such cells are scored on."""
        ledger, split = Ledger(self.ledger), "train" if held_out else "test"
        slots = [slot for slot in slots if tasks.get_slot(slot).test]
        code = code_digest(*SCORING)
        keys = {slot: digest_of([self._data(slot, split), held_out, self.answer["segmenter"], code]) for slot in slots}
        jobs = [
            (slot, partial(_reference, self, slot, split, held_out))
            for slot in sorted(slots, key=lambda slot: not tasks.get_slot(slot).masks)  # the slow ones first
            if keys[slot] not in ledger.references
        ]
        if jobs:
            results = run_pool(jobs, self.hardware.workers, "chance and oracle")
            ledger.add({}, {keys[slot]: {"slot": slot, **result} for slot, result in results.items()})
        return {slot: ledger.references[keys[slot]] for slot in slots}

    def data(self, cell: Cell, slot: str, split: str, on_problem: str = "error") -> tuple[SlotData, list[dict]]:
        """Samples of a slot as the cell sees them, and their records where these are needed (else an empty list).

        ``on_problem`` is that of `read_slot`. It is ``error`` for samples that are scored: the answer to another
        sample would count as theirs.
        """
        samples = read_slot(self.encoded, slot, split, self.base, on_problem)
        if not cell.words and cell.order == "media":
            return samples, []
        if "prompt" in samples[0]:
            raise ValueError(f"{cell.name}: its prompts are changed as they are read; set encode.cache to true")
        tokenizer = load_processor(self.base).tokenizer
        marks = model_of(self.base).marks(tokenizer)
        if cell.order == "instruction":
            samples = samples.mapped(partial(prompts.instruction_first, marks=marks))
        if not cell.words:
            return samples, []
        both = {name: read_slot(self.encoded, slot, name, self.base).ids for name in tasks.SPLITS}
        rows = {name: truths(self.dataset, slot, name, ids) for name, ids in both.items()}
        labels = [tasks.truth(slot, row) for part in rows.values() for row in part]
        names = prompts.permutations(labels, len(cell.words))
        return prompts.with_conventions(samples, rows[split], names, cell.words, cell.convention, tokenizer, marks)

    def versions(self, cell: Cell) -> int:
        """Samples that stand for each clip: one per convention."""
        return len(cell.words) if cell.words and cell.convention is None else 1


def _reference(store: Store, slot: str, split: str, held_out: int) -> dict:
    ids = read_slot(store.encoded, slot, split, store.base).ids[-held_out:]
    return reference(slot, truths(store.dataset, slot, split, ids), store.answer["segmenter"])
