"""Why I-LoRA does what it does: what each head and each slot's routing is worth, and how slots group.

The measure is teacher-forced: how likely the model finds the true answers of test samples, and whether it would give
them. It needs one forward pass, no generation, and moves long before a score does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from transformers.utils.logging import disable_progress_bar

from crab import tasks
from crab.data import records
from crab.data.files import atomic_file, write_json
from crab.ilora import ILoraLayer, fixed_routing, record_routing_means
from crab.models import omni
from crab.study.conflict import ALL, last_reliable
from crab.study.dataset import SEGMENTS, batch, load_base, read_slot, segments
from crab.study.predict import load_adapter
from crab.study.resample import bootstrap_means, interval
from crab.study.runs import Run
from crab.study.score import true_answer
from crab.study.spread import spread
from crab.study.states import last_hidden

WRAPPER = "base_model.model."  # what PEFT puts before the names of the base's modules
# What is changed. Each is compared with the adapter as it is, but for "routing of": that with the slot's own mean.
OFF, HEAD, RESCALED, UNIFORM, OWN, OTHER = (
    "adapter off", "head off", "head off, others rescaled", "uniform routing", "own mean routing", "routing of",
)  # fmt: skip
ANOTHER = "another slot's mean routing, on top"  # of what a slot's own costs; the mean over all others
POINT_NAMES = {"start": "Where training starts", "half-way": "Half-way to the trained adapter", "end": "Where training ends"}
COLUMNS = ["slot", "change", "of", "cost", "low", "high", "exact", "exact_low", "exact_high", "samples"]
GROUP_COLUMNS = ["routing against", "correlation", "low", "high", "p"]
HEAD_COLUMNS = ["module", "one", "other", "cosine", "overlap", "overlap_by_chance"]
Edit = Callable[[str, torch.Tensor], torch.Tensor]


# ---- the measure

def form_of(runs: Sequence[Run]) -> str:
    """The form of answers that all these runs were trained on. Raises ValueError where they differ."""
    forms = {run.name: run.form for run in runs}
    if len(set(forms.values())) != 1:
        raise ValueError(f"mechanism: {', '.join(forms)} were trained on different forms of answer, and cannot be compared; give each "
                         "method a joint run of one form (methods.*.runs)")  # fmt: skip
    return runs[0].form


def true_answers(dataset: str | Path, encoded: str | Path, slot: str, form: str, samples: int) -> list[tuple]:
    """Pairs of encoded test sample and true answer, spread evenly; samples without an answer are passed over.

    Args:
        form: of the answers, where the record gives them in words; published test records that do not have bare ones.

    Raises:
        ValueError: on samples that are no records of the dataset, or none that has an answer.
    """
    data = read_slot(encoded, slot, "test")
    by_id = {record["id"]: record for record in records.read(dataset, slot, "test")}
    entry, pairs = tasks.get_slot(slot), []
    for i in spread(len(data), samples):
        if data.ids[i] not in by_id:
            raise ValueError(f"{encoded}: {slot}: sample {data.ids[i]!r} is no record of {dataset}; run the encode stage again")
        record = by_id[data.ids[i]]
        if entry.answer_field in record:
            text = tasks.target(slot, record, form)
        else:
            text = true_answer(slot, record) if entry.masks else tasks.answer(slot, tasks.truth(slot, record))
        if text:
            pairs.append((data.samples[i], text))
    if not pairs:
        raise ValueError(f"{encoded}: {slot}: none of {samples} test samples has a true answer to look at; take more, or leave the slot out")
    return pairs


@torch.no_grad()
def likelihood(model, batches: Sequence[Mapping[str, torch.Tensor]], seen: Callable | None = None) -> np.ndarray:
    """Teacher-forced measure of batches with ``labels``, [samples, 2].

    Args:
        seen: called with each batch before it is run.

    Returns:
        Mean log-probability of the answer's tokens in nats, the end token included; and 1 where each of them is the
        most likely one, so that greedy generation gives this very answer, else 0.
    """
    found = []
    for made in batches:
        if seen is not None:
            seen(made)
        states = last_hidden(model, made)
        labels = made["labels"][:, 1:]
        here = labels != omni.IGNORE
        logits, wanted, row = model.lm_head(states[:, :-1][here]).float(), labels[here], here.nonzero()[:, 0]
        logs = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        wrong = (logits.argmax(-1) != wanted).float()
        total = torch.zeros(len(labels), 2, device=logs.device).index_add_(0, row, torch.stack([logs, wrong], 1))
        found.append(torch.stack([total[:, 0] / here.sum(1), (total[:, 1] == 0).float()], 1).double().cpu().numpy())
    return np.concatenate(found)


# ---- what is changed

def named(change: str, of: str) -> str:
    """A change in words: ``head 0 off, others rescaled``."""
    return f"head {of}{change.removeprefix('head')}" if change in (HEAD, RESCALED) else f"{change} {of}".strip()


@contextmanager
def edited_routing(model, edit: Edit) -> Iterator[None]:
    """Pass the routers' weights through ``edit`` while the block runs.

    Args:
        edit: given a module's name as in the base model and its weights [batch, tokens, heads], returns new ones.
    """
    layers = {name.removeprefix(WRAPPER): m for name, m in model.named_modules() if isinstance(m, ILoraLayer)}
    if not layers:
        raise ValueError("mechanism: the model has no I-LoRA layers; give a folder of an I-LoRA run")
    handles = []
    try:
        for name, layer in layers.items():
            for adapter in layer.active_adapters:
                def hook(module, args, weights, name=name):
                    return edit(name, weights)

                handles.append(layer.ilora_router[adapter].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def without(head: int, rescale: bool) -> Edit:
    """Switch a head off in every module; ``rescale`` makes the other heads' weights sum to 1 again."""

    def edit(name: str, weights: torch.Tensor) -> torch.Tensor:
        weights = weights.clone()
        weights[..., head] = 0
        return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny) if rescale else weights

    return edit


class MeanRouting:
    """Routes every token by the mean weights that one slot has for its kind of token.

    Call `label` with each batch before it is run; use it as the edit of `edited_routing`.
    """

    def __init__(self, config, gates: Mapping[str, torch.Tensor]):
        self.config, self.gates = config, gates
        self.kinds: torch.Tensor | None = None

    def label(self, made: Mapping[str, torch.Tensor]) -> None:
        self.kinds = segments(self.config, made).clamp_min(0)  # padding is looked at by nobody

    def __call__(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        return self.gates[name].to(weights)[self.kinds]


def mean_gates(means, slot: str) -> dict[str, torch.Tensor]:
    """A slot's mean weights by module, [segments, heads]; a kind of token it does not have gets the mean of all.

    Args:
        means: of `crab.ilora.record_routing_means`, labelled by slot.
    """
    overall = means.weights(slot)
    found = {name: weights.repeat(len(SEGMENTS), 1) for name, weights in overall.items()}
    for place, segment in enumerate(SEGMENTS):
        for name, weights in means.weights(slot, [segment]).items():
            found[name][place] = weights
    return found


def causes(
    adapter: str | Path,
    dataset: str | Path,
    encoded: str | Path,
    base: str | Path,
    slots: Sequence[str],
    form: str = "bare",
    samples: int = 40,
    swap_samples: int = 16,
    batch_size: int = 32,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict, np.ndarray]:
    """Change a joint I-LoRA adapter's routing and see which slots pay.

    Args:
        adapter: folder of the run. dataset: root that holds ``AVUIE_2``.
        samples: test samples a slot; ``swap_samples`` of them for the swaps, of which there are slots x slots.

    Returns:
        A row a slot and change (`COLUMNS`): ``cost`` in nats a token, the mean log-likelihood lost, and ``exact``, the
        share of answers lost, with 95 % paired bootstrap intervals over samples. ``of`` is the head that is off or the
        slot whose routing is used.
        Summary over slots (see `summarise`).
        Mean routing of each slot, [slots, modules x segments x heads].
    """
    disable_progress_bar()  # of each model that is loaded
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    (heads,) = {layer.num_heads[name] for layer in model.modules() if isinstance(layer, ILoraLayer) for name in layer.active_adapters}
    pairs = {slot: true_answers(dataset, encoded, slot, form, samples) for slot in slots}

    def batches(chosen: Sequence[tuple]) -> list[dict]:
        return [batch(model, processor.tokenizer, *map(list, zip(*chosen[i : i + batch_size], strict=True)))
                for i in range(0, len(chosen), batch_size)]  # fmt: skip

    routed = {}
    with record_routing_means(model) as means:
        for slot in slots:
            routed[slot] = likelihood(model, batches(pairs[slot]), lambda made: means.label(segments(model.config, made), slot))
    gates = {slot: MeanRouting(model.config, mean_gates(means, slot)) for slot in slots}
    lost: dict[str, dict[tuple, np.ndarray]] = {}
    for slot in slots:
        made, now = batches(pairs[slot]), routed[slot]
        found = lost.setdefault(slot, {})
        with model.disable_adapter():
            found[OFF, ""] = now - likelihood(model, made)
        for name, rescale in ((HEAD, False), (RESCALED, True)):
            for head in range(heads):
                with edited_routing(model, without(head, rescale)):
                    found[name, str(head)] = now - likelihood(model, made)
        with fixed_routing(model, [1 / heads] * heads):
            found[UNIFORM, ""] = now - likelihood(model, made)
        with edited_routing(model, gates[slot]):
            own = likelihood(model, made, gates[slot].label)
        found[OWN, ""] = now - own
        few = spread(len(pairs[slot]), swap_samples)
        made = batches([pairs[slot][i] for i in few])
        for other in slots:
            if other != slot:
                with edited_routing(model, gates[other]):
                    found[OTHER, other] = own[few] - likelihood(model, made, gates[other].label)
    rows = [
        {"slot": slot, "change": change, "of": of, **_row(values, resamples, seed)}
        for slot, found in lost.items()
        for (change, of), values in found.items()
    ]
    routing = np.stack([np.concatenate([g.numpy().ravel() for g in gates[slot].gates.values()]) for slot in slots])
    return pd.DataFrame(rows, columns=COLUMNS), summarise(lost, heads, resamples, seed), routing


def _row(values: np.ndarray, resamples: int, seed: int) -> dict:
    (low, high), (exact_low, exact_high) = (interval(bootstrap_means(column, resamples, seed)) for column in values.T)
    return {"cost": values[:, 0].mean(), "low": low, "high": high, "exact": values[:, 1].mean(),
            "exact_low": exact_low, "exact_high": exact_high, "samples": len(values)}  # fmt: skip


def summarise(lost: Mapping[str, Mapping[tuple, np.ndarray]], heads: int, resamples: int, seed: int) -> dict:
    """Mean costs over slots, in nats a token, with 95 % intervals; and which head each slot leans on.

    Args:
        lost: by slot and (change, of), what each sample loses, [samples, 2].

    Returns:
        ``cost`` by change: mean, low, high and the worst slot; a swap's is the mean over all the other slots.
        ``leans``: slots that need one head clearly more than any other, with that head (the paired interval of the
        difference to the next one leaves out 0; 95 % for all slots together, by Bonferroni).
    """
    changes = [(OFF, ""), *((name, str(head)) for name in (HEAD, RESCALED) for head in range(heads)), (UNIFORM, ""), (OWN, "")]
    cost = {}
    for change, of in changes:
        cost[named(change, of)] = _mean({slot: found[change, of][:, 0] for slot, found in lost.items()}, resamples, seed)
    swapped = {
        slot: np.mean([values[:, 0] for (change, _), values in found.items() if change == OTHER], axis=0)
        for slot, found in lost.items()
        if len(lost) > 1
    }
    if swapped:
        cost[ANOTHER] = _mean(swapped, resamples, seed)
    leans = {}
    for slot, found in lost.items():
        each = np.stack([found[HEAD, str(head)][:, 0] for head in range(heads)])
        order = np.argsort(-each.mean(1), kind="stable")
        if heads > 1:
            ahead = bootstrap_means(each[order[0]] - each[order[1]], resamples, seed)
            if interval(ahead, 1 - 0.05 / len(lost))[0] > 0:
                leans[slot] = int(order[0])
    return {"slots": len(lost), "heads": heads, "cost": cost, "leans": leans}


def _mean(values: Mapping[str, np.ndarray], resamples: int, seed: int) -> dict:
    draws = np.mean([bootstrap_means(v, resamples, seed, slot) for slot, v in values.items()], axis=0)
    means = {slot: float(v.mean()) for slot, v in values.items()}
    low, high = interval(draws)
    return {"mean": float(np.mean(list(means.values()))), "low": low, "high": high, "worst": max(means, key=means.get)}


# ---- how alike the heads are, and how slots group

def head_similarity(adapter: str | Path, base: str | Path) -> pd.DataFrame:
    """Pairs of heads in every module (`HEAD_COLUMNS`).

    ``cosine`` is that of the updates B_i A (with one A, of what the heads write). ``overlap`` compares the spaces they
    write to, whatever they write there: the mean squared cosine of the principal angles (Bjorck and Golub, 1973) between
    the columns of B_i and B_j, 1 for one space and rank / out for two random ones.
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
        # <B_i A_i, B_j A_j> = trace((B_i' B_j) (A_j A_i')), without any matrix of the layer's own size
        products = torch.einsum("iok,jol,jlx,ikx->ij", up, up, down, down)
        spaces = torch.linalg.qr(up).Q
        for i in range(heads):
            for j in range(i + 1, heads):
                cosine = products[i, j] / (products[i, i] * products[j, j]).sqrt()
                overlap = torch.linalg.matrix_norm(spaces[i].T @ spaces[j]) ** 2 / spaces.shape[2]
                rows.append([name.removeprefix(WRAPPER), i, j, float(cosine), float(overlap), rank / up.shape[1]])
    return pd.DataFrame(rows, columns=HEAD_COLUMNS)


def distances(features: np.ndarray) -> np.ndarray:
    """Euclidean distances between rows, [slots, slots]."""
    features = np.asarray(features, float)
    return np.linalg.norm(features[:, None] - features[None], axis=-1)


def mantel(one: np.ndarray, other: np.ndarray, permutations: int, seed: int) -> dict:
    """Do two distances group the same things alike? Mantel's (1967) test with Spearman's rank correlation.

    Args:
        one, other: symmetric distances [things, things], in the same order; at least 4 things.

    Returns:
        ``correlation``; ``low`` and ``high``, within which it falls for 95 % of random relabellings of the things; and
        the two-sided ``p``.
    """
    one, other = np.asarray(one, float), np.asarray(other, float)
    if one.shape != other.shape or len(one) < 4:
        raise ValueError(f"mantel: two distances of at least 4 same things are needed, got {one.shape} and {other.shape}")
    pairs = np.triu_indices(len(one), 1)
    ranks = rankdata(one[pairs])
    ranked = np.zeros_like(other)
    ranked[pairs] = rankdata(other[pairs])
    ranked += ranked.T

    def correlation(order: np.ndarray) -> float:
        found = ranked[np.ix_(order, order)][pairs]
        return float(np.corrcoef(ranks, found)[0, 1]) if found.std() and ranks.std() else 0.0

    rng = np.random.default_rng(seed)
    by_chance = np.array([correlation(rng.permutation(len(one))) for _ in range(permutations)])
    found = correlation(np.arange(len(one)))
    low, high = interval(by_chance)
    extreme = int((np.abs(by_chance) >= abs(found) - 1e-12).sum())
    return {"correlation": found, "low": low, "high": high, "p": (1 + extreme) / (1 + permutations)}


def gains(samples: pd.DataFrame, slots: Sequence[str], baseline: str = "single-lora-bare") -> np.ndarray:
    """What each slot gains by each joint run, [slots, joint families].

    Args:
        samples: per-sample scores, as `crab.study.score` writes them. baseline: family of single-task runs.

    Raises:
        ValueError: a slot was not scored by the baseline and by every joint family.
    """
    mean = samples.pivot_table(index="slot", columns="family", values="score", sort=False)
    joint = [family for family in mean.columns if family.startswith("joint-")]
    mean = mean.reindex(index=list(slots), columns=[baseline, *joint])
    missing = mean.index[mean.isna().any(axis=1)].tolist()
    if missing or not joint:
        raise ValueError(
            f"mechanism: {', '.join(missing) or 'every slot'} lacks scores of {baseline} or of a joint run; run the evaluate stage again"
        )
    return mean[joint].sub(mean[baseline], axis=0).to_numpy()


def groupings(
    slots: Sequence[str],
    routing: np.ndarray,
    pairs: pd.DataFrame,
    gained: np.ndarray,
    point: str | None = "end",
    permutations: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation of how routing groups slots with how gradients and transfer do, a row a comparison.

    Empty with fewer than four slots, which have too few groupings.

    Args:
        routing: mean routing of each slot, of `causes`.
        pairs: of `crab.study.conflict.conflicts`; slots are as far apart as 1 - cosine.
        gained: of `gains`.
        point: where gradients are taken (see `crab.study.conflict.last_reliable`); None leaves them out.
    """
    by = {"gains by joint training": distances(gained)}
    for method in dict.fromkeys(pairs["method"]) if point else ():
        part = pairs[(pairs["method"] == method) & (pairs["point"] == point) & (pairs["part"] == ALL)]
        found = part.pivot(index="one", columns="other", values="cosine").reindex(index=slots, columns=slots).to_numpy()
        upper = np.where(np.isnan(found), found.T, found)
        distance = 1 - upper
        np.fill_diagonal(distance, 0)
        by[f"gradients in {method}"] = distance
    rows = [
        {"routing against": name, **mantel(distances(routing), other, permutations, seed)}
        for name, other in by.items()
        if len(slots) >= 4
    ]
    return pd.DataFrame(rows, columns=GROUP_COLUMNS)


# ---- in words

def finding(
    effects: pd.DataFrame, summary: Mapping, conflict: pd.DataFrame, drawn: Mapping[tuple, np.ndarray],
    methods: Sequence[str] = ("lora", "lora_matched", "ilora"),
) -> str:  # fmt: skip
    """The result in two sentences: whether routing lessens conflict, and what it goes by.

    Args:
        effects, summary: of `causes`. conflict, drawn: summary and draws of `crab.study.conflict.conflicts`.
        methods: plain LoRA, plain LoRA of the routed one's size, with which that is compared, and the routed one.
    """
    return f"{_of_conflict(conflict, drawn, methods)} {_of_routing(effects, summary)}"


def _of_conflict(conflict: pd.DataFrame, drawn: Mapping[tuple, np.ndarray], methods: Sequence[str]) -> str:
    point = last_reliable(conflict, methods)
    if point is None:
        return "At no point of training can the slots' gradients be told from noise on so few samples, so nothing is known of conflict."
    at = conflict[(conflict["point"] == point) & (conflict["part"] == ALL)].set_index("method")
    *_, rival, routed = methods
    low, high = interval((drawn[routed, point, ALL] - drawn[rival, point, ALL]).mean(1))
    told = "agree more" if low > 0 else "agree less" if high < 0 else "agree neither more nor less, measurably,"
    each = ", ".join(f"{at.loc[m, 'clear_negative']} in `{m}` (mean cosine {at.loc[m, 'cosine']:+.2f})" for m in methods)
    return (
        f"{POINT_NAMES[point]}, the last point at which they can be told from noise, the gradients of two slots clearly point "
        f"against each other for this many of {at.loc[routed, 'pairs']} pairs: {each}; slots {told} with routing than in a LoRA of "
        f"its size (by {low:+.2f} to {high:+.2f})."
    )


def _of_routing(effects: pd.DataFrame, summary: Mapping) -> str:
    cost = summary["cost"]
    token, slot = cost[OWN], cost.get(ANOTHER)
    if slot is None:
        return "With one slot there is no other's routing to swap in."
    by = [name for name, values in (("token", token), ("slot", slot)) if values["low"] > 0]
    if len(by) == 2:
        more, less = ("token", "slot") if token["mean"] > slot["mean"] else ("slot", "token")
        goes = f"goes by {more} more than by {less}"
    else:
        goes = f"goes by {by[0]}, and measurably by nothing else" if by else "does nothing that can be measured"
    off = effects[effects["change"] == HEAD]
    spread_of = off.groupby("of")["cost"].agg(lambda values: values.max() - values.min())
    part = off[off["of"] == spread_of.idxmax()]
    most, least = part.loc[part["cost"].idxmax()], part.loc[part["cost"].idxmin()]
    return (
        f"I-LoRA's routing {goes} (held at the slot's own mean it costs {_interval(token)} nats a token, at another slot's "
        f"{_interval(slot)} more, no adapter {cost[OFF]['mean']:+.2f}), and head {most['of']} is worth most to `{most['slot']}` "
        f"({_interval(most, 'cost')}) and least to `{least['slot']}` ({_interval(least, 'cost')})."
    )


def _interval(values: Mapping, name: str = "mean") -> str:
    return f"{values[name]:+.2f} [{values['low']:+.2f}, {values['high']:+.2f}]"


def cost_table(summary: Mapping) -> pd.DataFrame:
    """Mean cost of each change over slots, a row a change."""
    columns = {"mean": "cost", "low": "low", "high": "high", "worst": "worst slot"}
    return pd.DataFrame(summary["cost"]).T.rename(columns=columns).rename_axis("change").reset_index()


def head_table(heads: pd.DataFrame) -> pd.DataFrame:
    """Mean similarity of heads by kind of module, of `head_similarity`."""
    kind = heads["module"].str.rpartition(".")[2]
    found = heads.groupby(kind, sort=False)[["cosine", "overlap", "overlap_by_chance"]].mean()
    return found.rename_axis("module").round(3)


def write(
    out: str | Path, effects: pd.DataFrame, summary: Mapping, pairs: pd.DataFrame, conflict: pd.DataFrame,
    heads: pd.DataFrame, groups: pd.DataFrame,
) -> None:  # fmt: skip
    """Write the tables as ``effects.csv``, ``gradients.csv`` and ``heads.csv``, and ``metrics.json``."""
    for name, table in (("effects", effects), ("gradients", pairs), ("heads", heads)):
        with atomic_file(Path(out) / f"{name}.csv") as path:
            table.to_csv(path, index=False, float_format="%.5g")

    found: dict = {}
    for row in conflict.to_dict("records"):
        method, point, part = (row.pop(name) for name in ("method", "point", "part"))
        found.setdefault(method, {}).setdefault(point, {})[part] = _rounded(row)
    alike = {row.pop("routing against"): _rounded(row) for row in groups.to_dict("records")}
    write_json(Path(out) / "metrics.json", {**summary, "conflict": found, "routing_groups_as": alike})


def _rounded(row: Mapping) -> dict:
    return {k: (round(v, 4) if np.isfinite(v) else None) if isinstance(v, float) else v for k, v in row.items()}
