"""Scores from hand-made prediction files."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from crab import tasks
from crab.data import media, records
from crab.study import score
from crab.study.resample import bootstrap_means, interval
from crab.study.runs import Run, plan

RUN = Run("single", "lora", "bare", "ks")
ACTIONS = ["ringing", "drumming", "ringing", "ringing"]


@pytest.fixture
def world(tmp_path):
    """Four test records of ks, without media, and predictions: right, right, wrong, unreadable."""
    slot = tasks.get_slot("ks")
    path = tmp_path / tasks.json_path(slot, "test")
    path.parent.mkdir(parents=True)
    known = [a for a in ACTIONS]
    rows = [
        {"video_path": f"{i}.mp4", "audio_path": f"{i}.wav", "action": a, "label": f"<answer>{a}</answer>"}
        for i, a in enumerate(known)
    ]
    path.write_text(json.dumps(rows))
    texts = ["<answer>ringing</answer>", "i see it . <answer> drumming </answer>", "<answer>drumming</answer>", "hm"]
    write(tmp_path, texts)
    return tmp_path


def write(root, texts, names=None):
    file = root / "predictions" / RUN.name / "ks.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    names = names or [f"ks/test/{i:05d}" for i in range(len(texts))]
    file.write_text("".join(json.dumps({"id": n, "slot": "ks", "text": t}) + "\n" for n, t in zip(names, texts)))


def go(root, runs=(RUN,)):
    return score.score_all(list(runs), ["ks"], root, root / "predictions", root / "out")


def test_hand_worked(world):
    table, samples = go(world)
    row = table[table["primary"]].iloc[0]
    assert row["value"] == 0.5 and row["chance"] == 0.75
    assert (row["n_expected"], row["n_found"], row["n_scored"], row["n_unparsable"]) == (4, 4, 4, 1)
    assert samples["score"].tolist() == [1, 1, 0, 0]
    assert row["low"] < 0.5 < row["high"]
    nested = json.loads((world / "out" / "metrics.json").read_text())
    assert nested["single-lora-bare"]["ks"]["score"] == nested["single-lora-bare"]["mean"] == 0.5
    again, of_samples = score.load(world / "out")
    assert again["run"].tolist() == table["run"].tolist() and of_samples.to_numpy().tolist() == samples.to_numpy().tolist()


def test_interval_of_a_family_knows_how_far_apart_its_seeds_lie(world):
    other = Run(RUN.setting, RUN.method, RUN.form, RUN.slot, seed=1)
    file = world / "predictions" / other.name / "ks.jsonl"
    file.parent.mkdir(parents=True)
    right = [json.loads(line) for line in (world / "predictions" / RUN.name / "ks.jsonl").read_text().splitlines()]
    for row, action in zip(right, ACTIONS):
        row["text"] = f"<answer>{action}</answer>"
    file.write_text("".join(json.dumps(row) + "\n" for row in right))
    go(world, [RUN, other])
    found = json.loads((world / "out" / "metrics.json").read_text())["single-lora-bare"]["ks"]
    # seeds score .5 and 1: Student's t with one degree of freedom alone makes it wider than all scores there are
    assert found["score"] == 0.75 and found["low"] < 0 and found["high"] > 1


def test_finding_counts_the_slots_that_are_clear_of_chance():
    slots = {name: {"score": 0.5, "low": low, "high": 0.7, "chance": 0.3, "expected": 1200, "unparsable": 1} for name, low in (("ks", 0.31), ("ave", 0.3))}
    assert score.finding({"joint-lora-bare": slots | {"mean": 0.5}}) == (
        "- `joint-lora-bare`: 0.500 on average, clearly above chance on 1 of 2 slots (not on ave); 2 of 2,400 answers could not be read."
    )


def test_scoring_twice_writes_the_same_bytes(world):
    go(world)
    first = {p.name: p.read_bytes() for p in (world / "out").iterdir()}
    go(world)
    assert first == {p.name: p.read_bytes() for p in (world / "out").iterdir()}


def test_workers_write_the_same_bytes_and_records_are_read_anew(world):
    runs = [RUN, Run("single", "lora", "bare", "ks", 1)]
    file = world / "predictions" / runs[1].name / "ks.jsonl"
    file.parent.mkdir()
    file.write_bytes((world / "predictions" / RUN.name / "ks.jsonl").read_bytes())
    go(world, runs)
    first = {p.name: p.read_bytes() for p in (world / "out").iterdir()}
    for kept in (world / "predictions").rglob("*.scores.json"):
        kept.unlink()
    score.score_all(runs, ["ks"], world, world / "predictions", world / "out", workers=2)
    assert first == {p.name: p.read_bytes() for p in (world / "out").iterdir()}
    path = world / tasks.json_path(tasks.get_slot("ks"), "test")
    path.write_text(path.read_text().replace("ringing", "drumming"))
    table, _ = go(world, runs)
    assert table["value"].tolist() == [0.5, 0.5] and table["chance"].tolist() == [1, 1]


def test_what_was_scored_before_is_scored_again_only_where_something_changed(world, monkeypatch):
    scored = []
    monkeypatch.setattr(score, "score_run", lambda run, *args, go=score.score_run: scored.append(run) or go(run, *args))
    first = go(world)
    again = go(world)
    assert scored == [RUN] and all(a.equals(b) for a, b in zip(first, again, strict=True))
    write(world, ["<answer>drumming</answer>"] * 4)
    assert go(world)[0]["value"].tolist() == [0.25] and len(scored) == 2
    score.score_all([RUN], ["ks"], world, world / "predictions", world / "out", resamples=10)
    assert len(scored) == 3
    monkeypatch.setattr(score, "code_digest", lambda imports: "other code")
    go(world)
    assert len(scored) == 4
    (world / "predictions" / RUN.name / "ks.scores.json").write_text("{")
    with pytest.raises(RuntimeError, match="ks.scores.json: malformed.*delete it"):
        go(world)


def test_a_mask_is_part_of_the_truth(tmp_path):
    path = tmp_path / tasks.json_path(tasks.get_slot("s4"), "test")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{
        "visual_path": "a/frames/0.jpg", "audio_path": "a/audio.wav", "vid": "a", "uid": "a_0", "a_obj": "whistle", "frame_idx": 0,
    }]))  # fmt: skip
    (record,) = records.read(tmp_path, "s4", "test")
    found = []
    for mask in (np.eye(4, dtype=bool), np.eye(4, dtype=bool), ~np.eye(4, dtype=bool)):
        media.write_mask(record["mask"], mask)
        found.append(score.truth_digest("s4", "test", tmp_path))
    assert found[0] == found[1] != found[2]


def test_missing_prediction_raises(world):
    write(world, ["<answer>ringing</answer>"] * 3)
    with pytest.raises(RuntimeError, match="single-lora-bare-ks.*ks/test/00003"):
        go(world)


def test_missing_file_raises(world):
    with pytest.raises(RuntimeError, match="joint-lora-bare.*ks.jsonl.*no such prediction file"):
        go(world, [RUN, Run("joint", "lora", "bare")])


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "ks.jsonl:1: expected"), ('{"id": "a", "text": "b"}', "slot"), ('{"id": 1, "slot": "ave", "text": ""}', "ave")],
)
def test_bad_line_is_named(world, line, message):
    (world / "predictions" / RUN.name / "ks.jsonl").write_text(line + "\n")
    with pytest.raises(RuntimeError, match=message):
        go(world)


@pytest.mark.parametrize("line", [b'{"id": "a", "slot": "ks", "text": "\xff"}', b"[" * 100_000, b"[]", b"3"])
def test_a_line_that_is_no_json_object_is_named(world, line):
    (world / "predictions" / RUN.name / "ks.jsonl").write_bytes(line + b"\n")
    with pytest.raises(RuntimeError, match="ks.jsonl:1: expected"):
        go(world)


def test_predictions_of_other_scripts_may_stand_unescaped(world):
    texts = ["鐘\u2028\x85\x0b", "колокол", "\ud800", ""]
    lines = [json.dumps({"id": f"ks/test/{i:05d}", "slot": "ks", "text": t}, ensure_ascii=False) for i, t in enumerate(texts)]
    path = world / "predictions" / RUN.name / "ks.jsonl"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
    assert list(score.read_predictions(path, "ks").values()) == texts
    table, _ = go(world)
    assert table["n_unparsable"].tolist() == [4] and table["value"].tolist() == [0]


def test_double_and_foreign_ids(world):
    write(world, ["x", "y"], ["a", "a"])
    with pytest.raises(RuntimeError, match="twice"):
        go(world)
    write(world, ["x"] * 5, [f"ks/test/{i:05d}" for i in range(4)] + ["other"])
    with pytest.raises(RuntimeError, match="other"):
        go(world)


def test_no_torch():
    code = "import sys, crab.study.score, crab.study.transfer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.repeat([0.0, 1.0], [300, 700])
    low, high = interval(bootstrap_means(values, 4000, 0))
    error = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert abs(low - (0.7 - error)) < 0.004 and abs(high - (0.7 + error)) < 0.004
    assert interval(bootstrap_means(np.ones(5), 100, 0)) == (1, 1)
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_means(np.empty(0), 10, 0)


def test_run_names():
    runs = plan("ilora", ["single-bare", "joint-explicit"], ["ave", "ks"], [0, 3])
    assert [r.name for r in runs][:3] == ["single-ilora-bare-ave", "single-ilora-bare-ks", "single-ilora-bare-ave-seed3"]
    assert runs[-1].name == "joint-ilora-explicit-seed3"
    assert [Run.parse(r.name) for r in runs] == runs
    for bad in ("joint-lora-bare-ave", "single-lora-bare", "solo-lora-bare", "joint-lora-terse", "joint-lora"):
        with pytest.raises(ValueError):
            Run.parse(bad)
    with pytest.raises(ValueError, match="terse"):
        plan("lora", ["joint-terse"], ["ave"])


# ---------------------------------------------------------------- the oracle of the pixel-level slots

BOX = (48, 40, 104, 96)


@pytest.fixture
def pixels(tmp_path):
    """Two test records of s4, a red square on grey each: the second one's answer field is left out, as it is published."""
    true = np.zeros((224, 224), bool)
    true[40:96, 48:104] = True
    image = np.where(true[..., None], [220, 40, 40], [90, 90, 90]).astype(np.uint8)
    rows = []
    for i in range(2):
        folder = tmp_path / tasks.FOLDER / "s4" / f"AVS/v1s/c{i}"
        media.write_image(folder / "frames/0.jpg", image)
        media.write_mask(folder / "labels_rgb/0.png", true)
        rows.append({"visual_path": f"AVS/v1s/c{i}/frames/0.jpg", "audio_path": f"AVS/v1s/c{i}/audio.wav", "vid": f"c{i}",
                     "uid": f"c{i}_0", "a_obj": "drum", "frame_idx": 0})
    rows[0]["label_content"] = "i see it . " + tasks.answer("s4", (BOX, ((56, 48), (72, 64), (96, 88))))
    (tmp_path / tasks.json_path("s4", "test")).write_text(json.dumps(rows))
    return tmp_path


def test_oracle_cuts_from_the_true_box(pixels):
    rows = score.oracle(pixels, ["ks", "s4"], resamples=50)
    assert list(rows.columns) == score.ORACLE_COLUMNS and set(rows["slot"]) == {"s4"}
    assert rows["primary"].sum() == 1 and (rows["n_expected"] == 2).all() and (rows["segmenter"] == "grabcut").all()
    values = rows.set_index("metric")["value"]
    assert values["J"] > 0.9 and values["F"] > 0.9 and values["no_mask"] == 0
    assert score.oracle(pixels, ["ks"]).empty


def test_oracle_costs_what_the_segmenter_costs(pixels, monkeypatch):
    from crab.models import segment

    def left_half(image, box, points):
        assert tuple(box) == BOX and all(48 <= x < 104 and 40 <= y < 96 for x, y in points) and len(points) == 3
        mask = np.zeros(image.shape[:2], bool)
        mask[box[1] : box[3], box[0] : (box[0] + box[2]) // 2] = True
        return mask

    asked = []
    monkeypatch.setattr(segment, "segmenter", lambda name: asked.append(name) or left_half)
    rows = score.oracle(pixels, ["s4"], "some/sam2", resamples=50).set_index("metric")
    assert rows["value"]["J"] == pytest.approx(0.5) and rows["low"]["J"] == rows["high"]["J"] == 0.5
    assert rows["value"]["F"] == pytest.approx(1.3 * 1 * 0.5 / (0.3 * 1 + 0.5))  # P = 1, R = 0.5
    assert set(asked) == {"some/sam2"}
    table = pd.DataFrame({"slot": ["s4"], "family": "f", "metric": "J", "primary": True, "value": 0.25, "chance": 0.1})
    grid = score.score_grid(table, rows.reset_index())
    assert grid.loc["s4", ["chance", "oracle", "f"]].tolist() == [0.1, 0.5, 0.25]
    assert "oracle" not in score.score_grid(table)


def test_a_mask_without_three_pixels_has_no_answer(pixels):
    tiny = np.zeros((224, 224), bool)
    tiny[5, 5] = True
    path = pixels / tasks.FOLDER / "s4/AVS/v1s/c1/labels_rgb/0.png"
    media.write_mask(path, tiny)
    assert score.true_answer("s4", {"mask": str(path)}) == ""
    values = score.oracle(pixels, ["s4"], resamples=50).set_index("metric")["value"]
    assert values["no_mask"] == 1 and values["J"] <= 0.5


def test_the_true_answer_of_the_null_split():
    assert score.true_answer("ref_avs", {"split": "test_n"}) == tasks.answer("ref_avs", tasks.NULL)
