"""Records of every slot with the published fields, for the tests of the unified interface."""

import numpy as np

from crab.tasks import NULL, Masks, answer, get_slot, truth

PROMPTS = [
    ((16, 24, 80, 88), ((40, 48), (48, 56), (56, 64))),
    ((0, 0, 224, 224), ((0, 0), (224, 224), (112, 112))),
    ((120, 8, 184, 72), ((130, 16), (140, 24), (150, 32))),
]
# Three truths of each slot. The first and the third label are equal, so that chance is 2/3.
TRUTHS = {
    "ave": [("bell", 2, 6), ("drum", 0, 10), ("bell", 3, 4)],
    "unav": [
        (("bell", 2, 6), ("drum", 0, 4), ("bell", 7, 9)),
        (("siren wail", 0, 10),),
        (("horn", 1, 2), ("church bell", 1.5, 42.25)),
    ],
    "avvp": [
        (("audio", "bell", 2, 6), ("visual", "bell", 2, 8)),
        (("visual", "frying_(food)", 0, 10),),
        (("audio", "drum", 1, 3), ("audio", "drum", 7, 9), ("audio", "horn, small", 0, 4)),
    ],
    "arig": [box for box, _ in PROMPTS],
    "s4": PROMPTS,
    "ms3": PROMPTS,
    "ref_avs": [PROMPTS[0], NULL, PROMPTS[2]],
    "avqa": ["yes", "two", "yes"],
    "avqa_thu": ["bell", "car horn", "bell"],
    **{slot: ["neutral", "joy", "neutral"] for slot in ("meld", "mer24", "cremad", "mafw", "dfew")},
    **{slot: ["swaying bell", "still", "swaying bell"] for slot in ("ks", "ucf")},
    "a2v": ["one", "two", "one"],
    "v2a": ["two", "two", "one"],
    "avcap": ["a red bell sways at top left .", "a drum .", "nothing is heard ."],
}
SPLITS = ["test_s", "test_n", "test_u"]
CHOICES = [["bell", "drum", "horn", "siren"], ["Flute", "Car Horn", "drum", "bell"], ["drum", "flute", "bell", "horn"]]
PLACES = [0, "Car  horn", "2"]  # a place among the choices, or the words of one
TYPES = ['["Audio", "Counting"]', "['Audio-Visual', 'Location']", ["Audio-Visual", "Counting"]]


def make_record(slot, index, truth, text=None):
    """A test record (a train record if there is no test split) whose answer follows a chain."""
    entry = get_slot(slot)
    fields = entry.fields(entry.splits[-1])
    record = {field: f"{field} {index}" for field in fields}
    record |= {field: f"media/clip_{index}/frames/0.jpg" for field in fields if field.endswith("_path")}
    record[entry.answer_field] = f"i hear it and i see it . {answer(slot, truth) if text is None else text}"
    if slot == "ave":
        record |= dict(zip(("event", "start_time", "end_time"), truth, strict=True))
    elif slot == "arig":
        record |= {"top_left": list(truth[:2]), "bottom_right": list(truth[2:])}
    elif slot == "avqa":
        record |= {"answer": truth, "type": TYPES[index % 3]}
    elif slot == "avqa_thu":
        record |= {"multi_choice": CHOICES[index % 3], "answer": PLACES[index % 3]}
        record |= {"question_relation": ("Sound", "Both")[index % 2]}
        record |= {"question_type": ("Which", "From")[index // 2 % 2]}
    elif slot == "ref_avs":
        record |= {"fid": 1 + index, "split": "test_n" if truth == NULL else SPLITS[index % 3]}
    elif entry.kind in ("emotion", "action"):
        record[entry.truth_fields[0]] = truth
    elif entry.kind == "matching":
        record[entry.truth_fields[0]] = {"one": 1, "two": "2"}[truth]
    return record | ({"frame_idx": 0} if "frame_idx" in fields else {})


def make_records(slot, truths=None):
    """A record for each truth; those of TRUTHS by default."""
    return [make_record(slot, index, truth) for index, truth in enumerate(truths or TRUTHS[slot])]


def box_mask(box, size=224):
    """A mask with this box filled."""
    x1, y1, x2, y2 = box
    mask = np.zeros((size, size), bool)
    mask[y1:y2, x1:x2] = True
    return mask


# The true mask fills the true box. The segmenter fills the box of the answer.
MASKS = Masks(
    lambda record: box_mask(truth("ref_avs" if "split" in record else "s4", record).box),
    lambda record, box, points: box_mask(box),
)


def options(slot):
    """What `score` and `chance` need for a slot."""
    return {"masks": MASKS} if get_slot(slot).masks else {}
