import json
from collections import Counter

import pytest
from PIL import Image

from crab.data.views import VIEWS
from crab.data.generate import build
from crab.study import gallery


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery") / "dataset"
    return root, build(root, 3, 4, 2, 3, workers=1, progress=False)


def test_sizes_has_a_row_for_each_split(built):
    table = gallery.sizes(built[1])
    assert len(table) == 2 * len(VIEWS) - 1 and table.index.is_unique
    assert table["records"].sum() == built[1]["records"]
    assert table["MiB"].sum() * 2**20 == pytest.approx(built[1]["bytes"])
    assert "<table" in table.style.hide().format(precision=2).to_html()


def test_labels_are_those_of_the_files(built):
    table = gallery.label_table(built[0])

    def counted(slot):
        part = table[table["slot"] == slot]
        return dict(zip(zip(part["label"], part["kind"]), part["count"]))

    for slot, field in {"ave": "event", "arig": "a_obj", "s4": "a_obj", "avqa": "answer", "cremad": "emotion", "ks": "action"}.items():
        raw = json.loads((built[0] / f"AVUIE_2/{slot}/train.json").read_text())
        assert counted(slot) == Counter((r[field], "") for r in raw)
    for slot in ("a2v", "v2a"):
        assert counted(slot) == {("one", ""): 2, ("two", ""): 2}
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
    box = figure.axes[2 * 5 + 1].patches[0]  # arig, the frame with its answer
    raw = json.loads((built[0] / "AVUIE_2/arig/train.json").read_text())[0]
    assert raw["top_left"] == [box.get_x() + 0.5, box.get_y() + 0.5]
    assert raw["bottom_right"] == [box.get_x() + box.get_width() + 0.5, box.get_y() + box.get_height() + 0.5]


def test_an_empty_root_is_named(tmp_path):
    with pytest.raises(ValueError, match="no slot has a train.json"):
        gallery.samples(tmp_path, tmp_path / "a.png")
