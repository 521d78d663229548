"""Answers of a trained adapter: batched greedy generation, shared out to all processes and kept by shard."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

import crab.ilora  # noqa: F401  makes I-LoRA known to PEFT
from crab.core.files import read_json, write_json
from crab.models.batches import Sample, batch, instruction_shown
from crab.models.protocol import model_of
from crab.samples.slots import SlotData

WEIGHTS = "adapter_model.safetensors"
SHARD = 16  # batches of answers that a process does and keeps as a whole


def load_adapter(model, folder: str | Path) -> PeftModel:
    """Put a saved adapter on a base, for inference.

    ValueError if the adapter is missing or damaged, or does not fit the base. PEFT itself only warns about missing
    weights, and goes on with random ones.
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
def answer(
    model, tokenizer, samples: Sequence[Sample], batch_size: int, max_new_tokens: int,
    tokens: Sequence[int] | None = None,
) -> list[str]:  # fmt: skip
    """Greedy answers in the order of ``samples``. Batches hold samples of similar length, to keep padding short.

    ``tokens`` is the length of each prompt, if it is known without reading the sample.
    """
    if tokens is None:
        tokens = [sample.get("prompt", sample)["input_ids"].shape[-1] for sample in samples]
    module = model_of(model)
    order = sorted(range(len(samples)), key=tokens.__getitem__)
    texts = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        inputs = batch(model, tokenizer, [samples[i] for i in part])
        with instruction_shown(model, inputs):
            answers = module.generate(model, tokenizer, inputs, max_new_tokens)
        for i, text in zip(part, answers, strict=True):
            texts[i] = text
    return texts


def answer_slot(
    model, tokenizer, samples: SlotData, folder: Path, key: str, batch_size: int, max_new_tokens: int
) -> None:
    """Answer this process's share of a slot. Shards that are on disk with this ``key`` are not answered again."""
    for number, chosen in enumerate(_shards(samples, batch_size)):
        path = folder / f"{samples.slot}-{number:05d}.json"
        if number % PartialState().num_processes == PartialState().process_index and kept_texts(path, key) is None:
            part = [samples[index] for index in chosen]
            texts = answer(model, tokenizer, part, batch_size, max_new_tokens, [samples.tokens[i] for i in chosen])
            write_json(path, {"key": key, "texts": {samples.ids[i]: t for i, t in zip(chosen, texts, strict=True)}})


def answered_slot(samples: SlotData, folder: Path, key: str, batch_size: int) -> dict[str, str]:
    """All answers of a slot by sample id, once every process has done its share."""
    count = len(_shards(samples, batch_size))
    shards = [kept_texts(folder / f"{samples.slot}-{number:05d}.json", key) for number in range(count)]
    texts = {name: text for shard in shards for name, text in shard.items()}
    return {name: texts[name] for name in samples.ids}


def _shards(samples: SlotData, batch_size: int) -> list[list[int]]:
    """Indices in order of length, in groups of `SHARD` batches."""
    order = sorted(range(len(samples)), key=samples.tokens.__getitem__)
    return [order[first : first + SHARD * batch_size] for first in range(0, len(order), SHARD * batch_size)]


def kept_texts(path: Path, key: str) -> dict | None:
    """``texts`` of a JSON file, if it is there and was written with this ``key``."""
    content = read_json(path) if path.is_file() else None
    return content["texts"] if content and content["key"] == key else None
