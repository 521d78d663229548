"""Qwen2.5-Omni's thinker, at any size: its processor, its frozen encoders' work, prompts and answers.

The same functions serve a small model built on the spot (:func:`build_processor`,
:func:`build_model`) and a published checkpoint (:func:`load`). Media are encoded once per sample
(:func:`prepare`, :func:`encode`); training and generation then run the language model alone on the
cached embeddings (:func:`collate`, :func:`generate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    WhisperFeatureExtractor,
)
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from crab.data.words import PIECE

#: The linear layers of the language model; a plain list of names would also hit both encoders.
LANGUAGE_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

SPECIAL = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
PAD, UNKNOWN, START, END = "<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"
ROLES = ("user", "assistant")
SAMPLE_RATE = 16_000
CLIP_SECONDS = 10
CHUNK_SECONDS = 2
IGNORE = -100

PLACEHOLDER = {
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}


class FrameVideoProcessor(BaseVideoProcessor):
    """Qwen2-VL's video patches from decoded frames, in numpy.

    transformers' own video processor needs torchvision, of which no CPU build is published. This
    one takes frames already decoded, uint8 [T, H, W, 3], scales them to ``side`` and gives the same patches:
    ``pixel_values_videos`` [patches, 3 * temporal_patch_size * patch_size ** 2] in the order
    (time, row block, column block, row, column), and ``video_grid_thw`` [videos, 3] in patches.
    """

    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, side: int, patch_size: int = 14, temporal_patch_size: int = 2, merge_size: int = 2, **kwargs):
        if side % (patch_size * merge_size):
            raise ValueError(f"side {side} must be a multiple of patch_size * merge_size = {patch_size * merge_size}")
        self.side = side
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.image_mean = kwargs.pop("image_mean", Qwen2VLImageProcessorPil.image_mean)
        self.image_std = kwargs.pop("image_std", Qwen2VLImageProcessorPil.image_std)

    def to_dict(self) -> dict:
        return {**vars(self), "video_processor_type": type(self).__name__}

    def __call__(self, videos, return_tensors: str | None = "pt", **_) -> BatchFeature:
        patches, grids = zip(*(self.patchify(np.asarray(video)) for video in videos), strict=True)
        data = {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.asarray(grids)}
        return BatchFeature(data, tensor_type=return_tensors)

    def patchify(self, video: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Patches of one video and its (time, height, width) grid; an odd last frame is repeated."""
        p, t, m = self.patch_size, self.temporal_patch_size, self.merge_size
        if video.ndim != 4 or video.shape[3] != 3 or not len(video):
            raise ValueError(f"a video must be [frames, height, width, 3] with at least one frame, got {video.shape}")
        if video.shape[1:3] != (self.side, self.side):
            video = np.stack([cv2.resize(f, (self.side, self.side), interpolation=cv2.INTER_AREA) for f in video])
        if video.shape[0] % t:
            video = np.concatenate([video, np.repeat(video[-1:], t - video.shape[0] % t, axis=0)])
        T, H, W = video.shape[0] // t, video.shape[1] // p, video.shape[2] // p
        blocks = video.reshape(T, t, H // m, m, p, W // m, m, p, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        blocks = blocks.reshape(T * H * W, 3, -1)  # put in order as bytes, and only then made four times as large
        std = np.asarray(self.image_std)
        pixels = blocks * np.float32(1 / 255 / std)[:, None]  # rescaling and normalization in one multiply-add
        pixels -= np.float32(np.asarray(self.image_mean) / std)[:, None]
        return pixels.reshape(T * H * W, -1), (T, H, W)


class FrameOmniProcessor(Qwen2_5OmniProcessor):
    """The Omni processor with :class:`FrameVideoProcessor`, which its type check would refuse."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor" and isinstance(argument, FrameVideoProcessor):
            return FrameVideoProcessor
        return super().check_argument_for_proper_class(argument_name, argument)


def build_tokenizer(words: Sequence[str], tags: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token a word, number, punctuation mark or tag.

    Args:
        words: the vocabulary; order does not matter.
        tags: answer tags such as ``<answer>``, kept whole.
    """
    special = [PAD, UNKNOWN, START, END, *SPECIAL.values()]
    vocabulary = [*special, *ROLES, *sorted({*words, *tags} - {*special, *ROLES})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[START, *SPECIAL.values()],
        extra_special_tokens=SPECIAL,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return fast


def build_processor(words: Sequence[str], tags: Sequence[str], size: dict) -> FrameOmniProcessor:
    """The processor of a small model: Whisper log-mel features, Qwen2-VL patches, word tokens."""
    shapes = dict(patch_size=size["patch_size"], temporal_patch_size=2, merge_size=size["merge_size"])
    pixels = size["image_size"] ** 2
    return FrameOmniProcessor(
        image_processor=Qwen2VLImageProcessorPil(**shapes, size={"shortest_edge": pixels, "longest_edge": pixels}),
        video_processor=FrameVideoProcessor(size["image_size"], **shapes),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=size["mel_bins"],
            sampling_rate=SAMPLE_RATE,
            hop_length=size["hop_length"],
            n_fft=size["n_fft"],
            chunk_length=CLIP_SECONDS,
        ),
        tokenizer=build_tokenizer(words, tags),
    )


def build_model(processor: Qwen2_5OmniProcessor, size: dict, seed: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A thinker with random weights in the shapes of ``size`` (the ``size`` part of the base section)."""
    token = processor.tokenizer.convert_tokens_to_ids
    hidden, heads = size["hidden_size"], size["num_attention_heads"]
    quarter = hidden // heads // 8
    mel_frames = CLIP_SECONDS * SAMPLE_RATE // size["hop_length"]
    config = Qwen2_5OmniThinkerConfig(
        text_config=dict(
            vocab_size=len(processor.tokenizer),
            hidden_size=hidden,
            intermediate_size=size["intermediate_size"],
            num_hidden_layers=size["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=size["num_key_value_heads"],
            max_position_embeddings=2048,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": size["rope_theta"],
                "mrope_section": [2 * quarter, quarter, quarter],
            },
            pad_token_id=token(PAD),
            eos_token_id=token(END),
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=size["vision_layers"],
            hidden_size=size["encoder_size"],
            intermediate_size=2 * size["encoder_size"],
            num_heads=heads,
            patch_size=size["patch_size"],
            spatial_merge_size=size["merge_size"],
            temporal_patch_size=2,
            window_size=size["image_size"],
            out_hidden_size=hidden,
            fullatt_block_indexes=list(range(size["vision_layers"])),
        ),
        audio_config=dict(
            num_mel_bins=size["mel_bins"],
            encoder_layers=size["audio_layers"],
            encoder_attention_heads=heads,
            encoder_ffn_dim=2 * size["encoder_size"],
            d_model=size["encoder_size"],
            max_source_positions=mel_frames,
            n_window=mel_frames // 2,
            output_dim=hidden,
        ),
        audio_token_index=token(SPECIAL["audio_token"]),
        image_token_index=token(SPECIAL["image_token"]),
        video_token_index=token(SPECIAL["video_token"]),
        audio_start_token_id=token(SPECIAL["audio_bos_token"]),
        audio_end_token_id=token(SPECIAL["audio_eos_token"]),
        vision_start_token_id=token(SPECIAL["vision_bos_token"]),
        vision_end_token_id=token(SPECIAL["vision_eos_token"]),
        user_token_id=token("user"),
        # One position a token of sound, so that sight and sound keep the same clock.
        position_id_per_seconds=tokens_per_second(processor),
        seconds_per_chunk=CHUNK_SECONDS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=token(PAD), eos_token_id=token(END), bos_token_id=None)
    return model


def save(path: str | Path, model, processor, dtype: torch.dtype = torch.float32) -> None:
    """Write weights (safetensors, in ``dtype``), configuration, tokenizer and processor settings to a folder."""
    model.save_pretrained(path, state_dict={k: v.to(dtype) for k, v in model.state_dict().items()})
    processor.tokenizer.save_pretrained(path)
    processor.image_processor.save_pretrained(path)
    processor.feature_extractor.save_pretrained(Path(path) / "audio")


def load(path: str | Path, dtype: torch.dtype = torch.float32):
    """(model, processor) from a folder written by :func:`save`, or from a published checkpoint.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}/config.json is missing: not a model; run `dvc repro base`")
    if (folder / "audio").is_dir():
        images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        shapes = {k: getattr(images, k) for k in ("patch_size", "temporal_patch_size", "merge_size")}
        processor = FrameOmniProcessor(
            image_processor=images,
            video_processor=FrameVideoProcessor(math.isqrt(images.size["longest_edge"]), **shapes),
            feature_extractor=WhisperFeatureExtractor.from_pretrained(folder / "audio"),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        )
    elif is_torchvision_available():
        processor = AutoProcessor.from_pretrained(path)
    else:
        raise ImportError(f"the processor of {path} needs torchvision; install it beside a CUDA build of torch")
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return model.eval(), processor


def tokens_per_second(processor) -> int:
    """Audio tokens a second of sound: the encoder gives one for four frames of the spectrogram."""
    return SAMPLE_RATE // processor.feature_extractor.hop_length // 4


def clock(processor) -> dict[str, float]:
    """How the processor is to place sight beside sound: positions a second, and seconds a turn."""
    return {"position_id_per_seconds": tokens_per_second(processor), "seconds_per_chunk": float(CHUNK_SECONDS)}


def interleaves(kinds: Sequence[str]) -> bool:
    """Whether these media are one clip, its sight and its sound, whose tokens then go in turns of two seconds.

    That is how Qwen2.5-Omni shows a video with its sound (``load_audio_from_video``), so that what is
    seen and what is heard at one time stand side by side. Two videos, or two sounds, stand one after the other.
    """
    return tuple(kinds) == ("video", "audio")


@dataclass
class Media:
    """One item of a prompt.

    Attributes:
        kind: ``video`` (uint8 [T, 224, 224, 3]), ``image`` (uint8 [224, 224, 3]) or ``audio``
            (float32 [samples], 16 kHz mono).
        data: the decoded array.
        fps: frames a second of a video; ignored otherwise.
    """

    kind: str
    data: np.ndarray
    fps: float = 1.0


def prompt_text(kinds: Sequence[str], instruction: str) -> str:
    """The chat turn that ends where the answer begins; one placeholder an item, media first.

    The sound of a clip has none: the processor puts it between the frames (`interleaves`).
    """
    media = "".join(PLACEHOLDER[kind] for kind in (("video",) if interleaves(kinds) else kinds))
    return f"{START} user {media} {instruction} {END} {START} assistant"


def prepare(processor, media: Sequence[Media], instruction: str) -> BatchFeature:
    """Run the processor on one sample (batch of one); media of one kind must share their fps."""
    of = lambda kind: [m for m in media if m.kind == kind]  # noqa: E731
    videos, images, audio = of("video"), of("image"), of("audio")
    kinds = [m.kind for m in media]
    own_sound = dict(load_audio_from_video=True, audio_from_video_indices=[0], **clock(processor))
    inputs = processor(
        text=[prompt_text(kinds, instruction)],
        images=[m.data for m in images] or None,
        videos=[m.data for m in videos] or None,
        audio=[m.data for m in audio] or None,
        **({"fps": videos[0].fps} if videos else {}),
        **({"sampling_rate": SAMPLE_RATE} if audio else {}),
        **(own_sound if interleaves(kinds) else {}),
        return_tensors="pt",
    )
    return inputs


@torch.no_grad()
def encode(model, prompts: Sequence[BatchFeature]) -> list[dict[str, torch.Tensor]]:
    """The frozen encoders' work on prepared samples, one pass an encoder for all of them.

    Returns:
        For each prompt ``input_ids`` [L]; ``position_ids`` [3, L]; ``features`` [P, hidden], one row a
        placeholder token in prompt order; ``is_media`` [L], True where a feature goes.
    """
    config, device = model.config, model.device
    lengths = [p["input_ids"].shape[1] for p in prompts]
    ids = torch.cat([p["input_ids"][0] for p in prompts])
    features = torch.zeros(len(ids), config.get_text_config().hidden_size)

    def joined(*keys: str) -> list[torch.Tensor]:
        return [torch.cat([p[k] for p in prompts if k in p]).to(device) for k in keys]

    if any("pixel_values" in p for p in prompts):
        out = model.get_image_features(*joined("pixel_values", "image_grid_thw"), return_dict=True)
        features[ids == config.image_token_id] = torch.cat(tuple(out.pooler_output)).float().cpu()
    if any("pixel_values_videos" in p for p in prompts):
        out = model.get_video_features(*joined("pixel_values_videos", "video_grid_thw"), return_dict=True)
        features[ids == config.video_token_id] = torch.cat(tuple(out.pooler_output)).float().cpu()
    if any("input_features" in p for p in prompts):
        out = model.get_audio_features(*joined("input_features", "feature_attention_mask"), return_dict=True)
        features[ids == config.audio_token_id] = out.last_hidden_state.float().cpu()
    samples = []
    for prompt, own, rows in zip(prompts, ids.split(lengths), features.split(lengths), strict=True):
        heard = prompt["feature_attention_mask"].sum(-1) if "feature_attention_mask" in prompt else None
        is_media = media_mask(config, own)
        positions = prompt_positions(model, prompt, heard)
        samples.append({"input_ids": own, "position_ids": positions, "features": rows[is_media], "is_media": is_media})
    return samples


#: Precisions of training: all in float32, or matrix products in bfloat16 by autocast.
PRECISIONS = ("fp32", "bf16")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass has this precision; the weights stay in float32.

    Raises:
        ValueError: on a precision that is not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def media_mask(config, ids: torch.Tensor) -> torch.Tensor:
    """True at placeholder tokens."""
    return torch.isin(ids, torch.tensor([config.image_token_id, config.video_token_id, config.audio_token_id]))


def prompt_positions(model, inputs: BatchFeature, audio_lengths: torch.Tensor | None) -> torch.Tensor:
    """TMRoPE positions of one prompt, [3, L]: time, height, width."""
    ids = inputs["input_ids"]
    if "image_grid_thw" not in inputs and "video_grid_thw" not in inputs:
        return torch.arange(ids.shape[1]).expand(3, -1)  # get_rope_index needs vision; text and sound count up
    bos, sound = model.config.vision_start_token_id, model.config.audio_start_token_id
    positions, _ = model.get_rope_index(
        ids,
        use_audio_in_video=bool(((ids[:, :-1] == bos) & (ids[:, 1:] == sound)).any()),
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=torch.ones_like(ids),
        audio_seqlens=audio_lengths,
        second_per_grids=None if "video_second_per_grid" not in inputs else torch.as_tensor(inputs["video_second_per_grid"]),
    )
    return positions[:, 0]


def collate(model, tokenizer, samples: Sequence[dict], answers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """A left-padded batch of encoded samples for the language model alone.

    Args:
        samples: outputs of :func:`encode`.
        answers: target texts; None for generation, which ends the batch at the prompt.

    Returns:
        ``inputs_embeds`` [B, L, hidden], ``attention_mask`` [B, L], ``position_ids`` [3, B, L],
        ``input_ids`` [B, L] and, with answers, ``labels`` [B, L] (answer and end token only).
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
        follow = prompt.max() + 1 + torch.arange(len(tail))
        positions[:, row, first:] = torch.cat([prompt, follow.expand(3, -1)], dim=1)
        if len(tail):
            labels[row, width - len(tail) :] = tail
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        embeds = torch.nn.functional.embedding(ids.to(weight.device), weight)
        at = media_mask(model.config, ids).to(weight.device)
        embeds[at] = torch.cat([s["features"] for s in samples]).to(embeds)
    batch = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    return batch if answers is None else {**batch, "labels": labels}


@contextmanager
def logits_at(model, chosen) -> Iterator[None]:
    """Inside, the model (a thinker, or PEFT's wrapper of one) gives logits at some positions alone.

    Of a vocabulary of 152,064 words, Qwen2.5-Omni's, those of a prompt's 1,500 tokens take half a gigabyte a sample in bfloat16.

    Args:
        chosen: what indexes the last hidden states [B, L, hidden]: a bool mask [B, L], say, for logits [chosen, vocabulary].
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0][chosen],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def generate(model, tokenizer, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch from :func:`collate` made without answers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask, positions = batch["attention_mask"], batch["position_ids"]
    # transformers adds this offset to the count of tokens seen to place each new token.
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
