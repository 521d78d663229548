"""Right answers and their reasons, from hand-made answers to a built tree."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab import tasks
from crab.data import records
from crab.study import faithfulness as faith
from crab.study.statements import COUNTS, judged, statement_counts
from crab.world.generate import build

FAMILY = "joint-ilora-explicit"
SLOTS = ["ave", "cremad"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six test records of two slots."""
    folder = tmp_path_factory.mktemp("faith") / "tree"
    build(folder, seed=2, train=2, test=6, caption=1, workers=1, slots=SLOTS, progress=False)
    return folder


def answers(root, slot, change):
    """Records, and the true texts changed by `change(index, record, chain, bare)`."""
    rows, texts = records.read(root, slot, "test"), {}
    for index, record in enumerate(rows):
        explicit, bare = (tasks.target(slot, record, form) for form in ("explicit", "bare"))
        texts[record["id"]] = change(index, record, explicit.removesuffix(bare), bare)
    return rows, texts


def frame(root, change, slots=SLOTS):
    """The scores and statement counts of such answers, as the ledger gives them."""
    frames = []
    for slot in slots:
        rows, texts = answers(root, slot, change)
        result = tasks.score(slot, rows, texts)
        counts = pd.DataFrame(statement_counts(root, slot, rows, texts), columns=COUNTS)
        head = {"family": FAMILY, "seed": 0, "slot": slot}
        frames.append(counts.assign(**head, id=result["ids"], score=result["per_sample"]))
    return pd.concat(frames)


def values(table, slot="ave", column="value"):
    return table[table["slot"] == slot].set_index("measure")[column]


def test_true_texts_are_right_for_right_reasons(root):
    table = faith.faithfulness(frame(root, lambda i, record, chain, bare: chain + bare), resamples=200)
    assert list(table.columns) == faith.COLUMNS and len(table) == 2 * len(faith.MEASURES) and (table["n"] == 6).all()
    for slot, statements in (("ave", 3), ("cremad", 2)):
        assert values(table, slot).to_dict() == {
            faith.RIGHT: 1, faith.LUCKY: 0, faith.WRONG: 0, faith.TRUE: 1, faith.UNREADABLE: 0, faith.COUNT: statements,
        }  # fmt: skip
        assert (values(table, slot, "low") == values(table, slot)).all()
        assert values(table, slot, "chance")[faith.TRUE] < 0.5


def mixed(i, record, chain, bare):
    """True chain; no chain; a lie beside a truth; true chain, wrong event; unreadable chain; no answer at all."""
    other = "bell" if record["event"] != "bell" else "drum"
    lie = f"i hear nothing . i hear a {record['event']} . "
    return (
        chain + bare,
        bare,
        lie + bare,
        chain + bare.replace(record["event"], other),
        "what is it ? " + bare,
        chain,
    )[i]


def test_hand_worked(root):
    samples = frame(root, mixed, ["ave"])
    assert samples[COUNTS[:3]].to_numpy().tolist() == [[3, 0, 3], [0, 0, 0], [1, 0, 2], [3, 0, 3], [0, 1, 1], [3, 0, 3]]
    table = faith.faithfulness(samples, resamples=200)
    shares_of = values(table)
    # the fourth answer is graded by its background seconds alone
    background = [10 - r["end_time"] + r["start_time"] for r in records.read(root, "ave", "test")][3]
    right = 1 + (background >= 5)
    shares = {faith.RIGHT: right / 6, faith.LUCKY: 3 / 6, faith.WRONG: 1 - right / 6 - 3 / 6}
    of_statements = {faith.COUNT: 12 / 6, faith.TRUE: 10 / 12, faith.UNREADABLE: 1 / 12}
    assert shares_of.to_dict() == pytest.approx(shares | of_statements)
    low, high = values(table, column="low"), values(table, column="high")
    assert (low <= shares_of).all() and (shares_of <= high).all() and low[faith.TRUE] < high[faith.TRUE]
    chance = values(table, column="chance")
    assert chance[faith.TRUE] == samples["true_by_chance"].sum() / 12 and chance.drop(faith.TRUE).isna().all()


def test_statements_are_judged_one_by_one(root, tmp_path):
    rows, texts = answers(root, "ave", mixed)
    table = judged(root, "ave", rows[:3], texts)
    assert table["verdict"].tolist() == ["true"] * 3 + ["false", "true"]
    assert table["id"].tolist() == ["ave/test/00000"] * 3 + ["ave/test/00002"] * 2
    # data that were not generated have no scene graph
    assert judged(tmp_path, "ave", rows, texts).empty and statement_counts(tmp_path, "ave", rows, texts) == []


def test_chance_checks_a_chain_against_the_scene_half_a_turn_away(root):
    rows, texts = answers(root, "ave", lambda i, record, chain, bare: chain + bare)
    ids = [record["id"] for record in rows]
    turned = dict(
        zip(ids, [texts[name] for name in ids[3:] + ids[:3]], strict=True)
    )  # of six, each has the text of another
    counts, of_turned = (np.array(statement_counts(root, "ave", rows, t)) for t in (texts, turned))
    assert (counts[:, 3] == np.roll(of_turned[:, 0], 3)).all() and (counts[:, 0] == 3).all()


def test_bare_answers_are_left_out_and_a_missing_score_is_an_error(root):
    samples = frame(root, lambda i, record, chain, bare: chain + bare)
    bare = samples.assign(family="joint-lora-bare", **dict.fromkeys(COUNTS, np.nan))
    assert set(faith.faithfulness(pd.concat([bare, samples]), resamples=20)["family"]) == {FAMILY}
    silent = values(faith.faithfulness(samples.assign(**dict.fromkeys(COUNTS, 0)), resamples=20))
    assert silent[faith.LUCKY] == 1 and silent[faith.COUNT] == 0 and np.isnan(silent[faith.TRUE])
    table = faith.faithfulness(bare)
    assert table.empty and list(table.columns) == faith.COLUMNS
    with pytest.raises(ValueError, match=f"{FAMILY}, ave: a seed lacks scores of 1 samples, e.g. ave/test/00000; run"):
        faith.faithfulness(pd.concat([samples, samples[1:].assign(seed=1)]))


@pytest.mark.parametrize(
    ("slot", "scores", "right"),
    [
        ("ave", [0, 0.4, 0.5, 1], [0, 0, 1, 1]), ("s4", [0.49, 0.5], [0, 1]), ("avvp", [0.5], [1]),
        ("ks", [0, 1], [0, 1]), ("meld", [0, 0.3, 1.4], [0, 1, 1]),
    ],
)  # fmt: skip
def test_what_is_right(slot, scores, right):
    assert faith.is_right(slot, scores).tolist() == [bool(r) for r in right]
    graded = {tasks.get_slot(s).metric for s in tasks.BENCHMARKS} - {"accuracy", "WAR", "weighted_f1", "ciou"}
    assert graded == set(faith.GRADED)


def measured(right, true, unreadable, stated, resamples):
    """Rows by measure, from lists [seeds][samples]; chance plays no role."""
    rows = faith.measures(*map(np.array, (right, true, unreadable, stated, true)), resamples)
    return {row["measure"]: row for row in rows}


@given(st.lists(st.tuples(st.booleans(), *3 * [st.integers(0, 3)]), min_size=1, max_size=8))
def test_shares_add_up(rows):
    right, true, unreadable, false = map(np.array, zip(*rows, strict=True))
    table = measured([right], [true], [unreadable], [true + unreadable + false], 50)
    assert sum(table[s]["value"] for s in faith.SHARES) == pytest.approx(1)
    assert table[faith.RIGHT]["value"] == pytest.approx(np.mean([r and u == f == 0 < t for r, t, u, f in rows]))
    assert table[faith.WRONG]["value"] == pytest.approx(np.mean(~right))
    for row in table.values():
        assert np.isnan(row["value"]) or row["low"] - 1e-9 <= row["high"]


def test_interval_of_a_ratio():
    """Against the delta method: one statement per answer, so the ratio is a plain share."""
    true = np.repeat([1, 0], [700, 300])
    row = measured([true > 0], [true], [0 * true], [np.ones_like(true)], 4000)[faith.TRUE]
    error = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    assert (row["low"], row["high"]) == pytest.approx((0.7 - error, 0.7 + error), abs=0.004)
