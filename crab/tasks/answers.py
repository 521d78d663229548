"""The base class of all kinds of answers, and how tagged text is read.

Reading is strict, so that the verdict on any text is definite: tags pair up and never nest, numbers are plain ASCII
integers, white space around them is free. No text raises an error, and reading takes linear time.
"""

import re
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from .fields import Record, describe
from .registry import Slot

LONGEST = 100_000  # characters; a longer text is not read (a real answer has a few dozen)

Scores = tuple[dict[str, float], list[float]]


class Span(NamedTuple):
    """A tagged piece of a text."""

    tag: str
    inside: str
    start: int
    end: int


def clean(label: object) -> str:
    """A label as it is compared: lower case, one space between words."""
    return " ".join(str(label).casefold().split())


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
    """The inside of the one piece with this tag; None if there is no piece or more than one."""
    pieces = spans(text, (tag,))
    return pieces[0].inside if pieces and len(pieces) == 1 else None


def integers(text: str, pattern: str) -> tuple[int, ...] | None:
    """The integers of a text that matches the pattern, else None: ``integers("( 1,2)", "( # , # )")`` is ``(1, 2)``."""
    parts = [r"([0-9]{1,4})" if part == "#" else re.escape(part) for part in pattern.split()]
    match = re.fullmatch(r"\s*" + r"\s*".join(parts) + r"\s*", text)
    return tuple(int(number) for number in match.groups()) if match else None


class Kind:
    """How answers of one kind are written, read and scored.

    A subclass gives the `tags` of an answer, an `example` of it for error messages, and:

    * `answer(truth)`: the bare answer of a truth;
    * `parse(text)`: what an answer says, of the type of a truth; None if it says nothing definite;
    * `measure(slot, records, answers, masks)`: the metrics and the score of each sample, whose mean is the primary one;
    * `chance(slot, records, masks)`: the primary metric of the best constant answer.
    """

    tags: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = ""

    def bare(self, text: str) -> str:
        """A readable answer without the words around it."""
        return " ".join(text[piece.start : piece.end] for piece in spans(text, self.tags))

    def truth(self, slot: Slot, record: Record) -> Any:
        """The truth of a record, by default from its answer. ValueError names the record and the field."""
        truth = self.parse(record.get(slot.answer_field, ""))
        if truth is None:
            raise ValueError(f"{describe(slot, record)}: field '{slot.answer_field}' must hold {self.example}")
        return truth

    def compared(self, answer: Any) -> Any:
        """An answer as the scorer compares it."""
        return answer
