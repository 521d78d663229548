"""Train one adapter on the frozen base, by HF Trainer, in one process or in several that Accelerate started.

A run works in a folder of its own and resumes there from its last whole checkpoint when it was killed.
"""

from __future__ import annotations

import difflib
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from crab.core.files import atomic_folder, write_json
from crab.ilora import ILoraConfig, parameter_groups
from crab.models.batches import Sample, attention
from crab.models.checkpoint import load_base
from crab.models.protocol import model_of
from crab.study.hardware import MIXED, Hardware
from crab.study.loop import AnswerTrainer, Checkpoints, delete_checkpoints, last_checkpoint

RECORD = "run.json"  # what was trained and what it cost, beside the adapter; written last
PRECISIONS = ("fp32", "bf16")
WARMUP = 0.03  # share of the steps over which the learning rate rises, as published
#: What a CPU calls its own bf16 arithmetic: AVX-512 and AMX of x86, NEON and SVE of ARM.
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def adapter_config(method: str, options: Mapping[str, Any], known: Mapping[str, str]):
    """PEFT config: I-LoRA for ``ilora``, LoRA for ``lora``. ``known`` are the ``TARGETS`` of the model's module.

    With the option ``targets: published``, adapters are also in both encoders, as in the published run: on q, k and v
    of the audio tower and on the MLPs of the visual one. Otherwise they are in the language model alone.

    ValueError on an option that the method does not have, or on unknown targets.
    """
    config, targets = {"lora": LoraConfig, "ilora": ILoraConfig}[method], options.get("targets", "language")
    if targets not in known:
        raise ValueError(f"{method}: targets is {targets!r}; with this base, use one of {', '.join(known)}")
    if adapts_encoders(options) and options.get("router_input", "token") != "token":
        raise ValueError(f"{method}: routers in the encoders see no instruction; set router_input to token")
    own = ("router_rate", "targets", "weights")
    names = {*own, *(field.name for field in fields(config))}
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"see {config.__name__} for the options it has"
            raise ValueError(f"{method}: option {name!r} is unknown; {fix}")
    return config(target_modules=known[targets], **{k: v for k, v in options.items() if k not in own})


def adapts_encoders(options: Mapping[str, Any]) -> bool:
    """Whether a method with these options changes the features of media."""
    return options.get("targets") == "published" or bool(options.get("weights"))


def adapted(model, method: str, options: Mapping[str, Any]):
    """The base with a new adapter in it. See `adapter_config`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks by the old name
        return get_peft_model(model, adapter_config(method, options, model_of(model).TARGETS))


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


def train(
    pairs: Sequence[tuple[Sample, str]], method: str, options: Mapping[str, Any], base: str | Path, folder: str | Path,
    *, learning_rate: float, passes: int, batch_size: int, seed: int, precision: str = "fp32",
    lengths: Sequence[int] | None = None, hardware: Hardware | None = None,
) -> Path:  # fmt: skip
    """Train one adapter, or finish it, and return its folder, ``<folder>/adapter``.

    Every process that Accelerate started calls this with the same arguments. ValueError on an unknown option or
    precision, a batch that does not divide, or a checkpoint that another number of processes wrote.

    Args:
        pairs: samples with their answers, in the order before shuffling. They are read when their turn comes.
        method, options: see `adapter_config`. With ``router_rate`` the routers learn that many times faster.
        folder: holds checkpoints while training; deleted from there when the adapter is whole.
        passes: over all pairs. batch_size: samples per step, of all processes together.
        precision: ``bf16`` (autocast; weights, optimiser and loss stay in float32) or ``fp32``.
        lengths: of the pairs; batches then hold samples of similar length.
    """
    folder = Path(folder)
    final = folder / "adapter"
    if (final / RECORD).exists():
        return final
    if precision not in PRECISIONS:
        raise ValueError(f"shared.precision: {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    state, hardware = PartialState(), hardware or Hardware()
    micro_batch = hardware.micro_batch(batch_size)
    note = hardware.note(batch_size, state.num_processes)
    checkpoint = last_checkpoint(folder, note)
    state.wait_for_everyone()  # all have looked
    if state.is_main_process:
        delete_checkpoints(folder, but=checkpoint)  # half written, they would count as the newest

    disable_progress_bar()  # a bar for each model loaded would hide the one of the cells
    set_seed(seed)  # before the adapter draws its initial weights
    model, processor = load_base(base)
    model.set_attn_implementation(attention(precision, model.device))
    peft_model = adapted(model, method, options)
    steps = -(-len(pairs) // batch_size) * passes
    accumulate = batch_size // micro_batch // state.num_processes
    optimizer = None  # Trainer makes its own
    if "router_rate" in options:
        groups = parameter_groups(peft_model, float(learning_rate), float(learning_rate) * options["router_rate"])
        optimizer = torch.optim.AdamW(groups, lr=float(learning_rate), weight_decay=0.0)
    arguments = _arguments(
        folder, learning_rate, passes, micro_batch, accumulate, seed, steps, precision, hardware,
        adapts_encoders(options),
    )  # fmt: skip
    trainer = AnswerTrainer(
        model, processor.tokenizer, lengths, model=peft_model, args=arguments, train_dataset=pairs,
        optimizers=(optimizer, None), callbacks=[Checkpoints(hardware.save_minutes, note)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    start = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    unset_hf_deepspeed_config()  # with it, transformers would spread out whatever model is loaded next
    seconds = time.perf_counter() - began
    with atomic_folder(final) if state.is_main_process else nullcontext(final) as temporary:
        for config in peft_model.peft_config.values():
            config.base_model_name_or_path = Path(base).name  # no path of this machine in a result
        trainer.save_model(str(temporary))  # all processes: weights may be spread over them
        if state.is_main_process:
            (temporary / "README.md").unlink(missing_ok=True)
            write_json(temporary / RECORD, {
                "samples": len(pairs),
                "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
                "steps": steps,
                "resumed_from": start,
                "seconds": round(seconds, 2),
                "samples_per_second": round((steps - start) * batch_size / max(seconds, 1e-9), 1),
                "loss": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
            })  # fmt: skip
    state.wait_for_everyone()
    if state.is_main_process:
        delete_checkpoints(folder)
    return final


def _arguments(
    folder: Path, learning_rate: float, passes: int, micro_batch: int, accumulate: int, seed: int, steps: int,
    precision: str, hardware: Hardware, unused: bool,
) -> TrainingArguments:  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=passes,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulate,
        activation_checkpointing=hardware.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if hardware.checkpointing else None,
        learning_rate=float(learning_rate),
        lr_scheduler_type="cosine",
        warmup_steps=round(WARMUP * steps),
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 40),
        save_strategy="no" if hardware.save_minutes else "epoch",
        save_total_limit=2,
        eval_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=PartialState().num_processes == 1,  # one of many adapters: the bar counts these
        dataloader_num_workers=hardware.loaders,
        dataloader_pin_memory=False,  # batches are made on the model's device
        ddp_find_unused_parameters=unused,  # a batch without pictures or sound leaves adapters of that encoder out
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # with several GPUs Trainer would take torch's DataParallel
    if arguments.mixed_precision != MIXED[precision]:  # `accelerate launch` can ask for another
        raise ValueError(
            f"shared.precision: {precision}, but Accelerate was started with mixed precision "
            f"{arguments.mixed_precision!r}; make the two agree (accelerate launch --mixed_precision)"
        )
    return arguments
