"""Train the language model of a small base by stages. The gate of each stage opens the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crab.core.files import atomic_file
from crab.models.base import probes
from crab.models.base.bank import Bank
from crab.models.base.optimize import MuonAdamW, warm_up_then_decay
from crab.models.base.packing import Packer, Row
from crab.models.base.probes import SKILLS, STAGES, Probe
from crab.models.batches import attention

PROBES_PER_ROW = 8
REPLAY = 0.3  # weight of a skill that has passed its gate
#: Kinds of context: share of the steps, and rows as a multiple of the batch size (short rows come in larger numbers).
CONTEXTS = {
    "text": (0.2, 1),
    "reading": (0.5, 1),
    "clip": (1.0, 1),
    "still": (0.6, 1),
    "match": (0.6, 3),
    "pair": (0.8, 2),
    # apart from the questions: sentences are long, and the loss of a step is a mean over all its answer tokens
    "clip_told": (0.5, 1),
    "still_told": (0.3, 1),
}


class Sampler:
    """Draws rows of one kind of context from a bank.

    ``weights`` say by skill how likely a probe is kept; 0 or missing leaves it out.
    """

    def __init__(self, bank: Bank, processor, rng: np.random.Generator):
        self.bank, self.rng = bank, rng
        tokenizer = processor.tokenizer
        self.vocabulary = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))  # to copy
        self.weights: dict[str, float] = {}

    def contexts(self) -> dict[str, float]:
        """The kinds of context that practise a skill of some weight, with their shares of the steps."""
        shares = {}
        for kind, (share, _) in CONTEXTS.items():
            heaviest = max(self.weights.get(name, 0) for name, skill in SKILLS.items() if kind in skill.contexts)
            if heaviest > 0:
                shares[kind] = share * heaviest
        return shares

    def draw(self, count: int) -> list[Row]:
        """Rows of one kind, which is drawn by its share of the steps."""
        shares = self.contexts()
        kind = self.rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values()))
        return self.rows(str(kind), count)

    def rows(self, kind: str, count: int) -> list[Row]:
        """Rows of one kind, about as long as ``count`` rows of a clip. Rows without a probe are left out."""
        rows = [getattr(self, f"_{kind}")() for _ in range(round(count * CONTEXTS[kind][1]))]
        return [row for row in rows if row.probes]

    def _keep(self, drawn: list[Probe]) -> list[Probe]:
        weight = np.array([self.weights.get(p.skill, 0.0) * SKILLS[p.skill].rarity for p in drawn])
        order = self.rng.random(len(drawn)) ** (1 / np.maximum(weight, 1e-9))  # weighted, without replacement
        order[weight == 0] = -1
        return [drawn[i] for i in np.argsort(-order)[:PROBES_PER_ROW] if order[i] >= 0]

    def _index(self) -> int:
        return int(self.rng.integers(len(self.bank.scenes)))

    def _text(self) -> Row:
        return Row([], self._keep([probes.copy_probe(self.vocabulary, self.rng) for _ in range(PROBES_PER_ROW)]))

    def _reading(self) -> Row:
        scenes = self.bank.scenes
        if self.rng.random() < 0.7:
            text, asked = probes.reading(scenes[self._index()], self.rng)
        else:
            which, a, b = self._ordered_pair()
            what = str(self.rng.choice(["video", "sound"]))
            text, asked = probes.pair_reading(scenes[a], scenes[b], which, what, self.rng)
        if self.rng.random() < 0.5:
            return Row([], self._keep(asked), text)
        return Row([], [replace(p, question=f"{p.question} {text}") for p in self._keep(asked)[:3]])  # text after each

    def _clip(self, draw=probes.clip_probes) -> Row:
        i = self._index()
        return Row([("video", i), ("audio", i)], self._keep(draw(self.bank.scenes[i], self.rng)))

    _clip_told = partialmethod(_clip, probes.clip_told)

    def _still(self, draw=probes.still_probes, scenes: int = 3) -> Row:
        # the one in which most things sound: few stills have several sounds, and questions about those are hard
        i = max((self._index() for _ in range(scenes)), key=self.bank.sources.__getitem__)
        drawn = draw(self.bank.scenes[i], int(self.bank.seconds[i]), self.rng)
        return Row([("image", i), ("second", i)], self._keep(drawn))

    _still_told = partialmethod(_still, probes.still_told, scenes=2)

    def _matching(self) -> tuple[int, int]:
        """Two scenes that both have something seen and heard, which the other one has not."""
        scenes = self.bank.scenes
        while True:
            i, j = self._index(), self._index()
            if probes.sounds_alone(scenes[i], scenes[j]) and probes.sounds_alone(scenes[j], scenes[i]):
                return i, j

    def _ordered_pair(self) -> tuple[str, int, int]:
        """Which of two scenes is meant, first or second, and the two."""
        i, j = self._matching()
        return ("first", i, j) if self.rng.random() < 0.5 else ("second", j, i)

    def _match(self) -> Row:
        i, j = self._matching()
        same = self.rng.random() < 0.5
        asked = probes.probe("match", self.rng, "yes" if same else "no")
        return Row([("video", i), ("audio", i if same else j)], [asked])

    def _pair(self) -> Row:
        """Two videos and a sound, or two sounds and a video. The single one comes first, as in the tasks."""
        answer, a, b = self._ordered_pair()
        scenes = self.bank.scenes[a], self.bank.scenes[b]
        single, double, what = ("audio", "video", "video") if self.rng.random() < 0.5 else ("video", "audio", "sound")
        which = probes.probe(f"which {what}", self.rng, answer)
        long = [probes.pair_told(*scenes, what, self.rng)] if self.rng.random() < 0.5 else []  # beside the others
        asked = [which, *probes.pair_probes(*scenes, what, self.rng), *long]
        return Row([(single, a if answer == "first" else b), (double, a), (double, b)], self._keep(asked))


@torch.no_grad()
def probe_accuracy(packer: Packer, sampler: Sampler, contexts: int, batch: int = 32) -> dict[str, dict[str, float]]:
    """Exact-match accuracy of each skill, beside the majority answer and a reader that picks a random thing.

    An answer is right only if each of its tokens, with the end, is the greedy choice after those before it. Greedy
    decoding would then produce it.
    """
    results: dict[str, list[tuple[bool, str, float | None]]] = {}
    was_training = packer.model.training
    packer.model.eval()
    for kind in sampler.contexts():
        for first in range(0, contexts, batch):
            rows = sampler.rows(kind, min(batch, contexts - first))
            packed = packer.pack(rows, sampler.bank)
            logits, target, index = packer.logits(packed)
            blocks = packed["block"].flatten()[index].tolist()
            owners = (index // packed["block"].shape[1]).tolist()
            right: dict[tuple[int, int], bool] = {}
            for row, block, hit in zip(owners, blocks, (logits.argmax(-1) == target).tolist(), strict=True):
                right[row, block] = right.get((row, block), True) and hit
            for (row, block), hit in right.items():
                probe = rows[row].probes[block - 1]
                picker = np.mean([p == probe.answer for p in probe.picked]) if probe.picked else None
                results.setdefault(probe.skill, []).append((hit, probe.answer, picker))
    packer.model.train(was_training)
    report = {}
    for skill, rows in results.items():
        hits, answers, pickers = zip(*rows, strict=True)
        pickers = [p for p in pickers if p is not None]
        report[skill] = {
            "accuracy": float(np.mean(hits)),
            "majority": Counter(answers).most_common(1)[0][1] / len(rows),
            "picker": float(np.mean(pickers)) if pickers else None,
            "n": len(rows),
        }
    return report


def train_language_model(
    model, processor, train: Bank, held_out: Bank, plan: Mapping[str, Any], seed: int, unfinished: Path | None = None,
    keep: Callable[[int, list[dict]], None] | None = None, until: int | None = None,
) -> list[dict]:  # fmt: skip
    """Run the staged curriculum; returns one record per check: step, stage, loss, and the accuracy of each skill.

    Args:
        plan: ``base.language`` of params.yaml. The learning rate decays over the last three fifths of ``steps``. The
            next stage begins when every skill of a stage has the accuracy ``gate``, or after ``stage_steps``.
            ``precision`` is fp32 or bf16 (autocast), which takes half the time on a CPU with native bfloat16.
        unfinished: a file that keeps the training as it was at the last check. If it exists, training goes on from
            there, to the same weights as without an interruption.
        keep: called after each check, with the number of steps and the records so far, to keep the model as it is.
        until: stop after this many of the steps.
    """
    if plan["precision"] not in ("bf16", "fp32"):
        raise ValueError(f"base.language.precision: {plan['precision']!r} is unknown; use bf16 or fp32")
    _start_from_words(model)
    sampler = Sampler(train, processor, np.random.default_rng(seed))
    checker = Sampler(held_out, processor, np.random.default_rng(seed + 1))
    packer = Packer(model, processor, plan["precision"])
    core, head = model.model.language_model, model.lm_head
    usual = core.config._attn_implementation
    core.set_attn_implementation(attention(plan["precision"], model.device))
    rest = [*core.embed_tokens.parameters(), *core.norm.parameters(), *head.parameters()]
    steps, gate = until or plan["steps"], plan["gate"]
    optimizer = MuonAdamW(core.layers, rest, plan["learning_rate"], warm_up_then_decay(plan["steps"]))
    learning = (model, *optimizer.optimizers, *optimizer.schedules)
    state = {"done": 0, "stage": 0, "since": 0, "accuracy": {}, "history": []}
    if unfinished is not None and unfinished.exists():
        state, weights, draws = torch.load(unfinished, weights_only=True)
        for part, saved in zip(learning, weights, strict=True):
            part.load_state_dict(saved)
        sampler.rng.bit_generator.state, checker.rng.bit_generator.state = draws
    stages = list(STAGES)
    model.train()
    bar = tqdm(range(state["done"], steps), "language model", initial=state["done"], total=steps, mininterval=5)
    losses = []
    for step in bar:
        sampler.weights = stage_weights(state["stage"], state["accuracy"], gate)
        rows = sampler.draw(plan["batch_size"])
        if not rows:
            continue
        logits, target, _ = packer.logits(packer.pack(rows, train))
        loss = F.cross_entropy(logits, target)
        optimizer.step(loss)
        losses.append(loss.detach())
        state["since"] += 1
        if (step + 1) % plan["check_every"] and step + 1 < steps:
            continue
        stage = stages[state["stage"]]
        checker.weights = dict.fromkeys(sampler.weights, 1.0)
        report = probe_accuracy(packer, checker, contexts=96)
        accuracy = {skill: numbers["accuracy"] for skill, numbers in report.items()}
        record = {"step": step + 1, "stage": stage, "loss": torch.stack(losses).mean().item(), **accuracy}
        losses = []
        below = sorted((value, skill) for skill, value in accuracy.items() if value < gate)
        below = ", ".join(f"{skill} {value:.2f}" for value, skill in below) or "none"
        bar.write(f"step {step + 1}, {stage}, loss {record['loss']:.3f}; under the gate: {below}")
        state |= {"done": step + 1, "accuracy": accuracy, "history": [*state["history"], record]}
        ready = all(accuracy.get(skill, 0) >= gate for skill in STAGES[stage])
        if stage != stages[-1] and (ready or state["since"] >= plan["stage_steps"]):
            state |= {"stage": state["stage"] + 1, "since": 0}
        if keep is not None:
            keep(step + 1, state["history"])
        if unfinished is not None:
            draws = [part.rng.bit_generator.state for part in (sampler, checker)]
            with atomic_file(unfinished) as path:
                torch.save((state, [part.state_dict() for part in learning], draws), path)
    core.set_attn_implementation(usual)
    model.eval()
    return state["history"]


def _start_from_words(model, norm: float = 5.0) -> None:
    """Make the language model trainable, with all word embeddings as long as media tokens, and the head their copy.

    Media tokens are 7 to 20 long. Beside them the first layers would lose a word of length 1, and with it the name of
    what is to be selected.
    """
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        unit = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-6)
        weight.copy_(norm * unit)
        model.lm_head.weight.copy_(0.3 * unit)  # at length 1 the first losses are 11, far above a uniform guess


def stage_weights(stage: int, accuracy: Mapping[str, float], gate: float) -> dict[str, float]:
    """By skill of the stages so far: 1 for the newest and for those under their gate, `REPLAY` for the others."""
    taught = list(STAGES.values())[: stage + 1]
    skills = [skill for group in taught for skill in group]
    return {s: 1.0 if s in taught[-1] or accuracy.get(s, 0) < gate else REPLAY for s in skills}
