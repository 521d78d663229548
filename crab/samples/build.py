"""The data root of a study: generated, taken from a tree, or converted from original data sets.

In each case the tree is validated (:mod:`crab.data.validate`), and the study reads a folder with checked lists of
records and a manifest. A generated tree has its media in this folder. For any other tree the folder only holds the
lists and ``root.json``, by which :mod:`crab.data.records` finds the media: they are neither copied nor ever deleted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from crab import tasks
from crab.core.files import atomic_folder, write_json
from crab.data import records
from crab.data.findings import Report
from crab.data.validate import validate
from crab.world import generate, vocabulary

SOURCES = ("generated", "tree", "raw")


def assemble(
    out: str | os.PathLike,
    source: str = "generated",
    root: str | os.PathLike | None = None,
    *,
    raw: Mapping[str, str | os.PathLike] | None = None,
    rewrite: str | None = None,
    slots: Sequence[str] | None = None,
    on_problem: str = "error",
    tolerate: Collection[str] = (),
    time_limit: float = 20.0,
    decode: bool = False,
    report: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: bool = True,
    **generated: int,
) -> Report:
    """Fill the folder ``out``, which is replaced as a whole, and return what the check of its records and media found.

    Args:
        out: the new data root. A folder with data that this function did not put there is refused.
        source: ``"generated"`` renders the generated world into ``out``; ``"tree"`` takes the tree under ``root``;
            ``"raw"`` converts original data sets to a tree under ``root``, and takes that.
        root: for "tree" and "raw", the folder that holds, or will hold, ``AVUIE_2``.
        raw: for "raw", slot -> folder of the original data set (:mod:`crab.data.sources`).
        rewrite: for "raw", name or folder of a chat model that words the chains for training
            (:mod:`crab.data.sources.rewrite`); None keeps the words of the templates.
        slots, on_problem, tolerate, time_limit, decode, report, cache, workers: see `crab.data.validate.validate`.
        generated: for "generated", ``seed``, ``train``, ``test`` and ``caption`` of `crab.world.generate.build`.

    Raises:
        ValueError: a wrong parameter, or a root that is not there; the message names it and how to fix it.
        crab.data.findings.ValidationError: there are problems that must not be skipped. A generated tree is then
            complete in ``out``; otherwise nothing is written.
    """
    out = Path(out)
    if source not in SOURCES:
        raise ValueError(f"build: source is {source!r}; choose one of {', '.join(SOURCES)}")
    if rewrite is not None and source != "raw":
        fault = f"rewrite is {rewrite!r}, but source is {source!r}, and a chat model only words chains of source raw"
        raise ValueError(f"build: {fault}; set rewrite to null")
    if source == "generated":
        if root is not None:
            fix = "set source to tree to read it, or root to null"
            raise ValueError(f"build: root is '{root}', but source is 'generated'; {fix}")
        generate.build(out, slots=slots, workers=workers or 2, progress=progress, **generated)
        folder, slots = out, slots or list(generate.VIEWS)
    else:
        folder = _root(root, out, source)
        if source == "raw":
            _convert(raw, folder, on_problem, rewrite, workers, progress)
            slots = slots or list(raw)
    result = validate(folder, slots, on_problem, tolerate, report, cache, time_limit, workers, progress, decode)
    if folder == out:
        _shorten(result, out)
        records.write_manifest(out)
    else:
        generate.refuse_foreign(out)
        with atomic_folder(out) as part:
            _write_lists(result, part, folder)
    return result


def _root(root: str | os.PathLike | None, out: Path, source: str) -> Path:
    holds = "will hold" if source == "raw" else "holds"
    fix = f"set `root` of the build section in params.yaml to the folder that {holds} {tasks.FOLDER}"
    if root is None or not str(root):
        raise ValueError(f"build: root is not set, and source '{source}' needs it; {fix}")
    if not Path(root).expanduser().is_absolute():
        raise ValueError(f"build: root is '{root}', which is a relative path; {fix}, as an absolute path")
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"build: root is '{root}', and there is no such folder; mount or create it, or {fix}")
    if folder.is_relative_to(out.resolve()) or out.resolve().is_relative_to(folder / tasks.FOLDER):
        fault = "this stage writes there, and DVC empties the folder first"
        raise ValueError(f"build: root is '{root}', but {fault}; move the tree elsewhere, and {fix}")
    return folder


def _convert(
    raw: Mapping[str, str | os.PathLike] | None,
    folder: Path,
    on_problem: str,
    rewrite: str | None,
    workers: int | None,
    progress: bool,
) -> None:
    """Convert the original data sets to a tree under ``folder``. Lists that no converter wrote are refused."""
    from crab.data import sources  # only this needs it

    if not raw:
        fix = "give slot: folder of the original data set, for each slot that you want"
        raise ValueError(f"build: raw is not set, and source 'raw' converts the data sets that it names; {fix}")
    rewriter = None
    if rewrite is not None:
        from crab.data.sources.rewrite import Rewriter

        rewriter = Rewriter.load(rewrite)
    faults = {"skip": "skip-and-record"}.get(on_problem, on_problem)
    sources.convert_all(raw, folder, faults=faults, rewrite=rewriter, workers=workers or 2, progress=progress)


def _shorten(result: Report, out: Path) -> None:
    """Write the lists that lost records in place, and delete a list that lost all."""
    for count in result.counts:
        if count.left_out and count.kept:
            records.write(out, count.slot, count.split, result.lists[count.slot, count.split], ids=True)
        elif count.left_out:
            (out / tasks.json_path(count.slot, count.split)).unlink()


def _write_lists(result: Report, out: Path, folder: Path) -> None:
    """Write the lists alone, and where their media are."""
    for (slot, split), rows in result.lists.items():
        records.write(out, slot, split, rows, ids=True)
    # the tokenizer of the base is made from it, whatever the data are, so that one base serves all
    write_json(out / generate.VOCABULARY, vocabulary.vocabulary())
    records.write_root(out, records.media_root(folder))
    records.write_manifest(out)
