"""Records of every slot, as the published layout has them, for the tests of the unified interface."""

import numpy as np
import pytest

from crab.tasks import Masks, get_slot

# Per slot: true answers (typed) and, for each, the record's own fields that say the same.
TRUTHS = {
    "ave": [("bell", 2, 6), ("drum", 0, 10), ("bell", 3, 4)],
    "avvp": [
        (("audio", "bell", 2, 6), ("visual", "bell", 2, 8)),
        (("visual", "frying_(food)", 0, 10),),
        (("audio", "drum", 1, 3), ("audio", "drum", 7, 9), ("audio", "horn, small", 0, 4)),
    ],
    "arig": [(16, 24, 80, 88), (0, 0, 224, 224), (120, 8, 184, 72)],
    "s4": [
        ((16, 24, 80, 88), ((40, 48), (48, 56), (56, 64))),
        ((0, 0, 224, 224), ((0, 0), (224, 224), (112, 112))),
        ((120, 8, 184, 72), ((130, 16), (140, 24), (150, 32))),
    ],
    "avqa": ["yes", "two", "yes"],
    "cremad": ["anger", "happy", "anger"],
    "ks": ["swaying", "still", "swaying"],
    "a2v": ["one", "two", "one"],
    "v2a": ["two", "two", "one"],
    "avcap": ["a red bell sways at top left .", "a drum .", "nothing is heard ."],
}
TYPES = ['["Audio", "Counting"]', '["Audio-Visual", "Location"]', '["Audio-Visual", "Counting"]']


def make_record(slot, index, tagged, truth):
    """A record holding the published fields, the tagged answer behind a chain, and the truth fields."""
    fields = (get_slot(slot).test_fields or get_slot(slot).train_fields)
    record = {field: f"{field} {index}" for field in fields}
    record |= {f: f"clips/{index}/frames/0.jpg" for f in fields if f.endswith("_path")}
    record[get_slot(slot).answer_field] = f"i hear it and i see it . {tagged}"
    if slot == "ave":
        record |= dict(zip(("event", "start_time", "end_time"), truth))
    elif slot == "arig":
        record |= {"top_left": list(truth[:2]), "bottom_right": list(truth[2:])}
    elif slot == "avqa":
        record |= {"answer": truth, "type": TYPES[index % 3]}
    elif slot in ("cremad", "ks"):
        record["emotion" if slot == "cremad" else "action"] = truth
    elif slot in ("a2v", "v2a"):
        record["correct_video" if slot == "a2v" else "correct_audio"] = {"one": 1, "two": "2"}[truth]
    if "frame_idx" in fields:
        record["frame_idx"] = 0
    return record


@pytest.fixture
def records_of():
    """slot name -> its records."""
    from crab.tasks import answer

    return lambda slot: [make_record(slot, i, answer(slot, t), t) for i, t in enumerate(TRUTHS[slot])]


def box_mask(box, size=224):
    """A filled box as a mask."""
    x1, y1, x2, y2 = box
    mask = np.zeros((size, size), bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.fixture
def box_masks():
    """True masks are the true boxes; the segmenter fills the box it is given."""
    from crab.tasks import truth

    return Masks(lambda record: box_mask(truth("s4", record).box), lambda record, box, points: box_mask(box))
