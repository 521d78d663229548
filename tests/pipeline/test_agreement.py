"""Files that say the same thing in two places agree: parameters, stages, packages."""

import re
import tomllib
from importlib.metadata import distributions

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook, new_output
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML
from toys import REPOSITORY, code, commit, sh

from crab.core.files import read_json
from crab.pipeline import params
from crab.pipeline.params import STAGES

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LOADED = params.load(REPOSITORY)
PROFILES = {name: params.resolve(REPOSITORY, name) for name in LOADED["profiles"]}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def read_yaml(name: str):
    return YAML(typ="safe", pure=True).load(read(name))


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebook_fits_its_section_in_every_profile_and_holds_the_defaults(stage):
    path = params.notebooks(REPOSITORY)[stage]
    notebook = params.read_notebook(path)
    for values in PROFILES.values():
        params.parameters(path, notebook, stage, values)
    cell = params.cell(path, notebook)[1]
    assert cell == params.parameters(path, notebook, stage, PROFILES["tiny"]), "run: python -m crab.pipeline defaults"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_its_notebook_and_depends_on_small_files(stage):
    stages = read_yaml("dvc.yaml")["stages"]
    assert set(stages) == {*STAGES, "resolve", "report"}
    assert stages[stage]["matrix"] == {"profile": ["${profile}"]} and "params" not in stages[stage]
    assert stages[stage]["cmd"] == f"python -m crab.pipeline run {stage}"
    assert stages[stage]["deps"][0] == f".stage/{stage}.json"
    assert not {"data/${profile}/dataset", "data/${profile}/encoded"} & set(stages[stage]["deps"])
    assert f"reports/${{profile}}/{stage}" in stages["report"]["deps"]


def test_the_base_depends_on_the_vocabulary_of_the_data_alone_and_is_kept_in_git():
    base = read_yaml("dvc.yaml")["stages"]["base"]
    assert base["deps"] == [".stage/base.json", "data/${profile}/dataset/vocabulary.json"]
    assert all(out[next(iter(out))] == {"cache": False, "persist": True} for out in base["outs"])


#: Of one layer's seven projections, the sums of their inputs and of their outputs: the small base's, and Qwen2.5-7B's.
WIDTHS = {
    "tiny": (6 * 128 + 320, 3 * 128 + 2 * 64 + 2 * 320),
    "full": (6 * 3584 + 18944, 3 * 3584 + 2 * 512 + 2 * 18944),
}


@pytest.mark.parametrize("profile", WIDTHS)
def test_the_plain_rival_has_the_rank_nearest_to_the_parameters_of_ilora(profile):
    """Per projection, I-LoRA has r (in + N out) + N in parameters, with the router; LoRA of rank r has r (in + out)."""
    methods, (ins, outs) = PROFILES[profile]["train"]["methods"], WIDTHS[profile]
    r, heads = methods["ilora"]["r"], methods["ilora"]["num_heads"]
    assert methods["lora"]["r"] == r
    assert methods["lora_matched"]["r"] == round((r * (ins + heads * outs) + heads * ins) / (ins + outs))


def test_study_differs_from_tiny_in_length_and_takes_the_rates_that_its_search_gave():
    tiny, changes = PROFILES["tiny"], LOADED["profiles"]["study"]
    assert LOADED["profiles"]["tiny"] == {} and not {"base", "encode"} & set(changes)
    assert set(changes["build"]) == {"test_samples"} and set(changes["train"]) == {"seeds", "rates"}
    for name in tiny["train"]["methods"]:
        search = read_json(REPOSITORY / f"reports/earlier/sweep-{name}/metrics.json")["rates"]
        assert tiny["train"]["given_rates"][name] == search


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean_and_short(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "strip outputs: nbstripout notebooks/*.ipynb"
            longest = 60 if "parameters" in cell.metadata.get("tags", []) else 50  # parameters are data
            assert len(cell.source.splitlines()) <= longest, cell.source
            assert not re.search(r"^\s*[!%]", cell.source, re.M), cell.source


def test_git_commits_notebooks_without_outputs(tmp_path):
    """As the Makefile and .gitattributes set it up; a clean notebook stays as it is."""
    (command,) = re.findall(r"filter.nbstripout.clean '.venv/bin/python (.*?)'", read("Makefile"))
    assert f'clean "python {command}"' in read(".gitattributes")
    clean = new_notebook(cells=[new_markdown_cell("ä"), code("1 + 1")], metadata={"authors": [{"name": "ä"}]})
    saved = nbformat.from_dict(clean)
    path = tmp_path / "notebooks/toy.ipynb"
    path.parent.mkdir()
    nbformat.write(clean, path)
    expected = path.read_text(encoding="utf-8")
    sh(tmp_path, "git", "init", "-q")
    sh(tmp_path, "git", "config", "filter.nbstripout.clean", f"python {command}")
    (tmp_path / ".gitattributes").write_text(read(".gitattributes"), encoding="utf-8")
    saved.cells[1].outputs, saved.cells[1].execution_count = [new_output("stream", text="2")], 3
    saved.metadata["language_info"] = {"name": "python", "version": "3.12.1"}
    for notebook in (clean, saved):
        nbformat.write(notebook, path)
        sh(tmp_path, "git", "add", ".")
        assert sh(tmp_path, "git", "show", ":notebooks/toy.ipynb") == expected


def test_a_clone_with_windows_line_ends_has_those_of_git(tmp_path):
    """The settings of git on Windows; digests in dvc.lock and in the ledger are of bytes."""
    names = ["a.py", "a.ipynb", "a.yaml", "a.json", "a.css"]
    (tmp_path / ".gitattributes").write_text(read(".gitattributes"), encoding="utf-8")
    for name in names:
        (tmp_path / name).write_bytes(b"one\ntwo\n")
    sh(tmp_path, "git", "init", "-q")
    commit(tmp_path)
    sh(tmp_path, "git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "clone", "-q", ".", "clone")
    assert {(tmp_path / "clone" / name).read_bytes() for name in names} == {b"one\ntwo\n"}


def test_reports_name_no_path_of_the_machine_that_made_them():
    """A warning shown in a notebook names the file it comes from."""
    paths = REPOSITORY.glob("reports/*/*/notebook.ipynb")
    named = [path for path in paths if "site-packages" in path.read_text(encoding="utf-8")]
    assert not named, f"silence these warnings, or correct what they warn of: {named}"


def project() -> tuple[dict, list[str]]:
    """The project's section of pyproject.toml, and all packages it names."""
    section = tomllib.loads(read("pyproject.toml"))["project"]
    extras = section["optional-dependencies"]
    named = section["dependencies"] + extras["study"] + extras["dev"] + extras["smollm"]
    assert "crab[study]" in extras["dev"]
    return section, [name for name in named if name != "crab[study]"]


def test_conda_and_make_install_the_same_pinned_packages():
    pip = read_yaml("environment.yml")["dependencies"][-1]["pip"]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    assert "--constraint constraints.txt --editable '.[dev]'" in read("Makefile")


def test_every_package_is_locked_exactly_and_for_any_index():
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    locked = {re.sub(r"[-_.]+", "-", n).lower(): v for n, v in (line.split("==") for line in lines)}
    assert "torchvision" not in locked  # its wheels for other builds of torch break peft's import
    for wanted in project()[1]:
        name, _, version = wanted.partition("==")
        assert locked[name.replace(".", "-")] == (version or locked[name.replace(".", "-")])


def test_every_locked_package_runs_on_the_oldest_python_the_project_takes():
    """pip does not say that a pin needs a later one: it searches for minutes and gives up with a graph too deep."""
    oldest = re.search(r">=([\d.]+)", project()[0]["requires-python"])[1] + ".0"
    needs = {d.name: d.metadata["Requires-Python"] for d in distributions() if d.metadata["Requires-Python"]}
    assert len(needs) > 100
    assert not {name: wanted for name, wanted in needs.items() if not SpecifierSet(wanted).contains(oldest)}
