"""I-LoRA over 8- and 4-bit base layers.

bitsandbytes is of use on a GPU only. Two layers of its kind stand in: subclasses of nn.Linear whose `weight` holds
whole numbers in another shape, and which alone know how to multiply by it.
"""

import pytest
import torch
from ilora_models import Single, adapted, base_model, language_model, logits, train
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from crab.ilora import ILoraLayer, record_routing, to_static


class Quantized(nn.Linear):
    """Rows of whole numbers, one scale per row. While `guarded`, only its own forward pass may read `weight`."""

    levels = 127
    guarded = False

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, dtype=plain.weight.dtype)
        self.bias = plain.bias
        self.register_buffer("scale", plain.weight.detach().abs().amax(1, keepdim=True) / self.levels)
        numbers = (plain.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(self.pack(numbers), requires_grad=False)

    def __getattr__(self, name):
        if name == "weight" and self.__dict__.get("guarded"):
            raise AssertionError("the weight of a quantized layer was read outside its own forward pass")
        return super().__getattr__(name)

    def pack(self, numbers):
        return numbers

    def unpack(self, weight):
        return weight

    def whole(self):
        return self.unpack(self._parameters["weight"]).to(self.scale.dtype) * self.scale

    def forward(self, x):
        return F.linear(x, self.whole().to(x.dtype), self.bias)


class EightBit(Quantized):
    pass


class FourBit(Quantized):
    """Two numbers per byte, in one column, as in bitsandbytes."""

    levels = 7

    def pack(self, numbers):
        high, low = (numbers + 8).to(torch.uint8).flatten().view(-1, 2).unbind(1)
        return (high * 16 + low).unsqueeze(1)

    def unpack(self, weight):
        numbers = torch.stack((weight // 16, weight % 16), dim=-1).to(torch.int8) - 8
        return numbers.view(self.out_features, self.in_features)


def guard(model, on=True):
    """PEFT reads the device and dtype of the weights when it adds or removes an adapter, so the guard is off then."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.guarded = on
    return model


KINDS = pytest.mark.parametrize("kind", [EightBit, FourBit])


def layer_of(kind, dtype):
    torch.manual_seed(0)
    base = Single(6, 4).to(dtype)
    base.lin = kind(base.lin)
    return base


@KINDS
def test_the_stand_ins_hold_the_weights_and_guard_them(kind):
    plain = nn.Linear(6, 4).double()
    layer = kind(plain)
    torch.testing.assert_close(layer.whole(), plain.weight, atol=float(layer.scale.max()) / 2, rtol=0)
    assert layer.weight.shape == {EightBit: (4, 6), FourBit: (12, 1)}[kind] and not layer.weight.is_floating_point()
    with pytest.raises(AssertionError, match="outside its own forward"):
        guard(layer).weight  # noqa: B018


@KINDS
@pytest.mark.parametrize("choices", [{}, dict(top_k=2), dict(shared_A=False), dict(router="uniform")])
def test_equals_the_adapter_over_the_weights_it_stands_for(kind, choices):
    base = layer_of(kind, torch.float64)
    plain = Single(6, 4).double()
    plain.lin.weight.data, plain.lin.bias.data = base.lin.whole(), base.lin.bias.data.clone()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 4, dtype=torch.float64)
    results = []
    for frozen in (base, plain):
        model = guard(adapted(base=frozen, **choices).double())
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == (2 if "router" in choices else 3)
        y = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x[:1, :1]), y[:1, :1])  # one token, as in decoding
        results.append((y, *torch.autograd.grad((y * target).sum(), (x, *trained))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@KINDS
def test_half_precision_input(kind):
    model = guard(adapted(torch.bfloat16, layer_of(kind, torch.bfloat16)))
    layer = model.base_model.model.lin
    x = torch.randn(3, 6, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.ilora_A["default"].weight.dtype == torch.float32
    A, B, R = (getattr(layer, part)["default"].weight for part in ("ilora_A", "ilora_B", "ilora_router"))
    w, z = torch.softmax(x.float() @ R.T, -1), x.float() @ A.T
    delta = 1.5 * sum(w[:, i : i + 1] * (z @ B[:, 2 * i : 2 * i + 2].T) for i in range(3))
    torch.testing.assert_close(y.float(), layer.base_layer(x).float() + delta, rtol=2e-2, atol=2e-2)


def quantized_base(kind):
    model = base_model()
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, kind(module))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind is EightBit, kind is FourBit
    return model


@KINDS
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_whole_model_trains_saves_and_reloads(kind, checkpointing, tmp_path):
    base = quantized_base(kind)
    plain = logits(base)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    choices = dict(target_modules=["q_proj", "down_proj"], init_weights=True, router_init_std=1.0)
    model = guard(language_model(base, **choices))
    numbers = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    assert len(numbers) == 2 * 7 and torch.equal(logits(model), plain)
    first, last = train(model, 1), train(model, 10)
    assert last < first and all(torch.equal(p, numbers[n]) for n, p in model.named_parameters() if n in numbers)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    with record_routing(model) as routing:
        assert torch.equal(logits(model), trained)
    assert len(routing) == 4
    to_static(model, [0.5, 0.3, 0.2])

    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".ilora_" in name and tensor.is_floating_point() for name, tensor in tensors.items())
    loaded = guard(PeftModel.from_pretrained(quantized_base(kind), tmp_path))
    assert torch.equal(logits(loaded), trained)
    back = guard(loaded, on=False).unload()
    assert torch.equal(logits(back), plain) and not any(isinstance(module, ILoraLayer) for module in back.modules())
