from types import SimpleNamespace

import pytest

from crab.data.generate import build


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A tiny tree of every slot, built in this process, with what it was built from."""
    root = tmp_path_factory.mktemp("data") / "tree"
    counts = {"seed": 5, "train": 4, "test": 3, "caption": 3}
    return SimpleNamespace(root=root, counts=counts, summary=build(root, **counts, workers=1, progress=False), **counts)
