"""I-LoRA as a citizen of PEFT, on a small transformers model."""

import inspect
import json
import os
import pydoc
from dataclasses import fields

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from crab.ilora import ILoraConfig, ILoraLayer, join_steps, record_routing

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(12).view(2, 6)


def base_model(layers=2, hidden=16):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=32, hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=31, pad_token_id=0)).eval()


def config(**choices):
    return ILoraConfig(**(dict(r=2, lora_alpha=4, num_heads=3, target_modules=LINEARS, task_type="CAUSAL_LM",
                               router_init_std=0.5) | choices))


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.fixture
def saved(tmp_path):
    """A trained adapter on disk: (path, its logits)."""
    model = get_peft_model(base_model(), config())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def test_registered_once_and_found_by_name():
    import crab.ilora as package

    assert PeftType("ILORA") is PeftType.ILORA and PeftType.ILORA in list(PeftType)
    package.register(package.ILoraConfig, package.ILoraModel)  # a reload registers again

    class Other(package.ILoraConfig):
        pass

    Other.__module__ = "elsewhere"
    with pytest.raises(RuntimeError, match="already has a method called 'ilora'"):
        package.register(Other, package.ILoraModel)


def test_fresh_adapter_changes_nothing_and_trains_only_itself():
    base = base_model()
    before = logits(base)
    model = get_peft_model(base, config(lora_dropout=0.1))
    assert torch.equal(logits(model.eval()), before)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert all("ilora_" in n for n, p in model.named_parameters() if p.requires_grad)
    first, last = train(model, 1), train(model, 20)
    assert last < first
    assert not torch.equal(logits(model), before)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


def test_one_shared_a_a_layer_and_the_parameter_count(capsys):
    model = get_peft_model(base_model(), config())
    layers = [m for m in model.modules() if isinstance(m, ILoraLayer)]
    assert len(layers) == 2 * len(LINEARS)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len([n for n in names if "ilora_A" in n]) == len(layers)
    model.print_trainable_parameters()
    expected = sum(2 * m.in_features + 3 * 2 * m.out_features + 3 * m.in_features for m in layers)
    assert f"trainable params: {expected:,} " in capsys.readouterr().out


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_reload_bit_equal(saved, low_cpu_mem_usage):
    path, wanted = saved
    assert sorted(os.listdir(path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(base_model(), path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), wanted)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = get_peft_model_state_dict(loaded)
    on_disk = load_file(path / "adapter_model.safetensors")
    assert again.keys() == on_disk.keys() and all(torch.equal(again[k], on_disk[k]) for k in again)
    assert isinstance(PeftConfig.from_pretrained(path), ILoraConfig)
    trainable = PeftModel.from_pretrained(base_model(), path, is_trainable=True)
    train(trainable, 1)
    assert not torch.equal(logits(trainable), wanted)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float64])
def test_reload_into_a_base_of_another_dtype_bit_equal(base, autocast, tmp_path):
    model = get_peft_model(base_model().to(base), config(), autocast_adapter_dtype=autocast)
    train(model)
    model.save_pretrained(tmp_path)
    dtypes = {p.dtype for n, p in model.named_parameters() if "ilora_" in n}
    assert dtypes == {torch.float32 if autocast and base == torch.bfloat16 else base}
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base_model().to(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage,
                                           autocast_adapter_dtype=autocast)
        for name, value in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == value.dtype and torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(logits(loaded), logits(model))


def test_low_cpu_mem_usage_changes_no_dtype(saved):
    for base in (torch.bfloat16, torch.float64):
        for autocast in (True, False):
            found = [{n: p.dtype for n, p in PeftModel.from_pretrained(
                base_model().to(base), saved[0], low_cpu_mem_usage=low, autocast_adapter_dtype=autocast).named_parameters()}
                for low in (False, True)]
            assert found[0] == found[1]


def test_same_config_same_bytes(tmp_path):
    for name, targets in (("one", LINEARS), ("two", LINEARS[::-1])):
        config(target_modules=targets).save_pretrained(tmp_path / name)
    assert (tmp_path / "one/adapter_config.json").read_bytes() == (tmp_path / "two/adapter_config.json").read_bytes()


def test_several_adapters(saved, tmp_path):
    path, wanted = saved
    model = PeftModel.from_pretrained(base_model(), path)
    model.add_adapter("second", config(num_heads=2, r=1, target_modules=["q_proj"], init_weights=False))
    assert torch.equal(logits(model), wanted)
    model.set_adapter("second")
    other = logits(model)
    assert not torch.equal(other, wanted)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".second." in n for n in trained)
    model.save_pretrained(tmp_path / "both")
    both = PeftModel.from_pretrained(base_model(), tmp_path / "both")
    both.load_adapter(tmp_path / "both/second", "second")
    assert torch.equal(logits(both), wanted)
    both.set_adapter("second")
    assert torch.equal(logits(both), other)
    both.set_adapter("default")
    both.delete_adapter("second")
    assert list(both.peft_config) == ["default"] and torch.equal(logits(both), wanted)


def test_modules_to_save_round_trip(tmp_path):
    model = get_peft_model(base_model(), config(modules_to_save=["lm_head"]))
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))


def test_regex_targets_and_excluded_modules():
    model = get_peft_model(base_model(), config(target_modules=r".*layers\.\d+\.self_attn\.(q|v)_proj",
                                                exclude_modules=r".*layers\.0\..*"))
    assert [n for n, m in model.named_modules() if isinstance(m, ILoraLayer)] == [
        "base_model.model.model.layers.1.self_attn.q_proj", "base_model.model.model.layers.1.self_attn.v_proj"]
    model = get_peft_model(base_model(), config(target_modules=["q_proj"], layers_to_transform=[1]))
    assert model.base_model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]
    assert len(get_peft_model(base_model(), config(target_modules="all-linear")).base_model.targeted_module_names) == 14


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointing in (False, True):
        base = base_model()
        model = get_peft_model(base, config(init_weights=True))
        if checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        for n, p in model.named_parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        model.train()
        with record_routing(model) as routing:
            model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        assert all(len(steps) == 1 for steps in routing.values())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-7) for n in grads[0])


# ---- routing

def test_recorder_sees_every_token_and_changes_nothing(saved):
    model = PeftModel.from_pretrained(base_model(), saved[0])
    with record_routing(model) as routing:
        assert torch.equal(logits(model), saved[1])
    assert sorted(routing) == sorted(model.base_model.targeted_module_names)
    for (weights,) in routing.values():
        assert weights.shape == (2, 6, 3) and weights.min() >= 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    inputs = model.base_model.model.model.layers[0].input_layernorm(model.get_input_embeddings()(TOKENS))
    torch.testing.assert_close(routing["model.layers.0.self_attn.q_proj"][0],
                               torch.softmax(inputs @ layer.ilora_router["default"].weight.T, -1))
    logits(model)
    assert all(len(steps) == 1 for steps in routing.values()), "recorded after the block ended"


def test_recorder_through_generate(saved):
    model = PeftModel.from_pretrained(base_model(), saved[0])
    options = dict(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, min_new_tokens=4,
                   do_sample=False)
    plain = model.generate(**options)
    with record_routing(model) as routing:
        assert torch.equal(model.generate(**options), plain)
    steps = routing["model.layers.1.mlp.down_proj"]
    assert [s.shape[1] for s in steps] == [6, 1, 1, 1]
    assert join_steps(steps).shape == (2, 9, 3)
    with pytest.raises(ValueError, match="one generate call"):
        join_steps([])


def test_recorder_needs_something_to_record(saved):
    with pytest.raises(ValueError, match="no I-LoRA layers"), record_routing(base_model()):
        pass
    with pytest.raises(ValueError, match="'nobody'"), record_routing(PeftModel.from_pretrained(base_model(), saved[0]),
                                                                     "nobody"):
        pass


# ---- refusals

@pytest.mark.parametrize("choices, message", [
    (dict(r=0), "`r` must be"), (dict(r=1.5), "`r` must be"), (dict(r=True), "`r` must be"),
    (dict(num_heads=0), "`num_heads` must be"), (dict(num_heads=-1), "`num_heads` must be"),
    (dict(lora_alpha=None), "`lora_alpha` must be given"), (dict(lora_alpha=0), "`lora_alpha` must be"),
    (dict(lora_alpha=float("nan")), "`lora_alpha` must be"), (dict(lora_dropout=1.0), "`lora_dropout` must be"),
    (dict(lora_dropout=-0.1), "`lora_dropout` must be"), (dict(router="top"), "`router` must be one of"),
    (dict(router_temperature=0), "`router_temperature` must be"), (dict(router_init_std=0), "`router_init_std` must be"),
    (dict(bias="lora_only"), "`bias` must be one of"), (dict(rank_pattern={"q_proj": 0}), "`rank_pattern` must be"),
    (dict(alpha_pattern={"q_proj": -1}), "`alpha_pattern` must be"),
    (dict(rank_pattern=None), "`rank_pattern` must be a map"), (dict(alpha_pattern=[4]), "`alpha_pattern` must be a map"),
    (dict(modules_to_save="lm_head"), "`modules_to_save` must be a list of names, got 'lm_head'"),
    (dict(target_modules="(q_proj"), "`target_modules` is not a valid regular expression"),
    (dict(target_modules=".*q_proj", layers_to_transform=[0]), "`layers_to_transform` must be"),
])
def test_bad_configuration(choices, message):
    with pytest.raises(ValueError, match=message):
        config(**choices)


def test_unknown_field_raises(saved):
    with pytest.raises(TypeError, match="heads"):
        config(heads=3)
    file = saved[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"heads": 3}))
    with pytest.raises(ValueError, match="'heads'"):
        PeftModel.from_pretrained(base_model(), saved[0])
    for read in (PeftConfig.from_pretrained, base_model().load_adapter):
        with pytest.raises(TypeError, match=r"ILoraConfig has no fields \['heads'\]"):
            read(saved[0])


def test_help_tells_what_each_field_is():
    page = pydoc.render_doc(ILoraConfig, renderer=pydoc.plaintext)
    for f in fields(ILoraConfig):
        assert f.name not in ILoraConfig.__annotations__ or f"{f.name}: {f.metadata['help'][:20]}" in page
    assert list(inspect.signature(ILoraConfig).parameters) == [f.name for f in fields(ILoraConfig)]


def test_numbers_of_numpy_are_numbers(tmp_path):
    given = dict(r=np.int64(4), lora_alpha=np.float32(8), num_heads=np.int8(3), rank_pattern={"q_proj": np.int64(2)})
    config(**given).save_pretrained(tmp_path / "numpy")
    config(r=4, lora_alpha=8.0, num_heads=3, rank_pattern={"q_proj": 2}).save_pretrained(tmp_path / "plain")
    assert (tmp_path / "numpy/adapter_config.json").read_bytes() == (tmp_path / "plain/adapter_config.json").read_bytes()


@pytest.mark.parametrize("choices, message", [
    (dict(target_modules=["nothing"]), "nothing.*not found"), (dict(target_modules=None), "specify `target_modules`"),
    (dict(target_modules=["q_proj", "embed_tokens"]), "'model.embed_tokens', which is a Embedding"),
    (dict(target_modules=".*self_attn"), "'model.layers.0.self_attn', which is a Qwen2Attention"),
    (dict(rank_pattern={"qproj": 4}), "`rank_pattern` key 'qproj' matches none"),
    (dict(modules_to_save=["lm_head", "lmhead"]), "`modules_to_save` entry 'lmhead'"),
    (dict(modules_to_save=["score"]), "`modules_to_save` entry 'score' matches no module"),
])
def test_bad_targets_leave_the_base_alone(choices, message):
    base = base_model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**choices))
    assert not any(isinstance(m, ILoraLayer) for m in base.modules())


def test_the_head_of_a_classifier_is_saved_whatever_it_is_called(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return Qwen2ForSequenceClassification(Qwen2Config(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0)).eval()

    model = get_peft_model(classifier(), config(task_type="SEQ_CLS"))  # PEFT asks for `classifier`, too, which is not there
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model.eval()))
    with pytest.raises(ValueError, match="`modules_to_save` entry 'pooler'"):
        get_peft_model(classifier(), config(task_type="SEQ_CLS", modules_to_save=["pooler"]))


def test_a_base_with_an_adapter_of_another_method():
    base = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"])).base_model.model
    del base.peft_config
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' already has an adapter .*lora.layer.Linear\)"):
        get_peft_model(base, config())


def test_merging_is_refused_with_the_reason(saved):
    model = PeftModel.from_pretrained(base_model(), saved[0])
    layer = next(m for m in model.modules() if isinstance(m, ILoraLayer))
    for refused in (model.merge_adapter, model.merge_and_unload, model.unmerge_adapter, layer.merge, layer.unmerge):
        with pytest.raises(ValueError, match="weighed anew for every token"):
            refused()
    assert torch.equal(logits(model), saved[1])


def rewrite(path, change):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.ilora_router.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(NAME), r"missing model.layers.0.self_attn.q_proj.ilora_router"),
    (lambda t: t.update({NAME.replace("q_proj", "x_proj"): t[NAME].clone()}), "spare .*x_proj.ilora_router"),
    (lambda t: t.update({NAME.replace("ilora_router", "lora_A"): t[NAME].clone()}), "spare .*q_proj.lora_A"),
    (lambda t: t.update({NAME: t[NAME][:2].clone()}), r"q_proj.ilora_router.*shape \[2, 16\].*need \[3, 16\]"),
])
def test_tensors_that_do_not_fit(saved, change, message):
    rewrite(saved[0], change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base_model(), saved[0])


@pytest.mark.parametrize("base, message", [
    (dict(layers=1), "spare .*layers.1"), (dict(layers=3), "missing model.layers.2"), (dict(hidden=32), "shape"),
])
def test_adapter_of_another_base(saved, base, message):
    with pytest.raises(ValueError, match=f"Cannot load adapter 'default': .*{message}"):
        PeftModel.from_pretrained(base_model(**base), saved[0])


def test_a_refused_adapter_is_not_left_behind(saved, tmp_path):
    model = PeftModel.from_pretrained(base_model(), saved[0])
    get_peft_model(base_model(), config(r=3, modules_to_save=["lm_head"])).save_pretrained(tmp_path / "other")
    rewrite(tmp_path / "other", lambda t: t.pop(NAME))
    for _ in range(2):  # and may be tried again under the name
        with pytest.raises(ValueError, match="Cannot load adapter 'other': missing model.layers.0.self_attn.q_proj.ilora_router"):
            model.load_adapter(tmp_path / "other", "other")
        assert list(model.peft_config) == ["default"] and not any("other" in name for name in model.state_dict())
        assert model.active_adapter == "default" and torch.equal(logits(model), saved[1])
    model.load_adapter(saved[0], "again")
    model.add_adapter("own", config(r=3, modules_to_save=["lm_head"]))
    for name in ("again", "own"):  # what was there before the call stays
        with pytest.raises(ValueError, match=f"Cannot load adapter '{name}'"):
            model.load_adapter(tmp_path / "other", name)
    assert list(model.peft_config) == ["default", "again", "own"] and torch.equal(logits(model), saved[1])


def test_saving_less_than_the_adapter_is_refused(tmp_path):
    model = get_peft_model(base_model(), config())
    state = model.state_dict()
    del state["base_model.model.model.layers.0.mlp.up_proj.ilora_A.default.weight"]
    with pytest.raises(ValueError, match="Cannot save adapter 'default': missing model.layers.0.mlp.up_proj.ilora_A"):
        model.save_pretrained(tmp_path / "part", state_dict=state)
