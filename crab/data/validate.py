"""A whole ``AVUIE_2`` tree walked: every list, every record's fields and answer, every media file probed once.

Nothing is dropped silently and nothing stops the walk: whatever is wrong becomes a finding (:mod:`crab.data.findings`)
that names file and record, and each record is either kept, or left out and counted under the first thing wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from crab import tasks
from crab.data import media, probe, records
from crab.data.findings import CONVERSION, NOTES, TOLERABLE, Count, Finding, Report, ValidationError
from crab.data.records import RecordError
from crab.tasks.registry import numbered

ON_PROBLEM = ("error", "skip")


class _Use(NamedTuple):
    """A record that waits for its media."""

    index: int
    id: str
    raw: dict[str, Any]
    media: tuple[tuple[str, str], ...]  # (path under the root, kind), its mask last
    window: tuple[int, int] | None  # which of them is heard from which second on


class _File(NamedTuple):
    """What is known of a path before it is probed."""

    problem: str = ""
    words: str = ""
    size: int = 0
    changed: int = 0
    same: Any = None  # equal for two names of one file
    outside: str = ""


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
    """Walk the tree under `root`, probe its media in parallel, and say all that is wrong.

    Args:
        root: the folder that holds ``AVUIE_2``.
        slots: names of those to look at; all by default. What is missing of them is a problem.
        on_problem: ``"error"`` raises at the end of the walk; ``"skip"`` leaves out what has a problem, and counts it.
        tolerate: of :data:`TOLERABLE`, what is noted and leaves no record out.
        report: file for all findings (csv), written in either case.
        cache: file that remembers the probes, so that a second walk probes only what has changed.
        time_limit: seconds for a file, then its process is killed.
        workers: processes; by default one a core.
        decode: decode clips and sounds to their end, which finds damage inside; else only what it takes to find them whole.

    Raises:
        ValueError: an argument that cannot be, naming it and its mend.
        ValidationError: there are problems and they are not to be skipped.
    """
    chosen = _chosen(root, slots, on_problem, tolerate, time_limit, workers)
    walk = _Walk(root, frozenset(tolerate), decode)
    splits = [(slot, split) for slot in chosen for split in slot.splits]
    uses = {(slot.name, split): walk.list(slot, split)
            for slot, split in tqdm(splits, unit="list", disable=not progress, desc="read", mininterval=0.5)}
    for slot in chosen:
        walk.conversion(slot)
    walk.strangers()
    wanted = dict.fromkeys(job for uses_of in uses.values() for use in uses_of for job in use.media)
    walk.probe(wanted, cache, time_limit, workers or probe.default_workers(), progress)
    # test first: a training record is measured against the test records that are there
    for key in sorted(uses, key=lambda key: key[1] != "test"):
        walk.settle(*key, uses[key])
    found = walk.finish(list(uses))
    if report is not None:
        found.write(report)
    if on_problem == "error" and found.problems:
        raise ValidationError(found.complaint(report))
    return found


def _chosen(root, slots, on_problem, tolerate, time_limit, workers) -> list[tasks.Slot]:
    if isinstance(slots, str) or (slots is not None and not slots):
        raise ValueError(f"slots is {slots!r}; give a list of names, or none for all")
    if on_problem not in ON_PROBLEM:
        raise ValueError(f"on_problem is {on_problem!r}; choose one of {', '.join(ON_PROBLEM)}")
    if isinstance(tolerate, str) or (unknown := [name for name in tolerate if name not in TOLERABLE]):
        raise ValueError(f"tolerate is {tolerate!r}; give a list of {', '.join(TOLERABLE)}" + (
            "" if isinstance(tolerate, str) else f"; {unknown[0]!r} leaves nothing to use"))
    if not time_limit > 0 or (workers is not None and workers < 1):
        raise ValueError(f"time_limit is {time_limit}, workers is {workers}; both must be more than 0")
    folder = Path(root) / tasks.FOLDER
    if not folder.is_dir():
        inside = Path(root).name == tasks.FOLDER or any((Path(root) / name / "train.json").is_file() for name in tasks.SLOTS)
        raise ValueError(f"root is '{root}', which holds no folder {tasks.FOLDER}; " + (
            f"give the folder above it, '{Path(root).parent}'" if inside else f"set it to the folder that holds {tasks.FOLDER}"))
    return [tasks.get_slot(name) for name in dict.fromkeys(slots or tasks.SLOTS)]


class _Walk:
    def __init__(self, root: str | os.PathLike, tolerate: frozenset[str], decode: bool) -> None:
        self.lists = Path(os.path.realpath(root))
        self.root = Path(os.path.realpath(records.media_root(root)))  # of the media
        self.tolerate, self.decode = tolerate, decode
        self.report = Report()
        self.counts: dict[tuple[str, str], Count] = {}
        self.findings: dict[tuple[str, str], list[Finding]] = {}
        self.folders: dict[str, str] = {}
        self.files: dict[str, _File] = {}
        self.probes: dict[tuple[str, str], probe.Probe] = {}
        self.used: set[str] = set()
        self.tested: dict[Any, str] = {}  # a file that a test record shows, an id that one has -> that record

    def find(self, key: tuple[str, str], problem: str, words: str, file: str, use: _Use | None = None, index: int | None = None) -> bool:
        """Note a finding; whether it leaves its record out."""
        out = problem not in NOTES and problem not in self.tolerate
        name, at = (use.id, use.index) if use else ("", index)
        self.findings.setdefault(key, []).append(Finding(*key, name, at, file, problem, words, out))
        return out

    # ------------------------------------------------------------ lists and records

    def list(self, slot: tasks.Slot, split: str) -> list[_Use]:
        """The records of a split whose fields are right."""
        key, file = (slot.name, split), tasks.json_path(slot, split)
        count = self.counts[key] = Count(*key, slot.published(split))
        at = self._stat(self.lists, file)
        if at.outside and self.find(key, "link", at.outside, file):
            return []
        try:
            raws = records.parse(self.lists / file)
        except RecordError as error:
            self.find(key, error.kind, error.words, file)
            return []
        count.listed = len(raws)
        if not raws:
            self.find(key, "no records", "is an empty list; copy or build it again, or take the slot out of `slots`", file)
        seen: dict[str, int] = {}
        whole: dict[bytes, int] = {}  # a record, all its fields alike -> its place
        uses = []
        for index, raw in enumerate(raws):
            try:
                use = self.use(key, slot, index, raw)
                if use.id in seen:
                    raise RecordError("", records.twice(use.id, seen[use.id]), "id twice")
            except RecordError as error:
                named = _Use(index, _name(slot, split, index, raw), {}, (), None)
                self.find(key, error.kind, error.words, file, named)
                count.left_out[error.kind] += 1
                continue
            seen[use.id] = index
            first = whole.setdefault(hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).digest(), index)
            if first != index and self.find(key, "record twice", f"has all fields alike with record {first}; take one of the two out", file, use):
                count.left_out["record twice"] += 1
                continue
            uses.append(use)
        return uses

    def use(self, key: tuple[str, str], slot: tasks.Slot, index: int, raw: Any) -> _Use:
        split = key[1]
        record = records.check("", slot, split, index, raw)
        try:
            notes = [*_answered(slot, split, record), *_framed(record)]
        except (ValueError, RecursionError) as error:
            raise RecordError("", records.said(error, slot, record), "answer") from None
        media = [(item.path, item.kind) for item in record["media"]]
        window = next(((place, item.second) for place, item in enumerate(record["media"]) if item.second is not None), None)
        if slot.masks and self.mask_wanted(split, record):
            media.append((record["mask"], "mask"))
        use = _Use(index, record["id"], raw, tuple(media), window)
        for problem, words in notes:
            self.find(key, problem, words, tasks.json_path(slot, split), use)
        return use

    def mask_wanted(self, split: str, record: dict[str, Any]) -> bool:
        """A test record is scored on its mask, unless nothing is to be found; a train record's is looked at if it is there."""
        return record.get("split") != "test_n" if split == "test" else not self.stat(record["mask"]).problem

    def conversion(self, slot: tasks.Slot) -> None:
        """Note what a converter left out when it made this slot, and whose chains it took: the report of a converted tree has it."""
        file = f"{tasks.FOLDER}/{slot.name}/{CONVERSION}"
        if not (self.lists / file).is_file():
            return
        try:
            told = json.loads((self.lists / file).read_text(encoding="utf-8"))
            left = [(split, told["splits"][split]["left_out"]) for split in slot.splits]
            rows = [(split, reason, place) for split, reasons in left for reason, places in reasons.items() for place in places]
            chains = Counter({str(verdict): int(number) for verdict, number in told.get("chains", {}).items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            words = f"it cannot be read what was left out ({type(error).__name__}); convert the set again, or remove this file"
            self.findings.setdefault((slot.name, slot.splits[0]), []).append(
                Finding(slot.name, slot.splits[0], "", None, file, "not converted", words, False))
            return
        self.report.chains += chains
        for split, reason, place in rows:  # a file's name need not be UTF-8, and is shown nevertheless
            words = f"{reason}: {place}".encode(errors="backslashreplace").decode()
            self.findings.setdefault((slot.name, split), []).append(Finding(slot.name, split, "", None, file, "not converted", words, True))

    def strangers(self) -> None:
        for folder in sorted((self.lists / tasks.FOLDER).iterdir()):
            if folder.name not in tasks.SLOTS and any((folder / f"{split}.json").is_file() for split in tasks.SPLITS):
                self.find(("", ""), "stranger", f"no slot has this name, so nothing in it is read; known: {', '.join(tasks.SLOTS)}",
                          f"{tasks.FOLDER}/{folder.name}")

    # ------------------------------------------------------------ files

    def stat(self, path: str) -> _File:
        """What the file system says of a path under the root; asked once a path."""
        if path not in self.files:
            self.files[path] = self._stat(self.root, path)
        return self.files[path]

    def _stat(self, root: Path, path: str) -> _File:
        folder, name = os.path.split(root / path)
        try:
            if folder not in self.folders:
                self.folders[folder] = os.path.realpath(folder)
            full = os.path.join(self.folders[folder], name)
            at = os.lstat(full)
            if stat.S_ISLNK(at.st_mode):
                full = os.path.realpath(full)
                at = os.stat(full)
        except (FileNotFoundError, NotADirectoryError):
            return _File("missing", "does not exist; check the record's path, or copy or build the file")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            return _File("missing", f"cannot be reached ({reason}); check the record's path and the file's rights")
        if not stat.S_ISREG(at.st_mode):
            return _File("not a file", "is a folder or a device; give a file")
        outside = "" if Path(full).is_relative_to(root) else (
            "is, or lies behind, a link that leads out of the root; copy it under the root, or put `link` in tolerate if you trust it")
        same = (at.st_dev, at.st_ino) if at.st_ino else full
        return _File("", "", at.st_size, at.st_mtime_ns, same, outside)

    def probe(self, wanted: dict[tuple[str, str], None], cache, limit: float, workers: int, progress: bool) -> None:
        """Probe each (path, kind) that is a file, unless the cache knows it."""
        bar = tqdm(total=len(wanted), unit="file", disable=not progress, desc="validate", mininterval=0.5)
        with probe.Cache(cache) as known, bar:
            waiting: dict[tuple[str, str], tuple[str, str]] = {}
            for path, kind in wanted:
                at, full = self.stat(path), str(self.root / path)
                # also in the cache: a file that was opened only need not be good to its end
                asked = f"{probe.WHOLE}{kind}" if self.decode and kind in ("video", "audio") else kind
                if at.problem:
                    bar.update()
                elif (found := known.get(full, asked, at.size, at.changed)) is not None:
                    self.probes[path, kind] = found
                    bar.update()
                else:
                    waiting[full, asked] = path, kind
            self.report.known, self.report.probed = len(self.probes), len(waiting)
            for job, found in probe.probe_all(waiting, workers, limit):
                path, kind = waiting[job]
                self.probes[path, kind] = found
                known.put(*job, self.files[path].size, self.files[path].changed, found)
                bar.update()

    # ------------------------------------------------------------ verdicts

    def settle(self, slot: str, split: str, uses: list[_Use]) -> None:
        """Keep or leave out each record, now that its media are known."""
        key, count = (slot, split), self.counts[slot, split]
        kept, files, lost = [], {}, bool(count.left_out)
        for use in uses:
            reasons = [problem for problem, words, file in self._wrong(key, use) if self.find(key, problem, words, file, use)]
            if reasons:
                count.left_out[reasons[0]] += 1
                lost = True
                continue
            kept.append(use)
            lengths = [(self.probes[job].seconds, job[1]) for job in use.media]
            count.seconds += [s for s, kind in lengths if kind == ("audio" if use.window else "video")]
            for path, _ in use.media:
                files[self.files[path].same] = self.files[path].size
                self.used.add(path)
                if split == "test":
                    self.tested.setdefault(self.files[path].same, f"{slot}/test, record {use.index} ({use.id})")
            if split == "test" and "id" in use.raw:
                self.tested.setdefault((slot, use.id), f"{slot}/test, record {use.index}")
        count.kept, count.files, count.bytes = len(kept), len(files), sum(files.values())
        if kept:
            # left-out records shift those behind them, whose names come from their place
            self.report.lists[key] = [{**use.raw, "id": use.raw.get("id", use.id)} for use in kept] if lost else [use.raw for use in kept]

    def _wrong(self, key: tuple[str, str], use: _Use) -> Iterator[tuple[str, str, str]]:
        """(problem, words, file) of all that is wrong with a record's media."""
        for place, (path, kind) in enumerate(use.media):
            at = self.files[path]
            if at.problem:
                yield at.problem, at.words, path
                continue
            if at.outside:
                yield "link", at.outside, path
            found = self.probes[path, kind]
            if found.problem:
                yield found.problem, found.words, path
                continue
            if found.named:
                yield "name", found.named, path
            if use.window and use.window[0] == place:
                if found.seconds < use.window[1] + media.LEAST:
                    yield ("no such second", f"lasts {found.seconds:.2f} s, and the record is about second {use.window[1]}; give the whole "
                           "sound, or the right index", path)
            elif kind == "audio" and 0 < found.seconds < media.LEAST:  # 0 where a container does not say
                yield ("no sound", f"lasts {found.seconds * 1000:.3g} ms, too short to be heard; give a sound of {media.LEAST} s or more",
                       path)
            if key[1] == "train" and at.same in self.tested:
                yield "overlap", f"is also shown by {self.tested[at.same]}; take one of the two out", path
        if key[1] == "train" and "id" in use.raw and (key[0], use.id) in self.tested:
            yield "overlap", f"field 'id': is also that of {self.tested[key[0], use.id]}; take one of the two out", tasks.json_path(*key)

    def finish(self, keys: Sequence[tuple[str, str]]) -> Report:
        """The report, in the order of the lists."""
        report = self.report
        report.counts = [self.counts[key] for key in keys]
        for key in (*keys, ("", "")):
            report.findings += sorted(self.findings.get(key, ()), key=lambda f: -1 if f.index is None else f.index)
        report.lists = {key: report.lists[key] for key in keys if key in report.lists}
        digest = hashlib.sha256()
        for path in sorted(self.used):
            digest.update(f"{path}\0{self.files[path].size}\0{self.files[path].changed}\n".encode())
        report.media = digest.hexdigest()
        return report


def _name(slot: tasks.Slot, split: str, index: int, raw: Any) -> str:
    """The id of a record that may be anything."""
    own = raw.get("id") if isinstance(raw, dict) else None
    return tasks.sample_id(slot, {"id": own} if isinstance(own, (str, int)) and own != "" else {}, index, split)[:200]


def _answered(slot: tasks.Slot, split: str, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Raise ValueError unless a record can be learned from (train) or scored on (test).

    Yields:
        (problem, words) of what is wrong with an answer that is not needed, and of a truth that none can say.
    """
    tasks.instruction(slot, record)
    labelled, others = slot.answer_field in record, ", ".join(slot.truth_fields) or "its other fields"
    if split == "train":
        said, true = tasks.parse(slot, tasks.target(slot, record, "explicit")), tasks.truth(slot, record)
        if not tasks.agree(slot, said, true):
            raise ValueError(f"field '{slot.answer_field}' says {_shown(said)}, and {others} {_shown(true)}; correct what is wrong")
        return
    blank = np.zeros((1, 1), bool)
    masks = tasks.Masks(lambda _: blank, lambda *_: blank) if slot.masks else None
    tasks.score(slot, [record], [""], ids=["one"], masks=masks)  # all that the scorer asks of a record
    if slot.masks and not labelled:
        return
    true = tasks.truth(slot, record)
    said = tasks.parse(slot, record[slot.answer_field]) if labelled else true
    if said is None:
        yield "unread answer", f"field '{slot.answer_field}' holds no answer that can be read; the truth is taken from {others}"
    elif not tasks.agree(slot, said, true):
        yield "other answer", (f"field '{slot.answer_field}' says {_shown(said)}, and {others} {_shown(true)}; the latter is taken for the "
                               "truth, correct it if it is wrong")
    try:
        tasks.answer(slot, true)
    except ValueError:
        yield "unsaid truth", f"no answer can say {_shown(true)}, which {others} gives for the truth; every prediction will be wrong, correct it"


def _shown(answer: Any) -> str:
    return repr(tuple(answer) if isinstance(answer, tuple) else answer)[:120]


def _framed(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(problem, words) where an image slot's record numbers its frame otherwise than the file's name does, if that is a number."""
    image, sound, *_ = record["media"]
    name, field = Path(image.path).stem, numbered(record)
    if image.kind == "image" and field and name.isascii() and name.isdigit() and int(name) != sound.second:
        yield "other frame", (f"field '{field}' is {record[field]!r:.40}, and the frame's file is named {name}; the second of the sound is taken "
                              "from the field, correct it if it is wrong")
