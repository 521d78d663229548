"""Do slots pull an adapter in opposite directions? Cosines between the gradients of their losses.

Two slots conflict if the cosine is negative: a step that helps one then hurts the other (Yu et al., 2020).
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig, get_peft_model
from peft.utils import load_peft_weights
from transformers.utils.logging import disable_progress_bar

from crab.models.batches import answer_loss, batch
from crab.models.checkpoint import load_base
from crab.samples.reading import read_slot, spread
from crab.study.cells import Cell
from crab.study.compare import interval

#: Where gradients are taken, on the straight line from an adapter's first weights (0) to its trained ones (1).
POINTS = {"start": 0.0, "half-way": 0.5, "end": 1.0}
ALL = "all"  # all parts of the adapter together
RELIABLE = 0.5  # gradients of lower reliability cannot be told from noise (see `cosines`)
WIDTH = 2**20  # longer gradients are hashed down to this many numbers (see `sketch`)
PAIRS = ["family", "point", "part", "one", "other", "cosine", "low", "high"]
MEANS = [
    *("family", "point", "part", "pairs", "negative", "negative_low", "negative_high"),
    *("cosine", "cosine_low", "cosine_high", "clear_negative", "clear_positive", "reliability"),
]


def trainable(model) -> dict[str, torch.nn.Parameter]:
    """The parameters of the adapter, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def pieces(model, name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """One parameter's gradient by part of the adapter: ``A``, ``B``, ``router``, or ``head 1``, ``head 2``, ..."""
    layer, kind, adapter, _ = name.rsplit(".", 3)
    if kind != "ilora_B":
        return {kind.rpartition("_")[2]: gradient}
    by_head = gradient.unflatten(1, (model.get_submodule(layer).num_heads[adapter], -1))  # [B_0 | B_1 | ...]
    return {f"head {i + 1}": by_head[:, i] for i in range(by_head.shape[1])}


def sketch(values: torch.Tensor, width: int = WIDTH) -> torch.Tensor:
    """A vector, hashed down to ``width`` numbers if it is longer; the same way each time.

    A count sketch (Charikar, Chen and Farach-Colton, 2002) adds each number with a fixed random sign to a fixed random
    place. Inner products stay right on average, with a relative error of about 1 / sqrt(width).
    """
    if len(values) <= width:
        return values
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(width, values.shape, generator=draw)
    signs = torch.randint(2, values.shape, generator=draw) * 2 - 1
    return torch.zeros(width).index_add_(0, places, values * signs)


def gradient_products(model, processor, data: Mapping[str, Sequence[tuple]], chunk: int) -> dict[str, np.ndarray]:
    """Inner products of the gradients of small batches, [slots, chunks, slots, chunks]; by part, and `ALL`.

    Args:
        data: by slot, pairs of sample and answer, the same number for each slot.
        chunk: samples of a slot whose gradient is taken together.
    """
    parameters = trainable(model)
    rows: dict[str, list[torch.Tensor]] = {}
    for pairs in data.values():
        for start in range(0, len(pairs), chunk):
            samples, answers = map(list, zip(*pairs[start : start + chunk], strict=True))
            loss, _ = answer_loss(model, batch(model, processor.tokenizer, samples, answers), 1)
            parts: dict[str, list[torch.Tensor]] = {}
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                for part, piece in pieces(model, name, gradient).items():
                    parts.setdefault(part, []).append(piece.float().cpu().flatten())
            for part, tensors in parts.items():
                rows.setdefault(part, []).append(sketch(torch.cat(tensors)))
    products = {}
    for part, vectors in rows.items():
        stacked = torch.stack(vectors).double()
        products[part] = (stacked @ stacked.T).numpy().reshape(2 * (len(data), len(vectors) // len(data)))
    return {ALL: sum(products.values()), **dict(sorted(products.items()))}


def cosines(products: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines between the mean gradients of slots, of `gradient_products`.

    Returns:
        Cosines [slots, slots], with each slot's reliability on the diagonal: the share of its gradient's squared length
        that other samples would show too, the mean product of different chunks over that of all. It is 0 for pure
        noise, and cosines of unreliable gradients are drawn to 0.
        Cosines with the chunks drawn again [resamples, pairs], pairs as in ``np.triu_indices(slots, 1)``. Lengths stay
        those of the full sample, since a gradient drawn again holds the noise twice and would seem longer. Equal seeds
        and shapes draw equal chunks, so that two adapters can be compared on the same samples.
    """
    slots, chunks = products.shape[:2]
    mean = products.mean((1, 3))
    length = np.sqrt(np.maximum(np.diag(mean), 0))
    scale = np.outer(length, length)
    table = np.divide(mean, scale, out=np.zeros_like(mean), where=scale > 0)
    for s in range(slots):
        own = products[s, :, s, :]
        shared = (own.sum() - np.trace(own)) / (chunks * (chunks - 1))
        table[s, s] = shared / mean[s, s] if mean[s, s] > 0 else np.nan
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(chunks, np.full(chunks, 1 / chunks), size=(resamples, slots)) / chunks
    pairs = np.triu_indices(slots, 1)
    draws = np.empty((resamples, len(pairs[0])))
    for pair, (one, other) in enumerate(zip(*pairs, strict=True)):
        draws[:, pair] = ((counts[:, one] @ products[one, :, other, :]) * counts[:, other]).sum(1)
    return table, np.divide(draws, scale[pairs], out=np.zeros_like(draws), where=scale[pairs] > 0)


def part_way(base: Path, adapter: Path, way: float, seed: int):
    """The base and its processor, with an adapter at ``way`` from the first weights that ``seed`` draws to its own."""
    torch.manual_seed(seed)
    model, processor = load_base(base)
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(model, config).eval()
    trained = load_peft_weights(str(adapter), device="cpu")
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.lerp_(trained[name.replace(".default.", ".")].to(parameter), way)
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # the backward pass of torch's fused attention is slow on CPUs
    return model, processor


def conflicts(
    cells: Sequence[Cell], adapters: Path, encoded: Path, base: Path, samples: int, chunk: int, resamples: int
) -> tuple[pd.DataFrame, pd.DataFrame, dict[tuple[str, str, str], np.ndarray]]:
    """Gradient conflict of joint adapters on training samples, at `POINTS`.

    Args:
        cells: one joint cell per family, all of the same slots and form. adapters: holds a folder per cell, by name.
        samples, chunk: samples per slot, and how many are taken together. Intervals draw these chunks again.

    Returns:
        Pairs of slots (`PAIRS`, 95% intervals); where one slot is both, the cosine is its reliability.
        Means over pairs (`MEANS`). ``negative`` is the share of negative cosines. It lies between the share of those
        negative over their whole interval and that of all but those positive over it. (Draws of the share itself would
        be pulled to a half by the noise they add.) ``reliability`` is the median over slots.
        By (family, point, part), the draws of all pairs, for paired comparisons.
    """
    disable_progress_bar()  # of each model that is loaded
    slots, form = list(cells[0].slots), cells[0].form
    if different := [cell.name for cell in cells if (list(cell.slots), cell.form) != (slots, form)]:
        raise ValueError(
            f"gradients: {', '.join(different)} and {cells[0].name} were trained on different slots or forms of answer "
            "and cannot be compared; give each method a joint run of one form (train.methods.*.runs in params.yaml)"
        )
    data = {slot: read_slot(encoded, slot, "train", base).answered(form) for slot in slots}
    count = min(samples, *map(len, data.values()))  # the same for each slot, in whole chunks
    if count < 2 * chunk:
        raise ValueError(
            f"gradients: {count} samples per slot are less than two chunks of {chunk}; raise gradient_samples"
        )
    data = {slot: [pairs[i] for i in spread(len(pairs), count - count % chunk)] for slot, pairs in data.items()}
    rows, means, drawn = [], [], {}
    one, other = np.triu_indices(len(slots), 1)
    for cell, (point, way) in itertools.product(cells, POINTS.items()):
        # the model has no name here, so that two never lie in memory
        by_part = gradient_products(*part_way(base, adapters / cell.name, way, cell.seed), data, chunk)
        for part, products in by_part.items():
            if not np.any(products):
                continue  # at the start B is 0, and nothing before it has a gradient
            key = (cell.family, point, part)
            table, drawn[key] = cosines(products, resamples, seed=0)
            pairs, reliability = table[one, other], np.diag(table)
            low, high = np.quantile(drawn[key], [0.025, 0.975], axis=0)
            of_pairs = zip(one, other, low, high, strict=True)
            rows += [(*key, slots[s], slots[t], table[s, t], *ends) for s, t, *ends in of_pairs]
            rows += [(*key, slot, slot, own, np.nan, np.nan) for slot, own in zip(slots, reliability, strict=True)]
            negative, positive = high < 0, low > 0  # over the whole interval
            shares = ((pairs < 0).mean(), negative.mean(), 1 - positive.mean())
            cosine = (pairs.mean(), *interval(drawn[key].mean(1)))
            counts = (negative.sum(), positive.sum())
            means.append((*key, len(pairs), *shares, *cosine, *counts, np.nanmedian(reliability)))
    return pd.DataFrame(rows, columns=PAIRS), pd.DataFrame(means, columns=MEANS), drawn


def last_reliable(means: pd.DataFrame) -> str | None:
    """The last of `POINTS` where gradients of all families are `RELIABLE`, by the means of `conflicts`, or None."""
    worst = means[means["part"] == ALL].groupby("point")["reliability"].min()
    reliable = [point for point in POINTS if worst.get(point, 0) >= RELIABLE]
    return reliable[-1] if reliable else None
