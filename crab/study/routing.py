"""What the routers of a joint I-LoRA adapter do: who is sent where, by slot, layer and kind of token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from crab.data.files import atomic_file, write_json
from crab.ilora import record_routing_means, routing_information
from crab.study.dataset import SEGMENTS, batch, load_base, read_slot, segments
from crab.study.predict import answer, load_adapter
from crab.study.runs import Run
from crab.study.spread import spread
from crab.study.states import last_hidden

COLUMNS = ["slot", "layer", "segment", "head", "weight", "entropy", "tokens"]


def share_of_maximum(bits, heads: int):
    """Entropy in bits (a number, array, tensor or column) as a share of its maximum: 0 one head alone, 1 all alike."""
    return bits / math.log2(max(heads, 2))  # of a single head it is 0


def layer_of(module: str) -> int:
    """Number of the language model's layer a module lies in."""
    found = re.search(r"\.layers\.(\d+)\.", module)
    if found is None:
        raise ValueError(f"{module}: not inside a numbered layer")
    return int(found[1])


@torch.no_grad()
def record_slot(model, tokenizer, samples: Sequence, batch_size: int, max_new_tokens: int) -> list[dict]:
    """Routing of one slot's samples with the answers the model itself gives them.

    Returns:
        Rows of layer, segment, head, weight (mean over tokens and the layer's modules), entropy (mean of each
        token's own, as a share of the maximum) and tokens.
    """
    texts = answer(model, tokenizer, samples, batch_size, max_new_tokens)
    with record_routing_means(model, SEGMENTS, generated=None) as means:
        for start in range(0, len(samples), batch_size):
            part = slice(start, start + batch_size)
            made = batch(model, tokenizer, samples[part], texts[part])
            means.label(segments(model.config, made))
            last_hidden(model, made)
    table = pd.DataFrame(means.rows())
    table["layer"] = table["module"].map(layer_of)
    table["kind"] = table["segment"].map(SEGMENTS.index)
    table["entropy"] = share_of_maximum(table["entropy"], table["head"].nunique())
    # the modules of a layer see the same tokens, so that each weighs alike
    what = {"segment": "first", "weight": "mean", "entropy": "mean", "tokens": "sum"}
    found = table.groupby(["layer", "kind", "head"], as_index=False).agg(what)
    return found.drop(columns="kind").to_dict("records")


def routing(
    adapter: str | Path,
    encoded: str | Path,
    base: str | Path,
    slots: Sequence[str],
    out: str | Path,
    samples: int,
    max_new_tokens: int,
    batch_size: int = 32,
) -> tuple[pd.DataFrame, dict]:
    """Record the routing of an I-LoRA adapter on test samples, spread evenly over the slots.

    Writes ``routing.csv`` and ``metrics.json`` to ``out``.

    Args:
        adapter: folder of a joint I-LoRA run. samples: in all, at least one a slot.
        max_new_tokens: of an answer; as the evaluate stage has it, or answers are cut that are not there.

    Returns:
        Table (`COLUMNS`), and a summary: mean entropy and mean weight of each head, over all tokens; and the mutual information
        in bits between slot and head, on average over layers, for each segment.
    """
    model, processor = load_base(base)
    peft_model = load_adapter(model, adapter)
    rows = []
    for slot in slots:
        data = read_slot(encoded, slot, "test")
        chosen = [data.samples[i] for i in spread(len(data), max(1, samples // len(slots)))]
        found = record_slot(peft_model, processor.tokenizer, chosen, batch_size, max_new_tokens)
        rows += [{"slot": slot, **row} for row in found]
    table = pd.DataFrame(rows, columns=COLUMNS)
    summary = summarise(table)
    with atomic_file(Path(out) / "routing.csv") as path:
        table.to_csv(path, index=False, float_format="%.6g")
    write_json(Path(out) / "metrics.json", summary)
    return table, summary


def summarise(table: pd.DataFrame) -> dict:
    """Numbers for `routing`, from its table."""
    information: dict[str, list[float]] = {}
    for (segment, _), part in table.groupby(["segment", "layer"], sort=False):
        gates = part.pivot(index="slot", columns="head", values="weight").to_numpy()
        information.setdefault(segment, []).append(routing_information(torch.tensor(gates)))
    heads = [part for _, part in table.groupby("head")]
    return {
        "mean_entropy": round(float(np.average(table["entropy"], weights=table["tokens"])), 4),
        "head_weight": [round(float(np.average(part["weight"], weights=part["tokens"])), 4) for part in heads],
        "slot_head_information_bits": {name: round(float(np.mean(v)), 4) for name, v in information.items()},
    }


def finding(summary: dict, run: Run) -> str:
    """How decided the routers of a run are, and what they know of the slot, in a sentence."""
    bits, weights = summary["slot_head_information_bits"], summary["head_weight"]
    knows, heads = max(bits, key=bits.get), len(weights)
    return (
        f"In `{run.name}` a token's weights have {summary['mean_entropy']:.0%} of the most entropy they could have, heads get {min(weights):.0%} to "
        f"{max(weights):.0%} of all weight (even: {1 / heads:.0%}), and which head a token is sent to tells at most {bits[knows]:.3f} bits about "
        f"its slot ({knows}; of {math.log2(heads):.2f} that {heads} heads could tell)."
    )


def information_table(summary: dict) -> pd.DataFrame:
    """Mutual information between slot and head in bits, a row a kind of token."""
    return pd.DataFrame(summary["slot_head_information_bits"].items(), columns=["tokens", "bits"])
