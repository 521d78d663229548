"""The language model on cached embeddings must be the whole model, and a saved base the base."""

import numpy as np
import pytest
import torch

from crab.world import render
from crab.world.scene import Scene, sample_scene, sample_thing
from crab.models import omni

SCENE = sample_scene(3)


def media(kinds: str) -> list[omni.Media]:
    """v: a clip of ten frames; i: one frame; a: ten seconds of sound; s: one second of it."""
    frames, wave = render.frames(SCENE)[1::2], render.waveform(SCENE)
    made = {
        "v": omni.Media("video", frames, fps=1.0),
        "i": omni.Media("image", frames[3]),
        "a": omni.Media("audio", wave),
        "s": omni.Media("audio", wave[:16000]),
    }
    return [made[k] for k in kinds]


def whole(model, inputs) -> dict:
    """The inputs as the whole model takes them, encoders included."""
    inputs = {k: torch.as_tensor(v) for k, v in inputs.items()}
    bos = (inputs["input_ids"][0] == model.config.vision_start_token_id).nonzero()[:, 0]
    own_sound = (inputs["input_ids"][0, bos + 1] == model.config.audio_start_token_id).any()
    return inputs | ({"use_audio_in_video": True} if own_sound else {})


@pytest.fixture(scope="module", params=["va", "is", "avv", "vaa", "a"])
def inputs(request, processor):
    return omni.prepare(processor, media(request.param), "what is at top left ?")


def test_cached_embeddings_give_the_whole_models_logits(model, processor, inputs):
    batch = omni.collate(model, processor.tokenizer, omni.encode(model, [inputs]))
    with torch.no_grad():
        cached = model(
            inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
        )
        torch.testing.assert_close(cached.logits, model(**whole(model, inputs)).logits, rtol=1e-5, atol=1e-5)


def test_sight_and_sound_of_a_clip_take_turns_of_two_seconds(model, processor):
    ids = omni.prepare(processor, media("va"), "what is heard ?")["input_ids"][0].tolist()
    config = model.config
    kind = {config.video_token_id: "v", config.audio_token_id: "a", config.vision_start_token_id: "(", config.vision_end_token_id: ")",
            config.audio_start_token_id: "[", config.audio_end_token_id: "]"}  # fmt: skip
    shown = "".join(kind.get(i, "") for i in ids)
    assert shown == "([" + "vvvvaaaa" * 5 + "])"  # four visual tokens a pair of frames, two audio tokens a second
    (sample,) = omni.encode(model, [omni.prepare(processor, media("va"), "what is heard ?")])
    time = sample["position_ids"][0]
    first = lambda token: time[sample["input_ids"] == token]  # noqa: E731
    seen, heard = first(config.video_token_id), first(config.audio_token_id)
    assert (heard - heard[0]).tolist() == list(range(20))
    assert (seen - seen[0]).tolist() == [4 * (i // 4) for i in range(20)] and seen[0] == heard[0]


def test_two_clips_stand_one_after_the_other(model, processor):
    ids = omni.prepare(processor, media("avv"), "which ?")["input_ids"][0]
    placed = ids[omni.media_mask(model.config, ids)].tolist()
    assert placed == [model.config.audio_token_id] * 20 + [model.config.video_token_id] * 40


def test_batched_left_padded_generation_says_what_each_alone_says(model, processor):
    prepared = [omni.prepare(processor, media(k), "what is heard ?") for k in ("va", "is", "avv")]
    batch = omni.collate(model, processor.tokenizer, omni.encode(model, prepared))
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][1, 0] == 0)
    together = omni.generate(model, processor.tokenizer, batch, max_new_tokens=8)
    for text, one in zip(together, prepared, strict=True):
        out = model.generate(**whole(model, one), max_new_tokens=8, do_sample=False)
        assert text == processor.tokenizer.decode(out[0, one["input_ids"].shape[1] :], skip_special_tokens=True)


def test_labels_are_the_answer_and_its_end_alone(model, processor):
    (sample,) = omni.encode(model, [omni.prepare(processor, media("is"), "what is heard ?")])
    batch = omni.collate(model, processor.tokenizer, [sample, sample], ["<answer>bell</answer>", "top left"])
    learned = [row[row != omni.IGNORE].tolist() for row in batch["labels"]]
    said = [processor.tokenizer.convert_ids_to_tokens(ids) for ids in learned]
    assert said == [["<answer>", "bell", "</answer>", omni.END], ["top", "left", omni.END]]


def test_video_patches_are_the_image_processors(processor):
    frame = render.frame(SCENE, 4)[::2, ::2]  # already at the model's side: resizing differs, patches must not
    video = processor.video_processor([np.stack([frame, frame])])
    image = processor.image_processor([frame], return_tensors="pt")
    assert video["video_grid_thw"].tolist() == image["image_grid_thw"].tolist() == [[1, 8, 8]]
    torch.testing.assert_close(video["pixel_values_videos"].float(), image["pixel_values"].float(), rtol=1e-4, atol=1e-4)


def test_two_frames_of_a_pair_are_told_apart(processor):
    a, b = render.frames(Scene(0, 0, (sample_thing(np.random.default_rng(0), motion="swaying"),)))[[1, 3]]
    one, two = (processor.video_processor([np.stack(pair)])["pixel_values_videos"] for pair in ((a, b), (b, a)))
    assert not torch.equal(one, two)
    halves = [x.view(64, 3, 2, -1) for x in (one, two)]
    torch.testing.assert_close(halves[0][:, :, 0], halves[1][:, :, 1])


def test_tokenizer_keeps_tags_and_numbers_whole(processor):
    text = "<range>2,6</range> [16,24] what is at top left ?"
    assert processor.tokenizer.tokenize(text)[:5] == ["<range>", "2", ",", "6", "</range>"]
    assert processor.tokenizer.tokenize("[16")[1] == "16"
    assert processor.tokenizer.tokenize("zebra") == [omni.UNKNOWN]


def test_saved_base_is_the_base(model, processor, tmp_path):
    omni.save(tmp_path, model, processor)
    again, reader = omni.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    one, two = (omni.prepare(p, media("va"), "what is heard ?") for p in (processor, reader))
    assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


def test_a_folder_without_a_model_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing.*dvc repro base"):
        omni.load(tmp_path)


def test_frames_of_a_wrong_shape_are_refused(processor):
    with pytest.raises(ValueError, match=r"\[frames, height, width, 3\]"):
        processor.video_processor([np.zeros((0, 224, 224, 3), np.uint8)])
