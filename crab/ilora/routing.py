"""Recording which heads the routers chose: every token's weights, or means in constant memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from .adapters import adapted_layers
from .layer import ILoraLayer

SEGMENTS = ("text", "video", "audio", "answer")  # what `record_routing_means` tells apart unless given other kinds of token


@contextmanager
def _observed(layers: Mapping[str, ILoraLayer], adapter_name: str, observer: Callable) -> Iterator[None]:
    """Call observer(module name, weights [batch, tokens, heads]) for each layer's forward passes in the block.

    The second forward that gradient checkpointing makes during backward is left out. Compiled code runs eagerly
    meanwhile: an observer breaks its graphs, and each layer would be compiled anew until dynamo gives up.
    """
    added = []
    try:
        for name, layer in layers.items():
            def see(module, weights, name=name):
                if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
                    observer(name, weights.detach())

            layer.routing_observers.setdefault(adapter_name, []).append(see)
            added.append((layer, see))
        # nothing is compiled where dynamo was never imported, which takes seconds
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for layer, see in added:
            layer.routing_observers[adapter_name].remove(see)
            if not layer.routing_observers[adapter_name]:  # as before, so that what was compiled before fits again
                del layer.routing_observers[adapter_name]


@contextmanager
def record_routing(model: nn.Module, adapter_name: str | None = None) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the routing weights of every adapted module while the block runs.

    Yields a dict: module name as in the base model -> one tensor a forward pass, [batch, tokens, heads], float32 (or
    float64), detached, on the CPU. Under `generate` the first pass covers the prompt and each later one a new token;
    `join_steps` puts them together. A module that did not run has an empty list. A model that is not being recorded
    pays nothing, and the outputs are the same either way. The second forward that gradient checkpointing makes during
    backward is not recorded. Whatever torch.compile has compiled runs eagerly in the block, and as compiled again after
    it. Memory grows with the tokens seen; for means alone use `record_routing_means`.

    Args:
        model: a PEFT model, or any module holding I-LoRA layers; also inside DDP or torch.compile, whose own prefixes
            the names do not have.
        adapter_name: which adapter's router to record; may be left out while one adapter is active.

    Raises:
        ValueError: no I-LoRA layer in the model, or no (or no single) adapter to record; or, inside the block, a
            router whose weights are not finite.
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
        raise ValueError(f"{caller}: the router of {name!r} gave weights that are not finite. Its input or its own "
                         "weights hold NaN or infinite values; lower the learning rate or look for the first module "
                         "that gives NaN.")


def join_steps(steps: list[torch.Tensor]) -> torch.Tensor:
    """Join the passes of one `generate` call: tensors [batch, tokens_i, heads] -> [batch, sum of tokens_i, heads].

    Raises:
        ValueError: nothing was recorded, or the passes have different batches (more than one call was recorded).
    """
    if not steps or any(step.shape[0] != steps[0].shape[0] for step in steps):
        raise ValueError("join_steps: the passes must be those of one generate call, all of one batch size; "
                         f"got shapes {[tuple(step.shape) for step in steps]}.")
    return torch.cat(steps, dim=-2)


# ---- means in constant memory

def routing_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in bits over the last axis of routing weights [..., heads] -> [...]; 0 to log2(heads)."""
    return -torch.special.xlogy(weights, weights).sum(-1) / math.log(2)


def routing_information(gates: torch.Tensor, shares: torch.Tensor | None = None) -> float:
    """Mutual information in bits between a class and the head chosen, I = H(sum_c p_c g_c) - sum_c p_c H(g_c).

    Args:
        gates: [classes, heads], the mean routing weights of each class, taken as P(head | class).
        shares: [classes], P(class) up to a factor; equal when left out.

    Returns:
        0 when all classes are routed alike, at most log2 of the smaller of classes and heads.
    """
    gates = gates.double()
    shares = torch.ones(len(gates), dtype=gates.dtype) if shares is None else shares.double()
    shares = shares / shares.sum()
    return max(0.0, float(routing_entropy(shares @ gates) - shares @ routing_entropy(gates)))


class RoutingMeans:
    """Sums of routing weights by group, module and segment; made by `record_routing_means`.

    Its memory grows with groups x modules x segments and not with the tokens seen.
    """

    def __init__(self, segments: Sequence[str], generated: str | None):
        self.segments = tuple(segments)
        self.generated = None if generated is None else self.segments.index(generated)
        self._group: Hashable = None
        self._kinds: torch.Tensor | None = None
        # group -> module -> [segments + 1, heads + 2]: weights, entropies in bits, tokens; the last row is padding's
        self._sums: dict[Hashable, dict[str, torch.Tensor]] = {}

    def label(self, kinds: torch.Tensor | None, group: Hashable = None) -> None:
        """Say what the next forward passes read; call it before each batch.

        Args:
            kinds: [batch, tokens] whole numbers, the place in `segments` of each token, negative for tokens to leave
                out (padding); under beam search repeated for each beam. None counts every token as the first segment.
            group: what the batch is a case of, such as its slot.
        """
        if kinds is not None:
            if kinds.dim() != 2 or kinds.is_floating_point():
                raise ValueError("RoutingMeans.label: `kinds` must be whole numbers [batch, tokens], "
                                 f"got {kinds.dtype} {list(kinds.shape)}.")
            if kinds.numel() and int(kinds.max()) >= len(self.segments):
                raise ValueError(f"RoutingMeans.label: `kinds` holds {int(kinds.max())}, there are {len(self.segments)} "
                                 f"segments: {self.segments}.")
        self._kinds, self._group = kinds, group

    def _add(self, name: str, weights: torch.Tensor) -> None:
        heads, rows = weights.shape[-1], len(self.segments)
        kinds, seen = self._kinds, weights.shape[:-1]
        if kinds is None:
            kinds = torch.zeros(seen, dtype=torch.long)
        elif kinds.shape != seen:
            if self.generated is None or len(seen) != 2 or seen[1] != 1:
                raise ValueError(f"record_routing_means: {name!r} saw tokens {list(seen)}, but the labels given are for "
                                 f"{list(kinds.shape)}. Call label() before each batch; under generate the passes after the "
                                 "prompt's count as `generated` only if they read one token each, which they do not with "
                                 "use_cache=False, prompt_lookup_num_tokens or an assistant model.")
            kinds = torch.full(seen, self.generated)
        kinds = kinds.to(weights.device).reshape(-1).long()
        weights = weights.reshape(-1, heads)
        values = torch.cat((weights, routing_entropy(weights).unsqueeze(-1), torch.ones_like(weights[:, :1])), dim=1)
        wide = torch.float32 if weights.device.type == "mps" else torch.float64
        sums = self._sums.setdefault(self._group, {})
        if name not in sums:
            sums[name] = torch.zeros(rows + 1, heads + 2, dtype=wide, device=weights.device)
        sums[name].index_add_(0, torch.where(kinds < 0, rows, kinds), values.to(wide))

    def rows(self) -> list[dict]:
        """One dict a (group, module, segment, head) with tokens in it.

        Keys: group, module, segment, head, weight (mean over tokens), entropy (mean of each token's own, in bits, the
        same for every head), tokens.

        Raises:
            ValueError: a router whose weights were not finite, by name.
        """
        found = []
        for group, modules in self._sums.items():
            for name, sums in modules.items():
                sums = sums[:-1].double().cpu()
                _require_finite(sums, name, "record_routing_means")
                for segment, row in zip(self.segments, sums, strict=True):
                    tokens = int(row[-1])
                    for head in range(len(row) - 2) if tokens else ():
                        found.append({"group": group, "module": name, "segment": segment, "head": head,
                                      "weight": float(row[head]) / tokens, "entropy": float(row[-2]) / tokens,
                                      "tokens": tokens})
        return found

    def weights(self, group: Hashable = ..., segments: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Module name -> mean weights [heads] in float64, over all tokens, or those of one group or some segments.

        A module that saw no such token is left out. What `to_static` takes.
        """
        return {name: sums[:-2] / sums[-1] for name, sums in self._summed(group, segments).items() if sums[-1] > 0}

    def information(self, segments: Sequence[str] | None = None) -> dict[str, float]:
        """Module name -> mutual information in bits between group and head, groups equally frequent.

        A group without tokens of these segments in a module is left out of that module's figure.
        """
        gates: dict[str, list[torch.Tensor]] = {}
        for group in self._sums:
            for name, weights in self.weights(group, segments).items():
                gates.setdefault(name, []).append(weights)
        return {name: routing_information(torch.stack(means)) for name, means in gates.items()}

    def _summed(self, group: Hashable, segments: Sequence[str] | None) -> dict[str, torch.Tensor]:
        chosen = self.segments if segments is None else segments
        if spare := [s for s in chosen if s not in self.segments]:
            raise ValueError(f"RoutingMeans: {spare} are no segments of this recording, which has {self.segments}.")
        places = [self.segments.index(s) for s in chosen]
        if group is not ... and group not in self._sums:
            raise ValueError(f"RoutingMeans: nothing was recorded for group {group!r}, only for {list(self._sums)}.")
        totals: dict[str, torch.Tensor] = {}
        for modules in self._sums.values() if group is ... else [self._sums[group]]:
            for name, sums in modules.items():
                part = sums[places].sum(0).double().cpu()
                _require_finite(part, name, "record_routing_means")
                totals[name] = totals[name] + part if name in totals else part
        return totals


@contextmanager
def record_routing_means(model: nn.Module, segments: Sequence[str] = SEGMENTS, generated: str | None = "answer",
                         adapter_name: str | None = None) -> Iterator[RoutingMeans]:
    """Keep means of the routing weights and their entropy while the block runs, in memory that does not grow with it.

    ::

        with record_routing_means(model) as means:
            for slot, batch, kinds in data:
                means.label(kinds, group=slot)       # kinds [batch, tokens]: places in `segments`, -1 for padding
                model(**batch)
        means.rows(), means.information(["text"]), to_static(model, means.weights())

    Passes of one token after a longer labelled one are those of `generate`, and count as `generated`. Labelled passes of
    other lengths raise, as generation without a cache, with prompt look-up or with an assistant model makes them. The
    outputs are the same as without the block.

    Args:
        segments: names of the kinds of token, whichever the caller tells apart, in the order its labels count them.
        generated: the segment of tokens that `generate` adds, or None to refuse them.
        model, adapter_name: as for `record_routing`, with its errors.

    Raises:
        ValueError: no segment, one named twice, or `generated` not among them; and as `record_routing`.
    """
    if isinstance(segments, str) or not segments or len(set(segments)) < len(segments):
        raise ValueError(f"record_routing_means: `segments` must be a list of different names, got {segments!r}.")
    if generated is not None and generated not in segments:
        raise ValueError(f"record_routing_means: `generated` must be one of {tuple(segments)} or None, got {generated!r}.")
    adapter_name, layers = adapted_layers(model, adapter_name, "record_routing_means")
    means = RoutingMeans(segments, generated)
    with _observed(layers, adapter_name, means._add):
        yield means
