"""Worker processes that end when the process that started them ends."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """End this worker as soon as its parent is dead. Use it as the initializer of a pool of spawned processes.

    A killed parent cannot stop its workers, and they would wait for the next job for ever. Each worker holds a pipe
    that closes when the parent dies.

    Raises:
        RuntimeError: in a process that `multiprocessing` did not start.
    """
    parent = parent_process()
    if parent is None:
        raise RuntimeError(
            "end_with_parent: this process is not a worker; pass the function to a pool as its initializer"
        )

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # at once: the main thread works on a job whose result nobody waits for

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
