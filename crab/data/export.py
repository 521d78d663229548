"""AV-UIE v2 as JSONL that ms-swift and LLaMA-Factory read, for training Qwen2.5-Omni with them.

    python -m crab.data.export ROOT OUT [--slots ave ms3] [--split train test] [--form explicit] [--relative]

ROOT is a checked tree, as the build stage leaves it. OUT gets one file for each slot and split,
``avuie_<slot>_<split>_<form>.jsonl``, with one line for each record, in the order of the records:

    {"messages": [{"role": "user", "content": "<video><audio>QUESTION"}, {"role": "assistant", "content": "ANSWER"}],
     "videos": ["PATH"], "audios": ["PATH"]}

and ``dataset_info.json``, the list of data sets of LLaMA-Factory (``dataset_dir: OUT``). Entries of other data sets in
it are kept. ms-swift takes the files by name (``--dataset OUT/avuie_ave_train_bare.jsonl``).

* A train record has its answer in the form asked for. A test record has its truth as a bare answer. If its truth is
  no text (the mask of s4 and ms3), it has no assistant turn. ms-swift answers such lines (``swift infer``), but
  LLaMA-Factory skips them. So a file with such a line is not in ``dataset_info.json``.
* Both programs put media wherever a text has ``<audio>`` or the like, in answers too, and ``<audio>`` also is the tag
  of a heard event (avvp). In questions and answers it is written ``<Audio>``. `unescape` turns the answers of a model
  that was trained so into what `crab.tasks.parse` reads.
* The formats have no word for a part of a sound. The sound of an image slot is the second around its frame, so this
  second is written as a wav file of its own, once for each record, into a folder beside the JSONL.
* The formats also do not say how a clip is shown. For 10 frames of 224 x 224 (4 for emotion), set FPS_MAX_FRAMES=10,
  VIDEO_MAX_PIXELS=50176 and MAX_PIXELS=50176 (ms-swift), or video_maxlen, video_max_pixels and image_max_pixels
  (LLaMA-Factory). Boxes and points are pixels of the picture at 224 x 224, whatever its size on disk. Leave
  USE_AUDIO_IN_VIDEO off, since every clip comes with its sound.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crab import tasks
from crab.core.files import atomic_file, write_json
from crab.data import media, records
from crab.tasks.registry import MEDIA

INFO = "dataset_info.json"
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_RESERVED = "image|video|audio|bbox|ref-object"  # tags that one of the programs replaces


def escape(text: str) -> str:
    """The text with the tags that mean media to ms-swift or LLaMA-Factory in a capital: ``<Audio>``, ``</Audio>``."""
    return re.sub(rf"<(/?)({_RESERVED})>", lambda tag: f"<{tag[1]}{tag[2].capitalize()}>", text)


def unescape(text: str) -> str:
    """The text that `escape` was given. Use it on what a model answers, before `crab.tasks.parse`."""
    return re.sub(rf"<(/?)({_RESERVED})>", lambda tag: tag[0].lower(), text, flags=re.IGNORECASE)


def export(
    root: str | os.PathLike,
    out: str | os.PathLike,
    slots: Iterable[str] | None = None,
    splits: Sequence[str] = ("train",),
    form: str = "bare",
    relative: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Write the JSONL of slots of the data root ``root`` into the folder ``out``, and its ``dataset_info.json``.

    Args:
        slots: names; by default all slots that have a list of records. form: of the answers of train records.
        relative: write paths of media relative to ``out``, so that both folders can move together. LLaMA-Factory
            finds them by its ``dataset_dir``, ms-swift if ROOT_IMAGE_DIR is ``out``. By default paths are absolute.

    Returns:
        One row for each file: slot, split, file, expected (records, by the manifest of the root if it has one),
        written (lines) and answered (lines with an assistant turn).

    Raises:
        ValueError: an unknown slot, split or form; no list of records; a manifest that disagrees; or a record or a
            media file that cannot be used. The file that was being written is not there then, earlier ones are whole.
    """
    root, out = Path(root).resolve(), Path(out).resolve()
    if form not in tasks.FORMS:
        raise ValueError(f"unknown answer form '{form}'; choose one of {', '.join(tasks.FORMS)}")
    asked = [tasks.get_slot(name) for name in dict.fromkeys(slots or tasks.SLOTS)]
    parts = [(slot, split) for slot in asked for split in dict.fromkeys(splits) if slots or split in slot.splits]
    there = [part for part in parts if (root / tasks.json_path(*part)).is_file()]
    if not there or (slots and there != parts):
        place = root / tasks.json_path(*next(part for part in parts if part not in there)) if parts else root
        raise ValueError(f"{place}: no such list of records; give the root that the build stage wrote, and its slots")
    info = _known(out / INFO)
    manifest = records.read_manifest(root) if (root / records.MANIFEST).is_file() else {}
    rows = []
    for slot, split in there:
        row = _write(root, out, slot, split, form if split == "train" else "bare", relative, progress, manifest)
        name, kinds = Path(row["file"]).stem, dict.fromkeys(f"{kind}s" for kind, _ in MEDIA[slot.media])
        columns = {name: name for name in ("messages", *kinds)}
        entry = {"file_name": row["file"], "formatting": "sharegpt", "columns": columns, "tags": ROLES}
        info.pop(name, None)
        if row["answered"] == row["written"] > 0:
            info[name] = entry
        rows.append(row)
    write_json(out / INFO, info)
    return rows


def _known(path: Path) -> dict[str, Any]:
    """The entries of a ``dataset_info.json`` that is there already."""
    try:
        info = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ValueError(f"{path}: is not a JSON object of data sets; correct it, or export to another folder")
    return info


def _write(
    root: Path, out: Path, slot: tasks.Slot, split: str, form: str, relative: bool, progress: bool, manifest: Mapping
) -> dict[str, Any]:
    """Write one file; its row of `export`."""
    rows, listed = records.read(root, slot.name, split), root / tasks.json_path(slot, split)
    expected = manifest.get(f"{slot.name}/{split}", {}).get("records", len(rows))
    if expected != len(rows):
        raise ValueError(f"{listed}: has {len(rows)} records, the manifest says {expected}; run the build stage again")
    file, answered = out / f"avuie_{slot.name}_{split}_{form}.jsonl", 0
    bar = tqdm(rows, f"{slot.name}/{split}", unit="record", disable=not progress, mininterval=0.5)
    place = (lambda path: os.path.relpath(path, out)) if relative else os.path.abspath
    with atomic_file(file) as part, part.open("w", encoding="utf-8", newline="\n") as lines:
        for index, record in enumerate(bar):
            sound = out / f"avuie_{slot.name}_{split}_sounds" / f"{index:06d}.wav"
            try:
                line = _line(slot, split, form, record, sound, place)
            except media.MediaError:
                raise
            except ValueError as error:
                words = records.words_of(error, slot, record)
                raise records.RecordError(f"{listed}: record {index}", words) from error
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            answered += len(line["messages"]) == 2
    return {
        "slot": slot.name, "split": split, "file": file.name, "expected": expected, "written": len(rows),
        "answered": answered,
    }  # fmt: skip


def _line(
    slot: tasks.Slot, split: str, form: str, record: Mapping, sound: Path, place: Callable[[Any], str]
) -> dict[str, Any]:
    """What a record is in JSON. The part of a sound that belongs to it is written to ``sound``."""
    paths: dict[str, list[str]] = {}
    for item in record["media"]:
        if item.second is not None:
            media.write_audio(sound, media.read_audio(item.path, item.second, item.second + 1))
        elif not os.path.isfile(item.path):
            raise media.MediaError(item.path, "does not exist", "put it there, or run the build stage again", "missing")
        paths.setdefault(f"{item.kind}s", []).append(place(item.path if item.second is None else sound))
    tags = "".join(f"<{item.kind}>" for item in record["media"])
    messages = [{"role": "user", "content": tags + escape(tasks.instruction(slot, record))}]
    answer = tasks.target(slot, record, form) if split == "train" else _truth(slot, record)
    if answer is not None:
        messages.append({"role": "assistant", "content": escape(answer)})
    return {"messages": messages, **paths}


def _truth(slot: tasks.Slot, record: Mapping) -> str | None:
    """The bare answer of a test record, None if its truth is no text."""
    try:
        return tasks.answer(slot, tasks.truth(slot, record))
    except ValueError:
        return None


def main(arguments: list[str] | None = None) -> None:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m crab.data.export", description=about)
    parser.add_argument("root", help="folder of a checked tree, which holds AVUIE_2 and manifest.json")
    parser.add_argument("out", help="folder for the JSONL files and dataset_info.json")
    parser.add_argument("--slots", nargs="+", metavar="SLOT", help="default: all that the root has")
    parser.add_argument("--split", nargs="+", choices=tasks.SPLITS, default=["train"], help="default: train")
    parser.add_argument("--form", choices=tasks.FORMS, default="bare", help="form of train answers; default: bare")
    parser.add_argument("--relative", action="store_true", help="paths of media relative to OUT, not absolute")
    options = parser.parse_args(arguments)
    try:
        rows = export(options.root, options.out, options.slots, options.split, options.form, options.relative)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for row in rows:
        print("{file}: {written} of {expected} records, {answered} with an answer".format(**row))


if __name__ == "__main__":
    main()
