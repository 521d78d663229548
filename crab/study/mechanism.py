"""What the parts of a joint I-LoRA adapter are worth: each head, routing by token and routing by slot.

The measure is teacher-forced: how likely the model finds the true answers of test samples, and whether it would give
them. It needs one forward pass and no generation, and it changes long before a score does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata
from transformers.utils.logging import disable_progress_bar

from crab import tasks
from crab.data import records
from crab.ilora import ILoraLayer, record_routing_means
from crab.models import omni
from crab.models.batches import SEGMENTS, batch, last_hidden, segments
from crab.models.checkpoint import load_base
from crab.study.answer import load_adapter
from crab.study.compare import bootstrap_means, interval
from crab.study.gradients import ALL
from crab.study.samples import read_slot, spread
from crab.study.score import true_answer

# Changes of the routing. Each is compared with the unchanged adapter, but OTHER with OWN.
OFF, HEAD, RESCALED = "adapter off", "head off", "head off, others rescaled"
UNIFORM, OWN, OTHER = "uniform routing", "own mean routing", "routing of"
ANOTHER = "another slot's mean routing, on top"  # what OTHER costs, the mean over all other slots
WRAPPER = "base_model.model."  # PEFT puts it before the names of the base's modules
#: Takes a module's name in the base, its routing weights and the kinds of its tokens; returns new weights.
Edit = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
Batch = Mapping[str, torch.Tensor]


def true_answers(dataset: Path, encoded: Path, slot: str, form: str, samples: int) -> list[tuple]:
    """Pairs of encoded test sample and true answer, evenly spread; samples without an answer are left out.

    Args:
        form: of the answer, if the record holds one in words. Published test records do not; their answer is bare.

    Raises:
        ValueError: a sample has no record, or no sample has an answer.
    """
    data = read_slot(encoded, slot, "test")
    by_id = {record["id"]: record for record in records.read(dataset, slot, "test")}
    entry, pairs = tasks.get_slot(slot), []
    for i in spread(len(data), samples):
        record = by_id.get(data.ids[i])
        if record is None:
            raise ValueError(f"{encoded}: {slot}: {data.ids[i]} has no record in {dataset}; run the encode stage again")
        if entry.answer_field in record:
            text = tasks.target(slot, record, form)
        else:
            text = true_answer(slot, record) if entry.masks else tasks.answer(slot, tasks.truth(slot, record))
        if text:
            pairs.append((data.samples[i], text))
    if not pairs:
        raise ValueError(
            f"{encoded}: {slot}: none of {samples} test samples has a true answer; raise mechanism.samples"
        )
    return pairs


@contextmanager
def edited_routing(model, edit: Edit, kinds: torch.Tensor) -> Iterator[None]:
    """Pass the weights [samples, tokens, heads] of all routers through ``edit`` while the block runs.

    Args:
        kinds: of each token of the batch, places in `SEGMENTS`, int [samples, tokens].
    """
    layers = {name.removeprefix(WRAPPER): m for name, m in model.named_modules() if isinstance(m, ILoraLayer)}
    if not layers:
        raise ValueError("mechanism: the model has no I-LoRA layers; give a folder of an I-LoRA run")
    handles = [
        layer.ilora_router[adapter].register_forward_hook(lambda module, args, w, name=name: edit(name, w, kinds))
        for name, layer in layers.items()
        for adapter in layer.active_adapters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def likelihood(model, batches: Sequence[Batch], edit: Edit | None = None, label: Callable | None = None) -> np.ndarray:
    """Teacher-forced measure of batches with ``labels``, [samples, 2].

    Args:
        label: called with the kinds of the tokens before each batch is run.

    Returns:
        Mean log-probability of the answer's tokens in nats, the end token included; and 1 if each of them is the most
        likely one, so that greedy decoding gives exactly this answer, else 0.
    """
    measures = []
    for inputs in batches:
        kinds = segments(model.config, inputs)
        if label:
            label(kinds)
        with edited_routing(model, edit, kinds) if edit else nullcontext():
            states = last_hidden(model, inputs)
        labels = inputs["labels"][:, 1:]
        places = labels != omni.IGNORE
        logits, targets, sample = model.lm_head(states[:, :-1][places]).float(), labels[places], places.nonzero()[:, 0]
        logs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        wrong = (logits.argmax(-1) != targets).float()
        total = torch.zeros(len(labels), 2, device=logs.device).index_add_(0, sample, torch.stack([logs, wrong], 1))
        exact = (total[:, 1] == 0).float()
        measures.append(torch.stack([total[:, 0] / places.sum(1), exact], 1).double().cpu().numpy())
    return np.concatenate(measures)


def without(head: int, rescale: bool) -> Edit:
    """Switch a head off in every module. With ``rescale`` the weights of the other heads sum to 1 again."""

    def edit(name: str, weights: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        weights = weights.clone()
        weights[..., head] = 0
        total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return weights / total if rescale else weights

    return edit


def mean_gates(means, slot: str) -> dict[str, torch.Tensor]:
    """A slot's mean weights by module, [segments, heads]; a kind of token that the slot lacks has the mean of all.

    Args:
        means: of `crab.ilora.record_routing_means`, labelled by slot.
    """
    gates = {name: weights.repeat(len(SEGMENTS), 1) for name, weights in means.weights(slot).items()}
    for place, segment in enumerate(SEGMENTS):
        for name, weights in means.weights(slot, [segment]).items():
            gates[name][place] = weights
    return gates


def routed_by(gates: Mapping[str, torch.Tensor]) -> Edit:
    """Route every token by `mean_gates` of its kind."""
    return lambda name, weights, kinds: gates[name].to(weights)[kinds.clamp_min(0)]  # nobody reads the padding


def causes(
    adapter: Path, dataset: Path, encoded: Path, base: Path, slots: Sequence[str], form: str, samples: int,
    swap_samples: int, batch_size: int = 32,
) -> tuple[pd.DataFrame, np.ndarray]:  # fmt: skip
    """Change a joint I-LoRA adapter's routing, and measure what each test sample loses.

    Args:
        samples: test samples per slot. swap_samples: as many of them for the swaps of routing between slots.

    Returns:
        One row per slot, change and sample: ``change``, ``of`` (the head that is off, or the slot whose mean routing is
        used), ``label`` (both in words), ``cost`` (log-likelihood lost, in nats per token), ``exact`` (exact answers lost).
        Mean routing of each slot, [slots, modules x segments x heads].
    """
    disable_progress_bar()  # of each model that is loaded
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    layers = [layer for layer in model.modules() if isinstance(layer, ILoraLayer)]
    (heads,) = {layer.num_heads[name] for layer in layers for name in layer.active_adapters}
    pairs = {slot: true_answers(dataset, encoded, slot, form, samples) for slot in slots}

    def batches(pairs: Sequence[tuple]) -> list[Batch]:
        parts = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        return [batch(model, processor.tokenizer, *map(list, zip(*part, strict=True))) for part in parts]

    unchanged = {}
    with record_routing_means(model) as means:
        for slot in slots:
            unchanged[slot] = likelihood(model, batches(pairs[slot]), label=partial(means.label, group=slot))
    gates = {slot: mean_gates(means, slot) for slot in slots}
    edits = {(c, str(head)): without(head, c == RESCALED) for c in (HEAD, RESCALED) for head in range(heads)}
    edits[UNIFORM, ""] = lambda name, weights, kinds: torch.full_like(weights, 1 / heads)
    rows = []
    for slot in slots:
        inputs, now, after = batches(pairs[slot]), unchanged[slot], {}
        with model.disable_adapter():
            after[OFF, ""] = likelihood(model, inputs)
        for key, edit in (*edits.items(), ((OWN, ""), routed_by(gates[slot]))):
            after[key] = likelihood(model, inputs, edit)
        few = spread(len(pairs[slot]), swap_samples)
        inputs = batches([pairs[slot][i] for i in few])
        for other in slots:
            if other != slot:
                after[OTHER, other] = likelihood(model, inputs, routed_by(gates[other]))
        for (change, of), values in after.items():
            lost = (after[OWN, ""][few] if change == OTHER else now) - values
            row = {"slot": slot, "change": change, "of": of, "label": change.replace("head", f"head {of}")}
            rows.append(pd.DataFrame({**row, "cost": lost[:, 0], "exact": lost[:, 1]}))
    routing = np.stack([np.concatenate([g.numpy().ravel() for g in gates[slot].values()]) for slot in slots])
    return pd.concat(rows, ignore_index=True), routing


# ---- means of what is lost, with 95 % paired bootstrap intervals over samples


def effects(lost: pd.DataFrame, resamples: int, seed: int = 0) -> pd.DataFrame:
    """One row per slot and change of `causes`: mean ``cost`` and ``exact``, with an interval of each."""
    rows = []
    for key, part in lost.groupby(["slot", "change", "of", "label"], sort=False):
        row = dict(zip(("slot", "change", "of", "label"), key, strict=True))
        for name, low, high in (("cost", "low", "high"), ("exact", "exact_low", "exact_high")):
            values = part[name].to_numpy()
            row[name] = values.mean()
            row[low], row[high] = interval(bootstrap_means(values, resamples, seed))
        rows.append({**row, "samples": len(part)})
    return pd.DataFrame(rows)


def mean_costs(lost: pd.DataFrame, resamples: int, seed: int = 0) -> pd.DataFrame:
    """One row per change: its mean ``cost`` over slots with its interval, and the slot that it costs most (``worst``)."""
    swapped = lost["change"] == OTHER
    groups = [*lost[~swapped].groupby("label", sort=False), *([(ANOTHER, lost[swapped])] if swapped.any() else [])]
    rows = []
    for label, part in groups:
        costs = {slot: _by_of(of_slot).mean(0) for slot, of_slot in part.groupby("slot", sort=False)}
        draws = np.mean([bootstrap_means(cost, resamples, seed, slot) for slot, cost in costs.items()], axis=0)
        means = {slot: cost.mean() for slot, cost in costs.items()}
        rows.append((label, np.mean(list(means.values())), *interval(draws), max(means, key=means.get)))
    return pd.DataFrame(rows, columns=["label", "cost", "low", "high", "worst"])


def _by_of(part: pd.DataFrame) -> np.ndarray:
    """Costs of one slot, [heads or other slots, samples]."""
    return part["cost"].to_numpy().reshape(part["of"].nunique(), -1)


def leaning(lost: pd.DataFrame, resamples: int, seed: int = 0) -> dict[str, int]:
    """By slot, the head it needs clearly more than any other; slots without such a head are left out.

    Clearly: the paired interval of the difference to the next head leaves out 0 (95 % for all slots, by Bonferroni).
    """
    costs = {slot: _by_of(part) for slot, part in lost[lost["change"] == HEAD].groupby("slot", sort=False)}
    result = {}
    for slot, cost in costs.items():
        first, *rest = np.argsort(-cost.mean(1), kind="stable")
        if rest:
            ahead = bootstrap_means(cost[first] - cost[rest[0]], resamples, seed)
            if interval(ahead, 1 - 0.05 / len(costs))[0] > 0:
                result[slot] = int(first)
    return result


# ---- how alike the heads are, and how slots group


def head_similarity(adapter: Path, base: Path) -> pd.DataFrame:
    """Pairs of heads (``one``, ``other``) in every ``module``.

    ``cosine`` is that of the updates B_i A_i. ``overlap`` compares the spaces they write to: the mean squared cosine of
    the principal angles (Björck and Golub, 1973) between the columns of B_i and B_j, 1 for the same space.
    ``overlap_by_chance`` is rank / out, that of random spaces.
    """
    model = load_adapter(load_base(base)[0], adapter)
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, ILoraLayer):
            continue
        (adapter_name,) = layer.active_adapters
        heads, rank = layer.num_heads[adapter_name], layer.r[adapter_name]
        up = layer.ilora_B[adapter_name].weight.detach().double().unflatten(1, (heads, rank)).transpose(0, 1)
        down = layer.ilora_A[adapter_name].weight.detach().double().unflatten(0, (-1, rank)).expand(heads, -1, -1)
        # <B_i A_i, B_j A_j> = trace((B_i' B_j) (A_j A_i')), without a matrix of the layer's own size
        products = torch.einsum("iok,jol,jlx,ikx->ij", up, up, down, down)
        spaces = torch.linalg.qr(up).Q
        for i, j in itertools.combinations(range(heads), 2):
            cosine = products[i, j] / (products[i, i] * products[j, j]).sqrt()
            overlap = torch.linalg.matrix_norm(spaces[i].T @ spaces[j]) ** 2 / spaces.shape[2]
            rows.append((name.removeprefix(WRAPPER), i, j, float(cosine), float(overlap), rank / up.shape[1]))
    return pd.DataFrame(rows, columns=["module", "one", "other", "cosine", "overlap", "overlap_by_chance"])


def mantel(one: np.ndarray, other: np.ndarray, permutations: int, seed: int) -> dict:
    """Do two distances group the same things alike? Mantel's (1967) test with Spearman's rank correlation.

    Args:
        one, other: symmetric distances [things, things] in the same order, of at least 4 things.

    Returns:
        ``correlation``; ``low`` and ``high``, which hold 95 % of random relabellings; and the two-sided ``p``.
    """
    if one.shape != other.shape or len(one) < 4:
        raise ValueError(f"mantel: needs two distances of the same 4 or more things, got {one.shape} and {other.shape}")
    pairs = np.triu_indices(len(one), 1)
    ranks = rankdata(one[pairs])
    ranked = np.zeros(other.shape)
    ranked[pairs] = rankdata(other[pairs])
    ranked += ranked.T

    def correlation(order: np.ndarray) -> float:
        permuted = ranked[np.ix_(order, order)][pairs]
        return float(np.corrcoef(ranks, permuted)[0, 1]) if permuted.std() and ranks.std() else 0.0

    rng = np.random.default_rng(seed)
    by_chance = np.array([correlation(rng.permutation(len(one))) for _ in range(permutations)])
    measured = correlation(np.arange(len(one)))
    low, high = interval(by_chance)
    extreme = int((np.abs(by_chance) >= abs(measured) - 1e-12).sum())
    return {"correlation": measured, "low": low, "high": high, "p": (1 + extreme) / (1 + permutations)}


def groupings(
    routing: np.ndarray, gains: pd.DataFrame, pairs: pd.DataFrame, point: str | None, permutations: int, seed: int = 0
) -> pd.DataFrame:
    """Rank correlation of how routing groups slots with how gains and gradients do; empty with fewer than 4 slots.

    Args:
        routing: of `causes`, slots in the order of ``gains``.
        gains: what each slot (row) gains by each joint run (column).
        pairs: of `crab.study.gradients.conflicts`; slots are 1 - cosine apart.
        point: where gradients are taken (`crab.study.gradients.last_reliable`); None leaves them out.
    """
    if gains.isna().any(axis=None) or gains.empty:
        slots = ", ".join(gains.index[gains.isna().any(axis=1)]) or "every slot"
        raise ValueError(f"mechanism: {slots} lacks scores of a run; run the train and evaluate stages again")
    others = {"gains by joint training": squareform(pdist(gains))}
    chosen = pairs[(pairs["point"] == point) & (pairs["part"] == ALL)]
    for method, part in chosen.groupby("method", sort=False):
        cosine = part.pivot(index="one", columns="other", values="cosine").reindex(
            index=gains.index, columns=gains.index
        )
        others[f"gradients in {method}"] = 1 - cosine.where(cosine.notna(), cosine.T).to_numpy()
    own = squareform(pdist(routing))
    tests = {name: mantel(own, other, permutations, seed) for name, other in others.items() if len(own) >= 4}
    return pd.DataFrame([{"routing against": name, **test} for name, test in tests.items()])
