"""Heads and routing changed by hand: planted idle heads and routers, and references of a few lines."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr

from crab.ilora import ILoraLayer, fixed_routing, record_routing, record_routing_means
from crab.study import conflict, features, mechanism, routing, train
from crab.study.dataset import SEGMENTS, batch, load_base, read_slot, segments, write_slot
from crab.study.mechanism import HEAD, OFF, OTHER, OWN, RESCALED, UNIFORM
from crab.study.predict import load_adapter
from crab.study.runs import Run

SLOTS = ("ks", "cremad")
INPUTS = ("inputs_embeds", "attention_mask", "position_ids")


@pytest.fixture(scope="module")
def adapter(encoded, base, tmp_path_factory):
    section = {"r": 2, "lora_alpha": 4, "num_heads": 3, "learning_rate": 1e-2, "router_init_std": 0.5}
    return train.train_run(Run("joint", "ilora", "bare"), section, encoded, base, tmp_path_factory.mktemp("w"), SLOTS, 2, 4)


def write_records(root, slot, records):
    folder = root / "AVUIE_2" / slot
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, encoded):
    """Records to the encoded samples."""
    root = tmp_path_factory.mktemp("data")
    texts = read_slot(encoded, "ks", "train").targets["bare"][:8]
    for slot in SLOTS:
        write_records(root, slot, [{"video_path": f"{i}.mp4", "audio_path": f"{i}.wav", "action": "x", "emotion": "x", "label": f"i see it . {text}"}
                                   for i, text in enumerate(texts)])  # fmt: skip
    return root


@pytest.fixture
def loaded(adapter, base):
    model, processor = load_base(base)
    return load_adapter(model, adapter), processor.tokenizer


@pytest.fixture
def made(loaded, encoded):
    samples = read_slot(encoded, "ks", "test").samples[:5]
    return batch(*loaded, samples, ["<answer>red</answer>", "<answer>blue</answer>"] * 2 + ["red"])


def test_true_answers(dataset, encoded):
    pairs = mechanism.true_answers(dataset, encoded, "ks", "bare", 3)
    assert [text for _, text in pairs] == [f"<answer>{c}</answer>" for c in ("red", "red", "yellow")]  # samples 0, 4 and 7
    explicit = mechanism.true_answers(dataset, encoded, "ks", "explicit", 1)
    assert explicit[0][1] == "i see it . <answer>red</answer>"
    assert torch.equal(explicit[0][0]["input_ids"], read_slot(encoded, "ks", "test").samples[0]["input_ids"])


def test_true_answers_of_records_that_hold_no_answer(tmp_path, encoded):
    """As published for arig, whose test records give the box in fields of its own."""
    samples = read_slot(encoded, "ks", "test").samples[:1]
    write_slot(tmp_path, "arig", "test", samples, ["arig/test/00000"], ["?"], {"bare": [], "explicit": []})
    record = {"visual_path": "a.jpg", "audio_path": "a.wav", "a_obj": "dog", "top_left": [16, 24], "bottom_right": [80, 88], "frame_idx": 0}
    write_records(tmp_path, "arig", [record])
    assert [text for _, text in mechanism.true_answers(tmp_path, tmp_path, "arig", "bare", 5)] == ["<obj>(16,24)(80,88)</obj>"]
    (tmp_path / "AVUIE_2/arig/test.json").write_text(json.dumps([record | {"id": "x"}]))
    with pytest.raises(ValueError, match="sample 'arig/test/00000' is no record of .*; run the encode stage again"):
        mechanism.true_answers(tmp_path, tmp_path, "arig", "bare", 5)


def test_a_slot_without_any_true_answer_is_named(tmp_path, encoded, monkeypatch):
    write_slot(tmp_path, "s4", "test", read_slot(encoded, "ks", "test").samples[:1], ["s4/test/00000"], ["?"], {"bare": [], "explicit": []})
    record = {"visual_path": "v/frames/0.jpg", "audio_path": "a.wav", "vid": "v", "uid": "u", "a_obj": "dog", "frame_idx": 0}
    write_records(tmp_path, "s4", [record])
    monkeypatch.setattr(mechanism, "true_answer", lambda slot, record: "")  # as of a mask of fewer than three pixels
    with pytest.raises(ValueError, match="s4: none of 5 test samples has a true answer to look at; take more, or leave the slot out"):
        mechanism.true_answers(tmp_path, tmp_path, "s4", "bare", 5)


def test_likelihood_agrees_with_one_token_at_a_time(loaded, made):
    model, _ = loaded
    found = mechanism.likelihood(model, [made])
    with torch.no_grad():
        logits = model(**{k: made[k] for k in INPUTS}).logits
    for row in range(5):
        places = [p for p in range(made["labels"].shape[1]) if made["labels"][row, p] >= 0]
        logs = [logits[row, p - 1].log_softmax(-1)[made["labels"][row, p]].item() for p in places]
        right = all(logits[row, p - 1].argmax() == made["labels"][row, p] for p in places)
        assert found[row] == pytest.approx([np.mean(logs), float(right)], abs=1e-5)


def test_exact_is_what_greedy_generation_would_give(loaded, encoded):
    """The likeliest token after each prompt, and a text it is not."""
    model, tokenizer = loaded
    model.get_base_model().lm_head.weight.data[tokenizer.eos_token_id] += 100 * model.get_base_model().lm_head.weight.data.mean(0)
    samples = read_slot(encoded, "ks", "test").samples[:4]
    with torch.no_grad():
        first = model(**{k: batch(model, tokenizer, samples)[k] for k in INPUTS}).logits[:, -1].argmax(-1)
    words = [tokenizer.decode([t]) for t in first]
    made = batch(model, tokenizer, samples, words)
    made["labels"][:, -1] = -100  # the word alone, without the end
    assert mechanism.likelihood(model, [made])[:, 1].tolist() == [1, 1, 1, 1]
    other = ["red" if w.strip() != "red" else "blue" for w in words]
    assert mechanism.likelihood(model, [batch(model, tokenizer, samples, other)])[:, 1].tolist() == [0, 0, 0, 0]


def test_head_off_is_its_columns_zeroed(loaded, made):
    model, _ = loaded
    with mechanism.edited_routing(model, mechanism.without(1, False)):
        off = mechanism.likelihood(model, [made])
    for layer in model.modules():
        if isinstance(layer, ILoraLayer):
            layer.ilora_B["default"].weight.data[:, 2:4] = 0
    assert off == pytest.approx(mechanism.likelihood(model, [made]), abs=1e-5)


def test_rescaled_weights_by_hand():
    weights = torch.tensor([[0.2, 0.3, 0.5]])
    assert mechanism.without(1, True)("", weights)[0].tolist() == pytest.approx([2 / 7, 0, 5 / 7])
    assert mechanism.without(1, False)("", weights)[0].tolist() == pytest.approx([0.2, 0, 0.5])
    assert weights[0].tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert mechanism.without(0, True)("", torch.tensor([[1.0, 0.0]]))[0].tolist() == [0, 0]  # top-1: nothing to rescale


def test_edited_routing_sees_the_modules_and_leaves_no_trace(loaded, made, base):
    model, _ = loaded
    before, seen = mechanism.likelihood(model, [made]), []
    with record_routing(model) as routing:
        mechanism.likelihood(model, [made])
    with pytest.raises(RuntimeError, match="stop"):
        with mechanism.edited_routing(model, lambda name, weights: seen.append((name, weights)) or weights):
            assert mechanism.likelihood(model, [made]) == pytest.approx(before, abs=1e-5)
            raise RuntimeError("stop")
    assert {name for name, _ in seen} == set(routing)
    assert all(torch.allclose(weights, routing[name][0], atol=1e-5) for name, weights in seen)
    assert (mechanism.likelihood(model, [made]) == before).all()
    with pytest.raises(ValueError, match="no I-LoRA layers; give a folder of an I-LoRA run"):
        with mechanism.edited_routing(load_base(base)[0], lambda name, weights: weights):
            pass


def test_mean_routing_of_one_kind_is_fixed_routing(loaded, made):
    model, _ = loaded
    gates = {n: torch.tensor([0.7, 0.2, 0.1]).repeat(len(SEGMENTS), 1) for n in mechanism_names(model)}
    edit = mechanism.MeanRouting(model.config, gates)
    with mechanism.edited_routing(model, edit):
        found = mechanism.likelihood(model, [made], edit.label)
    with fixed_routing(model, [0.7, 0.2, 0.1]):
        assert found == pytest.approx(mechanism.likelihood(model, [made]), abs=1e-5)


def mechanism_names(model):
    with record_routing(model) as routing:
        return list(routing)


def test_mean_gates_are_means_over_each_kind_of_token(loaded, made):
    model, _ = loaded
    kinds = segments(model.config, made)
    with record_routing(model) as routing:
        mechanism.likelihood(model, [made])
    with record_routing_means(model) as means:
        mechanism.likelihood(model, [made], lambda made: means.label(segments(model.config, made), "ks"))
    gates = mechanism.mean_gates(means, "ks")
    for name, (weights,) in routing.items():
        for place in range(len(SEGMENTS)):
            assert gates[name][place].tolist() == pytest.approx(weights[kinds == place].mean(0).tolist(), abs=1e-5)
    edit = mechanism.MeanRouting(model.config, gates)
    edit.label(made)
    name = next(iter(gates))
    assert torch.equal(edit(name, weights)[kinds == 1][0], gates[name][1].float())


def run(adapter, dataset, encoded, base, **options):
    return mechanism.causes(adapter, dataset, encoded, base, SLOTS, samples=6, swap_samples=4, batch_size=4, resamples=50, **options)


def test_causes(adapter, dataset, encoded, base):
    effects, summary, routing = run(adapter, dataset, encoded, base)
    assert effects.groupby("change", sort=False).size().to_dict() == {OFF: 2, HEAD: 6, RESCALED: 6, UNIFORM: 2, OWN: 2, OTHER: 2}
    assert set(effects.loc[effects["change"] == OTHER, ["slot", "of"]].itertuples(index=False, name=None)) == {("ks", "cremad"), ("cremad", "ks")}
    assert (effects["low"] <= effects["cost"] + 1e-9).all() and (effects["cost"] <= effects["high"] + 1e-9).all()
    assert routing.shape == (2, 2 * 7 * 4 * 3) and np.allclose(routing.reshape(2, -1, 3).sum(-1), 1)
    # without the adapter, the base alone
    pairs = mechanism.true_answers(dataset, encoded, "ks", "bare", 6)
    model, processor = load_base(base)
    alone = mechanism.likelihood(model, [batch(model, processor.tokenizer, *map(list, zip(*pairs)))])[:, 0].mean()
    model = load_adapter(model, adapter)
    adapted = mechanism.likelihood(model, [batch(model, processor.tokenizer, *map(list, zip(*pairs)))])[:, 0].mean()
    off = effects[(effects["slot"] == "ks") & (effects["change"] == OFF)]["cost"].item()
    assert off == pytest.approx(adapted - alone, abs=1e-5)
    assert summary["cost"][OFF]["mean"] == pytest.approx(effects.loc[effects["change"] == OFF, "cost"].mean())


def test_runs_of_one_form_are_demanded():
    bare, explicit = (Run("joint", "ilora", form) for form in ("bare", "explicit"))
    assert mechanism.form_of([explicit, explicit]) == "explicit"
    with pytest.raises(ValueError, match=r"different forms of answer.*methods\.\*\.runs"):
        mechanism.form_of([bare, explicit])


def test_a_router_that_reads_the_instruction_is_shown_it(dataset, encoded, base, tmp_path):
    section = {"r": 2, "lora_alpha": 4, "num_heads": 2, "router_input": "instruction", "learning_rate": 1e-2}
    adapter = train.train_run(Run("joint", "ilora", "bare"), section, encoded, base, tmp_path, SLOTS, 1, 8)
    run(adapter, dataset, encoded, base)
    routing.routing(adapter, encoded, base, SLOTS, tmp_path / "out", samples=4, batch_size=2, max_new_tokens=2)
    conflict.conflicts({"ilora": adapter}, encoded, base, samples=4, chunk=2, resamples=20)
    model, processor = load_base(base)
    states = features.hidden(load_adapter(model, adapter), processor.tokenizer, read_slot(encoded, "ks", "test").samples[:3], 2)
    assert states.shape == (3, model.config.text_config.hidden_size)


def change_weights(adapter, out, change):
    """A copy of an adapter with its tensors changed."""
    out.mkdir()
    tensors = {name: change(name, tensor) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return out


def test_planted_idle_head_costs_nothing(adapter, dataset, encoded, base, tmp_path):
    def only_head_0(name, tensor):
        tensor = tensor.clone()
        if ".ilora_B." in name:
            tensor[:, 2:] = 0
        return tensor

    effects, summary, _ = run(change_weights(adapter, tmp_path / "a", only_head_0), dataset, encoded, base)
    cost = effects[effects["change"] == HEAD].set_index(["slot", "of"])["cost"]
    whole = effects[effects["change"] == OFF].set_index("slot")["cost"]
    for slot in SLOTS:
        assert cost[slot, "1"] == pytest.approx(0, abs=1e-6) and cost[slot, "2"] == pytest.approx(0, abs=1e-6)
        assert cost[slot, "0"] == pytest.approx(whole[slot], abs=1e-5)  # all there is
    assert set(summary["leans"].values()) <= {0}


def test_planted_idle_router_makes_routing_worth_nothing(adapter, dataset, encoded, base, tmp_path):
    idle = change_weights(adapter, tmp_path / "a", lambda name, tensor: tensor * ("ilora_router" not in name))
    effects, summary, routing = run(idle, dataset, encoded, base)
    kept = effects[effects["change"].isin([UNIFORM, OWN, OTHER])]
    assert kept["cost"].abs().max() < 1e-5 and np.allclose(routing, 1 / 3)
    assert effects.loc[effects["change"] == HEAD, "cost"].abs().max() > 1e-3


def test_leaning_on_a_head():
    rng = np.random.default_rng(0)

    def slot(*costs):
        found = {(HEAD, str(h)): np.stack([c + rng.normal(0, 0.1, 30), np.zeros(30)], 1) for h, c in enumerate(costs)}
        rest = {(RESCALED, str(h)): np.zeros((30, 2)) for h in range(len(costs))}
        return found | rest | {(name, ""): np.full((30, 2), 0.5) for name in (OFF, UNIFORM, OWN)}

    lost = {"ave": slot(1, 0.2, 0.1), "ks": slot(0.1, 0.2, 1), "ucf": slot(0.5, 0.5, 0.5)}
    for name, found in lost.items():
        found |= {(OTHER, other): np.full((30, 2), k) for k, other in enumerate(o for o in lost if o != name)}
    summary = mechanism.summarise(lost, 3, 500, 0)
    assert summary["leans"] == {"ave": 0, "ks": 2}
    assert summary["cost"]["head 0 off"]["mean"] == pytest.approx(np.mean([1, 0.1, 0.5]), abs=0.05)
    assert summary["cost"]["head 0 off"]["worst"] == "ave"
    assert summary["cost"][mechanism.ANOTHER]["mean"] == pytest.approx(0.5)


def test_head_similarity_agrees_with_the_matrices_themselves(adapter, base):
    table = mechanism.head_similarity(adapter, base)
    assert len(table) == 2 * 7 * 3
    model = load_adapter(load_base(base)[0], adapter)
    layer = model.get_submodule("base_model.model." + table.loc[4, "module"])
    A, B = (w["default"].weight.detach().double().numpy() for w in (layer.ilora_A, layer.ilora_B))
    one, other = (B[:, 2 * h : 2 * h + 2] for h in table.loc[4, ["one", "other"]].astype(int))
    updates = [(b @ A).ravel() for b in (one, other)]
    assert table.loc[4, "cosine"] == pytest.approx(np.dot(*updates) / np.prod([np.linalg.norm(u) for u in updates]), abs=1e-6)
    assert table.loc[4, "overlap"] == pytest.approx((np.cos(subspace_angles(one, other)) ** 2).mean(), abs=1e-6)
    assert table.loc[4, "overlap_by_chance"] == 2 / B.shape[0]


def test_random_spaces_overlap_as_said():
    rng = np.random.default_rng(0)
    found = [np.linalg.norm(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0]) ** 2 / 3 for a, b in rng.normal(size=(300, 2, 24, 3))]
    assert np.mean(found) == pytest.approx(3 / 24, abs=0.01)


def test_mantel_against_spearman_and_planted_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat([0.0, 5.0, 9.0], 4)[:, None]
    one, other = (mechanism.distances(groups + rng.normal(0, 0.5, (12, 2))) for _ in range(2))
    found = mechanism.mantel(one, other, 400, 0)
    pairs = np.triu_indices(12, 1)
    assert found["correlation"] == pytest.approx(spearmanr(one[pairs], other[pairs]).statistic)
    assert found["correlation"] > found["high"] and found["p"] == pytest.approx(1 / 401)
    shuffled = mechanism.mantel(one, mechanism.distances(rng.normal(size=(12, 2))), 400, 0)
    assert shuffled["low"] < shuffled["correlation"] < shuffled["high"] and shuffled["p"] > 0.05
    with pytest.raises(ValueError, match=r"at least 4 same things are needed, got \(3, 3\) and \(3, 3\)"):
        mechanism.mantel(np.zeros((3, 3)), np.zeros((3, 3)), 10, 0)


def test_gains_by_hand():
    rows = [("single-lora-bare", "a", 0.5), ("single-lora-bare", "b", 0.2), ("joint-lora-bare", "a", 0.7), ("joint-lora-bare", "a", 0.5),
            ("joint-lora-bare", "b", 0.1), ("joint-ilora-bare", "a", 0.4), ("joint-ilora-bare", "b", 0.4)]  # fmt: skip
    samples = pd.DataFrame(rows, columns=["family", "slot", "score"])
    assert mechanism.gains(samples, ["b", "a"]) == pytest.approx(np.array([[-0.1, 0.2], [0.1, -0.1]]))
    with pytest.raises(ValueError, match="c lacks scores of single-lora-bare or of a joint run; run the evaluate stage again"):
        mechanism.gains(samples, ["a", "c"])


def test_groupings_find_what_gradients_planted():
    slots = [*"abcdef"]
    at = np.array([0, 0.1, 0.23, 1.0, 1.17, 1.43])
    rows = [("lora", "half-way", "all", slots[i], slots[j], np.cos(at[i] - at[j])) for i in range(6) for j in range(i, 6)]
    pairs = pd.DataFrame(rows, columns=["method", "point", "part", "one", "other", "cosine"])
    routing = at[:, None]
    table = mechanism.groupings(slots, routing, pairs, np.random.default_rng(0).normal(size=(6, 3)), "half-way", 200).set_index("routing against")
    assert table.loc["gradients in lora", "correlation"] == pytest.approx(1)
    assert list(mechanism.groupings(slots, routing, pairs, routing, None, 50)["routing against"]) == ["gains by joint training"]
    assert mechanism.groupings(slots[:3], routing[:3], pairs, routing[:3], "half-way", 50).empty


def conflict_tables(plain, ilora, reliability=0.9):
    rows = (("lora", 5, -0.3), ("lora_matched", 4, plain), ("ilora", 1, ilora))
    summary = pd.DataFrame(
        [(m, "half-way", "all", 10, n, c, reliability) for m, n, c in rows],
        columns=["method", "point", "part", "pairs", "clear_negative", "cosine", "reliability"],
    )
    return summary, {(m, "half-way", "all"): np.random.default_rng(0).normal(c, 0.001, (200, 10)) for m, _, c in rows}


def cost(own, other):
    def one(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "worst": "ks"}

    return {"slots": 2, "heads": 2, "leans": {}, "cost": {OFF: one(3), OWN: one(own), mechanism.ANOTHER: one(other)}}


EFFECTS = pd.DataFrame(
    [(s, HEAD, h, c, c - 0.1, c + 0.1) for s, h, c in (("ks", "0", 2.0), ("ave", "0", 0.5), ("ks", "1", 1.0), ("ave", "1", 1.1))],
    columns=["slot", "change", "of", "cost", "low", "high"],
)


@pytest.mark.parametrize(
    ("plain", "ilora", "own", "other", "said"),
    [
        (-0.2, 0.3, 1.0, 0.3, ["Half-way", "of 10 pairs: 5 in `lora` (mean cosine -0.30), 4 in", "agree more with routing", "by token more than by slot"]),
        (0.3, -0.2, 0.3, 1.0, ["agree less with routing", "by slot more than by token"]),
        (0.1, 0.1, 0.0, 1.0, ["agree neither more nor less", "goes by slot, and measurably by nothing else"]),
        (0.1, 0.1, 0.05, -0.05, ["does nothing that can be measured"]),
    ],
)
def test_finding_comes_out_either_way(plain, ilora, own, other, said):
    text = mechanism.finding(EFFECTS, cost(own, other), *conflict_tables(plain, ilora))
    assert all(words in text for words in said), text
    assert "head 0 is worth most to `ks` (+2.00 [+1.90, +2.10]) and least to `ave` (+0.50 [+0.40, +0.60])" in text
    assert text.count(". ") == 1


def test_finding_says_when_gradients_are_noise():
    assert "nothing is known of conflict" in mechanism.finding(EFFECTS, cost(1, 1), *conflict_tables(0.1, 0.1, 0.2))
    alone = cost(1, 1)
    del alone["cost"][mechanism.ANOTHER]
    assert "no other's routing" in mechanism.finding(EFFECTS, alone, *conflict_tables(0.1, 0.1))


def test_write(tmp_path):
    summary, _ = conflict_tables(0.1, 0.2)
    groups = pd.DataFrame([("gains", 0.1, -0.2, float("nan"), 0.5)], columns=mechanism.GROUP_COLUMNS)
    mechanism.write(tmp_path, EFFECTS, cost(1, 1), pd.DataFrame({"a": [1]}), summary, pd.DataFrame({"a": [1]}), groups)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["conflict"]["ilora"]["half-way"]["all"]["cosine"] == 0.2
    assert found["routing_groups_as"]["gains"] == {"correlation": 0.1, "low": -0.2, "high": None, "p": 0.5}
    assert {p.name for p in tmp_path.iterdir()} == {"effects.csv", "gradients.csv", "heads.csv", "metrics.json"}
