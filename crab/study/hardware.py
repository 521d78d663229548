"""What a machine is asked to do: processes, memory and checkpoints. None of it changes what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from crab.core.files import read_json

#: Accelerate configurations that come with the package, by name.
CONFIGURATIONS = files("crab.study") / "accelerate"
#: Kinds of configuration (``distributed_type``) that train one adapter together.
KINDS = ("MULTI_GPU", "DEEPSPEED", "FSDP")
#: What Accelerate calls the precisions of params.yaml.
MIXED = {"fp32": "no", "bf16": "bf16"}


@dataclass(frozen=True)
class Hardware:
    """``shared.hardware`` of params.yaml. ValueError, naming the parameter, on what cannot be.

    Args:
        workers: jobs side by side: shards to encode, and adapters that one process trains. With GPUs, one for each.
        processes: that train or answer one joint adapter together. Above 1, `accelerate launch` starts them. If the
            samples do not divide by the batch, they fill the last batch of a pass with samples of its first ones.
        accelerate: configuration for them: the name of one that comes with the package (ddp, zero2, zero3, fsdp), or
            the path of a file that `accelerate config` wrote. None means ddp.
        accumulate: parts of a batch, one after the other, in each process. More of them take less memory.
        loaders: processes that read and decode samples, for each process that trains.
        checkpointing: compute activations again in the backward pass, which saves memory and takes a third more time.
        save_minutes: between two checkpoints of a training; 0 saves after each pass.
    """

    workers: int = 2
    processes: int = 1
    accelerate: str | None = None
    accumulate: int = 1
    loaders: int = 0
    checkpointing: bool = False
    save_minutes: float = 0

    def __post_init__(self) -> None:
        for name in ("workers", "processes", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"shared.hardware.{name} is {getattr(self, name)}; at least 1 is needed")
        self.configuration()

    def micro_batch(self, batch_size: int) -> int:
        """Samples that a process takes at once, also where one trains alone. ValueError if a batch does not divide."""
        if batch_size % (self.processes * self.accumulate):
            raise ValueError(
                f"shared.batch_size is {batch_size}, which does not divide by {self.processes} processes with "
                f"{self.accumulate} parts each; change batch_size, shared.hardware.processes or "
                "shared.hardware.accumulate"
            )
        return batch_size // (self.processes * self.accumulate)

    def note(self, batch_size: int, processes: int | None = None) -> dict[str, Any]:
        """What a checkpoint can only be resumed with, by ``processes`` (by default all)."""
        processes = processes or self.processes
        kind, stage = self.shared_out() if processes > 1 else ("MULTI_GPU", 0)
        return {
            "processes": processes,
            "micro_batch": self.micro_batch(batch_size),
            "accelerate": "whole model" if kind == "MULTI_GPU" else f"{kind} {stage}",
        }

    def configuration(self) -> Path:
        """The file of the Accelerate configuration. ValueError if there is none."""
        path = Path(str(CONFIGURATIONS / f"{self.accelerate or 'ddp'}.yaml"))
        if not path.is_file():
            path = Path(str(self.accelerate)).expanduser()
        if not path.is_file():
            known = ", ".join(sorted(Path(str(entry)).stem for entry in CONFIGURATIONS.iterdir()))
            raise ValueError(f"shared.hardware.accelerate is {self.accelerate!r}; use {known}, or the path of a file")
        return path

    def shared_out(self) -> tuple[str, int]:
        """The kind of the Accelerate configuration, and from which ZeRO stage on: 3 means that weights are spread."""
        values = self._values()
        zero = values["deepspeed"].get("zero_optimization", {}).get("stage", 2)
        return values["distributed_type"], {"DEEPSPEED": zero, "FSDP": 3}.get(values["distributed_type"], 0)

    def check(self, batch_size: int, precision: str, cached: bool, gpus: int) -> None:
        """Check that these processes can train together on ``gpus``. ``cached``: features are stored.

        ValueError, naming the parameter, on a batch that does not divide, too few GPUs, a configuration that
        contradicts params.yaml, or one that spreads weights of which single processes need all.
        """
        self.micro_batch(batch_size)
        path, values, (kind, stage) = self.configuration(), self._values(), self.shared_out()
        machines = values.get("num_machines") or 1
        if gpus and self.processes > gpus * machines:
            raise ValueError(
                f"shared.hardware.processes is {self.processes}, but there are {gpus * machines} GPUs; each process "
                "takes one"
            )
        if kind != "MULTI_GPU" and not gpus:
            raise ValueError(
                f"shared.hardware.accelerate is {self.accelerate!r}, which needs GPUs, and there are none here; set "
                "it to null"
            )
        if stage == 3 and not cached:
            raise ValueError(
                f"encode.cache is false, and shared.hardware.accelerate is {self.accelerate!r}, which spreads weights "
                "over processes: the encoders cannot run in one process on media that the others do not have; set "
                "encode.cache to true, or shared.hardware.accelerate to ddp or zero2"
            )
        fsdp, deepspeed = values.get("fsdp_config") or {}, values["deepspeed"]
        micro_batch, none = self.micro_batch(batch_size), "nothing else works here"
        for section, field, needed, reason in (
            (values, "num_processes", self.processes, "shared.hardware.processes"),
            (values, "mixed_precision", MIXED[precision], "shared.precision"),
            (deepspeed, "gradient_accumulation_steps", self.accumulate, "shared.hardware.accumulate"),
            (deepspeed, "train_micro_batch_size_per_gpu", micro_batch, "shared.batch_size"),
            (deepspeed, "train_batch_size", batch_size, "shared.batch_size"),
            (fsdp, "fsdp_activation_checkpointing", False, "shared.hardware.checkpointing"),
            (fsdp, "fsdp_version", 2, none),
            (fsdp, "fsdp_state_dict_type", "FULL_STATE_DICT", none),
            (fsdp, "fsdp_cpu_ram_efficient_loading", False, none),
        ):
            default = "1, by default" if field == "fsdp_version" and kind == "FSDP" else None
            if (value := section.get(field, default)) not in (None, "auto", needed):
                raise ValueError(
                    f"shared.hardware.accelerate: {path} has {field}: {value}; set it to {needed} there "
                    f"({reason if reason is none else f'{reason} decides'})"
                )
        for name in ("bf16", "fp16"):
            enabled = deepspeed.get(name, {}).get("enabled", "auto")
            if enabled not in ("auto", MIXED[precision] == name):
                raise ValueError(
                    f"shared.hardware.accelerate: {path} has {name}.enabled: {enabled}, but shared.precision is "
                    f"{precision}; set it to auto there"
                )

    def _values(self) -> Mapping[str, Any]:
        """Fields of the Accelerate configuration; under ``deepspeed``, those of DeepSpeed by its own names."""
        path = self.configuration()
        try:
            values = YAML(typ="safe", pure=True).load(path)
        except YAMLError as error:
            raise ValueError(f"shared.hardware.accelerate: {path} cannot be read: {error}") from None
        if not isinstance(values, dict) or values.get("distributed_type") not in KINDS:
            raise ValueError(
                f"shared.hardware.accelerate: {path} must have distributed_type: {', '.join(KINDS[:-1])} or "
                f"{KINDS[-1]}; make one with `accelerate config`"
            )
        short = values.get("deepspeed_config") or {}
        if file := short.get("deepspeed_config_file"):
            return {**values, "deepspeed": read_json(Path(file).expanduser())}
        return {**values, "deepspeed": {**short, "zero_optimization": {"stage": short.get("zero_stage", 2)}}}
