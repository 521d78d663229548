"""The statements of a reasoning chain, written from the scene graph and therefore true of it.

Things in a list are joined by "and". A list need not name all things. What is seen or heard is so at some time of the
clip; if a record has a `second`, then in that second. Intervals [start, end) are in seconds. The words are a small
closed vocabulary, and punctuation stands alone, as a token.
"""

from collections.abc import Sequence

from crab.world.scene import FACE, QUADRANTS, Interval, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
VOICE = "voice"  # a face, when it is heard
NOTHING = "nothing"

#: Every statement, with blanks. :mod:`crab.world.verify` reads them by the same table.
STATEMENTS = {
    "see no": "i see no {thing}",  # no bell, no red bell: there is none at any time
    "hear no": "i hear no {source}",
    "see": "i see {sights}",  # a red bell swaying at top left from 2 to 8; a red face showing sad at top left; nothing
    "hear": "i hear {sounds}",  # a bell from 2 to 6; a voice showing fear (which its face may not show); nothing
    "video": "video {which} shows {sights}",  # of two videos
    "sound": "sound {which} is {sounds}",  # of two sounds
    "source": "the {colour} {name} {state}",  # a seen thing sounds, or is silent
    "first": "the {source} is first",  # its sound begins before all others
    "both": "both hold {times}",  # the overlap of the intervals of the two statements before
    "count": "{number} {what}",  # two seen; two heard; two seen and heard
    "counts": "{seen} seen and {heard} heard",
}
SOUNDS, SILENT = "sounds", "is silent"


def say(kind: str, **words: str) -> str:
    """A statement of :data:`STATEMENTS` with these words in its blanks."""
    return f"{STATEMENTS[kind].format(**words)} ."


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun(thing: Thing) -> str:
    """Colour and class: "red bell"."""
    return f"{thing.colour} {thing.name}"


def lasting(interval: Interval) -> str:
    """An interval in words: "from 2 to 6"."""
    return f"from {interval[0]} to {interval[1]}"


def sight(thing: Thing, does: bool = False, times: bool = False) -> str:
    """A seen thing and its place. A face shows its emotion instead of a motion."""
    manner = f" showing {thing.emotion}" if thing.name == FACE else f" {thing.motion}" if does else ""
    return f"{article(noun(thing))}{manner} at {thing.quadrant}" + (f" {lasting(thing.visible)}" if times else "")


def sound(thing: Thing, times: bool = True) -> str:
    """A heard thing. A face is heard as a voice with its emotion."""
    name = f"a {VOICE} showing {thing.heard_emotion}" if thing.name == FACE else article(thing.name)
    return name + (f" {lasting(thing.sounding)}" if times else "")


def see(things: Sequence[Thing], does: bool = False, times: bool = False) -> str:
    """These things are seen, in reading order."""
    return say("see", sights=" and ".join(sight(t, does, times) for t in by_place(things)) or NOTHING)


def hear(things: Sequence[Thing], times: bool = True) -> str:
    """These things are heard, by their beginning; without times by name, because a moment does not show who began."""
    ordered = by_time(things) if times else sorted(things, key=lambda t: t.name)
    return say("hear", sounds=" and ".join(sound(t, times) for t in ordered) or NOTHING)


def sounds(thing: Thing) -> str:
    """This seen thing is the source of a sound."""
    return say("source", colour=thing.colour, name=thing.name, state=SOUNDS)


def silent(thing: Thing) -> str:
    """This seen thing makes no sound."""
    return say("source", colour=thing.colour, name=thing.name, state=SILENT)


def video_shows(which: str, thing: Thing) -> str:
    """A thing of the video called "one" or "two"."""
    return say("video", which=which, sights=sight(thing))


def sound_is(which: str, thing: Thing) -> str:
    """A sound of those called "one" and "two"."""
    return say("sound", which=which, sounds=sound(thing, times=False))


def by_place(things: Sequence[Thing]) -> list[Thing]:
    """In reading order of their quadrants."""
    return sorted(things, key=lambda t: QUADRANTS.index(t.quadrant))


def by_time(things: Sequence[Thing]) -> list[Thing]:
    """By the times of their sounds, then by name."""
    return sorted(things, key=lambda t: (t.sounding, t.name))


def heard_and_seen(heard: Sequence[Thing], seen: Sequence[Thing], *ends: str, does: bool = False) -> str:
    """What is heard, without times, then what is seen, then the last statements."""
    return " ".join([hear(heard, times=False), see(seen, does), *ends])


def caption(scene: Scene) -> str:
    """A whole scene: how many things are seen and heard, then each with its place and times."""
    seen, heard = by_place(scene.visible), by_time(scene.sounding)
    counts = say("counts", seen=NUMBERS[len(seen)], heard=NUMBERS[len(heard)])
    return " ".join([counts, *(see([t], does=True, times=True) for t in seen), *(hear([t]) for t in heard)])
