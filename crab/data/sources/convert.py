"""Convert raw data sets to the AV-UIE v2 layout: records, media, and a report of what was left out and why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from crab import tasks
from crab.data import media
from crab.data import records as layout
from crab.data.files import write_json
from crab.data.findings import CONVERSION as REPORT
from crab.data.sources import classes, events, masks, matching, questions
from crab.data.sources.placing import LINKS, place
from crab.data.sources.raw import Draft, LeftOut, Raw, SourceError


class Source(NamedTuple):
    """How a raw set is read.

    Attributes:
        rows: (raw, slot, split) -> (where, row) of all that its annotation files list for the split.
        drafts: (raw, slot, split, where, row) -> the drafts of one row; raises LeftOut or SourceError where there is none.
    """

    rows: Callable[[Raw, str, str], Iterator[tuple[str, dict]]]
    drafts: Callable[[Raw, str, str, str, dict], Iterator[Draft]]


#: Slot -> its raw set.  MER2024, MAFW, DFEW and VALOR are not here: their annotations are not public.
SOURCES: dict[str, Source] = {
    "ave": Source(events.ave_rows, events.ave),
    "unav": Source(events.unav_rows, events.unav),
    "avvp": Source(events.llp_rows, events.llp),
    "arig": Source(masks.avs_rows, masks.avs),
    "s4": Source(masks.avs_rows, masks.avs),
    "ms3": Source(masks.avs_rows, masks.avs),
    "ref_avs": Source(masks.ref_rows, masks.ref),
    "avqa": Source(questions.music_rows, questions.music),
    "avqa_thu": Source(questions.avqa_rows, questions.avqa),
    "meld": Source(classes.meld_rows, classes.meld),
    "cremad": Source(classes.cremad_rows, classes.cremad),
    "ks": Source(classes.ks_rows, classes.ks),
    "ucf": Source(classes.ucf_rows, classes.ucf),
    "a2v": Source(matching.pair_rows, matching.match),
    "v2a": Source(matching.pair_rows, matching.match),
}


def _source(slot: str) -> Source:
    name = tasks.get_slot(slot).name
    if name not in SOURCES:
        raise ValueError(f"slot {name}: has no converter, for the annotations of its set are not public plain text; "
                         f"put its published folder under {tasks.FOLDER}. Converters: {', '.join(SOURCES)}")
    return SOURCES[name]


def drafts(slot: str, raw: Raw, split: str) -> Iterator[Draft]:
    """What a raw set's split holds for a slot; what is left out is in ``raw.left_out``."""
    source = _source(slot)
    tasks.get_slot(slot).fields(split)  # that the split exists
    for where, row in source.rows(raw, slot, split):
        try:
            for draft in source.drafts(raw, slot, split, where, row):
                finished(slot, draft)
                yield draft
        except LeftOut as left:
            raw.leave(left.reason, f"{where}: {left.about}")
        except SourceError as error:
            raw.fault(error)


def finished(slot: str, draft: Draft) -> dict[str, Any]:
    """A draft's record, with its answer: the chain, then the tagged answer.

    Raises:
        SourceError: the label cannot be said in the slot's tags, or does not read back, or the record is no UTF-8.
    """
    entry = tasks.get_slot(slot)
    try:
        record = {**draft.record, entry.answer_field: f"{draft.chain} {tasks.answer(slot, draft.truth)}"}
        json.dumps(record, ensure_ascii=False).encode()
        said, true = tasks.parse(slot, record[entry.answer_field]), tasks.truth(slot, record)
    except UnicodeEncodeError:
        words = f"{draft.where}: a file's name is not UTF-8, or a text holds half a character (a lone surrogate); rename or correct it"
        raise SourceError(words.encode(errors="backslashreplace").decode()) from None
    except ValueError as error:
        raise SourceError(f"{draft.where}: {error}; correct the label") from error
    if said != true:
        raise SourceError(f"{draft.where}: the answer {record[entry.answer_field]!r:.200} reads {said!r:.80}, not {true!r:.80}; "
                          "correct the label")
    return record


def convert(
    slot: str,
    raw_root: str | os.PathLike,
    out_root: str | os.PathLike,
    *,
    link: str = "hardlink",
    faults: str = "error",
    seed: int = 0,
    rewrite: Callable[[str, Sequence[Draft]], tuple[list[Draft], dict[str, int]]] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Write ``AVUIE_2/<slot>/{train,test}.json`` and the media they name; each file is renamed when it is whole.

    Args:
        raw_root: folder of the raw data set, laid out as its authors ship it.
        out_root: the data root, which will hold ``AVUIE_2``; other slots there are left alone.
        link: "hardlink" (one file system), "symlink" or "copy".
        faults: "error", or "skip-and-record" to leave out the rows at fault.
        seed: of the pairs of a2v and v2a.
        rewrite: gives the training drafts other chains (:class:`crab.data.sources.rewrite.Rewriter`).
        workers: threads that place media.

    Returns:
        The report, also in ``AVUIE_2/<slot>/conversion.json``: ``slot``, ``dataset``, ``splits`` (split -> ``records``,
        ``files`` and ``left_out``: reason -> the place of each), and, if chains were rewritten, ``chains`` (how many were
        taken, and why others were not).

    Raises:
        ValueError: unknown slot or option, or a slot that has no converter.
        SourceError: a fault of the raw set, or a split of which no record can be made.
    """
    entry = tasks.get_slot(slot)
    _source(slot)
    if link not in LINKS:
        raise ValueError(f"link is {link!r}; give one of {', '.join(LINKS)}")
    if Path(raw_root).resolve() in (Path(out_root).resolve(), *Path(out_root).resolve().parents):
        raise ValueError(f"{out_root}: lies in the raw data set {raw_root}, where its files would be taken for the set's own; "
                         "give another folder")
    folder = Path(out_root) / tasks.FOLDER / entry.media_slot
    report: dict[str, Any] = {"slot": entry.name, "dataset": entry.dataset, "splits": {}}
    raw, made = Raw(raw_root, faults, seed), {}
    for split in entry.splits:
        raw.left_out = {}
        kept = _placed(list(drafts(slot, raw, split)), folder, link, raw, workers, progress and f"{slot} {split}")
        if not kept:
            counts = {reason: len(where) for reason, where in raw.left_out.items()}
            raise SourceError(f"{raw.root}: no record of {slot}/{split} can be made of it; left out: {counts or 'nothing'}; check "
                              "that annotations and media are there")
        if rewrite is not None and split == "train":
            kept, report["chains"] = rewrite(slot, kept)
        made[split] = [finished(slot, draft) for draft in kept]
        report["splits"][split] = {
            "records": len(kept), "files": len({name for draft in kept for name in draft.files}), "left_out": raw.left_out,
        }
    for split, found in made.items():  # when all splits are whole
        layout.write(out_root, slot, split, found)
    write_json(Path(out_root) / tasks.FOLDER / slot / REPORT, report)
    return report


def convert_all(raw_roots: Mapping[str, str | os.PathLike], out_root: str | os.PathLike, **options) -> dict[str, dict[str, Any]]:
    """Convert every slot of `raw_roots` (slot -> its raw folder); options and reports as of :func:`convert`."""
    for slot in raw_roots:
        _source(slot)  # before hours of work
    return {slot: convert(slot, raw_root, out_root, **options) for slot, raw_root in raw_roots.items()}


def _placed(found: Sequence[Draft], folder: Path, link: str, raw: Raw, workers: int, said: str | bool) -> list[Draft]:
    """The drafts all of whose media could be put in place; each file is placed once."""
    owners = {name: (source, draft.where) for draft in found for name, source in draft.files.items()}
    failed: dict[str, media.MediaError] = {}
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = pool.map(partial(_try, folder, link), owners, (source for source, _ in owners.values()))
        for name, error in tqdm(zip(owners, results, strict=True), total=len(owners), unit="file", desc=said or None, disable=not said):
            if error is not None:
                failed[name] = error
    kept = []
    for draft in found:
        broken = next((failed[name] for name in draft.files if name in failed), None)
        if broken is None:
            kept.append(draft)
        else:
            raw.leave("no sound" if "no sound" in broken.fault else "sound cannot be decoded", f"{draft.where}: {broken}")
    return kept


def _try(folder: Path, link: str, name: str, source: Path) -> media.MediaError | None:
    try:
        place(source, folder / name, link)
    except media.MediaError as error:
        return error
    return None
