"""How a text parts into words: what the tokenizer and the vocabulary of the generated data agree on."""

from __future__ import annotations

import re

#: What stands alone inside a run of non-space characters: a tag, a number, a mark. The rest is words.
PIECE = r"</?[a-z]+>|\d+|[^\w\s<>/]|[<>/]"


def split(text: str) -> list[str]:
    """The words of a text, in lower case: ``"From <range>2,6"`` gives ``["from", "<range>", "2", ",", "6"]``."""
    return [piece for part in text.lower().split() for piece in re.split(f"({PIECE})", part) if piece]
