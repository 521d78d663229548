"""Emotion recognition: what a face shows and a voice tells."""

from __future__ import annotations

from crab import tasks
from crab.data import chains
from crab.data.staging import Stage
from crab.data.views.view import View, clip
from crab.data.world import EMOTIONS, FACE, sample_interval, sample_thing


def cremad(stage: Stage) -> View:
    """CREMA-D: a face that shows and voices one emotion."""
    rng, feeling = stage.rng(), stage.wanted(EMOTIONS, "emotion")
    face = sample_thing(rng, FACE, sounding=sample_interval(rng, 5), emotion=feeling)
    chain = f"{chains.see([face])} {chains.hear([face])}"
    return clip(stage, stage.scene(rng, [face]), emotion=feeling,
                 label=f"{chain} {tasks.answer('cremad', feeling)}")


VIEWS = {"cremad": cremad}
