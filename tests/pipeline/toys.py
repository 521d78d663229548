"""A clone of this repository with toy notebooks: the real dvc.yaml, params.yaml and runner, one second per stage."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from crab.pipeline import params
from crab.pipeline.params import STAGES
from crab.pipeline.schema import SECTIONS

REPOSITORY = Path(__file__).resolve().parents[2]

#: What each toy stage writes besides its report: files by path, as an expression of ``paths``.
FILES = {
    "build": 'paths.dataset / "manifest.json", paths.vocabulary, paths.dataset / "clip.mp4"',
    "base": "paths.models / folder / 'config.json',",
    "encode": 'paths.encoded / "manifest.json", paths.encoded / "ave.safetensors"',
    "train": 'paths.adapters / "joint-toy-bare" / "record.json", paths.train_cells, paths.ledger',
    "evaluate": "paths.ledger,",
}
WORK = """
from crab.core.files import write_json
from crab.models.checkpoint import write_pointer
from crab.pipeline.paths import Paths
paths = Paths(profile)
for path in ({files}):
    write_json(path, {{"toy": "{stage} made this"}})
if "{stage}" == "base":
    write_pointer(paths.base_pointer, paths.models / folder)
write_json(paths.report("{stage}") / "metrics.json", {{"score": 0.5, "joint-toy-bare": {{"mean_difference": 0.12345}}}})
"""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FIGURE = """
import base64
from IPython.display import Image
pixel = "{pixel}"
paths.figures("{stage}").mkdir(parents=True, exist_ok=True)
(paths.figures("{stage}") / "pixel.png").write_bytes(base64.b64decode(pixel))
Image(data=base64.b64decode(pixel))
"""
RESULT = 'from IPython.display import Markdown\nMarkdown("**joint gains on 3 of 4**")'


def code(source: str, *tags: str):
    return new_code_cell(source.strip(), metadata={"tags": list(tags)} if tags else {})


def write_notebook(folder: Path, stage: str, values: dict, *cells) -> Path:
    """A notebook of ``stage`` whose parameters cell holds ``values``."""
    parameters = code("\n".join(f"{k} = {v!r}" for k, v in values.items()), "parameters")
    path = folder / "notebooks" / f"{STAGES.index(stage) + 1:02}_{stage}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# Toy {stage}"), parameters, *cells]), path)
    return path


def write_notebooks(folder: Path) -> None:
    """Toy notebooks of all stages, with the default parameters."""
    for stage in STAGES:
        values = dict.fromkeys(["profile", *SECTIONS[stage], *(["resamples"] if stage == "evaluate" else [])])
        work = code(WORK.format(stage=stage, files=FILES.get(stage, "")))
        results = [code(FIGURE.format(stage=stage, pixel=PIXEL), "leading"), code(RESULT, "answer")]
        write_notebook(folder, stage, values, work, *results)
    params.write_defaults(folder)


def clone(folder: Path) -> Path:
    """Copy what git tracks or would track of this working tree to ``folder``, as a fresh repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, check=True, capture_output=True, encoding="utf-8",
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    sh(folder, "git", "init", "-q", "-b", "main")
    return commit(folder)


def commit(folder: Path) -> Path:
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "a state")
    return folder


def toy_clone(folder: Path) -> Path:
    """A clone whose notebooks are toys and whose earlier results are gone."""
    clone(folder)
    for name in ("notebooks", "models", "reports"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    write_notebooks(folder)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Commands as a user has them after activating the environment; `crab` is the clone's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "PYTEST_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(folder)}


def sh(folder: Path, *command: str, fails: bool = False, seconds: float = 900) -> str:
    """Run a command in ``folder``; returns its output, and fails the test if it does not end as expected."""
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), timeout=seconds, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def choose(folder: Path, profile: str) -> None:
    sh(folder, "python", "-m", "crab.pipeline", "choose", profile)


def ran(output: str) -> list[str]:
    """Stages that `dvc repro` ran, from its output."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]
