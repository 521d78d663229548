"""Statements of a reasoning chain, each written from the scene graph and therefore true of it.

    i hear a bell from 2 to 6 .                            a sound and its seconds [start, end)
    i hear a voice showing fear .                          a face's sound: the emotion of the voice, not of the face
    i see a red bell swaying at top left from 2 to 8 .     a thing, what it does, its quadrant, its seconds
    i see a red face showing sad at top left .             a face: what it shows, in place of what it does
    i see nothing .  i hear nothing .                      no thing is seen, heard
    the red bell sounds .                                  that seen thing is one of those heard
    the red bell is silent .                               that seen thing is none of those heard
    both hold from 2 to 6 .                                where the intervals of the two statements before overlap
    i see no bell .  i hear no bell .                      nothing of that class, at any time
    i see no red bell .                                    nothing of that class in that colour, at any time
    two seen .  two heard .  two seen and heard .          how many things are seen, are heard, are both
    two seen and one heard .                               how many are seen, and how many are heard
    the bell is first .                                    its sound begins before any other
    video one shows a red bell at top left .               a thing of the first of two videos
    sound two is a bell .                                  a sound of the second of two sounds

Lists after "see" and "hear" are joined by "and"; they need not name all there is.  What is seen and heard is so at
some time of the clip; where a record has a `second`, at that second.  Words come from a small closed vocabulary;
punctuation stands apart, as a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from crab.world.scene import FACE, QUADRANTS, Interval, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")


def article(words: str) -> str:
    """The words with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun(thing: Thing) -> str:
    """Colour and class: "red bell"."""
    return f"{thing.colour} {thing.name}"


def lasting(interval: Interval) -> str:
    """"from 2 to 6", the end exclusive."""
    return f"from {interval[0]} to {interval[1]}"


def sight(thing: Thing, does: bool = False, times: bool = False) -> str:
    """A seen thing and its place; a face shows its emotion instead of a motion."""
    manner = f" showing {thing.emotion}" if thing.name == FACE else f" {thing.motion}" if does else ""
    return f"{article(noun(thing))}{manner} at {thing.quadrant}" + (f" {lasting(thing.visible)}" if times else "")


def sound(thing: Thing, times: bool = True) -> str:
    """A heard thing; a face is heard as a voice with its emotion."""
    name = f"a voice showing {thing.heard_emotion}" if thing.name == FACE else article(thing.name)
    return name + (f" {lasting(thing.sounding)}" if times else "")


def see(things: Sequence[Thing], does: bool = False, times: bool = False) -> str:
    """All of these are seen, in reading order."""
    return f"i see {' and '.join(sight(t, does, times) for t in by_place(things)) or 'nothing'} ."


def hear(things: Sequence[Thing], times: bool = True) -> str:
    """All of these are heard: in order of their beginning, or, without times, of their names, since a moment does not tell who began."""
    ordered = by_time(things) if times else sorted(things, key=lambda t: t.name)
    return f"i hear {' and '.join(sound(t, times) for t in ordered) or 'nothing'} ."


def sounds(thing: Thing) -> str:
    """This seen thing is the source of a sound."""
    return f"the {noun(thing)} sounds ."


def silent(thing: Thing) -> str:
    """This seen thing makes no sound."""
    return f"the {noun(thing)} is silent ."


def no_sight(words: str) -> str:
    """Nothing of this class, or colour and class, is seen."""
    return f"i see no {words} ."


def no_sound(name: str) -> str:
    """Nothing of this class is heard."""
    return f"i hear no {name} ."


def counted(number: int, what: str) -> str:
    """How many things are `what`: "seen", "heard" or "seen and heard"."""
    return f"{NUMBERS[number]} {what} ."


def first(name: str) -> str:
    """The sound of this class begins before any other."""
    return f"the {name} is first ."


def both_hold(interval: Interval) -> str:
    """The seconds that the two statements before share."""
    return f"both hold {lasting(interval)} ."


def video_shows(which: str, thing: Thing) -> str:
    """A thing of the video called "one" or "two"."""
    return f"video {which} shows {sight(thing)} ."


def sound_is(which: str, thing: Thing) -> str:
    """A sound of those called "one" and "two"."""
    return f"sound {which} is {sound(thing, times=False)} ."


def by_place(things: Sequence[Thing]) -> list[Thing]:
    """In reading order of their quadrants."""
    return sorted(things, key=lambda t: QUADRANTS.index(t.quadrant))


def by_time(things: Sequence[Thing]) -> list[Thing]:
    """In order of their sounds, ties by name."""
    return sorted(things, key=lambda t: (t.sounding, t.name))


def overlap(first: Interval | None, second: Interval | None) -> Interval | None:
    """The seconds in both intervals, or None."""
    if first is None or second is None:
        return None
    start, end = max(first[0], second[0]), min(first[1], second[1])
    return (start, end) if start < end else None


def source(scene: Scene, *things: Thing) -> str:
    """The chain behind "which of the things I see are those I hear"."""
    return " ".join([hear(things, times=False), see(scene.visible), *(sounds(t) for t in by_place(things))])


def caption(scene: Scene) -> str:
    """A whole scene: how many things are seen and heard, then each with place and times."""
    parts = [counted(len(scene.visible), f"seen and {NUMBERS[len(scene.sounding)]} heard")]
    parts += [see([t], does=True, times=True) for t in by_place(scene.visible)]
    parts += [hear([t]) for t in by_time(scene.sounding)]
    return " ".join(parts)
