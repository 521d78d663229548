"""Which adapter's routing is meant, kinds of token of the caller's choice, and what a frozen routing costs."""

import math

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crab.ilora import ILoraConfig, fixed_routing, record_routing, record_routing_means, routing_information, to_static
from crab.ilora.published import published_state_dict


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.second(self.first(x))


def adapted(**choices):
    torch.manual_seed(0)
    settings = dict(r=2, lora_alpha=3, num_heads=3, target_modules=["first"], init_weights=False, router_init_std=1.0)
    return get_peft_model(Tower().double(), ILoraConfig(**settings | choices)).eval()


X = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ---- one adapter, by name or as the active one

CALLS = {
    "record_routing": lambda model, name=None: record_routing(model, adapter_name=name).__enter__(),
    "record_routing_means": lambda model, name=None: record_routing_means(model, adapter_name=name).__enter__(),
    "fixed_routing": lambda model, name=None: fixed_routing(model, [1, 0, 0], adapter_name=name).__enter__(),
    "to_static": lambda model, name=None: to_static(model, [1, 0, 0], adapter_name=name),
    "published_state_dict": published_state_dict,
}


@pytest.mark.parametrize("caller", CALLS)
def test_every_call_says_which_adapter_it_lacks(caller):
    call = CALLS[caller]
    with pytest.raises(ValueError, match=f"{caller}: Tower has no I-LoRA layers; give a PEFT model"):
        call(Tower())
    model = adapted()
    model.add_adapter("words", ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=["second"]))
    with pytest.raises(ValueError, match=rf"{caller}: no I-LoRA adapter 'nobody'; there are \['default', 'words'\]"):
        call(model, "nobody")
    model.base_model.set_adapter(["default", "words"])
    with pytest.raises(ValueError, match=rf"{caller}: give `adapter_name`; the active adapters are \['default', 'words'\]"):
        call(model)


def test_the_active_adapter_is_meant_unless_another_is_named():
    model = adapted()
    model.add_adapter("words", ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=["second"]))
    for name, module in ((None, "first"), ("default", "first"), ("words", "second")):
        with record_routing(model, name) as routing:
            model(X)
        assert list(routing) == [module]
    model.set_adapter("words")
    with record_routing(model) as routing:
        model(X)
    assert list(routing) == ["second"] and routing["second"][0].shape == (2, 4, 2)


# ---- inside wrappers

def test_names_inside_data_parallel_are_the_models_own(tmp_path):
    model = adapted()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with record_routing(DistributedDataParallel(model)) as routing, record_routing_means(nn.DataParallel(model)) as means:
            model(X)
    finally:
        dist.destroy_process_group()
    assert list(routing) == list(means.weights()) == ["first"]


class Deep(nn.Module):
    """More layers than dynamo compiles one function for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(torch._dynamo.config.recompile_limit + 2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def test_recording_a_compiled_model_compiles_nothing():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_peft_model(Deep().double(), ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=r"layers\.\d+",
                                                        init_weights=False, router_init_std=1.0)).eval()
    with record_routing(model) as wanted:
        model(X)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    y, made = compiled(X), len(graphs)
    assert made == 1
    with record_routing(compiled) as routing, record_routing_means(compiled, ["all"], generated=None) as means:
        torch.testing.assert_close(compiled(X), y)
    assert list(routing) == list(means.weights()) == list(wanted)
    assert all(torch.equal(routing[name][0], weights) for name, (weights,) in wanted.items())
    compiled(X)
    assert len(graphs) == made  # neither in the block nor after it


# ---- kinds of token

def test_any_names_of_kinds():
    model = adapted()
    kinds = torch.tensor([[0, 1, 1, -1], [1, 0, 0, 0]])
    router = model.base_model.model.first.ilora_router["default"].weight
    weights = torch.softmax(X @ router.T, -1).detach()
    with record_routing_means(model, ["question", "speech"], generated="speech") as means:
        for group in ("lips", "sounds"):
            means.label(kinds, group)
            model(X if group == "lips" else -X)
    found = {(r["group"], r["segment"], r["head"]): r for r in means.rows()}
    assert len(found) == 2 * 2 * 3 and {r["module"] for r in found.values()} == {"first"}
    for kind, segment in enumerate(["question", "speech"]):
        here = weights[kinds == kind]
        for head in range(3):
            row = found["lips", segment, head]
            assert row["weight"] == pytest.approx(float(here[:, head].mean())) and row["tokens"] == (4, 3)[kind]
            assert row["entropy"] == pytest.approx(float(-(here * here.log2()).sum(-1).mean()))
    flipped = torch.softmax(-X @ router.T, -1).detach()
    speech = torch.stack([w[kinds == 1].mean(0) for w in (weights, flipped)])
    entropy = [-sum(p * math.log2(p) for p in row) for row in (*speech.tolist(), speech.mean(0).tolist())]
    assert means.information(["speech"])["first"] == pytest.approx(entropy[2] - (entropy[0] + entropy[1]) / 2)
    assert routing_information(speech) == pytest.approx(entropy[2] - (entropy[0] + entropy[1]) / 2)
    with pytest.raises(ValueError, match=r"\['video'\] are no segments of this recording.*'question', 'speech'"):
        means.weights(segments=["video"])
    with pytest.raises(ValueError, match="nothing was recorded for group 'smells', only for .'lips', 'sounds'"):
        means.weights("smells")


@pytest.mark.parametrize("segments", [(), [], ["a", "b", "a"], "text"])
def test_kinds_are_different_names(segments):
    with pytest.raises(ValueError, match="`segments` must be a list of different names"):
        with record_routing_means(adapted(), segments, generated=None):
            pass


def test_one_kind_for_all_tokens_and_no_generation():
    model = adapted()
    with record_routing_means(model, ["all"], generated=None) as means:
        model(X)
        means.label(torch.zeros(2, 4, dtype=torch.long))
        with pytest.raises(ValueError, match=r"'first' saw tokens \[2, 1\], but the labels given are for \[2, 4\]"):
            model(X[:, :1])
    assert [row["tokens"] for row in means.rows()] == [8, 8, 8]


# ---- the error of a frozen routing

@pytest.mark.parametrize("fixed", [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_the_error_of_freezing_by_hand(fixed):
    """In float64 from the tensors alone: ||sum_i (g_i - w_i(x)) B_i A x|| / ||sum_i w_i(x) B_i A x|| behind `second`."""
    model = adapted()
    layer, last = model.base_model.model.first, model.base_model.model.second.weight
    A, B, R = (getattr(layer, part)["default"].weight for part in ("ilora_A", "ilora_B", "ilora_router"))
    off, done = [], []
    for x in X.reshape(-1, 5):
        scores = [math.exp(float(row @ x)) for row in R]
        heads = [last @ (B[:, 2 * i:2 * i + 2] @ (A @ x)) for i in range(3)]
        routed = [s / sum(scores) for s in scores]
        done.append(sum(w * head for w, head in zip(routed, heads, strict=True)))
        off.append(sum((g - w) * head for g, w, head in zip(fixed, routed, heads, strict=True)))
    wanted = float(torch.stack(off).norm() / torch.stack(done).norm())
    assert wanted > 0.05
    assert to_static(model, fixed, run=lambda: model(X)).error == pytest.approx(wanted, rel=1e-9)
    assert to_static(model, fixed, run=lambda: model(X), fold=True).error == pytest.approx(wanted, rel=1e-9)
    assert to_static(model, fixed).error is None


def test_the_error_is_of_the_adapter_that_runs():
    """Freezing one that is not active changes nothing, which would read as an error of 0."""
    model = adapted()
    model.add_adapter("words", ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=["second"], init_weights=False))
    run = lambda: model(X)  # noqa: E731
    for active in ("default", ["default", "words"]):
        model.base_model.set_adapter(active)
        with pytest.raises(ValueError, match=r"to_static: `run` measures the active adapters, \['default'.*set_adapter\('words'\)"):
            to_static(model, [1, 0], run=run, adapter_name="words")
        assert to_static(model, [1, 0], adapter_name="words").error is None
    model.set_adapter("words")
    assert to_static(model, [1, 0], run=run).error > 0


def test_freezing_at_the_recorded_means_costs_less_than_at_one_head():
    model = adapted(router_init_std=0.3)
    with record_routing_means(model) as means:
        model(X)
    run = lambda: model(X)  # noqa: E731
    error = to_static(model, means.weights(), run=run).error
    assert 0 < error < min(to_static(model, head, run=run).error for head in torch.eye(3))
