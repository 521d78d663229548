"""Batches of encoded samples for any model: padding, features at their placeholders, loss, and hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from crab.ilora import instruction_tokens
from crab.models.protocol import IGNORE, model_of

SEGMENTS = ("text", "video", "audio", "answer")
PADDING = -1
#: One sample: ``input_ids`` [L], ``position_ids`` [3, L] and ``features`` [media, hidden], or a ``prompt`` to encode.
Sample = Mapping[str, torch.Tensor]

INPUTS = ("inputs_embeds", "attention_mask", "position_ids")


def media_mask(config, ids: torch.Tensor) -> torch.Tensor:
    """True at placeholder tokens."""
    tokens = [config.image_token_id, config.video_token_id, config.audio_token_id]
    return torch.isin(ids, torch.tensor(tokens, device=ids.device))


def bare(model):
    """The base inside a PEFT model, or the base itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attention(precision: str, device: torch.device) -> str:
    """The implementation of attention to train with. On CPUs the backward pass of torch's fused one is slow in bf16."""
    return "eager" if precision == "bf16" and device.type == "cpu" else "sdpa"


def adapts_encoders(model) -> bool:
    """Whether adapters are in the encoders, ``visual`` and ``audio_tower``. Features then depend on them."""
    adapted = (name.split(".") for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return any("visual" in path or "audio_tower" in path for path in adapted)


def answer_tokens(tokenizer, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of each answer, with the end token."""
    return [tokenizer(a, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for a in answers]


def padded(
    tokenizer, samples: Sequence[Sample], answers: Sequence[str] | Sequence[Sequence[int]] | None = None
) -> dict[str, torch.Tensor]:
    """A left-padded batch of encoded samples. ``answers`` are texts, or of `answer_tokens`; None for generation.

    Returns ``input_ids`` and ``attention_mask`` [B, L], ``position_ids`` [3, B, L], ``features`` [media, hidden] in the
    order of their tokens and, with answers, ``labels`` [B, L] (answer and end token only).
    """
    tails = [[]] * len(samples)
    if answers is not None:
        tails = answer_tokens(tokenizer, answers) if isinstance(answers[0], str) else answers
    lengths = [len(s["input_ids"]) + len(t) for s, t in zip(samples, tails, strict=True)]
    width, size = max(lengths), len(samples)
    ids = torch.full((size, width), tokenizer.pad_token_id)
    labels = torch.full((size, width), IGNORE)
    mask = torch.zeros((size, width), dtype=torch.long)
    positions = torch.zeros((3, size, width), dtype=torch.long)
    for row, (sample, tail, length) in enumerate(zip(samples, tails, lengths, strict=True)):
        first, tail = width - length, torch.tensor(tail, dtype=torch.long)
        ids[row, first:] = torch.cat([sample["input_ids"], tail])
        mask[row, first:] = 1
        prompt = sample["position_ids"]
        after = prompt.max() + 1 + torch.arange(len(tail))
        positions[:, row, first:] = torch.cat([prompt, after.expand(3, -1)], dim=1)
        labels[row, width - len(tail) :] = tail
    features = torch.cat([s["features"] for s in samples])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "features": features}
    return batch if answers is None else {**batch, "labels": labels}


@contextmanager
def features_shown(model, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the embedding layer puts ``features`` at the placeholders of a batch that `padded` made.

    So they get there within the forward pass of a model whose weights are spread over processes (FSDP, ZeRO-3).
    """

    def fill(_module, inputs: tuple, embeds: torch.Tensor) -> torch.Tensor:
        # not in place: with checkpointing, embeddings are leaves that gradients are asked of
        return embeds.index_put((media_mask(model.config, inputs[0]),), batch["features"].to(embeds))

    hook = model.get_input_embeddings().register_forward_hook(fill)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def logits_at(model, chosen) -> Iterator[None]:
    """Inside, the model computes logits only at ``chosen``, an index into the hidden states [B, L, hidden].

    With the 152,064 words of Qwen2.5-Omni, the logits of a prompt of 1,500 tokens take half a gigabyte in bfloat16.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][chosen],))
    try:
        yield
    finally:
        hook.remove()


def batch(
    model, tokenizer, samples: Sequence[Sample], answers: Sequence[str] | Sequence[Sequence[int]] | None = None,
    embed: bool = True,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`padded` on the device of the model. Samples that are still a ``prompt`` go through its encoders first.

    With ``embed`` it has ``inputs_embeds`` [B, L, hidden], for the language model alone, in place of ``features``.
    `answer_loss` takes both. ValueError if a base of another width encoded the samples.
    """
    samples = encoded(model, samples)
    width = model.config.get_text_config().hidden_size
    stored = samples[0]["features"].shape[1]
    if stored != width:
        raise ValueError(f"stored features are {stored} wide, the model {width}; run the encode stage with this base")
    together = padded(tokenizer, samples, answers)
    if embed:
        grown = torch.is_grad_enabled() and together["features"].requires_grad  # of adapted encoders
        with torch.set_grad_enabled(grown), features_shown(model, together):
            layer = model.get_input_embeddings()
            together["inputs_embeds"] = layer(together["input_ids"].to(layer.weight.device))
        del together["features"]
    return {name: value.to(model.device) for name, value in together.items()}


def encoded(model, samples: Sequence[Sample]) -> list[Sample]:
    """The samples, those with a ``prompt`` encoded. Features are rounded to 16 bit, as stored ones are.

    Those of adapted encoders cannot be stored. They are not rounded, and have gradients in training.
    """
    prompts = [sample["prompt"] for sample in samples if "prompt" in sample]
    if not prompts:
        return list(samples)
    exact = adapts_encoders(model)
    results = iter(model_of(model).encode(model, prompts))
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
        kinds[batch["labels"] != IGNORE] = SEGMENTS.index("answer")
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
    with instruction_shown(model, batch):
        return model_of(model).last_hidden(model, batch)


def answer_loss(
    model, batch: Mapping[str, torch.Tensor], count: int | torch.Tensor | None = None, unwrapped=None
) -> tuple[torch.Tensor, object]:
    """Cross-entropy of the answers, with their end tokens, and the outputs of the model, whose logits are only these.

    Args:
        batch: that `batch` made, with or without ``embed``.
        count: the sum is divided by this number of tokens; None for the number in the batch.
        unwrapped: the model without the wrapper of DDP or DeepSpeed, if there is one.
    """
    inner = unwrapped or model
    shown = features_shown(inner, batch) if "features" in batch else nullcontext()
    names = ("input_ids" if "features" in batch else "inputs_embeds", "attention_mask", "position_ids")
    target = batch["labels"].roll(-1, 1)  # a position predicts the next token; no prompt begins with a label
    chosen = target != IGNORE
    with instruction_shown(model, batch), shown, logits_at(inner, chosen):
        outputs = model(**{name: batch[name] for name in names}, use_cache=False)
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), target[chosen], reduction="sum")
    return total / (chosen.sum() if count is None else count), outputs
