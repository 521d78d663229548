"""Questions about clips: MUSIC-AVQA and AVQA.

Both label what a question needs (the sound, the view, or both) and its kind, beside question and answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from crab.data.sources.raw import Draft, LeftOut, Raw, SourceError, need, one_of, plain

_ATTENDS = {"Audio": "i listen", "Sound": "i listen", "Visual": "i look", "View": "i look",
            "Audio-Visual": "i listen and look", "Both": "i listen and look"}
RELATIONS = ("Sound", "View", "Both")


def _list(where: str, entry: dict, name: str) -> list[str]:
    """A list of text, as JSON or, as MUSIC-AVQA has it, JSON in a text."""
    value = need(where, entry, name, (str, list))
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        value = None
    words = [str(v).strip() for v in value if type(v) in (str, int, float)] if isinstance(value, list) else None
    if words is None or len(words) != len(value) or not all(words):
        raise SourceError(f"{where}, field '{name}': {entry[name]!r:.80} is no list of words; correct it")
    return words


def music_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Entries of avqa-train.json or avqa-test.json."""
    return raw.entries(f"avqa-{split}.json")


def music(raw: Raw, slot: str, split: str, where: str, entry: dict) -> Iterator[Draft]:
    """MUSIC-AVQA: a question is a template, its `<...>` filled from `templ_values`; the answer is spelled `anser`."""
    if entry.get("question_deleted") not in (None, 0):
        raise LeftOut("deleted by the set's authors", "question_deleted")
    kind, values = _list(where, entry, "type"), _list(where, entry, "templ_values")
    if len(kind) != 2:
        raise SourceError(f"{where}, field 'type': {entry['type']!r:.80} must be the modality and the kind of the question")
    modality = one_of(where, kind[0], ("Audio", "Visual", "Audio-Visual"), "modality")
    template = need(where, entry, "question_content").strip()
    question, blanks = template, len(re.findall(r"<[^<>]*>", template))
    if blanks > len(values):
        raise SourceError(f"{where}, field 'templ_values': {len(values)} values for {blanks} blanks of {template!r:.120}; give each one")
    for value in values:
        question = re.sub(r"<[^<>]*>", lambda _: value, question, count=1)
    answer = need(where, entry, "anser" if "anser" in entry else "answer").strip()
    number, video = need(where, entry, "question_id", (int, str)), plain(where, "video_id", need(where, entry, "video_id"))
    fields, files = raw.clip(video)
    record = {**fields, "video_id": video, "question_id": number, "type": json.dumps(kind), "question": question, "answer": answer}
    chain = f"to answer , {_ATTENDS[modality]} : it is a question of kind {kind[1].lower()} ."
    yield Draft(where, record, answer, chain, files, (answer, *values))


def avqa_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Entries of train_qa.json; of val_qa.json for test, since the set has no other."""
    return raw.entries("train_qa.json" if split == "train" else "val_qa.json")


def avqa(raw: Raw, slot: str, split: str, where: str, entry: dict) -> Iterator[Draft]:
    """AVQA: four choices, the answer by its place from 0."""
    choices, place = _list(where, entry, "multi_choice"), need(where, entry, "answer", int)
    relation = one_of(where, need(where, entry, "question_relation"), RELATIONS, "relation")
    if len(choices) < 2 or not 0 <= place < len(choices):
        raise SourceError(f"{where}, field 'answer': {place} is no place among {len(choices)} choices; "
                          f"give 0 to {len(choices) - 1}")
    texts = {n: need(where, entry, n, (str, int)) for n in ("id", "video_name", "video_id", "question_type", "question_text")}
    fields, files = raw.clip(plain(where, "video_name", str(texts["video_name"])))
    record = {**fields, **texts, "question_relation": relation, "multi_choice": choices, "answer": place}
    chain = f"to answer , {_ATTENDS[relation]} : it is a question of kind {texts['question_type'].lower()} ."
    yield Draft(where, record, choices[place], chain, files, (choices[place],), tuple(c for c in choices if c != choices[place]))
