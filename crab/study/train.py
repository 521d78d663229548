"""Train one adapter on the frozen base, by HF Trainer, from encoded samples.

A run works in a folder of its own and resumes there from its last whole checkpoint when it was killed.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import disable_progress_bar

from crab.data.files import atomic_folder, write_json
from crab.ilora import ILoraConfig, parameter_groups
from crab.models import omni
from crab.models.batches import Sample, answer_loss, batch
from crab.models.checkpoint import load_base

WHOLE = "whole"  # empty file in a checkpoint, written last
RECORD = "run.json"  # what was trained and what it cost, beside the adapter; written last
PRECISIONS = ("fp32", "bf16")
WARMUP = 0.03  # share of the steps over which the learning rate rises, as published
#: What a CPU calls its own bf16 arithmetic: AVX-512 and AMX of x86, NEON and SVE of ARM.
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


class AnswerTrainer(Trainer):
    """HF Trainer on batches of encoded samples. The loss counts answer tokens only, their end included."""

    def _save(self, output_dir=None, state_dict=None):
        # Without this, PEFT looks the base up on the network to decide about embeddings.
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = answer_loss(model, inputs, num_items_in_batch, self.model)
        return (loss, outputs) if return_outputs else loss


class _MarkWhole(TrainerCallback):
    """Marks each checkpoint once all of it is written. In tests it stops there, as a kill would."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at = stop_at

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (folder / WHOLE).touch()
        if self.stop_at is not None and state.global_step >= self.stop_at:
            raise KeyboardInterrupt(f"stopped at step {state.global_step}")


def adapter_config(method: str, options: Mapping[str, Any]):
    """PEFT config: I-LoRA for ``ilora``, LoRA for ``lora``.

    Raises:
        ValueError: on an option that the method does not have.
    """
    config = {"lora": LoraConfig, "ilora": ILoraConfig}[method]
    try:
        return config(target_modules=omni.LANGUAGE_TARGETS, **{k: v for k, v in options.items() if k != "router_rate"})
    except TypeError as error:
        raise ValueError(f"{method}: {error}; see {config.__name__} for the options it has") from None


def adapted(model, method: str, options: Mapping[str, Any]):
    """The base with a new adapter in it. See `adapter_config`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks by the old name
        return get_peft_model(model, adapter_config(method, options))


def native_bf16(device: str | None = None) -> bool:
    """Whether a device (by default the one that trains) computes in bfloat16 itself, without emulation."""
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in CPU_BF16)


def warn_of_emulation(precision: str) -> None:
    """Warn if ``precision`` works here, but more slowly than float32. Nothing is changed."""
    if precision == "bf16" and not native_bf16():
        warnings.warn(
            "shared.precision is bf16, but this device has no bfloat16 arithmetic and emulates it slowly; "
            "fp32 trains faster here, with slightly different results",
            stacklevel=3,
        )


def last_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that was written to its end."""
    whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / WHOLE).exists()]
    return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None


def train(
    pairs: Sequence[tuple[Sample, str]],
    method: str,
    options: Mapping[str, Any],
    base: str | Path,
    folder: str | Path,
    *,
    learning_rate: float,
    passes: int,
    batch_size: int,
    seed: int,
    precision: str = "fp32",
    stop_at: int | None = None,
) -> Path:
    """Train one adapter, or finish it, and return its folder, ``<folder>/adapter``.

    Args:
        pairs: samples with their answers, in the order before shuffling.
        method, options: see `adapter_config`. With ``router_rate`` the routers learn that many times faster.
        folder: holds checkpoints while training; deleted from there when the adapter is whole.
        passes: over all pairs. batch_size: samples per step.
        precision: ``bf16`` (autocast; weights, optimiser and loss stay in float32) or ``fp32``.
        stop_at: raise KeyboardInterrupt after the first checkpoint at or past this step (for tests).

    Raises:
        ValueError: on an unknown option or precision.
    """
    folder = Path(folder)
    final = folder / "adapter"
    if (final / RECORD).exists():
        return final
    if precision not in PRECISIONS:
        raise ValueError(f"shared.precision: {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")

    disable_progress_bar()  # a bar for each model loaded would hide the one of the cells
    set_seed(seed)  # before the adapter draws its initial weights
    model, processor = load_base(base)
    # On CPUs the backward pass of torch's fused attention is slow in bf16; in fp32 it is the faster one.
    model.set_attn_implementation("eager" if precision == "bf16" and not torch.cuda.is_available() else "sdpa")
    peft_model = adapted(model, method, options)
    steps = -(-len(pairs) // batch_size) * passes
    optimizer = None  # Trainer makes its own
    if "router_rate" in options:
        groups = parameter_groups(peft_model, float(learning_rate), float(learning_rate) * options["router_rate"])
        optimizer = torch.optim.AdamW(groups, lr=float(learning_rate), weight_decay=0.0)
    trainer = AnswerTrainer(
        model=peft_model,
        args=_arguments(folder, learning_rate, passes, batch_size, seed, steps, precision),
        train_dataset=list(pairs),
        data_collator=partial(_collate, model, processor.tokenizer),
        optimizers=(optimizer, None),
        callbacks=[_MarkWhole(stop_at)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder)
    start = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - began
    record = {
        "samples": len(pairs),
        "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        "steps": steps,
        "resumed_from": start,
        "seconds": round(seconds, 2),
        "samples_per_second": round((steps - start) * batch_size / max(seconds, 1e-9), 1),
        "loss": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
    }
    with atomic_folder(final) as temporary:
        for config in peft_model.peft_config.values():
            config.base_model_name_or_path = Path(base).name  # no path of this machine in a result
        peft_model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)
        write_json(temporary / RECORD, record)
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)
    return final


def _collate(model, tokenizer, pairs: Sequence[tuple]) -> dict[str, torch.Tensor]:
    samples, answers = zip(*pairs, strict=True)
    return batch(model, tokenizer, samples, answers)


def _arguments(
    folder: Path, learning_rate: float, passes: int, batch_size: int, seed: int, steps: int, precision: str
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=passes,
        per_device_train_batch_size=batch_size,
        learning_rate=float(learning_rate),
        lr_scheduler_type="cosine",
        warmup_steps=round(WARMUP * steps),
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 40),
        save_strategy="epoch",
        save_total_limit=2,
        eval_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,  # batches are made on the model's device
    )
    if (
        arguments.mixed_precision != {"bf16": "bf16", "fp32": "no"}[precision]
    ):  # `accelerate launch` can ask for another
        raise ValueError(
            f"shared.precision: {precision}, but Accelerate was started with mixed precision "
            f"{arguments.mixed_precision!r}; make the two agree (accelerate launch --mixed_precision)"
        )
    return arguments
