"""Train the language model of a small base by stages, each advanced by its gate."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crab.data import files
from crab.world.scene import Scene
from crab.models.base import probes
from crab.models.base.bank import Bank
from crab.models.base.optimize import MuonAdamW, warm_up_then_decay
from crab.models.base.packing import Packer, Row
from crab.models.base.probes import Probe

#: Skills in the order they are taught. A stage keeps all earlier ones in the mix.
STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("text", ("copy", "read")),
    ("presence", ("visible", "heard")),
    ("selection", ("position", "colour", "motion", "at", "emotion", "voice", "seen at", "heard at", "still position", "still colour", "still heard")),
    ("space and time", ("still box", "box", "time seen", "time heard", "count seen", "count heard", "order", "video of", "sound of")),
    ("binding", ("which sounds", "where sounds", "still sounds", "still box sounds", "still box both", "still box around", "match", "which video", "which sound")),
    ("describing", ("sights told", "sounds told", "sources told", "boxes told", "caption")),
)


def initialize_from_words(model, norm: float = 5.0) -> None:
    """Give all word embeddings the length of media tokens' order, and start the head from them.

    Media tokens come out 7 to 20 long; beside them the first layers' outputs would drown a word of
    length 1, and with it the name of what is to be selected.
    """
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        unit = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-6)
        weight.copy_(norm * unit)
        model.lm_head.weight.copy_(0.3 * unit)  # at length 1 the first losses are 11, far above a uniform guess


class Sampler:
    """Draws packed rows of one context kind from a bank.

    Args:
        weights: skill -> how likely a probe of that skill is kept; 0 or missing leaves it out.
        vocabulary: words for copying.
    """

    def __init__(self, bank: Bank, vocabulary: list[str], rng: np.random.Generator, per_row: int = 8):
        self.bank, self.vocabulary, self.rng, self.per_row = bank, vocabulary, rng, per_row
        self.weights: dict[str, float] = {}

    def contexts(self) -> dict[str, float]:
        """Context kinds the present weights can use, with their shares of the steps."""
        heaviest = lambda skills: max((self.weights.get(s, 0) for s in skills), default=0)  # noqa: E731
        return {kind: share * heaviest(skills) for kind, (share, _, skills) in CONTEXTS.items()}

    def rows(self, kind: str, count: int) -> list[Row]:
        """About ``count`` rows' worth of one kind; short ones come in larger numbers."""
        return [getattr(self, f"_{kind}")() for _ in range(round(count * CONTEXTS[kind][1]))]

    def _keep(self, drawn: list[Probe]) -> list[Probe]:
        weight = np.array([self.weights.get(p.skill, 0.0) * RARE.get(p.skill, 1.0) for p in drawn])
        order = self.rng.random(len(drawn)) ** (1 / np.maximum(weight, 1e-9))  # weighted sampling without replacement
        order[weight == 0] = -1
        return [drawn[i] for i in np.argsort(-order)[: self.per_row] if order[i] >= 0]

    def _index(self) -> int:
        return int(self.rng.integers(len(self.bank.scenes)))

    def _text(self) -> Row:
        return Row([], self._keep([probes.copy_probe(self.vocabulary, self.rng) for _ in range(self.per_row)]))

    def _reading(self) -> Row:
        scenes = self.bank.scenes
        if self.rng.random() < 0.7:
            text, asked = probes.reading(scenes[self._index()], self.rng)
        else:
            which, a, b = self._ordered_pair()
            text, asked = probes.pair_reading(scenes[a], scenes[b], which, str(self.rng.choice(["video", "sound"])), self.rng)
        if self.rng.random() < 0.5:
            return Row([], self._keep(asked), text)
        return Row([], [replace(p, question=f"{p.question} {text}") for p in self._keep(asked)[:3]])  # the text anew with each

    def _clip(self) -> Row:
        i = self._index()
        return Row([("video", i), ("audio", i)], self._keep(probes.clip_probes(self.bank.scenes[i], self.rng)))

    def _still(self) -> Row:
        # of three, that in which most things sound: few stills have several, and what is asked of those is hard
        i = max((self._index() for _ in range(3)), key=self.bank.sources.__getitem__)
        drawn = probes.still_probes(self.bank.scenes[i], int(self.bank.seconds[i]), self.rng)
        return Row([("image", i), ("second", i)], self._keep(drawn))

    def _clip_told(self) -> Row:
        i = self._index()
        return Row([("video", i), ("audio", i)], self._keep(probes.clip_told(self.bank.scenes[i], self.rng)))

    def _still_told(self) -> Row:
        i = max(self._index(), self._index(), key=self.bank.sources.__getitem__)
        told = probes.still_told(self.bank.scenes[i], int(self.bank.seconds[i]), self.rng)
        return Row([("image", i), ("second", i)], self._keep(told))

    def _matching(self) -> tuple[int, int]:
        """A scene in which something is seen and heard, and another that does not hold it."""
        scenes = self.bank.scenes
        while True:
            i, j = self._index(), self._index()
            clear = lambda a, b: probes.shares_sound(scenes[a], scenes[a]) and not probes.shares_sound(scenes[a], scenes[b])  # noqa: E731
            if clear(i, j) and clear(j, i):
                return i, j

    def _ordered_pair(self) -> tuple[str, int, int]:
        """Which of two scenes is meant, first or second, and the two."""
        i, j = self._matching()
        return ("first", i, j) if self.rng.random() < 0.5 else ("second", j, i)

    def _match(self) -> Row:
        i, j = self._matching()
        same = self.rng.random() < 0.5
        probe = Probe("match", probes.wording("match", self.rng), "yes" if same else "no")
        return Row([("video", i), ("audio", i if same else j)], [probe])

    def _pair(self) -> Row:
        """Two videos and a sound, or two sounds and a video; what stands alone comes first, as in the tasks."""
        answer, a, b = self._ordered_pair()
        i = a if answer == "first" else b
        scenes = self.bank.scenes[a], self.bank.scenes[b]
        if self.rng.random() < 0.5:
            return Row([("audio", i), ("video", a), ("video", b)], self._of_pair("video", scenes, answer))
        return Row([("video", i), ("audio", a), ("audio", b)], self._of_pair("sound", scenes, answer))

    def _of_pair(self, what: str, scenes: tuple[Scene, Scene], answer: str) -> list[Probe]:
        which = Probe(f"which {what}", probes.wording(f"which {what}", self.rng), answer)
        told = probes.pair_told(*scenes, what, self.rng) if self.rng.random() < 0.5 else []  # long, beside the others
        return self._keep([which, *probes.pair_probes(*scenes, what, self.rng), *told])


#: Context kind -> share of the steps, rows beside the batch size, and the skills for whose sake it is drawn.
CONTEXTS: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "text": (0.2, 1, ("copy",)),
    "reading": (0.5, 1, ("read",)),
    "clip": (1.0, 1, (
        "visible", "heard", "colour", "motion", "position", "time seen", "time heard", "box", "at", "seen at", "heard at",
        "which sounds", "where sounds", "count seen", "count heard", "order", "emotion", "voice")),
    "still": (0.6, 1, (
        "still position", "still colour", "still heard", "still box", "still sounds", "still box sounds", "still box both", "still box around")),
    "match": (0.6, 3, ("match",)),
    "pair": (0.8, 2, ("which video", "which sound", "video of", "sound of")),
    # apart from the questions: sentences are long, and a step's loss is a mean over all that is said in it
    "clip_told": (0.5, 1, ("caption", "sights told", "sounds told", "sources told")),
    "still_told": (0.3, 1, ("sights told", "sounds told", "sources told", "boxes told")),
}  # fmt: skip

#: Questions that few scenes answer, and how much oftener one is kept when a scene does.
RARE = {
    "emotion": 4.0, "voice": 4.0, "box": 3.0, "still box": 2.0, "time heard": 3.0, "time seen": 3.0, "seen at": 2.0,
    "order": 2.0, "which sounds": 2.0, "where sounds": 2.0, "still sounds": 2.0, "still box sounds": 3.0, "caption": 3.0,
    "still box both": 2.0, "still box around": 4.0, "which video": 3.0, "which sound": 3.0,
}  # fmt: skip


@torch.no_grad()
def probe_accuracy(packer: Packer, sampler: Sampler, contexts: int, batch: int = 32) -> dict[str, dict[str, float]]:
    """Exact-match accuracy a skill, with the majority answer and the random-object picker beside it.

    An answer counts only when every token, end included, is the greedy choice given those before
    it, which is when greedy decoding would produce it.
    """
    right: dict[str, list[bool]] = {}
    said: dict[str, list[str]] = {}
    picker: dict[str, list[float]] = {}
    was_training = packer.model.training
    packer.model.eval()
    shares = {k: v for k, v in sampler.contexts().items() if v > 0}
    for kind in shares:
        for first in range(0, contexts, batch):
            rows = [r for r in sampler.rows(kind, min(batch, contexts - first)) if r.probes]
            packed = packer.pack(rows, sampler.bank)
            logits, target, where = packer.logits(packed)
            hit = logits.argmax(-1) == target
            width = packed["ids"].shape[1]
            blocks = packed["block"].flatten()[where].tolist()
            owner = (where // width).tolist()
            ok: dict[tuple[int, int], bool] = {}
            for h, r, b in zip(hit.tolist(), owner, blocks, strict=True):
                ok[r, b] = ok.get((r, b), True) and h
            for (r, b), good in ok.items():
                probe = rows[r].probes[b - 1]
                right.setdefault(probe.skill, []).append(good)
                said.setdefault(probe.skill, []).append(probe.answer)
                if probe.picked:
                    picker.setdefault(probe.skill, []).append(np.mean([p == probe.answer for p in probe.picked]))
    packer.model.train(was_training)
    report = {}
    for skill, hits in right.items():
        answers = said[skill]
        majority = max(map(answers.count, set(answers))) / len(answers)
        report[skill] = {
            "accuracy": float(np.mean(hits)),
            "majority": majority,
            "picker": float(np.mean(picker[skill])) if skill in picker else None,
            "n": len(hits),
        }
    return report


@dataclass
class Curriculum:
    """How long and how hard: steps, learning rate, and when a stage is done.

    Attributes:
        gate: accuracy every skill of a stage must reach before the next begins.
        stage_steps: most steps a stage may take before the next begins regardless.
        steps: all steps; the learning rate decays over the last three fifths, all skills in the mix.
        precision: ``bf16`` (autocast) or ``fp32``. With native bfloat16 a step on a CPU takes half the time, if
            attention is written out: the fused kernel's backward is slower in bfloat16 than in float32.
    """

    steps: int
    stage_steps: int
    gate: float
    batch_size: int
    learning_rate: float
    check_every: int
    seed: int
    precision: str = "fp32"
    per_row: int = 8
    history: list[dict] = field(default_factory=list)


def train_language_model(
    model, processor, train: Bank, held_out: Bank, plan: Curriculum, unfinished: Path | None = None
) -> list[dict]:
    """Run the staged curriculum; returns one record a check: step, stage, loss and accuracy a skill.

    Args:
        unfinished: a file that holds the training as it stood at the last check. Where it exists, training goes on
            from there, to the same weights as if it had never stopped.
    """
    rng = np.random.default_rng(plan.seed)
    sampler = Sampler(train, vocabulary(processor), rng, plan.per_row)
    checker = Sampler(held_out, vocabulary(processor), np.random.default_rng(plan.seed + 1), plan.per_row)
    packer = Packer(model, processor, plan.precision)
    lm = model.model.language_model
    attention = lm.config._attn_implementation
    if model.device.type == "cpu" and plan.precision == "bf16":
        lm.set_attn_implementation("eager")
    rest = [*lm.embed_tokens.parameters(), *lm.norm.parameters(), *model.lm_head.parameters()]
    optimizer = MuonAdamW(lm.layers, rest, plan.learning_rate, warm_up_then_decay(plan.steps, decay=0.6))
    learning = (model, *optimizer.optimizers, *optimizer.schedules)
    done, stage, since = 0, 0, 0
    accuracy: dict[str, float] = {}
    if unfinished is not None and unfinished.exists():
        kept = torch.load(unfinished, weights_only=True)
        done, stage, since, accuracy = kept["done"], kept["stage"], kept["since"], kept["accuracy"]
        plan.history[:] = kept["history"]
        for part, state in zip(learning, kept["learning"], strict=True):
            part.load_state_dict(state)
        for drawing, state in zip((rng, checker.rng), kept["draws"], strict=True):
            drawing.bit_generator.state = state
    model.train()
    bar = tqdm(range(done, plan.steps), desc="language model", initial=done, total=plan.steps, mininterval=5)
    running = []
    for step in bar:
        sampler.weights = stage_weights(stage, accuracy, plan.gate)
        shares = {k: v for k, v in sampler.contexts().items() if v > 0}
        kind = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
        rows = [r for r in sampler.rows(kind, plan.batch_size) if r.probes]
        if not rows:
            continue
        logits, target, _ = packer.logits(packer.pack(rows, train))
        loss = F.cross_entropy(logits, target)
        optimizer.step(loss)
        running.append(loss.detach())
        since += 1
        if (step + 1) % plan.check_every == 0 or step + 1 == plan.steps:
            checker.weights = {s: 1.0 for s in skills_until(stage)}
            report = probe_accuracy(packer, checker, contexts=96)
            accuracy = {k: v["accuracy"] for k, v in report.items()}
            mean_loss = torch.stack(running).mean().item()
            running = []
            plan.history.append({"step": step + 1, "stage": STAGES[stage][0], "loss": mean_loss, **accuracy})
            below = [f"{k} {v:.2f}" for k, v in sorted(accuracy.items(), key=lambda item: item[1]) if v < plan.gate]
            bar.write(f"step {step + 1}, {STAGES[stage][0]}, loss {mean_loss:.3f}; under the gate: {', '.join(below) or 'none'}")
            ready = all(accuracy.get(s, 0) >= plan.gate for s in STAGES[stage][1])
            if stage + 1 < len(STAGES) and (ready or since >= plan.stage_steps):
                stage, since = stage + 1, 0
            if unfinished is not None:
                draws = [rng.bit_generator.state, checker.rng.bit_generator.state]
                kept = {"done": step + 1, "stage": stage, "since": since, "accuracy": accuracy, "history": plan.history, "draws": draws}
                with files.atomic_file(unfinished) as path:
                    torch.save(kept | {"learning": [part.state_dict() for part in learning]}, path)
    lm.set_attn_implementation(attention)
    model.eval()
    return plan.history


def vocabulary(processor) -> list[str]:
    """The words copying draws from: all tokens but the special ones."""
    return sorted(set(processor.tokenizer.get_vocab()) - set(processor.tokenizer.all_special_tokens))


def skills_until(stage: int) -> list[str]:
    return [s for _, skills in STAGES[: stage + 1] for s in skills]


def stage_weights(stage: int, accuracy: dict[str, float], gate: float) -> dict[str, float]:
    """The newest skills and those still under their gate in full, what is mastered as replay."""
    new = set(STAGES[stage][1])
    return {s: 1.0 if s in new or accuracy.get(s, 0) < gate else 0.3 for s in skills_until(stage)}
