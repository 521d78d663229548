"""Routing from outside: to record it, and to tell routers which tokens are the instruction."""

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from .adapters import adapted_layers, ilora_layers, replaced
from .layer import ILoraLayer

SEGMENTS = ("text", "video", "audio", "answer")  # the default kinds of token of `record_routing_means`
ONE_TOKEN = "generate must read one new token per pass: not use_cache=False, prompt_lookup_num_tokens or an assistant."


@contextmanager
def _observed(layers: Mapping[str, ILoraLayer], adapter_name: str, observer: Callable) -> Iterator[None]:
    """Call observer(module name, weights [batch, tokens, heads]) in each forward pass of the layers in the block.

    Passes that gradient checkpointing repeats in backward are skipped. Compiled code runs eagerly in the block: an
    observer breaks its graphs, and each layer would be compiled again until dynamo gives up.
    """

    def see(name: str, module: ILoraLayer, weights: torch.Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            observer(name, weights.detach())

    observers = {}
    for name, layer in layers.items():
        own = [*layer.routing_observers.get(adapter_name, ()), partial(see, name)]
        observers[layer] = layer.routing_observers | {adapter_name: own}
    # without dynamo nothing is compiled, and its import takes seconds
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager, replaced("routing_observers", observers):
        yield


@contextmanager
def record_routing(model: nn.Module, adapter_name: str | None = None) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the routing weights of every adapted module while the block runs. The outputs do not change.

    Yields a dict: name of the module in the base -> one tensor per forward pass, [batch, tokens, heads], float32 or
    wider, on the CPU. Under `generate` the first pass is the prompt and each later one a new token, so
    `torch.cat(passes, 1)` joins them. Compiled code runs eagerly in the block.

    `model` may be any module with I-LoRA layers, also inside DDP or torch.compile. An `adapter_name` of None takes the
    active adapter. Raises ValueError if there is not exactly one, or if weights are not finite.
    """
    adapter_name, layers = adapted_layers(model, adapter_name, "record_routing")
    routing: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str, weights: torch.Tensor) -> None:
        weights = weights.cpu()
        _require_finite(weights, name, "record_routing")
        routing[name].append(weights)

    with _observed(layers, adapter_name, keep):
        yield routing


def _require_finite(values: torch.Tensor, name: str, caller: str) -> None:
    if not torch.isfinite(values).all():
        fix = "lower the learning rate, or look for the first module that gives NaN"
        raise ValueError(f"{caller}: the routing weights of {name!r} are not finite; {fix}.")


def routing_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in bits of routing weights: [..., heads] -> [...], from 0 to log2(heads)."""
    return -torch.special.xlogy(weights, weights).sum(-1) / math.log(2)


def routing_information(gates: torch.Tensor, shares: torch.Tensor | None = None) -> float:
    """Mutual information in bits of class and head, I = H(sum_c p_c g_c) - sum_c p_c H(g_c).

    `gates` [classes, heads] are the mean routing weights of each class, P(head | class). `shares` [classes] are
    P(class) up to a factor, equal by default. 0 means that all classes have the same weights.
    """
    gates = gates.double()
    shares = torch.ones(len(gates), dtype=gates.dtype) if shares is None else shares.double()
    shares = shares / shares.sum()
    return max(0.0, float(routing_entropy(shares @ gates) - shares @ routing_entropy(gates)))


class RoutingMeans:
    """Sums of routing weights per group, module and segment. `record_routing_means` makes it."""

    def __init__(self, segments: Sequence[str], generated: str | None):
        self.segments = tuple(segments)
        self.generated = None if generated is None else self.segments.index(generated)
        self._group: Hashable = None
        self._kinds: torch.Tensor | None = None
        # group -> module -> [segments + 1, heads + 2]: weights, entropy in bits, tokens; the last row is for padding
        self._sums: dict[Hashable, dict[str, torch.Tensor]] = {}

    def label(self, kinds: torch.Tensor | None, group: Hashable = None) -> None:
        """Say what the next forward passes read. Call it before each batch.

        `kinds` [batch, tokens] is the index in `segments` of each token, negative for padding, repeated for each beam.
        None counts all tokens as the first segment. `group` is for example the slot of the batch.
        """
        if kinds is not None:
            if kinds.dim() != 2 or kinds.is_floating_point():
                kind = f"{kinds.dtype} {list(kinds.shape)}"
                raise ValueError(f"RoutingMeans.label: `kinds` must be whole numbers [batch, tokens], got {kind}.")
            if kinds.numel() and int(kinds.max()) >= len(self.segments):
                raise ValueError(f"RoutingMeans.label: `kinds` holds {kinds.max()}; the segments are {self.segments}.")
        self._kinds, self._group = kinds, group

    def _add(self, name: str, weights: torch.Tensor) -> None:
        heads, rows = weights.shape[-1], len(self.segments)
        kinds, shape = self._kinds, weights.shape[:-1]
        if kinds is None:
            kinds = torch.zeros(shape, dtype=torch.long)
        elif kinds.shape != shape:
            if self.generated is None or len(shape) != 2 or shape[1] != 1:
                raise ValueError(
                    f"record_routing_means: {name!r} saw tokens {list(shape)}, but the labels are {list(kinds.shape)}. "
                    f"Call label() before each batch. {ONE_TOKEN}"
                )
            kinds = torch.full(shape, self.generated)
        kinds = kinds.to(weights.device).reshape(-1).long()
        weights = weights.reshape(-1, heads)
        values = torch.cat((weights, routing_entropy(weights).unsqueeze(-1), torch.ones_like(weights[:, :1])), dim=1)
        wide = torch.float32 if weights.device.type == "mps" else torch.float64
        sums = self._sums.setdefault(self._group, {})
        if name not in sums:
            sums[name] = torch.zeros(rows + 1, heads + 2, dtype=wide, device=weights.device)
        sums[name].index_add_(0, torch.where(kinds < 0, rows, kinds), values.to(wide))

    def rows(self) -> list[dict]:
        """One dict per group, module, segment and head with tokens, under these names.

        And weight (mean over tokens), entropy (mean over tokens of each token's own, in bits), tokens (their number).
        """
        rows = []
        for group, name, sums in self._finite_sums():
            for segment, (*weights, entropy, tokens) in zip(self.segments, sums.tolist(), strict=True):
                for head, weight in enumerate(weights if tokens else ()):
                    place = {"group": group, "module": name, "segment": segment, "head": head}
                    means = {"weight": weight / tokens, "entropy": entropy / tokens, "tokens": int(tokens)}
                    rows.append(place | means)
        return rows

    def weights(self, group: Hashable = ..., segments: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Module -> mean weights [heads] in float64, of all tokens or of one group or some segments, for `to_static`.

        A module without such tokens is left out.
        """
        chosen = self.segments if segments is None else segments
        if unknown := [segment for segment in chosen if segment not in self.segments]:
            raise ValueError(f"RoutingMeans: {unknown} are no segments of this recording; it has {self.segments}.")
        if group is not ... and group not in self._sums:
            raise ValueError(f"RoutingMeans: nothing was recorded for group {group!r}, only for {list(self._sums)}.")
        indices = [self.segments.index(segment) for segment in chosen]
        totals: dict[str, torch.Tensor] = {}
        for one, name, sums in self._finite_sums():
            if group is ... or one == group:
                part = sums[indices].sum(0)
                totals[name] = totals[name] + part if name in totals else part
        return {name: sums[:-2] / sums[-1] for name, sums in totals.items() if sums[-1] > 0}

    def _finite_sums(self) -> Iterator[tuple[Hashable, str, torch.Tensor]]:
        for group, modules in self._sums.items():
            for name, sums in modules.items():
                sums = sums[:-1].double().cpu()
                _require_finite(sums, name, "record_routing_means")
                yield group, name, sums


@contextmanager
def record_routing_means(
    model: nn.Module, segments=SEGMENTS, generated: str | None = "answer", adapter_name: str | None = None
) -> Iterator[RoutingMeans]:
    """Record means of the routing weights and of their entropy while the block runs, in constant memory::

        with record_routing_means(model) as means:
            for slot, batch, kinds in data:
                means.label(kinds, group=slot)       # kinds [batch, tokens]: index in `segments`, -1 for padding
                model(**batch)
        means.rows(), to_static(model, means.weights())

    `segments` are names of the kinds of token. After a longer labelled pass, passes of one token are those of
    `generate` and count as the segment `generated`; None refuses them. The rest is as in `record_routing`.
    """
    if isinstance(segments, str) or not segments or len(set(segments)) < len(segments):
        raise ValueError(f"record_routing_means: `segments` must be a list of different names, got {segments!r}.")
    if generated is not None and generated not in segments:
        raise ValueError(f"record_routing_means: `generated` must be None or one of {segments}, got {generated!r}.")
    adapter_name, layers = adapted_layers(model, adapter_name, "record_routing_means")
    means = RoutingMeans(segments, generated)
    with _observed(layers, adapter_name, means._add):
        yield means


class _Instruction:
    """The mask, and the weights of each layer, which later passes of `generate` use again."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask
        self._prompt: dict[tuple[int, str], torch.Tensor] = {}

    def weights(self, layer: ILoraLayer, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Routing weights [batch, 1, heads] for the input x [batch, tokens, in] of the layer."""
        key = (id(layer), adapter_name)
        if x.dim() == 3 and x.shape[:2] == self.mask.shape:
            # a sum over a long instruction overflows float16, and bfloat16 cannot hold its length
            wide = torch.promote_types(x.dtype, torch.float32)
            mask = self.mask.to(x.device, wide).unsqueeze(-1)
            mean = (x.to(wide) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            weights = layer.ilora_router[adapter_name](mean.to(x.dtype))
            if not torch.is_grad_enabled():
                self._prompt[key] = weights
            return weights
        if x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and key in self._prompt:
            if self._prompt[key].shape[0] == x.shape[0]:
                return self._prompt[key]
        raise ValueError(
            f"instruction_tokens: a layer reads {list(x.shape)}, but `mask` is {list(self.mask.shape)}. Give the mask "
            f"of this batch (repeated for each beam), and do not adapt the encoders. {ONE_TOKEN}"
        )


@contextmanager
def instruction_tokens(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Tell routers with router_input='instruction' which tokens to read, while the block runs.

    `mask` is bool [batch, tokens], True on the instruction; ValueError if it is not, or does not fit the batch. Under
    `generate` the weights of the prompt serve the new tokens too. With gradient checkpointing, run the backward pass in
    the block too, since it computes the layers again.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] < 2:
        kind = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"instruction_tokens: `mask` must be bool [batch, tokens], at least two tokens, got {kind}.")
    if not mask.any(1).all():
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"instruction_tokens: `mask` has no token of the samples {empty}; mark at least one of each.")
    with replaced("instruction", dict.fromkeys(ilora_layers(model).values(), _Instruction(mask))):
        yield
