"""A bridge must be its language model on the tokens of its projectors, and a saved one must be the same."""

import shutil

import numpy as np
import pytest
import torch
from bridges import write_parts
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CLIPModel, WhisperModel

from crab.models import batches, bridge, checkpoint, encoders, language, protocol
from crab.models.protocol import Media
from crab.study import train
from crab.study.footprint import read_base

WORDS = ["what", "is", "heard", "seen", "?", "bell", "top", "left", "<answer>", "</answer>"]
QUESTION = "what is heard ?"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"), WORDS)


@pytest.fixture(scope="module", params=["mlp", "qformer"])
def pair(request, parts):
    return bridge.assemble(**parts, projector=request.param, picture_tokens=4, sound_tokens=2, seed=1)


def prompts(processor, *kinds):
    """v: a clip of three frames; i: one picture; a: two seconds of sound; s: a bit more than one."""
    g = np.random.default_rng(0)
    frames, wave = g.integers(0, 256, (3, 224, 224, 3), dtype=np.uint8), g.normal(size=32_000).astype(np.float32)
    media = {
        "v": Media("video", frames, 1.0), "i": Media("image", frames[1]), "a": Media("audio", wave),
        "s": Media("audio", wave[:18_000]),
    }  # fmt: skip
    return [bridge.prepare(processor, [media[kind] for kind in each], QUESTION) for each in kinds]


def test_a_prompt_is_pictures_then_sounds_then_text_with_plain_positions(pair):
    model, processor = pair
    (prompt,) = prompts(processor, "avi")
    (sample,) = bridge.encode(model, [prompt])
    assert sample["position_ids"].tolist() == [list(range(len(sample["input_ids"])))] * 3
    text = processor.tokenizer.decode(sample["input_ids"])
    shown = ["<|video|>"] * (3 * 4 + 2) + ["<|image|>"] * (4 + 2) + ["<|audio|>"] * (2 * 2 + 2)
    assert text.split() == ["<s>", "user", *shown, *QUESTION.split(), "</s>", "<s>", "assistant"]
    kinds = batches.segments(model.config, batches.batch(model, processor.tokenizer, [sample]))[0].tolist()
    assert [kinds.count(number) for number in range(3)] == [9, 20, 6]


def test_logits_are_those_of_the_language_model_on_tokens_put_together_by_hand(pair, parts):
    model, processor = pair
    (prompt,) = prompts(processor, "va")
    text = AutoModelForCausalLM.from_pretrained(parts["language"]).eval()
    ids = prompt["input_ids"][0]
    with torch.no_grad():
        embeds = text.get_input_embeddings()(ids.clamp(max=text.config.vocab_size - 1))
        seen = CLIPModel.from_pretrained(parts["vision"]).vision_model(prompt["pixel_values"]).last_hidden_state[:, 1:]
        heard = (
            WhisperModel.from_pretrained(parts["audio"]).encoder(prompt["input_features"]).last_hidden_state[0, :100]
        )
        if model.config.projector == "mlp":  # means of quarters of the picture, and of half seconds
            seen = seen.view(3, 2, 2, 2, 2, 24).mean((2, 4)).view(3, 4, 24)
            heard = heard.view(2, 2, 25, 20).mean(2)
        else:
            heard = heard.view(2, 10, 5, 20).mean(2)
        eye, ear = model.visual.projector, model.audio_tower.projector
        embeds[ids == model.config.video_token_id] = torch.cat([eye.ends[:1], eye(seen).flatten(0, 1), eye.ends[1:]])
        embeds[ids == model.config.audio_token_id] = torch.cat([ear.ends[:1], ear(heard).flatten(0, 1), ear.ends[1:]])
        expected = text(inputs_embeds=embeds[None]).logits
        batch = batches.batch(model, processor.tokenizer, bridge.encode(model, [prompt]))
        logits = model(**{name: batch[name] for name in batches.INPUTS}).logits
        known = expected.shape[2]
        torch.testing.assert_close(logits[..., :known], expected, rtol=1e-4, atol=1e-5)
        assert not logits[..., known:].any()  # the placeholders are no words
        states = batches.last_hidden(model, batch)
        torch.testing.assert_close(model.get_output_embeddings()(states), logits)


def test_generation_in_a_left_padded_batch_answers_as_each_alone(pair):
    model, processor = pair
    samples = bridge.encode(model, prompts(processor, "va", "is", "avv", "a"))
    together = bridge.generate(model, processor.tokenizer, batches.batch(model, processor.tokenizer, samples), 6)
    for text, sample in zip(together, samples, strict=True):
        alone = batches.batch(model, processor.tokenizer, [sample])
        assert bridge.generate(model, processor.tokenizer, alone, 6) == [text]


def test_the_loss_of_a_batch_is_that_of_its_samples_with_features_shown_or_embedded(pair):
    model, processor = pair
    samples, answers = bridge.encode(model, prompts(processor, "va", "is")), ["bell", "top left"]
    with torch.no_grad():
        rows = []
        for sample, answer in zip(samples, answers, strict=True):
            batch = batches.batch(model, processor.tokenizer, [sample], [answer])
            logits = model(**{name: batch[name] for name in batches.INPUTS}).logits[0, :-1]
            rows.append(F.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum"))
        for embed in (True, False):
            batch = batches.batch(model, processor.tokenizer, samples, answers, embed=embed)
            torch.testing.assert_close(batches.answer_loss(model, batch)[0], sum(rows) / 5)


def test_a_saved_bridge_is_the_bridge_and_only_names_its_language_model(pair, tmp_path, monkeypatch):
    model, processor = pair
    bridge.save(tmp_path, model, processor)
    again, reader = checkpoint.load_base(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert protocol.model_of(tmp_path) is protocol.model_of(reader) is protocol.model_of(again) is bridge
    one, two = (prompts(p, "vai")[0] for p in (processor, reader))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: self)
    assert checkpoint.load_model(tmp_path).dtype == torch.float32  # on a GPU as here: it is no published checkpoint
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("language_model")]


def test_the_plan_of_a_bridge_counts_what_is_there(pair, tmp_path):
    model, processor = pair
    bridge.save(tmp_path, model, processor)
    base = read_base(tmp_path)
    assert base.parameters == sum(p.numel() for p in model.parameters())
    layers = model.language_model.model.layers
    assert base.towers["language_model"].weights == sum(p.numel() for p in layers.parameters())
    (prompt,) = prompts(processor, "va")
    counts = [
        int((prompt["input_ids"] == token).sum())
        for token in (model.config.video_token_id, model.config.audio_token_id)
    ]
    assert list(bridge.media_tokens(model.config, 224, ["video", "audio"], 3, 2.0)) == counts
    adapter = base.adapter("lora", {"r": 2, "lora_alpha": 4})
    assert len(adapter.inputs["language_model"]) == 7 and not adapter.inputs["visual"]


def test_what_cannot_be_read_is_named_with_its_fix(parts, tmp_path):
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "new"}', encoding="utf-8")
    for changes, problem in (
        ({"language": str(tmp_path)}, f"base.bridge.language is '{tmp_path}', and .*config.json is missing; give"),
        (
            {"language": str(tmp_path / "a.gguf")},
            "base.bridge.language .* no such file; give the absolute path of a GGUF",
        ),
        ({"vision": parts["audio"]}, "base.bridge.vision is .*, a whisper model; give a CLIP or SigLIP model"),
        ({"audio": parts["vision"]}, "base.bridge.audio is .*, a clip model; give a Whisper model"),
        ({"audio": str(unknown)}, "base.bridge.audio is .* cannot be read .*give the folder of a base"),
        ({"language": str(unknown)}, "base.bridge.language is .* cannot be read "),
        ({"projector": "mlp", "picture_tokens": 6, "words": 3}, "picture_tokens is 6: with 3 words .* 2 places"),
        ({"vision": str(tmp_path / "none")}, "base.bridge.vision is .* cannot be read .*give the folder of a base"),
    ):
        with pytest.raises(ValueError, match=problem):
            bridge.assemble(**parts | changes)


def test_the_package_of_smollm2_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="base.bridge.language is smollm2, whose package is not installed; run `pip"):
        language.located(language.SMOLLM2)


def test_seconds_are_those_begun():
    rate = encoders.RATE
    assert [bridge.seconds_of(n) for n in (1, rate, rate + 100, 2 * rate, 10 * rate)] == [1, 1, 1, 2, 10]


@pytest.mark.skipif(not shutil.which("c++"), reason="layers are compiled where there is a compiler")
@pytest.mark.parametrize("method, options", [("lora", {"r": 4}), ("ilora", {"r": 2, "lora_alpha": 4, "num_heads": 3})])
def test_compiled_layers_train_alike_and_leave_generation_as_it_was(parts, method, options):
    results = {}
    for compiled in (None, False):  # None compiles when training in bf16 begins
        torch.manual_seed(0)
        model, processor = bridge.assemble(**parts)
        model.set_attn_implementation("eager")
        model._compiled = compiled
        adapted = train.adapted(model, method, options)
        for seed, (name, weight) in enumerate(adapted.named_parameters()):
            if "_B" in name:  # adapters that do something
                weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        (sample,) = bridge.encode(model, prompts(processor, "va"))
        batch = batches.batch(adapted, processor.tokenizer, [sample, sample], ["bell left", "what"])
        adapted.train()
        exact, _ = batches.answer_loss(adapted, batch)
        assert model._compiled is compiled, "in fp32 nothing is compiled"
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = batches.answer_loss(adapted, batch)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])
        prompt = batches.batch(adapted, processor.tokenizer, [sample])
        answers = bridge.generate(adapted.eval(), processor.tokenizer, prompt, 5)
        assert bool(model._compiled) == (compiled is None)
        results[compiled] = exact.item(), loss.item(), gradients, answers
    one, other = results.values()
    assert one[0] == other[0] and one[3] == other[3]
    assert one[1] == pytest.approx(other[1], rel=1e-3)
    assert torch.cosine_similarity(one[2], other[2], 0) > 0.99
