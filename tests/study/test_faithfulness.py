"""Right answers and their reasons, from hand-made prediction files on a built tree."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

matplotlib.use("Agg")

from crab import tasks  # noqa: E402
from crab.data import records  # noqa: E402
from crab.world.generate import build  # noqa: E402
from crab.study import faithfulness as faith  # noqa: E402
from crab.study import score  # noqa: E402
from crab.study.figures.faithfulness import faithfulness_bars  # noqa: E402
from crab.study.runs import Run  # noqa: E402

RUN = Run("joint", "ilora", "explicit")
SLOTS = ["ave", "cremad"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six test records of two slots."""
    folder = tmp_path_factory.mktemp("faith") / "tree"
    build(folder, seed=2, train=2, test=6, caption=1, workers=1, slots=SLOTS, progress=False)
    return folder


def predict(root, out, change, run=RUN):
    """Write predictions: the true texts, changed by `change(slot, index, record, chain, bare)`."""
    for slot in SLOTS:
        path = out / run.name / f"{slot}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, record in enumerate(records.read(root, slot, "test")):
            explicit, bare = (tasks.target(slot, record, form) for form in ("explicit", "bare"))
            text = change(slot, index, record, explicit.removesuffix(bare), bare)
            lines.append(json.dumps({"id": record["id"], "slot": slot, "text": text}) + "\n")
        path.write_text("".join(lines))


def go(root, out, runs=(RUN,)):
    _, samples = score.score_all(list(runs), SLOTS, root, out, out / "scores", resamples=20)
    return faith.faithfulness(list(runs), SLOTS, root, out, samples, out / "faithfulness.csv", resamples=200)


def values(table, slot="ave", column="value"):
    return table[table["slot"] == slot].set_index("measure")[column]


def test_true_texts_are_right_by_right_reasons(root, tmp_path):
    predict(root, tmp_path, lambda slot, i, record, chain, bare: chain + bare)
    table = go(root, tmp_path)
    assert list(table.columns) == faith.COLUMNS and len(table) == 2 * len(faith.MEASURES) and (table["n"] == 6).all()
    for slot, statements in (("ave", 3), ("cremad", 2)):
        assert values(table, slot).to_dict() == {
            faith.RIGHT: 1, faith.LUCKY: 0, faith.WRONG: 0, faith.TRUE: 1, faith.UNREADABLE: 0, faith.COUNT: statements}
        assert (values(table, slot, "low") == values(table, slot)).all()
        assert values(table, slot, "chance")[faith.TRUE] < 0.5
    again = pd.read_csv(tmp_path / "faithfulness.csv")
    assert list(again.columns) == faith.COLUMNS and again["value"].tolist() == pytest.approx(table["value"].tolist())


def test_hand_worked(root, tmp_path):
    """ave: true chain; no chain; a lie beside a truth; true chain, wrong event; unreadable chain; no answer at all."""

    def change(slot, i, record, chain, bare):
        if slot != "ave":
            return chain + bare
        other = "bell" if record["event"] != "bell" else "drum"
        lie = f"i hear nothing . i hear a {record['event']} . "
        return (chain + bare, bare, lie + bare, chain + bare.replace(record["event"], other), "what is it ? " + bare, chain)[i]

    predict(root, tmp_path, change)
    table = go(root, tmp_path)
    got = values(table)
    # the fourth is graded by its background seconds alone
    background = [10 - r["end_time"] + r["start_time"] for r in records.read(root, "ave", "test")][3]
    right = 1 + (background >= 5)
    assert got[faith.RIGHT] == pytest.approx(right / 6) and got[faith.LUCKY] == pytest.approx(3 / 6)
    assert got[faith.WRONG] == pytest.approx(1 - right / 6 - 3 / 6)
    # statements: 3 + 0 + 2 + 3 + 1 + 3, of which one is false and one unreadable
    assert got[faith.COUNT] == pytest.approx(12 / 6)
    assert got[faith.TRUE] == pytest.approx(10 / 12) and got[faith.UNREADABLE] == pytest.approx(1 / 12)
    low, high = values(table, column="low"), values(table, column="high")
    assert (low <= got).all() and (got <= high).all() and low[faith.TRUE] < high[faith.TRUE]
    grid = faith.faithfulness_grid(table)
    assert grid.loc["ave", (RUN.family, faith.LUCKY)] == 0.5
    assert grid.loc["mean", (RUN.family, faith.LUCKY)] == 0.25
    said = faith.judged(root, tmp_path, RUN, ["ave"], each=3)
    assert said["verdict"].tolist() == ["true"] * 3 + ["false", "true"]
    assert said["id"].tolist() == ["ave/test/00000"] * 3 + ["ave/test/00002"] * 2


def test_nothing_said(root, tmp_path):
    predict(root, tmp_path, lambda slot, i, record, chain, bare: bare)
    table = go(root, tmp_path)
    got = values(table)
    assert got[faith.LUCKY] == 1 and got[faith.COUNT] == 0 and np.isnan(got[faith.TRUE])
    faithfulness_bars(table, tmp_path / "a.png")
    faith.faithfulness_grid(table)


def test_bare_runs_and_real_data_have_none(root, tmp_path):
    bare = Run("joint", "lora", "bare")
    predict(root, tmp_path, lambda slot, i, record, chain, bare: bare, bare)
    table = go(root, tmp_path, [bare])
    assert table.empty and list(table.columns) == faith.COLUMNS
    assert faith.faithfulness([RUN], SLOTS, tmp_path, tmp_path, pd.DataFrame()).empty
    assert faith.judged(tmp_path, tmp_path, RUN, SLOTS).empty
    assert faith.faithfulness_grid(table).empty
    faithfulness_bars(table, tmp_path / "none.png")


def test_missing_is_an_error(root, tmp_path):
    predict(root, tmp_path, lambda slot, i, record, chain, bare: chain + bare)
    _, samples = score.score_all([RUN], SLOTS, root, tmp_path, tmp_path / "scores", resamples=20)
    with pytest.raises(ValueError, match="score of 1 of 6 samples is missing.*ave/test/00000"):
        faith.faithfulness([RUN], SLOTS, root, tmp_path, samples[1:])
    file = tmp_path / RUN.name / "ave.jsonl"
    file.write_text("".join(file.read_text().splitlines(True)[:-1]))
    with pytest.raises(ValueError, match="joint-ilora-explicit, ave: prediction of 1 of 6.*ave/test/00005"):
        faith.faithfulness([RUN], SLOTS, root, tmp_path, samples)
    file.unlink()
    with pytest.raises(ValueError, match="no such prediction file"):
        faith.faithfulness([RUN], SLOTS, root, tmp_path, samples)


@pytest.mark.parametrize("slot, scores, right", [
    ("ave", [0, 0.4, 0.5, 1], [0, 0, 1, 1]), ("s4", [0.49, 0.5], [0, 1]), ("avvp", [0.5], [1]), ("ks", [0, 1], [0, 1]),
    # a right answer's share of weighted F1 is small where its class is predicted too often
    ("meld", [0, 0.3, 1.4], [0, 1, 1]),
])
def test_what_is_right(slot, scores, right):
    assert faith.is_right(slot, scores).tolist() == [bool(r) for r in right]


def test_every_graded_metric_is_known():
    graded = {tasks.get_slot(s).metric for s in tasks.BENCHMARKS} - {"accuracy", "WAR", "weighted_f1", "ciou"}
    assert graded == set(faith.GRADED)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_shares_add_up(rows):
    right = np.array([r for r, *_ in rows])
    found = np.array([(t, u, t + u + f) for _, t, u, f in rows])
    got = {row["measure"]: row for row in faith.measures(right[None], found[None], found[None], 50, 0)}
    assert sum(got[s]["value"] for s in faith.SHARES) == pytest.approx(1)
    assert got[faith.RIGHT]["value"] == pytest.approx(np.mean([r and u == f == 0 < t for r, t, u, f in rows]))
    assert got[faith.WRONG]["value"] == pytest.approx(np.mean(~right))
    for row in got.values():
        assert np.isnan(row["value"]) or row["low"] - 1e-9 <= row["high"]


def test_interval_of_a_ratio():
    """Against the delta method: one statement an answer, so the ratio is a plain share."""
    true = np.repeat([1, 0], [700, 300])
    found = np.stack([true, 0 * true, np.ones_like(true)], 1)
    row = {r["measure"]: r for r in faith.measures(true[None] > 0, found[None], found[None], 4000, 0)}[faith.TRUE]
    error = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    assert row["low"] == pytest.approx(0.7 - error, abs=0.004) and row["high"] == pytest.approx(0.7 + error, abs=0.004)


def test_seeds_that_differ_widen_the_interval():
    """Two seeds, right on .9 and .5 of the same 400 samples: Student's t with one degree of freedom, by scipy."""
    right = np.stack([np.arange(400) < 360, np.arange(400) < 200])
    found = np.ones((2, 400, 3), int)
    row = {r["measure"]: r for r in faith.measures(right, found, found, 20000, 0)}[faith.WRONG]
    assert row["value"] == pytest.approx(0.3) and row["seeds"] == 2 and row["n"] == 400
    half = stats.t.ppf(0.975, 1) * np.std([0.1, 0.5], ddof=1) / 2**0.5
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.1)


def test_figure(root, tmp_path):
    predict(root, tmp_path, lambda slot, i, record, chain, bare: (chain if i % 2 else "i hear nothing . ") + bare)
    figure = faithfulness_bars(go(root, tmp_path), tmp_path / "sub" / "a.png")
    assert figure.get_suptitle() and figure.axes[0].get_title() == RUN.family
    faithfulness_bars(pd.read_csv(tmp_path / "faithfulness.csv"), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
