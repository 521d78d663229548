"""Where samples lie in the model: hidden states before the answer, drawn in a plane and measured by slot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from crab.data.files import atomic_file, write_json
from crab.study.dataset import batch, load_base, read_slot
from crab.study.predict import load_adapter
from crab.study.spread import spread
from crab.study.states import last_hidden

COLUMNS = ["model", "slot", "family", "id", "x", "y"]
BASE = "base"


@torch.no_grad()
def hidden(model, tokenizer, samples: Sequence, batch_size: int) -> np.ndarray:
    """Last layer's hidden state at the last token of each prompt, where the answer is about to begin: [N, hidden]."""
    rows = []
    for start in range(0, len(samples), batch_size):
        made = batch(model, tokenizer, samples[start : start + batch_size])
        rows.append(last_hidden(model, made)[:, -1].float().cpu().numpy())  # prompts are padded on the left
    return np.concatenate(rows)


def plane(states: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    """UMAP (McInnes et al., 2018) of [N, hidden] states to [N, 2]. Seeded, hence on one thread.

    Raises:
        ValueError: with fewer than 5 states, of which UMAP can make no neighbourhoods.
    """
    if len(states) < 5:
        raise ValueError(f"features: {len(states)} samples are too few for a map; raise features.samples")
    from umap import UMAP  # takes seconds to import

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*n_jobs value.*overridden.*")
        mapper = UMAP(
            n_neighbors=min(neighbours, len(states) - 1), min_dist=0.3, random_state=seed, n_jobs=1,
            init="spectral" if len(states) > 20 else "random",
        )  # fmt: skip
        return mapper.fit_transform(np.asarray(states, np.float32))


def silhouette(states: np.ndarray, labels: Sequence[str]) -> float | None:
    """Mean silhouette (Rousseeuw, 1987) of labelled states, -1 to 1; None where every label or none repeats."""
    from sklearn.metrics import silhouette_score

    if not 2 <= len(set(labels)) < len(labels):
        return None
    return round(float(silhouette_score(states, labels)), 4)


def features(
    adapters: Mapping[str, str | Path],
    encoded: str | Path,
    base: str | Path,
    slots: Sequence[str],
    families: Mapping[str, str],
    out: str | Path,
    samples: int = 400,
    neighbours: int = 15,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[pd.DataFrame, dict]:
    """Hidden states of the base and of adapted models on the same test samples.

    Writes ``features.csv`` and ``metrics.json`` to ``out``.

    Args:
        adapters: name in the table -> folder of the adapter; the bare base comes first of itself.
        families: task family by slot. samples: in all, spread evenly over the slots.
        neighbours, seed: of UMAP, which is fitted for each model alone: positions of two maps do not compare.

    Returns:
        Table (`COLUMNS`), and by model the silhouettes of the full hidden states by slot and by family.
    """
    data = {slot: read_slot(encoded, slot, "test") for slot in slots}
    chosen = [(slot, i) for slot in slots for i in spread(len(data[slot]), max(1, samples // len(slots)))]
    items = [data[slot].samples[i] for slot, i in chosen]
    names = [slot for slot, _ in chosen]
    kinds = [families[slot] for slot in names]
    tables, summary = [], {}
    for name, folder in {BASE: None, **adapters}.items():
        model, processor = load_base(base)
        if folder is not None:
            model = load_adapter(model, folder)
        states = hidden(model, processor.tokenizer, items, batch_size)
        points = plane(states, neighbours, seed)
        tables.append(
            pd.DataFrame(
                {"model": name, "slot": names, "family": kinds, "id": [data[s].ids[i] for s, i in chosen],
                 "x": points[:, 0], "y": points[:, 1]}, columns=COLUMNS,
            )  # fmt: skip
        )
        summary[name] = {"silhouette_slot": silhouette(states, names), "silhouette_family": silhouette(states, kinds)}
    table = pd.concat(tables, ignore_index=True)
    with atomic_file(Path(out) / "features.csv") as path:
        table.to_csv(path, index=False, float_format="%.5g")
    write_json(Path(out) / "metrics.json", summary)
    return table, summary


def finding(summary: Mapping[str, Mapping[str, float | None]]) -> str:
    """What the silhouettes say, in a sentence.

    Args:
        summary: of `features`.
    """
    known = {name: values["silhouette_slot"] for name, values in summary.items() if values["silhouette_slot"] is not None}
    if not known:
        return "There are too few samples to say how far apart slots lie."
    each = ", ".join(f"{value:.2f} in `{name}`" for name, value in known.items())
    first, last = min(known, key=known.get), max(known, key=known.get)
    return (f"Before an answer begins slots lie farthest apart in `{last}`, least in `{first}`: their mean silhouette is {each} (1: each a tight "
            "group far from all others; 0: they overlap).")  # fmt: skip
