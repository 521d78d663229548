"""Heads and routing changed by hand: planted idle heads and routers, and references of a few lines."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from encoded_samples import store_samples
from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

from crab.analyses import features, gradients, mechanism, routing
from crab.analyses.mechanism import HEAD, OFF, OTHER, OWN, RESCALED, UNIFORM
from crab.ilora import ILoraLayer, record_routing, record_routing_means
from crab.models.batches import SEGMENTS, batch, segments
from crab.models.checkpoint import load_base
from crab.samples.reading import read_slot
from crab.study.answer import load_adapter
from crab.study.train import train

SLOTS = ("ks", "cremad")
INPUTS = ("inputs_embeds", "attention_mask", "position_ids")


def trained(encoded, base, folder, **options):
    pairs = [pair for slot in SLOTS for pair in read_slot(encoded, slot, "train").answered("bare")]
    options = {"r": 2, "lora_alpha": 4, **options}
    return train(pairs, "ilora", options, base, folder, learning_rate=1e-2, passes=2, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def adapter(encoded, base, tmp_path_factory):
    return trained(encoded, base, tmp_path_factory.mktemp("w"), num_heads=3, router_init_std=0.5)


@pytest.fixture
def loaded(adapter, base):
    model, processor = load_base(base)
    return load_adapter(model, adapter), processor.tokenizer


@pytest.fixture
def inputs(loaded, encoded):
    samples = list(read_slot(encoded, "ks", "test"))[:5]
    return batch(*loaded, samples, ["<answer>red</answer>", "<answer>blue</answer>"] * 2 + ["red"])


def one_sample(root, encoded, slot, **record):
    """A root that is dataset and encoded folder of one test sample."""
    samples = list(read_slot(encoded, "ks", "test"))[:1]
    store_samples(root, slot, "test", samples, [{"id": f"{slot}/test/00000", "instruction": "?"}])
    path = root / f"AVUIE_2/{slot}/test.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record]), encoding="utf-8")
    return mechanism.true_answers(root, root, slot, "explicit", 5)


def test_true_answers_are_spread_over_the_samples(dataset, encoded):
    pairs = mechanism.true_answers(dataset, encoded, "ks", "bare", 3)
    assert [text for _, text in pairs] == [f"<answer>{c}</answer>" for c in ("red", "red", "yellow")]  # 0, 4 and 7
    assert torch.equal(pairs[1][0]["input_ids"], list(read_slot(encoded, "ks", "test"))[4]["input_ids"])


def test_true_answers_come_from_the_label_or_the_record(tmp_path, encoded, monkeypatch):
    label = {"label": "i see it . <answer>red</answer>", "video_path": "0.mp4", "audio_path": "0.wav", "action": "red"}
    assert [text for _, text in one_sample(tmp_path, encoded, "ks", **label)] == [label["label"]]
    published = {"visual_path": "a.jpg", "audio_path": "a.wav", "a_obj": "dog", "frame_idx": 0}  # without an answer
    box = {"top_left": [16, 24], "bottom_right": [80, 88]}
    assert [t for _, t in one_sample(tmp_path, encoded, "arig", **published, **box)] == ["<obj>(16,24)(80,88)</obj>"]
    with pytest.raises(ValueError, match="no record 'arig/test/00000'.*; run the encode stage again"):
        one_sample(tmp_path, encoded, "arig", **published, **box, id="x")
    monkeypatch.setattr(mechanism, "true_answer", lambda slot, record: "")  # as of a mask of fewer than three pixels
    with pytest.raises(ValueError, match="s4: none of 5 test samples has a true answer; raise mechanism.samples"):
        one_sample(tmp_path, encoded, "s4", **published | {"visual_path": "v/frames/0.jpg"}, vid="v", uid="u")


def test_likelihood_agrees_with_one_token_at_a_time(loaded, inputs):
    model, _ = loaded
    measures = mechanism.likelihood(model, [inputs])
    with torch.no_grad():
        logits = model(**{k: inputs[k] for k in INPUTS}).logits
    for row, labels in enumerate(inputs["labels"]):
        places = [place for place in range(len(labels)) if labels[place] >= 0]
        logs = [logits[row, p - 1].log_softmax(-1)[labels[p]].item() for p in places]
        right = all(logits[row, p - 1].argmax() == labels[p] for p in places)
        assert measures[row] == pytest.approx([np.mean(logs), float(right)], abs=1e-5)


def test_exact_is_what_greedy_decoding_gives(loaded, encoded):
    model, tokenizer = loaded
    head = model.get_base_model().lm_head.weight.data
    head[tokenizer.eos_token_id] += 100 * head.mean(0)
    samples = list(read_slot(encoded, "ks", "test"))[:4]
    with torch.no_grad():
        first = model(**{k: batch(model, tokenizer, samples)[k] for k in INPUTS}).logits[:, -1].argmax(-1)
    words = [tokenizer.decode([token]) for token in first]
    inputs = batch(model, tokenizer, samples, words)
    inputs["labels"][:, -1] = -100  # the word alone, without the end
    assert mechanism.likelihood(model, [inputs])[:, 1].tolist() == [1, 1, 1, 1]
    other = ["red" if word.strip() != "red" else "blue" for word in words]
    assert mechanism.likelihood(model, [batch(model, tokenizer, samples, other)])[:, 1].tolist() == [0, 0, 0, 0]


def test_a_head_that_is_off_is_its_columns_zeroed(loaded, inputs):
    model, _ = loaded
    off = mechanism.likelihood(model, [inputs], mechanism.without(1, False))
    for layer in model.modules():
        if isinstance(layer, ILoraLayer):
            layer.ilora_B["default"].weight.data[:, 2:4] = 0
    assert off == pytest.approx(mechanism.likelihood(model, [inputs]), abs=1e-5)


def test_rescaled_weights_by_hand():
    weights = torch.tensor([[0.2, 0.3, 0.5]])
    for rescale, result in ((True, [2 / 7, 0, 5 / 7]), (False, [0.2, 0, 0.5])):
        assert mechanism.without(1, rescale)("", weights, None)[0].tolist() == pytest.approx(result)
    assert weights[0].tolist() == pytest.approx([0.2, 0.3, 0.5])  # not changed in place
    assert mechanism.without(0, True)("", torch.tensor([[1.0, 0.0]]), None)[0].tolist() == [0, 0]  # top-1


def test_an_edit_sees_every_module_and_leaves_no_trace(loaded, inputs, base):
    model, _ = loaded
    before, seen = mechanism.likelihood(model, [inputs]), {}
    with record_routing(model) as recorded:
        mechanism.likelihood(model, [inputs])

    def edit(name, weights, kinds):
        seen[name] = weights
        if len(seen) == len(recorded):
            raise RuntimeError("stop")
        return weights

    with pytest.raises(RuntimeError, match="stop"):
        mechanism.likelihood(model, [inputs], edit)
    assert all(torch.allclose(seen[name], weights, atol=1e-5) for name, (weights,) in recorded.items())
    assert (mechanism.likelihood(model, [inputs]) == before).all()
    with pytest.raises(ValueError, match="mechanism: .* has no I-LoRA layers"):
        mechanism.likelihood(load_base(base)[0], [inputs], edit)


def test_mean_routing_gives_each_kind_of_token_its_mean(loaded, inputs):
    model, _ = loaded
    kinds = segments(model.config, inputs)
    with record_routing(model) as recorded:
        mechanism.likelihood(model, [inputs])
    with record_routing_means(model) as means:
        mechanism.likelihood(model, [inputs], label=lambda kinds: means.label(kinds, "ks"))
    vector, edit = mechanism.mean_routing(means, "ks")
    expected = [[w[kinds == place].mean(0) for place in range(len(SEGMENTS))] for (w,) in recorded.values()]
    assert vector == pytest.approx(np.ravel([torch.stack(rows).numpy() for rows in expected]), abs=1e-5)
    for (name, (weights,)), rows in zip(recorded.items(), expected, strict=True):
        assert torch.allclose(edit(name, weights, kinds)[kinds >= 0], torch.stack(rows)[kinds[kinds >= 0]], atol=1e-5)


def run(adapter, dataset, encoded, base):
    lost, vectors = mechanism.causes(adapter, dataset, encoded, base, SLOTS, "bare", 6, 4, batch_size=4)
    table = mechanism.effects(lost, 50)
    return table[table["measure"] == "cost"], mechanism.mean_costs(lost, 50).set_index("label"), vectors


def test_causes(adapter, dataset, encoded, base):
    costs, means, vectors = run(adapter, dataset, encoded, base)
    counts = costs.groupby("change", sort=False).size().to_dict()
    assert counts == {OFF: 2, HEAD: 6, RESCALED: 6, UNIFORM: 2, OWN: 2, OTHER: 2}
    swaps = costs.loc[costs["change"] == OTHER, ["slot", "of"]]
    assert set(swaps.itertuples(index=False, name=None)) == {("ks", "cremad"), ("cremad", "ks")}
    assert ((costs["low"] <= costs["mean"] + 1e-9) & (costs["mean"] <= costs["high"] + 1e-9)).all()
    assert vectors.shape == (2, 2 * 7 * 4 * 3) and np.allclose(vectors.reshape(2, -1, 3).sum(-1), 1)
    # without the adapter, the base alone
    samples, answers = map(list, zip(*mechanism.true_answers(dataset, encoded, "ks", "bare", 6), strict=True))
    model, processor = load_base(base)
    alone = mechanism.likelihood(model, [batch(model, processor.tokenizer, samples, answers)])[:, 0].mean()
    model = load_adapter(model, adapter)
    adapted = mechanism.likelihood(model, [batch(model, processor.tokenizer, samples, answers)])[:, 0].mean()
    off = costs[costs["change"] == OFF].set_index("slot")["mean"]
    assert off["ks"] == pytest.approx(adapted - alone, abs=1e-5)
    assert means.loc[OFF, "cost"] == pytest.approx(off.mean())


def test_a_router_that_reads_the_instruction_is_shown_it(cell, dataset, encoded, base, tmp_path):
    settings = cell("joint-ilora-bare", "ilora")
    adapter = trained(encoded, base, tmp_path, num_heads=2, router_input="instruction")
    run(adapter, dataset, encoded, base)
    routing.routing(adapter, encoded, base, SLOTS, samples=4, max_new_tokens=2, batch_size=2)
    (tmp_path / settings.name).symlink_to(adapter)
    gradients.conflicts([settings], tmp_path, encoded, base, samples=4, chunk=2, resamples=20)
    model, processor = load_base(base)
    samples = list(read_slot(encoded, "ks", "test"))[:3]
    states = features.hidden(load_adapter(model, adapter), processor.tokenizer, samples, 2)
    assert states.shape == (3, model.config.text_config.hidden_size)


@pytest.mark.parametrize("idle", ["head", "router"])
def test_a_planted_idle_part_is_worth_nothing(idle, adapter, dataset, encoded, base, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if idle == "head" and ".ilora_B." in name:
            tensor[:, 2:] = 0  # of rank 2: all heads but the first
        elif idle == "router" and "ilora_router" in name:
            tensor[:] = 0
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    costs, _, vectors = run(tmp_path, dataset, encoded, base)
    of_heads = costs[costs["change"] == HEAD].pivot(index="slot", columns="of", values="mean")
    if idle == "head":
        whole = costs[costs["change"] == OFF].set_index("slot")["mean"]
        assert of_heads[["2", "3"]].abs().max(axis=None) < 1e-6
        assert of_heads["1"].to_dict() == pytest.approx(whole.to_dict(), abs=1e-5)  # all there is
    else:
        assert costs.loc[costs["change"].isin([UNIFORM, OWN, OTHER]), "mean"].abs().max() < 1e-5
        assert np.allclose(vectors, 1 / 3) and of_heads.abs().max(axis=None) > 1e-3


def test_means_over_slots_by_hand():
    head = ("head off", "1", "head 1 off", "cost")
    rows = [("a", *head, 1.0), ("a", *head, 3.0), ("b", *head, 0.0), ("b", *head, 1.0)]
    rows += [("a", OTHER, of, OTHER, "cost", v) for of, v in (("b", 1.0), ("b", 1.0), ("c", 2.0), ("c", 4.0))]
    lost = pd.DataFrame(rows, columns=["slot", "change", "of", "label", "measure", "lost"])
    table = mechanism.mean_costs(lost, 500).set_index("label")
    # (2 + .5) / 2, and the mean of (1 + 2) / 2 and (1 + 4) / 2; the interval ends at the lowest and highest draws
    assert table["cost"].to_dict() == {"head 1 off": 1.25, OTHER: 2.0}
    assert table.loc["head 1 off", ["low", "high", "worst"]].tolist() == [0.5, 2.0, "a"]
    assert mechanism.effects(lost, 500)["mean"].tolist() == [2, 0.5, 1, 3]


def test_head_similarity_agrees_with_the_matrices_themselves(adapter, base):
    table = mechanism.head_similarity(adapter, base)
    assert len(table) == 2 * 7 * 3
    model = load_adapter(load_base(base)[0], adapter)
    layer = model.get_submodule("base_model.model." + table.loc[4, "module"])
    A, B = (w["default"].weight.detach().double().numpy() for w in (layer.ilora_A, layer.ilora_B))
    one, other = (B[:, 2 * h : 2 * h + 2] for h in table.loc[4, ["one", "other"]].astype(int))
    updates = [(b @ A).ravel() for b in (one, other)]
    assert table.loc[4, "cosine"] == pytest.approx(1 - pdist(updates, "cosine")[0], abs=1e-6)
    assert table.loc[4, "overlap"] == pytest.approx((np.cos(subspace_angles(one, other)) ** 2).mean(), abs=1e-6)
    assert table.loc[4, "overlap_by_chance"] == 2 / B.shape[0]


def test_mantel_against_spearman_and_planted_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat([0.0, 5.0, 9.0], 4)[:, None]
    one, other = (squareform(pdist(groups + rng.normal(0, 0.5, (12, 2)))) for _ in range(2))
    test = mechanism.mantel(one, other, 400, 0)
    assert test["correlation"] == pytest.approx(spearmanr(squareform(one), squareform(other)).statistic)
    assert test["correlation"] > test["high"] and test["p"] == pytest.approx(1 / 401)
    unrelated = mechanism.mantel(one, squareform(pdist(rng.normal(size=(12, 2)))), 400, 0)
    assert unrelated["low"] < unrelated["correlation"] < unrelated["high"] and unrelated["p"] > 0.05


def test_groupings_find_what_gradients_planted():
    slots = [*"abcdef"]
    at = np.array([0, 0.1, 0.23, 1.0, 1.17, 1.43])
    rows = [
        ("lora", "half-way", "all", slots[i], slots[j], np.cos(at[i] - at[j])) for i in range(6) for j in range(i, 6)
    ]
    pairs = pd.DataFrame(rows, columns=["family", "point", "part", "one", "other", "cosine"])
    gains = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)), slots)
    table = mechanism.groupings(at[:, None], gains, pairs, "half-way", 200)
    assert table.loc["gradients of lora", "correlation"] == pytest.approx(1)
    assert list(mechanism.groupings(at[:, None], gains, pairs, None, 50).index) == ["gains by joint training"]
    assert mechanism.groupings(at[:3, None], gains[:3], pairs, "half-way", 50).empty
    for broken, name in ((gains.drop("c").reindex(slots), "c"), (gains[[]], "every slot")):
        with pytest.raises(ValueError, match=f"mechanism: {name} lacks scores of a run"):
            mechanism.groupings(at[:, None], broken, pairs, None, 50)
