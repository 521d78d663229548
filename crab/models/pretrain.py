"""Train the language model of a small base by stages, each advanced by its gate.

The encoders are frozen by now and each scene is encoded once (:class:`Bank`). Several short
questions share one context: they are packed behind it under a block mask, with positions restarting
after the media, which costs little more than one question and is exactly what a single prompt sees.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crab.data import media, render
from crab.data.world import SECONDS, Scene
from crab.models import omni, perception, probes
from crab.models.probes import Probe

#: Skills in the order they are taught. A stage keeps all earlier ones in the mix.
STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("presence", ("copy", "follow", "visible", "heard")),
    ("selection", ("position", "colour", "motion", "at", "emotion", "heard at", "still position", "still colour", "still heard")),
    ("space and time", ("still box", "box", "time seen", "time heard", "count seen", "count heard", "order")),
    ("binding", ("which sounds", "where sounds", "still sounds", "still box sounds", "match", "which video", "which sound")),
    ("describing", ("caption",)),
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
        model.lm_head.weight.copy_(unit)


class Bank:
    """Scenes encoded once: ``video`` [N, V, width], ``audio`` [N, A, width], and for one second of
    each (``seconds`` [N]) ``image`` [N, I, width] and ``second`` (its sound) [N, S, width], in half precision.

    Args:
        through_files: write each clip as mp4, jpg and sound and read it back, as the data's samples are.
    """

    def __init__(
        self, model, processor, scenes: list[Scene], seed: int, workers: int = 0, batch: int = 16, through_files: bool = False
    ):
        self.scenes = scenes
        self.seconds = np.random.default_rng(seed).integers(SECONDS, size=len(scenes))
        views = _SceneMedia(processor, scenes, self.seconds, through_files)
        loader = torch.utils.data.DataLoader(views, batch, num_workers=workers, collate_fn=_join)
        parts: dict[str, list[torch.Tensor]] = {k: [] for k in ("video", "audio", "image", "second")}
        model.eval()
        with torch.no_grad():
            for patches, index, mel, window in tqdm(loader, desc="encoding scenes", mininterval=5):
                tokens = perception.see(model, patches).half()[index]  # [B, pairs + 1, cells, width]
                parts["video"].append(tokens[:, :-1].flatten(1, 2))
                parts["image"].append(tokens[:, -1])
                parts["audio"].append(perception.hear(model, mel).half())
                parts["second"].append(perception.hear(model, window).half())
        self.tokens = {k: torch.cat(v) for k, v in parts.items()}


class _SceneMedia(torch.utils.data.Dataset):
    """What the encoders take of each scene; equal pairs of frames are prepared once."""

    def __init__(self, processor, scenes, seconds, through_files):
        self.processor, self.scenes, self.seconds, self.through_files = processor, scenes, seconds, through_files

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i: int):
        scene, second, rate = self.scenes[i], int(self.seconds[i]), omni.SAMPLE_RATE
        pairs = [(s, s + 1) for s in range(0, SECONDS, 2)] + [(second, second)]
        if self.through_files:
            clip, still, wave = _round_trip(scene, second)
            look = list(range(len(pairs)))
            clips = [*(clip[[a, b]] for a, b in pairs[:-1]), np.stack([still, still])]
        else:
            looks = [tuple((t.seen_at(s), s % 2) for t in scene.things for s in pair) for pair in pairs]
            unique = sorted(set(looks))
            look = [unique.index(v) for v in looks]
            clips = [np.stack([render.frame(scene, s) for s in pairs[looks.index(u)]]) for u in unique]
            wave = render.waveform(scene)
        mel = perception.log_mel(self.processor, [wave])
        window = perception.log_mel(self.processor, [wave[second * rate : (second + 1) * rate]])
        return self.processor.video_processor(clips), look, mel, window


def _round_trip(scene: Scene, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten frames, one still and the sound of a scene as the data's files give them back."""
    with tempfile.TemporaryDirectory() as folder:
        video, image, sound = (Path(folder) / name for name in ("clip.mp4", "still.jpg", "sound.mp3"))
        media.write_video(video, render.frames(scene), render.FPS)
        media.write_image(image, render.frame(scene, second))
        media.write_audio(sound, render.waveform(scene))
        return media.read_video(video, SECONDS)[0], media.read_image(image), media.read_audio(sound)


def _join(items):
    patches, index, mel, window = zip(*items, strict=True)
    counts = np.cumsum([0, *(len(p["video_grid_thw"]) for p in patches)])
    index = torch.tensor([[first + i for i in own] for first, own in zip(counts, index)])
    joined = {k: torch.cat([p[k] for p in patches]) for k in patches[0]}
    return joined, index, torch.cat(mel), torch.cat(window)


@dataclass
class Row:
    """One packed training row: media from the bank, then probes.

    ``media`` lists (kind of token, scene index) in prompt order.
    """

    media: list[tuple[str, int]]
    probes: list[Probe]


#: The prompt a context stands in, by its media: clip, still, two videos, two sounds, none.
KINDS = {"video": "video", "audio": "audio", "image": "image", "second": "audio"}


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
        w = self.weights
        some = lambda *skills: max((w.get(s, 0) for s in skills), default=0)  # noqa: E731
        still = some(*(s for s in w if s.startswith("still")))
        clip = some(*(s for s in w if s in CLIP_SKILLS))
        pairs = some("which video", "which sound")
        return {"text": 0.25 * some("copy", "follow"), "clip": clip, "still": 0.5 * still, "match": some("match"),
                "pair": pairs, "caption": 0.5 * w.get("caption", 0)}

    def rows(self, kind: str, count: int) -> list[Row]:
        return [getattr(self, f"_{kind}")() for _ in range(count)]

    def _keep(self, drawn: list[Probe]) -> list[Probe]:
        weight = np.array([self.weights.get(p.skill, 0.0) for p in drawn])
        order = self.rng.random(len(drawn)) ** (1 / np.maximum(weight, 1e-9))  # weighted sampling without replacement
        order[weight == 0] = -1
        return [drawn[i] for i in np.argsort(-order)[: self.per_row] if order[i] >= 0]

    def _index(self) -> int:
        return int(self.rng.integers(len(self.bank.scenes)))

    def _text(self) -> Row:
        return Row([], self._keep([probes.copy_probe(self.vocabulary, self.rng) for _ in range(self.per_row)]))

    def _clip(self) -> Row:
        i = self._index()
        return Row([("video", i), ("audio", i)], self._keep(probes.clip_probes(self.bank.scenes[i], self.rng)))

    def _still(self) -> Row:
        i = self._index()
        drawn = probes.still_probes(self.bank.scenes[i], int(self.bank.seconds[i]), self.rng)
        return Row([("image", i), ("second", i)], self._keep(drawn))

    def _caption(self) -> Row:
        i = self._index()
        return Row([("video", i), ("audio", i)], [Probe("caption", "describe the scene .", probes.caption(self.bank.scenes[i]))])

    def _matching(self) -> tuple[int, int]:
        """A scene in which something is seen and heard, and another that does not hold it."""
        scenes = self.bank.scenes
        while True:
            i, j = self._index(), self._index()
            clear = lambda a, b: probes.shares_sound(scenes[a], scenes[a]) and not probes.shares_sound(scenes[a], scenes[b])  # noqa: E731
            if clear(i, j) and clear(j, i):
                return i, j

    def _match(self) -> Row:
        i, j = self._matching()
        same = self.rng.random() < 0.5
        probe = Probe("match", "do sight and sound match ?", "yes" if same else "no")
        return Row([("video", i), ("audio", i if same else j)], [probe])

    def _pair(self) -> Row:
        i, j = self._matching()
        first = self.rng.random() < 0.5
        a, b = (i, j) if first else (j, i)
        answer = "first" if first else "second"
        if self.rng.random() < 0.5:
            return Row([("video", a), ("video", b), ("audio", i)], [Probe("which video", "which video matches the sound ?", answer)])
        return Row([("video", i), ("audio", a), ("audio", b)], [Probe("which sound", "which sound matches the video ?", answer)])


CLIP_SKILLS = {
    "visible", "heard", "colour", "motion", "position", "time seen", "time heard", "box", "at", "heard at",
    "which sounds", "where sounds", "count seen", "count heard", "order", "emotion",
}  # fmt: skip


class Packer:
    """Turns rows of one context kind into tensors; templates of ids and positions are computed once."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.ids_of = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.templates: dict[tuple, tuple[list[int], torch.Tensor]] = {}

    def template(self, media, bank: Bank) -> tuple[list[int], torch.Tensor]:
        key = tuple(kind for kind, _ in media)
        if key not in self.templates:
            text = f"{omni.START} user "
            for kind in key:
                name = KINDS[kind]
                text += omni.PLACEHOLDER[name].replace(f"<|{name.upper()}|>", f"<|{name.upper()}|>" * bank.tokens[kind].shape[1])
            ids = torch.tensor([self.ids_of(text)])
            m = self.processor.video_processor.merge_size
            side = self.processor.video_processor.side // self.processor.video_processor.patch_size
            inputs = {"input_ids": ids}
            videos, images = key.count("video"), key.count("image")
            if videos:
                steps = bank.tokens["video"].shape[1] * m * m // side**2
                inputs["video_grid_thw"] = torch.tensor([[steps, side, side]] * videos)
                inputs["video_second_per_grid"] = torch.tensor([SECONDS / steps] * videos)
            if images:
                inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * images)
            mel = torch.tensor([bank.tokens[k].shape[1] * 4 for k in key if KINDS[k] == "audio"])
            positions = omni.prompt_positions(self.model, inputs, mel if len(mel) else None)
            self.templates[key] = ids[0].tolist(), positions
        return self.templates[key]

    def pack(self, rows: list[Row], bank: Bank) -> dict[str, torch.Tensor]:
        """ids [B, L], position_ids [3, B, L], block [B, L] (0 context, -1 padding), target [B, L], probe [B, L]."""
        prefix, prefix_positions = self.template(rows[0].media, bank)
        start = int(prefix_positions.max()) + 1
        turn = self.ids_of(f"{omni.END} {omni.START} assistant")
        built = []
        for row in rows:
            ids, positions, block, target = list(prefix), [], [0] * len(prefix), [omni.IGNORE] * len(prefix)
            for k, probe in enumerate(row.probes, 1):
                question = self.ids_of(probe.question) + turn
                answer = [*self.ids_of(probe.answer), self.tokenizer.eos_token_id]
                ids += question + answer
                target += [omni.IGNORE] * (len(question) - 1) + answer + [omni.IGNORE]
                block += [k] * (len(question) + len(answer))
                positions += range(start, start + len(question) + len(answer))
            built.append((ids, positions, block, target))
        width = max(len(b[0]) for b in built)
        size = len(rows)
        out = {
            "ids": torch.full((size, width), self.tokenizer.pad_token_id),
            "block": torch.full((size, width), -1),
            "target": torch.full((size, width), omni.IGNORE),
        }
        place = torch.zeros(3, size, width, dtype=torch.long)
        for i, (ids, positions, block, target) in enumerate(built):
            out["ids"][i, : len(ids)] = torch.tensor(ids)
            out["block"][i, : len(ids)] = torch.tensor(block)
            out["target"][i, : len(ids)] = torch.tensor(target)
            place[:, i, : len(prefix)] = prefix_positions
            place[:, i, len(prefix) : len(ids)] = torch.tensor(positions, dtype=torch.long)
        device = self.model.device
        out = {k: v.to(device) for k, v in out.items()} | {"position_ids": place.to(device)}
        out["media"] = [
            torch.cat([bank.tokens[kind][i] for kind, i in row.media]) if row.media else None for row in rows
        ]
        return out

    def logits(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits at answer positions [M, vocabulary], targets [M], and flat position index [M]."""
        model = self.model
        embeds = model.get_input_embeddings()(batch["ids"])
        if batch["media"][0] is not None:
            at = omni.media_mask(model.config, batch["ids"].cpu()).to(embeds.device)
            embeds = embeds.masked_scatter(at[..., None], torch.cat(batch["media"]).to(embeds))
        block = batch["block"]
        length = block.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
        visible = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        mask = (causal & visible)[:, None]
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        where = (batch["target"] != omni.IGNORE).flatten().nonzero()[:, 0]
        return model.lm_head(hidden.flatten(0, 1)[where]), batch["target"].flatten()[where], where


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
        steps: all steps; the learning rate decays over the last third, all skills in the mix.
    """

    steps: int
    stage_steps: int
    gate: float
    batch_size: int
    learning_rate: float
    check_every: int
    seed: int
    per_row: int = 8
    history: list[dict] = field(default_factory=list)


def train_language_model(model, processor, train: Bank, held_out: Bank, plan: Curriculum) -> list[dict]:
    """Run the staged curriculum; returns one record a check: step, stage, loss and accuracy a skill."""
    rng = np.random.default_rng(plan.seed)
    sampler = Sampler(train, vocabulary(processor), rng, plan.per_row)
    checker = Sampler(held_out, vocabulary(processor), np.random.default_rng(plan.seed + 1), plan.per_row)
    packer = Packer(model, processor)
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    decay_from = plan.steps * 2 // 3
    scale = lambda s: min(1, s / 100) * (1 if s < decay_from else max(0.02, (plan.steps - s) / (plan.steps - decay_from)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    stage, since = 0, 0
    accuracy: dict[str, float] = {}
    model.train()
    bar = tqdm(range(plan.steps), desc="language model", mininterval=5)
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
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
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
