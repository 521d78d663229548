"""Routing and features of a small trained adapter; their formulas against hand-worked values."""

import numpy as np
import pandas as pd
import pytest
import torch

from crab.analyses import features, routing
from crab.ilora import record_routing, routing_entropy
from crab.models.batches import batch
from crab.models.checkpoint import load_base
from crab.samples.reading import read_slot
from crab.study.answer import answer, load_adapter
from crab.study.train import train

SLOTS = ("ks", "cremad")


@pytest.fixture(scope="module")
def adapter(encoded, base, tmp_path_factory):
    pairs = [pair for slot in SLOTS for pair in read_slot(encoded, slot, "train").answered("bare")]
    options = {"r": 2, "lora_alpha": 4, "num_heads": 3, "router_init_std": 0.5}
    folder = tmp_path_factory.mktemp("w")
    return train(pairs, "ilora", options, base, folder, learning_rate=1e-2, passes=1, batch_size=8, seed=0)


def test_information_is_the_mean_over_layers():
    rows = [(slot, layer, "text", head, weight) for slot, first in (("a", (1.0, 0.5)), ("b", (0.0, 0.5)))
            for layer in (0, 1) for head, weight in enumerate((first[layer], 1 - first[layer]))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["slot", "layer", "segment", "head", "weight"])
    assert routing.information(table) == {"text": pytest.approx(0.5)}  # layer 0 tells all, layer 1 nothing


def test_routing_table(adapter, encoded, base):
    table = routing.routing(adapter, encoded, base, SLOTS, samples=8, max_new_tokens=4, batch_size=3)
    assert list(table) == ["slot", "layer", "segment", "head", "weight", "entropy", "tokens"]
    assert np.allclose(table.groupby(["slot", "layer", "segment"])["weight"].sum(), 1) and set(table["head"]) == {
        0,
        1,
        2,
    }
    assert list(table["segment"].unique()) == ["text", "video", "audio", "answer"] and set(table["layer"]) == {0, 1}
    # 4 samples with 2 video tokens each, through the 7 modules of a layer
    assert set(table.loc[table["segment"] == "video", "tokens"]) == {4 * 2 * 7}
    assert table["entropy"].between(0, 1).all()


def test_routing_agrees_with_one_sample_at_a_time(adapter, encoded, base):
    """Padding does not leak into the means."""
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    samples = list(read_slot(encoded, "ks", "test"))[:3]
    table = routing.record_slot(model, processor.tokenizer, samples, 3, 4).set_index(["layer", "segment", "head"])
    weights, entropies = [], []
    for sample, text in zip(samples, answer(model, processor.tokenizer, samples, 3, 4), strict=True):
        inputs = batch(model, processor.tokenizer, [sample], [text])
        with record_routing(model) as recorded, torch.no_grad():
            model(**{k: inputs[k] for k in ("inputs_embeds", "attention_mask", "position_ids")})
        video = [w[0][0, :2] for name, w in recorded.items() if ".layers.1." in name]
        weights += [w[:, 2].mean().item() for w in video]
        entropies += [(routing_entropy(w) / np.log2(3)).mean().item() for w in video]
    row = table.loc[1, "video", 2]
    assert (row["weight"], row["entropy"]) == pytest.approx((np.mean(weights), np.mean(entropies)), abs=1e-6)


def test_features(adapter, encoded, base):
    models = {"base": None, "I-LoRA": adapter}
    table, silhouettes = features.features(models, encoded, base, SLOTS, samples=16, neighbours=4, seed=0)
    assert table.groupby("model", sort=False).size().to_dict() == {"base": 16, "I-LoRA": 16}
    assert table.groupby("slot")["family"].agg(set).to_dict() == {
        "ks": {"action recognition"},
        "cremad": {"emotion recognition"},
    }
    assert np.isfinite(table[["x", "y"]].to_numpy()).all()
    assert list(silhouettes.index) == list(models) and silhouettes["by slot"].between(-1, 1).all()
    assert (silhouettes["by slot"] == silhouettes["by family"]).all()  # each slot is a family of its own


def test_the_same_seed_gives_the_same_map():
    states = np.random.default_rng(0).normal(size=(16, 8))
    assert (features.plane(states, 4, 0) == features.plane(states, 4, 0)).all()
    with pytest.raises(ValueError, match="features: 4 samples are too few for a map; raise features.samples"):
        features.plane(states[:4], 3, 0)


def test_hidden_does_not_depend_on_padding(encoded, base):
    model, processor = load_base(base)
    samples = list(read_slot(encoded, "ks", "test"))
    together, alone = (features.hidden(model, processor.tokenizer, samples, size) for size in (8, 1))
    assert np.allclose(together, alone, atol=1e-5)


def test_silhouette_by_hand():
    states = np.array([[0.0], [1.0], [10.0], [11.0]])
    # a = 1 for all; b = 10.5, 9.5, 9.5, 10.5
    assert features.silhouette(states, list("aabb")) == pytest.approx(np.mean([1 - 1 / 10.5, 1 - 1 / 9.5]))
    assert np.isnan([features.silhouette(states, list(labels)) for labels in ("aaaa", "abcd")]).all()


def test_a_dot_is_the_mean_over_the_tokens_and_modules_of_its_sample(adapter, encoded, base):
    """One sample at a time, without padding; samples of different length share batches."""
    table = routing.dots(adapter, encoded, base, SLOTS, samples=10, max_new_tokens=4, batch_size=3)
    assert list(table) == ["slot", "family", "id", "head 1", "head 2", "head 3"]
    assert table["slot"].tolist() == ["ks"] * 5 + ["cremad"] * 5 and table["family"][9] == "emotion recognition"
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    data = read_slot(encoded, "cremad", "test")
    for row in table.iloc[5:].itertuples():
        samples = [data[data.ids.index(row.id)]]
        (text,) = answer(model, processor.tokenizer, samples, 1, 4)
        inputs = batch(model, processor.tokenizer, samples, [text])
        with record_routing(model) as recorded, torch.no_grad():
            model(**{k: inputs[k] for k in ("inputs_embeds", "attention_mask", "position_ids")})
        expected = torch.stack([weights[0][0].mean(0) for weights in recorded.values()]).mean(0)
        assert list(row)[4:] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(table["head 1"])) == 10
