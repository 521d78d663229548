"""What a stage hangs on: its code and the modules it imports; nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_markdown_cell, new_output
from toys import REPOSITORY, code, environment, write_notebook

from crab.study import code as sources

FILES = {
    "crab/__init__.py": "",
    "crab/a/__init__.py": "from . import near\n",
    "crab/a/near.py": "from ..b.deep import thing\n",
    "crab/a/far.py": "import os\n",
    "crab/b/__init__.py": "",
    "crab/b/deep.py": "def thing():\n    from crab.c import lazy\n    import crab.b.loop\n",
    "crab/b/loop.py": "import crab.b.deep\n",
    "crab/c/__init__.py": "",
    "crab/c/lazy.py": "",
    "crab/c/other.py": "",
}


@pytest.fixture
def package(repository: Path) -> Path:
    for name, text in FILES.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    return repository


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import numpy, os", []),
        ("import crab", ["crab/__init__.py"]),
        ("from crab.c import other", ["crab/__init__.py", "crab/c/__init__.py", "crab/c/other.py"]),
        ("import crab.c.other as x", ["crab/__init__.py", "crab/c/__init__.py", "crab/c/other.py"]),
        # through a package's __init__, a relative import, one inside a function, and round a circle
        ("from crab import a", sorted(set(FILES) - {"crab/a/far.py", "crab/c/other.py"})),
        ("if True:\n    import crab.a.far", sorted(set(FILES) - {"crab/c/other.py"})),
    ],
)
def test_modules_by_hand(package, text, expected):
    assert [m.as_posix() for m in sources.modules(package, text)] == expected


SAME = [
    ("x = 1  # why", "x = 1"),
    ("# only words\nx = 1\n\n\ny = 2", "x = 1\ny = 2"),
    ('def f():\n    """Old words,\n\n    on lines."""\n    return 1', 'def f():\n    "New."\n    return 1'),
    ('"""Module."""\nx = 1', '"""Another."""\nx = 1'),
    ('class A:\n    """One."""\n    x = 1', 'class A:\n    """Two."""; x = 1'.replace("; ", "\n    ")),
]
DIFFERENT = [
    ("x = 1", "x = 2"),
    ('x = "# 1"', 'x = "# 2"'),
    ("if a:\n    x = 1\ny = 2", "if a:\n    x = 1\n    y = 2"),
    ('def f():\n    """Doc."""; x = 1', 'def f():\n    """Doc."""; x = 2'),
    ('x = """a"""', 'x = """b"""'),
    ('def f():\n    return "a"', 'def f():\n    return "b"'),
    ('"""ä"""; x = 1', '"""ä"""; x = 2'),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_words_do_not_count(one, other):
    assert sources.plain(one) == sources.plain(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_code_counts(one, other):
    assert sources.plain(one) != sources.plain(other)


@pytest.mark.parametrize("text", [t for pair in SAME + DIFFERENT for t in pair])
def test_plain_text_is_the_same_program(text):
    """Against the tree: equal but for docstrings, which are blanked in both."""
    import ast

    def tree(source: str) -> str:
        parsed = ast.parse(source)
        for node in ast.walk(parsed):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0].value.value = ""
        return ast.dump(parsed)

    assert tree(sources.plain(text)) == tree(text)


@given(st.text(alphabet="abc #'\"\\", max_size=12))
def test_strings_are_kept_whatever_they_hold(value):
    assert repr(value) in sources.plain(f"x = {value!r}  # {value}")


@pytest.mark.parametrize("text", ["!ls", "%matplotlib inline", "def f(:"])
def test_magics_are_refused(text):
    with pytest.raises(ValueError, match="line 1 is not plain Python"):
        sources.plain(text)


def test_digest_ignores_outputs_prose_and_parameters_but_not_code(package):
    def digest(passes=1, prose="p", source="from crab.c import other", outputs=()):
        path = write_notebook(package, "toy", {"passes": passes}, new_markdown_cell(prose), code(source))
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[-1].outputs, notebook.cells[-1].execution_count = list(outputs), 7
        notebook.metadata["widgets"] = {"state": 1}
        nbformat.write(notebook, path)
        return sources.sources(package, path)

    first = digest()
    shown = [new_output("stream", text="hello")]
    assert first == digest(passes=2) == digest(prose="q") == digest(outputs=shown)
    assert first != digest(source="from crab.c import lazy")
    (package / "crab/a/far.py").write_text("import sys\n")
    assert first == digest()
    (package / "crab/c/other.py").write_text("x = 1\n")
    assert first != digest()


def test_write_leaves_one_file_a_notebook_and_no_outputs(package):
    path = write_notebook(package, "toy", {"a": 1}, code("1"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = [new_output("stream", text="hello")]
    nbformat.write(notebook, path)
    sources.write(package)
    assert json.loads((package / ".stage/toy.json").read_text()) == {"cells": ["1\n"], "modules": {}}
    assert "hello" not in (package / ".stage/notebooks/toy.ipynb").read_text()
    assert "hello" in path.read_text()


def test_training_hangs_on_no_task():
    """A metric, a parser or a slot's words can change without a run trained again."""
    found = sources.sources(REPOSITORY, REPOSITORY / "notebooks/train.ipynb")["modules"]
    assert {"crab/study/train.py", "crab/ilora/layer.py"} <= set(found)
    assert not [name for name in found if name.startswith("crab/tasks")]


LOADED = """
import ast, json, os, sys
from pathlib import Path
import torch, transformers, peft, pandas, matplotlib.pyplot  # once, before the forks
for path in map(Path, sys.argv[1:]):
    sys.stdout.flush()
    if os.fork() == 0:
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        for cell in cells:
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    exec(compile(ast.Module([node], []), str(path), "exec"), {})
        names = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "crab"]
        print(json.dumps([path.stem, [os.path.relpath(f) for f in names]]), flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, path
"""


@pytest.mark.slow
def test_python_loads_no_module_that_is_not_listed():
    """The independent truth: what is in sys.modules after a notebook's own imports."""
    notebooks = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, notebooks)],
        cwd=REPOSITORY, env=environment(REPOSITORY), check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    loaded = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert set(loaded) == {p.stem for p in notebooks}
    for path in notebooks:
        assert set(loaded[path.stem]) <= set(sources.sources(REPOSITORY, path)["modules"]), path.name
