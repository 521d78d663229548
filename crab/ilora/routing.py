"""Recording of routing weights: those of every token, or means in constant memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from .adapters import adapted_layers
from .layer import ILoraLayer

SEGMENTS = ("text", "video", "audio", "answer")  # the default kinds of token of `record_routing_means`


@contextmanager
def _observed(layers: Mapping[str, ILoraLayer], adapter_name: str, observer: Callable) -> Iterator[None]:
    """Call observer(module name, weights [batch, tokens, heads]) in each forward pass of the layers in the block.

    Gradient checkpointing runs layers again in backward; these passes are skipped. Compiled code runs eagerly in the
    block: an observer breaks its graphs, and each layer would be compiled again until dynamo gives up.
    """
    observers = []
    try:
        for name, layer in layers.items():

            def see(module, weights, name=name):
                if torch._C._current_graph_task_id() == -1:  # not in a backward pass
                    observer(name, weights.detach())

            layer.routing_observers.setdefault(adapter_name, []).append(see)
            observers.append((layer, see))
        # without dynamo nothing is compiled, and its import takes seconds
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for layer, see in observers:
            layer.routing_observers[adapter_name].remove(see)
            if not layer.routing_observers[adapter_name]:  # as before, so that compiled code is valid again
                del layer.routing_observers[adapter_name]


@contextmanager
def record_routing(model: nn.Module, adapter_name: str | None = None) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the routing weights of every adapted module while the block runs. The outputs do not change.

    Yields a dict: name of the module in the base -> one tensor per forward pass, [batch, tokens, heads], float32 or
    float64, detached, on the CPU. Under `generate` the first pass is the prompt and each later one a new token, so
    `torch.cat(passes, 1)` joins them. Compiled code runs eagerly in the block. Memory grows with the tokens; for means
    use `record_routing_means`.

    Args:
        model: a PEFT model, or any module with I-LoRA layers, also inside DDP or torch.compile.
        adapter_name: None takes the active adapter.

    Raises:
        ValueError: no I-LoRA layer, no such adapter, or not exactly one active; in the block: weights are not finite.
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
        raise ValueError(
            f"{caller}: the router of {name!r} gave weights that are not finite. Its input or its weight has NaN or "
            "infinite values; lower the learning rate, or look for the first module that gives NaN."
        )


def routing_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in bits of routing weights: [..., heads] -> [...], from 0 to log2(heads)."""
    return -torch.special.xlogy(weights, weights).sum(-1) / math.log(2)


def routing_information(gates: torch.Tensor, shares: torch.Tensor | None = None) -> float:
    """Mutual information in bits of class and head, I = H(sum_c p_c g_c) - sum_c p_c H(g_c).

    Args:
        gates: [classes, heads], the mean routing weights of each class, P(head | class).
        shares: [classes], P(class) up to a factor. None: equal.

    Returns:
        From 0, if all classes have the same weights, to log2 of the smaller of classes and heads.
    """
    gates = gates.double()
    shares = torch.ones(len(gates), dtype=gates.dtype) if shares is None else shares.double()
    shares = shares / shares.sum()
    return max(0.0, float(routing_entropy(shares @ gates) - shares @ routing_entropy(gates)))


class RoutingMeans:
    """Sums of routing weights per group, module and segment, of `record_routing_means`. Memory does not grow with tokens."""

    def __init__(self, segments: Sequence[str], generated: str | None):
        self.segments = tuple(segments)
        self.generated = None if generated is None else self.segments.index(generated)
        self._group: Hashable = None
        self._kinds: torch.Tensor | None = None
        # group -> module -> [segments + 1, heads + 2]: weights, entropy in bits, tokens; the last row is for padding
        self._sums: dict[Hashable, dict[str, torch.Tensor]] = {}

    def label(self, kinds: torch.Tensor | None, group: Hashable = None) -> None:
        """Say what the next forward passes read. Call it before each batch.

        Args:
            kinds: integers [batch, tokens], the index in `segments` of each token, negative for padding; under beam
                search repeated for each beam. None counts all tokens as the first segment.
            group: for example the slot of the batch.
        """
        if kinds is not None:
            if kinds.dim() != 2 or kinds.is_floating_point():
                given = f"{kinds.dtype} {list(kinds.shape)}"
                raise ValueError(f"RoutingMeans.label: `kinds` must be whole numbers [batch, tokens], got {given}.")
            if kinds.numel() and int(kinds.max()) >= len(self.segments):
                raise ValueError(
                    f"RoutingMeans.label: `kinds` holds {int(kinds.max())}; the segments are {self.segments}."
                )
        self._kinds, self._group = kinds, group

    def _add(self, name: str, weights: torch.Tensor) -> None:
        heads, rows = weights.shape[-1], len(self.segments)
        kinds, shape = self._kinds, weights.shape[:-1]
        if kinds is None:
            kinds = torch.zeros(shape, dtype=torch.long)
        elif kinds.shape != shape:
            if self.generated is None or len(shape) != 2 or shape[1] != 1:
                raise ValueError(
                    f"record_routing_means: {name!r} saw tokens {list(shape)}, but the labels are for {list(kinds.shape)}. "
                    "Call label() before each batch. Under generate, passes after the prompt must read one token: not "
                    "use_cache=False, prompt_lookup_num_tokens or an assistant model."
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
        """One dict per group, module, segment and head with tokens.

        Keys: group, module, segment, head, weight (mean over tokens), entropy (mean over tokens of each token's own, in
        bits, the same for all heads), tokens. Raises ValueError with the name of a router that is not finite.
        """
        rows = []
        for group, modules in self._sums.items():
            for name, sums in modules.items():
                sums = sums[:-1].double().cpu()
                _require_finite(sums, name, "record_routing_means")
                for segment, (*weights, entropy, tokens) in zip(self.segments, sums.tolist(), strict=True):
                    for head, weight in enumerate(weights if tokens else ()):
                        row = {"group": group, "module": name, "segment": segment, "head": head}
                        rows.append(
                            row | {"weight": weight / tokens, "entropy": entropy / tokens, "tokens": int(tokens)}
                        )
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
        for modules in self._sums.values() if group is ... else [self._sums[group]]:
            for name, sums in modules.items():
                part = sums[indices].sum(0).double().cpu()
                _require_finite(part, name, "record_routing_means")
                totals[name] = totals[name] + part if name in totals else part
        return {name: sums[:-2] / sums[-1] for name, sums in totals.items() if sums[-1] > 0}

    def information(self, segments: Sequence[str] | None = None) -> dict[str, float]:
        """Module -> mutual information in bits of group and head, with equal shares of the groups that have tokens."""
        gates: dict[str, list[torch.Tensor]] = {}
        for group in self._sums:
            for name, weights in self.weights(group, segments).items():
                gates.setdefault(name, []).append(weights)
        return {name: routing_information(torch.stack(means)) for name, means in gates.items()}


@contextmanager
def record_routing_means(
    model: nn.Module,
    segments: Sequence[str] = SEGMENTS,
    generated: str | None = "answer",
    adapter_name: str | None = None,
) -> Iterator[RoutingMeans]:
    """Record means of the routing weights and of their entropy while the block runs. The outputs do not change::

        with record_routing_means(model) as means:
            for slot, batch, kinds in data:
                means.label(kinds, group=slot)       # kinds [batch, tokens]: index in `segments`, -1 for padding
                model(**batch)
        means.rows(), means.information(["text"]), to_static(model, means.weights())

    After a longer labelled pass, passes of one token are those of `generate`, and count as `generated`.

    Args:
        segments: names of the kinds of token, in the order of the labels.
        generated: the segment of tokens that `generate` adds, or None to refuse them.
        model, adapter_name: as in `record_routing`, with its errors.
    """
    if isinstance(segments, str) or not segments or len(set(segments)) < len(segments):
        raise ValueError(f"record_routing_means: `segments` must be a list of different names, got {segments!r}.")
    if generated is not None and generated not in segments:
        raise ValueError(
            f"record_routing_means: `generated` must be one of {tuple(segments)} or None, got {generated!r}."
        )
    adapter_name, layers = adapted_layers(model, adapter_name, "record_routing_means")
    means = RoutingMeans(segments, generated)
    with _observed(layers, adapter_name, means._add):
        yield means
