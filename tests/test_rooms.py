"""The house: imports run downwards only, every room says what it is for, and no module is too long to read."""

import ast
import json
from pathlib import Path

import pytest

import crab

ROOT = Path(crab.__file__).parent
ORDER = ["core", "tasks", "data", "world", "models", "samples", "study", "analyses", "pipeline"]
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


def by_locale(text: str) -> list[str]:
    """Calls that read or write text in the encoding of the user's locale."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    without = []
    for call in calls:
        words = {word.arg for word in call.keywords}
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        mode = [value.value for value in [*call.args[1:2], *(w.value for w in call.keywords if w.arg == "mode")]
                if isinstance(value, ast.Constant)]  # fmt: skip
        opens = isinstance(call.func, ast.Name) and name == "open" and "b" not in "".join(map(str, mode))
        runs = name in ("run", "Popen", "check_output") and words & {"text", "universal_newlines"}
        if (opens or runs or name in ("read_text", "write_text")) and "encoding" not in words:
            without.append(ast.unparse(call))
    return without


@pytest.mark.parametrize(("text", "count"), [
    ("open(path)", 1), ("open(path, 'w')", 1), ("open(path, mode='rb')", 0), ("open(path, 'wb')", 0),
    ("open(path, encoding='utf-8')", 0), ("path.read_text()", 1), ("path.write_text(x, encoding='utf-8')", 0),
    ("subprocess.run(x, text=True)", 1), ("subprocess.run(x)", 0), ("av.open(path)", 0),
])  # fmt: skip
def test_calls_that_depend_on_the_locale(text, count):
    assert len(by_locale(text)) == count


def test_text_is_read_and_written_in_utf_8():
    """Else an 8-bit locale changes results."""
    folders = [ROOT, ROOT.parent / "tests"]
    codes = {path: [path.read_text(encoding="utf-8")] for folder in folders for path in folder.rglob("*.py")}
    for path in (ROOT.parent / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        codes[path] = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    calls = {path.name: [call for text in texts for call in by_locale(text)] for path, texts in codes.items()}
    assert not {name: found for name, found in calls.items() if found}, "say encoding='utf-8'"


def test_modules_are_short():
    long = {path.name: n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 350}
    assert not long
