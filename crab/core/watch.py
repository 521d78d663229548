"""Processes that other processes wait for: what to do once one of them has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import psutil


def when_ended(processes: Sequence[psutil.Process], action: Callable[[], None], name: str) -> None:
    """Call ``action`` in a thread of this ``name`` as soon as one of the processes has ended. A zombie has ended."""

    def watch() -> None:
        try:
            while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
                time.sleep(0.5)
        except psutil.NoSuchProcess:
            pass
        action()

    threading.Thread(target=watch, name=name, daemon=True).start()
