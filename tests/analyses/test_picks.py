"""Which samples the gallery shows, and where the answers to them come from."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab.analyses import picks
from crab.analyses.picks import ALL, ANY, APART, choose, gather, right, shown_cells
from crab.core.files import read_json, write_json
from crab.study.ledger import sample_scores

# SHA-256 of these ids, by `sha256sum`: c 2e7d2c03, b 3e23e816, a ca978112
A, B, C = "a", "b", "c"


def test_the_order_is_that_of_the_digests():
    one = {name: [1.0, 1.0] for name in (A, B, C)}
    assert [pick.id for pick in choose("ks", one)] == [C, B, A]
    assert [pick.fits for pick in choose("ks", one)] == [True, True, False]  # no two methods differ
    rules = [(pick.rule, pick.matching, pick.total) for pick in choose("ks", one)]
    assert rules == [(ANY, 3, 3), (ALL, 3, 3), (APART, 0, 3)]


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({A: [1, 0], B: [1, 1], C: [0, 0]}, [C, B, A]),
        ({A: [1, 1], B: [0, 1], C: [0, 0]}, [C, A, B]),
        ({A: [0, 0], B: [0, 0], C: [1, 1]}, [C, B, A]),  # the only one that all get right is taken
        ({A: [0, 1, 0], B: [1, 1, 0], C: [1, 1, 1]}, [C, B, A]),  # the third method does not count for the third rule
        ({A: [1], B: [0]}, [B, A]),  # one method, two samples
    ],
)
def test_rules_by_hand(scores, chosen):
    assert [pick.id for pick in choose("ks", scores)] == chosen


@pytest.mark.parametrize(
    ("slot", "score", "verdict"),
    [("ave", 0.5, True), ("ave", 0.4, False), ("s4", 0.49, False), ("arig", 1, True), ("meld", 0.2, True),
     ("meld", 0, False), ("ks", 1, True), ("ks", 0, False)],
)  # fmt: skip
def test_half_of_a_graded_score_is_right_and_any_of_a_label(slot, score, verdict):
    assert right(slot, score) is verdict


@given(
    st.dictionaries(st.text(max_size=4), st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=3, max_size=3)),
    st.integers(1, 6),
)
def test_rules_against_a_plain_search(scores, count):
    order = sorted(scores, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    tests = [lambda s: True, lambda s: min(s) >= 0.5, lambda s: (s[0] >= 0.5) != (s[1] >= 0.5)]
    picks, taken = choose("ave", scores, count), []
    for pick, test in zip(picks, tests + [tests[0]] * 3, strict=False):
        left = [name for name in order if name not in taken]
        fitting = [name for name in left if test(scores[name])]
        assert pick.id == (fitting or left)[0] and pick.fits == bool(fitting)
        assert (pick.matching, pick.total) == (sum(map(test, scores.values())), len(scores))
        taken.append(pick.id)
    assert len(picks) == min(count, len(scores))


def test_shown_are_the_known_families_in_order_and_the_lowest_seed_of_each(cell):
    cells = [
        cell("joint-ilora-bare", "ilora", seed=2), cell("joint-ilora-bare", "ilora", seed=1), cell("joint-other-bare"),
        *(cell("single-lora-bare", slots=[slot], seed=seed) for seed in (0, 1) for slot in ("ks", "cremad")),
    ]  # fmt: skip
    assert [c.name for c in shown_cells(cells)] == [
        "single-lora-bare-ks", "single-lora-bare-cremad", "joint-ilora-bare-seed1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="none of the runs single-lora-bare"):
        shown_cells([cell("joint-other-bare")])


@pytest.fixture
def ran(monkeypatch):
    """Names of the cells that were really run: trained or answered."""
    from crab.study import store as module

    names, real = [], module.run_cell

    def spy(store, cell):
        names.append(cell.name)
        return real(store, cell)

    monkeypatch.setattr(module, "run_cell", spy)
    return names


def test_a_fresh_clone_takes_answers_from_the_file_as_long_as_keys_hold(store, cell, tmp_path, ran):
    wanted = [cell(), *(cell("single-lora-bare", slots=[slot]) for slot in ("ks", "cremad"))]
    keyed = store.run(shown_cells(wanted), "test")
    assert sorted(ran) == ["joint-lora-bare", "single-lora-bare-cremad", "single-lora-bare-ks"]
    path = tmp_path / "answers.json"
    first = gather(store, keyed, path)
    assert len(ran) == 3 and first.families == ["single-lora-bare", "joint-lora-bare"]
    assert {slot: len(each) for slot, each in first.picks.items()} == {"ks": 3, "cremad": 3}
    for family, slots in first.texts.items():  # the answers that are shown, and no others
        for slot, texts in slots.items():
            (own,) = (c for c in keyed if c.family == family and slot in c.slots)
            assert texts == {pick.id: store.answers(own, slot)[pick.id] for pick in first.picks[slot]}
    scores = sample_scores(store.ledger, keyed)
    assert first.scores == {(r.family, r.slot, r.id): r.score for r in scores.itertuples()}

    clone = replace(store, cells=tmp_path / "elsewhere", published=tmp_path / "none")
    before = path.read_bytes()
    assert gather(clone, keyed, path) == first and len(ran) == 3 and path.read_bytes() == before


@pytest.mark.parametrize("change", ["answers", "training", "sample", "score", "file"])
def test_only_the_cell_whose_answers_do_not_hold_is_run_again(store, cell, tmp_path, ran, change):
    keyed = store.run([cell("single-lora-bare", slots=[slot]) for slot in ("ks", "cremad")], "test")
    path, clone = tmp_path / "answers.json", replace(store, cells=tmp_path / "elsewhere")
    first = gather(store, keyed, path)
    content, key = read_json(path), keyed[0].key
    if change == "answers":  # other settings of generation
        content[key]["answers"] = "0" * 16
    elif change == "training":
        content["0" * 16] = content.pop(key)
    elif change == "sample":
        content[key]["scores"]["ks"].popitem()
    elif change == "score":  # of a run whose answers were others
        content[key]["scores"]["ks"][first.picks["ks"][0].id] += 0.5
    path.unlink() if change == "file" else write_json(path, content)
    ran.clear()
    assert gather(clone, keyed, path) == first
    assert ran == ["single-lora-bare-ks"] + ["single-lora-bare-cremad"] * (change == "file")
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {c.key for c in keyed}


def test_samples_are_chosen_again_where_a_run_gives_other_scores(store, cell, tmp_path, monkeypatch):
    """The ledger of another machine says that all is wrong; here all is right."""
    texts = ["<answer>hm</answer>"]
    monkeypatch.setattr("crab.study.answer.answer", lambda model, tokenizer, samples, *args: texts * len(samples))
    keyed = store.run([cell("single-lora-bare", slots=["ks"])], "test")
    names = ("red", "green", "blue", "yellow")

    def answer(model, tokenizer, samples, *args):
        return [f"<answer>{names[int(sample['text']['id'][-2:]) % 4]}</answer>" for sample in samples]

    monkeypatch.setattr("crab.study.answer.answer", answer)
    shown = gather(replace(store, cells=tmp_path / "elsewhere"), keyed, tmp_path / "answers.json")
    assert [pick.matching for pick in shown.picks["ks"]] == [8, 8, 0] and set(shown.scores.values()) == {1.0}
    order = sorted((f"ks/test/{i:05d}" for i in range(8)), key=picks.place)
    assert [pick.id for pick in shown.picks["ks"]] == order[:3]
