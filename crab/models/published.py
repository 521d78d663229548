"""Media as the published loader of Crab+ shows them (github.com/GeWu-Lab/Crab_Plus, ``dataset/``), with its quirks.

The differences from `crab.samples.encode`, which shows a clip as it is:

- Frames are spread evenly from the first to the last of the clip. A clip with fewer frames than asked for shows only
  its first and last. A clip of one frame shows ten black frames.
- Images are scaled bicubically. Clips are rotated as their metadata says (decord does so); images are not.
- Time: the model is told one frame per second, so 2 s per pair of frames, whatever the length of the clip.
- A sound shorter than 1 s is padded with silence. Emotion slots then hear the first 4 s, padded likewise. For other
  slots the sound is cut into equal shares, as if it lasted 60 s (avqa), 5 s (arig, s4, ms3) or 10 s (all others).
  s4, ms3 and ref_avs hear the share with the index of the record (s4 in training: the first); avqa hears ten pieces of
  two shares, around the start of every sixth share; all others, arig too, hear all shares.
- The sound of a clip stands after its frames, not between them. The two clips of a2v are joined to one of twenty
  frames, and the two sounds of v2a to one.

Three things are not copied. A clip that does not decode is an error here, not black frames. Frames that an edit list
hides are not counted; decord counts them. Resampling is that of `crab.data.media`. The words of the published prompts
come from a file of the user's (``encode.prompts``); how answers are read for scoring is not part of the media.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from crab import tasks
from crab.data import media
from crab.models.protocol import Media, model_of

_SHARES = {"avqa": 60, "arig": 5, "s4": 5, "ms3": 5}  # 10 for all other slots
_SLACK = 0.5  # seconds by which a clip may be longer than announced
_EMOTION_SECONDS = 4  # seconds that emotion slots hear
_BLACK_FRAMES = 10  # in place of a clip of one frame, whatever number is asked for


def prepared(slot: str, processor, record: Mapping, frames: int, instruction: str, **around: str):
    """The prompt of a record, for the encoders, with the media of `load_media`. ValueError if a sound is too long.

    ``around`` are ``system`` and ``lead`` of `crab.models.protocol.AudioVisualModel.prepare`.
    """
    items = load_media(slot, record, frames)
    heard = processor.feature_extractor.n_samples
    for wave in (item.data for item in items if item.kind == "audio"):
        if tasks.get_slot(slot).media == "video_two_audios" and len(wave) > heard:
            raise ValueError(
                f"encode.compatibility is 'published', which joins the sounds of {record['id']} to "
                f"{len(wave) / media.RATE:.0f} s, and this base hears {heard / media.RATE:.0f} s; "
                f"take {slot} out of encode.slots, or set compatibility to none"
            )
        if problem := cut_off(processor, wave):
            raise ValueError(f"encode.compatibility is 'published', and the sound of {record['id']} {problem}")
    return model_of(processor).prepare(processor, items, instruction, turns=False, **around)


def cut_off(processor, wave: np.ndarray) -> str:
    """The problem with a sound that the processor would cut silently, and how to fix it; empty up to `_SLACK` s."""
    heard = processor.feature_extractor.n_samples
    if len(wave) <= heard + _SLACK * media.RATE:
        return ""
    return (
        f"lasts {len(wave) / media.RATE:.1f} s, of which this base hears {heard / media.RATE:.0f} s; cut clip and "
        "sound to that length, leave the record out of its list, or take a base that hears more"
    )


def load_media(slot: str, record: Mapping, frames: int) -> list[Media]:
    """Decoded media of a record of `crab.data.records.read`, in the order of the prompt. Two of a kind are joined."""
    items: list[Media] = []
    for item in record["media"]:
        if item.kind == "video":
            data = read_video(item.path, frames)
        elif item.kind == "image":
            with media.opened(item.path) as image:
                data = _scaled(image.convert("RGB"))
        else:
            first = slot == "s4" and "image_path" in record  # training records of s4 have no index
            data = sound(slot, media.read_audio(item.path), 0 if first else item.second)
        if items and items[-1].kind == item.kind:
            items[-1].data = np.concatenate([items[-1].data, data])
        else:
            items.append(Media(item.kind, data))
    return items


def read_video(path: str | Path, frames: int) -> np.ndarray:
    """Frames of a clip, uint8 [frames, 224, 224, 3]. The top of this module says which, and when there are fewer."""
    with media.decoding(path, "a video"), media.open_container(path, "video") as streams:
        container, stream = streams.container, streams.video
        # an edit list discards some packets
        total = sum(not packet.hidden for packet in media.packets(container, stream))
        if total == 1:
            return np.zeros((_BLACK_FRAMES, media.SIZE, media.SIZE, 3), np.uint8)
        wanted = torch.linspace(0, total - 1, frames if frames <= total else 2).round().long().tolist()
        images, frame = [], None
        for index, frame in enumerate(container.decode(stream)):
            if index == wanted[len(images)]:
                images.append(_upright(frame))
                if len(images) == len(wanted):
                    break
        if frame is None:
            raise media.MediaError(path, "has a video stream without frames that decode", "copy or build it again")
        images += [_upright(frame)] * (len(wanted) - len(images))  # some packets give no frame
        return np.stack(images)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return _scaled(frame.to_image().rotate(round(frame.rotation / 90) * 90, expand=True))


def _scaled(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((media.SIZE, media.SIZE), Image.Resampling.BICUBIC))


def sound(slot: str, wave: np.ndarray, second: int | None) -> np.ndarray:
    """The part of a sound [samples] that the model hears; ``second`` is the share that a pixel-level slot hears."""
    entry = tasks.get_slot(slot)
    wave = _padded(wave, media.RATE)
    if entry.family == "emotion recognition":
        return _padded(wave, _EMOTION_SECONDS * media.RATE)[: _EMOTION_SECONDS * media.RATE]
    shares = _SHARES.get(entry.name, 10)
    share = len(wave) // shares
    if entry.masks:
        return wave[second * share : (second + 1) * share] if second < shares else np.zeros(share, wave.dtype)
    if entry.name == "avqa":
        wave = np.pad(wave, (-(-share // 2), 0))  # the first piece begins half a share before the clip
        return np.concatenate([wave[index * share : (index + 2) * share] for index in range(0, shares, 6)])
    return wave[: shares * share]


def _padded(wave: np.ndarray, length: int) -> np.ndarray:
    return np.pad(wave, (0, max(0, length - len(wave))))
