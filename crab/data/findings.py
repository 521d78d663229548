"""What a walk through an ``AVUIE_2`` tree found: each thing that is wrong, counts by slot, and what is left to use."""

from __future__ import annotations

import csv
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from crab.data.files import atomic_file
from crab.tasks.registry import PUBLISHED_SAMPLES

#: What may be wrong, and what that means.
PROBLEMS = {
    "no list": "a slot's list of records is not there",
    "unreadable list": "a list is not UTF-8, not JSON, or not a list",
    "no records": "a list is empty",
    "field": "a field is missing, null or of another type",
    "path": "a path is no relative path, or climbs out of its folder",
    "id twice": "two records of a list have one id",
    "record twice": "two records of a list have all fields alike",
    "answer": "an answer, or a truth, cannot be read, or the answer to be learned is not the truth of its record",
    "unread answer": "the answer of a test record cannot be read; it is not needed, since the truth is in other fields",
    "other answer": "the answer of a test record is not its truth, which is in other fields and is what counts",
    "unsaid truth": "the truth of a test record is a text that no answer can say: whatever is predicted is wrong",
    "other frame": "the number of a frame is not that of its file's name",
    "missing": "a media file is not there",
    "not a file": "a media path leads to a folder or a device",
    "link": "a link leads out of the root",
    "empty": "a media file has 0 bytes",
    "name": "a file's name does not say what it holds",
    "undecodable": "a media file cannot be decoded",
    "truncated": "a media file ends before what it promises",
    "no video": "a clip has no video stream",
    "no frames": "a clip has no frames",
    "no sound": "a sound file has no sound, or too little to be heard",
    "no such second": "the sound ends before the second that a record asks for",
    "hangs": "the decoder did not come to an end in time",
    "crashes": "the decoder crashed",
    "overlap": "a training record shows media, or has the id, of a test record",
    "stranger": "a folder looks like a slot and is none",
    "not converted": "a row of an original data set of which its converter made no record",
}
#: Those that never leave a record out, and those that need not: such a record can be used.
NOTES = ("unread answer", "other answer", "unsaid truth", "other frame", "stranger")
TOLERABLE = ("name", "link", "overlap", "record twice")
#: Beside a slot's lists, where a converter made them: what it left out, and why.
CONVERSION = "conversion.json"
_NAMED = 5  # problems named in the error


class ValidationError(ValueError):
    """A tree has problems that were not to be skipped; the message names the first and where all are listed."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        slot, split: whose list; empty for a folder that belongs to none.
        record: id of the record; empty where the whole list is meant.
        index: place of the record in its list, from 0; None where the whole list is meant.
        file: the file at fault, a POSIX path under the root.
        problem: one of :data:`PROBLEMS`.
        words: what is wrong, and the mend.
        left_out: whether the record (or the list, or the row of the original set) is left out for it.
    """

    slot: str
    split: str
    record: str
    index: int | None
    file: str
    problem: str
    words: str
    left_out: bool

    @property
    def kind(self) -> str:
        """The problem; of what was not converted also the reason, with which its words begin."""
        return f"{self.problem}: {self.words.partition(': ')[0]}" if self.problem == "not converted" else self.problem

    def __str__(self) -> str:
        which = f", record {self.index} ({self.record})" if self.index is not None else ""
        return f"{self.slot}/{self.split}{which}: {self.file}: {self.words}"


@dataclass
class Count:
    """A slot's split in numbers.

    Attributes:
        published: records of the published split, None where not known.
        listed: records in its list, None where there is no list that can be read.
        kept: records that can be used.
        left_out: the others, by the first problem of each.
        files, bytes: media of the kept records, masks included, each file once.
        seconds: lengths of the clips of the kept records, of their sounds where they have no clips.
    """

    slot: str
    split: str
    published: int | None
    listed: int | None = None
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    files: int = 0
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass
class Report:
    """What a walk found.

    Attributes:
        counts: a row a slot and split.
        findings: all that is wrong, in the order of the lists.
        lists: (slot, split) -> records that can be used, as published; those of lists that lost some bear an ``id``.
        media: digest of the names, sizes and times of change of all media in use.
        chains: of converted slots, how many chains of a chat model were "taken", and how many refused, by reason.
        probed, known: files probed in this walk, and those unchanged since an earlier one.
    """

    counts: list[Count] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    lists: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    media: str = ""
    chains: Counter[str] = field(default_factory=Counter)
    probed: int = 0
    known: int = 0

    @property
    def problems(self) -> list[Finding]:
        """The findings that leave a record or a list out; what a converter left out never was in the tree."""
        return [finding for finding in self.findings if finding.left_out and finding.problem != "not converted"]

    def summary(self) -> str:
        """What was found, in a few sentences."""
        listed, kept = (sum(value or 0 for value in values) for values in zip(*((c.listed, c.kept) for c in self.counts), strict=True))
        files, left = sum(c.files for c in self.counts), sum((c.left_out for c in self.counts), Counter())
        reasons = ", ".join(f"{n} {problem}" for problem, n in left.most_common())
        absent = [f"{c.slot}/{c.split}" for c in self.counts if c.listed is None]
        notes = Counter(f.problem for f in self.findings if not f.left_out)
        rows = Counter(f.kind.removeprefix("not converted: ") for f in self.findings if f.left_out and f.problem == "not converted")
        unmade = ", ".join(f"{n} {reason}" for reason, n in rows.most_common())
        taken, refused = self.chains["taken"], Counter({why: n for why, n in self.chains.items() if why != "taken"})
        why = ", ".join(f"{n} {reason}" for reason, n in refused.most_common())
        return " ".join(filter(None, [
            f"{listed} records listed, {kept} kept, {listed - kept} left out{f' ({reasons})' if reasons else ''}.",
            f"{files} media files in use; {self.probed} probed now, {self.known} unchanged since an earlier walk.",
            f"Not converted of the original data sets: {rows.total()} rows ({unmade})." if rows else "",
            f"Chains of the chat model: {taken} taken, {refused.total()} refused{f' ({why})' if why else ''}." if self.chains else "",
            f"Without a list that can be read: {', '.join(absent)}." if absent else "",
            f"Noted, and kept: {', '.join(f'{n} {problem}' for problem, n in notes.most_common())}." if notes else "",
            f"The whole published set has about {PUBLISHED_SAMPLES} samples.",
        ]))

    def write(self, path: str | os.PathLike) -> None:
        """All findings as csv, a row each."""
        with atomic_file(path) as part, open(part, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            rows = csv.writer(file, lineterminator="\n")
            names = [f.name for f in fields(Finding)]
            rows.writerow(names)
            rows.writerows([getattr(finding, name) for name in names] for finding in self.findings)

    def complaint(self, path: str | os.PathLike | None) -> str:
        """The problems in words: how many, the first few, where all are listed (`path`), and what to do."""
        problems = self.problems
        lines = "".join(f"\n- {finding}"[:600] for finding in problems[:_NAMED])
        more = f"\nand {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        kinds = Counter(finding.problem for finding in problems)
        usable = [kind for kind in kinds if kind in TOLERABLE]
        return (
            f"{len(problems)} problems ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}):{lines}{more}\n"
            + (f"All are listed in {path}. " if path else "")
            + "Mend them, or set on_problem to skip to leave these records out"
            + (f"; or keep their records, with {', '.join(usable)} in tolerate" if usable else "") + "."
        )
