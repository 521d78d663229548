"""Check the statements of a reasoning chain, from a record or predicted, against the scene graph.

The grammar is :data:`crab.world.chains.STATEMENTS`. A statement claims only what it says: "i see a red bell at top
left" does not deny other things. A statement that is outside the grammar, or that refers to nothing, is unreadable. No
text raises an error, and the work is linear in its length.

No scene is stored on disk. The scene graph of a record is made again from the seed of the tree and the place of the
record in its file. The record is compared with what the views make there now.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from crab import tasks
from crab.core.files import read_json
from crab.data.records import ADDED, RecordError
from crab.tasks.answers import LONGEST
from crab.world import chains
from crab.world.chains import NUMBERS, VOICE
from crab.world.generate import SUMMARY
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, QUADRANTS, Interval, Scene
from crab.world.staging import View
from crab.world.views import view

TRUE, FALSE, UNREADABLE = "true", "false", "unreadable"

Words = dict[str, Any]  # blank of a statement -> what is said there of a thing, or can be said


class Verdict(NamedTuple):
    """A statement, its words one space apart, and whether it is true, false or unreadable."""

    statement: str
    verdict: str


@dataclass(frozen=True)
class Evidence:
    """What a prompt shows and plays, in its order: the scene of each video or picture, and of each sound."""

    seen: tuple[Scene, ...]
    heard: tuple[Scene, ...]

    @cached_property
    def sights(self) -> list[Words]:
        """All that can be said of each thing that is seen."""
        heard = {(scene.id, t.centre, t.name) for scene in self.heard for t in scene.sounding}
        sights = []
        for medium, scene in enumerate(self.seen, 1):
            for t in scene.visible:
                words = {name: getattr(t, name) for name in ("colour", "name", "emotion", "motion", "quadrant")}
                state = chains.SOUNDS if (scene.id, t.centre, t.name) in heard else chains.SILENT
                sights.append({**words, "times": chains.lasting(t.visible), "state": state, "medium": medium})
        return sights

    @cached_property
    def sounds(self) -> list[Words]:
        """All that can be said of each thing that is heard."""
        sounds = []
        for medium, scene in enumerate(self.heard, 1):
            for t in scene.sounding:
                words = {"source": VOICE if t.name == FACE else t.name, "emotion": t.heard_emotion}
                sounds.append({**words, "times": chains.lasting(t.sounding), "medium": medium})
        return sounds


def read_evidence(root: str | os.PathLike, slot: str, split: str, records: Sequence[Mapping]) -> list[Evidence]:
    """The evidence of all records of a split of a built tree, in order.

    Args:
        root: the data root, with the summary that a build writes.
        records: what :func:`crab.data.records.read` returns for this slot and split.

    Raises:
        ValueError: the tree was not generated, so it has no scene graphs; or no view makes this slot.
        RecordError: a record differs from what the views make today.
    """
    summary = Path(root) / SUMMARY
    if not known(root):
        raise ValueError(f"{summary}: no such file, so no scene graph is known; give a data root that was generated")
    contents = read_json(summary)
    seed = contents.get("seed") if isinstance(contents, dict) else None
    if not isinstance(seed, int):
        raise ValueError(f"{summary}: field 'seed' is {seed!r}, not a whole number; build the data again")
    result = []
    for index, record in enumerate(records):
        one = view(slot, split, index, seed)
        for name, value in json.loads(json.dumps(one.record)).items():
            if name not in ADDED and (name not in record or record[name] != value):
                place = f"{Path(root) / tasks.json_path(slot, split)}: record {index}, field '{name}'"
                words = "is not what the views make now, so the scene is unknown; build the data again"
                raise RecordError(place, words)
        result.append(evidence(slot, one))
    return result


def known(root: str | os.PathLike) -> bool:
    """Whether the data root was generated, so that its records have scene graphs."""
    return (Path(root) / SUMMARY).is_file()


def evidence(slot: str, one: View) -> Evidence:
    """What the prompt of this record shows and plays; for a picture, in its one second."""
    folder = f"{tasks.FOLDER}/{tasks.get_slot(slot).media_slot}/"
    seen, heard = [], []
    for item in tasks.media_paths(slot, one.record):
        _, scene, *second = one.files[item.path.removeprefix(folder)]
        (heard if item.kind == "audio" else seen).append(moment(scene, *second) if second else scene)
    return Evidence(tuple(seen), tuple(heard))


def moment(scene: Scene, second: int) -> Scene:
    """The scene with only what is seen and heard in one second. Intervals keep their whole length."""
    things = []
    for t in scene.things:
        seen, heard = t.visible if t.seen_at(second) else None, t.sounding if t.heard_at(second) else None
        things.append(replace(t, visible=seen, sounding=heard))
    return replace(scene, things=tuple(things))


def chain(slot: str | tasks.Slot, text: str) -> str:
    """The part of an answer before its first tag or bracket. A caption is all chain."""
    slot = tasks.get_slot(slot)
    return text if slot.kind == "captioning" else re.split(r"[<\[]", text, maxsplit=1)[0]


def statements(text: str) -> list[str]:
    """The statements of a chain: what lies between full stops, in lower case, words one space apart.

    The last one may lack its stop. A text too long to be an answer is one statement, its beginning.
    """
    if len(text) > LONGEST:
        return [text[:80]]
    parts = (" ".join(part.split()) for part in re.split(r"\.(?!\d)", text.casefold()))
    return [part for part in parts if part]


def verify(text: str, shown: Evidence) -> list[Verdict]:
    """The verdict on each statement of a chain, in order. The text may be any text."""
    texts = statements(text)
    claims: list[_Claim | None] = []
    for statement in texts:
        claims.append(_judge(statement, shown, claims[-2:]) if len(text) <= LONGEST else None)
    verdicts = (UNREADABLE if claim is None else TRUE if claim.holds else FALSE for claim in claims)
    return list(map(Verdict, texts, verdicts))


def verify_answer(slot: str | tasks.Slot, text: str, shown: Evidence) -> list[Verdict]:
    """The verdicts on the chain of an answer."""
    return verify(chain(slot, text), shown)


#: What fills the blanks of a statement.
_WORDS = {
    "colour": COLOURS,
    "name": (*CLASSES, FACE),
    "source": (*CLASSES, VOICE),
    "motion": MOTIONS,
    "emotion": EMOTIONS,
    "quadrant": QUADRANTS,
    "state": (chains.SOUNDS, chains.SILENT),
    "what": ("seen", "heard", "seen and heard"),
    **dict.fromkeys(("which", "number", "seen", "heard"), NUMBERS),
    "times": ("from [0-9]{1,4} to [0-9]{1,4}",),
    "sights": (".+",),
    "sounds": (".+",),
}
_BLANKS = {blank: f"(?P<{blank}>{'|'.join(words)})" for blank, words in _WORDS.items()}
_BLANKS["thing"] = "(?:{colour} )?{name}".format(**_BLANKS)


def _pattern(text: str) -> re.Pattern:
    return re.compile(text.format(**_BLANKS))


_SIGHT = _pattern("an? {thing}(?: showing {emotion}| {motion})?(?: at {quadrant})?(?: {times})?")
_SOUND = _pattern("an? {source}(?: showing {emotion})?(?: {times})?")
_PATTERNS = {kind: _pattern(text) for kind, text in chains.STATEMENTS.items()}


class _Claim(NamedTuple):
    """A statement that was read: whether it holds, and the intervals it names."""

    holds: bool
    intervals: tuple[Interval, ...] = ()


def _judge(statement: str, shown: Evidence, before: Sequence[_Claim | None]) -> _Claim | None:
    """The claim of a statement, after at most two claims before it; None if it is unreadable."""
    matches = ((kind, pattern.fullmatch(statement)) for kind, pattern in _PATTERNS.items())
    kind, match = next((pair for pair in matches if pair[1]), (None, None))
    if match is None:
        return None
    words, sights, sounds = _words_of(match), shown.sights, shown.sounds
    match kind:
        case "see":
            return _listed(words["sights"], _SIGHT, sights)
        case "hear":
            return _listed(words["sounds"], _SOUND, sounds)
        case "video":
            return _listed(words["sights"], _SIGHT, _of_medium(sights, len(shown.seen), words["which"]))
        case "sound":
            return _listed(words["sounds"], _SOUND, _of_medium(sounds, len(shown.heard), words["which"]))
        case "see no" | "source":
            return _Claim(_all_there([words], sights) == (kind == "source"))
        case "hear no":
            return _Claim(not _all_there([words], sounds))
        case "first":
            starts = [(_interval(s["times"])[0], s["source"] == words["source"]) for s in sounds]
            own, other = ([start for start, its in starts if its is wanted] for wanted in (True, False))
            return _Claim(bool(own) and all(min(own) < start for start in other))
        case "both":
            if len(before) < 2 or not all(claim and len(claim.intervals) == 1 for claim in before):
                return None
            starts, ends = zip(*(claim.intervals[0] for claim in before), strict=True)
            overlap = max(starts), min(ends)
            holds = overlap[0] < overlap[1] and overlap == _interval(words["times"])
            return _Claim(holds and all(claim.holds for claim in before))
        case _:
            both = sum(s["state"] == chains.SOUNDS for s in sights)
            counts = {"seen": len(sights), "heard": len(sounds), "seen and heard": both}
            numbers = {words["what"]: words["number"]} if kind == "count" else words
            return _Claim(all(counts[what] == NUMBERS.index(number) for what, number in numbers.items()))


def _words_of(match: re.Match) -> Words:
    return {blank: words for blank, words in match.groupdict().items() if words is not None}


def _interval(times: str) -> Interval:
    _, start, _, end = times.split()
    return int(start), int(end)


def _of_medium(things: list[Words], media: int, which: str) -> list[Words] | None:
    """The things of one of several media; None if the prompt has no such medium."""
    medium = NUMBERS.index(which)
    return [thing for thing in things if thing["medium"] == medium] if media > 1 and 1 <= medium <= media else None


def _listed(text: str, pattern: re.Pattern, things: list[Words] | None) -> _Claim | None:
    """The claim that all things of a list are there; None if it cannot be read or refers to nothing."""
    matches = [pattern.fullmatch(part) for part in text.split(" and ")] if text != chains.NOTHING else []
    if things is None or None in matches:
        return None
    listed = [_words_of(match) for match in matches]
    holds = _all_there(listed, things) if listed else not things
    return _Claim(holds, tuple(_interval(s["times"]) for s in listed if "times" in s))


def _all_there(wanted: list[Words], things: list[Words]) -> bool:
    """Whether each of ``wanted`` fits its own one of those there, of which there are few."""
    orders = permutations(things, len(wanted))
    return any(all(one.items() <= thing.items() for one, thing in zip(wanted, order, strict=True)) for order in orders)
