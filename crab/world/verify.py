"""Statements of a reasoning chain, a record's own or a predicted one, checked against the scene graph.

The grammar is that of :mod:`crab.world.chains`.  A statement claims no more than it says: "i see a red bell at top
left" does not deny other things.  Verdicts are definite: a statement that the grammar does not know, or that refers to
nothing, is unreadable; nothing here raises on any text, and the work is linear in its length.

No scene is stored.  The scene graph of a record of a built tree is made again from the tree's seed and the record's
place in its file, and the record is compared with what the views make there now.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from crab import tasks
from crab.world.chains import NUMBERS, overlap
from crab.data.files import read_json
from crab.world.generate import SUMMARY
from crab.data.records import ADDED, RecordError
from crab.world.views import view
from crab.world.views.view import View
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, QUADRANTS, Interval, Scene, Thing
from crab.tasks.text import LONGEST

TRUE, FALSE, UNREADABLE = "true", "false", "unreadable"
VOICE = "voice"  # how a face is heard


class Verdict(NamedTuple):
    """A statement, its words one space apart, and what is to be thought of it: true, false or unreadable."""

    statement: str
    verdict: str


@dataclass(frozen=True)
class Evidence:
    """What a prompt shows and plays, in its order.

    Attributes:
        seen: the scene of each video or picture.
        heard: the scene of each sound.
    """

    seen: tuple[Scene, ...]
    heard: tuple[Scene, ...]

    @property
    def sights(self) -> list[Thing]:
        return [t for scene in self.seen for t in scene.visible]

    @property
    def sounds(self) -> list[Thing]:
        return [t for scene in self.heard for t in scene.sounding]


# ---------------------------------------------------------------- the evidence of a record

def evidence(slot: str, split: str, index: int, seed: int) -> Evidence:
    """What the prompt of record `index` shows and plays; for a picture, in its one second."""
    return _evidence(slot, view(slot, split, index, seed))


def read_evidence(root: str | os.PathLike, slot: str, split: str, records: Sequence[Mapping[str, Any]]) -> list[Evidence]:
    """The evidence of all records of a split of a built tree, in order.

    Args:
        root: the data root, with the summary that a build leaves there.
        records: what :func:`crab.data.records.read` gives for this slot and split.

    Raises:
        ValueError: the root was not built here, so that no scene graph is known, or no view makes this slot.
        RecordError: a record differs from what the views make today.
    """
    summary = Path(root) / SUMMARY
    if not known(root):
        raise ValueError(f"{summary}: no such file, so these records have no scene graph to check a chain against; only "
                         "a generated data root has one")
    build = read_json(summary)
    seed = build.get("seed") if isinstance(build, dict) else None
    if not isinstance(seed, int):
        raise ValueError(f"{summary}: field 'seed' is {seed!r}, no whole number; build the data again")
    found = []
    for index, record in enumerate(records):
        made = view(slot, split, index, seed)
        for name, value in json.loads(json.dumps(made.record)).items():
            if name not in ADDED and (name not in record or record[name] != value):
                raise RecordError(f"{Path(root) / tasks.json_path(slot, split)}: record {index}, field '{name}': is not what "
                                  "the views make of this seed now, so its scene is not known; build the data again")
        found.append(_evidence(slot, made))
    return found


def known(root: str | os.PathLike) -> bool:
    """Whether the data root was built, so that scene graphs of its records can be had."""
    return (Path(root) / SUMMARY).is_file()


def _evidence(slot: str, made: View) -> Evidence:
    folder = f"{tasks.FOLDER}/{tasks.get_slot(slot).media_slot}/"
    moments = {name: moment(*at) for name, at in (*made.image.items(), *made.second.items())}
    sources: dict[str, Scene] = {**made.video, **made.audio, **moments}
    items = [(item.kind, sources[item.path.removeprefix(folder)]) for item in tasks.media_paths(slot, made.record)]
    return Evidence(tuple(s for kind, s in items if kind != "audio"), tuple(s for kind, s in items if kind == "audio"))


def moment(scene: Scene, second: int) -> Scene:
    """The scene with only what is seen and heard during one second; intervals keep their whole length."""
    things = (replace(t, visible=t.visible if t.seen_at(second) else None,
                      sounding=t.sounding if t.heard_at(second) else None) for t in scene.things)
    return replace(scene, things=tuple(things))


# ---------------------------------------------------------------- the chain of an answer

def chain(slot: str | tasks.Slot, text: str) -> str:
    """What stands before the first tag or bracket of an answer; a caption is all chain."""
    slot = tasks.get_slot(slot)
    return text if slot.module == "captioning" else re.split(r"[<\[]", text, maxsplit=1)[0]


def statements(text: str) -> list[str]:
    """The statements of a chain: what lies between full stops, folded to lower case, words one space apart.

    The last one may lack its stop.  A text too long to be an answer is one statement, its beginning.
    """
    if len(text) > LONGEST:
        return [text[:80]]
    parts = (" ".join(part.split()) for part in re.split(r"\.(?!\d)", text.casefold()))
    return [part for part in parts if part]


def verify(text: str, shown: Evidence) -> list[Verdict]:
    """The verdict on every statement of a chain, in order.

    Args:
        text: a chain (see :func:`chain`), any text.
        shown: what it is to be true of.
    """
    if len(text) > LONGEST:
        return [Verdict(s, UNREADABLE) for s in statements(text)]
    verdicts: list[Verdict] = []
    before: list[_Said] = []
    for statement in statements(text):
        said = _judge(statement, shown, before)
        verdicts.append(Verdict(statement, UNREADABLE if said is None else TRUE if said.holds else FALSE))
        before.append(said or _NOTHING)
    return verdicts


def verify_answer(slot: str | tasks.Slot, text: str, shown: Evidence) -> list[Verdict]:
    """The verdicts on the chain of an answer."""
    return verify(chain(slot, text), shown)


# ---------------------------------------------------------------- the grammar

class _Said(NamedTuple):
    """A read statement: whether it holds, and the intervals it names."""

    holds: bool
    intervals: tuple[Interval, ...] = ()


_NOTHING = _Said(False)


def _any(words: Sequence[str], name: str) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


_TIMES = r"(?: from (?P<start>[0-9]{1,4}) to (?P<end>[0-9]{1,4}))?"
_SIGHT = re.compile(
    rf"an? (?:{_any(COLOURS, 'colour')} )?{_any((*CLASSES, FACE), 'name')}"
    rf"(?: showing {_any(EMOTIONS, 'emotion')}| {_any(MOTIONS, 'motion')})?"
    rf"(?: at {_any(QUADRANTS, 'quadrant')})?{_TIMES}"
)
_SOUND = re.compile(rf"an? {_any((*CLASSES, VOICE), 'name')}(?: showing {_any(EMOTIONS, 'emotion')})?{_TIMES}")


def _listed(text: str, pattern: re.Pattern) -> list[dict[str, str]] | None:
    """What is said of each thing of a list; None if one of them cannot be read."""
    matches = [pattern.fullmatch(part) for part in text.split(" and ")]
    if None in matches:
        return None
    return [{key: value for key, value in match.groupdict().items() if value is not None} for match in matches]


def _sight_of(thing: Thing) -> dict[str, str]:
    """All that can be said of a seen thing."""
    return {"colour": thing.colour, "name": thing.name, "emotion": thing.emotion, "motion": thing.motion,
            "quadrant": thing.quadrant, **_times_of(thing.visible)}


def _sound_of(thing: Thing) -> dict[str, str]:
    """All that can be said of a heard thing."""
    return {"name": VOICE if thing.name == FACE else thing.name, "emotion": thing.heard_emotion, **_times_of(thing.sounding)}


def _times_of(interval: Interval) -> dict[str, str]:
    return {"start": str(interval[0]), "end": str(interval[1])}


def _all_there(said: Sequence[dict[str, str]], things: Sequence[dict[str, str]]) -> bool:
    """Whether the things said are as many different ones of those there: a matching, found by augmenting paths."""
    chosen: dict[int, int] = {}  # a thing's place among those there -> among those said

    def fits(one: int, tried: set[int]) -> bool:
        for place, thing in enumerate(things):
            if place not in tried and said[one].items() <= thing.items():
                tried.add(place)
                if place not in chosen or fits(chosen[place], tried):
                    chosen[place] = one
                    return True
        return False

    return len(said) <= len(things) and all(fits(one, set()) for one in range(len(said)))


def _list(text: str, pattern: re.Pattern, things: Sequence[dict[str, str]]) -> _Said | None:
    if text == "nothing":
        return _Said(not things)
    said = _listed(text, pattern)
    if said is None:
        return None
    intervals = tuple((int(s["start"]), int(s["end"])) for s in said if "start" in s)
    return _Said(_all_there(said, things), intervals)


def _judge(statement: str, shown: Evidence, before: Sequence[_Said]) -> _Said | None:
    for pattern, rule in _RULES:
        if match := pattern.fullmatch(statement):
            return rule(match, shown, before)
    return None


def _see(match: re.Match, shown: Evidence, before) -> _Said | None:
    return _list(match["list"], _SIGHT, [_sight_of(t) for t in shown.sights])


def _hear(match: re.Match, shown: Evidence, before) -> _Said | None:
    return _list(match["list"], _SOUND, [_sound_of(t) for t in shown.sounds])


def _see_no(match: re.Match, shown: Evidence, before) -> _Said:
    return _Said(not any(t.name == match["name"] and match["colour"] in (None, t.colour) for t in shown.sights))


def _hear_no(match: re.Match, shown: Evidence, before) -> _Said:
    return _Said(not any(_sound_of(t)["name"] == match["name"] for t in shown.sounds))


def _shows(match: re.Match, shown: Evidence, before) -> _Said | None:
    scene = _nth(shown.seen, match["which"])
    return scene and _list(match["list"], _SIGHT, [_sight_of(t) for t in scene.visible])


def _is(match: re.Match, shown: Evidence, before) -> _Said | None:
    scene = _nth(shown.heard, match["which"])
    return scene and _list(match["list"], _SOUND, [_sound_of(t) for t in scene.sounding])


def _nth(scenes: Sequence[Scene], number: str) -> Scene | None:
    """None where the prompt has no such medium: the statement then refers to nothing."""
    place = NUMBERS.index(number) - 1
    return scenes[place] if 0 <= place < len(scenes) and len(scenes) > 1 else None


def _sounds(match: re.Match, shown: Evidence, before) -> _Said:
    things = _heard_or_not(shown)[match["how"] == "sounds"]
    return _Said(any((t.colour, t.name) == (match["colour"], match["name"]) for t in things))


def _heard_or_not(shown: Evidence) -> tuple[list[Thing], list[Thing]]:
    """The seen things that are not heard, and those that are."""
    heard = {(scene.id, t.centre, t.name) for scene in shown.heard for t in scene.sounding}
    parts: tuple[list[Thing], list[Thing]] = [], []
    for scene in shown.seen:
        for thing in scene.visible:
            parts[(scene.id, thing.centre, thing.name) in heard].append(thing)
    return parts


def _hold(match: re.Match, shown: Evidence, before: Sequence[_Said]) -> _Said | None:
    """Both of the two statements before hold, each with its one interval, during their overlap."""
    pair = before[-2:]
    if len(pair) < 2 or any(len(said.intervals) != 1 for said in pair):
        return None
    (first,), (second,) = (said.intervals for said in pair)
    same = overlap(first, second) == (int(match["start"]), int(match["end"]))
    return _Said(same and all(said.holds for said in pair))


def _first(match: re.Match, shown: Evidence, before) -> _Said:
    starts = {name: [t.sounding[0] for t in shown.sounds if (_sound_of(t)["name"] == match["name"]) == named]
              for name, named in (("its", True), ("other", False))}
    return _Said(bool(starts["its"]) and all(min(starts["its"]) < start for start in starts["other"]))


def _count(match: re.Match, shown: Evidence, before) -> _Said:
    counts = {"seen": len(shown.sights), "heard": len(shown.sounds), "seen and heard": len(_heard_or_not(shown)[True])}
    said = {match["what"]: match["number"], **({"heard": match["other"]} if match["other"] else {})}
    return _Said(all(counts[what] == NUMBERS.index(number) for what, number in said.items()))


Rule = Callable[[re.Match, Evidence, Sequence[_Said]], "_Said | None"]

_RULES: tuple[tuple[re.Pattern, Rule], ...] = tuple((re.compile(pattern), rule) for pattern, rule in (
    (rf"i see no (?:{_any(COLOURS, 'colour')} )?{_any((*CLASSES, FACE), 'name')}", _see_no),
    (rf"i hear no {_any((*CLASSES, VOICE), 'name')}", _hear_no),
    (r"i see (?P<list>.+)", _see),
    (r"i hear (?P<list>.+)", _hear),
    (rf"video {_any(NUMBERS, 'which')} shows (?P<list>.+)", _shows),
    (rf"sound {_any(NUMBERS, 'which')} is (?P<list>.+)", _is),
    (rf"the {_any(COLOURS, 'colour')} {_any((*CLASSES, FACE), 'name')} (?P<how>sounds|is silent)", _sounds),
    (rf"the {_any((*CLASSES, VOICE), 'name')} is first", _first),
    (r"both hold from (?P<start>[0-9]{1,4}) to (?P<end>[0-9]{1,4})", _hold),
    (rf"{_any(NUMBERS, 'number')} (?P<what>seen(?: and heard)?|heard)(?P<other>)", _count),
    (rf"{_any(NUMBERS, 'number')} (?P<what>seen) and {_any(NUMBERS, 'other')} heard", _count),
))
