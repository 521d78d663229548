"""Cells of a tiny model: what is trained, what is scored, what is kept, and what is done again."""

import json
import pickle
from dataclasses import replace

import pytest
from stopping import stop_at

from crab import tasks
from crab.core.code import modules_of
from crab.core.files import read_json
from crab.study import store as module
from crab.study import train
from crab.study.cells import Cell, cells_of, families_of, joint, read_cells, write_cells
from crab.study.hardware import Hardware
from crab.study.ledger import Ledger, cost_table, metric_table, sample_scores
from crab.study.run import scored_part, training_pairs
from crab.study.score import truths

HELD = 4


@pytest.fixture
def trained(monkeypatch):
    """Number of samples of every adapter that was really trained."""
    counts, real = [], train.train

    def spy(pairs, *args, **kwargs):
        counts.append(len(pairs))
        return real(pairs, *args, **kwargs)

    monkeypatch.setattr("crab.study.run.train", spy)
    return counts


def test_held_out_or_test_samples_are_scored_and_nothing_is_done_twice(store, cell, trained):
    cells = [cell(held_out=HELD), cell("single-lora-bare", slots=["ks"])]
    keyed = store.run(cells, "test")
    assert trained == [2 * (16 - HELD), 16]
    scores = sample_scores(store.ledger, keyed)
    held = [f"{slot}/train/{i:05d}" for slot in ("ks", "cremad") for i in range(16 - HELD, 16)]
    assert scores[scores["family"] == "joint-lora-bare"]["id"].tolist() == held
    assert scores[scores["cell"] == "single-lora-bare-ks"]["id"].tolist() == [f"ks/test/{i:05d}" for i in range(8)]
    assert store.run(cells, "test") == keyed and len(trained) == 2
    assert sample_scores(store.ledger, keyed).equals(scores)
    costs = cost_table(store.ledger, keyed)
    assert costs["samples"].tolist() == trained and (costs["seconds"] > 0).all()


def test_scores_are_those_of_the_answers(store, cell, monkeypatch):
    """Answers are put in the place of the model's. The truth is the colour of each sample's number."""
    texts = [
        "<answer>red</answer>",
        "<answer>red</answer>",
        "hm",
        "<answer>yellow</answer>",
    ]  # red, green, blue, yellow

    def answer(model, tokenizer, samples, *args):  # of similar length together
        return [texts[int(sample["text"]["id"][-2:]) % 4] for sample in samples]

    monkeypatch.setattr("crab.study.answer.answer", answer)
    keyed = store.run([cell(held_out=HELD)], "test")
    assert sample_scores(store.ledger, keyed)["score"].tolist() == [1, 0, 0, 1] * 2
    table = metric_table(store.ledger, keyed)
    primary = table[table["primary"]]
    assert primary["value"].tolist() == [0.5, 0.5] and primary["n_unparsable"].tolist() == [1, 1]
    assert (table["n_expected"] == 4).all() and (table["n_scored"] == 4).all()
    references = store.references(("ks", "cremad", "unav"), HELD)
    assert {slot: entry["chance"] for slot, entry in references.items()} == {"ks": 0.25, "cremad": 0.25}


def test_a_ledger_is_enough_for_a_fresh_clone(store, cell, trained, tmp_path):
    cells = [cell(), cell("joint-ilora-bare", "ilora")]
    keyed = store.run(cells, "test")
    references = store.references(("ks",))
    clone = replace(store, cells=tmp_path / "elsewhere", published=tmp_path / "none")
    assert clone.run(cells, "test") == keyed and clone.references(("ks",)) == references
    assert len(trained) == 2 and not (tmp_path / "elsewhere").exists()
    clone.run(cells[:1], "test", need="adapter")  # weights are not in the ledger
    assert len(trained) == 3 and clone.adapter(keyed[0]) and clone.adapter(keyed[1]) is None


def test_published_adapters_are_taken_and_equal_ones_are_equal_files(store, cell, trained, tmp_path):
    files = []
    for place in ("one", "other"):
        here = replace(store, cells=tmp_path / place, published=tmp_path / f"{place}-published")
        keyed = here.run([cell(), cell(seed=1)], "test", need="adapter")
        here.publish(keyed[:1])
        assert [path.name for path in here.published.iterdir()] == ["joint-lora-bare"]
        files.append({path.name: path.read_bytes() for path in (here.published / "joint-lora-bare").iterdir()})
    assert files[0] == files[1] and {"run.json", "adapter_config.json", "adapter_model.safetensors"} <= set(files[0])
    clone = replace(here, cells=tmp_path / "clone")
    count = len(trained)
    (again,) = clone.run([cell()], "test", need="answers")
    assert len(trained) == count and set(clone.answers(again, "ks")) == {f"ks/test/{i:05d}" for i in range(8)}
    with pytest.raises(ValueError, match="joint-lora-bare-seed1: no answers here; run it with need='answers'"):
        clone.answers(keyed[1], "ks")
    with pytest.raises(ValueError, match="joint-lora-bare-seed1: no adapter here"):
        clone.publish(keyed[1:])
    replace(here, published=tmp_path / "none").publish([])  # where single-task runs are all there is


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 2e-2},
        {"held_out": 2},
        {"seed": 1},
        {"passes": 2},
        {"samples": 8},
        {"form": "explicit"},
        {"slots": ["ks"]},
    ],
)
def test_another_cell_is_trained_anew(store, cell, change):
    assert store.key(cell()) != store.key(cell(**change))


def test_names_do_not_decide(store, cell, trained):
    keyed = store.run([cell("one"), cell("other")], "test")
    assert len(trained) == 1 and keyed[0].key == keyed[1].key
    assert sample_scores(store.ledger, keyed)["family"].value_counts().to_dict() == {"one": 16, "other": 16}


def test_other_data_base_or_code_train_anew_and_other_scoring_scores_anew(store, cell, trained, monkeypatch):
    keyed = store.run([cell()], "test")
    for changed in ({"batch_size": 4}, {"precision": "bf16"}, {"group_by_length": True}):
        changed = replace(store, **changed)
        assert changed.key(cell()) != keyed[0].key
    other = replace(store)
    other.__dict__["manifest"] = {key: {**part, "digest": "new"} for key, part in store.manifest.items()}
    assert other.key(cell()) != keyed[0].key
    with monkeypatch.context() as context:
        context.setattr(module, "TRAINING", ("crab.core.pool",))
        assert store.key(cell()) != keyed[0].key
    calls = []
    monkeypatch.setattr(module, "SCORING", ("crab.core.pool",))
    monkeypatch.setattr("crab.study.run.answer_slot", lambda *args: calls.append(args))
    store.run([cell()], "test")  # the answers still hold
    assert len(trained) == 1 and not calls
    assert Ledger(store.ledger).cells[keyed[0].key]["score_key"] == store.score_key(cell())
    assert len(Ledger(store.ledger).cells) == 1


def test_an_entry_with_another_key_replaces_the_old_one(store, cell, monkeypatch):
    store.run([cell(), cell(seed=1)], "test")
    monkeypatch.setattr(module, "TRAINING", ("crab.core.pool",))
    keyed = store.run([cell()], "test")
    assert len(Ledger(store.ledger).cells) == 2 and keyed[0].key in Ledger(store.ledger).cells


def test_training_key_sees_the_code_that_trains_and_no_other(store, cell, monkeypatch):
    read = []
    monkeypatch.setattr(module, "code_digest", lambda *names: read.append(names) or "")
    store.key(cell())
    names = set(modules_of(read[0]))
    assert {"crab/ilora/layer.py", "crab/ilora/model.py", "crab/models/omni.py", "crab/samples/slots.py"} <= names
    assert not [name for name in names if name.startswith(("crab/tasks", "crab/world", "crab/pipeline"))]
    assert not {"crab/core/pool.py", "crab/study/score.py"} & names


def test_killed_while_training_resumes(store, cell, tmp_path):
    keyed = replace(store, cells=tmp_path / "whole").run([cell(passes=2)], "test")
    whole = sample_scores(store.ledger, keyed)["score"].tolist()
    fresh = replace(store, ledger=tmp_path / "other.json.xz")
    with stop_at(3), pytest.raises(KeyboardInterrupt):
        fresh.run([cell(passes=2), cell()], "test")
    keyed = fresh.run([cell(passes=2), cell()], "test")
    assert cost_table(fresh.ledger, keyed)["resumed_from"].tolist() == [4, 0]
    assert sample_scores(fresh.ledger, keyed[:1])["score"].tolist() == whole


def test_killed_while_answering_does_not_train_again(store, cell, monkeypatch, trained):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("crab.study.answer.answer", killed)
        with pytest.raises(KeyboardInterrupt):
            store.run([cell()], "test")
    monkeypatch.setattr(train.AnswerTrainer, "train", None)  # would fail
    keyed = store.run([cell()], "test")
    assert len(sample_scores(store.ledger, keyed)) == 16


def test_what_is_finished_is_kept_if_a_later_cell_fails(store, cell, monkeypatch):
    real = module.run_cell

    def fail_on_second(store, cell):
        if cell.seed == 1:
            raise ValueError("the disk is full")
        real(store, cell)

    monkeypatch.setattr(module, "run_cell", fail_on_second)
    with pytest.raises(RuntimeError, match="test 2: joint-lora-bare-seed1 failed: the disk is full"):
        store.run([cell(), cell(seed=1)], "test")
    assert len(Ledger(store.ledger).cells) == 1


def test_jobs_can_go_to_worker_processes_the_longest_first(store, cell, monkeypatch):
    seen = []

    def pool(jobs, workers, label):
        seen.extend(name for name, _ in jobs)
        assert workers == 2 and all(pickle.loads(pickle.dumps(job)).args[1] == job.args[1] for _, job in jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_pool", pool)
    with pytest.raises(KeyboardInterrupt):
        replace(store, hardware=Hardware(workers=2)).run(
            [cell("short", slots=["ks"]), cell("middle"), cell("long", passes=3)], "test"
        )
    assert seen == ["1: long", "2: middle", "3: short-ks"]


def test_training_pairs_leave_out_what_is_held_out(store, cell):
    def numbers(**fields):
        return [float(sample["features"][0].argmax()) for sample, _ in training_pairs(store, cell(**fields), "ks")]

    assert numbers() == [0, 1, 2, 3] * 4
    assert numbers(held_out=HELD) == [0, 1, 2, 3] * 3
    assert numbers(held_out=HELD, samples=5) == [0, 1, 2, 3, 0]
    for fields in ({"held_out": 16}, {"held_out": HELD, "samples": 13}):
        with pytest.raises(ValueError, match="ks: of 16 training samples .* hold out fewer"):
            numbers(**fields)


def test_only_training_may_replace_a_sample_that_cannot_be_read(store, cell, monkeypatch):
    """The answer to another sample would count as that of the one that is scored."""
    asked, real = [], module.read_slot

    def spy(root, slot, split, base, on_problem="error"):
        asked.append((split, on_problem))
        return real(root, slot, split, base, on_problem)

    monkeypatch.setattr(module, "read_slot", spy)
    lenient = replace(store, on_problem="skip")
    training_pairs(lenient, cell(), "ks")
    scored_part(lenient, cell(), "ks")
    scored_part(lenient, cell(held_out=HELD), "ks")
    assert asked == [("train", "skip"), ("test", "error"), ("train", "error")]


def test_errors_name_what_is_missing(store, cell, tmp_path):
    with pytest.raises(ValueError, match="ucf/train is not encoded; add ucf to encode.slots"):
        store.run([cell(slots=["ucf"])], "test")
    with pytest.raises(ValueError, match="lora: .*rank"):
        store.run([cell(options={"rank": 2})], "test")
    with pytest.raises(ValueError, match="no scores of joint-lora-bare"):
        sample_scores(store.ledger, store.keyed([cell()]))
    (tmp_path / "bad.xz").write_bytes(b"half")
    with pytest.raises(ValueError, match="bad.xz: damaged .* restore it from git"):
        Ledger(tmp_path / "bad.xz")


# ---- cells


def test_cells_are_read_as_written(cell, tmp_path):
    cells = [replace(cell(), key="abc"), cell("x", "ilora", seed=3, words=("one", "two"), convention=1, samples=7)]
    write_cells(tmp_path / "cells.json", cells)
    again = read_cells(tmp_path / "cells.json")
    assert again == cells and again[0].key == "abc"
    (tmp_path / "cells.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="cells.json: not a list of cells; run the train stage again"):
        read_cells(tmp_path / "cells.json")


def test_families_and_their_cells():
    lora, ilora = {"r": 4, "lora_alpha": 8}, {"r": 4, "num_heads": 3}
    methods = {
        "lora_matched": {**lora, "runs": ["single-bare"]},
        "ilora": {**ilora, "runs": ["joint-bare", "joint-explicit"]},
    }
    families = families_of(methods)
    assert list(families) == ["single-lora_matched-bare", "joint-ilora-bare", "joint-ilora-explicit"]
    assert families["joint-ilora-explicit"]["method"] == "ilora" and families["joint-ilora-bare"]["options"] == ilora
    slots = ("ave", "unav", "ks")
    single = cells_of("single-lora_matched-bare", "single", "lora", lora, 1e-3, slots, 2, [0, 1])
    assert [c.name for c in single][:3] == [f"single-lora_matched-bare-{s}" for s in ("ave", "ks", "ave-seed1")]
    both = [c for name in list(families)[1:] for c in cells_of(name, "joint", "ilora", ilora, 1e-3, slots, 2, [1])]
    assert both[0].slots == slots and both[0].scored_slots == ["ave", "ks"]  # unav has no test split
    assert joint(single + both, "ilora", "explicit") == both[1]
    with pytest.raises(ValueError, match="no joint cell of lora_matched; add joint-bare"):
        joint(single + both, "lora_matched", "bare")


def test_a_method_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="train.methods.vera: unknown method; its name must start with lora or ilora"):
        families_of({"vera": {"runs": []}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'"),
        ({"method": "vera"}, "method is 'vera'; use one of lora, ilora"),
        ({"form": "long"}, "form is 'long'"),
        ({"order": "last"}, "order is 'last'"),
        ({"passes": 0}, "passes is 0"),
        ({"held_out": -1}, "held_out is -1"),
        ({"held_out": 2.0}, "held_out is 2.0"),
        ({"samples": 0}, "samples is 0"),
        ({"slots": ("unav",)}, r"no slot of \['unav'\] has a test split"),
        ({"words": ("one", "two"), "form": "explicit"}, "bare answers"),
    ],
)
def test_bad_cells_are_refused(change, message):
    good = {"family": "x", "method": "lora", "options": {}, "learning_rate": 1e-3, "slots": ("ks",), "passes": 1}
    with pytest.raises(ValueError, match=f"cell x: .*{message}"):
        Cell(**good | change)


def test_ref_avs_training_records_get_the_split_of_test_ones(tmp_path):
    path = tmp_path / tasks.json_path("ref_avs", "train")
    path.parent.mkdir(parents=True)
    head = {
        "image_path": "media/c/frames/0.jpg", "audio_path": "a.wav", "vid": "v", "fid": 1, "uid": "u", "idx": 0,
        "description": "the red cube",
    }  # fmt: skip
    there = "<answer>true</answer> [16,24,80,88] [40,48] [48,56] [56,64]"
    path.write_text(
        json.dumps([head | {"output": there}, head | {"output": "<answer>false</answer>"}]), encoding="utf-8"
    )
    names = ["ref_avs/train/00001", "ref_avs/train/00000"]
    rows = truths(tmp_path, "ref_avs", "train", names)
    assert [(r["id"], r["split"]) for r in rows] == list(zip(names, ["test_n", "test_s"], strict=True))
    with pytest.raises(ValueError, match="no record 'ref_avs/train/00002'.*encode stage"):
        truths(tmp_path, "ref_avs", "train", ["ref_avs/train/00002"])


def test_scores_on_disk_are_readable_json(store, cell):
    (keyed,) = store.run([cell()], "test")
    entry = read_json(store.folder(keyed) / "scores.json")
    assert entry["cell"]["options"] == {"lora_alpha": 4, "r": 2} and set(entry["slots"]) == {"ks", "cremad"}
