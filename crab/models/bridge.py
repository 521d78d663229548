"""A frozen language model that reads pictures and sounds through projectors, as in LLaVA, Video-LLaMA and Crab (2025).

Frozen encoders see and hear; a projector behind each turns what they give into tokens of the language model. A prompt
is the block of pictures, then the block of sounds, then the text, with plain positions. The projectors are trained once
(`crab.models.base.align`); after that they are frozen too, so `encode` caches what they give.

The names are those of `crab.models.protocol.AudioVisualModel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BatchFeature

from crab.models import encoders, small
from crab.models import language as languages
from crab.models.batches import adapts_encoders, bare, logits_at
from crab.models.bridge_model import Bridge, BridgeConfig, BridgeProcessor
from crab.models.protocol import LANGUAGE_TARGETS, Marks, Media

TARGETS = {"language": LANGUAGE_TARGETS}
#: The placeholder of each token of media.
PLACEHOLDER = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>"}


# ---------------------------------------------------------------- built, saved, loaded


def assemble(
    language: str, vision: str, audio: str, *, projector: str = "mlp", picture_tokens: int = 4, sound_tokens: int = 2,
    words: int = 1, seed: int = 0,
) -> tuple[Bridge, BridgeProcessor]:  # fmt: skip
    """A bridge with untrained projectors, and its processor. ValueError, naming the parameter, on what does not fit.

    Args:
        language: see `crab.models.language.located`. vision, audio: see `crab.models.encoders.load_encoder`.
        projector, words: see `crab.models.encoders.Projector`. picture_tokens, sound_tokens: of a unit.
    """
    (eye, images), (ear, sounds) = encoders.load_encoder("vision", vision), encoders.load_encoder("audio", audio)
    tokenizer = languages.load_language_tokenizer(language)
    tokenizer.add_special_tokens({"additional_special_tokens": list(PLACEHOLDER.values())})
    model = languages.load_language(language, torch.float32)
    _extend(model, len(tokenizer))
    tokens = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(text) for kind, text in PLACEHOLDER.items()}
    config = BridgeConfig(
        text_config=model.config, vision_config=eye.config, audio_config=ear.config, language=language,
        projector=projector, picture_tokens=picture_tokens, sound_tokens=sound_tokens, words=words, **tokens,
    )  # fmt: skip
    torch.manual_seed(seed)
    bridge = Bridge(config, model)
    bridge.visual.tower.load_state_dict(eye.state_dict())
    bridge.audio_tower.tower.load_state_dict(ear.state_dict())
    return bridge.requires_grad_(False).eval(), BridgeProcessor(tokenizer, images, sounds, config)


def _extend(model, words: int) -> None:
    """Give a language model rows for the placeholders, of zeros. It never reads them."""
    rows = model.get_input_embeddings().weight
    if words > len(rows):
        known = len(rows)
        model.resize_token_embeddings(words, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[known:] = 0


def save(path: str | Path, model: Bridge, processor: BridgeProcessor, dtype: torch.dtype = torch.float32) -> None:
    """Write encoders, projectors (in ``dtype``), configuration and processor to a folder. The language model is only
    named.
    """
    own = (item for item in model.state_dict().items() if not item[0].startswith("language_model."))
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in own}
    model.save_pretrained(path, state_dict=state)
    processor.tokenizer.save_pretrained(path)
    encoders.save_preprocessing(path, processor.image_processor, processor.feature_extractor)


def read_config(path: str) -> tuple[BridgeConfig, str]:
    """The configuration of a base; nothing is assumed. OSError if it cannot be read."""
    return BridgeConfig.from_pretrained(path), ""


def load_processor(path: str | Path) -> BridgeProcessor:
    """The processor of a folder that `save` wrote."""
    config = BridgeConfig.from_pretrained(path)
    paired = config.vision_config.model_type == encoders.PAIRED
    return BridgeProcessor(AutoTokenizer.from_pretrained(path), *encoders.load_preprocessing(path, paired), config)


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> Bridge:
    """The model of a folder that `save` wrote, with its language model. ValueError if a part is missing."""
    config = BridgeConfig.from_pretrained(path)
    text = languages.load_language(config.language, dtype)
    _extend(text, config.get_text_config().vocab_size)
    model = Bridge(config, text)
    missing, unexpected = model.load_state_dict(load_file(Path(path) / "model.safetensors"), strict=False)
    odd = [*(name for name in missing if not name.startswith("language_model.")), *unexpected]
    if odd:
        raise ValueError(
            f"{path}/model.safetensors: {odd[0]} is missing or does not belong there; run `dvc repro base`"
        )
    return model.to(dtype).eval()


def build(config: BridgeConfig) -> Bridge:
    """A model of this configuration without trained weights."""
    return Bridge(config)


# ---------------------------------------------------------------- prompts and features


def prepare(
    processor: BridgeProcessor, media: Sequence[Media], instruction: str, turns: bool = True, system: str = "",
    lead: str = "",
) -> BatchFeature:  # fmt: skip
    """A prompt: pictures, then sounds, then the instruction. ``turns`` changes nothing here.

    Returns ``input_ids`` [1, L]; ``pixel_values`` [U, ...], and ``units`` of each picture or video; and of sounds
    ``input_features`` [S, bins, frames], ``feature_attention_mask`` [S, frames] and ``seconds`` [S].
    """
    media = [*(item for item in media if item.kind != "audio"), *(item for item in media if item.kind == "audio")]
    counts, pixels, sounds, seconds = [], [], [], []
    for item in media:
        if item.kind == "audio":
            sounds.append(encoders.spectrogram(processor.feature_extractor, item.data))
            seconds.append(seconds_of(len(item.data)))
            counts.append(seconds[-1] * processor.sound_tokens + 2)
        else:
            pixels.append(encoders.pixels_of(processor.image_processor, item.data.reshape(-1, *item.data.shape[-3:])))
            counts.append(len(pixels[-1]) * processor.picture_tokens + 2)
    text = prompt_text(processor.tokenizer, [item.kind for item in media], instruction, system, lead)
    ids, counts = [], iter(counts)
    placed = {processor.tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDER.values()}
    for token in processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
        ids += [token] * (next(counts) if token in placed else 1)
    data: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if pixels:
        data |= {"pixel_values": torch.cat(pixels), "units": torch.tensor([len(units) for units in pixels])}
    if sounds:
        mel, mask = zip(*sounds, strict=True)
        data |= {"input_features": torch.stack(mel), "feature_attention_mask": torch.stack(mask)}
        data["seconds"] = torch.tensor(seconds)
    return BatchFeature(data)


def seconds_of(samples: int) -> int:
    """Seconds of a sound that are begun; a few samples more than a whole second begin none."""
    return max(1, -(-(samples - encoders.RATE // 20) // encoders.RATE))


def prompt_text(tokenizer, kinds: Sequence[str], instruction: str, system: str = "", lead: str = "") -> str:
    """The chat up to where the answer begins, by the tokenizer's template. Without one, the end token ends the turn."""
    media = "".join(PLACEHOLDER[kind] for kind in kinds)
    text = "\n".join(part for part in (lead, media, instruction) if part)
    if not tokenizer.chat_template:
        return f"{system}\n{text}{tokenizer.eos_token}\n" if system else f"{text}{tokenizer.eos_token}\n"
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def encode(model, prompts: Sequence[BatchFeature]) -> list[dict[str, torch.Tensor]]:
    """Run encoders and projectors on prepared samples, each once for all of them. Positions just count."""
    core, device = bare(model), model.device
    with torch.set_grad_enabled(torch.is_grad_enabled() and adapts_encoders(model)):
        pictures, sounds = [], []
        if shown := [prompt for prompt in prompts if "pixel_values" in prompt]:
            pixels = torch.cat([prompt["pixel_values"] for prompt in shown]).to(device, model.dtype)
            units = torch.cat([prompt["units"] for prompt in shown]).tolist()
            pictures = core.visual.projector.items(core.visual.see(pixels).split(units))
        if played := [prompt for prompt in prompts if "input_features" in prompt]:
            mel, mask, seconds = (
                torch.cat([prompt[name] for prompt in played])
                for name in ("input_features", "feature_attention_mask", "seconds")
            )
            heard = core.audio_tower.hear(mel.to(device, model.dtype), mask.sum(-1).tolist(), seconds.tolist())
            sounds = core.audio_tower.projector.items(heard)
    samples, pictures, sounds = [], iter(pictures), iter(sounds)
    for prompt in prompts:
        ids = prompt["input_ids"][0]
        own = [next(pictures) for _ in prompt.get("units", ())] + [next(sounds) for _ in prompt.get("seconds", ())]
        features = torch.cat(own).float().cpu() if own else torch.zeros(0, core.config.get_text_config().hidden_size)
        samples.append({"input_ids": ids, "position_ids": torch.arange(len(ids)).expand(3, -1), "features": features})
    return samples


# ---------------------------------------------------------------- the language model on features


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # layers that were compiled to train would be compiled anew at each length
def generate(model, tokenizer, batch: Mapping[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    """Greedy answers to a left-padded batch with ``inputs_embeds``."""
    core = bare(model)
    config = core.config
    with logits_at(core, (slice(None), slice(-1, None))):
        out = core.language_model.generate(
            inputs_embeds=batch["inputs_embeds"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[config.image_token_id, config.video_token_id, config.audio_token_id],
        )
    return tokenizer.batch_decode(out, skip_special_tokens=True)


@torch.compiler.set_stance("force_eager")
def last_hidden(model, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of the last layer [B, L, hidden]."""
    return bare(model).language_model.base_model(
        inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"][0], use_cache=False,
    ).last_hidden_state  # fmt: skip


def marks(tokenizer) -> Marks:
    """Media are placeholders from the first to the last. A turn ends with the end token."""
    placeholders = tuple(tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDER.values())
    return Marks(placeholders, placeholders, tokenizer.eos_token_id)


def media_tokens(config: BridgeConfig, side: int, kinds: Sequence[str], frames: int, seconds: float) -> tuple[int, int]:
    """Tokens of the pictures and of the sounds of a sample, with both ends of each. ``side`` changes nothing here."""
    visual = _units(config, kinds, frames) * config.picture_tokens + 2 * sum(kind != "audio" for kind in kinds)
    return visual, kinds.count("audio") * (max(1, math.ceil(seconds)) * config.sound_tokens + 2)


def _units(config: BridgeConfig, kinds: Sequence[str], frames: int) -> int:
    """Units of all pictures and videos of a prompt."""
    paired = config.vision_config.model_type == encoders.PAIRED
    return kinds.count("image") + kinds.count("video") * (-(-frames // 2) if paired else frames)


def encoder_tokens(
    config: BridgeConfig, side: int, kinds: Sequence[str], frames: int, seconds: float
) -> tuple[int, int]:
    """Tokens that the layers of both encoders read.

    CLIP and SigLIP see pictures of a size of their own, and Whisper reads its whole window, however short a sound is.
    """
    seen, heard = config.vision_config, config.audio_config
    if seen.model_type == encoders.PAIRED:
        patches = (side // seen.patch_size) ** 2
    else:
        patches = (seen.image_size // seen.patch_size) ** 2 + (seen.model_type == "clip_vision_model")
    window = heard.max_source_positions
    if heard.model_type == encoders.OWN_EAR:  # of a small base: the spectrogram of a clip, which its layers read halved
        window = round(seconds * window / 2 / small.CLIP_SECONDS)
    return _units(config, kinds, frames) * patches, kinds.count("audio") * window
