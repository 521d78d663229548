"""The adapted linear layer and its routers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import ILoraConfig

MERGE_REFUSAL = (
    "I-LoRA cannot be merged: its heads are weighed anew for every token, so no single weight matrix equals the base "
    "plus the adapter. Keep the adapter beside the base, or call unload() to get the base back."
)


class TokenRouter(nn.Linear):
    """Softmax weights of the heads for each token. No bias; the softmax runs in float32 at least.

    Shapes: x [..., in_features] -> [..., num_heads], rows summing to 1.
    """

    def __init__(self, in_features: int, num_heads: int, temperature: float):
        super().__init__(in_features, num_heads, bias=False)
        self.temperature = temperature

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, self.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.softmax(logits / self.temperature, dim=-1)


class UniformRouter(nn.Module):
    """Equal weights for every token: x [..., in_features] -> [..., num_heads], all 1 / num_heads."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.full((*x.shape[:-1], self.num_heads), 1 / self.num_heads, dtype=dtype, device=x.device)


class ILoraLayer(BaseTunerLayer):
    """Holds, for each adapter name, the shared A, the stacked heads B, the router and the dropout.

    Shapes: `ilora_A` weight [r, in]; `ilora_B` weight [out, num_heads * r], that is [B_1 | ... | B_N] side by side;
    `ilora_router` weight [num_heads, in] (none for the uniform router).
    """

    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_router")
    other_param_names = ("r", "lora_alpha", "num_heads", "scaling", "ilora_dropout")

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.num_heads: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.ilora_A = nn.ModuleDict()
        self.ilora_B = nn.ModuleDict()
        self.ilora_router = nn.ModuleDict()
        self.ilora_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.kwargs = kwargs
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: ILoraConfig) -> None:
        """Add the adapter `adapter_name` to this layer (r and lora_alpha after the patterns were applied)."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.num_heads[adapter_name] = config.num_heads
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.ilora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.ilora_B[adapter_name] = nn.Linear(config.num_heads * r, self.out_features, bias=False)
        self.ilora_router[adapter_name] = (
            TokenRouter(self.in_features, config.num_heads, config.router_temperature)
            if config.router == "token" else UniformRouter(config.num_heads)
        )
        self.ilora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._reset_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
                 **kwargs) -> None:
        super().__init__()
        ILoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.ilora_A:
                result = self._add_adapter(name, x, result)
        return result

    def _add_adapter(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return `result` plus what adapter `name` adds for the input x, in the dtype of `result`.

        sum_i w_i B_i z equals [B_1 | ... | B_N] (w (x) z) with (x) the Kronecker product: the weights multiply the
        small [tokens, r] projections, and one matrix product serves every head.
        """
        up = self.ilora_B[name].weight
        x = self._cast_input_dtype(x, up.dtype)
        z = self.ilora_A[name](self.ilora_dropout[name](x))
        weights = self.ilora_router[name](x) * self.scaling[name]
        routed = (weights.to(z.dtype).unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)  # [..., num_heads * r]
        if routed.dtype == up.dtype == result.dtype:
            # Accumulates onto the base's output inside the matrix product.
            flat = torch.addmm(result.reshape(-1, self.out_features), routed.reshape(-1, routed.shape[-1]), up.t())
            return flat.view(result.shape)
        return result + self.ilora_B[name](routed).to(result.dtype)

    def __repr__(self) -> str:
        return "ilora." + super().__repr__()
