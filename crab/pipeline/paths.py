"""Where each thing of a profile lies. The same names stand in dvc.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


def root(start: str | Path | None = None) -> Path:
    """The repository: the first folder with a ``dvc.yaml``, from ``start`` (here) upwards, else the package's parent.

    A notebook therefore finds its files from ``notebooks/``, from ``reports/`` and from the top alike.
    """
    here = Path(start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "crab").is_dir():
            return folder
    return Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Paths:
    """Folders of one profile, absolute.

    Args:
        profile: ``smoke``, ``tiny``, ``study`` or ``full``.
    """

    profile: str

    @cached_property
    def root(self) -> Path:
        return root()

    @property
    def dataset(self) -> Path:
        """Holds ``AVUIE_2``, the published layout; written by `build`, which replaces the whole folder."""
        return self.root / "data" / self.profile / "dataset"

    @property
    def vocabulary(self) -> Path:
        """Words and tags for the base's tokenizer; written by `build`, the same for any seed and counts."""
        return self.dataset / "vocabulary.json"

    @property
    def encoded(self) -> Path:
        """The frozen encoders' work, a file a slot and split, and ``provenance.json``, on which later stages depend; written by `encode`."""
        return self.root / "data" / self.profile / "encoded"

    @property
    def base(self) -> Path:
        """The frozen base model and its processor; in git."""
        return self.root / "models" / self.profile / "base"

    def adapters(self, method: str) -> Path:
        """Trained adapters of one method, a folder a run."""
        return self.root / "models" / self.profile / "adapters" / method

    def checkpoints(self, method: str) -> Path:
        """Where interrupted runs of one method resume from; not an output, safe to delete."""
        return self.root / "runs" / self.profile / "checkpoints" / method

    @property
    def evaluation(self) -> Path:
        """Raw answers, with the scores of each; written by `evaluate`, whose report holds all scores in two tables."""
        return self.root / "runs" / self.profile / "evaluate"

    def report(self, name: str) -> Path:
        """Metrics, tables and the executed notebook of one stage, e.g. ``evaluate`` or ``train-ilora``."""
        return self.root / "reports" / self.profile / name

    def figures(self, name: str) -> Path:
        """Pictures of one stage, png."""
        return self.report(name) / "figures"

    @property
    def pages(self) -> Path:
        """HTML of the executed notebooks."""
        return self.root / "reports" / self.profile / "pages"
