"""Training, resuming and predicting with a tiny real model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crab.models import omni
from crab.study import predict, train
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


def test_killed_run_resumes_to_the_same_adapter(encoded, base, tmp_path):
    whole = weights(go(JOINT, ILORA, encoded, base, tmp_path / "a", passes=3))
    with pytest.raises(KeyboardInterrupt):
        go(JOINT, ILORA, encoded, base, tmp_path / "b", passes=3, stop_at=4)
    resumed = go(JOINT, ILORA, encoded, base, tmp_path / "b", passes=3)
    assert json.loads((resumed / "run.json").read_text())["resumed_from"] == 4
    assert same(whole, weights(resumed))
    assert not list(resumed.parent.glob("checkpoint-*"))


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
    section = LORA | {"r": 8, "lora_alpha": 16, "learning_rate": 3e-2}
    record = train.train_all([run], section, encoded, base, tmp_path / "out", tmp_path / "work", SLOTS, 40, 8, workers=1)[0]
    assert record["samples"] == 16 and record["steps"] == 80
    assert record["loss"][-1][1] < 0.5 * record["loss"][0][1]
    assert not (tmp_path / "work" / run.name).exists()
    found = predict.find_runs({"lora": tmp_path / "out"})
    assert list(found) == [run]
    predict.predict_all(found, encoded, base, tmp_path / "texts", SLOTS, 3, 8, workers=1)
    rows = [json.loads(line) for line in (tmp_path / "texts" / run.name / "ks.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == read_slot(encoded, "ks", "test").ids
    right = sum(a in row["text"] for a, row in zip(["red", "green", "blue", "yellow"] * 2, rows))
    assert right >= 6


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


def test_unknown_parameter_and_method(encoded, base, tmp_path):
    with pytest.raises(ValueError, match="methods.lora.*rank"):
        train.adapter_config("lora", LORA | {"rank": 3})
    with pytest.raises(ValueError, match="methods.vera"):
        train.adapter_config("vera", LORA)


def test_failing_run_is_named(encoded, base, tmp_path):
    run = Run("single", "lora", "bare", "ks")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="single-lora-bare-ks failed.*no base model"):
        train.train_all([run], LORA, encoded, tmp_path / "empty", tmp_path / "o", tmp_path / "w", SLOTS, 1, 8, workers=1)


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
