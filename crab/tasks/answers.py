"""The base class of all kinds of answers, and how tagged text is read.

What is unambiguous is read: a full stop inside a tag, an underscore for a space, an answer that is given twice. What
could mean two things is not read. Tags pair up and never nest, and numbers are plain ASCII decimals. No text raises an
error, and reading takes linear time.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from .fields import Record, describe
from .registry import Slot

LONGEST = 100_000  # characters; a longer text is not read (a real answer has a few dozen)
NUMBER = r"([0-9]{1,4}(?:\.[0-9]+)?)"

Scores = tuple[dict[str, float], list[float]]


class Partly(tuple):
    """What an answer says as far as it can be read. As a whole it cannot be read, and is wrong."""


class Span(NamedTuple):
    """A tagged piece of a text."""

    tag: str
    inside: str
    start: int
    end: int


def clean(label: object) -> str:
    """A label as it is shown: lower case, one space between words, no full stop at its end."""
    return " ".join(str(label).casefold().split()).rstrip(". ")


def same(label: object) -> str:
    """A label as it is compared: also, an underscore is a space."""
    return clean(str(label).replace("_", " "))


def readable(text: object) -> bool:
    """Whether the answer is text, and short enough."""
    return isinstance(text, str) and len(text) <= LONGEST


def spans(text: str, tags: Iterable[str]) -> list[Span] | None:
    """All pieces ``<tag>...</tag>`` in order; None if tags do not pair up, nest, or hold ``<`` or ``>``."""
    if not readable(text):
        return None
    marks = list(re.finditer(rf"<(/?)({'|'.join(tags)})>", text))
    pairs = list(zip(marks[::2], marks[1::2], strict=False))
    pieces = [Span(a[2], text[a.end() : b.start()], a.start(), b.end()) for a, b in pairs]
    paired = len(marks) % 2 == 0 and all(not a[1] and b[1] and a[2] == b[2] for a, b in pairs)
    return pieces if paired and not any("<" in piece.inside or ">" in piece.inside for piece in pieces) else None


def only(text: str, tag: str) -> str | None:
    """The inside of the pieces with this tag; None if there is no piece, or if two of them differ."""
    pieces = spans(text, (tag,)) or ()
    return pieces[0].inside if len({same(piece.inside) for piece in pieces}) == 1 else None


def decimals(text: str, pattern: str) -> tuple[float, ...] | None:
    """The numbers of a text that matches the pattern, else None: ``decimals("( 1,2.5)", "( # , # )")`` is ``(1, 2.5)``.

    A part of the pattern that ends in "?" may be missing.
    """
    marks = [NUMBER if part == "#" else re.escape(part[0]) for part in pattern.split()]
    parts = [rf"(?:\s*{m})?" if p.endswith("?") else rf"\s*{m}" for p, m in zip(pattern.split(), marks, strict=True)]
    match = re.fullmatch("".join(parts) + r"\s*", text)
    return tuple(map(float, match.groups())) if match else None


def seconds(text: str) -> tuple[float, ...] | None:
    """The two numbers of ``2,6`` or ``(2,6)``, else None."""
    return decimals(text, "# , #") or decimals(text, "( # , # )")


def nearest(number: float) -> int:
    """The nearest whole number, the higher of two that are equally near."""
    return math.floor(number + 0.5)


class Kind:
    """How answers of one kind are written, read and scored.

    A subclass gives the `tags` of an answer, an `example` of it for error messages, and:

    * `answer(truth)`: the bare answer of a truth;
    * `parse(text, record)`: what an answer says, of the type of a truth; None if it says nothing definite. The record
      is None, or the one that was asked about: a letter means one of its choices;
    * `measure(slot, records, answers, masks)`: the metrics and the score of each sample, whose mean is the primary one;
    * `chance(slot, records, masks)`: the primary metric of the best constant answer that it tries.
    """

    tags: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = ""

    def scored(self, text: str, record: Record) -> Any:
        """What counts of a predicted answer, by default all that it says or nothing; None counts as wrong."""
        return self.parse(text, record)

    def bare(self, text: str) -> str:
        """A readable answer without the words around it."""
        return " ".join(text[piece.start : piece.end] for piece in spans(text, self.tags))

    def truth(self, slot: Slot, record: Record) -> Any:
        """The truth of a record, by default from its answer. ValueError names the record and the field."""
        truth = self.parse(record.get(slot.answer_field, ""), record)
        if truth is None:
            raise ValueError(f"{describe(slot, record)}: field '{slot.answer_field}' must hold {self.example}")
        return truth

    def compared(self, answer: Any) -> Any:
        """An answer as the scorer compares it."""
        return answer
