"""Boxes and points from masks: AVSBench (s4, ms3, arig) and Ref-AVS."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crab.data import media
from crab.data.sources.raw import Draft, LeftOut, Raw, Row, SourceError
from crab.tasks.referring import NULL
from crab.tasks.segmentation import Prompt, bounding_box, points_inside

OLDER = "s4_meta_data.csv"
SETS = {"s4": "v1s", "arig": "v1s", "ms3": "v1m"}  # folders of AVSBench; metadata.csv calls them `label`
REF_TESTS = ("test_s", "test_u", "test_n")


def avs(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """AVSBench labels what sounds in a clip (`a_obj`) and where it is, one frame per second.

    A clip has five frames, but of the single-source training clips only the first is labelled. A frame in which nothing
    is marked has no box and is left out. If there is no metadata.csv, the older release of the single sources is read.
    """
    older = SETS[slot] == "v1s" and raw.has(OLDER) and not raw.has("metadata.csv")
    frames = range(1 if (split, SETS[slot]) == ("train", "v1s") else 5)
    for clip in _older_clips(raw) if older else _clips(raw):
        if (clip["split"], clip["label"]) == (split, SETS[slot]):
            for row in (Row(f"{clip.place}, frame {frame}", {**clip, "frame": frame}) for frame in frames):
                with raw.reading(row):
                    yield _sounding(slot, row, *(_older_files(raw, row) if older else _files(raw, row)))


def _clips(raw: Raw) -> Iterator[Row]:
    for row in raw.rows("metadata.csv", ("vid", "uid", "a_obj", "split", "label")):
        with raw.reading(row):
            row.one_of("split", ("train", "val", "test"))
            row.one_of("label", ("v1s", "v1m", "v2"))
            yield row


def _files(raw: Raw, row: Row) -> tuple[Path, Path, Path]:
    """Image, sound and mask of a frame."""
    clip = raw.file("metadata.csv").parent / row["label"] / row.name("uid")
    return clip / f"frames/{row['frame']}.jpg", clip / "audio.wav", clip / f"labels_rgb/{row['frame']}.png"


def _older_clips(raw: Raw) -> Iterator[Row]:
    """Clips of the older release in the fields of the newer. The category of a clip says what sounds in it."""
    for row in raw.rows(OLDER, ("category", "split")):
        with raw.reading(row):
            name, *_ = row.values()  # its first column, whatever it is called
            part = row.one_of("split", ("train", "val", "test"))
            clip = {"vid": name, "uid": name, "a_obj": row["category"], "category": row["category"], "split": part}
            yield Row(row.place, clip | {"label": "v1s"})


def _older_files(raw: Raw, row: Row) -> tuple[Path, Path, Path]:
    """As `_files`. The older release has a folder per kind, split and category, and numbers frames from 1."""
    base, uid = raw.file(OLDER).parent, row.name("uid")
    base = base / "s4_data" if (base / "s4_data").is_dir() else base
    folder = f"{row['split']}/{row.name('category')}"
    frame = f"{folder}/{uid}/{uid}_{row['frame'] + 1}.png"
    return base / "visual_frames" / frame, base / f"audio_wav/{folder}/{uid}.wav", base / "gt_masks" / frame


def _sounding(slot: str, row: Row, image: Path, audio: Path, mask: Path) -> Draft:
    """The record of one frame."""
    prompt = _prompt(row.place, image, audio, mask)
    if prompt is None:
        raise LeftOut("nothing is marked in the frame", str(mask))
    clip, number, a_obj = f"AVS/{row['label']}/{row['uid']}", row["frame"], row["a_obj"]
    shown, sound = f"{clip}/frames/{number}{image.suffix}", f"{clip}/audio.wav"
    field = "image_path" if row["split"] == "train" else "visual_path"
    record = {field: shown, "audio_path": sound, "a_obj": a_obj, "frame_idx": number}
    if slot == "arig":
        truth = prompt.box
        record |= {"top_left": list(truth[:2]), "bottom_right": list(truth[2:])}
    else:
        truth = prompt
        record |= {"vid": row["vid"], "uid": row["uid"]}
    chain = f"what sounds in the clip : {a_obj} . what sounds now is seen here ."
    files = {shown: image, sound: audio, f"{clip}/labels_rgb/{number}.png": mask}
    return Draft(row.place, record, truth, chain, (a_obj,), files=files)


def ref_avs(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """Ref-AVS labels what an expression means, and its mask in each frame; in the null split, that it means nothing.

    For test an expression gives all frames of its clip, for training one frame, in turn. The folder of a clip is its
    `uid` without object and number, as the set's own loader has it; if there is no such folder, its `vid`.
    """
    frames = Counter(p.parent.parent.name for p in raw.paths if p.parent.name == "frames" and p.suffix == ".jpg")
    for number, clip in enumerate(raw.rows("metadata.csv", ("vid", "uid", "split", "fid", "exp"))):
        with raw.reading(clip):
            if clip.one_of("split", ("train", "val", *REF_TESTS)) not in (REF_TESTS if split == "test" else ("train",)):
                continue
            vid = clip["uid"].rsplit("_", 2)[0]
            vid = vid if vid in frames else clip["vid"]
            count = max(frames[vid], 1)  # of a clip without frames the first one is reported missing
            for frame in range(count) if split == "test" else [number % count]:
                row = Row(f"{clip.place}, frame {frame}", {**clip, "vid": vid, "frame": frame})
                with raw.reading(row):
                    yield _referred(raw.file("metadata.csv").parent, split, row)


def _referred(base: Path, split: str, row: Row) -> Draft:
    """The record of one frame."""
    frame, vid, null = row["frame"], row.name("vid"), row["split"] == "test_n"
    number = 0 if null and not row["fid"].isdigit() else row.whole("fid")
    while null and (base / f"gt_mask/{vid}/fid_{number}").exists():  # take a number that no object of the clip has
        number += 1
    shown, sound = f"media/{vid}/frames/{frame}.jpg", f"media/{vid}/audio.wav"
    mask = f"gt_mask/{vid}/fid_{number}/{frame:05d}.png"
    truth = _prompt(row.place, base / shown, base / sound, None if null else base / mask) or NULL
    if truth == NULL and not null and split == "test":
        raise LeftOut("nothing is marked in the frame", str(base / mask))
    record = {"image_path" if split == "train" else "visual_path": shown}
    record |= {"audio_path": sound, "vid": vid, "uid": row["uid"], "fid": number}
    if split == "train":
        record |= {"idx": frame, "description": row["exp"]}
    else:
        record |= {"frame_idx": frame, "object": row["exp"], "split": row["split"]}
    files = {name: base / name for name in (shown, sound)}
    if truth == NULL:
        return Draft(row.place, record, truth, "what is described is not seen here .", files=files)
    name = row["uid"].removeprefix(f"{vid}_").rpartition("_")[0]  # <vid>_<object>_<number>
    chain = f"what is described is seen here{f' : {name}' if name else ''} ."
    return Draft(row.place, record, truth, chain, (name,) if name else (), files=files | {mask: base / mask})


def _prompt(place: str, image: Path, audio: Path, labels: Path | None) -> Prompt | None:
    """Box and points of a mask. None if it marks nothing, or if there is no mask to read."""
    for kind, path in (("image", image), ("sound", audio), ("mask", labels)):
        if path is not None and not path.is_file():
            raise LeftOut(f"no {kind} file", str(path))
    if labels is None:
        return None
    try:
        mask = media.read_mask(labels)
    except media.MediaError as error:
        raise SourceError(f"{place}: {error}") from error
    box = bounding_box(mask)
    if box is None:
        return None
    if np.count_nonzero(mask) < 3:
        raise LeftOut("a mask too small for three points", str(labels))
    return Prompt(box, tuple(points_inside(mask)))
