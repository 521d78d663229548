"""The published run at a small size: its adapter as a cell, held against the release's behaviour; and its training."""

import math
from dataclasses import replace

import av
import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from sizes import SMALL

from crab import tasks
from crab.analyses import ask
from crab.analyses.routing import routing
from crab.data import records
from crab.models import omni, small
from crab.models.batches import answer_loss, batch
from crab.models.checkpoint import load_base
from crab.samples.encode import encode_all
from crab.samples.reading import read_slot
from crab.study.answer import load_adapter
from crab.study.cells import Cell, cells_of, families_of
from crab.study.hardware import Hardware
from crab.study.ledger import cost_table, metric_table
from crab.study.store import Store
from crab.study.train import adapted
from crab.world import generate
from crab.world.vocabulary import vocabulary

SLOTS = ["ks", "s4", "a2v", "v2a"]
SIZE = SMALL | {"vision_layers": 2, "audio_layers": 2}
R, N, ALPHA = 2, 3, 6.0
OPTIONS = {"r": R, "num_heads": N, "lora_alpha": ALPHA, "lora_dropout": 0.1}
#: As the chat template of Qwen2.5-Omni writes turns; it makes a system turn if none is given.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif c['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = {  # system turn, media line, question, as a release might have them
    "ks": ("You see and hear.", "This is a video and a sound:", "Which action is it?"),
    "s4": ("You see and hear.", "This is a picture and a sound:", "Which thing sounds?"),
    "a2v": ("You see and hear.", "These are two videos and a sound:", "Which video matches the sound?"),
    "v2a": ("You see and hear.", "This is a video and two sounds:", "Which sound matches the video?"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose tokenizer has a chat template, as a published one has."""
    folder, known = tmp_path_factory.mktemp("base"), vocabulary()
    words = {*known["words"], *"system you see hear be kind this is a these are matches thing it : .".split()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "CLIP_SECONDS", 30)  # as the published one hears: the two sounds of v2a are joined
        processor = small.build_processor(sorted(words), known["tags"], SIZE)
        processor.tokenizer.chat_template = TEMPLATE
        omni.save(folder, small.build_model(processor, SIZE, seed=0), processor)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    generate.build(root, 0, train=3, test=2, caption=1, workers=1, slots=SLOTS, progress=False)
    records.write_manifest(root)
    return root


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    entries = {slot: dict(zip(("system", "media", "question"), texts, strict=True)) for slot, texts in WORDS.items()}
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoded(base, world, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded")
    encode_all(world, SLOTS, base, out, workers=1, compatibility="published", cache=False, prompts=prompts)
    return out


@pytest.fixture
def store(encoded, world, base, tmp_path):
    answer = {"batch_size": 4, "max_new_tokens": 4, "segmenter": "grabcut"}
    folders = (tmp_path / "cells", tmp_path / "cells.json.xz", tmp_path / "adapters")
    return Store(
        encoded, world, base, *folders, batch_size=4, precision="fp32", answer=answer, hardware=Hardware(workers=1)
    )


# ---------------------------------------------------------------- the release, from AVUIE.md


def published_modules(model):
    """Published name and module, by the ending of the name alone."""
    parts = {"model.language_model.": "model.", "model.audio_tower.": "audio_tower.", "model.visual.": "visual."}
    endings = tuple(f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down"))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(endings):
            ours = next(part for part in parts if name.startswith(part))
            yield "base_model.model." + parts[ours] + name.removeprefix(ours), module


@pytest.fixture(scope="module")
def weights(base, tmp_path_factory):
    """A fabricated finetune_weights.bin."""
    path, g, tensors = tmp_path_factory.mktemp("release") / "finetune_weights.bin", torch.Generator().manual_seed(1), {}
    for name, module in published_modules(load_base(base)[0]):
        wide = module.in_features
        tensors[f"{name}.lora_A.weight"] = torch.randn(R, wide, generator=g) / math.sqrt(wide)
        tensors[f"{name}.lora_route.weight"] = torch.randn(N, wide, generator=g)
        for i in range(N):
            tensors[f"{name}.lora_B{i}.weight"] = 0.3 * torch.randn(module.out_features, R, generator=g)
    assert {name.split(".")[2] for name in tensors} == {"model", "audio_tower", "visual"}
    torch.save(tensors, path)
    return path


def released_model(base, weights):
    """The thinker with y = W x + (alpha / r) sum_i softmax(R x)_i B_i A x on every module that the endings match."""
    model, processor = load_base(base)
    tensors = torch.load(weights, weights_only=True)

    def hook_of(name):
        A, route, *heads = (
            tensors[f"{name}.{part}.weight"] for part in ("lora_A", "lora_route", "lora_B0", "lora_B1", "lora_B2")
        )

        def hook(_module, inputs, result):
            gates = torch.softmax(inputs[0] @ route.T, dim=-1, dtype=torch.float32)
            for i, B in enumerate(heads):
                result = result + ALPHA / R * gates[..., i, None] * (inputs[0] @ A.T @ B.T)
            return result

        return hook

    for name, module in published_modules(model):
        module.register_forward_hook(hook_of(name))
    return model, processor


def frames_of(path, count=10):
    """Frames from the first to the last, evenly, 224 x 224."""
    with av.open(str(path)) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    chosen = torch.linspace(0, len(every) - 1, count).round().long().tolist()
    return [np.asarray(every[i].resize((224, 224), Image.Resampling.BICUBIC)) for i in chosen]


def sound_of(path, share=None, shares=5):
    wave = soundfile.read(path, dtype="float32")[0]
    size = len(wave) // shares
    return wave if share is None else wave[share * size : (share + 1) * size]


def released_logits(model, processor, slot, record, answer):
    """What the release computes: logits at each answer token and at the end, by the model's own forward."""
    system, line, question = WORDS[slot]
    video, audio, image = (
        f"<|{s}_bos|><|{k}|><|{s}_eos|>" for s, k in (("vision", "VIDEO"), ("audio", "AUDIO"), ("vision", "IMAGE"))
    )
    files = {"video": [], "audio": [], "image": []}
    for item in record["media"]:
        files[item.kind].append(item.path)
    data = {}
    if files["image"]:
        order, still = image + audio, Image.open(files["image"][0]).convert("RGB")
        data["images"] = [np.asarray(still.resize((224, 224), Image.Resampling.BICUBIC))]
        sounds = [sound_of(files["audio"][0], 0 if "image_path" in record else int(record["frame_idx"]))]
    else:
        order = audio + video if slot == "a2v" else video + audio
        data["videos"] = [np.stack([frame for path in files["video"] for frame in frames_of(path)])]
        sounds = [sound_of(path) for path in files["audio"]]
    data["audio"] = [np.concatenate(sounds)]  # two of a kind are one placeholder
    text = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{line}{order}{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = processor(text=[text], sampling_rate=16_000, fps=1.0, return_tensors="pt", **data)
    tail = torch.tensor([processor.tokenizer(answer)["input_ids"] + [processor.tokenizer.eos_token_id]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "video_second_per_grid" in inputs:
        inputs["video_second_per_grid"] = torch.as_tensor(inputs["video_second_per_grid"])
    with torch.no_grad():
        return model(**inputs).logits[0, -tail.shape[1] - 1 : -1]


# ---------------------------------------------------------------- the published adapter


def test_the_published_adapter_is_a_cell_that_computes_what_the_release_does(store, base, world, weights, prompts):
    methods = {"ilora": {**OPTIONS, "weights": str(weights), "runs": ["joint-explicit"]}}
    ((family, entry),) = families_of(methods).items()
    cells = cells_of(
        family, entry["setting"], entry["method"], entry["options"], 1e-4, SLOTS, 1, [0], form=entry["form"]
    )
    (cell,) = store.run(cells, "test", need="adapter")
    table = metric_table(store.ledger, [cell])  # answered and scored like any other
    assert set(table["slot"]) == set(SLOTS) and (table["n_found"] == 2).all()
    cost = cost_table(store.ledger, [cell]).iloc[0]
    assert cost["steps"] == 0 and cost["trainable_parameters"] == sum(
        tensor.numel() for tensor in torch.load(weights, weights_only=True).values()
    )
    assert store.run(cells, "again", need="adapter")[0].key == cell.key
    store.publish([cell])
    folder = store.adapter(cell)
    assert folder == store.published / "joint-ilora-explicit"
    assert str(weights.parent) not in "".join(p.read_text(encoding="utf-8") for p in folder.glob("*.json"))

    model, processor = load_base(base)
    model = load_adapter(model, folder)
    release = released_model(base, weights)
    for slot in SLOTS:
        for split in ("train", "test"):
            record, samples = records.read(world, slot, split)[0], read_slot(store.encoded, slot, split, base)
            text = "the answer is <answer>one</answer>"
            inputs = batch(model, processor.tokenizer, [samples[0]], [text])
            with torch.no_grad():
                _, outputs = answer_loss(model, inputs)
            expected = released_logits(*release, slot, record, text)
            torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-4)
            plain, _ = load_base(base)
            with torch.no_grad():
                _, without = answer_loss(plain, batch(plain, processor.tokenizer, [samples[0]], [text]))
            assert (without.logits - expected).abs().max() > 0.05  # the adapter counts

    routes = routing(folder, store.encoded, base, ["ks", "s4"], 2, 4)
    assert sorted(routes["layer"].unique()) == [0, 1] and set(routes["segment"]) == {"text", "video", "audio", "answer"}
    record = records.read(world, "ks", "test")[0]
    reply = ask.ask(model, processor, record, "ks", compatibility="published", max_new_tokens=4, prompts=prompts)
    assert reply.instruction == "Which action is it?" and not reply.unknown
    assert reply.text == store.answers(store.run(cells, "texts", need="answers")[0], "ks")[record["id"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "train.methods: r is 4, and 2 in .*finetune_weights.bin.*set r to 2"),
        ({"num_heads": 2}, "num_heads is 2, and 3 in"),
        ({"weights": "/nowhere/finetune_weights.bin"}, "weights is '/nowhere/.*no such file"),
        ({"weights": __file__}, "is not a torch-saved file"),
    ],
)
def test_a_published_file_that_does_not_fit_is_refused_before_anything_runs(store, weights, changes, message):
    cell = Cell("joint-ilora-bare", "ilora", OPTIONS | {"weights": str(weights)} | changes, 1e-4, tuple(SLOTS), 1)
    with pytest.raises(ValueError, match=message):
        store.run([cell], "test")
    assert not list(store.cells.glob("*/adapter")) if store.cells.exists() else True


@pytest.mark.parametrize("options", [{"targets": "published"}, {"weights": __file__}])
def test_cached_features_are_refused_if_encoders_are_adapted(store, base, world, tmp_path, options):
    encode_all(world, ["ks"], base, tmp_path / "cached", workers=1)
    cell = Cell("joint-ilora-bare", "ilora", OPTIONS | options, 1e-4, ("ks",), 1)
    with pytest.raises(ValueError, match="features of ks are cached in .*; set encode.cache to false"):
        replace(store, encoded=tmp_path / "cached").run([cell], "test")


# ---------------------------------------------------------------- the published training


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_adapters_in_the_encoders(base, encoded, checkpointing):
    """The same as by the model's own forward pass, over pixels and sound."""
    samples = [read_slot(encoded, slot, "train", base)[0] for slot in ("ks", "s4")]
    answers = ["it is the bell <answer>one</answer>", "<answer>two</answer>"]
    model, processor = load_base(base)
    options = OPTIONS | {"lora_dropout": 0.0, "targets": "published", "init_weights": False}
    peft_model = adapted(model, "ilora", options)
    tokens = [processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id] for text in answers]
    for sample, tail in zip(samples, tokens, strict=True):
        inputs, tail = dict(sample["prompt"]), torch.tensor([tail])
        ids = torch.cat([inputs["input_ids"], tail], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "video_second_per_grid" in inputs:
            inputs["video_second_per_grid"] = torch.as_tensor(inputs["video_second_per_grid"])
        logits = peft_model(**inputs).logits[0, -tail.shape[1] - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, tail[0], reduction="sum")
        (loss / sum(map(len, tokens))).backward()
    expected = gradients(peft_model)
    assert {name.split(".")[3] for name in expected} == {"language_model", "audio_tower", "visual"}
    peft_model.zero_grad()
    if checkpointing:
        peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft_model.train()
    for embed in (False, True):
        inputs = batch(model, processor.tokenizer, samples, answers, embed=embed)
        loss, _ = answer_loss(peft_model, inputs)
        loss.backward()
        result = gradients(peft_model)
        peft_model.zero_grad()
        assert result.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(result[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cell_with_the_published_targets_trains_the_encoders_too(store, precision):
    hardware = Hardware(workers=1, checkpointing=True, accumulate=2)
    options = OPTIONS | {"targets": "published"}
    cell = Cell("joint-ilora-explicit", "ilora", options, 1e-2, ("ks", "s4"), 2, form="explicit")
    (cell,) = replace(store, hardware=hardware, precision=precision).run([cell], "test", need="adapter")
    model = load_adapter(load_base(store.base)[0], store.adapter(cell))
    moved = {n.split(".")[3] for n, p in model.named_parameters() if "ilora_B" in n and p.abs().max() > 0}
    assert moved == {"language_model", "audio_tower", "visual"}  # B is zero at start


def test_routers_that_read_the_instruction_cannot_be_in_encoders(store):
    options = OPTIONS | {"targets": "published", "router_input": "instruction"}
    with pytest.raises(ValueError, match="routers in the encoders see no instruction; set router_input to token"):
        store.run([Cell("joint-ilora-bare", "ilora", options, 1e-2, ("ks",), 1)], "test")
    with pytest.raises(ValueError, match="targets is 'all'; with this base, use one of language, published"):
        store.run([Cell("joint-ilora-bare", "ilora", OPTIONS | {"targets": "all"}, 1e-2, ("ks",), 1)], "test")


# ---------------------------------------------------------------- prompts


def test_prompts_of_a_file_in_the_models_own_chat_template(base, encoded, prompts, world, tmp_path):
    tokenizer = omni.load_processor(base).tokenizer
    sample = read_slot(encoded, "ks", "test", base)[0]
    text = tokenizer.decode(sample["prompt"]["input_ids"][0]).replace("<|unknown|>", "#")
    assert text.startswith("# # # # # system you see and hear . <|im_end|>")
    assert " user this is a video and a sound : <|vision_bos|> <|VIDEO|>" in text
    assert "<|vision_eos|> <|audio_bos|> <|AUDIO|>" in text and "<|audio_eos|> which action is it ? <|im_end|>" in text
    assert text.endswith("assistant") and sample["text"] == {"id": "ks/test/00000", "instruction": WORDS["ks"][2]}
    encode_all(world, ["ks"], base, tmp_path / "cached", workers=1, compatibility="published", prompts=prompts)
    cached = read_slot(tmp_path / "cached", "ks", "test", base)[0]
    assert torch.equal(cached["input_ids"], sample["prompt"]["input_ids"][0])
    encode_all(world, ["ks"], base, tmp_path / "own", workers=1, cache=False, compatibility="published")
    own = read_slot(tmp_path / "own", "ks", "test", base)[0]["prompt"]["input_ids"][0]
    text = tokenizer.decode(own).replace("<|unknown|>", "#")
    assert "system be kind <|im_end|>" in text and "user <|vision_bos|>" in text  # the template's system turn
    assert "<|audio_eos|> which action takes place in the video ? <|im_end|>" in text


def test_a_wrong_prompts_file_stops_the_encode_stage_at_once(base, world, prompts, tmp_path):
    with pytest.raises(ValueError, match="prompts.yaml: slot cremad: there is no entry"):
        encode_all(world, ["cremad"], base, tmp_path, workers=1, prompts=prompts)
    assert not list(tmp_path.iterdir())


def test_words_of_the_system_turn_count_in_the_digest(base, world, prompts, tmp_path):
    digests = []
    for system in ("one", "two"):
        path = tmp_path / f"{system}.yaml"
        path.write_text(f'ks: {{system: "{system}", question: "Which?"}}', encoding="utf-8")
        done = encode_all(world, ["ks"], base, tmp_path / system, workers=1, cache=False, prompts=path)
        digests.append(done["ks/test"]["digest"])
    assert digests[0] != digests[1]
    assert tasks.read_prompts(prompts)["ks"].system == WORDS["ks"][0]
