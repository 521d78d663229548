"""Raw sets at fault: each fault is named with file, line and mend, or counted; nothing is dropped silently."""

import json
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources_formats import AVE, AVQA, AVS, FORMATS, MELD_HEAD, MUSIC, REF, WHEN, clips, put, shelf  # noqa: F401

from crab.data.sources import Draft, Raw, SourceError, convert, convert_all, drafts

HEAD = "Category&VideoID&Quality&StartTime&EndTime\n"
LLP_HEAD = "filename\tonset\toffset\tevent_labels\n"


def ave(line):
    return AVE | {"Annotations.txt": HEAD + line + "\n", "trainSet.txt": line + "\n"}


def llp(line):
    return FORMATS["avvp"][0] | {"AVVP_eval_audio.csv": LLP_HEAD + line + "\n"}


def unav(**entry):
    whole = {"subset": "train", "annotations": [{"segment": [0, 1], "label": "sailing"}], **entry}
    return {"unav100_annotations.json": {"database": {"v": whole}}}


def music(**change):
    return {"avqa-train.json": [MUSIC | {"video_id": "v"} | change]}


@pytest.mark.parametrize("slot, files, words", [
    ("ave", ave("Bark&x&good&0"), ["Annotations.txt, line 2", "4 fields, must be 5", "VideoID", "mend or remove"]),
    ("ave", ave("Barks&x&good&0&3"), ["line 2", "'Barks' is not among the set's 28", "did it mean 'Bark'?"]),
    ("ave", ave("Bark&x&good&7&3"), ["line 2", "seconds 7 to 3", "0 <= start < end <= 10"]),
    ("ave", ave("Bark&x&good&0&11"), ["line 2", "seconds 0 to 11"]),
    ("ave", ave("Bark&x&good&zero&3"), ["line 2", "field 'start'", "'zero'"]),
    ("ave", AVE | {"trainSet.txt": "Bark&other&good&0&3\n"}, ["trainSet.txt, line 1", "'other'", "not in Annotations.txt"]),
    ("ave", {"Annotations.txt": HEAD}, ["no trainSet.txt", "put the data set's own file there"]),
    ("ave", AVE | {"again/RUhOCu3LNXM.mp4": "sound.mp4"}, ["two files of one name", "again/RUhOCu3LNXM.mp4"]),
    ("ave", AVE | {"a/trainSet.txt": "", "b/trainSet.txt": "", "trainSet.txt": None},
     ["a/trainSet.txt", "b/trainSet.txt", "which is meant"]),
    ("a2v", ave("Barks&x&good&0&3"), ["line 2", "'Barks'"]),
    ("avvp", llp("-aaaaaaaaa1_10_20\t2\t5\tspeech"), ["AVVP_eval_audio.csv, line 2", "'speech'", "did it mean 'Speech'"]),
    ("avvp", llp("-aaaaaaaaa1_10_20\t2\t15\tSpeech"), ["AVVP_eval_audio.csv, line 2", "seconds 2 to 15"]),
    ("avvp", FORMATS["avvp"][0] | {"AVVP_eval_audio.csv": LLP_HEAD.replace("onset", "start")}, ["line 1", "no column 'onset'"]),
    ("avvp", FORMATS["avvp"][0] | {"AVVP_val_pd.csv": "filename\tevent_labels\n-aaaaaaaaa1_10_20\tSpeech,Dogs\n"}, ["line 2", "'Dogs'"]),
    ("avvp", FORMATS["avvp"][0] | {"AVVP_train_audio.csv": LLP_HEAD}, ["no AVVP_train_visual.csv"]),  # else none would seem seen
    ("unav", unav(subset="trian"), ["record v", "field 'subset'", "'trian'"]),
    ("unav", unav(annotations=[{"segment": [3, 1], "label": "sailing"}]), ["annotation 0", "field 'segment'", "start < end"]),
    ("unav", unav(annotations=[{"segment": [0, 1]}]), ["field 'label'", "missing"]),
    ("unav", unav(annotations={}), ["field 'annotations'", "give a list"]),
    ("unav", {"unav100_annotations.json": []}, ["holds a list", "object 'database'"]),
    ("unav", {"unav100_annotations.json": '{"database": {\n"v": '}, ["line 2", "malformed JSON"]),
    ("avqa", music(type="[Audio]"), ["record 0", "field 'type'"]),
    ("avqa", music(type='["Visul", "Counting"]'), ["record 0", "modality 'Visul'", "did it mean 'Visual'"]),
    ("avqa", music(question_content="Is the <LR> one loud?"), ["field 'templ_values'", "0 values for 1 blanks"]),
    ("avqa", music(anser=None), ["field 'anser'", "give a str"]),
    ("avqa", music(anser="a <b>") | clips("videos", "v"), ["<answer>a <b></answer>", "correct the label"]),
    ("avqa", music(video_id="../x"), ["field 'video_id'", "no file name"]),
    ("avqa", {"avqa-train.json": {}}, ["holds a dict", "list of records"]),
    ("avqa", {"avqa-train.json": ["text"]}, ["record 0", "is a str"]),
    ("avqa_thu", {"train_qa.json": [AVQA | {"answer": 4}]}, ["record 0", "field 'answer'", "4 is no place among 4"]),
    ("avqa_thu", {"train_qa.json": [AVQA | {"question_relation": "Ear"}]}, ["relation 'Ear'"]),
    ("avqa_thu", {"train_qa.json": [AVQA | {"multi_choice": ["a", None]}]}, ["field 'multi_choice'"]),
    ("meld", {"train_sent_emo.csv": MELD_HEAD + "1,What?,Mark,suprise,positive,0,0," + WHEN}, ["line 2", "did it mean 'surprise'"]),
    ("meld", {"train_sent_emo.csv": MELD_HEAD + "1,What?,Mark,surprise,positive,0,x," + WHEN}, ["line 2", "field 'Utterance_ID'"]),
    ("cremad", {"train.csv": "1001_DFA_ANG_XX,HAP\n", "test.csv": ""}, ["train.csv, line 1", "'HAP'", "'ANG'"]),
    ("cremad", {"train.csv": "1001_ABC_ANG_XX,ANG\n", "test.csv": ""}, ["sentence 'ABC'"]),
    ("cremad", {"train.csv": "noname,ANG\n", "test.csv": ""}, ["'noname'", "<actor>_<sentence>_<emotion>_<level>"]),
    ("ucf", FORMATS["ucf"][0] | {"ucfTrainTestlist/trainlist01.txt": "Yoyo/v.avi 1\n"}, ["trainlist01.txt, line 1", "'Yoyo'", "YoYo"]),
    ("ucf", FORMATS["ucf"][0] | {"ucfTrainTestlist/trainlist01.txt": "v.avi 1\n"}, ["line 1", "<class>/<clip>.avi"]),
    ("ks", {"other/x": "y"}, ["no folder 'train'"]),
    ("s4", AVS | {"metadata.csv": "vid,uid,a_obj,split,label\nv,../v,dog,train,v1s\n"}, ["line 2, frame 0", "field 'uid'"]),
    ("s4", AVS | {"metadata.csv": "vid,uid,a_obj,split,label\nv,v,dog,training,v1s\n"}, ["line 2", "'training'"]),
    ("s4", AVS | {"v1s/one_0_5000/labels_rgb/0.png": "no picture"}, ["labels_rgb/0.png", "cannot be decoded"]),
    ("ref_avs", REF | {"metadata.csv": "vid,uid,split,fid,exp\nv,u,tset_s,0,x\n"}, ["line 2", "'tset_s'"]),
    ("ref_avs", REF | {"metadata.csv": "vid,uid,split,fid,exp\n../v,u,train,0,x\n"}, ["line 2, frame 0", "field 'vid'", "'../v'"]),
    ("ref_avs", REF | {"metadata.csv": "vid,uid,split,fid,exp\nv1_0_10000,u,train,one,x\n"}, ["field 'fid'", "'one'"]),
])
def test_a_fault_is_named_or_counted(put, slot, files, words):  # noqa: F811
    root = put({name: content for name, content in files.items() if content is not None})
    with pytest.raises(SourceError) as caught:
        list(drafts(slot, Raw(root), "train"))
    for word in words:
        assert word in str(caught.value)
    raw = Raw(root, faults="skip-and-record")
    try:
        list(drafts(slot, raw, "train"))
    except SourceError as error:  # a file that cannot be read at all
        assert str(error) == str(caught.value)
    else:
        assert str(caught.value) in raw.left_out["fault"]


def test_text_that_is_not_utf8_is_named_by_line(put):  # noqa: F811
    root = put(AVE)
    (root / "trainSet.txt").write_bytes(b"Bark&x&good&0&3\nBark&\xff&good&0&3\n")
    with pytest.raises(SourceError, match=r"trainSet.txt, line 2: not UTF-8 at byte 21; save it as UTF-8"):
        list(drafts("ave", Raw(root), "train"))


def test_names_and_texts_that_no_list_can_hold_are_named_or_counted(put, tmp_path):  # noqa: F811
    root = put(FORMATS["ks"][0])
    clip = next(root.rglob("ghi_*.mp4"))
    clip.rename(os.fsdecode(os.fsencode(clip.parent) + b"/\xff.mp4"))
    with pytest.raises(SourceError, match=r"\\udcff.mp4: a file's name is not UTF-8"):
        convert("ks", root, tmp_path / "data", progress=False)
    report = convert("ks", root, tmp_path / "data", faults="skip-and-record", progress=False)["splits"]["train"]
    assert report["records"] == 1 and len(report["left_out"]["fault"]) == 1
    put(music(anser="\ud800") | clips("videos", "v"))
    with pytest.raises(SourceError, match="record 0: .*half a character"):
        list(drafts("avqa", Raw(root), "train"))


@pytest.mark.parametrize("slot, gone, split, reason", [
    ("ave", "AVE/RUhOCu3LNXM.mp4", "train", "no video file"),
    ("meld", "test/output_repeated_splits_test/dia0_utt0.mp4", "test", "no video file"),
    ("s4", "v1s/two_0_5000/frames/2.jpg", "test", "no image file"),
    ("s4", "v1s/two_0_5000/labels_rgb/2.png", "test", "no mask file"),
    ("ref_avs", "media/v1_0_10000/audio.wav", "train", "no sound file"),
    ("ref_avs", "media/v1_0_10000/frames/0.jpg", "train", "no image file"),
    ("a2v", "AVE/RUhOCu3LNXM.mp4", "train", "no video file"),
])
def test_missing_media_are_counted_with_their_place(put, slot, gone, split, reason):  # noqa: F811
    root = put(FORMATS[slot][0])
    whole = len(list(drafts(slot, Raw(root), split)))
    (root / gone).unlink()
    raw = Raw(root)
    rest = len(list(drafts(slot, raw, split)))
    assert len(raw.left_out[reason]) >= 1 and re.search(r"line \d", raw.left_out[reason][0])
    assert rest < whole and (slot == "a2v" or rest + len(raw.left_out[reason]) == whole)


def test_an_event_of_no_length_is_left_out(put):  # noqa: F811
    raw = Raw(put(ave("Bark&RUhOCu3LNXM&good&3&3")))
    assert list(drafts("ave", raw, "train")) == []
    assert list(raw.left_out) == ["an event of no length"]


def test_a_split_without_records_is_an_error_that_leaves_the_old_files(put, tmp_path):  # noqa: F811
    root, out = put(AVE), tmp_path / "data"
    convert("ave", root, out, progress=False)
    before = (out / "AVUIE_2/ave/train.json").read_bytes()
    for clip in ("bbbbbbbbbb2", "cccccccccc3"):
        (root / f"AVE/{clip}.mp4").unlink()
    with pytest.raises(SourceError, match=r"no record of ave/test can be made of it; left out: \{'no video file': 2\}"):
        convert("ave", root, out, progress=False)
    assert (out / "AVUIE_2/ave/train.json").read_bytes() == before


def test_a_clip_that_cannot_be_decoded_is_counted(put, tmp_path):  # noqa: F811
    root = put(AVE)
    (root / "AVE/RUhOCu3LNXM.mp4").write_bytes(b"no video" * 100)
    report = convert("ave", root, tmp_path / "data", progress=False)["splits"]["train"]
    assert report["records"] == 1
    (place,) = report["left_out"]["sound cannot be decoded"]
    assert "Annotations.txt, line 2" in place and "RUhOCu3LNXM.mp4: cannot be decoded" in place


def test_of_several_containers_the_first_in_order_is_taken(put):  # noqa: F811
    root = put(AVE | {"AVE/RUhOCu3LNXM.mkv": "sound.mp4", "AVE/RUhOCu3LNXM.wav": "ten.wav", "mp3/RUhOCu3LNXM.mp3": "ten.wav"})
    assert next(drafts("ave", Raw(root), "train")).files == {
        "video/RUhOCu3LNXM.mp4": root / "AVE/RUhOCu3LNXM.mp4", "audio/RUhOCu3LNXM.wav": root / "AVE/RUhOCu3LNXM.wav"}


@pytest.mark.parametrize("call, error, words", [
    (lambda raw, out: convert("mafw", raw, out), ValueError, "slot mafw: has no converter"),
    (lambda raw, out: convert("avee", raw, out), ValueError, "did you mean 'ave'"),
    (lambda raw, out: convert("ave", raw, out, link="move"), ValueError, "link is 'move'; give one of hardlink"),
    (lambda raw, out: convert("ave", raw, out, faults="ignore"), ValueError, "faults is 'ignore'; give one of error"),
    (lambda raw, out: convert("ave", raw / "gone", out), SourceError, "no such folder"),
    (lambda raw, out: convert("ave", raw, raw / "data"), ValueError, "lies in the raw data set"),
    (lambda raw, out: convert_all({"ave": raw, "dfew": raw}, out), ValueError, "slot dfew: has no converter"),
    (lambda raw, out: list(drafts("unav", Raw(raw), "test")), ValueError, "slot unav has no split 'test'"),
])
def test_what_cannot_be_asked_for(put, tmp_path, call, error, words):  # noqa: F811
    with pytest.raises(error, match=words):
        call(put(AVE), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_links_that_loop_and_hidden_files_do_no_harm(put):  # noqa: F811
    root = put(AVE)
    (root / "AVE/loop").symlink_to(root)
    (root / "AVE/._RUhOCu3LNXM.mp4").write_text("what another system leaves")
    (root / "Annotations.txt.bak").write_text("what an editor leaves")
    assert len(list(drafts("ave", Raw(root), "train"))) == 2


TEXT = st.text(st.sampled_from("&\t,\n\"'{}[]:0123456789abANG_<>/.\0\x85é"), max_size=80)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, rest=st.booleans(),
       slot=st.sampled_from(["ave", "avvp", "unav", "avqa", "avqa_thu", "meld", "cremad", "ucf", "s4", "ref_avs"]))
def test_no_annotation_file_breaks_the_readers(tmp_path, text, slot, rest):
    """Whatever stands in the files, there are records, left-out rows or a SourceError."""
    heads = {"meld": MELD_HEAD, "s4": "vid,uid,a_obj,split,label\n", "ref_avs": "vid,uid,split,fid,exp\n", "unav": '{"database": ',
             "avqa": "[", "avqa_thu": "["}
    tails = {"unav": "}", "avqa": "]", "avqa_thu": "]"}
    for name in ("Annotations.txt", "trainSet.txt", "AVVP_eval_audio.csv", "AVVP_eval_visual.csv", "AVVP_train.csv", "AVVP_val_pd.csv",
                 "unav100_annotations.json", "avqa-train.json", "train_qa.json", "train_sent_emo.csv", "train.csv", "test.csv",
                 "classInd.txt", "trainlist01.txt", "metadata.csv"):
        written = heads.get(slot, "") + text + tails.get(slot, "") if rest else text
        (tmp_path / name).write_text(written, encoding="utf-8", newline="")
    for faults in ("error", "skip-and-record"):
        try:
            assert all(isinstance(d, Draft) for d in drafts(slot, Raw(tmp_path, faults), "train"))
        except SourceError as error:
            assert str(tmp_path) in str(error)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_no_json_value_breaks_the_readers(tmp_path, data, value):
    slot, name, good = data.draw(st.sampled_from([
        ("avqa", "avqa-train.json", MUSIC | {"video_id": "v"}), ("avqa_thu", "train_qa.json", AVQA),
        ("unav", "unav100_annotations.json", {"subset": "train", "annotations": [{"segment": [0, 1], "label": "sailing"}]})]))
    entry = good | {data.draw(st.sampled_from(sorted(good))): value}
    (tmp_path / name).write_text(json.dumps({"database": {"v": entry}} if slot == "unav" else [entry]))
    raw = Raw(tmp_path, faults="skip-and-record")
    assert list(drafts(slot, raw, "train")) == []  # there are no media
    assert sum(map(len, raw.left_out.values())) == (1 if entry.get("subset", "train") == "train" or "fault" in raw.left_out else 0)
