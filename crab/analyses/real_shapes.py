"""A training step at the real shapes of a base, with random weights: time, memory, and how far the plan is off."""

import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from crab.models.batches import answer_loss
from crab.models.protocol import IGNORE, model_of
from crab.study.footprint import CONTEXT, GIB, Base, flops, memory
from crab.study.train import adapted

WARM = 2  # steps before time is taken


def training_steps(
    base: Base, methods: Mapping[str, tuple[str, Mapping[str, Any]]], samples: int, tokens: int, answer: int,
    steps: int, checkpointing: bool = True, tflops: float | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Train each method for some steps on random tokens, one after the other, with the weights of a base at random.

    Args:
        base: `crab.study.footprint.read_base`. Its weights are in bfloat16 on a GPU, in float32 elsewhere.
        methods: by name, ``lora`` or ``ilora``, and options of its PEFT config.
        samples, tokens, answer: samples per step, tokens of each, and of its answer.
        tflops: what the device can do in bfloat16, dense, for the MFU.

    Returns:
        One row per method and step: ``seconds``, ``mfu`` (without what checkpointing computes again), and on a GPU
        ``gib`` (the most that was allocated) and ``planned_gib``.
    """
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    rows = []
    for name, (method, options) in methods.items():
        model = _random(base, device, dtype, method, options, checkpointing)
        batch = _batch(model, samples, tokens, answer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=gpu)
        adapter = base.adapter(method, options)
        work = samples * flops(base, adapter, tokens, answer, checkpointing=False)
        precision = "bf16" if gpu else "fp32"
        planned = memory(base, adapter, samples, tokens, answer, precision=precision, checkpointing=checkpointing)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for number in range(WARM + steps):
            began = _now(gpu)
            with torch.autocast(device, torch.bfloat16, enabled=gpu):
                loss, _ = answer_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds = _now(gpu) - began
            if number >= WARM:
                rows.append({
                    "method": name,
                    "seconds": seconds,
                    "mfu": work / seconds / (tflops * 1e12) if tflops else None,
                    "gib": torch.cuda.max_memory_allocated() / GIB if gpu else None,
                    "planned_gib": (sum(planned.values()) - CONTEXT) / GIB if gpu else None,
                })  # fmt: skip
        del model, batch, trained, optimizer, loss
        if gpu:
            torch.cuda.empty_cache()
    return pd.DataFrame(rows)


def _random(base: Base, device: str, dtype: torch.dtype, method: str, options: Mapping[str, Any], checkpointing: bool):
    """The base with random weights and a new adapter, ready to train."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_of(base.config).build(base.config)
    finally:
        torch.set_default_dtype(before)
    model = adapted(model.requires_grad_(False).to(dtype), method, options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _batch(model, samples: int, tokens: int, answer: int) -> dict[str, torch.Tensor]:
    """Random embeddings, of which the last ``answer`` tokens are learned; the first sample is padded by one token."""
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((samples, tokens), IGNORE)
    labels[:, -answer:] = torch.randint(text.vocab_size, (samples, answer), generator=generator)
    mask = torch.ones_like(labels)
    mask[0, 0] = 0
    embeds = 0.02 * torch.randn(samples, tokens, text.hidden_size, generator=generator)
    batch = {"inputs_embeds": embeds.to(next(model.parameters()).dtype), "attention_mask": mask, "labels": labels}
    batch["position_ids"] = torch.arange(tokens).repeat(3, samples, 1)
    return {name: value.to(model.device) for name, value in batch.items()}


def _now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()
