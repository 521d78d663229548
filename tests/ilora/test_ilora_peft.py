"""I-LoRA as a PEFT method, on a small language model."""

import os

import pytest
import torch
from ilora_models import LINEARS, TOKENS, base_model, config, equal, language_model, logits, refuses, rewrite, train
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForSequenceClassification

import crab.ilora
from crab.ilora import ILoraConfig, ILoraLayer, fixed_routing, parameter_groups, record_routing, to_static


@pytest.fixture
def saved(tmp_path):
    """A trained adapter on disk: (folder, its logits)."""
    model = get_peft_model(base_model(), config())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def test_registered_once_and_found_by_name():
    assert PeftType("ILORA") is PeftType.ILORA and PeftType.ILORA in list(PeftType)
    for _ in range(2):  # as after a reload
        crab.ilora.register(crab.ilora.ILoraConfig, crab.ilora.ILoraModel)
    assert not hasattr(PeftModel.load_adapter.lenient, "lenient")

    class Other(ILoraConfig):
        pass

    Other.__module__ = "elsewhere"
    with pytest.raises(RuntimeError, match="already has a method called 'ilora'"):
        crab.ilora.register(Other, crab.ilora.ILoraModel)


def test_fresh_adapter_changes_nothing_and_trains_only_itself(capsys):
    base = base_model()
    before = logits(base)
    model = get_peft_model(base, config(lora_dropout=0.1))
    assert torch.equal(logits(model.eval()), before)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert all("ilora_" in n for n, p in model.named_parameters() if p.requires_grad)
    layers = [m for m in model.modules() if isinstance(m, ILoraLayer)]
    assert len(layers) == 2 * len(LINEARS)
    model.print_trainable_parameters()
    expected = sum(2 * m.in_features + 3 * 2 * m.out_features + 3 * m.in_features for m in layers)
    assert f"trainable params: {expected:,} " in capsys.readouterr().out
    first, last = train(model, 1), train(model, 20)
    assert last < first and not torch.equal(logits(model), before)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


# ---- saving


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_reload_bit_equal(saved, low_cpu_mem_usage):
    folder, expected = saved
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(base_model(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert equal(get_peft_model_state_dict(loaded), load_file(folder / "adapter_model.safetensors"))
    assert isinstance(PeftConfig.from_pretrained(folder), ILoraConfig)
    trainable = PeftModel.from_pretrained(base_model(), folder, is_trainable=True)
    train(trainable, 1)
    assert not torch.equal(logits(trainable), expected)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_reload_into_a_base_of_another_dtype_bit_equal(dtype, autocast, tmp_path, saved):
    model = get_peft_model(base_model().to(dtype), config(), autocast_adapter_dtype=autocast)
    train(model)
    model.save_pretrained(tmp_path)
    dtypes = {p.dtype for n, p in model.named_parameters() if "ilora_" in n}
    assert dtypes == {torch.float32 if autocast and dtype == torch.bfloat16 else dtype}
    of_float32 = []
    for low in (False, True):
        options = dict(low_cpu_mem_usage=low, autocast_adapter_dtype=autocast)
        loaded = PeftModel.from_pretrained(base_model().to(dtype), tmp_path, **options)
        for name, value in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == value.dtype and torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(logits(loaded), logits(model))
        other = PeftModel.from_pretrained(base_model().to(dtype), saved[0], **options)
        of_float32.append({name: p.dtype for name, p in other.named_parameters()})
    assert of_float32[0] == of_float32[1]


OPTIONS = [dict(top_k=2), dict(shared_A=False), dict(router_input="instruction"), dict(router_sharing="layer")]
OPTIONS += [dict(router_temperature=0.5), dict(router="uniform", shared_A=False), dict(modules_to_save=["lm_head"])]
OPTIONS += [dict(use_rslora=True, rank_pattern={"q_proj": 3})]


@pytest.mark.parametrize("choices", OPTIONS, ids=lambda choices: "-".join(choices))
def test_options_survive_saving(choices, tmp_path):
    model = language_model(**choices)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    with crab.ilora.instruction_tokens(model, mask):
        train(model)
        expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert all(getattr(loaded.peft_config["default"], name) == value for name, value in choices.items())
    with crab.ilora.instruction_tokens(loaded, mask):
        assert torch.equal(logits(loaded), expected)


def test_several_adapters(saved, tmp_path):
    folder, expected = saved
    model = PeftModel.from_pretrained(base_model(), folder)
    model.add_adapter("second", config(num_heads=2, r=1, target_modules=["q_proj"], init_weights=False))
    assert torch.equal(logits(model), expected)
    model.set_adapter("second")
    other = logits(model)
    assert not torch.equal(other, expected)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".second." in n for n in trained)
    model.save_pretrained(tmp_path / "both")
    both = PeftModel.from_pretrained(base_model(), tmp_path / "both")
    both.load_adapter(tmp_path / "both/second", "second")
    assert torch.equal(logits(both), expected)
    both.set_adapter("second")
    assert torch.equal(logits(both), other)
    both.set_adapter("default")
    both.delete_adapter("second")
    assert list(both.peft_config) == ["default"] and torch.equal(logits(both), expected)


def test_the_head_of_a_classifier_is_saved_whatever_its_name(tmp_path):
    def classifier():
        torch.manual_seed(0)
        sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
        heads = dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
        return Qwen2ForSequenceClassification(Qwen2Config(**sizes, **heads)).eval()

    model = get_peft_model(classifier(), config(task_type="SEQ_CLS"))  # PEFT also asks for `classifier`
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    loaded.load_adapter(tmp_path, "default")  # and again over itself
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_targets_by_expression_and_by_exclusion():
    by_expression = dict(target_modules=r".*layers\.\d+\.self_attn\.(q|v)_proj", exclude_modules=r".*layers\.0\..*")
    model = get_peft_model(base_model(), config(**by_expression))
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    assert model.base_model.targeted_module_names == names
    assert len(get_peft_model(base_model(), config(target_modules="all-linear")).base_model.targeted_module_names) == 14


@pytest.mark.parametrize("reentrant, half, dropout", [(False, False, 0), (True, False, 0), (False, True, 0.3)])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, half, dropout):
    gradients = []
    for checkpointing in (False, True):
        model = language_model(lora_dropout=dropout, router_init_std=0.5).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        with record_routing(model) as routing:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            loss.backward()
        assert all(len(passes) == 1 for passes in routing.values())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    tolerance = dict(atol=0, rtol=0) if half else dict(atol=1e-6, rtol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **tolerance)


# ---- refusals


def test_a_base_with_an_adapter_of_another_method():
    base = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"])).base_model.model
    del base.peft_config
    with refuses(r"'model.layers.0.self_attn.q_proj' already has an adapter .*lora.layer.Linear\)"):
        get_peft_model(base, config())


def test_merging_is_refused_with_the_reason(saved):
    model = PeftModel.from_pretrained(base_model(), saved[0])
    layer = next(m for m in model.modules() if isinstance(m, ILoraLayer))
    for refused in (model.merge_adapter, model.merge_and_unload, model.unmerge_adapter, layer.merge, layer.unmerge):
        with refuses("cannot be merged: the weights of its heads change with every token"):
            refused()
    assert torch.equal(logits(model), saved[1])


def test_a_weighted_sum_of_adapters_is_refused_and_the_way_named_works(tmp_path):
    model = get_peft_model(base_model(), config())
    model.add_adapter("other", config())
    with refuses("no `add_weighted_adapter`, since each .* own router; .*to_static"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    for name in ("default", "other"):
        to_static(model, [0.2, 0.3, 0.5], tmp_path / name, adapter_name=name)
    plain = PeftModel.from_pretrained(base_model(), tmp_path / "default")
    plain.load_adapter(tmp_path / "other", "other")
    plain.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum", combination_type="cat")
    plain.set_adapter("sum")
    with fixed_routing(model, [0.2, 0.3, 0.5], "default"):
        torch.testing.assert_close(logits(plain), logits(model))


@pytest.mark.parametrize("first", [config(), LoraConfig(r=2, target_modules=["q_proj"])], ids=["ilora", "lora"])
def test_a_base_that_is_a_peft_model_is_refused_unchanged(saved, first):
    wrapped = get_peft_model(base_model(), first)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    message = r"the base already is a PeftModel\w* with the adapters \['default'\]. Give model.unload\(\)"
    for again in (lambda: get_peft_model(wrapped, config()), lambda: PeftModel.from_pretrained(wrapped, saved[0])):
        with refuses(message):
            again()
    assert equal(wrapped.state_dict(), before)
    assert torch.equal(logits(PeftModel.from_pretrained(wrapped.unload(), saved[0])), saved[1])


NAME = "base_model.model.model.layers.0.self_attn.q_proj.ilora_router.weight"


def test_a_refused_adapter_is_not_left_behind(saved, tmp_path):
    model = PeftModel.from_pretrained(base_model(), saved[0])
    get_peft_model(base_model(), config(r=3, modules_to_save=["lm_head"])).save_pretrained(tmp_path / "other")
    rewrite(tmp_path / "other", lambda t: t.pop(NAME))
    for _ in range(2):  # the name can be used again
        with refuses("Cannot load adapter 'other': missing model.layers.0.self_attn.q_proj.ilora"):
            model.load_adapter(tmp_path / "other", "other")
        assert list(model.peft_config) == ["default"] and not any("other" in name for name in model.state_dict())
        assert model.active_adapter == "default" and torch.equal(logits(model), saved[1])
    model.load_adapter(saved[0], "again")
    model.add_adapter("own", config(r=3, modules_to_save=["lm_head"]))
    for name in ("again", "own"):  # adapters from before the call stay
        with refuses(f"Cannot load adapter '{name}'"):
            model.load_adapter(tmp_path / "other", name)
    assert list(model.peft_config) == ["default", "again", "own"] and torch.equal(logits(model), saved[1])


def test_saving_less_than_the_adapter_is_refused(tmp_path):
    model = get_peft_model(base_model(), config())
    state = model.state_dict()
    del state["base_model.model.model.layers.0.mlp.up_proj.ilora_A.default.weight"]
    with refuses("Cannot save adapter 'default': missing model.layers.0.mlp.up_proj.ilora_A"):
        model.save_pretrained(tmp_path / "part", state_dict=state)


# ---- a learning rate for the routers


def test_parameter_groups():
    model = language_model(modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    rest, routers = parameter_groups(model, 1e-2, 1e-3)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (rest["lr"], routers["lr"]) == (1e-2, 1e-3) and len(routers["params"]) == 4
    assert all("ilora_router" in names[id(p)] for p in routers["params"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(names[id(p)] for p in rest["params"] + routers["params"]) == sorted(trained)
    torch.optim.AdamW([rest, routers])
    with refuses("no router requires gradient"):
        parameter_groups(language_model(router="uniform"), 1e-2, 1e-3)
    with refuses("`router_learning_rate` must be"):
        parameter_groups(model, 1e-2, -1)
