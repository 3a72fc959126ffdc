"""The chunk table of a launch, for both engines."""

from __future__ import annotations

from typing import Any

import numpy as np


def chunk_table(numels: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """(chunks, 3) int64: tensor, first, last for every `size` elements of each tensor."""
    counts = -(-numels // size)
    tensor = np.repeat(np.arange(len(numels), dtype=np.int64), counts)
    within = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    first = within * size
    last = np.minimum(first + size, numels[tensor])
    return np.ascontiguousarray(np.stack([tensor, first, last], axis=1))
