"""Questions about clips of your own: which files are seen and heard, what the answer says, and the picture of it."""

from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from peft import get_peft_model

from crab import tasks
from crab.analyses import ask, clips
from crab.data import media, records
from crab.data.media import MediaError
from crab.ilora import ILoraConfig, ILoraLayer
from crab.models import omni
from crab.models.batches import SEGMENTS, batch, encoded
from crab.models.checkpoint import load_base
from crab.pipeline import params
from crab.samples.inputs import prompt_of
from crab.world.generate import build

NOTEBOOK = Path(__file__).parents[2] / "notebooks/ask.ipynb"
HEADS = 3
AT_0_2 = "<event>a</event> <range>0,2</range>"


def write_clip(path, seconds=2, sound=True):
    """A clip of H.264 and AAC in one mp4, with eight frames per second."""
    pictures = path.with_suffix(".pictures.mp4")
    media.write_video(pictures, (np.full((48, 64, 3), 20 * (i % 8), np.uint8) for i in range(8 * seconds)), 8)
    wave = 0.5 * np.sin(0.2 * np.arange(media.RATE * seconds)) if sound else None
    clips.write_clip(path, pictures, wave, 48, 20)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "clip.mp4")
    write_clip(folder / "other.mp4")
    write_clip(folder / "silent.mp4", sound=False)
    write_clip(folder / "long.mp4", seconds=12)
    media.write_audio(folder / "tone.wav", np.sin(np.arange(32_000)) / 2)
    media.write_audio(folder / "tone2.wav", np.sin(np.arange(16_000)) / 2)
    media.write_image(folder / "picture.png", np.full((48, 64, 3), 99, np.uint8))
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:900])
    (folder / "broken.wav").write_bytes(b"RIFFsomething")
    (folder / "note.txt").write_text("hello", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A folder with an I-LoRA adapter whose heads differ."""
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 4, "num_heads": HEADS, "router_init_std": 0.5}
    model = get_peft_model(load_base(base)[0], ILoraConfig(target_modules=omni.LANGUAGE_TARGETS, **options))
    folder = tmp_path_factory.mktemp("models") / "adapters/heads"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(base, adapter):
    return ask.load(SimpleNamespace(base=base, adapters=adapter.parent), adapter="heads")


@pytest.fixture
def says(monkeypatch):
    """Makes the model answer with a text."""
    return lambda text: monkeypatch.setattr(ask, "answer", lambda *_: [text])


# ---------------------------------------------------------------- the clip


@pytest.mark.parametrize(
    ("slot", "paths", "second", "expected"),
    [
        ("ave", "clip.mp4", None, "video clip.mp4, audio clip.mp4"),
        ("ave", ["silent.mp4", "tone.wav"], 1, "video silent.mp4, audio tone.wav"),
        ("s4", ["picture.png", "tone.wav"], None, "image picture.png, audio tone.wav"),
        ("s4", ["picture.png", "tone.wav"], 1, "image picture.png, audio tone.wav at 1"),
        ("a2v", ["tone.wav", "clip.mp4", "other.mp4"], None, "audio tone.wav, video clip.mp4, video other.mp4"),
        ("v2a", ["clip.mp4", "tone.wav", "tone2.wav"], None, "video clip.mp4, audio tone.wav, audio tone2.wav"),
        (None, ["clip.mp4"], None, "video clip.mp4, audio clip.mp4"),
        (None, ["silent.mp4"], None, "video silent.mp4"),
        (None, ["clip.mp4", "other.mp4"], None, "video clip.mp4, audio clip.mp4, video other.mp4, audio other.mp4"),
        (None, ["tone.wav", "clip.mp4"], None, "audio tone.wav, video clip.mp4"),
        (None, ["picture.png", "tone.wav"], 0, "image picture.png, audio tone.wav at 0"),
        (None, "tone.wav", 1, "audio tone.wav"),
    ],
)
def test_files_become_the_media_of_a_prompt(files, slot, paths, second, expected):
    paths = str(files / paths) if isinstance(paths, str) else [files / path for path in paths]
    items = ask.own(paths, slot, second)["media"]
    names = [f"{i.kind} {Path(i.path).name}" + (f" at {i.second}" if i.second is not None else "") for i in items]
    assert ", ".join(names) == expected


@pytest.mark.parametrize(
    ("slot", "paths", "error", "message"),
    [
        ("ave", ["broken.mp4"], MediaError, "broken.mp4: .*truncated"),
        ("ave", ["tone.wav"], MediaError, "tone.wav: has no video stream"),
        ("ave", ["silent.mp4"], MediaError, "silent.mp4: has no sound stream; give a file with sound"),
        ("ave", ["gone.mp4"], MediaError, "gone.mp4: does not exist"),
        ("s4", ["clip.mp4", "tone.wav"], MediaError, "clip.mp4: cannot be decoded as an image"),
        (None, ["broken.mp4"], MediaError, "broken.mp4: .*truncated"),
        (None, ["broken.wav"], MediaError, "broken.wav: cannot be decoded as sound"),
        (None, ["note.txt"], MediaError, "note.txt: cannot be decoded as (a )?video"),
        (None, ["gone.png"], MediaError, "gone.png: does not exist"),
        ("s4", ["picture.png"], ValueError, "1 files; slot s4 takes image, audio, in this order$"),
        ("ave", ["clip.mp4"] * 3, ValueError, "3 files; slot ave takes video, audio, .*, or one video with sound"),
        ("avee", ["clip.mp4"], ValueError, "did you mean 'ave'"),
    ],
)
def test_bad_files_are_told_in_the_words_of_the_reader(files, slot, paths, error, message):
    with pytest.raises(error, match=message):
        ask.own([files / path for path in paths], slot)


def test_generated_clips_come_from_the_data_or_are_rendered_unlike_any_that_was_trained_on(tmp_path):
    root = tmp_path / "data"
    build(root, 0, 2, 3, 2, workers=1, slots=["ave", "avcap"], progress=False)
    assert ask.generated(root, "ave", tmp_path, 2) == records.read(root, "ave", "test")[2]
    assert not (tmp_path / "dataset").exists()
    shown = ask.generated(root, "avcap", tmp_path, 1)  # has training records only
    assert shown["label_content"] not in [row["label_content"] for row in records.read(root, "avcap", "train")]
    assert Path(shown["media"][0].path).is_relative_to(tmp_path / "dataset") and records.load(shown, 1)
    with pytest.raises(ValueError, match="number is 3; slot ave has the test records 0 to 2"):
        ask.generated(root, "ave", tmp_path, 3)


# ---------------------------------------------------------------- the reply


def test_an_adapter_that_is_not_there_is_named_with_those_that_are(base, adapter):
    with pytest.raises(ValueError, match=r"adapter is 'head'; .* adapters \(heads\)"):
        ask.load(SimpleNamespace(base=base, adapters=adapter.parent), adapter="head")


def test_routing_is_the_mean_softmax_of_all_routers_at_each_token(loaded, files):
    model, processor = loaded
    record = ask.own([files / "clip.mp4"], "ks")
    reply = ask.ask(model, processor, record, "ks", question="which action ?", max_new_tokens=4)
    (sample,) = encoded(model, [{"prompt": prompt_of(processor, "ks", record, tasks.Prompt("which action ?"))}])
    inputs = batch(model, processor.tokenizer, [sample], [reply.text])
    gates = []

    def see(layer, args):
        gates.append(torch.softmax(args[0][0] @ layer.ilora_router["default"].weight.T, -1))

    layers = [module for module in model.modules() if isinstance(module, ILoraLayer)]
    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    with torch.no_grad():
        model(**{name: inputs[name] for name in ("inputs_embeds", "attention_mask", "position_ids")})
    for hook in hooks:
        hook.remove()
    table = reply.routing.pivot(index="token", columns="head", values="weight").to_numpy()
    assert np.allclose(table, torch.stack(gates).mean(0).numpy(), atol=1e-5) and np.ptp(table) > 0.1
    config, ids = model.config, inputs["input_ids"][0]
    kinds = {config.video_token_id: "video", config.audio_token_id: "audio"}
    answered = len(processor.tokenizer(reply.text)["input_ids"]) + 1  # with the end token
    expected = [kinds.get(token, "text") for token in ids.tolist()[:-answered]] + ["answer"] * answered
    assert list(reply.routing["segment"][: len(ids)]) == expected and set(expected) == set(SEGMENTS)


def test_words_that_the_base_does_not_know_are_named(loaded, files, says):
    says("i see red")
    reply = ask.ask(*loaded, ask.own(files / "tone.wav"), None, "which zebra , i see a Red zebra ?")
    assert reply.unknown == ["zebra", ",", "a"]  # words are read in lower case


@pytest.mark.parametrize(
    ("text", "slot", "parsed", "chain"),
    [
        ("i hear . <event>bell</event> <range>2,6</range>", "ave", ("bell", 2, 6), "i hear ."),
        (f"{AT_0_2} <event>b</event> <range>1,2</range>", "unav", (("a", 0, 2), ("b", 1, 2)), ""),
        ("<visual>bell,(2 8)</visual>", "avvp", (("visual", "bell", 2, 8),), ""),
        ("there <obj>(16,24)(80,88)</obj>", "arig", (16, 24, 80, 88), "there"),
        ("[16,24,80,88] [40,48] [48,56] [56,64]", "s4", ((16, 24, 80, 88), ((40, 48), (48, 56), (56, 64))), ""),
        ("i see two . <answer>two</answer>", "avqa", "two", "i see two ."),
        ("two bells", "avcap", "two bells", ""),
        ("", "avcap", None, ""),
    ],
)  # fmt: skip
def test_a_free_answer_is_read_by_the_grammar_that_fits(loaded, files, says, text, slot, parsed, chain):
    says(text)
    reply = ask.ask(*loaded, ask.own(files / "clip.mp4"), None, "which ?", frames=4)
    assert (reply.slot.name, reply.parsed, reply.chain, reply.text) == (slot, parsed, chain, text)
    figure = ask.draw(reply)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(figure.axes) == 4 + 1 + HEADS and titles[:4] == ["0.2 s", "0.8 s", "1.2 s", "1.8 s"]
    plt.close(figure)


@pytest.mark.parametrize(
    ("slot", "question", "message"),
    [
        ("ref_avs", None, "no field 'description or object' to ask about; set it in `fields`"),
        (None, None, "question and slot are both empty"),
    ],
)
def test_a_question_that_is_missing_is_told(loaded, files, slot, question, message):
    with pytest.raises(ValueError, match=message):
        ask.ask(*loaded, ask.own([files / "picture.png", files / "tone.wav"]), slot, question)


@pytest.mark.parametrize("slot", ["ks", None])
def test_a_clip_longer_than_the_base_hears_is_refused(loaded, files, slot):
    with pytest.raises(ValueError, match="long.mp4, a sound of a record, lasts 12.0 s, of which this base hears 10 s"):
        ask.ask(*loaded, ask.own(files / "long.mp4", slot), slot, "which ?")


# ---------------------------------------------------------------- the picture


def test_boxes_masks_and_seconds_are_drawn_where_the_answer_says(loaded, files, says):
    says("i see . [56,64,120,128] [80,90] [90,100] [100,110]")
    still = ask.ask(*loaded, ask.own([files / "picture.png", files / "tone.wav"], "s4"), "s4", "which ?")
    figure = ask.draw(still)
    plain, drawn = figure.axes[:2]
    (box,) = [patch for patch in drawn.patches if isinstance(patch, Rectangle)]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (55.5, 63.5, 64, 64)
    assert [tuple(map(int, line.get_xydata()[0])) for line in drawn.lines] == [(80, 90), (90, 100), (100, 110)]
    assert not plain.patches and len(drawn.collections) == 1  # the mask
    assert figure.get_suptitle() == "which ?\n[56,64,120,128] [80,90] [90,100] [100,110]"
    says("<event>bell</event> <range>1,2</range>")
    clip = ask.ask(*loaded, ask.own(files / "clip.mp4", "ave"), "ave", "which ?")
    (span,) = ask.draw(clip).axes[4].patches
    assert (span.get_x(), span.get_width()) == (1, 1)
    says("[1,2")
    unread = ask.draw(ask.ask(*loaded, ask.own([files / "picture.png", files / "tone.wav"], "s4"), "s4", "which ?"))
    assert [axes.get_visible() for axes in unread.axes[:2]] == [True, False]
    plt.close("all")


def test_the_notebook_runs_with_any_base_and_adapter_and_its_result_is_the_reply(
    base, adapter, files, tmp_path, monkeypatch
):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    _, values = params.cell(NOTEBOOK, notebook)
    values |= {"base": str(base), "adapter": str(adapter), "media": [str(files / "clip.mp4")], "max_new_tokens": 4}
    values |= {"slot": "avqa", "fields": {"question": "which zebra ?"}}
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "crab").mkdir()
    monkeypatch.chdir(tmp_path)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            exec(compile(cell.source, cell.id, "exec"), values)
    reply = values["reply"]
    assert reply.instruction == "which zebra ?" and reply.unknown == ["zebra"] and reply.slot == tasks.get_slot("avqa")
    assert values["rows"]["true answer"] == "not known"
    assert (tmp_path / "runs/tiny/ask.png").stat().st_size > 10_000
    assert list(values["weights"].index) == list(SEGMENTS) and values["weights"].shape == (4, HEADS)


def test_bad_input_stops_a_notebook_with_its_message_alone():
    """In IPython itself: what a cell shows."""
    from IPython.core.interactiveshell import InteractiveShell

    shell, shown = InteractiveShell.instance(), []
    shell._showtraceback = lambda kind, error, lines: shown.append(lines)
    shell.run_cell(
        "from crab.analyses.ask import message_only, own\nwith message_only():\n    own('gone.mp4', 'ave')\n1 / 0"
    )
    assert shown == [[f"MediaError: gone.mp4: does not exist; {shown[0][0].split('; ')[1]}"]]
    InteractiveShell.clear_instance()
