"""Many short questions in one row of training: media first, then the questions side by side.

They share one context under a block mask, with positions restarting after the media. That costs little more
than one question, and each sees exactly what it would see as a single prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crab.data.world import SECONDS
from crab.models import omni
from crab.models.bank import Bank
from crab.models.probes import Probe


@dataclass
class Row:
    """One packed training row: media from the bank, then probes.

    ``media`` lists (kind of token, scene index) in prompt order.
    """

    media: list[tuple[str, int]]
    probes: list[Probe]


#: The prompt a context stands in, by its media: clip, still, two videos, two sounds, none.
KINDS = {"video": "video", "audio": "audio", "image": "image", "second": "audio"}


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
