"""The published adapter as a finished cell: a method with ``weights`` takes it from its file and trains nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from crab.core.files import atomic_folder, file_digest, write_json
from crab.ilora import published
from crab.models.checkpoint import resolve
from crab.models.protocol import model_of
from crab.study.answer import WEIGHTS
from crab.study.train import RECORD


def import_published(options: Mapping[str, Any], base: str | Path, folder: str | Path) -> Path:
    """Turn ``options["weights"]``, a published ``finetune_weights.bin``, into the adapter ``<folder>/adapter``.

    Its record is that of an adapter that was trained in no step. ValueError, naming the file or the option, if the file
    is missing or damaged, does not fit the base, or has another rank or other heads than ``options`` say.
    """
    final, path = Path(folder) / "adapter", _existing(options["weights"])
    module = model_of(base)
    with torch.device("meta"):
        model = module.build(module.read_config(str(resolve(base) or base))[0])
    with atomic_folder(final) as temporary:
        config = published.import_published(
            path, model, temporary, lora_alpha=options["lora_alpha"], lora_dropout=options.get("lora_dropout", 0.0)
        )
        for name in ("r", "num_heads"):
            if options.get(name) != getattr(config, name):
                raise ValueError(
                    f"train.methods: {name} is {options.get(name)}, and {getattr(config, name)} in {path}, the "
                    f"weights of this method; set {name} to {getattr(config, name)}"
                )
        with safe_open(temporary / WEIGHTS, "pt") as file:
            count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        nothing = {"samples": 0, "steps": 0, "resumed_from": 0, "seconds": 0.0, "samples_per_second": 0.0, "loss": []}
        write_json(temporary / RECORD, {"trainable_parameters": count, "weights": path.name, **nothing})
    return final


def weights_digest(path: str | Path) -> str:
    """The digest of a published file. ValueError if it is not there."""
    path = _existing(path)
    return _digest(path, path.stat().st_mtime_ns)


@cache  # it has gigabytes, and every cell asks
def _digest(path: Path, _changed: int) -> str:
    return file_digest(path)


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"train.methods: weights is {str(path)!r}, and there is no such file; give the absolute path of the "
            "published finetune_weights.bin, or null to train"
        )
    return path
