import pytest
from sizes import COARSE

from crab.models import small
from crab.models.base import probes


@pytest.fixture(scope="session")
def size():
    return COARSE


@pytest.fixture(scope="session")
def processor():
    words = sorted({*probes.words(), ","})  # the comma belongs to the answers of the tasks
    return small.build_processor(words, ("<answer>", "</answer>", "<range>", "</range>"), COARSE)


@pytest.fixture(scope="session")
def model(processor):
    return small.build_model(processor, COARSE, seed=0).eval()
