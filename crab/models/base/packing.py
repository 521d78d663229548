"""Many short questions in one row of training: media or text first, then the questions side by side.

They share one context under a block mask, with positions restarting after the media. That costs little more
than one question, and each sees exactly what it would see as a single prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crab.world.scene import SECONDS
from crab.models import omni
from crab.models.base.bank import Bank
from crab.models.base.probes import Probe


@dataclass
class Row:
    """One packed training row: media from the bank, then probes.

    ``media`` lists (kind of token, scene index) in prompt order; ``text`` follows them.
    """

    media: list[tuple[str, int]]
    probes: list[Probe]
    text: str = ""


#: The prompt a context stands in, by its media: clip, still, two videos, two sounds, none.
KINDS = {"video": "video", "audio": "audio", "image": "image", "second": "audio"}
TOKEN = {kind: omni.SPECIAL[f"{kind}_token"] for kind in ("video", "audio", "image")}


class Packer:
    """Turns rows of one context kind into tensors; templates of ids and positions are computed once."""

    def __init__(self, model, processor, precision: str = "fp32"):
        self.model, self.processor, self.precision = model, processor, precision
        self.tokenizer = processor.tokenizer
        self.ids_of = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.templates: dict[tuple, tuple[list[int], torch.Tensor, torch.Tensor]] = {}

    def template(self, media, bank: Bank) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Of a context: ids, positions [3, L], and for each placeholder the row of the media, laid end to end, that it takes."""
        key = tuple(kind for kind, _ in media)
        if key not in self.templates:
            kinds = [KINDS[kind] for kind in key]
            counts = [bank.tokens[kind].shape[1] for kind in key]
            merge = self.processor.video_processor.merge_size
            side = self.processor.video_processor.side // self.processor.video_processor.patch_size
            inputs = {}
            if "video" in kinds:
                steps = counts[kinds.index("video")] * merge**2 // side**2
                inputs["video_grid_thw"] = torch.tensor([[steps, side, side]] * kinds.count("video"))
                inputs["video_second_per_grid"] = [SECONDS / steps] * kinds.count("video")
            if "image" in kinds:
                inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * kinds.count("image"))
            sounds = torch.tensor([count for kind, count in zip(kinds, counts, strict=True) if kind == "audio"])
            if omni.interleaves(kinds):
                turns = self.processor.replace_video_with_audio_token(
                    inputs, 0, {"num_audio_tokens": sounds.tolist()}, 0, **omni.clock(self.processor)
                )
                text = omni.PLACEHOLDER["video"].replace(TOKEN["video"], turns)
            else:
                text = "".join(omni.PLACEHOLDER[k].replace(TOKEN[k], TOKEN[k] * n) for k, n in zip(kinds, counts, strict=True))
            ids = torch.tensor(self.ids_of(f"{omni.START} user {text}"))
            positions = omni.prompt_positions(self.model, inputs | {"input_ids": ids[None]}, 4 * sounds if len(sounds) else None)
            # tokens of one kind come in the order of their media, but sight and sound may take turns
            placed = ids[omni.media_mask(self.model.config, ids)]
            laid = torch.tensor([i for k, n in zip(kinds, counts, strict=True) for i in self.ids_of(TOKEN[k]) * n], dtype=torch.long)
            order = torch.empty_like(placed)
            order[placed.argsort(stable=True)] = laid.argsort(stable=True)
            self.templates[key] = ids.tolist(), positions, order
        return self.templates[key]

    def pack(self, rows: list[Row], bank: Bank) -> dict[str, torch.Tensor]:
        """ids [B, L], position_ids [3, B, L], block [B, L] (0 context, -1 padding), target [B, L], probe [B, L]."""
        prefix, prefix_positions, order = self.template(rows[0].media, bank)
        turn = self.ids_of(f"{omni.END} {omni.START} assistant")
        built = []
        for row in rows:
            ids = [*prefix, *self.ids_of(row.text)]
            start = int(prefix_positions.max()) + 1 + len(ids) - len(prefix)
            positions = list(range(start - len(ids) + len(prefix), start))
            block, target = [0] * len(ids), [omni.IGNORE] * len(ids)
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
            torch.cat([bank.tokens[kind][i] for kind, i in row.media])[order] if row.media else None for row in rows
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
        allowed = (causal & visible)[:, None]
        # as numbers to add, which every attention implementation takes
        mask = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)
        with omni.autocast(model.device, self.precision):
            hidden = model.model.language_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
            where = (batch["target"] != omni.IGNORE).flatten().nonzero()[:, 0]
            logits = model.lm_head(hidden.flatten(0, 1)[where]).float()
        return logits, batch["target"].flatten()[where], where
