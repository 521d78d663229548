"""What the cells of a study take, before it starts: GPU memory, disk, samples, steps and hours.

All follows from the base's configuration (:mod:`crab.study.footprint`) and the numbers of records. No weight is loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil
import torch

from crab import tasks
from crab.data import records
from crab.study.cells import families_of
from crab.study.footprint import GIB, Base, flops, memory
from crab.study.hardware import Hardware
from crab.tasks.registry import PUBLISHED_SAMPLES

GB = 10**9
TEXT = 50  # tokens of a prompt beside its media, about
#: Tokens of an answer, about: the mean, and of the longest one if answer.max_new_tokens is not less.
ANSWER = {"bare": (16, 64), "explicit": (100, math.inf)}
CORE_TFLOPS = 0.06  # peak of one core in 32 bit, about
CHECKPOINTS = 2  # kept of a cell in training
#: Seconds of sound of the real data, where they are not 10; and those that encode.compatibility: published shows.
SECONDS = {
    "none": {"avqa": 60.0, "unav": 42.0, "image": 1.0, "emotion": 3.3},
    "published": {"avqa": 20.0, "unav": 42.0, "arig": 5.0, "image": 1.0, "emotion": 4.0},
}


@dataclass(frozen=True)
class Machine:
    """What there is to train on.

    Args:
        memory_gib: of one GPU. disk_gb: free space.
        tflops: peak of one GPU in matrix products, 10^12 per second; ``mfu`` is the share of it that is reached.
        samples_per_second: of one process, in place of these two.
    """

    memory_gib: float
    disk_gb: float = math.inf
    tflops: float = 312.0  # of an A100, in 16 bit
    mfu: float = 0.35
    samples_per_second: float | None = None

    @classmethod
    def here(cls, folder: str | Path, large: bool, workers: int = 1, **given: Any) -> Machine:
        """This machine, with the disk that ``folder`` is on or will be. Arguments in ``given`` that are not None win.

        Without a GPU, a ``large`` base is planned for GPUs of 80 GB, and a small one for a CPU that ``workers`` share.
        """
        there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        known: dict[str, Any] = {"memory_gib": 79.0, "disk_gb": disk_usage(there).free / GB}
        if torch.cuda.is_available():
            known["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / GIB
        elif not large:
            known["memory_gib"] = psutil.virtual_memory().total / GIB / workers
            known["tflops"] = CORE_TFLOPS * (os.cpu_count() or 1) / workers
        return cls(**known | {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Plan:
    """The cells of ``train.methods`` of params.yaml, on a machine.

    Args:
        counts: records by ``slot/split``. slots: those of them that are encoded; None for all.
        methods, passes, seeds: of the train section. batch_size, precision, answer, hardware: of the shared section.
        cache, compatibility: of the encode section. real: clips are as long as the real ones, otherwise 10 s.
    """

    base: Base
    counts: Mapping[str, int]
    machine: Machine
    methods: Mapping[str, Mapping[str, Any]]
    passes: int
    seeds: Sequence[int]
    batch_size: int
    precision: str
    answer: Mapping[str, Any]
    hardware: Hardware = field(default_factory=Hardware)
    slots: Sequence[str] | None = None
    cache: bool = True
    compatibility: str = "none"
    real: bool = True

    def _seconds(self, slot: str) -> float:
        """Of one sound of a sample."""
        entry = tasks.get_slot(slot)
        kind = "image" if entry.media == "image_audio" else entry.family.split()[0]
        seconds = SECONDS[self.compatibility] if self.real else {"image": 1.0}
        return seconds.get(slot, seconds.get(kind, 10.0))

    def features(self) -> list[dict[str, Any]]:
        """One row per slot and split: samples, media tokens of each, and GB if features are stored in 16 bit."""
        rows = []
        for key, count in self.counts.items():
            slot, _, split = key.partition("/")
            if self.slots is None or slot in self.slots:
                tokens = sum(self.base.media_tokens(slot, self._seconds(slot)))
                size = 2 * tokens * self.base.width + 16 * (tokens + TEXT)  # a token and its positions take 16 bytes
                rows.append({"slot": slot, "split": split, "samples": count, "tokens": tokens, "gb": count * size / GB})
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """One row per family and group of slots (``joint``, or one slot): sizes of one cell. Memory is per process.

        ValueError, naming the parameter, on a batch that does not divide, an unknown option or configuration.
        """
        counts = {row["slot"]: row["samples"] for row in self.features() if row["split"] == "train"}
        rows = []
        for family, entry in families_of(self.methods).items():
            single = entry["setting"] == "single"
            groups = [[slot] for slot in counts if tasks.get_slot(slot).test] if single else [list(counts)]
            for group in groups:
                samples = {slot: counts[slot] for slot in group}
                rows.append({"family": family, "cell": group[0] if single else "joint"} | self._row(entry, samples))
        return rows

    def _row(self, entry: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
        adapter, hardware = self.base.adapter(entry["method"], entry["options"]), self.hardware
        processes = 1 if entry["setting"] == "single" else hardware.processes  # single-task cells take one GPU each
        mean, longest = ANSWER[entry["form"]]
        longest = int(min(self.answer["max_new_tokens"], longest))
        media = {slot: sum(self.base.media_tokens(slot, self._seconds(slot))) for slot in counts}
        encoded = {slot: self.base.encoder_tokens(slot, self._seconds(slot)) for slot in counts}
        largest, micro_batch = max(media, key=media.__getitem__), hardware.micro_batch(self.batch_size)
        sizes = (micro_batch, media[largest] + TEXT + longest, longest, encoded[largest])
        off, on = (
            memory(
                self.base, adapter, *sizes, precision=self.precision, checkpointing=checkpointing,
                processes=processes, stage=hardware.shared_out()[1],
            )
            for checkpointing in (False, True)
        )  # fmt: skip
        work = sum(
            count * flops(
                self.base, adapter, media[slot] + TEXT + mean, mean, (0, 0) if self.cache else encoded[slot],
                checkpointing=hardware.checkpointing,
            )
            for slot, count in counts.items()
        )  # fmt: skip
        samples, chosen = sum(counts.values()), on if hardware.checkpointing else off
        speed = self.machine.samples_per_second
        seconds = samples / speed if speed else work / (self.machine.tflops * 1e12 * self.machine.mfu)
        return {
            "seeds": len(self.seeds),
            "processes": processes,
            "micro_batch": micro_batch,
            "longest": sizes[1],
            "samples": samples,
            "steps": -(-samples // self.batch_size) * self.passes,
            "parameters": self.base.parameters,
            "adapter_parameters": adapter.parameters,
            **{f"{name}_gib": size / GIB for name, size in chosen.items()},
            "gib": sum(chosen.values()) / GIB,
            "gib_with_checkpointing": sum(on.values()) / GIB,
            "gib_without": sum(off.values()) / GIB,
            "adapter_gb": 4 * adapter.parameters / GB,
            "checkpoints_gb": CHECKPOINTS * 3 * 4 * adapter.parameters / GB,  # with the two moments of AdamW
            "hours": self.passes * seconds / processes / 3600,
        }

    def totals(self) -> dict[str, float]:
        """Of the whole study: cells, hours of GPUs and of the clock, and GB of features, adapters and checkpoints."""
        rows = self.rows()
        side = [1 if row["processes"] > 1 else self.hardware.workers for row in rows]  # cells at the same time
        return {
            "cells": sum(row["seeds"] for row in rows),
            "gpu_hours": sum(row["seeds"] * row["hours"] * row["processes"] for row in rows),
            "hours": sum(row["seeds"] * row["hours"] / count for row, count in zip(rows, side, strict=True)),
            "features_gb": sum(row["gb"] for row in self.features()) if self.cache else 0.0,
            "adapters_gb": sum(row["seeds"] * row["adapter_gb"] for row in rows),
            "checkpoints_gb": max(row["checkpoints_gb"] * count for row, count in zip(rows, side, strict=True)),
        }

    def check(self) -> None:
        """Raise ValueError if memory or disk is too small, with the parameter to change."""
        rows = self.rows()
        worst, limit = max(rows, key=lambda row: row["gib"]), self.machine.memory_gib
        if worst["gib"] > limit:
            fixes = (words for words, plan in self._smaller(worst) if max(r["gib"] for r in plan.rows()) <= limit)
            fix = next(fixes, "set base.checkpoint to a smaller base, or take GPUs with more memory")
            name = f"{worst['family']} ({worst['cell']})"
            raise ValueError(f"{name} takes {worst['gib']:.1f} GiB per process, and {limit:.1f} are there; {fix}")
        need = {name.removesuffix("_gb"): size for name, size in self.totals().items() if name.endswith("_gb")}
        total, free = sum(need.values()), self.machine.disk_gb
        if total > free:
            parts = ", ".join(f"{name} {size:.1f}" for name, size in need.items())
            fix = f"lower train.methods.{_method(max(rows, key=lambda row: row['adapter_gb']))}.r"
            fix = "set encode.cache to false" if total - need["features"] <= free else fix
            raise ValueError(f"{total:.1f} GB of disk are needed ({parts}), and {free:.1f} are free; {fix}")

    def _smaller(self, row: Mapping[str, Any]) -> Iterator[tuple[str, Plan]]:
        """Plans that need less memory than this row, each with the words for it; first those that cost least."""
        now = self.hardware
        parts = range(now.accumulate + 1, self.batch_size + 1)
        changes: list[dict[str, Any]] = [
            {"accumulate": count} for count in parts if self.batch_size % (count * now.processes) == 0
        ]
        changes += [{"checkpointing": True}] if not now.checkpointing else []
        spread = ("zero2", "zero3") if self.cache else ("zero2",)  # with the weights spread, encoders cannot run
        changes += [{"accelerate": name} for name in spread if now.processes > 1]
        together = {name: value for change in changes for name, value in change.items()}
        for change in [*changes, together]:
            words = " and ".join(f"shared.hardware.{name} to {str(value).lower()}" for name, value in change.items())
            yield f"set {words}", replace(self, hardware=replace(now, **change))
        if self.precision == "fp32":
            yield "set shared.precision to bf16", replace(self, precision="bf16")
        rank = self.methods[name := _method(row)]["r"]
        while rank := rank // 2:
            methods = {**self.methods, name: {**self.methods[name], "r": rank}}
            yield f"set train.methods.{name}.r to {rank}", replace(self, methods=methods)


def _method(row: Mapping[str, Any]) -> str:  # of train.methods
    return row["family"].split("-")[1]


def counts_of(build: Mapping[str, Any], dataset: str | Path) -> tuple[dict[str, int], str]:
    """Records by ``slot/split``, and a note if they are assumed.

    Args:
        build: section of params.yaml. dataset: the data root, with the manifest of the build stage if that has run.
    """
    if (Path(dataset) / records.MANIFEST).is_file():
        return {name: entry["records"] for name, entry in records.read_manifest(dataset).items()}, ""
    slots = [tasks.get_slot(name) for name in build["slots"] or tasks.SLOTS]
    if build["source"] == "generated":
        size = {"train": build["train_samples"], "test": build["test_samples"]}
        note = "the build stage has not run; numbers of records are those of params.yaml"
        captions = {"avcap/train": build["caption_samples"]}
    else:
        share = PUBLISHED_SAMPLES // len(tasks.SLOTS)
        size, captions = {"train": share, "test": share // 3}, {}
        note = (f"the build stage has not run; {PUBLISHED_SAMPLES:,} training samples, as published, are spread evenly "
                "over the slots, so disk and hours are rough")  # fmt: skip
    counts = {f"{slot.name}/{split}": size[split] for slot in slots for split in slot.splits}
    return counts | {name: count for name, count in captions.items() if name in counts}, note
