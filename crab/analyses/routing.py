"""Which heads the routers of a joint I-LoRA adapter choose, by slot, layer and kind of token."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from crab.ilora import record_routing_means, routing_information
from crab.models.batches import PADDING, SEGMENTS, batch, last_hidden, segments
from crab.models.checkpoint import load_base
from crab.samples.reading import read_slot, spread
from crab.study.answer import answer, load_adapter
from crab.tasks import get_slot


@torch.no_grad()
def record_slot(model, tokenizer, samples: Sequence, batch_size: int, max_new_tokens: int) -> pd.DataFrame:
    """Routing of one slot's samples and of the model's own answers to them, per ``layer``, ``segment`` and ``head``.

    ``weight`` is the mean over tokens and modules; ``entropy`` the mean of each token's, as a share of its maximum (0:
    one head alone, 1: all alike); and ``tokens`` their number.
    """
    with record_routing_means(_language(model), SEGMENTS, generated=None) as means:
        for _, inputs in _answered(model, tokenizer, samples, batch_size, max_new_tokens):
            means.label(segments(model.config, inputs))
            last_hidden(model, inputs)
    table = pd.DataFrame(means.rows())
    table["layer"] = table["module"].str.extract(r"(?:^|\.)layers\.(\d+)\.", expand=False)
    if table["layer"].isna().any():
        raise ValueError(f"routing: {table['module'][table['layer'].isna()].iloc[0]} lies in no numbered layer")
    table["layer"] = table["layer"].astype(int)
    table["entropy"] /= math.log2(max(table["head"].nunique(), 2))  # bits to a share; a single head has 0 bits
    # the modules of a layer see the same tokens, so each weighs the same
    groups = table.groupby(["layer", "segment", "head"], sort=False, as_index=False)
    return groups.agg({"weight": "mean", "entropy": "mean", "tokens": "sum"})


def _language(model) -> torch.nn.Module:
    """Where routing is recorded: encoders, if they are adapted, see other tokens."""
    return next(part for name, part in model.named_modules() if name.endswith("language_model"))


def _answered(model, tokenizer, samples: Sequence, batch_size: int, max_new_tokens: int) -> Iterator[tuple[int, Any]]:
    """Batches of samples and the model's own answers to them, each with the number of its first sample."""
    texts = answer(model, tokenizer, samples, batch_size, max_new_tokens)
    for start in range(0, len(samples), batch_size):
        part = slice(start, start + batch_size)
        yield start, batch(model, tokenizer, samples[part], texts[part])


@torch.no_grad()
def sample_weights(model, tokenizer, samples: Sequence, batch_size: int, max_new_tokens: int) -> np.ndarray:
    """Mean routing weights of each sample [samples, heads], over all tokens of prompt and answer and all modules."""
    places = [str(place) for place in range(batch_size)]
    with record_routing_means(_language(model), places, generated=None) as means:
        for start, inputs in _answered(model, tokenizer, samples, batch_size, max_new_tokens):
            own = torch.arange(len(inputs["input_ids"]), device=model.device)[:, None]
            means.label(torch.where(inputs["attention_mask"] > 0, own, PADDING), group=start)
            last_hidden(model, inputs)
    table = pd.DataFrame(means.rows())
    table["sample"] = table["group"] + table["segment"].astype(int)
    return table.pivot_table("weight", "sample", "head").to_numpy()  # every module of the model weighs the same


def dots(
    adapter: Path, encoded: Path, base: Path, slots: Sequence[str], samples: int, max_new_tokens: int,
    batch_size: int = 32,
) -> pd.DataFrame:  # fmt: skip
    """One row per test sample: ``slot``, ``family``, ``id``, and the mean weight of each head, ``head 1`` and on.

    The arguments are those of `routing`.
    """
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    tables = []
    for slot in slots:
        data = read_slot(encoded, slot, "test", base)
        chosen = spread(len(data), max(1, samples // len(slots)))
        weights = sample_weights(model, processor.tokenizer, [data[i] for i in chosen], batch_size, max_new_tokens)
        names = [f"head {head + 1}" for head in range(weights.shape[1])]
        head = {"slot": slot, "family": get_slot(slot).family, "id": [data.ids[i] for i in chosen]}
        tables.append(pd.DataFrame(head).join(pd.DataFrame(weights, columns=names)))
    return pd.concat(tables, ignore_index=True)


def routing(
    adapter: Path, encoded: Path, base: Path, slots: Sequence[str], samples: int, max_new_tokens: int,
    batch_size: int = 32,
) -> pd.DataFrame:  # fmt: skip
    """`record_slot` of test samples of each slot, with a column ``slot``.

    Args:
        samples: in all, evenly spread over the slots, at least one per slot.
        max_new_tokens: of an answer; use the value of the evaluate stage, so that the answers are the same.
    """
    model, processor = load_base(base)
    model = load_adapter(model, adapter)
    tables = {}
    for slot in slots:
        data = read_slot(encoded, slot, "test", base)
        chosen = [data[i] for i in spread(len(data), max(1, samples // len(slots)))]
        tables[slot] = record_slot(model, processor.tokenizer, chosen, batch_size, max_new_tokens)
    return pd.concat(tables, names=["slot"]).reset_index("slot").reset_index(drop=True)


def information(table: pd.DataFrame) -> dict[str, float]:
    """Mutual information between slot and head in a table of `routing`: bits by kind of token, mean over layers."""
    bits: dict[str, list[float]] = {}
    for (segment, _), part in table.groupby(["segment", "layer"], sort=False):
        gates = part.pivot(index="slot", columns="head", values="weight").to_numpy()
        bits.setdefault(segment, []).append(routing_information(torch.tensor(gates)))
    return {segment: float(np.mean(values)) for segment, values in bits.items()}
