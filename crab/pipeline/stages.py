"""What each stage depends on, besides its data: its notebook's code, the modules that this imports, and its parameters.

The DVC stage `resolve` writes this to ``.stage/<stage>.json``, so a stage reruns when this file changes, and not when
outputs, prose, comments or other modules do. ``.stage/report.json`` is the same for the report, with the prose.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crab import tasks
from crab.core.code import modules, modules_of, plain
from crab.core.files import atomic_folder, clear_unfinished, digest_of, write_json
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
    templates = {path.name: digest_of(path.read_text(encoding="utf-8")) for path in sorted(TEMPLATES.rglob("*.*"))}
    files["report"] = {"modules": modules_of(["crab.pipeline.report"]), "templates": templates, "prose": prose}
    clear_unfinished(folder, deep=False)
    with atomic_folder(folder / FOLDER) as out:
        for name, content in files.items():
            write_json(out / f"{name}.json", content)
