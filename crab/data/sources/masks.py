"""Boxes and points from masks: AVSBench (s4, ms3, arig) and Ref-AVS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crab.data import media
from crab.data.sources.raw import Draft, LeftOut, Raw, SourceError, one_of, plain, whole
from crab.world.views.where import points_inside
from crab.tasks.referring import NULL
from crab.tasks.segmentation import Prompt, bounding_box

OLDER = "s4_meta_data.csv"
SETS = {"s4": "v1s", "arig": "v1s", "ms3": "v1m"}  # folders of AVSBench, which metadata.csv calls `label`
REF_SPLITS = {"train": ("train",), "test": ("test_s", "test_u", "test_n")}


def avs_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Frames of the clips in metadata.csv: five a clip, but of the single-source training clips the labelled first alone.

    The older release has s4_meta_data.csv instead, for single sources; what sounds is there called by its category.
    """
    if SETS[slot] == "v1s" and raw.has(OLDER) and not raw.has("metadata.csv"):
        for where, row in raw.rows(OLDER, ("category", "split")):
            name, *_ = row.values()  # its first column, whatever it is called
            if row["split"] not in ("train", "val", "test"):
                raw.fault(SourceError(f"{where}: split {row['split']!r} must be train, val or test; correct it"))
            elif row["split"] == split:
                row = {"vid": name, "uid": name, "a_obj": row["category"], "split": split, "label": "v1s"}
                for frame in range(1 if split == "train" else 5):
                    yield f"{where}, frame {frame}", {**row, "frame": frame}
        return
    for where, row in raw.rows("metadata.csv", ("vid", "uid", "a_obj", "split", "label")):
        if row["split"] not in ("train", "val", "test") or row["label"] not in ("v1s", "v1m", "v2"):
            raw.fault(SourceError(f"{where}: split {row['split']!r} of {row['label']!r} must be train, val or test of v1s, v1m "
                                  "or v2; correct it"))
        elif (row["split"], row["label"]) == (split, SETS[slot]):
            for frame in range(1 if (split, row["label"]) == ("train", "v1s") else 5):
                yield f"{where}, frame {frame}", {**row, "frame": frame}


def avs(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """AVSBench labels what sounds in a clip (`a_obj`) and where it is, a second a frame.

    A frame in which nothing is marked has no box and is left out.
    """
    frame, uid = row["frame"], plain(where, "uid", row["uid"])
    image, audio, labels = _newer(raw, row) if raw.has("metadata.csv") else _older(raw, where, row)
    prompt = _prompt(where, image, audio, labels)
    if prompt is None:
        raise LeftOut("nothing is marked in the frame", str(labels))
    base = f"AVS/{row['label']}/{uid}"
    shown = f"{base}/frames/{frame}{image.suffix}"
    files = {shown: image, f"{base}/audio.wav": audio, f"{base}/labels_rgb/{frame}.png": labels}
    record = {"image_path" if split == "train" else "visual_path": shown,
              "audio_path": f"{base}/audio.wav", "a_obj": row["a_obj"], "frame_idx": frame}
    if slot == "arig":
        truth = prompt.box
        record |= {"top_left": list(truth[:2]), "bottom_right": list(truth[2:])}
    else:
        truth = prompt
        record |= {"vid": row["vid"], "uid": uid}
    yield Draft(where, record, truth, f"what sounds in the clip : {row['a_obj']} . what sounds now is seen here .", files,
                (row["a_obj"],))


def _newer(raw: Raw, row: dict) -> tuple[Path, Path, Path]:
    """Image, sound and mask of a frame where metadata.csv lists the clips."""
    clip = raw.file("metadata.csv").parent / row["label"] / row["uid"]
    return clip / f"frames/{row['frame']}.jpg", clip / "audio.wav", clip / f"labels_rgb/{row['frame']}.png"


def _older(raw: Raw, where: str, row: dict) -> tuple[Path, Path, Path]:
    """Those of the older release: a folder for each kind, split and category; frames are numbered from 1."""
    base = raw.file(OLDER).parent
    base = base / "s4_data" if (base / "s4_data").is_dir() else base
    uid, folder = row["uid"], f"{row['split']}/{plain(where, 'category', row['a_obj'])}"
    named = f"{folder}/{uid}/{uid}_{row['frame'] + 1}.png"
    return base / "visual_frames" / named, base / f"audio_wav/{folder}/{uid}.wav", base / "gt_masks" / named


def ref_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Frames for the expressions of metadata.csv (`vid,uid,split,fid,exp`): all for test, one an expression, in turn, for training.

    The folder of a clip is named by its `uid` without object and number, as the set's own loader has it; else by its `vid`.
    """
    frames = Counter(p.parent.parent.name for p in raw.paths if p.parent.name == "frames" and p.suffix == ".jpg")
    for number, (where, row) in enumerate(raw.rows("metadata.csv", ("vid", "uid", "split", "fid", "exp"))):
        part = row["split"]
        if part not in ("train", "val", *REF_SPLITS["test"]):
            raw.fault(SourceError(f"{where}: split {part!r} must be train, val, test_s, test_u or test_n; correct it"))
        elif part in REF_SPLITS[split]:
            clip = row["uid"].rsplit("_", 2)[0]
            clip = clip if clip in frames else row["vid"]
            count = max(frames[clip], 1)  # a clip without frames is missed in its first
            for frame in range(count) if split == "test" else [number % count]:
                yield f"{where}, frame {frame}", {**row, "vid": clip, "frame": frame}


def ref(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """Ref-AVS labels what an expression means, and its mask in each frame; in the null split, that it means nothing there."""
    frame, vid, null = row["frame"], plain(where, "vid", row["vid"]), row["split"] == "test_n"
    base = raw.file("metadata.csv").parent
    number = whole(where, "fid", row["fid"] if row["fid"].isdigit() or not null else "0")
    while null and (base / f"gt_mask/{vid}/fid_{number}").exists():  # a number that names no thing of the clip
        number += 1
    image, audio = base / f"media/{vid}/frames/{frame}.jpg", base / f"media/{vid}/audio.wav"
    labels = base / f"gt_mask/{vid}/fid_{number}/{frame:05d}.png"
    truth = _prompt(where, image, audio, None if null else labels) or NULL
    if truth == NULL and not null and split == "test":
        raise LeftOut("nothing is marked in the frame", str(labels))
    files = {f"media/{vid}/frames/{frame}.jpg": image, f"media/{vid}/audio.wav": audio}
    said = {"idx": frame, "description": row["exp"]}
    if split == "test":
        said = {"frame_idx": frame, "object": row["exp"], "split": one_of(where, row["split"], REF_SPLITS["test"], "split")}
    record = {"image_path" if split == "train" else "visual_path": f"media/{vid}/frames/{frame}.jpg",
              "audio_path": f"media/{vid}/audio.wav", "vid": vid, "uid": row["uid"], "fid": number, **said}
    if truth == NULL:
        yield Draft(where, record, truth, "what is described is not seen here .", files)
        return
    files[f"gt_mask/{vid}/fid_{number}/{frame:05d}.png"] = labels
    named = row["uid"].removeprefix(f"{vid}_").rpartition("_")[0]  # <vid>_<object>_<number>
    chain = f"what is described is seen here{f' : {named}' if named else ''} ."
    yield Draft(where, record, truth, chain, files, (named,) if named else ())


def _prompt(where: str, image: Path, audio: Path, labels: Path | None) -> Prompt | None:
    """Box and points of a mask; None if it marks nothing, or there is to be none."""
    for kind, path in (("image", image), ("sound", audio), ("mask", labels)):
        if path is not None and not path.is_file():
            raise LeftOut(f"no {kind} file", str(path))
    if labels is None:
        return None
    try:
        mask = media.read_mask(labels)
    except media.MediaError as error:
        raise SourceError(f"{where}: {error}") from error
    box = bounding_box(mask)
    if box is None:
        return None
    if np.count_nonzero(mask) < 3:
        raise LeftOut("a mask too small for three points", str(labels))
    return Prompt(box, tuple(points_inside(mask)))
