"""Biases of the base that are trained with an adapter: which, saved and read back whole."""

import copy

import pytest
import torch
from ilora_models import Tower, base_model, equal, language_model, refuses, rewrite
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from crab.ilora import ILoraConfig, fixed_routing, to_static
from crab.ilora.published import published_state_dict

X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
OWN = {"ilora_only": {"first"}, "all": {"first", "norm", "second"}}  # modules whose bias is trained
BIAS = pytest.mark.parametrize("bias", OWN)


def config(bias, **choices):
    settings = dict(r=2, lora_alpha=3, num_heads=3, target_modules=["first"], init_weights=False, router_init_std=1.0)
    return ILoraConfig(**settings | dict(bias=bias) | choices)


def lora_of(bias):
    return get_peft_model(Tower(), LoraConfig(target_modules=["first"], bias=bias.replace("ilora", "lora")))


def trained(bias, **choices):
    """A model after three steps."""
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


def biases(model):
    """Name of the module -> its bias."""
    names = {n: n.removeprefix("base_model.model.").replace(".base_layer", "") for n, _ in model.named_parameters()}
    return {name.removesuffix(".bias"): model.get_parameter(n) for n, name in names.items() if name.endswith(".bias")}


def open_biases(model):
    return {name for name, bias in biases(model).items() if bias.requires_grad}


@BIAS
def test_the_biases_that_lora_trains_and_their_gradient_by_hand(bias):
    model = get_peft_model(Tower(), config(bias))
    assert open_biases(model) == open_biases(lora_of(bias)) == OWN[bias]
    assert not open_biases(get_peft_model(Tower(), config("none")))
    layer, grad = model.base_model.model.first, torch.randn(2, 3, 6)
    layer(X).backward(grad)
    torch.testing.assert_close(layer.base_layer.bias.grad, grad.sum((0, 1)))
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@BIAS
def test_biases_are_saved_and_read_back_bit_equal(bias, low_cpu_mem_usage, tmp_path):
    model = trained(bias)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    saved = {name: tensor for name, tensor in tensors.items() if ".ilora_" not in name}
    assert set(saved) == {n for n in get_peft_model_state_dict(lora_of(bias)) if ".lora_" not in n}
    assert len(saved) == len(OWN[bias])
    for name, tensor in saved.items():
        start = Tower().get_parameter(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        assert not torch.equal(tensor, start)
    loaded = PeftModel.from_pretrained(Tower(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded), output(model)) and not any(p.requires_grad for p in loaded.parameters())
    assert equal(biases(loaded), biases(model))
    assert open_biases(PeftModel.from_pretrained(Tower(), tmp_path, is_trainable=True)) == OWN[bias]


@BIAS
def test_transformers_own_loader_finds_every_bias(bias, tmp_path):
    model = language_model(target_modules=["q_proj"], bias=bias)  # k and v have a bias that no adapter wraps
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith("bias"):
                p.normal_()
    model.save_pretrained(tmp_path)
    loaded = base_model()
    loaded.load_adapter(tmp_path)
    assert equal(loaded.state_dict(), model.base_model.model.state_dict())


FIRST, SECOND = "base_model.model.first.base_layer.bias", "base_model.model.second.bias"


@pytest.mark.parametrize(
    "bias, base, change, message",
    [
        ("all", Tower(), lambda t: t.pop(SECOND), "missing second.bias"),
        ("ilora_only", Tower(), lambda t: t.pop(FIRST), "missing first.base_layer.bias"),
        ("ilora_only", Tower(), lambda t: t.update({SECOND: torch.zeros(4)}), "unexpected second.bias"),
        ("none", Tower(), lambda t: t.update({FIRST: torch.zeros(6)}), "unexpected first"),
        ("ilora_only", Tower(), lambda t: t.update({FIRST: torch.zeros(5)}), r"first.*bias has shape \[5\].*\[6\]"),
        ("ilora_only", Tower(bias=False), lambda t: None, "unexpected first.base_layer.bias"),
    ],
)
def test_biases_that_do_not_fit(bias, base, change, message, tmp_path):
    trained(bias).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with refuses(f"Cannot load adapter 'default': {message}"):
        PeftModel.from_pretrained(base, tmp_path)


def test_modules_saved_whole_bring_their_own_bias(tmp_path):
    model = trained("all", modules_to_save=["second"])
    model.save_pretrained(tmp_path)
    names = {n for n in load_file(tmp_path / "adapter_model.safetensors") if ".ilora_" not in n}
    whole = ("first.base_layer.bias", "norm.bias", "second.bias", "second.weight")
    assert names == {f"base_model.model.{name}" for name in whole}
    assert torch.equal(output(PeftModel.from_pretrained(Tower(), tmp_path)), output(model))


def test_one_adapter_with_biases_and_only_while_it_is_active(tmp_path):
    model = trained("all")
    model.save_pretrained(tmp_path)
    with refuses("supports only 1 adapter with bias"):
        model.add_adapter("words", config("ilora_only"))
    model.add_adapter("words", config("none", target_modules=["second"]))
    for name, expected in (("default", OWN["all"]), ("words", set()), ("default", OWN["all"])):
        model.set_adapter(name)
        assert open_biases(model) == expected
    # the other adapter wraps `second` here, and the saved names do not show it
    model.save_pretrained(tmp_path / "both", selected_adapters=["default"])
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("", "both"))
    assert one == two
    other = get_peft_model(Tower(), config("none", target_modules=["second"]), adapter_name="other")
    other.load_adapter(tmp_path, "default")
    other.set_adapter("default", inference_mode=True)
    assert torch.equal(output(other), output(model)) and not open_biases(other)
    before = {name: bias.clone() for name, bias in biases(model).items()}
    model.delete_adapter("default")
    assert not open_biases(model) and equal(biases(model), before)
    with refuses("Adapter nobody does not exist"):
        model.base_model.delete_adapter("nobody")


def test_disabling_warns_and_leaves_the_trained_biases():
    model, base = trained("all"), Tower()
    with torch.no_grad():
        for name, bias in biases(model).items():
            base.get_submodule(name).bias.copy_(bias)
    with pytest.warns(UserWarning, match="configured to be 'all' does not produce the same output"):
        with model.disable_adapter():
            off = output(model)
    assert torch.equal(off, output(base)) and not torch.equal(off, output(Tower()))
    assert torch.equal(output(model.unload()), output(base))


@BIAS
def test_exports_take_biases_along_or_refuse_them(bias, tmp_path):
    model = trained(bias)
    lora, _ = to_static(model, [0.2, 0.3, 0.5], tmp_path)
    with fixed_routing(model, [0.2, 0.3, 0.5]):
        expected = output(model)
    plain = PeftModel.from_pretrained(Tower(), tmp_path)
    assert lora.bias == bias.replace("ilora", "lora")
    torch.testing.assert_close(output(plain), expected)
    torch.testing.assert_close(output(copy.deepcopy(plain).merge_and_unload()), expected)
    with refuses(f"`bias` is '{bias}', but the published format cannot say it"):
        published_state_dict(model)
