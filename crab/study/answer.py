"""Answers of a trained adapter: batched greedy generation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

import crab.ilora  # noqa: F401  makes I-LoRA known to PEFT
from crab.models import omni
from crab.models.batches import Sample, batch, instruction_shown

WEIGHTS = "adapter_model.safetensors"


def load_adapter(model, folder: str | Path) -> PeftModel:
    """Put a saved adapter on a base, for inference.

    Raises:
        ValueError: the adapter is missing or damaged, or does not fit the base. PEFT itself only warns about
            missing weights, and goes on with random ones.
    """
    folder = Path(folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        PeftConfig.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: missing or damaged adapter ({error}); run the train stage again") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks by the old name
            peft_model = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: this adapter does not fit the base ({reason}); train it on this base") from error
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if stored != expected:
        odd = sorted(name for name in {*stored, *expected} if stored.get(name) != expected.get(name))
        raise ValueError(
            f"{folder}: this adapter does not fit the base: {len(odd)} weights differ, e.g. {odd[0]} is "
            f"{stored.get(odd[0])} in the file and {expected.get(odd[0])} in the model; train it on this base"
        )
    return peft_model.eval()


@torch.no_grad()
def answer(model, tokenizer, samples: Sequence[Sample], batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy answers in the order of ``samples``. Batches hold samples of similar length, to keep padding short."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    texts = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        inputs = batch(model, tokenizer, [samples[i] for i in part])
        with instruction_shown(model, inputs):
            answers = omni.generate(model, tokenizer, inputs, max_new_tokens)
        for i, text in zip(part, answers, strict=True):
            texts[i] = text
    return texts
