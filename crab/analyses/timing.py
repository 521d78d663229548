"""Times of contenders side by side, and how sure their ratios are.

Contenders run in turn, so that whatever slows the machine slows them all. A ratio is the median over repetitions of two
times from the same repetition.
"""

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crab.study.train import native_bf16

Step = Callable[[int], Iterator[None]]
RESAMPLES = 500  # of an interval
SHORT = 0.1  # seconds of one repetition of all contenders
WARM = 3  # untimed runs of a contender after one of another kind, where repetitions are short


def interleaved(
    steps: Mapping[Hashable, Step], seconds: float, device: str = "cpu", least: int = 5, by_wall: bool = False
) -> dict[Hashable, np.ndarray]:
    """Seconds [parts, repetitions] of contenders in turn, one of each per repetition, and each time another one first.

    In a model, a layer follows others of its kind and finds their code in the caches of the processor. So if a
    repetition takes no more than `SHORT` seconds, each contender runs `WARM` times before it is timed.

    Args:
        steps: generator functions of the number of the repetition (-1 is the warm-up). They yield at the end of each
            part to be timed; what follows the last yield is not timed.
        seconds: repetitions stop after this time, but not before there are ``least``.
        by_wall: time by the wall clock, as is done with several threads and on CUDA. Otherwise the time of this thread
            counts, so that other processes do not.
    """
    on_gpu = device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    clock = time.perf_counter if by_wall or on_gpu or torch.get_num_threads() > 1 else time.thread_time
    names, times = list(steps), {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.disable()  # a collection would count for the contender that runs
    try:
        end, n, short = time.perf_counter() + seconds, -1, False
        while n < least or (n < 2000 and time.perf_counter() < end):
            first, turn = n % len(names), 0.0
            for name in names[first:] + names[:first]:
                for _ in range(1 + WARM if short else 1):
                    marks, running = [], steps[name](n)
                    wait()
                    begin = clock()
                    for _ in running:
                        wait()
                        marks.append(clock() - begin)
                if n >= 0:
                    times[name].append(np.diff(marks, prepend=0))
                turn += marks[-1]
            if n < 0:
                short, end = turn <= SHORT, time.perf_counter() + seconds
            n += 1
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(rows).T for name, rows in times.items()}


def quartiles(seconds: np.ndarray) -> dict[str, float]:
    """Median and quartiles, as columns of a table."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return {"seconds": middle, "q1": low, "q3": high, "repetitions": len(seconds)}


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """Median of the ratios of paired times, with its 95% bootstrap interval over repetitions."""
    ratios = above / below
    draws = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975], method="inverted_cdf")
    return {"value": float(np.median(ratios)), "low": float(low), "high": float(high)}


def formats(dtypes: Sequence[str], device: str) -> list[str]:
    """The number formats that a device computes natively. Times of an emulated one tell of the emulation."""
    return [dtype for dtype in dtypes if dtype != "bfloat16" or native_bf16(device)]


def machine(threads: int) -> dict[str, Any]:
    """Set torch's threads, and tell what the times depend on."""
    torch.set_num_threads(threads)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "")
    return {
        "CPU": name[1].strip() if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads used": torch.get_num_threads(),
        "bfloat16 on the CPU": "measured" if formats(["bfloat16"], "cpu") else "emulated, so not measured",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__.partition("+")[0],
    }
