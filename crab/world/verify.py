"""Check the statements of a reasoning chain, from a record or predicted, against the scene graph.

The grammar is :data:`crab.world.chains.STATEMENTS`. A statement claims only what it says: "i see a red bell at top
left" does not deny other things. A statement that is outside the grammar, or that refers to nothing, is unreadable. No
text raises an error, and the work is linear in its length.

No scene is stored on disk. The scene graph of a record is made again from the seed of the tree and the place of the
record in its file. The record is compared with what the views make there now.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from crab import tasks
from crab.data.files import read_json
from crab.data.records import ADDED, RecordError
from crab.tasks.text import LONGEST
from crab.world import chains
from crab.world.chains import NUMBERS, VOICE
from crab.world.generate import SUMMARY
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, QUADRANTS, Interval, Scene, Thing
from crab.world.views import view
from crab.world.views.view import View

TRUE, FALSE, UNREADABLE = "true", "false", "unreadable"


class Verdict(NamedTuple):
    """A statement, its words one space apart, and whether it is true, false or unreadable."""

    statement: str
    verdict: str


@dataclass(frozen=True)
class Evidence:
    """What a prompt shows and plays, in its order: the scene of each video or picture, and of each sound."""

    seen: tuple[Scene, ...]
    heard: tuple[Scene, ...]


# ---------------------------------------------------------------- the evidence of a record


def evidence(slot: str, split: str, index: int, seed: int) -> Evidence:
    """What the prompt of record `index` shows and plays; for a picture, in its one second."""
    return _evidence(slot, view(slot, split, index, seed))


def read_evidence(
    root: str | os.PathLike, slot: str, split: str, records: Sequence[Mapping[str, Any]]
) -> list[Evidence]:
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
        raise ValueError(
            f"{summary}: no such file, so these records have no scene graph to check a chain against; give a data root "
            "that was generated"
        )
    contents = read_json(summary)
    seed = contents.get("seed") if isinstance(contents, dict) else None
    if not isinstance(seed, int):
        raise ValueError(f"{summary}: field 'seed' is {seed!r}, not a whole number; build the data again")
    result = []
    for index, record in enumerate(records):
        one = view(slot, split, index, seed)
        for name, value in json.loads(json.dumps(one.record)).items():
            if name not in ADDED and (name not in record or record[name] != value):
                raise RecordError(
                    f"{Path(root) / tasks.json_path(slot, split)}: record {index}, field '{name}': differs from what "
                    "the views make of this seed now, so its scene is unknown; build the data again"
                )
        result.append(_evidence(slot, one))
    return result


def known(root: str | os.PathLike) -> bool:
    """Whether the data root was generated, so that its records have scene graphs."""
    return (Path(root) / SUMMARY).is_file()


def _evidence(slot: str, one: View) -> Evidence:
    folder = f"{tasks.FOLDER}/{tasks.get_slot(slot).media_slot}/"
    moments = {name: moment(*at) for name, at in (*one.image.items(), *one.second.items())}
    sources: dict[str, Scene] = {**one.video, **one.audio, **moments}
    items = [(item.kind, sources[item.path.removeprefix(folder)]) for item in tasks.media_paths(slot, one.record)]
    return Evidence(
        tuple(scene for kind, scene in items if kind != "audio"),
        tuple(scene for kind, scene in items if kind == "audio"),
    )


def moment(scene: Scene, second: int) -> Scene:
    """The scene with only what is seen and heard in one second. Intervals keep their whole length."""
    things = (
        replace(
            t,
            visible=t.visible if t.seen_at(second) else None,
            sounding=t.sounding if t.heard_at(second) else None,
        )
        for t in scene.things
    )
    return replace(scene, things=tuple(things))


# ---------------------------------------------------------------- the chain of an answer


def chain(slot: str | tasks.Slot, text: str) -> str:
    """The part of an answer before its first tag or bracket. A caption is all chain."""
    slot = tasks.get_slot(slot)
    return text if slot.module == "captioning" else re.split(r"[<\[]", text, maxsplit=1)[0]


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
    if len(text) > LONGEST:
        return [Verdict(s, UNREADABLE) for s in statements(text)]
    facts = _Facts(shown)
    verdicts: list[Verdict] = []
    before: list[_Claim] = []
    for statement in statements(text):
        claim = _judge(statement, facts, before)
        verdicts.append(Verdict(statement, UNREADABLE if claim is None else TRUE if claim.holds else FALSE))
        before.append(claim or _Claim(False))
    return verdicts


def verify_answer(slot: str | tasks.Slot, text: str, shown: Evidence) -> list[Verdict]:
    """The verdicts on the chain of an answer."""
    return verify(chain(slot, text), shown)


# ---------------------------------------------------------------- the grammar


def _any(words: Sequence[str], name: str) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


_NAME, _SOURCE = _any((*CLASSES, FACE), "name"), _any((*CLASSES, VOICE), "name")
_COLOUR, _EMOTION = _any(COLOURS, "colour"), _any(EMOTIONS, "emotion")
_TIMES = "(?P<times>from [0-9]{1,4} to [0-9]{1,4})"
_SIGHT = re.compile(
    f"an? (?:{_COLOUR} )?{_NAME}(?: showing {_EMOTION}| {_any(MOTIONS, 'motion')})?"
    f"(?: at {_any(QUADRANTS, 'quadrant')})?(?: {_TIMES})?"
)
_SOUND = re.compile(f"an? {_SOURCE}(?: showing {_EMOTION})?(?: {_TIMES})?")
#: What the blanks of `chains.STATEMENTS` may hold.
_BLANKS = {
    "thing": f"(?:{_COLOUR} )?{_NAME}",
    "colour": _COLOUR,
    "name": _NAME,
    "source": _SOURCE,
    "sights": "(?P<sights>.+)",
    "sounds": "(?P<sounds>.+)",
    "state": _any((chains.SOUNDS, chains.SILENT), "state"),
    "times": _TIMES,
    "what": _any(("seen", "heard", "seen and heard"), "what"),
    **{name: _any(NUMBERS, name) for name in ("which", "number", "seen", "heard")},
}
_PATTERNS = {kind: re.compile(text.format(**_BLANKS)) for kind, text in chains.STATEMENTS.items()}

Words = dict[str, str]  # what is said of a thing, or all that can be said of it, by blank


class _Facts:
    """All that can be said of what is shown and played.

    Attributes:
        videos, plays: for each medium, the words of each thing that is seen or heard in it.
        sights, sounds: the same of all media together.
    """

    def __init__(self, shown: Evidence) -> None:
        heard = {(scene.id, t.centre, t.name) for scene in shown.heard for t in scene.sounding}
        self.videos = [
            [_sight_words(t, (scene.id, t.centre, t.name) in heard) for t in scene.visible] for scene in shown.seen
        ]
        self.plays = [[_sound_words(t) for t in scene.sounding] for scene in shown.heard]
        self.sights, self.sounds = sum(self.videos, []), sum(self.plays, [])


def _sight_words(thing: Thing, heard: bool) -> Words:
    return {
        "colour": thing.colour,
        "name": thing.name,
        "emotion": thing.emotion,
        "motion": thing.motion,
        "quadrant": thing.quadrant,
        "times": chains.lasting(thing.visible),
        "state": chains.SOUNDS if heard else chains.SILENT,
    }


def _sound_words(thing: Thing) -> Words:
    name = VOICE if thing.name == FACE else thing.name
    return {"name": name, "emotion": thing.heard_emotion, "times": chains.lasting(thing.sounding)}


class _Claim(NamedTuple):
    """A statement that was read: whether it holds, and the intervals it names."""

    holds: bool
    intervals: tuple[Interval, ...] = ()


def _judge(statement: str, facts: _Facts, before: Sequence[_Claim]) -> _Claim | None:
    """The claim of a statement; None if it is unreadable."""
    matches = ((kind, pattern.fullmatch(statement)) for kind, pattern in _PATTERNS.items())
    kind, match = next((pair for pair in matches if pair[1]), (None, None))
    words = _words(match) if match else {}
    match kind:
        case "see no":
            return _Claim(not _all_there([words], facts.sights))
        case "hear no":
            return _Claim(not _all_there([words], facts.sounds))
        case "see":
            return _listed(words["sights"], _SIGHT, facts.sights)
        case "hear":
            return _listed(words["sounds"], _SOUND, facts.sounds)
        case "video":
            return _of_medium(words["which"], words["sights"], _SIGHT, facts.videos)
        case "sound":
            return _of_medium(words["which"], words["sounds"], _SOUND, facts.plays)
        case "source":
            return _Claim(_all_there([words], facts.sights))
        case "first":
            return _Claim(_is_first(words["name"], facts.sounds))
        case "both":
            return _both(_interval(words["times"]), before[-2:])
        case "count":
            return _Claim(_counts({words["what"]: words["number"]}, facts))
        case "counts":
            return _Claim(_counts(words, facts))
    return None


def _words(match: re.Match) -> Words:
    return {name: words for name, words in match.groupdict().items() if words is not None}


def _interval(times: str) -> Interval:
    _, start, _, end = times.split()
    return int(start), int(end)


def _listed(text: str, pattern: re.Pattern, things: Sequence[Words]) -> _Claim | None:
    """The claim that all things of a list are there; None if one cannot be read."""
    if text == chains.NOTHING:
        return _Claim(not things)
    matches = [pattern.fullmatch(part) for part in text.split(" and ")]
    if None in matches:
        return None
    said = [_words(match) for match in matches]
    return _Claim(_all_there(said, things), tuple(_interval(s["times"]) for s in said if "times" in s))


def _of_medium(which: str, text: str, pattern: re.Pattern, media: Sequence[Sequence[Words]]) -> _Claim | None:
    """The claim about one of several videos or sounds; None if the prompt has no such medium."""
    place = NUMBERS.index(which) - 1
    if len(media) < 2 or not 0 <= place < len(media):
        return None
    return _listed(text, pattern, media[place])


def _all_there(said: Sequence[Words], things: Sequence[Words]) -> bool:
    """Whether each thing that is said fits its own one of those there: a bipartite matching by augmenting paths."""
    chosen: dict[int, int] = {}  # index of a thing there -> index of a thing said

    def fits(one: int, tried: set[int]) -> bool:
        for place, thing in enumerate(things):
            if place not in tried and said[one].items() <= thing.items():
                tried.add(place)
                if place not in chosen or fits(chosen[place], tried):
                    chosen[place] = one
                    return True
        return False

    return len(said) <= len(things) and all(fits(one, set()) for one in range(len(said)))


def _is_first(name: str, sounds: Iterable[Words]) -> bool:
    starts: dict[bool, list[int]] = {True: [], False: []}
    for sound in sounds:
        starts[sound["name"] == name].append(_interval(sound["times"])[0])
    return bool(starts[True]) and all(min(starts[True]) < start for start in starts[False])


def _both(interval: Interval, pair: Sequence[_Claim]) -> _Claim | None:
    """The claim that two statements, each with one interval, hold during their overlap; None if there are no such two."""
    if len(pair) < 2 or any(len(claim.intervals) != 1 for claim in pair):
        return None
    starts, ends = zip(*(claim.intervals[0] for claim in pair), strict=True)
    start, end = max(starts), min(ends)
    return _Claim(start < end and interval == (start, end) and all(claim.holds for claim in pair))


def _counts(numbers: Words, facts: _Facts) -> bool:
    counts = {
        "seen": len(facts.sights),
        "heard": len(facts.sounds),
        "seen and heard": sum(thing["state"] == chains.SOUNDS for thing in facts.sights),
    }
    return all(counts[what] == NUMBERS.index(number) for what, number in numbers.items())
