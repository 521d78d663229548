"""Files are whole or not there: what killed processes leave is cleared, and a full disk is told in one line."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crab.core import files
from crab.core.files import DiskFullError, atomic_file, atomic_folder, clear_unfinished

KILLED = """
import os, signal, sys
from crab.core.files import atomic_file, atomic_folder
with atomic_folder(sys.argv[1] + "/made") as folder, atomic_file(sys.argv[1] + "/deep/down/table.csv.xz") as file:
    for path in (folder / "inside.txt", file):
        path.write_text("half", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_a_killed_process_left_is_cleared_and_a_live_one_keeps_its_own(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (tmp_path / ".mine.partial.txt").write_text("a file of the user", encoding="utf-8")
    assert len(left(tmp_path)) == 3
    with atomic_folder(tmp_path / "live") as folder, atomic_file(tmp_path / "live.json") as file:
        (folder / "a").touch()
        file.touch()
        clear_unfinished(tmp_path, deep=False)
        assert len(left(tmp_path / "deep")) == 1
        clear_unfinished(tmp_path)
        assert left(tmp_path / "deep") == []
    assert left(tmp_path) == [".mine.partial.txt", "live.json", "live/a"]


def test_a_later_process_of_the_same_number_did_not_write_it(tmp_path):
    path = tmp_path / f".table.{files._HOST}-{os.getpid()}.partial.csv"
    path.touch()
    clear_unfinished(tmp_path)
    assert path.exists()
    os.utime(path, (0, 0))  # long before this process began
    clear_unfinished(tmp_path)
    assert not path.exists()


def test_files_of_another_machine_stay(tmp_path):
    """On a shared disk: whether its process lives cannot be known here."""
    path = tmp_path / ".table.0a1b2c-1.partial.csv"
    path.touch()
    clear_unfinished(tmp_path)
    assert path.exists()


def full_by_system(path: Path) -> None:
    path.symlink_to("/dev/full")
    path.write_text("x", encoding="utf-8")


def full_by_words(path: Path) -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


def full_by_space(path: Path) -> None:
    raise RuntimeError("file write failed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this file")
@pytest.mark.parametrize("write", [full_by_system, full_by_words, full_by_space])
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_full_disk_is_told_in_one_line_with_the_file(tmp_path, monkeypatch, write, atomic):
    target = tmp_path / "table.csv"
    if write is full_by_space:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    message = f"^{re.escape(str(target))}: no space is left on its disk; free some, and run it again$"
    with pytest.raises(DiskFullError, match=message) as error, atomic(target) as part:
        write(part / "inside" if part.is_dir() else part)
    assert left(tmp_path) == []
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as it comes from a worker


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a"), atomic_file(tmp_path / "a" / "b"):
        print(1 / 0)
    assert left(tmp_path) == []


def test_json_that_is_missing_or_damaged_is_told_apart_and_is_a_value_error_either_way(tmp_path):
    (tmp_path / "damaged.json").write_text('{"a": 1,\n', encoding="utf-8")
    with pytest.raises(ValueError, match="missing.json: no such file; run the stage") as missing:
        files.read_json(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="damaged.json: malformed JSON at line 2; delete it") as damaged:
        files.read_json(tmp_path / "damaged.json")
    assert [isinstance(each.value, files.MissingFileError) for each in (missing, damaged)] == [True, False]
