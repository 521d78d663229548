"""Records of every slot, as the published layout has them, for the tests of the unified interface."""

import numpy as np
import pytest

from crab.tasks import NULL, Masks, get_slot

# Per slot: true answers (typed) and, for each, the record's own fields that say the same.
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
    "arig": [(16, 24, 80, 88), (0, 0, 224, 224), (120, 8, 184, 72)],
    "s4": [
        ((16, 24, 80, 88), ((40, 48), (48, 56), (56, 64))),
        ((0, 0, 224, 224), ((0, 0), (224, 224), (112, 112))),
        ((120, 8, 184, 72), ((130, 16), (140, 24), (150, 32))),
    ],
    "ms3": [
        ((8, 24, 200, 88), ((16, 48), (48, 56), (192, 64))),
        ((0, 0, 224, 224), ((0, 0), (224, 224), (112, 112))),
        ((120, 8, 184, 192), ((130, 16), (140, 24), (150, 180))),
    ],
    "ref_avs": [
        ((16, 24, 80, 88), ((40, 48), (48, 56), (56, 64))),
        NULL,
        ((120, 8, 184, 72), ((130, 16), (140, 24), (150, 32))),
    ],
    "avqa": ["yes", "two", "yes"],
    "avqa_thu": ["bell", "car horn", "bell"],
    "meld": ["neutral", "joy", "neutral"],
    "mer24": ["worried", "happy", "worried"],
    "cremad": ["anger", "happy", "anger"],
    "mafw": ["contempt", "helplessness", "contempt"],
    "dfew": ["sad", "disgust", "sad"],
    "ks": ["swaying", "still", "swaying"],
    "ucf": ["swaying bell", "still drum", "swaying bell"],
    "a2v": ["one", "two", "one"],
    "v2a": ["two", "two", "one"],
    "avcap": ["a red bell sways at top left .", "a drum .", "nothing is heard ."],
}
SPLITS = ["test_s", "test_n", "test_u"]
CHOICES = [["bell", "drum", "horn", "siren"], ["Flute", "Car Horn", "drum", "bell"], ["drum", "flute", "bell", "horn"]]
PLACES = [0, "Car  horn", "2"]  # a place among the choices, or the words of one
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
    elif slot == "avqa_thu":
        asked = {"question_relation": ("Sound", "Both")[index % 2], "question_type": ("Which", "Come From")[index // 2 % 2]}
        record |= {"multi_choice": CHOICES[index % 3], "answer": PLACES[index % 3], **asked}
    elif slot == "ref_avs":
        clip = f"media/clip_{index}"
        record |= {"visual_path": f"{clip}/frames/0.jpg", "audio_path": f"{clip}/audio.wav", "fid": 1 + index}
        record |= {"split": "test_n" if truth == NULL else SPLITS[index % 3]}
    elif get_slot(slot).module in ("emotion", "action"):
        record[get_slot(slot).truth_fields[0]] = truth
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


def true_box_mask(record):
    """The true box of a record of a slot with masks, filled; a null record has none to be asked for."""
    from crab.tasks import truth

    return box_mask(truth("ref_avs" if "split" in record else "s4", record).box)


MASKS = Masks(true_box_mask, lambda record, box, points: box_mask(box))


def options(slot):
    """What scoring a slot needs: true masks are the true boxes, the segmenter fills the box it is given."""
    return {"masks": MASKS} if get_slot(slot).masks else {}
