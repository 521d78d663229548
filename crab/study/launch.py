"""One cell on several processes: how they are started and followed, and what each of them runs.

    accelerate launch --config_file ... -m crab.study.launch JOB

`Store.run` starts this for a joint cell if ``shared.hardware.processes`` is above 1. Without a GPU, torch starts the
processes, since Accelerate does so for several CPU processes by MPI only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import PartialState

from crab.data.files import read_json, write_json

if TYPE_CHECKING:
    from crab.study.cells import Cell
    from crab.study.store import Store

JOB, LOG = "job.json", "log.txt"
_PARENT = "CRAB_PARENT"  # environment variable with the number of the process that started the launch


def launch(store: Store, cell: Cell) -> None:
    """Run a cell on ``store.hardware.processes`` processes, and show what the first of them prints.

    RuntimeError if they fail, with the end of what they printed; all of it is in ``log.txt`` of the cell's folder.
    """
    folder = store.folder(cell)
    write_json(folder / JOB, json.loads(json.dumps({"store": asdict(store), "cell": asdict(cell)}, default=str)))
    tail: deque[str] = deque(maxlen=20)
    with (
        open(folder / LOG, "a", encoding="utf-8") as log,
        subprocess.Popen(
            command(store, folder / JOB), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **environment(store), _PARENT: str(os.getpid())},
        ) as process,
    ):  # fmt: skip
        try:
            while text := process.stdout.read1(4096).decode(errors="replace"):  # a progress bar ends no line
                sys.stderr.write(text)
                log.write(text)
                tail.extend(text.splitlines())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise RuntimeError(f"{cell.name}: its processes failed; see {folder / LOG}\n" + "\n".join(tail))


def command(store: Store, job: Path) -> list[str]:
    """The command that starts the processes of a cell."""
    hardware, module = store.hardware, ["-m", "crab.study.launch", str(job)]
    if not torch.cuda.is_available():
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={hardware.processes}", *module]
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(hardware.configuration()),
        "--num_processes", str(hardware.processes), "--mixed_precision", {"fp32": "no"}.get(store.precision, "bf16"),
        *module,
    ]  # fmt: skip


def environment(store: Store) -> dict[str, str]:
    """Environment variables of the processes. Those that Accelerate's launcher would set are set here for CPUs."""
    if torch.cuda.is_available():
        return {}
    threads = max(1, (os.cpu_count() or 1) // store.hardware.processes)
    precision = {"fp32": "no"}.get(store.precision, "bf16")
    return {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": precision, "OMP_NUM_THREADS": str(threads)}


def _end_with(parent: int) -> None:
    """End this process once the one that started the launch is gone: a killed notebook cannot stop its processes."""

    def watch() -> None:
        while psutil.pid_exists(parent):
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def main(job: str) -> None:
    """What each process runs."""
    from crab.study.cells import Cell
    from crab.study.hardware import Hardware
    from crab.study.store import Store, run_cell

    if _PARENT in os.environ:
        _end_with(int(os.environ[_PARENT]))
    state = PartialState(cpu=not torch.cuda.is_available())  # chooses the GPU of this process
    content = read_json(job)
    settings, fields = content["store"], content["cell"]
    if state.num_processes != settings["hardware"]["processes"]:
        raise ValueError(
            f"shared.hardware.processes is {settings['hardware']['processes']}, but Accelerate started "
            f"{state.num_processes}; take num_processes out of {settings['hardware']['accelerate']}"
        )
    for name in ("encoded", "dataset", "base", "cells", "ledger", "published"):
        settings[name] = Path(settings[name])
    settings["hardware"] = Hardware(**settings["hardware"])
    cell = Cell(**{**fields, "slots": tuple(fields["slots"]), "words": tuple(fields["words"])})
    run_cell(Store(**settings), cell)
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
