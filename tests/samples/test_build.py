"""A data root from each source: the same records and media through the same reader, and a manifest."""

import json
import shutil

import numpy as np
import pytest
from trees import digests, spoil

from crab.data import records
from crab.data.findings import ValidationError
from crab.data.records import RecordError
from crab.data.validate import validate
from crab.samples.build import assemble
from crab.world import generate

pytestmark = pytest.mark.usefixtures("probed_here")
QUIET = {"workers": 1, "progress": False}
SLOTS = ["ks", "s4", "avqa_thu"]
COUNTS = {"seed": 5, "train": 4, "test": 3, "caption": 3}
LISTS = {f"AVUIE_2/{slot}/{split}.json" for slot in SLOTS for split in ("train", "test")}
MADE = {"vocabulary.json", "root.json", "manifest.json"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "tree"
    generate.build(root, **COUNTS, slots=SLOTS, **QUIET)
    return root


@pytest.fixture
def broken(tree, tmp_path):
    """A copy of which two records of ks/train and one of avqa_thu/test cannot be used."""
    at = tmp_path / "given/AVUIE_2"
    shutil.copytree(tree / "AVUIE_2", at)
    spoil(tmp_path / "given", "ks", lambda rows: rows[1].pop("action"))
    (at / "ks/video/train_00002.mp4").unlink()
    (at / "avqa_thu/video/test_00000.mp4").write_bytes(b"")
    return tmp_path / "given"


def ids(root, slot, split):
    return [record["id"] for record in records.read(root, slot, split)]


def test_generated_data_are_those_that_were_built_and_have_a_manifest(tree, tmp_path):
    report = assemble(tmp_path / "out", **COUNTS, slots=SLOTS, **QUIET, report=tmp_path / "findings.csv")
    manifest = digests(tmp_path / "out").pop("manifest.json")
    assert digests(tmp_path / "out") == {**digests(tree), "manifest.json": manifest}
    header = "slot,split,record,index,file,problem,words,left_out\n"
    assert (tmp_path / "findings.csv").read_text(encoding="utf-8") == header
    parts = [(slot, split, n) for slot in SLOTS for split, n in (("train", 4), ("test", 3))]
    assert [(c.slot, c.split, c.kept) for c in report.counts] == parts
    numbers = {key: entry["records"] for key, entry in records.read_manifest(tmp_path / "out").items()}
    assert numbers == {f"{slot}/{split}": n for slot, split, n in parts}
    assemble(tmp_path / "again", **COUNTS, slots=SLOTS, **QUIET)
    assert records.read_manifest(tmp_path / "again") == records.read_manifest(tmp_path / "out")


def test_a_tree_is_read_where_it_lies_with_the_same_result(tree, tmp_path):
    before, out = digests(tree), tmp_path / "out"
    assemble(out, "tree", tree, slots=SLOTS, **QUIET)
    assert digests(tree) == before and set(digests(out)) == LISTS | MADE  # no media
    assert all(digests(out)[name] == before[name] for name in (*LISTS, "vocabulary.json"))
    for slot in SLOTS:
        for split in ("train", "test"):  # with the same paths of media and masks
            assert records.read(out, slot, split) == records.read(tree, slot, split)
    loaded = [records.load(records.read(root, "ks", "test")[0], 4) for root in (out, tree)]
    np.testing.assert_equal(*loaded)
    assert json.loads((out / "root.json").read_text(encoding="utf-8")) == {"media_root": str(tree)}
    assemble(tmp_path / "next", "tree", out, slots=SLOTS, **QUIET)  # which has lists alone: its media are the tree's
    assert records.read_manifest(tmp_path / "next") == records.read_manifest(out)
    assert records.read(tmp_path / "next", "ks", "test") == records.read(tree, "ks", "test")
    manifest = records.read_manifest(out)
    assert len(manifest) == 6 and manifest == records.write_manifest(out)
    assemble(out, "tree", tree, slots=["ks"], **QUIET)  # an earlier one is replaced as a whole
    assert set(digests(out)) == {"AVUIE_2/ks/train.json", "AVUIE_2/ks/test.json"} | MADE
    assert records.read_manifest(out) == {key: manifest[key] for key in ("ks/train", "ks/test")}


def test_broken_records_are_left_out_and_the_others_keep_their_ids(broken, tree, tmp_path):
    out, options = tmp_path / "out", {"slots": SLOTS, "on_problem": "skip", **QUIET}
    report = assemble(out, "tree", broken, report=tmp_path / "report/findings.csv", **options)
    assert ids(out, "ks", "train") == ["ks/train/00000", "ks/train/00003"]
    assert ids(out, "avqa_thu", "test") == ["test_00001", "test_00002"]
    given = json.dumps(records.read(tree, "s4", "test")).replace(str(tree), str(broken))
    assert json.dumps(records.read(out, "s4", "test")) == given
    left_out = {f"{c.slot}/{c.split}": dict(c.left_out) for c in report.counts if c.left_out}
    assert left_out == {"ks/train": {"field": 1, "missing": 1}, "avqa_thu/test": {"empty": 1}}
    assert len((tmp_path / "report/findings.csv").read_text(encoding="utf-8").splitlines()) == 4
    again = validate(out, SLOTS, **QUIET)  # the result has no problems
    assert again.findings == [] and [c.kept for c in again.counts] == [c.kept for c in report.counts]


def test_on_error_only_the_report_is_written(broken, tmp_path):
    with pytest.raises(ValidationError, match="3 problems"):
        assemble(tmp_path / "out", "tree", broken, slots=SLOTS, report=tmp_path / "findings.csv", **QUIET)
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "findings.csv").read_text(encoding="utf-8").splitlines()) == 4


def test_a_split_that_loses_all_records_has_no_list(broken, tmp_path):
    shutil.rmtree(broken / "AVUIE_2/ks/audio")
    assemble(tmp_path / "out", "tree", broken, slots=SLOTS, on_problem="skip", **QUIET)
    with pytest.raises(RecordError, match="no such file; run the build stage"):
        records.read(tmp_path / "out", "ks", "train")
    assert not {"ks/train", "ks/test"} & records.read_manifest(tmp_path / "out").keys()


def test_a_generated_tree_that_went_bad_loses_its_records_too(tmp_path, monkeypatch):
    real = generate.build

    def build(root, **options):
        real(root, **options)
        (root / "AVUIE_2/ks/video/train_00001.mp4").write_bytes(b"")
        (root / "AVUIE_2/ks/audio/test_00000.mp3").unlink()

    monkeypatch.setattr(generate, "build", build)
    assemble(tmp_path / "out", seed=0, train=3, test=1, caption=1, slots=["ks"], on_problem="skip", **QUIET)
    assert ids(tmp_path / "out", "ks", "train") == ["ks/train/00000", "ks/train/00002"]
    assert not (tmp_path / "out/AVUIE_2/ks/test.json").exists()
    assert {key: entry["records"] for key, entry in records.read_manifest(tmp_path / "out").items()} == {"ks/train": 2}


def test_damage_inside_a_clip_is_left_out_with_decode(tree, tmp_path):
    shutil.copytree(tree / "AVUIE_2/ks", tmp_path / "given/AVUIE_2/ks")
    path = tmp_path / "given/AVUIE_2/ks/video/train_00001.mp4"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    path.write_bytes(content)
    for decode, kept in ((False, 4), (True, 3)):
        options = {"slots": ["ks"], "on_problem": "skip", "decode": decode, **QUIET}
        assemble(tmp_path / "out", "tree", tmp_path / "given", **options)
        assert len(ids(tmp_path / "out", "ks", "train")) == kept
    for record in records.read(tmp_path / "out", "ks", "train"):
        records.load(record, 10)


TREE = {"source": "tree"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"source": "real"}, "source is 'real'; choose one of generated, tree, raw"),
        (TREE, "root is not set, and source 'tree' needs it; set `root` of the build section in params.yaml to the"),
        ({**TREE, "root": "/gone"}, "root is '/gone', and there is no such folder; mount or create it, or set `root`"),
        ({**TREE, "root": "data"}, "root is 'data', which is a relative path; set `root`"),
        ({**TREE, "root": "/"}, "root is '/', which holds no folder AVUIE_2; set it to the folder"),
        ({"source": "raw"}, "root is not set, and source 'raw' needs it"),
        ({"rewrite": "a/model"}, "rewrite is 'a/model', but source is 'generated', and a chat model only words chains"),
        ({**TREE, "root": "/", "rewrite": "a/model"}, "rewrite is 'a/model', but source is 'tree'"),
        ({"root": "/"}, "root is '/', but source is 'generated'; set source to tree"),
    ],
)
def test_a_wrong_source_or_root_names_the_parameter_and_the_fix(tmp_path, options, words):
    with pytest.raises(ValueError) as caught:
        assemble(tmp_path / "out", **options, **QUIET)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def test_the_output_of_the_stage_is_not_a_root_and_foreign_data_are_not_replaced(broken, tmp_path):
    (broken / "inside").mkdir()
    for root in (broken, broken / "inside"):
        with pytest.raises(ValueError, match="this stage writes there, and DVC empties the folder first; move"):
            assemble(broken, "tree", root, **QUIET)
    shutil.copytree(broken, tmp_path / "other")
    with pytest.raises(ValueError, match="not built here"):
        assemble(tmp_path / "other", "tree", broken, slots=SLOTS, on_problem="skip", **QUIET)
    assert digests(tmp_path / "other") == digests(broken)


def test_a_folder_of_media_that_is_gone_is_named(tree, tmp_path):
    shutil.copytree(tree / "AVUIE_2/ks", tmp_path / "given/AVUIE_2/ks")
    assemble(tmp_path / "out", "tree", tmp_path / "given", slots=["ks"], **QUIET)
    (tmp_path / "given").rename(tmp_path / "moved")
    with pytest.raises(RecordError, match="root.json: the folder of the media, '.*given', is not there.*set `root`"):
        records.read(tmp_path / "out", "ks", "train")
    for content in ("{", "[]", '{"media_root": 3}'):
        (tmp_path / "out/root.json").write_text(content, encoding="utf-8")
        with pytest.raises(RecordError, match="root.json"):
            records.read(tmp_path / "out", "ks", "train")


def test_original_data_sets_are_converted_under_the_root_and_then_read_as_a_tree(tree, tmp_path, monkeypatch):
    """With a converter and a chat model that do nothing: `crab.data.sources` has its own tests."""
    calls, folder = [], tmp_path / "converted"
    folder.mkdir()

    def convert_all(raw, out, **options):
        calls.append((raw, out, options))
        for slot, source in raw.items():
            shutil.copytree(source, out / "AVUIE_2" / slot, dirs_exist_ok=True)

    monkeypatch.setattr("crab.data.sources.convert_all", convert_all)
    monkeypatch.setattr("crab.data.sources.rewrite.Rewriter.load", str.upper)
    raw, options = {"ks": tree / "AVUIE_2/ks"}, {"faults": "error", "rewrite": None, **QUIET}
    report = assemble(tmp_path / "out", "raw", folder, raw=raw, **QUIET)
    assert [(c.slot, c.split, c.kept) for c in report.counts] == [("ks", "train", 4), ("ks", "test", 3)]
    assert records.read(tmp_path / "out", "ks", "test")[0]["media"][0].path.startswith(str(folder))
    assemble(tmp_path / "out", "raw", folder, raw=raw, slots=["ks"], on_problem="skip", rewrite="a/model", **QUIET)
    skip = {**options, "faults": "skip-and-record", "rewrite": "A/MODEL"}
    assert calls == [(raw, folder, options), (raw, folder, skip)]
    with pytest.raises(ValueError, match="raw is not set"):
        assemble(tmp_path / "out", "raw", folder, **QUIET)
