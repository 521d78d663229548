"""The report of a profile: ``index.html``, which leads with the result, and a page for each notebook.

``python -m crab.pipeline.report [--profile P]`` reads only the executed notebooks, and the metrics of `transfer`. A cell tagged ``result`` is
lifted onto the index, outputs only: what the notebook calls its result is shown nowhere else anew. Pages show
the prose and comments of today's notebooks around the recorded outputs, so that mending a sentence runs nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crab.data.files import atomic_file, atomic_folder, read_json, write_json
from crab.pipeline import params
from crab.pipeline.ipynb import nbformat
from crab.pipeline.stage import page
from crab.pipeline.paths import root
from crab.study.code import FOLDER, code_cells

# In the order a reader wants them: the claim, what it rests on, why, and how it was made.
ORDER = (
    "transfer", "ablation", "regime", "mechanism", "evaluate", "routing", "features", "benchmark", "base", "sweep", "train", "encode",
    "build",
)  # fmt: skip
#: What a reader of results must know of their words.
WORDS = """\
A *slot* is one data set's task. A *single* run trains an adapter for one slot, a *joint* run one adapter for all of them, with as
many passes over each slot's samples. *Bare* answers are the tagged answer alone, in *explicit* ones reasons come first. `lora` is
plain LoRA of the rank of I-LoRA's heads, `lora_unrouted` one with as many parameters as I-LoRA without its router, `lora_matched` one with
as many as all of it. A slot *gains* or *loses* where the difference exceeds the margin; a difference is *clear* where its 95 % interval
leaves out zero. Where there is one seed, intervals hold for that seed alone, and another may come out on the other side.
[All findings in words](../README.md).
"""
#: First in a page, which lies in a folder of its own.
BACK = "[The report](../index.html)"


def executed(folder: Path, profile: str) -> dict[str, Any]:
    """Executed notebooks by name, in `ORDER`, others last."""

    def place(name: str) -> tuple[int, str]:
        stage = name.partition("-")[0]
        return (ORDER.index(stage) if stage in ORDER else len(ORDER)), name

    # a killed stage leaves its half-run notebook in a hidden folder
    paths = {p.parent.name: p for p in (folder / "reports" / profile).glob("[!.]*/notebook.ipynb")}
    if not paths:
        raise ValueError(f"reports/{profile}: no executed notebook; run dvc repro")
    return {name: nbformat.read(paths[name], as_version=4) for name in sorted(paths, key=place)}


def refreshed(run: Any, now: Any, name: str = "notebook") -> Any:
    """The executed notebook ``run`` with the prose and comments of ``now``.

    Left as it is where the code differs: outputs are shown only beside the code that made them.
    """
    injected = [c for c in run.cells if "injected-parameters" in c.metadata.get("tags", [])]
    before = [c for c in run.cells if c.cell_type == "code" and c not in injected]
    bare = copy.deepcopy(run)
    bare.cells = before
    if code_cells(bare, name) != code_cells(now, name):
        return run
    result, recorded = copy.deepcopy(now), iter(before)
    result.metadata, result.cells = run.metadata, []
    for cell in now.cells:
        cell = copy.deepcopy(cell)
        result.cells.append(cell)
        if cell.cell_type == "code":
            old = next(recorded)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
            if "parameters" in cell.metadata.get("tags", []):
                result.cells += injected
    return result


def _stages(notebooks: dict[str, Any]) -> str:
    rows = ["| notebook | last execution | peak memory |", "|---|---:|---:|"]
    for name, notebook in notebooks.items():
        cost = notebook.metadata.get("crab", {})
        rows.append(f"| [{name}](pages/{name}.html) | {cost.get('seconds', 0.0):.0f} s | {cost.get('peak_gib', 0):.2f} GiB |")
    rows += ["", "A notebook whose results still stood (the base, the sweeps, adapters, answers, rows of the ablation and points of the maps are",
             "taken over while what decides them is the same) took only as long as it takes to find that; what training took is on its page."]  # fmt: skip
    return "\n".join(rows)


def index(notebooks: dict[str, Any], profile: str) -> Any:
    """The front page as a notebook: results of each stage in `ORDER`, then what each stage cost."""
    cells = [nbformat.v4.new_markdown_cell(f"# The Crab+ study, profile `{profile}`\n\n{WORDS}")]
    for name, notebook in notebooks.items():
        outputs = [
            output
            for cell in notebook.cells
            if cell.cell_type == "code" and "result" in cell.metadata.get("tags", [])
            for output in cell.outputs
            if output.output_type in ("display_data", "execute_result")
        ]
        if outputs:
            cells.append(nbformat.v4.new_markdown_cell(f"## {name.capitalize()}\n\n[How it was made](pages/{name}.html)"))
            cells.append(nbformat.v4.new_code_cell("", outputs=outputs))
    cells.append(nbformat.v4.new_markdown_cell("## All notebooks\n\n" + _stages(notebooks)))
    for number, cell in enumerate(cells):
        cell.id = f"index-{number}"  # in place of a drawn one, so that equal results are equal pages
    return nbformat.v4.new_notebook(cells=cells)


def headline(transfer: Mapping[str, Any]) -> dict[str, float]:
    """Of each joint run what joint training adds, on average over slots: few enough numbers to be columns of ``dvc exp show``.

    Args:
        transfer: metrics of that stage.
    """
    found = {name: values.get("mean_difference") for name, values in transfer.items() if isinstance(values, dict)}
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def write(profile: str | None = None, folder: Path | None = None) -> Path:
    """Write ``index.html``, ``pages`` and ``metrics.json``, the `headline`; returns the index's path."""
    folder = folder or root()
    profile = profile or params.load(folder)["profile"]
    reports = folder / "reports" / profile
    notebooks = executed(folder, profile)
    with atomic_folder(reports / "pages") as pages:
        for name, notebook in notebooks.items():
            now = folder / FOLDER / "notebooks" / f"{name.partition('-')[0]}.ipynb"
            if now.is_file():
                notebook = refreshed(notebook, nbformat.read(now, as_version=4), name)
            notebook.cells.insert(0, nbformat.v4.new_markdown_cell(BACK, id="back"))
            (pages / f"{name}.html").write_text(page(notebook, f"{name} ({profile})"))
    if (measured := reports / "transfer" / "metrics.json").is_file():
        write_json(reports / "metrics.json", headline(read_json(measured)))
    with atomic_file(reports / "index.html") as part:
        part.write_text(page(index(notebooks, profile), f"Crab+ ({profile})", inputs=False))
    return reports / "index.html"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m crab.pipeline.report", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", help="of params.yaml; by default the one chosen there")
    try:
        print(write(parser.parse_args(arguments).profile))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
