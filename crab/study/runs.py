"""What a run is: one adapter trained in one setting, by one method, on one form of answers.

No torch here, so that scoring and transfer can name runs without loading a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SETTINGS = ("single", "joint")
FORMS = ("bare", "explicit")
METHODS = ("lora", "lora_unrouted", "lora_matched", "ilora")

_NAME = re.compile(
    r"(?P<setting>single|joint)-(?P<method>[a-z0-9_]+)-(?P<form>bare|explicit)"
    r"(?:-(?P<slot>(?!seed\d+$)[a-z0-9_]+))?(?:-seed(?P<seed>\d+))?"
)


@dataclass(frozen=True, order=True)
class Run:
    """One training run.

    Args:
        setting: ``single`` (one slot) or ``joint`` (all slots together).
        method: a key of the ``methods`` section, such as ``lora`` or ``ilora``.
        form: ``bare`` (tagged answer alone) or ``explicit`` (chain, then tagged answer).
        slot: the slot of a single run; None for a joint one.
        seed: seeds the adapter's initial weights and the order of the samples.

    Raises:
        ValueError: on an unknown setting or form, or a slot where none belongs.
    """

    setting: str
    method: str
    form: str
    slot: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"run: setting {self.setting!r} is unknown; use one of {', '.join(SETTINGS)}")
        if self.form not in FORMS:
            raise ValueError(f"run: form {self.form!r} is unknown; use one of {', '.join(FORMS)}")
        if (self.setting == "single") != (self.slot is not None):
            raise ValueError(f"run: a single run needs a slot and a joint one takes none (got {self.slot!r})")

    @property
    def name(self) -> str:
        """``<setting>-<method>-<form>[-<slot>][-seed<k>]``; seed 0 is left out."""
        parts = [self.setting, self.method, self.form]
        if self.slot:
            parts.append(self.slot)
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)

    @property
    def family(self) -> str:
        """The run without its slot and seed, e.g. ``single-lora-bare``: the row of a score table."""
        return f"{self.setting}-{self.method}-{self.form}"

    def slots(self, known: Iterable[str]) -> list[str]:
        """Slots this run trains on and is tested on, out of ``known``."""
        return [self.slot] if self.slot else list(known)

    @classmethod
    def parse(cls, name: str) -> Run:
        """Inverse of `name`. Raises ValueError on anything that is not a run's name."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a run's name; expected <setting>-<method>-<form>[-<slot>][-seed<k>]")
        return cls(
            match["setting"], match["method"], match["form"], match["slot"], int(match["seed"] or 0)
        )


def plan(method: str, rows: Iterable[str], benchmarks: Iterable[str], seeds: Iterable[int] = (0,)) -> list[Run]:
    """Expand rows such as ``single-bare`` and ``joint-explicit`` into runs of one method.

    Args:
        benchmarks: slots with a test split, as `crab.study.dataset.benchmarks` finds them; each has a single run.
            A slot without has none, since there would be no score to compare; joint runs train on it all the same.

    Raises:
        ValueError: when a row is not ``<setting>-<form>``.
    """
    benchmarks, seeds = list(benchmarks), list(seeds)
    runs = []
    for row in rows:
        setting, _, form = row.partition("-")
        for seed in seeds:
            slots = benchmarks if setting == "single" else [None]
            runs += [Run(setting, method, form, slot, seed) for slot in slots]
    return runs
