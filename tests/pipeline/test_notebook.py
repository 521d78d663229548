"""Running one stage: parameters reach it, pages are left, and failure leaves nothing that looks whole."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell
from toys import code, write_notebook

from crab.pipeline import stage as notebook, report
from crab.study import code as sources
from crab.pipeline.paths import Paths, root

VALUES = {"profile": "tiny", "passes": 8, "rate": 1.0, "method": "lora", "settings": {"r": 4}}
PNG = 'Image(data=base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="))'


def left(repository, profile="smoke"):
    return sorted(str(p.relative_to(repository)) for p in (repository / "reports" / profile).rglob("*") if p.is_file())


def test_run_injects_parameters_and_leaves_notebook_and_page(repository):
    write_notebook(
        repository, "stage", VALUES,
        code("import base64, os\nfrom IPython.display import Image\nfrom crab_marker import word"),
        code("print(profile, passes, rate, method, settings['r'], word, os.path.basename(os.getcwd()))"),
        code(PNG, "result"),
    )  # fmt: skip
    (repository / "crab_marker.py").write_text("word = 'of this folder'\n")
    target = notebook.run("stage", "smoke", "lora", repository)
    assert left(repository) == ["reports/smoke/pages/stage-lora.html", "reports/smoke/stage-lora/notebook.ipynb"]
    done = nbformat.read(target, as_version=4)
    assert done.cells[4].outputs[0].text == "smoke 1 0.005 lora 1 of this folder notebooks\n"
    assert "papermill" not in done.metadata and str(repository) not in target.read_text()
    assert set(done.metadata["crab"]) == {"seconds", "peak_gib"} and done.metadata["crab"]["peak_gib"] > 0
    html = (repository / "reports/smoke/pages/stage-lora.html").read_text()
    assert "of this folder" in html and "data:image/png;base64" in html and "Toy stage" in html

    sources.write(repository)
    index = report.write("smoke", repository).read_text()
    assert "data:image/png;base64" in index and "pages/stage-lora.html" in index and "of this folder" not in index
    assert report.write("smoke", repository).read_text() == index


@pytest.mark.parametrize("source", ["1 / 0", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_failing_cell_leaves_its_page_only(repository, source):
    write_notebook(repository, "stage", VALUES, code("print('before')"), code(source), code("print('af' + 'ter')"))
    with pytest.raises(notebook.StageError, match="pages/stage-lora.html"):
        notebook.run("stage", "smoke", "lora", repository)
    assert left(repository) == ["reports/smoke/pages/stage-lora.html"]
    html = (repository / "reports/smoke/pages/stage-lora.html").read_text()
    assert "before" in html
    assert ("ZeroDivisionError" in html) == (source == "1 / 0")


def test_command_fails_with_a_plain_error(repository, monkeypatch):
    write_notebook(repository, "stage", {"profile": "tiny", "passes": 8})
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit, match=r"error: stage.ipynb, profile tiny: parameter 'rate' is unknown"):
        notebook.main(["stage"])
    with pytest.raises(SystemExit, match="no such notebook; there are stage"):
        notebook.main(["stag"])


def test_root_is_found_from_below(repository, monkeypatch):
    monkeypatch.chdir(repository / "notebooks")
    assert root() == repository
    assert Paths("tiny").report("base") == repository / "reports/tiny/base"


def test_page_shows_the_prose_of_now_around_recorded_outputs(repository):
    path = write_notebook(repository, "stage", {"a": 1}, new_markdown_cell("old words"), code("2 + 2  # old"))
    old = nbformat.read(path, as_version=4)
    run = nbformat.read(path, as_version=4)
    run.cells[-1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "4"})]
    run.cells.insert(2, code("a = 3", "injected-parameters"))

    old.cells[2].source, old.cells[-1].source = "new words", "2 + 2  # new"
    old.cells.append(new_markdown_cell("more words"))
    new = report.refreshed(run, old)
    assert [c.source for c in new.cells[1:]] == ["a = 1", "a = 3", "new words", "2 + 2  # new", "more words"]
    assert new.cells[4].outputs[0].data["text/plain"] == "4"

    old.cells[3].source = "2 + 3"
    assert report.refreshed(run, old) == run


def test_a_page_names_its_figures_and_shows_no_bars_and_no_defaults(repository):
    bars = "import sys\nprint(f'train: {50}%|##  | 1/2 [00:01<00:01]\\npredict: {0}it [00:00, ?it/s]', file=sys.stderr)"
    write_notebook(
        repository, "stage", VALUES, new_markdown_cell("text\n\n## Loss by step\n\nmore"),
        code("import base64\nfrom IPython.display import Image\nprint(profile)"), code(bars),
        code(bars + "\nprint('something is odd', file=sys.stderr)"), code(PNG),
    )  # fmt: skip
    notebook.run("stage", "smoke", "lora", repository)
    html = (repository / "reports/smoke/pages/stage-lora.html").read_text()
    assert 'alt="Loss by step"' in html and "No description" not in html
    assert "something is odd" in html and "50%|" not in html and "0it" not in html
    assert html.count("passes") == 1  # the default that was replaced is not shown


def test_report_without_notebooks_says_what_to_run(repository):
    with pytest.raises(ValueError, match="run dvc repro"):
        report.write("smoke", repository)


def test_report_leaves_out_what_a_killed_stage_left(repository):
    write_notebook(repository, "stage", VALUES, code("1"))
    target = notebook.run("stage", "smoke", "lora", repository)
    half = target.parents[1] / ".x.partial" / target.name
    half.parent.mkdir()
    half.write_bytes(target.read_bytes())
    assert "partial" not in report.write("smoke", repository).read_text()
    assert not [name for name in left(repository) if "partial" in name and name.endswith(".html")]


def test_headline_is_what_joint_training_adds_by_run():
    transfer = {"baseline": "single-lora-bare", "joint-lora-bare": {"mean_difference": 0.025649, "gain": 6}, "joint-ilora-bare": {"mean_difference": None},
                "rival": "lora_matched", "against_rival": {"joint-lora-bare": {"mean_difference": -0.01}}}  # fmt: skip
    assert report.headline(transfer) == {"joint-lora-bare": 0.0256}
