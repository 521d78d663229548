"""Emotion recognition: one label, scored by accuracy.

Data sets scored otherwise (weighted F1; WAR and UAR) will add their metrics to ``measure`` here.
"""

from .labels import TAGS, answer, chance, measure, parse, truth

__all__ = ["TAGS", "answer", "chance", "measure", "parse", "truth"]
