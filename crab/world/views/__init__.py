"""The records of each slot, with their scenes and media: one module per task family, each with a table ``VIEWS``.

A view stages a scene for a wanted label and writes the record in the slot's own fields. Its answer is a chain of true
statements (:mod:`crab.world.chains`), then the tagged answer (:mod:`crab.tasks`). Every record also holds ``scene``,
the id of its scene (a list of two for a pair). To add a view: see :mod:`crab.world`.
"""

from collections.abc import Callable

from crab import tasks
from crab.world.staging import Stage, View
from crab.world.views import actions, captions, emotions, matching, questions, referring, when, where

_FAMILIES = (when, where, referring, questions, emotions, actions, matching, captions)
#: Slot -> its view, in the registry's order.
VIEWS: dict[str, Callable[[Stage], View]] = {
    name: family.VIEWS[name] for name in tasks.SLOTS for family in _FAMILIES if name in family.VIEWS
}


def view(slot: str, split: str, index: int, seed: int) -> View:
    """Record `index` of a slot's split, with its scenes and media. The same arguments always give the same view."""
    if slot not in VIEWS:
        raise ValueError(f"no view makes records of slot '{slot}'; choose one of {', '.join(VIEWS)}")
    paired = tasks.get_slot(slot).media in ("two_videos_audio", "video_two_audios")
    scenes = (index - index % 2, index - index % 2 + 1) if paired else (index,)
    return VIEWS[slot](Stage(slot, split, index, seed, scenes))
