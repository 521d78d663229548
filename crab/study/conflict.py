"""Do slots pull an adapter in opposite directions? Cosines between the gradients of their losses.

Two slots conflict where the cosine is negative: a step that helps one then hurts the other (Yu et al., 2020).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig, get_peft_model
from peft.utils import load_peft_weights
from transformers.utils.logging import disable_progress_bar

from crab.data.files import read_json
from crab.study.dataset import batch, load_base, read_slot
from crab.study.resample import interval
from crab.study.spread import spread
from crab.study.train import answer_loss

#: Where gradients are taken, on the straight line from an adapter's first weights (0) to its last (1).
POINTS = {"start": 0.0, "half-way": 0.5, "end": 1.0}
#: Gradients of which less than this is reliable cannot be told from noise (see `cosines`).
RELIABLE = 0.5
ALL = "all"
COLUMNS = ["method", "point", "part", "one", "other", "cosine", "low", "high"]
SUMMARY = [
    "method", "point", "part", "pairs", "negative", "negative_low", "negative_high", "cosine", "cosine_low", "cosine_high",
    "clear_negative", "clear_positive", "reliability",
]  # fmt: skip
#: Gradients of more numbers than this are hashed down to it (see `sketch`).
WIDTH = 2**20
_PARAMETER = re.compile(r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|ilora_A|ilora_B|ilora_router)\.(?P<adapter>[^.]+)\.weight")


def unfrozen_parameters(model) -> dict[str, torch.nn.Parameter]:
    """LoRA's or I-LoRA's own parameters by name, made trainable.

    Raises:
        ValueError: when the model has none.
    """
    found = {name: p for name, p in model.named_parameters() if _PARAMETER.fullmatch(name)}
    if not found:
        raise ValueError("conflict: the model has no LoRA or I-LoRA parameters; give a folder of the train stage")
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def pieces(model, name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """What one parameter's gradient holds, by part: ``A``, ``B``, ``router``, or ``head 0``, ``head 1``, ..."""
    match = _PARAMETER.fullmatch(name)
    kind = match["kind"].rpartition("_")[2]
    if match["kind"] != "ilora_B":
        return {kind: gradient}
    heads = model.get_submodule(match["layer"]).num_heads[match["adapter"]]
    return {f"head {i}": gradient.unflatten(1, (heads, -1))[:, i] for i in range(heads)}  # [B_0 | B_1 | ...]


def sketch(named: Mapping[str, torch.Tensor], width: int = WIDTH) -> torch.Tensor:
    """Tensors laid end to end, hashed down to ``width`` numbers where they hold more.

    A count sketch (Charikar, Chen and Farach-Colton, 2002): each number is added with a fixed random sign to a fixed
    random place, which leaves inner products right on average with a relative error of about 1 / sqrt(width).
    """
    flat = [tensor.detach().float().cpu().flatten() for tensor in named.values()]
    if sum(map(len, flat)) <= width:
        return torch.cat(flat)
    total = torch.zeros(width)
    for name, values in zip(named, flat, strict=True):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        places = torch.randint(width, values.shape, generator=draw)
        signs = torch.randint(2, values.shape, generator=draw) * 2 - 1
        total.index_add_(0, places, values * signs)
    return total


def gradient_products(model, tokenizer, data: Mapping[str, Sequence[tuple]], chunk: int) -> dict[str, np.ndarray]:
    """Inner products of the gradients of small batches.

    Args:
        data: by slot, pairs of sample and answer; as many of each slot.
        chunk: samples of a slot whose gradient is taken together.

    Returns:
        By part (see `pieces`, and ``all``), float64 [slots, chunks, slots, chunks].
    """
    parameters = unfrozen_parameters(model)
    rows: dict[str, list[torch.Tensor]] = {}
    count = 0
    for pairs in data.values():
        count = len(range(0, len(pairs), chunk))
        for start in range(0, len(pairs), chunk):
            made = batch(model, tokenizer, *map(list, zip(*pairs[start : start + chunk], strict=True)))
            found = torch.autograd.grad(answer_loss(model, made, 1)[0], list(parameters.values()))
            parts: dict[str, dict[str, torch.Tensor]] = {}
            for name, gradient in zip(parameters, found, strict=True):
                for part, piece in pieces(model, name, gradient).items():
                    parts.setdefault(part, {})[name] = piece
            for part, named in parts.items():
                rows.setdefault(part, []).append(sketch(named))
    shape = (len(data), count, len(data), count)
    products = {part: (stacked @ stacked.T).numpy().reshape(shape) for part in rows for stacked in [torch.stack(rows[part]).double()]}
    return {ALL: sum(products.values()), **dict(sorted(products.items()))}


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines [slots, slots] of the slots' mean gradients; on the diagonal, how reliable each of them is.

    Reliability is the share of a mean gradient's squared length that other samples would show as well, the mean product
    of different chunks over that of all: 0 where it is noise alone. Cosines are drawn towards 0 by what it lacks of 1.

    Args:
        products: [slots, chunks, slots, chunks] of `gradient_products`.
    """
    slots, chunks = products.shape[:2]
    mean = products.mean((1, 3))
    length = np.sqrt(np.maximum(np.diag(mean), 0))
    scale = np.outer(length, length)
    found = np.divide(mean, scale, out=np.zeros_like(mean), where=scale > 0)
    for s in range(slots):
        own = products[s, :, s, :]
        shared = (own.sum() - np.trace(own)) / (chunks * (chunks - 1)) if chunks > 1 else np.nan
        found[s, s] = shared / mean[s, s] if mean[s, s] > 0 else np.nan
    return found


def pair_draws(products: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Cosines of all pairs of slots with the chunks drawn again, [resamples, pairs], pairs as ``np.triu_indices(slots, 1)``.

    Lengths stay those of the full sample: a gradient drawn again holds the noise twice, and would seem longer.
    Equal seed and shape draw equal chunks, so that two adapters can be compared on the same samples.
    """
    slots, chunks = products.shape[:2]
    counts = np.random.default_rng(seed).multinomial(chunks, np.full(chunks, 1 / chunks), size=(resamples, slots)) / chunks
    one, other = np.triu_indices(slots, 1)
    length = np.sqrt(np.maximum(np.diag(products.mean((1, 3))), 0))
    scale = length[one] * length[other]
    draws = np.empty((resamples, len(one)))
    for pair, (s, t) in enumerate(zip(one, other, strict=True)):
        draws[:, pair] = ((counts[:, s] @ products[s, :, t, :]) * counts[:, t]).sum(1)
    return np.divide(draws, scale, out=np.zeros_like(draws), where=scale > 0)


def read_pairs(encoded: str | Path, slots: Sequence[str], form: str, samples: int, chunk: int) -> dict[str, list[tuple]]:
    """Training samples with their answers by slot, spread evenly; as many of each slot, and whole chunks."""
    data = {slot: read_slot(encoded, slot, "train").answered(form) for slot in slots}
    fewest = min(samples, *map(len, data.values()))
    if fewest < 2 * chunk:
        raise ValueError(f"conflict: {fewest} samples a slot are fewer than two chunks of {chunk}; raise gradient_samples")
    chosen = {slot: [pairs[i] for i in spread(len(pairs), fewest - fewest % chunk)] for slot, pairs in data.items()}
    return chosen


def part_way(base: str | Path, adapter: str | Path, way: float):
    """The model and its processor with an adapter at ``way`` between its first weights (0) and its last (1).

    The first weights are those that the run's seed draws for its configuration.
    """
    torch.manual_seed(read_json(Path(adapter) / "run.json").get("seed", 0))
    model, processor = load_base(base)
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(model, config).eval()
    last = load_peft_weights(str(adapter), device="cpu")
    with torch.no_grad():
        for name, parameter in unfrozen_parameters(model).items():
            match = _PARAMETER.fullmatch(name)
            parameter.lerp_(last[f"{match['layer']}.{match['kind']}.weight"].to(parameter), way)
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # the backward pass of torch's fused attention is slow on CPUs
    return model, processor


def conflicts(
    adapters: Mapping[str, str | Path],
    encoded: str | Path,
    base: str | Path,
    form: str = "bare",
    samples: int = 24,
    chunk: int = 4,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[tuple[str, str, str], np.ndarray]]:
    """Gradient conflict of joint adapters on training samples, at `POINTS`.

    Args:
        adapters: method -> folder of its joint adapter; all must be trained on the same slots.
        samples, chunk: of each slot, taken together ``chunk`` at a time; intervals draw these batches again.

    Returns:
        The table of pairs (`COLUMNS`, 95 % intervals of each cosine), the summary over pairs (`SUMMARY`), and by
        (method, point, part) the draws of all pairs, for paired comparisons. In the summary `negative` is the share of
        pairs with a negative cosine, ``clear_negative`` of which stay so over their interval; it lies between the
        share of these and that of all pairs but the ``clear_positive``. (Draws of the share itself would not do: drawing
        again adds noise, which pulls it towards a half.) ``cosine`` is the mean, with its interval; ``reliability``
        the median over slots.
    """
    disable_progress_bar()  # of each model that is loaded
    trained = {method: read_json(Path(folder) / "run.json")["slots"] for method, folder in adapters.items()}
    slots = next(iter(trained.values()))
    if any(other != slots for other in trained.values()):
        raise ValueError(f"conflict: the adapters were trained on different slots: {trained}; train them again together")
    data = read_pairs(encoded, slots, form, samples, chunk)
    rows, summary, drawn = [], [], {}
    one, other = np.triu_indices(len(slots), 1)
    for method, folder in adapters.items():
        for point, way in POINTS.items():
            for part, products in _products_at(base, folder, way, data, chunk).items():
                if not np.any(products):
                    continue  # at the start B is 0, and nothing behind it has a gradient
                found, draws = cosines(products), pair_draws(products, resamples, seed)
                drawn[method, point, part] = draws
                head = {"method": method, "point": point, "part": part}
                low, high = np.quantile(draws, [0.025, 0.975], axis=0)
                rows += [
                    {**head, "one": slots[s], "other": slots[t], "cosine": found[s, t], "low": a, "high": b}
                    for s, t, a, b in zip(one, other, low, high, strict=True)
                ]
                rows += [{**head, "one": s, "other": s, "cosine": own} for s, own in zip(slots, np.diag(found), strict=True)]
                summary.append({**head, "pairs": len(one), **_over_pairs(found[one, other], draws, low, high),
                                "reliability": float(np.nanmedian(np.diag(found)))})  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(summary, columns=SUMMARY), drawn


def _products_at(base: str | Path, adapter: str | Path, way: float, data: Mapping[str, Sequence[tuple]], chunk: int) -> dict:
    model, processor = part_way(base, adapter, way)  # of this call alone, so that two never lie in memory
    return gradient_products(model, processor.tokenizer, data, chunk)


def _over_pairs(found: np.ndarray, draws: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict:
    cosine, clear = interval(draws.mean(1)), ((high < 0).sum(), (low > 0).sum())
    return {
        "negative": float((found < 0).mean()),
        "negative_low": float(clear[0] / len(found)), "negative_high": float(1 - clear[1] / len(found)),
        "cosine": float(found.mean()), "cosine_low": cosine[0], "cosine_high": cosine[1],
        "clear_negative": int(clear[0]), "clear_positive": int(clear[1]),
    }  # fmt: skip


def last_reliable(conflict: pd.DataFrame, methods: Iterable[str]) -> str | None:
    """The last of `POINTS` where the gradients of all of ``methods`` are at least `RELIABLE`; None if there is none.

    Args:
        conflict: the summary of `conflicts`.
    """
    whole = conflict[conflict["part"] == ALL].pivot(index="point", columns="method", values="reliability")
    fit = [point for point in POINTS if point in whole.index and (whole.loc[point, list(methods)] >= RELIABLE).all()]
    return fit[-1] if fit else None
