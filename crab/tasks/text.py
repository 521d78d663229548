"""Reading tagged answers out of any text.

The rules are strict, so that the verdict on any text is definite: an answer holds what its grammar
asks for exactly once, tags pair up and never nest, numbers are plain ASCII integers. White space
around tags, numbers and punctuation is free. Nothing here raises on any text, and nothing takes
more than linear time: text beyond :data:`LONGEST` characters (an answer has a few dozen) is refused
unread.
"""

from __future__ import annotations

import re
from typing import Iterable, NamedTuple

LONGEST = 100_000


class Span(NamedTuple):
    """A tagged piece: tag name, what stands inside, and where the whole piece lies in the text."""

    tag: str
    inside: str
    start: int
    end: int


def clean(label: object) -> str:
    """A label as it is compared: case folded, white space collapsed."""
    return " ".join(str(label).casefold().split())


def readable(text: object) -> bool:
    """Whether an answer is looked at at all."""
    return isinstance(text, str) and len(text) <= LONGEST


def spans(text: str, tags: Iterable[str]) -> list[Span] | None:
    """All pieces ``<tag>...</tag>`` in order; None if tags do not pair up, nest, or hold ``<`` or ``>``."""
    if not readable(text):
        return None
    found: list[Span] = []
    opened: re.Match | None = None
    for mark in re.finditer(rf"<(/?)({'|'.join(tags)})>", text):
        closing, tag = mark.groups()
        if not closing:
            if opened:
                return None
            opened = mark
            continue
        if not opened or opened[2] != tag:
            return None
        inside = text[opened.end():mark.start()]
        if "<" in inside or ">" in inside:
            return None
        found.append(Span(tag, inside, opened.start(), mark.end()))
        opened = None
    return None if opened else found


def only(text: str, tag: str) -> str | None:
    """What stands inside the one piece of this tag; None if there is none or more than one."""
    found = spans(text, (tag,))
    return found[0].inside if found and len(found) == 1 else None


def integers(text: str, pattern: str) -> tuple[int, ...] | None:
    """The integers of a text that is the pattern as a whole; ``#`` is an integer, spaces are free.

    ``integers(" ( 1, 2 )", "( # , # )")`` is ``(1, 2)``.
    """
    parts = [r"([0-9]{1,4})" if p == "#" else re.escape(p) for p in pattern.split()]
    match = re.fullmatch(r"\s*" + r"\s*".join(parts) + r"\s*", text)
    return tuple(int(g) for g in match.groups()) if match else None


def literals(tags: Iterable[str]) -> tuple[str, ...]:
    """The tag strings themselves: ``<tag>`` and ``</tag>`` of each."""
    return tuple(mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>"))
