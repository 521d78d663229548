"""One setting, trained at a learning rate of its own and scored on the test split.

The rate is chosen as in the sweep stage, by held-out training samples. All that are compared get the same `Tuning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd
import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from crab.models import checkpoint
from crab.study.sweep import cells_of, check_rates, sweep
from crab.study.train import adapted


@dataclass(frozen=True)
class Tuning:
    """How a learning rate is chosen: the same for all that are compared.

    Args:
        rates: tried; a single one is taken as it is, and nothing is swept.
        extend: how often one beyond the edge may be added.
        seeds: of the runs it is chosen by. passes: of these; None for as many as are trained then.
        held_out: samples of each slot that these are not trained but scored on.
    """

    rates: Sequence[float]
    extend: int
    seeds: Sequence[int]
    passes: int | None
    held_out: int

    def __post_init__(self) -> None:
        check_rates(self.rates, self.extend)

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Tuning:
        """From a section of params.yaml. Raises ValueError naming what is missing or unknown."""
        known = {field.name for field in fields(cls)}
        if set(section) != known:
            raise ValueError(f"tuning holds {', '.join(section) or 'nothing'}; it must hold {', '.join(sorted(known))}")
        return cls(**section)


@dataclass(frozen=True)
class Tuned:
    """What came out.

    Attributes:
        samples: a row a seed, slot and test sample (columns of `crab.study.grid.COLUMNS`).
        rate: the learning rate taken. tries: rates that were tried; 1 where nothing was swept.
        inside: whether lower and higher rates were tried and did no better; None where nothing was swept.
        seconds: of training, this setting's test runs only.
        adapters: trained a seed. parameters: of one of them.
    """

    samples: pd.DataFrame
    rate: float
    tries: int
    inside: bool | None
    seconds: float
    adapters: int
    parameters: int


def tuned(
    method: str,
    row: str,
    options: Mapping[str, Any],
    slots: Sequence[str],
    seeds: Sequence[int],
    passes: int,
    tuning: Tuning,
    run,
    label: str,
    resamples: int = 500,
    **where: Any,
) -> Tuned:
    """Choose the rate of one setting, train it with each seed on all training samples, and score it on the test split.

    Args:
        method: ``lora`` or ``ilora``. row: setting and form, such as ``joint-bare``. options: of its PEFT config.
        run: what trains and scores cells, as `crab.study.grid.run_grid` does, called with ``where``.
        label: stands before the progress bar of the test runs.
    """
    found = sweep(
        method, {**options, "runs": [row]}, rates=tuning.rates, extend=tuning.extend, forms=[row.partition("-")[2]],
        seeds=tuning.seeds, slots=slots, passes=tuning.passes or passes, held_out=tuning.held_out, resamples=resamples, run=run, **where,
    )  # fmt: skip
    swept = not found.points.empty
    cells = cells_of(method, row, found.rates[row], options, slots, seeds, passes, 0)
    samples, summary = run(cells, label=label, **where)
    return Tuned(
        samples, found.rates[row], max(1, len(found.points)), found.inside(row) if swept else None, float(summary["seconds"].sum()),
        len(summary) // len(seeds), int(summary["trainable_parameters"].iloc[0]),
    )  # fmt: skip


def adapter_parameters(base, method: str, options: Mapping[str, Any]) -> int:
    """Trainable parameters of an adapter on the base in this folder, counted without loading a weight."""
    config = Qwen2_5OmniThinkerConfig.from_pretrained(checkpoint.resolve(base) or base)
    with torch.device("meta"):
        model = adapted(Qwen2_5OmniThinkerForConditionalGeneration(config), method, options)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def plain_rank(parameters: int, of_rank_one: int) -> int:
    """Rank of the smallest plain LoRA with at least so many parameters: in doubt the rival is the larger one.

    Args:
        of_rank_one: parameters of a plain LoRA of rank 1 on the same base.
    """
    return -(-parameters // of_rank_one)
