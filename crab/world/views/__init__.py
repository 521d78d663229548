"""A scene's records: one view for each slot, in that slot's fields, labels and answer tags.

A view stages scenes for a wanted label and writes the record with an explicit answer: a chain of statements true of
the scene graph (:mod:`crab.world.chains`), then the tagged answer (:mod:`crab.tasks`).  Every record, of train and of
test, also holds ``scene``, the id of its scene (a list for two), by which a chain can be checked.

To add a slot: a view in the module of its family, and its name in that module's ``VIEWS``.
"""

from __future__ import annotations

from collections.abc import Callable

from crab import tasks
from crab.world.staging import Stage
from crab.world.views import actions, captions, emotions, matching, questions, when, where
from crab.world.views.view import View

#: Slot -> its view, in the registry's order.
VIEWS: dict[str, Callable[[Stage], View]] = {
    name: family.VIEWS[name]
    for name in tasks.SLOTS
    for family in (when, where, questions, emotions, actions, matching, captions)
    if name in family.VIEWS
}


def view(slot: str, split: str, index: int, seed: int) -> View:
    """Record `index` of a slot's split, with its scenes and media.  The same four always give the same view."""
    if slot not in VIEWS:
        raise ValueError(f"no view makes records of slot '{slot}'; those made: {', '.join(VIEWS)}")
    paired = tasks.get_slot(slot).media in ("two_videos_audio", "video_two_audios")
    scenes = (index - index % 2, index - index % 2 + 1) if paired else (index,)
    return VIEWS[slot](Stage(slot, split, index, seed, scenes))
