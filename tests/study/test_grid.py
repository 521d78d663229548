"""A grid of real runs of a tiny model: what is trained on, what is scored, what is kept and what is done again."""

import json
import pickle

import pandas as pd
import pytest

from crab import tasks
from crab.study import grid, train
from crab.study.dataset import read_slot
from crab.study.grid import Cell, run_grid
from crab.study.runs import Run

COLOURS, SLOTS = ("red", "green", "blue", "yellow"), ("ks", "cremad")  # those of the encoded samples
LORA = {"r": 2, "lora_alpha": 4, "learning_rate": 1e-2}
EVALUATE = {"batch_size": 8, "max_new_tokens": 6, "segmenter": "grabcut"}
HELD = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The records the conftest's samples belong to: colours, in turn."""
    root = tmp_path_factory.mktemp("dataset")
    for slot, field in zip(SLOTS, ("action", "emotion"), strict=True):
        for split, count in (("train", 16), ("test", 8)):
            path = root / tasks.json_path(slot, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = [COLOURS[i % 4] for i in range(count)]
            path.write_text(json.dumps(
                [{"video_path": "a.mp4", "audio_path": "a.wav", field: c, "label": f"<answer>{c}</answer>"} for c in colours]
            ))  # fmt: skip
    return root


def joint(name="joint", held_out=HELD, **settings):
    return Cell(name, Run("joint", "lora", "bare"), LORA | settings, 1, SLOTS, held_out)


def go(cells, encoded, dataset, base, work, **kwargs):
    return run_grid(cells, encoded, dataset, base, work, batch_size=8, evaluate=EVALUATE, workers=1, **kwargs)


@pytest.fixture
def trained(monkeypatch):
    """Runs that were trained, with the ids of the samples each was trained on."""
    seen = []

    def spy(run, section, encoded, base, folder, slots, *args, held_out, samples, **kwargs):
        final = real(run, section, encoded, base, folder, slots, *args, held_out=held_out, samples=samples, **kwargs)
        seen.append((run.name, json.loads((final / "run.json").read_text())["samples"]))
        return final

    real = train.train_run
    monkeypatch.setattr(grid, "train_run", spy)
    return seen


def test_scores_the_held_out_samples_and_a_second_time_trains_nothing(encoded, dataset, base, tmp_path, trained):
    cells = [joint(), Cell("alone", Run("single", "lora", "bare", "ks"), LORA, 1)]
    samples, summary = go(cells, encoded, dataset, base, tmp_path)
    assert trained == [("joint-lora-bare", 2 * (16 - HELD)), ("single-lora-bare-ks", 16)]
    assert list(samples.columns) == grid.COLUMNS and list(summary["cell"]) == ["joint", "alone"]
    held = [f"{slot}/train/{i:05d}" for slot in SLOTS for i in range(16 - HELD, 16)]
    assert samples[samples["cell"] == "joint"]["id"].tolist() == held
    assert samples[samples["cell"] == "alone"]["id"].tolist() == [f"ks/test/{i:05d}" for i in range(8)]
    assert not list(tmp_path.rglob("*.safetensors"))  # adapters are gone

    again, same = go(cells, encoded, dataset, base, tmp_path)
    assert len(trained) == 2
    pd.testing.assert_frame_equal(samples, again)
    pd.testing.assert_frame_equal(summary, same)


def test_scores_are_those_of_the_answers(encoded, dataset, base, tmp_path, monkeypatch):
    """Answers put in the model's place; truth is the colour of each sample's number."""

    def answers(run, adapter, encoded, base, out, slots, *args):
        for slot in slots:
            given = ["red"] * 3 + ["yellow"]  # of held-out samples 12 to 15: red, green, blue, yellow
            rows = [{"id": f"{slot}/train/{12 + i:05d}", "slot": slot, "text": f"<answer>{c}</answer>"} for i, c in enumerate(given)]
            rows[2]["text"] = "hm"
            (out / run.name).mkdir(parents=True, exist_ok=True)
            (out / run.name / f"{slot}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    monkeypatch.setattr(grid, "predict_run", answers)
    samples, summary = go([joint()], encoded, dataset, base, tmp_path)
    assert samples["score"].tolist() == [1, 0, 0, 1] * 2
    assert summary["unparsable"].tolist() == [2]
    assert grid.chances(dataset, encoded, SLOTS, HELD) == {slot: 0.25 for slot in SLOTS}


def test_held_out_samples_are_not_trained_on(encoded):
    data = read_slot(encoded, "ks", "train")
    numbers = {id(sample): name for sample, name in zip(data.samples, data.ids, strict=True)}

    def ids(**kwargs):
        return [numbers[id(sample)] for sample, _ in train._trained_on(data, "bare", **kwargs)]

    assert ids(held_out=4, samples=None) == data.ids[:12]
    assert ids(held_out=4, samples=5) == data.ids[:5]
    assert ids(held_out=0, samples=None) == data.ids
    for held_out, samples in ((16, None), (-1, None), (4, 13), (4, 0)):
        with pytest.raises(ValueError, match="ks: of 16 training samples .* hold out fewer"):
            ids(held_out=held_out, samples=samples)


def test_only_what_changed_is_done_again(encoded, dataset, base, tmp_path, trained, monkeypatch):
    first, _ = go([joint()], encoded, dataset, base, tmp_path)
    for changed in (joint(learning_rate=2e-2), joint(held_out=2), joint(held_out=0), joint(r=1)):
        count = len(trained)
        go([changed], encoded, dataset, base, tmp_path)
        assert len(trained) == count + 1
    count = len(trained)
    monkeypatch.setattr(grid, "SCORING", "import crab.study.resample")  # other code scores: the answers are still good
    again, _ = go([joint()], encoded, dataset, base, tmp_path)
    assert len(trained) == count
    pd.testing.assert_frame_equal(first, again)


def test_equal_cells_are_trained_once_and_adapters_kept_on_demand(encoded, dataset, base, tmp_path, trained):
    cells = [joint("one"), joint("other")]
    samples, summary = go(cells, encoded, dataset, base, tmp_path)
    assert len(trained) == 1 and summary["key"].nunique() == 1
    assert samples["cell"].value_counts().tolist() == [8, 8]
    go(cells, encoded, dataset, base, tmp_path)
    assert len(trained) == 1


def test_killed_grid_goes_on_in_the_cell_it_was_in(encoded, dataset, base, tmp_path, monkeypatch):
    whole, _ = go([Cell("a", Run("joint", "lora", "bare"), LORA, 2, SLOTS, HELD)], encoded, dataset, base, tmp_path / "whole")
    cells = [Cell("a", Run("joint", "lora", "bare"), LORA, 2, SLOTS, HELD), joint("b")]
    real = train.train_run
    done = []

    def killed(run, *args, **kwargs):
        return real(run, *args, stop_at=3, **kwargs)

    monkeypatch.setattr(grid, "train_run", killed)
    with pytest.raises(KeyboardInterrupt):
        go(cells, encoded, dataset, base, tmp_path / "work")

    def resumed(run, *args, **kwargs):
        final = real(run, *args, **kwargs)
        done.append(json.loads((final / "run.json").read_text())["resumed_from"])
        return final

    monkeypatch.setattr(grid, "train_run", resumed)
    samples, _ = go(cells, encoded, dataset, base, tmp_path / "work")
    assert done == [3, 0]
    assert samples[samples["cell"] == "a"]["score"].tolist() == whole["score"].tolist()


def test_killed_while_answering_does_not_train_again(encoded, dataset, base, tmp_path, monkeypatch, trained):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(grid, "predict_run", killed)
        with pytest.raises(KeyboardInterrupt):
            go([joint()], encoded, dataset, base, tmp_path)
    stamp = [p.stat().st_mtime_ns for p in tmp_path.rglob("adapter_model.safetensors")]
    assert len(stamp) == 1
    with monkeypatch.context() as context:
        context.setattr(train.AnswerTrainer, "train", None)  # would fail
        go([joint()], encoded, dataset, base, tmp_path)


def test_ref_avs_training_records_get_the_split_of_test_ones(tmp_path):
    path = tmp_path / tasks.json_path("ref_avs", "train")
    path.parent.mkdir(parents=True)
    head = dict(image_path="media/c/frames/0.jpg", audio_path="a.wav", vid="v", fid=1, uid="u", idx=0, description="the red cube")
    there = "<answer>true</answer> [16,24,80,88] [40,48] [48,56] [56,64]"
    path.write_text(json.dumps([head | {"output": there}, head | {"output": "<answer>false</answer>"}]))
    names = ["ref_avs/train/00001", "ref_avs/train/00000"]
    found = grid.truths(tmp_path, "ref_avs", "train", names)
    assert [(r["id"], r["split"]) for r in found] == list(zip(names, ["test_n", "test_s"], strict=True))
    with pytest.raises(ValueError, match="no record 'ref_avs/train/00002'.*encode stage"):
        grid.truths(tmp_path, "ref_avs", "train", ["ref_avs/train/00002"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": LORA | {"learning_rate": 0}}, "learning_rate is 0"),
        ({"settings": {"r": 2}}, "learning_rate is None"),
        ({"settings": LORA | {"rank": 2}}, "methods.lora.*rank"),
        ({"passes": 0}, "passes is 0"),
        ({"held_out": -1}, "held_out is -1"),
        ({"held_out": 2.0}, "held_out is 2.0"),
        ({"slots": ("unav",)}, r"none of its slots \['unav'\] has a test split"),
    ],
)
def test_bad_cells_are_refused(change, said):
    good = {"name": "x", "run": Run("joint", "lora", "bare"), "settings": LORA, "passes": 1, "slots": SLOTS}
    with pytest.raises(ValueError, match=said):
        Cell(**good | change)


def test_bad_grids_are_refused(encoded, dataset, base, tmp_path):
    with pytest.raises(ValueError, match=r"two cells have one name: \['joint'\]"):
        go([joint(), joint(r=1)], encoded, dataset, base, tmp_path)
    with pytest.raises(ValueError, match="evaluate holds"):
        run_grid([joint()], encoded, dataset, base, tmp_path, batch_size=8, evaluate={"batch_size": 8})
    with pytest.raises(ValueError, match="train.precision: 'fp16' is unknown; use one of bf16, fp32"):
        go([joint()], encoded, dataset, base, tmp_path, precision="fp16")
    with pytest.raises(RuntimeError, match="grid joint failed: ks: of 16 training samples 16 are held out"):
        go([joint(held_out=16)], encoded, dataset, base, tmp_path)


def test_jobs_can_go_to_worker_processes_the_longest_first(encoded, dataset, base, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def pool(jobs, workers, label):
        assert workers == 2 and label == "ablation"
        assert [name for name, _ in jobs] == ["longer", "joint", "alone"]
        for _, job in jobs:
            assert pickle.loads(pickle.dumps(job)).args[0] == job.args[0]
        raise Seen

    monkeypatch.setattr(grid, "run_pool", pool)
    cells = [Cell("alone", Run("single", "lora", "bare", "ks"), LORA, 1), joint(), Cell("longer", joint().run, LORA, 3, SLOTS)]
    with pytest.raises(Seen):
        run_grid(cells, encoded, dataset, base, tmp_path, batch_size=8, evaluate=EVALUATE, workers=2, label="ablation")
