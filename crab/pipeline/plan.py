"""The plan of a profile: what its cells take, from params.yaml, before anything runs."""

from pathlib import Path
from typing import Any

import pandas as pd

from crab.pipeline import params
from crab.pipeline.paths import Paths
from crab.study.footprint import read_base
from crab.study.hardware import Hardware
from crab.study.plan import Machine, Plan, counts_of

SHOWN = [
    "family", "cell", "seeds", "processes", "micro_batch", "longest", "samples", "steps", "adapter_parameters", "gib",
    "gib_with_checkpointing", "gib_without", "checkpoints_gb", "hours",
]  # fmt: skip


def plan_of(
    folder: Path, profile: str, machine: dict[str, Any] | None = None, **changes: Any
) -> tuple[Plan, list[str]]:
    """The plan of a profile, and what it assumes.

    Args:
        machine: arguments of `Machine` in place of what is found here. changes: fields of `Plan` in place of the
            profile's.

    Raises:
        ValueError: params.yaml is wrong; base or data cannot be read.
    """
    values, paths = params.resolve(folder, profile), Paths(profile)
    build, encode, train, shared = (values[name] for name in ("build", "encode", "train", "shared"))
    base = read_base(values["base"]["checkpoint"] or paths.models / values["base"]["folder"])
    counts, note = counts_of(build, paths.dataset)
    fields = {"base": base, "counts": counts, "real": build["source"] != "generated"}
    fields |= {name: train[name] for name in ("methods", "passes", "seeds")}
    fields |= {name: shared[name] for name in ("batch_size", "precision", "answer")}
    fields |= {name: encode[name] for name in ("slots", "cache", "compatibility")}
    fields |= {"hardware": Hardware(**shared["hardware"]), **changes}
    place = Machine.here(paths.encoded, base.size == 2, fields["hardware"].workers, **machine or {})
    return Plan(machine=place, **fields), [text for text in (base.note, note) if text]


def text(plan: Plan, notes: list[str]) -> str:
    """A plan for a terminal: what it assumes, one line per cell, and the totals."""
    machine = plan.machine
    speed = f"{machine.mfu:.0%} of {machine.tflops:g} TFLOP/s"
    if machine.samples_per_second:
        speed = f"{machine.samples_per_second:g} samples/s"
    memory = f"each process has {machine.memory_gib:.1f} GiB and reaches {speed}"
    there = f"{memory}; {machine.disk_gb:,.0f} GB of disk are free"
    table = pd.DataFrame(plan.rows())[SHOWN].to_string(index=False, float_format="{:,.2f}".format)
    totals = ", ".join(f"{name.replace('_', ' ')} {value:,.1f}" for name, value in plan.totals().items())
    base = f"base: {plan.base.parameters / 1e6:,.1f} million parameters"
    return "\n".join([*(f"note: {note}" for note in notes), base, there, table, f"all cells: {totals}"])
