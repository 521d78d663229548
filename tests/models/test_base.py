"""What the base is taught must be true of the scene, packing must not change what a prompt sees, training resumes."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crab.models import checkpoint, omni, small
from crab.models.base import curriculum, optimize, packing, perception, probes, train
from crab.models.base.bank import Bank
from crab.world import chains, render, verify
from crab.world.scene import FACE, QUADRANTS, SECONDS, Scene, Thing, sample_scene

BELL = Thing("bell", "red", "still", (56, 56), (24, 32), (2, 8), (3, 5))
DRUM = Thing("drum", "blue", "swaying", (168, 56), (32, 24), (0, 10), None)
FLUTE = Thing("flute", "green", "still", (56, 168), (24, 24), None, (6, 9))
HORN = Thing("horn", "red", "still", (168, 168), (24, 24), (0, 10), (0, 10))
SMILE = Thing(FACE, "red", "still", (56, 56), (40, 40), (0, 10), (0, 10), emotion="sad", voice="fear")
SCENE, OTHER, FACES = Scene(0, 0, (BELL, DRUM, FLUTE)), Scene(1, 0, (HORN,)), Scene(2, 0, (SMILE,))


def rng(seed=0):
    return np.random.default_rng(seed)


def answers(draw) -> dict[str, set[str]]:
    """All answers to each question that ``draw`` asks over many draws."""
    out: dict[str, set[str]] = {}
    for seed in range(200):
        for p in draw(rng(seed)):
            out.setdefault(p.question, set()).add(p.answer)
    return out


SIGHTS = "i see a red bell at top left and a blue drum at top right ."
VIDEOS = (
    "video one shows a red bell at top left . video one shows a blue drum at top right . "
    "video two shows a red horn at bottom right ."
)
SOUNDS = "sound one is a bell . sound one is a flute . sound two is a horn ."
CAPTION = (
    "two seen and two heard . i see a red bell still at top left from 2 to 8 . i see a blue drum swaying at top right "
    "from 0 to 10 . i hear a bell from 3 to 5 . i hear a flute from 6 to 9 ."
)

WORKED = [  # what is drawn, then each question with its only answer; None: it is not asked
    (lambda r: probes.clip_probes(SCENE, r), {
        "is the bell visible ?": "yes", "is the flute visible ?": "no", "is the flute heard ?": "yes",
        "is the drum heard ?": "no", "what colour is the bell ?": "red", "how does the drum move ?": "swaying",
        "where is the bell ?": "top left", "when is the bell visible ?": "from 2 to 8",
        "is the bell visible at 1 ?": "no", "is the bell visible at 2 ?": "yes",
        "when is the flute heard ?": "from 6 to 9",
        "box of the bell at 4 ?": "32 24 80 88", "box of the drum at 0 ?": "128 32 192 80",
        "box of the drum at 1 ?": "144 32 208 80", "box of the bell at 1 ?": None, "what is at top right ?": "drum",
        "what is at bottom left ?": "nothing", "what is heard at 4 ?": "bell", "what is heard at 5 ?": "nothing",
        "which visible thing is heard ?": "bell", "where is the thing that is heard ?": "top left",
        "how many things are visible ?": "two", "how many things are heard ?": "two",
        "which is heard first ?": "bell"}),
    (lambda r: probes.clip_probes(FACES, r), {"how does the face feel ?": "sad", "how does the voice feel ?": "fear"}),
    (lambda r: probes.still_probes(SCENE, 4, r), {
        "box around the bell and the drum ?": "32 24 192 88", "which visible thing is heard ?": "bell",
        "box of the thing that is heard ?": "32 24 80 88", "what is heard ?": "bell"}),
    (lambda r: probes.still_probes(SCENE, 1, r), {  # only the drum is seen, and nothing is heard
        "box around the drum and the bell ?": None, "what is heard ?": None}),
    (lambda r: probes.still_probes(Scene(0, 0, (BELL, HORN, DRUM)), 4, r), {
        "box around the things that are heard ?": "32 24 192 192"}),
    (lambda r: probes.still_probes(Scene(0, 0, (BELL, HORN, DRUM)), 6, r), {
        "box around the things that are heard ?": None, "what is heard ?": "horn"}),
    (lambda r: probes.pair_probes(SCENE, Scene(1, 0, (BELL, HORN)), "video", r), {
        "which video shows the drum ?": "first", "find the horn in the two videos .": "second",
        "which video shows the bell ?": None, "which video shows the flute ?": None}),
    (lambda r: probes.pair_probes(SCENE, Scene(1, 0, (BELL, HORN)), "sound", r), {
        "which sound is the flute ?": "first", "find the horn in the two sounds .": "second",
        "which sound is the bell ?": None, "which sound is the drum ?": None}),
    (lambda r: probes.clip_told(SCENE, r), {
        "describe the scene .": CAPTION, "describe what is seen .": SIGHTS, "describe where things are .": None,
        "describe what is heard .": "i hear a bell and a flute .",
        "describe which things sound .": "the red bell sounds . the blue drum is silent ."}),
    (lambda r: probes.still_told(SCENE, 1, r), {
        "describe what is seen .": "i see a blue drum at top right .", "describe what is heard .": "i hear nothing .",
        "describe which things sound .": "the blue drum is silent .", "describe the scene .": None,
        "describe where things are .": "the blue drum is at 144 32 208 80 ."}),
    (lambda r: [probes.pair_told(SCENE, OTHER, "video", r)], {"describe what is seen .": VIDEOS}),
    (lambda r: [probes.pair_told(SCENE, OTHER, "sound", r)], {"describe what is heard .": SOUNDS}),
]  # fmt: skip


@pytest.mark.parametrize("draw, expected", WORKED)
def test_probes_worked_by_hand(draw, expected):
    asked = answers(draw)
    assert {question: asked.get(question) for question in expected} == {
        question: answer and {answer} for question, answer in expected.items()
    }


def test_times_are_asked_of_two_things_and_pickers_are_all_that_are_seen():
    for seed in range(20):
        asked = [(p.skill, p.answer, set(p.picked)) for p in probes.clip_probes(SCENE, rng(seed))]
        assert {answer for skill, answer, _ in asked if skill == "time seen"} == {"from 2 to 8", "from 0 to 10"}
        assert {answer for skill, answer, _ in asked if skill == "time heard"} == {"from 3 to 5", "from 6 to 9"}
        assert [picked for skill, _, picked in asked if skill == "which sounds"] == [{"bell", "drum"}]


@pytest.mark.parametrize("which, what, expected", [
    ("first", "video", f"i hear a bell and a flute . {VIDEOS}"), ("second", "video", f"i hear a horn . {VIDEOS}"),
    ("first", "sound", f"{SIGHTS} {SOUNDS}"),
])  # fmt: skip
def test_a_pair_to_read_worked_by_hand(which, what, expected):
    text, asked = probes.pair_reading(SCENE, OTHER, which, what, rng())
    assert text == expected and asked[0].answer == which
    assert {p.answer for p in asked[1:] if "horn" in p.question} <= {"second"}


@pytest.mark.parametrize("number", range(40))
def test_all_sentences_are_true_hold_the_answers_and_use_known_words(processor, number):
    r, scene, other = rng(number), sample_scene(number), sample_scene(number + 1)
    second = int(r.integers(SECONDS))
    now, pair = verify.moment(scene, second), verify.Evidence((scene, other), (scene, other))
    texts = [(p, verify.Evidence((scene,), (scene,))) for p in probes.clip_told(scene, r)]
    texts += [
        (p, verify.Evidence((now,), (now,))) for p in probes.still_told(scene, second, r) if p.skill != "boxes told"
    ]
    texts += [(probes.pair_told(scene, other, what, r), pair) for what in ("video", "sound")]
    text, asked = probes.reading(scene, r)
    texts.append((probes.Probe("read", "", text), verify.Evidence((scene,), (scene,))))
    assert {v.verdict for p, evidence in texts for v in verify.verify(p.answer, evidence)} == {verify.TRUE}
    closed = ("yes", "no", "nothing", FACE, *chains.NUMBERS)
    assert asked and all(p.answer in closed or p.answer in text for p in asked), asked
    asked += [*probes.clip_probes(scene, r), *probes.still_probes(scene, second, r), *(p for p, _ in texts)]
    for p in asked:
        assert small.UNKNOWN not in processor.tokenizer.tokenize(f"{p.question} {p.answer}"), p


def test_dense_targets_of_frames_and_of_sound():
    target = perception.visual_targets(SCENE, (1, 2))  # the bell appears in the second of them
    names = [perception.NAMES[i] for i in target["name"]]
    assert dict(zip(QUADRANTS, names, strict=True)) == {
        "top left": "bell", "top right": "drum", "bottom left": "nothing", "bottom right": "nothing",
    }  # fmt: skip
    assert target["present"].tolist() == [[0, 1], [1, 1], [0, 0], [0, 0]]
    assert (target["box"][0, 0] == omni.IGNORE).all() and (target["box"][0, 1] * 8).tolist() == [32, 24, 80, 88]
    assert target["motion"][0] == omni.IGNORE != target["motion"][1]
    assert (perception.visual_targets(SCENE, (4, 4))["motion"] == omni.IGNORE).all()  # a still does not move
    heard = perception.audio_targets(SCENE, 20)["present"]
    assert heard[:, perception.NAMES.index("bell")].nonzero()[0].tolist() == [6, 7, 8, 9] and heard.sum() == 4 + 6
    alone = perception.audio_targets(SCENE, 2, only=4)
    assert alone["present"].sum() == 2 and alone["second"].tolist() == [omni.IGNORE] * 2
    assert {perception.EMOTIONS[i] for i in perception.audio_targets(FACES, 20)["emotion"]} == {"fear"}


@pytest.fixture(scope="module")
def bank(model, processor):
    return Bank(model, processor, [sample_scene(i) for i in range(6)], seed=0)


def test_a_bank_through_files_is_close_to_the_rendered_one(model, processor, bank):
    files = Bank(model, processor, bank.scenes[:2], seed=0, through_files=True)
    for kind in ("video", "image"):
        assert torch.cosine_similarity(files.tokens[kind].float(), bank.tokens[kind][:2].float(), -1).mean() > 0.95


@pytest.mark.parametrize("text", ["", "i hear a drum ."])
def test_a_packed_question_is_the_prompt_of_the_tasks_and_sees_what_it_sees_alone(model, processor, bank, text):
    packer, clip = packing.Packer(model, processor), [("video", 1), ("audio", 1)]
    asked = [probes.Probe("a", "is the bell visible ?", "yes"), probes.Probe("b", "what is heard at 4 ?", "drum")]
    packed = packer.pack([packing.Row(clip, asked, text)], bank)
    with torch.no_grad():
        together, _, _ = packer.logits(packed)
        alone = [packer.logits(packer.pack([packing.Row(clip, [p], text)], bank))[0] for p in asked]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    scene = bank.scenes[1]
    media = [omni.Media("video", render.frames(scene)[1::2]), omni.Media("audio", render.waveform(scene))]
    (sample,) = omni.encode(model, [omni.prepare(processor, media, f"{text} {asked[0].question}".strip())])
    length = len(sample["input_ids"])
    assert packed["ids"][0, :length].tolist() == sample["input_ids"].tolist()
    assert torch.equal(packed["position_ids"][:, 0, :length], sample["position_ids"])
    torch.testing.assert_close(packed["media"][0].float(), sample["features"], rtol=1e-2, atol=1e-2)  # half precision


def test_bfloat16_with_written_out_attention_is_close_to_float32(model, processor, bank):
    clips = [[("video", i), ("audio", i)] for i in (2, 3)]
    rows = [packing.Row(clips[0], [probes.Probe("a", "is the bell visible ?", "yes")]), packing.Row(clips[1], [])]
    exact, rough = packing.Packer(model, processor), packing.Packer(model, processor, "bf16")
    with torch.no_grad():
        fused, _, _ = exact.logits(exact.pack(rows, bank))
        model.model.language_model.set_attn_implementation("eager")
        plain, _, _ = exact.logits(exact.pack(rows, bank))
        low, _, _ = rough.logits(rough.pack(rows, bank))
        model.model.language_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)
    assert low.dtype == torch.float32 and 0 < (low - fused).abs().max() < 0.05 * fused.abs().max()


def test_the_sampler_draws_what_is_hard_and_pairs_that_differ(processor, bank):
    bank = copy.copy(bank)
    bank.sources = np.array([0, 0, 0, 0, 0, 3])
    sampler = curriculum.Sampler(bank, processor, rng())
    drawn = [sampler._still().media[0][1] for _ in range(600)]
    assert 215 < drawn.count(5) < 290  # 91 of 216 for the best of three draws; of two it would be 183
    bank.scenes = [sample_scene(i) for i in range(50)]
    for _ in range(20):
        i, j = sampler._matching()
        for own, other in ((i, j), (j, i)):
            sounding = {t.name for t in bank.scenes[own].visible if t.sounding}
            assert sounding and not sounding & {t.name for t in bank.scenes[other].things}
    weights = curriculum.stage_weights(1, {"copy": 0.95, "read": 0.5, "heard": 0.95}, gate=0.9)
    assert weights == {"copy": curriculum.REPLAY, "read": 1, "visible": 1, "heard": 1}


@pytest.mark.parametrize(("end", "accuracy"), [(0, 1.0), (1, 0.0)])
def test_an_answer_is_right_if_each_of_its_tokens_and_its_end_are(model, processor, bank, end, accuracy):
    class Knowing(packing.Packer):
        """Knows all answers, and goes wrong at the end token if told to."""

        def logits(self, packed):
            index = (packed["target"].flatten() != omni.IGNORE).nonzero().squeeze(1)
            target = packed["target"].flatten()[index]
            chosen = target + end * (target == self.tokenizer.eos_token_id)
            return torch.nn.functional.one_hot(chosen, len(self.tokenizer) + 1).float(), target, index

    sampler = curriculum.Sampler(bank, processor, rng())
    sampler.weights = {"visible": 1.0, "copy": 1.0}
    report = curriculum.probe_accuracy(Knowing(model, processor), sampler, contexts=8)
    assert {skill: row["accuracy"] for skill, row in report.items()} == {"visible": accuracy, "copy": accuracy}
    assert 0.15 < report["visible"]["majority"] < 0.85 and report["visible"]["picker"] is None


def test_missed_gates_are_named_and_unknown_ones_refused():
    gates = {"visible": {"accuracy": 0.8}, "copy": {"accuracy": 0.95}}
    train.require(gates, {"copy": 0.9})
    with pytest.raises(RuntimeError, match=r"visible: accuracy 0.800 is under its gate of 0.9"):
        train.require(gates, {"visible": 0.9, "copy": 0.9})
    with pytest.raises(ValueError, match="there is no skill visibel"):
        train.require(gates, {"visibel": 0.9})
    assert train.floors(gates, {"all": 0.9, "visible": 0.5}) == {"visible": 0.5, "copy": 0.9}
    assert train.floors(gates, {"copy": 0.5}) == {"copy": 0.5} and train.floors(gates, {}) == {}


VOCABULARY = {"words": ["bell"], "tags": []}


@pytest.fixture
def section(size):
    encoders = {"visual_steps": 1, "audio_steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    language = dict(steps=8, stage_steps=2, gate=0.9, batch_size=2, learning_rate=1e-2, check_every=2, precision="fp32")
    return dict(seed=3, scenes=6, held_out=4, size=size, encoders=encoders, language=language)


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_a_killed_training_goes_on_to_the_weights_it_would_have_had(tmp_path, section):
    def make(phases):
        return train.make_base(None, VOCABULARY, section, code=str, phases=tmp_path / phases, workers=0)

    whole, _, report = make("whole")
    killed = mock.Mock(wraps=curriculum.probe_accuracy, side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(curriculum, "probe_accuracy", killed), pytest.raises(KeyboardInterrupt):
        make("cut")
    (unfinished,) = (tmp_path / "cut").glob("*.unfinished")
    step = optimize.MuonAdamW.step
    with mock.patch.object(optimize.MuonAdamW, "step", autospec=True, side_effect=step) as steps:
        resumed, _, again = make("cut")
    assert steps.call_count == 4  # 5 to 8: the checks were at 2 and 4
    assert again["history"] == report["history"] and [record["step"] for record in again["history"]] == [2, 4, 6, 8]
    assert equal(whole, resumed) and not unfinished.exists()


def test_a_finished_base_is_not_trained_again(tmp_path, section, capsys):
    def make(folder=tmp_path / "base", code=str, **changes):
        return train.make_base(folder, VOCABULARY, section | changes, code=code, phases=tmp_path / "runs", workers=0)

    first, processor, report = make()
    train.keep(tmp_path / "base", first, processor, report)
    stored, _ = checkpoint.load_base(tmp_path / "base")  # what the gates measured, to the bit
    assert equal(first, stored)
    assert {v.dtype for v in load_file(tmp_path / "base/model.safetensors").values()} == {train.STORED_AS}
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    capsys.readouterr()
    assert make() == (None, None, report)
    train.keep(tmp_path / "base", None, None, report)
    assert equal(make(None)[0], first)  # from the finished phases
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == kept and not capsys.readouterr().out
    assert make(language={**section["language"], "steps": 3})[2]["key"] != report["key"]
    assert "other parameters, words or code" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("encoders*"))) == 1  # taken up again; the language model is another
    digest = checkpoint.base_digest(tmp_path / "base")
    make(code=lambda name: f"new {name}")
    assert len(list((tmp_path / "runs").glob("encoders*"))) == 2 and checkpoint.base_digest(tmp_path / "base") == digest


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(model):
    core = model.model.language_model
    optimizer = optimize.MuonAdamW(core.layers, [*core.embed_tokens.parameters()], 0.1, lambda step: 0.5**step)
    muon, adamw = ({id(p) for group in o.param_groups for p in group["params"]} for o in optimizer.optimizers)
    assert {id(p) for p in core.layers.parameters() if p.ndim == 2} == muon and id(core.embed_tokens.weight) in adamw
    assert {group["lr"] for o in optimizer.optimizers for group in o.param_groups} == {0.1}
    factors = [optimize.warm_up_then_decay(300)(step) for step in (0, 49, 100, 120, 210, 300)]
    assert factors == pytest.approx([0.01, 0.5, 1, 1, 0.5, 0.02])
