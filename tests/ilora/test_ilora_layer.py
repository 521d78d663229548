"""The layer's arithmetic, against references written out the long way."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from crab.ilora import ILoraConfig


class Single(nn.Module):
    def __init__(self, in_features=5, out_features=7):
        super().__init__()
        self.lin = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.lin(x)


def adapted(dtype=torch.float64, base=None, **choices):
    torch.manual_seed(0)
    settings = dict(r=2, lora_alpha=3, num_heads=3, target_modules=["lin"], init_weights=False) | choices
    return get_peft_model((base or Single()).to(dtype), ILoraConfig(**settings))


def reference(layer, x, alpha, r, heads, temperature=1.0):
    W, b = layer.base_layer.weight, layer.base_layer.bias
    A, B, R = (getattr(layer, name)["default"].weight for name in ("ilora_A", "ilora_B", "ilora_router"))
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        exponents = torch.exp(R @ token / temperature)
        y = W @ token + b
        for i in range(heads):
            y = y + alpha / r * exponents[i] / exponents.sum() * (B[:, i * r:(i + 1) * r] @ (A @ token))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("r, heads, temperature, shape",
                         [(2, 3, 1.0, (2, 4, 5)), (1, 1, 1.0, (3, 5)), (3, 4, 0.5, (5,)), (2, 2, 2.0, (1, 2, 3, 5))])
def test_equals_the_formula(r, heads, temperature, shape):
    model = adapted(r=r, num_heads=heads, router_temperature=temperature, router_init_std=1.0)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(model.base_model.model.lin, x, 3, r, heads, temperature),
                               rtol=1e-12, atol=1e-12)


def test_gradients():
    model = adapted(router_init_std=1.0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    assert len(names) == 3
    call = lambda x, *values: torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *values))


def test_dropout_is_on_a_and_not_on_the_router():
    model = adapted(lora_dropout=0.5, router_init_std=1.0).train()
    layer = model.base_model.model.lin
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    A, B, R = (getattr(layer, name)["default"].weight for name in ("ilora_A", "ilora_B", "ilora_router"))
    w, z = torch.softmax(x @ R.T, -1), dropped @ A.T
    expected = layer.base_layer(x) + 1.5 * sum(w[:, i:i + 1] * (z @ B[:, 2 * i:2 * i + 2].T) for i in range(3))
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, model.eval()(x))


def test_one_hot_router_equals_a_plain_lora_head():
    base = Single()
    with torch.no_grad():
        base.lin.weight.normal_()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = adapted(base=base)
    layer = model.base_model.model.lin
    x = torch.cat([torch.randn(4, 4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)], dim=1)
    with torch.no_grad():
        layer.ilora_router["default"].weight.zero_()
        layer.ilora_router["default"].weight[1, 4] = 1e4  # the constant last input makes head 1 win for every token
    plain = Single().double()
    plain.load_state_dict(state)
    plain = get_peft_model(plain, LoraConfig(r=2, lora_alpha=3, target_modules=["lin"]))
    lora = plain.base_model.model.lin
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(layer.ilora_A["default"].weight)
        lora.lora_B["default"].weight.copy_(layer.ilora_B["default"].weight[:, 2:4])
    torch.testing.assert_close(model(x), plain(x))


def test_uniform_router_is_the_mean_head_and_learns_no_router():
    model = adapted(router="uniform")
    layer = model.base_model.model.lin
    x = torch.randn(4, 5, dtype=torch.float64)
    mean_head = layer.ilora_B["default"].weight.view(7, 3, 2).mean(dim=1)
    torch.testing.assert_close(model(x), layer.base_layer(x) + 1.5 * x @ layer.ilora_A["default"].weight.T @ mean_head.T)
    assert not [n for n, p in model.named_parameters() if "router" in n]


def test_random_router_tells_zero_heads_apart():
    model = adapted(init_weights=True, router_init_std=0.5)
    model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
    first, second, _ = model.base_model.model.lin.ilora_B["default"].weight.grad.view(7, 3, 2).unbind(1)
    assert not torch.allclose(first, second)


def test_rank_and_alpha_patterns_and_rslora():
    model = adapted(base=nn.Sequential(Single(), Single(7, 7)), rank_pattern={"1.lin": 4}, alpha_pattern={"1.lin": 8},
                    use_rslora=True)
    first, second = (model.base_model.model[i].lin for i in (0, 1))
    assert (first.r["default"], second.r["default"]) == (2, 4)
    assert first.scaling["default"] == pytest.approx(3 / 2**0.5) and second.scaling["default"] == pytest.approx(8 / 2)
    assert second.ilora_B["default"].weight.shape == (7, 3 * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_base(dtype, upcast):
    torch.manual_seed(0)
    config = ILoraConfig(r=2, lora_alpha=3, num_heads=3, target_modules=["lin"], init_weights=False)
    model = get_peft_model(Single().to(dtype), config, autocast_adapter_dtype=upcast)
    x = torch.randn(2, 4, 5, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    layer = model.base_model.model.lin.double()
    torch.testing.assert_close(y.double(), reference(layer, x.double(), 3, 2, 3), rtol=3e-2, atol=3e-2)
    single = Single()
    model = get_peft_model(single, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(4, 5)).dtype == torch.bfloat16
