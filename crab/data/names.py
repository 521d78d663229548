"""Files of nearly the same name: other systems change case, and the form in which accents are stored."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from crab.tasks import FOLDER


def near(root: Path, path: str, listings: dict[Path, dict[str, str]]) -> str:
    """Words for a missing file if one of nearly its name is there, else nothing.

    Args:
        path: under the root, from AVUIE_2 on. listings: what is known of folders; more is added.
    """
    repeated = path[path.rindex(f"{FOLDER}/") :]
    if repeated != path and os.path.exists(root / repeated):
        return f"does not exist, but {repeated!r} does; give the path below the folder of the slot's media"
    at = root
    for part in Path(path).parts:
        name = part if os.path.exists(at / part) else _listing(at, listings).get(_plain(part))
        if name is None:
            return ""
        at /= name
    there = at.relative_to(root).as_posix()
    if there == path or at.is_dir():
        return ""
    ways = {
        "the form of its accents (Unicode NFC or NFD)": _composed,
        "case": lambda name: _composed(name).casefold(),
        "white space": _plain,
    }
    way = next((way for way, change in ways.items() if change(there) == change(path)), "white space")
    shown = at.name if Path(there).parent == Path(path).parent else there
    return f"does not exist, but {shown!r} does, which differs in {way}; rename the file, or correct the record"


def _listing(folder: Path, listings: dict[Path, dict[str, str]]) -> dict[str, str]:
    """Plain name -> name, of what is in a folder."""
    if folder not in listings:
        try:
            listings[folder] = {_plain(name): name for name in os.listdir(folder)}
        except OSError:  # no folder, or one that may not be read
            listings[folder] = {}
    return listings[folder]


def _plain(name: str) -> str:
    return _composed(name).casefold().strip()


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
