"""Training, resuming and predicting with a tiny real model."""

import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import crab
from crab.models import omni
from crab.study import instruction, predict, code as sources, train
from crab.study.dataset import batch, load_base, read_slot, segments
from crab.study.runs import Run

SLOTS = ("ks", "cremad")
LORA = {"r": 2, "lora_alpha": 4, "learning_rate": 1e-2}
ILORA = {"r": 2, "lora_alpha": 4, "num_heads": 2, "learning_rate": 1e-2, "lora_dropout": 0.1}
JOINT = Run("joint", "ilora", "bare")


def go(run, section, encoded, base, folder, passes=2, **kwargs):
    return train.train_run(run, section, encoded, base, folder, SLOTS, passes, 8, **kwargs)


def weights(folder):
    return load_file(folder / predict.WEIGHTS)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_same_seed_gives_same_adapter_and_another_does_not(encoded, base, tmp_path):
    first = weights(go(JOINT, ILORA, encoded, base, tmp_path / "a"))
    assert same(first, weights(go(JOINT, ILORA, encoded, base, tmp_path / "b")))
    assert not same(first, weights(go(Run("joint", "ilora", "bare", seed=1), ILORA, encoded, base, tmp_path / "c")))


@pytest.mark.parametrize("precision", train.PRECISIONS)
def test_killed_run_resumes_to_the_same_adapter(encoded, base, tmp_path, precision):
    whole = weights(go(JOINT, ILORA, encoded, base, tmp_path / "a", passes=3, precision=precision))
    with pytest.raises(KeyboardInterrupt):
        go(JOINT, ILORA, encoded, base, tmp_path / "b", passes=3, precision=precision, stop_at=4)
    resumed = go(JOINT, ILORA, encoded, base, tmp_path / "b", passes=3, precision=precision)
    assert json.loads((resumed / "run.json").read_text())["resumed_from"] == 4
    assert same(whole, weights(resumed))
    assert not list(resumed.parent.glob("checkpoint-*"))


def test_precision_is_the_one_asked_for(encoded, base, tmp_path, monkeypatch):
    """bf16 inside the model; loss, gradients and weights in float32; and one precision after the other in one process."""
    seen = []

    class Spy(train.AnswerTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inner = []
            layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
            handle = layer.register_forward_hook(lambda module, args, out: inner.append(out.dtype))
            loss = super().compute_loss(model, inputs, **kwargs)
            handle.remove()
            seen.append((inner[0], loss.dtype, {p.dtype for p in model.parameters()}, model.config._attn_implementation))
            return loss

    monkeypatch.setattr(train, "AnswerTrainer", Spy)
    for precision, inside in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        final = go(JOINT, ILORA, encoded, base, tmp_path / f"{precision}{len(seen)}", passes=1, precision=precision)
        attention = "sdpa" if torch.cuda.is_available() or precision == "fp32" else "eager"
        assert seen[-1] == (inside, torch.float32, {torch.float32}, attention)
        assert json.loads((final / "run.json").read_text())["precision"] == precision
        assert {tensor.dtype for tensor in weights(final).values()} == {torch.float32}


def test_precision_is_never_changed_silently(encoded, base, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="train.precision: 'fp16' is unknown; use one of bf16, fp32"):
        go(JOINT, ILORA, encoded, base, tmp_path, precision="fp16")
    with monkeypatch.context() as context:
        context.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` sets it
        with pytest.raises(ValueError, match="train.precision: fp32, but Accelerate was started with mixed precision 'bf16'"):
            go(JOINT, ILORA, encoded, base, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, native in (({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.warn_of_emulation("bf16")
            train.warn_of_emulation("fp32")
        assert [("train.precision is bf16" in str(w.message)) for w in caught] == [True] * (not native)


def test_key_hangs_on_the_code_that_decides_and_on_no_other():
    names = {path.as_posix() for path in sources.modules(Path(crab.__file__).parents[1], train.DECIDING)}
    assert {"crab/ilora/layer.py", "crab/ilora/model.py", "crab/models/omni.py", "crab/study/dataset.py"} <= names
    assert not {"crab/ilora/published.py", "crab/study/paths.py", "crab/study/notebook.py", "crab/study/pool.py"} & names


def test_other_parameters_do_not_resume(encoded, base, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(JOINT, ILORA, encoded, base, tmp_path, stop_at=4)
    fresh = go(JOINT, ILORA | {"learning_rate": 2e-2}, encoded, base, tmp_path)
    assert json.loads((fresh / "run.json").read_text())["resumed_from"] == 0


def test_half_written_checkpoint_is_not_taken(encoded, base, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(JOINT, ILORA, encoded, base, tmp_path, stop_at=4)
    (checkpoint,) = tmp_path.glob("*/*/checkpoint-4")
    (checkpoint / train.WHOLE).unlink()
    fresh = go(JOINT, ILORA, encoded, base, tmp_path)
    assert json.loads((fresh / "run.json").read_text())["resumed_from"] == 0


def test_learns_and_predicts(encoded, base, tmp_path):
    run = Run("single", "lora", "bare", "ks")
    section, rates = {"r": 8, "lora_alpha": 16}, {"single-bare": 3e-2, "joint-bare": 1e-9}
    record = train.train_all([run], section, rates, encoded, base, tmp_path / "out", tmp_path / "work", SLOTS, 40, 8, workers=1)[0]
    assert record["samples"] == 16 and record["steps"] == 80 and record["learning_rate"] == 3e-2
    assert record["loss"][-1][1] < 0.5 * record["loss"][0][1]
    assert not (tmp_path / "work" / run.name).exists()
    found = predict.find_runs({"lora": tmp_path / "out"})
    assert list(found) == [run]
    predict.predict_all(found, encoded, base, tmp_path / "texts", SLOTS, 3, 8, workers=1)
    rows = [json.loads(line) for line in (tmp_path / "texts" / run.name / "ks.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == read_slot(encoded, "ks", "test").ids
    right = sum(a in row["text"] for a, row in zip(["red", "green", "blue", "yellow"] * 2, rows))
    assert right >= 6


def test_runs_of_another_plan_are_not_left_to_be_evaluated(encoded, base, tmp_path):
    section, rates = {"r": 2, "lora_alpha": 4}, {"single-bare": 1e-3}
    plans = [[Run("single", "lora", "bare", "ks", seed) for seed in seeds] for seeds in ((0, 1), (0,))]
    for runs in plans:
        train.train_all(runs, section, rates, encoded, base, tmp_path / "out", tmp_path / "work", SLOTS, 1, 8, workers=1)
        (tmp_path / "out" / "notes.txt").write_text("a file of somebody's own is left alone")
    shutil.copytree(tmp_path / "out" / plans[1][0].name, tmp_path / "out" / ".single-lora-bare-ks-seed1.12.partial")  # as a kill leaves
    assert list(predict.find_runs({"lora": tmp_path / "out"})) == plans[1]


def test_adapters_trained_again_are_the_same_files(encoded, base, tmp_path):
    """Else all that depends on them would run again: what training took is told, but not kept beside them."""
    run, places = Run("single", "lora", "bare", "ks"), []
    for place in (tmp_path / "a", tmp_path / "b"):
        (record,) = train.train_all(
            [run], {"r": 2, "lora_alpha": 4}, {"single-bare": 1e-3}, encoded, base, place, tmp_path / "work", SLOTS, 1, 8, workers=1
        )
        assert record["seconds"] > 0 and train.cost_table([record])["resumed from"].tolist() == [0]
        places.append({path.name: path.read_bytes() for path in (place / run.name).iterdir()})
    assert places[0] == places[1] and {"run.json", predict.WEIGHTS, "adapter_config.json"} <= set(places[0])


def test_answers_are_kept_by_what_decided_them(encoded, base, tmp_path):
    runs = [Run("single", "lora", "bare", slot) for slot in SLOTS]
    section, rates = {"r": 2, "lora_alpha": 4}, {"single-bare": 1e-3}
    train.train_all(runs, section, rates, encoded, base, tmp_path / "out", tmp_path / "work", SLOTS, 1, 8, workers=1)
    found, texts = predict.find_runs({"lora": tmp_path / "out"}), tmp_path / "texts"

    def go_on(found, tokens=4):
        predict.predict_all(found, encoded, base, texts, SLOTS, 3, tokens, workers=1)
        return {run.slot: (texts / run.name / f"{run.slot}.jsonl").stat().st_mtime_ns for run in found}

    first = go_on(found)
    (texts / "notes.txt").write_text("a file of somebody's own is left alone")
    assert go_on(found) == first
    killed, whole = SLOTS[:2]
    (texts / f"single-lora-bare-{killed}" / predict.ANSWERED).unlink()
    (texts / f"single-lora-bare-{killed}" / f"{killed}.jsonl").write_text("")
    second = go_on(found)
    assert second[killed] != first[killed] and second[whole] == first[whole]
    assert (texts / f"single-lora-bare-{killed}" / f"{killed}.jsonl").read_text()
    third = go_on(found, tokens=5)
    assert not set(third.values()) & set(second.values())
    go_on({run: folder for run, folder in found.items() if run.slot == whole})
    assert sorted(path.name for path in texts.iterdir()) == ["notes.txt", f"single-lora-bare-{whole}"]


def test_routers_that_read_the_instruction_train_and_answer(encoded, base, tmp_path, monkeypatch):
    section = ILORA | {"router_input": "instruction", "router_init_std": 0.5}
    folder = go(JOINT, section, encoded, base, tmp_path, passes=1, precision="bf16")
    model, processor = load_base(base)
    peft_model = predict.load_adapter(model, folder)
    samples = read_slot(encoded, "ks", "test").samples
    alone = predict.answer(peft_model, processor.tokenizer, samples, 1, 4)
    assert predict.answer(peft_model, processor.tokenizer, samples, 8, 4) == alone
    # told nothing, such a router refuses
    made = batch(model, processor.tokenizer, samples[:3])
    with pytest.raises(ValueError, match="instruction_tokens"):
        omni.generate(peft_model, processor.tokenizer, made, 1)
    shown = []
    with monkeypatch.context() as context:
        context.setattr(instruction, "instruction_tokens", lambda model, mask: shown.append(mask) or nullcontext())
        with instruction.instruction_shown(peft_model, made), instruction.instruction_shown(model.base_model, made):
            pass
    assert [m.sum(1).tolist() for m in shown] == [[2, 3, 4]]  # "which" once to three times, and "?"; not the media, no padding


def test_routers_learn_at_their_own_rate(encoded, base, tmp_path):
    def routers(folder):
        return {name: tensor for name, tensor in weights(folder).items() if "router" in name}

    kept = routers(go(JOINT, ILORA | {"router_rate": 0.0}, encoded, base, tmp_path / "a", passes=1))
    longer = routers(go(JOINT, ILORA | {"router_rate": 0.0}, encoded, base, tmp_path / "b", passes=2))
    assert kept and same(kept, longer)  # as they were drawn
    whole = weights(go(JOINT, ILORA, encoded, base, tmp_path / "c"))
    assert same(whole, weights(go(JOINT, ILORA | {"router_rate": 1.0}, encoded, base, tmp_path / "d")))
    with pytest.raises(ValueError, match="router_rate|no router"):
        go(Run("joint", "lora", "bare"), LORA | {"router_rate": 0.1}, encoded, base, tmp_path / "e")


def test_answers_do_not_depend_on_the_batch(encoded, base):
    model, processor = load_base(base)
    samples = read_slot(encoded, "ks", "test").samples
    alone = predict.answer(model, processor.tokenizer, samples, 1, 6)
    assert predict.answer(model, processor.tokenizer, samples, 8, 6) == alone


def test_only_the_answer_is_learned(encoded, base):
    model, processor = load_base(base)
    data = read_slot(encoded, "ks", "train")
    made = batch(model, processor.tokenizer, data.samples[:3], data.targets["explicit"][:3])
    kinds = segments(model.config, made)
    text = processor.tokenizer.decode(made["labels"][0][made["labels"][0] != omni.IGNORE])
    assert text.split() == "i see red . <answer> red </answer> <|im_end|>".split()
    assert [(kinds == k).sum().item() for k in range(4)] == [(1 + 1) + (2 + 1) + (3 + 1), 6, 3, 24]
    assert ((kinds == -1) == (made["attention_mask"] == 0)).all()


def test_loss_is_the_models_own_and_no_logits_are_made_of_prompts(encoded, base, tmp_path, monkeypatch):
    found = []

    class Spy(train.AnswerTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            with torch.no_grad():
                whole = model(**{k: v for k, v in inputs.items() if k != "input_ids"}, use_cache=False)
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            answer_tokens = (inputs["labels"] != omni.IGNORE).sum().item()
            found.append((loss.item(), whole.loss.item(), len(outputs.logits), answer_tokens))
            return loss

    monkeypatch.setattr(train, "AnswerTrainer", Spy)
    go(JOINT, {**ILORA, "lora_dropout": 0.0}, encoded, base, tmp_path, passes=1)
    assert len(found) == 4  # 32 samples in batches of 8
    for loss, whole, logits, answer_tokens in found:
        assert loss == pytest.approx(whole, rel=1e-5) and logits == answer_tokens


def test_unknown_parameter_and_method(encoded, base, tmp_path):
    with pytest.raises(ValueError, match="methods.lora.*rank"):
        train.adapter_config("lora", LORA | {"rank": 3})
    with pytest.raises(ValueError, match="methods.vera"):
        train.adapter_config("vera", LORA)


def test_rates_come_from_the_sweep(encoded, base, tmp_path):
    run, places = Run("single", "lora", "bare", "ks"), (encoded, base, tmp_path / "o", tmp_path / "w", SLOTS, 1, 8)
    with pytest.raises(ValueError, match="methods.lora.learning_rate: rates come from the sweep stage"):
        train.train_all([run], LORA, {"single-bare": 1e-3}, *places)
    with pytest.raises(ValueError, match="ks: the sweep chose no learning rate for single-bare, only for joint-bare"):
        train.train_all([run], {"r": 2, "lora_alpha": 4}, {"joint-bare": 1e-3}, *places)


def test_failing_run_is_named(encoded, base, tmp_path):
    run = Run("single", "lora", "bare", "ks")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="single-lora-bare-ks failed.*no base model"):
        train.train_all([run], {"r": 2, "lora_alpha": 4}, {"single-bare": 1e-2}, encoded, tmp_path / "empty", tmp_path / "o", tmp_path / "w", SLOTS, 1, 8, workers=1)


def test_adapter_that_does_not_fit(encoded, base, tmp_path):
    folder = go(Run("joint", "lora", "bare"), LORA, encoded, base, tmp_path, passes=1)
    stored = weights(folder)
    name = next(iter(stored))
    save_file({k: v for k, v in stored.items() if k != name}, folder / predict.WEIGHTS)
    with pytest.raises(ValueError, match="does not fit the base"):
        predict.load_adapter(load_base(base)[0], folder)
    save_file(stored | {name: torch.zeros(2, 5)}, folder / predict.WEIGHTS)
    with pytest.raises(ValueError, match="does not fit the base"):
        predict.load_adapter(load_base(base)[0], folder)
    (folder / predict.WEIGHTS).write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        predict.load_adapter(load_base(base)[0], folder)


def test_finding_runs(tmp_path):
    with pytest.raises(ValueError, match="no trained run of ilora"):
        predict.find_runs({"ilora": tmp_path})
    for name, slots in (("joint-ilora-bare", ["ave", "ks"]), ("joint-ilora-explicit", ["ave", "ks"]), ("single-ilora-bare-ks", ["ks"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"slots": slots}))
    found = predict.find_runs({"ilora": tmp_path})
    assert [run.name for run in found] == ["single-ilora-bare-ks", "joint-ilora-bare", "joint-ilora-explicit"]
    assert predict.slots_of(found) == ["ave", "ks"]
    assert predict.joint_run(found, "explicit").name == "joint-ilora-explicit"
    with pytest.raises(ValueError, match="no joint run"):
        predict.joint_run({run: path for run, path in found.items() if run.slot}, "bare")


def test_damaged_encoding_is_named(tmp_path, encoded):
    import shutil

    shutil.copytree(encoded / "ks", tmp_path / "ks")
    path = tmp_path / "ks" / "train.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="train.safetensors.*encode stage"):
        read_slot(tmp_path, "ks", "train")
    with pytest.raises(ValueError, match="test.json.*malformed"):
        (tmp_path / "ks" / "test.json").write_text("{")
        read_slot(tmp_path, "ks", "test")
    with pytest.raises(ValueError, match="no such file"):
        read_slot(tmp_path, "ave", "train")
