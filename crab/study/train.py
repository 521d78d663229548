"""Train adapters on the frozen base: one `Run` each, by HF Trainer, from the encoded samples.

A run works in ``<checkpoints>/<run>/<key>``, where the key is a hash of everything that decides its
result; killed, it goes on from its last whole checkpoint. Finished adapters wait there until all runs
of the stage are done and are then promoted together, so a killed stage loses no finished run.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import disable_progress_bar

from crab.data.files import atomic_folder, read_json, write_json
from crab.ilora import ILoraConfig, parameter_groups
from crab.models import omni
from crab.study.dataset import SlotData, batch, load_base, read_slot
from crab.study.instruction import instruction_shown
from crab.study.keys import base_digest, code_digest, key_of
from crab.study.pool import run_pool
from crab.study.runs import Run

WHOLE = "whole"  # empty file in a checkpoint, written last
WARMUP = 0.03  # share of the steps the learning rate rises over, as published
NOT_FOR_CONFIG = ("runs", "learning_rate", "router_rate")
PRECISIONS = ("bf16", "fp32")
#: What a CPU calls its bf16 arithmetic: AVX-512 and AMX of x86, NEON and SVE of ARM.
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
#: Of a run's record, what is never twice the same.
COST = ("resumed_from", "seconds", "samples_per_second")
#: Modules that decide, with this one, what a run results in; the rest only brings runs about.
DECIDING = "import crab.ilora, crab.models.omni, crab.study.dataset, crab.study.instruction"


class AnswerTrainer(Trainer):
    """HF Trainer on batches of cached embeddings; the loss is on answer tokens only, their end included."""

    def _save(self, output_dir=None, state_dict=None):
        # as in `train_run`: PEFT must not look the base up on the network to decide on embeddings
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = answer_loss(model, inputs, num_items_in_batch, self.model)
        return (loss, outputs) if return_outputs else loss


def answer_loss(model, inputs: Mapping[str, torch.Tensor], count: int | torch.Tensor | None = None, unwrapped=None):
    """Cross-entropy of the answer tokens of a batch, their end included, and the model's outputs; only they get logits.

    Args:
        count: tokens the sum is divided by; None for the batch's own. unwrapped: the model without DDP's wrapper, if it has one.
    """
    wanted = inputs["labels"].roll(-1, 1)  # a label is learned from the position before it; no prompt begins with one
    here = wanted != omni.IGNORE
    with instruction_shown(model, inputs), omni.logits_at(unwrapped or model, here):
        outputs = model(
            inputs_embeds=inputs["inputs_embeds"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            use_cache=False,
        )
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), wanted[here], reduction="sum")
    return total / (here.sum() if count is None else count), outputs


def _collate(model, tokenizer, pairs: Sequence[tuple]) -> dict[str, torch.Tensor]:
    samples, answers = zip(*pairs, strict=True)
    return batch(model, tokenizer, samples, answers)


class _MarkWhole(TrainerCallback):
    """Marks each checkpoint once all of it is written; optionally stops there, to act out a kill."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at = stop_at

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (folder / WHOLE).touch()
        if self.stop_at is not None and state.global_step >= self.stop_at:
            raise KeyboardInterrupt(f"stopped at step {state.global_step}")


def adapter_config(method: str, section: Mapping[str, Any]):
    """PEFT config of a method: I-LoRA for names that start with ``ilora``, LoRA for ``lora``.

    Raises:
        ValueError: on another name, or a parameter that method does not have.
    """
    options = {k: v for k, v in section.items() if k not in NOT_FOR_CONFIG}
    if method.startswith("ilora"):
        config = ILoraConfig
    elif method.startswith("lora"):
        config = LoraConfig
    else:
        raise ValueError(f"methods.{method}: unknown method; its name must start with lora or ilora")
    try:
        return config(target_modules=omni.LANGUAGE_TARGETS, **options)
    except TypeError as error:
        raise ValueError(f"methods.{method}: {error}; see {config.__name__}") from None


def run_options(
    run: Run, section: Mapping[str, Any], passes: int, batch_size: int, precision: str = "fp32", held_out: int = 0,
    samples: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The parameters that decide a run's result, as `run_key` takes them; arguments as for `train_run`.

    Raises:
        ValueError: on an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"train.precision: {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    kept = {name: value for name, value in section.items() if name != "runs"}
    return {
        "method": run.method, **kept, "passes": passes, "batch_size": batch_size, "warmup": WARMUP, "seed": run.seed,
        "precision": precision, "held_out": held_out, "samples_a_slot": samples,
    }  # fmt: skip


def run_key(run: Run, options: Mapping[str, Any], data: Sequence[str], base: str | Path) -> str:
    """Hash of the parameters, the data, the base and the code that trains: equal keys mean equal results.

    Args:
        options: of `run_options`. data: digests of the training data of each slot, in order.
    """
    return key_of({
        "run": run.name,
        "options": options,
        "data": list(data),
        "base": base_digest(base),
        "code": code_digest(DECIDING, Path(__file__)),
        "versions": [torch.__version__, transformers.__version__, peft.__version__],
    })


def native_bf16(device: str | None = None) -> bool:
    """Whether a device, else the one that trains, computes in bfloat16 itself; else it is emulated, and slower than float32."""
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in CPU_BF16)


def warn_of_emulation(precision: str) -> None:
    """Warn where ``precision`` works, but more slowly than float32. Nothing is changed."""
    if precision == "bf16" and not native_bf16():
        warnings.warn(
            "train.precision is bf16, but this device has no bfloat16 arithmetic of its own and emulates it, slowly; "
            "fp32 trains faster here, with slightly different results",
            stacklevel=3,
        )


def _last_whole(folder: Path) -> str | None:
    """The latest checkpoint that was written to its end."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / WHOLE).exists()]
    return str(max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))) if found else None


def train_run(
    run: Run,
    section: Mapping[str, Any],
    encoded: str | Path,
    base: str | Path,
    checkpoints: str | Path,
    slots: Sequence[str],
    passes: int,
    batch_size: int,
    stop_at: int | None = None,
    *,
    precision: str = "fp32",
    held_out: int = 0,
    samples: int | None = None,
) -> Path:
    """Train one run, or finish it, and return the folder of its adapter (not yet promoted).

    Args:
        section: the method's own parameters: ``learning_rate``, ``runs`` (not used here) and the
            PEFT config's (``r``, ``lora_alpha``, ``lora_dropout``, ``num_heads``, ...). With ``router_rate``, I-LoRA's
            routers learn at so many times the learning rate.
        encoded: output of the encode stage. slots: those a joint run trains on.
        passes: over every slot's samples, the same for single and joint runs.
        batch_size: samples a step.
        stop_at: raise KeyboardInterrupt after the first checkpoint at or past this step (for tests).
        precision: ``bf16`` (autocast; weights, optimiser and loss stay in float32) or ``fp32``.
        held_out: leave out the last so many samples of each slot. samples: of the rest, take the first so many.

    Raises:
        ValueError: a parameter the method does not have, an unknown precision, or nothing left to train on.
    """
    data = [read_slot(encoded, slot, "train") for slot in run.slots(slots)]
    options = run_options(run, section, passes, batch_size, precision, held_out, samples)
    key = run_key(run, options, [d.digest for d in data], base)
    folder = Path(checkpoints) / run.name / key
    final = folder / "final"
    if (final / "run.json").exists():
        return final

    disable_progress_bar()  # a bar for each model loaded would bury the one of the runs
    set_seed(run.seed)  # before the adapter draws its initial weights
    model, processor = load_base(base)
    # on CPUs the backward pass of torch's fused attention is slow in bf16; in fp32 it is the faster one
    model.set_attn_implementation("eager" if precision == "bf16" and not torch.cuda.is_available() else "sdpa")
    peft_model = adapted(model, run.method, section)
    pairs = [pair for slot in data for pair in _trained_on(slot, run.form, held_out, samples)]
    steps = -(-len(pairs) // batch_size) * passes
    trainer = AnswerTrainer(
        model=peft_model,
        args=_arguments(folder, run, section, passes, batch_size, steps, precision),
        train_dataset=pairs,
        data_collator=partial(_collate, model, processor.tokenizer),
        optimizers=(_optimizer(peft_model, section), None),
        callbacks=[_MarkWhole(stop_at)],
    )
    trainer.remove_callback(PrinterCallback)
    start = _last_whole(folder)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=start)
    seconds = time.perf_counter() - began
    done = steps - (int(start.rsplit("-", 1)[1]) if start else 0)
    record = {
        "run": run.name,
        "key": key,
        **options,
        "slots": run.slots(slots),
        "samples": len(pairs),
        "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        "steps": steps,
        "resumed_from": steps - done,
        "seconds": round(seconds, 2),
        "samples_per_second": round(done * batch_size / max(seconds, 1e-9), 1),
        "loss": [[h["step"], h["loss"]] for h in trainer.state.log_history if "loss" in h],
    }
    with atomic_folder(final) as temporary:
        for config in peft_model.peft_config.values():
            config.base_model_name_or_path = Path(base).name  # no path of this machine in a result
        # never embeddings: to decide on them, PEFT would look the base up on the network
        peft_model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)
        write_json(temporary / "run.json", record)
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)
    return final


def adapted(model, method: str, section: Mapping[str, Any]):
    """The base with a new adapter in it; see `adapter_config`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks by the old name
        return get_peft_model(model, adapter_config(method, section))


def _optimizer(model, section: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    """What Trainer makes by itself, but with the routers at a rate of their own; None where they have none."""
    if "router_rate" not in section:
        return None
    rate = float(section["learning_rate"])
    return torch.optim.AdamW(parameter_groups(model, rate, rate * section["router_rate"]), lr=rate, weight_decay=0.0)


def _trained_on(slot: SlotData, form: str, held_out: int, samples: int | None) -> list[tuple]:
    """Pairs of sample and answer, without the last ``held_out``, of the rest the first ``samples``."""
    left = len(slot) - held_out
    if held_out < 0 or left < 1 or (samples is not None and not 1 <= samples <= left):
        raise ValueError(
            f"{slot.slot}: of {len(slot)} training samples {held_out} are held out and {samples or left} wanted; hold out fewer, "
            "or build more (build.train_samples)"
        )
    return slot.answered(form)[:left][:samples]


def _arguments(
    folder: Path, run: Run, section: Mapping, passes: int, batch_size: int, steps: int, precision: str
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=passes,
        per_device_train_batch_size=batch_size,
        learning_rate=float(section["learning_rate"]),
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
        seed=run.seed,
        data_seed=run.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,  # batches are made on the model's device
    )
    if arguments.mixed_precision != {"bf16": "bf16", "fp32": "no"}[precision]:  # `accelerate launch` can ask for another
        raise ValueError(
            f"train.precision: {precision}, but Accelerate was started with mixed precision {arguments.mixed_precision!r}; "
            "make the two agree (accelerate launch --mixed_precision)"
        )
    return arguments


def learning_rates(path: str | Path) -> dict[str, float]:
    """Rates the sweep stage chose, by setting and form (``joint-bare``), from its ``metrics.json``.

    Raises:
        ValueError: when the file is missing or holds none.
    """
    rates = read_json(path).get("rates")
    if not isinstance(rates, dict) or not rates or not all(isinstance(r, int | float) and r > 0 for r in rates.values()):
        raise ValueError(f"{path}: no learning rates in it; run the sweep stage again")
    return rates


def train_all(
    runs: Sequence[Run],
    settings: Mapping[str, Any],
    rates: Mapping[str, float],
    encoded: str | Path,
    base: str | Path,
    out: str | Path,
    checkpoints: str | Path,
    slots: Sequence[str],
    passes: int,
    batch_size: int,
    workers: int = 2,
    precision: str = "fp32",
) -> list[dict]:
    """Train independent runs of one method in worker processes, longest first, then promote their adapters.

    Args:
        settings: the method's section, without a learning rate.
        rates: the learning rate of each ``<setting>-<form>``, see `learning_rates`; the rest as for `train_run`.
        out: each adapter ends in ``<out>/<run>``, with its ``run.json``. Runs of other plans there, which the next stage would take for
            part of this one, are deleted.

    Returns:
        Each run's record in the order of ``runs``: its ``run.json``, and what it cost, which is not kept there, so that adapters
        trained again are the same files and nothing after them runs.

    Raises:
        ValueError: a wrong parameter, or no rate for a run.
        RuntimeError: naming the run that failed, with the worker's error as its cause.
    """
    warn_of_emulation(precision)
    sections = {}
    for run in runs:  # a wrong parameter fails here, not minutes later in a worker
        if "learning_rate" in settings:
            raise ValueError(f"methods.{run.method}.learning_rate: rates come from the sweep stage; name one in sweep.rates")
        row = f"{run.setting}-{run.form}"
        if row not in rates:
            raise ValueError(f"{run.name}: the sweep chose no learning rate for {row}, only for {', '.join(rates)}; run the sweep stage")
        sections[run] = {**settings, "learning_rate": rates[row]}
        adapter_config(run.method, settings)
        run_options(run, sections[run], passes, batch_size, precision)
    size = {slot: len(read_json(Path(encoded) / slot / "train.json")["ids"]) for slot in slots}
    jobs = [
        (run.name, partial(train_run, run, sections[run], encoded, base, checkpoints, list(slots), passes, batch_size, precision=precision))
        for run in sorted(runs, key=lambda run: -sum(size[s] for s in run.slots(slots)))
    ]  # fmt: skip
    finals = run_pool(jobs, workers, "train")
    records = []
    for run in runs:
        record = read_json(finals[run.name] / "run.json")
        with atomic_folder(Path(out) / run.name) as temporary:
            shutil.copytree(finals[run.name], temporary, dirs_exist_ok=True)
            write_json(temporary / "run.json", {name: value for name, value in record.items() if name not in COST})
        records.append(record)
    for folder in Path(out).iterdir():
        if folder.is_dir() and folder.name not in finals:
            shutil.rmtree(folder)
    for run in runs:  # only now that every run of the stage is in place
        shutil.rmtree(Path(checkpoints) / run.name, ignore_errors=True)
    return records


def cost_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """What each run trained, how long, and where its loss ended."""
    rows = [
        {
            "run": r["run"],
            "learning rate": r["learning_rate"],
            "trainable parameters": r["trainable_parameters"],
            "samples": r["samples"],
            "steps": r["steps"],
            "seconds": r["seconds"],
            "samples/s": r["samples_per_second"],
            "resumed from": r["resumed_from"],
            "last loss": r["loss"][-1][1] if r["loss"] else None,
        }
        for r in records
    ]
    return pd.DataFrame(rows)
