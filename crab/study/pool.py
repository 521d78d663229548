"""Independent jobs in worker processes, which share the cores evenly among them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from crab.data.workers import end_with_parent

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

#: Workers that wait for further jobs, by their number. To import torch, transformers and peft takes each of them as long as a
#: short job, and a map or an ablation runs dozens of lists of jobs.
_POOLS: dict[int, ProcessPoolExecutor] = {}


def _start(threads: int) -> None:
    end_with_parent()
    # An interrupt reaches workers too, also whenever a notebook's kernel ends. They end without a word, a job as by an error.
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    import torch

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, lambda *_: sys.exit())


def run_pool(jobs: Sequence[tuple[str, Callable[[], Any]]], workers: int, label: str) -> dict[str, Any]:
    """Run named jobs, started in the order given, with a progress bar.

    Args:
        jobs: name and picklable callable without arguments.
        workers: processes, each with ``cores // workers`` threads. They are kept for the next call and end with this
            process. One worker, or one job, runs here.
        label: stands before the progress bar and in errors.

    Returns:
        Results by name, in the order of the jobs.

    Raises:
        ValueError: on no workers or on two jobs of one name.
        RuntimeError: naming the job that failed; jobs not yet started are dropped, those that run are waited for.
    """
    if workers < 1:
        raise ValueError(f"{label}: workers is {workers}; at least 1 is needed")
    names = [name for name, _ in jobs]
    if len(set(names)) != len(names):
        raise ValueError(f"{label}: two jobs have one name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    results: dict[str, Any] = {}
    bar = tqdm(total=len(jobs), desc=label, mininterval=1)
    if workers == 1 or len(jobs) < 2:
        for name, job in jobs:
            try:
                results[name] = job()
            except Exception as error:
                raise RuntimeError(f"{label} {name} failed: {error}") from error
            bar.update()
        bar.close()
        return results

    threads = max(1, (os.cpu_count() or 1) // workers)
    # Read by the numeric libraries when a spawned worker first imports them.
    kept = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update({name: str(threads) for name in THREAD_VARIABLES})
    if workers not in _POOLS:
        _POOLS[workers] = ProcessPoolExecutor(workers, get_context("spawn"), _start, (threads,))
    try:
        futures = {_POOLS[workers].submit(job): name for name, job in jobs}
        for future in as_completed(futures):
            name = futures[future]
            try:
                results[name] = future.result()
            except Exception as error:
                raise RuntimeError(f"{label} {name} failed: {error}") from error
            bar.set_postfix_str(name)
            bar.update()
    except BaseException:  # an interrupt too: whoever calls next gets workers that do nothing else
        _POOLS.pop(workers).shutdown(cancel_futures=True)
        raise
    finally:
        bar.close()
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return {name: results[name] for name in names}  # in the order of the jobs, not of their ends
