"""A few samples out of many, the same each time."""

from __future__ import annotations

import numpy as np


def spread(total: int, wanted: int) -> list[int]:
    """Up to ``wanted`` indices evenly spread over ``range(total)``."""
    if total < 1 or wanted < 1:
        raise ValueError(f"spread: {wanted} samples wanted of {total}; at least 1 of 1 is needed")
    return sorted(set(np.linspace(0, total - 1, min(wanted, total)).round().astype(int).tolist()))
