"""The recipes of notebooks/README.md and the code of the front page, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))

from toys import REPOSITORY, choose, clone, code, commit, environment, ran, sh, toy_clone

from crab.world.generate import build

RECIPES = (REPOSITORY / "notebooks/README.md").read_text(encoding="utf-8")


def blocks(heading: str, text: str = RECIPES) -> list[tuple[str, str]]:
    """(language, code) of each block of a recipe."""
    _, heading_line, rest = text.partition(f"# {heading}\n")
    assert heading_line, f"no recipe {heading}"
    return re.findall(r"```(\w+)\n(.*?)```", re.split(r"\n#+ ", rest)[0], re.DOTALL)


def bash(heading: str) -> str:
    (script,) = [source for language, source in blocks(heading) if language == "bash"]
    return script


def follow(folder: Path, script: str, **variables: str) -> str:
    """Run a script of shell commands as a user would, each one whether or not the one before failed."""
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**environment(folder), **variables}, timeout=900, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_no_recipe_is_long():
    names = re.findall(r"^### (.+)", RECIPES, re.MULTILINE)
    assert len(names) == 11
    for name in names:
        assert sum(len(source.splitlines()) for _, source in blocks(name)) <= 12, name


def test_ilora_on_another_model(tmp_path):
    ((_, source),) = blocks("Use `crab.ilora` on another model")
    (tmp_path / "recipe.py").write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "recipe.py"], cwd=tmp_path, env=environment(REPOSITORY), capture_output=True, encoding="utf-8"
    )
    assert done.stdout == "14 modules are routed\n", done.stderr  # seven projections of two layers
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_code_of_the_front_page(tmp_path, monkeypatch):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    monkeypatch.chdir(tmp_path)
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = Qwen2ForCausalLM(Qwen2Config(**size, num_attention_heads=2, num_key_value_heads=1))
    names = {"model": base, "batch": {"input_ids": torch.arange(6)[None]}}
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    ((_, source),) = blocks("I-LoRA in your own project", readme)
    exec(source, names)
    assert len(names["routing"]) == 2 and (tmp_path / "adapter").is_dir()


def insert(path: Path, anchor: str, block: str, after: bool = False) -> None:
    """Put a block above, or below, the line with an anchor."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = [number for number, line in enumerate(lines) if anchor in line]
    lines.insert(place + after, block)
    path.write_text("".join(lines), encoding="utf-8")


KEYS = """
import pathlib, sys
from crab.core.code import digest_in
from crab.pipeline.accept import keyed_modules
print(*(digest_in(pathlib.Path(sys.argv[1]), names) for sets in keyed_modules().values() for names in sets))
"""


def keys(folder: Path) -> str:
    """What the code of a clone puts into the keys of results."""
    return sh(folder, "python", "-c", KEYS, str(folder))


def test_a_data_set_is_added(tmp_path):
    folder = clone(tmp_path)
    before = keys(folder)
    (_, entry), (_, question), (_, check) = blocks("Add a data set")
    insert(folder / "crab/tasks/registry.py", 'Slot("avcap"', entry)
    with (folder / "crab/tasks/prompts.yaml").open("a", encoding="utf-8") as file:
        file.write(question)
    assert follow(folder, check).endswith("('video_path', 'audio_path', 'action', 'label') accuracy\n")
    assert keys(folder) == before


def test_an_option_of_the_adapter_is_added(tmp_path):
    folder = clone(tmp_path)
    before = keys(folder)
    (_, option), (_, use), (_, variant), (_, check) = blocks("Add an option of the adapter")
    insert(folder / "crab/ilora/config.py", "num_heads: int = _option(", option)
    insert(folder / "crab/ilora/layer.py", "self.scaling[adapter_name] =", use, after=True)
    insert(folder / "params.yaml", "instruction_first: {method: lora, r: 4", variant)
    follow(folder, check)
    assert keys(folder) == before  # so that what was trained without the option still counts
    assert '"gain": 2.0' in (folder / ".stage/experiments.json").read_text(encoding="utf-8")
    doubled = (
        "import torch; from torch import nn; from peft import get_peft_model; from crab.ilora import ILoraConfig\n"
        "models = [get_peft_model(nn.Sequential(nn.Linear(2, 2)), ILoraConfig(r=1, lora_alpha=1, target_modules=['0'], "
        "gain=g)) for g in (1.0, 2.0)]\n"
        "print([m.base_model.model[0].scaling['default'] for m in models])"
    )
    assert sh(folder, "python", "-c", doubled) == "[1.0, 2.0]\n"


def test_code_is_tidied(tmp_path):
    folder = clone(tmp_path)
    before = keys(folder)
    with (folder / "crab/models/omni.py").open("a", encoding="utf-8") as file:
        file.write("\n\nNOTHING_READS_THIS = 1\n")
    changed = keys(folder)
    assert "crab.models.base.train" in follow(folder, bash("Tidy code without training again"))
    assert changed != keys(folder) == before


def test_a_parameter_is_added(tmp_path):
    folder = clone(tmp_path)
    (_, kind), (_, value), (_, check) = blocks("Add a parameter")
    for name, old, new in (("crab/pipeline/schema.py", '    "routing": {', kind), ("params.yaml", "routing: {", value)):
        text = (folder / name).read_text(encoding="utf-8")
        (line,) = [line for line in text.splitlines(keepends=True) if line.startswith(old)]
        (folder / name).write_text(text.replace(line, new), encoding="utf-8")
    assert "09_routing.ipynb" in follow(folder, check)
    assert '"tokens": 16' in (folder / ".stage/routing.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A clone with toy notebooks, as `dvc repro` leaves it."""
    folder = toy_clone(tmp_path_factory.mktemp("toy"))
    assert "report@tiny" in ran(follow(folder, bash("Run it")))
    return commit(folder)


@pytest.mark.slow
def test_running_it_leaves_nothing_to_run(toy):
    output = follow(toy, bash("Run it"))
    assert ran(output) == [] and "up to date" in output


@pytest.mark.slow
def test_the_report_is_read(toy):
    script = bash("Read the report").replace("study", "tiny")  # the toy has this one
    assert (toy / "reports/tiny/index.html").as_posix() in follow(toy, script, BROWSER="true %s")


@pytest.mark.slow
def test_a_parameter_is_tried(toy):
    output = follow(toy, bash("Try a parameter and compare"))
    assert "train@tiny" in ran(output) and output.count("train.passes") >= 2
    assert sh(toy, "git", "status", "--short", "params.yaml") == ""
    assert ran(sh(toy, "dvc", "repro")) == ["train@tiny", "report@tiny"]  # which reads the cells of before


@pytest.mark.slow
def test_a_figure_is_changed(toy, tmp_path):
    editor = tmp_path / "jupyter"  # saves a change, as a user in JupyterLab
    editor.write_text(
        '#!/bin/sh\nsed -i.bak "s/transfer made this/transfer drew this/" "$2"\nrm "$2.bak"\n', encoding="utf-8"
    )
    editor.chmod(0o755)
    script = f'PATH="{tmp_path}:$PATH"\n{bash("Change a figure")}'
    assert ran(follow(toy, script)) == ["resolve", "transfer@tiny", "report@tiny"]
    sh(toy, "git", "checkout", "-q", ".")
    sh(toy, "dvc", "repro")


@pytest.mark.slow
def test_a_killed_run_resumes(toy):
    path = toy / "notebooks/09_routing.ipynb"
    notebook = nbformat.read(path, as_version=4)
    killed = "import os, signal\nfrom pathlib import Path\nonce = Path('../once')\nif not once.exists():\n"
    notebook.cells.append(code(killed + "    once.touch()\n    os.kill(os.getpid(), signal.SIGKILL)"))
    nbformat.write(notebook, path)
    stages = ran(follow(toy, bash("Resume a killed run")))
    assert stages.count("routing@tiny") == 2 and stages[-1] == "report@tiny"
    sh(toy, "git", "checkout", "-q", ".")
    sh(toy, "dvc", "repro")


@pytest.mark.slow
def test_a_real_tree_is_read(tmp_path):
    tree = tmp_path / "tree"
    build(tree, 7, train=2, test=2, caption=2, workers=1, slots=["ave", "ks"], progress=False)
    (tmp_path / "clone").mkdir()
    folder = clone(tmp_path / "clone")
    choose(folder, "smoke")
    commit(folder)
    assert "build@smoke" in ran(follow(folder, bash("Point it at a real tree"), TREE=str(tree)))
    page = (folder / "reports/smoke/build/notebook.ipynb").read_text(encoding="utf-8")
    assert "**8 records** can be used, 0 are left out" in page
