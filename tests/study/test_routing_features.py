"""Routing and features of a tiny trained adapter; their formulas against hand-worked values."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from crab.ilora import record_routing, routing_entropy, routing_information
from crab.study import features, routing, train
from crab.study.dataset import batch, load_base, read_slot
from crab.study.predict import answer, load_adapter
from crab.study.runs import Run
from crab.study.spread import spread

SLOTS = ("ks", "cremad")


@pytest.fixture(scope="module")
def adapter(encoded, base, tmp_path_factory):
    section = {"r": 2, "lora_alpha": 4, "num_heads": 3, "learning_rate": 1e-2, "router_init_std": 0.5}
    return train.train_run(Run("joint", "ilora", "bare"), section, encoded, base, tmp_path_factory.mktemp("w"), SLOTS, 1, 8)


def test_entropy_and_information_by_hand():
    def entropy(weights):
        weights = torch.tensor(weights, dtype=torch.float64)
        return routing.share_of_maximum(routing_entropy(weights), weights.shape[-1]).numpy()

    def mutual_information(gates):
        return routing_information(torch.tensor(gates))

    assert entropy([[1, 0], [0.5, 0.5]]).tolist() == [0, 1]
    assert entropy(np.full((2, 3), 1 / 3)) == pytest.approx(1)
    assert entropy([[0.25, 0.75]])[0] == pytest.approx(0.811278, abs=1e-6)
    assert entropy([[1.0]]).tolist() == [0]
    assert mutual_information([[1, 0], [0, 1]]) == pytest.approx(1)
    assert mutual_information([[0.3, 0.7], [0.3, 0.7]]) == pytest.approx(0)
    assert mutual_information(np.eye(4)) == pytest.approx(2)
    # binary symmetric channel of error 1/4 with even input: 1 - H(1/4)
    assert mutual_information([[0.75, 0.25], [0.25, 0.75]]) == pytest.approx(1 - 0.811278, abs=1e-6)


def test_findings_by_hand():
    summary = {"mean_entropy": 0.5, "head_weight": [0.2, 0.8], "slot_head_information_bits": {"text": 0.25, "video": 0.0}}
    said = routing.finding(summary, Run("joint", "ilora", "explicit"))
    assert said.startswith("In `joint-ilora-explicit` a token") and "50% of the most entropy" in said and "20% to 80% of all weight (even: 50%)" in said
    assert "at most 0.250 bits about its slot (text; of 1.00 that 2 heads" in said
    assert routing.information_table(summary).to_numpy().tolist() == [["text", 0.25], ["video", 0.0]]
    near, far, none = ({"silhouette_slot": v, "silhouette_family": None} for v in (0.1, 0.4, None))
    assert "farthest apart in `far`, least in `near`" in features.finding({"near": near, "far": far})
    assert "too few samples" in features.finding({"base": none})


def test_what_is_said_of_all_tokens_weighs_each_alike():
    rows = [("a", 0, "text", 0, 0.9, 0.2, 10), ("a", 0, "text", 1, 0.1, 0.2, 10), ("a", 0, "video", 0, 0.4, 0.6, 30), ("a", 0, "video", 1, 0.6, 0.6, 30)]
    summary = routing.summarise(pd.DataFrame(rows, columns=routing.COLUMNS))
    assert summary["mean_entropy"] == 0.5  # (10 x .2 + 30 x .6) / 40
    assert summary["head_weight"] == [0.525, 0.475]  # (10 x .9 + 30 x .4) / 40


def test_layer_names():
    assert routing.layer_of("model.language_model.layers.11.mlp.up_proj") == 11
    with pytest.raises(ValueError, match="lm_head"):
        routing.layer_of("lm_head")


def test_routing_table(adapter, encoded, base, tmp_path):
    table, summary = routing.routing(adapter, encoded, base, SLOTS, tmp_path, samples=8, batch_size=3, max_new_tokens=4)
    sums = table.groupby(["slot", "layer", "segment"])["weight"].sum()
    assert np.allclose(sums, 1) and set(table["head"]) == {0, 1, 2}
    assert set(table["segment"]) == {"text", "video", "audio", "answer"} and set(table["layer"]) == {0, 1}
    # 4 samples with 2 video tokens each, through the 7 modules of a layer
    assert set(table.loc[table["segment"] == "video", "tokens"]) == {4 * 2 * 7}
    assert table["entropy"].between(0, 1).all()
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    assert len(pd.read_csv(tmp_path / "routing.csv")) == len(table)


def test_routing_agrees_with_one_sample_at_a_time(adapter, encoded, base):
    """Padding must not leak into the means."""
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    samples = read_slot(encoded, "ks", "test").samples[:3]
    rows = routing.record_slot(model, processor.tokenizer, samples, 3, 4)
    found = next(r["weight"] for r in rows if (r["layer"], r["segment"], r["head"]) == (1, "video", 2))
    texts = answer(model, processor.tokenizer, samples, 3, 4)
    values = []
    for sample, text in zip(samples, texts):
        made = batch(model, processor.tokenizer, [sample], [text])
        with record_routing(model) as recorded, torch.no_grad():
            model(**{k: made[k] for k in ("inputs_embeds", "attention_mask", "position_ids")})
        values += [w[0][0, :2, 2].mean().item() for name, w in recorded.items() if ".layers.1." in name]
    assert found == pytest.approx(np.mean(values), abs=1e-6)


def test_features(adapter, encoded, base, tmp_path):
    args = ({"joint-ilora-bare": adapter}, encoded, base, SLOTS, {"ks": "action", "cremad": "emotion"})
    table, summary = features.features(*args, tmp_path, samples=16, neighbours=4)
    assert table.groupby("model").size().to_dict() == {"base": 16, "joint-ilora-bare": 16}
    assert np.isfinite(table[["x", "y"]].to_numpy()).all()
    assert set(summary) == {"base", "joint-ilora-bare"} and -1 <= summary["base"]["silhouette_slot"] <= 1
    assert len(pd.read_csv(tmp_path / "features.csv")) == 32


def test_same_seed_same_map():
    states = np.random.default_rng(0).normal(size=(16, 8))
    assert (features.plane(states, 4, 0) == features.plane(states, 4, 0)).all()


def test_hidden_does_not_depend_on_padding(encoded, base):
    model, processor = load_base(base)
    samples = read_slot(encoded, "ks", "test").samples
    together = features.hidden(model, processor.tokenizer, samples, 8)
    alone = features.hidden(model, processor.tokenizer, samples, 1)
    assert np.allclose(together, alone, atol=1e-5)


def test_silhouette_by_hand():
    states = np.array([[0.0], [1.0], [10.0], [11.0]])
    # a = 1 for all; b = 10.5, 9.5, 9.5, 10.5
    assert features.silhouette(states, list("aabb")) == pytest.approx(np.mean([1 - 1 / 10.5, 1 - 1 / 9.5]), abs=1e-4)
    assert features.silhouette(states, list("aaaa")) is None
    with pytest.raises(ValueError, match="too few"):
        features.plane(states, 3, 0)


def test_spread():
    assert spread(10, 3) == [0, 4, 9] and spread(3, 10) == [0, 1, 2] and spread(5, 1) == [0]
    with pytest.raises(ValueError):
        spread(0, 1)
