"""Gradient conflict against planted gradients and plain backward passes."""

import numpy as np
import pandas as pd
import pytest
import torch

from crab.analyses import gradients
from crab.models.batches import batch
from crab.models.checkpoint import load_base
from crab.samples.reading import read_slot
from crab.study.answer import load_adapter
from crab.study.train import train

SLOTS = ("ks", "cremad")
INPUTS = ("inputs_embeds", "attention_mask", "position_ids")
HEADS = {"head 1", "head 2", "head 3"}


@pytest.fixture(scope="module")
def adapters(encoded, base, tmp_path_factory):
    """A folder with the adapters of two joint cells."""
    folder = tmp_path_factory.mktemp("w")
    pairs = [pair for slot in SLOTS for pair in read_slot(encoded, slot, "train").answered("bare")]
    for method, extra in (("lora", {}), ("ilora", {"num_heads": 3})):
        options = {"r": 2, "lora_alpha": 4, **extra}
        train(pairs, method, options, base, folder / method, learning_rate=1e-2, passes=1, batch_size=8, seed=0)
        (folder / f"joint-{method}-bare").symlink_to(folder / method / "adapter")
    return folder


def products(chunks):
    """[slots, chunks, numbers] -> inner products."""
    return np.einsum("scn,ten->scte", *2 * [np.asarray(chunks, float)])


def cosines(chunks, resamples=1):
    return gradients.cosines(products(chunks), resamples, seed=0)


def test_cosines_and_reliability_by_hand():
    # mean gradients (1, 0), (1, 1), (-2, 0), each without noise
    table, draws = cosines([[[1, 0]] * 2, [[1, 1]] * 2, [[-2, 0]] * 2], resamples=20)
    half = 0.5**0.5
    assert table == pytest.approx(np.array([[1, half, -1], [half, 1, -half], [-1, -half, 1]]))
    assert draws == pytest.approx(np.tile([half, -1, -half], (20, 1)))  # pairs as in triu_indices
    # chunks (3, 4) and (3, -4): the mean (3, 0) has squared length 9, the product of different chunks is 9 - 16 = -7
    assert cosines([[[3, 4], [3, -4]]])[0][0, 0] == pytest.approx(-7 / 9)
    # 8 chunks of signal 1 and noise of squared length 8: half of the mean's squared length is signal
    noise = np.random.default_rng(0).normal(0, (8 / 4000) ** 0.5, (1, 8, 4001))
    assert cosines(np.r_[1, np.zeros(4000)] + noise)[0][0, 0] == pytest.approx(0.5, abs=0.1)


def test_planted_conflict_is_clear_and_noise_is_not():
    rng = np.random.default_rng(0)
    pull = np.array([[1, 0], [-1, 0.2], [0, 1]])
    _, draws = cosines(np.concatenate([np.repeat(pull[:, None], 8, 1), rng.normal(0, 0.05, (3, 8, 50))], 2), 1000)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert high[0] < -0.8 and low[0] > -1.2  # slots 0 and 1
    low, high = np.quantile(cosines(rng.normal(size=(6, 8, 200)), 1000)[1], [0.025, 0.975], axis=0)
    assert ((low < 0) & (high > 0)).sum() >= 12  # of 15


def test_sketch_keeps_inner_products():
    one, other = torch.randn(2, 60_000, generator=torch.Generator().manual_seed(0))
    other = other + 0.5 * one
    assert torch.equal(gradients.sketch(one), one)
    small = [gradients.sketch(vector, 8192) for vector in (one, other)]
    assert [len(vector) for vector in small] == [8192, 8192]
    exact = torch.nn.functional.cosine_similarity(one, other, dim=0)
    hashed = torch.nn.functional.cosine_similarity(*small, dim=0)
    assert float(hashed) == pytest.approx(float(exact), abs=5 / 8192**0.5)


@pytest.mark.parametrize(("method", "parts"), [("lora", {"A", "B"}), ("ilora", {"A", "router", *HEADS})])
def test_products_agree_with_plain_backward_passes(method, parts, adapters, encoded, base):
    model, processor = gradients.part_way(base, adapters / f"joint-{method}-bare", 1.0, seed=0)
    data = {slot: read_slot(encoded, slot, "train").answered("bare")[:4] for slot in SLOTS}
    result = gradients.gradient_products(model, processor, data, 2)
    plain = {}
    for slot, pairs in data.items():
        model.zero_grad()
        for sample, text in pairs:
            inputs = batch(model, processor.tokenizer, [sample], [text])
            logits = model(**{k: inputs[k] for k in INPUTS}).logits[0]
            labels = inputs["labels"][0]
            for place in (labels >= 0).nonzero()[:, 0]:
                (-logits[place - 1].log_softmax(-1)[labels[place]]).backward(retain_graph=True)
        plain[slot] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    dot = sum((plain["ks"][n] * plain["cremad"][n]).sum() for n in plain["ks"])
    assert set(result) == {"all", *parts}
    assert result["all"].sum((1, 3))[0, 1] == pytest.approx(dot.item(), rel=1e-3)
    assert result["all"] == pytest.approx(sum(v for k, v in result.items() if k != "all"))
    if method == "ilora":  # of rank 2: the columns of the second head
        columns = [g[:, 2:4] for n, g in plain["ks"].items() if "ilora_B" in n]
        assert result["head 2"].sum((1, 3))[0, 0] == pytest.approx(sum((c**2).sum() for c in columns).item(), rel=1e-3)


def test_part_way_starts_at_the_base_and_ends_at_the_trained_adapter(adapters, encoded, base):
    model, processor = load_base(base)
    inputs = batch(model, processor.tokenizer, list(read_slot(encoded, "ks", "test"))[:3])
    inputs, folder = {k: inputs[k] for k in INPUTS}, adapters / "joint-ilora-bare"
    start, half, end = (gradients.part_way(base, folder, way, seed=0)[0] for way in (0.0, 0.5, 1.0))
    with torch.no_grad():  # at the last token: values in the padding differ between implementations of attention
        plain = model(**inputs).logits[:, -1]
        trained = load_adapter(model, folder)(**inputs).logits[:, -1]
        assert torch.allclose(start(**inputs).logits[:, -1], plain, atol=1e-4)
        assert torch.allclose(end(**inputs).logits[:, -1], trained, atol=1e-4)
    assert not torch.allclose(plain, trained, atol=1e-2)
    first, middle, last = map(gradients.trainable, (start, half, end))
    assert all(torch.allclose(p, (first[n] + last[n]) / 2, atol=1e-6) for n, p in middle.items())


def test_conflicts(adapters, cell, encoded, base):
    cells = [cell("joint-lora-bare"), cell("joint-ilora-bare", "ilora")]
    pairs, means, drawn = gradients.conflicts(cells, adapters, encoded, base, samples=9, chunk=2, resamples=50)
    assert set(means["point"]) == set(gradients.POINTS)
    start = means[means["point"] == "start"].groupby("family")["part"].agg(set)
    # B is 0, so nothing before it has a gradient
    assert start.to_dict() == {"joint-lora-bare": {"all", "B"}, "joint-ilora-bare": {"all", *HEADS}}
    assert means["negative"].between(means["negative_low"], means["negative_high"]).all()
    part = pairs[(pairs["family"] == "joint-lora-bare") & (pairs["point"] == "end") & (pairs["part"] == "all")]
    assert list(zip(part["one"], part["other"], strict=True)) == [("ks", "cremad"), *((s, s) for s in SLOTS)]
    assert drawn["joint-lora-bare", "end", "all"].shape == (50, 1)
    row = means[(means["family"] == "joint-lora-bare") & (means["point"] == "end") & (means["part"] == "all")].iloc[0]
    assert row[["cosine", "cosine_low", "cosine_high"]].tolist() == pytest.approx(part.iloc[0, -3:].tolist())
    assert row["reliability"] == pytest.approx(part["cosine"].iloc[1:].mean())


def test_refusals(cell, adapters, encoded, base):
    with pytest.raises(ValueError, match="3 samples per slot are less than two chunks of 2; raise gradient_samples"):
        gradients.conflicts([cell()], adapters, encoded, base, samples=3, chunk=2, resamples=9)
    for other in (cell("joint-ilora-bare", slots=("ks",)), cell("joint-ilora-explicit", form="explicit")):
        with pytest.raises(ValueError, match=rf"{other.name} and joint-lora-bare were trained on different.*\.runs"):
            gradients.conflicts([cell(), other], adapters, encoded, base, samples=9, chunk=2, resamples=9)


@pytest.mark.parametrize(("lora", "ilora", "point"), [(0.8, 0.9, "half-way"), (0.8, 0.4, "start"), (0.4, 0.9, "start")])
def test_last_reliable_point(lora, ilora, point):
    rows = [("lora", "start", 0.9), ("lora", "half-way", lora), ("lora", "end", 0.1)]
    rows += [("ilora", "start", 0.9), ("ilora", "half-way", ilora), ("ilora", "end", 0.9)]
    table = pd.DataFrame(rows, columns=["family", "point", "reliability"]).assign(part="all")
    assert gradients.last_reliable(table) == point
    assert gradients.last_reliable(table.assign(reliability=0.2)) is None
