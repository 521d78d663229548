"""The plan against what small models really take, and against published figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoded_samples import store_samples
from sizes import SMALL
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from crab.models import omni, small
from crab.models.batches import answer_loss
from crab.models.checkpoint import load_base
from crab.models.omni import PUBLISHED
from crab.pipeline import __main__ as command
from crab.study.footprint import Base, flops, memory, read_base
from crab.study.hardware import Hardware
from crab.study.plan import Machine, Plan, counts_of
from crab.study.train import adapted

OPTIONS = {"lora": {"r": 8, "lora_alpha": 16}, "ilora": {"r": 8, "lora_alpha": 16, "num_heads": 3}}
OPTIONS["ilora-dropout"] = {**OPTIONS["ilora"], "lora_dropout": 0.1}
TOLERANCE = 0.15
LAYERS, HEADS, WORDS, ANSWER = 2, 4, 1000, 20


def thinker(hidden):
    """A small thinker with random weights, without encoders to speak of."""
    size = SMALL | {"hidden_size": hidden, "intermediate_size": 5 * hidden // 2, "num_hidden_layers": LAYERS}
    size |= {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    processor = small.build_processor([f"w{i}" for i in range(WORDS)], [], size)
    model = small.build_model(processor, size, seed=0).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    return model


def training_batch(model, samples, tokens):
    """Random features and answers; the first of several samples is padded."""
    ids = torch.randint(20, WORDS, (samples, tokens))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, omni.IGNORE)
    mask[0, : 3 * (samples > 1)] = 0
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    features = torch.randn(samples, tokens, model.config.get_text_config().hidden_size).to(model.dtype)
    positions = torch.arange(tokens).repeat(3, samples, 1)
    return {"inputs_embeds": features, "attention_mask": mask, "position_ids": positions, "labels": labels}


def kept_by_autograd(step, besides):
    """Bytes of the tensors that autograd saves in a forward pass, each once, other than ``besides``."""
    known, sizes = {tensor.untyped_storage().data_ptr() for tensor in besides}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes(), storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    return sum(size for size, _ in sizes.values()), loss


def peak_memory(step, folder):
    """Most bytes that the allocator held during ``step``, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    record.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("method", "hidden", "samples", "tokens", "weights", "precision"),
    [
        ("lora", 128, 2, 256, torch.float32, "fp32"),
        ("ilora", 128, 2, 256, torch.float32, "fp32"),
        ("ilora-dropout", 128, 2, 256, torch.float32, "fp32"),
        ("ilora", 128, 1, 256, torch.float32, "fp32"),  # no padding: keys and values are not repeated
        ("lora", 512, 2, 600, torch.float32, "fp32"),
        ("ilora", 512, 2, 600, torch.float32, "fp32"),
        ("lora", 128, 2, 256, torch.bfloat16, "bf16"),
        ("ilora", 128, 2, 256, torch.bfloat16, "bf16"),
        ("lora", 128, 2, 256, torch.float32, "bf16"),
        ("ilora", 128, 2, 256, torch.float32, "bf16"),
    ],
)
def test_memory_of_a_step(method, hidden, samples, tokens, weights, precision, checkpointing, tmp_path):
    options, method = OPTIONS[method], method.partition("-")[0]
    model = thinker(hidden).to(weights)
    base = Base(model.config, size=weights.itemsize)
    model = adapted(model, method, options).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = training_batch(model, samples, tokens)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return answer_loss(model, batch)[0]

    adapter = base.adapter(method, options)
    planned = memory(base, adapter, samples, tokens, ANSWER, precision=precision, checkpointing=checkpointing)
    fixed = [*model.parameters(), *model.buffers()]
    if not checkpointing:
        kept, loss = kept_by_autograd(forward, fixed)
        work = samples * tokens * 20 * hidden  # of backward, which has not begun
        assert planned["activations"] - work == pytest.approx(kept, rel=0.05)
        loss.backward()
    forward().backward()  # from now on gradients are there
    peak = peak_memory(lambda: forward().backward(), tmp_path) + batch["inputs_embeds"].nbytes
    assert planned["activations"] + planned["logits"] == pytest.approx(peak, rel=TOLERANCE)
    assert planned["weights"] == pytest.approx(sum(p.nbytes for p in model.parameters() if not p.requires_grad))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (planned["adapter"], planned["gradients"]) == (trained, trained)


def test_logits_of_long_answers(tmp_path):
    """With many answer tokens the loss takes the most; only positions that predict one have logits."""
    model = thinker(128)
    base, adapter = Base(model.config), Base(model.config).adapter("lora", OPTIONS["lora"])
    model = adapted(model, "lora", OPTIONS["lora"]).train()
    batch = training_batch(model, 2, 256)
    batch["labels"] = torch.randint(20, WORDS, (2, 256))
    batch["labels"][:, 0] = omni.IGNORE
    answer_loss(model, batch)[0].backward()
    peak = peak_memory(lambda: answer_loss(model, batch)[0].backward(), tmp_path) + batch["inputs_embeds"].nbytes
    planned = memory(base, adapter, 2, 256, 255, precision="fp32", checkpointing=False)
    assert planned["logits"] > 0
    assert planned["activations"] + planned["logits"] == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("method", ["lora", "ilora"])
def test_adapter_and_its_checkpoint(method, tmp_path):
    model = thinker(128)
    base = Base(model.config)
    model = adapted(model, method, OPTIONS[method])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert base.adapter(method, OPTIONS[method]).parameters == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    size = sum((tmp_path / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer.pt"))
    row = plan(base, methods={method: {**OPTIONS[method], "runs": ["joint-bare"]}}).rows()[0]
    assert row["checkpoints_gb"] * 1e9 == pytest.approx(2 * size, rel=TOLERANCE)
    assert row["adapter_gb"] * 1e9 == pytest.approx((tmp_path / "adapter_model.safetensors").stat().st_size, rel=0.05)


def test_cached_features(base, tmp_path):
    model, processor = load_base(base)
    media = [
        omni.Media("video", np.zeros((10, 224, 224, 3), np.uint8), fps=1.0),
        omni.Media("audio", np.zeros(10 * omni.SAMPLE_RATE, np.float32)),
    ]
    prompts = [omni.prepare(processor, media, "which action is seen ?") for _ in range(4)]
    texts = [
        {"id": str(i), "instruction": "which action is seen ?", "bare": "red", "explicit": "red"} for i in range(4)
    ]
    samples = omni.encode(model, prompts)
    store_samples(tmp_path, "ks", "train", samples, texts)
    (row,) = plan(read_base(base), counts={"ks/train": 4}, real=False).features()
    assert row["tokens"] == len(samples[0]["features"])
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert row["gb"] * 1e9 == pytest.approx(written, rel=TOLERANCE)
    assert plan(read_base(base), cache=False).totals()["features_gb"] == 0


# ---------------------------------------------------------------- published figures


@pytest.fixture(scope="module")
def published():
    return read_base(PUBLISHED)


def test_published_adapters(published, monkeypatch):
    """Rank 128 and 3 heads: 870.48 million with the encoders, which the published target names match too."""
    assert published.parameters == pytest.approx(8.93e9, rel=0.001)
    options = {"r": 128, "num_heads": 3, "lora_alpha": 256}
    shapes = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584), (3584, 18944), (3584, 18944), (18944, 3584)]
    alone = 28 * sum(128 * n + 3 * n + 384 * m for n, m in shapes)
    assert published.adapter("ilora", options).parameters == alone
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    monkeypatch.setitem(omni.TARGETS, "language", rf".*\.({names})")
    wide = Base(published.config, size=2).adapter("ilora", options)
    assert round(wide.parameters / 1e6, 2) == 870.48
    assert {name: len(inputs) for name, inputs in wide.inputs.items()} == {
        "language_model": 7, "visual": 3, "audio_tower": 3,
    }  # fmt: skip
    sizes = {"precision": "bf16", "checkpointing": False}
    with_encoders = memory(published, wide, 1, 620, 50, (1280, 500), **sizes)["activations"]
    assert with_encoders > 1.5 * memory(published, wide, 1, 620, 50, **sizes)["activations"]


def test_published_activations(published):
    """About 5.8 MB a token without checkpointing."""
    adapter = published.adapter("ilora", {"r": 128, "num_heads": 3, "lora_alpha": 256})
    one, two = (
        memory(published, adapter, 1, tokens, 1, precision="bf16", checkpointing=False)["activations"]
        for tokens in (1000, 2000)
    )
    assert (two - one) / 1000 == pytest.approx(5.8e6, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("slot", "tokens", "megabytes"),
    [("ave", 570, 4.1), ("avqa", 1820, 13.1), ("unav", 1370, 9.8), ("a2v", 890, 6.4), ("v2a", 820, 5.9),
     ("meld", 210, 1.5), ("s4", 89, 0.64)],
)  # fmt: skip
def test_published_features(published, slot, tokens, megabytes):
    (row,) = plan(published, counts={f"{slot}/train": 1000}).features()
    assert row["tokens"] == pytest.approx(tokens, abs=5)
    assert row["gb"] == pytest.approx(megabytes, rel=0.03)


# ---------------------------------------------------------------- the study


def plan(base, **fields):
    defaults = dict(
        counts={"ks/train": 101, "cremad/train": 50, "avcap/train": 9, "ks/test": 20},
        machine=Machine(80.0),
        methods={"lora": {"r": 8, "lora_alpha": 16, "runs": ["single-bare", "joint-bare"]}},
        passes=2, seeds=[0, 1], batch_size=8, precision="fp32", answer={"max_new_tokens": 32},
    )  # fmt: skip
    return Plan(base, **{**defaults, **fields})


@pytest.fixture(scope="module")
def tiny():
    return Base(thinker(128).config)


def test_rows_and_totals(tiny):
    each = plan(tiny, machine=Machine(80.0, samples_per_second=10.0), hardware=Hardware(workers=2, processes=2))
    rows = {row["cell"]: row for row in each.rows()}
    assert list(rows) == ["ks", "cremad", "joint"]  # avcap has no test split, so no single-task cell
    assert [row["samples"] for row in rows.values()] == [101, 50, 160]
    assert [row["steps"] for row in rows.values()] == [26, 14, 40]
    assert [row["processes"] for row in rows.values()] == [1, 1, 2]
    assert {row["micro_batch"] for row in rows.values()} == {4}
    assert rows["joint"]["hours"] == pytest.approx(160 * 2 / 10 / 2 / 3600)
    parts = ["weights", "adapter", "gradients", "optimizer", "activations", "logits", "context"]
    for row in rows.values():
        assert row["gib"] == pytest.approx(sum(row[f"{part}_gib"] for part in parts))
        assert row["gib"] == row["gib_without"] > row["gib_with_checkpointing"]
    totals = each.totals()
    assert totals["cells"] == 6
    assert totals["checkpoints_gb"] == pytest.approx(
        2 * rows["ks"]["checkpoints_gb"]
    )  # two single-task cells at a time
    assert totals["gpu_hours"] == pytest.approx(2 * 2 * (101 + 50 + 160) / 10 / 3600)
    assert totals["hours"] == pytest.approx(2 * 2 * ((101 + 50) / 2 + 160 / 2) / 10 / 3600)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "ilora"])
def test_operations_of_a_step(method, checkpointing):
    """Against torch's own count of matrix products."""
    model = thinker(128)
    base, samples, tokens = Base(model.config), 2, 256
    model.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    model = adapted(model, method, OPTIONS[method]).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = training_batch(model, samples, tokens)
    with FlopCounterMode(display=False) as count:
        answer_loss(model, batch)[0].backward()
    adapter = base.adapter(method, OPTIONS[method])
    planned = samples * flops(base, adapter, tokens, ANSWER, checkpointing=checkpointing)
    assert planned == pytest.approx(count.get_total_flops(), rel=TOLERANCE)


def test_hours(tiny):
    slow = plan(tiny, machine=Machine(80.0, tflops=1.0, mfu=0.5))
    row, faster = slow.rows()[0], replace(slow, machine=Machine(80.0, tflops=2.0, mfu=0.5)).rows()[0]
    assert faster["hours"] == pytest.approx(row["hours"] / 2)
    ks = flops(tiny, tiny.adapter("lora", OPTIONS["lora"]), row["longest"] - 32 + 16, 16, checkpointing=False)
    assert row["hours"] == pytest.approx(101 * 2 * ks / 0.5e12 / 3600)
    encoding = replace(slow, cache=False).rows()[0]  # the encoders run in the step
    assert encoding["hours"] > row["hours"]


@pytest.mark.parametrize(
    ("stage", "adapter", "gradients", "moments", "gathered"),
    [(0, 1, 2, 2, False), (1, 1, 1, 0.5, False), (2, 1, 0.25, 0.5, False), (3, 0.25, 0.25, 0.5, True)],
)
def test_sharding(published, stage, adapter, gradients, moments, gathered):
    """Of four processes, each holds a quarter of what is shared out; DDP holds its gradients twice."""
    own = published.adapter("lora", {"r": 64, "lora_alpha": 64})
    size = 4 * own.parameters
    sizes = memory(published, own, 4, 600, 10, precision="bf16", checkpointing=False, processes=4, stage=stage)
    assert sizes["adapter"] == adapter * size
    assert sizes["gradients"] == gradients * size
    assert sizes["optimizer"] == moments * size
    assert (sizes["weights"] < published.parameters) == gathered  # a quarter and what is gathered: under half


FULL = {"ilora": {"r": 128, "num_heads": 3, "lora_alpha": 256, "runs": ["joint-bare"]}}


@pytest.mark.parametrize(
    ("memory_gib", "disk_gb", "fields", "words"),
    [
        (79, 5000, {"hardware": Hardware(accumulate=8)}, None),
        (79, 5000, {}, "120.4 GiB per process, and 79.0 are there; set shared.hardware.accumulate to 2"),
        (34, 5000, {"batch_size": 1}, "shared.hardware.checkpointing to true"),
        (34, 5000, {}, "shared.hardware.accumulate to 8 and shared.hardware.checkpointing to true"),
        (22, 5000, {"batch_size": 1, "hardware": Hardware(checkpointing=True)}, "train.methods.ilora.r to 32"),
        (8, 5000, {"batch_size": 1, "hardware": Hardware(checkpointing=True)}, "base.checkpoint to a smaller base"),
        (79, 900, {"hardware": Hardware(accumulate=8)}, "GB of disk are needed .*; set encode.cache to false"),
        (79, 10, {"hardware": Hardware(accumulate=8), "cache": False}, "lower train.methods.ilora.r"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(published, memory_gib, disk_gb, fields, words):
    counts, _ = counts_of({"source": "tree", "slots": None}, "nowhere")
    settings = {"precision": "bf16", "methods": FULL, "seeds": [0], **fields}
    each = plan(published, counts=counts, machine=Machine(memory_gib, disk_gb), **settings)
    if words is None:
        each.check()
    else:
        with pytest.raises(ValueError, match=words):
            each.check()


@pytest.mark.parametrize(("cache", "words"), [(True, "accelerate to zero3$"), (False, "base.checkpoint")])
def test_sharding_is_proposed(published, cache, words):
    """Where only spreading the weights helps, it is named, unless the encoders run in the step."""
    methods = {"lora": {"r": 1, "lora_alpha": 1, "runs": ["joint-bare"]}}
    settings = {"methods": methods, "batch_size": 4, "precision": "bf16", "cache": cache}
    each = plan(published, machine=Machine(14.0), hardware=Hardware(processes=4, checkpointing=True), **settings)
    with pytest.raises(ValueError, match=words):
        each.check()


def test_batch_that_does_not_divide(tiny):
    with pytest.raises(ValueError, match=r"shared\.batch_size is 8, .*shared\.hardware\.processes"):
        plan(tiny, hardware=Hardware(processes=3)).rows()


@pytest.mark.parametrize(
    ("build", "counts", "note"),
    [
        ({"source": "generated", "slots": ["ks", "avcap"], "train_samples": 7, "test_samples": 5, "caption_samples": 3},
         {"ks/train": 7, "ks/test": 5, "avcap/train": 3}, "params.yaml"),
        ({"source": "tree", "slots": ["ks"]}, {"ks/train": 11684, "ks/test": 3894}, "222,000"),
    ],
)  # fmt: skip
def test_counts(build, counts, note, tmp_path):
    assumed, words = counts_of(build, tmp_path)
    assert assumed == counts
    assert note in words and "build stage" in words
    manifest = {"ks/train": {"records": 4, "digest": "0"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert counts_of(build, tmp_path) == ({"ks/train": 4}, "")


def test_base_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"missing.*run the base stage"):
        read_base(tmp_path / "missing" / "base")


def test_command(capsys):
    """Prints the plan; one line and status 1 if it does not fit."""
    command.main(["plan", "--profile", "full", "--memory-gib", "200", "--disk-gb", "9000"])
    assert "joint-ilora-bare" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: .* GB of disk are needed .*; ") as stop:
        command.main(["plan", "--profile", "tiny", "--disk-gb", "0.001"])
    assert "\n" not in str(stop.value)
