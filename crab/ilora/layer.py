"""The adapted linear layer and its routers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import ILoraConfig

MERGE_REFUSAL = (
    "I-LoRA cannot be merged: its heads are weighed anew for every token, so no single weight matrix equals the base "
    "plus the adapter. Keep the adapter beside the base, call unload() to get the base back, or export an "
    "approximation with frozen weights by crab.ilora.to_static()."
)


class TokenRouter(nn.Linear):
    """Softmax weights of the heads for each token. No bias; the softmax runs in float32 at least.

    With `top_k` the softmax is over the k largest logits and the other heads weigh 0.

    Shapes: x [..., in_features] -> [..., num_heads], rows summing to 1.
    """

    def __init__(self, in_features: int, num_heads: int, temperature: float, top_k: int | None = None):
        super().__init__(in_features, num_heads, bias=False)
        self.temperature = temperature
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weigh(F.linear(x, self.weight))

    def weigh(self, logits: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Weights of the logits R x, of the same shape, float32 or wider; the heads lie along `dim`."""
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k is not None:
            chosen = logits.topk(self.top_k, dim=dim)
            logits = torch.full_like(logits, -math.inf).scatter(dim, chosen.indices, chosen.values)
        return torch.softmax(logits, dim=dim)


class UniformRouter(nn.Module):
    """Equal weights for every token: x [..., in_features] -> [..., num_heads], all 1 / num_heads."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.full((*x.shape[:-1], self.num_heads), 1 / self.num_heads, dtype=dtype, device=x.device)


class _FusedLinear(torch.autograd.Function):
    """Base and adapter of one layer together, for 2-D inputs: what the tokens cost is three matrix products forward.

    Against the same formula left to autograd it keeps only x and the small product [A; R] x for backward (the routed
    projections, num_heads times as wide, are made again), adds into the base's output and into the input's gradient
    inside the matrix products, and so makes no further tensor of the size of either. The small tensors lie with the
    tokens last: a few rows as long as there are tokens are what CPUs multiply and add fastest.

    Shapes: x [T, in], weight [out, in], bias [out] or None, A [r or num_heads * r, in], R [num_heads, in],
    B [out, num_heads * r]. Returns y [T, out] and, without gradient, [A; R] x^T [rows of A + num_heads, T].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, R, B, router, scaling):
        y, small = _fused_forward(x, weight, bias, A, R, B, router, scaling)
        ctx.save_for_backward(x, weight, A, R, B, small)
        ctx.mark_non_differentiable(small)
        ctx.set_materialize_grads(False)  # or backward would be handed zeros for `small`
        ctx.router, ctx.scaling = router, scaling
        return y, small

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 8
        x, weight, A, R, B, small = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the steps below write in place, the formula can be derived again
            return _FusedLinear._differentiable_backward(ctx, grad, x, weight, A, R, B)
        need_x, _, _, need_A, need_R, need_B, _, _ = ctx.needs_input_grad
        z, weights = _gates(small, A, R, B, ctx.router)
        scaled = (weights * ctx.scaling).to(z.dtype)
        up_grad = grad.to(B.dtype)
        grad_x = grad_A = grad_R = grad_B = None
        if need_B:
            grad_B = ((scaled * z).flatten(0, 1) @ up_grad).t()
        if need_x or need_A or need_R:
            routed_grad = (B.t() @ up_grad.t()).unflatten(0, (R.shape[0], -1))
            # softmax: d logit_i = w_i (d w_i - sum_j w_j d w_j); a head left out by top_k has w_i = 0
            logits_grad = (routed_grad * z).sum(1, keepdim=True).to(weights.dtype) * (ctx.scaling / ctx.router.temperature)
            logits_grad *= weights
            logits_grad -= weights * logits_grad.sum(0, keepdim=True)
            z_grad = scaled * routed_grad
            z_grad = z_grad.sum(0) if _is_shared(A, R, B) else z_grad.flatten(0, 1)
            small_grad = torch.cat((z_grad, logits_grad.squeeze(1).to(z_grad.dtype)))
            if need_A or need_R:
                grad_A, grad_R = (small_grad @ x.to(A.dtype)).split((A.shape[0], R.shape[0]))
            if need_x:
                grad_x = grad @ weight
                _accumulate(grad_x, small_grad.t(), torch.cat((A, R)))
        return grad_x, None, None, grad_A, grad_R, grad_B, None, None

    @staticmethod
    def _differentiable_backward(ctx, grad, x, weight, A, R, B):
        # views, so that a path from one of them to another outside this layer is not counted here
        given = [t.view_as(t) for t in (x, A, R, B)]
        x, A, R, B = given
        z, weights = _gates(torch.cat((A, R)) @ x.to(A.dtype).t(), A, R, B, ctx.router)
        routed = ((weights * ctx.scaling).to(z.dtype) * z).flatten(0, 1).t()
        y = F.linear(x, weight) + F.linear(routed, B)
        wanted = [need for i, need in enumerate(ctx.needs_input_grad) if i in (0, 3, 4, 5)]
        found = iter(torch.autograd.grad(y, [t for t, need in zip(given, wanted, strict=True) if need],
                                         grad.to(y.dtype), create_graph=True, materialize_grads=True))
        grad_x, grad_A, grad_R, grad_B = (next(found) if need else None for need in wanted)
        return grad_x, None, None, grad_A, grad_R, grad_B, None, None


def _fused_forward(x, weight, bias, A, R, B, router, scaling):
    """y [T, out] and [A; R] x^T [rows of A + num_heads, T], the latter in the dtype of A."""
    y = F.linear(x, weight, bias)
    columns = x.to(A.dtype).t()
    if x.shape[0] > A.shape[0]:
        small = torch.cat((A, R)) @ columns
    else:  # few tokens, as in decoding: reading A and R is the cost, so do not copy them first
        small = torch.cat((A @ columns, R @ columns))
    z, weights = _gates(small, A, R, B, router)
    _accumulate(y, (weights.to(z.dtype) * z).flatten(0, 1).t(), B.t(), scaling)
    return y, small


def _is_shared(A: torch.Tensor, R: torch.Tensor, B: torch.Tensor) -> bool:
    return A.shape[0] * R.shape[0] == B.shape[1]


def _gates(small, A, R, B, router):
    """Parts of [A; R] x^T: A x as [1 or num_heads, r, T], and the routing weights as [num_heads, 1, T]."""
    rows, heads = A.shape[0], R.shape[0]
    weights = router.weigh(small[rows:], dim=0).unsqueeze(1)
    z = small[:rows].view(rows * heads // B.shape[1], B.shape[1] // heads, small.shape[1])
    return z, weights


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1) -> None:
    """total += factor * left @ right in place; of a wider dtype than `total` it is rounded once, after the sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)


def _untouched(module: nn.Module) -> bool:
    """Nobody has hooked or replaced the module's forward, so its weights may be used without calling it.

    ZeRO and FSDP gather sharded weights in such hooks, Accelerate moves offloaded ones, users read activations.
    """
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
                or own["_backward_pre_hooks"] or "forward" in own)


class ILoraLayer(BaseTunerLayer):
    """Holds, for each adapter name, A, the stacked heads B, the router and the dropout.

    Shapes: `ilora_A` weight [r, in], or [num_heads * r, in] when each head has its own; `ilora_B` weight
    [out, num_heads * r], that is [B_1 | ... | B_N] side by side; `ilora_router` weight [num_heads, in] (none for the
    uniform router).

    Attributes:
        fused: let the layer run base and adapter together where that is possible (the default). Set it to False, on
            the class or on one layer, to have every part called as a module, for instance to compare the two.
        routing_observers: adapter name -> functions that are given (module, weights [..., num_heads]) in each forward.
        fixed_routing: adapter name -> weights [num_heads] used in place of the router's.
        instruction: which tokens the routers with router_input='instruction' read, set by
            `crab.ilora.instruction_tokens`.
    """

    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_router")
    other_param_names = ("r", "lora_alpha", "num_heads", "scaling", "shared_A", "router_input", "ilora_dropout")
    fused = True

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.num_heads: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.shared_A: dict[str, bool] = {}
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

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: ILoraConfig) -> None:
        """Add the adapter `adapter_name` to this layer (r and lora_alpha after the patterns were applied)."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.num_heads[adapter_name] = config.num_heads
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.shared_A[adapter_name] = config.shared_A
        self.router_input[adapter_name] = config.router_input
        rows = r if config.shared_A else config.num_heads * r
        self.ilora_A[adapter_name] = nn.Linear(self.in_features, rows, bias=False)
        self.ilora_B[adapter_name] = nn.Linear(config.num_heads * r, self.out_features, bias=False)
        self.ilora_router[adapter_name] = (
            TokenRouter(self.in_features, config.num_heads, config.router_temperature, config.top_k)
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
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.ilora_A]
        if len(names) == 1 and not args and not kwargs:
            weights = self._fusible(names[0], x)
            if weights is not None:
                return self._fused(names[0], x, *weights)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            result = self._add_adapter(name, x, result)
        return result

    def _fusible(self, name: str, x: torch.Tensor) -> tuple | None:
        """The tensors `_FusedLinear` works on and the router, or None where using them directly would miss something.

        Left to autograd and the modules: quantised, sharded, offloaded or trained base layers, hooked parts, dropout
        in training, autocast, torch.func transforms, and tracing or compiling, where the compiler does the fusing.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return None
        if not self.fused or name in self.fixed_routing or self.router_input[name] != "token":
            return None
        own = self._modules  # the plain dictionaries: in decoding these look-ups cost as much as the arithmetic
        base, down, up, router, dropout = own["base_layer"], *(
            own[part]._modules[name] for part in ("ilora_A", "ilora_B", "ilora_router", "ilora_dropout"))
        if not (type(base) is type(down) is type(up) is nn.Linear) or type(router) is not TokenRouter:
            return None
        if dropout.training and type(dropout) is not nn.Identity or torch.is_autocast_enabled(x.device.type):
            return None
        for part in (base, down, up, router, dropout):
            if not _untouched(part):
                return None
        weight, bias, A, R, B = base.weight, base.bias, down.weight, router.weight, up.weight
        for tensor in (weight, A, R, B):
            if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
                return None
        if weight.requires_grad or (bias is not None and bias.requires_grad) or x.dtype != weight.dtype:
            return None
        if not A.dtype == R.dtype == B.dtype:
            return None
        if A.dtype != x.dtype and not getattr(self, "cast_input_dtype_enabled", True):
            return None
        return weight, bias, A, R, B, router

    def _fused(self, name: str, x: torch.Tensor, weight, bias, A, R, B, router: TokenRouter) -> torch.Tensor:
        shape = x.shape[:-1]
        run = _FusedLinear.apply if torch.is_grad_enabled() else _fused_forward
        y, small = run(x.reshape(-1, x.shape[-1]), weight, bias, A, R, B, router, self.scaling[name])
        if self.routing_observers.get(name):
            weights = router.weigh(small[A.shape[0]:].detach(), dim=0).t()
            self._show_routing(name, weights.reshape(*shape, -1))
        return y.view(*shape, y.shape[-1])

    def _add_adapter(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return `result` plus what adapter `name` adds for the input x, in the dtype of `result`.

        sum_i w_i B_i z_i equals [B_1 | ... | B_N] (w_1 z_1, ..., w_N z_N): the weights multiply the small
        [tokens, r] projections (the same z for every head when A is shared), and one matrix product serves all heads.
        """
        B = self.ilora_B[name]
        x = self._cast_input_dtype(x, B.weight.dtype)
        z = self.ilora_A[name](self.ilora_dropout[name](x))
        weights = self._weights(name, x)
        if self.routing_observers.get(name):
            self._show_routing(name, weights.expand(*x.shape[:-1], -1))
        scaled = (weights * self.scaling[name]).to(z.dtype).unsqueeze(-1)
        z = z.unsqueeze(-2) if self.shared_A[name] else z.unflatten(-1, (self.num_heads[name], -1))
        routed = (scaled * z).flatten(-2)  # [..., num_heads * r]
        if routed.dtype == B.weight.dtype == result.dtype and type(B) is nn.Linear and _untouched(B):
            # Accumulates onto the base's output inside the matrix product.
            flat = torch.addmm(result.reshape(-1, self.out_features), routed.reshape(-1, routed.shape[-1]), B.weight.t())
            return flat.view(result.shape)
        return result + B(routed).to(result.dtype)

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

    def _show_routing(self, name: str, weights: torch.Tensor) -> None:
        for observer in self.routing_observers[name]:
            observer(self, weights)

    def __repr__(self) -> str:
        return "ilora." + super().__repr__()
