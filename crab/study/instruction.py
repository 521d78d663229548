"""Which tokens of a batch are the instruction, told to the routers that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from crab.ilora import instruction_tokens
from crab.study.dataset import SEGMENTS, segments


@contextmanager
def instruction_shown(model, made: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, routers with ``router_input="instruction"`` read the text of each prompt; for other models nothing happens.

    Args:
        model: a PEFT model or a base. made: the batch it is about to be given, of `crab.study.dataset.batch`.
    """
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "router_input", None) == "instruction" for config in configs):
        with instruction_tokens(model, segments(model.config, made) == SEGMENTS.index("text")):
            yield
    else:
        yield
