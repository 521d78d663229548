"""Gradient conflict against planted gradients and plain backward passes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from crab.study import conflict, train
from crab.study.dataset import batch, load_base, read_slot
from crab.study.predict import load_adapter
from crab.study.runs import Run

SLOTS = ("ks", "cremad")
SECTION = {"r": 2, "lora_alpha": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def adapters(encoded, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("w")
    return {
        method: train.train_run(Run("joint", method, "bare"), SECTION | extra, encoded, base, folder / method, SLOTS, 1, 8)
        for method, extra in (("lora", {}), ("ilora", {"num_heads": 3}))
    }


def products(chunks):
    """[slots, chunks, numbers] -> inner products."""
    return np.einsum("scn,ten->scte", *2 * [np.asarray(chunks, float)])


def test_cosines_by_hand():
    # mean gradients (1, 0), (1, 1), (-2, 0), each without noise
    found = conflict.cosines(products([[[1, 0]] * 2, [[1, 1]] * 2, [[-2, 0]] * 2]))
    half = 0.5**0.5
    assert found == pytest.approx(np.array([[1, half, -1], [half, 1, -half], [-1, -half, 1]]))


def test_reliability_is_what_other_samples_would_show():
    # chunks (3, 4) and (3, -4): mean (3, 0) of squared length 9, products of different chunks 9 - 16 = -7
    assert conflict.cosines(products([[[3, 4], [3, -4]]]))[0, 0] == pytest.approx(-7 / 9)
    rng = np.random.default_rng(0)
    # 8 chunks of signal 1 and noise of squared length 8: half of the mean's squared length is signal
    noisy = np.r_[1, np.zeros(4000)] + rng.normal(0, (8 / 4000) ** 0.5, (1, 8, 4001))
    assert conflict.cosines(products(noisy))[0, 0] == pytest.approx(0.5, abs=0.1)


def test_planted_conflict_is_clear_and_noise_is_not():
    rng = np.random.default_rng(0)
    pull = np.array([[1, 0], [-1, 0.2], [0, 1]])
    chunks = np.concatenate([np.repeat(pull[:, None], 8, 1), rng.normal(0, 0.05, (3, 8, 50))], 2)
    draws = conflict.pair_draws(products(chunks), 1000, 0)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert high[0] < -0.8 and low[0] > -1.2  # slots 0 and 1
    noise = conflict.pair_draws(products(rng.normal(size=(6, 8, 200))), 1000, 0)
    low, high = np.quantile(noise, [0.025, 0.975], axis=0)
    assert ((low < 0) & (high > 0)).sum() >= 12  # of 15


def test_pairs_are_those_of_triu_indices():
    chunks = np.repeat(np.random.default_rng(1).normal(size=(4, 1, 6)), 3, 1)
    draws = conflict.pair_draws(products(chunks), 20, 0)
    assert draws == pytest.approx(np.tile(conflict.cosines(products(chunks))[np.triu_indices(4, 1)], (20, 1)))


def test_sketch_keeps_inner_products():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 60_000, generator=draw)
    other = other + 0.5 * one
    assert torch.equal(conflict.sketch({"a": one[:10], "b": one[10:]}), one)
    small = [conflict.sketch({"a": v[:100], "b": v[100:].view(-1, 100)}, 8192) for v in (one, other)]
    assert [len(v) for v in small] == [8192, 8192]
    exact = torch.nn.functional.cosine_similarity(one, other, dim=0)
    assert float(torch.nn.functional.cosine_similarity(*small, dim=0)) == pytest.approx(float(exact), abs=5 / 8192**0.5)


@pytest.mark.parametrize("method", ["lora", "ilora"])
def test_products_agree_with_plain_backward_passes(method, adapters, encoded, base):
    model, processor = load_base(base)
    model = load_adapter(model, adapters[method])
    data = {slot: read_slot(encoded, slot, "train").answered("bare")[:4] for slot in SLOTS}
    found = conflict.gradient_products(model, processor.tokenizer, data, 2)
    gradients = {}
    for slot, pairs in data.items():
        model.zero_grad()
        for sample, text in pairs:
            made = batch(model, processor.tokenizer, [sample], [text])
            logits = model(**{k: made[k] for k in ("inputs_embeds", "attention_mask", "position_ids")}).logits
            for place in range(1, made["labels"].shape[1]):
                if made["labels"][0, place] >= 0:
                    (-logits[0, place - 1].log_softmax(-1)[made["labels"][0, place]]).backward(retain_graph=True)
        gradients[slot] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    dot = sum((gradients["ks"][n] * gradients["cremad"][n]).sum() for n in gradients["ks"])
    assert found["all"].sum((1, 3))[0, 1] == pytest.approx(dot.item(), rel=1e-3)
    assert found["all"] == pytest.approx(sum(v for k, v in found.items() if k != "all"))
    if method == "lora":
        assert set(found) == {"all", "A", "B"}
    else:
        assert set(found) == {"all", "A", "router", "head 0", "head 1", "head 2"}
        columns = [g[:, 2:4] for n, g in gradients["ks"].items() if "ilora_B" in n]  # rank 2: the second head's
        assert found["head 1"].sum((1, 3))[0, 0] == pytest.approx(sum((c**2).sum() for c in columns).item(), rel=1e-3)


def test_part_way_ends_at_the_trained_adapter_and_starts_at_the_base(adapters, encoded, base):
    model, processor = load_base(base)
    made = batch(model, processor.tokenizer, read_slot(encoded, "ks", "test").samples[:3])
    inputs = {k: made[k] for k in ("inputs_embeds", "attention_mask", "position_ids")}
    with torch.no_grad():  # at the last token: what stands in the padding differs by attention's implementation
        plain = model(**inputs).logits[:, -1]
        trained = load_adapter(model, adapters["ilora"])(**inputs).logits[:, -1]
        end, _ = conflict.part_way(base, adapters["ilora"], 1.0)
        assert torch.allclose(end(**inputs).logits[:, -1], trained, atol=1e-4) and not torch.allclose(plain, trained, atol=1e-2)
        start, _ = conflict.part_way(base, adapters["ilora"], 0.0)
        assert torch.allclose(start(**inputs).logits[:, -1], plain, atol=1e-4)
    half = conflict.unfrozen_parameters(conflict.part_way(base, adapters["ilora"], 0.5)[0])
    ends = [conflict.unfrozen_parameters(m) for m in (start, end)]
    assert all(torch.allclose(p, (ends[0][n] + ends[1][n]) / 2, atol=1e-6) for n, p in half.items())


def test_conflicts(adapters, encoded, base):
    pairs, summary, drawn = conflict.conflicts(adapters, encoded, base, samples=8, chunk=2, resamples=50)
    assert set(summary["point"]) == set(conflict.POINTS) and set(summary["method"]) == {"lora", "ilora"}
    start = summary[summary["point"] == "start"]
    assert set(start["part"]) == {"all", "B", "head 0", "head 1", "head 2"}  # B is 0: nothing else has a gradient
    assert (summary["negative"].between(summary["negative_low"], summary["negative_high"])).all()
    one = pairs[(pairs["method"] == "lora") & (pairs["point"] == "end") & (pairs["part"] == "all")]
    assert [(a, b) for a, b in zip(one["one"], one["other"])] == [("ks", "cremad"), ("ks", "ks"), ("cremad", "cremad")]
    assert drawn["lora", "end", "all"].shape == (50, 1)


def test_refusals(adapters, encoded, base, tmp_path):
    with pytest.raises(ValueError, match="no LoRA or I-LoRA parameters; give a folder of the train stage"):
        conflict.unfrozen_parameters(load_base(base)[0])
    with pytest.raises(ValueError, match="3 samples a slot are fewer than two chunks of 2; raise gradient_samples"):
        conflict.read_pairs(encoded, SLOTS, "bare", 3, 2)
    for name, slots in (("a", ["ks"]), ("b", ["cremad"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"slots": slots}))
    with pytest.raises(ValueError, match="trained on different slots"):
        conflict.conflicts({"lora": tmp_path / "a", "ilora": tmp_path / "b"}, encoded, base)


def test_last_reliable_point():
    rows = [("lora", "start", 0.9), ("lora", "half-way", 0.8), ("lora", "end", 0.1), ("ilora", "start", 0.9), ("ilora", "half-way", 0.4), ("ilora", "end", 0.9)]
    table = pd.DataFrame(rows, columns=["method", "point", "reliability"]).assign(part="all")
    assert conflict.last_reliable(table, ["lora"]) == "half-way"
    assert conflict.last_reliable(table, ["lora", "ilora"]) == "start"
    assert conflict.last_reliable(table.assign(reliability=0.2), ["lora"]) is None
