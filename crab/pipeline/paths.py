"""Where the files of a profile are. The same names stand in dvc.yaml."""

from pathlib import Path

from crab.models.checkpoint import read_pointer


def root() -> Path:
    """The repository: the first folder with ``dvc.yaml`` and ``crab``, from the working folder upwards.

    So a notebook finds its files from ``notebooks/``, ``reports/`` and the top. If there is none: the package's parent.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "crab").is_dir():
            return folder
    return Path(__file__).resolve().parents[2]


class Paths:
    """Absolute paths of one profile of params.yaml."""

    def __init__(self, profile: str) -> None:
        self.profile, self.root = profile, root()
        #: AV-UIE v2 in its published layout, and manifest.json. The build stage replaces the whole folder.
        self.dataset = self.root / "data" / profile / "dataset"
        #: Words and tags of the base's tokenizer; the same for any seed and sample counts.
        self.vocabulary = self.dataset / "vocabulary.json"
        #: Samples as a model reads them: shards by slot and split, and manifest.json.
        self.encoded = self.root / "data" / profile / "encoded"
        #: All models. The base stage writes to its ``folder`` in here.
        self.models = self.root / "models"
        #: Names the base of this profile, since profiles may share one. Written by the base stage.
        self.base_pointer = self.models / profile / "base.json"
        #: Published adapters, one folder per name. The analyses show these.
        self.adapters = self.models / profile / "adapters"
        #: Trained cells on this machine. DVC does not track this folder; it is safe to delete.
        self.cells = self.root / "runs" / profile / "cells"
        #: Where an interrupted training of the base goes on. Safe to delete, too.
        self.checkpoints = self.root / "runs" / profile / "checkpoints"
        #: Scores of every sample of every finished cell, in git. Several stages add to it.
        self.ledger = self.report("cells.json.xz")
        #: The cells of the train stage, with their learning rates.
        self.train_cells = self.report("train") / "cells.json"

    @property
    def base(self) -> Path:
        """The frozen base and its processor. ValueError: the base stage has not run, or made other weights."""
        return read_pointer(self.base_pointer)

    def report(self, name: str) -> Path:
        """Metrics, tables, figures and executed notebook of a stage, e.g. ``evaluate``."""
        return self.root / "reports" / self.profile / name

    def figures(self, stage: str) -> Path:
        """Figures of a stage, as PNG."""
        return self.report(stage) / "figures"
