"""What the base is taught must be true of the scene, and packing must not change what a prompt sees."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crab.world import verify
from crab.world.scene import FACE, QUADRANTS, SECONDS, Scene, Thing, sample_scene
from crab.models.base import train as base, curriculum, packing, perception, probes
from crab.models import omni
from crab.models.base.bank import Bank

BELL = Thing("bell", "red", "still", (56, 56), (24, 32), (2, 8), (3, 5))
DRUM = Thing("drum", "blue", "swaying", (168, 56), (32, 24), (0, 10), None)
FLUTE = Thing("flute", "green", "still", (56, 168), (24, 24), None, (6, 9))
SCENE = Scene(0, 0, (BELL, DRUM, FLUTE))
HORN = Thing("horn", "red", "still", (56, 168), (24, 24), (0, 10), (1, 4))
OTHER = Scene(1, 0, (HORN,))


def test_probes_of_a_scene_worked_by_hand():
    said = {}
    for seed in range(200):
        for p in probes.clip_probes(SCENE, np.random.default_rng(seed)):
            assert said.setdefault(p.question, p.answer) == p.answer
    expected = {
        "is the bell visible ?": "yes", "is the flute visible ?": "no", "is the flute heard ?": "yes", "is the drum heard ?": "no",
        "what colour is the bell ?": "red", "how does the drum move ?": "swaying", "where is the bell ?": "top left",
        "when is the bell visible ?": "from 2 to 8", "is the bell visible at 1 ?": "no", "is the bell visible at 2 ?": "yes", "when is the flute heard ?": "from 6 to 9",
        "box of the bell at 4 ?": "32 24 80 88", "box of the drum at 0 ?": "128 32 192 80", "box of the drum at 1 ?": "144 32 208 80",
        "what is at top right ?": "drum", "what is at bottom left ?": "nothing", "what is heard at 4 ?": "bell",
        "what is heard at 5 ?": "nothing", "which visible thing is heard ?": "bell", "where is the thing that is heard ?": "top left",
        "how many things are visible ?": "two", "how many things are heard ?": "two", "which is heard first ?": "bell",
    }  # fmt: skip
    assert {q: said.get(q) for q in expected} == expected
    assert "box of the bell at 1 ?" not in said  # not visible then


def test_picker_is_the_share_of_things_that_fit():
    (probe,) = [p for p in probes.clip_probes(SCENE, np.random.default_rng(0)) if p.skill == "which sounds"]
    assert sorted(probe.picked) == ["bell", "drum"]


def test_all_probe_words_are_in_the_vocabulary(processor):
    rng = np.random.default_rng(0)
    for i in range(300):
        scene = sample_scene(i)
        second = int(rng.integers(SECONDS))
        asked = [*probes.clip_probes(scene, rng), *probes.still_probes(scene, second, rng)]
        asked += [*probes.clip_told(scene, rng), *probes.still_told(scene, second, rng)]
        asked += [p for what in ("video", "sound") for p in probes.pair_told(scene, SCENE, what, rng)]
        read = [probes.reading(scene, rng), *(probes.pair_reading(scene, SCENE, "first", what, rng) for what in ("video", "sound"))]
        asked += [p for _, of_text in read for p in of_text]
        for text in (*(text for text, _ in read), *(t for p in asked for t in (p.question, p.answer))):
            assert omni.UNKNOWN not in processor.tokenizer.tokenize(text), text


def test_a_scene_told_in_sentences_worked_by_hand():
    rng = np.random.default_rng(0)
    told = {p.skill: p.answer for p in probes.clip_told(SCENE, rng)}
    assert told == {
        "caption": "two seen and two heard . i see a red bell still at top left from 2 to 8 . i see a blue drum swaying at top right from 0 to 10 . "
                   "i hear a bell from 3 to 5 . i hear a flute from 6 to 9 .",
        "sights told": "i see a red bell at top left and a blue drum at top right .",
        "sounds told": "i hear a bell and a flute .",
        "sources told": "the red bell sounds . the blue drum is silent .",
    }  # fmt: skip
    assert {p.skill: p.answer for p in probes.still_told(SCENE, 1, rng)} == {
        "sights told": "i see a blue drum at top right .", "sounds told": "i hear nothing .", "sources told": "the blue drum is silent .",
        "boxes told": "the blue drum is at 144 32 208 80 .",
    }  # fmt: skip
    (sights,), (sounds,) = (probes.pair_told(SCENE, OTHER, what, rng) for what in ("video", "sound"))
    assert sights.answer == "video one shows a red bell at top left . video one shows a blue drum at top right . video two shows a red horn at bottom left ."
    assert sounds.answer == "sound one is a bell . sound one is a flute . sound two is a horn ."


@pytest.mark.parametrize("number", range(40))
def test_what_is_told_of_a_scene_is_true_of_it(number):
    rng = np.random.default_rng(number)
    scene, other = sample_scene(number), sample_scene(number + 1)
    second = int(rng.integers(SECONDS))
    now = verify.moment(scene, second)
    shown = [(probes.clip_told(scene, rng), verify.Evidence((scene,), (scene,))), (probes.still_told(scene, second, rng), verify.Evidence((now,), (now,)))]
    shown += [(probes.pair_told(scene, other, what, rng), verify.Evidence((scene, other), (scene, other))) for what in ("video", "sound")]
    verdicts = [v for told, evidence in shown for p in told if p.skill != "boxes told" for v in verify.verify(p.answer, evidence)]
    assert verdicts and {v.verdict for v in verdicts} == {verify.TRUE}, verdicts


#: Question -> its answer, and what must stand in the sentences for it to be told.
READ = {
    "what colour is the bell ?": ("red", ["a red bell"]), "how does the drum move ?": ("swaying", ["a blue drum swaying at"]),
    "where is the bell ?": ("top left", ["at top left"]), "when is the bell visible ?": ("from 2 to 8", ["at top left from 2 to 8"]),
    "when is the flute heard ?": ("from 6 to 9", ["a flute from 6 to 9"]), "which is heard first ?": ("bell", ["a bell from 3 to 5", "a flute from 6 to 9"]),
    "which visible thing is heard ?": ("bell", ["a red bell", "a bell"]), "how many things are visible ?": ("two", ["a red bell", "a blue drum"]),
    "is the flute visible ?": ("no", []), "is the flute heard ?": ("yes", ["a flute"]), "what is at bottom left ?": ("nothing", []),
}  # fmt: skip


def test_what_is_read_of_a_scene_worked_by_hand():
    said = {}
    for seed in range(300):
        text, asked = probes.reading(SCENE, np.random.default_rng(seed))
        for p in asked:
            assert p.skill == "read" and "box" not in p.question
            said.setdefault(p.question, set()).add(p.answer)
            assert all(words in text for words in READ.get(p.question, (None, []))[1]), (p.question, text)
    assert {question: said.get(question) for question in READ} == {question: {answer} for question, (answer, _) in READ.items()}


def test_what_is_read_of_a_pair_worked_by_hand():
    seen = "video one shows a red bell at top left . video one shows a blue drum at top right . video two shows a red horn at bottom left ."
    heard = "sound one is a bell . sound one is a flute . sound two is a horn ."
    for which, what, expected in (
        ("first", "video", f"i hear a bell and a flute . {seen}"), ("second", "video", f"i hear a horn . {seen}"),
        ("first", "sound", f"i see a red bell at top left and a blue drum at top right . {heard}"),
    ):  # fmt: skip
        text, asked = probes.pair_reading(SCENE, OTHER, which, what, np.random.default_rng(0))
        assert text == expected
        assert asked[0].answer == which
        assert {p.answer for p in asked[1:] if "horn" in p.question} <= {"second"}


@pytest.mark.parametrize("number", range(40))
def test_what_is_read_is_true_and_holds_its_answer(number):
    rng = np.random.default_rng(number)
    scene = sample_scene(number)
    text, asked = probes.reading(scene, rng)
    assert asked and {v.verdict for v in verify.verify(text, verify.Evidence((scene,), (scene,)))} == {verify.TRUE}
    for p in asked:
        assert p.answer in ("yes", "no", "nothing", "never", FACE, *probes.NUMBER_WORDS) or p.answer in text, p


def test_a_box_around_two_things_worked_by_hand():
    boxes = {p.answer for seed in range(20) for p in probes.still_probes(SCENE, 4, np.random.default_rng(seed)) if p.skill == "still box both"}
    assert boxes == {"32 24 192 88"}  # of 32 24 80 88 and 128 32 192 80
    assert not [p for p in probes.still_probes(SCENE, 1, np.random.default_rng(0)) if p.skill == "still box both"]  # one is seen


def test_times_are_asked_of_two_things_side_by_side():
    """Of one alone, a base learns when something comes and goes, not whose time it is."""
    for seed in range(20):
        asked = probes.clip_probes(SCENE, np.random.default_rng(seed))
        for skill, answers in (("time seen", {"from 2 to 8", "from 0 to 10"}), ("time heard", {"from 3 to 5", "from 6 to 9"})):
            assert {p.answer for p in asked if p.skill == skill} == answers


def test_of_three_stills_that_with_most_sources_is_asked_about(bank):
    bank = copy.copy(bank)
    bank.sources = np.array([0, 0, 0, 0, 0, 3])
    sampler = curriculum.Sampler(bank, [], np.random.default_rng(0))
    drawn = [sampler._still().media[0][1] for _ in range(600)]
    assert 215 < drawn.count(5) < 290  # 91 / 216 of 600 are 253; of two it would be 183


def test_dense_targets_of_a_pair_of_seconds():
    target = perception.visual_targets(SCENE, 1)  # seconds 1 and 2: the bell appears in the second of them
    names = [perception.NAMES[i] for i in target["name"]]
    assert dict(zip(QUADRANTS, names)) == {
        "top left": "bell", "top right": "drum", "bottom left": "nothing", "bottom right": "nothing",
    }  # fmt: skip
    assert target["present"].tolist() == [[0, 1], [1, 1], [0, 0], [0, 0]]
    assert (target["box"][0, 0] == omni.IGNORE).all() and (target["box"][0, 1] * 8).tolist() == [32, 24, 80, 88]
    heard = perception.audio_targets(SCENE, 20)["present"]
    assert heard[:, perception.NAMES.index("bell")].nonzero()[0].tolist() == [6, 7, 8, 9]
    assert heard.sum() == 4 + 6


@pytest.fixture(scope="module")
def bank(model, processor):
    return Bank(model, processor, [sample_scene(i) for i in range(6)], seed=0)


@pytest.mark.parametrize("text", ["", "i hear a drum ."])
def test_packed_questions_see_what_each_alone_sees(model, processor, bank, text):
    packer = packing.Packer(model, processor)
    asked = [probes.Probe("a", "is the bell visible ?", "yes"), probes.Probe("b", "what is heard at 4 ?", "drum")]
    media = [("video", 2), ("audio", 2)]
    with torch.no_grad():
        together, _, _ = packer.logits(packer.pack([packing.Row(media, asked, text)], bank))
        apart = [packer.logits(packer.pack([packing.Row(media, [p], text)], bank))[0] for p in asked]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["", "i hear a drum ."])
def test_a_packed_question_is_the_prompt_the_tasks_use(model, processor, bank, text):
    """The curriculum's template and the task prompts must be one and the same sequence and positions."""
    scene = bank.scenes[1]
    from crab.world import render

    media = [omni.Media("video", render.frames(scene)[1::2], fps=1.0), omni.Media("audio", render.waveform(scene))]
    (sample,) = omni.encode(model, [omni.prepare(processor, media, f"{text} is the bell visible ?".strip())])
    packer = packing.Packer(model, processor)
    row = packing.Row([("video", 1), ("audio", 1)], [probes.Probe("a", "is the bell visible ?", "yes")], text)
    packed = packer.pack([row], bank)
    length = len(sample["input_ids"])
    assert packed["ids"][0, :length].tolist() == sample["input_ids"].tolist()
    assert torch.equal(packed["position_ids"][:, 0, :length], sample["position_ids"])
    (stored,) = (rows.float() for rows in packed["media"])
    torch.testing.assert_close(stored, sample["features"], rtol=1e-2, atol=1e-2)  # half precision


def test_written_out_attention_in_bfloat16_is_close_to_the_fused_one(model, processor, bank):
    rows = [packing.Row([("video", 2), ("audio", 2)], [probes.Probe("a", "is the bell visible ?", "yes")]), packing.Row([("video", 3), ("audio", 3)], [])]
    exact, rough = packing.Packer(model, processor), packing.Packer(model, processor, "bf16")
    with torch.no_grad():
        fused, _, _ = exact.logits(exact.pack(rows, bank))
        model.model.language_model.set_attn_implementation("eager")
        plain, _, _ = exact.logits(exact.pack(rows, bank))
        low, _, _ = rough.logits(rough.pack(rows, bank))
        model.model.language_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)
    assert low.dtype == torch.float32 and (low - fused).abs().max() < 0.05 * fused.abs().max()
    with pytest.raises(ValueError, match="precision 'fp8' is unknown"):
        packing.Packer(model, processor, "fp8").logits(exact.pack(rows, bank))


def test_bank_through_files_is_close_to_the_rendered_one(model, processor, bank):
    files = Bank(model, processor, bank.scenes[:2], seed=0, through_files=True)
    for kind in ("video", "image"):
        a, b = files.tokens[kind].float(), bank.tokens[kind][:2].float()
        assert torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() > 0.95


def test_matching_scenes_share_no_sound(model, processor, bank):
    more = Bank.__new__(Bank)
    more.scenes = [sample_scene(i) for i in range(50)]
    sampler = curriculum.Sampler(more, ["a"], np.random.default_rng(0))
    for _ in range(20):
        i, j = sampler._matching()
        for own, other in ((i, j), (j, i)):
            sounding = {t.name for t in more.scenes[own].visible if t.sounding}
            assert sounding and not sounding & {t.name for t in more.scenes[other].things}


def test_accuracy_of_a_model_that_says_nothing_right_is_zero(model, processor, bank):
    sampler = curriculum.Sampler(bank, curriculum.vocabulary(processor), np.random.default_rng(0))
    sampler.weights = {"visible": 1.0, "copy": 1.0}
    report = curriculum.probe_accuracy(packing.Packer(model, processor), sampler, contexts=8)
    assert set(report) == {"visible", "copy"} and report["visible"]["accuracy"] <= report["visible"]["majority"]
    assert math.isclose(report["visible"]["majority"], 0.5, abs_tol=0.35)


def test_missed_gates_are_named_and_unknown_ones_refused():
    gates = {"visible": {"accuracy": 0.8}, "copy": {"accuracy": 0.95}}
    base.require(gates, {"copy": 0.9})
    with pytest.raises(RuntimeError, match=r"visible: accuracy 0.800 is under its gate of 0.9"):
        base.require(gates, {"visible": 0.9, "copy": 0.9})
    with pytest.raises(ValueError, match="no skill visibel"):
        base.require(gates, {"visibel": 0.9})
    assert base.floors(gates, {"all": 0.9, "visible": 0.5}) == {"visible": 0.5, "copy": 0.9}
    assert base.floors(gates, {"copy": 0.5}) == {"copy": 0.5} and base.floors(gates, {}) == {}


def test_a_killed_language_model_goes_on_to_the_weights_it_would_have_had(tmp_path, size, monkeypatch):
    options = dict(
        seed=3, scenes=6, held_out=4, size=size, workers=0,
        encoders={"visual_steps": 1, "audio_steps": 1, "batch_size": 2, "learning_rate": 1e-3},
        language={"steps": 8, "stage_steps": 2, "gate": 0.9, "batch_size": 2, "learning_rate": 1e-2, "check_every": 2},
    )  # fmt: skip
    whole, _, report = base.train_base(["bell"], [], **options, checkpoints=tmp_path / "whole")
    checks, check = [], curriculum.probe_accuracy

    def killed_at_the_third(*args, **kwargs):
        checks.append(0)
        if len(checks) == 3:
            raise KeyboardInterrupt
        return check(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(curriculum, "probe_accuracy", killed_at_the_third)
        base.train_base(["bell"], [], **options, checkpoints=tmp_path / "cut")
    (unfinished,) = (tmp_path / "cut").glob("*.unfinished.pt")
    steps = []
    monkeypatch.setattr(curriculum.MuonAdamW, "step", lambda self, loss, step=curriculum.MuonAdamW.step: steps.append(step(self, loss)))
    resumed, _, again = base.train_base(["bell"], [], **options, checkpoints=tmp_path / "cut")
    assert len(steps) == 4  # 5 to 8: the checks were at 2 and 4
    assert again["history"] == report["history"] and [record["step"] for record in again["history"]] == [2, 4, 6, 8]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not unfinished.exists()


def test_finished_phases_are_not_repeated(tmp_path, size):
    options = dict(
        seed=3, scenes=6, held_out=4, size=size, workers=0, checkpoints=tmp_path,
        encoders=dict(visual_steps=1, audio_steps=1, batch_size=2, learning_rate=1e-3),
        language=dict(steps=2, stage_steps=1, gate=0.9, batch_size=2, learning_rate=1e-3, check_every=1),
    )  # fmt: skip
    first, processor_of_first, report = base.train_base(["bell"], [], **options)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    second, _, again = base.train_base(["bell"], [], **options)
    assert kept == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} and len(kept) == 2
    assert report == again
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    omni.save(tmp_path / "kept", first, processor_of_first, base.KEPT_AS)
    kept_model, _ = omni.load(tmp_path / "kept")  # what was gated, to the bit
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), kept_model.state_dict().values(), strict=True))
    assert {v.dtype for v in load_file(tmp_path / "kept/model.safetensors").values()} == {base.KEPT_AS}
    base.train_base(["bell"], [], **{**options, "language": {**options["language"], "steps": 3}})
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # the encoders are taken up, the language model is another


def test_a_face_is_asked_for_its_expression():
    face = Thing(FACE, "red", "still", (56, 56), (40, 40), (0, 10), (0, 10), emotion="fear")
    asked = probes.clip_probes(Scene(0, 0, (face,)), np.random.default_rng(0))
    assert [p.answer for p in asked if p.skill == "emotion"] == ["fear"]


def test_pair_probes_name_what_only_one_of_two_scenes_holds():
    other = Scene(1, 0, (BELL, HORN))
    said = {what: {} for what in ("video", "sound")}
    for what, answers in said.items():
        for seed in range(50):
            answers.update({p.question: p.answer for p in probes.pair_probes(SCENE, other, what, np.random.default_rng(seed))})
    # the bell is seen and heard in both; the flute is heard only
    assert said["video"] == {
        "which video shows the drum ?": "first", "which video shows the horn ?": "second",
        "find the drum in the two videos .": "first", "find the horn in the two videos .": "second",
    }  # fmt: skip
    assert said["sound"] == {
        "which sound is the flute ?": "first", "which sound is the horn ?": "second",
        "find the flute in the two sounds .": "first", "find the horn in the two sounds .": "second",
    }  # fmt: skip


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(model):
    from crab.models.base.optimize import MuonAdamW

    lm = model.model.language_model
    optimizer = MuonAdamW(lm.layers, [*lm.embed_tokens.parameters()], 0.1, lambda step: 0.5**step)
    muon, adamw = ({id(p) for group in o.param_groups for p in group["params"]} for o in optimizer.optimizers)
    assert {id(p) for p in lm.layers.parameters() if p.ndim == 2} == muon and id(lm.embed_tokens.weight) in adamw
    assert {group["lr"] for o in optimizer.optimizers for group in o.param_groups} == {0.1}


@pytest.mark.parametrize("step, factor", [(0, 0.01), (49, 0.5), (100, 1.0), (200, 1.0), (250, 0.5), (300, 0.02)])
def test_schedule(step, factor):
    from crab.models.base.optimize import warm_up_then_decay

    assert warm_up_then_decay(300)(step) == pytest.approx(factor)


def test_voice_and_face_are_asked_apart():
    face = Thing(FACE, "red", "still", (56, 56), (40, 40), (0, 10), (0, 10), emotion="sad", voice="fear")
    asked = probes.clip_probes(Scene(0, 0, (face,)), np.random.default_rng(0))
    assert {p.skill: p.answer for p in asked if p.skill in ("emotion", "voice")} == {"emotion": "sad", "voice": "fear"}
    heard = perception.audio_targets(Scene(0, 0, (face,)), 20)["emotion"]
    assert {perception.EMOTIONS[i] for i in heard} == {"fear"}


def test_the_box_around_all_that_is_heard():
    horn = Thing("horn", "red", "still", (168, 168), (24, 24), (0, 10), (0, 10))
    scene = Scene(0, 0, (BELL, horn, DRUM))
    asked = {p.skill: p.answer for p in probes.still_probes(scene, 4, np.random.default_rng(0))}
    assert asked["still box around"] == "32 24 192 192"  # bell 32 24 80 88, horn 144 144 192 192; the drum is silent
    assert "still box around" not in {p.skill for p in probes.still_probes(scene, 6, np.random.default_rng(0))}
