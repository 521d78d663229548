"""Weaker bases: the training of a base's language model, stopped earlier. Encoders are those of the finished base.

The folder of a weaker base holds what differs. Its index, of the kind that sharded checkpoints have, names the file of
the finished base for all else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from crab.core.files import atomic_folder, digest_of, read_json, write_json
from crab.models import omni, small
from crab.models.base import curriculum, perception
from crab.models.base.bank import Bank
from crab.models.base.train import STORED_AS, final_gates, round_weights
from crab.models.checkpoint import RECORD, base_digest, load_base, weaker_folder
from crab.world.scene import sample_scene

#: The file of a weaker base with the tensors that differ from those of the finished one.
OWN = "language.safetensors"


def make_weaker(
    base: str | Path, steps: Sequence[int], section: Mapping[str, Any], *, code: Callable[[str], str],
    phases: str | Path, workers: int = 1,
) -> dict[int, dict]:  # fmt: skip
    """Bases whose language model has learned for fewer steps, each in its `weaker_folder`.

    The language model starts again from the weights that the finished base started from, on the same scenes in the same
    order and with the same learning rates; it is kept on the way. Features of the encoders are those of the finished
    base, so encoded samples serve all of them.

    Args:
        base: folder of the finished base. steps: multiples of ``language.check_every``, below ``language.steps``;
            ValueError on others, at which nothing can be kept.
        section, code: as for `crab.models.base.train.make_base`. phases: a folder that keeps the unfinished training.

    Returns by number of steps the report: ``key``, ``steps``, ``history`` (one record per check) and ``gates``, which
    measure the weights as they are stored.
    """
    seed, plan = section["seed"], section["language"]
    for number in steps:
        if number % plan["check_every"] or not 0 < number < plan["steps"]:
            raise ValueError(
                f"base.weaker: {number} cannot be kept; give multiples of base.language.check_every "
                f"({plan['check_every']}) below base.language.steps ({plan['steps']})"
            )
    decides = [base_digest(base), seed, section["scenes"], section["held_out"], plan, code(__name__)]
    keys = {number: digest_of([number, *decides]) for number in steps}
    records = {number: weaker_folder(base, number) / RECORD for number in steps}
    kept = {number: read_json(path) for number, path in records.items() if path.exists()}
    missing = [number for number in steps if kept.get(number, {}).get("key") != keys[number]]
    if not missing:
        return {number: kept[number] for number in steps}
    finished, processor = load_base(base)
    model = small.build_model(processor, section["size"], seed)
    model.model.visual.load_state_dict(finished.model.visual.state_dict())
    model.model.audio_tower.load_state_dict(finished.model.audio_tower.state_dict())
    perception.unit_words(model)
    round_weights(model)  # as it was when its language model began to learn
    scenes = [sample_scene(number, seed) for number in range(section["scenes"] + section["held_out"])]
    learned = Bank(model, processor, scenes[: section["scenes"]], seed, workers)
    held_out = Bank(model, processor, scenes[section["scenes"] :], seed + 1, workers, through_files=True)

    def keep(number: int, history: list[dict]) -> None:
        if number not in missing:
            return
        stopped = copy.deepcopy(model).eval()
        round_weights(stopped)
        report = {"key": keys[number], "steps": number, "history": history}
        report["gates"] = final_gates(stopped, processor, held_out, seed)
        with atomic_folder(weaker_folder(base, number)) as part:
            omni.save(part, stopped, processor, STORED_AS)
            _share(part, Path(base))
            write_json(part / RECORD, report)

    unfinished = Path(phases) / f"weaker-{digest_of([*decides, sorted(steps)])}.unfinished"  # on its way it keeps these
    curriculum.train_language_model(
        model, processor, learned, held_out, plan, seed, unfinished, keep=keep, until=max(missing)
    )
    unfinished.unlink(missing_ok=True)
    return {number: read_json(path) for number, path in records.items()}


def _share(folder: Path, base: Path) -> None:
    """Leave out of a saved model the tensors that its finished base has, too."""
    theirs = f"../{base.name}/{SAFE_WEIGHTS_NAME}"  # loaded first, since files are loaded in the order of their names
    own, finished = load_file(folder / SAFE_WEIGHTS_NAME), load_file(base / SAFE_WEIGHTS_NAME)
    places = {name: theirs if torch.equal(weight, finished[name]) else OWN for name, weight in own.items()}
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": places})
    own = {name: weight for name, weight in own.items() if places[name] == OWN}
    save_file(own, folder / OWN, {"format": "pt"})
    (folder / SAFE_WEIGHTS_NAME).unlink()
