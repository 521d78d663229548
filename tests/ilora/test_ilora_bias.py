"""Training the base's biases beside an adapter: which, saved and read back whole, and what else then is different."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from crab.ilora import ILoraConfig, fixed_routing, to_static
from crab.ilora.published import published_state_dict


class Tower(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(5, 6, bias=bias), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
OWN = {"ilora_only": {"first"}, "all": {"first", "norm", "second"}}  # modules whose bias is trained


def config(bias, **choices):
    return ILoraConfig(**dict(r=2, lora_alpha=3, num_heads=3, target_modules=["first"], init_weights=False,
                              router_init_std=1.0, bias=bias) | choices)


def trained(bias, **choices):
    """A model after three steps, in which everything that is trained moved."""
    model = get_peft_model(Tower(), config(bias, **choices))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def output(model):
    return model(X)


def open_biases(model):
    return {n.removeprefix("base_model.model.").removesuffix(".bias").removesuffix(".base_layer")
            for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad}


def biases(model):
    return {n: getattr(model.base_model.model.get_submodule(n), "base_layer", model.base_model.model.get_submodule(n)).bias
            for n in ("first", "norm", "second")}


@pytest.mark.parametrize("bias", OWN)
def test_the_biases_that_lora_trains_and_their_gradient_by_hand(bias):
    lora = get_peft_model(Tower(), LoraConfig(target_modules=["first"], bias=bias.replace("ilora", "lora")))
    model = get_peft_model(Tower(), config(bias))
    assert open_biases(model) == open_biases(lora) == OWN[bias] and not open_biases(get_peft_model(Tower(), config("none")))
    layer, grad = model.base_model.model.first, torch.randn(2, 3, 6)
    layer(X).backward(grad)
    torch.testing.assert_close(layer.base_layer.bias.grad, grad.sum((0, 1)))
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("bias", OWN)
def test_biases_are_saved_and_read_back_bit_equal(bias, low_cpu_mem_usage, tmp_path):
    model = trained(bias)
    model.save_pretrained(tmp_path)
    kept = {n: t for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if ".ilora_" not in n}
    lora = get_peft_model_state_dict(get_peft_model(Tower(), LoraConfig(target_modules=["first"], bias=bias.replace("ilora", "lora"))))
    assert set(kept) == {n for n in lora if ".lora_" not in n} and len(kept) == len(OWN[bias])
    for name, tensor in kept.items():
        start = Tower().get_parameter(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        assert not torch.equal(tensor, start)
    loaded = PeftModel.from_pretrained(Tower(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded), output(model)) and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(b, biases(model)[n]) for n, b in biases(loaded).items())
    assert open_biases(PeftModel.from_pretrained(Tower(), tmp_path, is_trainable=True)) == OWN[bias]


def rewrite(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


FIRST, SECOND = "base_model.model.first.base_layer.bias", "base_model.model.second.bias"


def test_biases_saved_under_the_names_of_the_base_are_read_too(tmp_path):
    model = trained("all")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({FIRST.replace(".base_layer", ""): t.pop(FIRST)}))
    assert torch.equal(output(PeftModel.from_pretrained(Tower(), tmp_path)), output(model))


@pytest.mark.parametrize("bias", OWN)
def test_transformers_own_loader_finds_every_bias(bias, tmp_path):
    def base():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                            num_attention_heads=2, num_key_value_heads=1)).eval()

    tokens = torch.arange(6).view(1, 6)
    model = get_peft_model(base(), config(bias, target_modules=["q_proj"]))  # k and v have a bias that no adapter wraps
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith("bias"):
                p.normal_()
    model.save_pretrained(tmp_path)
    loaded = base()
    loaded.load_adapter(tmp_path)
    found, wanted = loaded.state_dict(), model.base_model.model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("bias, change, message", [
    ("all", lambda t: t.pop(SECOND), "missing second.bias"), ("ilora_only", lambda t: t.pop(FIRST), "missing first.base_layer.bias"),
    ("ilora_only", lambda t: t.update({SECOND: torch.zeros(4)}), "spare second.bias"),
    ("none", lambda t: t.update({FIRST: torch.zeros(6)}), "spare first"),
    ("ilora_only", lambda t: t.update({FIRST: torch.zeros(5)}), r"first.*bias has shape \[5\].*need \[6\]"),
])  # fmt: skip
def test_biases_that_do_not_fit(bias, change, message, tmp_path):
    trained(bias).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"Cannot load adapter 'default': {message}"):
        PeftModel.from_pretrained(Tower(), tmp_path)


def test_a_base_without_the_bias_and_a_state_without_it(tmp_path):
    model = trained("ilora_only")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot load adapter 'default': spare first.base_layer.bias"):
        PeftModel.from_pretrained(Tower(bias=False), tmp_path)
    state = model.state_dict()
    del state["base_model.model.first.base_layer.bias"]
    with pytest.raises(ValueError, match="Cannot save adapter 'default': missing first.base_layer.bias"):
        model.save_pretrained(tmp_path / "part", state_dict=state)


def test_modules_saved_whole_bring_their_own_bias(tmp_path):
    model = trained("all", modules_to_save=["second"])
    model.save_pretrained(tmp_path)
    names = {n for n in load_file(tmp_path / "adapter_model.safetensors") if ".ilora_" not in n}
    assert names == {f"base_model.model.{n}" for n in ("first.base_layer.bias", "norm.bias", "second.bias", "second.weight")}
    assert torch.equal(output(PeftModel.from_pretrained(Tower(), tmp_path)), output(model))


def test_one_adapter_with_biases_and_only_while_it_is_active(tmp_path):
    model = trained("all")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("words", config("ilora_only"))
    model.add_adapter("words", config("none", target_modules=["second"]))
    assert open_biases(model) == OWN["all"]
    model.set_adapter("words")
    assert not open_biases(model)
    model.set_adapter("default")
    assert open_biases(model) == OWN["all"]
    # `second` is wrapped here, by the other adapter, and not where this one was trained: the names do not tell of it
    model.save_pretrained(tmp_path / "both", selected_adapters=["default"])
    assert (tmp_path / "both/adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()
    other = get_peft_model(Tower(), config("none", target_modules=["second"]), adapter_name="other")
    other.load_adapter(tmp_path, "default")
    other.set_adapter("default", inference_mode=True)
    assert torch.equal(output(other), output(model)) and not open_biases(other)


@pytest.mark.parametrize("bias", OWN)
def test_a_deleted_adapter_trains_no_biases(bias):
    model = trained(bias)
    model.add_adapter("words", config("none", target_modules=["second"]))
    kept = {name: b.clone() for name, b in biases(model).items()}
    model.delete_adapter("default")
    assert not open_biases(model) and all(torch.equal(b, kept[name]) for name, b in biases(model).items())
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.base_model.delete_adapter("nobody")


def test_only_the_layers_of_the_adapter_itself():
    model = get_peft_model(Tower(), config("none"))
    model.add_adapter("words", config("ilora_only", target_modules=["second"]))
    assert not open_biases(model)
    model.set_adapter("words")
    assert open_biases(model) == {"second"}


def test_disabling_warns_and_leaves_the_trained_biases():
    model, base = trained("all"), Tower()
    with torch.no_grad():
        for name, bias in biases(model).items():
            base.get_submodule(name).bias.copy_(bias)
    with pytest.warns(UserWarning, match="configured to be 'all' does not produce the same output"), model.disable_adapter():
        off = output(model)
    assert torch.equal(off, output(base)) and not torch.equal(off, output(Tower()))
    with pytest.raises(ValueError, match="with its biases as they were trained"):
        model.merge_adapter()
    assert torch.equal(output(model.unload()), output(base))


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
@pytest.mark.parametrize("bias", OWN)
def test_the_static_export_takes_the_biases_along(bias, tmp_path):
    model = trained(bias)
    fixed = to_static(model, [0.2, 0.3, 0.5], tmp_path, run=lambda: model(X))
    assert fixed.config.bias == bias.replace("ilora", "lora") and 0 < fixed.error < 2
    with fixed_routing(model, [0.2, 0.3, 0.5]):
        wanted = output(model)
    plain = PeftModel.from_pretrained(Tower(), tmp_path)
    torch.testing.assert_close(output(plain), wanted)
    torch.testing.assert_close(output(copy.deepcopy(plain).merge_and_unload()), wanted)


def test_the_published_format_has_no_place_for_biases():
    with pytest.raises(ValueError, match="`bias` is 'ilora_only', which the published format cannot say"):
        published_state_dict(trained("ilora_only"))
