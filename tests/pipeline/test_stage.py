"""Running a stage and rendering its page: parameters reach it, and a failure leaves nothing that looks complete."""

from __future__ import annotations

import base64

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook, new_output
from toys import PIXEL, code, write_notebook

from crab.pipeline import report, stage, stages
from crab.pipeline.__main__ import main
from crab.pipeline.paths import Paths, root

VALUES = {"profile": "tiny", "samples": 0}
SHOW = f'import base64\nfrom IPython.display import Image\nImage(data=base64.b64decode("{PIXEL}"))'


def run(repository, *cells, values=VALUES):
    """Execute a toy notebook of the stage `routing`."""
    write_notebook(repository, "routing", values, *cells)
    stages.resolve(repository)
    return stage.run(repository, "routing")


def left(repository):
    reports = repository / "reports/tiny"
    return sorted(p.relative_to(reports).as_posix() for p in reports.rglob("*") if p.is_file())


def read_page(repository, name="pages/routing.html"):
    return (repository / "reports/tiny" / name).read_text(encoding="utf-8")


def test_a_run_gets_its_parameters_and_leaves_notebook_and_page(repository, monkeypatch):
    (repository / "crab_marker.py").write_text("word = 'of this folder'\n", encoding="utf-8")
    startup = repository / "startup.py"
    startup.write_text("samples_of_user = 1\n", encoding="utf-8")
    (repository / "matplotlibrc").write_text("figure.dpi: 7\n", encoding="utf-8")
    for name, value in {"PYTHONSTARTUP": startup, "MATPLOTLIBRC": repository, "JUPYTER_PATH": repository}.items():
        monkeypatch.setenv(name, str(value))
    target = run(
        repository,
        code("import matplotlib, os\nfrom crab_marker import word"),
        code("print(profile, samples, answer['segmenter'], word, os.path.basename(os.getcwd()), 'ä')"),
        code("print('samples_of_user' in dir(), matplotlib.rcParams['figure.dpi'])"),
        values={**VALUES, "answer": 0},
    )
    assert left(repository) == ["pages/routing.html", "pages/style.css", "routing/notebook.ipynb"]
    done = nbformat.read(target, as_version=4)
    texts = [cell.outputs[0].text for cell in done.cells if cell.get("outputs")]
    assert texts == ["tiny 200 grabcut of this folder notebooks ä\n", "False 100.0\n"]
    assert "papermill" not in done.metadata and str(repository) not in target.read_text(encoding="utf-8")
    assert set(done.metadata["crab"]) == {"seconds", "peak_gib"} and done.metadata["crab"]["peak_gib"] > 0


@pytest.mark.parametrize("source", ["1 / 0", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_failing_cell_leaves_its_page_alone(repository, source):
    with pytest.raises(stage.StageError, match="pages/routing.html"):
        run(repository, code("print('before')"), code(source), code("print('af' + 'ter')"))
    assert left(repository) == ["pages/routing.html", "pages/style.css"]
    html = read_page(repository)
    assert "before" in html and "after" not in html
    assert ("ZeroDivisionError" in html) == ('<details open="">' in html) == (source == "1 / 0")


def test_commands_fail_with_a_plain_error(repository, monkeypatch):
    monkeypatch.chdir(repository / "notebooks")
    assert root() == repository and Paths("tiny").report("base") == repository / "reports/tiny/base"
    for arguments, message in [
        (["run", "rooting"], "error: rooting: there is no such stage; did you mean 'routing'"),
        (["run", "routing"], r"error: .*routing.json: no such file; run the stage that writes it \(dvc repro\)"),
        (["report"], "error: .*no executed notebook; run dvc repro"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(arguments)


def test_a_page_refers_to_figures_names_them_and_shows_no_bars_and_no_defaults(repository):
    figure = repository / "reports/tiny/routing/figures/dot.png"
    figure.parent.mkdir(parents=True)
    figure.write_bytes(base64.b64decode(PIXEL))
    bars = "import sys\nprint(f'train: {50}%|##  | 1/2 [00:01<00:01]\\npredict: {0}it [00:00, ?it/s]', file=sys.stderr)"
    heading = new_markdown_cell("text\n\n## Loss by step\n\nmore")
    odd = code(bars + "\nprint('odd', file=sys.stderr)")
    target = run(repository, heading, code("print(profile)"), code(bars), odd, code(SHOW))
    html = read_page(repository)
    assert '<img alt="Loss by step" loading="lazy" src="../routing/figures/dot.png"/>' in html and "base64," not in html
    assert "odd" in html and "50%|" not in html and "0it" not in html
    assert html.count("samples") == 1  # the default that was replaced is not shown
    assert len(html) < 10_000 and "50%|" not in target.read_text(encoding="utf-8").replace("{50}%|", "")

    figure.write_bytes(b"another figure")
    report.write(repository, "tiny")
    assert "data:image/png;base64," in read_page(repository)


def test_the_front_page_shows_results_alone(repository):
    target = run(repository, code("print('details')"), code("'the **result**'", "result"), code(SHOW, "result"))
    half = target.parents[1] / ".x.partial" / target.name  # as a killed stage leaves it
    half.parent.mkdir()
    half.write_bytes(b"not a notebook")
    html = report.write(repository, "tiny").read_text(encoding="utf-8")
    assert (
        "the **result**" in html and "pages/routing.html" in html and "<summary>" not in html and "details" not in html
    )
    assert report.write(repository, "tiny").read_text(encoding="utf-8") == html
    assert 'href="pages/style.css"' in html and 'href="../pages/style.css"' in read_page(repository)


def test_a_page_shows_the_prose_of_now_around_recorded_outputs():
    def notebook(*cells):
        return new_notebook(cells=[code("a = 1", "parameters"), *cells])

    run = notebook(new_markdown_cell("old words"), code("2 + 2  # old"))
    run.cells[-1].outputs = [new_output("execute_result", {"text/plain": "4"})]
    run.cells.insert(1, code("a = 3", "injected-parameters"))
    empty, result = code("# an empty cell"), code("2 + 2  # new", "result")
    now = notebook(new_markdown_cell("new words"), empty, result, new_markdown_cell("end"))
    page = report.refreshed(run, now)
    assert [c.source for c in page.cells] == ["a = 1", "a = 3", "new words", "# an empty cell", "2 + 2  # new", "end"]
    assert page.cells[4].outputs[0].data["text/plain"] == "4" and page.cells[4].metadata.tags == ["result"]
    assert page.cells[3].outputs == []

    now.cells[3].source = "2 + 3"
    assert report.refreshed(run, now) == run


def test_the_headline_is_what_joint_training_adds_by_run():
    transfer = {
        "baseline": "single-lora-bare", "joint-lora-bare": {"mean_difference": 0.025649, "gain": 6},
        "joint-ilora-bare": {"mean_difference": None}, "against_rival": {"joint-lora-bare": {"mean_difference": -0.01}},
    }  # fmt: skip
    assert report.headline(transfer) == {"joint-lora-bare": 0.0256}
