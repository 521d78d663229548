"""`dvc repro` from a fresh clone, with toy notebooks: what reruns and what does not."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_markdown_cell, new_output
from toys import choose, clone, code, commit, environment, ran, sh, toy_clone

from crab.core.files import read_json, write_json
from crab.pipeline.params import STAGES
from crab.world.vocabulary import vocabulary

pytestmark = pytest.mark.slow


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A toy clone whose whole pipeline has run, committed as a user would commit it."""
    folder = toy_clone(tmp_path_factory.mktemp("toy"))
    stages = ran(sh(folder, "dvc", "repro"))
    assert sorted(stages) == sorted(["resolve", "report@tiny", *(f"{stage}@tiny" for stage in STAGES)])
    assert stages[0] == "resolve" and stages[-1] == "report@tiny"
    commit(folder)
    assert not {"data", "runs", ".stage"} & {name.split("/")[0] for name in sh(folder, "git", "ls-files").splitlines()}
    return folder


@pytest.fixture
def settled(toy: Path):
    """The toy, all up to date. What a test changes is undone afterwards."""
    yield toy
    sh(toy, "git", "checkout", "-q", ".")
    sh(toy, "dvc", "repro")


@pytest.mark.parametrize("command", ["repro", "status"])
def test_nothing_to_do_takes_little_time(toy, command):
    before = sum(os.times()[2:4])
    assert ran(sh(toy, "dvc", command)) == []
    assert sum(os.times()[2:4]) - before < 5  # seconds of CPU of child processes


def test_outputs_prose_comments_and_strangers_retrain_nothing(settled):
    path = settled / "notebooks/02_base.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = [new_output("stream", text="saved in JupyterLab")]
    nbformat.write(notebook, path)
    (settled / "crab/study/stranger.py").write_text("x = 1\n", encoding="utf-8")
    edit(settled / "crab/core/files.py", '"""Files that', '"""In other words: files that')
    edit(settled / "params.yaml", "# how many", "# the number of them")
    assert ran(sh(settled, "dvc", "repro")) == ["resolve"]

    notebook.cells.append(new_markdown_cell("A better sentence."))
    nbformat.write(notebook, path)
    assert ran(sh(settled, "dvc", "repro")) == ["resolve", "report@tiny"]
    assert "A better sentence" in (settled / "reports/tiny/pages/base.html").read_text(encoding="utf-8")


def test_code_and_parameters_rerun_what_depends_on_them(settled):
    edit(settled / "notebooks/06_transfer.ipynb", "transfer made this", "transfer made that")
    assert ran(sh(settled, "dvc", "repro")) == ["resolve", "transfer@tiny", "report@tiny"]
    edit(settled / "params.yaml", "mechanism: {samples: 4,", "mechanism: {samples: 5,")  # of another profile
    assert ran(sh(settled, "dvc", "repro")) == ["resolve"]
    output = sh(settled, "dvc", "exp", "run", "-S", "train.passes=5")
    assert ran(output) == ["resolve", "train@tiny", "report@tiny"]  # the toy's cells do not change with its passes
    assert read_json(settled / ".stage/train.json")["parameters"]["passes"] == 5
    assert "train.passes" in sh(settled, "dvc", "params", "diff")
    assert "train.passes" in sh(settled, "dvc", "exp", "show", "--only-changed", "--csv")


def test_samples_that_another_processor_rounds_otherwise_retrain_nothing(settled):
    """The numbers differ, and the manifest does not. If that differs, everything after it reruns."""
    write_json(settled / "data/tiny/encoded/ave.safetensors", "rounded otherwise")
    sh(settled, "dvc", "commit", "-f", "encode@tiny")
    assert ran(sh(settled, "dvc", "repro")) == []
    edit(settled / "notebooks/03_encode.ipynb", '{\\"toy\\": \\"encode made', '{\\"toy\\": \\"encode has made')
    assert {"train@tiny", "experiments@tiny"} < set(ran(sh(settled, "dvc", "repro")))


def test_another_profile_and_back_runs_nothing_twice(settled):
    choose(settled, "smoke")
    assert ran(sh(settled, "dvc", "repro", "base", "build")) == ["resolve", "build@smoke", "base@smoke"]
    choose(settled, "tiny")
    assert ran(sh(settled, "dvc", "repro")) == []
    choose(settled, "smoke")
    assert ran(sh(settled, "dvc", "repro", "base", "build")) == []


def test_a_fresh_clone_does_not_train_the_base_unless_it_is_taken_away(toy, tmp_path):
    folder = tmp_path / "clone"
    sh(tmp_path, "git", "clone", "-q", str(toy), str(folder))
    assert ran(sh(folder, "dvc", "repro", "encode")) == ["resolve", "build@tiny", "encode@tiny"]
    weights, pointer = map(Path, sh(folder, "python", "-m", "crab.pipeline", "base").splitlines())
    assert (weights, pointer) == (folder / "models/base", folder / "models/tiny/base.json")
    pointer.unlink()  # as `make repro-all`
    assert ran(sh(folder, "dvc", "repro", "encode")) == ["base@tiny"]


@pytest.mark.parametrize("line_end", ["lf", "crlf"])
def test_the_committed_base_belongs_to_the_code_beside_it(tmp_path, line_end):
    """Else every fresh clone would train it again: run `dvc repro` and commit what it made."""
    folder = clone(tmp_path / "clone")
    for path in [*folder.glob("crab/**/*.py"), *folder.glob("notebooks/*.ipynb"), folder / "params.yaml"]:
        if line_end == "crlf":
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    sh(folder, "dvc", "repro", "resolve")
    write_json(folder / "data/tiny/dataset/vocabulary.json", vocabulary())  # as `build` would: it is always the same
    assert "up to date" in sh(folder, "dvc", "status", "base")


def test_metrics_and_plots_mean_something(settled):
    output = sh(settled, "dvc", "metrics", "show", "--json")
    assert "reports/tiny/metrics.json" in output and '"joint-toy-bare": 0.1235' in output and "score" not in output
    assert '"score": 0.5' in sh(settled, "dvc", "metrics", "show", "--json", "reports/tiny/evaluate/metrics.json")
    sh(settled, "dvc", "plots", "show", "-o", "dvc_plots")
    assert "pixel.png" in (settled / "dvc_plots/index.html").read_text(encoding="utf-8")


def test_a_wrong_parameter_stops_everything_before_anything_is_cleared_away(settled):
    contents = {p: p.read_bytes() for name in ("models", "reports") for p in (settled / name).rglob("*") if p.is_file()}
    path = settled / "params.yaml"
    text = path.read_text(encoding="utf-8")
    for old, new, message in [
        ("held_out: 300", "held_ot: 300", "base.held_ot is unknown; did you mean 'held_out'?"),
        ("margin: 0.02", "margin: -0.02", "shared.margin is -0.02"),
    ]:
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        assert message in sh(settled, "dvc", "repro", fails=True)
        assert {path: path.read_bytes() for path in contents} == contents
    path.write_text(text, encoding="utf-8")
    assert ran(sh(settled, "dvc", "repro")) == []


def test_a_failing_cell_fails_the_stage_and_shows_why(settled):
    edit(settled / "notebooks/09_routing.ipynb", '{\\"score\\": 0.5', '{\\"score\\": 1 / 0')
    output = sh(settled, "dvc", "repro", "routing", fails=True)
    assert "ZeroDivisionError" in output and "pages/routing.html" in output
    assert "ZeroDivisionError" in (settled / "reports/tiny/pages/routing.html").read_text(encoding="utf-8")
    assert not (settled / "reports/tiny/routing/notebook.ipynb").exists()


LONG = """
import os, subprocess, sys, time
from crab.core.files import atomic_folder
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
with atomic_folder(paths.report("half")) as part:
    print("processes", os.getppid(), os.getpid(), worker.pid, flush=True)
    time.sleep(900)
"""


@pytest.mark.parametrize("killed", ["dvc", "stage"])
def test_a_killed_run_ends_whole_and_the_next_start_clears_what_it_left(settled, killed):
    path = settled / "notebooks/09_routing.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(code(LONG if killed == "dvc" else LONG.replace("import time; time.sleep(900)", "")))
    nbformat.write(notebook, path)
    command = {"args": ["dvc", "repro", "routing"], "cwd": settled, "encoding": "utf-8"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    shell = {**environment(settled), "SHELL": "/bin/sh"}
    with subprocess.Popen(**command, **quiet, env=shell) as dvc:
        line = next(line for line in dvc.stdout if line.startswith("processes"))
        processes = [psutil.Process(int(number)) for number in line.split()[1:]]
        os.kill(dvc.pid if killed == "dvc" else processes[0].pid, signal.SIGKILL)
        left = psutil.wait_procs(processes, timeout=30)[1]
        assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
        dvc.stdout.close()
    assert list((settled / "reports/tiny").glob(".half.*.partial"))
    sh(settled, "git", "checkout", "-q", ".")
    sh(settled, "dvc", "repro", "--force", "--single-item", "routing@tiny")  # else DVC has it in its run cache
    assert not list(settled.glob("reports/**/.*.partial*"))


#: In place of Python, pip and DVC of a new environment: those of the tests. It installs nothing.
STUB = """#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p .venv/bin
    for name in python dvc; do printf '#!/bin/sh\\nexec "%s/%s" "$@"\\n' "{folder}" $name > .venv/bin/$name; done
    printf '#!/bin/sh\\n' > .venv/bin/pip
    chmod +x .venv/bin/*
fi
"""


def make(folder: Path, *arguments: str, fails: bool = False) -> str:
    stub = folder / "py thon"
    stub.write_text(STUB.format(folder=Path(sys.executable).parent), encoding="utf-8")
    stub.chmod(0o755)
    return sh(folder, "make", f"PYTHON={stub}", *arguments, fails=fails)


def test_make_works_under_a_path_with_a_space(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "a clone of mine", symlinks=True)
    output = make(folder, "repro-all")
    assert ran(output) == ["base@tiny", "report@tiny"]  # the base is what it was, and the report tells its time
    assert (folder / ".venv/.ready").exists() and (tmp_path / "a clone of mine").exists()
    assert "profile: tiny" in make(folder, "repro")


def test_make_says_before_it_installs_that_an_archive_is_no_clone(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "archive", ignore=shutil.ignore_patterns(".git", "cache"))
    assert "this folder is no git repository, and DVC needs one; clone" in make(folder, "repro", fails=True)
    assert not (folder / ".venv").exists()
    sh(folder, "git", "init", "-q")  # as the message says
    commit(folder)
    assert "profile: tiny" in make(folder, "repro")


def test_make_report_needs_only_what_is_in_git(toy, tmp_path):
    folder = tmp_path / "clone"
    sh(tmp_path, "git", "clone", "-q", str(toy), str(folder))
    page = folder / "reports/tiny/pages/transfer.html"
    before = page.read_bytes()
    page.unlink()
    sh(folder, "python", "-m", "crab.pipeline", "report")
    assert page.read_bytes() == before and b'src="../transfer/figures/pixel.png"' in before
