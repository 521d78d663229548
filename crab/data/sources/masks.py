"""Boxes and points from masks: AVSBench (s4, ms3, arig) and Ref-AVS."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crab import tasks
from crab.data import media
from crab.data.sources.raw import Draft, LeftOut, Raw, Row, SourceError
from crab.tasks.segmentation import Prompt, bounding_box, points_inside

SETS = {"s4": "v1s", "arig": "v1s", "ms3": "v1m"}  # folders of AVSBench; metadata.csv calls them `label`
#: Image, sound and mask of a frame, in the folder of metadata.csv.
FILES = ("{label}/{uid}/frames/{frame}.jpg", "{label}/{uid}/audio.wav", "{label}/{uid}/labels_rgb/{frame}.png")
#: The same in the older release of the single sources, whose frames are numbered from 1.
OLDER_LIST = "s4_meta_data.csv"
OLDER_FILES = (
    "visual_frames/{split}/{category}/{uid}/{uid}_{number}.png",
    "audio_wav/{split}/{category}/{uid}.wav",
    "gt_masks/{split}/{category}/{uid}/{uid}_{number}.png",
)
REF_TESTS = ("test_s", "test_u", "test_n")


def avs(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """AVSBench labels what sounds in a clip (`a_obj`) and where it is, one frame per second.

    A clip has five frames, but of the single-source training clips only the first is labelled. A frame in which nothing
    is marked has no box and is left out. The older release is read if there is no metadata.csv; there the category of a
    clip says what sounds.
    """
    older = SETS[slot] == "v1s" and raw.has(OLDER_LIST) and not raw.has("metadata.csv")
    name, paths = (OLDER_LIST, OLDER_FILES) if older else ("metadata.csv", FILES)
    columns = ("category", "split") if older else ("vid", "uid", "a_obj", "split", "label")
    base = raw.file(name).parent
    base = base / "s4_data" if older and (base / "s4_data").is_dir() else base
    for clip in raw.rows(name, columns):
        with raw.reading(clip):
            if older:
                uid = next(iter(clip.values()))  # its first column, whatever it is called
                clip |= {"vid": uid, "uid": uid, "a_obj": clip["category"], "label": "v1s"}
            part = clip.one_of("split", ("train", "val", "test")), clip.one_of("label", ("v1s", "v1m", "v2"))
            frames = range(1 if part == ("train", "v1s") else 5)
            for frame in frames if part == (split, SETS[slot]) else ():
                row = Row(f"{clip.place}, frame {frame}", {**clip, "frame": frame, "number": frame + 1})
                with raw.reading(row):
                    for field in ("uid", "category") if older else ("uid",):
                        row.name(field)
                    yield _sounding(slot, row, *(base / path.format_map(row) for path in paths))


def _sounding(slot: str, row: Row, image: Path, audio: Path, mask: Path) -> Draft:
    prompt = _prompt(row, image, audio, mask)
    if prompt is None:
        raise LeftOut("nothing is marked in the frame", str(mask))
    clip, frame, a_obj = f"AVS/{row['label']}/{row['uid']}", row["frame"], row["a_obj"]
    shown, sound = f"{clip}/frames/{frame}{image.suffix}", f"{clip}/audio.wav"
    field = "image_path" if row["split"] == "train" else "visual_path"
    record = {field: shown, "audio_path": sound, "a_obj": a_obj, "frame_idx": frame}
    if slot == "arig":
        truth = prompt.box
        record |= {"top_left": list(truth[:2]), "bottom_right": list(truth[2:])}
    else:
        truth = prompt
        record |= {"vid": row["vid"], "uid": row["uid"]}
    chain = f"what sounds in the clip : {a_obj} . what sounds now is seen here ."
    files = {shown: image, sound: audio, f"{clip}/labels_rgb/{frame}.png": mask}
    return Draft(row.place, record, truth, chain, (a_obj,), files=files)


def ref_avs(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """Ref-AVS labels what an expression means, and its mask in each frame; in the null split, that it means nothing.

    For test an expression gives all frames of its clip, for training one frame, in turn. The folder of a clip is its
    `uid` without object and number, as the set's own loader has it; if there is no such folder, its `vid`. A few rows
    have the split "TODO": they belong to none, and are left out.
    """
    frames = Counter(p.parent.parent.name for p in raw.paths if p.parent.name == "frames" and p.suffix == ".jpg")
    parts = REF_TESTS if split == "test" else ("train",)
    for number, clip in enumerate(raw.rows("metadata.csv", ("vid", "uid", "split", "fid", "exp"))):
        with raw.reading(clip):
            if clip["split"] == "TODO":
                if split == "train":  # so that it is counted once
                    raise LeftOut("no split", clip["uid"])
                continue
            if clip.one_of("split", ("train", "val", *REF_TESTS)) not in parts:
                continue
            vid = clip["uid"].rsplit("_", 2)[0]
            vid = vid if vid in frames else clip["vid"]
            count = max(frames[vid], 1)  # of a clip without frames the first one is reported missing
            for frame in range(count) if split == "test" else [number % count]:
                row = Row(f"{clip.place}, frame {frame}", {**clip, "vid": vid, "frame": frame})
                with raw.reading(row):
                    yield _referred(raw.file("metadata.csv").parent, split, row)


def _referred(base: Path, split: str, row: Row) -> Draft:
    frame, vid, null = row["frame"], row.name("vid"), row["split"] == "test_n"
    number = 0 if null and not row["fid"].isdigit() else row.whole("fid")
    while null and (base / f"gt_mask/{vid}/fid_{number}").exists():  # take a number that no object of the clip has
        number += 1
    shown, sound = f"media/{vid}/frames/{frame}.jpg", f"media/{vid}/audio.wav"
    mask = f"gt_mask/{vid}/fid_{number}/{frame:05d}.png"
    prompt = _prompt(row, base / shown, base / sound, None if null else base / mask)
    if prompt is None and not null and split == "test":
        raise LeftOut("nothing is marked in the frame", str(base / mask))
    record = {"image_path" if split == "train" else "visual_path": shown}
    record |= {"audio_path": sound, "vid": vid, "uid": row["uid"], "fid": number}
    if split == "train":
        record |= {"idx": frame, "description": row["exp"]}
    else:
        record |= {"frame_idx": frame, "object": row["exp"], "split": row["split"]}
    files = {name: base / name for name in (shown, sound)}
    if prompt is None:
        return Draft(row.place, record, tasks.NULL, "what is described is not seen here .", files=files)
    name = row["uid"].removeprefix(f"{vid}_").rpartition("_")[0]  # <vid>_<object>_<number>
    chain = f"what is described is seen here{f' : {name}' if name else ''} ."
    return Draft(row.place, record, prompt, chain, (name,) if name else (), files=files | {mask: base / mask})


def _prompt(row: Row, image: Path, audio: Path, labels: Path | None) -> Prompt | None:
    """Box and points of a mask. None if it marks nothing, or if there is no mask to read."""
    for kind, path in (("image", image), ("sound", audio), ("mask", labels)):
        if path is not None and not path.is_file():
            raise LeftOut(f"no {kind} file", str(path))
    if labels is None:
        return None
    try:
        mask = media.read_mask(labels)
    except media.MediaError as error:
        raise SourceError(row.place, f"{error.path}: {error.fault}", error.fix) from error
    if 0 < np.count_nonzero(mask) < 3:
        raise LeftOut("a mask too small for three points", str(labels))
    box = bounding_box(mask)
    return Prompt(box, tuple(points_inside(mask))) if box else None
