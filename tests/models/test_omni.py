"""The language model on cached features must be the whole model, and a saved base must be the base."""

import numpy as np
import pytest
import torch

from crab.models import batches, omni, small
from crab.models.checkpoint import load_base
from crab.world import render
from crab.world.scene import Scene, sample_scene, sample_thing

SCENE = sample_scene(3)
QUESTION = "what is heard ?"


def prepared(processor, kinds: str):
    """v: a clip of ten frames; i: one frame; a: ten seconds of sound; s: one second of it."""
    frames, wave = render.frames(SCENE)[1::2], render.waveform(SCENE)
    media = {
        "v": omni.Media("video", frames, fps=1.0),
        "i": omni.Media("image", frames[3]),
        "a": omni.Media("audio", wave),
        "s": omni.Media("audio", wave[:16000]),
    }
    return omni.prepare(processor, [media[kind] for kind in kinds], QUESTION)


def whole(model, prompt) -> dict:
    """The prompt as the whole model takes it, encoders included."""
    prompt = {name: torch.as_tensor(value) for name, value in prompt.items()}
    begin = (prompt["input_ids"][0] == model.config.vision_start_token_id).nonzero()[:, 0]
    turns = (prompt["input_ids"][0, begin + 1] == model.config.audio_start_token_id).any()
    return prompt | ({"use_audio_in_video": True} if turns else {})


@pytest.mark.parametrize("kinds", ["va", "is", "avv", "vaa", "a"])
def test_cached_features_give_the_logits_of_the_whole_model(model, processor, kinds):
    prompt = prepared(processor, kinds)
    batch = batches.batch(model, processor.tokenizer, omni.encode(model, [prompt]))
    with torch.no_grad():
        logits = model.lm_head(batches.last_hidden(model, batch))
        torch.testing.assert_close(logits, model(**whole(model, prompt)).logits, rtol=1e-5, atol=1e-5)


def test_video_and_sound_of_a_clip_take_turns_of_two_seconds(model, processor):
    config = model.config
    (sample,) = omni.encode(model, [prepared(processor, "va")])
    names = {
        config.vision_start_token_id: "(", config.vision_end_token_id: ")", config.video_token_id: "v",
        config.audio_start_token_id: "[", config.audio_end_token_id: "]", config.audio_token_id: "a",
    }  # fmt: skip
    shown = "".join(names.get(i, "") for i in sample["input_ids"].tolist())
    assert shown == "([" + "vvvvaaaa" * 5 + "])"  # four visual tokens per pair of frames, two audio tokens per second
    time = sample["position_ids"][0]
    seen, heard = (time[sample["input_ids"] == token] for token in (config.video_token_id, config.audio_token_id))
    assert (heard - heard[0]).tolist() == list(range(20))
    assert (seen - seen[0]).tolist() == [4 * (i // 4) for i in range(20)] and seen[0] == heard[0]
    ids = prepared(processor, "avv")["input_ids"][0]  # two clips stand one after the other
    placed = ids[batches.media_mask(config, ids)].tolist()
    assert placed == [config.audio_token_id] * 20 + [config.video_token_id] * 40


def test_generation_in_a_left_padded_batch_answers_as_each_alone(model, processor):
    prompts = [prepared(processor, kinds) for kinds in ("va", "is", "avv")]
    batch = batches.batch(model, processor.tokenizer, omni.encode(model, prompts))
    assert (batch["attention_mask"][:, -1] == 1).all() and batch["attention_mask"][1, 0] == 0
    together = omni.generate(model, processor.tokenizer, batch, max_new_tokens=8)
    for text, prompt in zip(together, prompts, strict=True):
        out = model.generate(**whole(model, prompt), max_new_tokens=8, do_sample=False)
        assert text == processor.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_labels_are_the_answer_and_its_end(model, processor):
    (sample,) = omni.encode(model, [prepared(processor, "is")])
    batch = batches.batch(model, processor.tokenizer, [sample, sample], ["<answer>bell</answer>", "top left"])
    learned = [row[row != omni.IGNORE].tolist() for row in batch["labels"]]
    tokens = [processor.tokenizer.convert_ids_to_tokens(ids) for ids in learned]
    assert tokens == [["<answer>", "bell", "</answer>", omni.END], ["top", "left", omni.END]]
    kinds = batches.segments(model.config, batch)[1]
    counts = {name: int((kinds == number).sum()) for number, name in enumerate(batches.SEGMENTS)}
    assert counts["answer"] == 3 and counts["video"] == 4 and counts["audio"] == 2  # four cells, one second
    assert (kinds == batches.PADDING).sum() == 1 and counts["text"] == len(sample["input_ids"]) - 6


def test_the_loss_is_the_mean_over_answer_tokens_of_the_whole_logits(model, processor):
    samples = omni.encode(model, [prepared(processor, kinds) for kinds in ("is", "a")])
    batch = batches.batch(model, processor.tokenizer, samples, ["bell", "top left"])
    with torch.no_grad():
        loss, outputs = batches.answer_loss(model, batch)
        logits = model.lm_head(batches.last_hidden(model, batch))[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(batches.answer_loss(model, batch, count=10)[0], expected * 5 / 10)
    assert outputs.logits.shape[0] == 5  # bell, top, left and two ends


def test_video_patches_are_those_of_the_image_processor(processor):
    frame = render.frame(SCENE, 4)[::2, ::2]  # at the size of the model: the two resize differently
    video = processor.video_processor([np.stack([frame, frame])])
    image = processor.image_processor([frame], return_tensors="pt")
    assert video["video_grid_thw"].tolist() == image["image_grid_thw"].tolist() == [[1, 8, 8]]
    torch.testing.assert_close(
        video["pixel_values_videos"].float(), image["pixel_values"].float(), rtol=1e-4, atol=1e-4
    )


def test_the_two_frames_of_a_pair_are_told_apart(processor):
    a, b = render.frames(Scene(0, 0, (sample_thing(np.random.default_rng(0), motion="swaying"),)))[[1, 3]]
    one, two = (processor.video_processor([np.stack(pair)])["pixel_values_videos"] for pair in ((a, b), (b, a)))
    assert not torch.equal(one, two)
    torch.testing.assert_close(one.view(64, 3, 2, -1)[:, :, 0], two.view(64, 3, 2, -1)[:, :, 1])


def test_the_tokenizer_keeps_tags_and_numbers_whole(processor):
    text = "<range>2,6</range> [16,24] what is at top left ?"
    assert processor.tokenizer.tokenize(text)[:5] == ["<range>", "2", ",", "6", "</range>"]
    assert processor.tokenizer.tokenize("[16")[1] == "16"
    assert processor.tokenizer.tokenize("zebra") == [small.UNKNOWN]


def test_a_saved_base_is_the_base(model, processor, tmp_path):
    omni.save(tmp_path, model, processor)
    again, reader = load_base(tmp_path)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    one, two = (prepared(p, "va") for p in (processor, reader))
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)


def test_what_does_not_fit_the_model_is_refused(model, processor, tmp_path):
    with pytest.raises(ValueError, match="features are 16 wide, the model 32; run the encode stage"):
        batches.batch(model, processor.tokenizer, [{"features": torch.zeros(1, 16)}])
    with pytest.raises(FileNotFoundError, match="config.json is missing.*dvc repro base"):
        load_base(tmp_path)
    with pytest.raises(ValueError, match=r"\[frames, height, width, 3\]"):
        processor.video_processor([np.zeros((0, 224, 224, 3), np.uint8)])
