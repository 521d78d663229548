"""A whole ``AVUIE_2`` tree checked: every list, the fields and the answer of every record, every media file once.

Nothing stops the walk. Each problem becomes a finding (:mod:`crab.data.findings`) that names file and record. Each
record is kept, or left out and counted under its first problem.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crab import tasks
from crab.data import records
from crab.data.findings import CONVERSION, NOTES, TOLERABLE, Count, Finding, Report, ValidationError
from crab.data.names import near
from crab.data.probe import Files
from crab.data.records import RecordError
from crab.data.sounds import LEAST
from crab.tasks.fields import numbered

ON_PROBLEM = ("error", "skip")


@dataclass
class _Entry:
    """A record of a list, and all that is wrong with it."""

    index: int
    id: str
    raw: Any
    faults: list[tuple[str, str, str]] = field(default_factory=list)  # (problem, words, file)
    media: list[tuple[str, str]] = field(default_factory=list)  # (path under the root, kind), the mask last
    second: int | None = None  # of its sound, for an image slot


def validate(
    root: str | os.PathLike,
    slots: Sequence[str] | None = None,
    on_problem: str = "error",
    tolerate: Collection[str] = (),
    report: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    time_limit: float = 20.0,
    workers: int | None = None,
    progress: bool = True,
    decode: bool = False,
) -> Report:
    """Check the tree under ``root``, and report all problems.

    Args:
        root: the folder that holds ``AVUIE_2``.
        slots: names of the slots to check; by default all. A slot that is not there is a problem.
        on_problem: ``"error"`` raises at the end of the walk; ``"skip"`` leaves out records that have a problem.
        tolerate: problems of :data:`TOLERABLE` that are noted and leave no record out.
        report: csv file for all findings, written in either case.
        cache: JSON file that remembers the probes, so that a second walk only opens files that changed.
        time_limit: seconds per media file, then its process is killed.
        workers: processes; by default one per core.
        decode: decode clips and sounds completely, which finds damage inside them.

    Raises:
        ValueError: a wrong argument; the message names it and how to fix it.
        ValidationError: there are problems, and ``on_problem`` is "error".
    """
    chosen = _chosen(root, slots, on_problem, tolerate, time_limit)
    walk = _Walk(root, tolerate, cache)
    splits = [(slot, split) for slot in chosen for split in slot.splits]
    for slot, split in tqdm(splits, "read", unit="list", disable=not progress, mininterval=0.5):
        walk.read(slot, split)
    for slot in chosen:
        walk.conversion(slot)
    walk.strangers()
    usable = (entry for entries in walk.entries.values() for entry in entries if not walk.left_out(entry))
    jobs = dict.fromkeys(job for entry in usable for job in entry.media)
    probed, known = walk.media.probe(jobs, decode, time_limit, workers or _cores(), progress)
    for slot, split in sorted(walk.counts, key=lambda key: key[1] != "test"):  # test first, to find overlaps
        walk.decide(slot, split)
    result = walk.result(probed, known)
    if report is not None:
        result.write(report)
    if on_problem == "error" and result.problems:
        raise ValidationError(result.complaint(report))
    return result


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chosen(root, slots, on_problem, tolerate, time_limit) -> list[tasks.Slot]:
    """The slots to check, if all arguments are right. (The schema of params.yaml checks them earlier, one by one.)"""
    if on_problem not in ON_PROBLEM or not set(tolerate) <= set(TOLERABLE) or not time_limit > 0:
        fault = f"on_problem is {on_problem!r}, tolerate is {tolerate!r}, time_limit is {time_limit}"
        fix = f"give one of {', '.join(ON_PROBLEM)}, a list of {', '.join(TOLERABLE)}, and a number above 0"
        raise ValueError(f"{fault}; {fix}")
    root, fix = Path(root), f"set it to the folder that holds {tasks.FOLDER}"
    if root.name == tasks.FOLDER or any((root / name / "train.json").is_file() for name in tasks.SLOTS):
        fix = f"give the folder above it, '{root.parent}'"
    if not (root / tasks.FOLDER).is_dir():
        raise ValueError(f"root is '{root}', which holds no folder {tasks.FOLDER}; {fix}")
    return [tasks.get_slot(name) for name in dict.fromkeys(slots or tasks.SLOTS)]


class _Walk:
    def __init__(self, root: str | os.PathLike, tolerate: Collection[str], cache: str | os.PathLike | None) -> None:
        self.lists, self.media = Files(root), Files(records.media_root(root), cache)
        self.harmless = {*NOTES, *tolerate}
        self.chains: Counter[str] = Counter()
        self.usable: dict[tuple[str, str], list[dict]] = {}
        self.counts: dict[tuple[str, str], Count] = {}
        self.entries: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
        self.findings: dict[tuple[str, str], list[Finding]] = defaultdict(list)
        #: a file that a test record shows, or an id that it has -> its slot, and its name
        self.tested: dict[Any, tuple[str, str]] = {}
        self.listings: dict[Path, dict[str, str]] = {}

    def note(self, key: tuple[str, str], problem: str, words: str, file: str, entry: _Entry | None = None) -> bool:
        """Add a finding. Returns whether it leaves its record or list out."""
        name, index = (entry.id, entry.index) if entry else ("", None)
        self.findings[key].append(Finding(*key, name, index, file, problem, words, problem not in self.harmless))
        return problem not in self.harmless

    def left_out(self, entry: _Entry) -> str | None:
        """The first problem that leaves a record out."""
        return next((problem for problem, _, _ in entry.faults if problem not in self.harmless), None)

    # ------------------------------------------------------------ lists and records

    def read(self, slot: tasks.Slot, split: str) -> None:
        """Read a list, and check each record as far as its fields and its answer."""
        key, file = (slot.name, split), tasks.json_path(slot, split)
        count = self.counts[key] = Count(*key)
        if (outside := self._linked(self.lists, file)) and self.note(key, "link", outside, file):
            return
        try:
            raws = records.parse(self.lists.root / file)
        except RecordError as error:
            self.note(key, error.kind, error.words, file)
            return
        count.listed = len(raws)
        if not raws:
            fix = "copy or build it again, or take the slot out of `slots`"
            self.note(key, "no records", f"is an empty list; {fix}", file)
        ids, wholes = {}, {}  # id, and digest of all fields -> place
        for index, raw in enumerate(raws):
            entry = _Entry(index, _name(slot, split, index, raw), raw)
            self.entries[key].append(entry)
            try:
                self._check(slot, split, entry)
                if (first := ids.setdefault(entry.id, index)) != index:
                    raise RecordError("", records.twice(entry.id, first), "id twice")
            except RecordError as error:
                entry.faults.append((error.kind, error.words, file))
                continue
            whole = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).digest()
            if (first := wholes.setdefault(whole, index)) != index:
                words = f"all fields are equal to those of record {first}; remove one of the two"
                entry.faults.append(("record twice", words, file))

    def _check(self, slot: tasks.Slot, split: str, entry: _Entry) -> None:
        """Complete an entry; RecordError if its fields or its answer cannot be used."""
        record = records.check("", slot, split, entry.index, entry.raw, self.media.root)
        try:
            notes = [*_check_answer(slot, split, record), *_check_frame(record)]
        except (ValueError, RecursionError) as error:
            raise RecordError("", records.words_of(error, slot, record), "answer") from None
        entry.id = record["id"]
        entry.faults += [(problem, words, tasks.json_path(slot, split)) for problem, words in notes]
        entry.media = [(item.path, item.kind) for item in record["media"]]
        entry.second = next((item.second for item in record["media"] if item.second is not None), None)
        if slot.masks:
            # a test record is scored on its mask, unless the thing is not there; a train record does not need it
            needed = split == "test" and record.get("split") != "test_n"
            if needed or split == "train" and not self.media.stat(record["mask"]).fault:
                entry.media.append((record["mask"], "mask"))

    def conversion(self, slot: tasks.Slot) -> None:
        """Note the rows that a converter left out of this slot, and the chains of a chat model that it took."""
        file = f"{tasks.FOLDER}/{slot.name}/{CONVERSION}"
        if not (self.lists.root / file).is_file():
            return
        try:
            content = json.loads((self.lists.root / file).read_text(encoding="utf-8"))
            left = [(split, content["splits"][split]["left_out"].items()) for split in slot.splits]
            rows = [(split, f"{reason}: {row}") for split, rows in left for reason, places in rows for row in places]
            chains = Counter({str(verdict): int(number) for verdict, number in content.get("chains", {}).items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            words = f"cannot be read ({type(error).__name__}); convert the set again, or remove this file"
            key = slot.name, slot.splits[0]
            self.findings[key].append(Finding(*key, "", None, file, "not converted", words, False))
            return
        self.chains += chains
        for split, words in rows:
            words = words.encode(errors="backslashreplace").decode()  # the name of a file need not be UTF-8
            self.note((slot.name, split), "not converted", words, file)

    def strangers(self) -> None:
        """Note folders that look like a slot."""
        words = f"no slot has this name, so nothing in it is read; known: {', '.join(tasks.SLOTS)}"
        for folder in sorted((self.lists.root / tasks.FOLDER).iterdir()):
            lists = [folder / f"{split}.json" for split in tasks.SPLITS]
            # unlike Path.is_file, this does not stop at a folder that may not be read
            if folder.name not in tasks.SLOTS and any(map(os.path.isfile, lists)):
                self.note(("", ""), "stranger", words, f"{tasks.FOLDER}/{folder.name}")

    # ------------------------------------------------------------ verdicts

    def decide(self, slot: str, split: str) -> None:
        """Keep or leave out each record of a list, now that its media are known."""
        key, count = (slot, split), self.counts[slot, split]
        usable, sizes = [], {}
        for entry in self.entries[key]:
            if not self.left_out(entry):
                entry.faults += self._check_media(slot, split, entry)
            for problem, words, file in entry.faults:
                self.note(key, problem, words, file, entry)
            if reason := self.left_out(entry):
                count.left_out[reason] += 1
                continue
            usable.append(entry)
            timed = "video" if entry.second is None else "audio"
            count.seconds += [self.media.probes[job].seconds for job in entry.media if job[1] == timed]
            for path, _ in entry.media:
                at = self.media.stat(path)
                sizes[at.same] = at.size
                if split == "test":
                    self.tested.setdefault(at.same, (slot, f"{slot}/test, record {entry.index} ({entry.id})"))
            if split == "test" and "id" in entry.raw:
                self.tested.setdefault((slot, entry.id), (slot, f"{slot}/test, record {entry.index}"))
        count.kept, count.files, count.bytes = len(usable), len(sizes), sum(sizes.values())
        if usable:
            # records that are left out shift the later ones, which are named by their place
            named = [{**entry.raw, "id": entry.raw.get("id", entry.id)} for entry in usable]
            self.usable[key] = named if count.left_out else [entry.raw for entry in usable]

    def _check_media(self, slot: str, split: str, entry: _Entry) -> Iterator[tuple[str, str, str]]:
        """(problem, words, file) of all that is wrong with the media of a record."""
        own_overlap = False
        for path, kind in entry.media:
            at, result = self.media.stat(path), self.media.probes[path, kind]
            if outside := self._linked(self.media, path):
                yield "link", outside, path
            if result.problem:
                other = near(self.media.root, path, self.listings) if result.problem == "missing" else ""
                yield result.problem, other or result.words, path
                continue
            if result.named:
                yield "name", result.named, path
            if kind == "audio" and entry.second is not None:
                if result.seconds < entry.second + LEAST:
                    about = f"lasts {result.seconds:.2f} s, and the record is about second {entry.second}"
                    yield "no such second", f"{about}; give the whole sound, or the right index", path
            elif kind == "audio" and 0 < result.seconds < LEAST:  # 0 if a container does not say it
                fault = f"lasts {result.seconds * 1000:.3g} ms, too short to be heard"
                yield "no sound", f"{fault}; give a sound of {LEAST} s or more", path
            if split == "train" and at.same in self.tested:
                tested, name = self.tested[at.same]
                if tested != slot or not tasks.get_slot(slot).overlap:
                    yield "overlap", f"is also shown by {name}; remove one of the two", path
                elif not own_overlap:  # one note per record
                    yield "own overlap", f"is also shown by {name}; the published set has this overlap", path
                    own_overlap = True
        if split == "train" and "id" in entry.raw and (slot, entry.id) in self.tested:
            words = f"field 'id': is also that of {self.tested[slot, entry.id][1]}; remove one of the two"
            yield "overlap", words, tasks.json_path(slot, split)

    @staticmethod
    def _linked(files: Files, path: str) -> str:
        """Words for a file that is a link out of the root. A folder may be one: large media often lie elsewhere."""
        outside = files.stat(path).outside
        return outside if outside and (files.root / path).is_symlink() else ""

    def result(self, probed: int, known: int) -> Report:
        """The report, in the order of the lists."""
        findings = [finding for key in (*self.counts, ("", "")) for finding in self.findings[key]]
        usable = {key: self.usable[key] for key in self.counts if key in self.usable}
        return Report(list(self.counts.values()), findings, usable, self.chains, probed, known)


def _name(slot: tasks.Slot, split: str, index: int, raw: Any) -> str:
    """The id of a record that may be anything."""
    own = raw.get("id") if isinstance(raw, dict) else None
    named = {"id": own} if isinstance(own, (str, int)) and own != "" else {}
    return tasks.sample_id(slot, named, index, split)[:200]


def _check_answer(slot: tasks.Slot, split: str, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Raise ValueError unless a record can be learned from (train) or scored on (test).

    Yields:
        (problem, words) for an answer that is not needed and is wrong, and for a truth that no answer can say.
    """
    tasks.instruction(slot, record)
    field, others = f"field '{slot.answer_field}'", ", ".join(slot.truth_fields) or "its other fields"
    if split == "train":
        answer, truth = tasks.parse(slot, tasks.target(slot, record, "explicit"), record), tasks.truth(slot, record)
        if not tasks.agree(slot, answer, truth):
            raise ValueError(f"{field} says {_shown(answer)}, and {others} {_shown(truth)}; correct what is wrong")
        return
    blank = np.zeros((1, 1), bool)
    masks = tasks.Masks(lambda _: blank, lambda *_: blank) if slot.masks else None
    tasks.score(slot, [record], [""], ids=["one"], masks=masks)  # needs all that scoring needs of a record
    labelled = slot.answer_field in record
    if slot.masks and not labelled:
        return
    truth = tasks.truth(slot, record)
    answer = tasks.parse(slot, record[slot.answer_field], record) if labelled else truth
    if answer is None:
        yield "unread answer", f"{field} holds no answer that can be read; the truth is taken from {others}"
    elif not tasks.agree(slot, answer, truth):
        used = "the latter is used as the truth, correct it if it is wrong"
        yield "other answer", f"{field} says {_shown(answer)}, and {others} {_shown(truth)}; {used}"
    try:
        tasks.answer(slot, truth)
    except ValueError:
        words = f"no answer can say {_shown(truth)}, the truth by {others}; every prediction will be wrong, correct it"
        yield "unsaid truth", words


def _shown(answer: Any) -> str:
    return repr(tuple(answer) if isinstance(answer, tuple) else answer)[:120]


def _check_frame(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(problem, words) if a field and the name of the file give a frame different numbers."""
    image, sound, *_ = record["media"]
    name, field = Path(image.path).stem, numbered(record)
    if image.kind == "image" and field and name.isascii() and name.isdigit() and int(name) != sound.second:
        used = "the second of the sound is taken from the field, correct it if it is wrong"
        yield "other frame", f"field '{field}' is {record[field]!r:.40}, and the frame's file is named {name}; {used}"
