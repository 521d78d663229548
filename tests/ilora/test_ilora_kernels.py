"""The fused layer's Triton kernels against the same layer without them: on a GPU if there is one, else interpreted."""

import os
import subprocess
import sys

import pytest
import torch
from ilora_models import Single, formula, refuses
from ilora_models import adapted as small_adapted
from ilora_models import parts as weights_of
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from crab.ilora import fused, layer

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it at import


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run here")
def test_interpreted():
    """Run this file with interpreted kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout


@pytest.fixture
def used(monkeypatch):
    """How often each kernel ran in the layers. On a CPU these use interpreted kernels."""
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    from crab.ilora import kernels

    if DEVICE == "cuda":  # this tries the kernels once, which does not count
        fused.kernels_for(torch.device("cuda", torch.cuda.current_device()))
    counts = {"route": 0, "route_backward": 0}

    def counting(name):
        call = getattr(kernels, name)

        def count(*args):
            counts[name] += 1
            with _disable_current_modes():  # `Calls` must not see what the interpreter does
                return call(*args)

        return count

    for name in counts:
        monkeypatch.setattr(kernels, name, counting(name))
    if INTERPRETED:
        monkeypatch.setattr(layer, "KERNEL_DEVICES", ("cpu",))
        monkeypatch.setattr(layer, "kernels_for", lambda device: kernels)
    return counts


def adapted(dtype=torch.float32, upcast=False, bias=True, **choices):
    """The model, its layer, and the weights A, B and R."""
    settings = dict(r=4, lora_alpha=6, router_init_std=0.5)
    model = small_adapted(dtype, Single(24, 40, bias), upcast, **settings | choices).to(DEVICE)
    return model, *weights_of(model)


def tensor(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def both(model, lin, weights, x, autocast=None):
    """Output, gradients of x and the weights, output without gradient, and routing: with the kernels and without."""
    results, grad = [], tensor(len(x), 40)
    for lin.kernels in (True, False):
        seen = []
        lin.routing_observers["default"] = [lambda module, routing, seen=seen: seen.append(routing)]
        torch.manual_seed(1)
        with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
            y = model(x)
            with torch.no_grad():
                without = model(x)
        grads = torch.autograd.grad(y, (x, *weights), grad.to(y.dtype))
        results.append([y.detach(), *grads, without, *seen])
    return results


def assert_close(results, tolerance):
    for ours, theirs in zip(*results, strict=True):
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
    model, lin, *weights = adapted(dtype, **choices)
    results = both(model.train(), lin, weights, tensor(tokens, 24, dtype=dtype).requires_grad_())
    assert used == {"route": 2, "route_backward": 1}
    assert_close(results, {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-10}[dtype])


@pytest.mark.parametrize("shared_A", [True, False])
def test_equals_the_formula_in_float64(used, shared_A):
    model, lin, *weights = adapted(shared_A=shared_A)
    x, target = tensor(2, 9, 24).requires_grad_(), tensor(2, 9, 40)
    y = model(x)
    grads = torch.autograd.grad(y, (x, *weights), target)
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    expected = formula(wide[0], lin.base_layer.weight.double(), lin.base_layer.bias.double(), *wide[1:])
    exact = torch.autograd.grad(expected, wide, target.double())
    assert used == {"route": 1, "route_backward": 1}
    for ours, theirs in zip((y, *grads), (expected, *exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_dtype, upcast", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
@pytest.mark.parametrize("tokens", [3, 40])
def test_mixed_precision(used, base_dtype, upcast, autocast, tokens):
    model, lin, *weights = adapted(base_dtype, upcast)
    results = both(model, lin, weights, tensor(tokens, 24, dtype=base_dtype).requires_grad_(), autocast)
    assert used == {"route": 2, "route_backward": 1}
    assert_close(results, 2**-7)


def test_a_bad_token_spoils_what_it_spoils_without_kernels(used):
    model, lin, *weights = adapted()
    lin.check_routing = False
    x = tensor(6, 24)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    with_kernels, without = both(model, lin, weights, x.requires_grad_())
    for ours, theirs in zip(with_kernels, without, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert with_kernels[0].isnan().any(1).tolist() == [False, True, False, False, True, False]
    lin.kernels = lin.check_routing = True
    with refuses("routing of .* is not finite"):
        model(x)


def test_only_what_is_asked_for(used):
    model, lin, A, B, R = adapted()
    x = tensor(4, 24).requires_grad_()
    results = []
    for lin.kernels in (True, False):
        results.append([torch.autograd.grad(model(x).square().sum(), [weight])[0] for weight in (B, R)])
    assert used == {"route": 2, "route_backward": 2}
    assert_close(results, 1e-4)
    lin.kernels = True
    model(x).sum().backward()
    assert B.grad.is_contiguous() and A.grad.is_contiguous() and R.grad.is_contiguous()


@pytest.mark.parametrize(
    "off, choices, dtype, tokens",
    [
        ("kernels", {}, torch.float32, 3),
        ("fused", {}, torch.float32, 3),
        (None, dict(top_k=2), torch.float32, 3),
        (None, {}, torch.float64, 3),
        (None, {}, torch.float32, 0),
    ],
)
def test_what_is_left_to_torch(used, off, choices, dtype, tokens, monkeypatch):
    if off:
        monkeypatch.setattr(layer.ILoraLayer, off, False)
    model = adapted(dtype, **choices)[0]
    model(tensor(tokens, 24, dtype=dtype).requires_grad_()).sum().backward()
    assert used == {"route": 0, "route_backward": 0}


def test_whole_models_still_compile(used):
    model, x = adapted()[0], tensor(3, 24)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert used["route"] == 0
    torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)
    assert used["route"] == 1


VIEWS = {"t", "view", "_unsafe_view", "slice", "split_with_sizes", "detach", "transpose", "empty", "new_empty"}


class Calls(TorchDispatchMode):
    """Counts the operations that compute."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **kwargs or {})


def test_no_more_launches_than_plain_lora_and_nothing_more_kept(used):
    plain = get_peft_model(Single(24, 40, False), LoraConfig(r=4, lora_alpha=6, target_modules=["lin"])).to(DEVICE)
    ours, lin, *_ = adapted(bias=False)
    x = tensor(40, 24).requires_grad_()
    counts, stored = [], []
    for model, lin.kernels in ((plain, True), (ours, True), (ours, False)):
        x.grad, storages = None, {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with Calls() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        with Calls() as backward:
            y.backward(torch.ones(40, 40, device=DEVICE))
        counts.append((forward.count, backward.count))
        stored.append(sum(storages.values()))
    assert used == {"route": 1, "route_backward": 1}
    # the kernels' own launches, one each way, are not counted
    assert counts[1][0] + 1 <= counts[0][0] and counts[1][1] + 1 <= counts[0][1] and stored[1] == stored[2]
