"""What both engines are told of a launch beside its rule: the chunk table, and the extras."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Extras(NamedTuple):
    """What stands around a rule. Each takes one scalar, after those of the rule, in this order; an
    average is one more stream, after the states."""

    clipped: bool = False
    averaged: bool = False


NO_EXTRAS = Extras()


def chunk_table(numels: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """(chunks, 3) int64: tensor, first, last for every `size` elements of each tensor."""
    counts = -(-numels // size)
    tensor = np.repeat(np.arange(len(numels), dtype=np.int64), counts)
    within = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    first = within * size
    last = np.minimum(first + size, numels[tensor])
    return np.ascontiguousarray(np.stack([tensor, first, last], axis=1))
