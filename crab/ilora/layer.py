"""The adapted linear layer."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .config import ILoraConfig
from .fused import FusedLinear, Setting, kernels_for, project, project_few
from .routers import SharedRouter, TokenRouter, UniformRouter, autocast_dtype, autocast_off

MERGE_REFUSAL = (
    "I-LoRA cannot be merged: the weights of its heads change with every token. Call unload() for the base (biases "
    "that were trained stay so), or export an approximation with fixed weights by crab.ilora.to_static()."
)

CAST_BY_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_DEVICES = ("cuda",)
FEW_TOKENS = 32  # as in decoding: to prepare the weights takes as long as to use them


def _untouched(*modules: nn.Module) -> bool:
    """No module has a hook or another forward, so the layer may use their weights without calling them.

    ZeRO and FSDP gather sharded weights in hooks, Accelerate moves offloaded ones, and users read activations.
    """
    if _has_any_global_hook():
        return False
    for own in (module.__dict__ for module in modules):  # written out, since decoding does this for every token
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "forward" in own:
            return False
    return True


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The attribute, 1 microsecond faster if it is a parameter. The first FSDP has plain tensors there."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _few(x: torch.Tensor) -> bool:
    """There are few tokens and no gradient, as in decoding."""
    return x.numel() <= FEW_TOKENS * x.shape[-1] and not torch.is_grad_enabled()


def _is_eager() -> bool:
    """The code is not compiled or traced, and not under a torch.func transform or forward-mode differentiation."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class ILoraLayer(BaseTunerLayer):
    """Holds A, the stacked heads B, the router and the dropout of each adapter.

    Weights: `ilora_A` [r, in], or [num_heads * r, in] with shared_A=False. `ilora_B` [out, num_heads * r], that is
    [B_1 | ... | B_N]. `ilora_router` [num_heads, in]; a uniform router has none, a shared one is in another layer.

    Attributes:
        r, lora_alpha, num_heads, scaling, shared_A, router_input: adapter name -> value in this layer.
        fused: run base and adapter as one function where possible. False, for the class or a layer, calls all modules.
        kernels: on a GPU use `crab.ilora.kernels` where possible.
        check_routing: refuse routing weights that are not finite. None checks on the CPU, in 2 microseconds per layer.
            True checks on all devices, which then wait for the host. Code that is not eager is never checked.
        routing_observers: adapter name -> functions, called with (module, weights [..., num_heads]) in each forward.
        fixed_routing: adapter name -> weights [num_heads] in place of the router's.
    """

    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_router")
    other_param_names = ("r", "lora_alpha", "num_heads", "scaling", "shared_A", "router_input", "ilora_dropout")
    fused = True
    kernels = True
    check_routing: bool | None = None

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        for name in ("r", "lora_alpha", "num_heads", "scaling", "shared_A", "router_input"):
            setattr(self, name, {})
        for name in ("ilora_A", "ilora_B", "ilora_router", "ilora_dropout"):
            setattr(self, name, nn.ModuleDict())
        self.routing_observers: dict[str, list[Callable]] = {}
        self.fixed_routing: dict[str, torch.Tensor] = {}
        self.instruction: Any = None  # set by `crab.ilora.instruction_tokens`
        self.cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(self, adapter_name: str, config: ILoraConfig, shared: nn.ModuleDict | None = None) -> None:
        """Add an adapter. `shared` are the routers of the layer whose router this one shares; None makes a new one."""
        ranks, alphas = config.rank_pattern, config.alpha_pattern
        r = self.r[adapter_name] = ranks.get(get_pattern_key(ranks, self.module_name), config.r)
        lora_alpha = alphas.get(get_pattern_key(alphas, self.module_name), config.lora_alpha)
        self.lora_alpha[adapter_name] = lora_alpha
        self.num_heads[adapter_name] = config.num_heads
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.shared_A[adapter_name] = config.shared_A
        self.router_input[adapter_name] = config.router_input
        rows = r if config.shared_A else config.num_heads * r
        self.ilora_A[adapter_name] = nn.Linear(self.in_features, rows, bias=False)
        self.ilora_B[adapter_name] = nn.Linear(config.num_heads * r, self.out_features, bias=False)
        if shared is not None:
            router = SharedRouter(shared, adapter_name)
        elif config.router == "token":
            router = TokenRouter(self.in_features, config.num_heads, config.router_temperature, config.top_k)
        else:
            router = UniformRouter(config.num_heads)
        self.ilora_router[adapter_name] = router
        self.ilora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._reset_parameters(adapter_name, config)
        super()._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move to the device of the base layer, and to its dtype if that is the wider one.

        With low_cpu_mem_usage PEFT calls this on loaded tensors. Its own version rounds float32 to a bfloat16 base.
        """
        base_device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = base_device if device is None else device
        floats = base_dtype is not None and base_dtype.is_floating_point
        for modules in (self._modules[name]._modules for name in self.adapter_layer_names):
            own = next(modules[adapter_name].parameters(), None) if adapter_name in modules else None
            if own is not None and own.device.type != "meta" and device is not None:
                modules[adapter_name].to(device, torch.promote_types(own.dtype, base_dtype) if floats else own.dtype)

    def _reset_parameters(self, adapter_name: str, config: ILoraConfig) -> None:
        nn.init.kaiming_uniform_(self.ilora_A[adapter_name].weight, a=math.sqrt(5))  # as in LoRA
        if config.init_weights:
            nn.init.zeros_(self.ilora_B[adapter_name].weight)
        else:
            nn.init.normal_(self.ilora_B[adapter_name].weight, std=1 / math.sqrt(self.r[adapter_name]))
        router = self.ilora_router[adapter_name]
        if isinstance(router, TokenRouter):
            nn.init.normal_(router.weight, std=config.router_init_std)

    def merge(self, *args, **kwargs) -> None:
        raise ValueError(MERGE_REFUSAL)

    unmerge = get_delta_weight = merge


class Linear(nn.Module, ILoraLayer):
    """An `nn.Linear` with I-LoRA adapters: x [..., in_features] -> [..., out_features]."""

    def __init__(self, base_layer: nn.Linear, module_name: str, adapter_name: str, config: ILoraConfig, shared=None):
        super().__init__()
        ILoraLayer.__init__(self, base_layer, module_name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, shared)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = self._modules["ilora_A"]._modules  # plain dictionaries: in decoding, look-ups cost as much as sums
        names = [] if self._disable_adapters else [name for name in self.active_adapters if name in adapters]
        if len(names) == 1 and not args and not kwargs:
            inputs = self._fusible(names[0], x)
            if inputs is not None:
                return self._fused(names[0], *inputs)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            result = self._add_adapter(name, x, result)
        return result

    def _fusible(self, name: str, x: torch.Tensor) -> tuple | None:
        """The inputs of `_fused`, or None if the parts must run as modules.

        So do quantised, sharded, offloaded or trained base layers, hooks, float64 under autocast, and compiled code.
        """
        if not self.fused or name in self.fixed_routing or self.router_input[name] != "token" or not _is_eager():
            return None
        own = self._modules
        base, down, up = own["base_layer"], own["ilora_A"]._modules[name], own["ilora_B"]._modules[name]
        router, dropout = own["ilora_router"]._modules[name], own["ilora_dropout"]._modules[name]
        if type(router) is SharedRouter and _untouched(router):
            router = router.router
        if not (type(base) is type(down) is type(up) is nn.Linear) or type(router) is not TokenRouter:
            return None
        if not _untouched(base, down, up, router, dropout):
            return None
        rate = 0.0
        if dropout.training and type(dropout) is not nn.Identity:
            if type(dropout) is not nn.Dropout:
                return None
            rate = dropout.p
        weight, A, R, B = (_tensor(part, "weight") for part in (base, down, router, up))
        bias = _tensor(base, "bias")
        for tensor in (weight, A, R, B):
            if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
                return None
        if weight.requires_grad or R.device != x.device or not A.dtype == R.dtype == B.dtype:
            return None
        # Without gradient a trained bias is like any other, so a saved adapter gives the same bits after loading.
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        dtype = autocast_dtype(x.device.type)
        if dtype is None:
            if x.dtype != weight.dtype or A.dtype != x.dtype and not self.cast_input_dtype_enabled:
                return None
            setting = Setting(router, self.scaling[name], rate, A.dtype, A.dtype, self._kernels(router, x, A.dtype))
            return x, None, weight, bias, A, R, B, setting
        for tensor in (x, weight, A):
            if tensor.dtype not in CAST_BY_AUTOCAST:
                return None
        read = None if x.dtype == dtype else x.detach()
        bias = bias if bias is None else bias.to(dtype)
        # A cast of A and B takes as long as their product with a few tokens, and the stored dtype is more exact.
        used = A.dtype if _few(x) else dtype
        setting = Setting(router, self.scaling[name], rate, used, torch.float32, self._kernels(router, x, used))
        return x.to(dtype), read, weight.to(dtype), bias, A, R, B, setting

    def _kernels(self, router: TokenRouter, x: torch.Tensor, dtype: torch.dtype) -> ModuleType | None:
        """`crab.ilora.kernels`, or None where they do not run or do not compute this."""
        if x.device.type not in KERNEL_DEVICES or not self.kernels or router.top_k is not None:
            return None
        return kernels_for(x.device) if dtype in CAST_BY_AUTOCAST and type(x) is torch.Tensor and x.numel() else None

    def _fused(self, name: str, x: torch.Tensor, read, weight, bias, A, R, B, setting: Setting) -> torch.Tensor:
        if x.dtype == setting.dtype == setting.router_dtype and not setting.dropout and _few(x):
            y, weights = project_few(x, weight, bias, A, R, B, setting)
        else:
            flat = (-1, x.shape[-1])
            read = read if read is None else read.reshape(flat)
            with autocast_off(x.device.type):
                if torch.is_grad_enabled():
                    y, weights = FusedLinear.apply(x.reshape(flat), read, weight, bias, A, R, B, setting)
                else:
                    y, _, _, weights, _ = project(x.reshape(flat), read, weight, bias, A, R, B, setting)
            y = y.view(*x.shape[:-1], y.shape[-1])
        if self.check_routing is not False:
            self._require_finite(name, weights)
        for observer in self.routing_observers.get(name, ()):
            observer(self, weights.detach().squeeze(1).t().reshape(*x.shape[:-1], len(weights)))
        return y

    def _add_adapter(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` plus the output of adapter `name` for x, in the dtype of `result`.

        sum_i w_i B_i z_i equals [B_1 | ... | B_N] (w_1 z_1, ..., w_N z_N). So the weights multiply the small
        [tokens, r] projections, and one matrix product serves all heads.
        """
        B = self.ilora_B[name]
        x = self._cast_input_dtype(x, B.weight.dtype)
        z = self.ilora_A[name](self.ilora_dropout[name](x))
        weights = self._weights(name, x)
        if self.check_routing is not False and _is_eager():
            self._require_finite(name, weights)
        for observer in self.routing_observers.get(name, ()):
            observer(self, weights.expand(*x.shape[:-1], -1))
        scaled = (weights * self.scaling[name]).to(z.dtype).unsqueeze(-1)
        z = z.unsqueeze(-2) if self.shared_A[name] else z.unflatten(-1, (self.num_heads[name], -1))
        routed = (scaled * z).flatten(-2)  # [..., num_heads * r]
        if routed.dtype == B.weight.dtype == result.dtype and type(B) is nn.Linear and _untouched(B):
            # adds to the output of the base inside the matrix product
            rows = (result.reshape(-1, self.out_features), routed.reshape(-1, routed.shape[-1]))
            return torch.addmm(*rows, B.weight.t()).view(result.shape)
        return result + B(routed).to(result.dtype)

    def _weights(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Routing weights [..., num_heads], or [batch, 1, num_heads] if all tokens of a sample have the same."""
        if name in self.fixed_routing:
            return self.fixed_routing[name].to(x.device).expand(*x.shape[:-1], -1)
        if self.router_input[name] == "token":
            return self.ilora_router[name](x)
        if self.instruction is None:
            raise ValueError("I-LoRA: router_input='instruction' needs `with crab.ilora.instruction_tokens(...):`.")
        return self.instruction.weights(self, name, x)

    def _require_finite(self, name: str, weights: torch.Tensor) -> None:
        """Raise ValueError if routing weights are NaN. A logit that is NaN or infinite makes them so."""
        if self.check_routing is None and weights.device.type != "cpu" or type(weights) is not torch.Tensor:
            return
        # Python adds few numbers, as in decoding, faster than torch.
        total = sum(weights.flatten().tolist()) if weights.numel() <= 128 else weights.sum().item()
        if math.isfinite(total):
            return
        router = self.ilora_router[name]
        own = getattr(router, "router", router).weight
        cause = "its input is not; look for the first such module"
        if not torch.isfinite(own).all():
            cause = "its weight is not; lower the learning rate, or return to an earlier checkpoint"
        place = f"{self.module_name!r} (adapter {name!r})"
        raise ValueError(f"I-LoRA: the routing of {place} is not finite: {cause}. See ILoraLayer.check_routing.")

    def __repr__(self) -> str:
        return "ilora." + super().__repr__()
