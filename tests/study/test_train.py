"""Training, resuming and answering with a tiny real model."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stopping import stop_at

from crab.data import records
from crab.models import batches, omni
from crab.models.checkpoint import load_base
from crab.samples.encode import encode_all
from crab.samples.reading import read_slot
from crab.study import train as module
from crab.study.answer import WEIGHTS, answer, load_adapter
from crab.study.hardware import Hardware
from crab.study.loop import WHOLE, LengthGrouped
from crab.study.train import RECORD, adapter_config, train, warn_of_emulation
from crab.world import generate

ILORA = {"r": 2, "lora_alpha": 4, "num_heads": 2, "lora_dropout": 0.1}
LORA = {"r": 2, "lora_alpha": 4}


@pytest.fixture(scope="module")
def pairs(encoded):
    return [pair for slot in ("ks", "cremad") for pair in read_slot(encoded, slot, "train").answered("bare")]


@pytest.fixture
def go(pairs, base, tmp_path):
    """Trains I-LoRA for two passes unless told otherwise; returns the folder of the adapter."""

    def run(name="run", method="ilora", options=ILORA, rate=1e-2, passes=2, seed=0, **fields):
        settings = {"learning_rate": rate, "passes": passes, "batch_size": 8, "seed": seed, **fields}
        return train(pairs, method, options, base, tmp_path / name, **settings)

    return run


def weights(folder):
    return load_file(folder / WEIGHTS)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_same_seed_gives_same_adapter_and_another_seed_does_not(go):
    first = weights(go("a"))
    assert same(first, weights(go("b")))
    assert not same(first, weights(go("c", seed=1)))


@pytest.mark.parametrize("precision", module.PRECISIONS)
def test_killed_run_resumes_to_the_same_adapter(go, precision):
    whole = weights(go("a", passes=3, precision=precision))
    with stop_at(4), pytest.raises(KeyboardInterrupt):
        go("b", passes=3, precision=precision)
    resumed = go("b", passes=3, precision=precision)
    assert json.loads((resumed / RECORD).read_text(encoding="utf-8"))["resumed_from"] == 4
    assert same(whole, weights(resumed))
    assert not list(resumed.parent.glob("checkpoint-*"))


@pytest.mark.parametrize("router", ["token", "instruction"])
@pytest.mark.parametrize("change", [{"loaders": 2}, {"checkpointing": True}, {"save_minutes": 1e-9}], ids=str)
def test_what_a_machine_does_changes_no_weight(go, change, router):
    options = ILORA | {"router_input": router}
    assert same(weights(go("a", options=options)), weights(go("b", options=options, hardware=Hardware(**change))))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_computed_again_if_activations_are_not_kept(go, monkeypatch, checkpointing):
    calls = []

    class Spy(module.AnswerTrainer):
        def training_step(self, model, *args, **kwargs):
            layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
            handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
            loss = super().training_step(model, *args, **kwargs)
            handle.remove()
            return loss

    monkeypatch.setattr(module, "AnswerTrainer", Spy)
    go(passes=1, hardware=Hardware(checkpointing=checkpointing))
    assert len(calls) == 4 * (2 if checkpointing else 1)


@pytest.mark.parametrize("fields", [{}, {"loaders": 2}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_killed_within_a_pass_it_resumes_at_the_step(go, pairs, grouped, fields):
    """Four steps a pass, a checkpoint at each; stopped after the sixth."""
    lengths = [len(sample["input_ids"]) for sample, _ in pairs] if grouped else None
    settings = {"passes": 3, "lengths": lengths, "hardware": Hardware(save_minutes=1e-9, **fields)}
    whole = weights(go("a", **settings))
    with stop_at(6), pytest.raises(KeyboardInterrupt):
        go("b", **settings)
    resumed = go("b", **settings)
    assert json.loads((resumed / RECORD).read_text(encoding="utf-8"))["resumed_from"] == 6
    assert same(whole, weights(resumed))


def test_batches_hold_samples_of_similar_length_in_an_order_that_follows_from_the_pass(go, pairs):
    lengths = [(7 * i) % 40 + 1 for i in range(400)]
    sampler = LengthGrouped(lengths, 8, 3)
    first = list(sampler)
    assert sorted(first) == list(range(400)) and first == list(LengthGrouped(lengths, 8, 3))
    spans = [max(part) - min(part) for part in ([lengths[i] for i in first[n : n + 8]] for n in range(0, 400, 8))]
    assert sorted(spans)[40] <= 4  # of 39
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first) and list(sampler) != first != list(LengthGrouped(lengths, 8, 4))
    # the order is that of whole batches, also if a process takes them in parts
    settings = {"lengths": [len(sample["input_ids"]) for sample, _ in pairs], "options": {**ILORA, "lora_dropout": 0.0}}
    one, parts = (weights(go(str(n), **settings, hardware=Hardware(accumulate=n))) for n in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.fixture
def uncached(base, tmp_path_factory):
    """Pairs whose media are decoded as they are read, and the same with cached features."""
    world, folders = tmp_path_factory.mktemp("world"), {}
    generate.build(world, 0, train=8, test=1, caption=1, workers=1, slots=["cremad"], progress=False)
    records.write_manifest(world)
    for cache in (False, True):
        folders[cache] = tmp_path_factory.mktemp("encoded")
        encode_all(world, ["cremad"], base, folders[cache], 1, cache=cache)
    return [read_slot(folders[cache], "cremad", "train", base).answered("bare") for cache in (False, True)]


def test_media_decoded_in_two_loaders_train_as_cached_features_do(uncached, base, tmp_path):
    settings = {"learning_rate": 1e-2, "passes": 2, "batch_size": 4, "seed": 0}
    live, cached = uncached
    results = [
        weights(train(pairs, "ilora", ILORA, base, tmp_path / str(n), **settings, hardware=Hardware(loaders=loaders)))
        for n, (pairs, loaders) in enumerate([(live, 0), (live, 2), (cached, 0)])
    ]
    assert same(*results[:2])
    for name, tensor in results[2].items():  # encoded in other batches, hence rounded differently
        torch.testing.assert_close(results[0][name], tensor, atol=2e-3, rtol=2e-2)


def test_several_gpus_never_reach_data_parallel(go, monkeypatch):
    """DataParallel would take batches times the GPUs, and split positions [3, B, L] along the 3."""
    seen = []

    class FourGpus(module.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    class Spy(module.AnswerTrainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.append((self.args.train_batch_size, type(model)))
            return super().compute_loss(model, *args, **kwargs)

    monkeypatch.setattr(module, "TrainingArguments", FourGpus)
    monkeypatch.setattr(module, "AnswerTrainer", Spy)
    go(passes=1)
    assert seen == [(8, PeftModel)] * 4


def test_checkpoint_of_another_layout_is_refused(go, tmp_path):
    with stop_at(4), pytest.raises(KeyboardInterrupt):
        go()
    with pytest.raises(ValueError, match="micro batch was 8 .* and is 4 now; set shared.hardware back, or delete"):
        go(hardware=Hardware(accumulate=2))
    path = tmp_path / "run" / "checkpoint-4" / WHOLE
    path.write_text(json.dumps({"processes": 2, "micro_batch": 4, "accelerate": "FSDP 3"}), encoding="utf-8")
    with pytest.raises(ValueError, match="checkpoint-4: processes was 2 .* and is 1 now"):
        go()


def test_half_written_checkpoint_is_not_taken(go, tmp_path):
    with stop_at(4), pytest.raises(KeyboardInterrupt):
        go()
    (tmp_path / "run" / "checkpoint-4" / WHOLE).unlink()
    assert json.loads((go() / RECORD).read_text(encoding="utf-8"))["resumed_from"] == 0


def test_precision_is_the_one_asked_for(go, monkeypatch):
    """bf16 inside the model; loss, gradients and weights in float32; and the next run in the same process is fp32."""
    seen = []

    class Spy(module.AnswerTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inner = []
            layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
            handle = layer.register_forward_hook(lambda module, args, out: inner.append(out.dtype))
            loss = super().compute_loss(model, inputs, **kwargs)
            handle.remove()
            types = {p.dtype for p in model.parameters()}
            seen.append((inner[0], loss.dtype, types, model.config._attn_implementation))
            return loss

    monkeypatch.setattr(module, "AnswerTrainer", Spy)
    for precision, inside in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        folder = go(f"{precision}{len(seen)}", passes=1, precision=precision)
        attention = "sdpa" if torch.cuda.is_available() or precision == "fp32" else "eager"
        assert seen[-1] == (inside, torch.float32, {torch.float32}, attention)
        assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}


def test_precision_is_never_changed_silently(go, monkeypatch):
    with pytest.raises(ValueError, match="shared.precision: 'fp16' is unknown; use one of fp32, bf16"):
        go(precision="fp16")
    with monkeypatch.context() as context:
        context.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` sets it
        with pytest.raises(ValueError, match="fp32, but Accelerate was started with mixed precision 'bf16'"):
            go()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, native in (({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda values=capabilities: values)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_emulation("bf16")
            warn_of_emulation("fp32")
        assert ["shared.precision is bf16" in str(w.message) for w in caught] == [True] * (not native)


def test_learns_and_answers(encoded, base, tmp_path):
    data, test = read_slot(encoded, "ks", "train"), read_slot(encoded, "ks", "test")
    options = {"r": 8, "lora_alpha": 16}
    settings = {"learning_rate": 3e-2, "passes": 40, "batch_size": 8, "seed": 0}
    folder = train(data.answered("bare"), "lora", options, base, tmp_path, **settings)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    assert record["samples"] == 16 and record["steps"] == 80
    assert record["loss"][-1][1] < 0.5 * record["loss"][0][1]
    model, processor = load_base(base)
    texts = answer(load_adapter(model, folder), processor.tokenizer, list(test), 3, 8)
    assert sum(a in text for a, text in zip(["red", "green", "blue", "yellow"] * 2, texts, strict=True)) >= 6


def test_answers_do_not_depend_on_the_batch(encoded, base):
    model, processor = load_base(base)
    samples = list(read_slot(encoded, "ks", "test"))
    assert answer(model, processor.tokenizer, samples, 8, 6) == answer(model, processor.tokenizer, samples, 1, 6)


def test_routers_that_read_the_instruction_train_and_answer(go, encoded, base):
    folder = go(options=ILORA | {"router_input": "instruction", "router_init_std": 0.5}, passes=1, precision="bf16")
    model, processor = load_base(base)
    peft_model = load_adapter(model, folder)
    samples = list(read_slot(encoded, "ks", "test"))
    alone = answer(peft_model, processor.tokenizer, samples, 1, 4)
    assert answer(peft_model, processor.tokenizer, samples, 8, 4) == alone
    with pytest.raises(ValueError, match="instruction_tokens"):  # without the instruction, such a router refuses
        omni.generate(peft_model, processor.tokenizer, batches.batch(model, processor.tokenizer, samples[:3]), 1)


def test_routers_learn_at_their_own_rate(go):
    def routers(folder):
        return {name: tensor for name, tensor in weights(folder).items() if "router" in name}

    still = routers(go("a", options=ILORA | {"router_rate": 0.0}, passes=1))
    assert still and same(still, routers(go("b", options=ILORA | {"router_rate": 0.0})))  # as they were drawn
    assert same(weights(go("c")), weights(go("d", options=ILORA | {"router_rate": 1.0})))
    with pytest.raises(ValueError, match="router_rate|no router"):
        go("e", "lora", LORA | {"router_rate": 0.1})


def test_loss_is_the_models_own_and_prompts_get_no_logits(go, monkeypatch):
    seen = []

    class Spy(module.AnswerTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            with torch.no_grad(), batches.features_shown(model, inputs):
                whole = model(**{k: v for k, v in inputs.items() if k != "features"}, use_cache=False)
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            answer_tokens = (inputs["labels"] != omni.IGNORE).sum().item()
            seen.append((loss.item(), whole.loss.item(), len(outputs.logits), answer_tokens))
            return loss

    monkeypatch.setattr(module, "AnswerTrainer", Spy)
    go(options={**ILORA, "lora_dropout": 0.0}, passes=1)
    assert len(seen) == 4  # 32 samples in batches of 8
    for loss, whole, logits, answer_tokens in seen:
        assert loss == pytest.approx(whole, rel=1e-5) and logits == answer_tokens


def test_features_that_get_in_within_the_forward_pass_change_no_bit(pairs, base):
    model, processor = load_base(base)
    peft_model = module.adapted(model, "ilora", ILORA | {"lora_dropout": 0.0})
    samples, answers = zip(*pairs[:8], strict=True)
    results = []
    for embed in (True, False):
        inputs = batches.batch(model, processor.tokenizer, samples, answers, embed)
        assert ("inputs_embeds" in inputs, "features" in inputs) == (embed, not embed)
        peft_model.zero_grad()
        loss, _ = batches.answer_loss(peft_model, inputs)
        loss.backward()
        results.append({"loss": loss} | {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad})
    assert same(*results)


def test_unknown_option_is_named():
    with pytest.raises(ValueError, match="lora: .*rank.*see LoraConfig"):
        adapter_config("lora", {"rank": 3}, omni.TARGETS)


def test_adapter_that_does_not_fit(go, base):
    folder = go(method="lora", options=LORA, passes=1)
    stored = weights(folder)
    name = next(iter(stored))
    for tensors in ({k: v for k, v in stored.items() if k != name}, stored | {name: torch.zeros(2, 5)}):
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ValueError, match="does not fit the base"):
            load_adapter(load_base(base)[0], folder)
    (folder / WEIGHTS).write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(load_base(base)[0], folder)
