"""One pass of the language model over a batch, up to what its output head reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from crab.study.instruction import instruction_shown


def last_hidden(model, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Last layer's hidden states [samples, tokens, hidden]; routers that read the instruction are shown it.

    Args:
        model: a PEFT model or a base. made: a batch, of `crab.study.dataset.batch`.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    with instruction_shown(model, made):
        return core.model(
            inputs_embeds=made["inputs_embeds"], attention_mask=made["attention_mask"],
            position_ids=made["position_ids"], use_cache=False,
        ).last_hidden_state  # fmt: skip
