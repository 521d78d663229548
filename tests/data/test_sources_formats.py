"""Each raw set in its authors' own form, by hand, and what becomes of it."""

import json
import shutil

import av
import numpy as np
import pytest

from crab import tasks
from crab.data import media, records
from crab.data.sources import SOURCES, Raw, SourceError, convert, convert_all, drafts, finished


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """One file of each kind: a clip with sound, one without, a sound of ten seconds, a picture."""
    folder = tmp_path_factory.mktemp("shelf")
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(8)]
    wave = np.sin(np.arange(160_000) / 5) / 2
    with av.open(str(folder / "sound.mp4"), "w") as out:
        video, audio = out.add_stream("libx264", rate=8), out.add_stream("aac", rate=16000, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        out.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(wave[None, :16000].astype(np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        out.mux(audio.encode(sound))
        out.mux(audio.encode())
    media.write_video(folder / "mute.avi", frames, 8)
    media.write_audio(folder / "ten.wav", wave)
    media.write_image(folder / "frame.jpg", np.repeat(np.repeat(frames[0], 4, 0), 4, 1))
    return folder


@pytest.fixture
def put(shelf, tmp_path):
    """Writes a raw set: texts by name, copies of shelf files by name."""
    root = tmp_path / "raw"

    def write(files):
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, np.ndarray):
                media.write_mask(path, content)
            elif isinstance(content, str) and content in ("sound.mp4", "mute.avi", "ten.wav", "frame.jpg"):
                shutil.copy(shelf / content, path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return root

    return write


def raw_records(slot, root, split, **options):
    """Records of a split, without their media."""
    for draft in drafts(slot, Raw(root, **options), split):
        yield finished(slot, draft)


def clips(folder, *names, suffix=".mp4"):
    return {f"{folder}/{name}{suffix}": "sound.mp4" for name in names}


def square(top, left, side=64):
    mask = np.zeros((224, 224), bool)
    mask[top:top + side, left:left + side] = True
    return mask


AVE = {
    "Annotations.txt": "Category&VideoID&Quality&StartTime&EndTime\n"
                       "Church bell&RUhOCu3LNXM&good&0&10\nBark&-aaaaaaaaa1&good&2&6\nHorse&bbbbbbbbbb2&good&1&4\n"
                       "Male speech, man speaking&cccccccccc3&good&3&10\nFrying (food)&dddddddddd4&good&0&5\n",
    "trainSet.txt": "Church bell&RUhOCu3LNXM&good&0&10\nBark&-aaaaaaaaa1&good&2&6\n",
    "valSet.txt": "Frying (food)&dddddddddd4&good&0&5\n",
    "testSet.txt": "Male speech, man speaking&cccccccccc3&good&3&10\nHorse&bbbbbbbbbb2&good&1&4\n",
    **clips("AVE", "RUhOCu3LNXM", "-aaaaaaaaa1", "bbbbbbbbbb2", "cccccccccc3"),
}
AVS = {
    "metadata.csv": "vid,uid,s_min,s_sec,a_obj,split,label\n"
                    "one,one_0_5000,0,0,dog,train,v1s\ntwo,two_0_5000,0,0,piano,test,v1s\nold,old_0_5000,0,0,piano,val,v1s\n"
                    "tri,tri_0_5000,0,0,man_piano,train,v1m\nqua,qua_0_5000,0,0,cat_dog,test,v1m\nnew,new,0,0,cat,train,v2\n",
}
for _set, _uid, _count in (("v1s", "one_0_5000", 1), ("v1s", "two_0_5000", 5), ("v1m", "tri_0_5000", 5), ("v1m", "qua_0_5000", 5)):
    AVS[f"{_set}/{_uid}/audio.wav"] = "ten.wav"
    for _frame in range(5):
        AVS[f"{_set}/{_uid}/frames/{_frame}.jpg"] = "frame.jpg"
    for _frame in range(_count):
        AVS[f"{_set}/{_uid}/labels_rgb/{_frame}.png"] = square(16 * _frame, 32)

REF = {
    "metadata.csv": "vid,uid,split,fid,exp\n"
                    "v1_0_10000,v1_0_10000_hair-dryer_1,train,1,The object that sounds.\n"
                    "v1_0_10000,v1_0_10000_hair-dryer_2,val,1,Something.\n"
                    "v2_0_10000,v2_0_10000_cat_1,test_s,0,\"The cat, in front.\"\n"
                    "v2_0_10000,v2_0_10000_cat_2,test_u,0,The white cat.\n"
                    "v2_0_10000,v2_0_10000_null_1,test_n,0,The sounding dog.\n",
    "media/v1_0_10000/audio.wav": "ten.wav", "media/v1_0_10000/frames/0.jpg": "frame.jpg",
    "media/v2_0_10000/audio.wav": "ten.wav", "media/v2_0_10000/frames/0.jpg": "frame.jpg", "media/v2_0_10000/frames/1.jpg": "frame.jpg",
    "gt_mask/v1_0_10000/fid_1/00000.png": square(0, 0),
    "gt_mask/v2_0_10000/fid_0/00000.png": square(8, 8), "gt_mask/v2_0_10000/fid_0/00001.png": square(8, 64),
}
MUSIC = {"question_id": 8, "type": '["Audio-Visual", "Counting"]', "question_content": "How many instruments are sounding in the video?",
         "templ_values": "[]", "question_deleted": 0, "anser": "two"}
AVQA = {"id": 183, "video_name": "-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?",
        "multi_choice": ["motorboat", "yacht", "sailboat", "car"], "answer": 1, "question_relation": "View", "question_type": "Happening"}
MELD_HEAD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n"
WHEN = '4,7,"00:20:57,256","00:21:00,049"\n'

# slot -> (files, first train record but for its media, its answer's text, a test record's fields)
FORMATS = {
    "ave": (AVE,
            {"video_path": "RUhOCu3LNXM.mp4", "audio_path": "RUhOCu3LNXM.wav", "vid": "RUhOCu3LNXM", "event": "Church bell",
             "start_time": 0, "end_time": 10},
            "Church bell from 0 to 10 is both heard and seen . <event>Church bell</event> <range>0,10</range>",
            {"event": "Male speech, man speaking", "start_time": 3, "end_time": 10}),
    "avvp": ({
        "AVVP_train.csv": "filename\tevent_labels\nzzzzzzzzzz0_30_40\tSpeech,Dog\n",
        "AVVP_val_pd.csv": "filename\tevent_labels\n-aaaaaaaaa1_10_20\tSpeech,Frying_(food)\n",
        "AVVP_test_pd.csv": "filename\tevent_labels\nbbbbbbbbb_2_30_40\tCello\n",
        "AVVP_eval_audio.csv": "filename\tonset\toffset\tevent_labels\n-aaaaaaaaa1_10_20\t2\t5\tSpeech\n"
                               "-aaaaaaaaa1_10_20\t0\t10\tFrying_(food)\n-aaaaaaaaa1_10_20\t6\t7\tSpeech\n",
        "AVVP_eval_visual.csv": "filename\tonset\toffset\tevent_labels\n-aaaaaaaaa1_10_20\t0\t8\tFrying_(food)\n"
                                "bbbbbbbbb_2_30_40\t4\t10\tCello\n",
        **clips("video", "-aaaaaaaaa1", "bbbbbbbbb_2"),
    }, {"video_path": "-aaaaaaaaa1.mp4", "audio_path": "-aaaaaaaaa1.wav", "filename": "-aaaaaaaaa1_10_20", "vid": "-aaaaaaaaa1",
        "event": "Frying_(food),Speech"},
        "i hear Frying_(food) from 0 to 10 and Speech from 2 to 5 and Speech from 6 to 7 . i see Frying_(food) from 0 to 8 . "
        "<audio>Frying_(food),(0 10)</audio> <audio>Speech,(2 5)</audio> <audio>Speech,(6 7)</audio> <visual>Frying_(food),(0 8)</visual>",
        {"label_content": "none of the events is heard . i see Cello from 4 to 10 . <visual>Cello,(4 10)</visual>"}),
    "unav": ({
        "data/unav100_annotations.json": {"version": "unav100", "database": {
            "72f67ednp7w": {"duration": 47.68, "subset": "train", "annotations": [
                {"segment": [21.01, 37.7377], "label": "skateboarding", "label_id": 36},
                {"segment": [0, 15.78316], "label": "man speaking", "label_id": 0}]},
            "8WSesSOfBrE": {"duration": 39, "subset": "test", "annotations": [{"segment": [0, 39], "label": "sailing", "label_id": 55}]}}},
        **clips("raw_videos", "72f67ednp7w"),
    }, {"video_path": "72f67ednp7w.mp4", "audio_path": "72f67ednp7w.wav", "vid": "72f67ednp7w"},
        "both heard and seen : man speaking from 0 to 15.8 and skateboarding from 21 to 37.7 . "
        "<event>man speaking</event> <range>0,15.8</range> <event>skateboarding</event> <range>21,37.7</range>", None),
    "s4": (AVS, {"image_path": "AVS/v1s/one_0_5000/frames/0.jpg", "audio_path": "AVS/v1s/one_0_5000/audio.wav", "vid": "one",
                 "uid": "one_0_5000", "a_obj": "dog", "frame_idx": 0},
           "what sounds in the clip : dog . what sounds now is seen here . [32,0,96,64]", {"frame_idx": 0, "a_obj": "piano"}),
    "arig": (AVS, {"image_path": "AVS/v1s/one_0_5000/frames/0.jpg", "audio_path": "AVS/v1s/one_0_5000/audio.wav", "a_obj": "dog",
                   "frame_idx": 0, "top_left": [32, 0], "bottom_right": [96, 64]},
             "what sounds in the clip : dog . what sounds now is seen here . <obj>(32,0)(96,64)</obj>",
             {"top_left": [32, 0], "bottom_right": [96, 64]}),
    "ms3": (AVS, {"image_path": "AVS/v1m/tri_0_5000/frames/0.jpg", "audio_path": "AVS/v1m/tri_0_5000/audio.wav", "vid": "tri",
                  "uid": "tri_0_5000", "a_obj": "man_piano", "frame_idx": 0},
            "what sounds in the clip : man_piano . what sounds now is seen here . [32,0,96,64]", {"a_obj": "cat_dog"}),
    "ref_avs": (REF, {"image_path": "media/v1_0_10000/frames/0.jpg", "audio_path": "media/v1_0_10000/audio.wav", "vid": "v1_0_10000",
                      "uid": "v1_0_10000_hair-dryer_1", "fid": 1, "idx": 0, "description": "The object that sounds."},
                "what is described is seen here : hair-dryer . <answer>true</answer> [0,0,64,64]",
                {"object": "The cat, in front.", "split": "test_s", "fid": 0}),
    "avqa": ({
        "json/avqa-train.json": [MUSIC | {"video_id": "00000238"}, MUSIC | {
            "video_id": "00000238", "question_id": 9, "question_content": "Is the <LR> instrument louder than the <RL> one?",
            "type": '["Audio", "Comparative"]', "templ_values": '["left", "right"]', "anser": "no"},
            MUSIC | {"video_id": "00000238", "question_id": 10, "question_deleted": 1}],
        "json/avqa-test.json": [MUSIC | {"video_id": "sv7", "question_content": "Where is the <FL> sounding instrument?",
                                         "type": '["Audio-Visual", "Location"]', "templ_values": '["first"]', "anser": "left"}],
        **clips("MUSIC-AVQA-videos-Real", "00000238"), **clips("MUSIC-AVQA-videos-Synthetic", "sv7"),
    }, {"video_path": "00000238.mp4", "audio_path": "00000238.wav", "video_id": "00000238", "question_id": 8,
        "type": '["Audio-Visual", "Counting"]', "question": "How many instruments are sounding in the video?", "answer": "two"},
        "to answer , i listen and look : it is a question of kind counting . <answer>two</answer>",
        {"question": "Where is the first sounding instrument?", "answer": "left"}),
    "avqa_thu": ({"train_qa.json": [AVQA], "val_qa.json": [AVQA | {"id": 184, "answer": 3, "question_relation": "Both"}],
                  **clips("videos", "-HG3Omg_89c_000030")},
                 {"video_path": "-HG3Omg_89c_000030.mp4", "audio_path": "-HG3Omg_89c_000030.wav", **AVQA},
                 "to answer , i look : it is a question of kind happening . <answer>yacht</answer>",
                 {"answer": 3, "question_relation": "Both"}),
    "meld": ({
        "train_sent_emo.csv": MELD_HEAD + '1,"Oh my God, he\x92s lost it. [x] <answer>",Phoebe,sadness,negative,0,0,' + WHEN,
        "test_sent_emo.csv": MELD_HEAD + "1,What?,Mark,surprise,negative,0,0," + WHEN,
        **clips("train/train_splits", "dia0_utt0"), **clips("test/output_repeated_splits_test", "dia0_utt0"),
    }, {"video_path": "train/dia0_utt0.mp4", "audio_path": "train/dia0_utt0.wav", "Emotion": "sadness"},
        'i hear " Oh my God, he’s lost it. x answer " . <answer>sadness</answer>', {"Emotion": "surprise"}),
    "cremad": ({**clips("VideoFlash", "1001_DFA_ANG_XX", "1010_IEO_HAP_HI"),
                "AudioWAV/1001_DFA_ANG_XX.wav": "ten.wav", "AudioWAV/1010_IEO_HAP_HI.wav": "ten.wav",
                "AudioMP3/1001_DFA_ANG_XX.mp3": "not read"},
               {"video_path": "1001_DFA_ANG_XX.mp4", "audio_path": "1001_DFA_ANG_XX.wav", "emotion": "anger"},
               'i hear " don\'t forget a jacket " . face and voice act anger . <answer>anger</answer>', {"emotion": "happy"}),
    "ks": ({**clips("train/playing_violin", "abc_000010_000020"), **clips("val/tap dancing", "def_000000_000010"),
            **clips("train/tap dancing", "ghi_000000_000010")},
           {"video_path": "train/playing_violin/abc_000010_000020.mp4", "audio_path": "train/playing_violin/abc_000010_000020.wav",
            "action": "playing violin"},
           "what is done in the clip : playing violin . <answer>playing violin</answer>", {"action": "tap dancing"}),
    "ucf": ({
        "ucfTrainTestlist/classInd.txt": "1 ApplyEyeMakeup\n2 PlayingDhol\n3 YoYo\n",
        "ucfTrainTestlist/trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nYoYo/v_YoYo_g08_c01.avi 3\n",
        "ucfTrainTestlist/testlist01.txt": "PlayingDhol/v_PlayingDhol_g01_c01.avi\n",
        **clips("UCF-101/ApplyEyeMakeup", "v_ApplyEyeMakeup_g08_c01", suffix=".avi"),
        **clips("UCF-101/PlayingDhol", "v_PlayingDhol_g01_c01", suffix=".avi"),
        "UCF-101/YoYo/v_YoYo_g08_c01.avi": "mute.avi",
    }, {"video_path": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "audio_path": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.wav",
        "label": "apply eye makeup"},
        "what is done in the video : apply eye makeup . <answer>apply eye makeup</answer>", {"label": "playing dhol"}),
    "a2v": (AVE, None, None, {}),
    "v2a": (AVE, None, None, {}),
}


@pytest.mark.parametrize("slot", SOURCES)
def test_a_raw_set_becomes_records_that_read_decode_and_score_one(put, tmp_path, slot):
    files, record, answer, tested = FORMATS[slot]
    root = put(files)
    entry = tasks.get_slot(slot)
    report = convert(slot, root, tmp_path / "data", progress=False)
    for split in entry.splits:
        found = records.read(tmp_path / "data", slot, split)
        assert len(found) == report["splits"][split]["records"] > 0
        for one in found:
            assert len(records.load(one, entry.frames)) == len(one["media"]) >= 2
            assert tasks.parse(slot, tasks.target(slot, one, "bare")) == tasks.truth(slot, one)
            assert set(entry.fields(split)) <= set(one)
        if entry.metric and split == "test":
            masks = tasks.Masks(truth_mask, lambda record, box, points: truth_mask(record)) if entry.masks else None
            scored = tasks.score(slot, found, [tasks.target(slot, r, "explicit") for r in found], masks=masks)
            assert scored["primary"] == 1 and scored["n_unparsable"] == 0
            assert {name: found[0][name] for name in tested} == tested
    if record is not None:
        first = json.loads((tmp_path / f"data/AVUIE_2/{slot}/train.json").read_text())[0]
        text = first.pop(entry.answer_field)
        assert first == record
        assert text.startswith(answer) and (entry.masks or text == answer)
        assert next(raw_records(slot, root, "train")) == {**record, entry.answer_field: text}
    assert json.loads((tmp_path / f"data/AVUIE_2/{slot}/conversion.json").read_text()) == report


def truth_mask(record):
    try:
        return media.read_mask(record["mask"])
    except media.MediaError:
        assert record["split"] == "test_n"  # alone has no mask
        return np.zeros((224, 224), bool)


def left(report, split):
    return {reason: len(where) for reason, where in report["splits"][split]["left_out"].items()}


@pytest.mark.parametrize("slot, split, counts", [
    ("avvp", "train", {"labels without modality and times": 1}),
    ("avqa", "train", {"deleted by the set's authors": 1}),
    ("ucf", "train", {"no sound": 1}),
    ("ave", "train", {}),
])
def test_what_is_left_out_is_counted(put, tmp_path, slot, split, counts):
    assert left(convert(slot, put(FORMATS[slot][0]), tmp_path / "data", progress=False), split) == counts


def test_points_lie_on_the_mask_and_every_frame_has_its_own_second(put, tmp_path):
    root = put(AVS)
    (root / "v1m/tri_0_5000/labels_rgb/2.png").unlink()
    media.write_mask(root / "v1m/tri_0_5000/labels_rgb/3.png", np.zeros((224, 224), bool))
    report = convert("ms3", root, tmp_path / "data", progress=False)
    assert left(report, "train") == {"no mask file": 1, "nothing is marked in the frame": 1}
    found = records.read(tmp_path / "data", "ms3", "train")
    assert [r["media"][1].second for r in found] == [0, 1, 4]
    for one in found:
        box, points = tasks.truth("ms3", one)
        assert box == (32, 16 * one["frame_idx"], 96, 16 * one["frame_idx"] + 64)
        assert all(media.read_mask(one["mask"])[y, x] for x, y in points) and len(set(points)) == 3


@pytest.mark.parametrize("slot", ["s4", "arig"])
@pytest.mark.parametrize("folder", ["", "s4_data/"])
def test_the_older_release_of_avsbench_is_read_by_its_categories(put, tmp_path, slot, folder):
    """Folders by kind, split and category, pictures as png, numbered from 1; the set's own code goes by the columns' places."""
    older = {"s4_meta_data.csv": "name,start,category,split\none,20,dog_barking,train\ntwo,0,cat_meowing,test\nold,0,dog_barking,val\n"}
    for split, category, name, count in (("train", "dog_barking", "one", 1), ("test", "cat_meowing", "two", 5)):
        older[f"{folder}audio_wav/{split}/{category}/{name}.wav"] = "ten.wav"
        for frame in range(1, 6):
            older[f"{folder}visual_frames/{split}/{category}/{name}/{name}_{frame}.png"] = square(0, 0)
        for frame in range(1, count + 1):
            older[f"{folder}gt_masks/{split}/{category}/{name}/{name}_{frame}.png"] = square(16 * frame, 32)
    root = put(older)
    convert(slot, root, tmp_path / "data", progress=False)
    train, test = (records.read(tmp_path / "data", slot, split) for split in ("train", "test"))
    assert [(r["image_path"], r["a_obj"], r["media"][1].second) for r in train] == [("AVS/v1s/one/frames/0.png", "dog_barking", 0)]
    assert [r["visual_path"] for r in test] == [f"AVS/v1s/two/frames/{frame}.png" for frame in range(5)]
    for frame, one in enumerate(test):
        assert np.argwhere(media.read_mask(one["mask"])).min(0).tolist() == [16 * (frame + 1), 32] if slot == "s4" else True
        truth = tasks.truth(slot, one)
        assert (truth if slot == "arig" else truth.box) == (32, 16 * (frame + 1), 96, 16 * (frame + 1) + 64)
        assert len(records.load(one, 1)) == 2
    (root / "s4_meta_data.csv").write_text("name,start,category,split\none,20,../dog,train\n")
    with pytest.raises(SourceError, match="line 2, frame 0, field 'category': '../dog' is no file name"):
        list(raw_records(slot, root, "train"))
    (root / "s4_meta_data.csv").write_text("name,start,category,split\none,20,dog,dev\n")
    with pytest.raises(SourceError, match="line 2: split 'dev' must be train, val or test"):
        list(raw_records(slot, root, "train"))


def test_a_music_question_is_filled_in_order(put):
    second = list(raw_records("avqa", put(FORMATS["avqa"][0]), "train"))[1]
    assert second["question"] == "Is the left instrument louder than the right one?"
    assert second["label"] == "to answer , i listen : it is a question of kind comparative . <answer>no</answer>"


def test_dense_labels_of_llp_training_clips_are_taken_where_there_are_some(put):
    root = put({**FORMATS["avvp"][0], **clips("video", "zzzzzzzzzz0"),
                "AVVP_train_audio.csv": "filename\tonset\toffset\tevent_labels\nzzzzzzzzzz0_30_40\t1\t3\tDog\n",
                "AVVP_train_visual.csv": "filename\tonset\toffset\tevent_labels\n"})
    found = list(raw_records("avvp", root, "train"))
    assert [r["vid"] for r in found] == ["zzzzzzzzzz0", "-aaaaaaaaa1"]
    assert found[0]["label_content"].startswith("i hear Dog from 1 to 3 . none of the events is seen . <audio>Dog,(1 3)</audio>")


def test_an_event_of_no_length_of_llp_is_left_out_and_its_clip_kept(put, tmp_path):
    root = put(FORMATS["avvp"][0])
    with (root / "AVVP_eval_audio.csv").open("a") as file:
        file.write("bbbbbbbbb_2_30_40\t3\t3\tCello\n")
    report = convert("avvp", root, tmp_path / "data", progress=False)
    assert left(report, "test") == {"an event of no length": 1} and report["splits"]["test"]["records"] == 1


def test_cremads_split_is_by_actor_or_by_its_lists(put):
    root = put(FORMATS["cremad"][0])
    assert [r["video_path"][:4] for r in raw_records("cremad", root, "test")] == ["1010"]
    put({"train.csv": "1010_IEO_HAP_HI,HAP\n", "test.csv": "1001_DFA_ANG_XX,ANG\n"})
    found = list(raw_records("cremad", root, "train"))
    said = "i hear \" it's eleven o'clock \" . face and voice act happy at a high level . <answer>happy</answer>"
    assert [r["label"] for r in found] == [said]


def test_a_null_reference_has_no_mask_and_an_unmarked_training_frame_is_not_there(put, tmp_path):
    root = put(REF)
    media.write_mask(root / "gt_mask/v1_0_10000/fid_1/00000.png", np.zeros((224, 224), bool))
    convert("ref_avs", root, tmp_path / "data", progress=False)
    train = records.read(tmp_path / "data", "ref_avs", "train")
    assert [r["output"] for r in train] == ["what is described is not seen here . <answer>false</answer>"]
    test = records.read(tmp_path / "data", "ref_avs", "test")
    assert [(r["split"], r["frame_idx"], truth_mask(r).any()) for r in test] == [
        ("test_s", 0, True), ("test_s", 1, True), ("test_u", 0, True), ("test_u", 1, True), ("test_n", 0, False), ("test_n", 1, False)]


def test_a_clip_of_ref_avs_lies_where_its_uid_says(put):
    """The set's own loader takes the folder from `uid`, whatever stands in `vid`."""
    root = put(REF | {"metadata.csv": REF["metadata.csv"].replace("\nv1_0_10000,", "\n17,").replace("\nv2_0_10000,", "\n18,")})
    assert list(raw_records("ref_avs", root, "train")) == list(raw_records("ref_avs", put(REF), "train"))
    put({"metadata.csv": REF["metadata.csv"].replace("\nv2_0_10000,", "\n18,")})
    assert [r["vid"] for r in raw_records("ref_avs", root, "test")] == ["v2_0_10000"] * 6


def pairs(root, slot, **options):
    return list(raw_records(slot, root, "train", **options))


def test_pairs_are_of_different_classes_balanced_and_seeded(put):
    names = [f"{i:011d}" for i in range(12)]
    kinds = ["Bark"] * 5 + ["Horse"] * 3 + ["Flute"] * 2 + ["Bus", "Bus"]
    rows = "".join(f"{kind}&{name}&good&0&10\n" for kind, name in zip(kinds, names, strict=True))
    rows += f"Goat&{names[0]}&good&0&3\n"  # a clip with two labels
    root = put({"Annotations.txt": rows, "trainSet.txt": rows, **clips("AVE", *names)})
    event = dict(zip(names, kinds, strict=True))
    for slot, side, asked, right in (("a2v", "video", "audio", "correct_video"), ("v2a", "audio", "video", "correct_audio")):
        found = pairs(root, slot)
        used = [name[:11] for r in found[::2] for name in (r[f"{side}1_path"], r[f"{side}2_path"])]
        assert len(used) == len(set(used)) and names[0] not in used
        for k, r in enumerate(found):
            assert r[right] == k % 2 + 1 and r[f"{side}1_event"] != r[f"{side}2_event"]
            assert r[f"{asked}_path"][:11] == r[f"{side}{r[right]}_path"][:11]
            assert all(event[r[f"{side}{n}_path"][:11]] == r[f"{side}{n}_event"] for n in (1, 2))
            assert r[f"{asked}_event"] == r[f"{side}{r[right]}_event"]
        assert found == pairs(root, slot) != pairs(root, slot, seed=1)
    first = pairs(root, "a2v")[0]
    assert first["label"] == (f"i hear : {first['video1_event']} . video one shows : {first['video1_event']} . "
                              f"video two shows : {first['video2_event']} . <answer>one</answer>")


def test_many_at_once(put, tmp_path):
    root = put(AVE | FORMATS["avqa"][0])
    reports = convert_all({"ave": root, "avqa": root}, tmp_path / "data", progress=False)
    found = {(slot, split): (part["records"], part["files"], {reason: len(where) for reason, where in part["left_out"].items()})
             for slot, report in reports.items() for split, part in report["splits"].items()}
    assert found == {("ave", "train"): (2, 4, {}), ("ave", "test"): (2, 4, {}),
                     ("avqa", "train"): (2, 2, {"deleted by the set's authors": 1}), ("avqa", "test"): (1, 2, {})}


@pytest.mark.parametrize("link", ["hardlink", "symlink", "copy"])
def test_media_are_placed_as_asked_and_never_encoded_anew(put, tmp_path, link):
    root, out = put(AVE), tmp_path / "data"
    made = []
    for _ in range(2):
        convert("ave", root, out, link=link, progress=False)
        source, target = root / "AVE/RUhOCu3LNXM.mp4", out / "AVUIE_2/ave/video/RUhOCu3LNXM.mp4"
        assert target.read_bytes() == source.read_bytes()
        assert target.is_symlink() == (link == "symlink")
        assert (target.stat().st_ino == source.stat().st_ino) == (link != "copy")
        sound = out / "AVUIE_2/ave/audio/RUhOCu3LNXM.wav"
        made.append(sound.stat().st_mtime_ns)
    assert made[0] == made[1]  # not extracted anew
    assert not list(out.rglob("*.partial*"))
    np.testing.assert_allclose(media.read_audio(sound)[4000:12000], np.sin(np.arange(4000, 12000) / 5) / 2, atol=0.05)


def test_every_slot_whose_annotations_are_public_has_a_converter():
    assert set(SOURCES) == set(FORMATS) == set(tasks.SLOTS) - {"mer24", "mafw", "dfew", "avcap"}
