"""Run a stage: execute its notebook with its parameters, and leave a page to read."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from crab.core.files import atomic_file, clear_unfinished, digest_of, read_json, temporary_folder
from crab.core.watch import when_ended
from crab.pipeline import params, report
from crab.pipeline.params import nbformat
from crab.pipeline.stages import FOLDER

_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")
_TABLE = re.compile(r'<table id="(T_[0-9a-f]+)"')
#: How papermill executes every notebook. The kernel logs errors only.
EXECUTION = {
    "kernel_name": "python3", "language": "python", "log_output": True, "progress_bar": False,
    "extra_arguments": ["--log-level=40"],
}  # fmt: skip
_PROGRESS = re.compile(r"\d+%\||\d+(it)? \[\d+:\d+")


class StageError(RuntimeError):
    """A notebook's cell failed, or its kernel died."""


class _Meter(threading.Thread):
    """Peak memory of this process' descendants, in GiB. Memory that they share counts once where the system tells."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stop = 0.0, threading.Event()

    def run(self) -> None:
        pause = 0.5
        while not self.stop.wait(pause):
            begin, total = time.thread_time(), 0
            for process in psutil.Process().children(recursive=True):
                try:
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
                except psutil.Error:
                    continue  # it has ended meanwhile
            self.peak = max(self.peak, total / 2**30)
            # the system walks through all pages of large processes: take 2% of a core at most
            pause = max(0.5, 50 * (time.thread_time() - begin))


def end_with_dvc() -> None:
    """End this process and all that it started as soon as the DVC process that runs the stage is dead.

    DVC starts a command through a shell, which lives on after it. Without DVC nothing happens.
    """
    if "DVC_STAGE" not in os.environ:
        return

    def inside(process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return "DVC_STAGE" in process.environ()
        return False

    dvc = next((process for process in psutil.Process().parents() if not inside(process)), None)

    def end() -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
        os._exit(1)

    if dvc is not None:
        when_ended([dvc], end, "end-with-dvc")


@contextmanager
def _environment(folder: Path, scratch: Path) -> Iterator[None]:
    """Kernels run this interpreter and import `crab` of ``folder``. They read no start-up file or style of the user."""
    before = dict(os.environ)
    for name in ("JUPYTER_CONFIG_PATH", "JUPYTER_PATH", "MPLBACKEND", "PYTHONSTARTUP"):
        os.environ.pop(name, None)
    os.environ |= {
        **dict.fromkeys(("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"), str(scratch)),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MATPLOTLIBRC": str(Path(find_spec("matplotlib").origin).parent / "mpl-data" / "matplotlibrc"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONPATH": str(folder),
        "PYTHONUTF8": "1",
        # a page has no widgets, so bars are text; PEFT asks transformers by an old name, which we cannot change
        "PYTHONWARNINGS": "ignore:IProgress not found,ignore:`is_gradient_checkpointing`",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _tidy(notebook: Any, folder: Path) -> None:
    """Drop what differs between runs (times, paths of this machine) and progress bars."""
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    CoalesceStreamsPreprocessor().preprocess(notebook, {})
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill draws one at random, and pandas draws the names of tables
        for data in (output.data for output in cell.get("outputs", []) if "data" in output):
            if "text/plain" in data:
                data["text/plain"] = _ADDRESS.sub(">", data["text/plain"])
            for table in dict.fromkeys(_TABLE.findall(data.get("text/html", ""))):
                name = f"T_{digest_of(data['text/html'].replace(table, ''))[:8]}"
                data["text/html"] = data["text/html"].replace(table, name)
        for output in [o for o in cell.get("outputs", []) if o.output_type == "stream"]:
            output.text = output.text.replace(f"{folder}/", "")  # warnings name the file they come from
            if output.name == "stderr":
                output.text = "".join(line for line in output.text.splitlines(True) if not _PROGRESS.search(line))
            if not output.text.strip():
                cell.outputs.remove(output)


def show_output() -> None:
    """Print what the cells print, without papermill's own lines about each cell."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    chatter = ("Executing ", "Ending ", "Input Notebook", "Output Notebook", "Working directory")
    logging.root.handlers[0].addFilter(lambda record: not record.getMessage().startswith(chatter))


def run(folder: Path, stage: str) -> Path:
    """Execute the notebook of ``stage`` with the parameters in ``.stage/<stage>.json``, which `resolve` writes.

    Returns:
        The executed notebook, ``reports/<profile>/<stage>/notebook.ipynb``. It is written only if every cell succeeded.
        ``pages/<stage>.html`` beside it is always written.

    Raises:
        ValueError: there is no such stage, or it is not resolved.
        StageError: a cell failed; the page shows which and why.
        DiskFullError: there is no space for the executed notebook or its page.
    """
    if stage not in params.STAGES:
        raise ValueError(f"{stage}: there is no such stage; {params.nearest(stage, params.STAGES)}")
    source = params.notebooks(folder)[stage]
    values = read_json(folder / FOLDER / f"{stage}.json")["parameters"]
    reports = folder / "reports" / values["profile"]
    notebook, failure = _execute(folder, source, reports / stage, values)
    page = report.write_page(notebook, stage, reports)
    if failure:
        raise StageError(f"{failure}\nSee {page.relative_to(folder)}")
    return _write(notebook, reports / stage)


def run_alone(folder: Path, name: str) -> Path:
    """`run` for ``notebooks/<name>.ipynb``, which is no stage: with the parameters that it holds, and without a page.

    Returns the executed notebook, ``reports/<name>/notebook.ipynb``.
    """
    source = folder / "notebooks" / f"{name}.ipynb"
    if not source.is_file():
        raise ValueError(f"{source}: there is no such notebook")
    notebook, failure = _execute(folder, source, folder / "reports" / name, {})
    if failure:
        raise StageError(failure)
    return _write(notebook, folder / "reports" / name)


def _write(notebook: Any, reports: Path) -> Path:
    with atomic_file(reports / "notebook.ipynb") as part:
        nbformat.write(notebook, part)
    return reports / "notebook.ipynb"


def _execute(folder: Path, source: Path, reports: Path, values: Mapping[str, Any]) -> tuple[Any, str]:
    """The executed notebook, without what differs between runs, and what went wrong; empty if nothing did."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    for name in ("data", "models", "reports", "runs"):
        clear_unfinished(folder / name)
    failure: Exception | None = None
    meter, begin = _Meter(), time.monotonic()
    meter.start()
    # outside the stage's folder, which the notebook itself may replace as a whole
    with temporary_folder(reports) as scratch:
        temporary = scratch / "notebook.ipynb"
        try:
            with _environment(folder, scratch):
                papermill.execute_notebook(source, temporary, values, cwd=source.parent, **EXECUTION)
        except (papermill.exceptions.PapermillExecutionError, DeadKernelError) as error:
            failure = error
        notebook = params.read_notebook(temporary)
    meter.stop.set()
    meter.join()
    _tidy(notebook, folder)
    notebook.metadata["crab"] = {"seconds": round(time.monotonic() - begin, 1), "peak_gib": round(meter.peak, 2)}
    if failure is None:
        return notebook, ""
    cause = str(failure)
    if "DiskFullError" in cause:  # one line without the traceback
        cause = failure.evalue
    elif "No space left on device" in cause:
        cause = f"{failure.evalue}; free some space, and run the stage again"
    return notebook, f"{source.relative_to(folder)}: {cause}"
