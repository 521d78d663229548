"""Action recognition: one label, scored by top-1 accuracy."""

from .labels import TAGS, answer, chance, measure, parse, truth

__all__ = ["TAGS", "answer", "chance", "measure", "parse", "truth"]
