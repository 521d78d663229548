"""The encode stage: decode every sample's media and run the frozen encoders on it, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from crab import tasks
from crab.data import records
from crab.models import omni
from crab.models import published
from crab.study.dataset import load_base, write_slot
from crab.study.pool import run_pool

#: Samples that go through the encoders together; their decoded media are in memory at once.
BATCH = 16
_LEAST_FRAMES = 3  # of a spectrogram, for a token: the encoder halves their number twice
#: How media are shown: as they are, or as the published loader does (`crab.models.published`).
COMPATIBILITY = ("none", "published")


def load_media(record: Mapping, frames: int) -> list[omni.Media]:
    """Decoded media of a record that `crab.data.records.read` gave, in the order in which the prompt shows them.

    A video's rate is that at which its frames were taken, from their own times: a clip of 3 s and one of 60 s, shown by
    as many frames, differ in it.

    Raises:
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
    """
    items = []
    for item, data in zip(record["media"], records.load(record, frames), strict=True):
        if item.kind == "video":
            pictures, seconds = data
            step = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
            if len(set(seconds)) < len(seconds):  # a short clip gives some frames twice: each then stands for its part of the clip
                step = records.clip_seconds(item.path) / frames
            items.append(omni.Media("video", pictures, fps=round(float(1 / step), 6) if step > 0 else 1.0))
        else:
            items.append(omni.Media(item.kind, data))
    return items


def prepared(processor, record: Mapping, frames: int, instruction: str):
    """A record's prompt, as `omni.prepare` makes it, in which each video keeps its own seconds a frame.

    Raises:
        ValueError: a sound is longer than what the model hears, which would cut it off while the frames span all of the clip.
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
    """
    media = load_media(record, frames)
    for item, source in zip(media, record["media"], strict=True):
        if item.kind == "audio" and (words := published.cut_off(processor, item.data)):
            raise ValueError(f"encode: {source.path}, a sound of {_named(record)}, {words}")
    prompt = omni.prepare(processor, media, instruction)
    rates = [item.fps for item in media if item.kind == "video"]
    if len(set(rates)) > 1:  # the processor takes one rate for all of a prompt's videos
        prompt["video_second_per_grid"] = [processor.video_processor.temporal_patch_size / rate for rate in rates]
    return prompt


def encode_slot(
    root: str | Path,
    slot: str,
    split: str,
    base: str | Path,
    out: str | Path,
    compatibility: str = "none",
) -> int:
    """Encode one slot and split into ``out``; returns the number of samples.

    Args:
        root: holds ``AVUIE_2``. compatibility: one of :data:`COMPATIBILITY`.

    Raises:
        ValueError: no records, or a sound too short or too long for the base; naming the record.
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
        RuntimeError: the encoders fail; naming the records they were given.
    """
    _check(compatibility)
    prepare = partial(published.prepared, slot) if compatibility == "published" else prepared
    found = records.read(root, slot, split)
    if not found:
        raise ValueError(f"{Path(root) / tasks.json_path(slot, split)}: no records to encode")
    model, processor = load_base(base)
    samples, frames = [], tasks.get_slot(slot).frames
    for first in range(0, len(found), BATCH):
        batch = found[first : first + BATCH]
        prompts = [prepare(processor, r, frames, tasks.instruction(slot, r)) for r in batch]
        for record, prompt in zip(batch, prompts, strict=True):
            _check_heard(processor, record, prompt)
        try:
            samples += omni.encode(model, prompts)
        except RuntimeError as error:
            raise RuntimeError(f"encode: {slot}/{split}, records {batch[0]['id']} to {batch[-1]['id']}: {error}") from error
    write_slot(
        out,
        slot,
        split,
        samples,
        [record["id"] for record in found],
        [tasks.instruction(slot, record) for record in found],
        # the truth of a test record may stand outside its answer, which then is not there to be learned
        {f: [tasks.target(slot, record, f) for record in found] if split == "train" else [] for f in tasks.FORMS},
    )
    return len(found)


def encode_all(
    root: str | Path,
    slots: Sequence[str],
    base: str | Path,
    out: str | Path,
    workers: int = 2,
    compatibility: str = "none",
) -> dict[str, int]:
    """Encode all splits of every slot in worker processes; returns samples by ``slot/split``."""
    _check(compatibility)
    jobs = [
        (f"{slot}/{split}", partial(encode_slot, root, slot, split, base, out, compatibility))
        for split in tasks.SPLITS
        for slot in slots
        if split in tasks.get_slot(slot).splits
    ]
    return run_pool(jobs, workers, "encode")


def _named(record: Mapping) -> str:
    return f"record {record['id']}" if "id" in record else "a record"


def _check_heard(processor, record: Mapping, prompt: Mapping) -> None:
    """Raise ValueError, naming the record, if one of a prompt's sounds is so short that no token is made of it."""
    if "feature_attention_mask" in prompt and int(prompt["feature_attention_mask"].sum(-1).min()) < _LEAST_FRAMES:
        least = (_LEAST_FRAMES - 1) * processor.feature_extractor.hop_length / omni.SAMPLE_RATE
        files = " or ".join(item.path for item in record["media"] if item.kind == "audio")
        raise ValueError(f"encode: {files}, a sound of {_named(record)}, gives no more than {least:.3g} s to hear, of which this base makes no "
                         "token; leave the record out of its list, or take a base whose spectrogram is finer (hop_length)")


def _check(compatibility: str) -> None:
    if compatibility not in COMPATIBILITY:
        raise ValueError(f"encode: compatibility is {compatibility!r}; choose one of {', '.join(COMPATIBILITY)}")
