"""Recording which heads the routers chose, telling them what to read, fixing them, and exporting them fixed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .layer import ILoraLayer
from .model import WRAPPER

SEGMENTS = ("text", "video", "audio", "answer")
Weights = Sequence[float] | torch.Tensor


def _adapted_layers(model: nn.Module, adapter_name: str | None, caller: str) -> tuple[str, dict[str, ILoraLayer]]:
    """The adapter meant, and its layers by module name in the base model; ValueErrors as `record_routing` says."""
    layers = {name.removeprefix(WRAPPER): module for name, module in model.named_modules()
              if isinstance(module, ILoraLayer)}
    if not layers:
        raise ValueError(f"{caller}: the model has no I-LoRA layers.")
    if adapter_name is None:
        active = {name for layer in layers.values() for name in layer.active_adapters}
        if len(active) != 1:
            raise ValueError(f"{caller}: give `adapter_name`; the active adapters are {sorted(active)}.")
        (adapter_name,) = active
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.ilora_A}
    if not layers:
        raise ValueError(f"{caller}: no layer has an adapter called {adapter_name!r}.")
    return adapter_name, layers


@contextmanager
def _observed(layers: Mapping[str, ILoraLayer], adapter_name: str, observer: Callable) -> Iterator[None]:
    """Call observer(module name, weights [batch, tokens, heads]) for each layer's forward passes in the block.

    The second forward that gradient checkpointing makes during backward is left out.
    """
    added = []
    try:
        for name, layer in layers.items():
            def see(module, weights, name=name):
                if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
                    observer(name, weights.detach())

            layer.routing_observers.setdefault(adapter_name, []).append(see)
            added.append((layer, see))
        yield
    finally:
        for layer, see in added:
            layer.routing_observers[adapter_name].remove(see)


@contextmanager
def record_routing(model: nn.Module, adapter_name: str | None = None) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the routing weights of every adapted module while the block runs.

    Yields a dict: module name as in the base model -> one tensor a forward pass, [batch, tokens, heads], float32 (or
    float64), detached, on the CPU. Under `generate` the first pass covers the prompt and each later one a new token;
    `join_steps` puts them together. A module that did not run has an empty list. A model that is not being recorded
    pays nothing, and the outputs are the same either way. The second forward that gradient checkpointing makes during
    backward is not recorded. Memory grows with the tokens seen; for means alone use `record_routing_means`.

    Args:
        model: a PEFT model, or any module holding I-LoRA layers.
        adapter_name: which adapter's router to record; may be left out while one adapter is active.

    Raises:
        ValueError: no I-LoRA layer in the model, or no (or no single) adapter to record; or, inside the block, a
            router whose weights are not finite.
    """
    adapter_name, layers = _adapted_layers(model, adapter_name, "record_routing")
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
                out (padding). None counts every token as the first segment.
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
                                 f"{list(kinds.shape)}. Call label() before each batch.")
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
        places = [self.segments.index(s) for s in (self.segments if segments is None else segments)]
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
                means.label(kinds, group=slot)       # kinds [batch, tokens]: places in SEGMENTS, -1 for padding
                model(**batch)
        means.rows(), means.information(["text"]), to_static(model, means.weights())

    Passes of one token after a longer labelled one are those of `generate`, and count as `generated`. The outputs are
    the same as without the block.

    Args:
        segments: names of the kinds of token.
        generated: the segment of tokens that `generate` adds, or None to refuse them.
        model, adapter_name: as for `record_routing`, with its errors.
    """
    if generated is not None and generated not in segments:
        raise ValueError(f"record_routing_means: `generated` must be one of {tuple(segments)} or None, got {generated!r}.")
    adapter_name, layers = _adapted_layers(model, adapter_name, "record_routing_means")
    means = RoutingMeans(segments, generated)
    with _observed(layers, adapter_name, means._add):
        yield means


# ---- what the routers read

class _Instruction:
    """Which tokens are the instruction, and the weights each layer drew from them, for the passes of `generate`."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    def weights(self, layer: ILoraLayer, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Routing weights [batch, 1, heads] for the layer's input x [batch, tokens, in]."""
        key = (id(layer), adapter_name)
        if x.dim() == 3 and x.shape[:2] == self.mask.shape:
            mask = self.mask.to(x.device, x.dtype).unsqueeze(-1)
            weights = layer.ilora_router[adapter_name]((x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))
            if not torch.is_grad_enabled():
                self._kept[key] = weights
            return weights
        if x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and key in self._kept:
            if self._kept[key].shape[0] == x.shape[0]:
                return self._kept[key]
        raise ValueError(f"instruction_tokens: a layer was given an input {list(x.shape)}, but the mask is for [batch, "
                         f"tokens] = {list(self.mask.shape)}. Give the mask of this very batch (repeated for each beam), "
                         "and target only modules that see the whole sequence, not the encoders.")


@contextmanager
def instruction_tokens(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Tell routers with router_input='instruction' which tokens of the batch to read while the block runs.

    Under `generate` the weights found for the prompt serve the new tokens too. Under gradient checkpointing run the
    backward pass inside the block as well, since it computes the layers again. Routers that read each token are not
    affected.

    Args:
        model: a PEFT model, or any module holding I-LoRA layers.
        mask: bool [batch, tokens], True on the instruction; at least one token a sample, at least two columns.

    Raises:
        ValueError: the mask is not so, or (inside the block) does not fit the batch.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] < 2:
        raise ValueError("instruction_tokens: `mask` must be bool [batch, tokens] with at least two tokens, got "
                         f"{mask.dtype} {list(mask.shape)}.")
    if not mask.any(1).all():
        raise ValueError("instruction_tokens: each sample needs at least one instruction token; samples "
                         f"{(~mask.any(1)).nonzero().flatten().tolist()} have none.")
    layers = [module for module in model.modules() if isinstance(module, ILoraLayer)]
    before = [layer.instruction for layer in layers]
    instruction = _Instruction(mask)
    try:
        for layer in layers:
            layer.instruction = instruction
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.instruction = value


# ---- frozen weights

def _per_module(task_weights: Mapping[str, Weights] | Weights, layers: Mapping[str, ILoraLayer], adapter_name: str,
                caller: str) -> dict[str, torch.Tensor]:
    """Checked weights, module name -> float64 [heads]."""
    if isinstance(task_weights, Mapping):
        lacking, spare = sorted(set(layers) - set(task_weights)), sorted(set(task_weights) - set(layers))
        if lacking or spare:
            raise ValueError(f"{caller}: `task_weights` must name the adapted modules one to one; missing "
                             f"{lacking[:3]}, spare {spare[:3]}.")
    found = {}
    for name, layer in layers.items():
        given = task_weights[name] if isinstance(task_weights, Mapping) else task_weights
        weights = torch.as_tensor(given).detach().double().cpu()
        heads = layer.num_heads[adapter_name]
        if weights.shape != (heads,) or not torch.isfinite(weights).all():
            raise ValueError(f"{caller}: the weights of {name!r} must be {heads} finite numbers, one a head, got "
                             f"{weights.tolist()}.")
        found[name] = weights
    return found


@contextmanager
def fixed_routing(model: nn.Module, task_weights: Mapping[str, Weights] | Weights,
                  adapter_name: str | None = None) -> Iterator[None]:
    """Weigh the heads by `task_weights` in place of the routers while the block runs: what `to_static` would compute.

    Args:
        task_weights: [heads] for all modules, or module name -> [heads].
        model, adapter_name: as for `record_routing`, with its errors.
    """
    adapter_name, layers = _adapted_layers(model, adapter_name, "fixed_routing")
    weights = _per_module(task_weights, layers, adapter_name, "fixed_routing")
    before = {name: layer.fixed_routing.get(adapter_name) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            base = layer.ilora_A[adapter_name].weight
            layer.fixed_routing[adapter_name] = weights[name].to(
                base.device, torch.promote_types(base.dtype, torch.float32))
        yield
    finally:
        for name, layer in layers.items():
            del layer.fixed_routing[adapter_name]
            if before[name] is not None:
                layer.fixed_routing[adapter_name] = before[name]


class StaticLora(NamedTuple):
    """A plain LoRA made by `to_static`.

    Attributes:
        config: its LoraConfig.
        state_dict: its tensors by the names PEFT saves them under.
        error: ||y_fixed - y_routed|| / ||y_routed - y_base|| of the outputs given by `run`, that is the change as a
            share of what the adapter does at all; None without `run`.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    error: float | None


def to_static(model: nn.Module, task_weights: Mapping[str, Weights] | Weights, path: str | Path | None = None,
              run: Callable[[], torch.Tensor] | None = None, fold: bool = False,
              adapter_name: str | None = None) -> StaticLora:
    """Export the adapter as a plain LoRA whose heads are weighed the same for every token.

    B = scaling * [w_1 B_1 | ... | w_N B_N] and A = [A; ...; A] (or [A_1; ...; A_N]), of rank num_heads * r, with
    LoRA's own scaling at 1. The result can be merged and served by anything that reads LoRA, but no longer routes:
    it equals the adapter only where the router gives these very weights.

    Args:
        model: a PEFT model with an I-LoRA adapter. It is not changed.
        task_weights: [heads] for all modules, or module name -> [heads], such as `RoutingMeans.weights(group)`.
        path: folder to write adapter_config.json and adapter_model.safetensors to, for `PeftModel.from_pretrained`.
        run: gives the model's output on data to measure the error on, such as `lambda: model(**batch).logits`; it is
            called three times, without gradient, and should be called with the model in eval mode.
        fold: with a shared A, sum the weighed heads into one LoRA of rank r, the same function at a num_heads-th of
            its size.
        adapter_name: may be left out while one adapter is active.

    Raises:
        ValueError: weights that do not fit the modules, `fold` without a shared A, dropout left on while measuring, or
            an adapter whose effect on `run`'s output is nothing, so that no share of it can be given.
    """
    adapter_name, layers = _adapted_layers(model, adapter_name, "to_static")
    weights = _per_module(task_weights, layers, adapter_name, "to_static")
    state, ranks = {}, {}
    for name, layer in layers.items():
        r, heads, shared = layer.r[adapter_name], layer.num_heads[adapter_name], layer.shared_A[adapter_name]
        if fold and not shared:
            raise ValueError(f"to_static: `fold` needs one shared A, but the heads of {name!r} have their own.")
        A, B = layer.ilora_A[adapter_name].weight.detach(), layer.ilora_B[adapter_name].weight.detach()
        up = B.double().unflatten(1, (heads, r)) * (layer.scaling[adapter_name] * weights[name].to(B.device)).unsqueeze(-1)
        up = (up.sum(1) if fold else up.flatten(1)).to(B.dtype)
        ranks[name] = up.shape[1]
        down = A if fold or not shared else A.repeat(heads, 1)
        state[f"{WRAPPER}{name}.lora_A.weight"] = down.clone().cpu().contiguous()
        state[f"{WRAPPER}{name}.lora_B.weight"] = up.cpu().contiguous()
    ours = model.peft_config[adapter_name]
    if ours.modules_to_save:
        kept = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        state |= {key: value.cpu().contiguous() for key, value in kept.items() if ".ilora_" not in key}
    usual = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    other = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    # The modules as an expression: a list matches name endings, and PEFT writes lists in no fixed order.
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=other, alpha_pattern=dict(other), lora_dropout=0.0, bias="none",
        target_modules="|".join(map(re.escape, layers)), modules_to_save=ours.modules_to_save,
        task_type=ours.task_type, base_model_name_or_path=ours.base_model_name_or_path, inference_mode=True)
    error = None if run is None else _static_error(model, weights, run, adapter_name)
    if path is not None:
        config.save_pretrained(str(path))
        save_file(state, Path(path) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return StaticLora(config, state, error)


@torch.no_grad()
def _static_error(model: nn.Module, weights: Mapping[str, torch.Tensor], run: Callable[[], torch.Tensor],
                  adapter_name: str) -> float:
    if model.training:
        raise ValueError("to_static: call model.eval() first; dropout would count as error.")
    routed = run().double()
    with fixed_routing(model, weights, adapter_name):
        fixed = run().double()
    with model.disable_adapter():
        base = run().double()
    effect = float((routed - base).norm())
    if not effect > 0:
        raise ValueError("to_static: the adapter does not change the output of `run` at all (is it untrained, or not "
                         "active?), so its error is no share of anything.")
    return float((fixed - routed).norm()) / effect
