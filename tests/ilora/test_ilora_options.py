"""The options that are off by default, frozen export and the online recorder."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import crab.ilora
from crab.ilora import (
    ILoraConfig,
    ILoraLayer,
    fixed_routing,
    instruction_tokens,
    parameter_groups,
    record_routing,
    record_routing_means,
    routing_entropy,
    routing_information,
    to_static,
)


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


def language_model(**choices):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=31, pad_token_id=0)).eval()
    if choices.pop("bare", False):
        return base
    settings = dict(r=2, lora_alpha=4, num_heads=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                    router_init_std=3.0, init_weights=False)
    return get_peft_model(base, ILoraConfig(**settings | choices)).eval()


TOKENS = torch.arange(12).view(2, 6)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens).logits


# ---- options

def test_top_k_by_hand():
    model = adapted(top_k=2, num_heads=4)
    layer, A, B, R = parts(model)
    x = torch.randn(6, 5, dtype=torch.float64)
    for token, y in zip(x, model(x), strict=True):
        scores = (R @ token).detach()
        best = sorted(range(4), key=lambda i: -scores[i])[:2]
        total = sum(math.exp(scores[i]) for i in best)
        expected = layer.base_layer(token)
        for i in best:
            expected = expected + 1.5 * math.exp(scores[i]) / total * (B[:, 2 * i:2 * i + 2] @ (A @ token))
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(adapted(top_k=4, num_heads=4)(x), adapted(num_heads=4)(x))


def test_an_a_for_each_head_by_hand():
    model = adapted(shared_A=False)
    layer, A, B, R = parts(model)
    assert A.shape == (6, 5)
    x = torch.randn(6, 5, dtype=torch.float64)
    w = torch.softmax(x @ R.T, -1)
    heads = [x @ A[2 * i:2 * i + 2].T @ B[:, 2 * i:2 * i + 2].T for i in range(3)]
    torch.testing.assert_close(model(x), layer.base_layer(x) + 1.5 * sum(w[:, i:i + 1] * heads[i] for i in range(3)))


OPTIONS = [dict(top_k=2), dict(shared_A=False), dict(router_input="instruction"), dict(router_sharing="layer"),
           dict(router_temperature=0.5), dict(router="uniform", shared_A=False), dict(use_rslora=True, rank_pattern={"q_proj": 3}),
           dict(shared_head=True), dict(shared_head=True, router_sharing="layer", top_k=1),
           dict(router_noise=0.5, balance_weight=0.1, orthogonality_weight=0.1)]


@pytest.mark.parametrize("choices", OPTIONS, ids=lambda c: "-".join(c))
def test_options_survive_saving(choices, tmp_path):
    model = language_model(**choices)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    with instruction_tokens(model, mask):
        wanted = logits(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(written[name] == value for name, value in choices.items())
    loaded = PeftModel.from_pretrained(language_model(bare=True), tmp_path)
    with instruction_tokens(loaded, mask):
        assert torch.equal(logits(loaded), wanted)


def test_options_left_alone_are_not_written(tmp_path):
    language_model().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"top_k", "router_input", "router_sharing", "shared_A", "shared_head", "router_noise", "balance_weight"} & set(written)


@pytest.mark.parametrize("choices, message", [
    (dict(top_k=0), "`top_k` must be"), (dict(top_k=4), "from 1 to num_heads=3"), (dict(top_k=True), "`top_k` must be"),
    (dict(top_k=1, router="uniform"), "unless router='token'"), (dict(router_input="prompt"), "`router_input` must be one of"),
    (dict(router_input="instruction", router="uniform"), "reads nothing"),
    (dict(router_sharing="block"), "`router_sharing` must be one of"),
    (dict(router_sharing="layer", router="uniform"), "no weight to share"), (dict(shared_A=1), "`shared_A` must be"),
    (dict(shared_head=1), "`shared_head` must be"), (dict(shared_head=True, num_heads=1), "num_heads is 2 or more"),
    (dict(shared_head=True, router="uniform"), "unless router='token'"),
    (dict(shared_head=True, top_k=3), "at most the 2 heads that are routed"),
    (dict(router_noise=-1.0), "`router_noise` must be a number of at least 0"), (dict(router_noise=True), "`router_noise` must be"),
    (dict(router_noise=1.0, router="uniform"), "`router_noise` must be 0 unless"),
    (dict(balance_weight=math.inf), "`balance_weight` must be"), (dict(balance_weight=1, router="uniform"), "0 unless router='token'"),
    (dict(orthogonality_weight=0.1, num_heads=1), "0 for a single head"),
    (dict(balance_weight=1.0, num_heads=1), "`balance_weight` must be 0 for a single routed head"),
    (dict(balance_weight=1.0, num_heads=2, shared_head=True), "`balance_weight` must be 0 for a single routed head"),
    (dict(router_noise=1.0, num_heads=2, shared_head=True), "`router_noise` must be 0 for a single routed head"),
    (dict(balance_weight=1.0, top_k=1), "`balance_weight` must be 0 with top_k=1"),
    (dict(use_rslora="false"), "`use_rslora` must be True or False, got 'false'"), (dict(init_weights="no"), "`init_weights` must be"),
])
def test_bad_options(choices, message):
    with pytest.raises(ValueError, match=message):
        adapted(**choices)


# ---- a shared head, noise, and terms beside the loss

def test_a_shared_head_by_hand():
    model = adapted(shared_head=True)
    layer, A, B, R = parts(model)
    assert R.shape == (2, 5)
    x = torch.randn(4, 5, dtype=torch.float64)
    w = torch.softmax(x @ R.T, -1)
    heads = [(x @ A.T) @ B[:, 2 * i:2 * i + 2].T for i in range(3)]
    with record_routing(model) as routing:
        y = model(x)
    torch.testing.assert_close(y, layer.base_layer(x) + 1.5 * (heads[0] + w[:, :1] * heads[1] + w[:, 1:] * heads[2]))
    torch.testing.assert_close(routing["lin"][0], torch.cat((torch.ones(4, 1), w.detach().float()), 1).to(routing["lin"][0]))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (A, B, R))


def test_noise_is_drawn_in_training_alone():
    model, still = adapted(router_noise=0.7), adapted()
    layer, A, B, R = parts(model)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(model.eval()(x), still.eval()(x))
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    w = torch.softmax(x @ R.T + 0.7 * torch.randn(4, 3, dtype=torch.float64), -1)
    expected = layer.base_layer(x) + 1.5 * sum(w[:, i:i + 1] * ((x @ A.T) @ B[:, 2 * i:2 * i + 2].T) for i in range(3))
    torch.testing.assert_close(y, expected)
    assert not torch.equal(y, model(x))


def imbalance(w):
    means = w.reshape(-1, w.shape[-1]).mean(0)
    return len(means) * sum(m * m for m in means) - 1


def overlap(B, heads):
    parts = B.chunk(heads, 1)
    pairs = [(i, j) for i in range(heads) for j in range(i)]
    return sum((parts[i].T @ parts[j]).norm() ** 2 / (parts[i].norm() * parts[j].norm()) ** 2 for i, j in pairs) / len(pairs)


def test_terms_are_what_they_say():
    terms = crab.ilora.terms
    for w, wanted in (([[0.5, 0.5], [0.5, 0.5]], 0), ([[1, 0], [0, 1]], 0), ([[1, 0], [1, 0]], 1), ([[0.75, 0.25]], 0.25)):
        assert terms.imbalance(torch.tensor(w).float()).item() == pytest.approx(wanted)
    eye = torch.eye(4)
    for B, wanted in ((eye, 0), (torch.cat((eye[:, :2], eye[:, :2]), 1), 0.5), (torch.ones(4, 4), 1), (torch.zeros(4, 4), 0)):
        assert terms.overlap(B, 2).item() == pytest.approx(wanted)
    B = torch.randn(7, 6)
    assert terms.overlap(B, 3).item() == pytest.approx(overlap(B, 3).item(), rel=1e-5)


@pytest.mark.parametrize("choices", [dict(balance_weight=0.3), dict(orthogonality_weight=0.2), dict(balance_weight=0.3, orthogonality_weight=0.2),
                                     dict(balance_weight=0.3, shared_A=False, lora_dropout=0.0), dict(balance_weight=0.3, shared_head=True)])
def test_terms_give_the_gradient_they_would_have_in_the_loss(choices):
    model, plain = adapted(**choices), adapted(**{k: v for k, v in choices.items() if not k.endswith("_weight")})
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    _, _, B, R = parts(plain)
    loss = plain.train()(x).square().mean()
    whole = loss
    if "balance_weight" in choices:
        whole = whole + 0.3 * imbalance(torch.softmax(x @ R.T, -1))
    if "orthogonality_weight" in choices:
        whole = whole + 0.2 * overlap(B, 3)
    whole.backward()
    found = model.train()(x).square().mean()
    torch.testing.assert_close(found, loss)  # what is reported stays the task's
    found.backward()
    for own, wanted in zip(parts(model)[1:], parts(plain)[1:], strict=True):
        torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_terms_in_a_whole_model_under_checkpointing_and_from_zero_heads():
    grads = []
    for checkpointing in (False, True):
        model = language_model(balance_weight=1.0, orthogonality_weight=1.0, init_weights=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(g.isfinite().all() for g in grads[-1].values()) and any("router" in n and g.abs().sum() > 0 for n, g in grads[-1].items())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("choices", [dict(balance_weight=1.0), dict(orthogonality_weight=1.0)])
def test_terms_do_what_they_are_for(choices):
    measured = {}
    for name, chosen in (("without", {}), ("with", choices)):
        model = adapted(dtype=torch.float32, **chosen).train()
        layer, _, B, R = parts(model)
        x = torch.randn(32, 5)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        measured[name] = imbalance(torch.softmax(x @ R.T, -1)) if "balance_weight" in choices else overlap(B, 3)
    assert measured["with"] < 0.5 * measured["without"]


def test_sharded_heads_are_refused_an_orthogonality_term():
    model = adapted(orthogonality_weight=0.1).train()
    layer, _, B, _ = parts(model)
    layer.ilora_B["default"] = nn.Linear(3, 7, bias=False).double()
    with pytest.raises(ValueError, match=r"orthogonality_weight needs whole heads, but those of 'lin' are sharded \(\[7, 3\] in place"):
        layer._whole_heads("default")


# ---- the instruction as the router's input

def test_instruction_router_by_hand():
    model = adapted(router_input="instruction")
    layer, A, B, R = parts(model)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    with instruction_tokens(model, mask), record_routing(model) as routing:
        y = model(x)
    for sample, here, found in zip(x, mask, y, strict=True):
        w = torch.softmax(R @ sample[here].mean(0), -1)
        delta = sum(w[i] * (sample @ A.T @ B[:, 2 * i:2 * i + 2].T) for i in range(3))
        torch.testing.assert_close(found, layer.base_layer(sample) + 1.5 * delta)
    assert routing["lin"][0].shape == (2, 4, 3) and torch.equal(routing["lin"][0][:, 0], routing["lin"][0][:, 3])


def test_instruction_router_through_generate():
    model = language_model(router_input="instruction")
    mask = torch.tensor([[False, True, True, False, False, False], [False, False, True, True, True, False]])
    options = dict(attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with instruction_tokens(model, mask), record_routing(model) as routing:
        made = model.generate(input_ids=TOKENS, **options)
    first, *others = routing["model.layers.1.mlp.down_proj"]
    assert all(torch.equal(step, first[:, :1]) for step in others) and len(others) == 3
    # without a cache: the whole sequence again, the answer outside the mask
    with instruction_tokens(model, nn.functional.pad(mask, (0, 4))):
        scores = logits(model, made)
    assert torch.equal(scores[:, 5:-1, :31].argmax(-1), made[:, 6:])


def test_instruction_router_refusals():
    model = adapted(router_input="instruction")
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="instruction_tokens"):
        model(x)
    with instruction_tokens(model, mask), pytest.raises(ValueError, match=r"\[3, 4, 5\].*\[2, 4\]"):
        model(torch.randn(3, 4, 5, dtype=torch.float64))
    for wrong, message in ((mask.int(), "must be bool"), (mask[0], "must be bool"), (mask & False, r"\[0, 1\] have none")):
        with pytest.raises(ValueError, match=message), instruction_tokens(model, wrong):
            pass
    with pytest.raises(ValueError, match="instruction_tokens"):  # nothing stays behind
        model(x)


@pytest.mark.parametrize("options", [dict(use_cache=False), dict(prompt_lookup_num_tokens=2)])
def test_generation_that_reads_more_than_the_new_token_says_so(options):
    model = language_model(router_input="instruction")
    tokens = torch.tensor([[3, 4, 5, 3, 4, 5]])  # repeated, for look-up to find something
    options |= dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with instruction_tokens(model, torch.ones_like(tokens, dtype=torch.bool)), \
            pytest.raises(ValueError, match="one new token a pass: not use_cache=False, prompt_lookup_num_tokens"):
        model.generate(**options)
    model = language_model()
    with record_routing_means(model) as means, pytest.raises(ValueError, match="which they do not with use_cache=False, prompt"):
        means.label(torch.zeros_like(tokens))
        model.generate(**options)


def test_a_long_instruction_is_pooled_in_float32():
    model = adapted(dtype=torch.float16, upcast=False, router_input="instruction")
    R = parts(model)[3]
    assert R.dtype == torch.float16
    # sums of up to 90000, where float16 ends at 65504
    x = (30 * torch.tensor([1, -1, 0.5, -0.5, 0]) + torch.randn(1, 3000, 5)).half()
    with instruction_tokens(model, torch.ones(1, 3000, dtype=torch.bool)), record_routing(model) as routing:
        model(x)
    wanted = torch.softmax(x.double().mean(1) @ R.T.double(), -1)
    torch.testing.assert_close(routing["lin"][0][0, :1].double(), wanted, atol=0.02, rtol=0)


# ---- a learning rate of its own for the router

def test_parameter_groups():
    model = language_model(modules_to_save=["lm_head"])
    rest, routers = parameter_groups(model, 1e-2, 1e-3)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (rest["lr"], routers["lr"]) == (1e-2, 1e-3) and len(routers["params"]) == 4
    assert all("ilora_router" in names[id(p)] for p in routers["params"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(names[id(p)] for p in rest["params"] + routers["params"]) == sorted(trained)
    torch.optim.AdamW([rest, routers])
    with pytest.raises(ValueError, match="no router that requires gradient"):
        parameter_groups(language_model(router="uniform"), 1e-2, 1e-3)
    with pytest.raises(ValueError, match="`router_learning_rate` must be"):
        parameter_groups(model, 1e-2, -1)


# ---- frozen export

FIXED = [0.6, 0.3, 0.1]


@pytest.mark.parametrize("choices, fold, rank", [
    ({}, False, 6), ({}, True, 2), (dict(shared_A=False, use_rslora=True), False, 6),
    (dict(rank_pattern={r"layers\.1\.self_attn\.q_proj": 3}), False, 6), (dict(modules_to_save=["lm_head"]), True, 2)])
def test_static_lora_equals_the_adapter_with_these_weights(choices, fold, rank, tmp_path):
    model = language_model(**choices)
    if "modules_to_save" in choices:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    before = logits(model)
    with fixed_routing(model, FIXED):
        wanted = logits(model)
    made = to_static(model, FIXED, tmp_path, run=lambda: model(input_ids=TOKENS).logits, fold=fold)
    assert torch.equal(logits(model), before) and not torch.allclose(before, wanted)
    loaded = PeftModel.from_pretrained(language_model(bare=True), tmp_path)
    assert isinstance(loaded.peft_config["default"], LoraConfig) and made.config.r == rank
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-6)
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert on_disk.keys() == made.state_dict.keys()
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        base = logits(model)
    assert made.error == pytest.approx(float((wanted - before).norm() / (before - base).norm()), rel=1e-4)


def test_static_lora_of_a_transformers_model_that_holds_its_adapters_itself(tmp_path):
    wrapped = language_model(modules_to_save=["lm_head"])
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    wrapped.save_pretrained(tmp_path / "ilora")
    run = lambda model: lambda: model(input_ids=TOKENS).logits  # noqa: E731
    wanted = to_static(wrapped, FIXED, tmp_path / "wrapped", run=run(wrapped))
    native = language_model(bare=True)
    native.load_adapter(tmp_path / "ilora")
    before = logits(native)
    made = to_static(native.eval(), FIXED, tmp_path / "native", run=run(native))
    assert made.error == pytest.approx(wanted.error, rel=1e-5) and made.state_dict.keys() == wanted.state_dict.keys()
    assert all(torch.equal(made.state_dict[name], tensor) for name, tensor in wanted.state_dict.items())
    assert torch.equal(logits(native), before)
    native.add_adapter(ILoraConfig(lora_alpha=1, target_modules=["q_proj"], modules_to_save=["lm_head"]), "other")  # made active
    with pytest.raises(ValueError, match=r"`run` measures the active adapters, \['other'\]; call model.set_adapter\('default'\)"):
        to_static(native, FIXED, run=run(native), adapter_name="default")


def test_static_lora_costs_nothing_when_the_weights_never_change():
    model = language_model(router="uniform")
    made = to_static(model, [1 / 3] * 3, run=lambda: model(input_ids=TOKENS).logits)
    assert made.error < 1e-6


def test_static_lora_refusals():
    model = language_model()
    run = lambda: model(input_ids=TOKENS).logits  # noqa: E731
    for weights, message in (([1.0, 0.0], "3 finite numbers"), ([math.nan, 0, 1], "3 finite numbers"),
                             ({"model.layers.0.self_attn.q_proj": FIXED}, "one to one; missing")):
        with pytest.raises(ValueError, match=message):
            to_static(model, weights)
    with pytest.raises(ValueError, match="no I-LoRA layers"):
        to_static(language_model(bare=True), FIXED)
    with pytest.raises(ValueError, match="have their own"):
        to_static(language_model(shared_A=False), FIXED, fold=True)
    with pytest.raises(ValueError, match="call model.eval"):
        to_static(model.train(), FIXED, run=run)
    model = language_model(init_weights=True)
    with pytest.raises(ValueError, match="does not change the output"):
        to_static(model, FIXED, run=run)


# ---- means

KINDS = torch.tensor([[1, 1, 2, 0, 0, 3], [-1, 1, 2, 2, 0, 3]])


def test_means_equal_those_of_everything_recorded():
    model = language_model()
    batches = [("ks", TOKENS, KINDS), ("ave", TOKENS + 9, KINDS.flip(0)), ("ks", TOKENS + 3, KINDS)]
    wanted = [logits(model, tokens) for _, tokens, _ in batches]
    every = {}
    with record_routing_means(model) as means:
        for (group, tokens, kinds), plain in zip(batches, wanted, strict=True):
            means.label(kinds, group)
            with record_routing(model) as routing:
                assert torch.equal(logits(model, tokens), plain)
            for name, (weights,) in routing.items():
                for kind, segment in enumerate(crab.ilora.routing.SEGMENTS):
                    every.setdefault((group, name, segment), []).append(weights[kinds == kind].double())
    logits(model)  # not recorded
    found = {}
    for row in means.rows():
        found.setdefault((row["group"], row["module"], row["segment"]), []).append(row)
    assert found.keys() == every.keys()
    for key, rows in found.items():
        weights = torch.cat(every[key])
        assert [r["head"] for r in rows] == [0, 1, 2] and rows[0]["tokens"] == len(weights)
        assert [r["weight"] for r in rows] == pytest.approx(weights.mean(0).tolist(), abs=1e-7)
        assert rows[0]["entropy"] == pytest.approx(float(-(weights * weights.log2()).sum(-1).mean()), abs=1e-6)
    name = "model.layers.1.mlp.down_proj"
    video = torch.stack([torch.cat(every[group, name, "video"]).mean(0) for group in ("ks", "ave")])
    torch.testing.assert_close(means.weights("ks", ["video"])[name], video[0], atol=1e-7, rtol=0)
    assert means.information(["video"])[name] == pytest.approx(routing_information(video), abs=1e-6)
    whole = torch.cat([w for (_, module, _), many in every.items() if module == name for w in many])
    torch.testing.assert_close(means.weights()[name], whole.mean(0), atol=1e-7, rtol=0)
    assert to_static(model, means.weights("ks")).config.r == 6


def test_means_through_generate_in_constant_memory():
    model = language_model()
    options = dict(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), do_sample=False)
    sizes = []
    for new in (1, 6):
        with record_routing_means(model) as means:
            means.label(KINDS.where(KINDS != 3, 0))
            model.generate(**options, max_new_tokens=new, min_new_tokens=new)
        sizes.append(sum(s.numel() for sums in means._sums.values() for s in sums.values()))
    assert sizes[0] == sizes[1]
    tokens = {row["segment"]: row["tokens"] for row in means.rows()}
    assert tokens == {"text": 5, "video": 3, "audio": 3, "answer": 2 * 5}  # the last new token is never read


def test_entropy_and_information_by_hand():
    assert routing_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]])).tolist() == pytest.approx([0, 1, 0.811278])
    assert routing_information(torch.eye(4)) == pytest.approx(2)
    assert routing_information(torch.tensor([[0.3, 0.7]] * 2)) == pytest.approx(0, abs=1e-7)
    assert routing_information(torch.tensor([[0.75, 0.25], [0.25, 0.75]])) == pytest.approx(1 - 0.811278, abs=1e-6)
    assert routing_information(torch.eye(2), torch.tensor([1, 0])) == 0


def test_recorders_refuse(monkeypatch):
    model = language_model()
    with record_routing_means(model) as means:
        means.label(KINDS[:, :4])
        with pytest.raises(ValueError, match=r"saw tokens \[2, 6\].*\[2, 4\]"):
            logits(model)
        for kinds, message in ((KINDS + 1, "holds 4"), (KINDS.float(), "whole numbers"), (KINDS[0], "whole numbers")):
            with pytest.raises(ValueError, match=message):
                means.label(kinds)
    with pytest.raises(ValueError, match="`generated` must be"), record_routing_means(model, ("a", "b")):
        pass
    layer = next(m for m in model.modules() if isinstance(m, ILoraLayer))
    with torch.no_grad():
        layer.ilora_router["default"].weight[0, 0] = math.nan
    monkeypatch.setattr(ILoraLayer, "check_routing", False)
    with record_routing_means(model) as means:
        logits(model)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.*not finite"):
        means.rows()
    with record_routing(model), pytest.raises(ValueError, match="layers.0.self_attn.q_proj.*not finite"):
        logits(model)
