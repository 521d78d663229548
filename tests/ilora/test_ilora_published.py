"""The published adapter file, made at small sizes in its exact shape, on a small thinker."""

import json
import math
import os
import pickle
import re
import stat

import numpy as np
import pytest
import torch
from ilora_models import equal, refuses
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from crab.ilora import ILoraConfig, ILoraLayer, published
from crab.ilora.published import PUBLISHED_TARGETS, import_published, published_state_dict, read_published
from crab.models import omni, small

HIDDEN, KEYS, MLP, ENCODER, LAYERS = 32, 16, 48, 32, 2
SIZE = dict(hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=2)
SIZE |= dict(num_key_value_heads=1, rope_theta=1e4, encoder_size=ENCODER, vision_layers=LAYERS, audio_layers=LAYERS)
SIZE |= dict(image_size=112, patch_size=14, merge_size=4, mel_bins=16, hop_length=2000, n_fft=2048)
R, N, ALPHA = 2, 3, 5.0

LAYER, SELF, FEED = "model.language_model.layers.{}.", "self_attn.", "mlp."
# Beginnings of module names as published and as they are here, projections, in and out features.
ROWS = [
    ("model.layers.{}." + SELF, LAYER + SELF, ("q", "o"), HIDDEN, HIDDEN),
    ("model.layers.{}." + SELF, LAYER + SELF, ("k", "v"), HIDDEN, KEYS),
    ("model.layers.{}." + FEED, LAYER + FEED, ("gate", "up"), HIDDEN, MLP),
    ("model.layers.{}." + FEED, LAYER + FEED, ("down",), MLP, HIDDEN),
    ("audio_tower.layers.{}." + SELF, "model.audio_tower.layers.{}." + SELF, ("q", "k", "v"), ENCODER, ENCODER),
    ("visual.blocks.{}." + FEED, "model.visual.blocks.{}." + FEED, ("gate", "up"), ENCODER, 2 * ENCODER),
    ("visual.blocks.{}." + FEED, "model.visual.blocks.{}." + FEED, ("down",), 2 * ENCODER, ENCODER),
]
MODULES = {
    f"base_model.model.{theirs.format(i)}{short}_proj": (f"{ours.format(i)}{short}_proj", (inside, outside))
    for theirs, ours, projections, inside, outside in ROWS
    for i in range(LAYERS)
    for short in projections
}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EAR = "base_model.model.audio_tower.layers.1.self_attn.k_proj"
EYE = "base_model.model.visual.blocks.0.mlp.down_proj"


def fabricate(r=R, heads=N, dtype=torch.float32):
    """Tensors with the names and shapes that the published training saves."""
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (_, (inside, outside)) in MODULES.items():
        tensors[f"{name}.lora_route.weight"] = torch.randn(heads, inside, generator=g)
        tensors[f"{name}.lora_A.weight"] = torch.randn(r, inside, generator=g) / math.sqrt(inside)
        for i in range(heads):
            tensors[f"{name}.lora_B{i}.weight"] = 0.2 * torch.randn(outside, r, generator=g)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def processor():
    return small.build_processor(["heard", "is", "what"], ["<answer>", "</answer>"], SIZE)


@pytest.fixture(scope="module")
def inputs(processor):
    """A clip of four frames with two seconds of sound, and a question."""
    g = np.random.default_rng(0)
    video = omni.Media("video", g.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8))
    media = [video, omni.Media("audio", g.normal(size=32_000).astype(np.float32))]
    return {k: torch.as_tensor(v) for k, v in omni.prepare(processor, media, "what is heard ?").items()}


@pytest.fixture
def base(processor):
    return small.build_model(processor, SIZE, seed=0).eval()


@pytest.fixture
def file(tmp_path):
    """Writes tensors as the published training does, and returns the path."""

    def write(tensors=None, **options):
        path = tmp_path / "finetune_weights.bin"
        torch.save(fabricate() if tensors is None else tensors, path, **options)
        return path

    return write


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def published_loop(model, tensors, alpha, within=""):
    """Hooks that add the published formula, one head after the other, to the output of each module."""

    def hook_for(name):
        A, R = (tensors[f"{name}.{part}.weight"] for part in ("lora_A", "lora_route"))
        heads = [tensors[f"{name}.lora_B{i}.weight"] for i in range(len(R))]

        def hook(module, args, result):
            weights = torch.softmax(args[0] @ R.T, dim=-1, dtype=torch.float32)
            for i, B in enumerate(heads):
                result = result + weights[..., i, None] * (args[0] @ A.T @ B.T) * alpha / len(A)
            return result

        return hook

    modules = {name: model.get_submodule(ours) for name, (ours, _) in MODULES.items() if within in name}
    return [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]


# ---- import


@pytest.mark.parametrize("r, heads", [(2, 3), (3, 2), (1, 1)])
def test_imported_adapter_is_the_published_loop(base, processor, inputs, file, tmp_path, r, heads):
    tensors = fabricate(r, heads)
    config = import_published(file(tensors), base, tmp_path / "adapter", lora_alpha=ALPHA)
    assert (config.r, config.num_heads, config.lora_alpha, config.lora_dropout) == (r, heads, ALPHA, 0.1)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs)
    reference = small.build_model(processor, SIZE, seed=0).eval()
    for part in ("audio_tower", "visual", "model.model.layers"):  # each part changes the logits
        before = logits(reference, inputs)
        published_loop(reference, tensors, ALPHA, within=part)
        assert (logits(reference, inputs) - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted, logits(reference, inputs), rtol=1e-4, atol=1e-5)


def test_loads_bit_equal_at_exactly_the_published_targets_and_trains_on(base, inputs, file, tmp_path):
    tensors = fabricate()
    import_published(file(tensors), base, tmp_path / "adapter", lora_alpha=ALPHA)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, ILoraLayer)}
    assert sorted(layers) == sorted(ours for ours, _ in MODULES.values()) and len(layers) == LAYERS * (7 + 3 + 3)
    for name, (ours, (_, outside)) in MODULES.items():
        a, b, route = (getattr(layers[ours], p)["default"].weight for p in ("ilora_A", "ilora_B", "ilora_router"))
        assert b.shape == (outside, N * R) and layers[ours].scaling["default"] == ALPHA / R
        assert torch.equal(a, tensors[f"{name}.lora_A.weight"])
        assert torch.equal(route, tensors[f"{name}.lora_route.weight"])
        for i in range(N):
            assert torch.equal(b[:, i * R : (i + 1) * R], tensors[f"{name}.lora_B{i}.weight"])
    assert all(("ilora_" in n) == p.requires_grad for n, p in model.named_parameters())
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grown = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert {"audio_tower", "visual", "language_model"} == {n.split(".")[3] for n in grown}


def test_the_folder_is_what_save_pretrained_writes_also_from_the_meta_device(base, file, tmp_path):
    import_published(file(), base, tmp_path / "adapter", lora_alpha=ALPHA)
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    PeftModel.from_pretrained(base, tmp_path / "adapter").save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert equal(one, two)
    files = [tmp_path / name / "adapter_config.json" for name in ("adapter", "again")]
    one, two = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    assert {k for k in one | two if one.get(k) != two.get(k)} <= {"auto_mapping", "base_model_name_or_path"}
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").unload()
    import_published(file(), model.to("meta"), tmp_path / "meta", lora_alpha=ALPHA)
    for name in os.listdir(tmp_path / "adapter"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "meta" / name).read_bytes()


@pytest.mark.parametrize("prefix", ["", "module.", "thinker.", "module._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_both_of_torchs_formats_and_names_with_a_prefix(file, prefix, zipped):
    tensors = fabricate()
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    assert equal(read_published(file(named, _use_new_zipfile_serialization=zipped)), tensors)


# ---- export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_to_the_published_names_and_values(base, file, tmp_path, dtype):
    tensors = fabricate(dtype=dtype)
    import_published(file(tensors), base, tmp_path / "adapter", lora_alpha=ALPHA)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    back = published_state_dict(model)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k].to(dtype), tensors[k]) and back[k].is_contiguous() for k in tensors)
    assert len({t.untyped_storage().data_ptr() for t in back.values()}) == len(back), "tensors share memory"
    back[f"{Q0}.lora_A.weight"].zero_()
    assert torch.equal(published_state_dict(model)[f"{Q0}.lora_A.weight"].to(dtype), tensors[f"{Q0}.lora_A.weight"])


def test_an_adapter_trained_here_goes_out_and_comes_in_again(base, inputs, file, tmp_path):
    torch.manual_seed(0)
    settings = dict(r=2, lora_alpha=ALPHA, num_heads=4, init_weights=False, lora_dropout=0.1)
    model = get_peft_model(base, ILoraConfig(target_modules=PUBLISHED_TARGETS, **settings)).eval()
    expected = logits(model, inputs)
    path = file(published_state_dict(model))
    model.add_adapter("words", ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=omni.LANGUAGE_TARGETS))
    modules = {name for name in MODULES if name.startswith("base_model.model.model.")}
    names = {f"{m}.{p}.weight" for m in modules for p in ("lora_A", "lora_route", "lora_B0", "lora_B1")}
    assert set(published_state_dict(model, "words")) == names
    base = model.unload()
    import_published(path, base, tmp_path / "adapter", lora_alpha=ALPHA)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs), expected)


def test_at_full_size_these_are_the_published_runs_parameters():
    """The published run reports 870.48 million trainable parameters at r = 128, N = 3."""
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    audio = dict(encoder_layers=32, d_model=1280, encoder_ffn_dim=5120, encoder_attention_heads=20, output_dim=3584)
    text |= dict(num_key_value_heads=4, vocab_size=152064)
    with torch.device("meta"):
        config = Qwen2_5OmniThinkerConfig(text_config=text, vision_config=vision, audio_config=audio)
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    modules = [m for name, m in model.named_modules() if re.fullmatch(PUBLISHED_TARGETS, name)]
    assert len(modules) == 28 * 7 + 32 * 3 + 32 * 3
    assert sum(128 * m.in_features + 3 * 128 * m.out_features + 3 * m.in_features for m in modules) == 870_480_512


CANNOT = dict(top_k=1, router_input="instruction", router_sharing="layer", shared_A=False, use_rslora=True, bias="all")
CANNOT |= dict(router="uniform", router_temperature=0.5, rank_pattern={"k_proj": 1}, alpha_pattern={"k_proj": 1})


@pytest.mark.parametrize("field, value", CANNOT.items())
def test_what_the_published_format_cannot_say(base, field, value):
    settings = dict(r=R, lora_alpha=ALPHA, num_heads=N, target_modules=PUBLISHED_TARGETS) | {field: value}
    with refuses(rf"`{field}` is {re.escape(repr(value))}, but the published format cannot"):
        published_state_dict(get_peft_model(base, ILoraConfig(**settings)))


def test_modules_without_a_published_name(base):
    settings = dict(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "out_proj"])
    with refuses("the published format has no name for .*out_proj"):
        published_state_dict(get_peft_model(base, ILoraConfig(**settings)))


def test_shards_and_other_methods_do_not_go_out(base):
    for model in (base, get_peft_model(base, LoraConfig(target_modules=["q_proj"]))):
        with refuses("published_state_dict: .* has no I-LoRA layers"):
            published_state_dict(model)
    base = model.unload()
    model = get_peft_model(base, ILoraConfig(r=R, lora_alpha=ALPHA, target_modules=PUBLISHED_TARGETS))
    layer = model.get_submodule("base_model.model.model.visual.blocks.1.mlp.up_proj")
    layer.ilora_B["default"].weight.data = torch.empty(0)
    with refuses(r"visual.blocks.1.mlp.up_proj.ilora_B.* has shape \[0\] .*Gather"):
        published_state_dict(model)


# ---- files that do not fit, are not whole, or are not safe


def drop(beginning, ending=""):
    def change(tensors):
        for name in [n for n in tensors if n.startswith(beginning) and n.endswith(ending)]:
            del tensors[name]

    return change


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (drop(f"{Q0}.lora_A"), f"missing {Q0}.lora_A.weight. Fetch the whole file"),
        (drop(f"{EAR}.lora_B1"), f"missing {EAR}.lora_B1.weight"),
        (drop(f"{EYE}.lora_B2"), f"missing {EYE}.lora_B2.weight"),
        (drop("base_model", ending="lora_B2.weight"), "3 heads.*missing .*lora_B2.weight; .* and 23 more"),
        (drop("base_model.model.visual"), "missing base_model.model.visual.blocks.0.mlp.gate_proj"),
        (put(f"{Q0}.lora_B3.weight", torch.ones(HIDDEN, R)), f"unexpected {Q0}.lora_B3.weight. .*give the base"),
        (put(f"{Q0}.lora_route.bias", torch.ones(N)), f"unexpected {Q0}.lora_route.bias"),
        (put(EAR.replace("k_proj", "out_proj") + ".lora_A.weight", torch.ones(R, ENCODER)), "unexpected .*out_proj"),
        (put(f"{Q0}.lora_A.weight", torch.ones(R + 1, HIDDEN)), r"has shape \[3, 32\] and needs \[2, 32\]"),
        (put(f"{EAR}.lora_route.weight", torch.ones(N - 1, ENCODER)), r"shape \[2, 32\] and needs \[3, 32\]"),
        (put(f"{Q0}.lora_B0.weight", torch.ones(R * HIDDEN)), r"lora_B0.weight has shape \[64\] and needs \[32, 2\]"),
        (put(f"{Q0}.lora_A.weight", torch.full((R, HIDDEN), math.nan)), f"{Q0}.lora_A.weight holds NaN"),
        (put(f"{Q0}.lora_A.weight", torch.ones(R, HIDDEN, dtype=torch.int8)), "is torch.int8"),
        (put(f"{Q0}.lora_A.weight", [1.0]), f"'{Q0}.lora_A.weight' is a list"),
        (put("module.base_model.model.model.x", torch.ones(1)), "'module.base.*' does not have the published form"),
        (put("lm_head.weight", torch.ones(1)), "'lm_head.weight' does not have the published form"),
        (put(7, torch.ones(1)), "entry 7 is a Tensor"),
        (put("state_dict", {"a": torch.ones(1)}), "entry 'state_dict' is a dict.*save that inner dict"),
        (drop("base_model", ending="lora_route.weight"), "no matrix '....lora_route.*PEFT itself loads plain LoRA"),
        (lambda tensors: tensors.clear(), "holds an empty dict"),
    ],
)
def test_tensors_that_do_not_fit_are_named(base, file, tmp_path, change, message):
    tensors = fabricate()
    change(tensors)
    path = file(tensors)
    with refuses(message) as error:
        import_published(path, base, tmp_path / "adapter", lora_alpha=ALPHA)
    assert str(path) in str(error.value) and os.listdir(tmp_path) == [path.name], "something was written"


def test_other_bases_and_no_alpha(base, processor, file, tmp_path):
    larger = small.build_model(processor, SIZE | dict(num_hidden_layers=3, intermediate_size=64), seed=0)
    with refuses(r"missing base_model.model.model.layers.2"):
        import_published(file(), larger, tmp_path / "adapter", lora_alpha=ALPHA)
    for model in (base.model, torch.nn.Linear(2, 2), get_peft_model(base, LoraConfig(target_modules=["q_proj"]))):
        with refuses(f"{type(model).__name__} has no layers under 'model.language_model."):
            import_published(file(), model, tmp_path / "adapter", lora_alpha=ALPHA)
    with refuses("`lora_alpha` must be given"):
        import_published(file(), model.unload(), tmp_path / "adapter", lora_alpha=None)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_file_cut_short(file, zipped, share):
    path = file(_use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with refuses(f"{path.name} is cut short or damaged; fetch it again"):
        read_published(path)


@pytest.mark.parametrize("start", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>"])
def test_a_file_that_is_no_torch_file(tmp_path, start):
    path = tmp_path / "finetune_weights.bin"
    path.write_bytes(start)
    with refuses("is not a torch-saved file: it (starts with|is empty).*Git LFS"):
        read_published(path)
    with pytest.raises(FileNotFoundError, match="nothing.bin is not a file"):
        read_published(tmp_path / "nothing.bin")


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zipped", "legacy", "pickle"])
def test_code_in_the_file_is_refused_and_not_run(tmp_path, form):
    path, mark = tmp_path / "finetune_weights.bin", tmp_path / "ran"
    content = fabricate() | {"trap": Trap(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=form == "zipped")
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    with refuses("holds more than plain tensors: perhaps code, none of it was run"):
        read_published(path)
    assert not mark.exists()


# ---- writing


def test_a_folder_in_use_is_left_alone_and_a_new_one_is_written_whole_or_not_at_all(base, file, tmp_path, monkeypatch):
    path, folder = file(), tmp_path / "deep/adapter"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="adapter exists and is not empty"):
        import_published(path, base, folder, lora_alpha=ALPHA)
    assert os.listdir(folder) == ["mine"]
    (folder / "mine").unlink()
    folder.rmdir()

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half")
        assert not folder.exists()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(published, "save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            import_published(path, base, folder, lora_alpha=ALPHA)
    assert os.listdir(tmp_path / "deep") == []
    folder.mkdir()  # empty is fine
    import_published(path, base, folder, lora_alpha=ALPHA)
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "deep/adapter")]
    assert modes[0] == modes[1]
