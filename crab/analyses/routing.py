"""Which heads the routers of a joint I-LoRA adapter choose, by slot, layer and kind of token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from crab.ilora import record_routing_means, routing_information
from crab.models.batches import SEGMENTS, batch, last_hidden, segments
from crab.models.checkpoint import load_base
from crab.models.protocol import model_of
from crab.samples.reading import read_slot, spread
from crab.study.answer import answer, load_adapter


@torch.no_grad()
def record_slot(model, tokenizer, samples: Sequence, batch_size: int, max_new_tokens: int) -> pd.DataFrame:
    """Routing of one slot's samples and of the model's own answers to them.

    Returns:
        Per ``layer``, ``segment`` and ``head``: ``weight``, the mean over tokens and modules; ``entropy``, the mean of
        each token's, as a share of its maximum (0: one head alone, 1: all alike); and ``tokens``.
    """
    texts = answer(model, tokenizer, samples, batch_size, max_new_tokens)
    language = model_of(model).language(model)  # encoders, if they are adapted, see other tokens
    with record_routing_means(language, SEGMENTS, generated=None) as means:
        for start in range(0, len(samples), batch_size):
            part = slice(start, start + batch_size)
            inputs = batch(model, tokenizer, samples[part], texts[part])
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
    """Mutual information between slot and head in bits, by kind of token, on average over layers.

    Args:
        table: of `routing`.
    """
    bits: dict[str, list[float]] = {}
    for (segment, _), part in table.groupby(["segment", "layer"], sort=False):
        gates = part.pivot(index="slot", columns="head", values="weight").to_numpy()
        bits.setdefault(segment, []).append(routing_information(torch.tensor(gates)))
    return {segment: float(np.mean(values)) for segment, values in bits.items()}
