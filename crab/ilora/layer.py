"""The adapted linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from .config import ILoraConfig
from .fused import FusedLinear, Setting, kernels_for, project, project_few
from .routers import PrivateRouter, SharedRouter, TokenRouter, UniformRouter, autocast_dtype, autocast_off
from .terms import Terms, with_terms

MERGE_REFUSAL = (
    "I-LoRA cannot be merged: its heads are weighed anew for every token, so no single weight matrix equals the base "
    "plus the adapter. Keep the adapter beside the base, call unload() to get the base back (with its biases as they "
    "were trained, if the config's `bias` had them trained), or export an approximation with frozen weights by "
    "crab.ilora.to_static()."
)

CAST_BY_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_DEVICES = ("cuda",)
FEW_TOKENS = 32  # as in decoding: what is done to the weights before they are used costs as much as using them


def _untouched(*modules: nn.Module) -> bool:
    """Nobody has hooked or replaced the modules' forwards, so their weights may be used without calling them.

    ZeRO and FSDP gather sharded weights in such hooks, Accelerate moves offloaded ones, users read activations.
    """
    if (hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks
            or hooks._global_backward_pre_hooks):
        return False
    for module in modules:
        own = module.__dict__
        if (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
                or "forward" in own):
            return False
    return True


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The attribute, faster by 1 microsecond where it is a parameter; FSDP's first version leaves plain tensors instead."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def _few(x: torch.Tensor) -> bool:
    """Tokens are few and no gradient is wanted, as in decoding."""
    return x.numel() <= FEW_TOKENS * x.shape[-1] and not torch.is_grad_enabled()


def _is_eager() -> bool:
    """Neither compiled, nor traced, nor under a torch.func transform or forward-mode differentiation."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
                or forward_ad._current_level >= 0)


class ILoraLayer(BaseTunerLayer):
    """Holds, for each adapter name, A, the stacked heads B, the router and the dropout.

    Shapes: `ilora_A` weight [r, in], or [num_heads * r, in] when each head has its own; `ilora_B` weight
    [out, num_heads * r], that is [B_1 | ... | B_N] side by side; `ilora_router` weight [num_heads, in], a row less with
    a shared head (none for the uniform router, nor where another layer holds the router that this one shares).

    Attributes:
        fused: let the layer run base and adapter together where that is possible (the default). Set it to False, on
            the class or on one layer, to have every part called as a module, for instance to compare the two.
        kernels: on a GPU with Triton, let a layer that runs fused do what lies between its matrix products in one kernel
            each way (the default), which saves launches. A router with top_k and float64 are always left to torch. Set it
            to False, on the class or on one layer, to compare the two.
        check_routing: refuse, by the module's name, routing that is not finite. None (the default) checks on the CPU,
            where it costs 2 microseconds a layer; True also on other devices, which then wait for the host in every
            layer; False nowhere. Set it on the class or on one layer. Code that is compiled, traced, under a
            torch.func transform or differentiated forward is not checked.
        module_name: the layer's name in the base model, for messages.
        routing_observers: adapter name -> functions that are given (module, weights [..., num_heads]) in each forward.
        fixed_routing: adapter name -> weights [num_heads] used in place of the router's.
        instruction: which tokens the routers with router_input='instruction' read, set by
            `crab.ilora.instruction_tokens`.
    """

    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_router")
    other_param_names = ("r", "lora_alpha", "num_heads", "scaling", "shared_A", "shared_head", "router_input",
                         "terms", "unfused_training", "ilora_dropout")
    fused = True
    kernels = True
    check_routing: bool | None = None

    def __init__(self, base_layer: nn.Module, module_name: str = "", **kwargs) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.num_heads: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.shared_A: dict[str, bool] = {}
        self.shared_head: dict[str, bool] = {}
        self.terms: dict[str, Terms] = {}
        self.unfused_training: dict[str, bool] = {}  # something is done in training that `FusedLinear` does not do
        self.router_input: dict[str, str] = {}
        self.ilora_A = nn.ModuleDict()
        self.ilora_B = nn.ModuleDict()
        self.ilora_router = nn.ModuleDict()
        self.ilora_dropout = nn.ModuleDict()
        self.routing_observers: dict[str, list[Callable]] = {}
        self.fixed_routing: dict[str, torch.Tensor] = {}
        self.instruction: Any = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.kwargs = kwargs
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: ILoraConfig,
                     shared_routers: nn.ModuleDict | None = None) -> None:
        """Add the adapter `adapter_name` to this layer.

        Args:
            r, lora_alpha: after the patterns were applied.
            shared_routers: another layer's, whose router for this adapter this one shares; None makes one.
        """
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.num_heads[adapter_name] = config.num_heads
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.shared_A[adapter_name] = config.shared_A
        self.shared_head[adapter_name] = config.shared_head
        self.terms[adapter_name] = Terms(config.balance_weight, config.orthogonality_weight)
        self.unfused_training[adapter_name] = bool(config.router_noise) or any(self.terms[adapter_name])
        self.router_input[adapter_name] = config.router_input
        rows = r if config.shared_A else config.num_heads * r
        self.ilora_A[adapter_name] = nn.Linear(self.in_features, rows, bias=False)
        self.ilora_B[adapter_name] = nn.Linear(config.num_heads * r, self.out_features, bias=False)
        if shared_routers is not None:
            self.ilora_router[adapter_name] = SharedRouter(shared_routers, adapter_name)
        elif config.router == "token":
            self.ilora_router[adapter_name] = (PrivateRouter if config.shared_head else TokenRouter)(
                self.in_features, config.num_heads, config.router_temperature, config.top_k, config.router_noise)
        else:
            self.ilora_router[adapter_name] = UniformRouter(config.num_heads)
        self.ilora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._reset_parameters(adapter_name, config)
        super()._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base layer's device, and to its dtype where that is the wider one.

        With low_cpu_mem_usage PEFT calls this on the tensors it has loaded; its own would round float32 to a bfloat16 base's.
        """
        base_device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = base_device if device is None else device
        for held in (self._modules[name]._modules for name in self.adapter_layer_names):
            own = next(held[adapter_name].parameters(), None) if adapter_name in held else None
            if own is not None and own.device.type != "meta" and device is not None:
                floats = base_dtype is not None and base_dtype.is_floating_point
                held[adapter_name].to(device, torch.promote_types(own.dtype, base_dtype) if floats else own.dtype)

    def _reset_parameters(self, adapter_name: str, config: ILoraConfig) -> None:
        nn.init.kaiming_uniform_(self.ilora_A[adapter_name].weight, a=math.sqrt(5))  # as LoRA does
        if config.init_weights:
            nn.init.zeros_(self.ilora_B[adapter_name].weight)
        else:
            nn.init.normal_(self.ilora_B[adapter_name].weight, std=1 / math.sqrt(self.r[adapter_name]))
        router = self.ilora_router[adapter_name]
        if isinstance(router, TokenRouter):
            nn.init.normal_(router.weight, std=config.router_init_std)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        raise ValueError(MERGE_REFUSAL)


class Linear(nn.Module, ILoraLayer):
    """An `nn.Linear` with I-LoRA adapters: x [..., in_features] -> [..., out_features]."""

    def __init__(self, base_layer: nn.Linear, adapter_name: str, r: int, lora_alpha: float, config: ILoraConfig,
                 shared_routers: nn.ModuleDict | None = None, **kwargs) -> None:
        super().__init__()
        ILoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, shared_routers)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        held = self._modules["ilora_A"]._modules  # plain dictionaries: in decoding look-ups cost as much as the arithmetic
        names = [] if self._disable_adapters else [name for name in self.active_adapters if name in held]
        if len(names) == 1 and not args and not kwargs:
            tensors = self._fusible(names[0], x)
            if tensors is not None:
                return self._fused(names[0], *tensors)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            result = self._add_adapter(name, x, result)
        return result

    def _fusible(self, name: str, x: torch.Tensor) -> tuple | None:
        """The tensors and setting `FusedLinear` works on, or None where using them directly would miss something.

        Left to autograd and the modules: quantised, sharded, offloaded or trained base layers, parts hooked by themselves or
        with all modules, torch.func transforms, forward-mode differentiation, float64 under autocast (which leaves that
        alone), and tracing or compiling, where the compiler does the fusing. So are, in training, noise and further terms of
        the loss, and always a shared head.
        """
        if not self.fused or name in self.fixed_routing or self.router_input[name] != "token" or not _is_eager():
            return None
        if self.unfused_training[name] and self.training:
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
        if weight.requires_grad or R.device != x.device:
            return None
        # Without gradient a trained bias is like any other, and what is saved and loaded for use gives the same bits.
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        if not A.dtype == R.dtype == B.dtype:
            return None
        dtype = autocast_dtype(x.device.type)
        if dtype is None:
            if x.dtype != weight.dtype or A.dtype != x.dtype and not getattr(self, "cast_input_dtype_enabled", True):
                return None
            setting = Setting(router, self.scaling[name], rate, A.dtype, A.dtype, self._kernels(router, x, A.dtype))
            return x, None, weight, bias, A, R, B, setting
        for tensor in (x, weight, A):
            if tensor.dtype not in CAST_BY_AUTOCAST:
                return None
        read = None if x.dtype == dtype else x.detach()
        bias = bias if bias is None else bias.to(dtype)
        # Casting A and B costs as much as multiplying a few tokens by them; as they are stored they are more exact.
        used = A.dtype if _few(x) else dtype
        setting = Setting(router, self.scaling[name], rate, used, torch.float32, self._kernels(router, x, used))
        return x.to(dtype), read, weight.to(dtype), bias, A, R, B, setting

    def _kernels(self, router: TokenRouter, x: torch.Tensor, dtype: torch.dtype) -> ModuleType | None:
        """`crab.ilora.kernels`, or None where they do not run, or do not do what is asked for."""
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
        if self.routing_observers.get(name):
            self._show_routing(name, weights.detach().squeeze(1).t().reshape(*x.shape[:-1], len(weights)))
        return y

    def _add_adapter(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return `result` plus what adapter `name` adds for the input x, in the dtype of `result`.

        sum_i w_i B_i z_i equals [B_1 | ... | B_N] (w_1 z_1, ..., w_N z_N): the weights multiply the small
        [tokens, r] projections (the same z for every head when A is shared), and one matrix product serves all heads.
        """
        B = self.ilora_B[name]
        x = self._cast_input_dtype(x, B.weight.dtype)
        z = self.ilora_A[name](self.ilora_dropout[name](x))
        weights = self._weights(name, x)
        if self.check_routing is not False and _is_eager():
            self._require_finite(name, weights)
        if self.routing_observers.get(name):
            self._show_routing(name, weights.expand(*x.shape[:-1], -1))
        scaled = (weights * self.scaling[name]).to(z.dtype).unsqueeze(-1)
        z = z.unsqueeze(-2) if self.shared_A[name] else z.unflatten(-1, (self.num_heads[name], -1))
        routed = (scaled * z).flatten(-2)  # [..., num_heads * r]
        if routed.dtype == B.weight.dtype == result.dtype and type(B) is nn.Linear and _untouched(B):
            # Accumulates onto the base's output inside the matrix product.
            flat = torch.addmm(result.reshape(-1, self.out_features), routed.reshape(-1, routed.shape[-1]), B.weight.t())
            result = flat.view(result.shape)
        else:
            result = result + B(routed).to(result.dtype)
        if self.training and any(self.terms[name]) and torch.is_grad_enabled():
            result = with_terms(result, weights, self._whole_heads(name), self.terms[name], self.shared_head[name])
        return result

    def _whole_heads(self, name: str) -> torch.Tensor:
        """B's weight [out, num_heads * r], refused where it is a shard and a term would be of that alone."""
        B, wanted = self.ilora_B[name].weight, (self.out_features, self.num_heads[name] * self.r[name])
        if self.terms[name].orthogonality_weight and tuple(B.shape) != wanted:
            raise ValueError(f"I-LoRA: orthogonality_weight needs whole heads, but those of {self.module_name!r} are sharded "
                             f"({list(B.shape)} in place of {list(wanted)}). Train without ZeRO-3 or FSDP, or set it to 0.")
        return B

    def _weights(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Routing weights, [..., num_heads], or [batch, 1, num_heads] when one serves all tokens of a sample."""
        if name in self.fixed_routing:
            return self.fixed_routing[name].to(x.device).expand(*x.shape[:-1], -1)
        if self.router_input[name] == "token":
            return self.ilora_router[name](x)
        if self.instruction is None:
            raise ValueError("I-LoRA: a router with router_input='instruction' does not know which tokens are the "
                             "instruction. Run the model inside `with crab.ilora.instruction_tokens(model, mask):`.")
        return self.instruction.weights(self, name, x)

    def _require_finite(self, name: str, weights: torch.Tensor) -> None:
        """Raise if routing weights are NaN, as those of a token with a NaN or an infinite logit are."""
        if self.check_routing is None and weights.device.type != "cpu" or type(weights) is not torch.Tensor:
            return
        # Few numbers, as in decoding, are read sooner than torch has summed them.
        total = sum(weights.flatten().tolist()) if weights.numel() <= 128 else weights.sum().item()
        if math.isfinite(total):
            return
        router = self.ilora_router[name]
        own = getattr(router, "router", router).weight
        fault = ("its input does; look for the first module that gives such values" if torch.isfinite(own).all()
                 else "its own weight does; lower the learning rate, or go back to a sound checkpoint")
        raise ValueError(f"I-LoRA: the routing of {self.module_name!r} (adapter {name!r}) is not finite: {fault}. "
                         "ILoraLayer.check_routing = False lets such values pass.")

    def _show_routing(self, name: str, weights: torch.Tensor) -> None:
        for observer in self.routing_observers[name]:
            observer(self, weights)

    def __repr__(self) -> str:
        return "ilora." + super().__repr__()
