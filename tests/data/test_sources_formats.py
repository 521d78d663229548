"""Each raw set in its authors' own form becomes records, media and counts of what is left out."""

import json

import numpy as np
import pytest
from raw_sets import SETS, paths, records_of, square, write

from crab import tasks
from crab.data import media, records
from crab.data.sources import SOURCES, SourceError, convert, convert_all


def truth_mask(record):
    try:
        return media.read_mask(record["mask"])
    except media.MediaError:
        assert record["split"] == "test_n"  # the only one without a mask
        return np.zeros((224, 224), bool)


def left(report, split):
    return {reason: len(places) for reason, places in report["splits"][split]["left_out"].items()}


@pytest.mark.parametrize("slot", SOURCES)
def test_a_raw_set_becomes_records_that_read_decode_and_score_one(tmp_path, slot):
    expected, entry, root = SETS[slot], tasks.get_slot(slot), write(tmp_path / "raw", slot)
    report = convert(slot, root, tmp_path / "data", progress=False)
    for split in entry.splits:
        rows = records.read(tmp_path / "data", slot, split)
        assert len(rows) == report["splits"][split]["records"] > 0
        for row in rows:
            assert len(records.load(row, entry.frames)) == len(row["media"]) >= 2
            assert tasks.parse(slot, tasks.target(slot, row, "bare")) == tasks.truth(slot, row)
            assert set(entry.fields(split)) <= set(row)
        if entry.metric and split == "test":
            masks = tasks.Masks(truth_mask, lambda record, box, points: truth_mask(record)) if entry.masks else None
            scores = tasks.score(slot, rows, [tasks.target(slot, row, "explicit") for row in rows], masks=masks)
            assert scores["primary"] == 1 and scores["n_unparsable"] == 0
            assert {name: rows[0][name] for name in expected["test"]} == expected["test"]
    first = json.loads((tmp_path / f"data/AVUIE_2/{slot}/train.json").read_text(encoding="utf-8"))[0]
    assert records_of(slot, root)[0] == first
    answer = first.pop(entry.answer_field)
    assert first == expected["train"]
    assert answer.startswith(expected["answer"]) and (entry.masks or answer == expected["answer"])
    assert json.loads((tmp_path / f"data/AVUIE_2/{slot}/conversion.json").read_text(encoding="utf-8")) == report


def test_every_slot_whose_annotations_are_public_has_a_converter():
    assert set(SOURCES) == set(SETS) == set(tasks.SLOTS) - {"mer24", "mafw", "dfew", "avcap"}


def test_several_slots_at_once_are_counted(tmp_path):
    root = write(write(tmp_path / "raw", "ave"), "avqa")
    reports = convert_all({"ave": root, "avqa": root}, tmp_path / "data", progress=False)
    parts = {(slot, split): part for slot, report in reports.items() for split, part in report["splits"].items()}
    assert {key: (part["records"], part["files"]) for key, part in parts.items()} == {
        ("ave", "train"): (2, 4), ("ave", "test"): (2, 4), ("avqa", "train"): (2, 2), ("avqa", "test"): (1, 2),
    }  # fmt: skip
    assert left(reports["avqa"], "train") == {"deleted by the set's authors": 1} and left(reports["ave"], "train") == {}


@pytest.mark.parametrize("link", ["hardlink", "symlink", "copy"])
def test_media_are_placed_as_asked_and_not_encoded_again(tmp_path, link):
    root, out = write(tmp_path / "raw", "ave"), tmp_path / "data/AVUIE_2/ave"
    times = []
    for _ in range(2):
        convert("ave", root, tmp_path / "data", link=link, progress=False)
        source, target = root / "AVE/RUhOCu3LNXM.mp4", out / "video/RUhOCu3LNXM.mp4"
        assert target.read_bytes() == source.read_bytes()
        assert target.is_symlink() == (link == "symlink")
        assert (target.stat().st_ino == source.stat().st_ino) == (link != "copy")
        times.append((out / "audio/RUhOCu3LNXM.wav").stat().st_mtime_ns)
    assert times[0] == times[1] and not list(out.rglob("*.partial*"))
    sound = media.read_audio(out / "audio/RUhOCu3LNXM.wav")[4000:12000]
    np.testing.assert_allclose(sound, np.sin(np.arange(4000, 12000) / 5) / 2, atol=0.05)


def test_points_lie_on_the_mask_and_every_frame_has_its_own_second(tmp_path):
    root = write(tmp_path / "raw", "ms3")
    (root / "v1m/tri_0_5000/labels_rgb/2.png").unlink()
    media.write_mask(root / "v1m/tri_0_5000/labels_rgb/3.png", np.zeros((224, 224), bool))
    report = convert("ms3", root, tmp_path / "data", progress=False)
    assert left(report, "train") == {"no mask file": 1, "nothing is marked in the frame": 1}
    rows = records.read(tmp_path / "data", "ms3", "train")
    assert [row["media"][1].second for row in rows] == [0, 1, 4]
    for row in rows:
        box, points = tasks.truth("ms3", row)
        assert box == (32, 16 * row["frame_idx"], 96, 16 * row["frame_idx"] + 64)
        assert all(media.read_mask(row["mask"])[y, x] for x, y in points) and len(set(points)) == 3


@pytest.mark.parametrize("slot", ["s4", "arig"])
@pytest.mark.parametrize("folder", ["", "s4_data/"])
def test_the_older_release_of_avsbench_is_read_by_its_categories(tmp_path, slot, folder):
    """It has a folder per kind, split and category; pictures are png, and frames are numbered from 1."""
    clips = "name,start,category,split\none,20,dog_barking,train\ntwo,0,cat_meowing,test\nold,0,dog_barking,val\n"
    older = [folder + path for path in paths("audio_wav/{train/dog_barking/one,test/cat_meowing/two}.wav")]
    for kind in ("visual_frames", "gt_masks"):
        older.append(f"{folder}{kind}/{{train/dog_barking/one/one,test/cat_meowing/two/two}}_{{1,2,3,4,5}}.png")
    root = write(tmp_path / "raw", changes={"s4_meta_data.csv": clips}, media_paths=older)
    convert(slot, root, tmp_path / "data", progress=False)
    train, test = (records.read(tmp_path / "data", slot, split) for split in ("train", "test"))
    first = [(row["image_path"], row["a_obj"], row["media"][1].second) for row in train]
    assert first == [("AVS/v1s/one/frames/0.png", "dog_barking", 0)]
    assert [row["visual_path"] for row in test] == [f"AVS/v1s/two/frames/{frame}.png" for frame in range(5)]
    for frame, row in enumerate(test):
        truth = tasks.truth(slot, row)
        assert (truth if slot == "arig" else truth.box) == (32, 16 * (frame + 1), 96, 16 * (frame + 1) + 64)
        assert slot == "arig" or (media.read_mask(row["mask"]) == square(16 * (frame + 1))).all()
        assert len(records.load(row, 1)) == 2
    for line, message in {
        "one,20,../dog,train": "line 2, frame 0, field 'category': '../dog' is not a file name",
        "one,20,dog,dev": "line 2, field 'split': 'dev' is not among the set's 3; give one of train, val, test",
    }.items():
        write(root, changes={"s4_meta_data.csv": f"name,start,category,split\n{line}\n"})
        with pytest.raises(SourceError, match=message):
            records_of(slot, root)


def test_a_music_question_is_filled_in_order(tmp_path):
    second = records_of("avqa", write(tmp_path, "avqa"))[1]
    assert second["question"] == "Is the left instrument louder than the right one?"
    assert second["label"] == "to answer , i listen : it is a question of kind comparative . <answer>no</answer>"


def test_dense_labels_of_llp_training_clips_are_used_if_there_are_some(tmp_path):
    head = "filename\tonset\toffset\tevent_labels\n"
    more = {"AVVP_train_audio.csv": head + "zzzzzzzzzz0_30_40\t1\t3\tDog\n", "AVVP_train_visual.csv": head}
    first, second = records_of("avvp", write(tmp_path, "avvp", more, ["video/zzzzzzzzzz0.mp4"]))
    assert (first["vid"], second["vid"]) == ("zzzzzzzzzz0", "-aaaaaaaaa1")
    chain = "i hear Dog from 1 to 3 . none of the events is seen . <audio>Dog,(1 3)</audio>"
    assert first["label_content"].startswith(chain)


def test_the_split_of_cremad_is_by_actor_or_by_its_lists(tmp_path):
    root = write(tmp_path, "cremad")
    assert [row["video_path"][:4] for row in records_of("cremad", root, "test")] == ["1010"]
    write(root, changes={"train.csv": "1010_IEO_HAP_HI,HAP\n", "test.csv": "1001_DFA_ANG_XX,ANG\n"})
    chain = "i hear \" it's eleven o'clock \" . face and voice act happy at a high level . <answer>happy</answer>"
    assert [row["label"] for row in records_of("cremad", root)] == [chain]


def test_a_null_reference_has_no_mask_and_an_unmarked_training_frame_is_false(tmp_path):
    root = write(tmp_path / "raw", "ref_avs")
    media.write_mask(root / "gt_mask/v1_0_10000/fid_1/00000.png", np.zeros((224, 224), bool))
    convert("ref_avs", root, tmp_path / "data", progress=False)
    train, test = (records.read(tmp_path / "data", "ref_avs", split) for split in ("train", "test"))
    assert [row["output"] for row in train] == ["what is described is not seen here . <answer>false</answer>"]
    assert [(row["split"], row["frame_idx"], truth_mask(row).any()) for row in test] == [
        (part, frame, part != "test_n") for part in ("test_s", "test_u", "test_n") for frame in (0, 1)
    ]


def test_a_clip_of_ref_avs_lies_where_its_uid_says(tmp_path):
    """The set's own loader takes the folder from `uid`, whatever `vid` says."""
    root, text = write(tmp_path, "ref_avs"), SETS["ref_avs"]["files"]["metadata.csv"]
    rows = {split: records_of("ref_avs", root, split) for split in ("train", "test")}
    write(root, changes={"metadata.csv": text.replace("\nv1_0_10000,", "\n17,").replace("\nv2_0_10000,", "\n18,")})
    assert rows == {split: records_of("ref_avs", root, split) for split in ("train", "test")}
    assert [row["vid"] for row in rows["test"]] == ["v2_0_10000"] * 6


@pytest.mark.parametrize("slot, side, asked", [("a2v", "video", "audio"), ("v2a", "audio", "video")])
def test_pairs_are_of_different_classes_balanced_and_seeded(tmp_path, slot, side, asked):
    names, kinds = [f"{i:011d}" for i in range(12)], ["Bark"] * 5 + ["Horse"] * 3 + ["Flute"] * 2 + ["Bus", "Bus"]
    event = dict(zip(names, kinds, strict=True))
    lines = [f"{kind}&{name}&good&0&10\n" for name, kind in event.items()] + [f"Goat&{names[0]}&good&0&3\n"]
    text = "".join(lines)  # the first clip has two labels
    clips = [f"AVE/{{{','.join(names)}}}.mp4"]
    root = write(tmp_path, changes={"Annotations.txt": text, "trainSet.txt": text}, media_paths=clips)
    rows = records_of(slot, root)
    used = [name[:11] for row in rows[::2] for name in (row[f"{side}1_path"], row[f"{side}2_path"])]
    assert len(used) == len(set(used)) and names[0] not in used
    for number, row in enumerate(rows):
        right = row[f"correct_{side}"]
        assert right == number % 2 + 1 and row[f"{side}1_event"] != row[f"{side}2_event"]
        assert row[f"{asked}_path"][:11] == row[f"{side}{right}_path"][:11]
        assert all(event[row[f"{side}{n}_path"][:11]] == row[f"{side}{n}_event"] for n in (1, 2))
        assert row[f"{asked}_event"] == row[f"{side}{right}_event"]
    assert rows == records_of(slot, root) != records_of(slot, root, seed=1)
