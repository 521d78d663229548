"""A clone of this repository with toy notebooks: the real dvc.yaml, params.yaml and runner, a second a stage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from crab.pipeline import params

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = (
    "build", "base", "encode", "sweep", "train", "evaluate", "transfer", "ablation", "regime", "mechanism", "routing", "features",
    "benchmark",
)  # fmt: skip
A_METHOD = ("sweep", "train")  # stages run once a method

# What each stage leaves besides its report, as an expression of `paths`.
OUTS = {
    "build": "paths.dataset",
    "base": "paths.base",
    "encode": "paths.encoded",
    "train": "paths.adapters(method)",
    "evaluate": "paths.evaluation",
}

WORK = """
from crab.data.files import write_json
from crab.pipeline.paths import Paths
paths = Paths(profile)
name = {name}
write_json({out} / "made.json", {{"by": name, "toy": {toy}}})
if name == "build":
    write_json(paths.vocabulary, {{"words": [], "tags": []}})
if name == "encode":
    write_json(paths.encoded / "provenance.json", {{"toy": {toy}}})
if name == "evaluate":
    for table in "scores.csv", "samples.csv.xz":
        write_json(paths.report(name) / table, {{"toy": {toy}}})
write_json(paths.report(name) / "metrics.json", {{"score": 0.5, "joint-toy-bare": {{"mean_difference": 0.12345}}}})
"""
FIGURE = """
import base64
pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
(paths.figures(name)).mkdir(parents=True, exist_ok=True)
(paths.figures(name) / "pixel.png").write_bytes(base64.b64decode(pixel))
"""


def code(source: str, *tags: str):
    return new_code_cell(source.strip(), metadata={"tags": list(tags)} if tags else {})


def write_notebook(folder: Path, stage: str, values: dict, *cells) -> Path:
    """A notebook whose parameters cell holds ``values``."""
    head = [
        new_markdown_cell(f"# Toy {stage}"),
        code("\n".join(f"{k} = {v!r}" for k, v in values.items()), "parameters"),
    ]
    path = folder / "notebooks" / f"{stage}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=head + list(cells)), path)
    return path


def clone(folder: Path) -> Path:
    """Copy what git tracks or would track of this working tree to ``folder``, as a fresh repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "clone"]):
        sh(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", *command)
    return folder


def toy_clone(folder: Path) -> Path:
    """A clone whose notebooks are toys and whose earlier results are gone."""
    clone(folder)
    for name in ("notebooks", "models", "reports"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    loaded = params.load(folder)
    for stage in STAGES:
        values = params.section(loaded, "tiny", stage, "lora" if stage in A_METHOD else None)
        name = f'"{stage}-" + method' if stage in A_METHOD else repr(stage)
        work = WORK.format(name=name, out=OUTS.get(stage, "paths.report(name)"), toy=f'"{stage} made this"')
        result = 'from IPython.display import Markdown\nMarkdown("**joint gains on 3 of 4**")'
        write_notebook(folder, stage, values, code(work), code(FIGURE), code(result, "result"))
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Commands as a user has them after activating the environment; `crab` is the clone's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "PYTEST_"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    kept["PYTHONPATH"] = str(folder)
    return kept


def sh(folder: Path, *command: str, fails: bool = False, seconds: float = 900) -> str:
    """Run a command in ``folder``; returns what it said, and fails the test when it did not end as expected."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), timeout=seconds,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def ran(said: str) -> list[str]:
    """Stages that `dvc repro` ran, out of what it said."""
    return [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage '")]
