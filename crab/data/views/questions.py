"""Questions about a clip."""

from __future__ import annotations

import json

from crab import tasks
from crab.data.questions import QUESTIONS
from crab.data.staging import Stage
from crab.data.views.view import View, clip


def avqa(stage: Stage) -> View:
    """MUSIC-AVQA: templates take turns, and within each its answers do."""
    rng, number = stage.rng(), stage.wanted(range(len(QUESTIONS)), "template")
    question = QUESTIONS[number]
    value = stage.every(len(QUESTIONS)).wanted(question.answers, f"answer to {number}")
    things, text, chain = question.stage(rng, value)
    return clip(stage, stage.scene(rng, things), video_id=stage.stems[0], question_id=stage.index,
                 type=json.dumps([question.modality, question.kind]), question=text, answer=value,
                 label=f"{chain} {tasks.answer('avqa', value)}")


VIEWS = {"avqa": avqa}
