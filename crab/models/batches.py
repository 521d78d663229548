"""Batches of encoded samples: what each token is, the loss of the answers, and the last hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch

from crab.ilora import instruction_tokens
from crab.models import omni

SEGMENTS = ("text", "video", "audio", "answer")
PADDING = -1
#: One sample: ``input_ids`` [L], ``position_ids`` [3, L] and ``features`` [media, hidden], or a ``prompt`` to encode.
Sample = Mapping[str, torch.Tensor]

_INPUTS = ("inputs_embeds", "attention_mask", "position_ids")
_UNEMBEDDED = ("input_ids", "attention_mask", "position_ids")


def batch(
    model, tokenizer, samples: Sequence[Sample], answers: Sequence[str] | None = None, embed: bool = True
) -> dict[str, torch.Tensor]:
    """`omni.collate` on the device of the model. Samples that are still a ``prompt`` go through its encoders first.

    Without ``embed`` it is `omni.padded`, which reads no weights; `answer_loss` takes it, too.

    ValueError if a base of another width encoded the samples.
    """
    samples = encoded(model, samples)
    width = model.config.get_text_config().hidden_size
    stored = samples[0]["features"].shape[1]
    if stored != width:
        raise ValueError(f"stored features are {stored} wide, the model {width}; run the encode stage with this base")
    together = omni.collate(model, tokenizer, samples, answers) if embed else omni.padded(tokenizer, samples, answers)
    return {name: value.to(model.device) for name, value in together.items()}


def encoded(model, samples: Sequence[Sample]) -> list[Sample]:
    """The samples, those with a ``prompt`` encoded. Features are rounded to 16 bit, as stored ones are.

    Those of adapted encoders cannot be stored. They are not rounded, and have gradients in training.
    """
    prompts = [sample["prompt"] for sample in samples if "prompt" in sample]
    if not prompts:
        return list(samples)
    results, exact = iter(omni.encode(model, prompts)), omni.adapts_encoders(model)
    return [
        {**sample, **(own := next(results)), "features": own["features"] if exact else own["features"].half()}
        if "prompt" in sample
        else sample
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
        batch: that `batch` made, with or without ``embed``.
        count: the sum is divided by this number of tokens; None for the number in the batch.
        unwrapped: the model without the wrapper of DDP or DeepSpeed, if there is one.
    """
    bare = unwrapped or model
    shown = omni.features_shown(bare, batch) if "features" in batch else nullcontext()
    names = _UNEMBEDDED if "features" in batch else _INPUTS
    target = batch["labels"].roll(-1, 1)  # a position predicts the next token; no prompt begins with a label
    chosen = target != omni.IGNORE
    with instruction_shown(model, batch), shown, omni.logits_at(bare, chosen):
        outputs = model(**{name: batch[name] for name in names}, use_cache=False)
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), target[chosen], reduction="sum")
    return total / (chosen.sum() if count is None else count), outputs
