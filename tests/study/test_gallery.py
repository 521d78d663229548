import json
import re
from collections import Counter

import pytest
from PIL import Image

from crab.data.generate import build
from crab.data.validate import validate
from crab.data.views import VIEWS
from crab.study import gallery


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery") / "dataset"
    return root, build(root, 3, 4, 2, 3, workers=1, progress=False)


def test_sizes_and_problems_are_the_validators(built, tmp_path):
    table = gallery.sizes(validate(built[0], workers=1, progress=False))
    assert len(table) == 2 * len(VIEWS) - 3 and table.index.is_unique
    assert table["listed"].sum() == table["kept"].sum() == built[1]["records"] and table["left out"].sum() == 0
    assert table["published"].isna().all()  # nowhere known
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
