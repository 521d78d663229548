"""Do slots pull an adapter in opposite directions? Cosines between the gradients of their losses.

Two slots conflict if the cosine is negative: a step that helps one then hurts the other (Yu et al., 2020).
"""

from __future__ import annotations

import itertools
import re
import zlib
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
from crab.study.compare import interval
from crab.study.samples import read_slot, spread

#: Where gradients are taken, on the straight line from an adapter's first weights (0) to its trained ones (1).
POINTS = {"start": 0.0, "half-way": 0.5, "end": 1.0}
#: Gradients of lower reliability cannot be told from noise (see `cosines`).
RELIABLE = 0.5
ALL = "all"
PAIRS = ["method", "point", "part", "one", "other", "cosine", "low", "high"]
MEANS = [
    *("method", "point", "part", "pairs", "negative", "negative_low", "negative_high"),
    *("cosine", "cosine_low", "cosine_high", "clear_negative", "clear_positive", "reliability"),
]
#: Gradients of more numbers than this are hashed down to it (see `sketch`).
WIDTH = 2**20
_PARAMETER = re.compile(
    r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|ilora_A|ilora_B|ilora_router)\.(?P<adapter>[^.]+)\.weight"
)


def unfrozen_parameters(model) -> dict[str, torch.nn.Parameter]:
    """The parameters of LoRA or I-LoRA by name, made trainable. Raises ValueError if the model has none."""
    parameters = {name: p for name, p in model.named_parameters() if _PARAMETER.fullmatch(name)}
    if not parameters:
        raise ValueError("gradients: the model has no LoRA or I-LoRA parameters; give a folder of the train stage")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def pieces(model, name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """One parameter's gradient by part of the adapter: ``A``, ``B``, ``router``, or ``head 0``, ``head 1``, ..."""
    match = _PARAMETER.fullmatch(name)
    if match["kind"] != "ilora_B":
        return {match["kind"].rpartition("_")[2]: gradient}
    heads = model.get_submodule(match["layer"]).num_heads[match["adapter"]]
    return {f"head {i}": gradient.unflatten(1, (heads, -1))[:, i] for i in range(heads)}  # [B_0 | B_1 | ...]


def sketch(tensors: Mapping[str, torch.Tensor], width: int = WIDTH) -> torch.Tensor:
    """Tensors laid end to end, hashed down to ``width`` numbers if they hold more.

    A count sketch (Charikar, Chen and Farach-Colton, 2002) adds each number with a fixed random sign to a fixed random
    place. Inner products stay right on average, with a relative error of about 1 / sqrt(width).
    """
    flat = [tensor.detach().float().cpu().flatten() for tensor in tensors.values()]
    if sum(map(len, flat)) <= width:
        return torch.cat(flat)
    total = torch.zeros(width)
    for name, values in zip(tensors, flat, strict=True):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        places = torch.randint(width, values.shape, generator=draw)
        signs = torch.randint(2, values.shape, generator=draw) * 2 - 1
        total.index_add_(0, places, values * signs)
    return total


def gradient_products(model, tokenizer, data: Mapping[str, Sequence[tuple]], chunk: int) -> dict[str, np.ndarray]:
    """Inner products of the gradients of small batches.

    Args:
        data: by slot, pairs of sample and answer, the same number for each slot.
        chunk: samples of a slot whose gradient is taken together.

    Returns:
        By part (see `pieces`, and ``all``), float64 [slots, chunks, slots, chunks].
    """
    parameters = unfrozen_parameters(model)
    rows: dict[str, list[torch.Tensor]] = {}
    for pairs in data.values():
        for start in range(0, len(pairs), chunk):
            samples, answers = map(list, zip(*pairs[start : start + chunk], strict=True))
            loss, _ = answer_loss(model, batch(model, tokenizer, samples, answers), 1)
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                for part, piece in pieces(model, name, gradient).items():
                    parts.setdefault(part, {})[name] = piece
            for part, tensors in parts.items():
                rows.setdefault(part, []).append(sketch(tensors))
    products = {}
    for part in sorted(rows):
        stacked = torch.stack(rows[part]).double()
        products[part] = (stacked @ stacked.T).numpy().reshape(2 * (len(data), len(stacked) // len(data)))
    return {ALL: sum(products[part] for part in rows), **products}


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines [slots, slots] of the slots' mean gradients, with each slot's reliability on the diagonal.

    Reliability is the share of a mean gradient's squared length that other samples would show too: the mean product of
    different chunks over that of all chunks. It is 0 for pure noise. Cosines of unreliable gradients are drawn to 0.

    Args:
        products: [slots, chunks, slots, chunks] of `gradient_products`.
    """
    slots, chunks = products.shape[:2]
    mean = products.mean((1, 3))
    length = np.sqrt(np.maximum(np.diag(mean), 0))
    scale = np.outer(length, length)
    result = np.divide(mean, scale, out=np.zeros_like(mean), where=scale > 0)
    for s in range(slots):
        own = products[s, :, s, :]
        shared = (own.sum() - np.trace(own)) / (chunks * (chunks - 1)) if chunks > 1 else np.nan
        result[s, s] = shared / mean[s, s] if mean[s, s] > 0 else np.nan
    return result


def pair_draws(products: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Cosines with the chunks drawn again, [resamples, pairs], pairs in the order of ``np.triu_indices(slots, 1)``.

    Lengths stay those of the full sample: a gradient drawn again holds the noise twice and would seem longer. Equal
    seeds and shapes draw equal chunks, so that two adapters can be compared on the same samples.
    """
    slots, chunks = products.shape[:2]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(chunks, np.full(chunks, 1 / chunks), size=(resamples, slots)) / chunks
    one, other = np.triu_indices(slots, 1)
    length = np.sqrt(np.maximum(np.diag(products.mean((1, 3))), 0))
    scale = length[one] * length[other]
    draws = np.empty((resamples, len(one)))
    for pair, (s, t) in enumerate(zip(one, other, strict=True)):
        draws[:, pair] = ((counts[:, s] @ products[s, :, t, :]) * counts[:, t]).sum(1)
    return np.divide(draws, scale, out=np.zeros_like(draws), where=scale > 0)


def read_pairs(
    encoded: str | Path, slots: Sequence[str], form: str, samples: int, chunk: int
) -> dict[str, list[tuple]]:
    """Training samples with their answers by slot, evenly spread: whole chunks, the same number for each slot."""
    data = {slot: read_slot(encoded, slot, "train").answered(form) for slot in slots}
    fewest = min(samples, *map(len, data.values()))
    if fewest < 2 * chunk:
        raise ValueError(
            f"gradients: {fewest} samples per slot are fewer than two chunks of {chunk}; raise gradient_samples"
        )
    return {slot: [pairs[i] for i in spread(len(pairs), fewest - fewest % chunk)] for slot, pairs in data.items()}


def part_way(base: str | Path, adapter: str | Path, way: float, seed: int = 0):
    """The model and its processor, with the adapter at ``way`` between its first weights (0) and its trained ones (1).

    Args:
        seed: of the training run, which draws the first weights.
    """
    torch.manual_seed(seed)
    model, processor = load_base(base)
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(model, config).eval()
    trained = load_peft_weights(str(adapter), device="cpu")
    with torch.no_grad():
        for name, parameter in unfrozen_parameters(model).items():
            match = _PARAMETER.fullmatch(name)
            parameter.lerp_(trained[f"{match['layer']}.{match['kind']}.weight"].to(parameter), way)
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # the backward pass of torch's fused attention is slow on CPUs
    return model, processor


def conflicts(
    cells: Sequence,
    adapters: str | Path,
    encoded: str | Path,
    base: str | Path,
    samples: int = 24,
    chunk: int = 4,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[tuple[str, str, str], np.ndarray]]:
    """Gradient conflict of joint adapters on training samples, at `POINTS`.

    Args:
        cells: one trained cell per method, all of the same slots and form. adapters: holds a folder per cell.
        samples, chunk: samples per slot, and how many are taken together. Intervals draw these chunks again.

    Returns:
        Pairs of slots (`PAIRS`, 95 % intervals); where one slot is both, the cosine is its reliability.
        Means over pairs (`MEANS`). ``negative`` is the share of negative cosines, between the share of those negative
        over their whole interval and that of all but those positive over it (draws of the share itself would be
        pulled to a half by the noise they add). ``reliability`` is the median over slots.
        By (method, point, part), the draws of all pairs, for paired comparisons.
    """
    disable_progress_bar()  # of each model that is loaded
    slots, form = cells[0].slots, cells[0].form
    if different := [cell.name for cell in cells if (list(cell.slots), cell.form) != (list(slots), form)]:
        raise ValueError(
            f"gradients: {', '.join(different)} and {cells[0].name} were trained on different slots or forms of answer "
            "and cannot be compared; give each method a joint run of one form (train.methods.*.runs in params.yaml)"
        )
    data = read_pairs(encoded, slots, form, samples, chunk)
    rows, means, drawn = [], [], {}
    one, other = np.triu_indices(len(slots), 1)
    for cell, (point, way) in itertools.product(cells, POINTS.items()):
        for part, products in _products_at(base, Path(adapters) / cell.name, way, cell.seed, data, chunk).items():
            if not np.any(products):
                continue  # at the start B is 0, and nothing before it has a gradient
            key = (cell.method, point, part)
            table, draws = cosines(products), pair_draws(products, resamples, seed)
            pairs, reliability, drawn[key] = table[one, other], np.diag(table), draws
            low, high = np.quantile(draws, [0.025, 0.975], axis=0)
            of_pairs = zip(np.take(slots, one), np.take(slots, other), pairs, low, high, strict=True)
            rows += [(*key, *values) for values in of_pairs]
            rows += [(*key, slot, slot, own, np.nan, np.nan) for slot, own in zip(slots, reliability, strict=True)]
            negative, positive = high < 0, low > 0  # clearly
            shares = ((pairs < 0).mean(), negative.mean(), 1 - positive.mean())
            cosine = (pairs.mean(), *interval(draws.mean(1)))
            counts = (negative.sum(), positive.sum())
            means.append((*key, len(pairs), *shares, *cosine, *counts, np.nanmedian(reliability)))
    return pd.DataFrame(rows, columns=PAIRS), pd.DataFrame(means, columns=MEANS), drawn


def _products_at(base, adapter, way: float, seed: int, data: Mapping[str, Sequence[tuple]], chunk: int) -> dict:
    model, processor = part_way(base, adapter, way, seed)  # local, so that two models never lie in memory
    return gradient_products(model, processor.tokenizer, data, chunk)


def last_reliable(means: pd.DataFrame) -> str | None:
    """The last of `POINTS` where the gradients of all methods are reliable (`RELIABLE`), or None.

    Args:
        means: of `conflicts`.
    """
    worst = means[means["part"] == ALL].groupby("point")["reliability"].min()
    reliable = [point for point in POINTS if worst.get(point, 0) >= RELIABLE]
    return reliable[-1] if reliable else None
