"""Alignment moves the projectors alone, and one that was killed ends at the same weights."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from bridges import write_parts

from crab.models import bridge
from crab.models.base import align, curriculum, probes, words
from crab.models.base.packing import Row
from crab.models.base.train import keep
from crab.world.scene import FACE, Scene, Thing, sample_scene

PLAN = {"word_steps": 3, "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32", "check_every": 2}
PLAN |= {"check_contexts": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"), sorted(probes.words()))


@pytest.fixture(scope="module")
def banks(parts):
    model, processor = bridge.assemble(**parts)
    scenes = [sample_scene(i, 3) for i in range(32)]
    return [align.BridgeBank(model, processor, part, 0) for part in (scenes[:16], scenes[16:])]


def test_a_question_of_a_row_sees_what_it_would_see_as_a_prompt(parts, banks):
    model, processor = bridge.assemble(**parts)
    asked = [
        probes.Probe("heard", "is the bell heard ?", "yes"),
        probes.Probe("at", "what is at top left ?", "nothing"),
    ]
    row = Row([("audio", 0), ("video", 0), ("video", 1)], asked)
    packer = align.BridgePacker(model, processor)
    with torch.no_grad():
        logits, target, _ = packer.logits(packer.pack([row], banks[0]))
        media = [("video", banks[0].tokens["video"][i]) for i in (0, 1)] + [("audio", banks[0].tokens["audio"][0])]
        towers = {"video": model.visual.projector, "audio": model.audio_tower.projector}
        features = torch.cat([towers[kind].items([item.float()])[0] for kind, item in media])
        alone = []
        for probe in asked:
            text = bridge.prompt_text(processor.tokenizer, [], f"@ {probe.question}").split("@")
            ids = processor.tokenizer(text[0], add_special_tokens=False)["input_ids"]
            head, ids = len(ids), ids + [0] * len(features)
            ids += processor.tokenizer(f"{text[1]} {probe.answer} </s>", add_special_tokens=False)["input_ids"]
            embeds = model.get_input_embeddings()(torch.tensor(ids))
            embeds[head : head + len(features)] = features
            alone.append(model(inputs_embeds=embeds[None]).logits[0, -3:-1])
    assert processor.tokenizer.decode(target).split() == ["yes", "</s>", "nothing", "</s>"]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)


def trained(parts, banks, **options):
    model, processor = bridge.assemble(**parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, history = align.train_projectors(model, processor, *banks, PLAN, 5, **options)
    return before, model.state_dict(), history


def test_only_projectors_are_trained_and_a_killed_run_ends_at_the_same_weights(parts, banks, tmp_path):
    before, whole, history = trained(parts, banks)
    changed = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    assert changed and all(".projector." in name for name in changed)
    assert [record["step"] for record in history] == [2, 4, 6] and np.isfinite([r["loss"] for r in history]).all()
    file = tmp_path / "unfinished"
    killed = mock.Mock(wraps=curriculum.probe_accuracy, side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(curriculum, "probe_accuracy", killed), pytest.raises(KeyboardInterrupt):
        trained(parts, banks, unfinished=file)
    _, again, resumed = trained(parts, banks, unfinished=file)
    assert resumed == history and all(torch.equal(whole[name], again[name]) for name in whole)


def test_in_bf16_the_language_model_is_rounded_and_the_projectors_are_not(parts, banks, monkeypatch):
    monkeypatch.setattr(align, "compile_layers", lambda model: None)  # which takes minutes
    model, processor = bridge.assemble(**parts)
    _, history = align.train_projectors(model, processor, *banks, {**PLAN, "precision": "bf16"}, 5)
    assert np.isfinite([record["loss"] for record in history]).all()
    kinds = {name.split(".")[0]: value.dtype for name, value in model.state_dict().items() if ".tower." not in name}
    assert kinds == {"language_model": torch.bfloat16, "visual": torch.float32, "audio_tower": torch.float32}


def test_a_bridge_is_made_once(parts, tmp_path):
    part = {**parts, "projector": "mlp", "picture_tokens": 4, "sound_tokens": 2, "words": 1, "scenes": 16}
    part["align"] = {**PLAN, "steps": 2, "gate_contexts": 2}
    section = {"seed": 3, "scenes": 16, "held_out": 16, "bridge": part}
    model, processor, report = align.make_bridge(tmp_path / "base", section, tmp_path, code=str)
    keep(tmp_path / "base", model, processor, report)
    assert {"visible", "heard", "caption"} & set(report["gates"]) and not set(report["gates"]) & set(align.UNTAUGHT)
    assert align.make_bridge(tmp_path / "base", section, tmp_path, code=str) == (None, None, report)
    stored = bridge.load_model(tmp_path / "base")  # what the gates measured, to the bit
    pairs = zip(model.state_dict().values(), stored.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


RED = Thing("bell", "red", "swaying", (56, 56), (24, 32), (0, 4), (3, 5))
SAD = Thing(FACE, "blue", "still", (168, 168), (40, 40), (2, 10), (3, 10), emotion="sad", voice="fear")


def shares(tokens):
    """The words of each token, with their shares."""
    return [{words.VOCABULARY[i]: round(float(row[i]), 3) for i in row.nonzero()[:, 0]} for row in tokens]


def test_the_words_of_a_token_are_those_of_its_place_and_its_second():
    scene, nothing = Scene(0, 0, (RED, SAD)), {"nothing": 1.0}
    bell, face = dict.fromkeys(("bell", "red", "swaying"), 0.333), dict.fromkeys(("face", "blue", "sad"), 0.333)
    assert shares(words.picture_words(scene, (2, 3), 4, 1)) == [bell, nothing, nothing, face]
    sixteen = shares(words.picture_words(scene, (2, 3), 16, 1))
    assert sixteen[:4] == [bell, bell, nothing, nothing] and sixteen[-1] == face
    (all_of_it,) = shares(words.picture_words(scene, (2, 3), 1, 1))
    assert all_of_it["nothing"] == 0.5 and all_of_it["bell"] == 0.083
    one_by_one = [next(iter(token)) for token in shares(words.picture_words(scene, (2, 3), 4, 3))]
    assert one_by_one == ["red", "swaying", "bell", *["nothing"] * 6, "blue", "sad", "face"]
    still = shares(words.picture_words(scene, (0, 0), 4, 3))  # a still does not move
    assert still[:3] == [{"red": 1.0}, nothing, {"bell": 1.0}] and still[3:] == [nothing] * 9
    heard = [shares(tokens) for tokens in words.sound_words(scene, 10, 1, 3)]
    assert heard[2] == [nothing, nothing, {"2": 1.0}] and heard[3] == [
        {"bell": 1},
        {"face": 0.5, "fear": 0.5},
        {"3": 1},
    ]
    assert heard[9] == [{"face": 1}, {"fear": 1}, {"9": 1}]
    assert (
        shares(words.sound_words(scene, 1, 2, 3, only=3)[0]) == [{"bell": 1}, {"face": 0.5, "fear": 0.5}, nothing] * 2
    )


def test_a_projector_learns_to_give_the_embedding_of_the_word_that_its_token_holds(parts, banks):
    model, processor = bridge.assemble(**parts, picture_tokens=12, sound_tokens=6, words=3)
    targets, generator = words.words_of(model, banks[0]), torch.Generator().manual_seed(0)
    bank = SimpleNamespace(scenes=banks[0].scenes, seconds=banks[0].seconds, tokens={})
    codes = {}  # encoders that tell all
    for kind, shares in targets.items():
        width = banks[0].tokens[kind].shape[-1]
        if width not in codes:
            codes[width] = torch.randn(3 * shares.shape[-1], width, generator=generator)
        bank.tokens[kind] = shares.unflatten(2, (-1, 3)).flatten(3) @ codes[width]
    assert all(gate["accuracy"] < 0.2 for gate in words.accuracy(model, processor.tokenizer, bank).values())
    words.fit(model, processor.tokenizer, bank, 400, 0)
    assert all(gate["accuracy"] > 0.95 for gate in words.accuracy(model, processor.tokenizer, bank).values())
    weight = model.get_input_embeddings().weight
    ids = [processor.tokenizer.convert_tokens_to_ids(word) for word in words.VOCABULARY]
    for kind, part in (("video", model.visual), ("audio", model.audio_tower)):
        given = part.projector(bank.tokens[kind].flatten(0, 1)) - weight.mean(0)
        wanted = targets[kind].flatten(0, 1) @ (weight[ids] - weight.mean(0))
        assert torch.cosine_similarity(given, wanted, -1).mean() > 0.9
