"""The small base, from random weights to a frozen model that has passed its gates."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crab.world import chains, render, scene as world
from crab.data import files
from crab.world.scene import sample_scene
from crab.models.base import bank, curriculum, optimize, packing, perception, probes
from crab.models import omni
from crab.models.base.bank import Bank
from crab.models.checkpoint import point_to

#: The base draws its scenes from this number on; records of the data start at `crab.world.staging.BASE_IDS`.
FIRST_SCENE = 0
#: Precision of the weights on disk: half of it is half a repository's growth at each new base.
KEPT_AS = torch.float16


def make_base(words: Sequence[str], tags: Sequence[str], *, checkpoint: str | None, **training: Any) -> tuple[Any, Any, dict]:
    """The base to keep: trained here by `train_base`, or, where ``checkpoint`` names one, a published model.

    Returns:
        (model, processor, report) as `train_base`; for a checkpoint (None, None, a report in which nothing was measured).
    """
    if checkpoint is None:
        return train_base(words, tags, **training)
    return None, None, {"encoders": {}, "history": [], "gates": {}, "parameters": None, "seconds": {}}


def keep(folder: str | Path, model, processor, checkpoint: str | None) -> None:
    """Write the base to a folder: its weights, or the name of the checkpoint that is taken for it."""
    if checkpoint is None:
        omni.save(folder, model, processor, KEPT_AS)
    else:
        point_to(folder, checkpoint)


def said(report: Mapping[str, Any], checkpoint: str | None) -> str:
    """One line on the base's size and cost, or on where it is from."""
    if checkpoint is not None:
        return f"Nothing is trained here: the base is the published checkpoint {checkpoint}."
    return f"{report['parameters'] / 1e6:.2f} M parameters; seconds: {report['seconds']}"


def train_base(
    words: Sequence[str],
    tags: Sequence[str],
    *,
    seed: int,
    scenes: int,
    held_out: int,
    size: Mapping[str, Any],
    encoders: Mapping[str, Any],
    language: Mapping[str, Any],
    workers: int = 1,
    checkpoints: str | Path | None = None,
) -> tuple[Any, Any, dict]:
    """Train a base on its own scenes: first the encoders on dense targets, then the language model by stages.

    Args:
        words, tags: the vocabulary of the data, so that adapters can use any of its words; the base
            meets those that no probe uses only in copying.
        scenes, held_out: how many scenes to learn from, and how many more to be gated on. The
            latter pass through the media files' codecs, as the data does.
        size: shapes of the model; see `crab.models.omni.build_model`.
        encoders: arguments of `crab.models.base.perception.train_encoders`.
        language: fields of `crab.models.base.curriculum.Curriculum`.
        workers: processes that render.
        checkpoints: a folder that keeps each finished phase, and the language model at its last check, under a hash
            of what decides it, so that a killed run, or one that missed a gate, repeats only what is not there.

    Returns:
        (model, processor, report); the model's weights are rounded to `KEPT_AS` before they are gated.
        The report has the keys ``encoders`` (loss curves), ``history``
        (accuracy a skill at each check), ``gates`` (final accuracy, majority and picker a skill),
        ``parameters`` and ``seconds`` by phase.
    """
    processor = omni.build_processor(sorted({*words, *probes.words()}), tags, size)
    model = omni.build_model(processor, size, seed)
    scene_of = lambda i: sample_scene(FIRST_SCENE + i, seed)  # noqa: E731
    decides = [sorted(words), sorted(tags), seed, scenes, dict(size), dict(encoders)]
    sensing, speech = (omni, optimize, perception, render, world), (bank, chains, curriculum, packing, probes)

    def see_and_hear(_) -> dict:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads - workers))  # rendering takes the rest
        try:
            return perception.train_encoders(model, processor, scene_of, scenes, seed=seed, workers=workers, **encoders)
        finally:
            torch.set_num_threads(threads)

    curves, perceiving = _phase(model, checkpoints, "encoders", [*decides, _code(*sensing)], see_and_hear)
    model.requires_grad_(False)
    _round(model)  # the language model learns from, and is gated on, what the kept encoders give
    held: list[Bank] = []

    def unseen() -> Bank:
        if not held:
            found = [scene_of(scenes + i) for i in range(held_out)]
            held.append(Bank(model, processor, found, seed + 1, workers, through_files=True))
        return held[0]

    def speak(unfinished: Path | None) -> list[dict]:
        seen = Bank(model, processor, [scene_of(i) for i in range(scenes)], seed, workers)
        curriculum.initialize_from_words(model)
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        plan = curriculum.Curriculum(seed=seed, **language)
        return curriculum.train_language_model(model, processor, seen, unseen(), plan, unfinished)

    history, speaking = _phase(model, checkpoints, "language", [*decides, held_out, dict(language), _code(*sensing, *speech)], speak)
    _round(model)
    report = {
        "encoders": curves,
        "history": history,
        "gates": final_gates(model, processor, unseen(), seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {"encoders": perceiving, "language model": speaking},
    }
    return model.eval(), processor, report


def _phase(model, folder: str | Path | None, name: str, decides: list, train) -> tuple[Any, float]:
    """Run ``train`` on the model, or take what it left; returns (its record, the seconds it took, since it last went on).

    ``train`` is called with a file in which it may keep what is not finished, or None.
    """
    path = unfinished = None
    if folder is not None:
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        path, unfinished = (Path(folder) / f"{name}-{key}{suffix}" for suffix in (".safetensors", ".unfinished.pt"))
        if path.exists():
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["record"])
            model.load_state_dict(load_file(path))
            return record["value"], record["seconds"]
    began = time.perf_counter()
    value = train(unfinished)
    seconds = round(time.perf_counter() - began, 1)
    if path is not None:
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        with files.atomic_file(path) as part:
            save_file(state, part, metadata={"record": json.dumps({"value": value, "seconds": seconds})})
        unfinished.unlink(missing_ok=True)
    return value, seconds


def _round(model) -> None:
    """Round the weights to the precision in which they are kept, so that what is gated is what is kept."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(KEPT_AS))


def _code(*modules) -> str:
    """Digest of the code that decides what a phase learns."""
    return hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in modules)).hexdigest()


def final_gates(model, processor, held: Bank, seed: int) -> dict[str, dict[str, float]]:
    """Every skill on held-out scenes, each beside the majority answer and the random-object picker."""
    checker = curriculum.Sampler(held, curriculum.vocabulary(processor), np.random.default_rng(seed + 2))
    checker.weights = {s: 1.0 for s in curriculum.skills_until(len(curriculum.STAGES) - 1)}
    return curriculum.probe_accuracy(packing.Packer(model, processor), checker, contexts=4 * len(held.scenes))


def floors(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> dict[str, float]:
    """The least accuracy of each skill.

    Args:
        gates: from the report. least: skill -> least accuracy; ``all`` stands for those it does not name.

    Raises:
        ValueError: when ``least`` names a skill that was not measured.
    """
    unknown = sorted(set(least) - set(gates) - {"all"})
    if unknown:
        raise ValueError(f"gates: no skill {', '.join(unknown)}; known: {', '.join(sorted(gates))}")
    return {skill: least.get(skill, least.get("all")) for skill in gates if skill in least or "all" in least}


def missed(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> list[str]:
    """Sentences naming each gate that is missed; empty when all hold.

    Args:
        gates: from the report. least: as for `floors`.
    """
    return [
        f"{skill}: accuracy {gates[skill]['accuracy']:.3f} is under its gate of {floor}"
        for skill, floor in floors(gates, least).items()
        if gates[skill]["accuracy"] < floor
    ]


def require(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> None:
    """Raise RuntimeError when a gate is missed; the stage then fails and its report says which."""
    found = missed(gates, least)
    if found:
        raise RuntimeError("the base misses its gates: " + "; ".join(found) + "; give it more steps (profiles.*.base.language)")
