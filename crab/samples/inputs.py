"""From a record to a prompt: its media are decoded and laid out as the model reads them. No weights are needed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from transformers import BatchFeature

from crab import tasks
from crab.data import records
from crab.data.media import RATE, clip_seconds
from crab.models import published
from crab.models.checkpoint import load_processor
from crab.models.protocol import Media, model_of

_LEAST_FRAMES = 3  # of a spectrogram, for one token: the encoder halves their number twice
#: How media are shown: as they are, or as the published loader shows them (`crab.models.published`).
COMPATIBILITY = ("none", "published")


def check_compatibility(compatibility: str) -> None:
    """ValueError if ``compatibility`` is unknown."""
    if compatibility not in COMPATIBILITY:
        raise ValueError(f"encode.compatibility is {compatibility!r}; choose one of {', '.join(COMPATIBILITY)}")


@lru_cache(maxsize=2)
def processor_of(base: str | Path, version: str):
    """The processor of a base, loaded once per process. ``version`` is another one once the base has changed."""
    return load_processor(base)


def prompt_of(processor, slot: str, record: Mapping, prompt: tasks.Prompt, compatibility: str = "none") -> BatchFeature:
    """The prompt of a record that `crab.data.records.read` gave, with the words of `tasks.prompt`, for the model.

    Raises:
        ValueError: a sound is too short or too long for the base; naming the file and the record.
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
    """
    frames, around = tasks.get_slot(slot).frames, {"system": prompt.system, "lead": prompt.media}
    if compatibility != "published":
        return prepared(processor, record, frames, prompt.question, **around)
    inputs = published.prepared(slot, processor, record, frames, prompt.question, **around)
    _check_heard(processor, record, inputs)
    return inputs


def load_media(record: Mapping, frames: int) -> list[Media]:
    """The media of `crab.data.records.load`, each with its kind, and a video with its rate.

    This is the rate at which its frames were taken, from their time stamps: a clip of 3 s and one of 60 s that are
    shown by equally many frames differ in it.
    """
    items = []
    for item, data in zip(record["media"], records.load(record, frames), strict=True):
        if item.kind == "video":
            pictures, seconds = data
            step = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
            if len(set(seconds)) < len(seconds):  # a short clip gives some frames twice; each stands for an equal part
                step = clip_seconds(item.path) / frames
            items.append(Media("video", pictures, fps=round(float(1 / step), 6) if step > 0 else 1.0))
        else:
            items.append(Media(item.kind, data))
    return items


def prepared(processor, record: Mapping, frames: int, instruction: str, **around: str) -> BatchFeature:
    """The prompt of a record, as the model's ``prepare`` makes it, in which each video keeps its own seconds per frame.

    ``around`` are ``system`` and ``lead`` of `crab.models.protocol.AudioVisualModel.prepare`. Errors are those of
    `prompt_of`: a sound that is too long would be cut off, while the frames span the whole clip.
    """
    media = load_media(record, frames)
    for item, source in zip(media, record["media"], strict=True):
        if item.kind == "audio" and (problem := published.cut_off(processor, item.data)):
            raise ValueError(f"encode: {source.path}, a sound of {_named(record)}, {problem}")
    prompt = model_of(processor).prepare(processor, media, instruction, **around)
    _check_heard(processor, record, prompt)
    return prompt


def _named(record: Mapping) -> str:
    return f"record {record['id']}" if "id" in record else "a record"


def _check_heard(processor, record: Mapping, prompt: Mapping) -> None:
    """ValueError, naming the record, if a sound of a prompt is so short that no token is made of it."""
    if "feature_attention_mask" in prompt and int(prompt["feature_attention_mask"].sum(-1).min()) < _LEAST_FRAMES:
        least = (_LEAST_FRAMES - 1) * processor.feature_extractor.hop_length / RATE
        files = " or ".join(item.path for item in record["media"] if item.kind == "audio")
        raise ValueError(
            f"encode: {files}, a sound of {_named(record)}, gives at most {least:.3g} s to hear, of which this base "
            "makes no token; leave the record out of its list, or take a base with a finer spectrogram (hop_length)"
        )
