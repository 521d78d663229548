"""The small base, from random weights to a frozen model that has passed its gates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crab.core.files import atomic_file, atomic_folder, digest_of, read_json, write_json
from crab.models import small
from crab.models.base import curriculum, perception, probes
from crab.models.base.bank import Bank
from crab.models.base.packing import Packer
from crab.models.checkpoint import RECORD, point_to
from crab.models.protocol import model_of
from crab.world.scene import sample_scene

#: Precision of the weights on disk, for half the size in the repository.
STORED_AS = torch.float16


def make_base(
    folder: str | Path | None, vocabulary: Mapping[str, list[str]], section: Mapping[str, Any],
    checkpoint: str | None = None, *, code: Callable[[str], str], phases: str | Path | None = None, workers: int = 1,
) -> tuple[Any, Any, dict]:  # fmt: skip
    """The base of ``folder``: published, already there, or trained on its own scenes.

    Args:
        vocabulary: ``words`` and ``tags`` of the data. The base meets words that no probe uses only in copying.
        section: of params.yaml: seed, scenes (to learn from), held_out (further scenes, for the gates, which go
            through media files as the data does), size, encoders and language.
        checkpoint: name of a published checkpoint, in place of training.
        code: gives the digest of a module and of all that it imports, such as `crab.core.code.code_digest`.
        phases: a folder for finished phases and for the last check. A killed run repeats only what is not there.
        workers: processes that render.

    Returns (model, processor, report). Model and processor are None if nothing was trained: for a published checkpoint,
    and for a folder with a base of the same section, vocabulary and code. The report holds ``key``, ``encoders``
    (losses by step), ``history`` (one record per check), ``gates`` (accuracy, majority, picker and n by skill),
    ``parameters``, and ``seconds`` by phase. The gates measure the weights as they are stored.
    """
    if checkpoint is not None:
        return None, None, {"key": None, "encoders": {}, "history": [], "gates": {}, "parameters": None, "seconds": {}}
    words, tags = sorted(vocabulary["words"]), sorted(vocabulary["tags"])
    seed, scenes, encoders, language = (section[name] for name in ("seed", "scenes", "encoders", "language"))
    decides = [words, tags, seed, scenes, section["size"], encoders]
    encoders_key = digest_of([*decides, code("crab.models.base.perception")])
    key = digest_of([*decides, section["held_out"], language, code("crab.models.base.train")])
    if report := kept_report(folder, key):
        return None, None, report
    processor = small.build_processor(sorted({*words, *probes.words()}), tags, section["size"])
    model = small.build_model(processor, section["size"], seed)

    def scene_of(number: int):
        return sample_scene(number, seed)

    @cache
    def held_out() -> Bank:
        last = [scene_of(scenes + i) for i in range(section["held_out"])]
        return Bank(model, processor, last, seed + 1, workers, through_files=True)

    def see_and_hear(_) -> dict:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads - workers))  # rendering takes the rest
        try:
            return perception.train_encoders(model, processor, scene_of, scenes, encoders, seed, workers)
        finally:
            torch.set_num_threads(threads)

    def speak(unfinished: Path | None) -> list[dict]:
        seen = Bank(model, processor, [scene_of(i) for i in range(scenes)], seed, workers)
        return curriculum.train_language_model(model, processor, seen, held_out(), language, seed, unfinished)

    curves, encoder_seconds = _phase(model, phases, f"encoders-{encoders_key}", see_and_hear)
    round_weights(model)  # the language model learns from what the stored encoders give
    history, language_seconds = _phase(model, phases, f"language-{key}", speak)
    round_weights(model)
    report = {
        "key": key,
        "encoders": curves,
        "history": history,
        "gates": final_gates(model, processor, held_out(), seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {"encoders": encoder_seconds, "language model": language_seconds},
    }
    return model.eval(), processor, report


def kept_report(folder: str | Path | None, key: str) -> dict | None:
    """The report of the base that lies in ``folder``, if it has this ``key``."""
    if folder is None or not (Path(folder) / RECORD).exists():
        return None
    report = read_json(Path(folder) / RECORD)
    if report["key"] == key:
        return report
    print(f"{folder} holds a base of other parameters, words or code; a new one is trained")
    return None


def keep(folder: str | Path, model, processor, report: Mapping[str, Any], checkpoint: str | None = None) -> None:
    """Write what `make_base` returned to ``folder``. A base that is already there stays."""
    if checkpoint is None and model is None:
        return
    with atomic_folder(folder) as part:
        if checkpoint is not None:
            point_to(part, checkpoint)
        else:
            model_of(model).save(part, model, processor, STORED_AS)
            write_json(part / RECORD, report)


def _phase(model, folder: str | Path | None, name: str, train: Callable[[Path | None], Any]) -> tuple[Any, float]:
    """Run ``train`` on the model, or load what it left in ``folder``; returns (its result, its seconds).

    ``train`` gets a file in which it may keep unfinished work, or None.
    """
    began = time.perf_counter()
    if folder is None:
        return train(None), round(time.perf_counter() - began, 1)
    path, unfinished = Path(folder) / f"{name}.pt", Path(folder) / f"{name}.unfinished"
    if path.exists():
        state, result, seconds = torch.load(path, weights_only=True)
        model.load_state_dict(state)
        return result, seconds
    result, seconds = train(unfinished), round(time.perf_counter() - began, 1)
    with atomic_file(path) as part:
        torch.save((model.state_dict(), result, seconds), part)
    unfinished.unlink(missing_ok=True)
    return result, seconds


def round_weights(model) -> None:
    """Freeze the weights, and round them to the precision on disk, so that the gates measure what is stored."""
    with torch.no_grad():
        for weight in model.requires_grad_(False).parameters():
            weight.copy_(weight.to(STORED_AS))


def final_gates(model, processor, held_out: Bank, seed: int) -> dict[str, dict[str, float]]:
    """`probe_accuracy` of all skills on held-out scenes."""
    checker = curriculum.Sampler(held_out, processor, np.random.default_rng(seed + 2))
    checker.weights = dict.fromkeys(probes.SKILLS, 1.0)
    return curriculum.probe_accuracy(Packer(model, processor), checker, contexts=4 * len(held_out.scenes))


def floors(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> dict[str, float]:
    """The least accuracy of each measured skill, by ``least`` (``base.gates`` of params.yaml).

    There, ``all`` is for the skills without a number of their own. ValueError if it names a skill that has no gate.
    """
    unknown = sorted(set(least) - set(gates) - {"all"})
    if unknown:
        raise ValueError(f"base.gates: there is no skill {', '.join(unknown)}; known: {', '.join(sorted(gates))}")
    return {skill: least.get(skill, least.get("all")) for skill in gates if skill in least or "all" in least}


def require(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> None:
    """Raise RuntimeError, naming each skill under its gate, so that the stage fails. Arguments as for `floors`."""
    missed = [
        f"{skill}: accuracy {gates[skill]['accuracy']:.3f} is under its gate of {floor}"
        for skill, floor in floors(gates, least).items()
        if gates[skill]["accuracy"] < floor
    ]
    if missed:
        fix = "increase base.language.steps, or base.bridge.align.steps for a bridge, in params.yaml"
        raise RuntimeError(f"base.gates are missed: {'; '.join(missed)}; {fix}")
