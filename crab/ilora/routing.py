"""Recording which heads the routers chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .layer import ILoraLayer
from .model import WRAPPER


@contextmanager
def record_routing(model: nn.Module, adapter_name: str | None = None) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the routing weights of every adapted module while the block runs.

    Yields a dict: module name as in the base model -> one tensor a forward pass, [batch, tokens, heads], float32 (or
    float64), detached, on the CPU. Under `generate` the first pass covers the prompt and each later one a new token;
    `join_steps` puts them together. A module that did not run has an empty list. Works by forward hooks on the
    routers, so a model that is not being recorded pays nothing, and the outputs are the same either way. The second
    forward that gradient checkpointing makes during backward is not recorded.

    Args:
        model: a PEFT model, or any module holding I-LoRA layers.
        adapter_name: which adapter's router to record; may be left out while one adapter is active.

    Raises:
        ValueError: no I-LoRA layer in the model, or no (or no single) adapter to record.
    """
    layers = {name.removeprefix(WRAPPER): module for name, module in model.named_modules()
              if isinstance(module, ILoraLayer)}
    if not layers:
        raise ValueError("record_routing: the model has no I-LoRA layers.")
    if adapter_name is None:
        active = {name for layer in layers.values() for name in layer.active_adapters}
        if len(active) != 1:
            raise ValueError(f"record_routing: give `adapter_name`; the active adapters are {sorted(active)}.")
        (adapter_name,) = active
    routers = {name: layer.ilora_router[adapter_name] for name, layer in layers.items()
               if adapter_name in layer.ilora_router}
    if not routers:
        raise ValueError(f"record_routing: no layer has an adapter called {adapter_name!r}.")

    routing: dict[str, list[torch.Tensor]] = {name: [] for name in routers}
    handles = []
    try:
        for name, router in routers.items():
            handles.append(router.register_forward_hook(_keep_in(routing[name])))
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def _keep_in(steps: list[torch.Tensor]):
    def hook(module, args, weights):
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            steps.append(weights.detach().cpu())

    return hook


def join_steps(steps: list[torch.Tensor]) -> torch.Tensor:
    """Join the passes of one `generate` call: tensors [batch, tokens_i, heads] -> [batch, sum of tokens_i, heads].

    Raises:
        ValueError: nothing was recorded, or the passes have different batches (more than one call was recorded).
    """
    if not steps or any(step.shape[0] != steps[0].shape[0] for step in steps):
        raise ValueError("join_steps: the passes must be those of one generate call, all of one batch size; "
                         f"got shapes {[tuple(step.shape) for step in steps]}.")
    return torch.cat(steps, dim=-2)
