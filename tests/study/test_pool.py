"""Jobs in worker processes."""

import os
import time
from functools import partial

import pytest

from crab.study.pool import run_pool


def test_results_by_name_from_other_processes():
    found = run_pool([("a", os.getpid), ("b", partial(divmod, 7, 2))], 2, "count")
    assert found["b"] == (3, 1) and found["a"] != os.getpid()
    assert run_pool([("a", os.getpid)], 1, "count") == {"a": os.getpid()}


def test_results_stand_in_the_order_of_the_jobs_not_of_their_ends():
    assert list(run_pool([("slow", partial(time.sleep, 1.0)), ("quick", os.getpid)], 2, "count")) == ["slow", "quick"]


def test_a_failing_job_is_named():
    with pytest.raises(RuntimeError, match="count bad failed: .*zero"):
        run_pool([("good", partial(divmod, 1, 1)), ("bad", partial(divmod, 1, 0))], 2, "count")


def test_wrong_jobs():
    with pytest.raises(ValueError, match="one name.*a"):
        run_pool([("a", os.getpid), ("a", os.getpid)], 2, "count")
    with pytest.raises(ValueError, match="at least 1"):
        run_pool([], 0, "count")
