"""The small base, from random weights to a frozen model that has passed its gates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crab.data.world import sample_scene
from crab.models import omni, perception, pretrain, probes

#: The base draws its scenes from this number on; records of the data start at `crab.data.staging.BASE_IDS`.
FIRST_SCENE = 0


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
) -> tuple[Any, Any, dict]:
    """Train a base on its own scenes: first the encoders on dense targets, then the language model by stages.

    Args:
        words, tags: the vocabulary of the data, so that adapters can use any of its words; the base
            meets those that no probe uses only in copying.
        scenes, held_out: how many scenes to learn from, and how many more to be gated on. The
            latter pass through the media files' codecs, as the data does.
        size: shapes of the model; see `crab.models.omni.build_model`.
        encoders: arguments of `crab.models.perception.train_encoders`.
        language: fields of `crab.models.pretrain.Curriculum`.
        workers: processes that render.

    Returns:
        (model, processor, report) with the report's keys ``encoders`` (loss curves), ``history``
        (accuracy a skill at each check), ``gates`` (final accuracy, majority and picker a skill),
        ``parameters`` and ``seconds`` by phase.
    """
    began = time.perf_counter()
    processor = omni.build_processor(sorted({*words, *probes.words()}), tags, size)
    model = omni.build_model(processor, size, seed)
    scene_of = lambda i: sample_scene(FIRST_SCENE + i, seed)  # noqa: E731
    curves = perception.train_encoders(model, processor, scene_of, scenes, seed=seed, workers=workers, **encoders)
    seconds = {"encoders": time.perf_counter() - began}

    began = time.perf_counter()
    model.requires_grad_(False)
    bank = pretrain.Bank(model, processor, [scene_of(i) for i in range(scenes)], seed, workers)
    unseen = [scene_of(scenes + i) for i in range(held_out)]
    held = pretrain.Bank(model, processor, unseen, seed + 1, workers, through_files=True)
    seconds["encoding"] = time.perf_counter() - began

    began = time.perf_counter()
    pretrain.initialize_from_words(model)
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    plan = pretrain.Curriculum(seed=seed, **language)
    history = pretrain.train_language_model(model, processor, bank, held, plan)
    seconds["language model"] = time.perf_counter() - began

    report = {
        "encoders": curves,
        "history": history,
        "gates": final_gates(model, processor, held, seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
    }
    return model.eval(), processor, report


def final_gates(model, processor, held: pretrain.Bank, seed: int) -> dict[str, dict[str, float]]:
    """Every skill on held-out scenes, each beside the majority answer and the random-object picker."""
    checker = pretrain.Sampler(held, pretrain.vocabulary(processor), np.random.default_rng(seed + 2))
    checker.weights = {s: 1.0 for s in pretrain.skills_until(len(pretrain.STAGES) - 1)}
    return pretrain.probe_accuracy(pretrain.Packer(model, processor), checker, contexts=4 * len(held.scenes))


def missed(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> list[str]:
    """Sentences naming each gate that is missed; empty when all hold.

    Args:
        gates: from the report. least: skill -> least accuracy.

    Raises:
        ValueError: when ``least`` names a skill that was not measured.
    """
    unknown = sorted(set(least) - set(gates))
    if unknown:
        raise ValueError(f"gates: no skill {', '.join(unknown)}; known: {', '.join(sorted(gates))}")
    return [
        f"{skill}: accuracy {gates[skill]['accuracy']:.3f} is under its gate of {floor}"
        for skill, floor in least.items()
        if gates[skill]["accuracy"] < floor
    ]


def require(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> None:
    """Raise RuntimeError when a gate is missed; the stage then fails and its report says which."""
    found = missed(gates, least)
    if found:
        raise RuntimeError("the base misses its gates: " + "; ".join(found) + "; give it more steps (profiles.*.base.language)")
