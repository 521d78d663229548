"""Routers that several modules share, and routing that is not finite."""

import copy
import math

import pytest
import torch
from ilora_models import LINEARS, MASK, TOKENS, base_model, config, language_model, logits, refuses
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from crab.ilora import ILoraConfig, ILoraLayer, instruction_tokens, parameter_groups, record_routing

SHARING = pytest.mark.parametrize("sharing", ["layer", "model"])


def routers_saved(model):
    """Name of the module -> shape of its router, of the routers that are saved."""
    state = get_peft_model_state_dict(model)
    names = {key.removeprefix("base_model.model.").removesuffix(".ilora_router.weight"): key for key in state}
    return {name: tuple(state[key].shape) for name, key in names.items() if "router" in key}


def test_which_routers_are_saved():
    wide = {"self_attn.q_proj": (3, 16), "mlp.down_proj": (3, 24)}
    by_layer = {f"model.layers.{i}.{name}": shape for i in (0, 1) for name, shape in wide.items()}
    assert routers_saved(language_model(router_sharing="layer")) == by_layer
    by_model = {f"model.layers.0.{name}": shape for name, shape in wide.items()}
    assert routers_saved(language_model(router_sharing="model")) == by_model
    assert len(routers_saved(language_model())) == 14


def block(**parts):
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, nn.ModuleList(part) if isinstance(part, list) else part)
    return module


def lin():
    return nn.Linear(4, 4)


def experts():
    return [block(up=lin(), down=lin()), block(up=lin(), down=lin())]


@pytest.mark.parametrize(
    "base, layers",
    [
        # a list that holds the whole model has no layers
        (lambda: nn.Sequential(base_model().model, nn.Identity()), ["0.layers.0", "0.layers.1"]),
        (lambda: nn.ModuleList([base_model().model]), ["0.layers.0", "0.layers.1"]),
        # lists in lists: the inner members are the layers
        (
            lambda: block(stages=[block(blocks=[block(q=lin(), k=lin()) for _ in "ab"], merge=lin()) for _ in "ab"]),
            [f"stages.{i}{inner}" for i in range(2) for inner in (".blocks.0", ".blocks.1", "")],
        ),
        # experts are parts of their layer
        (lambda: block(layers=[block(q=lin(), experts=experts()) for _ in "ab"]), ["layers.0", "layers.1"]),
        (lambda: block(layers=[block(experts=experts()) for _ in "ab"]), ["layers.0", "layers.1"]),
        # members of several classes are parts of a layer
        (
            lambda: block(blocks=[block(q=lin(), net=nn.Sequential(block(a=lin()), nn.GELU(), lin())) for _ in "ab"]),
            ["blocks.0", "blocks.1"],
        ),
        # layers of several classes: the outermost number counts
        (
            lambda: block(layers=[block(q=lin(), k=lin()), nn.ModuleDict({"mixer": block(q=lin(), k=lin())})]),
            ["layers.0", "layers.1"],
        ),
        # modules outside of numbered layers have their own router
        (lambda: block(layers=[block(q=lin(), k=lin())], first=lin(), second=lin()), ["layers.0", "first", "second"]),
    ],
)
def test_which_modules_share_a_router(base, layers):
    model = get_peft_model(base(), ILoraConfig(r=1, lora_alpha=2, target_modules="all-linear", router_sharing="layer"))
    groups, expected = {}, {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, ILoraLayer):
            router = module.ilora_router["default"]
            groups.setdefault(id(getattr(router, "router", router)), set()).add(name)
            layer = max((layer for layer in layers if f"{name}.".startswith(f"{layer}.")), key=len)
            expected.setdefault((layer, module.in_features), set()).add(name)
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected.values()))
    assert {layer for layer, _ in expected} == set(layers)


@pytest.mark.parametrize("fused, checkpointing", [(True, False), (False, False), (True, True)])
@SHARING
def test_a_shared_router_equals_own_routers_of_the_same_weights(sharing, checkpointing, fused, monkeypatch):
    monkeypatch.setattr(ILoraLayer, "fused", fused)
    shared, own = language_model(router_sharing=sharing), language_model()
    stored = dict(shared.named_parameters())
    with torch.no_grad():
        for name, tensor in own.named_parameters():
            module, _, part = name.rpartition(".ilora_")
            if part.startswith("router"):
                router = shared.get_submodule(module).ilora_router["default"]
                tensor.copy_(getattr(router, "router", router).weight)
            elif module:
                tensor.copy_(stored[name])
    assert torch.equal(logits(own), logits(shared))
    for model in (own, shared):
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    for name, p in shared.named_parameters():
        if "ilora_router" in name:  # the sum over the modules that share it
            place = name.split(".layers.")[1][0] if sharing == "layer" else ""
            same = [n for n, g in gradients.items() if "router" in n and g.shape == p.shape and f".layers.{place}" in n]
            assert len(same) in {"layer": (1, 6), "model": (2, 12)}[sharing]
            torch.testing.assert_close(p.grad, sum(gradients[n] for n in same), rtol=1e-4, atol=1e-6)
        elif "ilora_" in name:
            torch.testing.assert_close(p.grad, gradients[name])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@SHARING
def test_a_shared_router_is_trained_saved_and_loaded_once(sharing, low_cpu_mem_usage, tmp_path):
    model = language_model(router_sharing=sharing).train()
    groups = parameter_groups(model, 1e-2, 1e-2)
    assert len(groups[1]["params"]) == len(routers_saved(model))
    before = {n: p.clone() for n, p in model.named_parameters() if "router" in n}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    torch.optim.AdamW(groups).step()
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.save_pretrained(tmp_path)
    expected = logits(model.eval())
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("router" in key for key in on_disk) == {"layer": 4, "model": 2}[sharing]
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    assert sum("router" in name for name, _ in loaded.named_parameters()) == len(routers_saved(model))
    copied = copy.deepcopy(loaded)
    with torch.no_grad():  # a copy shares within itself
        for name, tensor in copied.named_parameters():
            if "router" in name:
                tensor.zero_()
    assert torch.equal(logits(loaded), expected) and not torch.equal(logits(copied), expected)


def test_shared_routers_of_several_adapters(tmp_path):
    model = language_model(router_sharing="layer")
    first = logits(model)
    choices = dict(r=1, num_heads=2, target_modules=["k_proj", "up_proj"], init_weights=False, router_init_std=3.0)
    model.add_adapter("second", config(router_sharing="model", **choices))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "router" in n]
    assert trained == ["base_model.model.model.layers.0.self_attn.k_proj.ilora_router.second.weight"]
    model.save_pretrained(tmp_path)
    both = PeftModel.from_pretrained(base_model(), tmp_path)
    both.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(both), first)
    both.set_adapter("second")
    both.delete_adapter("default")
    assert torch.equal(logits(both), second) and not torch.equal(first, second)
    assert torch.equal(logits(both.unload()), logits(base_model()))


def test_recording_and_compiling_shared_routers():
    model = language_model(router_sharing="model")
    expected = logits(model)
    with record_routing(model) as routing:
        assert torch.equal(logits(model), expected)
    first, second = (routing[f"model.layers.{i}.self_attn.q_proj"][0] for i in (0, 1))
    assert len(routing) == 2 * len(LINEARS) and not torch.equal(first, second)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, expected)
    model = language_model(router_sharing="layer", router_input="instruction")
    with instruction_tokens(model, MASK), record_routing(model) as routing:
        logits(model)
    q, k, o = (routing[f"model.layers.0.self_attn.{name}_proj"][0] for name in "qko")
    assert torch.equal(q, k) and not torch.equal(q, o)  # q and k read the same input


# ---- routing that is not finite


CASES = [({}, True, False), ({}, False, False), ({}, True, True)]  # options, fused, autocast
CASES += [
    (dict([o]), True, False) for o in dict(lora_dropout=0.1, router_sharing="layer", router_input="instruction").items()
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("choices, fused, half", CASES)
def test_logits_that_are_not_finite_name_the_module(value, choices, fused, half, monkeypatch):
    monkeypatch.setattr(ILoraLayer, "fused", fused)
    model = language_model(target_modules=["v_proj", "down_proj"], **choices).train()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")

    def run(grad=True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=half):
            with instruction_tokens(model, MASK):
                model(input_ids=TOKENS)

    with torch.no_grad():
        layer.ilora_router["default"].weight[1] = value
    for grad in (True, False):
        with refuses(r"'model.layers.1.mlp.down_proj' \(adapter 'default'\).*its weight is not"):
            run(grad)
    with torch.no_grad():
        layer.ilora_router["default"].weight[1] = 0
        model.base_model.model.model.layers[1].input_layernorm.weight[0] = value
    with refuses(r"'model.layers.1.self_attn.v_proj'.*its input is not"):
        run()
    monkeypatch.setattr(ILoraLayer, "check_routing", False)
    run()


def test_large_logits_are_no_error():
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7)), ILoraConfig(lora_alpha=2, target_modules=["0"])).eval()
    with torch.no_grad():
        model.base_model.model[0].ilora_router["default"].weight.fill_(3e38)
        assert model(torch.eye(5)).isfinite().all()  # each logit is 3e38, and their sum is beyond float32
