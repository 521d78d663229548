"""Code that gives the same results keeps the keys of older code, once someone states it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from toys import REPOSITORY

from crab.core.code import ACCEPTED, digest_in, own_digest
from crab.core.files import read_json
from crab.pipeline.accept import accept, keyed_modules

LAYER = "crab/ilora/layer.py"
SETS = [names for sets in keyed_modules().values() for names in sets]
TRAINING, SCORING = (keyed_modules()[kind][0] for kind in ("train", "score"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package in a git repository of its own, committed, before anything was accepted."""
    shutil.copytree(REPOSITORY / "crab", tmp_path / "crab", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ACCEPTED).unlink()
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        git(tmp_path, *command)
    return tmp_path


def git(folder: Path, *command: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], cwd=folder, check=True)


def edit(folder: Path, line: str) -> None:
    path = folder / LAYER
    path.write_text(path.read_text(encoding="utf-8") + line, encoding="utf-8")


def test_changed_code_counts_as_the_old_and_only_where_it_changed(checkout):
    before = {names: digest_in(checkout, names) for names in SETS}
    edit(checkout, "\nSAME = 1\n")
    assert digest_in(checkout, TRAINING) != before[TRAINING]
    changed = accept(checkout, "HEAD", "one constant that nothing reads")
    assert " ".join(TRAINING) in changed and " ".join(SCORING) not in changed
    assert {names: digest_in(checkout, names) for names in SETS} == before
    entry = read_json(checkout / ACCEPTED)[own_digest(checkout, TRAINING)]
    assert entry == {
        "modules": " ".join(TRAINING),
        "counts_as": before[TRAINING],
        "why": "one constant that nothing reads",
    }
    edit(checkout, "OTHER = 2\n")  # what was stated holds for that code, and not for what comes after it
    assert digest_in(checkout, TRAINING) != before[TRAINING]


def test_statements_add_up_and_end_with_what_they_were_about(checkout):
    first = digest_in(checkout, TRAINING)
    for number in range(2):
        edit(checkout, f"\nSAME{number} = 1\n")
        accept(checkout, "HEAD", f"reason {number}")
        git(checkout, "commit", "-qam", "change")
        git(checkout, "add", "-A")
        git(checkout, "commit", "-qm", "accepted", "--allow-empty")
        assert digest_in(checkout, TRAINING) == first
    assert accept(checkout, "HEAD", "again") == []  # nothing changed since, and the statement stays
    assert digest_in(checkout, TRAINING) == first
    git(checkout, "checkout", "-q", "HEAD~4", "--", LAYER)
    accept(checkout, "HEAD~4", "as it was")
    assert own_digest(checkout, TRAINING) not in read_json(checkout / ACCEPTED)


def test_only_the_results_that_are_named_stay(checkout):
    before = {names: digest_in(checkout, names) for names in SETS}
    path = checkout / "crab/tasks/labels.py"
    metric = "\nMETRICS['error'] = lambda *pair: [1 - hit for hit in hits(*pair)]\n"
    path.write_text(path.read_text(encoding="utf-8") + metric, encoding="utf-8")
    accept(checkout, "HEAD", "a metric more; prompts and answers are the same", only=["encode", "train"])
    same = [kind for kind, sets in keyed_modules().items() if all(digest_in(checkout, n) == before[n] for n in sets)]
    assert same == ["base", "encode", "train", "answer"]


def test_a_statement_needs_a_reason_and_a_revision(checkout):
    with pytest.raises(ValueError, match="accept: say why"):
        accept(checkout, "HEAD", " ")
    with pytest.raises(ValueError, match="--only training is unknown; use base, encode, train, answer, score"):
        accept(checkout, "HEAD", "equal", only=["encode", "training"])
    with pytest.raises(ValueError, match="git has no code of 'HEAD~9'.*git log"):
        accept(checkout, "HEAD~9", "equal")


def test_every_digest_of_code_that_is_part_of_a_key_can_be_accepted():
    """All places that take one, read from the code: named modules, or lists of names that `keyed_modules` has."""
    taken = set()
    for path in (REPOSITORY / "crab").rglob("*.py"):
        if path.name not in ("code.py", "accept.py"):
            text = path.read_text(encoding="utf-8")
            taken |= set(re.findall(r"\bcode(?:_digest)?\((.*?)\)", text)) - {""}
    sets = {" ".join(names) for names in SETS}
    named = {module for name in taken for module in re.findall(r'"(crab[\w.]+)"', name)}
    assert named and named <= sets
    assert "__name__" in taken and "crab.models.base.weaker" in sets
    lists = {name for text in taken for name in re.findall(r"\*(?:\()?([A-Z]+)", text)}
    assert lists == {"TRAINING", "PROMPTS", "ANSWERING", "SCORING", "REASONING", "ENCODING"}
