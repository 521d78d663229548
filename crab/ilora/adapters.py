"""Names of adapted modules, and which adapter's layers a call means."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .layer import ILoraLayer

WRAPPER = "base_model.model."  # what PeftModel puts before the base's own module names
# What FSDP's first version and torch's activation checkpointing put into module names, and leave out of state dicts.
INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COMPILED = "_orig_mod."  # what torch.compile puts there, and in state dicts too, so that tensors must keep it


def base_name(name: str) -> str:
    """A module's or tensor's name in the base model, from its name in a (wrapped) PEFT model."""
    for part in INSIDE:
        name = name.replace(part, "")
    return name.removeprefix(WRAPPER)


def adapted_layers(model: nn.Module, adapter_name: str | None, caller: str) -> tuple[str, dict[str, ILoraLayer]]:
    """The adapter meant, and its layers by module name in the base model.

    Args:
        model: a PEFT model, or any module holding I-LoRA layers; also inside DDP or torch.compile.
        adapter_name: may be left out while one adapter is active.
        caller: the function called, which errors begin with.

    Raises:
        ValueError: no I-LoRA layer in the model, no such adapter, or no single active one to take.
    """
    whole = model
    while isinstance(whole, (DistributedDataParallel, DataParallel)) or "_orig_mod" in whole._modules:
        whole = whole._modules.get("_orig_mod", whole._modules.get("module"))
    layers = {base_name(name.replace(COMPILED, "")): module for name, module in whole.named_modules()
              if isinstance(module, ILoraLayer)}
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no I-LoRA layers; give a PEFT model made with ILoraConfig.")
    if adapter_name is None:
        active = {name for layer in layers.values() for name in layer.active_adapters}
        if len(active) != 1:
            raise ValueError(f"{caller}: give `adapter_name`; the active adapters are {sorted(active)}.")
        (adapter_name,) = active
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.ilora_A}
    if not found:
        there = sorted({name for layer in layers.values() for name in layer.ilora_A})
        raise ValueError(f"{caller}: no I-LoRA adapter {adapter_name!r}; there are {there}.")
    return adapter_name, found
