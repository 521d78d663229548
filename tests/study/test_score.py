"""Scores of answers from hand-made records, chance and oracle."""

import json
import subprocess
import sys

import numpy as np
import pytest

from crab import tasks
from crab.data import media, records
from crab.study.score import reference, score_slot, true_answer

ACTIONS = ["ringing", "drumming", "ringing", "ringing"]
TEXTS = ["<answer>ringing</answer>", "i see it . <answer> drumming </answer>", "<answer>drumming</answer>", "hm"]


@pytest.fixture
def rows(tmp_path):
    """Four test records of ks, without media."""
    path = tmp_path / tasks.json_path("ks", "test")
    path.parent.mkdir(parents=True)
    actions = enumerate(ACTIONS)
    rows = [{"video_path": f"{i}.mp4", "audio_path": f"{i}.wav", "action": a, "label": ""} for i, a in actions]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return records.read(tmp_path, "ks", "test")


def texts_of(rows, texts=TEXTS):
    return {row["id"]: text for row, text in zip(rows, texts, strict=True)}


def test_hand_worked(rows):
    """Right, right, wrong, unreadable. The best constant answer is right three times."""
    result = score_slot("ks", rows, texts_of(rows), "grabcut")
    assert result["scores"] == [1, 1, 0, 0] and result["metrics"][tasks.get_slot("ks").metric] == 0.5
    assert [result[f"n_{name}"] for name in ("expected", "found", "scored", "unparsable")] == [4, 4, 4, 1]
    assert result["ids"] == [f"ks/test/{i:05d}" for i in range(4)]
    assert reference("ks", rows, "grabcut") == {"chance": 0.75}


def test_missing_and_foreign_answers_raise(rows):
    texts = texts_of(rows)
    with pytest.raises(ValueError, match="ks/test/00003"):
        score_slot("ks", rows, dict(list(texts.items())[:3]), "grabcut")
    with pytest.raises(ValueError, match="other"):
        score_slot("ks", rows, {**texts, "other": "x"}, "grabcut")


def test_no_torch():
    code = "import sys, crab.study.score, crab.study.ledger, crab.study.compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the oracle of the pixel-level slots

BOX = (48, 40, 104, 96)


@pytest.fixture
def pixels(tmp_path):
    """Two test records of s4, a red square on grey each. The second has no answer field, as it is published."""
    mask = np.zeros((224, 224), bool)
    mask[40:96, 48:104] = True
    image = np.where(mask[..., None], [220, 40, 40], [90, 90, 90]).astype(np.uint8)
    rows = []
    for i in range(2):
        folder = tmp_path / tasks.FOLDER / "s4" / f"AVS/v1s/c{i}"
        media.write_image(folder / "frames/0.jpg", image)
        media.write_mask(folder / "labels_rgb/0.png", mask)
        paths = {"visual_path": f"AVS/v1s/c{i}/frames/0.jpg", "audio_path": f"AVS/v1s/c{i}/audio.wav"}
        rows.append({**paths, "vid": f"c{i}", "uid": f"c{i}_0", "a_obj": "drum", "frame_idx": 0})
    rows[0]["label_content"] = "i see it . " + tasks.answer("s4", (BOX, ((56, 48), (72, 64), (96, 88))))
    (tmp_path / tasks.json_path("s4", "test")).write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def oracle(root, segmenter="grabcut"):
    return reference("s4", records.read(root, "s4", "test"), segmenter)["oracle"]


def test_oracle_cuts_from_the_true_box(pixels):
    result = oracle(pixels)
    assert result["n_expected"] == 2 and len(result["scores"]) == 2
    values = result["metrics"]
    assert values["J"] > 0.9 and values["F"] > 0.9 and values["no_mask"] == 0


def test_oracle_costs_what_the_segmenter_costs(pixels, monkeypatch):
    from crab.models import segment

    def left_half(image, box, points):
        assert tuple(box) == BOX and all(48 <= x < 104 and 40 <= y < 96 for x, y in points) and len(points) == 3
        mask = np.zeros(image.shape[:2], bool)
        mask[box[1] : box[3], box[0] : (box[0] + box[2]) // 2] = True
        return mask

    names = []
    monkeypatch.setattr(segment, "segmenter", lambda name: names.append(name) or left_half)
    values = oracle(pixels, "some/sam2")["metrics"]
    assert values["J"] == pytest.approx(0.5) and set(names) == {"some/sam2"}
    assert values["F"] == pytest.approx(1.3 * 1 * 0.5 / (0.3 * 1 + 0.5))  # P = 1, R = 0.5


def test_a_mask_without_three_pixels_has_no_answer(pixels):
    mask = np.zeros((224, 224), bool)
    mask[5, 5] = True
    path = pixels / tasks.FOLDER / "s4/AVS/v1s/c1/labels_rgb/0.png"
    media.write_mask(path, mask)
    assert true_answer("s4", {"mask": str(path)}) == ""
    values = oracle(pixels)["metrics"]
    assert values["no_mask"] == 1 and values["J"] <= 0.5


def test_the_true_answer_of_the_null_split():
    assert true_answer("ref_avs", {"split": "test_n"}) == tasks.answer("ref_avs", tasks.NULL)
