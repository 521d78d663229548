"""Train the projectors of a bridge; its encoders and its language model stay frozen.

First they are fitted to the words of what is there (`crab.models.base.words`). Then the bridge answers the same plain
questions about generated scenes that a small base learns from, and tells what it sees and hears. It never sees an
instruction of a task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crab.core.files import atomic_file, digest_of
from crab.models import bridge, encoders
from crab.models.base import curriculum, probes, words
from crab.models.base.bank import Bank, Clips, round_trip
from crab.models.base.packing import BLANK, Packer, Row
from crab.models.base.train import kept_report, round_weights
from crab.models.batches import attention, media_mask
from crab.models.checkpoint import base_digest
from crab.models.language import compile_layers
from crab.world import render
from crab.world.scene import SECONDS, sample_scene

PARTS = ("visual", "audio_tower")
UNTAUGHT = ("copy", "read")  # the language model reads and copies already
TAUGHT = {skill: 1.0 for skill in probes.SKILLS if skill not in UNTAUGHT}
WARM_UP = 0.03  # share of the steps
BATCH = 16  # scenes that go through the encoders together


class BridgeBank(Bank):
    """A `Bank` of what the encoders of a bridge give, before its projectors: float16 [N, units, tokens, width]."""

    def _encoded(self, model, processor, through_files: bool, workers: int) -> dict[str, torch.Tensor]:
        clips = _Clips(processor, self.scenes, self.seconds, through_files)
        loader = torch.utils.data.DataLoader(clips, batch_size=BATCH, num_workers=workers)
        parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in BLANK}
        for batch in tqdm(loader, desc="encoding scenes", mininterval=5):
            for kind in ("video", "image"):
                seen = model.visual.see(batch[kind].flatten(0, 1).to(model.device))
                parts[kind].append(seen.unflatten(0, batch[kind].shape[:2]).half().cpu())
            for kind, seconds in (("audio", SECONDS), ("second", 1)):
                mel, mask = batch[kind]
                heard = model.audio_tower.hear(mel.to(model.device), mask.sum(-1).tolist(), [seconds] * len(mel))
                parts[kind].append(torch.stack(heard).half().cpu())
        return {kind: torch.cat(values) for kind, values in parts.items()}


class _Clips(Clips):
    """What the encoders read of each scene: the clip and its sound, and one second of both."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene, second, rate = self.scenes[i], int(self.seconds[i]), encoders.RATE
        if self.through_files:
            clip, still, wave = round_trip(scene, second)
        else:
            clip, wave = np.stack([render.frame(scene, s) for s in range(SECONDS)]), render.waveform(scene)
            still = clip[second]
        images, sounds = self.processor.image_processor, self.processor.feature_extractor
        return {
            "video": encoders.pixels_of(images, clip),
            "image": encoders.pixels_of(images, still[None]),
            "audio": encoders.spectrogram(sounds, wave[: SECONDS * rate]),
            "second": encoders.spectrogram(sounds, wave[second * rate : (second + 1) * rate]),
        }


class BridgeSampler(curriculum.Sampler):
    """A `Sampler` whose rows all have the same kinds of media, in the same order."""

    def rows(self, kind: str, count: int) -> list[Row]:
        rows = super().rows(kind, count)
        return [row for row in rows if [k for k, _ in row.media] == [k for k, _ in rows[0].media]]


class BridgePacker(Packer):
    """A `Packer` for a bridge: its prompts, its plain positions, and features that go through the projectors."""

    def _turn(self) -> str:
        return bridge.prompt_text(self.tokenizer, [], "\0").split("\0")[1]

    def template(self, kinds: tuple[str, ...], bank: Bank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The prompt up to its question: ids [L], positions [3, L], and the order of its media, pictures first."""
        if kinds not in self.templates:
            prompt = bridge.prepare(self.processor, [BLANK[kind] for kind in kinds], "\0")
            ids = prompt["input_ids"][0]
            last = int(media_mask(self.model.config, ids).nonzero()[-1])
            head = torch.tensor(self._ids("\n"), dtype=torch.long)  # between media and question
            ids = torch.cat([ids[: last + 1], head])
            sounds = [BLANK[kind].kind == "audio" for kind in kinds]
            order = torch.tensor(sounds).int().argsort(stable=True)
            self.templates[kinds] = ids, torch.arange(len(ids)).expand(3, -1), order
        return self.templates[kinds]

    def media(self, row: Row, bank: Bank, order: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Kind and tokens [units, tokens, width] of each item of a row, pictures first."""
        chosen = [row.media[i] for i in order.tolist()]
        return [(BLANK[kind].kind, bank.tokens[kind][i]) for kind, i in chosen]

    def features(self, media: list[list[tuple[str, torch.Tensor]]]) -> torch.Tensor:
        """What the projectors make of the media, with gradients."""
        model, projected = self.model, []
        for tower, sounds in ((model.visual, False), (model.audio_tower, True)):
            chosen = [item for row in media for kind, item in row if (kind == "audio") == sounds]
            learned = next(tower.projector.parameters())  # in float32, also where the language model is rounded
            items = [item.to(learned) for item in chosen]
            projected.append(iter(tower.projector.items(items) if items else ()))
        return torch.cat([next(projected[kind == "audio"]) for row in media for kind, _ in row])

    def hidden(self, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        core = self.model.language_model.base_model
        return core(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions[0], use_cache=False
        ).last_hidden_state


def make_bridge(
    folder: str | Path | None, section: Mapping[str, Any], models: str | Path, *, code: Callable[[str], str],
    phases: str | Path | None = None, workers: int = 1,
) -> tuple[Any, Any, dict]:  # fmt: skip
    """The bridge of ``folder``: already there, or with projectors that are trained on generated scenes.

    Args:
        section: base of params.yaml: ``seed``, ``scenes`` (those after them are held out), ``held_out`` and ``bridge``.
        models: holds the folders of small bases, which ``vision`` and ``audio`` may name.
        code, phases, workers: see `crab.models.base.train.make_base`.

    Returns (model, processor, report), as `crab.models.base.train.make_base` does, also for a folder with such a
    bridge. ValueError, naming the parameter, if a part cannot be read.
    """
    part = section["bridge"]
    folders = {sense: Path(models) / part[sense] for sense in ("vision", "audio")}
    sources = {s: str(path) if (path / "config.json").is_file() else part[s] for s, path in folders.items()}
    kept = [base_digest(path) for path in folders.values() if (path / "config.json").is_file()]
    decides = [section["seed"], section["scenes"], section["held_out"], part, kept]
    key = digest_of([*decides, code("crab.models.base.align"), code("crab.models.bridge")])
    if report := kept_report(folder, key):
        return None, None, report
    began, seed, plan = time.perf_counter(), section["seed"], part["align"]
    model, processor = bridge.assemble(
        part["language"], **sources, projector=part["projector"], picture_tokens=part["picture_tokens"],
        sound_tokens=part["sound_tokens"], words=part["words"], seed=seed,
    )  # fmt: skip
    scenes = [sample_scene(i, seed) for i in range(part["scenes"])]
    last = [sample_scene(section["scenes"] + i, seed) for i in range(section["held_out"])]
    held_out = BridgeBank(model, processor, last, seed + 1, workers, through_files=True)
    unfinished = None if phases is None else Path(phases) / f"align-{key}.unfinished"
    curves, history = train_projectors(
        model, processor, BridgeBank(model, processor, scenes, seed, workers), held_out, plan, seed, unfinished
    )
    for name in PARTS:
        round_weights(model.get_submodule(name))
    checker = BridgeSampler(held_out, processor, np.random.default_rng(seed + 2))
    checker.weights = TAUGHT
    packer = BridgePacker(model, processor, plan["precision"])
    report = {
        "key": key,
        "encoders": curves,
        "history": history,
        "gates": words.accuracy(model, processor.tokenizer, held_out)
        | curriculum.probe_accuracy(packer, checker, plan["gate_contexts"], plan["batch_size"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {"alignment": round(time.perf_counter() - began, 1)},
    }
    return model.eval(), processor, report


def train_projectors(
    model, processor, train: Bank, held_out: Bank, plan: Mapping[str, Any], seed: int, unfinished: Path | None = None,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Train the projectors by AdamW.

    Args:
        plan: ``base.bridge.align`` of params.yaml. ``precision`` is fp32 or bf16 (autocast). ``word_steps`` fit the
            projectors to words, before ``steps`` of questions; 0 starts from noise.
        unfinished: a file that keeps the training as it was at the last check. If it exists, training goes on from
            there, to the same weights as without an interruption.

    Returns the losses of `crab.models.base.words.fit`, and one record per check: step, stage, loss, and the accuracy of
    each skill.
    """
    projectors = [model.get_submodule(name).projector for name in PARTS]
    parameters = [p for part in projectors for p in part.requires_grad_(True).parameters()]
    steps, warm_up = plan["steps"], max(1, round(WARM_UP * plan["steps"]))
    optimizer = torch.optim.AdamW(parameters, lr=plan["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / max(1, steps)))),
    )
    sampler, checker = (
        BridgeSampler(bank, processor, np.random.default_rng(seed + n)) for n, bank in enumerate((train, held_out))
    )
    sampler.weights = checker.weights = TAUGHT
    packer = BridgePacker(model, processor, plan["precision"])
    if steps and plan["precision"] == "bf16":
        # the language model learns nothing: its weights are rounded once, not in each step
        model.language_model.to(torch.bfloat16).set_attn_implementation(attention("bf16", model.device))
        compile_layers(model.language_model)
    learning: Sequence[Any] = (*projectors, optimizer, schedule)
    state: dict[str, Any] = {"done": 0, "curves": {}, "history": []}
    if unfinished is not None and unfinished.exists():
        state, weights, draws = torch.load(unfinished, weights_only=True)
        for part, saved in zip(learning, weights, strict=True):
            part.load_state_dict(saved)
        sampler.rng.bit_generator.state, checker.rng.bit_generator.state = draws
    elif plan["word_steps"]:
        state["curves"] = words.fit(model, processor.tokenizer, train, plan["word_steps"], seed)
    losses: list[torch.Tensor] = []
    bar = tqdm(range(state["done"], steps), "projectors", initial=state["done"], total=steps, mininterval=5)
    for step in bar:
        if rows := sampler.draw(plan["batch_size"]):
            logits, target, _ = packer.logits(packer.pack(rows, train))
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.detach())
        schedule.step()
        if (step + 1) % plan["check_every"] == 0 or step + 1 == steps:
            report = curriculum.probe_accuracy(packer, checker, plan["check_contexts"], plan["batch_size"])
            accuracy = {skill: numbers["accuracy"] for skill, numbers in report.items()}
            record = {"step": step + 1, "stage": "alignment", "loss": torch.stack(losses).mean().item(), **accuracy}
            losses, state = [], {**state, "done": step + 1, "history": [*state["history"], record]}
            bar.write(f"step {step + 1}, loss {record['loss']:.3f}, accuracy {np.mean(list(accuracy.values())):.2f}")
            if unfinished is not None:
                draws = [part.rng.bit_generator.state for part in (sampler, checker)]
                with atomic_file(unfinished) as path:
                    torch.save((state, [part.state_dict() for part in learning], draws), path)
    return state["curves"], state["history"]
