"""What each stage's result hangs on in code: its notebook's code cells, and the modules of `crab` these import.

``python -m crab.study.code`` (the DVC stage `sources`) writes, for each notebook,

- ``.stage/<name>.json``: its code cells, and a digest of every module of `crab` it imports, directly or
  through others. The stage depends on this file, so that nothing else makes it run again: not a notebook
  saved with outputs, not its prose, not a comment or docstring, not a module it never imports.
- ``.stage/notebooks/<name>.ipynb``: the notebook without outputs, for the report, which shows the prose of now.

``python -m crab.study.code STAGE`` prints the files that stage hangs on. Imports are found by reading the
code (`ast`), wherever they stand, also inside functions; ``importlib`` with a name put together is not seen.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crab.data.files import atomic_file, atomic_folder, write_json
from crab.pipeline.ipynb import nbformat
from crab.pipeline.paths import root

FOLDER = ".stage"
PACKAGE = "crab"


def plain(code: str, name: str = "<code>") -> str:
    """``code`` without comments, docstrings and blank lines: what can change a result.

    The text itself is kept, not a dump of its tree, so that all versions of Python agree on it.

    Raises:
        ValueError: when it is not Python (also for IPython magics and shell lines, whose files nobody sees).
    """
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"{name}: line {error.lineno} is not plain Python ({error.msg}); magics are not tracked") from None
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                # the tree counts columns in bytes
                head = lines[first.lineno - 1].encode()[: first.col_offset].decode()
                tail = lines[first.end_lineno - 1].encode()[first.end_col_offset :].decode()
                lines[first.lineno - 1 : first.end_lineno] = [head + '""' + tail] + [""] * (first.end_lineno - first.lineno)
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


def _named(code: str, package: str) -> Iterator[str]:
    """Dotted names that ``code`` imports; relative ones are resolved against ``package``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join(parts + ([node.module] if node.module else []))
            yield stem
            # `from a import b`: b may be a module
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def _file(folder: Path, name: str) -> Path | None:
    path = folder.joinpath(*name.split("."))
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def modules(folder: Path, code: str) -> list[Path]:
    """Files of `crab` that importing ``code`` may load, sorted, relative to ``folder``.

    Each package on the way counts with its ``__init__.py``, which Python runs first.
    """
    found: dict[str, Path] = {}
    waiting = list(_named(code, ""))
    while waiting:
        parts = waiting.pop().split(".")
        if parts[0] != PACKAGE:
            continue
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            path = None if name in found else _file(folder, name)
            if path is not None:
                found[name] = path.relative_to(folder)
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                waiting += _named(path.read_text(), package)
    return sorted(found.values())


def code_cells(notebook: Any, name: str) -> list[str]:
    """Code of the notebook, cell by cell, as `plain` text; without the parameters cell, since params.yaml sets those."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])]
    return [plain(c.source, f"{name}, code cell {i}") for i, c in enumerate(cells, 1)]


def stripped(notebook: Any) -> Any:
    """The notebook without outputs and counts, in place."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = {k: v for k, v in notebook.metadata.items() if k == "kernelspec"}
    return notebook


def sources(folder: Path, path: Path) -> dict[str, Any]:
    """Code cells of the notebook at ``path``, and the SHA-256 of each module's `plain` text."""
    cells = code_cells(nbformat.read(path, as_version=4), path.name)
    return {
        "cells": cells,
        "modules": {
            module.as_posix(): hashlib.sha256(plain((folder / module).read_text(), str(module)).encode()).hexdigest()
            for module in modules(folder, "\n".join(cells))
        },
    }


def write(folder: Path) -> None:
    """Write ``.stage`` for all notebooks."""
    with atomic_folder(folder / FOLDER) as out:
        (out / "notebooks").mkdir()
        for path in sorted((folder / "notebooks").glob("*.ipynb")):
            write_json(out / f"{path.stem}.json", sources(folder, path))
            with atomic_file(out / "notebooks" / path.name) as temporary:
                nbformat.write(stripped(nbformat.read(path, as_version=4)), temporary)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m crab.study.code", description=__doc__)
    parser.add_argument("stage", nargs="?", help="print what this stage hangs on, and write nothing")
    stage = parser.parse_args(arguments).stage
    try:
        if stage is None:
            write(root())
        else:
            print(*sources(root(), root() / "notebooks" / f"{stage}.ipynb")["modules"], sep="\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
