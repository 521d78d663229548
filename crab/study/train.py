"""Train adapters on the frozen base: one `Run` each, by HF Trainer, from the encoded samples.

A run works in ``<checkpoints>/<run>/<key>``, where the key is a hash of everything that decides its
result; killed, it goes on from its last whole checkpoint. Finished adapters wait there until all runs
of the stage are done and are then promoted together, so a killed stage loses no finished run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
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

import crab.ilora
from crab.data.files import aside_folder, read_json, write_json
from crab.ilora import ILoraConfig
from crab.models import omni
from crab.study.dataset import SlotData, batch, load_base, read_slot
from crab.study.pool import run_pool
from crab.study.runs import Run

WHOLE = "whole"  # empty file in a checkpoint, written last
NOT_FOR_CONFIG = ("runs", "learning_rate")


class AnswerTrainer(Trainer):
    """HF Trainer on batches of cached embeddings; the loss is on answer tokens only, their end included."""

    def _save(self, output_dir=None, state_dict=None):
        # as in `train_run`: PEFT must not look the base up on the network to decide on embeddings
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(
            inputs_embeds=inputs["inputs_embeds"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            use_cache=False,
        )
        labels = inputs["labels"][:, 1:]
        here = labels != omni.IGNORE
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1][here].float(), labels[here], reduction="sum"
        ) / (here.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


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


def base_digest(base: str | Path) -> str:
    """Digest of a base's weights and configuration; files over 256 MB count by name, size and date."""
    digest = hashlib.sha256()
    files = sorted(p for p in Path(base).rglob("*") if p.suffix in (".safetensors", ".json"))
    if not files:
        raise ValueError(f"{base}: no base model there; run the base stage")
    for path in files:
        stat = path.stat()
        small = stat.st_size < 2**28
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def run_key(run: Run, options: Mapping[str, Any], data: Sequence[SlotData], base: str | Path) -> str:
    """Hash of the parameters, the data, the base and the code that trains: equal keys mean equal results."""
    sources = [*sorted(Path(crab.ilora.__file__).parent.glob("*.py")), Path(omni.__file__), Path(__file__)]
    what = {
        "run": run.name,
        "options": options,
        "data": [d.digest for d in data],
        "base": base_digest(base),
        "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources],
        "versions": [torch.__version__, transformers.__version__, peft.__version__],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


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
    warmup: float = 0.03,
    stop_at: int | None = None,
) -> Path:
    """Train one run, or finish it, and return the folder of its adapter (not yet promoted).

    Args:
        section: the method's own parameters: ``learning_rate``, ``runs`` (not used here) and the
            PEFT config's (``r``, ``lora_alpha``, ``lora_dropout``, ``num_heads``, ...).
        encoded: output of the encode stage. slots: those a joint run trains on.
        passes: over every slot's samples, the same for single and joint runs.
        batch_size: samples a step. warmup: share of the steps the learning rate rises over.
        stop_at: raise KeyboardInterrupt after the first checkpoint at or past this step (for tests).
    """
    data = [read_slot(encoded, slot, "train") for slot in run.slots(slots)]
    options = {
        "method": run.method, **section, "passes": passes, "batch_size": batch_size, "warmup": warmup, "seed": run.seed,
    }  # fmt: skip
    options.pop("runs", None)
    key = run_key(run, options, data, base)
    folder = Path(checkpoints) / run.name / key
    final = folder / "final"
    if (final / "run.json").exists():
        return final

    set_seed(run.seed)  # before the adapter draws its initial weights
    model, processor = load_base(base)
    peft_model = _adapted(model, run, section)
    samples = [pair for slot in data for pair in slot.answered(run.form)]
    steps = -(-len(samples) // batch_size) * passes
    trainer = AnswerTrainer(
        model=peft_model,
        args=_arguments(folder, run, section, passes, batch_size, warmup, steps),
        train_dataset=samples,
        data_collator=partial(_collate, model, processor.tokenizer),
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
        "samples": len(samples),
        "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        "steps": steps,
        "resumed_from": steps - done,
        "seconds": round(seconds, 2),
        "samples_per_second": round(done * batch_size / max(seconds, 1e-9), 1),
        "loss": [[h["step"], h["loss"]] for h in trainer.state.log_history if "loss" in h],
    }
    with aside_folder(final) as temporary:
        for config in peft_model.peft_config.values():
            config.base_model_name_or_path = Path(base).name  # no path of this machine in a result
        # never embeddings: to decide on them, PEFT would look the base up on the network
        peft_model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)
        write_json(temporary / "run.json", record)
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)
    return final


def _adapted(model, run: Run, section: Mapping[str, Any]):
    return get_peft_model(model, adapter_config(run.method, section))


def _arguments(
    folder: Path, run: Run, section: Mapping, passes: int, batch_size: int, warmup: float, steps: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=passes,
        per_device_train_batch_size=batch_size,
        learning_rate=float(section["learning_rate"]),
        lr_scheduler_type="cosine",
        warmup_steps=round(warmup * steps),
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


def train_all(
    runs: Sequence[Run],
    settings: Mapping[str, Any],
    encoded: str | Path,
    base: str | Path,
    out: str | Path,
    checkpoints: str | Path,
    slots: Sequence[str],
    passes: int,
    batch_size: int,
    warmup: float = 0.03,
    workers: int = 2,
) -> list[dict]:
    """Train independent runs of one method in worker processes, longest first, then promote their adapters.

    Args:
        settings: the method's section; the rest as for `train_run`.
        out: each adapter ends in ``<out>/<run>``, with its ``run.json``.

    Returns:
        Each run's record (its ``run.json``), in the order of ``runs``.

    Raises:
        RuntimeError: naming the run that failed, with the worker's error as its cause.
    """
    size = {slot: len(read_json(Path(encoded) / slot / "train.json")["ids"]) for slot in slots}
    jobs = [
        (run.name, partial(train_run, run, dict(settings), encoded, base, checkpoints, list(slots), passes, batch_size, warmup))
        for run in sorted(runs, key=lambda run: -sum(size[s] for s in run.slots(slots)))
    ]
    for run in runs:  # a wrong parameter fails here, not minutes later in a worker
        adapter_config(run.method, settings)
    finals = run_pool(jobs, workers, "train")
    records = []
    for run in runs:
        with aside_folder(Path(out) / run.name) as temporary:
            shutil.copytree(finals[run.name], temporary, dirs_exist_ok=True)
        records.append(read_json(Path(out) / run.name / "run.json"))
    for run in runs:  # only now that every run of the stage is in place
        shutil.rmtree(Path(checkpoints) / run.name, ignore_errors=True)
    return records


def cost_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """What each run trained, how long, and where its loss ended."""
    rows = [
        {
            "run": r["run"],
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
