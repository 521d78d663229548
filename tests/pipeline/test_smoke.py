"""The real smoke study, from a fresh clone. A file of its own, so that it runs beside the other slow tests."""

import time

import pytest
from toys import choose, clone, ran, sh

from crab.pipeline import params
from crab.pipeline.params import STAGES

pytestmark = pytest.mark.slow


def test_the_smoke_study_runs_twice_and_its_notebooks_reproduce_themselves(tmp_path):
    """The real thing: every stage, then nothing, then each executed notebook again by nbval with equal metrics."""
    folder = clone(tmp_path / "smoke")
    choose(folder, "smoke")
    begin = time.monotonic()
    stages = ran(sh(folder, "dvc", "repro", seconds=1800))  # minutes, but not on a busy machine
    print(f"smoke study: {time.monotonic() - begin:.0f} s")
    assert {f"{stage}@smoke" for stage in STAGES} <= set(stages)
    assert ran(sh(folder, "dvc", "repro")) == []
    reports = folder / "reports/smoke"
    assert "&lt;" in (reports / "pages/evaluate.html").read_text(encoding="utf-8")  # answers are shown with their tags

    def metrics() -> dict[str, str]:
        paths = sorted(p for p in reports.rglob("*.json") if p.parent.name != "benchmark")  # times differ
        return {str(path): path.read_text(encoding="utf-8") for path in paths}

    before = metrics()
    assert before
    notebooks = [f"reports/smoke/{stage}/notebook.ipynb" for stage in params.notebooks(folder)]
    nbval = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-kernel-name", "python3"]
    sh(folder, *nbval, *notebooks, seconds=1800)
    assert metrics() == before
