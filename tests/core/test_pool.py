"""Jobs in worker processes."""

import os
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from crab.core.pool import run_pool
from crab.core.workers import end_with_parent


def test_results_by_name_from_other_processes():
    results = run_pool([("a", os.getpid), ("b", partial(divmod, 7, 2))], 2, "count")
    assert results["b"] == (3, 1) and results["a"] != os.getpid()
    assert run_pool([("a", os.getpid)], 2, "count")["a"] != os.getpid()  # its threads do not depend on its company
    assert run_pool([("a", os.getpid)], 1, "count") == {"a": os.getpid()}


@pytest.mark.parametrize(
    ("there", "visible", "workers", "given"),
    [
        (4, None, 2, ["0", "1"]),
        (2, None, 4, ["0", "1"]),  # never more workers than GPUs
        (2, "5, GPU-7a", 2, ["5", "GPU-7a"]),  # those that were chosen for this process
    ],
)
def test_each_worker_has_a_gpu_of_its_own(monkeypatch, there, visible, workers, given):
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = {}
    for number in range(12):  # until both workers got a job
        names |= run_pool([(f"{number}", gpu_of_worker), (f"{number} too", gpu_of_worker)], workers, "count")
    assert sorted(set(names.values())) == [(name, 1) for name in given]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def gpu_of_worker():
    """The GPU of this process, and how many it had in its life."""
    global _gpus
    _gpus = {*globals().get("_gpus", ()), os.environ["CUDA_VISIBLE_DEVICES"]}
    time.sleep(0.05)
    return os.environ["CUDA_VISIBLE_DEVICES"], len(_gpus)


def test_one_gpu_means_no_other_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert set(run_pool([("a", os.getpid), ("b", os.getpid)], 4, "count").values()) == {os.getpid()}


def test_results_are_in_the_order_of_the_jobs():
    assert list(run_pool([("slow", partial(time.sleep, 1.0)), ("quick", os.getpid)], 2, "count")) == ["slow", "quick"]


def fill_and_free():
    """Take and free 300 MB below a block that stays, as a training does; the memory in use while it is taken."""
    global _stays
    blocks = [bytearray(100_000) for _ in range(3000)]
    _stays = bytearray(100_000)
    blocks.clear()
    return psutil.Process().memory_info().rss


def resident():
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux keeps memory")
def test_a_worker_gives_back_what_its_jobs_have_freed():
    jobs = [("fill", fill_and_free), ("fill too", fill_and_free)]  # one for each worker
    before = run_pool(jobs, 2, "memory")
    after = run_pool([("a", resident), ("b", resident)], 2, "memory")
    assert max(after.values()) < max(before.values()) - 200e6


def test_a_failing_job_is_named():
    with pytest.raises(RuntimeError, match="count bad failed: .*zero"):
        run_pool([("good", partial(divmod, 1, 1)), ("bad", partial(divmod, 1, 0))], 2, "count")


def test_workers_are_kept_for_the_next_jobs_until_one_fails():
    def pids():
        return set(run_pool([("a", os.getpid), ("b", os.getpid)], 2, "count").values())

    first = pids()
    assert first & pids()
    with pytest.raises(RuntimeError, match="count bad failed"):
        run_pool([("good", os.getpid), ("bad", partial(divmod, 1, 0))], 2, "count")
    assert not first & pids()


def test_a_killed_worker_does_not_spoil_the_next_jobs():
    with pytest.raises(RuntimeError, match="count [ab] failed"):
        run_pool([("a", partial(time.sleep, 0.1)), ("b", partial(os._exit, 1))], 2, "count")
    assert list(run_pool([("a", os.getpid), ("b", os.getpid)], 2, "count")) == ["a", "b"]


def test_wrong_jobs():
    with pytest.raises(ValueError, match="one name.*a"):
        run_pool([("a", os.getpid), ("a", os.getpid)], 2, "count")
    with pytest.raises(ValueError, match="at least 1"):
        run_pool([], 0, "count")


INTERRUPTED = """
import os, signal, sys, time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Timer
from crab.core.pool import run_pool

def job(folder):
    with ExitStack() as stack:
        stack.callback((folder / f"tidied {os.getpid()}").touch)
        (folder / f"started {os.getpid()}").touch()
        time.sleep(60)

def interrupt(folder):
    while len(list(folder.glob("started *"))) < 2:
        time.sleep(0.05)
    os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_pool([("a", os.getpid), ("b", os.getpid)], 2, "idle")
    if sys.argv[2] == "idle":  # as when a notebook's kernel ends
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.killpg(0, signal.SIGINT)
        time.sleep(1)
        sys.exit()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in its background ignores interrupts
    Timer(0, interrupt, [folder]).start()
    try:
        run_pool([("c", partial(job, folder)), ("d", partial(job, folder))], 2, "busy")
    except KeyboardInterrupt:
        sys.exit("interrupted")
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_an_interrupt_ends_workers_silently_and_lets_their_jobs_tidy_up(tmp_path, state):
    (tmp_path / "script.py").write_text(INTERRUPTED, encoding="utf-8")
    command = [sys.executable, "script.py", str(tmp_path), state]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "start_new_session": True, "timeout": 180}
    run = subprocess.run(command, **options)
    assert "Traceback" not in run.stderr
    if state == "busy":
        assert run.returncode == 1 and "interrupted" in run.stderr
        assert len(list(tmp_path.glob("tidied *"))) == len(list(tmp_path.glob("started *"))) == 2


# Each leaves files in the folder as soon as its workers are busy, for longer than the test lasts.
PARENTS = {
    "pool": """
import sys
from functools import partial
from crab.core.pool import run_pool
work = "open(%r, 'w')\\nfor _ in iter(int, 1): pass"
run_pool([(n, partial(exec, work % f"{sys.argv[1]}/{n}", {})) for n in "ab"], 2, "work")
""",
    "build": """
import sys
from crab.world.generate import build
build(sys.argv[1] + "/world", train=4000, test=1, workers=2, slots=["arig"], progress=False)
""",
}


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def running(process):
    try:  # an orphan that has ended may stay a zombie
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("name", PARENTS)
def test_workers_end_with_a_killed_parent(name, tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENTS[name], str(tmp_path)])
    workers = []
    try:
        pattern = {"pool": "[ab]", "build": ".world*/AVUIE_2/**/*.jpg"}[name]
        until(lambda: len(list(tmp_path.glob(pattern))) > 1 or parent.poll() is not None)
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert sum("spawn_main" in " ".join(w.cmdline()) for w in workers) == 2
        parent.kill()
        parent.wait()
        until(lambda: not any(map(running, workers)), 20)
    finally:
        parent.kill()
        parent.wait()
        for worker in filter(running, workers):
            worker.kill()


def test_only_a_worker_has_a_parent_to_end_with():
    with pytest.raises(RuntimeError, match="is not a worker"):
        end_with_parent()
