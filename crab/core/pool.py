"""Independent jobs in worker processes that share the cores evenly."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from crab.core.workers import end_with_parent

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

#: Workers that wait for more jobs, by their number and their GPUs. Importing torch, transformers and peft takes a
#: worker as long as a short job does, and a study runs dozens of lists of jobs.
_POOLS: dict[tuple, ProcessPoolExecutor] = {}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]


def _start(threads: int, gpus: Any) -> None:
    end_with_parent()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()  # before CUDA starts in this process
    # An interrupt also reaches workers whenever a notebook's kernel ends. They end silently.
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    import torch

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, lambda *_: sys.exit())


def give_back_memory() -> None:
    """Give freed memory back to the system. glibc keeps it, which after a training is gigabytes, and more each time.

    Python's own collector is not asked for: once torch is loaded it takes a second, and this a hundredth of one.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _run(job: Callable[[], Any]) -> Any:
    try:
        return job()
    finally:
        give_back_memory()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, processes that are started give their numeric libraries ``count`` threads."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update({name: str(count) for name in THREAD_VARIABLES})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _pool(workers: int, threads: int, gpus: Sequence[str]) -> ProcessPoolExecutor:
    context, free = get_context("spawn"), None
    if gpus:
        free = context.SimpleQueue()
        for gpu in gpus:
            free.put(gpu)
    return ProcessPoolExecutor(workers, context, _start, (threads, free))


def run_pool(jobs: Sequence[tuple[str, Callable[[], Any]]], workers: int, label: str) -> dict[str, Any]:
    """Run named jobs, started in the order given, with a progress bar.

    Args:
        jobs: name and picklable callable without arguments.
        workers: processes. With GPUs, at most one for each: each has one of its own. They have
            ``cores // workers`` threads each, so that a job gives the same numbers whatever runs beside it. They stay
            for the next call and end with this process. One worker is this process.
        label: stands before the progress bar and in errors.

    Returns:
        Results by name, in the order of the jobs.

    Raises:
        ValueError: no workers, or two jobs of one name.
        RuntimeError: naming the job that failed. Jobs that run are waited for; the others are dropped.
    """
    names = [name for name, _ in jobs]
    if workers < 1:
        raise ValueError(f"{label}: workers is {workers}; at least 1 is needed")
    if len(set(names)) != len(names):
        raise ValueError(f"{label}: two jobs have one name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    gpus = visible_gpus()[:workers]
    workers = len(gpus) or workers
    results: dict[str, Any] = {}

    def collect(name: str, job: Callable[[], Any]) -> None:
        try:
            results[name] = job()
        except Exception as error:
            raise RuntimeError(f"{label} {name} failed: {error}") from error
        bar.set_postfix_str(name)
        bar.update()

    with tqdm(total=len(jobs), desc=label, mininterval=1) as bar:
        if workers == 1 or not jobs:
            for name, job in jobs:
                collect(name, partial(_run, job))
            return results
        threads = max(1, (os.cpu_count() or 1) // workers)
        with _threads(threads):
            kind = (workers, *gpus)
            if kind not in _POOLS:
                _POOLS[kind] = _pool(workers, threads, gpus)
            try:
                futures = {_POOLS[kind].submit(_run, job): name for name, job in jobs}
                for future in as_completed(futures):
                    collect(futures[future], future.result)
            except BaseException:  # an interrupt too: the next call gets fresh workers
                _POOLS.pop(kind).shutdown(cancel_futures=True)
                raise
    return {name: results[name] for name in names}
