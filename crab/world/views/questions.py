"""Questions about a clip."""

from __future__ import annotations

import json

from crab.world.questions import CHOICES, OFFERED, QUESTIONS
from crab.world.staging import Stage, View


def avqa(stage: Stage) -> View:
    """MUSIC-AVQA: the templates take turns, and so do the answers of each."""
    rng, number = stage.rng(), stage.wanted(range(len(QUESTIONS)), "template")
    question = QUESTIONS[number]
    value = stage.every(len(QUESTIONS)).wanted(question.answers, f"answer to {number}")
    things, text, chain, _ = question.stage(rng, value)
    fields = {
        "video_id": stage.stems[0],
        "question_id": stage.index,
        "type": json.dumps([question.relation, question.kind]),
        "question": text,
        "answer": value,
    }
    return stage.clip(stage.scene(rng, things), chain, value, **fields)


def avqa_thu(stage: Stage) -> View:
    """AVQA: the templates take turns, and so do the answers and the place of the right one among four choices."""
    rng, number = stage.rng(), stage.wanted(range(len(CHOICES)), "template")
    question, turn = CHOICES[number], stage.every(len(CHOICES))
    value = turn.wanted(question.answers, f"answer to {number}")
    place = turn.wanted(range(OFFERED), f"place in {number}")
    things, text, chain, likely = question.stage(rng, value)
    scene = stage.scene(rng, things)
    fields = {
        "id": stage.stems[0],
        "video_name": stage.stems[0],
        "video_id": stage.index,
        "question_relation": question.relation,
        "question_type": question.kind,
        "multi_choice": question.choices(rng, value, likely, place),
        "question_text": text,
        "answer": place,
    }
    return stage.clip(scene, chain, value, **fields)


VIEWS = {"avqa": avqa, "avqa_thu": avqa_thu}
