"""Figures are drawn from small tables, with titles and units, and the same table gives the same file."""

from itertools import combinations

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")

from crab.study.figures.features import feature_maps  # noqa: E402
from crab.study.figures.gates import encoder_curves, gate_bars, gate_table, skill_curves  # noqa: E402
from crab.study.figures.losses import loss_curves  # noqa: E402
from crab.study.figures.mechanism import conflict_maps, head_costs, head_likeness, mechanism_bars, swap_map  # noqa: E402
from crab.study.figures.routing import entropy_lines, routing_heatmaps  # noqa: E402
from crab.study.figures.scores import score_bars  # noqa: E402
from crab.study.figures.sweep import sweep_lines  # noqa: E402
from crab.study.figures.transfer import rate_bars, transfer_bars  # noqa: E402

SCORES = {
    f"{setting}-lora-bare": {"ave": {"score": v, "low": v - 0.1, "high": v + 0.1, "chance": 0.3, "unparsable": 0}, "mean": v}
    for setting, v in (("single", 0.5), ("joint", 0.6))
}
TRANSFER = pd.DataFrame(
    [("j vs s", "ave", 0.1, 0.0, 0.2, False, "gain"), ("j vs s", "ks", -0.1, -0.3, 0.0, True, "loss")],
    columns=["comparison", "slot", "difference", "low", "high", "at_chance", "verdict"],
)
ROUTING = pd.DataFrame(
    [(s, layer, seg, h, (0.4, 0.6)[h], 0.9, 5) for s in ("ave", "ks") for layer in range(5) for seg in ("text", "audio") for h in (0, 1)],
    columns=["slot", "layer", "segment", "head", "weight", "entropy", "tokens"],
)  # fmt: skip
FEATURES = pd.DataFrame(
    [(m, s, f, i, i * 0.3) for m in ("base", "ilora") for s, f in (("ave", "time"), ("ks", "action")) for i in range(4)],
    columns=["model", "slot", "family", "x", "y"],
)
POINTS = pd.DataFrame(
    [(s, rate, v, v - 0.1, v + 0.1, v == 0.5) for s in ("single-bare", "joint-bare") for rate, v in ((1e-3, 0.4), (2e-3, 0.5))],
    columns=["setting", "rate", "score", "low", "high", "chosen"],
)
RATES = {
    "joint-lora-bare": {
        "positive_rate": 0.25, "positive_rate_interval": [0.1, 0.5], "negative_rate": 0.5, "negative_rate_interval": [0.3, 0.7],
        "clear_gain": 1, "clear_loss": 0, "slots_counted": 4,
    },
    "joint-ilora-bare": {"positive_rate": None},
}  # fmt: skip
PAIRS = pd.DataFrame(
    [(m, "end", "all", a, b, 0.3) for m in ("lora", "ilora") for a, b in (("ave", "ave"), ("ave", "ks"), ("ks", "ks"))],
    columns=["method", "point", "part", "one", "other", "cosine"],
)
CONFLICT = pd.DataFrame(
    [("lora", point, "all", 0.1, 0.0, 0.2, r) for point, r in (("start", 0.9), ("half-way", 0.8), ("end", 0.1))],
    columns=["method", "point", "part", "cosine", "cosine_low", "cosine_high", "reliability"],
)
EFFECTS = pd.DataFrame(
    [(s, c, of, 0.4, 0.1) for s in ("ave", "ks") for c, of in (("head off", "0"), ("uniform routing", ""), ("routing of", "ks"))],
    columns=["slot", "change", "of", "cost", "exact"],
)
COST = {"cost": {name: {"mean": 0.4, "low": 0.3, "high": 0.5} for name in ("adapter off", "head 0 off", "uniform routing")}}
HEADS = pd.DataFrame(
    [(f"layers.{k}.mlp.up_proj", 0, 1, 0.2, 0.3, 0.1) for k in (0, 1)],
    columns=["module", "one", "other", "cosine", "overlap", "overlap_by_chance"],
)
LOSSES = [{"run": "single-lora-bare-ks", "steps": 10, "passes": 2, "loss": [[5, 1.0], [10, 0.5]]}]


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        (score_bars, SCORES), (transfer_bars, TRANSFER), (routing_heatmaps, ROUTING), (entropy_lines, ROUTING),
        (sweep_lines, POINTS), (sweep_lines, POINTS[:0]),
        (feature_maps, FEATURES), (loss_curves, LOSSES), (rate_bars, RATES), (head_costs, EFFECTS), (swap_map, EFFECTS),
        (head_likeness, HEADS), (lambda t, path: conflict_maps(t, "end", path), PAIRS), (lambda t, path: mechanism_bars(COST, t, path), CONFLICT),
    ],
)  # fmt: skip
def test_draws(draw, table, tmp_path):
    figure = draw(table, tmp_path / "sub" / "a.png")
    axes = [a for a in figure.axes if a.get_visible()]
    assert figure.get_suptitle() or any(a.get_title() for a in axes)
    assert any(a.get_xlabel() or a.get_ylabel() for a in axes)
    first = (tmp_path / "sub" / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    draw(table, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == first
    assert len(list(tmp_path.rglob("*"))) == 3  # no temporary file is left


def test_no_rival_is_said_in_place_of_bars(tmp_path):
    assert [axes.get_title() for axes in transfer_bars(TRANSFER[:0], tmp_path / "a.png").axes] == ["nothing to compare with"]


def test_rates_stand_beside_the_papers(tmp_path):
    axes = rate_bars(RATES, tmp_path / "a.png").axes[0]
    bars = {label.get_text(): place for place, label in enumerate(axes.get_yticklabels())}
    lengths = {round(bar.get_y() + bar.get_height() / 2): [] for bar in axes.patches}
    for bar in axes.patches:
        lengths[round(bar.get_y() + bar.get_height() / 2)].append(round(bar.get_width(), 3))
    assert lengths[bars["paper: joint LoRA"]] == [-0.55] and lengths[bars["paper: Crab+"]] == [0.88]
    assert sorted(lengths[bars["joint-lora-bare"]]) == [-0.5, 0, 0.25, 0.25]  # shares, and the clear part of each
    assert "no slot above chance" in [text.get_text() for text in axes.texts]


def test_a_skill_is_drawn_in_the_panel_of_the_stage_that_teaches_it(tmp_path):
    history = [
        {"step": 10, "stage": "text", "loss": 2.0, "copy": 0.5},
        {"step": 20, "stage": "presence", "loss": 1.0, "copy": 0.75, "heard": 0.25},
        {"step": 30, "stage": "presence", "loss": 1.0, "copy": 1.0, "heard": 0.5},
    ]
    first, second = skill_curves(history, tmp_path / "a.png").axes
    assert (first.get_title(), second.get_title()) == ("text", "presence")
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["copy"]
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["heard"]
    drawn = [line.get_ydata().tolist() for line in first.lines if len(line.get_ydata()) == 3]
    assert drawn == [[0.5, 0.75, 1.0]]


def test_a_base_that_was_not_trained_has_figures_that_say_so(tmp_path):
    for draw, empty in ((encoder_curves, {}), (skill_curves, [])):
        assert "Nothing was trained here" in draw(empty, tmp_path / "a.png").axes[0].get_title()
    assert "Nothing was trained here" in gate_bars({}, {}, tmp_path / "a.png").axes[0].get_title()
    assert list(gate_table({}, {})) == ["skill", "accuracy", "gate", "majority", "picker", "n"]


def test_names_of_slots_do_not_cover_each_other(tmp_path):
    rows = [("base", slot, "emotion", f"{slot}{i}", 1.0, i / 9) for slot in ("meld", "cremad", "mafw", "dfew") for i in range(3)]
    figure = feature_maps(pd.DataFrame(rows, columns=["model", "slot", "family", "id", "x", "y"]), tmp_path / "maps.png")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4 and not any(one.overlaps(other) for one, other in combinations(boxes, 2))
