"""Files that are either whole or not there, JSON, and digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_UNFINISHED = re.compile(rf"\..+\.{_HOST}-(\d+)\.partial(\.[^.]*)?")


class DiskFullError(OSError):
    """No space is left for a file, ``filename``."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(errno.ENOSPC, "no space is left on its disk; free some, and run it again", str(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"

    def __reduce__(self) -> tuple:
        return type(self), (self.filename,)


class MissingFileError(FileNotFoundError, ValueError):
    """A file that a stage writes is not there. Like other files that cannot be used, it is a ValueError, too."""


@contextmanager
def check_space(path: str | Path) -> Iterator[None]:
    """Raise a `DiskFullError` that names ``path`` in place of any error that comes of a full disk.

    Writers have errors of their own for this, and some do not say that the disk is full. So its space counts, too.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        folder = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full or shutil.disk_usage(folder).free < 2**16:
            raise DiskFullError(path) from error
        raise


def _unfinished(path: Path, suffix: str = "") -> Path:
    """The name of ``path`` while it is written. It says by which process, for `clear_unfinished`."""
    return path.with_name(f".{path.name.removesuffix(suffix)}.{_HOST}-{os.getpid()}.partial{suffix}")


def clear_unfinished(folder: str | Path, deep: bool = True) -> None:
    """Delete unfinished files and folders in ``folder`` that killed processes of this machine left.

    Args:
        deep: also in its folders.
    """
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path, match = Path(place, name), _UNFINISHED.fullmatch(name)
            if not match:
                continue
            if name in folders:
                folders.remove(name)
            if not _alive(int(match[1]), path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if not deep:
            break


def _alive(number: int, path: Path) -> bool:
    """Whether the process of this number still runs and may have written ``path``. Numbers are used again."""
    try:
        process = psutil.Process(number)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() < path.lstat().st_mtime + 3600  # clocks may differ
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.Error:
        return True


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. It is renamed to ``path`` if the block succeeds, else deleted.

    The temporary name keeps the suffix, because some writers choose a format by it. A full disk is a `DiskFullError`.
    """
    path = Path(path)
    temporary = _unfinished(path, path.suffix)
    try:
        with check_space(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, which is deleted afterwards. A full disk is a `DiskFullError`."""
    temporary = _unfinished(Path(path))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with check_space(path):
            temporary.mkdir(parents=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Like `atomic_file`, for a folder. An older folder of that name is replaced as a whole."""
    with temporary_folder(path) as temporary:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON. NaN and infinity are refused (ValueError)."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="\n")


def read_json(path: str | Path) -> Any:
    """Read JSON. A malformed file is a ValueError that says how to fix it, a missing one a `MissingFileError`."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file; run the stage that writes it (dvc repro)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON at line {error.lineno}; delete it and run its stage again") from None


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, or ``"none"`` if there is no such file."""
    if not Path(path).is_file():
        return "none"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Short digest (16 hexadecimal digits) of anything JSON can hold; other objects count by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
