"""The encode stage: decode the media of every sample and run the frozen encoders on them, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from crab import tasks
from crab.data import records
from crab.data.files import digest_of, file_digest, write_json
from crab.data.media import clip_seconds
from crab.models import omni, published
from crab.models.checkpoint import base_digest, load_base
from crab.study.code import code_digest
from crab.study.pool import run_pool
from crab.samples.reading import MANIFEST, SlotData, write_slot

#: Samples that go through the encoders together. Their decoded media are in memory at once.
BATCH = 16
_LEAST_FRAMES = 3  # of a spectrogram, for one token: the encoder halves their number twice
#: How media are shown: as they are, or as the published loader shows them (`crab.models.published`).
COMPATIBILITY = ("none", "published")
#: Modules that decide how media become features.
ENCODING = ("crab.data.media", "crab.data.records", "crab.models.omni", "crab.models.published", "crab.samples.encode")


def load_media(record: Mapping, frames: int) -> list[omni.Media]:
    """Decoded media of a record that `crab.data.records.read` gave, in the order of the prompt.

    The rate of a video is that at which its frames were taken, from their time stamps: a clip of 3 s and one of 60 s
    that are shown by equally many frames differ in it.

    Raises:
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
    """
    items = []
    for item, data in zip(record["media"], records.load(record, frames), strict=True):
        if item.kind == "video":
            pictures, seconds = data
            step = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
            if len(set(seconds)) < len(seconds):  # a short clip gives some frames twice; each stands for an equal part
                step = clip_seconds(item.path) / frames
            items.append(omni.Media("video", pictures, fps=round(float(1 / step), 6) if step > 0 else 1.0))
        else:
            items.append(omni.Media(item.kind, data))
    return items


def prepared(processor, record: Mapping, frames: int, instruction: str):
    """The prompt of a record, as `omni.prepare` makes it, in which each video keeps its own seconds per frame.

    Raises:
        ValueError: a sound is longer than the model hears. It would be cut off, while the frames span the whole clip.
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
    """
    media = load_media(record, frames)
    for item, source in zip(media, record["media"], strict=True):
        if item.kind == "audio" and (problem := published.cut_off(processor, item.data)):
            raise ValueError(f"encode: {source.path}, a sound of {_named(record)}, {problem}")
    prompt = omni.prepare(processor, media, instruction)
    rates = [item.fps for item in media if item.kind == "video"]
    if len(set(rates)) > 1:  # the processor takes one rate for all videos of a prompt
        prompt["video_second_per_grid"] = [processor.video_processor.temporal_patch_size / rate for rate in rates]
    return prompt


def encode_slot(
    root: str | Path, slot: str, split: str, base: str | Path, out: str | Path, compatibility: str = "none"
) -> int:
    """Encode one slot and split into ``out``; returns the number of samples.

    Args:
        root: holds ``AVUIE_2``. compatibility: one of :data:`COMPATIBILITY`.

    Raises:
        ValueError: no records, or a sound too short or too long for the base; naming the record.
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
        RuntimeError: the encoders fail; naming the records.
    """
    if compatibility not in COMPATIBILITY:
        raise ValueError(f"encode.compatibility is {compatibility!r}; choose one of {', '.join(COMPATIBILITY)}")
    prepare = partial(published.prepared, slot) if compatibility == "published" else prepared
    rows = records.read(root, slot, split)
    if not rows:
        raise ValueError(f"{Path(root) / tasks.json_path(slot, split)}: no records to encode")
    model, processor = load_base(base)
    samples, frames = [], tasks.get_slot(slot).frames
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        prompts = [prepare(processor, row, frames, tasks.instruction(slot, row)) for row in part]
        for row, prompt in zip(part, prompts, strict=True):
            _check_heard(processor, row, prompt)
        try:
            samples += omni.encode(model, prompts)
        except RuntimeError as error:
            raise RuntimeError(
                f"encode: {slot}/{split}, records {part[0]['id']} to {part[-1]['id']}: {error}"
            ) from error
    # Test records may hold their truth outside the answer, which then is not there to be learned.
    targets = {form: [tasks.target(slot, r, form) for r in rows] if split == "train" else [] for form in tasks.FORMS}
    ids, instructions = [row["id"] for row in rows], [tasks.instruction(slot, row) for row in rows]
    write_slot(out, SlotData(slot, split, samples, ids, instructions, targets))
    return len(rows)


def encode_all(
    root: str | Path,
    slots: Sequence[str] | None,
    base: str | Path,
    out: str | Path,
    workers: int = 2,
    compatibility: str = "none",
) -> dict[str, int]:
    """Encode all splits of every slot in worker processes, and write the manifest.

    A digest in the manifest covers what the features follow from: records and media, base, code and settings, and the
    texts that are asked and learned. It does not cover the features, which are rounded differently on other processors.

    Args:
        slots: None for all that were built.

    Returns:
        Samples by ``slot/split``.
    """
    built = records.read_manifest(root)
    slots = list(dict.fromkeys(key.partition("/")[0] for key in built)) if slots is None else list(slots)
    parts = [(slot, split) for split in tasks.SPLITS for slot in slots if split in tasks.get_slot(slot).splits]
    if absent := [f"{slot}/{split}" for slot, split in parts if f"{slot}/{split}" not in built]:
        raise ValueError(
            f"{root}: {absent[0]} was not built; take its slot out of encode.slots, or run the build stage"
        )
    jobs = [(f"{s}/{split}", partial(encode_slot, root, s, split, base, out, compatibility)) for s, split in parts]
    counts = run_pool(jobs, workers, "encode")
    settings = [base_digest(base), code_digest(*ENCODING), compatibility]
    manifest = {}
    for slot in slots:
        for split in tasks.get_slot(slot).splits:
            texts = file_digest(Path(out) / slot / f"{split}.json")
            digest = digest_of([built[f"{slot}/{split}"]["digest"], texts, *settings])
            manifest[f"{slot}/{split}"] = {"samples": counts[f"{slot}/{split}"], "digest": digest}
    write_json(Path(out) / MANIFEST, manifest)
    return counts


def _named(record: Mapping) -> str:
    return f"record {record['id']}" if "id" in record else "a record"


def _check_heard(processor, record: Mapping, prompt: Mapping) -> None:
    """ValueError, naming the record, if a sound of a prompt is so short that no token is made of it."""
    if "feature_attention_mask" in prompt and int(prompt["feature_attention_mask"].sum(-1).min()) < _LEAST_FRAMES:
        least = (_LEAST_FRAMES - 1) * processor.feature_extractor.hop_length / omni.SAMPLE_RATE
        files = " or ".join(item.path for item in record["media"] if item.kind == "audio")
        raise ValueError(
            f"encode: {files}, a sound of {_named(record)}, gives no more than {least:.3g} s to hear, of which "
            "this base makes no token; leave the record out of its list, or take a base with a finer spectrogram "
            "(hop_length)"
        )
