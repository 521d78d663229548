"""Media shown as the published loader of Crab+ shows them (github.com/GeWu-Lab/Crab_Plus, ``dataset/``), quirks included.

What differs from `crab.study.encode`, which shows a clip as it is:

- frames: spread evenly from the first of the clip to the last, both taken. A clip that has fewer than are asked for is shown by
  its first and last alone, one of a single frame by ten black ones;
- pictures are scaled bicubically; clips are turned as they are marked to be (decord does that), pictures are not;
- time: the model is told one frame a second, thus 2 s for each pair of frames, however long the clip is;
- sound shorter than 1 s is filled up with silence. Then emotion slots hear its first 4 s, filled up likewise. Elsewhere it is cut
  into equal shares, as if it lasted 60 s (avqa), 5 s (arig, s4, ms3) or 10 s (all others): s4, ms3 and ref_avs hear the share
  that the record's index numbers (in training, s4 always the first), avqa ten pieces of two shares, around the start of every
  sixth, and the others all shares, arig too;
- order: the sound of a clip stands after its frames, not between them; the two clips of a2v are joined to one of twenty
  frames, and the two sounds of v2a to one.

Not followed: a clip that does not decode is an error here, not black frames; frames that an edit list says not to show are not
counted, which decord does count; and resampling is that of `crab.data.media`.
Nor are the published prompts' words, or how answers are read for scoring: these do not belong to the media.
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
from crab.models import omni

_SHARES = {"avqa": 60, "arig": 5, "s4": 5, "ms3": 5}  # of all others 10
_SLACK = 0.5  # seconds by which a clip may be longer than it is said to be
_FELT = 4  # seconds that emotion slots hear
_BLACK = 10  # frames in place of a clip that has but one, whatever is asked for


def prepared(slot: str, processor, record: Mapping, frames: int, instruction: str):
    """A record's prompt, for `omni.encode`, with the media as :func:`load_media` gives them.

    Raises:
        ValueError: a sound is longer than what the model hears; of the joined ones of v2a the second would be cut off.
        crab.data.media.MediaError: naming the file that is missing or cannot be read.
    """
    items = load_media(slot, record, frames)
    of = {kind: [item.data for item in items if item.kind == kind] for kind in omni.PLACEHOLDER}
    heard = processor.feature_extractor.n_samples
    if tasks.get_slot(slot).media == "video_two_audios" and len(of["audio"][0]) > heard:
        raise ValueError(f"encode: compatibility is 'published', which joins the sounds of {record['id']} to "
                         f"{len(of['audio'][0]) / media.RATE:.0f} s, and this base hears {heard / media.RATE:.0f} s; "
                         f"take {slot} out of slots, or set compatibility to none")
    for wave in of["audio"]:
        if words := cut_off(processor, wave):
            raise ValueError(f"encode: compatibility is 'published', and what is heard of {record['id']} {words}")
    shown = "".join(omni.PLACEHOLDER[item.kind] for item in items)
    return processor(
        text=[f"{omni.START} user {shown} {instruction} {omni.END} {omni.START} assistant"],
        images=of["image"] or None,
        videos=of["video"] or None,
        audio=of["audio"] or None,
        **({"fps": 1.0} if of["video"] else {}),
        **({"sampling_rate": media.RATE} if of["audio"] else {}),
        return_tensors="pt",
    )


def cut_off(processor, wave: np.ndarray) -> str:
    """What is wrong with a sound that the processor would cut, silently, and the mend; empty where at most `_SLACK` s are lost."""
    heard = processor.feature_extractor.n_samples
    if len(wave) <= heard + _SLACK * media.RATE:
        return ""
    return (f"lasts {len(wave) / media.RATE:.1f} s, of which this base hears {heard / media.RATE:.0f} s; cut clip and sound to that, leave "
            "the record out of its list, or take a base that hears more")


def load_media(slot: str, record: Mapping, frames: int) -> list[omni.Media]:
    """Decoded media of a record that `crab.data.records.read` gave, in the order of the prompt; two of a kind are joined."""
    items: list[omni.Media] = []
    for item in record["media"]:
        if item.kind == "video":
            data = read_video(item.path, frames)
        elif item.kind == "image":
            data = _scaled(_image(item.path))
        else:
            first = slot == "s4" and "image_path" in record  # training records of s4 have no index
            data = sound(slot, media.read_audio(item.path), 0 if first else item.second)
        if items and items[-1].kind == item.kind:
            items[-1].data = np.concatenate([items[-1].data, data])
        else:
            items.append(omni.Media(item.kind, data))
    return items


def read_video(path: str | Path, frames: int) -> np.ndarray:
    """Frames of a clip, uint8 [frames, 224, 224, 3]: see the module's words on which, and on clips that have fewer."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            total = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))  # edit lists discard some
            if total == 1:
                return np.zeros((_BLACK, media.SIZE, media.SIZE, 3), np.uint8)
            wanted = torch.linspace(0, total - 1, frames if frames <= total else 2).round().long().tolist()
            container.seek(0)
            pictures, last = [], None
            for place, last in enumerate(container.decode(stream)):
                if place == wanted[len(pictures)]:
                    pictures.append(_upright(last))
                    if len(pictures) == len(wanted):
                        break
            if last is None:
                raise media.MediaError(path, "has a video stream without frames that decode", "copy or build it again")
            pictures += [_upright(last)] * (len(wanted) - len(pictures))  # not every packet need give a frame
            return np.stack(pictures)
    except (av.error.FFmpegError, EOFError, IndexError) as error:
        raise media.MediaError(path, f"cannot be decoded as video ({error})", "copy or build it again") from error


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return _scaled(frame.to_image().rotate(round(frame.rotation / 90) * 90, expand=True))


def _image(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise media.MediaError(path, f"cannot be decoded as an image ({error})", "copy or build it again") from error


def _scaled(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((media.SIZE, media.SIZE), Image.Resampling.BICUBIC))


def sound(slot: str, wave: np.ndarray, second: int | None) -> np.ndarray:
    """What is heard of a sound (float32 [samples], 16 kHz): see the module's words.

    Args:
        second: index of the share that a pixel-level slot hears.
    """
    entry = tasks.get_slot(slot)
    wave = _filled(wave, media.RATE)
    if entry.family == "emotion recognition":
        return _filled(wave, _FELT * media.RATE)[: _FELT * media.RATE]
    shares = _SHARES.get(entry.name, 10)
    share = len(wave) // shares
    if entry.masks:
        return wave[second * share : (second + 1) * share] if second < shares else np.zeros(share, wave.dtype)
    if entry.name == "avqa":
        wave = np.pad(wave, (-(-share // 2), 0))  # the first piece begins half a share before the clip
        return np.concatenate([wave[place * share : (place + 2) * share] for place in range(0, shares, 6)])
    return wave[: shares * share]


def _filled(wave: np.ndarray, length: int) -> np.ndarray:
    return np.pad(wave, (0, max(0, length - len(wave))))
