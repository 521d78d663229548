"""A base that is taken, not trained: its folder holds only the name of a published checkpoint.

Tens of gigabytes are then neither copied nor put under version control; the name is what later stages hang on.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from crab.data.files import read_json, write_json

POINTER = "checkpoint.json"
#: What its configuration must call itself: the whole Omni model, of which the thinker is loaded, or a thinker alone.
MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
MEND = "give `checkpoint` of the base section in params.yaml a name on the model hub, or the absolute path of a downloaded copy"


def point_to(folder: str | Path, name: str) -> None:
    """Make ``folder`` stand for the checkpoint ``name``, of which no more than the configuration is read.

    Raises:
        ValueError: there is no such checkpoint, it is named by a relative path, or it is another kind of model.
    """
    if Path(name).exists() and not Path(name).is_absolute():
        raise ValueError(f"base: checkpoint is '{name}', which depends on the folder it is read in; {MEND}")
    try:
        found = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"base: checkpoint '{name}' cannot be read ({str(error).splitlines()[0]}); {MEND}") from error
    if found not in MODEL_TYPES:
        raise ValueError(f"base: checkpoint '{name}' is a {found} model, and must be one of {', '.join(MODEL_TYPES)}; {MEND}")
    write_json(Path(folder) / POINTER, {"checkpoint": str(name)})


def resolve(folder: str | Path) -> str | None:
    """The checkpoint that ``folder`` stands for; None where it holds a base itself."""
    path = Path(folder) / POINTER
    return read_json(path)["checkpoint"] if path.exists() else None
