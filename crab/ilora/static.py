"""The same head weights for every token: to try them, and to export them as a plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .adapters import WRAPPER, adapted_layers
from .layer import ILoraLayer

Weights = Sequence[float] | torch.Tensor | Mapping[str, Sequence[float] | torch.Tensor]


def _checked(
    task_weights: Weights, model: nn.Module, adapter_name: str | None, caller: str
) -> tuple[str, dict[str, ILoraLayer], dict[str, torch.Tensor]]:
    """Name of the adapter, its layers, and module name -> weights [heads] in float64."""
    adapter_name, layers = adapted_layers(model, adapter_name, caller)
    named = task_weights if isinstance(task_weights, Mapping) else dict.fromkeys(layers, task_weights)
    missing, unknown = sorted(set(layers) - set(named)), sorted(set(named) - set(layers))
    if missing or unknown:
        raise ValueError(
            f"{caller}: `task_weights` must name exactly the adapted modules; missing {missing[:3]}, unknown {unknown[:3]}."
        )
    weights = {name: torch.as_tensor(named[name]).detach().double().cpu() for name in layers}
    for name, values in weights.items():
        heads = layers[name].num_heads[adapter_name]
        if values.shape != (heads,) or not torch.isfinite(values).all():
            raise ValueError(
                f"{caller}: the weights of {name!r} must be {heads} finite numbers, got {values.tolist()}."
            )
    return adapter_name, layers, weights


@contextmanager
def fixed_routing(model: nn.Module, task_weights: Weights, adapter_name: str | None = None) -> Iterator[None]:
    """Use `task_weights` in place of the routers while the block runs. `to_static` exports the same function.

    Args:
        task_weights: [heads] for all modules, or module name -> [heads].
        model, adapter_name: as in `record_routing`, with its errors.
    """
    adapter_name, layers, weights = _checked(task_weights, model, adapter_name, "fixed_routing")
    before = {name: layer.fixed_routing.get(adapter_name) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            A = layer.ilora_A[adapter_name].weight
            layer.fixed_routing[adapter_name] = weights[name].to(A.device, torch.promote_types(A.dtype, torch.float32))
        yield
    finally:
        for name, layer in layers.items():
            del layer.fixed_routing[adapter_name]
            if before[name] is not None:
                layer.fixed_routing[adapter_name] = before[name]


class StaticLora(NamedTuple):
    """A plain LoRA of `to_static`.

    Attributes:
        config: its LoraConfig.
        state_dict: its tensors, under the names in which PEFT saves them.
        error: ||y_fixed - y_routed|| / ||y_routed - y_without|| of the outputs of `run`, so the change as a share of
            what the heads do. y_without has zero weights, and trained biases stay. None without `run`.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    error: float | None


def to_static(
    model: nn.Module,
    task_weights: Weights,
    path: str | Path | None = None,
    run: Callable[[], torch.Tensor] | None = None,
    fold: bool = False,
    adapter_name: str | None = None,
) -> StaticLora:
    """Export the adapter as a plain LoRA with the same head weights for every token.

    B = scaling * [w_1 B_1 | ... | w_N B_N] and A = [A; ...; A] (or [A_1; ...; A_N]), of rank num_heads * r, with a LoRA
    scaling of 1. Any LoRA software can merge and serve it, but it does not route: it equals the adapter only where the
    router gives these weights. Trained biases and modules_to_save are included. The model does not change.

    Args:
        model: a PEFT model with an I-LoRA adapter.
        task_weights: [heads] for all modules, or module name -> [heads], such as `RoutingMeans.weights(group)`.
        path: folder for adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained`.
        run: returns the output of the model on data for the error, for example `lambda: model(**batch).logits`. It is
            called three times without gradient. The model must be in eval mode with this adapter active.
        fold: with a shared A, add the weighted heads to one LoRA of rank r, the same function in fewer numbers.
        adapter_name: None takes the active adapter.

    Raises:
        ValueError: weights that do not fit, `fold` without a shared A, or a `run` whose error is not defined.
    """
    adapter_name, layers, weights = _checked(task_weights, model, adapter_name, "to_static")
    state, ranks = {}, {}
    for name, layer in layers.items():
        r, heads, shared = layer.r[adapter_name], layer.num_heads[adapter_name], layer.shared_A[adapter_name]
        if fold and not shared:
            raise ValueError(
                f"to_static: `fold` needs one shared A, but each head of {name!r} has its own; use fold=False."
            )
        A, B = layer.ilora_A[adapter_name].weight.detach(), layer.ilora_B[adapter_name].weight.detach()
        factors = layer.scaling[adapter_name] * weights[name].to(B.device)
        up = B.double().unflatten(1, (heads, r)) * factors.unsqueeze(-1)
        up = (up.sum(1) if fold else up.flatten(1)).to(B.dtype)
        ranks[name] = up.shape[1]
        state[f"{WRAPPER}{name}.lora_A.weight"] = (
            (A if fold or not shared else A.repeat(heads, 1)).clone().cpu().contiguous()
        )
        state[f"{WRAPPER}{name}.lora_B.weight"] = up.cpu().contiguous()
    ours = model.peft_config[adapter_name]
    if ours.modules_to_save or ours.bias != "none":
        saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        # a transformers model with its own adapters does not have the prefix, but the file must
        own = {WRAPPER + key.removeprefix(WRAPPER): value for key, value in saved.items() if ".ilora_" not in key}
        state |= {key: value.cpu().contiguous() for key, value in own.items()}
    usual = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    other = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    # target_modules as an expression: a list matches endings of names, and PEFT writes lists in any order
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=other,
        alpha_pattern=dict(other),
        bias={"ilora_only": "lora_only"}.get(ours.bias, ours.bias),
        target_modules="|".join(map(re.escape, layers)),
        modules_to_save=ours.modules_to_save,
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
    )
    error = None if run is None else _error(model, weights, run, adapter_name)
    if path is not None:
        config.save_pretrained(str(path))
        save_file(state, Path(path) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return StaticLora(config, state, error)


@torch.no_grad()
def _error(model: nn.Module, weights: Mapping[str, torch.Tensor], run: Callable, adapter_name: str) -> float:
    if model.training:
        raise ValueError("to_static: call model.eval() before `run`; dropout would count as error.")
    routed = run().double()
    with fixed_routing(model, weights, adapter_name):
        fixed = run().double()
    with fixed_routing(model, {name: torch.zeros_like(values) for name, values in weights.items()}, adapter_name):
        effect = float((routed - run().double()).norm())
    if not effect > 0:
        raise ValueError(
            f"to_static: adapter {adapter_name!r} does not change the output of `run`, so its error is not defined. Is it "
            "untrained, or not active? If not active, call model.set_adapter first."
        )
    return float((fixed - routed).norm()) / effect
