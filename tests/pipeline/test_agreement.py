"""Files that say the same thing in two places agree: parameters, stages, dependencies."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions

import nbformat
import pytest
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML
from toys import A_METHOD, REPOSITORY, STAGES

from crab.data.files import read_json
from crab.pipeline import params

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LOADED = params.load(REPOSITORY)
PROFILES = list(LOADED["profiles"])
METHODS = ["lora", "lora_unrouted", "lora_matched", "ilora"]


def read_yaml(name: str):
    return YAML(typ="safe", pure=True).load(REPOSITORY / name)


def test_every_stage_has_a_notebook_and_every_notebook_a_stage():
    assert {p.stem for p in NOTEBOOKS} == set(STAGES)
    assert set(read_yaml("dvc.yaml")["stages"]) == {*STAGES, "sources", "report"}


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_hold_the_same_sections_and_no_other(profile):
    assert set(LOADED["profiles"][profile]) == {*STAGES, "methods"}
    assert list(LOADED["profiles"][profile]["methods"]) == METHODS


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_cell_matches_its_section(path, profile):
    for method in METHODS if path.stem in A_METHOD else [None]:
        params.check(path, params.section(LOADED, profile, path.stem, method))


@pytest.mark.parametrize("profile", PROFILES)
def test_learning_rates_are_swept_as_the_runs_are_trained(profile):
    found = LOADED["profiles"][profile]
    swept, trained = found["sweep"], found["train"]
    same = {"slots", "passes", "batch_size", "precision"}
    assert {name: swept[name] for name in same} == {name: trained[name] for name in same}
    assert set(swept["seeds"]) <= set(trained["seeds"])
    assert not any("learning_rate" in section for section in found["methods"].values())


#: Of one layer's seven projections, the sums of their inputs and of their outputs: the small base's, and Qwen2.5-7B's.
WIDTHS = {
    "tiny": (6 * 128 + 320, 3 * 128 + 2 * 64 + 2 * 320),
    "full": (6 * 3584 + 18944, 3 * 3584 + 2 * 512 + 2 * 18944),
}


@pytest.mark.parametrize("profile", WIDTHS)
def test_plain_rivals_have_the_ranks_nearest_to_the_parameters_they_are_to_match(profile):
    """I-LoRA has r (in + N out) + N in parameters a projection, the last of them the router's; LoRA of rank r has r (in + out)."""
    methods, (ins, outs) = LOADED["profiles"][profile]["methods"], WIDTHS[profile]
    r, heads = methods["ilora"]["r"], methods["ilora"]["num_heads"]
    unrouted = r * (ins + heads * outs)
    nearest = {
        "lora": r,
        "lora_unrouted": round(unrouted / (ins + outs)),
        "lora_matched": round((unrouted + heads * ins) / (ins + outs)),
    }
    assert {name: methods[name]["r"] for name in nearest} == nearest


def test_tiny_takes_the_rates_that_the_sweep_of_study_found():
    tiny, study = (LOADED["profiles"][name] for name in ("tiny", "study"))
    assert set(tiny["sweep"]["given"]) == set(tiny["methods"])
    assert (
        tiny["train"]["passes"] == tiny["sweep"]["passes"] == study["sweep"]["passes"] == 3
    )  # at which they were swept
    assert all(
        tiny["sweep"][name] == study["sweep"][name]
        for name in ("rates", "extend", "seeds", "slots", "held_out", "batch_size")
    )
    for method, rates in tiny["sweep"]["given"].items():
        swept = read_json(REPOSITORY / f"reports/study/sweep-{method}/metrics.json")
        assert rates == swept["rates"] and set(rates) == set(tiny["methods"][method]["runs"])
        assert all(setting["inside"] for setting in swept["settings"].values())


def test_tiny_and_study_differ_in_length_only():
    tiny, study = (LOADED["profiles"][name] for name in ("tiny", "study"))
    assert tiny["base"] == study["base"] and tiny["encode"] == study["encode"] and tiny["methods"] == study["methods"]
    assert tiny["build"] == study["build"] | {"test_samples": tiny["build"]["test_samples"]}
    assert tiny["train"] == study["train"] | {"seeds": tiny["train"]["seeds"]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_defaults_are_the_tiny_profile(path):
    found = params.defaults(path)
    expected = params.section(LOADED, params.DEFAULT_PROFILE, path.stem, found.get("method"))
    assert found == expected, "run: python -m crab.pipeline.params defaults"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean_and_short(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "strip outputs: nbstripout notebooks/*.ipynb"
            longest = 25 if "parameters" in cell.metadata.get("tags", []) else 15  # parameters are data, not logic
            assert len(cell.source.splitlines()) <= longest, cell.source
            assert not re.search(r"^\s*[!%]", cell.source, re.M), cell.source


def test_answers_are_shown_with_their_tags():
    """A Styler leaves text as it is, and a browser hides what looks like a tag of HTML."""
    code = [
        c.source
        for c in nbformat.read(REPOSITORY / "notebooks/evaluate.ipynb", as_version=4).cells
        if c.cell_type == "code"
    ]
    for call in "examples(", "judged(":
        shown = [line for cell in code for line in cell.splitlines() if line.startswith(call)]
        assert shown and all('.format(escape="html")' in line for line in shown)


def test_reports_name_no_path_of_the_machine_that_made_them():
    """A warning shown in a notebook names the file it comes from."""
    found = [p for p in REPOSITORY.glob("reports/*/*/notebook.ipynb") if "site-packages" in p.read_text()]
    assert not found, f"silence its warnings, or mend what they warn of: {found}"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_runs_its_notebook_with_its_section(stage):
    found = read_yaml("dvc.yaml")["stages"][stage]
    assert found["matrix"]["profile"] == ["${profile}"]
    assert found["cmd"].startswith(f"python -m crab.pipeline.stage {stage} --profile ${{item.profile}}")
    assert f".stage/{stage}.json" in found["deps"]
    wanted = {f"profiles.${{item.profile}}.{stage}"}
    if stage in A_METHOD:
        assert found["matrix"]["method"] == METHODS
        wanted.add("profiles.${item.profile}.methods.${item.method}")
    # evaluate and others may name `methods` too: they know of all runs
    assert wanted <= set(found["params"]) <= wanted | {"profiles.${item.profile}.methods"}


def test_base_is_made_from_the_vocabulary_of_the_data_alone_and_kept_in_git():
    found = read_yaml("dvc.yaml")["stages"]["base"]
    assert found["deps"] == [".stage/base.json", "data/${item.profile}/dataset/vocabulary.json"]
    assert all(out[next(iter(out))] == {"cache": False, "persist": True} for out in found["outs"])


def project():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_conda_environment_holds_the_same_packages():
    environment = read_yaml("environment.yml")["dependencies"]
    pip = environment[-1]["pip"]
    wanted = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    assert sorted(p for p in pip if not p.startswith("-")) == sorted(wanted)
    assert "-c constraints.txt" in pip and "-e ." in pip
    assert "python=3.11" in environment


def test_every_package_is_locked_exactly_and_for_any_index():
    lines = [x for x in (REPOSITORY / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    locked = {re.sub(r"[-_.]+", "-", n).lower(): v for n, v in (line.split("==") for line in lines)}
    assert "torchvision" not in locked  # its wheels for other builds of torch break peft's import
    for wanted in project()["dependencies"] + project()["optional-dependencies"]["dev"]:
        name, _, version = wanted.partition("==")
        assert locked[name.replace(".", "-")] == (version or locked[name.replace(".", "-")])


def test_every_locked_package_runs_on_the_oldest_python_the_project_takes():
    """pip does not say that a pin needs a later one: it searches for minutes and gives up with a graph too deep."""
    oldest = re.search(r">=([\d.]+)", project()["requires-python"])[1] + ".0"
    needs = {d.name: d.metadata["Requires-Python"] for d in distributions() if d.metadata["Requires-Python"]}
    assert len(needs) > 100
    assert not {name: wanted for name, wanted in needs.items() if not SpecifierSet(wanted).contains(oldest)}
