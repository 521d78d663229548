"""The unified interface of AV-UIE v2: what each slot asks, how it is answered, read and scored.

Pure Python and NumPy. :mod:`crab.tasks.registry` names the slots, :mod:`crab.tasks.interface` holds
the functions that work for all of them; one module for each form of answer does the rest.
"""

from .interface import (
    FORMS,
    agree,
    answer,
    chance,
    corpus,
    instruction,
    parse,
    sample_id,
    score,
    tags,
    target,
    truth,
)
from .referring import NULL
from .registry import BENCHMARKS, FOLDER, SLOTS, SPLITS, MediaItem, Slot, get_slot, json_path, mask_path, media_paths
from .segmentation import Masks
from .spatial import SIZE

__all__ = [
    "BENCHMARKS", "FOLDER", "FORMS", "Masks", "MediaItem", "NULL", "SIZE", "SLOTS", "SPLITS", "Slot",
    "agree", "answer", "chance", "corpus", "get_slot", "instruction", "json_path", "mask_path", "media_paths",
    "parse", "sample_id", "score", "tags", "target", "truth",
]
