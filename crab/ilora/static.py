"""The same head weights for every token: to try them, and to export them as a plain LoRA."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mode

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .adapters import WRAPPER, adapted_layers, replaced, unwrapped

Weights = Sequence[float] | torch.Tensor | Mapping[str, Sequence[float] | torch.Tensor]


def _checked(task_weights: Weights, model: nn.Module, adapter_name: str | None, caller: str) -> tuple[str, dict, dict]:
    """Name of the adapter, module name -> layer, module name -> weights [heads] in float64."""
    adapter_name, layers = adapted_layers(model, adapter_name, caller)
    named = task_weights if isinstance(task_weights, Mapping) else dict.fromkeys(layers, task_weights)
    if named.keys() != layers.keys():
        lists = f"missing {sorted(layers.keys() - named)[:3]}, unknown {sorted(named.keys() - layers)[:3]}"
        raise ValueError(f"{caller}: `task_weights` must name exactly the adapted modules; {lists}.")
    weights = {name: torch.as_tensor(named[name]).detach().double().cpu() for name in layers}
    for name, values in weights.items():
        heads = layers[name].num_heads[adapter_name]
        if values.shape != (heads,) or not torch.isfinite(values).all():
            raise ValueError(f"{caller}: {name!r} needs {heads} finite weights, one per head, got {values.tolist()}.")
    return adapter_name, layers, weights


@contextmanager
def fixed_routing(model: nn.Module, task_weights: Weights, adapter_name: str | None = None) -> Iterator[None]:
    """Use `task_weights` in place of the routers while the block runs: [heads], or module name -> [heads].

    `to_static` exports the same function. Errors are as in `record_routing`, or that the weights do not fit.
    """
    adapter_name, layers, weights = _checked(task_weights, model, adapter_name, "fixed_routing")
    fixed = {}
    for name, layer in layers.items():
        A = layer.ilora_A[adapter_name].weight
        own = {adapter_name: weights[name].to(A.device, torch.promote_types(A.dtype, torch.float32))}
        fixed[layer] = layer.fixed_routing | own
    with replaced("fixed_routing", fixed):
        yield


def to_static(
    model: nn.Module, task_weights: Weights, path: str | Path | None = None, fold=False, adapter_name: str | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Export the adapter as a plain LoRA with the same head weights for every token. The model does not change.

    B = scaling * [w_1 B_1 | ... | w_N B_N] and A = [A; ...; A] (or [A_1; ...; A_N]), of rank num_heads * r, with a LoRA
    scaling of 1. Any LoRA software can merge and serve it, but it does not route: it equals the adapter only where the
    router gives these weights. Run the model inside `fixed_routing` to see what it loses.

    Args:
        model: a PEFT model with an I-LoRA adapter. Its trained biases and modules_to_save are exported too.
        task_weights: [heads] for all modules, or module name -> [heads], such as `RoutingMeans.weights(group)`.
        path: folder to save the adapter in, for `PeftModel.from_pretrained`.
        fold: with a shared A, add the weighted heads to one LoRA of rank r, the same function in fewer numbers.

    Returns the configuration, and the tensors under the names in which PEFT saves them.
    """
    adapter_name, layers, weights = _checked(task_weights, model, adapter_name, "to_static")
    model = unwrapped(model)
    state, ranks = {}, {}
    for name, layer in layers.items():
        r, heads, shared = layer.r[adapter_name], layer.num_heads[adapter_name], layer.shared_A[adapter_name]
        if fold and not shared:
            raise ValueError(f"to_static: the heads of {name!r} have their own A, so use fold=False.")
        A, B = layer.ilora_A[adapter_name].weight.detach(), layer.ilora_B[adapter_name].weight.detach()
        factors = layer.scaling[adapter_name] * weights[name].to(B.device)
        up = B.double().unflatten(1, (heads, r)) * factors.unsqueeze(-1)
        up = (up.sum(1) if fold else up.flatten(1)).to(B.dtype)
        down = A if fold or not shared else A.repeat(heads, 1)
        ranks[name] = up.shape[1]
        state[f"{WRAPPER}{name}.lora_A.weight"] = down.clone().cpu().contiguous()
        state[f"{WRAPPER}{name}.lora_B.weight"] = up.cpu().contiguous()
    ours = model.peft_config[adapter_name]
    if ours.modules_to_save or ours.bias != "none":
        saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        # a transformers model with its own adapters does not have the prefix, but the file must
        own = {WRAPPER + key.removeprefix(WRAPPER): value for key, value in saved.items() if ".ilora_" not in key}
        state |= {key: value.cpu().contiguous() for key, value in own.items()}
    usual = mode(sorted(ranks.values()))
    other = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=other,
        alpha_pattern=dict(other),
        bias={"ilora_only": "lora_only"}.get(ours.bias, ours.bias),
        target_modules="|".join(map(re.escape, layers)),  # a list would match endings, and be written in any order
        modules_to_save=ours.modules_to_save,
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
    )
    if path is not None:
        config.save_pretrained(str(path))
        save_file(state, Path(path) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return config, state
