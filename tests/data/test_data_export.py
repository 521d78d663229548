"""The exported JSONL fits the documented formats of ms-swift and LLaMA-Factory, and says what the records say."""

import json
import re
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from trees import PARTS, spoil

from crab import tasks
from crab.core.files import write_json
from crab.data import export, records

TAGS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}
PROMPTS = {  # the tags before the question; one slot of each kind of media
    "ave": "<video><audio>",
    "ms3": "<image><audio>",
    "a2v": "<audio><video><video>",
    "v2a": "<video><audio><audio>",
}

# ms-swift, "Custom dataset", standard format and multimodal: `messages` is required; `images`, `videos` and `audios`
# are lists of paths. LLaMA-Factory, data/README.md, OpenAI format: user and assistant take turns, in odd and even
# places. Neither takes more than these columns, and an empty list would make a column without a type.
PATHS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
TURNS = [
    {
        "type": "object",
        "required": ["role", "content"],
        "additionalProperties": False,
        "properties": {"role": {"const": role}, "content": {"type": "string", "minLength": 1}},
    }
    for role in ("user", "assistant")
]
LINE = {
    "type": "object",
    "required": ["messages"],
    "additionalProperties": False,
    "properties": {
        "messages": {"type": "array", "prefixItems": TURNS, "items": False, "minItems": 1},
        **dict.fromkeys(TAGS, PATHS),
    },
}
# LLaMA-Factory, data/README.md: the description of a data set in dataset_info.json.
NAMES = {"type": "object", "additionalProperties": {"type": "string"}}
ENTRY = {
    "type": "object",
    "required": ["file_name", "formatting", "columns", "tags"],
    "additionalProperties": False,
    "properties": {
        "file_name": {"type": "string"},
        "formatting": {"const": "sharegpt"},
        "columns": NAMES | {"required": ["messages"], "propertyNames": {"enum": ["messages", *TAGS]}},
        "tags": {"const": {f"{name}_tag": name for name in ("role", "content", "user", "assistant")}},
    },
}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def exported(tree, tmp_path_factory):
    """The whole tree, exported in both forms: folder, and rows of each form."""
    out = tmp_path_factory.mktemp("export")
    options = {"splits": tasks.SPLITS, "progress": False}
    return out, {form: export.export(tree.root, out, form=form, **options) for form in tasks.FORMS}


@pytest.fixture
def small(tree, tmp_path):
    """A copy of three slots, with a manifest, to spoil."""
    for slot in ("ave", "s4", "avvp"):
        shutil.copytree(tree.root / "AVUIE_2" / slot, tmp_path / "tree/AVUIE_2" / slot)
    records.write_manifest(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("form", tasks.FORMS)
@pytest.mark.parametrize("slot, split", PARTS)
def test_every_line_fits_the_documented_schema_and_says_what_the_record_says(tree, exported, slot, split, form):
    out, rows = exported
    row = next(row for row in rows[form] if (row["slot"], row["split"]) == (slot, split))
    lines, truths = lines_of(out / row["file"]), records.read(tree.root, slot, split)
    assert row["expected"] == row["written"] == row["answered"] == len(lines) == len(truths) > 0
    for line, record in zip(lines, truths, strict=True):
        jsonschema.validate(line, LINE)
        text = "".join(turn["content"] for turn in line["messages"])  # both programs look for tags in every turn
        for column, tag in TAGS.items():
            assert text.count(tag) == len(line.get(column, []))
        paths = [Path(path) for column in TAGS for path in line.get(column, [])]
        assert all(path.is_absolute() and path.is_file() for path in paths)
        question, answer = (turn["content"] for turn in line["messages"])
        tags, question = re.fullmatch(r"((?:<\w+>)*)(.*)", question, re.DOTALL).groups()
        assert question == tasks.instruction(slot, record)
        assert tags == "".join(f"<{item.kind}>" for item in record["media"])
        assert tags == PROMPTS.get(slot, tags)
        for column, tag in TAGS.items():  # in the order of the tags; a part of a sound has a file of its own
            whole = [item.path for item in record["media"] if f"<{item.kind}>" == tag and item.second is None]
            assert not whole or line[column] == whole
        answer = export.unescape(answer)
        if split == "train":
            assert answer == tasks.target(slot, record, form)
        else:
            assert answer == tasks.answer(slot, tasks.truth(slot, record))
        assert tasks.agree(slot, tasks.parse(slot, answer), tasks.truth(slot, record))


def test_a_heard_event_is_not_taken_for_a_sound(exported):
    contents = [line["messages"][1]["content"] for line in lines_of(exported[0] / "avuie_avvp_train_bare.jsonl")]
    assert any("<Audio>" in text and "</Audio>" in text for text in contents)


def test_the_sound_of_a_picture_is_the_second_around_it(small, tmp_path):
    spoil(small, "s4", lambda rows: {row.update(frame_idx=second) for second, row in enumerate(rows)}, "test")
    truths = records.read(small, "s4", "test")
    waves = [np.random.default_rng(seed).uniform(-0.9, 0.9, 3 * 16000) for seed in range(3)]
    for record, wave in zip(truths, waves, strict=True):
        soundfile.write(record["media"][1].path, wave, 16000)
    export.export(small, tmp_path / "out", ["s4"], ["test"], progress=False)
    for second, line in enumerate(lines_of(tmp_path / "out/avuie_s4_test_bare.jsonl")):
        assert line["audios"] == [str(tmp_path / f"out/avuie_s4_test_sounds/{second:06d}.wav")]
        part, rate = soundfile.read(line["audios"][0])
        assert (rate, len(part)) == (16000, 16000)
        assert abs(part - waves[second][second * rate : (second + 1) * rate]).max() < 2 / 32768


def test_dataset_info_names_existing_files_and_their_columns(exported):
    out, rows = exported
    info = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))
    assert {entry["file_name"] for entry in info.values()} == {row["file"] for form in rows.values() for row in form}
    for name, entry in info.items():
        jsonschema.validate(entry, ENTRY)
        assert (out / entry["file_name"]).is_file() and entry["file_name"] == f"{name}.jsonl"
        for line in lines_of(out / entry["file_name"]):
            assert set(entry["columns"].values()) == set(line)


def test_a_test_record_whose_truth_is_a_mask_has_no_answer(small, tmp_path):
    spoil(small, "s4", lambda rows: {row.pop("label_content", None) for row in rows}, "test")
    (tmp_path / "out").mkdir()
    others = {"identity": {"file_name": "identity.json"}, "avuie_s4_test_bare": {"file_name": "stale.jsonl"}}
    (tmp_path / "out/dataset_info.json").write_text(json.dumps(others), encoding="utf-8")
    rows = export.export(small, tmp_path / "out", ["s4", "ave"], ["test"], "explicit", progress=False)
    assert [(row["slot"], row["expected"], row["written"], row["answered"]) for row in rows] == [
        ("s4", 3, 3, 0), ("ave", 3, 3, 3),
    ]  # fmt: skip
    for line in lines_of(tmp_path / "out/avuie_s4_test_bare.jsonl"):
        jsonschema.validate(line, LINE)
        assert [turn["role"] for turn in line["messages"]] == ["user"]
    info = json.loads((tmp_path / "out/dataset_info.json").read_text(encoding="utf-8"))
    assert sorted(info) == ["avuie_ave_test_bare", "identity"]


def test_relative_paths_move_with_the_folders(small, tmp_path):
    export.export(small, tmp_path / "out/a", ["s4", "ave"], relative=True, progress=False)
    shutil.move(tmp_path / "tree", tmp_path / "moved/tree")
    shutil.move(tmp_path / "out", tmp_path / "moved/out")
    out = tmp_path / "moved/out/a"
    paths = [path for file in out.glob("*.jsonl") for line in lines_of(file) for c in TAGS for path in line.get(c, [])]
    assert len(paths) == 16 and all(not Path(path).is_absolute() and (out / path).is_file() for path in paths)


def test_a_second_export_writes_the_same_bytes(small, tmp_path):
    def content() -> dict:
        export.export(small, tmp_path / "out", progress=False)
        return {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    first = content()
    assert content() == first and len(first) == 3 + 4 + 1  # lists, sounds of s4, dataset_info.json


PIECES = st.sampled_from([*"<audio> </audio> <video> <image> <bbox> <visual> <answer> a < >".split(), " "])


@given(st.lists(PIECES).map("".join))
def test_escape_leaves_no_tag_of_media_and_can_be_taken_back(text):
    assert not re.search("<(image|video|audio|bbox|ref-object)>", export.escape(text))
    assert export.unescape(export.escape(text)) == text


SPOILED = {
    "nothing": lambda root: None,
    "no answer": lambda root: spoil(root, "ave", lambda rows: rows[2].update(label_content="a dog barks")),
    "fewer": lambda root: spoil(root, "ave", lambda rows: rows[:-1]),
    "no clip": lambda root: next((root / "AVUIE_2/ave/video").glob("train_*")).unlink(),
    "no sound": lambda root: next((root / "AVUIE_2/s4").rglob("train_*/audio.wav")).write_bytes(b""),
    "all": lambda root: shutil.rmtree(root / "AVUIE_2"),
    "info": lambda root: write_json(root.parent / "out/dataset_info.json", [1]),
}


@pytest.mark.parametrize(
    "what, options, message",
    [
        ("nothing", ["--slots", "avee"], "unknown slot 'avee'; did you mean 'ave'?"),
        ("nothing", ["--slots", "unav", "--split", "test"], "slot unav has no split 'test'; choose one of train"),
        ("nothing", ["--slots", "ave", "ks"], "AVUIE_2/ks/train.json: no such list of records; give the root that"),
        ("all", [], "AVUIE_2/ave/train.json: no such list of records; give the root that the build stage wrote"),
        ("fewer", [], "AVUIE_2/ave/train.json: has 3 records, the manifest says 4; run the build stage again"),
        ("no answer", [], "record 2: field 'label_content' holds no answer that can be read: 'a dog barks'"),
        ("no clip", [], "mp4: does not exist; put it there, or run the build stage again"),
        ("no sound", ["--slots", "s4"], "audio.wav: is empty (0 bytes); copy or build it again"),
        ("info", [], "dataset_info.json: is not a JSON object of data sets; correct it, or export to another folder"),
    ],
)
def test_errors_are_one_line_with_the_fix_and_leave_no_half_file(small, tmp_path, what, options, message):
    SPOILED[what](small)
    with pytest.raises(SystemExit) as stop:
        export.main([str(small), str(tmp_path / "out"), *options])
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code
    assert not list((tmp_path / "out").rglob("*.jsonl")) and not list((tmp_path / "out").rglob(".*"))


def test_the_command_says_what_it_wrote(small, tmp_path, capsys):
    options = "--slots avvp --split train test --form explicit"
    export.main([str(small), str(tmp_path / "out"), *options.split()])
    assert capsys.readouterr().out.splitlines() == [
        "avuie_avvp_train_explicit.jsonl: 4 of 4 records, 4 with an answer",
        "avuie_avvp_test_bare.jsonl: 3 of 3 records, 3 with an answer",
    ]
