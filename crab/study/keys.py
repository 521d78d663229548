"""What decides a result, as a short hash: equal keys mean equal results, up to rounding on another machine."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import crab
from crab.study.code import modules, plain


def key_of(what: Any) -> str:
    """Hash of anything JSON can hold, and of other things' text: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code_digest(imports: str, *own: Path) -> str:
    """Digest of the `plain` text of all modules that ``imports`` may load, and of the files ``own``."""
    folder = Path(crab.__file__).parents[1]
    paths = [folder / path for path in modules(folder, imports)] + list(own)
    return hashlib.sha256("".join(plain(path.read_text(), path.name) for path in paths).encode()).hexdigest()


def base_digest(base: str | Path) -> str:
    """Digest of a base's weights and configuration; files over 256 MB count by name, size and date. None there: ValueError."""
    files = sorted(p for p in Path(base).rglob("*") if p.suffix in (".safetensors", ".json"))
    if not files:
        raise ValueError(f"{base}: no base model there; run the base stage")
    return _digest_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache  # a grid asks for each of its cells
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, changed in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if size < 2**28 else f"{size} {changed}".encode())
    return digest.hexdigest()
