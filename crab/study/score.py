"""Scores of answers, from texts and records alone: no model, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crab import tasks
from crab.data import media, records
from crab.tasks.segmentation import bounding_box, points_inside


def _true_mask(record: Mapping) -> Any:
    return media.read_mask(record["mask"])


def _predicted_mask(segmenter: str, record: Mapping, box, points) -> Any:
    from crab.models import segment  # OpenCV is loaded only when a slot needs a mask

    (image,) = (item for item in record["media"] if item.kind == "image")
    return segment.segmenter(segmenter)(media.read_image(image.path), box, points)


def masks_of(slot: str, segmenter: str) -> dict[str, tasks.Masks]:
    """Keyword arguments that `crab.tasks.score` needs for a slot: ``masks`` for pixel-level slots, else none.

    ``segmenter`` cuts the predicted masks, see `crab.models.segment.segmenter`.
    """
    return {"masks": tasks.Masks(_true_mask, partial(_predicted_mask, segmenter))} if tasks.get_slot(slot).masks else {}


def truths(dataset: str | Path, slot: str, split: str, ids: Sequence[str]) -> list[dict]:
    """Records of ``ids``, in that order, as the test records that `crab.tasks.score` takes. ValueError if one is
    missing.
    """
    by_id = {record["id"]: record for record in records.read(dataset, slot, split)}
    if missing := [name for name in ids if name not in by_id]:
        raise ValueError(
            f"{Path(dataset) / tasks.json_path(slot, split)}: no record {missing[0]!r}, which was encoded; "
            "run the encode stage again"
        )
    rows = [by_id[name] for name in ids]
    if split == "train" and "split" in tasks.get_slot(slot).fields("test"):
        # Test records of Ref-AVS say whether the object is there. Of training records, the answer says it.
        rows = [{**row, "split": "test_n" if tasks.truth(slot, row) == tasks.NULL else "test_s"} for row in rows]
    return rows


def score_slot(slot: str, rows: Sequence[Mapping], texts: Mapping[str, str], segmenter: str) -> dict[str, Any]:
    """All metrics of a slot, and the primary score of each sample.

    Args:
        rows: every record that was asked. texts: raw answers by sample id; ValueError if one is missing or spare.

    Returns ``metrics`` by name; ``ids`` and ``scores``, one per sample; ``n_expected``, ``n_found``, ``n_scored`` and
    ``n_unparsable``. An answer that cannot be read is wrong.
    """
    result = tasks.score(slot, rows, texts, **masks_of(slot, segmenter))
    return {
        "ids": result["ids"],
        "scores": [float(value) for value in result["per_sample"]],
        "metrics": {name: float(value) for name, value in result["metrics"].items()},
        **{name: result[name] for name in ("n_expected", "n_found", "n_scored", "n_unparsable")},
    }


def true_answer(slot: str, record: Mapping) -> str:
    """The bare answer to a record of a pixel-level slot.

    It comes from the record's answer if there is one (published test records have none), else from its mask. A mask of
    fewer than three pixels has no box and points: the answer is empty, and is scored as unreadable.
    """
    entry = tasks.get_slot(slot)
    if entry.answer_field in record or record.get("split") == "test_n":
        return tasks.answer(slot, tasks.truth(slot, record))
    mask = _true_mask(record)
    return tasks.answer(slot, (bounding_box(mask), points_inside(mask))) if mask.sum() >= 3 else ""


def reference(slot: str, rows: Sequence[Mapping], segmenter: str) -> dict[str, Any]:
    """What a slot's scores are compared with: ``chance`` and, for pixel-level slots, ``oracle``.

    Chance is the score of the best constant answer. The oracle is the score of the true box and points: what it lacks
    of 1 is the cost of the segmenter. It has the form of `score_slot`.
    """
    result: dict[str, Any] = {"chance": float(tasks.chance(slot, rows, **masks_of(slot, segmenter)))}
    if tasks.get_slot(slot).masks:
        answers = {row["id"]: true_answer(slot, row) for row in rows}
        result["oracle"] = score_slot(slot, rows, answers, segmenter)
    return result
