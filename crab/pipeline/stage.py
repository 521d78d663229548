"""Run a stage: execute its notebook with the parameters of its section, and leave a page to read.

``python -m crab.pipeline.stage STAGE [--profile P] [--method M]`` executes ``notebooks/STAGE.ipynb`` and writes

- ``reports/<profile>/<name>/notebook.ipynb``, the executed notebook, only when every cell succeeded;
- ``reports/<profile>/pages/<name>.html``, always: where a cell failed, it shows which and why.

The name is the stage's, with ``-<method>`` where there is one.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import psutil

from crab.data.files import atomic_file
from crab.pipeline import params
from crab.pipeline.ipynb import nbformat
from crab.pipeline.paths import root


class StageError(RuntimeError):
    """A notebook's cell failed, or its kernel died."""


#: What a page adds to Jupyter's own looks: a long table scrolls, and leaves what follows in sight.
_STYLE = "<style>.jp-OutputArea-output.jp-RenderedHTML { max-height: 48em; overflow: auto; }</style>"
_NO_NAME = "No description has been provided for this image"  # what nbconvert calls every figure
_PROGRESS = re.compile(r"\d+%\||\d+(it)? \[\d+:\d+")


def page(notebook: Any, title: str, inputs: bool = True) -> str:
    """The notebook as one self-contained HTML page (images embedded); without its code if not ``inputs``.

    Default parameters that were replaced and progress bars are left out, and a figure is named by the heading it stands under.
    """
    from nbconvert import HTMLExporter

    notebook, heading, figures = copy.deepcopy(notebook), title, []
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        notebook.cells = [cell for cell in notebook.cells if "parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if found := re.findall(r"^#+ (.+)", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []:
            heading = found[-1]
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    output.text = "".join(line for line in output.text.splitlines(True) if not _PROGRESS.search(line))
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" or output.text.strip()]
        figures += [heading for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    exporter = HTMLExporter(
        embed_images=True,
        exclude_input=not inputs,
        exclude_input_prompt=not inputs,
        exclude_output_prompt=not inputs,
    )
    exporter.log.setLevel(logging.ERROR)  # it would warn of the names that figures get below
    html, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title, "path": str(root())}})
    headings = iter(figures)
    html = re.sub(_NO_NAME, lambda found: escape(next(headings, title)), html)
    return html.replace("</head>", f"{_STYLE}</head>", 1)


class _Meter(threading.Thread):
    """Peak memory of this process' descendants, in GiB, sampled each half second, or less often where looking takes long.

    Memory they share counts once (proportional set size) where the system tells, else each time. To tell, the system
    walks through all their pages: at two looks a second that took a tenth of a core from large workers.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        pause = 0.5
        while not self._stop_asked.wait(pause):
            begin, total = time.thread_time(), 0
            for process in psutil.Process().children(recursive=True):
                try:
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
                except psutil.Error:
                    continue  # it has ended meanwhile
            self.peak = max(self.peak, total / 2**30)
            pause = max(0.5, 50 * (time.thread_time() - begin))  # 2 % of a core at most

    def stop(self) -> float:
        self._stop_asked.set()
        self.join()
        return self.peak


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Kernels import `crab` of this repository, and run this interpreter, not another of the user's."""
    new = {"PYTHONPATH": str(folder), "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    # bars are text in a page that outlives its kernel; PEFT asks transformers by an old name, which nobody here can mend
    new["PYTHONWARNINGS"] = "ignore:IProgress not found,ignore:`is_gradient_checkpointing`"
    old = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _tidy(notebook: Any) -> None:
    """Drop papermill's clock times and paths of this machine, which would differ with every run.

    Of each progress bar only the last state stays: a page is read when all is over.
    """
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    CoalesceStreamsPreprocessor().preprocess(notebook, {})
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":  # warnings name the file they come from
                output.text = output.text.replace(f"{root()}/", "")


def run(stage: str, profile: str | None = None, method: str | None = None, folder: Path | None = None) -> Path:
    """Execute the notebook of ``stage``; returns the executed notebook's path.

    Args:
        stage: name of a notebook in ``notebooks``.
        profile: of params.yaml; by default the one chosen there.
        method: for stages run once a method.

    Raises:
        ValueError: when parameters and notebook do not fit; nothing has run then.
        StageError: when a cell failed; the page is written, the executed notebook is not.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    folder = folder or root()
    source = folder / "notebooks" / f"{stage}.ipynb"
    if not source.is_file():
        raise ValueError(f"{source}: no such notebook; there are {', '.join(sorted(p.stem for p in source.parent.glob('*.ipynb')))}")
    everything = params.load(folder)
    profile = profile or everything["profile"]
    values = params.section(everything, profile, stage, method)
    params.check(source, values)

    name = stage if method is None else f"{stage}-{method}"
    reports = folder / "reports" / profile
    target, html = reports / name / "notebook.ipynb", reports / "pages" / f"{name}.html"
    failure: Exception | None = None
    meter, begin = _Meter(), time.monotonic()
    meter.start()
    # apart from the target's folder, which the notebook itself may replace as a whole
    reports.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=reports) as apart:
        temporary = Path(apart) / "notebook.ipynb"
        try:
            with _environment(folder):
                papermill.execute_notebook(
                    source,
                    temporary,
                    parameters=values,
                    kernel_name="python3",
                    language="python",
                    cwd=source.parent,
                    log_output=True,
                    progress_bar=False,
                    extra_arguments=["--log-level=40"],  # of the kernel: errors only
                )
        except (papermill.exceptions.PapermillExecutionError, DeadKernelError) as error:
            failure = error
        notebook = nbformat.read(temporary, as_version=4)
    _tidy(notebook)
    notebook.metadata["crab"] = {"seconds": round(time.monotonic() - begin, 1), "peak_gib": round(meter.stop(), 2)}
    with atomic_file(html) as part:
        part.write_text(page(notebook, f"{name} ({profile})"))
    if failure is not None:
        raise StageError(f"{source.relative_to(folder)}: {failure}\nSee {html.relative_to(folder)}")
    with atomic_file(target) as part:
        nbformat.write(notebook, part)
    return target


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m crab.pipeline.stage", description=__doc__.splitlines()[0])
    parser.add_argument("stage", help="name of a notebook in notebooks/, e.g. train")
    parser.add_argument("--profile", help="of params.yaml; by default the one chosen there")
    parser.add_argument("--method", help="lora, lora_unrouted, lora_matched or ilora, for stages run once a method")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    # what the cells say, without papermill's own lines about each cell
    chatter = ("Executing ", "Ending ", "Input Notebook", "Output Notebook", "Working directory")
    logging.root.handlers[0].addFilter(lambda record: not record.getMessage().startswith(chatter))
    try:
        run(options.stage, options.profile, options.method)
    except (ValueError, StageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
