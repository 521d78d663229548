"""What a machine is asked to do: processes, memory and checkpoints. None of it changes what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

#: Accelerate configurations that come with the package, by name.
CONFIGURATIONS = files("crab.study") / "accelerate"


@dataclass(frozen=True)
class Hardware:
    """``shared.hardware`` of params.yaml.

    Args:
        workers: jobs side by side: shards to encode, and adapters that one process trains. With GPUs, one for each.
        processes: that train or answer one joint adapter together. Above 1, `accelerate launch` starts them.
        accelerate: configuration for them: the name of one that comes with the package (ddp, zero2, zero3, fsdp), or
            the path of a file that `accelerate config` wrote. None means ddp.
        accumulate: parts of a batch, one after the other, in each process. More of them take less memory.
        loaders: processes that read and decode samples, for each process that trains.
        checkpointing: compute activations again in the backward pass, which saves memory and takes a third more time.
        save_minutes: between two checkpoints of a training; 0 saves after each pass.

    Raises:
        ValueError: naming the parameter.
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

    def configuration(self) -> Path:
        """The file of the Accelerate configuration. ValueError if there is none."""
        path = Path(str(CONFIGURATIONS / f"{self.accelerate or 'ddp'}.yaml"))
        if not path.is_file():
            path = Path(str(self.accelerate)).expanduser()
        if not path.is_file():
            known = ", ".join(sorted(Path(str(entry)).stem for entry in CONFIGURATIONS.iterdir()))
            raise ValueError(f"shared.hardware.accelerate is {self.accelerate!r}; use {known}, or the path of a file")
        return path
