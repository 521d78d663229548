import time
from types import SimpleNamespace

import pytest

from crab.world.generate import build


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A tiny tree of every slot, built in this process, with its counts and its summary."""
    root = tmp_path_factory.mktemp("world") / "tree"
    counts = {"seed": 5, "train": 4, "test": 3, "caption": 3}
    began = time.process_time()
    summary = build(root, **counts, workers=1, progress=False)
    return SimpleNamespace(root=root, counts=counts, summary=summary, cost=time.process_time() - began, **counts)
