"""Running a stage and rendering its page: parameters reach it, and a failure leaves nothing that looks complete."""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook, new_output
from toys import PIXEL, REPOSITORY, code, environment, write_notebook

from crab.core import files
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


def test_a_run_gets_its_parameters_and_leaves_notebook_and_page(repository):
    (repository / "crab_marker.py").write_text("word = 'of this folder'\n", encoding="utf-8")
    target = run(
        repository,
        code("import os\nfrom crab_marker import word"),
        code("print(profile, samples, answer['segmenter'], word, os.path.basename(os.getcwd()), 'ä')"),
        values={**VALUES, "answer": 0},
    )
    assert left(repository) == ["pages/routing.html", "pages/style.css", "routing/notebook.ipynb"]
    done = nbformat.read(target, as_version=4)
    assert done.cells[-1].outputs[0].text == "tiny 200 grabcut of this folder notebooks ä\n"
    assert "papermill" not in done.metadata and str(repository) not in target.read_text(encoding="utf-8")
    assert set(done.metadata["crab"]) == {"seconds", "peak_gib"} and done.metadata["crab"]["peak_gib"] > 0


#: Files of a user, in a folder that all these variables name.
USER = {
    "profile_default/startup/00.py": "samples_of_user = 1",
    "startup.py": "samples_of_user = 1",
    "ipython_kernel_config.py": "c.IPKernelApp.exec_lines = ['samples_of_user = 1']",
    "matplotlibrc": "figure.dpi: 7\ntext.usetex: True",
    "kernels/python3/kernel.json": '{"argv": ["false"], "display_name": "foreign", "language": "python"}',
    "nbconvert/templates/classic/base.html.j2": "a page of the user",
}
VARIABLES = ["IPYTHONDIR", "JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "MATPLOTLIBRC", "MPLCONFIGDIR"]


def test_files_of_the_user_do_not_reach_results(repository, tmp_path, monkeypatch):
    user = tmp_path / "user"
    for name, text in USER.items():
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text(text, encoding="utf-8")
    for name in VARIABLES:
        monkeypatch.setenv(name, str(user))
    monkeypatch.setenv("PYTHONSTARTUP", str(user / "startup.py"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    shown = "print('samples_of_user' in dir(), plt.rcParams['figure.dpi'], plt.rcParams['text.usetex'])"
    write_notebook(repository, "routing", VALUES, code("import matplotlib.pyplot as plt\n" + shown))
    monkeypatch.chdir(repository)
    for command in (["resolve"], ["run", "routing"]):
        main(command)
    done = nbformat.read(repository / "reports/tiny/routing/notebook.ipynb", as_version=4)
    assert done.cells[-1].outputs[0].text == "False 100.0 False\n"
    assert "False 100.0 False" in read_page(repository) and "of the user" not in read_page(repository)


@pytest.fixture
def eight_bits(tmp_path):
    """The environment of an 8-bit locale. Minimal systems have none, but most can make one."""
    locale = tmp_path / "locale/de_DE.ISO-8859-1"
    locale.parent.mkdir()
    process = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", locale], stderr=subprocess.DEVNULL
    )
    if not locale.exists():
        pytest.skip(f"no 8-bit locale can be made here ({process})")
    return {"LOCPATH": str(locale.parent), "LC_ALL": locale.name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_an_8_bit_locale_changes_nothing(repository, eight_bits):
    write_notebook(repository, "routing", VALUES, new_markdown_cell("ä ☃"), code("print('ä ☃')"))
    stages.resolve(repository)
    before = {path.name: path.read_bytes() for path in (repository / ".stage").iterdir()}
    for command in (["resolve"], ["run", "routing"], ["report"]):
        crab = [sys.executable, "-m", "crab.pipeline", *command]
        done = subprocess.run(crab, cwd=repository, env={**environment(REPOSITORY), **eight_bits}, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode("latin-1").count("ä \\u2603") == ("run" in command)  # what the locale has, else named
    assert {path.name: path.read_bytes() for path in (repository / ".stage").iterdir()} == before
    executed = (repository / "reports/tiny/routing/notebook.ipynb").read_text(encoding="utf-8")
    assert executed.count("ä ☃") == 3 and read_page(repository).count("ä ☃") == 3


FULL = """
from pathlib import Path
from crab.core.files import atomic_file
with atomic_file("table.csv") as path:
    path.symlink_to("/dev/full")
    path.write_text("x", encoding="utf-8")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this file")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FULL, "table.csv: no space is left on its disk; free some, and run it again"),
        (
            "open('/dev/full', 'wb', 0).write(b'x')",
            "[Errno 28] No space left on device; free some space, and run the stage",
        ),
    ],
)
def test_a_full_disk_is_told_in_one_line(repository, source, message):
    with pytest.raises(stage.StageError) as error:
        run(repository, code(source))
    first, last = str(error.value).splitlines()
    assert first.startswith(f"notebooks/09_routing.ipynb: {message}") and last == "See reports/tiny/pages/routing.html"


def test_a_start_clears_what_killed_runs_left(repository):
    places = [repository / name / "tiny" for name in ("data", "models", "reports", "runs")]
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as in containers
    for place in [*places, repository]:
        for process in (ended.pid, os.getpid()):
            (place / f".half.{files._HOST}-{process}.partial").mkdir(parents=True)
    run(repository)
    for place in [*places, repository]:
        assert [path.name for path in place.glob(".half*")] == [f".half.{files._HOST}-{os.getpid()}.partial"]


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
    assert '<a class="figure" href="../routing/figures/dot.png">' in html  # it opens at its full size
    assert "odd" in html and "50%|" not in html and "0it" not in html
    assert html.count("samples") == 1  # the default that was replaced is not shown
    assert len(html) < 10_000 and "50%|" not in target.read_text(encoding="utf-8").replace("{50}%|", "")

    run(repository, code(SHOW[:-1] + ", width=7, height=5)"))
    assert 'height="5"' in read_page(repository) and 'width="7"' in read_page(repository)

    figure.write_bytes(b"another figure")
    report.write(repository, "tiny")
    assert "data:image/png;base64," in read_page(repository)


def test_links_of_a_notebook_to_files_of_the_report_hold_in_its_pages(repository):
    """A cell links from the folder of the notebooks, so that the link works in JupyterLab, too."""
    clip = repository / "reports/tiny/routing/media/a.mp4"
    clip.parent.mkdir(parents=True)
    clip.write_bytes(b"a clip")
    links = 'src="../reports/tiny/routing/media/a.mp4" poster="../reports/tiny/routing/media/a.jpg"'
    shown = f'<video {links}></video> <a href="../README.md">../reports/</a>'
    run(repository, code(f"from IPython.display import HTML\nHTML({shown!r})"))
    (link,) = re.findall('<video [^>]*src="(.*?)"', read_page(repository))
    assert (repository / "reports/tiny/pages" / link).resolve() == clip
    assert 'poster="../routing/media/a.jpg"' in read_page(repository)
    assert '<a href="../README.md">../reports/</a>' in read_page(repository)


def test_a_page_shows_the_prose_of_now_around_recorded_outputs():
    def notebook(*cells):
        return new_notebook(cells=[code("a = 1", "parameters"), *cells])

    run = notebook(new_markdown_cell("old words"), code("2 + 2  # old"))
    run.cells[-1].outputs = [new_output("execute_result", {"text/plain": "4"})]
    run.cells.insert(1, code("a = 3", "injected-parameters"))
    empty, result = code("# an empty cell"), code("2 + 2  # new", "answer")
    now = notebook(new_markdown_cell("new words"), empty, result, new_markdown_cell("end"))
    page = report.refreshed(run, now)
    assert [c.source for c in page.cells] == ["a = 1", "a = 3", "new words", "# an empty cell", "2 + 2  # new", "end"]
    assert page.cells[4].outputs[0].data["text/plain"] == "4" and page.cells[4].metadata.tags == ["answer"]
    assert page.cells[3].outputs == []

    # a module that moved
    run.cells[-1].source, now.cells[3].source = "from a import b\n2 + 2", "from c import b\n2 + 2"
    assert report.refreshed(run, now).cells[4].source == now.cells[3].source

    now.cells[3].source = "2 + 3"
    assert report.refreshed(run, now) == run


def test_the_headline_is_what_joint_training_adds_by_run():
    transfer = {
        "baseline": "single-lora-bare", "joint-lora-bare": {"mean_difference": 0.025649, "gain": 6},
        "joint-ilora-bare": {"mean_difference": None}, "against_rival": {"joint-lora-bare": {"mean_difference": -0.01}},
    }  # fmt: skip
    assert report.headline(transfer) == {"joint-lora-bare": 0.0256}


def test_two_runs_with_equal_results_give_equal_notebooks(repository):
    table = "import pandas as pd\nframe = pd.DataFrame({'a': [1, 2]}).style.format(precision=1)\nframe"
    once = nbformat.read(run(repository, code(table), code("frame.hide()")), as_version=4)
    twice = nbformat.read(stage.run(repository, "routing"), as_version=4)
    assert once.cells == twice.cells
    html = [cell.outputs[0].data["text/html"] for cell in once.cells[-2:]]
    names = [re.search(r'<table id="(\w+)"', text)[1] for text in html]
    assert len(set(names)) == 2  # the front page shows tables of many notebooks, and their styles go by name
    assert all(f"{name}_row1_col0" in text for name, text in zip(names, html, strict=True))


def test_a_notebook_that_is_no_stage_is_run_as_it_is(repository, monkeypatch):
    monkeypatch.chdir(repository)
    source = "print(count)\nimport sys\nprint('50%|', file=sys.stderr)"
    path = write_notebook(repository, "routing", {"count": 3}, code(source))
    path.rename(path.with_name("apart.ipynb"))
    main(["page", "apart"])
    target = repository / "reports/apart/notebook.ipynb"
    done = nbformat.read(target, as_version=4)
    assert [output.text for output in done.cells[-1].outputs] == ["3\n"] and "papermill" not in done.metadata
    broken = nbformat.read(path.with_name("apart.ipynb"), as_version=4)
    broken.cells.append(code("1 / 0"))
    nbformat.write(broken, path.with_name("apart.ipynb"))
    for name, message in [("apart", "error: notebooks/apart.ipynb: [^$]*by zero"), ("none", "no such notebook")]:
        with pytest.raises(SystemExit, match=message):
            main(["page", name])
    assert nbformat.read(target, as_version=4) == done
