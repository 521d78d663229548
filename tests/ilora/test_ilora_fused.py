"""The fused layer against the same modules called one by one, and what it may cost."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from crab.ilora import ILoraConfig, record_routing
from crab.ilora.fused import MANY_ROWS


class Single(nn.Module):
    def __init__(self, in_features=5, out_features=7, bias=True):
        super().__init__()
        self.lin = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x):
        return self.lin(x)


def adapted(dtype=torch.float64, base=None, upcast=True, **choices):
    torch.manual_seed(0)
    settings = dict(r=2, lora_alpha=3, num_heads=3, target_modules=["lin"], init_weights=False, router_init_std=1.0)
    return get_peft_model((base or Single()).to(dtype), ILoraConfig(**settings | choices), autocast_adapter_dtype=upcast)


def parts(model):
    layer = model.base_model.model.lin
    return layer, *(getattr(layer, name)["default"].weight for name in ("ilora_A", "ilora_B", "ilora_router"))


@pytest.mark.parametrize("choices", [{}, dict(num_heads=1), dict(router_temperature=0.3), dict(top_k=2), dict(top_k=1),
                                     dict(shared_A=False), dict(shared_A=False, top_k=2, use_rslora=True)])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_equals_the_modules_called_one_by_one(choices, shape, bias):
    model = adapted(base=Single(bias=bias), **choices)
    layer, *weights = parts(model)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    found = []
    for fused in (True, False):
        layer.fused = fused
        y = model(x)
        assert ("Fused" in type(y.grad_fn.next_functions[0][0]).__name__) == fused
        found.append((y.detach(), *torch.autograd.grad((y * target).sum(), (x, *weights), materialize_grads=True)))
        with torch.no_grad():
            torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choices", [{}, dict(shared_A=False), dict(router_temperature=0.3, top_k=1)])
def test_the_way_of_few_tokens_equals_that_of_many(tokens, dtype, choices):
    """Without gradient few tokens go a shorter way than the same tokens among many."""
    model = adapted(dtype, Single(64, 48), upcast=False, **choices)
    many = torch.randn(64, 64, dtype=dtype)
    with torch.no_grad(), record_routing(model) as routing:
        expected, found = model(many)[:tokens], model(many[:tokens])
    of_many, of_few = next(iter(routing.values()))
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.05)
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(of_few, of_many[:tokens], **tolerance)


@pytest.mark.parametrize("choices", [{}, dict(top_k=2), dict(shared_A=False, router_temperature=2.0)])
def test_first_and_second_derivatives(choices):
    model = adapted(**choices)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    call = lambda x, *values: torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


def test_only_what_is_asked_for_gets_a_gradient():
    model = adapted()
    layer, A, B, R = parts(model)
    A.requires_grad_(False)
    R.requires_grad_(False)
    model(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    assert A.grad is None and R.grad is None and B.grad is not None and layer.base_layer.weight.grad is None


def test_the_output_may_be_changed_in_place():
    model = adapted()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.mul_(2)
    grad = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(grad, 2 * torch.autograd.grad(model(x).sum(), x)[0])


class Sizes(TorchDispatchMode):
    """Elements of every tensor with storage of its own that an operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.made.append(out.numel())
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_no_second_tensor_of_the_outputs_or_inputs_size(grad):
    tokens, wide_in, wide_out = 50, 64, 96
    model = adapted(torch.float32, Single(wide_in, wide_out))
    x = torch.randn(tokens, wide_in, requires_grad=True)
    with torch.set_grad_enabled(grad), Sizes() as forward:
        y = model(x)
    assert forward.made.count(tokens * wide_out) == 1 and sorted(forward.made)[-2] < tokens * wide_in / 2
    if grad:
        with Sizes() as backward:
            torch.autograd.grad(y, (x, *parts(model)[1:]), torch.ones_like(y))
        assert backward.made.count(tokens * wide_in) == 1 and backward.made.count(tokens * wide_out) == 1  # ones_like


@pytest.mark.parametrize("columns", [64, 128, 160])
def test_gradient_of_wide_heads_is_made_once_and_right(columns):
    """From some width on it is computed as B is stored: the copy of a transpose would be a second tensor of B's size."""
    wide_out, tokens = 384, 12
    model = adapted(torch.float64, Single(24, wide_out), r=columns // 4, num_heads=4)
    layer, _, B, _ = parts(model)
    x, target = torch.randn(tokens, 24, dtype=torch.float64), torch.randn(tokens, wide_out, dtype=torch.float64)
    layer.fused = False
    (expected,) = torch.autograd.grad(model(x), B, target)
    layer.fused = True
    y = model(x)
    with Sizes() as backward:
        y.backward(target)
    torch.testing.assert_close(B.grad, expected, rtol=1e-11, atol=1e-12)
    assert B.grad.is_contiguous() and backward.made.count(B.numel()) == (1 if columns >= MANY_ROWS else 2)


def kept_bytes(model, x):
    """Bytes that wait for backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("wide_in, wide_out, tokens, r, heads", [
    (128, 320, 256, 4, 3), (576, 1536, 64, 8, 3), (128, 128, 64, 4, 3), (128, 320, 64, 4, 16), (512, 512, 64, 128, 3)])
def test_memory_kept_for_backward_is_near_plain_loras(wide_in, wide_out, tokens, r, heads):
    x = torch.randn(2, tokens // 2, wide_in, requires_grad=True)
    torch.manual_seed(0)
    plain = get_peft_model(Single(wide_in, wide_out), LoraConfig(r=r, lora_alpha=8, target_modules=["lin"]))
    theirs = kept_bytes(plain, x)
    assert theirs == 4 * tokens * (wide_in + r)
    ours = adapted(torch.float32, Single(wide_in, wide_out), r=r, num_heads=heads)
    assert kept_bytes(ours, x) <= 1.15 * theirs
    parts(ours)[0].fused = False
    assert kept_bytes(ours, x) > 4 * tokens * (wide_in + r + heads * r)


def test_a_half_precision_base_rounds_the_sum_once():
    model = adapted(torch.bfloat16, Single(16, 24))
    layer, A, B, R = parts(model)
    assert A.dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    grads = torch.autograd.grad(y.float().sum(), (x, A, B, R))
    assert y.dtype == torch.bfloat16 and [g.dtype for g in grads] == [torch.bfloat16] + 3 * [torch.float32]
    base = layer.base_layer(x)
    A, B, R, wide = A.double(), B.double(), R.double(), x.double()
    w, z = torch.softmax(wide @ R.T, -1), wide @ A.T
    exact = base.double() + 1.5 * sum(w[:, i:i + 1] * (z @ B[:, 2 * i:2 * i + 2].T) for i in range(3))
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_hooks_on_the_parts_still_work():
    model = adapted()
    layer = parts(model)[0]
    x = torch.randn(3, 5, dtype=torch.float64)
    wanted, seen = model(x), []
    for part in (layer.base_layer, layer.ilora_A["default"], layer.ilora_router["default"], layer.ilora_B["default"]):
        handle = part.register_forward_hook(lambda module, args, out: seen.append((module, out)))
        torch.testing.assert_close(model(x), wanted)
        handle.remove()
        assert seen[-1][0] is part
    torch.testing.assert_close(seen[0][1], layer.base_layer(x))  # the base's own output, not the sum


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_all_modules_see_every_part(register):
    model = adapted()
    layer = parts(model)[0]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    wanted, seen = model(x), []
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda module, *args: seen.append(module))
    try:
        y = model(x)
        y.sum().backward()
    finally:
        handle.remove()
    torch.testing.assert_close(y, wanted)
    assert {layer.base_layer, *(getattr(layer, name)["default"] for name in ("ilora_A", "ilora_B", "ilora_router"))} <= set(seen)
    assert layer._fusible("default", x) is not None


@pytest.mark.parametrize("choices", [{}, dict(shared_A=False), dict(top_k=2), dict(shared_head=True)])
def test_forward_mode_differentiation(choices):
    model = adapted(**choices)
    x, along = torch.randn(2, 3, 5, dtype=torch.float64)
    wanted = torch.autograd.functional.jvp(model, x, along)[1]  # by two reverse passes
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, along))).tangent
    torch.testing.assert_close(found, wanted)


def test_compiles_whole_and_under_function_transforms():
    model = adapted()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    half = adapted(torch.float32, lora_dropout=0.3).train()
    compiled = torch.compile(half, backend="eager", fullgraph=True)
    parts(half)[0].fused = False  # which rounds to bfloat16 elsewhere
    outputs = []
    for call in (half, compiled):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(call(x.float()))
    torch.testing.assert_close(*outputs)
    found = torch.func.vmap(torch.func.grad(lambda row: model(row).square().sum()))(x)
    x.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(model(x).square().sum(), x)[0])


def test_what_goes_by_the_modules():
    model = adapted(torch.float32)
    layer = parts(model)[0]
    x = torch.randn(3, 5)
    assert layer._fusible("default", x) is not None
    layer.base_layer.weight.requires_grad_(True)
    assert layer._fusible("default", x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone
        assert parts(adapted())[0]._fusible("default", x.double()) is None
    assert parts(adapted(torch.float32).to("meta"))[0]._fusible("default", x.to("meta")) is not None
    first = model(x)
    model.add_adapter("second", ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=["lin"], init_weights=False))
    model.set_adapter("second")
    second = model(x)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x), first + second - layer.base_layer(x))


# ---- the fused layer under autocast

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def exact(x, weight, bias, A, B, R, top_k=None):
    """The published formula in float64, heads one by one; with top_k the other heads weigh 0."""
    logits = x @ R.T
    if top_k:
        logits = logits.masked_fill(logits < logits.sort(-1, descending=True).values[..., top_k - 1:top_k], -math.inf)
    w, y = torch.softmax(logits, -1), x @ weight.T + bias
    for i in range(3):
        own = A if len(A) == 4 else A[4 * i:4 * i + 4]
        y = y + 0.75 * w[..., i:i + 1] * (x @ own.T @ B[:, 4 * i:4 * i + 4].T)
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype, adapter_upcast", [(torch.float32, True), (torch.bfloat16, True),
                                                        (torch.bfloat16, False)])
@pytest.mark.parametrize("choices", [{}, dict(top_k=2), dict(shared_A=False)], ids=lambda c: "-".join(c))
@pytest.mark.parametrize("fused", [True, False])
def test_autocast_is_near_float64(device, half, base_dtype, adapter_upcast, choices, fused):
    model = adapted(base_dtype, Single(64, 48), adapter_upcast, r=4, router_init_std=0.2, **choices).to(device)
    layer, A, B, R = parts(model)
    layer.fused = fused
    for input_dtype in {torch.float32, half}:
        x = torch.randn(2, 40, 64, device=device, dtype=input_dtype, requires_grad=True)
        target = torch.randn(2, 40, 48, device=device)
        with torch.autocast(device, dtype=half):
            y = model(x)
        assert ("Fused" in type(y.grad_fn.next_functions[0][0]).__name__) == fused
        leaves = (x, A, B, R)
        grads = torch.autograd.grad((y.float() * target).sum(), leaves)
        assert y.dtype == half and [g.dtype for g in grads] == [t.dtype for t in leaves]
        double = [t.detach().double().requires_grad_() for t in leaves]
        wanted = exact(double[0], layer.base_layer.weight.double(), layer.base_layer.bias.double(), *double[1:],
                       choices.get("top_k"))
        wanted_grads = torch.autograd.grad((wanted * target).sum(), double)
        for found, true in zip((y.detach(), *grads), (wanted.detach(), *wanted_grads), strict=True):
            assert float((found.double() - true).norm() / true.norm()) < 2**-7  # bfloat16 rounds by up to 2^-9 each time


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("base_dtype, adapter_upcast", [(torch.float32, True), (torch.bfloat16, True),
                                                        (torch.bfloat16, False)])
def test_autocast_without_gradient(base_dtype, adapter_upcast, tokens):
    model = adapted(base_dtype, Single(64, 48), adapter_upcast, r=4, router_init_std=0.2)
    layer, A, B, R = (t.double() if isinstance(t, torch.Tensor) else t for t in (parts(model)[i] for i in (0, 1, 2, 3)))
    x = torch.randn(1, tokens, 64)
    wanted = exact(x.double(), layer.base_layer.weight.double(), layer.base_layer.bias.double(), A, B, R)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x.to(dtype))
        assert y.dtype == torch.bfloat16 and float((y.double() - wanted).detach().norm() / wanted.detach().norm()) < 2**-7


@pytest.mark.parametrize("fused", [True, False])
def test_the_router_stays_in_float32_under_autocast(fused):
    model = adapted(torch.float32, Single(2, 3))
    layer, A, B, R = parts(model)
    layer.fused = fused
    with torch.no_grad():
        R.copy_(torch.tensor([[100.0, 0.1], [100.0, 0.0], [100.0, -0.2]]))  # logits that bfloat16 cannot tell apart
    x = torch.tensor([[1.0, 1.0], [1.001, 2.0]])
    wanted = torch.softmax(torch.tensor([[0.1, 0.0, -0.2], [0.2, 0.0, -0.4]]), -1)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_routing(model) as routing:
        model(x)
    assert routing["lin"][0].dtype == torch.float32
    torch.testing.assert_close(routing["lin"][0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("choices", [{}, dict(lora_dropout=0.3)])
def test_gradient_checkpointing_under_autocast(choices):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=1))
    model = get_peft_model(base, ILoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_weights=False,
                                             **choices)).train()
    tokens = torch.arange(12).view(2, 6)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert found[0] and all(map(torch.equal, *found))


def test_backward_inside_the_autocast_block_and_twice():
    model = adapted(torch.float32, Single(16, 24))
    layer, *weights = parts(model)
    x = torch.randn(9, 16, requires_grad=True)
    found = []
    for fused in (True, False):
        layer.fused = fused
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            once = torch.autograd.grad(y.float().square().sum(), (x, *weights), retain_graph=True)
        twice = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)[0].square().sum()
        found.append((*once, *torch.autograd.grad(twice, weights)))
    layer.fused = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert all(map(torch.equal, found[0][:4], torch.autograd.grad(y.float().square().sum(), (x, *weights))))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


# ---- the fused layer with dropout

@pytest.mark.parametrize("choices", [{}, dict(top_k=2), dict(shared_A=False), dict(router_temperature=0.3)])
@pytest.mark.parametrize("shape", [(5,), (4, 3, 5), (2, 0, 5)])
def test_dropout_equals_the_modules_called_one_by_one(choices, shape):
    model = adapted(lora_dropout=0.4, **choices).train()
    layer, *weights = parts(model)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    found = []
    for fused in (True, False):
        layer.fused = fused
        torch.manual_seed(1)
        y = model(x)
        assert ("Fused" in type(y.grad_fn.next_functions[0][0]).__name__) == fused
        found.append((y.detach(), *torch.autograd.grad((y * target).sum(), (x, *weights), materialize_grads=True)))
        torch.manual_seed(1)
        with torch.no_grad():
            torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    layer.fused = True
    torch.testing.assert_close(model.eval()(x), adapted(**choices)(x))


def test_first_and_second_derivatives_with_dropout():
    model = adapted(lora_dropout=0.4).train()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names, values = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)

    def call(x, *values):
        torch.manual_seed(1)
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


@pytest.mark.parametrize("half, dropout", [(True, 0.0), (False, 0.1), (True, 0.1)])
def test_memory_kept_under_autocast_and_dropout(half, dropout):
    x = torch.randn(2, 128, 128, requires_grad=True)
    torch.manual_seed(0)
    plain = get_peft_model(Single(128, 320), LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["lin"]))
    ours = adapted(torch.float32, Single(128, 320), r=4, lora_dropout=dropout)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        theirs, kept = kept_bytes(plain.train(), x), kept_bytes(ours.train(), x)
    assert kept <= 1.15 * theirs
    if dropout:  # one byte an element in place of dropout's factors and the dropped copy
        assert kept <= 0.8 * theirs
