"""A data root from either source: the same records and media through the same reader."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from test_data_generate import digests
from test_data_probe import holed

from crab import tasks
from crab.world import generate
from crab.data import records
from crab.study.build import assemble
from crab.data.findings import ValidationError
from crab.data.records import RecordError
from crab.data.validate import validate

pytestmark = pytest.mark.usefixtures("probed_here")
QUIET = {"workers": 1, "progress": False}
SLOTS = ["ks", "s4", "avqa_thu"]


def test_generated_data_come_out_byte_for_byte_as_they_were_built(tree, tmp_path):
    report = assemble(tmp_path / "out", **tree.counts, slots=SLOTS, **QUIET, report=tmp_path / "findings.csv")
    generate.build(tmp_path / "built", **tree.counts, slots=SLOTS, **QUIET)
    assert digests(tmp_path / "out") == digests(tmp_path / "built")
    assert (tmp_path / "findings.csv").read_text() == "slot,split,record,index,file,problem,words,left_out\n"
    assert [(c.slot, c.split, c.kept) for c in report.counts] == [(s, split, n) for s in SLOTS for split, n in (("train", 4), ("test", 3))]


def test_a_tree_is_read_where_it_lies_with_the_same_result(tree, tmp_path):
    before = digests(tree.root)
    out = tmp_path / "out"
    assemble(out, "tree", tree.root, **QUIET)
    assert digests(tree.root) == before
    lists = {tasks.json_path(s.name, split) for s in tasks.SLOTS.values() for split in s.splits}
    assert set(digests(out)) == lists | {"vocabulary.json", "root.json"}  # no medium among them
    assert all((out / name).read_bytes() == (tree.root / name).read_bytes() for name in (*lists, "vocabulary.json"))
    for slot in tasks.SLOTS.values():
        for split in slot.splits:
            assert records.read(out, slot.name, split) == records.read(tree.root, slot.name, split)  # paths of media and masks too
    record = records.read(out, "a2v", "test")[0]
    np.testing.assert_equal(records.load(record, 4), records.load(records.read(tree.root, "a2v", "test")[0], 4))
    noted = json.loads((out / "root.json").read_text())
    assert noted["media_root"] == str(tree.root) and len(noted["media"]) == 64
    assemble(out, "tree", tree.root, slots=["ks"], **QUIET)  # an earlier one is replaced as a whole
    assert set(digests(out)) == {"AVUIE_2/ks/train.json", "AVUIE_2/ks/test.json", "vocabulary.json", "root.json"}


@pytest.fixture
def broken(tree, tmp_path):
    """A copy of some slots, of which two ks records and one test clip of avqa_thu cannot be used."""
    for slot in SLOTS:
        shutil.copytree(tree.root / "AVUIE_2" / slot, tmp_path / "given/AVUIE_2" / slot)
    at = tmp_path / "given/AVUIE_2"
    raws = json.loads((at / "ks/train.json").read_text())
    raws[1].pop("action")
    (at / "ks/train.json").write_text(json.dumps(raws))
    (at / "ks/video/train_00002.mp4").unlink()
    (at / "avqa_thu/video/test_00000.mp4").write_bytes(b"")
    return tmp_path / "given"


def test_what_is_broken_is_left_out_and_the_rest_keep_their_ids(broken, tree, tmp_path):
    report = assemble(tmp_path / "out", "tree", broken, slots=SLOTS, on_problem="skip", report=tmp_path / "report/findings.csv", **QUIET)
    assert [r["id"] for r in records.read(tmp_path / "out", "ks", "train")] == ["ks/train/00000", "ks/train/00003"]
    assert [r["id"] for r in records.read(tmp_path / "out", "avqa_thu", "test")] == ["test_00001", "test_00002"]
    assert records.read(tmp_path / "out", "s4", "test") == [
        {**r, "media": [m._replace(path=m.path.replace(str(tree.root), str(broken))) for m in r["media"]],
         "mask": r["mask"].replace(str(tree.root), str(broken))} for r in records.read(tree.root, "s4", "test")]
    assert {(c.slot, c.split): dict(c.left_out) for c in report.counts if c.left_out} == {
        ("ks", "train"): {"field": 1, "missing": 1}, ("avqa_thu", "test"): {"empty": 1}}
    assert len((tmp_path / "report/findings.csv").read_text().splitlines()) == 4
    again = validate(tmp_path / "out", SLOTS, **QUIET)  # a walk through the result, in turn, finds it right
    assert again.findings == [] and [c.kept for c in again.counts] == [c.kept for c in report.counts] and again.media == report.media


def test_on_error_nothing_is_written_but_the_report(broken, tmp_path):
    with pytest.raises(ValidationError, match="3 problems"):
        assemble(tmp_path / "out", "tree", broken, slots=SLOTS, report=tmp_path / "findings.csv", **QUIET)
    assert not (tmp_path / "out").exists() and len((tmp_path / "findings.csv").read_text().splitlines()) == 4


def test_a_slot_of_which_nothing_is_left_has_no_list(broken, tmp_path):
    shutil.rmtree(broken / "AVUIE_2/ks/audio")
    assemble(tmp_path / "out", "tree", broken, slots=SLOTS, on_problem="skip", **QUIET)
    with pytest.raises(RecordError, match="no such file; run the build stage"):
        records.read(tmp_path / "out", "ks", "train")


def test_a_generated_tree_that_went_bad_loses_its_records_too(tmp_path, monkeypatch):
    real = generate.build

    def build(root, **options):
        real(root, **options)
        (root / "AVUIE_2/ks/video/train_00001.mp4").write_bytes(b"")
        (root / "AVUIE_2/ks/audio/test_00000.mp3").unlink()

    monkeypatch.setattr(generate, "build", build)
    counts = {"seed": 0, "train": 3, "test": 1, "caption": 1, "slots": ["ks"]}
    assemble(tmp_path / "out", **counts, on_problem="skip", **QUIET)
    assert [r["id"] for r in records.read(tmp_path / "out", "ks", "train")] == ["ks/train/00000", "ks/train/00002"]
    assert not (tmp_path / "out/AVUIE_2/ks/test.json").exists()


@pytest.mark.parametrize("options, words", [
    ({"source": "real"}, "source is 'real'; choose one of generated, tree, raw"),
    ({"source": "tree"}, "root is not set, and source 'tree' needs it; set `root` of the build section in params.yaml to the folder that "
                         "holds AVUIE_2"),
    ({"source": "tree", "root": "/no/such"}, "root is '/no/such', and there is no such folder; mount or make it, or set `root`"),
    ({"source": "tree", "root": "data"}, "root is 'data', which depends on the folder it is read in; set `root`"),
    ({"source": "tree", "root": "/"}, "root is '/', which holds no folder AVUIE_2; set it to the folder"),
    ({"source": "raw"}, "root is not set, and source 'raw' needs it"),
    ({"rewrite": "a/model"}, "build: rewrite is 'a/model', but source is 'generated', and only chains that source raw makes"),
    ({"source": "tree", "root": "/", "rewrite": "a/model"}, "rewrite is 'a/model', but source is 'tree'"),
    ({"root": "/"}, "root is '/', but source is 'generated'; set source to tree"),
])  # fmt: skip
def test_a_wrong_source_or_root_names_the_parameter_and_the_mend(tmp_path, options, words):
    with pytest.raises(ValueError) as caught:
        assemble(tmp_path / "out", **{**options, **QUIET})
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def test_the_stages_own_output_is_no_root_and_foreign_data_are_not_replaced(broken, tmp_path):
    with pytest.raises(ValueError, match="which is where this stage writes, and DVC empties that first; move the tree elsewhere"):
        assemble(broken, "tree", broken, **QUIET)
    with pytest.raises(ValueError, match="where this stage writes"):
        assemble(broken, "tree", broken / "inside", **QUIET) if (broken / "inside").mkdir() is None else None
    other = tmp_path / "other"
    shutil.copytree(broken, other)
    with pytest.raises(ValueError, match="not built here"):
        assemble(other, "tree", broken, slots=SLOTS, on_problem="skip", **QUIET)
    assert digests(other) == digests(broken) or (broken / "inside").exists()


def test_media_that_are_gone_are_missed_by_name(tree, tmp_path):
    shutil.copytree(tree.root / "AVUIE_2/ks", tmp_path / "given/AVUIE_2/ks")
    assemble(tmp_path / "out", "tree", tmp_path / "given", slots=["ks"], **QUIET)
    (tmp_path / "given").rename(tmp_path / "moved")
    with pytest.raises(RecordError, match="root.json: the media's folder '.*given' is not there.*set `root` of the build section"):
        records.read(tmp_path / "out", "ks", "train")
    for content in ("{", "[]", '{"media_root": 3}'):
        (tmp_path / "out/root.json").write_text(content)
        with pytest.raises(RecordError, match="root.json"):
            records.read(tmp_path / "out", "ks", "train")


def test_original_data_sets_are_converted_under_the_root_and_then_read_as_a_tree(tree, tmp_path, monkeypatch):
    """With a converter that copies what is there: `crab.data.sources` has its own tests."""
    called = []

    def convert_all(raw, out, **options):
        called.append((raw, out, options))
        for slot, folder in raw.items():
            shutil.copytree(folder, out / "AVUIE_2" / slot)

    monkeypatch.setitem(sys.modules, "crab.data.sources", SimpleNamespace(convert_all=convert_all))
    monkeypatch.setattr("crab.data.sources", sys.modules["crab.data.sources"], raising=False)
    (tmp_path / "converted").mkdir()
    raw = {"ks": tree.root / "AVUIE_2/ks"}
    report = assemble(tmp_path / "out", "raw", tmp_path / "converted", raw=raw, on_problem="skip", **QUIET)
    assert called == [(raw, tmp_path / "converted", {"faults": "skip-and-record", "rewrite": None, "workers": 1,
                                                            "progress": False})]
    assert [(c.slot, c.split, c.kept) for c in report.counts] == [("ks", "train", 4), ("ks", "test", 3)]
    assert records.read(tmp_path / "out", "ks", "test")[0]["media"][0].path.startswith(str(tmp_path / "converted"))
    (tmp_path / "named").mkdir()
    named = assemble(tmp_path / "out", "raw", tmp_path / "named", raw=raw, slots=["ks"], on_problem="skip", **QUIET)
    assert len(called) == 2 and named.counts == report.counts  # slots that are named are converted too
    with pytest.raises(ValueError, match="raw is not set"):
        assemble(tmp_path / "out", "raw", tmp_path / "converted", **QUIET)


def test_the_chat_model_is_passed_on_to_the_converters_by_its_name(tree, tmp_path, monkeypatch):
    (tmp_path / "converted").mkdir()
    calls = []
    monkeypatch.setattr("crab.data.sources.rewrite.Rewriter.load", lambda name: calls.append(name) or name.upper())

    def convert_all(raw, out, rewrite, **options):
        calls.append(rewrite)
        for slot, folder in raw.items():
            shutil.copytree(folder, out / "AVUIE_2" / slot)

    monkeypatch.setattr("crab.data.sources.convert_all", convert_all)
    assemble(tmp_path / "out", "raw", tmp_path / "converted", raw={"ks": tree.root / "AVUIE_2/ks"}, rewrite="a/model", **QUIET)
    assert calls == ["a/model", "A/MODEL"]


def test_damage_inside_a_clip_is_left_out_with_decode(tree, tmp_path):
    shutil.copytree(tree.root / "AVUIE_2/ks", tmp_path / "given/AVUIE_2/ks")
    path = tmp_path / "given/AVUIE_2/ks/video/train_00001.mp4"
    holed(path, path)
    for decode, kept in ((False, 4), (True, 3)):
        assemble(tmp_path / "out", "tree", tmp_path / "given", slots=["ks"], on_problem="skip", decode=decode, **QUIET)
        found = records.read(tmp_path / "out", "ks", "train")
        assert len(found) == kept
    for record in found:  # all that is left can be encoded
        records.load(record, 10)
