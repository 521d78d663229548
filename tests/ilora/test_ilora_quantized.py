"""I-LoRA over 8- and 4-bit base layers.

The bitsandbytes library needs a GPU to be of use, so two layers of its kind stand in: subclasses of nn.Linear whose
`weight` holds whole numbers in a shape of its own, and which alone know how to multiply by it.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from crab.ilora import ILoraConfig, ILoraLayer, record_routing, to_static


class Quantized(nn.Linear):
    """Rows of whole numbers and a scale a row. While `guarded`, `weight` may be read in its own forward pass alone."""

    levels: int

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, dtype=plain.weight.dtype)
        self.bias = plain.bias
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / self.levels
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(self.pack((plain.weight.detach() / scale).round().to(torch.int8)), requires_grad=False)
        self.guarded = True

    def __getattr__(self, name):
        if name == "weight" and self.__dict__.get("guarded"):
            raise AssertionError("the weight of a quantized layer was read outside its own forward pass")
        return super().__getattr__(name)

    def whole(self):
        return self.unpack(self._parameters["weight"]).to(self.scale.dtype) * self.scale

    def forward(self, x):
        return F.linear(x, self.whole().to(x.dtype), self.bias)


class EightBit(Quantized):
    levels = 127

    def pack(self, numbers):
        return numbers

    def unpack(self, weight):
        return weight


class FourBit(Quantized):
    """Two numbers a byte, in one column, as bitsandbytes keeps them."""

    levels = 7

    def pack(self, numbers):
        high, low = (numbers + 8).to(torch.uint8).flatten().view(-1, 2).unbind(1)
        return (high * 16 + low).unsqueeze(1)

    def unpack(self, weight):
        numbers = torch.stack((weight // 16, weight % 16), dim=-1).to(torch.int8) - 8
        return numbers.view(self.out_features, self.in_features)


KINDS = pytest.mark.parametrize("kind", [EightBit, FourBit])


def guard(model, on):
    for module in model.modules():
        if isinstance(module, Quantized):
            module.guarded = on


def adapted(base, **choices):
    """The base with an adapter of random heads; PEFT looks at the weights' device and dtype while it is added."""
    guard(base, False)
    torch.manual_seed(1)
    settings = dict(r=2, lora_alpha=3, num_heads=3, init_weights=False, router_init_std=1.0) | choices
    model = get_peft_model(base, ILoraConfig(**settings))
    guard(model, True)
    return model


class Single(nn.Module):
    def __init__(self, lin):
        super().__init__()
        self.lin = lin

    def forward(self, x):
        return self.lin(x)


def test_the_stand_ins_are_what_they_say():
    plain = nn.Linear(6, 4).double()
    eight, four = EightBit(plain), FourBit(plain)
    torch.testing.assert_close(eight.whole(), plain.weight, atol=float(eight.scale.max()) / 2, rtol=0)
    torch.testing.assert_close(four.whole(), plain.weight, atol=float(four.scale.max()) / 2, rtol=0)
    four.guarded = False
    assert four.weight.shape == (12, 1) and four.weight.dtype == torch.uint8
    with pytest.raises(AssertionError, match="outside its own forward"):
        eight.weight  # noqa: B018


@KINDS
@pytest.mark.parametrize("choices", [{}, dict(top_k=2), dict(shared_A=False), dict(router="uniform")])
def test_equals_the_adapter_over_the_weights_it_stands_for(kind, choices):
    torch.manual_seed(0)
    base = kind(nn.Linear(6, 4).double())
    plain = nn.Linear(6, 4).double()
    plain.weight.data, plain.bias.data = base.whole(), base.bias.data.clone()
    ours, theirs = (adapted(Single(lin), target_modules=["lin"], **choices).double() for lin in (base, plain))
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 4, dtype=torch.float64)
    found = []
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == (2 if "router" in choices else 3)
        y = model(x)
        found.append((y, *torch.autograd.grad((y * target).sum(), (x, *trained))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), found[0][0])
        torch.testing.assert_close(ours(x[:1, :1]), found[0][0][:1, :1])  # one token, as in decoding


@KINDS
def test_half_precision_input(kind):
    torch.manual_seed(0)
    model = adapted(Single(kind(nn.Linear(6, 4).bfloat16())), target_modules=["lin"])
    layer = model.base_model.model.lin
    assert layer.ilora_A["default"].weight.dtype == torch.float32
    x = torch.randn(3, 6, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    A, B, R = (getattr(layer, part)["default"].weight for part in ("ilora_A", "ilora_B", "ilora_router"))
    w, z = torch.softmax(x.float() @ R.T, -1), x.float() @ A.T
    delta = 1.5 * sum(w[:, i:i + 1] * (z @ B[:, 2 * i:2 * i + 2].T) for i in range(3))
    torch.testing.assert_close(y.float(), layer.base_layer(x).float() + delta, rtol=2e-2, atol=2e-2)


# ---- a whole model

TOKENS = torch.arange(12).view(2, 6)
TARGETS = r".*\.(q_proj|down_proj)"


def language_model(kind):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=31, pad_token_id=0)).eval()
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, kind(module))
    model.is_loaded_in_8bit = kind is EightBit
    model.is_loaded_in_4bit = kind is FourBit
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@KINDS
@pytest.mark.parametrize("checkpointing", [True, False])
def test_trains_saves_and_reloads(kind, checkpointing, tmp_path):
    base = language_model(kind)
    plain = logits(base)
    guard(base, False)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    model = adapted(base, target_modules=TARGETS, task_type="CAUSAL_LM", init_weights=True)
    numbers = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    assert len(numbers) == 2 * 7
    assert torch.equal(logits(model), plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, numbers[n]) for n, p in model.named_parameters() if n in numbers)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    with record_routing(model) as routing:
        assert torch.equal(logits(model), trained)
    assert len(routing) == 4 and all(steps[0].shape == (2, 6, 3) for steps in routing.values())

    model.save_pretrained(tmp_path)
    assert all(".ilora_" in name and t.is_floating_point()
               for name, t in load_file(tmp_path / "adapter_model.safetensors").items())
    fresh = language_model(kind)
    guard(fresh, False)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    guard(loaded, True)
    assert torch.equal(logits(loaded), trained)
    fixed = to_static(loaded, [0.5, 0.3, 0.2], run=lambda: loaded(input_ids=TOKENS).logits)
    assert 0 < fixed.error < 1
    guard(loaded, False)  # PEFT puts the very weight back
    back = loaded.unload()
    assert torch.equal(logits(back), plain)
    assert not any(isinstance(module, ILoraLayer) for module in back.modules())
    assert sum(isinstance(module, kind) for module in back.modules()) == 2 * 7
