"""Names of adapted modules, the layers of one adapter, and the check that saved tensors fit them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .layer import ILoraLayer

WRAPPER = "base_model.model."  # PeftModel puts it before the names of the base
# The first FSDP and torch's activation checkpointing put these into names of modules, but not into state dicts.
INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COMPILED = "_orig_mod."  # torch.compile puts it into both


def base_name(name: str) -> str:
    """The name of a module or tensor in the base model, from its name in a (wrapped) PEFT model."""
    for part in INSIDE:
        name = name.replace(part, "")
    return name.removeprefix(WRAPPER)


def adapted_layers(model: nn.Module, adapter_name: str | None, caller: str) -> tuple[str, dict[str, ILoraLayer]]:
    """The name of the adapter, and its layers by module name in the base model.

    Args:
        model: a PEFT model, or any module with I-LoRA layers, also inside DDP or torch.compile.
        adapter_name: None takes the active adapter.
        caller: the function that was called, for messages.

    Raises:
        ValueError: no I-LoRA layer, no such adapter, or not exactly one active adapter.
    """
    whole = model
    while isinstance(whole, (DistributedDataParallel, DataParallel)) or "_orig_mod" in whole._modules:
        whole = whole._modules.get("_orig_mod", whole._modules.get("module"))
    modules = {base_name(name.replace(COMPILED, "")): module for name, module in whole.named_modules()}
    layers = {name: module for name, module in modules.items() if isinstance(module, ILoraLayer)}
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no I-LoRA layers; give a PEFT model made with ILoraConfig."
        )
    if adapter_name is None:
        active = {name for layer in layers.values() for name in layer.active_adapters}
        if len(active) != 1:
            raise ValueError(f"{caller}: give `adapter_name`; the active adapters are {sorted(active)}.")
        (adapter_name,) = active
    own = {name: layer for name, layer in layers.items() if adapter_name in layer.ilora_A}
    if not own:
        names = sorted({name for layer in layers.values() for name in layer.ilora_A})
        raise ValueError(f"{caller}: no I-LoRA adapter {adapter_name!r}; the model has {names}.")
    return adapter_name, own


def require_fit(
    expected: Mapping[str, tuple[int, ...] | None], shapes: Mapping[str, tuple[int, ...]], action: str, fix: str
) -> None:
    """Raise ValueError unless the tensors have exactly the expected names and shapes. None means any shape."""
    faults = [f"missing {name}" for name in expected if name not in shapes]
    faults += [f"unexpected {name}" for name in shapes if name not in expected]
    faults += [
        f"{name} has shape {list(shapes[name])}, but the model needs {list(shape)}"
        for name, shape in expected.items()
        if shape is not None and shapes.get(name, shape) != shape
    ]
    if faults:
        more = f" ... and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{action}: {'; '.join(faults[:3])}{more}. {fix}")
