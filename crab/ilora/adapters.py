"""The layers of one adapter by name, values they have for a time, and the check that saved tensors fit them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .layer import ILoraLayer

WRAPPER = "base_model.model."  # PeftModel puts it before the names of the base
# The first FSDP and activation checkpointing put these into names of modules, but not into state dicts.
INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COMPILED = "_orig_mod."  # torch.compile puts it into both


def base_name(name: str) -> str:
    """The name of a module or tensor in the base model, from its name in a (wrapped) PEFT model."""
    for part in INSIDE:
        name = name.replace(part, "")
    return name.removeprefix(WRAPPER)


def ilora_layers(model: nn.Module) -> dict[str, ILoraLayer]:
    """Name in the base -> I-LoRA layer."""
    return {base_name(name): module for name, module in model.named_modules() if isinstance(module, ILoraLayer)}


@contextmanager
def replaced(attribute: str, values: Mapping[ILoraLayer, Any]) -> Iterator[None]:
    """Give the attribute of each layer another value while the block runs."""
    before = {layer: getattr(layer, attribute) for layer in values}
    try:
        for layer, value in values.items():
            setattr(layer, attribute, value)
        yield
    finally:
        for layer, value in before.items():
            setattr(layer, attribute, value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and torch.compile."""
    while isinstance(model, (DistributedDataParallel, DataParallel)) or "_orig_mod" in model._modules:
        model = model._modules.get("_orig_mod", model._modules.get("module"))
    return model


def adapted_layers(model: nn.Module, adapter_name: str | None, caller: str) -> tuple[str, dict[str, ILoraLayer]]:
    """The name of the adapter, and its layers by module name in the base model.

    `model` may be any module with I-LoRA layers, also inside DDP or torch.compile. An `adapter_name` of None takes the
    active adapter. Raises ValueError, starting with `caller`, without layers or without exactly one such adapter.
    """
    layers = {name.replace(COMPILED, ""): layer for name, layer in ilora_layers(unwrapped(model)).items()}
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no I-LoRA layers; give a PEFT model with ILoraConfig.")
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


def require_fit(expected: Mapping[str, tuple | None], shapes: Mapping[str, tuple], action: str, fix: str) -> None:
    """Raise ValueError unless the names and shapes are exactly the expected ones. A shape of None is not checked."""
    faults = [f"missing {name}" for name in expected if name not in shapes]
    faults += [f"unexpected {name}" for name in shapes if name not in expected]
    wrong = {name: shape for name, shape in expected.items() if shape is not None and shapes.get(name, shape) != shape}
    faults += [f"{name} has shape {list(shapes[name])} and needs {list(shape)}" for name, shape in wrong.items()]
    if faults:
        more = f" ... and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{action}: {'; '.join(faults[:3])}{more}. {fix}")
