"""Routers shared by several modules, and routing that is not finite."""

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from crab.ilora import (
    ILoraConfig,
    ILoraLayer,
    instruction_tokens,
    parameter_groups,
    record_routing,
    to_static,
)
from crab.ilora.published import published_state_dict

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(12).view(2, 6)


def language_model(**choices):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=31, pad_token_id=0)).eval()
    if choices.pop("bare", False):
        return base
    settings = dict(r=2, lora_alpha=4, num_heads=3, target_modules=ALL, task_type="CAUSAL_LM",
                    router_init_std=3.0, init_weights=False)
    return get_peft_model(base, ILoraConfig(**settings | choices)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def routers_saved(model):
    found = get_peft_model_state_dict(model)
    return {key.removeprefix("base_model.model.").removesuffix(".ilora_router.weight"): tuple(tensor.shape)
            for key, tensor in found.items() if "router" in key}


def test_which_modules_share_a_router():
    model = language_model(router_sharing="layer")
    assert routers_saved(model) == {f"model.layers.{i}.{name}": (3, wide) for i in (0, 1)
                                    for name, wide in (("self_attn.q_proj", 16), ("mlp.down_proj", 24))}
    model = language_model(router_sharing="model")
    assert routers_saved(model) == {"model.layers.0.self_attn.q_proj": (3, 16), "model.layers.0.mlp.down_proj": (3, 24)}
    assert len(routers_saved(language_model())) == 14
    # experts of a mixture lie in their decoder layer; a module outside numbered layers keeps its own router
    nested = nn.ModuleDict({"layers": nn.ModuleList(
        [nn.ModuleDict({"lin": nn.Linear(4, 4), "experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})]),
        "first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    model = get_peft_model(nested, ILoraConfig(lora_alpha=2, target_modules=r".*", exclude_modules=r"layers|.*\.0|.*experts",
                                               router_sharing="layer"))
    assert list(routers_saved(model)) == ["layers.0.lin", "first", "second"]


class Part(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def listed(*modules):
    return nn.ModuleList(modules)


def lin():
    return nn.Linear(4, 4)


def expert():
    return Part(up=lin(), down=lin())


def swin():
    return Part(stages=listed(*(Part(blocks=listed(*(Part(q=lin(), k=lin()) for _ in range(3))), merge=lin()) for _ in range(2))))


@pytest.mark.parametrize("base, layers", [
    # whatever holds the model is no layer
    (lambda: nn.Sequential(language_model(bare=True).model, nn.Identity()), ["0.layers.0", "0.layers.1"]),
    (lambda: listed(language_model(bare=True).model), ["0.layers.0", "0.layers.1"]),
    (swin, [f"stages.{i}{block}" for i in range(2) for block in (".blocks.0", ".blocks.1", ".blocks.2", "")]),
    (lambda: Part(layers=listed(*(Part(q=lin(), experts=listed(expert(), expert())) for _ in range(2)))), ["layers.0", "layers.1"]),
    (lambda: Part(layers=listed(*(Part(experts=listed(expert(), expert())) for _ in range(2)))), ["layers.0", "layers.1"]),
    # members of several classes are parts of a layer; where the layers themselves are of several, the outermost number is it
    (lambda: Part(blocks=listed(*(Part(q=lin(), net=nn.Sequential(Part(proj=lin()), nn.GELU(), lin())) for _ in range(2)))),
     ["blocks.0", "blocks.1"]),
    (lambda: Part(layers=listed(Part(q=lin(), k=lin()), nn.ModuleDict({"mixer": Part(q=lin(), k=lin())}))), ["layers.0", "layers.1"]),
])  # fmt: skip
def test_which_layer_a_module_lies_in(base, layers):
    model = get_peft_model(base(), ILoraConfig(r=1, lora_alpha=2, target_modules="all-linear", router_sharing="layer"))
    found, wanted = {}, {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, ILoraLayer):
            router = module.ilora_router["default"]
            found.setdefault(id(getattr(router, "router", router)), set()).add(name)
            layer = max((layer for layer in layers if name.startswith(f"{layer}.")), key=len)
            wanted.setdefault((layer, module.in_features), set()).add(name)
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, wanted.values()))
    assert {layer for layer, _ in wanted} == set(layers)


def test_a_list_named_by_layers_pattern_holds_the_layers():
    model = get_peft_model(swin(), ILoraConfig(r=1, lora_alpha=2, target_modules=["q", "merge"], router_sharing="layer",
                                               layers_pattern="stages"))
    assert list(routers_saved(model)) == ["stages.0.blocks.0.q", "stages.1.blocks.0.q"]
    with pytest.raises(ValueError, match="`layers_pattern` must be left out without `layers_to_transform` or router_sharing"):
        ILoraConfig(lora_alpha=2, target_modules=["q"], layers_pattern="stages")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_a_shared_router_equals_own_routers_of_the_same_weights(sharing, checkpointing, fused, monkeypatch):
    monkeypatch.setattr(ILoraLayer, "fused", fused)
    shared = language_model(router_sharing=sharing)
    own = language_model()
    stored = dict(shared.named_parameters())
    with torch.no_grad():
        for name, tensor in own.named_parameters():
            if "ilora_" in name:
                layer = shared.get_submodule(name.rpartition(".ilora_")[0])
                part = name.rpartition(".ilora_")[2].removesuffix(".default.weight")
                router = layer.ilora_router["default"]
                tensor.copy_(getattr(router, "router", router).weight if part == "router" else stored[name])
    assert torch.equal(logits(own), logits(shared))
    for model in (own, shared):
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    grads = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    for name, p in shared.named_parameters():
        if "ilora_router" in name:  # the sum over the modules that share it
            group = [g for key, g in grads.items() if "router" in key and g.shape == p.shape
                     and (sharing == "model" or key.split(".layers.")[1][0] == name.split(".layers.")[1][0])]
            assert len(group) in {"layer": (1, 6), "model": (2, 12)}[sharing]
            torch.testing.assert_close(p.grad, sum(group), rtol=1e-4, atol=1e-6)
        elif "ilora_" in name:
            torch.testing.assert_close(p.grad, grads[name])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_a_shared_router_is_trained_saved_and_loaded_once(sharing, low_cpu_mem_usage, tmp_path):
    model = language_model(router_sharing=sharing).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 1e-2))
    assert len(optimizer.param_groups[1]["params"]) == len(routers_saved(model))
    before = {n: p.clone() for n, p in model.named_parameters() if "router" in n}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.save_pretrained(tmp_path)
    wanted = logits(model.eval())
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert on_disk.keys() == get_peft_model_state_dict(model).keys()
    assert sum("router" in key for key in on_disk) == {"layer": 4, "model": 2}[sharing]
    loaded = PeftModel.from_pretrained(language_model(bare=True), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), wanted)
    assert sum("router" in name for name, _ in loaded.named_parameters()) == len(routers_saved(model))
    copied = copy.deepcopy(loaded)
    with torch.no_grad():  # a copy shares with itself alone
        for name, tensor in copied.named_parameters():
            if "router" in name:
                tensor.zero_()
    assert torch.equal(logits(loaded), wanted) and not torch.equal(logits(copied), wanted)
    del on_disk["base_model.model.model.layers.0.mlp.down_proj.ilora_router.weight"]
    save_file(on_disk, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Cannot load adapter 'default': missing model.layers.0.mlp.down_proj.ilora_router"):
        PeftModel.from_pretrained(language_model(bare=True), tmp_path)


def test_shared_routers_of_several_adapters(tmp_path):
    model = language_model(router_sharing="layer")
    first = logits(model)
    model.add_adapter("second", ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=["k_proj", "up_proj"],
                                            init_weights=False, router_init_std=3.0, router_sharing="model"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "router" in n] == [
        "base_model.model.model.layers.0.self_attn.k_proj.ilora_router.second.weight"]
    model.save_pretrained(tmp_path)
    both = PeftModel.from_pretrained(language_model(bare=True), tmp_path)
    both.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(both), first)
    both.set_adapter("second")
    assert torch.equal(logits(both), second)
    both.delete_adapter("default")
    assert torch.equal(logits(both), second)
    base = logits(language_model(bare=True))
    assert torch.equal(logits(both.unload()), base)


@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_the_published_format_has_no_shared_router(sharing):
    model = language_model(router_sharing=sharing)
    with pytest.raises(ValueError, match=f"`router_sharing` is '{sharing}', which the published format cannot say"):
        published_state_dict(model)


def test_other_uses_of_a_shared_router():
    model = language_model(router_sharing="model")
    wanted = logits(model)
    with record_routing(model) as routing:
        assert torch.equal(logits(model), wanted)
    assert len(routing) == 14 and not torch.equal(routing["model.layers.0.self_attn.q_proj"][0],
                                                  routing["model.layers.1.self_attn.q_proj"][0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, wanted)
    assert to_static(model, [0.6, 0.3, 0.1], run=lambda: model(input_ids=TOKENS).logits).error > 0
    model = language_model(router_sharing="layer", router_input="instruction")
    with instruction_tokens(model, torch.ones_like(TOKENS, dtype=torch.bool)), record_routing(model) as routing:
        logits(model)
    # q, k and v read the same input, o another
    q, k, o = (routing[f"model.layers.0.self_attn.{name}_proj"][0] for name in "qko")
    assert torch.equal(q, k) and not torch.equal(q, o)


# ---- routing that is not finite

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("choices", [{}, dict(fused=False), dict(lora_dropout=0.1), dict(router_sharing="layer"),
                                     dict(router_input="instruction"), dict(autocast=True)], ids=lambda c: "-".join(c))
def test_logits_that_are_not_finite_name_the_module(value, choices, monkeypatch):
    choices = dict(choices)
    half, fused = choices.pop("autocast", False), choices.pop("fused", True)
    monkeypatch.setattr(ILoraLayer, "fused", fused)
    model = language_model(target_modules=["v_proj", "down_proj"], **choices).train()
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    with torch.no_grad():
        layer.ilora_router["default"].weight[1] = value
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=half), \
                instruction_tokens(model, mask), \
                pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj' \(adapter 'default'\) is not finite: its own"):
            model(input_ids=TOKENS)
    with torch.no_grad():
        layer.ilora_router["default"].weight[1] = 0
        model.base_model.model.model.layers[1].input_layernorm.weight[0] = value
    with instruction_tokens(model, mask), pytest.raises(ValueError, match=r"'model.layers.1.self_attn.v_proj'.*its input does"):
        model(input_ids=TOKENS)
    monkeypatch.setattr(ILoraLayer, "check_routing", False)
    with instruction_tokens(model, mask):
        model(input_ids=TOKENS)


def test_large_logits_are_no_error():
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7)), ILoraConfig(lora_alpha=2, target_modules=["0"])).eval()
    with torch.no_grad():
        model.base_model.model[0].ilora_router["default"].weight.fill_(3e38)
        assert model(torch.eye(5)).isfinite().all()  # each logit is 3e38, their sum is beyond float32
