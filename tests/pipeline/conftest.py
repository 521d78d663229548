"""Fixtures of the pipeline's tests."""

import copy
import shutil
from pathlib import Path

import pytest
from nbformat.v4 import new_markdown_cell
from toys import REPOSITORY, code, write_notebook

from crab.pipeline import params


@pytest.fixture(scope="session")
def _first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(REPOSITORY / "params.yaml", folder)
    (folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    (folder / "crab").mkdir()
    values = params.resolve(folder, "tiny")
    for stage in params.STAGES:
        write_notebook(folder, stage, {"profile": "tiny", **values[stage]}, new_markdown_cell("words"), code("1 + 1"))
    return folder


@pytest.fixture
def repository(_first, tmp_path: Path) -> Path:
    """A folder that looks like this repository to the runner: the real params.yaml and notebooks that do nothing."""
    return shutil.copytree(_first, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def _contents() -> dict:
    return params.load(REPOSITORY)


@pytest.fixture
def loaded(_contents, monkeypatch) -> dict:
    """The contents of params.yaml, which a test may change."""
    contents = copy.deepcopy(_contents)
    monkeypatch.setattr(params, "load", lambda folder: contents)
    return contents
