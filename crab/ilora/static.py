"""Heads weighed the same for every token: trying fixed weights, and exporting them as a plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn

from .adapters import WRAPPER, adapted_layers
from .layer import ILoraLayer

Weights = Sequence[float] | torch.Tensor


def _per_module(task_weights: Mapping[str, Weights] | Weights, layers: Mapping[str, ILoraLayer], adapter_name: str,
                caller: str) -> dict[str, torch.Tensor]:
    """Checked weights, module name -> float64 [heads]."""
    if isinstance(task_weights, Mapping):
        lacking, spare = sorted(set(layers) - set(task_weights)), sorted(set(task_weights) - set(layers))
        if lacking or spare:
            raise ValueError(f"{caller}: `task_weights` must name the adapted modules one to one; missing "
                             f"{lacking[:3]}, spare {spare[:3]}.")
    found = {}
    for name, layer in layers.items():
        given = task_weights[name] if isinstance(task_weights, Mapping) else task_weights
        weights = torch.as_tensor(given).detach().double().cpu()
        heads = layer.num_heads[adapter_name]
        if weights.shape != (heads,) or not torch.isfinite(weights).all():
            raise ValueError(f"{caller}: the weights of {name!r} must be {heads} finite numbers, one a head, got "
                             f"{weights.tolist()}.")
        found[name] = weights
    return found


@contextmanager
def fixed_routing(model: nn.Module, task_weights: Mapping[str, Weights] | Weights,
                  adapter_name: str | None = None) -> Iterator[None]:
    """Weigh the heads by `task_weights` in place of the routers while the block runs: what `to_static` would compute.

    Args:
        task_weights: [heads] for all modules, or module name -> [heads].
        model, adapter_name: as for `record_routing`, with its errors.
    """
    adapter_name, layers = adapted_layers(model, adapter_name, "fixed_routing")
    weights = _per_module(task_weights, layers, adapter_name, "fixed_routing")
    before = {name: layer.fixed_routing.get(adapter_name) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            base = layer.ilora_A[adapter_name].weight
            layer.fixed_routing[adapter_name] = weights[name].to(
                base.device, torch.promote_types(base.dtype, torch.float32))
        yield
    finally:
        for name, layer in layers.items():
            del layer.fixed_routing[adapter_name]
            if before[name] is not None:
                layer.fixed_routing[adapter_name] = before[name]


class StaticLora(NamedTuple):
    """A plain LoRA made by `to_static`.

    Attributes:
        config: its LoraConfig.
        state_dict: its tensors by the names PEFT saves them under.
        error: ||y_fixed - y_routed|| / ||y_routed - y_base|| of the outputs given by `run`, that is the change as a
            share of what the adapter does at all; None without `run`. Trained biases are in all three outputs.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    error: float | None


def to_static(model: nn.Module, task_weights: Mapping[str, Weights] | Weights, path: str | Path | None = None,
              run: Callable[[], torch.Tensor] | None = None, fold: bool = False,
              adapter_name: str | None = None) -> StaticLora:
    """Export the adapter as a plain LoRA whose heads are weighed the same for every token.

    B = scaling * [w_1 B_1 | ... | w_N B_N] and A = [A; ...; A] (or [A_1; ...; A_N]), of rank num_heads * r, with
    LoRA's own scaling at 1. The result can be merged and served by anything that reads LoRA, but no longer routes:
    it equals the adapter only where the router gives these very weights. Biases that the config's `bias` had trained go
    along as they are, as LoRA saves its own (`bias='ilora_only'` becomes 'lora_only').

    Args:
        model: a PEFT model with an I-LoRA adapter. It is not changed.
        task_weights: [heads] for all modules, or module name -> [heads], such as `RoutingMeans.weights(group)`.
        path: folder to write adapter_config.json and adapter_model.safetensors to, for `PeftModel.from_pretrained`.
        run: gives the model's output on data to measure the error on, such as `lambda: model(**batch).logits`; it is
            called three times, without gradient, with the model in eval mode and this adapter alone active.
        fold: with a shared A, sum the weighed heads into one LoRA of rank r, the same function at a num_heads-th of
            its size.
        adapter_name: may be left out while one adapter is active.

    Raises:
        ValueError: weights that do not fit the modules, `fold` without a shared A, dropout left on while measuring, or
            another adapter active meanwhile, or one whose effect on `run`'s output is nothing, so that no share of it
            can be given.
    """
    adapter_name, layers = adapted_layers(model, adapter_name, "to_static")
    weights = _per_module(task_weights, layers, adapter_name, "to_static")
    state, ranks = {}, {}
    for name, layer in layers.items():
        r, heads, shared = layer.r[adapter_name], layer.num_heads[adapter_name], layer.shared_A[adapter_name]
        if fold and not shared:
            raise ValueError(f"to_static: `fold` needs one shared A, but the heads of {name!r} have their own.")
        A, B = layer.ilora_A[adapter_name].weight.detach(), layer.ilora_B[adapter_name].weight.detach()
        up = B.double().unflatten(1, (heads, r)) * (layer.scaling[adapter_name] * weights[name].to(B.device)).unsqueeze(-1)
        up = (up.sum(1) if fold else up.flatten(1)).to(B.dtype)
        ranks[name] = up.shape[1]
        down = A if fold or not shared else A.repeat(heads, 1)
        state[f"{WRAPPER}{name}.lora_A.weight"] = down.clone().cpu().contiguous()
        state[f"{WRAPPER}{name}.lora_B.weight"] = up.cpu().contiguous()
    ours = model.peft_config[adapter_name]
    if ours.modules_to_save or ours.bias != "none":
        kept = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        # a transformers model that holds its adapters itself has no such prefix, and the file it is to be saved in has
        state |= {WRAPPER + key.removeprefix(WRAPPER): value.cpu().contiguous() for key, value in kept.items()
                  if ".ilora_" not in key}
    usual = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    other = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    # The modules as an expression: a list matches name endings, and PEFT writes lists in no fixed order.
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=other, alpha_pattern=dict(other), lora_dropout=0.0,
        bias={"ilora_only": "lora_only"}.get(ours.bias, ours.bias),
        target_modules="|".join(map(re.escape, layers)), modules_to_save=ours.modules_to_save,
        task_type=ours.task_type, base_model_name_or_path=ours.base_model_name_or_path, inference_mode=True)
    error = None if run is None else _static_error(model, layers, weights, run, adapter_name)
    if path is not None:
        config.save_pretrained(str(path))
        save_file(state, Path(path) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return StaticLora(config, state, error)


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """As PeftModel's `disable_adapter`, for any module that holds adapters; what requires gradient is left alone."""
    switches = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [module._disable_adapters for module in switches]
    try:
        for module in switches:
            module._disable_adapters = True
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module._disable_adapters = value


@torch.no_grad()
def _static_error(model: nn.Module, layers: Mapping[str, ILoraLayer], weights: Mapping[str, torch.Tensor],
                  run: Callable[[], torch.Tensor], adapter_name: str) -> float:
    if model.training:
        raise ValueError("to_static: call model.eval() first; dropout would count as error.")
    # asked of the layers, as of a transformers model that holds its adapters itself `active_adapters` is a method
    active = list(dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters))
    if active != [adapter_name]:  # freezing one that does not run would seem to cost nothing
        raise ValueError(f"to_static: `run` measures the active adapters, {active}; call model.set_adapter({adapter_name!r}) "
                         "first.")
    routed = run().double()
    with fixed_routing(model, weights, adapter_name):
        fixed = run().double()
    with _adapters_off(model):
        base = run().double()
    effect = float((routed - base).norm())
    if not effect > 0:
        raise ValueError("to_static: the adapter does not change the output of `run` at all (is it untrained, or not "
                         "active?), so its error is no share of anything.")
    return float((fixed - routed).norm()) / effect
