"""Scores from hand-made prediction files."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from crab import tasks
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
    return score.score_all(list(runs), ["ks"], root, root / "predictions", root / "out", root / "metrics.json")


def test_hand_worked(world):
    table, samples = go(world)
    row = table[table["primary"]].iloc[0]
    assert row["value"] == 0.5 and row["chance"] == 0.75
    assert (row["n_expected"], row["n_found"], row["n_scored"], row["n_unparsable"]) == (4, 4, 4, 1)
    assert samples["score"].tolist() == [1, 1, 0, 0]
    assert row["low"] < 0.5 < row["high"]
    nested = json.loads((world / "metrics.json").read_text())
    assert nested["single-lora-bare"]["ks"]["score"] == nested["single-lora-bare"]["mean"] == 0.5
    again, of_samples = score.load(world / "out")
    assert again["run"].tolist() == table["run"].tolist() and of_samples.to_numpy().tolist() == samples.to_numpy().tolist()


def test_scoring_twice_writes_the_same_bytes(world):
    go(world)
    first = {p.name: p.read_bytes() for p in (world / "out").iterdir()}
    go(world)
    assert first == {p.name: p.read_bytes() for p in (world / "out").iterdir()}


def test_missing_prediction_raises(world):
    write(world, ["<answer>ringing</answer>"] * 3)
    with pytest.raises(ValueError, match="single-lora-bare-ks.*ks/test/00003"):
        go(world)


def test_missing_file_raises(world):
    with pytest.raises(ValueError, match="joint-lora-bare.*ks.jsonl.*no such prediction file"):
        go(world, [RUN, Run("joint", "lora", "bare")])


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "ks.jsonl:1: expected"), ('{"id": "a", "text": "b"}', "slot"), ('{"id": 1, "slot": "ave", "text": ""}', "ave")],
)
def test_bad_line_is_named(world, line, message):
    (world / "predictions" / RUN.name / "ks.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        go(world)


def test_double_and_foreign_ids(world):
    write(world, ["x", "y"], ["a", "a"])
    with pytest.raises(ValueError, match="twice"):
        go(world)
    write(world, ["x"] * 5, [f"ks/test/{i:05d}" for i in range(4)] + ["other"])
    with pytest.raises(ValueError, match="other"):
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
