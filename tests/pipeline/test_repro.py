"""`dvc repro` from a fresh clone: with toy notebooks, what runs again and what does not; then the real smoke study."""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_output
from ruamel.yaml import YAML
from toys import A_METHOD, STAGES, clone, ran, sh, toy_clone

from crab.data.files import write_json
from crab.world.vocabulary import vocabulary

pytestmark = pytest.mark.slow

METHODS = ("lora", "lora_unrouted", "lora_matched", "ilora")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def set_parameter(folder: Path, *keys: str, value: float = 0.125) -> None:
    yaml = YAML()
    loaded = yaml.load(folder / "params.yaml")
    section = loaded["profiles"]
    for key in keys[:-1]:
        section = section[key]
    assert keys[-1] in section
    section[keys[-1]] = value
    yaml.dump(loaded, folder / "params.yaml")


def choose(folder: Path, profile: str) -> None:
    sh(folder, "python", "-m", "crab.pipeline.params", "choose", profile)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A toy clone whose whole pipeline has run, committed as a user would commit it."""
    folder = toy_clone(tmp_path_factory.mktemp("toy"))
    said = ran(sh(folder, "dvc", "repro"))
    several = [f"{stage}@tiny-{m}" for stage in A_METHOD for m in METHODS]
    assert sorted(said) == sorted(
        ["sources", "report@tiny", *several, *(f"{s}@tiny" for s in STAGES if s not in A_METHOD)]
    )
    assert said[-1] == "report@tiny"
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "results")
    assert not {"data", "runs", ".stage"} & {name.split("/")[0] for name in sh(folder, "git", "ls-files").splitlines()}
    return folder


@pytest.fixture
def settled(toy: Path):
    """The toy, all up to date; whatever a test changes is undone and settled again."""
    yield toy
    sh(toy, "git", "checkout", "-q", ".")
    sh(toy, "dvc", "repro")


def test_second_run_does_nothing(toy):
    assert ran(sh(toy, "dvc", "repro")) == []


def test_outputs_prose_comments_and_strangers_retrain_nothing(settled):
    path = settled / "notebooks/base.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = [new_output("stream", text="saved in JupyterLab")]
    nbformat.write(notebook, path)
    (settled / "crab/study/stranger.py").write_text("x = 1\n")
    edit(settled / "crab/data/files.py", '"""Writing aside', '"""Other words: writing aside')
    assert ran(sh(settled, "dvc", "repro")) == ["sources"]

    notebook.cells.append(new_markdown_cell("A better sentence."))
    nbformat.write(notebook, path)
    assert ran(sh(settled, "dvc", "repro")) == ["sources", "report@tiny"]
    assert "A better sentence" in (settled / "reports/tiny/pages/base.html").read_text()


def test_code_and_parameters_run_what_hangs_on_them(settled):
    edit(settled / "notebooks/transfer.ipynb", "transfer made this", "transfer made that")
    assert ran(sh(settled, "dvc", "repro")) == ["sources", "transfer@tiny", "report@tiny"]
    # one method's settings concern that method; another profile's nobody
    set_parameter(settled, "smoke", "methods", "ilora", "lora_alpha")
    assert ran(sh(settled, "dvc", "repro", "--dry")) == []
    set_parameter(settled, "tiny", "methods", "ilora", "lora_alpha")
    assert ran(sh(settled, "dvc", "repro", "--dry", "train")) == ["sources", "sweep@tiny-ilora", "train@tiny-ilora"]
    set_parameter(settled, "tiny", "train", "passes")
    waiting = {"sources", "sweep@tiny-ilora"}  # for what was changed just before
    assert set(ran(sh(settled, "dvc", "repro", "--dry", "train"))) == {*waiting, *(f"train@tiny-{m}" for m in METHODS)}


def test_samples_encoded_with_other_rounding_retrain_nothing(settled):
    """As on another processor: the numbers differ, and what they follow from does not. Where that differs, all after it runs."""
    (settled / "data/tiny/encoded/made.json").write_text("rounded otherwise")
    sh(settled, "dvc", "commit", "-f", "encode@tiny")
    assert ran(sh(settled, "dvc", "repro")) == []
    edit(settled / "notebooks/encode.ipynb", 'provenance.json\\", {\\"toy\\": ', 'provenance.json\\", {\\"other\\": ')
    assert {f"train@tiny-{m}" for m in METHODS} < set(ran(sh(settled, "dvc", "repro")))


def test_going_to_another_profile_and_back_runs_nothing_twice(settled):
    choose(settled, "smoke")
    assert sorted(ran(sh(settled, "dvc", "repro", "base", "build"))) == ["base@smoke", "build@smoke", "sources"]
    choose(settled, "tiny")
    assert ran(sh(settled, "dvc", "repro")) == []
    choose(settled, "smoke")
    assert ran(sh(settled, "dvc", "repro", "base", "build")) == []


def test_fresh_clone_does_not_train_the_base(toy, tmp_path):
    folder = tmp_path / "clone"
    sh(tmp_path, "git", "clone", "-q", str(toy), str(folder))
    assert ran(sh(folder, "dvc", "repro", "encode")) == ["sources", "build@tiny", "encode@tiny"]


def test_committed_base_belongs_to_the_code_beside_it(tmp_path):
    """Else every fresh clone would train it again: run `dvc repro` and commit what it made."""
    folder = clone(tmp_path / "clone")
    sh(folder, "dvc", "repro", "sources")
    write_json(folder / "data/tiny/dataset/vocabulary.json", vocabulary())  # as `build` would: it is always the same
    assert "up to date" in sh(folder, "dvc", "status", "base")


def test_metrics_plots_and_experiments_mean_something(settled):
    said = sh(settled, "dvc", "metrics", "show", "--json")
    assert "reports/tiny/metrics.json" in said and '"joint-toy-bare": 0.1235' in said and "score" not in said
    assert '"score": 0.5' in sh(settled, "dvc", "metrics", "show", "--json", "reports/tiny/evaluate/metrics.json")
    sh(settled, "dvc", "plots", "show", "-o", "dvc_plots")
    assert "pixel.png" in (settled / "dvc_plots/index.html").read_text()
    said = sh(settled, "dvc", "exp", "run", "-S", "profiles.tiny.transfer.margin=0.05")
    assert ran(said) == ["sources", "transfer@tiny", "report@tiny"]


def test_a_wrong_parameter_stops_all_before_anything_is_cleared_away(settled):
    made = {
        path: path.read_bytes()
        for name in ("models", "reports")
        for path in (settled / name).rglob("*")
        if path.is_file()
    }
    text = (settled / "params.yaml").read_text()
    for wrong in (text.replace("held_out: 300", "held_ot: 300"), text.replace("margin: 0.02", "margin: -0.02")):
        (settled / "params.yaml").write_text(wrong)
        said = sh(settled, "dvc", "repro", fails=True)
        assert "did you mean 'held_out'" in said or "parameter 'margin' is -0.02" in said
        assert {path: path.read_bytes() for path in made} == made
    (settled / "params.yaml").write_text(text)
    assert ran(sh(settled, "dvc", "repro")) == []


def test_failing_cell_fails_the_stage_and_shows_why(settled):
    edit(settled / "notebooks/routing.ipynb", '\\"toy\\": \\"', '\\"toy\\": 1 / 0, \\"_\\": \\"')
    said = sh(settled, "dvc", "repro", "routing", fails=True)
    assert "ZeroDivisionError" in said and "pages/routing.html" in said
    assert "ZeroDivisionError" in (settled / "reports/tiny/pages/routing.html").read_text()
    assert not (settled / "reports/tiny/routing/notebook.ipynb").exists()


def test_smoke_study_runs_twice_and_its_notebooks_reproduce_themselves(tmp_path):
    """The real thing: every stage, then nothing, then each executed notebook again by nbval with equal metrics."""
    folder = clone(tmp_path / "smoke")
    choose(folder, "smoke")
    begin = time.monotonic()
    said = sh(folder, "dvc", "repro", seconds=1800)  # minutes, but not on a busy machine
    print(f"smoke study: {time.monotonic() - begin:.0f} s")
    assert "evaluate@smoke" in ran(said)
    assert ran(sh(folder, "dvc", "repro")) == []
    assert (folder / "reports/smoke/index.html").is_file()

    def metrics() -> dict[str, str]:
        files = sorted((folder / "reports/smoke").rglob("*.json"))
        return {str(p): p.read_text() for p in files if p.parent.name != "benchmark"}  # times differ

    before = metrics()
    assert before
    names = [[f"{stage}-{m}" for m in METHODS] if stage in A_METHOD else [stage] for stage in STAGES]
    notebooks = [f"reports/smoke/{name}/notebook.ipynb" for group in names for name in group]
    nbval = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-kernel-name", "python3"]
    sh(folder, *nbval, *notebooks, seconds=1800)
    assert metrics() == before
