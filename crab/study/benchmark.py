"""Time things side by side, say how sure their ratios are, and hold them against what they were built to reach.

What is measured lies beside: `crab.study.benchmark_layer`, `crab.study.benchmark_model`, `crab.study.benchmark_data`.
Each gives a table of costs and one of ratios; the latter's columns are `RATIO`.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from crab.data.files import atomic_file, write_json
from crab.study.train import native_bf16

Step = Callable[[int], Iterator[None]]
SHORT = 0.1  # seconds of one repetition of all contenders
WARM = 3  # runs of a contender that follow one of another kind and are not timed

#: part: layer, model or data; where: the sizes; ratio: its name; value, with a 95 % interval from low to high;
#: roofline: the value if every operation of I-LoRA ran at the machine's own speed (of data: as PyAV's), where that is known;
#: plain: the value if I-LoRA took the time that plain LoRA of its rank does, where that was measured
RATIO = ["part", "device", "dtype", "where", "ratio", "value", "low", "high", "roofline", "plain"]


def interleaved(
    steps: Mapping[Hashable, Step], seconds: float, device: str = "cpu", least: int = 5, most: int = 2000, by_wall: bool = False
) -> dict[Hashable, np.ndarray]:
    """Time contenders in turn, one of each a repetition and each time another one first, so that drift hits all alike.

    Where a repetition of all takes no more than `SHORT` seconds, each is run `WARM` times in its turn before it is timed. A layer
    of a model follows others of its kind and finds their code in the processor's caches; after a contender of another kind it
    would not, which at small sizes costs as much as its arithmetic, and more the more calls it makes.

    Args:
        steps: generator functions that get the number of the repetition (-1 is the warm-up, which is not counted).
            They yield at the end of each part to be timed; what they do after the last yield is not timed.
        seconds: repetitions stop when these are over, but not before there are `least`, and at `most`.
        device: a CUDA device is waited for at each yield.
        by_wall: time by the clock on the wall, as is done with several threads and on CUDA. Otherwise the time counts
            that this thread was computing: what other processes take of the core is not the contender's.

    Returns:
        Seconds [parts, repetitions] of each contender, each part from its start.
    """
    on_gpu = device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    clock = time.perf_counter if by_wall or on_gpu or torch.get_num_threads() > 1 else time.thread_time
    names, times = list(steps), {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever runs
    try:
        end, n, short = time.perf_counter() + seconds, -1, False
        while n < least or (n < most and time.perf_counter() < end):
            first, turn = n % len(names), 0.0
            for name in names[first:] + names[:first]:
                for _ in range(1 + WARM if short else 1):
                    marks = []
                    running = steps[name](n)
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
    """Median and quartiles, as columns of a table of costs."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return {"seconds": middle, "q1": low, "q3": high, "repetitions": len(seconds)}


def quotient(above: Hashable, below: Hashable) -> Callable[[Mapping[Hashable, np.ndarray]], np.ndarray]:
    """The median over repetitions (last axis) of one contender's time over another's in the same repetition."""
    return lambda times: np.median(times[above] / times[below], axis=-1)


def quotient_without(base: str, above: str, below: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """The same of what each costs beyond `base`; infinite where `below` costs nothing beyond it."""

    def of(times: Mapping[str, np.ndarray]) -> np.ndarray:
        top, bottom = (np.median(times[name] - times[base], axis=-1) for name in (above, below))
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.inf)

    return of


def estimate(statistic: Callable, times: Mapping[str, np.ndarray], resamples: int = 500) -> dict[str, float]:
    """A ratio and its 95 % bootstrap interval: whole repetitions are drawn, so that pairs stay together.

    Args:
        times: seconds [repetitions] by contender.
    """
    count = len(next(iter(times.values())))
    drawn = np.random.default_rng(0).integers(count, size=(resamples, count))
    spread = statistic({name: seconds[drawn] for name, seconds in times.items()})
    low, high = np.quantile(spread, [0.025, 0.975], method="inverted_cdf")
    return {"value": float(statistic(times)), "low": float(low), "high": float(high)}


def formats(dtypes: Sequence[str], device: str) -> list[str]:
    """Those of ``dtypes`` that a device computes in itself.

    A CPU without bfloat16 emulates it, tens of times slower: such times would tell of the emulation, not of a method.
    """
    return [dtype for dtype in dtypes if dtype != "bfloat16" or native_bf16(device)]


def machine(threads: int) -> dict[str, Any]:
    """Set torch's threads, and tell what the figures depend on."""
    torch.set_num_threads(threads)
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        said = ""
    name = re.search(r"model name\s*: (.+)", said)
    return {
        "CPU": name[1].strip() if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads used": torch.get_num_threads(),
        "bfloat16 on the CPU": "measured" if formats(["bfloat16"], "cpu") else "emulated, so not measured",
        "load before (processes)": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__.partition("+")[0],
    }


def machine_table(facts: Mapping[str, Any], rates: pd.DataFrame) -> pd.DataFrame:
    """`machine` and the best rates seen, a row a fact. `rates`: of `crab.study.benchmark_layer.rates`."""
    rows = {key: str(value) for key, value in facts.items()}
    rows |= {f"{r.device} {r.dtype}: matrix product, best": f"{r.gflops:.0f} GFLOP/s" for r in rates.itertuples()}
    rows |= {f"{r.device} {r.dtype}: memory, best": f"{r.gbytes:.0f} GB/s" for r in rates.itertuples()}
    return pd.DataFrame({"value": rows})


class Target(NamedTuple):
    """What a ratio should reach: at most, or at least, `limit` in all rows of the part that `applies` takes."""

    key: str
    says: str
    part: str
    ratio: str
    limit: float
    at_least: bool = False
    applies: Callable[[pd.DataFrame], pd.Series] = lambda rows: rows["value"].notna()

    @property
    def wanted(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _three(rows: pd.DataFrame) -> pd.Series:
    """The number of heads of the published run."""
    return rows["heads"] == 3


TARGETS = (
    Target("wide", "layer, 576 wide and more, N 3: I-LoRA / LoRA of rank r", "layer", "ilora_over_lora", 1.05,
           applies=lambda rows: _three(rows) & (rows["width_in"] >= 576)),
    Target("narrow", "layer, 128 wide, N 3: I-LoRA / LoRA of rank r", "layer", "ilora_over_lora", 1.15,
           applies=lambda rows: _three(rows) & (rows["width_in"] < 576)),
    Target("matched", "layer: I-LoRA / LoRA of rank N·r", "layer", "ilora_over_wide_lora", 1.0),
    Target("alone_published", "adapter alone, 3584 to 18944, N 3: loop / I-LoRA", "layer", "loop_over_ilora_alone", 2.0, True,
           lambda rows: _three(rows) & (rows["width_out"] == 18944)),
    Target("alone_small", "adapter alone, 128 and 576 wide, N 3: loop / I-LoRA", "layer", "loop_over_ilora_alone", 5.0, True,
           lambda rows: _three(rows) & (rows["width_in"] <= 576)),
    Target("alone_many", "adapter alone, N 16: loop / I-LoRA", "layer", "loop_over_ilora_alone", 8.0, True,
           lambda rows: rows["heads"] == 16),
    Target("kept", "bytes kept for backward: I-LoRA / LoRA of rank r", "layer", "saved_ilora_over_lora", 1.15),
    Target("train", "training step of the model: I-LoRA / LoRA", "model", "train_ilora_over_lora", 1.15),
    Target("decode", "greedy decoding of the model: I-LoRA / LoRA", "model", "decode_ilora_over_lora", 1.15),
    Target("prepare", "preparing a sample / decoding it", "data", "prepare_over_decode", 1.0),
    Target("scale", "decoding and preparing, two workers: one worker / two", "data", "workers_2_over_1", 1.7, True),
    Target("read", "decoding and preparing / PyAV decoding every frame", "data", "both_over_pyav", 1.05),
)  # fmt: skip


def hold(ratios: pd.DataFrame, targets: Sequence[Target] = TARGETS) -> pd.DataFrame:
    """Each ratio that a target is about, with the verdict.

    Returns:
        Columns key, target, device, dtype, where, wanted, value, low, high, roofline, plain, reached, verdict. The verdict says
        *narrowly* where the interval holds the limit too, and of a miss whether I-LoRA would miss at its roofline, or with plain
        LoRA's time, too.
    """
    found = []
    for target in targets:
        rows = ratios[(ratios["part"] == target.part) & (ratios["ratio"] == target.ratio)]
        for row in rows[target.applies(rows).astype(bool)].to_dict("records") if len(rows) else []:
            reached = target.reached(row["value"])
            verdict = "reached" if reached else "missed"
            if row["low"] <= target.limit <= row["high"]:
                verdict += ", narrowly"
            for bound, said in (("roofline", "at the roofline"), ("plain", "at plain LoRA's time")):
                if not reached and pd.notna(row[bound]) and not target.reached(row[bound]):
                    verdict += f", even {said}"
            row |= {"key": target.key, "target": target.says, "wanted": target.wanted, "reached": reached, "verdict": verdict}
            found.append(row)
    names = ["key", "target", "device", "dtype", "where", "wanted", "value", "low", "high", "roofline", "plain", "reached", "verdict"]
    return pd.DataFrame(found, columns=names)


def summary(held: pd.DataFrame) -> pd.DataFrame:
    """A row a target and number format: at how many sizes it was reached, and the worst of them."""
    rows = []
    for (key, target, device, dtype, wanted), group in held.groupby(["key", "target", "device", "dtype", "wanted"], sort=False):
        worst = group.loc[group["value"].idxmin() if wanted[0] == "≥" else group["value"].idxmax()]
        row = {"key": key, "target": target, "device": device, "dtype": dtype, "wanted": wanted}
        row |= {"reached": f"{group['reached'].sum()} of {len(group)}", "median": group["value"].median(), "worst": worst["value"]}
        rows.append(row | {"at": worst["where"]})
    return pd.DataFrame(rows)


def style(table: pd.DataFrame):
    """A table as it is read, two decimals."""
    return table.drop(columns=["key", "reached"] if "verdict" in table else "key").style.hide().format(precision=2, na_rep="")


def write(folder: str | Path, facts: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], held: pd.DataFrame) -> None:
    """Write ``<name>.csv`` of each table, ``machine.json``, and ``metrics.json`` with median and worst ratio of each target."""
    folder = Path(folder)
    for name, table in tables.items():
        with atomic_file(folder / f"{name}.csv") as path:
            table.to_csv(path, index=False, float_format="%.6g")
    write_json(folder / "machine.json", dict(facts))
    metrics: dict[str, Any] = {"reached": int(held["reached"].sum()), "of": len(held)}
    for row in summary(held).itertuples():
        numbers = {name: round(getattr(row, name), 3) for name in ("median", "worst") if np.isfinite(getattr(row, name))}
        metrics.setdefault(row.key, {})[f"{row.device} {row.dtype}".strip()] = numbers
    write_json(folder / "metrics.json", metrics)
