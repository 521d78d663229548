"""A small Qwen2.5-Omni thinker, built on the spot: its tokenizer, its processor, and a model with random weights.

The classes are those of transformers. Only the sizes are small, and the vocabulary is a list of words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers.video_processing_utils import BaseVideoProcessor

from crab.data.words import PIECE

#: Tokens of Qwen2.5-Omni that stand for media, by their names in its processor.
SPECIAL = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "audio", "video")} | {
    f"{sense}_{edge}_token": f"<|{sense}_{edge}|>" for sense in ("vision", "audio") for edge in ("bos", "eos")
}
PAD, UNKNOWN, START, END = "<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"
ROLES = ("user", "assistant")
SAMPLE_RATE = 16_000  # of every sound, Hz
CLIP_SECONDS = 10  # of sound that a small model hears
_OF_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
CHUNK_SECONDS = 2  # of video and of sound that stand side by side in a prompt


class FrameVideoProcessor(BaseVideoProcessor):
    """Video patches of Qwen2-VL from decoded frames, in numpy.

    The video processor of transformers needs torchvision, which has no CPU build. This one takes frames,
    uint8 [T, H, W, 3], scales them to ``side`` and gives the same patches: ``pixel_values_videos``
    [patches, 3 * temporal_patch_size * patch_size ** 2] in the order (time, row block, column block, row, column), and
    ``video_grid_thw`` [videos, 3] in patches.
    """

    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    image_mean = transformers.Qwen2VLImageProcessorPil.image_mean
    image_std = transformers.Qwen2VLImageProcessorPil.image_std
    temporal_patch_size = 2

    def __init__(self, side: int, patch_size: int, merge_size: int):
        if side % (patch_size * merge_size):
            raise ValueError(f"side {side} must be a multiple of patch_size * merge_size = {patch_size * merge_size}")
        self.side, self.patch_size, self.merge_size = side, patch_size, merge_size

    def __call__(self, videos, return_tensors: str | None = "pt", **_) -> transformers.BatchFeature:
        patches, grids = zip(*(self.patchify(np.asarray(video)) for video in videos), strict=True)
        data = {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.asarray(grids)}
        return transformers.BatchFeature(data, tensor_type=return_tensors)

    def patchify(self, video: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Patches of one video and its (time, height, width) grid. An odd last frame is repeated."""
        p, t, m = self.patch_size, self.temporal_patch_size, self.merge_size
        if video.ndim != 4 or video.shape[3] != 3 or not len(video):
            raise ValueError(f"a video must be [frames, height, width, 3] with at least one frame, got {video.shape}")
        if video.shape[1:3] != (self.side, self.side):
            video = np.stack([cv2.resize(f, (self.side, self.side), interpolation=cv2.INTER_AREA) for f in video])
        if len(video) % t:
            video = np.concatenate([video, video[-1:]])
        T, H, W = len(video) // t, self.side // p, self.side // p
        blocks = video.reshape(T, t, H // m, m, p, W // m, m, p, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        blocks = blocks.reshape(T * H * W, 3, -1)  # reordered as bytes, before floats make them four times as large
        std = np.asarray(self.image_std)
        pixels = blocks * np.float32(1 / 255 / std)[:, None]  # rescaling and normalization in one multiply-add
        pixels -= np.float32(np.asarray(self.image_mean) / std)[:, None]
        return pixels.reshape(T * H * W, -1), (T, H, W)


class FrameOmniProcessor(transformers.Qwen2_5OmniProcessor):
    """The Omni processor with a `FrameVideoProcessor`, which the type check of its parent refuses."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor" and isinstance(argument, FrameVideoProcessor):
            return FrameVideoProcessor
        return super().check_argument_for_proper_class(argument_name, argument)


def build_tokenizer(words: Sequence[str], tags: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer: one token per word, number, punctuation mark or tag such as ``<answer>``.

    It reads English as it is written: capitals and spaces make no difference.
    """
    special = [PAD, UNKNOWN, START, END, *SPECIAL.values()]
    vocabulary = [*special, *ROLES, *sorted({*words, *tags} - {*special, *ROLES})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=UNKNOWN))
    pieces = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
    tokenizer.normalizer = normalizers.Lowercase()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[START, *SPECIAL.values()],
        extra_special_tokens=SPECIAL,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def image_processor(side: int, patch_size: int, merge_size: int) -> transformers.Qwen2VLImageProcessorPil:
    """The image processor of transformers for pictures of this side."""
    area = dict.fromkeys(("shortest_edge", "longest_edge"), side**2)
    return transformers.Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=merge_size, size=area)


def video_processor(images: transformers.Qwen2VLImageProcessorPil) -> FrameVideoProcessor:
    """The video processor that gives patches of the size of these images'."""
    return FrameVideoProcessor(math.isqrt(images.size["longest_edge"]), images.patch_size, images.merge_size)


def build_processor(words: Sequence[str], tags: Sequence[str], size: Mapping[str, Any]) -> FrameOmniProcessor:
    """The processor of a small model: log-mel features of Whisper, patches of Qwen2-VL, word tokens."""
    images = image_processor(size["image_size"], size["patch_size"], size["merge_size"])
    sounds = transformers.WhisperFeatureExtractor(
        feature_size=size["mel_bins"], hop_length=size["hop_length"], n_fft=size["n_fft"], chunk_length=CLIP_SECONDS
    )
    return _processor(images, sounds, build_tokenizer(words, tags))


def load_processor(folder: str | Path) -> FrameOmniProcessor:
    """The processor that `crab.models.omni.save` wrote to a folder."""
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    sounds = transformers.WhisperFeatureExtractor.from_pretrained(Path(folder) / "audio")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # the file of an older base has none
    return _processor(images, sounds, tokenizer)


def _processor(images, sounds, tokenizer) -> FrameOmniProcessor:
    videos = video_processor(images)
    return FrameOmniProcessor(images, videos, sounds, tokenizer, chat_template=tokenizer.chat_template)


def tokens_per_second(processor) -> int:
    """Audio tokens per second of sound. The encoder gives one for four frames of the spectrogram."""
    return SAMPLE_RATE // processor.feature_extractor.hop_length // 4


def build_model(
    processor, size: Mapping[str, Any], seed: int
) -> transformers.Qwen2_5OmniThinkerForConditionalGeneration:
    """A thinker with random weights in the shapes of ``size`` (``base.size`` of params.yaml)."""
    token = processor.tokenizer.convert_tokens_to_ids
    special = {name: token(text) for name, text in SPECIAL.items()}
    hidden, heads, width = size["hidden_size"], size["num_attention_heads"], size["encoder_size"]
    quarter = hidden // heads // 8
    mel_frames = CLIP_SECONDS * SAMPLE_RATE // size["hop_length"]
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=dict(
            **{name: size[name] for name in _OF_TEXT},
            vocab_size=len(processor.tokenizer),
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
            hidden_size=width,
            intermediate_size=2 * width,
            num_heads=heads,
            patch_size=size["patch_size"],
            spatial_merge_size=size["merge_size"],
            window_size=size["image_size"],
            out_hidden_size=hidden,
            fullatt_block_indexes=list(range(size["vision_layers"])),
        ),
        audio_config=dict(
            num_mel_bins=size["mel_bins"],
            encoder_layers=size["audio_layers"],
            encoder_attention_heads=heads,
            encoder_ffn_dim=2 * width,
            d_model=width,
            max_source_positions=mel_frames,
            n_window=mel_frames // 2,
            output_dim=hidden,
        ),
        **{f"{kind}_token_index": special[f"{kind}_token"] for kind in ("audio", "image", "video")},
        **{f"{sense}_start_token_id": special[f"{sense}_bos_token"] for sense in ("audio", "vision")},
        **{f"{sense}_end_token_id": special[f"{sense}_eos_token"] for sense in ("audio", "vision")},
        user_token_id=token("user"),
        position_id_per_seconds=tokens_per_second(processor),  # video and sound keep the same clock
        seconds_per_chunk=CHUNK_SECONDS,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=token(PAD), eos_token_id=token(END), bos_token_id=None)
    return model
