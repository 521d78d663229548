"""Figures are drawn from small tables, with titles and units, and the same table gives the same file."""

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")

from crab.study.figures.features import feature_maps  # noqa: E402
from crab.study.figures.losses import loss_curves  # noqa: E402
from crab.study.figures.routing import entropy_lines, routing_heatmaps  # noqa: E402
from crab.study.figures.scores import score_bars  # noqa: E402
from crab.study.figures.sweep import sweep_lines  # noqa: E402
from crab.study.figures.transfer import transfer_bars  # noqa: E402

SCORES = pd.DataFrame(
    [("single-lora-bare", s, True, v, v - 0.1, v + 0.1, 0.3) for s, v in (("ave", 0.5), ("ks", 0.8))]
    + [("joint-lora-bare", "ave", True, 0.6, 0.5, 0.7, 0.3), ("joint-lora-bare", "ave", False, 0.1, None, None, None)],
    columns=["family", "slot", "primary", "value", "low", "high", "chance"],
)
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
LOSSES = [{"run": "a", "steps": 10, "passes": 2, "loss": [[5, 1.0], [10, 0.5]]}]


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        (score_bars, SCORES), (transfer_bars, TRANSFER), (routing_heatmaps, ROUTING), (entropy_lines, ROUTING),
        (feature_maps, FEATURES), (loss_curves, LOSSES), (sweep_lines, POINTS), (sweep_lines, POINTS[:0]),
    ],
)  # fmt: skip
def test_draws(draw, table, tmp_path):
    figure = draw(table, tmp_path / "sub" / "a.png")
    axes = [a for a in figure.axes if a.get_visible()]
    assert figure.get_suptitle() or any(a.get_title() for a in axes)
    assert any(a.get_xlabel() for a in axes)
    first = (tmp_path / "sub" / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    draw(table, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == first
    assert len(list(tmp_path.rglob("*"))) == 3  # no temporary file is left
