"""Questions about a clip."""

from __future__ import annotations

import json

from crab import tasks
from crab.world.choices import CHOICES, TEMPLATES
from crab.world.questions import QUESTIONS
from crab.world.staging import Stage
from crab.world.views.view import View, clip


def avqa(stage: Stage) -> View:
    """MUSIC-AVQA: templates take turns, and within each its answers do."""
    rng, number = stage.rng(), stage.wanted(range(len(QUESTIONS)), "template")
    question = QUESTIONS[number]
    value = stage.every(len(QUESTIONS)).wanted(question.answers, f"answer to {number}")
    things, text, chain = question.stage(rng, value)
    return clip(stage, stage.scene(rng, things), video_id=stage.stems[0], question_id=stage.index,
                 type=json.dumps([question.modality, question.kind]), question=text, answer=value,
                 label=f"{chain} {tasks.answer('avqa', value)}")


def avqa_thu(stage: Stage) -> View:
    """AVQA: templates, their answers and the right one's place among four choices take turns."""
    rng, number = stage.rng(), stage.wanted(range(len(TEMPLATES)), "template")
    template, turn = TEMPLATES[number], stage.every(len(TEMPLATES))
    words, place = turn.wanted(template.answers, f"answer to {number}"), turn.wanted(range(CHOICES), f"place in {number}")
    (things, question, chain), likely = template.stage(rng, words)
    return clip(stage, stage.scene(rng, things), id=stage.stems[0], video_name=stage.stems[0], video_id=stage.index,
                question_relation=template.relation, question_type=template.kind,
                multi_choice=template.offered(rng, words, likely, place), question_text=question, answer=place,
                label=f"{chain} {tasks.answer('avqa_thu', words)}")


VIEWS = {"avqa": avqa, "avqa_thu": avqa_thu}
