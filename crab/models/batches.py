"""Batches of encoded samples: what each token is, the loss of the answers, and the last hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from crab.ilora import instruction_tokens
from crab.models import omni

SEGMENTS = ("text", "video", "audio", "answer")
PADDING = -1
#: One sample: ``input_ids`` [L], ``position_ids`` [3, L] and ``features`` [media, hidden], or a ``prompt`` to encode.
Sample = Mapping[str, torch.Tensor]

_INPUTS = ("inputs_embeds", "attention_mask", "position_ids")


def batch(model, tokenizer, samples: Sequence[Sample], answers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """`omni.collate` on the device of the model. Samples that are still a ``prompt`` go through its encoders first.

    ValueError if a base of another width encoded the samples.
    """
    samples = encoded(model, samples)
    width = model.get_input_embeddings().weight.shape[1]
    stored = samples[0]["features"].shape[1]
    if stored != width:
        raise ValueError(f"stored features are {stored} wide, the model {width}; run the encode stage with this base")
    return {name: value.to(model.device) for name, value in omni.collate(model, tokenizer, samples, answers).items()}


def encoded(model, samples: Sequence[Sample]) -> list[Sample]:
    """The samples, those with a ``prompt`` encoded; their features are rounded to 16 bit, as stored ones are."""
    results = iter(omni.encode(model, prompts) if (prompts := [s["prompt"] for s in samples if "prompt" in s]) else [])
    return [
        {**sample, **(own := next(results)), "features": own["features"].half()} if "prompt" in sample else sample
        for sample in samples
    ]


def segments(config, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The index in `SEGMENTS` of each token, int [B, L]; `PADDING` at padding.

    An image counts as video. The answer is what the model learns, with its end token.
    """
    ids = batch["input_ids"]
    kinds = torch.zeros_like(ids)
    kinds[(ids == config.video_token_id) | (ids == config.image_token_id)] = SEGMENTS.index("video")
    kinds[ids == config.audio_token_id] = SEGMENTS.index("audio")
    if "labels" in batch:
        kinds[batch["labels"] != omni.IGNORE] = SEGMENTS.index("answer")
    kinds[batch["attention_mask"] == 0] = PADDING
    return kinds


@contextmanager
def instruction_shown(model, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, routers with ``router_input="instruction"`` read the text of each prompt; for other models, nothing."""
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "router_input", None) == "instruction" for config in configs):
        with instruction_tokens(model, segments(model.config, batch) == SEGMENTS.index("text")):
            yield
    else:
        yield


def last_hidden(model, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of the last layer [B, L, hidden], of a PEFT model or a base."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    with instruction_shown(model, batch):
        return core.model(**{name: batch[name] for name in _INPUTS}, use_cache=False).last_hidden_state


def answer_loss(
    model, batch: Mapping[str, torch.Tensor], count: int | torch.Tensor | None = None, unwrapped=None
) -> tuple[torch.Tensor, object]:
    """Cross-entropy of the answers, with their end tokens, and the outputs of the model, whose logits are only these.

    Args:
        count: the sum is divided by this number of tokens; None for the number in the batch.
        unwrapped: the model without the wrapper of DDP, if there is one.
    """
    target = batch["labels"].roll(-1, 1)  # a position predicts the next token; no prompt begins with a label
    chosen = target != omni.IGNORE
    with instruction_shown(model, batch), omni.logits_at(unwrapped or model, chosen):
        outputs = model(**{name: batch[name] for name in _INPUTS}, use_cache=False)
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), target[chosen], reduction="sum")
    return total / (chosen.sum() if count is None else count), outputs
