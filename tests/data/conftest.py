from types import SimpleNamespace

import pytest

from crab.data import probe
from crab.world.generate import build

PROBE_ALL = probe.probe_all


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A tiny tree of every slot, with the numbers it was built from."""
    root = tmp_path_factory.mktemp("data") / "tree"
    counts = {"seed": 5, "train": 4, "test": 3, "caption": 3}
    return SimpleNamespace(root=root, counts=counts, summary=build(root, **counts, workers=1, progress=False), **counts)


@pytest.fixture(scope="module")
def probed_here():
    """Probe files in this process: no other one must start, but nothing can be killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "probe_all", lambda jobs, *_: ((job, probe.probe(*job)) for job in jobs))
        yield


@pytest.fixture
def probed_apart(probed_here, monkeypatch):
    """Probe files in worker processes again."""
    monkeypatch.setattr(probe, "probe_all", PROBE_ALL)
