"""The tuner: it puts I-LoRA layers into a model, and checks saved tensors against them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .adapters import base_name, ilora_layers, require_fit
from .config import ILoraConfig
from .layer import MERGE_REFUSAL, ILoraLayer, Linear
from .registration import PREFIX
from .routers import SharedRouter, UniformRouter

# PEFT itself adds these to modules_to_save for these tasks, whether the model has them or not.
TASKS_WITH_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
AUTOMATIC_MODULES = ("classifier", "score", "qa_outputs")


class ILoraModel(BaseTuner):
    """Adapts a model with I-LoRA (Crab+, arXiv 2603.04128). `peft.get_peft_model` makes it.

    Where PEFT's own tuners only warn, it raises ValueError: for targets that are not linear, entries that match no
    module, a base that is a PeftModel, and saved tensors that do not fit. (A transformers model's own `load_adapter`
    only logs the latter.)
    """

    prefix: str = PREFIX
    tuner_layer_cls = ILoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # no default: the study must say which modules it adapts

    def _prepare_model(self, peft_config: ILoraConfig, model: nn.Module) -> None:
        """Check all targets before the first is replaced, so that a refusal leaves the base unchanged."""
        if isinstance(model, PeftModel):
            fault = f"the base already is a {type(model).__name__} with the adapters {sorted(model.peft_config)}"
            fix = "Give model.unload(), or model.merge_and_unload() to keep the change of a LoRA"
            raise ValueError(f"I-LoRA: {fault}. {fix}; a further I-LoRA adapter comes by model.add_adapter.")
        self._routers: dict[tuple, nn.ModuleDict] = {}  # group -> routers of the layer that has the router of the group
        _maybe_include_all_linear_layers(peft_config, model)  # as PEFT does next: names in place of 'all-linear'
        names, targets, inside = [], [], ()
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            names.append(name)
            match = self._check_target_module_exists(peft_config, name)
            if match and not isinstance(match, _ExcludedModule):
                _require_linear(module, name)
                targets.append(name)
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
        automatic = AUTOMATIC_MODULES if peft_config.task_type in TASKS_WITH_HEADS else ()
        entries = set(peft_config.modules_to_save or ()).difference(automatic)
        every = [name for name, _ in model.named_modules(remove_duplicate=False)]
        unmatched = [("modules_to_save", e) for e in sorted(entries) if not any(name.endswith(e) for name in every)]
        if targets:  # otherwise PEFT raises an error next
            for option in ("target_modules", "exclude_modules"):
                value = getattr(peft_config, option) or ()
                whole = {value: value} if isinstance(value, str) else {e: rf"(.*\.)?{re.escape(e)}" for e in value}
                for entry, expression in sorted(whole.items()):
                    if not any(re.fullmatch(expression, name) for name in names):
                        unmatched.append((option, entry))
            for option in ("rank_pattern", "alpha_pattern"):
                keys = {key: rf"(.*\.)?({key})$" for key in getattr(peft_config, option)}
                unmatched += [(option, k) for k, e in keys.items() if not any(re.match(e, name) for name in targets)]
        for option, entry in unmatched:
            modules = "adapted module" if option.endswith("pattern") else "module of the model"
            raise ValueError(f"ILoraConfig: `{option}` entry {entry!r} matches no {modules}; correct or remove it.")

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key) -> None:
        _require_linear(target, current_key)
        group = _router_group(config, self.model, current_key, target.in_features)
        shared = self._routers.get(group)
        if isinstance(target, ILoraLayer):
            layer = target
            layer.update_layer(adapter_name, config, shared)
        else:
            layer = Linear(target, current_key, adapter_name, config, shared)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is trained only once it is active
            self._replace_module(parent, target_name, layer, target)
        self._routers.setdefault(group, layer.ilora_router)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """Refuse one adapter per sample. PEFT would ignore the names, and run the active adapter on all samples."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("I-LoRA has no `adapter_names`; run one adapter at a time, after model.set_adapter.")
        yield

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    unmerge_adapter = _check_merge_allowed

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """Refused: each adapter routes by itself, so no adapter of this method is the weighted sum of two."""
        fix = "train one adapter on all tasks, or export each by crab.ilora.to_static() and add these plain LoRAs"
        raise ValueError(f"I-LoRA has no `add_weighted_adapter`, since each adapter has its own router; {fix}.")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT. Without autocast, loaded tensors also get the dtype of the base layer."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer in _layers(self.model, adapter_name).values() if not autocast_adapter_dtype else ():
            BaseTunerLayer._move_adapter_to_device_of_base_layer(layer, adapter_name)

    # ---- biases of the base

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self._train_biases(any(self.peft_config[name].inference_mode for name in self.active_adapters))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. Of the biases, only those of the new active adapters are trained."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._train_biases(inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT. The biases that the adapter trained keep their values, and are no longer trained."""
        bias = self.peft_config[adapter_name].bias if adapter_name in self.peft_config else "none"
        super().delete_adapter(adapter_name)
        if bias != "none":  # only one adapter of a model trains biases
            for parameter in _biases(self.model).values():
                parameter.requires_grad_(False)

    def _train_biases(self, inference_mode: bool) -> None:
        """Train exactly the biases that the active adapters save.

        PEFT would also train those of layers of other adapters, and keep them when another adapter becomes active.
        """
        if all(config.bias == "none" for config in self.peft_config.values()):
            return
        active = () if inference_mode else self.active_adapters
        trained = {key for name in active for key in _shapes(self.model, name, self.peft_config[name].bias)}
        for key, parameter in _biases(self.model).items():
            parameter.requires_grad_(key in trained)

    # ---- saved tensors

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """The tensors of the adapter. Raises ValueError if one is missing or not whole, such as a shard.

        They are selected by name: PEFT's selection by modules misses those inside wrappers of the first FSDP. A bias of
        an own module is called `<module>.base_layer.bias`, as transformers expects. Others have their name in the base.
        """
        expected = _shapes(model, adapter_name, config.bias)
        tensors = {key: value for key, value in state_dict.items() if base_name(key) in expected}
        if not state_dict and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return tensors  # only the main process has the gathered tensors, and only it saves
        shapes = {base_name(key): tuple(value.shape) for key, value in tensors.items()}
        fix = "Gather by accelerator.get_state_dict on all processes, and give it as `state_dict` on the main one."
        require_fit(expected, shapes, f"Cannot save adapter '{adapter_name}'", fix)
        own = {f"{name}.base_layer.bias" for name in _layers(model, adapter_name)}
        return {key if base_name(key) in own else _unwrapped(key): value for key, value in tensors.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """The saved tensors under the names of this model. Raises ValueError unless they fit its layers one to one."""
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        keys = list(model.state_dict())
        wrapped = {base_name(_unwrapped(key)): key for key in keys if key != _unwrapped(key)}
        renamed = {wrapped.get(base_name(_unwrapped(key)), key): _aligned(value) for key, value in renamed.items()}
        shapes = {base_name(key): tuple(value.shape) for key, value in renamed.items()}
        expected = _shapes(model, adapter_name, config.bias)
        # PEFT checks modules_to_save and resized embeddings, which have names of the base and come with a weight.
        alone = {key for key in _biases(model) if key.removesuffix("bias") + "weight" not in shapes}
        others = {base_name(key) for key in keys} - alone - set(expected)
        shapes = {key: shape for key, shape in shapes.items() if key not in others}
        fix = "The tensors must fit the adapted modules; was the adapter made for another base or configuration?"
        require_fit(expected, shapes, f"Cannot load adapter '{adapter_name}'", fix)
        return renamed


def _router_group(config: ILoraConfig, model: nn.Module, name: str, in_features: int) -> tuple:
    """Modules of one group share a router, see `ILoraConfig.router_sharing`."""
    if config.router_sharing == "model":
        return (in_features,)
    layer = _layer_of(name, model) if config.router_sharing == "layer" else None
    return (name,) if layer is None else (layer, in_features)


def _layer_of(name: str, model: nn.Module) -> str | None:
    """The numbered layer of a module: "model.layers.3" of "model.layers.3.mlp.up_proj". None if it has none.

    It is the innermost numbered member of a list whose members have one class, such as "stages.1.blocks.0"; experts of
    a mixture ("experts.5") are parts of their layer. If no list has one class, it is the outermost numbered module.
    """
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
    return ".".join(parts[: layer + 1])


def _require_linear(module: nn.Module, name: str) -> None:
    if isinstance(module, ILoraLayer):
        return
    kind = type(module)
    if isinstance(module, BaseTunerLayer):
        other = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"I-LoRA: {name!r} already has an adapter of another method ({other}); unload that first.")
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        fix = "I-LoRA adapts nn.Linear only, so add it to `exclude_modules`"
        raise ValueError(f"ILoraConfig: `target_modules` matches {name!r}, which is a {kind.__name__}; {fix}.")


def _layers(model: nn.Module, adapter_name: str) -> dict[str, ILoraLayer]:
    return {name: layer for name, layer in ilora_layers(model).items() if adapter_name in layer.r}


def _shapes(model: nn.Module, adapter_name: str, bias: str) -> dict[str, tuple[int, ...] | None]:
    """Name in the base -> shape of each tensor of the adapter. Parameters may be sharded, so shapes are computed.

    None for a bias outside the adapted modules, whose shape is then not known.
    """
    shapes, own = {}, {}
    for name, layer in _layers(model, adapter_name).items():
        r, heads = layer.r[adapter_name], layer.num_heads[adapter_name]
        rows = r if layer.shared_A[adapter_name] else heads * r
        shapes[f"{name}.ilora_A.{adapter_name}.weight"] = (rows, layer.in_features)
        shapes[f"{name}.ilora_B.{adapter_name}.weight"] = (layer.out_features, heads * r)
        if not isinstance(layer.ilora_router[adapter_name], (SharedRouter, UniformRouter)):  # FSDP may wrap the router
            shapes[f"{name}.ilora_router.{adapter_name}.weight"] = (heads, layer.in_features)
        own[f"{name}.base_layer.bias"] = (layer.out_features,)
    biases = () if bias == "none" else _biases(model)
    return shapes | {name: own.get(name) for name in biases if bias == "all" or name in own}


def _biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name in the base -> bias, without those of modules_to_save, which are trained and saved with their module."""
    whole = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    parameters = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(whole)}
    return {base_name(name): parameter for name, parameter in parameters.items() if f".{name}".endswith(".bias")}


def _unwrapped(key: str) -> str:
    """The name of a bias if no adapter wraps its module. Other names stay."""
    return key.removesuffix(".base_layer.bias") + ".bias" if key.endswith(".base_layer.bias") else key


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy if the memory does not start where torch would put it, as in the middle of a mapped file.

    The last bits of small matrix products depend on that, and a loaded adapter must give the bits of the saved one.
    """
    misplaced = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % 64
    return tensor.clone() if misplaced else tensor


def parameter_groups(model: nn.Module, learning_rate: float, router_learning_rate: float) -> list[dict]:
    """Two groups for an optimiser (`torch.optim.AdamW(groups)`): all trained parameters but the routers, the routers.

    A router that reads the instruction saturates at the rate of the adapter; a tenth of it is a good start. Raises
    ValueError if a rate is below 0 or not finite, or if no router is trained.
    """
    for name, rate in (("learning_rate", learning_rate), ("router_learning_rate", router_learning_rate)):
        if not 0 <= rate < float("inf"):
            raise ValueError(f"parameter_groups: `{name}` must be a number of at least 0, got {rate!r}.")
    layers = ilora_layers(model).values()
    routing = {id(parameter) for layer in layers for parameter in layer.ilora_router.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    routers = [parameter for parameter in trained if id(parameter) in routing]
    if not routers:
        raise ValueError("parameter_groups: no router requires gradient; use router='token', and an active adapter.")
    rest = [parameter for parameter in trained if id(parameter) not in routing]
    return [{"params": rest, "lr": learning_rate}, {"params": routers, "lr": router_learning_rate}]
