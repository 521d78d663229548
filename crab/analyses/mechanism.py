"""What the parts of a joint I-LoRA adapter are worth: each head, routing by token and routing by slot.

The measure is teacher-forced: how likely the model finds the true answers of test samples, and whether it would give
them. It needs one forward pass and no generation, and it changes long before a score does.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata
from transformers.utils.logging import disable_progress_bar

from crab import tasks
from crab.analyses.gradients import ALL
from crab.ilora import record_routing_means
from crab.ilora.adapters import adapted_layers
from crab.models.batches import SEGMENTS, batch, last_hidden, segments
from crab.models.checkpoint import load_base
from crab.models.protocol import IGNORE
from crab.samples.reading import read_slot, spread
from crab.study.answer import load_adapter
from crab.study.compare import bootstrap_means, interval
from crab.study.score import true_answer, truths

# Changes of the routing. Each is compared with the unchanged adapter, but OTHER with OWN.
OFF, HEAD, RESCALED = "adapter off", "head off", "head off, others rescaled"
UNIFORM, OWN, OTHER = "uniform routing", "own mean routing", "another slot's mean routing, on top"
SEED = 0  # of intervals and permutations
#: Takes a module's name, its routing weights [samples, tokens, heads] and the kind of each token (its place in
#: `SEGMENTS`) [samples, tokens]; returns new weights.
Edit = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
Batch = Mapping[str, torch.Tensor]


def true_answers(dataset: Path, encoded: Path, slot: str, form: str, samples: int) -> list[tuple]:
    """Pairs of encoded test sample and true answer, evenly spread; samples without an answer are left out.

    Answers have ``form`` if the record holds one in words. Published test records do not; their answer is bare.
    """
    data, entry, pairs = read_slot(encoded, slot, "test"), tasks.get_slot(slot), []
    chosen = spread(len(data), samples)
    for i, record in zip(chosen, truths(dataset, slot, "test", [data.ids[i] for i in chosen]), strict=True):
        if entry.answer_field in record:
            text = tasks.target(slot, record, form)
        else:
            text = true_answer(slot, record) if entry.masks else tasks.answer(slot, tasks.truth(slot, record))
        if text:
            pairs.append((data[i], text))
    if not pairs:
        raise ValueError(
            f"{encoded}: {slot}: none of {samples} test samples has a true answer; raise mechanism.samples"
        )
    return pairs


@torch.no_grad()
def likelihood(model, batches: Sequence[Batch], edit: Edit | None = None, label: Callable | None = None) -> np.ndarray:
    """Teacher-forced measure of batches with ``labels``, [samples, 2].

    Args:
        edit: changes the routing weights. label: called with the kinds of the tokens before each batch is run.

    Returns:
        Mean log-probability of the answer's tokens in nats, the end token included; and 1 if each of them is the most
        likely one, so that greedy decoding gives exactly this answer, else 0.
    """
    measures = []
    adapter, layers = adapted_layers(model, None, "mechanism") if edit else ("", {})
    for inputs in batches:
        kinds = segments(model.config, inputs)
        if label:
            label(kinds)
        with ExitStack() as hooks:
            for name, layer in layers.items():

                def hook(module, args, weights, name=name, kinds=kinds):
                    return edit(name, weights, kinds)

                hooks.enter_context(layer.ilora_router[adapter].register_forward_hook(hook))
            states = last_hidden(model, inputs)
        labels = inputs["labels"][:, 1:]
        places = labels != IGNORE
        logits = model.get_output_embeddings()(states[:, :-1][places]).float()
        targets, sample = labels[places], places.nonzero()[:, 0]
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


def mean_routing(means, slot: str) -> tuple[np.ndarray, Edit]:
    """A slot's mean weights [modules x segments x heads], and the edit that gives every token those of its kind.

    ``means`` are of `crab.ilora.record_routing_means`, labelled by slot. A kind of token that the slot lacks has the
    mean of all.
    """
    gates = {name: weights.repeat(len(SEGMENTS), 1) for name, weights in means.weights(slot).items()}
    for place, segment in enumerate(SEGMENTS):
        for name, weights in means.weights(slot, [segment]).items():
            gates[name][place] = weights

    def edit(name: str, weights: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        return gates[name].to(weights)[kinds.clamp_min(0)]  # nobody reads the padding

    return np.concatenate([weights.numpy().ravel() for weights in gates.values()]), edit


def causes(
    adapter: Path, dataset: Path, encoded: Path, base: Path, slots: Sequence[str], form: str, samples: int,
    swap_samples: int, batch_size: int = 32,
) -> tuple[pd.DataFrame, np.ndarray]:  # fmt: skip
    """Change a joint I-LoRA adapter's routing, and measure what each test sample loses.

    Args:
        samples: test samples per slot. swap_samples: as many of them for the swaps of routing between slots.

    Returns:
        One row per slot, change, sample and measure: ``change``, ``of`` (the head that is off, or the slot whose mean
        routing is used), ``label`` (in words), and what is ``lost``: ``measure`` is "cost" (log-likelihood, in nats per
        token) or "exact" (exact answers).
        Mean routing of each slot, [slots, modules x segments x heads].
    """
    disable_progress_bar()  # of each model that is loaded
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    name, layers = adapted_layers(model, None, "mechanism")
    (heads,) = {layer.num_heads[name] for layer in layers.values()}
    pairs = {slot: true_answers(dataset, encoded, slot, form, samples) for slot in slots}

    def batches(pairs: Sequence[tuple]) -> list[Batch]:
        parts = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        return [batch(model, processor.tokenizer, *map(list, zip(*part, strict=True))) for part in parts]

    unchanged = {}
    with record_routing_means(model) as means:
        for slot in slots:
            unchanged[slot] = likelihood(model, batches(pairs[slot]), label=partial(means.label, group=slot))
    routing, as_slot = zip(*(mean_routing(means, slot) for slot in slots), strict=True)
    edits = {(c, str(head + 1)): without(head, c == RESCALED) for c in (HEAD, RESCALED) for head in range(heads)}
    edits[UNIFORM, ""] = lambda name, weights, kinds: torch.full_like(weights, 1 / heads)
    frames = []
    for slot, as_itself in zip(slots, as_slot, strict=True):
        inputs, after = batches(pairs[slot]), {}
        with model.disable_adapter():
            after[OFF, ""] = likelihood(model, inputs)
        for key, edit in {**edits, (OWN, ""): as_itself}.items():
            after[key] = likelihood(model, inputs, edit)
        few = spread(len(pairs[slot]), swap_samples)
        inputs = batches([pairs[slot][i] for i in few])
        for other, edit in zip(slots, as_slot, strict=True):
            if other != slot:
                after[OTHER, other] = likelihood(model, inputs, edit)
        for (change, of), values in after.items():
            cost, exact = ((after[OWN, ""][few] if change == OTHER else unchanged[slot]) - values).T
            row = {"slot": slot, "change": change, "of": of, "label": change.replace("head", f"head {of}")}
            frames.append(pd.DataFrame({**row, "cost": cost, "exact": exact}))
    lost = pd.concat(frames).melt(["slot", "change", "of", "label"], var_name="measure", value_name="lost")
    return lost, np.stack(routing)


def effects(lost: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Mean over samples of what is lost, with a 95% bootstrap interval, one row per slot, change and measure."""
    keys = ["slot", "change", "of", "label", "measure"]
    rows = [
        (*key, values.mean(), *interval(bootstrap_means(values, resamples, SEED)), len(values))
        for key, values in lost.groupby(keys, sort=False)["lost"]
    ]
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "samples"])


def mean_costs(lost: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Mean over slots of the cost of each change, with a 95% interval over samples, and the slot that loses most.

    A slot's cost of another slot's routing is the mean over all other slots.
    """
    rows = []
    for label, part in lost[lost["measure"] == "cost"].groupby("label", sort=False):
        costs = {
            slot: of_slot["lost"].to_numpy().reshape(of_slot["of"].nunique(), -1).mean(0)
            for slot, of_slot in part.groupby("slot", sort=False)
        }
        draws = np.mean([bootstrap_means(cost, resamples, SEED, slot) for slot, cost in costs.items()], axis=0)
        means = {slot: cost.mean() for slot, cost in costs.items()}
        rows.append((label, np.mean(list(means.values())), *interval(draws), max(means, key=means.get)))
    return pd.DataFrame(rows, columns=["label", "cost", "low", "high", "worst"])


def head_similarity(adapter: Path, base: Path) -> pd.DataFrame:
    """Pairs of heads (``one``, ``other``) in every ``module``.

    ``cosine`` is that of the updates B_i A_i. ``overlap`` compares the spaces they write to: the mean squared cosine of
    the principal angles (Björck and Golub, 1973) between the columns of B_i and B_j, 1 for the same space.
    ``overlap_by_chance`` is rank / out, that of random spaces.
    """
    name, layers = adapted_layers(load_adapter(load_base(base)[0], adapter), None, "mechanism")
    rows = []
    for module, layer in layers.items():
        heads, rank = layer.num_heads[name], layer.r[name]
        up = layer.ilora_B[name].weight.detach().double().unflatten(1, (heads, rank)).transpose(0, 1)
        down = layer.ilora_A[name].weight.detach().double().unflatten(0, (-1, rank)).expand(heads, -1, -1)
        # <B_i A_i, B_j A_j> = trace((B_i' B_j) (A_j A_i')), without a matrix of the layer's own size
        products = torch.einsum("iok,jol,jlx,ikx->ij", up, up, down, down)
        spaces = torch.linalg.qr(up).Q
        for i, j in itertools.combinations(range(heads), 2):
            cosine = products[i, j] / (products[i, i] * products[j, j]).sqrt()
            overlap = torch.linalg.matrix_norm(spaces[i].T @ spaces[j]) ** 2 / spaces.shape[2]
            rows.append((module, i, j, float(cosine), float(overlap), rank / up.shape[1]))
    return pd.DataFrame(rows, columns=["module", "one", "other", "cosine", "overlap", "overlap_by_chance"])


def mantel(one: np.ndarray, other: np.ndarray, permutations: int, seed: int) -> dict:
    """Do two distances [things, things] group the same things alike? Mantel's (1967) test with rank correlation.

    Gives ``correlation`` (Spearman); ``low`` and ``high``, which hold 95% of random relabellings; two-sided ``p``.
    """
    pairs = np.triu_indices(len(one), 1)
    ranks, ranked = rankdata(one[pairs]), squareform(rankdata(other[pairs]))

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
    routing: np.ndarray, gains: pd.DataFrame, pairs: pd.DataFrame, point: str | None, permutations: int
) -> pd.DataFrame:
    """Whether routing groups slots as gains and gradients do (`mantel`); empty with fewer than 4 slots.

    Args:
        routing: of `causes`, slots in the order of ``gains``.
        gains: what each slot (row) gains by each joint run (column).
        pairs: of `crab.analyses.gradients.conflicts`; slots are 1 - cosine apart.
        point: where gradients are taken (`crab.analyses.gradients.last_reliable`); None leaves them out.
    """
    if gains.empty or gains.isna().any(axis=None):
        slots = ", ".join(gains.index[gains.isna().any(axis=1)]) or "every slot"
        raise ValueError(f"mechanism: {slots} lacks scores of a run; run the train and evaluate stages again")
    others = {"gains by joint training": squareform(pdist(gains))}
    for family, part in pairs[(pairs["point"] == point) & (pairs["part"] == ALL)].groupby("family", sort=False):
        cosine = part.pivot(index="one", columns="other", values="cosine").reindex(gains.index, columns=gains.index)
        others[f"gradients of {family}"] = 1 - cosine.where(cosine.notna(), cosine.T).to_numpy()
    own = squareform(pdist(routing))
    tests = {name: mantel(own, other, permutations, SEED) for name, other in others.items() if len(own) >= 4}
    return pd.DataFrame(tests.values(), tests.keys(), ["correlation", "low", "high", "p"])
