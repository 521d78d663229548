"""Which code a stage depends on: the modules it imports, without what only people read."""

import ast
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

from crab.core.code import code_digest, modules, modules_of, plain
from crab.pipeline import params, stages

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
        (repository / name).write_text(text, encoding="utf-8")
    return repository


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import numpy, os", []),
        ("import crab", ["crab/__init__.py"]),
        ("from crab.c import other", ["crab/__init__.py", "crab/c/__init__.py", "crab/c/other.py"]),
        ("import crab.c.other as x", ["crab/__init__.py", "crab/c/__init__.py", "crab/c/other.py"]),
        # through a package's __init__, a relative import, one inside a function, and in a circle
        ("from crab import a", sorted(set(FILES) - {"crab/a/far.py", "crab/c/other.py"})),
        ("if True:\n    import crab.a.far", sorted(set(FILES) - {"crab/c/other.py"})),
    ],
)
def test_modules_by_hand(package, text, expected):
    assert list(modules(package, text)) == expected


SAME = [
    ("x = 1  # why", "x = 1"),
    ("# only words\nx = 1\n\n\ny = 2", "x = 1\ny = 2"),
    ('def f():\n    """Old words,\n\n    on lines."""\n    return 1', "def f():\n    return 1"),
    ('"""Module."""\nx = 1', '"""Another\x0c\u2028\x85\nmodule."""\nx = 1'),
    ('class A:\n    """One."""', 'class A:\n    """Two."""'),
    ('x = 1\r\ny = """a\r\nb"""\r\n', 'x = 1\ny = """a\nb"""\n'),
    ("x = 1\n\x0c\ny = 2", "x = 1\ny = 2"),
]
DIFFERENT = [
    ("x = 1", "x = 2"),
    ('x = "# 1"', 'x = "# 2"'),
    ("if a:\n    x = 1\ny = 2", "if a:\n    x = 1\n    y = 2"),
    ('def f():\n    """Doc."""; x = 1', 'def f():\n    """Doc."""; x = 2'),
    ('x = """a"""', 'x = """b"""'),
    ('x = """a\n\nb"""', 'x = """a\nb"""'),
    ('x = """a \nb"""', 'x = """a\nb"""'),
    ('def f():\n    return "a"', 'def f():\n    return "b"'),
    ('"""ä\u2028"""; x = 1', '"""ä\u2028"""; x = 2'),
    ("x = 1\x0c\ny = 2", "x = 1\x0c\ny = 3"),
]


@pytest.mark.parametrize(("one", "other", "same"), [(*pair, pair in SAME) for pair in SAME + DIFFERENT])
def test_what_only_people_read_does_not_count(one, other, same):
    assert (plain(one) == plain(other)) == same


@pytest.mark.parametrize("text", [text for pair in SAME + DIFFERENT for text in pair])
def test_plain_text_is_the_same_program(text):
    """Against the tree without docstrings."""

    def tree(source: str) -> str:
        parsed = ast.parse(source)
        for node in ast.walk(parsed):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        return ast.dump(parsed)

    assert tree(plain(text)) == tree(text)


@given(st.text(alphabet="abc #'\"\\\n\x0c\u2028", max_size=12))
def test_strings_are_kept_whatever_they_hold(value):
    assert repr(value) in plain(f"x = {value!r}  # {value!r}")
    if "'''" not in value and "\\" not in value and not value.endswith("'"):
        assert ast.literal_eval(plain(f"x = '''{value}'''")[4:]) == value


@pytest.mark.parametrize("text", ["!ls", "%matplotlib inline", "def f(:"])
def test_magics_are_refused(text):
    with pytest.raises(ValueError, match="line 1 is not plain Python"):
        plain(text)


def test_a_string_that_a_cell_shows_counts():
    assert plain("'shown'  # why", cell=True) == "'shown'\n" and plain("'a docstring'") == ""
    assert plain("def f():\n    'a docstring'", cell=True) == plain("def f():\n    'another'", cell=True)


def test_a_digest_of_an_unknown_module_is_refused():
    assert code_digest("crab.tasks") != code_digest("crab.core.files")
    with pytest.raises(ValueError, match="crab.tasksy: no such module"):
        code_digest("crab.tasksy")


def test_a_stage_depends_on_code_and_not_on_prose_outputs_or_empty_cells(package):
    def resolved(*cells, prose="p", outputs=()):
        path = write_notebook(package, "evaluate", {"profile": "tiny"}, new_markdown_cell(prose), *map(code, cells))
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[3].outputs, notebook.cells[3].execution_count = list(outputs), 7
        notebook.metadata["widgets"] = {"state": 1}
        nbformat.write(notebook, path)
        stages.resolve(package)
        return (package / ".stage/evaluate.json").read_text(encoding="utf-8")

    first = resolved("from crab.c import other")
    assert first == resolved("from crab.c import other", prose="q")
    assert first == resolved("from crab.c import other", outputs=[new_output("stream", text="hello")])
    assert first == resolved("from crab.c import other", "", "# only a remark")
    assert first != resolved("from crab.c import lazy")
    (package / "crab/a/far.py").write_text("import sys\n", encoding="utf-8")
    assert first == resolved("from crab.c import other")
    (package / "crab/c/other.py").write_text("x = 1\n", encoding="utf-8")
    assert first != resolved("from crab.c import other")


def test_data_beside_a_module_count_without_their_comments(package):
    digests = []
    for text in ("a: 1", "# why\na: 1", "a: 2"):
        (package / "crab/a/far.yaml").write_text(text, encoding="utf-8")
        digests.append(modules(package, "import crab.a.far"))
        assert {"crab/a/far.py", "crab/a/far.yaml"} <= set(digests[-1])
    assert digests[0] == digests[1] != digests[2]


def test_training_depends_on_no_task():
    """A metric, a parser or a slot's words can change, and nothing is trained again."""
    names = set(modules_of(["crab.study.train", "crab.samples.shards", "crab.samples.slots"]))
    assert {"crab/study/train.py", "crab/ilora/layer.py"} <= names
    assert not [name for name in names if name.startswith(("crab/tasks", "crab/world"))]


LOADED = """
import json, os, sys
import torch, transformers, peft, pandas, matplotlib.pyplot  # once, before the forks
for name, imports in json.load(sys.stdin).items():
    if os.fork() == 0:
        exec(imports)
        print(json.dumps([name, [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "crab"]]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.mark.slow
def test_python_loads_no_module_that_is_not_listed():
    """The independent truth: what is in sys.modules after a notebook's own imports."""
    listed, imports = {}, {}
    for stage, path in params.notebooks(REPOSITORY).items():
        cells = "".join(stages.code_cells(params.read_notebook(path), path.name))
        listed[stage] = {str(REPOSITORY / name) for name in modules(REPOSITORY, cells)}
        nodes = [node for node in ast.walk(ast.parse(cells)) if isinstance(node, ast.Import | ast.ImportFrom)]
        imports[stage] = "\n".join(map(ast.unparse, nodes))
    done = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=REPOSITORY, env=environment(REPOSITORY), check=True,
        input=json.dumps(imports), stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    loaded = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(loaded) == set(listed)
    assert not {stage: set(loaded[stage]) - listed[stage] for stage in listed if set(loaded[stage]) - listed[stage]}
