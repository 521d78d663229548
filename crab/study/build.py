"""The data root that a study reads, from where its data come: generated here, taken from a tree, or converted to one.

Whichever it is, the tree is validated (:mod:`crab.data.validate`), and what the study reads is a folder with checked lists of
records.  A generated tree has its media in that folder.  Of any other tree nothing but the lists is written there, and
``root.json``, by which :mod:`crab.data.records` finds the media where they are: they are neither copied nor ever deleted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from crab import tasks
from crab.world import generate, vocabulary
from crab.data import records
from crab.data.files import atomic_folder, write_json
from crab.data.findings import Report
from crab.data.validate import validate

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
    """Fill the folder `out`, which is replaced as a whole, and say what the walk through its records and media found.

    Args:
        out: the data root to be. One that holds data which were not put there by this function is refused.
        source: ``"generated"``: render the generated world into `out`; ``"tree"``: take the tree under `root`;
            ``"raw"``: convert original data sets to a tree under `root`, and take that.
        root: for any source but the generated one, the folder that holds ``AVUIE_2``, or is to hold it.
        raw: slot -> folder of the original data set, for source ``"raw"`` (:mod:`crab.data.sources`).
        rewrite: name or folder of a chat model that words the chains of what source ``"raw"`` converts for training
            (:mod:`crab.data.sources.rewrite`); None for the templates' words.
        slots, on_problem, tolerate, time_limit, decode, report, cache, workers: as for :func:`crab.data.validate.validate`.
        generated: `seed`, `train`, `test` and `caption`, as for :func:`crab.world.generate.build`; no other source
            looks at them.

    Raises:
        ValueError: a parameter that cannot be, or a root that is not there: named, with its mend.
        crab.data.findings.ValidationError: there are problems and they are not to be skipped; a generated tree is then
            complete in `out`, of any other nothing has been written.
    """
    out = Path(out)
    if source not in SOURCES:
        raise ValueError(f"build: source is {source!r}; choose one of {', '.join(SOURCES)}")
    if rewrite is not None and source != "raw":
        raise ValueError(f"build: rewrite is {rewrite!r}, but source is {source!r}, and only chains that source raw makes are worded by a "
                         "chat model; set rewrite to null")
    if source == "generated":
        if root is not None:
            raise ValueError(f"build: root is '{root}', but source is 'generated'; set source to tree to read it, or root to null")
        generate.build(out, slots=slots, workers=workers or 2, progress=progress, **generated)
        folder, slots = out, slots or list(generate.VIEWS)
    else:
        folder = _root(root, out, source)
        if source == "raw":
            made = _convert(raw, folder, on_problem, rewrite, workers, progress)
            slots = slots or list(made)
    found = validate(folder, slots, on_problem, tolerate, report, cache, time_limit, workers, progress, decode)
    if folder == out:
        _shorten(found, out)
    else:
        _lay(found, out, folder)
    return found


def _root(root: str | os.PathLike | None, out: Path, source: str) -> Path:
    holds = "is to hold" if source == "raw" else "holds"
    mend = f"set `root` of the build section in params.yaml to the folder that {holds} {tasks.FOLDER}"
    if root is None or not str(root):
        raise ValueError(f"build: root is not set, and source '{source}' needs it; {mend}")
    if not Path(root).expanduser().is_absolute():
        raise ValueError(f"build: root is '{root}', which depends on the folder it is read in; {mend}, from / on")
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"build: root is '{root}', and there is no such folder; mount or make it, or {mend}")
    if folder.is_relative_to(out.resolve()) or out.resolve().is_relative_to(folder / tasks.FOLDER):
        raise ValueError(f"build: root is '{root}', which is where this stage writes, and DVC empties that first; move the tree "
                         f"elsewhere, and {mend}")
    return folder


def _convert(raw: Mapping[str, str | os.PathLike] | None, folder: Path, on_problem: str, rewrite: str | None, workers: int | None,
             progress: bool) -> Mapping:
    """Convert the original data sets to a tree under `folder`; files that are in place already are kept."""
    from crab.data import sources  # only who converts needs it

    if not raw:
        raise ValueError("build: raw is not set, and source 'raw' converts what it names; give slot: folder of the original data set, for "
                         "each slot that is wanted")
    faults = {"error": "error", "skip": "skip-and-record"}.get(on_problem, on_problem)
    worded = None
    if rewrite is not None:
        from crab.data.sources.rewrite import Rewriter  # it needs no transformers until a model is loaded

        worded = Rewriter.load(rewrite)
    sources.convert_all(raw, folder, faults=faults, rewrite=worded, workers=workers or 2, progress=progress)
    return raw


def _shorten(found: Report, out: Path) -> None:
    """Write the lists that have lost records, in place; one that has none left goes."""
    for count in found.counts:
        if count.left_out and count.kept:
            records.write(out, count.slot, count.split, found.lists[count.slot, count.split], ids=True)
        elif count.left_out:
            (out / tasks.json_path(count.slot, count.split)).unlink()


def _lay(found: Report, out: Path, folder: Path) -> None:
    """Write the lists alone, and where their media are."""
    generate.refuse_foreign(out)
    with atomic_folder(out) as part:
        for (slot, split), kept in found.lists.items():
            records.write(part, slot, split, kept, ids=True)
        # the base's tokenizer is made from it whatever the data are, so that one base serves all
        write_json(part / generate.VOCABULARY, vocabulary.vocabulary())
        # with the digest, what is made from the media is made again after they have changed
        records.write_root(part, folder, found.media)
