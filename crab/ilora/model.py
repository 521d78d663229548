"""The tuner: puts I-LoRA layers into a model, and holds saved tensors against it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .adapters import base_name
from .config import ILoraConfig
from .layer import MERGE_REFUSAL, ILoraLayer, Linear
from .registration import PREFIX
from .routers import SharedRouter, UniformRouter

# What PEFT itself puts into modules_to_save for these tasks, whichever of the names the model has.
TASKS_WITH_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
AUTOMATIC_MODULES = ("classifier", "score", "qa_outputs")


class ILoraModel(BaseTuner):
    """Adapts a model with I-LoRA (Crab+, arXiv 2603.04128); made by `peft.get_peft_model`, not by hand.

    Stricter than PEFT's own tuners where those only warn: a target that is not linear, a pattern key that matches
    nothing, and saved tensors that are missing, spare or of another shape all raise ValueError naming the module. So do
    `adapter_names` given to `forward` or `generate`: one batch has one adapter (or several, active together).

    Saved tensors are held against the model by PEFT's loaders: `PeftModel.from_pretrained`, its `load_adapter`, and
    `peft.set_peft_model_state_dict`. The `load_adapter` and `from_pretrained` of a transformers model itself read the
    file without asking the tuner: they log tensors that are missing or unexpected, and go on.
    """

    prefix: str = PREFIX
    tuner_layer_cls = ILoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # no silent default: which modules are adapted is the study's choice

    def _prepare_model(self, peft_config: ILoraConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced, so that a refusal leaves the base as it was."""
        self._routers: dict[tuple, nn.ModuleDict] = {}  # group -> the routers of the layer that holds the one it shares
        _maybe_include_all_linear_layers(peft_config, model)  # as PEFT does next: names in the place of 'all-linear'
        inside: list[str] = []
        names, targets = [], []
        for name, module in model.named_modules():
            if not name or name.startswith(tuple(inside)):
                continue
            names.append(name)
            found = self._check_target_module_exists(peft_config, name)
            if found and not isinstance(found, _ExcludedModule):
                _require_linear(module, name)
                targets.append(name)
            if isinstance(module, BaseTunerLayer):
                inside.append(name + ".")
        automatic = AUTOMATIC_MODULES if peft_config.task_type in TASKS_WITH_HEADS else ()
        kept = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for entry in peft_config.modules_to_save or ():
            if entry not in automatic and not any(name.endswith(entry) for name in kept):
                raise ValueError(f"ILoraConfig: `modules_to_save` entry {entry!r} matches no module of the model; mend its "
                                 "spelling or leave it out.")
        listed = () if isinstance(peft_config.target_modules, str) or not targets else peft_config.target_modules
        for entry in sorted(listed):
            if not any(f".{name}".endswith(f".{entry}") for name in names):
                raise ValueError(f"ILoraConfig: `target_modules` entry {entry!r} matches no module of the model; mend its "
                                 "spelling or leave it out.")
        for field in ("rank_pattern", "alpha_pattern") if targets else ():
            for key in getattr(peft_config, field):
                if not any(re.match(rf"(.*\.)?({key})$", name) for name in targets):
                    raise ValueError(f"ILoraConfig: `{field}` key {key!r} matches none of the adapted modules "
                                     f"(for example {targets[0]!r}).")

    def _create_and_replace(self, ilora_config: ILoraConfig, adapter_name: str, target: nn.Module, target_name: str,
                            parent: nn.Module, current_key: str, **optional_kwargs) -> None:
        _require_linear(target, current_key)
        ranks, alphas = ilora_config.rank_pattern, ilora_config.alpha_pattern
        r = ranks.get(get_pattern_key(ranks.keys(), current_key), ilora_config.r)
        alpha = alphas.get(get_pattern_key(alphas.keys(), current_key), ilora_config.lora_alpha)
        group = _router_group(ilora_config, self.model, current_key, target.in_features)
        shared = self._routers.get(group)
        if isinstance(target, ILoraLayer):
            layer = target
            layer.update_layer(adapter_name, r, alpha, ilora_config, shared)
        else:
            layer = Linear(target, adapter_name, r, alpha, ilora_config, shared, module_name=current_key)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is not trained until it is made active
            self._replace_module(parent, target_name, layer, target)
        self._routers.setdefault(group, layer.ilora_router)

    def _post_injection_hook(self, model: nn.Module, config: ILoraConfig, adapter_name: str) -> None:
        del self._routers

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """Refuse an adapter for each sample: PEFT would drop the names, and run the active adapter on all of them."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("I-LoRA: `adapter_names`, an adapter for each sample of a batch, is not supported. Run the "
                             "samples of one adapter at a time, after model.set_adapter(name).")
        yield

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._train_biases(any(self.peft_config[name].inference_mode for name in self.active_adapters))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; and the biases trained are those that the config of the adapter made active says."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._train_biases(inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; and the biases that the adapter had trained are so no longer. Their values stay."""
        bias = self.peft_config[adapter_name].bias if adapter_name in self.peft_config else "none"
        super().delete_adapter(adapter_name)
        if bias != "none":  # one adapter of a model may have this set, so no other one trains them
            for parameter in _biases(self.model).values():
                parameter.requires_grad_(False)

    def _train_biases(self, inference_mode: bool) -> None:
        """Let the base's biases that the active adapters save be trained, and no other.

        PEFT would train those of layers that only other adapters have too, also for inference, and would leave them as
        they are when another adapter is made active; what was trained then and what is saved would not be the same.
        """
        if all(config.bias == "none" for config in self.peft_config.values()):
            return
        active = () if inference_mode else self.active_adapters
        trained = {key for name in active for key in _bias_shapes(self.model, self.peft_config[name].bias, name)}
        for key, parameter in _biases(self.model).items():
            parameter.requires_grad_(key in trained)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's; and without autocast, loaded tensors that have kept their dtype get that of the base layer."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer in self.model.modules() if not autocast_adapter_dtype else ():
            if isinstance(layer, ILoraLayer):
                BaseTunerLayer._move_adapter_to_device_of_base_layer(layer, adapter_name)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    def unmerge_adapter(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """The adapter's tensors, refused when one is absent or not whole (a shard, for instance).

        Found by name: PEFT's own selection, by modules, misses those inside the wrappers of FSDP's first version.
        Biases get the names they have where this adapter alone is, whichever others wrap their modules here: those of its
        own modules `<module>.base_layer.bias`, as LoRA's do, since transformers looks tensors up by no other.
        """
        expected = _adapter_shapes(model, adapter_name) | _bias_shapes(model, config.bias, adapter_name)
        selected = {key: value for key, value in state_dict.items() if base_name(key) in expected}
        if not state_dict and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return selected  # empty: what was gathered went to the main process alone, which saves it
        _require_fit(expected, {base_name(key): tuple(value.shape) for key, value in selected.items()},
                     "Cannot save adapter", adapter_name, "Gather on all processes what FSDP or ZeRO-3 has sharded, and save "
                     "on the main one alone, giving it as `state_dict`; crab.ilora's docstring shows how.")
        own = _adapted_biases(model, adapter_name)
        return {key if base_name(key) in own else _unwrapped(key): value for key, value in selected.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """PEFT's renaming of saved tensors, refused when they do not fit the layers of this base one to one.

        A bias of an adapted module is taken by the base's own name of it too, under which it was once saved.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        here = list(model.state_dict())
        wrapped = {base_name(_unwrapped(key)): key for key in here if key != _unwrapped(key)}
        remapped = {wrapped.get(base_name(_unwrapped(key)), key): _aligned(value) for key, value in remapped.items()}
        known = {base_name(key) for key in here}
        expected = _adapter_shapes(model, adapter_name) | _bias_shapes(model, config.bias, adapter_name)
        given = {base_name(key): tuple(value.shape) for key, value in remapped.items()}
        # modules_to_save and resized embeddings belong to the base; PEFT checks their shapes itself
        lone = {key for key in _biases(model) if key.removesuffix("bias") + "weight" not in given}
        given = {key: shape for key, shape in given.items() if key in expected or key not in known or key in lone}
        added = config.__dict__.pop("being_loaded", False)
        try:
            _require_fit(expected, given, "Cannot load adapter", adapter_name, "Its tensors must match the adapted modules one "
                         "to one; was it made for another base model or with another configuration?")
        except ValueError:
            if added:
                model.delete_adapter(adapter_name)
            raise
        return remapped


def _router_group(config: ILoraConfig, model: nn.Module, name: str, in_features: int) -> tuple:
    """Modules of the same group share a router; what is shared is said at `ILoraConfig.router_sharing`."""
    if config.router_sharing == "model":
        return (in_features,)
    layer = _layer_of(name, model, config.layers_pattern) if config.router_sharing == "layer" else None
    return (name,) if layer is None else (layer, in_features)


def _layer_of(name: str, model: nn.Module, layers_pattern: list[str] | str | None) -> str | None:
    """"model.layers.3" of "model.layers.3.mlp.up_proj", or None outside numbered layers."""
    if layers_pattern:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        found = (re.match(rf"((?:.*?\.)??(?:{pattern})\.\d+)\.", name) for pattern in patterns)  # as for layers_to_transform
        return next((match[1] for match in found if match), None)
    parts = name.split(".")
    places = [place for place, part in enumerate(parts[:-1]) if part.isdecimal()]
    if not places:
        return None
    layer = places[0]
    for place in places:
        if place and "expert" in parts[place - 1]:
            break
        if len({type(module) for module in model.get_submodule(".".join(parts[:place])).children()}) == 1:
            layer = place
    return ".".join(parts[:layer + 1])


def _require_linear(module: nn.Module, name: str) -> None:
    if isinstance(module, ILoraLayer):
        return
    if isinstance(module, BaseTunerLayer):
        raise ValueError(f"I-LoRA: {name!r} already has an adapter of another method ({type(module).__module__}."
                         f"{type(module).__name__}). Merge or unload that one first, or leave the module out by `exclude_modules`.")
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(f"I-LoRA adapts nn.Linear modules only, but `target_modules` matches {name!r}, which is a "
                         f"{type(module).__name__}. Narrow `target_modules` or add it to `exclude_modules`.")


def _adapter_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Name in the model's state dict (without PeftModel's prefix) -> shape, of each tensor the adapter should have.

    Computed from the layers' numbers and not from their parameters, which may be sharded.
    """
    shapes = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, ILoraLayer) or adapter_name not in layer.r:
            continue
        name = base_name(name)
        r, heads = layer.r[adapter_name], layer.num_heads[adapter_name]
        rows = r if layer.shared_A[adapter_name] else heads * r
        shapes[f"{name}.ilora_A.{adapter_name}.weight"] = (rows, layer.in_features)
        shapes[f"{name}.ilora_B.{adapter_name}.weight"] = (layer.out_features, heads * r)
        if not isinstance(layer.ilora_router[adapter_name], (SharedRouter, UniformRouter)):  # perhaps wrapped by FSDP
            shapes[f"{name}.ilora_router.{adapter_name}.weight"] = (heads - layer.shared_head[adapter_name], layer.in_features)
    return shapes


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it lies where torch would not have put it, as one mapped from the middle of a file may.

    The last bits of small matrix products hang on that, and what was saved and loaded is to give the same ones.
    """
    return tensor.clone() if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor


def _unwrapped(key: str) -> str:
    """A bias's name in the state dict as it is without an adapter on its module; other names as they are."""
    return key.removesuffix(".base_layer.bias") + ".bias" if key.endswith(".base_layer.bias") else key


def _biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name as of `base_name` -> each bias of the base; modules_to_save have theirs trained and saved with them."""
    others = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    return {base_name(name): parameter for name, parameter in model.named_parameters()
            if f".{name}".endswith(".bias") and not name.startswith(others)}


def _adapted_biases(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Name as of `base_name` -> shape of the bias, should there be one, of each module that the adapter wraps."""
    return {f"{base_name(name)}.base_layer.bias": (layer.out_features,) for name, layer in model.named_modules()
            if isinstance(layer, ILoraLayer) and adapter_name in layer.r}


def _bias_shapes(model: nn.Module, bias: str, adapter_name: str) -> dict[str, tuple[int, ...] | None]:
    """Name as of `base_name` -> shape of each bias that the adapter trains and saves by its config's `bias`.

    None for a bias outside the adapted layers, whose parameter may be sharded: only its presence is checked.
    """
    if bias == "none":
        return {}
    own = _adapted_biases(model, adapter_name)
    return {name: own.get(name) for name in _biases(model) if bias == "all" or name in own}


def _require_fit(expected: dict, given: dict, action: str, adapter_name: str, mend: str) -> None:
    faults = [f"missing {key}" for key in expected if key not in given]
    faults += [f"spare {key}" for key in given if key not in expected]
    faults += [f"{key} has shape {list(given[key])}, this base and configuration need {list(shape)}"
               for key, shape in expected.items() if shape is not None and given.get(key, shape) != shape]
    if faults:
        more = f" ... and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{action} '{adapter_name}': {'; '.join(faults[:3])}{more}. {mend}")


def parameter_groups(model: nn.Module, learning_rate: float, router_learning_rate: float) -> list[dict]:
    """Parameter groups for an optimiser in which the routers learn at their own rate.

    A router that reads the pooled instruction saturates at the adapter's rate; a tenth of it is a place to start.

    Args:
        model: any module holding I-LoRA layers. Every parameter that requires gradient is in exactly one group.
        learning_rate: of A, B and whatever else is trained, such as modules_to_save and biases.
        router_learning_rate: of the routers of every trained adapter; 0 keeps them as they are.

    Returns:
        [{"params": [...], "lr": learning_rate}, {"params": [routers], "lr": router_learning_rate}], as
        `torch.optim.AdamW(groups)` or HF Trainer's `optimizers=` take them.

    Raises:
        ValueError: a rate below 0 or not finite, or no router to train (a uniform one, or a frozen adapter).
    """
    for field, rate in (("learning_rate", learning_rate), ("router_learning_rate", router_learning_rate)):
        if not 0 <= rate < float("inf"):
            raise ValueError(f"parameter_groups: `{field}` must be a number of at least 0, got {rate!r}.")
    is_router = {id(p) for module in model.modules() if isinstance(module, ILoraLayer)
                 for p in module.ilora_router.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    routers = [p for p in trained if id(p) in is_router]
    if not routers:
        raise ValueError("parameter_groups: the model has no router that requires gradient. Is the adapter active and "
                         "not frozen, and its config's router='token'?")
    return [{"params": [p for p in trained if id(p) not in is_router], "lr": learning_rate},
            {"params": routers, "lr": router_learning_rate}]
