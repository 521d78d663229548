"""The arithmetic of one layer, against formulas written out."""

import pytest
import torch
from ilora_models import Single, adapted, formula, parts
from peft import LoraConfig, get_peft_model
from torch import nn

from crab.ilora import ILoraConfig, instruction_tokens, record_routing


@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 5), (5,), (1, 2, 3, 5)])
@pytest.mark.parametrize(
    "choices, options",
    [
        ({}, {}),
        (dict(r=1, num_heads=1), dict(scaling=3)),
        (dict(r=3, num_heads=4, router_temperature=0.5), dict(scaling=1, temperature=0.5)),
        (dict(top_k=1), dict(top_k=1)),
        (dict(top_k=3), {}),
        (dict(shared_A=False, top_k=2, use_rslora=True), dict(top_k=2, scaling=3 / 2**0.5)),
    ],
)
def test_the_layer_equals_the_formula(choices, options, shape):
    model = adapted(**choices)
    layer, *weights = parts(model)
    x = torch.randn(shape, dtype=torch.float64)
    expected = formula(x, layer.base_layer.weight, layer.base_layer.bias, *weights, **options)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("choices", [{}, dict(top_k=2), dict(shared_A=False, router_temperature=2.0)])
def test_gradients_and_second_derivatives(choices, monkeypatch):
    model = adapted(**choices)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    assert len(names) == 3
    call = lambda x, *values: torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *values))
    with pytest.raises(RuntimeError, match=r"set ILoraLayer.fused = False for second derivatives"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    monkeypatch.setattr(type(parts(model)[0]), "fused", False)
    assert torch.autograd.gradgradcheck(call, (x, *values))


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_is_on_a_and_not_on_the_router(fused):
    model = adapted(lora_dropout=0.5).train()
    layer, A, B, R = parts(model)
    layer.fused = fused
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    w, z = torch.softmax(x @ R.T, -1), dropped @ A.T
    expected = layer.base_layer(x) + 1.5 * sum(w[:, i : i + 1] * (z @ B[:, 2 * i : 2 * i + 2].T) for i in range(3))
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, model.eval()(x))


def test_one_hot_router_equals_a_plain_lora_head():
    model = adapted()
    layer, A, B, R = parts(model)
    x = torch.cat([torch.randn(4, 4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)], dim=1)
    plain = Single().double()
    plain.lin.load_state_dict(layer.base_layer.state_dict())
    plain = get_peft_model(plain, LoraConfig(r=2, lora_alpha=3, target_modules=["lin"]))
    with torch.no_grad():
        R.zero_()
        R[1, 4] = 1e4  # the constant last input makes head 1 win for every token
        plain.base_model.model.lin.lora_A["default"].weight.copy_(A)
        plain.base_model.model.lin.lora_B["default"].weight.copy_(B[:, 2:4])
    torch.testing.assert_close(model(x), plain(x))


def test_uniform_router_is_the_mean_head_and_learns_no_router():
    model = adapted(router="uniform")
    layer = model.base_model.model.lin
    x = torch.randn(4, 5, dtype=torch.float64)
    head = layer.ilora_B["default"].weight.view(7, 3, 2).mean(dim=1)
    torch.testing.assert_close(model(x), layer.base_layer(x) + 1.5 * x @ layer.ilora_A["default"].weight.T @ head.T)
    assert not [n for n, p in model.named_parameters() if "router" in n]


def test_random_router_tells_zero_heads_apart():
    model = adapted(init_weights=True)
    model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
    first, second, _ = parts(model)[2].grad.view(7, 3, 2).unbind(1)
    assert not torch.allclose(first, second)


def test_rank_and_alpha_patterns():
    patterns = dict(rank_pattern={"1.lin": 4}, alpha_pattern={"1.lin": 8}, use_rslora=True)
    model = adapted(base=nn.Sequential(Single(), Single(7, 7)), **patterns)
    first, second = (model.base_model.model[i].lin for i in (0, 1))
    assert (first.r["default"], second.r["default"]) == (2, 4)
    assert first.scaling["default"] == pytest.approx(3 / 2**0.5) and second.scaling["default"] == pytest.approx(8 / 2)
    assert second.ilora_B["default"].weight.shape == (7, 3 * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_base(dtype, upcast):
    model = adapted(dtype, upcast=upcast, router_init_std=0.02)
    x = torch.randn(2, 4, 5, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    layer, *weights = parts(model.double())
    expected = formula(x.double(), layer.base_layer.weight, layer.base_layer.bias, *weights)
    torch.testing.assert_close(y.double(), expected, rtol=3e-2, atol=3e-2)


def test_instruction_router():
    model = adapted(router_input="instruction")
    layer, A, B, R = parts(model)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    with instruction_tokens(model, mask), record_routing(model) as routing:
        y = model(x)
    for sample, instruction, result in zip(x, mask, y, strict=True):
        w = torch.softmax(R @ sample[instruction].mean(0), -1)
        delta = sum(w[i] * (sample @ A.T @ B[:, 2 * i : 2 * i + 2].T) for i in range(3))
        torch.testing.assert_close(result, layer.base_layer(sample) + 1.5 * delta)
    (weights,) = routing["lin"]
    assert weights.shape == (2, 4, 3) and torch.equal(weights[:, 0], weights[:, 3])


def test_a_long_instruction_is_pooled_in_float32():
    model = adapted(torch.float16, upcast=False, router_input="instruction")
    R = parts(model)[3]
    assert R.dtype == torch.float16
    # sums of up to 90000, and float16 ends at 65504
    x = (30 * torch.tensor([1, -1, 0.5, -0.5, 0]) + torch.randn(1, 3000, 5)).half()
    with instruction_tokens(model, torch.ones(1, 3000, dtype=torch.bool)), record_routing(model) as routing:
        model(x)
    expected = torch.softmax(x.double().mean(1) @ R.T.double(), -1)
    torch.testing.assert_close(routing["lin"][0][0, :1].double(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_weights_come_from_the_seed(seed):
    torch.manual_seed(seed)
    expected = nn.Linear(5, 7), nn.Linear(5, 2, bias=False), nn.Linear(6, 7, bias=False), nn.Linear(5, 3, bias=False)
    nn.init.kaiming_uniform_(expected[1].weight, a=5**0.5)
    nn.init.normal_(expected[3].weight, std=0.1)
    torch.manual_seed(seed)
    settings = dict(r=2, lora_alpha=3, num_heads=3, target_modules=["lin"], router_init_std=0.1)
    layer, A, B, R = parts(get_peft_model(Single(), ILoraConfig(**settings)))
    assert torch.equal(A, expected[1].weight) and torch.equal(R, expected[3].weight) and not B.any()
