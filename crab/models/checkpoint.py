"""Where a base lies: a folder with weights, a folder that names a published checkpoint, or a pointer to such a folder.

torch and transformers are imported where a model is loaded, so that paths can be resolved quickly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from crab.core.files import read_json, write_json

POINTER = "checkpoint.json"
#: The file of a base that says how it was trained. It is not part of the digest.
RECORD = "training.json"
LARGE = 2**28  # bytes; a larger file counts in the digest by its size and date
_FIX = "set base.checkpoint in params.yaml to a name on the model hub or to the absolute path of a downloaded copy"


def point_to(folder: str | Path, name: str) -> None:
    """Make ``folder`` stand for the published checkpoint ``name``, without a copy. ValueError if it is of no use."""
    from crab.models.protocol import MODEL_TYPES, model_type

    if Path(name).exists() and not Path(name).is_absolute():
        raise ValueError(f"base.checkpoint: '{name}' is a relative path, which depends on the working folder; {_FIX}")
    try:
        kind = model_type(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"base.checkpoint: '{name}' cannot be read ({str(error).splitlines()[0]}); {_FIX}") from error
    if kind not in MODEL_TYPES:
        raise ValueError(f"base.checkpoint: '{name}' is a {kind} model, not one of {', '.join(MODEL_TYPES)}; {_FIX}")
    write_json(Path(folder) / POINTER, {"checkpoint": str(name)})


def resolve(folder: str | Path) -> str | None:
    """The published checkpoint that ``folder`` stands for; None if the folder holds the weights itself."""
    path = Path(folder) / POINTER
    return read_json(path)["checkpoint"] if path.exists() else None


def weaker_folder(base: str | Path, steps: int) -> Path:
    """The folder of a weaker base, by the steps of its training: beside the finished one."""
    return Path(base).with_name(f"{Path(base).name}-{steps}")


def base_name(steps: int | None) -> str:
    """The name for readers of a base by the steps of its training; None stands for the finished one."""
    return f"{steps:,} steps" if steps else "finished"


def load_base(path: str | Path):
    """(model, processor) of `load_model` and `load_processor`."""
    processor = load_processor(path)
    return load_model(path), processor


def load_model(path: str | Path):
    """The frozen base of a folder or name, on the GPU if there is one. PEFT changes it: load it anew.

    A published checkpoint is loaded in bfloat16 on a GPU, for half the memory; everything else in float32.
    """
    import torch

    from crab.models.protocol import model_of

    gpu = torch.cuda.is_available()
    here = any((Path(path) / name).is_dir() for name in ("audio", "sounds"))  # `omni.save` and `bridge.save` write them
    published = resolve(path) or (None if here else path)
    dtype = torch.bfloat16 if published and gpu else torch.float32
    model = model_of(path).load_model(published or path, dtype).requires_grad_(False)
    return model.eval().to("cuda" if gpu else "cpu")


def load_processor(path: str | Path):
    """The processor alone, for processes that decode media and run no model."""
    from crab.models.protocol import model_of

    return model_of(path).load_processor(resolve(path) or path)


def base_digest(folder: str | Path) -> str:
    """SHA-256 of the weights and the configuration of a base. ValueError if the folder holds no base."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".safetensors", ".json") and p.name != RECORD)
    if not files:
        raise ValueError(f"{folder}: there is no base in this folder; run `dvc repro base`")
    return _digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache  # every cell asks for it
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, changed in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if size < LARGE else f"{size} {changed}".encode())
    return digest.hexdigest()


def write_pointer(path: str | Path, folder: str | Path, weaker: Sequence[int] = ()) -> None:
    """Write ``path``, a JSON file with the ``folder`` of a base, relative to the file, and the digest of the base.

    ``weaker`` are the steps of the weaker bases beside it (`crab.models.base.weaker`), whose digests are written too.
    """
    relative = Path(os.path.relpath(folder, Path(path).parent))
    content = {"folder": relative.as_posix(), "digest": base_digest(folder)}
    if weaker:
        content["weaker"] = {str(steps): base_digest(weaker_folder(folder, steps)) for steps in weaker}
    write_json(path, content)


def read_pointer(path: str | Path) -> Path:
    """The folder that ``path`` names. ValueError if it is missing, or holds another base than when it was written."""
    pointer = read_json(path)
    if not isinstance(pointer, dict) or not {"folder", "digest"} <= set(pointer):
        raise ValueError(f"{path}: must hold the fields folder and digest; run `dvc repro base` to write it again")
    folder = Path(os.path.normpath(Path(path).parent / pointer["folder"]))
    digest = base_digest(folder)
    if digest != pointer["digest"]:
        problem = f"digest is {pointer['digest'][:12]}, but the base in {folder} has {digest[:12]}"
        raise ValueError(f"{path}: {problem}; run `dvc repro base`, or restore the folder from git")
    return folder
