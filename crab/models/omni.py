"""Qwen2.5-Omni's thinker at any size, published or small: from media and an instruction to an answer.

`prepare` and `encode` run once per sample: processor, then the frozen encoders. Training and generation then run the
language model alone on these features (`collate`, `generate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoProcessor, BatchFeature, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.utils import is_torchvision_available

from crab.models import small
from crab.models.small import CHUNK_SECONDS, END, SAMPLE_RATE, SPECIAL, START, tokens_per_second

#: The linear layers of the language model. A plain list of names would also match both encoders.
LANGUAGE_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
IGNORE = -100  # label of a token that is not learned

#: A clip with its sound. Their tokens take turns of two seconds, so that what is seen and heard at the same time stands
#: side by side. All other media stand one after the other.
CLIP = ("video", "audio")

#: What stands for one item of a prompt before the processor expands it, by kind of media.
PLACEHOLDER = {
    kind: SPECIAL[f"{sense}_bos_token"] + SPECIAL[f"{kind}_token"] + SPECIAL[f"{sense}_eos_token"]
    for kind, sense in (("video", "vision"), ("image", "vision"), ("audio", "audio"))
}


@dataclass
class Media:
    """One item of a prompt: a ``video``, uint8 [T, 224, 224, 3] at ``fps`` frames per second, an ``image``, uint8
    [224, 224, 3], or ``audio``, float32 [samples] at 16 kHz.
    """

    kind: str
    data: np.ndarray
    fps: float = 1.0


def save(path: str | Path, model, processor, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights of a small model (in ``dtype``), its configuration, tokenizer and processor to a folder."""
    model.save_pretrained(path, state_dict={k: v.to(dtype) for k, v in model.state_dict().items()})
    processor.tokenizer.save_pretrained(path)
    processor.image_processor.save_pretrained(path)
    processor.feature_extractor.save_pretrained(Path(path) / "audio")


def load(path: str | Path, dtype: torch.dtype = torch.float32):
    """(model, processor) from a folder that `save` wrote, or from a published checkpoint."""
    processor = load_processor(path)
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return model.eval(), processor


def load_processor(path: str | Path):
    """The processor alone, for processes that decode media and run no model."""
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}/config.json is missing: this is not a model; run `dvc repro base`")
    if (folder / "audio").is_dir():
        return small.load_processor(folder)
    if not is_torchvision_available():
        raise ImportError(f"the processor of {path} needs torchvision; install it beside a CUDA build of torch")
    return AutoProcessor.from_pretrained(path)


def prompt_text(
    kinds: Sequence[str], instruction: str, turns: bool = True, system: str = "", lead: str = "", processor=None
) -> str:
    """The chat up to where the answer begins: ``lead``, one placeholder per item, then the instruction.

    The sound of a `CLIP` has no placeholder: the processor adds its tokens.

    Args:
        system: the system turn, if there is one. lead: stands before the media.
        processor: its chat template says how turns are written. Without one they are written as for a small model.
    """
    shown = ("video",) if turns and tuple(kinds) == CLIP else kinds
    if getattr(processor, "chat_template", None):
        content = [{"type": kind} for kind in shown]
        texts = [{"type": "text", "text": text} for text in (lead, instruction)]
        chat = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        chat.append({"role": "user", "content": [*texts[:1], *content, *texts[1:]] if lead else [*content, *texts[1:]]})
        return processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    head = (f"{START} system {system} {END} " if system else "") + f"{START} user " + (f"{lead} " if lead else "")
    return f"{head}{''.join(PLACEHOLDER[kind] for kind in shown)} {instruction} {END} {START} assistant"


def prepare(
    processor, media: Sequence[Media], instruction: str, turns: bool = True, system: str = "", lead: str = ""
) -> BatchFeature:
    """Run the processor on one sample, a batch of one. All its videos must have the same fps.

    ``turns=False`` puts the sound of a `CLIP` after its frames. See `prompt_text` for the other arguments.
    """
    kinds = tuple(item.kind for item in media)
    data = {kind: [item.data for item in media if item.kind == kind] for kind in PLACEHOLDER}
    options = {}
    if data["video"]:
        options["fps"] = next(item.fps for item in media if item.kind == "video")
    if data["audio"]:
        options["sampling_rate"] = SAMPLE_RATE
    if turns and kinds == CLIP:
        options |= {
            "load_audio_from_video": True,
            "audio_from_video_indices": [0],
            "position_id_per_seconds": tokens_per_second(processor),
            "seconds_per_chunk": float(CHUNK_SECONDS),
        }
    return processor(
        text=[prompt_text(kinds, instruction, turns, system, lead, processor)],
        images=data["image"] or None,
        videos=data["video"] or None,
        audio=data["audio"] or None,
        **options,
        return_tensors="pt",
    )


def adapts_encoders(model) -> bool:
    """Whether adapters are in the encoders. Features then depend on them."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    towers = core.model.visual, core.model.audio_tower
    return any(isinstance(module, BaseTunerLayer) for tower in towers for module in tower.modules())


def encode(model, prompts: Sequence[BatchFeature]) -> list[dict[str, torch.Tensor]]:
    """Run the encoders on prepared samples, each encoder once for all of them; with gradients only if it is adapted.

    Returns for each sample ``input_ids`` [L], ``position_ids`` [3, L] and ``features`` [media, hidden], one row per
    placeholder token in prompt order.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and adapts_encoders(model)):
        return _encode(model, prompts)


def _encode(model, prompts: Sequence[BatchFeature]) -> list[dict[str, torch.Tensor]]:
    config = model.config
    lengths = [p["input_ids"].shape[1] for p in prompts]
    ids = torch.cat([p["input_ids"][0] for p in prompts])
    features = torch.zeros(len(ids), config.get_text_config().hidden_size)
    for encoder, token, *names in (
        (model.get_image_features, config.image_token_id, "pixel_values", "image_grid_thw"),
        (model.get_video_features, config.video_token_id, "pixel_values_videos", "video_grid_thw"),
        (model.get_audio_features, config.audio_token_id, "input_features", "feature_attention_mask"),
    ):
        if any(names[0] in p for p in prompts):
            inputs = (torch.cat([p[name] for p in prompts if name in p]).to(model.device) for name in names)
            out = encoder(*inputs, return_dict=True)
            rows = out.last_hidden_state if token == config.audio_token_id else torch.cat(tuple(out.pooler_output))
            features[ids == token] = rows.float().cpu()
    samples = []
    for prompt, own, rows in zip(prompts, ids.split(lengths), features.split(lengths), strict=True):
        features = rows[media_mask(config, own)]
        samples.append({"input_ids": own, "position_ids": prompt_positions(model, prompt), "features": features})
    return samples


def media_mask(config, ids: torch.Tensor) -> torch.Tensor:
    """True at placeholder tokens."""
    tokens = [config.image_token_id, config.video_token_id, config.audio_token_id]
    return torch.isin(ids, torch.tensor(tokens, device=ids.device))


def prompt_positions(model, inputs: BatchFeature) -> torch.Tensor:
    """TMRoPE positions of one prepared prompt, [3, L]: time, height, width."""
    ids = inputs["input_ids"]
    if "image_grid_thw" not in inputs and "video_grid_thw" not in inputs:
        return torch.arange(ids.shape[1]).expand(3, -1)  # get_rope_index needs images; text and sound count up
    bos, sound = model.config.vision_start_token_id, model.config.audio_start_token_id
    seconds, mel = inputs.get("video_second_per_grid"), inputs.get("feature_attention_mask")
    positions, _ = model.get_rope_index(
        ids,
        use_audio_in_video=bool(((ids[:, :-1] == bos) & (ids[:, 1:] == sound)).any()),
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=torch.ones_like(ids),
        audio_seqlens=None if mel is None else mel.sum(-1),
        second_per_grids=None if seconds is None else torch.as_tensor(seconds),
    )
    return positions[:, 0]


def padded(tokenizer, samples: Sequence[dict], answers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """A left-padded batch of encoded samples. Without answers, for generation.

    Returns ``input_ids`` and ``attention_mask`` [B, L], ``position_ids`` [3, B, L], ``features`` [media, hidden] in the
    order of their tokens and, with answers, ``labels`` [B, L] (answer and end token only).
    """
    tails = [[]] * len(samples)
    if answers is not None:
        tails = [tokenizer(a, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for a in answers]
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


def collate(model, tokenizer, samples: Sequence[dict], answers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """`padded` for the language model alone: ``inputs_embeds`` [B, L, hidden] in place of ``features``."""
    batch = padded(tokenizer, samples, answers)
    grown = torch.is_grad_enabled() and batch["features"].requires_grad  # of adapted encoders
    with torch.set_grad_enabled(grown), features_shown(model, batch):
        embed = model.get_input_embeddings()
        batch["inputs_embeds"] = embed(batch["input_ids"].to(embed.weight.device))
    del batch["features"]
    return batch


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


@torch.no_grad()
def generate(model, tokenizer, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch that `collate` made without answers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask, positions = batch["attention_mask"], batch["position_ids"]
    # transformers adds this offset to the number of tokens so far, to get the position of each new token
    base.model.rope_deltas = (positions.amax(dim=(0, 2)) + 1 - mask.sum(-1))[:, None]
    with logits_at(base, (slice(None), slice(-1, None))):
        out = model.generate(
            inputs_embeds=batch["inputs_embeds"],
            attention_mask=mask,
            position_ids=positions,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
    return tokenizer.batch_decode(out, skip_special_tokens=True)
