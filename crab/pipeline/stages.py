"""What each stage depends on, besides its data: its notebook's code, the modules that this imports, and its parameters.

The DVC stage `resolve` writes this to ``.stage/<stage>.json``, so a stage reruns when this file changes, and not when
outputs, prose, comments or other modules do. ``.stage/report.json`` is the same for the report, with the prose.
"""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crab import tasks
from crab.core.code import modules, modules_of, plain
from crab.core.files import atomic_folder, clear_unfinished, digest_of, read_json, write_json
from crab.models.protocol import MODELS
from crab.pipeline import params

FOLDER = ".stage"
PROTOCOL = "crab/models/protocol.py"
TEMPLATES = Path(__file__).parent / "templates"


def code_cells(notebook: Any, name: str) -> list[str]:
    """The notebook's code as `plain` text, one member per cell. Empty cells and the parameters cell are left out."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])]
    return [text for i, c in enumerate(cells, 1) if (text := plain(c.source, f"{name}, code cell {i}", cell=True))]


def _served_by(base: Mapping[str, Any]) -> list[str]:
    """The modules that may serve a base: its own, or all for a checkpoint, which can be of any kind."""
    own = "crab.models.bridge" if base["bridge"] else "crab.models.omni"
    return [entry.module for entry in MODELS if base["checkpoint"] or entry.module == own]


def _decides_adapters(files: Mapping[str, Mapping]) -> list:
    """What the configurations of all adapters follow from."""
    train, experiments = (files[stage]["parameters"] for stage in ("train", "experiments"))
    options = [train["methods"], *(experiments[name] for name in ("variants", "passes", "seeds", "routed"))]
    return [options, files["train"]["modules"].get("crab/ilora/config.py")]


def _wrong_options(values: Mapping[str, Any]) -> Iterator[str]:
    """What PEFT refuses among the options of adapters, and where it stands."""
    from crab.study.cells import families_of
    from crab.study.train import adapter_config
    from crab.study.variants import expand

    targets, plan = importlib.import_module(_served_by(values["base"])[0]).TARGETS, values["experiments"]
    adapters = [(f"train.methods.{name.split('-')[1]}", family["method"], family["options"])
                for name, family in families_of(values["train"]["methods"]).items()]  # fmt: skip
    rows = expand(plan["variants"], plan["passes"], plan["seeds"])
    adapters += [(f"experiments.variants.{row.name}", row.method, row.options) for row in rows]
    routed = plan["routed"].items()
    adapters += [(f"experiments.routed.{name}", "ilora", {"r": 1, "lora_alpha": 2, **part}) for name, part in routed]
    for place, method, options in adapters:
        try:
            adapter_config(method, options, targets)
        except (ValueError, TypeError) as error:
            yield f"params.yaml, profile {values['profile']}: {place}: {error}"


def resolve(folder: Path) -> None:
    """Check params.yaml and all notebooks, then write ``.stage``. ValueError: what is wrong, and how to fix it."""
    values, files, prose = params.resolve(folder), {}, {}
    for stage, path in params.notebooks(folder).items():
        notebook = params.read_notebook(path)
        cells = code_cells(notebook, path.name)
        used = modules(folder, "\n".join(cells))
        if PROTOCOL in used:  # it imports the module of the base by name, which the code does not show
            used = modules(folder, "\n".join([*cells, *(f"import {name}" for name in _served_by(values["base"]))]))
        files[stage] = {
            "cells": cells,
            "modules": used,
            "parameters": params.parameters(path, notebook, stage, values),
        }
        prose[stage] = digest_of([[c.cell_type, c.source, c.metadata.get("tags")] for c in notebook.cells])
    if prompts := values["encode"]["prompts"]:
        given = tasks.read_prompts(folder / prompts, values["encode"]["slots"] or values["build"]["slots"] or ())
        files["encode"]["prompts"] = {slot: vars(prompt) for slot, prompt in given.items()}
    before = {stage: folder / FOLDER / f"{stage}.json" for stage in ("train", "experiments")}
    known = all(path.is_file() for path in before.values())
    if not known or _decides_adapters({k: read_json(path) for k, path in before.items()}) != _decides_adapters(files):
        if wrong := list(dict.fromkeys(_wrong_options(values))):  # slow, since it loads PEFT
            raise ValueError("\n".join(wrong))
    templates = {path.name: digest_of(path.read_text(encoding="utf-8")) for path in sorted(TEMPLATES.rglob("*.*"))}
    files["report"] = {"modules": modules_of(["crab.pipeline.report"]), "templates": templates, "prose": prose}
    clear_unfinished(folder, deep=False)
    with atomic_folder(folder / FOLDER) as out:
        for name, content in files.items():
            write_json(out / f"{name}.json", content)
