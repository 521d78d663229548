"""What decides rows and encoded samples: all but how features round."""

from pathlib import Path

import pytest
import torch

from crab import tasks
from crab.data import records
from crab.data.files import write_json
from crab.study import deciding as asked
from crab.study.dataset import write_slot
from crab.study.deciding import ENCODING, ENCODING_ALONE, deciding, provenance
from crab.pipeline.paths import root
from crab.study.code import modules


@pytest.fixture
def place(tmp_path):
    """Encoded samples, dataset and base: one test record of ks."""
    write_json(tmp_path / "base" / "config.json", {})
    record = {"video_path": "v.mp4", "audio_path": "a.wav", "action": "ringing", "label": "<answer>ringing</answer>"}
    write_json(tmp_path / "dataset" / tasks.json_path("ks", "test"), [record])
    change(tmp_path)
    return tmp_path


def change(place, features=0.5, positions=1, frame=b"frame", prompt="what"):
    sample = {"input_ids": torch.arange(3), "position_ids": torch.full((3, 3), positions), "features": torch.full((2, 4), features)}
    write_slot(place / "encoded", "ks", "test", [sample], ["a"], [prompt], {"bare": []})
    for item in records.read(place / "dataset", "ks", "test")[0]["media"]:
        Path(item.path).parent.mkdir(parents=True, exist_ok=True)
        Path(item.path).write_bytes(frame)


def found(place, **how):
    where = [place / name for name in ("encoded", "dataset", "base")]
    return provenance(*where, ["ks"], **{"compatibility": "none", **how}), deciding(*where, ["ks"], [])


def test_rounding_of_the_encoders_changes_nothing(place):
    first = found(place)
    change(place, features=0.75)
    assert found(place) == first and set(first[0]["samples"]) == {"ks/train", "ks/test"}


@pytest.mark.parametrize("what", [{"positions": 2}, {"frame": b"another"}, {"prompt": "who"}])
def test_another_record_or_medium_changes_both(place, what):
    first = found(place)
    change(place, **what)
    assert all(now != before for now, before in zip(found(place), first, strict=True))


def test_another_base_changes_both(place):
    first = found(place)
    write_json(place / "base" / "config.json", {"hidden_size": 64})
    assert all(now != before for now, before in zip(found(place), first, strict=True))


def test_provenance_is_of_the_code_and_of_how_media_are_shown(place, monkeypatch):
    first = found(place)[0]
    assert found(place, compatibility="published")[0] != first
    monkeypatch.setattr(asked, "code_digest", lambda *which: "other code")
    assert found(place)[0] != first


def test_how_a_task_is_scored_is_no_part_of_what_is_encoded():
    assert {path.name for path in ENCODING_ALONE} == {"encode.py", "published.py", "records.py"}
    assert all(path.is_file() for path in ENCODING_ALONE)
    loaded = {path.as_posix() for path in modules(root(), ENCODING)}
    assert {"crab/data/media.py", "crab/models/omni.py"} <= loaded and not any("tasks" in path for path in loaded)
