"""The page of `make scale` at a small size: its claims hold, and its parts work."""

from pathlib import Path

import nbformat
import pytest

from crab.pipeline import params

NOTEBOOK = Path(__file__).parents[2] / "notebooks/scale.ipynb"
SMALL = {
    "counts": [64, 256], "steps": 4, "samples": 16, "repeats": 1, "records": 2000, "workers": 2, "shard_mib": 1,
    "clip": {"fps": 30, "width": 160, "height": 120},
}  # fmt: skip


@pytest.mark.slow
def test_memory_losses_and_lists_at_a_small_size(monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    _, values = params.cell(NOTEBOOK, notebook)
    assert set(SMALL) <= set(values)
    values |= SMALL
    monkeypatch.chdir(NOTEBOOK.parent)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            exec(compile(cell.source, cell.id, "exec"), values)
    memory = values["memory"]
    assert len(memory) == 4 and (memory["MiB"] < 1536).all() and (values["spans"] < 100).all()
    assert values["shard"]["shard"] > 0.5 and (values["largest"] < 1e-5).all()
    assert set(values["median"].index) == set(values["loop"]["way"]) and (values["loop"]["seconds"] > 0).all()
    assert values["many"]["records"] == 2000 and values["many"]["peak MiB"] < 500
    assert not values["folder"].exists()
