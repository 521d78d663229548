"""State that code gives the same results as before it was changed, so that these still count.

Keys of results hold digests of the code that decides them. A renamed variable changes the digest, and everything would
be trained again. Like `dvc commit` for stages, this is a statement of the user, and nothing checks it. It stands in
``crab/core/accepted.json``, which belongs into the commit of the change.
"""

from __future__ import annotations

import io
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from crab.core.code import ACCEPTED, accepted, digest_in, own_digest
from crab.core.files import write_json
from crab.models.protocol import MODELS
from crab.samples.encode import ENCODING
from crab.study.store import ANSWERING, PROMPTS, REASONING, SCORING, TRAINING

#: What makes the bases.
BASES = ("perception", "train", "weaker", "align")


def keyed_modules() -> dict[str, list[tuple[str, ...]]]:
    """By the result that they decide, the sets of modules whose digest is part of a key."""
    models = [entry.module for entry in MODELS]
    return {
        "base": [*((f"crab.models.base.{name}",) for name in BASES), ("crab.models.bridge",)],
        "encode": [(*ENCODING, model) for model in models],
        "train": [(*names, model) for model in models for names in (TRAINING, (*TRAINING, *PROMPTS))],
        "answer": [(*ANSWERING, model) for model in models],
        "score": [SCORING, (*SCORING, *REASONING)],
    }


def accept(folder: Path, revision: str, why: str, only: Sequence[str] = ()) -> list[str]:
    """Let the code in ``folder`` count as that of a git ``revision``, and return the sets of modules that changed.

    ``only`` are the results that stay the same (keys of `keyed_modules`); by default all. ValueError if git does not
    know the revision, no reason is given, or a result is unknown.
    """
    kinds = keyed_modules()
    if unknown := [name for name in only if name not in kinds]:
        raise ValueError(f"accept: --only {unknown[0]} is unknown; use {', '.join(kinds)}")
    if not why.strip():
        raise ValueError("accept: say why the results are the same, e.g. 'names only; two cells trained by both agree'")
    archive = subprocess.run(["git", "archive", "--format=zip", revision, "crab"], cwd=folder, capture_output=True)
    if archive.returncode:
        raise ValueError(f"accept: git has no code of '{revision}' ({archive.stderr.decode().strip()}); see `git log`")
    own = {names: own_digest(folder, names) for sets in kinds.values() for names in sets}
    # git keeps the statements about code that is no more
    stated = {digest: entry for digest, entry in accepted(folder).items() if digest in own.values()}
    changed = []
    with TemporaryDirectory() as older:
        zipfile.ZipFile(io.BytesIO(archive.stdout)).extractall(older)
        for names in (names for kind in only or kinds for names in kinds[kind]):
            try:
                then = digest_in(Path(older), names)
            except ValueError:  # a module that is new: nothing was made with it
                continue
            if then != digest_in(folder, names):
                changed.append(" ".join(names))
                stated[own[names]] = {"modules": " ".join(names), "counts_as": then, "why": why.strip()}
    write_json(folder / ACCEPTED, stated)
    return changed
