"""The report of a profile: one page per notebook, and ``index.html``, the front page (`crab.pipeline.front`).

It is rendered from what is in ``reports/<profile>``: executed notebooks, figures and metrics. Pages show the prose and
comments of today's notebooks around the recorded outputs, so a better sentence needs no run. A page opens with what the
notebook asks, what came out, and what would be bad news. What came out is computed by the notebook, in the cell tagged
``answer``. The front page shows the figure of the cell tagged ``leading``.
"""

import ast
import copy
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crab.core.code import plain
from crab.core.files import atomic_file, read_json, write_json
from crab.pipeline import front, outputs, params
from crab.pipeline.params import nbformat
from crab.pipeline.stages import TEMPLATES, code_cells

#: In the order a reader wants them: the result, what it rests on, why, and how it was made.
ORDER = (
    "transfer", "gallery", "strength", "experiments", "mechanism", "evaluate", "routing", "features", "benchmark",
    "base", "train", "encode", "build",
)  # fmt: skip

#: Profile and stage of the figure that every front page shows: where joint training hurts.
EVERYWHERE = ("strength", "strength")


def _tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def answer(notebook: Any) -> tuple[Any, Any] | None:
    """(cell, output): what came out, in words; None if the notebook says nothing, as when a cell failed before."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and _tagged(cell, "answer"):
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    return cell, output
    return None


def opening(notebook: Any) -> list[str]:
    """The first text of a notebook in four parts: title, question, bad news, and the paragraphs between them."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        return ["", "", "", ""]
    title, *rest = [part.strip() for part in first.source.split("\n\n")]
    question = "\n\n".join(part for part in rest if part.startswith("**Question"))
    bad = "\n\n".join(part for part in rest if part.startswith("**Bad news"))
    between = "\n\n".join(part for part in rest if part not in question and part not in bad)
    return [title, question, bad, between]


def _open(notebook: Any) -> None:
    """Move what came out to the top of the page, between question and bad news."""
    title, question, bad, between = opening(notebook)
    if not title:
        return
    markdown, cells = nbformat.v4.new_markdown_cell, []
    if question:
        cells.append(markdown(question))
    if came := answer(notebook):
        cell, output = came
        cell.outputs.remove(output)
        text = output.data["text/markdown"]
        output.data["text/markdown"] = "**What came out.**" + ("\n\n" if text.startswith("- ") else " ") + text
        cells.append(nbformat.v4.new_code_cell("", outputs=[output]))
    if bad:
        cells.append(markdown(bad))
    for cell in cells:
        cell.metadata["tags"] = ["opening"]
    cells = [markdown(title), *cells, *([markdown(between)] if between else [])]
    for number, cell in enumerate(cells):
        cell.id = f"opening-{number}"  # in place of a random one, so that equal results are equal pages
    notebook.cells[:1] = cells


def _join(notebook: Any) -> None:
    """Join code cells that show nothing with the next one, so that a page has one piece of code per output."""
    cells = []
    for cell in notebook.cells:
        before = cells[-1] if cells else None
        if before is not None and before.cell_type == cell.cell_type == "code" and not before.outputs and before.source:
            cell.source = f"{before.source.rstrip()}\n\n\n{cell.source}".rstrip()
            cells.pop()
        cells.append(cell)
    notebook.cells = cells


def _figures(reports: Path, stage: str) -> dict[bytes, str]:
    """Path from the report's folder to each figure of a stage, by the bytes of the PNG."""
    paths = sorted((reports / stage / "figures").glob("*.png"))
    return {path.read_bytes(): path.relative_to(reports).as_posix() for path in paths}


def write_page(notebook: Any, stage: str, reports: Path, stages: Sequence[str] = ()) -> Path:
    """Write the page of a stage with its code folded, and the style sheet beside it; returns the page's path.

    ``stages`` are those that have a page, which this one links to.
    """
    from nbconvert import HTMLExporter

    path, title = reports / "pages" / f"{stage}.html", f"{stage.capitalize()} ({reports.name})"
    notebook = copy.deepcopy(notebook)
    if any(_tagged(cell, "injected-parameters") for cell in notebook.cells):
        # the defaults, which were replaced
        notebook.cells = [cell for cell in notebook.cells if not _tagged(cell, "parameters")]
    _open(notebook)
    _join(notebook)
    heading, figures = title, _figures(reports, stage)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ (.+)", cell.source, re.MULTILINE)][-1]
        for output in cell.get("outputs", []):
            outputs.shown(output, heading, figures, "../")
    settings = {"exclude_input_prompt": True, "exclude_output_prompt": True, "template_name": "page"}
    exporter = HTMLExporter(extra_template_basedirs=[str(TEMPLATES)], **settings)
    pages = {name: name.capitalize() for name in stages}
    resources = {"title": title, "top": "../", "pages": pages, "here": stage}
    with atomic_file(path) as part:
        part.write_text(exporter.from_notebook_node(notebook, resources=resources)[0], encoding="utf-8")
    shutil.copyfile(TEMPLATES / "style.css", path.with_name("style.css"))
    return path


def _without_imports(cells: Sequence[str]) -> list[str]:
    trees = [ast.parse(cell) for cell in cells]
    kept = [[node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)] for tree in trees]
    return [ast.unparse(ast.Module(nodes, [])) for nodes in kept]


def refreshed(run: Any, now: Any, name: str = "notebook") -> Any:
    """The executed notebook ``run`` with the prose, comments, imports and tags of the notebook ``now``.

    If the rest of the code differs it stays as it is: outputs are shown only beside the code that made them. Imports
    may differ, since a module may move.
    """
    injected = [cell for cell in run.cells if _tagged(cell, "injected-parameters")]
    before = nbformat.from_dict({**run, "cells": [cell for cell in run.cells if cell not in injected]})
    if _without_imports(code_cells(before, name)) != _without_imports(code_cells(now, name)):
        return run
    recorded = iter([cell for cell in before.cells if cell.cell_type == "code" and plain(cell.source, cell=True)])
    before.cells = []
    for cell in copy.deepcopy(now.cells):
        before.cells.append(cell)
        if cell.cell_type == "code":
            old = next(recorded) if plain(cell.source, cell=True) else {"outputs": [], "execution_count": None}
            cell.outputs, cell.execution_count = old["outputs"], old["execution_count"]
            if _tagged(cell, "parameters"):
                before.cells += injected
    return before


def headline(transfer: Mapping[str, Any]) -> dict[str, float]:
    """From the metrics of `transfer`, what joint training adds in each joint run: the columns of ``dvc exp show``."""
    means = {name: row.get("mean_difference") for name, row in transfer.items() if isinstance(row, dict)}
    return {name: round(mean, 4) for name, mean in means.items() if mean is not None}


def _entry(stage: str, notebook: Any, figures: Mapping[bytes, str]) -> front.Entry:
    """What the front page says about a notebook."""
    title, question, _, _ = opening(notebook)
    came, leading = answer(notebook), None
    for cell in notebook.cells:
        if _tagged(cell, "leading"):
            drawn = (outputs.shown(copy.deepcopy(o), stage, figures, "") for o in cell.outputs)
            html = "".join(o.get("data", {}).get("text/html", "") for o in drawn)
            leading = next(iter(re.findall(r'href="([^"]+)"', html)), None)
    return front.Entry(
        stage=stage,
        title=title.lstrip("# ") or stage,
        question=question.removeprefix("**Question.**").strip(),
        answer=outputs.for_people(came[1].data["text/markdown"]) if came else "",
        leading=leading,
        **{name: notebook.metadata.get("crab", {}).get(name, 0.0) for name in ("seconds", "peak_gib")},
    )


def _recorded(reports: Path, stage: str, now: Mapping[str, Path]) -> Any:
    """The executed notebook of a stage, `refreshed` from today's, whose path is in ``now``."""
    run = params.read_notebook(reports / stage / "notebook.ipynb")
    return refreshed(run, params.read_notebook(now[stage]), stage)


def _everywhere(folder: Path, now: Mapping[str, Path]) -> tuple[str, front.Entry] | None:
    """The page of `EVERYWHERE` as `crab.pipeline.front.page` takes it; None if its figure is not there."""
    profile, stage = EVERYWHERE
    reports = folder / "reports" / profile
    if not (reports / stage / "notebook.ipynb").is_file():
        return None
    figures = {content: f"../{profile}/{path}" for content, path in _figures(reports, stage).items()}
    entry = _entry(stage, _recorded(reports, stage, now), figures)
    return (f"../{profile}/index.html", entry) if entry.leading else None


def write(folder: Path, profile: str) -> Path:
    """Write ``index.html``, ``pages`` and ``metrics.json``, the `headline`; returns the path of the index.

    ValueError: no notebook of this profile has been executed.
    """
    reports, now = folder / "reports" / profile, params.notebooks(folder)
    stages = [stage for stage in ORDER if (reports / stage / "notebook.ipynb").is_file()]
    if not stages:
        raise ValueError(f"{reports}: no executed notebook; run dvc repro")
    shutil.rmtree(reports / "pages", ignore_errors=True)
    entries = []
    for stage in stages:
        notebook = _recorded(reports, stage, now)
        write_page(notebook, stage, reports, stages)
        entries.append(_entry(stage, notebook, _figures(reports, stage)))
    if (metrics := reports / "transfer" / "metrics.json").is_file():
        write_json(reports / "metrics.json", headline(read_json(metrics)))
    everywhere = None if profile == EVERYWHERE[0] else _everywhere(folder, now)
    with atomic_file(reports / "index.html") as part:
        part.write_text(front.page(entries, reports, folder / "models", everywhere), encoding="utf-8")
    return reports / "index.html"
