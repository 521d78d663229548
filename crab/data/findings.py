"""What a walk through an ``AVUIE_2`` tree found: each problem, numbers by slot, and the records that can be used."""

from __future__ import annotations

import csv
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from crab.core.files import atomic_file

#: All problems, and what they mean.
PROBLEMS = {
    "no list": "the list of records of a slot does not exist",
    "unreadable list": "a list is not UTF-8, not JSON, or not a list",
    "no records": "a list is empty",
    "field": "a field is missing, null or of another type",
    "path": "a path is not relative, or leaves its folder",
    "id twice": "two records of a list have the same id",
    "record twice": "two records of a list are equal in all fields",
    "answer": "an answer, or a truth, cannot be read, or the answer to learn is not the truth of its record",
    "unread answer": "the answer of a test record cannot be read; it is not needed, since other fields hold the truth",
    "other answer": "the answer of a test record is not its truth, which is in other fields and is what counts",
    "unsaid truth": "no answer can say the truth of a test record: every prediction is wrong",
    "other frame": "the number of a frame is not the number in its file's name",
    "missing": "a media file does not exist",
    "not a file": "a media path leads to a folder or a device",
    "link": "a file is a link that leads out of the root; a folder may be one",
    "empty": "a media file has 0 bytes",
    "name": "the suffix of a file does not fit its content",
    "undecodable": "a media file cannot be decoded",
    "truncated": "a media file ends before its header says",
    "no video": "a clip has no video stream",
    "no frames": "a clip has no frames",
    "no sound": "a sound file has no sound, or too little to be heard",
    "no such second": "the sound ends before the second that a record asks for",
    "hangs": "the decoder did not finish in time",
    "crashes": "the decoder crashed",
    "overlap": "a training record shows media, or has the id, of a test record",
    "own overlap": "the same in a set that is published so (MUSIC-AVQA): its figures are measured on this split",
    "stranger": "a folder looks like a slot, but no slot has its name",
    "not converted": "a row of an original data set of which its converter made no record",
}
#: Problems that never leave a record out, and problems that a user may tolerate: the record can be used.
NOTES = ("unread answer", "other answer", "unsaid truth", "other frame", "own overlap", "stranger")
TOLERABLE = ("name", "link", "overlap", "record twice")
#: A converter writes this file beside the lists of a slot: the rows that it left out, and why.
CONVERSION = "conversion.json"
_NAMED = 5  # problems named in the error


class ValidationError(ValueError):
    """A tree has problems that must not be skipped. The message names the first ones, and where all are listed."""


@dataclass(frozen=True)
class Finding:
    slot: str  # both empty for a folder that belongs to no slot
    split: str
    record: str  # id; empty for a problem of the whole list
    index: int | None  # place of the record in its list, from 0; None for a problem of the whole list
    file: str  # POSIX path under the root
    problem: str  # one of `PROBLEMS`
    words: str  # the problem and how to fix it
    left_out: bool  # whether the record, the list, or the row of the original set is left out because of it

    @property
    def kind(self) -> str:
        """The problem; for a row that was not converted also the reason, which stands first in its words."""
        return f"{self.problem}: {self.words.partition(': ')[0]}" if self.problem == "not converted" else self.problem

    def __str__(self) -> str:
        record = f", record {self.index} ({self.record})" if self.index is not None else ""
        return f"{self.slot}/{self.split}{record}: {self.file}: {self.words}"


@dataclass
class Count:
    """One split of a slot in numbers."""

    slot: str
    split: str
    listed: int | None = None  # records in its list; None if there is no list that can be read
    kept: int = 0  # records that can be used
    left_out: Counter[str] = field(default_factory=Counter)  # the other records, by their first problem
    files: int = 0  # media of the kept records with their masks, each file once
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # of their clips, or of their sounds if they have no clips


@dataclass
class Report:
    """The result of a walk."""

    counts: list[Count]
    findings: list[Finding]  # in the order of the lists
    lists: dict[tuple[str, str], list[dict[str, Any]]]  # usable records by slot and split; with ids if some are lost
    chains: Counter[str]  # of a chat model, in converted slots: how many were "taken", or refused, by reason
    probed: int  # media files opened in this walk
    known: int  # media files unchanged since an earlier walk

    @property
    def problems(self) -> list[Finding]:
        """The findings that leave a record or a list of this tree out."""
        return [finding for finding in self.findings if finding.left_out and finding.problem != "not converted"]

    def write(self, path: str | os.PathLike) -> None:
        """Write all findings as csv, one per row."""
        text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        with atomic_file(path) as part, part.open("w", **text) as file:
            rows = csv.DictWriter(file, [f.name for f in fields(Finding)], lineterminator="\n")
            rows.writeheader()
            rows.writerows(map(vars, self.findings))

    def complaint(self, path: str | os.PathLike | None) -> str:
        """The problems in words: how many, the first ones, where all are listed (``path``), and what to do."""
        problems, kinds = self.problems, Counter(finding.problem for finding in self.problems)
        numbers = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        lines = "".join(f"\n- {finding}"[:600] for finding in problems[:_NAMED])
        more = f"\nand {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        all_in = f"All are listed in {path}. " if path else ""
        usable = ", ".join(kind for kind in kinds if kind in TOLERABLE)
        tolerate = f"; or keep their records, with {usable} in tolerate" if usable else ""
        fix = f"Correct them, or set on_problem to skip to leave these records out{tolerate}."
        return f"{len(problems)} problems ({numbers}):{lines}{more}\n{all_in}{fix}"
