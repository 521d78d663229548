"""What decides a row of a report or encoded samples, so that a later run can tell whether what was made before still holds.

Unlike the key of a run (:mod:`crab.study.keys`) it is the same on every processor, and with every version of the libraries: rows say what
came out with those of the time.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from crab import tasks
from crab.data import records
from crab.data.files import file_digest
from crab.study import code as sources
from crab.study.keys import base_digest, code_digest, key_of

#: What decides how media become features: modules with all they import, and files alone. What is asked and answered is encoded as well,
#: but stands beside the features and counts as it is, so that a change in how a task is scored leaves the samples what they are.
ENCODING = "import crab.data.media, crab.models.omni"
ENCODING_ALONE = tuple(Path(__file__).with_name(f"{name}.py") for name in ("encode", "published")) + (Path(records.__file__),)


def deciding(encoded: str | Path, dataset: str | Path, base: str | Path, slots: Sequence[str], code: Sequence[Any], *others: Any) -> list:
    """What decides a result beside a method's own settings, to be hashed: samples and records of the slots, the base, and code.

    Args:
        code: imports of modules, and functions. others: anything else.
    """
    own = [code_digest(each) if isinstance(each, str) else sources.plain(inspect.getsource(each)) for each in code]
    return [list(slots), list(_samples(encoded, dataset, slots).values()), base_digest(base), own, *others]


def provenance(encoded: str | Path, dataset: str | Path, base: str | Path, slots: Sequence[str], **how: Any) -> dict[str, Any]:
    """What the encoded samples of the slots follow from: records and media, the base, the code that encodes, and ``how`` it is told to.

    The stages after `encode` depend on this in place of the features, so that what was trained on one processor holds on the next.
    """
    samples = _samples(encoded, dataset, slots)
    return {"base": base_digest(base), "code": code_digest(ENCODING, *ENCODING_ALONE), **how, "samples": samples}


def _samples(encoded: str | Path, dataset: str | Path, slots: Sequence[str]) -> dict[str, str]:
    """`_samples_digest` by slot and split."""
    return {f"{slot}/{split}": _samples_digest(encoded, dataset, slot, split) for slot in slots for split in tasks.get_slot(slot).splits}


def _samples_digest(encoded: str | Path, dataset: str | Path, slot: str, split: str) -> str:
    """Of a slot's records and media, and of what is encoded of them but for the features.

    These follow from the rest, and round differently on another processor, where rows would then never be taken over.
    """
    path, listed = Path(encoded) / slot / f"{split}.safetensors", Path(dataset) / tasks.json_path(slot, split)
    found = records.read(dataset, slot, split) if listed.is_file() else []
    files = [path.with_suffix(".json"), listed, *(item.path for record in found for item in record["media"])]
    files += [record["mask"] for record in found if record.get("mask")]
    whole = []
    if path.is_file():
        with safe_open(path, "np") as tensors:
            whole = [hashlib.sha256(tensors.get_tensor(name).tobytes()).hexdigest() for name in ("ids", "positions", "lengths")]
    return key_of([file_digest(each) for each in files] + whole)
