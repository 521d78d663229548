"""The house: imports run downwards only, every room says what it is for, and no module is too long to read."""

import ast
from pathlib import Path

import pytest

import crab

ROOT = Path(crab.__file__).parent
ORDER = ["tasks", "data", "world", "models", "study", "analyses", "pipeline"]
FILES = sorted(ROOT.rglob("*.py"))


def rooms_of(path: Path) -> set[str]:
    """Rooms that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.split(".")[1] for name in names if name.startswith("crab.")}


@pytest.mark.parametrize("room", ORDER)
def test_imports_run_downwards(room):
    below = {*ORDER[: ORDER.index(room) + 1], "ilora"} - ({"ilora"} if room in ("tasks", "data", "world") else set())
    for path in sorted((ROOT / room).rglob("*.py")):
        assert rooms_of(path) <= below, path


def test_ilora_stands_alone_and_tasks_need_no_torch():
    for path in sorted((ROOT / "ilora").rglob("*.py")):
        assert rooms_of(path) <= {"ilora"}, path
    for path in sorted((ROOT / "tasks").rglob("*.py")):
        assert "import torch" not in path.read_text(encoding="utf-8"), path


def test_no_stranger_among_the_rooms():
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*ORDER, "ilora"}


@pytest.mark.parametrize("room", [*ORDER, "ilora"])
def test_a_room_says_what_it_is_for(room):
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
    assert text and len(text.split()) > 20


def test_modules_are_short():
    long = {path.name: n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 350}
    assert not long
