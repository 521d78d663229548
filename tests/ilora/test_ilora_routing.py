"""Recording, fixing and exporting the routing."""

import math

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from ilora_models import MASK, TOKENS, Tower, base_model, language_model, logits, refuses, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import crab.ilora
from crab.ilora import (
    ILoraConfig,
    ILoraLayer,
    fixed_routing,
    instruction_tokens,
    record_routing,
    record_routing_means,
    routing_entropy,
    routing_information,
    to_static,
)
from crab.ilora.published import published_state_dict

X = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GENERATE = dict(attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, min_new_tokens=4, do_sample=False)
DOWN = "model.layers.1.mlp.down_proj"


def adapted(**choices):
    torch.manual_seed(0)
    settings = dict(r=2, lora_alpha=3, num_heads=3, target_modules=["first"], init_weights=False, router_init_std=1.0)
    return get_peft_model(Tower().double(), ILoraConfig(**settings | choices)).eval()


def with_words():
    """A model with the adapters `default` on `first` and `words` on `second`."""
    model = adapted()
    model.add_adapter("words", ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=["second"]))
    return model


# ---- which adapter

CALLS = {
    "record_routing": lambda model, name=None: record_routing(model, adapter_name=name).__enter__(),
    "record_routing_means": lambda model, name=None: record_routing_means(model, adapter_name=name).__enter__(),
    "fixed_routing": lambda model, name=None: fixed_routing(model, [1, 0, 0], adapter_name=name).__enter__(),
    "to_static": lambda model, name=None: to_static(model, [1, 0, 0], adapter_name=name),
    "published_state_dict": published_state_dict,
}


@pytest.mark.parametrize("caller", CALLS)
def test_every_call_says_which_adapter_is_missing(caller):
    call = CALLS[caller]
    with refuses(f"{caller}: Tower has no I-LoRA layers; give a PEFT model"):
        call(Tower())
    model = with_words()
    with refuses(rf"{caller}: no I-LoRA adapter 'nobody'; the model has \['default', 'words'\]"):
        call(model, "nobody")
    model.base_model.set_adapter(["default", "words"])
    with refuses(rf"{caller}: give `adapter_name`; the active adapters are \['default', 'words'\]"):
        call(model)


def test_the_active_adapter_is_taken_unless_another_is_named():
    model = with_words()
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
        with record_routing(DistributedDataParallel(model)) as routing:
            with record_routing_means(nn.DataParallel(model)) as means:
                model(X)
    finally:
        dist.destroy_process_group()
    assert list(routing) == list(means.weights()) == ["first"]


def test_recording_a_compiled_model_compiles_nothing():
    torch._dynamo.reset()
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(5, 5) for _ in range(torch._dynamo.config.recompile_limit + 2))).double()
    model = get_peft_model(deep, ILoraConfig(r=1, lora_alpha=1, num_heads=2, target_modules=r"\d+", init_weights=False))
    with record_routing(model.eval()) as expected:
        model(X)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    y, count = compiled(X), len(graphs)
    assert count == 1
    with record_routing(compiled) as routing, record_routing_means(compiled, ["all"], generated=None) as means:
        torch.testing.assert_close(compiled(X), y)
    assert list(routing) == list(means.weights()) == list(expected)
    assert all(torch.equal(routing[name][0], weights) for name, (weights,) in expected.items())
    compiled(X)
    assert len(graphs) == count  # neither in the block nor after it


# ---- every token


def test_recorder_sees_every_token_and_changes_nothing():
    model = language_model()
    expected = logits(model)
    with record_routing(model) as routing:
        assert torch.equal(logits(model), expected)
    assert sorted(routing) == sorted(model.base_model.targeted_module_names)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    inputs = model.base_model.model.model.layers[0].input_layernorm(model.get_input_embeddings()(TOKENS))
    weights = torch.softmax(inputs @ layer.ilora_router["default"].weight.T, -1)
    torch.testing.assert_close(routing["model.layers.0.self_attn.q_proj"][0], weights)
    logits(model)
    assert all(len(passes) == 1 for passes in routing.values()), "recorded after the block"


@pytest.mark.parametrize("router_input", ["token", "instruction"])
def test_recorder_and_instruction_through_generate(router_input):
    model = language_model(router_input=router_input)
    mask = torch.tensor([[False, True, True, False, False, False], [False, False, True, True, True, False]])
    with instruction_tokens(model, mask):
        plain = model.generate(input_ids=TOKENS, **GENERATE)
        with record_routing(model) as routing:
            assert torch.equal(model.generate(input_ids=TOKENS, **GENERATE), plain)
    first, *others = routing[DOWN]
    assert [step.shape for step in routing[DOWN]] == [(2, 6, 3), *3 * [(2, 1, 3)]]
    if router_input == "instruction":
        assert all(torch.equal(step, first[:, :1]) for step in others)
    # without a cache: the whole sequence again, with the answer outside of the mask
    with instruction_tokens(model, nn.functional.pad(mask, (0, 4))):
        scores = logits(model, plain)
    assert torch.equal(scores[:, 5:-1, :31].argmax(-1), plain[:, 6:])


def test_instruction_refusals():
    model = language_model(router_input="instruction")
    with refuses("instruction_tokens"):
        logits(model)
    with instruction_tokens(model, MASK), refuses(r"reads \[2, 4, 16\].*\[2, 6\]"):
        logits(model, TOKENS[:, :4])
    for wrong, message in ((MASK.int(), "must be bool"), (MASK[0], "must be bool"), (MASK & False, r"\[0, 1\]")):
        with refuses(message), instruction_tokens(model, wrong):
            pass
    with refuses("instruction_tokens"):  # the mask does not stay
        logits(model)


@pytest.mark.parametrize("options", [dict(use_cache=False), dict(prompt_lookup_num_tokens=2)])
def test_generation_that_reads_more_than_the_new_token_says_so(options):
    tokens = torch.tensor([[3, 4, 5, 3, 4, 5]])  # repeated, so that look-up finds something
    options = GENERATE | options | dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    message = "generate must read one new token per pass: not use_cache=False, prompt_lookup_num_tokens"
    model = language_model(router_input="instruction")
    with instruction_tokens(model, tokens > 0), refuses(message):
        model.generate(**options)
    model = language_model()
    with record_routing_means(model) as means, refuses(message):
        means.label(torch.zeros_like(tokens))
        model.generate(**options)


# ---- means

KINDS = torch.tensor([[1, 1, 2, 0, 0, 3], [-1, 1, 2, 2, 0, 3]])


def test_means_equal_those_of_everything_recorded():
    model = language_model()
    batches = [("ks", TOKENS, KINDS), ("ave", TOKENS + 9, KINDS.flip(0)), ("ks", TOKENS + 3, KINDS)]
    every = {}
    with record_routing_means(model) as means:
        for group, tokens, kinds in batches:
            means.label(kinds, group)
            with record_routing(model) as routing:
                logits(model, tokens)
            for name, (weights,) in routing.items():
                for kind, segment in enumerate(crab.ilora.routing.SEGMENTS):
                    every.setdefault((group, name, segment), []).append(weights[kinds == kind].double())
    logits(model)  # not recorded
    groups = {}
    for row in means.rows():
        groups.setdefault((row["group"], row["module"], row["segment"]), []).append(row)
    assert groups.keys() == every.keys()
    for key, rows in groups.items():
        weights = torch.cat(every[key])
        assert [r["head"] for r in rows] == [0, 1, 2] and rows[0]["tokens"] == len(weights)
        assert [r["weight"] for r in rows] == pytest.approx(weights.mean(0).tolist(), abs=1e-7)
        assert rows[0]["entropy"] == pytest.approx(float(-(weights * weights.log2()).sum(-1).mean()), abs=1e-6)
    video = torch.cat(every["ks", DOWN, "video"]).mean(0)
    torch.testing.assert_close(means.weights("ks", ["video"])[DOWN], video, atol=1e-7, rtol=0)
    whole = torch.cat([w for (_, module, _), many in every.items() if module == DOWN for w in many])
    torch.testing.assert_close(means.weights()[DOWN], whole.mean(0), atol=1e-7, rtol=0)
    assert to_static(model, means.weights("ks"))[0].r == 6


def test_means_through_generate_in_constant_memory():
    model = language_model()
    sizes = []
    for new in (1, 6):
        with record_routing_means(model) as means:
            means.label(KINDS.where(KINDS != 3, 0))
            model.generate(input_ids=TOKENS, **GENERATE | dict(max_new_tokens=new, min_new_tokens=new))
        sizes.append(sum(s.numel() for sums in means._sums.values() for s in sums.values()))
    assert sizes[0] == sizes[1]
    tokens = {row["segment"]: row["tokens"] for row in means.rows()}
    assert tokens == {"text": 5, "video": 3, "audio": 3, "answer": 2 * 5}  # the last new token is never read


def test_entropy_and_information_by_hand():
    entropy = routing_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]))
    assert entropy.tolist() == pytest.approx([0, 1, 0.811278])
    assert routing_information(torch.eye(4)) == pytest.approx(2)
    assert routing_information(torch.tensor([[0.3, 0.7]] * 2)) == pytest.approx(0, abs=1e-7)
    assert routing_information(torch.tensor([[0.75, 0.25], [0.25, 0.75]])) == pytest.approx(1 - 0.811278, abs=1e-6)
    assert routing_information(torch.eye(2), torch.tensor([1, 0])) == 0


def test_own_names_of_kinds_and_no_generation():
    model = adapted()
    with record_routing_means(model, ["question", "speech"], generated=None) as means:
        model(X)  # without labels: all of the first kind
        means.label(torch.tensor([[0, 1, 1, -1], [1, 0, 0, 0]]), "lips")
        model(X)
        with refuses(r"'first' saw tokens \[2, 1\], but the labels are \[2, 4\]"):
            model(X[:, :1])
    tokens = {(row["group"], row["segment"]): row["tokens"] for row in means.rows()}
    assert tokens == {(None, "question"): 8, ("lips", "question"): 4, ("lips", "speech"): 3}
    with refuses(r"\['video'\] are no segments of this recording.*'question', 'speech'"):
        means.weights(segments=["video"])
    with refuses("nothing was recorded for group 'smells', only for .None, 'lips'"):
        means.weights("smells")


def test_recorders_refuse(monkeypatch):
    model = language_model()
    with record_routing_means(model) as means:
        means.label(KINDS[:, :4])
        with refuses(r"saw tokens \[2, 6\].*\[2, 4\]"):
            logits(model)
        for kinds, message in ((KINDS + 1, "holds 4"), (KINDS.float(), "whole numbers"), (KINDS[0], "whole numbers")):
            with refuses(message):
                means.label(kinds)
    for segments in ((), ["a", "b", "a"], "text"):
        with refuses("`segments` must be a list of different names"):
            record_routing_means(model, segments, generated=None).__enter__()
    with refuses("`generated` must be"):
        record_routing_means(model, ("a", "b")).__enter__()
    layer = next(m for m in model.modules() if isinstance(m, ILoraLayer))
    with torch.no_grad():
        layer.ilora_router["default"].weight[0, 0] = math.nan
    monkeypatch.setattr(ILoraLayer, "check_routing", False)
    with record_routing_means(model) as means:
        logits(model)
    for read in (means.rows, means.weights):
        with refuses("layers.0.self_attn.q_proj.*not finite"):
            read()
    with record_routing(model), refuses("layers.0.self_attn.q_proj.*not finite"):
        logits(model)


# ---- fixed weights

FIXED = [0.6, 0.3, 0.1]


@pytest.mark.parametrize("fixed", [FIXED, [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_fixed_routing_by_hand(fixed):
    model = adapted()
    layer = model.base_model.model.first
    A, B = (getattr(layer, part)["default"].weight for part in ("ilora_A", "ilora_B"))
    before = model(X)
    with fixed_routing(model, [0.1, 0.1, 0.1]), fixed_routing(model, {"first": fixed}):
        result = model(X)
    delta = sum(g * (X @ A.T @ B[:, 2 * i : 2 * i + 2].T) for i, g in enumerate(fixed))
    tower = model.base_model.model
    torch.testing.assert_close(result, tower.second(tower.norm(layer.base_layer(X) + 1.5 * delta)))
    assert torch.equal(model(X), before)


PATTERN = dict(rank_pattern={r"layers\.1\.self_attn\.q_proj": 3}, modules_to_save=["lm_head"])
CASES = [({}, True, 2), (dict(shared_A=False, use_rslora=True), False, 6), (PATTERN, False, 6)]


@pytest.mark.parametrize("native", [False, True])  # or a transformers model that holds its adapters itself
@pytest.mark.parametrize("choices, fold, rank", CASES)
def test_static_lora_equals_the_adapter_with_these_weights(choices, fold, rank, native, tmp_path):
    model = language_model(**choices)
    train(model)
    if native:
        model.save_pretrained(tmp_path / "ilora")
        model = base_model()
        model.load_adapter(tmp_path / "ilora")
    before = logits(model.eval())
    with fixed_routing(model, FIXED):
        expected = logits(model)
    lora, state = to_static(nn.DataParallel(model), FIXED, tmp_path, fold=fold)
    assert torch.equal(logits(model), before) and not torch.allclose(before, expected)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert isinstance(loaded.peft_config["default"], LoraConfig) and lora.r == rank
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == state.keys()
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_fixed_weights_that_do_not_fit():
    model = language_model()
    for weights, message in (
        ([1.0, 0.0], "needs 3 finite weights"),
        ([math.nan, 0, 1], "needs 3 finite weights"),
        ({"model.layers.0.self_attn.q_proj": FIXED}, "exactly the adapted modules; missing"),
        ({"x": FIXED}, r"unknown \['x'\]"),
    ):
        for call in (to_static, lambda *given: fixed_routing(*given).__enter__()):
            with refuses(message):
                call(model, weights)
    with refuses("have their own A, so use fold=False"):
        to_static(language_model(shared_A=False), FIXED, fold=True)
