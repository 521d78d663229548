"""Which code decides a result: modules found by reading imports, and a digest that ignores what only people read.

Comments, docstrings, blank lines and the kind of line end do not count. Imports are found with `ast` wherever they
stand, also inside functions; a module that is imported by a name put together at run time is not found.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import crab
from crab.core.files import read_json

PACKAGE = "crab"
#: The list of code that counts as older code: digests, and why. Relative to the folder of the package.
ACCEPTED = "crab/core/accepted.json"
#: Tokens that hold the text of a string. f-strings have tokens of their own since Python 3.12.
_TEXT = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def plain(code: str, name: str = "<code>", cell: bool = False) -> str:
    """``code`` without comments, docstrings and blank lines, with ``\\n`` line ends.

    The rest stays as it is written, so that all versions of Python agree. In a notebook's ``cell`` a string at the top
    is no docstring: it may be what the cell shows.

    Raises:
        ValueError: ``code`` is not Python. This includes IPython magics and shell lines: files they use are not seen.
    """
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise ValueError(
            f"{name}: line {error.lineno} is not plain Python ({error.msg}); correct it, and use no magics (% or !)"
        ) from None
    lines = code.split("\n")  # splitlines() also splits at form feeds and U+2028, where Python does not
    exact = set()  # lines whose end lies inside a string
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.type in _TEXT:
            exact.update(range(row - 1, token.end[0] - 1))
    for node, alone in _docstrings(tree, cell):
        # the tree counts columns in bytes
        head = lines[node.lineno - 1].encode()[: node.col_offset].decode()
        tail = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        text = '""' if alone or head.strip() or tail.strip() else ""
        lines[node.lineno - 1 : node.end_lineno] = [head + text + tail] + [""] * (node.end_lineno - node.lineno)
        exact.difference_update(range(node.lineno - 1, node.end_lineno - 1))
    return "".join(
        f"{line}\n" if number in exact else f"{line.rstrip()}\n"
        for number, line in enumerate(lines)
        if number in exact or line.strip()
    )


def _docstrings(tree: ast.AST, cell: bool) -> Iterator[tuple[ast.Expr, bool]]:
    """Docstrings of a tree, and whether each is all that its function or class holds."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, *(() if cell else (ast.Module,)))
    for node in ast.walk(tree):
        if isinstance(node, kinds) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first, len(node.body) == 1 and not isinstance(node, ast.Module)


def _imports(code: str, package: str) -> Iterator[str]:
    """Dotted names that ``code`` imports. Relative ones are resolved against ``package``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join(parts + ([node.module] if node.module else []))
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)  # `from a import b`: b may be a module


@cache
def _read(path: Path, package: str, changed: int) -> tuple[str, tuple[str, ...]]:
    code = path.read_text(encoding="utf-8")
    text = plain(code, str(path))
    return hashlib.sha256(text.encode()).hexdigest(), tuple(_imports(code, package))


def _file(folder: Path, name: str) -> Path | None:
    path = folder.joinpath(*name.split("."))
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def modules(folder: Path, code: str) -> dict[str, str]:
    """Files of `crab` that importing ``code`` may load: paths relative to ``folder``, digests of their `plain` text.

    Python runs the ``__init__.py`` of each package on the way, so these count too, and so does a YAML file beside a
    module that has its name.
    """
    digests: dict[str, str] = {}
    waiting = list(_imports(code, ""))
    while waiting:
        parts = waiting.pop().split(".")
        names = (".".join(parts[:end]) for end in range(1, len(parts) + 1)) if parts[0] == PACKAGE else ()
        for name in names:
            path = _file(folder, name)
            if path is None or (key := path.relative_to(folder).as_posix()) in digests:
                continue
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            digests[key], imports = _read(path, package, path.stat().st_mtime_ns)
            waiting += imports
            if (data := path.with_suffix(".yaml")).is_file():
                lines = data.read_text(encoding="utf-8").splitlines()
                text = "\n".join(line for line in lines if not line.startswith("#"))
                digests[data.relative_to(folder).as_posix()] = hashlib.sha256(text.encode()).hexdigest()
    return dict(sorted(digests.items()))


def modules_of(names: Iterable[str], folder: Path | None = None) -> dict[str, str]:
    """`modules` of this package, or of the one in ``folder``, from dotted names such as ``crab.study.train``.

    Raises:
        ValueError: there is no module of that name.
    """
    folder, names = folder or Path(crab.__file__).parents[1], list(names)
    for name in names:
        if _file(folder, name) is None:
            raise ValueError(f"{name}: no such module in {folder}; correct the name where its digest is taken")
    return modules(folder, "\n".join(f"import {name}" for name in names))


@cache
def code_digest(*names: str) -> str:
    """Digest of these modules of `crab` (dotted names) and of all that they import. ValueError: no such module.

    Code that is known to give the same as older code has the digest of that code (`crab.pipeline.accept`).
    """
    return digest_in(Path(crab.__file__).parents[1], names)


def digest_in(folder: Path, names: Iterable[str]) -> str:
    """`code_digest` of the package in ``folder``, by the accepted code that is listed there."""
    digest, known = own_digest(folder, names), accepted(folder)
    return known[digest]["counts_as"] if digest in known else digest


def accepted(folder: Path) -> dict[str, dict[str, str]]:
    """What is accepted of the package in ``folder``, by digest: what it ``counts_as``, ``why``, and its ``modules``."""
    path = folder / ACCEPTED
    return read_json(path) if path.is_file() else {}


def own_digest(folder: Path, names: Iterable[str]) -> str:
    """Digest of the modules as they are, whatever is accepted."""
    return hashlib.sha256("\n".join(modules_of(names, folder).values()).encode()).hexdigest()
