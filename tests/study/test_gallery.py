import dataclasses
import json
import re
import shutil
from collections import Counter

import pytest
from PIL import Image

from crab.world.generate import build
from crab.data.media import MediaError
from crab.data.validate import validate
from crab.world.views import VIEWS
from crab.study import gallery


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery") / "dataset"
    return root, build(root, 3, 4, 2, 3, workers=1, progress=False)


def test_sizes_and_problems_are_the_validators(built, tmp_path):
    table = gallery.sizes(validate(built[0], workers=1, progress=False))
    assert len(table) == 2 * len(VIEWS) - 3 and table.index.is_unique
    assert table["listed"].sum() == table["kept"].sum() == built[1]["records"] and table["left out"].sum() == 0
    assert "published" not in table  # nowhere known
    assert "<table" in table.style.hide().format(precision=2, na_rep="").to_html()

    lists = tmp_path / "AVUIE_2/ks"
    lists.mkdir(parents=True)
    raw = json.loads((built[0] / "AVUIE_2/ks/train.json").read_text())
    (lists / "train.json").write_text(json.dumps([*raw, "text", {**raw[0], "action": 3}]))  # and no media, no test list
    report = validate(tmp_path, ["ks"], "skip", workers=1, progress=False)
    found = gallery.problems(report).set_index(["problem", "split"])
    assert found.loc[("missing", "train"), ["found", "left out"]].tolist() == [2 * len(raw), len(raw)]
    assert found.loc[("field", "train"), ["found", "left out"]].tolist() == [2, 2]
    assert found.loc[("no list", "test"), ["found", "left out", "first"]].tolist() == [1, 0, "the list: AVUIE_2/ks/test.json"]
    assert len(found) == 3 and gallery.sizes(report)["listed"].tolist()[0] == len(raw) + 2
    assert "<table" in gallery.sizes(report).style.hide().format(precision=2, na_rep="").to_html()
    nothing = gallery.problems(validate(built[0], ["ks"], workers=1, progress=False))
    assert not len(nothing) and "in words" in nothing.style.hide().to_html()


def test_published_counts_are_a_column_where_some_are_known(built, monkeypatch):
    monkeypatch.setitem(gallery.tasks.SLOTS, "ks", dataclasses.replace(gallery.tasks.SLOTS["ks"], published_train=20))
    table = gallery.sizes(validate(built[0], ["ks"], workers=1, progress=False))
    assert table["published"].iloc[0] == 20 and table["published"].isna().tolist() == [False, True]


def test_what_a_converter_left_out_has_a_row_for_each_reason(built, tmp_path):
    shutil.copytree(built[0] / "AVUIE_2/ks", tmp_path / "AVUIE_2/ks")
    left = {"no sound": ["a.csv, line 3: x", "a.csv, line 4: y"], "fault": ["a.csv, line 5: z"]}
    told = {"splits": {"train": {"left_out": left}, "test": {"left_out": {}}}}
    (tmp_path / "AVUIE_2/ks/conversion.json").write_text(json.dumps(told))
    found = gallery.problems(validate(tmp_path, ["ks"], workers=1, progress=False))
    assert found[["problem", "split", "found", "left out", "in words"]].values.tolist() == [
        ["not converted: no sound", "train", 2, 2, "no sound: a.csv, line 3: x"],
        ["not converted: fault", "train", 1, 1, "fault: a.csv, line 5: z"]]


def test_a_record_whose_clip_breaks_off_inside_is_passed_over_and_named(built, tmp_path, monkeypatch):
    shutil.copytree(built[0] / "AVUIE_2/ks", tmp_path / "AVUIE_2/ks")
    real = gallery.records.load

    def load(record, frames):
        if record["id"] == "ks/train/00000":
            raise MediaError(record["media"][0].path, "cannot be decoded", "copy it again")
        return real(record, frames)

    monkeypatch.setattr(gallery.records, "load", load)
    titles = [t.get_text() for axes in gallery.samples(tmp_path, tmp_path / "samples.png").axes for t in axes.texts]
    assert any("1 before it do not decode: train_00000.mp4" in title for title in titles)
    monkeypatch.setattr(gallery.records, "load", lambda record, _: load({**record, "id": "ks/train/00000"}, 1))
    with pytest.raises(MediaError, match="train_00000.mp4"):
        gallery.samples(tmp_path, tmp_path / "samples.png")


def test_labels_are_those_of_the_files(built):
    table = gallery.label_table(built[0])

    def counted(slot):
        part = table[table["slot"] == slot]
        return dict(zip(zip(part["label"], part["kind"]), part["count"]))

    single = {"ave": "event", "arig": "a_obj", "s4": "a_obj", "avqa": "answer", "cremad": "emotion", "meld": "Emotion",
              "mer24": "discrete", "mafw": "emotion", "dfew": "emotion", "ks": "action", "ucf": "label"}
    for slot, field in single.items():
        raw = json.loads((built[0] / f"AVUIE_2/{slot}/train.json").read_text())
        assert counted(slot) == Counter((r[field], "") for r in raw)
    for slot in ("a2v", "v2a"):
        assert counted(slot) == {("one", ""): 2, ("two", ""): 2}
    raw = json.loads((built[0] / "AVUIE_2/ms3/train.json").read_text())
    assert counted("ms3") == Counter((name, "") for r in raw for name in r["a_obj"].split(","))
    raw = json.loads((built[0] / "AVUIE_2/unav/train.json").read_text())
    assert counted("unav") == Counter((name, "") for r in raw for name in re.findall("<event>(.+?)</event>", r["label_content"]))
    assert counted("ref_avs") == {("there", ""): 3, ("not there", ""): 1}
    assert sum(counted("avqa_thu").values()) == 4 and {k.split(", ")[0] for k, _ in counted("avqa_thu")} <= {"Sound", "View", "Both"}
    raw = json.loads((built[0] / "AVUIE_2/avvp/train.json").read_text())
    text = " ".join(r["label_content"] for r in raw)
    kinds = table[table["slot"] == "avvp"].groupby("kind")["count"].sum()
    assert kinds.to_dict() == {"heard": text.count("<audio>"), "seen": text.count("<visual>")}


def test_figures_are_written(built, tmp_path):
    for name in ("a.png", "b.png"):
        gallery.label_counts(built[0], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    figure = gallery.samples(built[0], tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").width > 800
    rows = len(VIEWS)
    assert len(figure.axes) == rows * 5
    box = figure.axes[list(VIEWS).index("arig") * 5 + 1].patches[0]  # arig, the frame with its answer
    raw = json.loads((built[0] / "AVUIE_2/arig/train.json").read_text())[0]
    assert raw["top_left"] == [box.get_x() + 0.5, box.get_y() + 0.5]
    assert raw["bottom_right"] == [box.get_x() + box.get_width() + 0.5, box.get_y() + box.get_height() + 0.5]


def test_the_card_counts_labels_and_words(built):
    table = gallery.card(built[0]).set_index("slot")
    assert list(table.index) == list(VIEWS)
    meld = json.loads((built[0] / "AVUIE_2/meld/train.json").read_text())
    counts = Counter(r["Emotion"] for r in meld)
    assert table.loc["meld", "labels"] == len(counts) and table.loc["meld", "its share"] == max(counts.values()) / 4
    assert counts[table.loc["meld", "commonest"]] == max(counts.values())
    assert table.loc["meld", "rarest share"] == min(counts.values()) / 4
    assert table.loc["meld", ["asked words", "bare words", "most bare"]].tolist() == [6, 3, 3]  # <answer> joy </answer>
    lengths = [len(r["label"].replace("<answer>", "<answer> ").replace("</answer>", " </answer>").split()) for r in meld]
    assert table.loc["meld", ["explicit words", "most explicit"]].tolist() == [sum(lengths) / 4, max(lengths)]
    assert table.loc["avcap", "labels"] == 0 and table["commonest"].isna().sum() == 1


def test_an_empty_root_is_named(tmp_path):
    with pytest.raises(ValueError, match="no slot has a train.json"):
        gallery.samples(tmp_path, tmp_path / "a.png")
