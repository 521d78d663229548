"""Small raw data sets on disk, as `raw_sets.yaml` lists them."""

import functools
import itertools
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import yaml
from made_media import muxed

from crab.data import media
from crab.data.sources import Raw, drafts, finished

SETS = yaml.safe_load((Path(__file__).parent / "raw_sets.yaml").read_text(encoding="utf-8"))
KINDS = {".mp4": "sound.mp4", ".mkv": "sound.mp4", ".avi": "sound.mp4", ".wav": "ten.wav", ".jpg": "frame.jpg"}


@functools.cache
def shelf():
    """A folder with one file of each kind: a clip with sound, one without, a sound of ten seconds, a picture."""
    folder = tempfile.TemporaryDirectory()
    root, rng = Path(folder.name), np.random.default_rng(0)
    frames = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(8)]
    wave = np.sin(np.arange(160_000) / 5) / 2
    muxed(root / "sound.mp4", frames, sound=("aac", wave[None, :16000], 16000, "mono", 0, 0), rate=8)
    media.write_video(root / "mute.avi", frames, 8)
    media.write_audio(root / "ten.wav", wave)
    media.write_image(root / "frame.jpg", np.repeat(np.repeat(frames[0], 4, 0), 4, 1))
    return folder


def square(top, left=32, side=64):
    mask = np.zeros((224, 224), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def paths(pattern):
    """The paths that a pattern with braces stands for."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def write(root, slot="", changes=(), media_paths=()):
    """Write the raw set of a slot, or only these files and media, and return its folder.

    The mask of a frame is a square whose place follows from the frame's number.

    Args:
        changes: file -> its text or JSON; "+text": its first line, then this text; a map: these fields of its first
            record; None: the file or folder is removed.
        media_paths: further media; {a,b} stands for both.
    """
    entry = SETS.get(slot, {"files": {}, "media": []})
    for path in (root / path for pattern in [*entry["media"], *media_paths] for path in paths(pattern)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            media.write_mask(path, square(16 * int(re.search(r"(\d+)\.png", path.name)[1])))
        else:
            shutil.copy(Path(shelf().name) / KINDS[path.suffix], path)
    changes = {name: changed(entry["files"].get(name), change) for name, change in dict(changes).items()}
    for name, content in (entry["files"] | changes).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            shutil.rmtree(path, ignore_errors=True)
        elif content in ("mute.avi", "sound.mp4"):
            shutil.copy(Path(shelf().name) / content, path)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8", newline="")
    return root


def changed(old, change):
    if isinstance(change, dict) and isinstance(old, list):
        return [old[0] | change]
    if isinstance(change, dict) and "database" in (old or {}):
        return {"database": {"v": next(iter(old["database"].values())) | change}}
    if isinstance(change, str) and change.startswith("+"):
        return f"{old.splitlines()[0]}\n{change[1:]}\n"
    return change


def records_of(slot, root, split="train", **options):
    """Records of a split, whose media are not placed."""
    return [finished(slot, draft) for draft in drafts(slot, Raw(root, **options), split)]
