"""Worker processes that do not outlive the process that started them."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """End this worker as soon as its parent has died, however it died; the initializer of a pool of spawned processes.

    A pool tells its workers to stop, but a killed parent can no longer do so: they would finish their jobs, and then wait
    for the next one for good. Each worker holds a pipe whose other end is the parent's, and closes with it.

    Raises:
        RuntimeError: in a process that `multiprocessing` did not start.
    """
    parent = parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent: this is no worker; give it to a pool as its initializer")

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # at once: the main thread is in the midst of a job, which nobody waits for

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
