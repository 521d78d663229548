"""The fused layer against the same modules called one by one, and its memory."""

import pytest
import torch
from ilora_models import Single, adapted, config, formula, parts
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from crab.analyses.layer_costs import kept_bytes
from crab.ilora import record_routing


def is_fused(y):
    return "Fused" in type(y.grad_fn.next_functions[0][0]).__name__


CHOICES = [{}, dict(num_heads=1), dict(router_temperature=0.3), dict(top_k=2), dict(top_k=1), dict(shared_A=False)]


# with r = 40 the gradient of B has another layout
@pytest.mark.parametrize("choices", [*CHOICES, dict(shared_A=False, top_k=2, use_rslora=True), dict(r=40, num_heads=4)])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("bias, dropout", [(True, 0.0), (False, 0.0), (True, 0.4)])
def test_fused_equals_the_modules_called_one_by_one(choices, shape, bias, dropout):
    model = adapted(base=Single(bias=bias), lora_dropout=dropout, **choices).train()
    layer, *weights = parts(model)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    results = []
    for fused in (True, False):
        layer.fused = fused
        torch.manual_seed(1)
        y = model(x)
        assert is_fused(y) == fused
        results.append((y.detach(), *torch.autograd.grad((y * target).sum(), (x, *weights), materialize_grads=True)))
        torch.manual_seed(1)
        with torch.no_grad():
            torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choices", [{}, dict(shared_A=False), dict(router_temperature=0.3, top_k=1)])
def test_the_way_of_few_tokens_equals_that_of_many(tokens, dtype, choices):
    model = adapted(dtype, Single(64, 48), upcast=False, **choices)
    many = torch.randn(64, 64, dtype=dtype)
    with torch.no_grad(), record_routing(model) as routing:
        expected, result = model(many)[:tokens], model(many[:tokens])
    of_many, of_few = routing["lin"]
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.05)
    torch.testing.assert_close(result, expected, **tolerance)
    torch.testing.assert_close(of_few, of_many[:tokens], **tolerance)


def test_gradients_only_where_asked_and_outputs_may_change_in_place():
    model = adapted()
    layer, A, B, R = parts(model)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * torch.autograd.grad(model(x).sum(), x)[0])
    A.requires_grad_(False)
    R.requires_grad_(False)
    model(x.detach()).sum().backward()
    assert A.grad is None and R.grad is None and B.grad is not None and layer.base_layer.weight.grad is None


# ---- memory


class Sizes(TorchDispatchMode):
    """Elements of every tensor with new storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_no_second_tensor_of_the_outputs_or_inputs_size(grad):
    tokens, wide_in, wide_out = 50, 64, 96
    model = adapted(torch.float32, Single(wide_in, wide_out))
    x = torch.randn(tokens, wide_in, requires_grad=True)
    with torch.set_grad_enabled(grad), Sizes() as forward:
        y = model(x)
    assert forward.sizes.count(tokens * wide_out) == 1 and sorted(forward.sizes)[-2] < tokens * wide_in / 2
    if grad:
        with Sizes() as backward:
            torch.autograd.grad(y, (x, *parts(model)[1:]), torch.ones_like(y))
        # one of the output's size is ones_like
        assert backward.sizes.count(tokens * wide_in) == 1 and backward.sizes.count(tokens * wide_out) == 1


@pytest.mark.parametrize("half, dropout", [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)])
@pytest.mark.parametrize("wide_in, wide_out, tokens, r, heads", [(128, 320, 256, 4, 3), (512, 512, 64, 128, 3)])
def test_memory_kept_for_backward_is_near_plain_loras(wide_in, wide_out, tokens, r, heads, half, dropout):
    x = torch.randn(2, tokens // 2, wide_in, requires_grad=True)
    lora = LoraConfig(r=r, lora_alpha=8, lora_dropout=dropout, target_modules=["lin"])
    plain = get_peft_model(Single(wide_in, wide_out), lora).train()
    ours = adapted(torch.float32, Single(wide_in, wide_out), r=r, num_heads=heads, lora_dropout=dropout).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        theirs, ours_stored = kept_bytes(plain, x), kept_bytes(ours, x)
        parts(ours)[0].fused = False
        unfused = kept_bytes(ours, x)
    # with dropout ours keeps one byte per element, plain LoRA factors and a copy
    assert ours_stored <= (0.8 if dropout else 1.15) * theirs and ours_stored < unfused


# ---- hooks, compilers and other modes


def test_hooks_on_one_part_still_work():
    model = adapted()
    layer = parts(model)[0]
    x = torch.randn(3, 5, dtype=torch.float64)
    expected, seen = model(x), []
    for part in (layer.base_layer, *(getattr(layer, f"ilora_{name}")["default"] for name in ("A", "router", "B"))):
        handle = part.register_forward_hook(lambda module, args, out: seen.append((module, out)))
        torch.testing.assert_close(model(x), expected)
        handle.remove()
        assert seen[-1][0] is part
    torch.testing.assert_close(seen[0][1], layer.base_layer(x))  # the base's own output, not the sum


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_all_modules_see_every_part(register):
    model = adapted()
    layer = parts(model)[0]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    expected, seen = model(x), []
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda module, *args: seen.append(module))
    try:
        y = model(x)
        y.sum().backward()
    finally:
        handle.remove()
    torch.testing.assert_close(y, expected)
    assert {layer.base_layer, *(getattr(layer, f"ilora_{n}")["default"] for n in ("A", "B", "router"))} <= set(seen)
    assert is_fused(model(x))


@pytest.mark.parametrize("choices", [{}, dict(shared_A=False), dict(top_k=2)])
def test_forward_mode_differentiation(choices):
    model = adapted(**choices)
    layer = parts(model)[0]
    x, along = torch.randn(2, 3, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(model(forward_ad.make_dual(x, along))).tangent
    layer.fused = False
    torch.testing.assert_close(result, torch.autograd.functional.jvp(model, x, along)[1])  # by two reverse passes


def test_compiles_whole_and_under_function_transforms():
    model = adapted()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    result = torch.func.vmap(torch.func.grad(lambda row: model(row).square().sum()))(x)
    x.requires_grad_()
    torch.testing.assert_close(result, torch.autograd.grad(model(x).square().sum(), x)[0])


def test_what_goes_by_the_modules():
    model = adapted(torch.float32)
    layer = parts(model)[0]
    x = torch.randn(3, 5)
    assert is_fused(model(x))
    layer.base_layer.weight.requires_grad_(True)
    assert not is_fused(model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it leaves float64 alone
        assert not is_fused(adapted()(x.double()))
    assert is_fused(adapted(torch.float32).to("meta")(x.to("meta")))
    first = model(x)
    model.add_adapter("second", config(r=1, lora_alpha=1, num_heads=2, target_modules=["lin"], init_weights=False))
    model.set_adapter("second")
    second = model(x)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x), first + second - layer.base_layer(x))


# ---- half precision and autocast


def test_a_half_precision_base_rounds_the_sum_once():
    model = adapted(torch.bfloat16, Single(16, 24))
    layer, *weights = parts(model)
    assert weights[0].dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    grads = torch.autograd.grad(y.float().sum(), (x, *weights))
    assert y.dtype == torch.bfloat16 and [g.dtype for g in grads] == [torch.bfloat16] + 3 * [torch.float32]
    zero = torch.zeros(24, 16, dtype=torch.float64)
    exact = layer.base_layer(x).double() + formula(x.double(), zero, 0, *(w.double() for w in weights))
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
BASES = [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype, upcast", BASES)
@pytest.mark.parametrize("choices", [{}, dict(top_k=2), dict(shared_A=False)], ids=lambda c: "-".join(c))
@pytest.mark.parametrize("fused", [True, False])
def test_autocast_is_near_float64(device, half, base_dtype, upcast, choices, fused):
    model = adapted(base_dtype, Single(64, 48), upcast, r=4, router_init_std=0.2, **choices).to(device)
    layer, *weights = parts(model)
    layer.fused = fused
    base = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    for dtype, tokens in ((torch.float32, 40), (half, 40), (half, 1), (torch.float32, 3)):
        x = torch.randn(2, tokens, 64, device=device, dtype=dtype, requires_grad=True)
        leaves = (x, *weights)
        double = [t.detach().double().requires_grad_() for t in leaves]
        expected = formula(double[0], *base, *double[1:], scaling=0.75, top_k=choices.get("top_k"))
        with torch.autocast(device, dtype=half):
            y = model(x)
            with torch.no_grad():
                without_gradient = model(x)
        assert is_fused(y) == fused and y.dtype == without_gradient.dtype == half
        pairs = [(y, expected), (without_gradient, expected)]
        if tokens == 40:  # few tokens do not average the rounding of gradients
            target = torch.randn(2, tokens, 48, device=device)
            grads = torch.autograd.grad((y.float() * target).sum(), leaves)
            assert [g.dtype for g in grads] == [t.dtype for t in leaves]
            pairs += zip(grads, torch.autograd.grad((expected * target).sum(), double), strict=True)
        for result, true in pairs:  # bfloat16 rounds by up to 2^-9 each time
            assert float((result.double() - true).detach().norm() / true.detach().norm()) < 2**-7


@pytest.mark.parametrize("fused", [True, False])
def test_the_router_stays_in_float32_under_autocast(fused):
    model = adapted(torch.float32, Single(2, 3))
    layer, A, B, R = parts(model)
    layer.fused = fused
    with torch.no_grad():
        R.copy_(torch.tensor([[100.0, 0.1], [100.0, 0.0], [100.0, -0.2]]))  # logits that bfloat16 cannot tell apart
    x = torch.tensor([[1.0, 1.0], [1.001, 2.0]])
    expected = torch.softmax(torch.tensor([[0.1, 0.0, -0.2], [0.2, 0.0, -0.4]]), -1)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_routing(model) as routing:
        model(x)
    assert routing["lin"][0].dtype == torch.float32
    torch.testing.assert_close(routing["lin"][0], expected, atol=1e-5, rtol=0)


def test_backward_inside_the_autocast_block():
    model = adapted(torch.float32, Single(16, 24))
    layer, *weights = parts(model)
    x = torch.randn(9, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        inside = torch.autograd.grad(y.float().square().sum(), (x, *weights), retain_graph=True)
    assert all(map(torch.equal, inside, torch.autograd.grad(y.float().square().sum(), (x, *weights))))
