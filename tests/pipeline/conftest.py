"""Fixtures of the pipeline's tests: small folders that look like this repository to the runner."""

from __future__ import annotations

from pathlib import Path

import pytest

PARAMS = """
profile: tiny  # chosen
profiles:
  smoke:
    stage: {passes: 1, rate: 5e-3}
    methods: {lora: {r: 1}}
  tiny:
    stage: {passes: 8, rate: 1}
    methods: {lora: {r: 4}, ilora: {r: 4, num_heads: 3}}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with params.yaml, an empty `crab`, a dvc.yaml that marks the root, and no notebook."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "crab").mkdir()
    (tmp_path / "notebooks").mkdir()
    return tmp_path
