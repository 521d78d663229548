"""Questions about clips: MUSIC-AVQA and AVQA. Both label the kind of a question, and whether it is on sound or view."""

import json
import re
from collections.abc import Iterator

from crab.data.sources.raw import Draft, LeftOut, Raw, Row
from crab.tasks.fields import listed

#: What a question is about, in the words of MUSIC-AVQA and of AVQA -> in the words of the chain.
MODALITIES = {"Audio": "i listen", "Visual": "i look", "Audio-Visual": "i listen and look"}
RELATIONS = {"Sound": "i listen", "View": "i look", "Both": "i listen and look"}
BLANK = re.compile(r"<[^<>]*>")


def _words(row: Row, field: str) -> list[str]:
    """A list of words, as JSON or, in MUSIC-AVQA, as text in the form of JSON or of Python."""
    value = listed(row.need(field, (str, list)))
    words = [str(v).strip() for v in value if type(v) in (str, int, float)] if isinstance(value, list) else None
    if words is None or len(words) != len(value) or not all(words):
        row.fail(field, f"{row[field]!r:.80} is not a list of words")
    return words


def music(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """MUSIC-AVQA: a question is a template; `templ_values` fill its `<...>`. The answer is called `anser`."""
    for row in raw.entries(f"avqa-{split}.json"):
        with raw.reading(row):
            if row.get("question_deleted") not in (None, 0):
                raise LeftOut("deleted by the set's authors", "question_deleted")
            kind, values = _words(row, "type"), _words(row, "templ_values")
            if len(kind) != 2:
                row.fail("type", f"{row['type']!r:.80} must be the modality and the kind of the question")
            attends = MODALITIES[Row(row.place, {"type": kind[0]}).one_of("type", MODALITIES)]
            question = row.need("question_content").strip()
            blanks = len(BLANK.findall(question))
            if blanks > len(values):
                fault = f"{len(values)} values for {blanks} blanks of {question!r:.120}"
                row.fail("templ_values", fault, "give one for each blank")
            for value in values:
                question = BLANK.sub(lambda _, value=value: value, question, count=1)
            answer = row.need("anser" if "anser" in row else "answer").strip()
            number, video, _ = row.need("question_id", (int, str)), row.need("video_id"), row.name("video_id")
            record = {"video_id": video, "question_id": number, "type": json.dumps(kind), "question": question}
            chain = f"to answer , {attends} : it is a question of kind {kind[1].lower()} ."
            draft = Draft(row.place, record | {"answer": answer}, answer, chain, (answer, *values))
            yield raw.clip(draft, video)


def avqa(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """AVQA: several choices; the answer is an index from 0. The set has no test file, so its val file is for test."""
    for row in raw.entries("train_qa.json" if split == "train" else "val_qa.json"):
        with raw.reading(row):
            choices, index = _words(row, "multi_choice"), row.need("answer", int)
            relation = row.one_of("question_relation", RELATIONS)
            if len(choices) < 2 or not 0 <= index < len(choices):
                fault = f"{index} is no place among {len(choices)} choices"
                row.fail("answer", fault, f"give 0 to {len(choices) - 1}")
            record = {field: row.need(field, (str, int)) for field in ("id", "video_name", "video_id")}
            record |= {field: row.need(field) for field in ("question_type", "question_text")}
            record |= {"question_relation": relation, "multi_choice": choices, "answer": index}
            right, others = choices[index], tuple(choice for choice in choices if choice != choices[index])
            kind = record["question_type"].lower()
            chain = f"to answer , {RELATIONS[relation]} : it is a question of kind {kind} ."
            yield raw.clip(Draft(row.place, record, right, chain, (right,), others), row.name("video_name"))
