"""The fused layer's Triton kernels against the same layer without them: on a GPU if there is one, else interpreted."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from crab.ilora import ILoraConfig, fused, layer

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported


class Single(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin = nn.Linear(24, 40, bias=bias)

    def forward(self, x):
        return self.lin(x)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run here")
def test_interpreted():
    """Run this file where Triton interprets its kernels."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout


@pytest.fixture
def used(monkeypatch):
    """How often each kernel ran in the layers, which here take interpreted ones on a CPU."""
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    from crab.ilora import kernels

    if DEVICE == "cuda":
        fused.kernels_for(
            torch.device("cuda", torch.cuda.current_device())
        )  # tries the kernels once, which is not counted
    counts = {"route": 0, "route_backward": 0}

    def counting(name):
        call = getattr(kernels, name)

        def count(*args):
            counts[name] += 1
            with _disable_current_modes():  # what the interpreter itself does is none of `Calls`' business
                return call(*args)

        return count

    for name in counts:
        monkeypatch.setattr(kernels, name, counting(name))
    if INTERPRETED:
        monkeypatch.setattr(layer, "KERNEL_DEVICES", ("cpu",))
        monkeypatch.setattr(layer, "kernels_for", lambda device: kernels)
    return counts


def adapted(dtype=torch.float32, upcast=False, base=None, **choices):
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=6, num_heads=3, target_modules=["lin"], init_weights=False, router_init_std=0.5)
    model = get_peft_model(
        (base or Single()).to(dtype), ILoraConfig(**settings | choices), autocast_adapter_dtype=upcast
    )
    model = model.to(DEVICE)
    lin = model.base_model.model.lin
    return model, lin, [getattr(lin, name)["default"].weight for name in ("ilora_A", "ilora_B", "ilora_router")]


def both(model, lin, weights, x, grad, autocast=None):
    """Output, gradients of x and the weights, output without gradient and routing: with the kernels and without."""
    found = []
    for lin.kernels in (True, False):
        seen = []
        lin.routing_observers["default"] = [lambda module, routing: seen.append(routing)]  # noqa: B023
        torch.manual_seed(1)
        with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
            y = model(x)
            with torch.no_grad():
                without = model(x)
        grads = torch.autograd.grad(y, (x, *weights), grad.to(y.dtype))
        found.append([y.detach(), *grads, without, *seen])
    return found


def assert_close(found, tolerance):
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error = (ours.double() - theirs.double()).norm()
        assert float(error) <= tolerance * float(theirs.double().norm()) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, choices",
    [
        (1, {}),
        (70, {}),
        (70, dict(shared_A=False, bias=False)),
        (33, dict(num_heads=1, r=1)),
        (8, dict(num_heads=5, r=3, router_temperature=0.3)),
        (65, dict(num_heads=5, r=3, shared_A=False, router_temperature=2)),
        (40, dict(r=70, num_heads=2)),
        (40, dict(lora_dropout=0.4)),
        (7, dict(lora_dropout=0.4, shared_A=False)),
    ],
)
def test_equals_the_layer_without_kernels(used, dtype, tokens, choices):
    choices = dict(choices)
    model, lin, weights = adapted(dtype, base=Single(choices.pop("bias", True)), **choices)
    x = torch.randn(tokens, 24, dtype=dtype, device=DEVICE, requires_grad=True)
    found = both(model.train(), lin, weights, x, torch.randn(tokens, 40, device=DEVICE))
    assert used == {"route": 2, "route_backward": 1}
    assert_close(found, {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-10}[dtype])


@pytest.mark.parametrize("choices", [{}, dict(shared_A=False)])
def test_equals_the_formula_in_float64(used, choices):
    model, lin, weights = adapted(**choices)
    x = torch.randn(2, 9, 24, device=DEVICE, requires_grad=True)
    target = torch.randn(2, 9, 40, device=DEVICE)
    y = model(x)
    grads = torch.autograd.grad(y, (x, *weights), target)
    wide, A, B, R = (t.detach().double().requires_grad_() for t in (x, *weights))
    w = torch.softmax(wide @ R.T, -1)
    wanted = wide @ lin.base_layer.weight.double().T + lin.base_layer.bias.double()
    for i in range(3):
        own = A if len(A) == 4 else A[4 * i : 4 * i + 4]
        wanted = wanted + 1.5 * w[..., i : i + 1] * (wide @ own.T @ B[:, 4 * i : 4 * i + 4].T)
    exact = torch.autograd.grad(wanted, (wide, A, B, R), target.double())
    assert used == {"route": 1, "route_backward": 1}
    for ours, theirs in zip((y, *grads), (wanted, *exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_dtype, upcast", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
@pytest.mark.parametrize("tokens", [3, 40])
def test_mixed_precision(used, base_dtype, upcast, autocast, tokens):
    model, lin, weights = adapted(base_dtype, upcast)
    x = torch.randn(tokens, 24, dtype=base_dtype, device=DEVICE, requires_grad=True)
    found = both(model, lin, weights, x, torch.randn(tokens, 40, device=DEVICE), autocast)
    assert used == {"route": 2, "route_backward": 1}
    assert_close(found, 2**-7)


def test_a_bad_token_spoils_what_it_spoils_without_kernels(used):
    model, lin, weights = adapted()
    lin.check_routing = False
    x = torch.randn(6, 24, device=DEVICE)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    with_kernels, without = both(model, lin, weights, x.requires_grad_(), torch.randn(6, 40, device=DEVICE))
    for ours, theirs in zip(with_kernels, without, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert with_kernels[0].isnan().any(1).tolist() == [False, True, False, False, True, False]
    lin.kernels = lin.check_routing = True
    with pytest.raises(ValueError, match="routing of .* is not finite"):
        model(x)


def test_only_what_is_asked_for_and_second_derivatives(used):
    model, lin, (A, B, R) = adapted()
    x = torch.randn(4, 24, device=DEVICE, requires_grad=True)
    found = []
    for lin.kernels in (True, False):
        found.append(
            [*torch.autograd.grad(model(x).square().sum(), [B]), *torch.autograd.grad(model(x).square().sum(), [R])]
        )
        slope = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        found[-1] += torch.autograd.grad(slope.square().sum(), (A, B, R))
    assert used == {"route": 3, "route_backward": 3}
    assert_close(found, 1e-4)
    B.grad = None
    lin.kernels = True
    model(x).sum().backward()
    assert B.grad.is_contiguous() and A.grad.is_contiguous() and R.grad.is_contiguous()


@pytest.mark.parametrize(
    "change", [dict(kernels=False), dict(fused=False), dict(top_k=2), dict(dtype=torch.float64), dict(tokens=0)]
)
def test_what_is_left_to_torch(used, change, monkeypatch):
    change = dict(change)
    dtype, tokens = change.pop("dtype", torch.float32), change.pop("tokens", 3)
    for name in ("kernels", "fused"):
        if name in change:
            monkeypatch.setattr(layer.ILoraLayer, name, change.pop(name))
    model, _, _ = adapted(dtype, **change)
    model(torch.randn(tokens, 24, dtype=dtype, device=DEVICE, requires_grad=True)).sum().backward()
    assert used == {"route": 0, "route_backward": 0}


def test_whole_models_still_compile(used):
    model, _, _ = adapted()
    x = torch.randn(3, 24, device=DEVICE)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert used["route"] == 0
    torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)
    assert used["route"] == 1


class Calls(TorchDispatchMode):
    """Names of the operations that compute: no views, no empty tensors."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in (
            "t",
            "view",
            "_unsafe_view",
            "slice",
            "split_with_sizes",
            "detach",
            "transpose",
            "empty",
            "new_empty",
        ):
            self.made.append(name)
        return func(*args, **kwargs or {})


def test_as_many_launches_as_plain_lora(used):
    plain = get_peft_model(Single(bias=False), LoraConfig(r=4, lora_alpha=6, target_modules=["lin"])).to(DEVICE)
    x = torch.randn(40, 24, device=DEVICE, requires_grad=True)
    made = []
    for model in (plain, adapted(base=Single(bias=False))[0]):
        x.grad = None
        with Calls() as forward:
            y = model(x)
        with Calls() as backward:
            y.backward(torch.ones(40, 40, device=DEVICE))
        made.append((forward.made, backward.made))
    (forward, backward), (our_forward, our_backward) = made
    assert used == {"route": 1, "route_backward": 1}
    assert len(our_forward) + 1 <= len(forward), (forward, our_forward)
    assert len(our_backward) + 1 <= len(backward), (backward, our_backward)


@pytest.mark.parametrize("choices", [{}, dict(shared_A=False)])
def test_no_more_is_kept_for_backward(used, choices):
    model, lin, _ = adapted(**choices)
    x = torch.randn(50, 24, device=DEVICE, requires_grad=True)
    kept = []
    for lin.kernels in (True, False):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        assert y.requires_grad
        kept.append(sum(storages.values()))
    assert kept[0] == kept[1]
