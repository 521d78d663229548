"""A cell is one adapter: what is trained, on what, and how. The study is a list of cells and comparisons of them.

Cells are plain descriptions; :mod:`crab.study.store` trains, answers and scores them. Two cells with the same
description, whatever they are called, are trained once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from crab import tasks
from crab.core.files import read_json, write_json

SETTINGS = ("single", "joint")
ORDERS = ("media", "instruction")  # what comes first in a prompt
METHODS = ("lora", "ilora")
#: Fields that name a cell, and do not change what is trained.
_LABELS = ("family", "key")


def is_rate(value: Any) -> bool:
    """Whether a value is a learning rate: a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclass(frozen=True)
class Cell:
    """One adapter to train and score. ValueError, naming the cell and the field, on what cannot be trained.

    Args:
        family: the row of a table that the cell belongs to, e.g. ``joint-ilora-explicit``. Cells of one family differ
            in slots and seed only.
        method: ``lora`` or ``ilora``.
        options: of the PEFT config (``r``, ``lora_alpha``, ``num_heads``, ...), and three of our own. ``router_rate``:
            how much faster the routers of I-LoRA learn. ``targets``: what is adapted, ``language`` (by default) or
            ``published`` (`crab.study.train.adapter_config`). ``weights``: a published adapter in place of training
            (`crab.study.imported`).
        learning_rate: peak of the cosine schedule.
        slots: trained on, in this order. Those with a test split are scored.
        passes: over the training samples of every slot.
        seed: of the initial weights and of the order of the samples.
        form: ``bare`` (tagged answer alone) or ``explicit`` (reasoning, then tagged answer).
        held_out: 0 trains on all training samples and scores on the test split. Otherwise the last ``held_out``
            training samples of each slot are not trained on, and are scored.
        samples: train on the first ``samples`` of each slot; None for all.
        order: ``media`` before the instruction, as the base has learned it, or ``instruction`` first.
        words: one word per labelling convention (:mod:`crab.study.prompts`); empty for the slots as they are.
        convention: train and score on this one of ``words`` alone; None for all of them.
        base_steps: train on a weaker base (`crab.models.base.weaker`), whose language training stopped at this step;
            None for the finished base.
        key: digest of all that decides the training, once a store has computed it.
    """

    family: str
    method: str
    options: Mapping[str, Any]
    learning_rate: float
    slots: tuple[str, ...]
    passes: int
    seed: int = 0
    form: str = "bare"
    held_out: int = 0
    samples: int | None = None
    order: str = "media"
    words: tuple[str, ...] = ()
    convention: int | None = None
    base_steps: int | None = None
    key: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        known = (("method", METHODS), ("form", tasks.FORMS), ("order", ORDERS))
        for name, values in known:
            if getattr(self, name) not in values:
                raise ValueError(
                    f"cell {self.family}: {name} is {getattr(self, name)!r}; use one of {', '.join(values)}"
                )
        if not is_rate(self.learning_rate):
            raise ValueError(f"cell {self.family}: learning_rate is {self.learning_rate!r}; give a number above 0")
        for name, least in (("passes", 1), ("held_out", 0), ("seed", 0), ("samples", 1), ("base_steps", 1)):
            value = getattr(self, name)
            if name in ("samples", "base_steps") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"cell {self.family}: {name} is {value!r}; give a whole number of at least {least}")
        if self.words and (self.form, self.order) != ("bare", "media"):
            raise ValueError(f"cell {self.family}: conventions (words) take bare answers and the media first only")
        if not self.scored_slots:
            raise ValueError(
                f"cell {self.family}: no slot of {list(self.slots)} has a test split, so nothing can be scored"
            )

    @property
    def name(self) -> str:
        """``<family>[-<slot>][-seed<k>]``: the slot where there is one only, the seed unless it is 0."""
        slot = [self.slots[0]] if len(self.slots) == 1 else []
        seed = [f"seed{self.seed}"] if self.seed else []
        return "-".join([self.family, *slot, *seed])

    @property
    def scored_slots(self) -> list[str]:
        """The slots that have a test split: benchmarks."""
        return [slot for slot in self.slots if tasks.get_slot(slot).test]

    @property
    def split(self) -> str:
        """The split on disk that holds the scored samples."""
        return "train" if self.held_out else "test"

    @property
    def training(self) -> dict[str, Any]:
        """All fields that decide what is trained, as JSON holds them."""
        values = {name: value for name, value in asdict(self).items() if name not in _LABELS}
        if self.base_steps is None:  # so that cells from before there were weaker bases keep their keys
            del values["base_steps"]
        options = dict(sorted(self.options.items()))
        if options.get("weights"):
            options["weights"] = Path(options["weights"]).name  # no path of this machine in a result
        return {**values, "options": options, "slots": list(self.slots), "words": list(self.words)}


def cells_of(
    family: str, setting: str, method: str, options: Mapping[str, Any], rate: float, slots: Sequence[str], passes: int,
    seeds: Iterable[int], **fields: Any,
) -> list[Cell]:  # fmt: skip
    """Cells of one family: one per seed, and in the ``single`` setting one per benchmark and seed.

    ``setting`` is ``single`` (one slot each) or ``joint`` (all slots together), ``fields`` are further ones of `Cell`.
    """
    if setting not in SETTINGS:
        raise ValueError(f"{family}: setting is {setting!r}; use {' or '.join(SETTINGS)}")
    groups = [tuple(slots)]
    if setting == "single":
        groups = [(slot,) for slot in slots if tasks.get_slot(slot).test]
    return [Cell(family, method, options, rate, group, passes, seed, **fields) for seed in seeds for group in groups]


def families_of(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The families that ``train.methods`` of params.yaml asks for, in its order.

    Returns by ``<setting>-<name of the method>-<form>``: ``setting``, ``form``, ``method`` (``lora`` or ``ilora``, with
    which the name starts, or ValueError) and ``options`` of its PEFT config.
    """
    families = {}
    for name, section in methods.items():
        method = next((known for known in METHODS if name.startswith(known)), None)
        if method is None:
            raise ValueError(f"train.methods.{name}: unknown method; its name must start with {' or '.join(METHODS)}")
        options = {option: value for option, value in section.items() if option != "runs"}
        for run in section["runs"]:
            setting, _, form = run.partition("-")
            families[f"{setting}-{name}-{form}"] = {
                "setting": setting,
                "form": form,
                "method": method,
                "options": options,
            }
    return families


def write_cells(path: str | Path, cells: Sequence[Cell]) -> None:
    """Write cells as JSON, for later stages."""
    write_json(path, [asdict(cell) for cell in cells])


def read_cells(path: str | Path) -> list[Cell]:
    """Cells that `write_cells` wrote. ValueError if the file is missing or holds something else."""
    names = {entry.name for entry in fields(Cell)}
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == names for row in rows):
        raise ValueError(f"{path}: not a list of cells; run the train stage again")
    return [Cell(**{**row, "slots": tuple(row["slots"]), "words": tuple(row["words"])}) for row in rows]


def joint(cells: Sequence[Cell], method: str, form: str) -> Cell:
    """The joint cell of lowest seed of a method of ``train.methods``, with this form of answer if there is one.

    ValueError if the method has no joint cell.
    """
    families = {f"joint-{method}-{name}": name for name in tasks.FORMS}
    if not any(cell.family in families for cell in cells):
        raise ValueError(f"no joint cell of {method}; add joint-{form} to train.methods.{method}.runs")
    matching = [cell for cell in cells if cell.family in families]
    return min(matching, key=lambda cell: (families[cell.family] != form, cell.seed))
