"""The report of a profile: ``index.html``, which starts with the result, and one page per notebook.

It is rendered from what is in ``reports/<profile>``: executed notebooks, figures, and the metrics of `transfer`. The
front page shows the outputs of cells tagged ``result``. Pages show the prose and comments of today's notebooks around
the recorded outputs, so a better sentence needs no run.
"""

from __future__ import annotations

import base64
import copy
import re
import shutil
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from crab.core.code import plain
from crab.core.files import atomic_file, read_json, write_json
from crab.pipeline import params
from crab.pipeline.params import nbformat
from crab.pipeline.stages import TEMPLATES, code_cells

#: In the order a reader wants them: the result, what it rests on, why, and how it was made.
ORDER = (
    "transfer", "gallery", "experiments", "mechanism", "evaluate", "routing", "features", "benchmark", "base", "train",
    "encode", "build",
)  # fmt: skip

_LINK = re.compile(r'\b(src|href)="\.\./reports/[\w-]+/')


def _page(notebook: Any, title: str, figures: Mapping[bytes, str], top: str) -> str:
    """A notebook as HTML with its code folded.

    Args:
        figures: path from the report's folder to each figure, by the bytes of the PNG. Other images are embedded.
        top: path from the page to the report's folder, such as ``../``; empty for the front page.
    """
    from nbconvert import HTMLExporter

    notebook, heading = copy.deepcopy(notebook), title
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        # the defaults, which were replaced
        notebook.cells = [cell for cell in notebook.cells if "parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ (.+)", cell.source, re.MULTILINE)][-1]
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png and (path := figures.get(base64.b64decode(png))):
                output.data = {"text/html": f'<img src="{escape(top + path)}" alt="{escape(heading)}" loading="lazy">'}
            elif png:
                output.metadata["image/png"] = {"alt": heading}
            if html := output.get("data", {}).get("text/html"):  # links that hold from the folder of the notebooks
                output.data["text/html"] = _LINK.sub(rf'\1="{top}', html)
    settings = {"exclude_input_prompt": True, "exclude_output_prompt": True, "template_name": "page"}
    exporter = HTMLExporter(extra_template_basedirs=[str(TEMPLATES)], **settings)
    return exporter.from_notebook_node(notebook, resources={"title": title, "top": top})[0]


def _figures(reports: Path, stage: str) -> dict[bytes, str]:
    paths = sorted((reports / stage / "figures").glob("*.png"))
    return {path.read_bytes(): path.relative_to(reports).as_posix() for path in paths}


def write_page(notebook: Any, stage: str, reports: Path) -> Path:
    """Write the page of a stage, with the style sheet beside it; returns the page's path."""
    path = reports / "pages" / f"{stage}.html"
    with atomic_file(path) as part:
        part.write_text(_page(notebook, f"{stage} ({reports.name})", _figures(reports, stage), "../"), encoding="utf-8")
    shutil.copyfile(TEMPLATES / "style.css", path.with_name("style.css"))
    return path


def refreshed(run: Any, now: Any, name: str = "notebook") -> Any:
    """The executed notebook ``run`` with the prose, comments and tags of the notebook ``now``.

    If the code differs it stays as it is: outputs are shown only beside the code that made them.
    """
    injected = [cell for cell in run.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    before = nbformat.from_dict({**run, "cells": [cell for cell in run.cells if cell not in injected]})
    if code_cells(before, name) != code_cells(now, name):
        return run
    recorded = iter([cell for cell in before.cells if cell.cell_type == "code" and plain(cell.source, cell=True)])
    before.cells = []
    for cell in copy.deepcopy(now.cells):
        before.cells.append(cell)
        if cell.cell_type == "code":
            old = next(recorded) if plain(cell.source, cell=True) else {"outputs": [], "execution_count": None}
            cell.outputs, cell.execution_count = old["outputs"], old["execution_count"]
            if "parameters" in cell.metadata.get("tags", []):
                before.cells += injected
    return before


def _front(notebooks: Mapping[str, Any], profile: str) -> Any:
    """The front page as a notebook: results of each stage, then what each stage cost."""
    markdown, words = nbformat.v4.new_markdown_cell, (TEMPLATES / "words.md").read_text(encoding="utf-8")
    cells = [markdown(f"# The Crab+ study, profile `{profile}`\n\n{words}")]
    rows = ["## All notebooks\n", "| notebook | last execution | peak memory |", "|---|---:|---:|"]
    for name, notebook in notebooks.items():
        cost = notebook.metadata.get("crab", {})
        seconds, memory = cost.get("seconds", 0.0), cost.get("peak_gib", 0.0)
        rows.append(f"| [{name}](pages/{name}.html) | {seconds:.0f} s | {memory:.2f} GiB |")
        results = [c for c in notebook.cells if c.cell_type == "code" and "result" in c.metadata.get("tags", [])]
        outputs = [o for c in results for o in c.outputs if o.output_type in ("display_data", "execute_result")]
        if outputs:
            cells.append(markdown(f"## {name.capitalize()}\n\n[How it was made](pages/{name}.html)"))
            cells.append(nbformat.v4.new_code_cell("", outputs=outputs))
    rows.append("\nA notebook whose results were there, trained adapters for example, took only the time to read them.")
    cells.append(markdown("\n".join(rows)))
    for number, cell in enumerate(cells):
        cell.id = f"index-{number}"  # in place of a random one, so that equal results are equal pages
    return nbformat.v4.new_notebook(cells=cells)


def headline(transfer: Mapping[str, Any]) -> dict[str, float]:
    """From the metrics of `transfer`, what joint training adds in each joint run: the columns of ``dvc exp show``."""
    means = {name: row.get("mean_difference") for name, row in transfer.items() if isinstance(row, dict)}
    return {name: round(mean, 4) for name, mean in means.items() if mean is not None}


def write(folder: Path, profile: str) -> Path:
    """Write ``index.html``, ``pages`` and ``metrics.json``, the `headline`; returns the path of the index.

    Raises:
        ValueError: no notebook of this profile has been executed.
    """
    reports, now = folder / "reports" / profile, params.notebooks(folder)
    stages = [stage for stage in ORDER if (reports / stage / "notebook.ipynb").is_file()]
    if not stages:
        raise ValueError(f"{reports}: no executed notebook; run dvc repro")
    shutil.rmtree(reports / "pages", ignore_errors=True)
    notebooks, figures = {}, {}
    for stage in stages:
        run = params.read_notebook(reports / stage / "notebook.ipynb")
        notebooks[stage] = refreshed(run, params.read_notebook(now[stage]), stage)
        figures |= _figures(reports, stage)
        write_page(notebooks[stage], stage, reports)
    if (metrics := reports / "transfer" / "metrics.json").is_file():
        write_json(reports / "metrics.json", headline(read_json(metrics)))
    with atomic_file(reports / "index.html") as part:
        part.write_text(_page(_front(notebooks, profile), f"Crab+ ({profile})", figures, ""), encoding="utf-8")
    return reports / "index.html"
