"""The closed vocabulary of the generated data: all that a word-level tokenizer must know to read and write it.

It follows from the views alone, not from a build's seed or counts, so that what is trained on it (the base model)
stays as it is when those change.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from crab import tasks
from crab.world.views import VIEWS, view
from crab.data.words import split
from crab.world.scene import LATTICE, SECONDS, SIZE

# Labels take turns and the rarest word comes once in some 100 records of one slot and oftener in others: twice what
# any word needs. A build checks that nothing is missing.
_RECORDS = 200


def words(slot: str, records: Iterable[dict]) -> set[str]:
    """The different words, tags included, of all instructions and explicit targets of a slot's records."""
    texts = {text for r in records for text in (tasks.instruction(slot, r), tasks.target(slot, r, "explicit"))}
    return {word for text in texts for word in split(text)}


@cache
def vocabulary() -> dict[str, tuple[str, ...]]:
    """``words`` (seconds 0 to 10 and lattice coordinates 0 to 224 among them, no tags) and ``tags``, both sorted."""
    found = {str(n) for n in (*range(SECONDS + 1), *range(0, SIZE + 1, LATTICE))}
    for slot in VIEWS:
        found |= words(slot, (view(slot, "train", index, 0).record for index in range(_RECORDS)))
    tags = set(tasks.tags())
    return {"words": tuple(sorted(found - tags)), "tags": tuple(sorted(tags))}


def check(slot: str, records: Iterable[dict]) -> None:
    """ValueError if a record says a word that the vocabulary lacks; a model would read it as unknown."""
    known = vocabulary()
    missing = words(slot, records) - {*known["words"], *known["tags"]}
    if missing:
        raise ValueError(f"slot {slot}: words {', '.join(sorted(missing))} are not in the vocabulary; let the first "
                         f"{_RECORDS} train records of its view say them (crab/data/views)")
