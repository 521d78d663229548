"""The tables of the build notebook against the files, and what `gallery` draws."""

import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from matplotlib import pyplot as plt

from crab import tasks
from crab.analyses import gallery
from crab.core.files import read_json, write_json
from crab.data import records
from crab.data.media import MediaError
from crab.data.validate import validate
from crab.world.generate import build

NOTEBOOK = Path(__file__).parents[2] / "notebooks/01_build.ipynb"


def run(root, report, out):
    """What the cells of the notebook compute, for data that are there and the report of their check."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    names, paths = {}, SimpleNamespace(dataset=root, report=lambda stage: out, figures=lambda stage: out)
    for cell in cells:
        if not cell.source.startswith("report = assemble("):
            exec(compile(cell.source, cell.id, "exec"), names)
        names |= {"paths": paths, "report": report}
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery") / "dataset"
    build(root, 3, 4, 2, 3, workers=1, progress=False)
    return root


def test_tables_are_those_of_the_files(built, tmp_path):
    page = run(built, validate(built, workers=1, progress=False), tmp_path)
    rows = {slot: read_json(built / f"AVUIE_2/{slot}/train.json") for slot in tasks.SLOTS}
    tests = sum(len(read_json(path)) for path in built.glob("AVUIE_2/*/test.json"))
    assert page.sizes["kept"].sum() == sum(map(len, rows.values())) + tests and page.problems.empty
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("labels.png", "samples.png"))
    table = page.labels.set_index(["slot", "label", "kind"])["count"]
    for slot, field in {"ave": "event", "arig": "a_obj", "avqa": "answer", "meld": "Emotion", "ucf": "label"}.items():
        assert table[slot].to_dict() == Counter((row[field], "") for row in rows[slot])
    assert table["ms3"].to_dict() == Counter((name, "") for row in rows["ms3"] for name in row["a_obj"].split(","))
    assert table["ref_avs"].to_dict() == {("there", ""): 3, ("not there", ""): 1} and table["avqa_thu"].sum() == 4
    text = " ".join(row["label_content"] for row in rows["unav"] + rows["avvp"])
    assert table["unav"].to_dict() == Counter((name, "") for name in re.findall("<event>(.+?)</event>", text))
    senses = table["avvp"].groupby("kind").sum().to_dict()
    assert senses == {"heard": text.count("<audio>"), "seen": text.count("<visual>")}
    card, counts = {row["slot"]: row for row in page.card}, Counter(row["Emotion"] for row in rows["meld"])
    shares = [counts[card["meld"]["most common"]] / 4, card["meld"]["its share"], max(counts.values()) / 4]
    assert len(set(shares)) == 1 and card["meld"]["rarest share"] == min(counts.values()) / 4
    lengths = [len(re.sub("(</?answer>)", r" \1 ", row["label"]).split()) for row in rows["meld"]]
    words = [card["meld"][name] for name in ("labels", "words asked", "bare words", "explicit words", "most explicit")]
    assert words == [len(counts), 6, 3, sum(lengths) / 4, max(lengths)] and card["avcap"]["labels"] == 0


def test_problems_have_a_row_each_and_count_left_out_records_once(built, tmp_path):
    shutil.copytree(built / "AVUIE_2/ave", tmp_path / "AVUIE_2/ave")
    rows = read_json(built / "AVUIE_2/ks/train.json")
    left = {"train": {"left_out": {"no sound": ["a.csv, line 3: x", "a.csv, line 4: y"]}}, "test": {"left_out": {}}}
    broken = [*rows, "text", {**rows[0], "action": 3}]  # and there are no media, and no test list
    for name, value in {"ave/conversion.json": {"splits": left}, "ks/train.json": broken}.items():
        write_json(tmp_path / "AVUIE_2" / name, value)
    page = run(tmp_path, validate(tmp_path, ["ave", "ks"], "skip", workers=1, progress=False), tmp_path)
    assert {key: tuple(row[["found", "left out"]]) for key, row in page.problems.iterrows()} == {
        ("not converted: no sound", "ave", "train"): (2, 2),
        ("missing", "ks", "train"): (2 * len(rows), len(rows)),
        ("field", "ks", "train"): (2, 2),
        ("no list", "ks", "test"): (1, 0),
    }


def test_the_truth_is_drawn_where_it_is(built):
    _, (picture, sound) = plt.subplots(1, 2)
    row = records.read(built, "arig", "train")[0]
    gallery.draw_place(picture, tasks.get_slot("arig"), row)
    assert [picture.patches[0].get_x() + 0.5, picture.patches[0].get_y() + 0.5] == row["top_left"]
    row = records.read(built, "ave", "train")[0]
    gallery.draw_seconds(sound, tasks.get_slot("ave"), row)
    span = sound.patches[0]
    assert (span.get_x(), span.get_x() + span.get_width()) == (row["start_time"], row["end_time"])
    plt.close("all")


def test_a_record_that_does_not_decode_is_passed_over_and_named(built, monkeypatch):
    rows, load = records.read(built, "ks", "train"), records.load
    bad = {rows[0]["id"]}

    def broken(record, frames):
        if record["id"] in bad:
            raise MediaError(record["media"][0].path, "cannot be decoded", "copy it again")
        return load(record, frames)

    monkeypatch.setattr(gallery.records, "load", broken)
    record, _, failed = gallery.sample(tasks.get_slot("ks"), rows)
    assert record["id"] == rows[1]["id"] and [Path(path).name for path in failed] == ["train_00000.mp4"]
    bad |= {row["id"] for row in rows}
    with pytest.raises(MediaError, match="train_00000.mp4"):
        gallery.sample(tasks.get_slot("ks"), rows)
