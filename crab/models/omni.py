"""Qwen2.5-Omni's thinker at any size, published or small: from media and an instruction to an answer.

`prepare` and `encode` run once per sample: processor, then the frozen encoders. Training and generation then run the
language model alone on these features. The names are those of `crab.models.protocol.AudioVisualModel`.

The tokens of a clip and those of its sound take turns of two seconds, so that what is seen and heard at the same time
stands side by side. All other media stand one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    BatchFeature,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.utils import is_torchvision_available

from crab.ilora.published import PUBLISHED_TARGETS
from crab.models import small
from crab.models.batches import INPUTS, adapts_encoders, bare, logits_at, media_mask
from crab.models.protocol import CLIP, IGNORE, LANGUAGE_TARGETS, Marks, Media  # noqa: F401  IGNORE: for base/
from crab.models.small import CHUNK_SECONDS, END, SAMPLE_RATE, SPECIAL, START, tokens_per_second

TARGETS = {"language": LANGUAGE_TARGETS, "published": PUBLISHED_TARGETS}
PUBLISHED = "Qwen/Qwen2.5-Omni-7B"

#: What stands for one item of a prompt before the processor expands it, by kind of media.
PLACEHOLDER = {
    kind: SPECIAL[f"{sense}_bos_token"] + SPECIAL[f"{kind}_token"] + SPECIAL[f"{sense}_eos_token"]
    for kind, sense in (("video", "vision"), ("image", "vision"), ("audio", "audio"))
}


def save(path: str | Path, model, processor, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights of a small model (in ``dtype``), its configuration, tokenizer and processor to a folder."""
    model.save_pretrained(path, state_dict={k: v.to(dtype) for k, v in model.state_dict().items()})
    processor.tokenizer.save_pretrained(path)
    processor.image_processor.save_pretrained(path)
    processor.feature_extractor.save_pretrained(Path(path) / "audio")


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The model alone, in evaluation mode."""
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()


def read_config(path: str) -> tuple[Qwen2_5OmniThinkerConfig, str]:
    """The configuration of a base, and a note if it is assumed: the sizes of `PUBLISHED` are known, so that the network
    is not asked. OSError if it cannot be read.
    """
    try:
        return Qwen2_5OmniThinkerConfig.from_pretrained(path, local_files_only=path == PUBLISHED), ""
    except OSError:
        if path != PUBLISHED:
            raise
    # The defaults of transformers are the published sizes but for these two.
    config = Qwen2_5OmniThinkerConfig(vision_config={"hidden_size": 1280}, text_config=dict(tie_word_embeddings=False))
    return config, f"{PUBLISHED} is not on this machine; its published sizes are used"


def build(config: Qwen2_5OmniThinkerConfig) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A model of this configuration without trained weights."""
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def load_processor(path: str | Path):
    """The processor alone, for processes that decode media and run no model."""
    if (Path(path) / "audio").is_dir():
        return small.load_processor(path)
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
    """Run the processor on one sample, a batch of one. Each video keeps its own seconds per frame.

    ``turns=False`` puts the sound of a `CLIP` after its frames. See `prompt_text` for the other arguments.
    """
    kinds = tuple(item.kind for item in media)
    data = {kind: [item.data for item in media if item.kind == kind] for kind in PLACEHOLDER}
    rates = [item.fps for item in media if item.kind == "video"]
    options = {}
    if rates:
        options["fps"] = rates[0]
    if data["audio"]:
        options["sampling_rate"] = SAMPLE_RATE
    if turns and kinds == CLIP:
        options |= {
            "load_audio_from_video": True,
            "audio_from_video_indices": [0],
            "position_id_per_seconds": tokens_per_second(processor),
            "seconds_per_chunk": float(CHUNK_SECONDS),
        }
    prompt = processor(
        text=[prompt_text(kinds, instruction, turns, system, lead, processor)],
        images=data["image"] or None,
        videos=data["video"] or None,
        audio=data["audio"] or None,
        **options,
        return_tensors="pt",
    )
    if len(set(rates)) > 1:  # the processor takes one rate for all videos of a prompt
        prompt["video_second_per_grid"] = [processor.video_processor.temporal_patch_size / rate for rate in rates]
    return prompt


def encode(model, prompts: Sequence[BatchFeature]) -> list[dict[str, torch.Tensor]]:
    """Run the encoders on prepared samples, each encoder once for all of them."""
    config = model.config
    lengths = [p["input_ids"].shape[1] for p in prompts]
    ids = torch.cat([p["input_ids"][0] for p in prompts])
    features = torch.zeros(len(ids), config.get_text_config().hidden_size)
    encoders = (
        (model.get_image_features, config.image_token_id, "pixel_values", "image_grid_thw"),
        (model.get_video_features, config.video_token_id, "pixel_values_videos", "video_grid_thw"),
        (model.get_audio_features, config.audio_token_id, "input_features", "feature_attention_mask"),
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and adapts_encoders(model)):
        for encoder, token, *names in encoders:
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


@torch.no_grad()
def generate(model, tokenizer, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch that `crab.models.batches.batch` made without answers."""
    base = bare(model)
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


def last_hidden(model, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of the last layer [B, L, hidden]."""
    return bare(model).model(**{name: batch[name] for name in INPUTS}, use_cache=False).last_hidden_state


def marks(tokenizer) -> Marks:
    """What opens and closes media and ends a turn in a prompt."""
    token = tokenizer.convert_tokens_to_ids
    bos, eos = (
        tuple(token(SPECIAL[f"{sense}_{edge}_token"]) for sense in ("vision", "audio")) for edge in ("bos", "eos")
    )
    return Marks(bos, eos, token(END))


def media_tokens(
    config: Qwen2_5OmniThinkerConfig, side: int, kinds: Sequence[str], frames: int, seconds: float
) -> tuple[int, int]:
    """Tokens of the pictures and of the sounds of a sample."""
    seen = config.vision_config
    grid = (side // seen.patch_size // seen.spatial_merge_size) ** 2
    pairs = -(-frames // seen.temporal_patch_size)
    visual = grid * (kinds.count("image") + pairs * kinds.count("video"))
    return visual, round(seconds * config.position_id_per_seconds) * kinds.count("audio")


def encoder_tokens(
    config: Qwen2_5OmniThinkerConfig, side: int, kinds: Sequence[str], frames: int, seconds: float
) -> tuple[int, int]:
    """Tokens that the layers of both encoders read: they are merged, or averaged in pairs, behind these."""
    visual, sound = media_tokens(config, side, kinds, frames, seconds)
    return visual * config.vision_config.spatial_merge_size**2, 2 * sound
