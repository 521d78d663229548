"""The closed vocabulary of the generated data: every word that a word-level tokenizer must know.

It follows from the views only, not from a build's seed or counts. So the base model, which is trained on it, stays the
same when those change.
"""

from collections.abc import Iterable
from functools import cache

from crab import tasks
from crab.data.words import split
from crab.world.scene import LATTICE, SECONDS, SIZE
from crab.world.views import VIEWS, view

# Labels take turns, and the rarest word comes once in some 100 records of a slot. Twice that is enough for every word.
# A build checks that no word is missing.
_RECORDS = 200


def words(slot: str, records: Iterable[dict]) -> set[str]:
    """The different words, tags included, of all instructions and explicit targets of a slot's records."""
    texts = {text for r in records for text in (tasks.instruction(slot, r), tasks.target(slot, r, "explicit"))}
    return {word for text in texts for word in split(text)}


@cache
def vocabulary() -> dict[str, tuple[str, ...]]:
    """``words`` without tags (with the seconds 0 to 10 and the coordinates 0 to 224), and ``tags``, both sorted."""
    known = {str(n) for n in (*range(SECONDS + 1), *range(0, SIZE + 1, LATTICE))}
    for slot in VIEWS:
        known |= words(slot, (view(slot, "train", index, 0).record for index in range(_RECORDS)))
    tags = set(tasks.tags())
    return {"words": tuple(sorted(known - tags)), "tags": tuple(sorted(tags))}


def check(slot: str, records: Iterable[dict]) -> None:
    """ValueError if a record has a word that is not in the vocabulary. A model would read it as unknown."""
    known = vocabulary()
    missing = words(slot, records) - {*known["words"], *known["tags"]}
    if missing:
        fix = f"change the slot's view in crab/world/views so that its first {_RECORDS} train records use them"
        raise ValueError(f"slot {slot}: words {', '.join(sorted(missing))} are not in the vocabulary; {fix}")
