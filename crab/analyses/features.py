"""Where samples lie in the model: hidden states before the answer, drawn in a plane and measured by slot."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import silhouette_score

from crab import tasks
from crab.models.batches import batch, last_hidden
from crab.models.checkpoint import load_base
from crab.samples.reading import read_slot, spread
from crab.study.answer import load_adapter


@torch.no_grad()
def hidden(model, tokenizer, samples: Sequence, batch_size: int) -> np.ndarray:
    """Hidden states of the last layer at the end of each prompt, where the answer begins: [samples, hidden]."""
    batches = (batch(model, tokenizer, samples[i : i + batch_size]) for i in range(0, len(samples), batch_size))
    # prompts are padded on the left
    return np.concatenate([last_hidden(model, inputs)[:, -1].float().cpu().numpy() for inputs in batches])


def plane(states: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    """UMAP (McInnes et al., 2018) of states [N, hidden] to [N, 2]. It is seeded, so it runs on one thread.

    ValueError: fewer than 5 states, which have no neighbourhoods.
    """
    if len(states) < 5:
        raise ValueError(f"features: {len(states)} samples are too few for a map; raise features.samples")
    from umap import UMAP  # takes seconds to import

    size, init = min(neighbours, len(states) - 1), "spectral" if len(states) > 20 else "random"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*n_jobs value.*overridden.*")
        umap = UMAP(n_neighbors=size, min_dist=0.3, init=init, random_state=seed, n_jobs=1)
        return umap.fit_transform(np.asarray(states, np.float32))


def silhouette(states: np.ndarray, labels: Sequence[str]) -> float:
    """Mean silhouette (Rousseeuw, 1987) of labelled states, -1 to 1; NaN if all labels are equal or all differ."""
    return float(silhouette_score(states, labels)) if 2 <= len(set(labels)) < len(labels) else np.nan


def features(
    adapters: Mapping[str, Path | None], encoded: Path, base: Path, slots: Sequence[str], samples: int, neighbours: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Hidden states of several models on the same test samples.

    Args:
        adapters: name of a model -> folder of its adapter, or None for the base alone.
        samples: in all, evenly spread over the slots, at least one per slot.
        neighbours, seed: of UMAP. Each model has its own map, so positions in two maps cannot be compared.

    Returns:
        One row per model and sample: ``model``, ``slot``, ``family`` (of tasks), ``id`` and the place ``x``, ``y``.
        Silhouettes of the full hidden states, one row per model: ``by slot`` and ``by family``.
    """
    rows, items = [], []
    for slot in slots:
        data = read_slot(encoded, slot, "test", base)
        for i in spread(len(data), max(1, samples // len(slots))):
            rows.append({"slot": slot, "family": tasks.get_slot(slot).family, "id": data.ids[i]})
            items.append(data[i])
    table, maps, silhouettes = pd.DataFrame(rows), [], {}
    for name, folder in adapters.items():
        model, processor = load_base(base)
        if folder is not None:
            model = load_adapter(model, folder)
        states = hidden(model, processor.tokenizer, items, batch_size=32)
        x, y = plane(states, neighbours, seed).T
        maps.append(table.assign(model=name, x=x, y=y))
        silhouettes[name] = {f"by {column}": silhouette(states, table[column]) for column in ("slot", "family")}
    return pd.concat(maps, ignore_index=True), pd.DataFrame(silhouettes).T.rename_axis("model")
