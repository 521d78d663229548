"""One cell on several processes: how they are started and followed, and what each of them runs.

    accelerate launch --config_file ... -m crab.study.launch JOB

`Store.run` starts this for a joint cell if ``shared.hardware.processes`` is above 1. Without a GPU, torch starts the
processes, since Accelerate does so for several CPU processes by MPI only.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import PartialState

from crab.core.files import atomic_file
from crab.core.watch import when_ended
from crab.study.hardware import MIXED
from crab.study.loop import last_checkpoint

if TYPE_CHECKING:
    from crab.study.cells import Cell
    from crab.study.store import Store

JOB, LOG = "job.pickle", "log.txt"
_PARENT = "CRAB_PARENT"  # environment variable with the number of the process that started the launch


def check(store: Store, cell: Cell, processes: int) -> None:
    """ValueError, naming the parameter, if this machine cannot train a cell on this number of processes."""
    hardware = store.hardware
    last_checkpoint(store.folder(cell), hardware.note(store.batch_size, processes))
    if processes > 1:
        cached = all(map(store.cached, cell.slots))
        hardware.check(store.batch_size, store.precision, cached, torch.cuda.device_count())


def launch(store: Store, cell: Cell) -> None:
    """Run a cell on ``store.hardware.processes`` processes, and show what the first of them prints.

    RuntimeError if they fail, with the end of what they printed; all of it is in ``log.txt`` of the cell's folder.
    """
    folder = store.folder(cell)
    write_job(folder / JOB, store, cell)
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
        "--num_processes", str(hardware.processes), "--mixed_precision", MIXED[store.precision], *module,
    ]  # fmt: skip


def environment(store: Store) -> dict[str, str]:
    """Environment variables of the processes. Those that Accelerate's launcher would set are set here for CPUs."""
    if torch.cuda.is_available():
        return {}
    threads = max(1, (os.cpu_count() or 1) // store.hardware.processes)
    precision = MIXED[store.precision]
    return {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": precision, "OMP_NUM_THREADS": str(threads)}


def _end_with(parent: int) -> None:
    """End this process once the launcher, or the process that called `launch`, is gone: killed, they cannot stop it."""
    end = partial(os._exit, 1)  # at once: the main thread works on a result that nobody waits for
    try:
        above = [psutil.Process(parent), psutil.Process(os.getppid())]
    except psutil.NoSuchProcess:
        end()
    when_ended(above, end, "end-with-parent")


def write_job(job: Path, store: Store, cell: Cell) -> None:
    """Write a store and a cell for `read_job`."""
    with atomic_file(job) as path:
        path.write_bytes(pickle.dumps((replace(store), cell)))  # a new store, which has read no file yet


def read_job(job: str | Path) -> tuple[Store, Cell]:
    """The store and the cell that `write_job` wrote to a file."""
    return pickle.loads(Path(job).read_bytes())


def main(job: str) -> None:
    """What each process runs."""
    from crab.study.run import run_cell

    if _PARENT in os.environ:
        _end_with(int(os.environ[_PARENT]))
    # It chooses the GPU of this process. Processes wait for each other until the last has answered its share.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
    store, cell = read_job(job)
    if state.num_processes != store.hardware.processes:
        raise ValueError(
            f"shared.hardware.processes is {store.hardware.processes}, but Accelerate started {state.num_processes}"
        )
    run_cell(store, cell)
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
