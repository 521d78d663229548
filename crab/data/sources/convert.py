"""Convert raw data sets to the AV-UIE v2 layout: records, media, and a report of what was left out and why."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.contrib.concurrent import thread_map

from crab import tasks
from crab.core.files import atomic_file, write_json
from crab.data import media
from crab.data import records as layout
from crab.data.findings import CONVERSION
from crab.data.sources import classes, events, masks, questions
from crab.data.sources.raw import AUDIO, Draft, LeftOut, Raw, SourceError

LINKS = {"hardlink": os.link, "symlink": os.symlink, "copy": shutil.copy2}
#: Slot -> converter: (raw, slot, split) -> drafts. The annotations of MER2024, MAFW, DFEW and VALOR are not public.
SOURCES: dict[str, Callable[[Raw, str, str], Iterator[Draft]]] = {
    "ave": events.ave,
    "unav": events.unav,
    "avvp": events.llp,
    "arig": masks.avs,
    "s4": masks.avs,
    "ms3": masks.avs,
    "ref_avs": masks.ref_avs,
    "avqa": questions.music,
    "avqa_thu": questions.avqa,
    "meld": classes.meld,
    "cremad": classes.cremad,
    "ks": classes.ks,
    "ucf": classes.ucf,
    "a2v": events.pairs,
    "v2a": events.pairs,
}


def _check(slot: str) -> None:
    if tasks.get_slot(slot).name not in SOURCES:
        fault = "has no converter, because the annotations of its set are not public plain text"
        fix = f"put its published folder under {tasks.FOLDER}. Converters: {', '.join(SOURCES)}"
        raise ValueError(f"slot {slot}: {fault}; {fix}")


def drafts(slot: str, raw: Raw, split: str) -> Iterator[Draft]:
    """Drafts of all records that a raw set's split has for a slot. What is left out is added to ``raw.left_out``."""
    _check(slot)
    tasks.get_slot(slot).fields(split)  # raises if there is no such split
    for draft in SOURCES[slot](raw, slot, split):
        with raw.reading(draft):
            finished(slot, draft)
            yield draft


def finished(slot: str, draft: Draft) -> dict[str, Any]:
    """A draft's record with its answer: the chain, then the tagged answer. SourceError if it does not read back."""
    field = tasks.get_slot(slot).answer_field
    try:
        record = {**draft.record, field: f"{draft.chain} {tasks.answer(slot, draft.truth)}"}
        json.dumps(record, ensure_ascii=False).encode()
        answer, truth = tasks.parse(slot, record[field]), tasks.truth(slot, record)
    except UnicodeEncodeError:
        place = draft.place.encode(errors="backslashreplace").decode()
        fault = "a file's name is not UTF-8, or a text holds half a character (a lone surrogate)"
        raise SourceError(place, fault, "rename or correct it") from None
    except ValueError as error:
        raise SourceError(draft.place, str(error), "correct the label") from error
    if answer != truth:
        fault = f"the answer {record[field]!r:.200} reads {answer!r:.80}, not {truth!r:.80}"
        raise SourceError(draft.place, fault, "correct the label")
    return record


def convert(
    slot: str,
    raw_root: str | os.PathLike,
    out_root: str | os.PathLike,
    link: str = "hardlink",
    rewrite: Callable[[str, Sequence[Draft]], tuple[list[Draft], dict[str, int]]] | None = None,
    workers: int = 2,
    progress: bool = True,
    **reading: Any,
) -> dict[str, Any]:
    """Write ``AVUIE_2/<slot>/{train,test}.json`` and their media under `out_root`, once every split has records.

    Args:
        raw_root: folder of the raw data set, laid out as its authors ship it.
        link: "hardlink" (within one file system), "symlink" or "copy".
        rewrite: gives the training drafts other chains (:class:`crab.data.sources.rewrite.Rewriter`).
        workers: threads that place media.
        reading: `faults` ("error", or "skip-and-record" to leave out rows at fault) and `seed` of Raw.

    Returns:
        The report, also in ``conversion.json`` beside the lists: ``slot``, ``dataset``, ``splits`` (split ->
        ``records``, ``files``, ``left_out``: reason -> places); with `rewrite` also ``chains`` (outcome -> number).

    Raises:
        ValueError: an unknown slot or option, or lists of the slot that no converter wrote.
        SourceError: a fault of the raw set, or a split without records.
    """
    entry, root = tasks.get_slot(slot), Path(out_root)
    _check(slot)
    if link not in LINKS:
        raise ValueError(f"link is {link!r}; give one of {', '.join(LINKS)}")
    if root.resolve().is_relative_to(Path(raw_root).resolve()):
        fault = f"lies in the raw data set {raw_root}, where its files would count as the set's own"
        raise ValueError(f"{out_root}: {fault}; give another folder")
    lists = [root / tasks.json_path(slot, split) for split in entry.splits]
    if any(map(Path.is_file, lists)) and not (lists[0].parent / CONVERSION).is_file():
        fault, fix = "holds lists that no converter wrote", f"give another root, or take {slot} out of `raw`"
        raise ValueError(f"{lists[0].parent}: {fault}; {fix}")
    report: dict[str, Any] = {"slot": entry.name, "dataset": entry.dataset, "splits": {}}
    raw, records = Raw(raw_root, **reading), {}
    for split in entry.splits:
        raw.left_out = {}
        folder, title = root / tasks.FOLDER / entry.media_slot, f"{slot} {split}" if progress else None
        rows = _placed(list(drafts(slot, raw, split)), folder, link, raw, workers, title)
        if not rows:
            counts = {reason: len(places) for reason, places in raw.left_out.items()} or "nothing"
            fault = f"no record of {slot}/{split} can be made of it; left out: {counts}"
            raise SourceError(raw.root, fault, "check that annotations and media are there")
        if rewrite is not None and split == "train":
            rows, report["chains"] = rewrite(slot, rows)
        records[split] = [finished(slot, draft) for draft in rows]
        files = {name for draft in rows for name in draft.files}
        report["splits"][split] = {"records": len(rows), "files": len(files), "left_out": raw.left_out}
    write_json(lists[0].parent / CONVERSION, report)  # first: lists without it count as another's
    for split, rows in records.items():
        layout.write(out_root, slot, split, rows)
    return report


def convert_all(raw_roots: Mapping[str, str | os.PathLike], out_root: str | os.PathLike, **options) -> dict[str, dict]:
    """Convert every slot of `raw_roots` (slot -> its raw folder); options and reports as of :func:`convert`."""
    for slot in raw_roots:
        _check(slot)  # fail before hours of work
    return {slot: convert(slot, raw_root, out_root, **options) for slot, raw_root in raw_roots.items()}


def _placed(rows: list[Draft], folder: Path, link: str, raw: Raw, workers: int, title: str | None) -> list[Draft]:
    """The drafts whose media could all be put in place. Each file is placed once."""
    files = {name: source for draft in rows for name, source in draft.files.items()}
    targets, options = [folder / name for name in files], {"unit": "file", "desc": title, "disable": title is None}
    results = thread_map(partial(_place, link), files.values(), targets, max_workers=max(workers, 1), **options)
    errors = dict(zip(files, results, strict=True))
    placed = []
    for draft in rows:
        with raw.reading(draft):
            for error in filter(None, map(errors.get, draft.files)):
                raise LeftOut("no sound" if "no sound" in error.fault else "sound cannot be decoded", error)
            placed.append(draft)
    return placed


def _place(link: str, source: Path, target: Path) -> media.MediaError | None:
    """Put one file in place, unless it is there. Returns the error if a sound cannot be read from its video.

    A copy or a sound keeps the time of its source, so that a source that was replaced is seen, even by an older file.

    Such a sound is written as what a model hears: 16-bit PCM, 16 kHz, mono. No other file is decoded or encoded.
    """
    if target.suffix.lower() in AUDIO and source.suffix.lower() not in AUDIO:
        if target.is_file() and _of_one_time(target, source):
            return None
        try:
            media.write_audio(target, media.read_audio(source))
        except media.MediaError as error:
            return error
        return os.utime(target, ns=(source.stat().st_mtime_ns,) * 2)
    if target.exists() and (_same(target, source) if link == "copy" else target.samefile(source)):
        return None
    with atomic_file(target) as part:
        try:
            LINKS[link](source.resolve(), part)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            fix = "convert to a root on its own file system, or call convert_all with link='symlink' or link='copy'"
            fault = f"cannot be hard-linked to {target.parent} ({error.strerror})"
            raise SourceError(source, fault, fix) from error
    return None


def _of_one_time(one: Path, other: Path) -> bool:
    """Whether two files bear the same time of change, up to the two seconds to which some file systems round it."""
    return abs(one.stat().st_mtime - other.stat().st_mtime) <= 2


def _same(one: Path, other: Path) -> bool:
    return _of_one_time(one, other) and one.stat().st_size == other.stat().st_size
