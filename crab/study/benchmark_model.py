"""What I-LoRA costs in the whole model: a training step and greedy decoding, beside plain LoRA of the same rank."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from crab import tasks
from crab.data import records
from crab.ilora.layer import Linear
from crab.models import omni
from crab.study import train as training
from crab.study.benchmark import RATIO, estimate, formats, interleaved, quartiles, quotient
from crab.study.dataset import batch, load_base
from crab.study.encode import load_media

METHODS = ("LoRA", "I-LoRA")
#: I-LoRA's operations on a few tokens and nothing else: the least that decoding with it costs in torch, operation by operation
FLOOR = "I-LoRA, operations alone"
_PARTS = ("forward", "backward", "optimizer")


def adapted(base, rank: int, heads: int) -> dict:
    """The base with each method's adapter; they share the frozen weights, so that a large base lies in memory once."""
    options = {"r": rank, "lora_alpha": 2 * rank}
    models = {
        "LoRA": training.adapted(_sharing(base), "lora", options),
        "I-LoRA": training.adapted(_sharing(base), "ilora", {**options, "num_heads": heads}),
    }
    for model in models.values():
        model.generation_config.eos_token_id = None  # both write as many tokens as they may
    return models


def _sharing(model):
    """A copy whose parameters and buffers are the model's own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def operations_alone(model):
    """A copy of an I-LoRA model with nothing but the formula in each adapted layer: for inference in float32 only.

    No choice of adapter, no hooks, dtypes, observers or checks; [A; R] is stacked beforehand.
    """
    model = _sharing(model)
    for layer in [m for m in model.modules() if isinstance(m, Linear)]:
        (name,) = layer.active_adapters
        A, R, B = (part[name].weight for part in (layer.ilora_A, layer.ilora_router, layer.ilora_B))
        base = layer.get_base_layer()
        stacked = torch.cat((A, R)).detach()
        layer.forward = partial(_formula, base.weight, base.bias, stacked, B.detach().t(), len(A), layer.scaling[name])
    return model


def _formula(weight, bias, stacked, B, r: int, scaling: float, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, x.shape[-1])
    y, small = F.linear(flat, weight, bias), stacked @ flat.t()
    routed = small[r:].softmax(0).unsqueeze(1) * small[:r]
    return y.addmm_(routed.flatten(0, 1).t(), B, alpha=scaling).view(*x.shape[:-1], -1)


def model_costs(
    base: str | Path, root: str | Path, slot: str, batch_size: int, new_tokens: int, rank: int, heads: int,
    dtypes: Iterable[str], seconds: float,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Time a training step (AdamW) and greedy decoding on the first training samples of a slot.

    Args:
        base: folder of the base. root: holds ``AVUIE_2``.
        new_tokens: decoded for each sample of the batch; none ends earlier.
        dtypes: ``bfloat16`` is autocast, as the Trainer's ``bf16`` is; left out where it is emulated. ``float32`` is left out of a
            base that is loaded in bfloat16 (a published one on a GPU).
        seconds: of repetitions, for each of training and decoding.

    Returns:
        Costs, a row a number format, method and part, with medians and quartiles; and ratios, whose roofline in decoding is
        that of `FLOOR`, in float32.
    """
    model, processor = load_base(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    found = records.read(root, slot, "train")[:batch_size]
    frames = tasks.get_slot(slot).frames
    samples = omni.encode(model, [omni.prepare(processor, load_media(r, frames), tasks.instruction(slot, r)) for r in found])
    answers = [tasks.target(slot, record, "bare") for record in found]
    learned, asked = batch(model, processor.tokenizer, samples, answers), batch(model, processor.tokenizer, samples)
    models = adapted(model, rank, heads)

    costs, ratios = [], []
    for dtype in formats(dtypes, device):
        precision = getattr(torch, dtype)
        if precision == torch.float32 != model.dtype:
            continue

        def context():
            return nullcontext() if precision == torch.float32 else torch.autocast(device, precision)  # noqa: B023

        def train(model):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

            def step(_: int):
                model.train()
                with context():
                    loss, _ = training.answer_loss(model, learned)
                yield
                loss.backward()
                yield
                optimizer.step()
                optimizer.zero_grad()
                yield

            return step

        def decode(model):
            def step(_: int):
                model.eval()
                with context():
                    omni.generate(model, processor.tokenizer, asked, new_tokens)
                yield

            return step

        about = {"device": device, "dtype": dtype}
        where = f"batch {len(found)} x {asked['input_ids'].shape[1]} tokens, r {rank}, N {heads}"
        floor = {FLOOR: operations_alone(models["I-LoRA"])} if precision == torch.float32 else {}
        for name, work, parts, held in (("train", train, _PARTS, models), ("decode", decode, ("decoding",), models | floor)):
            times = interleaved({method: work(m) for method, m in held.items()}, seconds, device)
            for method, taken in times.items():
                costs += [{**about, "method": method, "part": p, **quartiles(t)} for p, t in zip(parts, taken, strict=True)]
            whole = {method: taken.sum(0) for method, taken in times.items()}
            ratio = {"ratio": f"{name}_ilora_over_lora", **estimate(quotient("I-LoRA", "LoRA"), whole)}
            least = float(quotient(FLOOR, "LoRA")(whole)) if FLOOR in whole else np.nan
            ratios.append({"part": "model", "where": where, **about, **ratio, "roofline": least})
    return pd.DataFrame(costs), pd.DataFrame(ratios, columns=RATIO)


def model_table(costs: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of each part by method, a row a number format, and the ratios of training and decoding."""
    table = (1000 * costs.pivot(index=["device", "dtype"], columns=["part", "method"], values="seconds")).round(1)
    decoding = [("decoding", method) for method in (*METHODS, FLOOR) if ("decoding", method) in table]
    table = table[[(part, method) for part in _PARTS for method in METHODS] + decoding]
    for name in ("train", "decode"):
        part = ratios[ratios["ratio"] == f"{name}_ilora_over_lora"].set_index(["device", "dtype"])
        said = [f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f})" for r in part.itertuples()]
        table[(name, "I-LoRA / LoRA")] = pd.Series(said, index=part.index)
    return table
