"""Many short questions in one row of training: media or text first, then the questions side by side.

The questions share one context. A block mask hides them from each other, and the positions of each start after the
context. So each question sees what it would see as a single prompt, and many cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from crab.models import omni
from crab.models.base.bank import Bank
from crab.models.base.probes import Probe
from crab.models.batches import media_mask
from crab.world.scene import SECONDS, SIZE

#: Media of the right shape for each key of `Bank.tokens`, from which the processor makes the prompt.
BLANK = {
    "video": omni.Media("video", np.zeros((SECONDS, SIZE, SIZE, 3), np.uint8)),
    "audio": omni.Media("audio", np.zeros(SECONDS * omni.SAMPLE_RATE, np.float32)),
    "image": omni.Media("image", np.zeros((SIZE, SIZE, 3), np.uint8)),
    "second": omni.Media("audio", np.zeros(omni.SAMPLE_RATE, np.float32)),
}


@dataclass
class Row:
    """One row of training: ``media`` as (key of `Bank.tokens`, index of the scene), then ``text``, then ``probes``."""

    media: list[tuple[str, int]]
    probes: list[Probe]
    text: str = ""


class Packer:
    """Turns rows of one kind of context into tensors, and these into logits."""

    def __init__(self, model, processor, precision: str = "fp32"):
        self.model, self.processor, self.precision = model, processor, precision
        self.tokenizer = processor.tokenizer
        self.turn = self._ids(self._turn())
        self.templates: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _turn(self) -> str:
        """The text between a question and its answer."""
        return f"{omni.END} {omni.START} assistant"

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def template(self, kinds: tuple[str, ...], bank: Bank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The prompt up to the end of its media: ids [L], positions [3, L], and the order of the features [media].

        The order takes the features of all media, one after the other, to their placeholders.
        """
        if kinds not in self.templates:
            prompt, end = omni.prepare(self.processor, [BLANK[kind] for kind in kinds], ""), -len(self.turn)
            ids, positions = prompt["input_ids"][0, :end], omni.prompt_positions(self.model, prompt)[:, :end]
            # tokens of one kind stand in the order of their media, but video and sound may take turns
            placed = ids[media_mask(self.model.config, ids)]
            token = {kind: self._ids(omni.SPECIAL[f"{BLANK[kind].kind}_token"]) for kind in kinds}
            stored = [i for kind in kinds for i in token[kind] * bank.tokens[kind].shape[1]]
            order = torch.empty_like(placed)
            order[placed.argsort(stable=True)] = torch.tensor(stored, dtype=torch.long).argsort(stable=True)
            self.templates[kinds] = ids, positions, order
        return self.templates[kinds]

    def pack(self, rows: Sequence[Row], bank: Bank) -> dict:
        """ids [B, L], position_ids [3, B, L], block [B, L], target [B, L], and media: the features of each row.

        Block 0 is the context, k the k-th probe of a row, -1 padding. The template of the first row serves all rows,
        also where pairs of videos and pairs of sounds mix: the base in git was trained so.
        """
        prefix, prefix_positions, order = self.template(tuple(kind for kind, _ in rows[0].media), bank)
        columns: dict[str, list[torch.Tensor]] = {"ids": [], "position_ids": [], "block": [], "target": []}
        for row in rows:
            ids = [*prefix.tolist(), *self._ids(row.text)]
            first = int(prefix_positions.max()) + 1
            start = first + len(ids) - len(prefix)
            positions = list(range(first, start))
            block, target = [0] * len(ids), [omni.IGNORE] * len(ids)
            for number, probe in enumerate(row.probes, 1):
                question = self._ids(probe.question) + self.turn
                answer = [*self._ids(probe.answer), self.tokenizer.eos_token_id]
                ids += question + answer
                target += [omni.IGNORE] * (len(question) - 1) + answer + [omni.IGNORE]
                block += [number] * (len(question) + len(answer))
                positions += range(start, start + len(question) + len(answer))
            after = torch.tensor(positions, dtype=torch.long).expand(3, -1)
            columns["position_ids"].append(torch.cat([prefix_positions, after], 1).T)
            for name, values in (("ids", ids), ("block", block), ("target", target)):
                columns[name].append(torch.tensor(values))
        padding = {"ids": self.tokenizer.pad_token_id, "position_ids": 0, "block": -1, "target": omni.IGNORE}
        out = {name: pad_sequence(parts, True, padding[name]).to(self.model.device) for name, parts in columns.items()}
        media = [self.media(row, bank, order) for row in rows if row.media]
        return {**out, "position_ids": out["position_ids"].permute(2, 0, 1).contiguous(), "media": media}

    def media(self, row: Row, bank: Bank, order: torch.Tensor) -> torch.Tensor:
        """Features of one row, in the order of their placeholders."""
        return torch.cat([bank.tokens[kind][i] for kind, i in row.media])[order]

    def logits(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits at the answer tokens [M, vocabulary], their targets [M], and their index in the flat batch [M]."""
        embeds = self.model.get_input_embeddings()(batch["ids"])
        if batch["media"]:
            at = media_mask(self.model.config, batch["ids"])
            embeds = embeds.index_put((at,), self.features(batch["media"]).to(embeds))
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            hidden = self.hidden(embeds, visible(batch["block"]), batch["position_ids"])
            index = (batch["target"] != omni.IGNORE).flatten().nonzero()[:, 0]
            logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[index]).float()
        return logits, batch["target"].flatten()[index], index

    def features(self, media: list) -> torch.Tensor:
        """Features of all rows, [media, width], in the order of their placeholders."""
        return torch.cat(media)

    def hidden(self, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states of the last layer, [B, L, width]."""
        core = self.model.model.language_model
        return core(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state


def visible(block: torch.Tensor) -> torch.Tensor:
    """Numbers to add to the scores of attention, float32 [B, 1, L, L], which every implementation of it takes.

    A token sees the context and its own block, up to itself. ``block`` is int [B, L], see `Packer.pack`.
    """
    causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool, device=block.device).tril()
    together = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    allowed = (causal & together)[:, None]
    mask = torch.zeros(allowed.shape, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(torch.float32).min)
