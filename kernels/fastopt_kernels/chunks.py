"""What both engines are told of a launch beside its rule: the chunk table, and the extras."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# How a bf16 parameter is rounded: to nearest; up or down by chance, as far as it is from either;
# with what was rounded away kept in bf16; or with its 16 low bits kept, which makes it a float32.
NEAREST, STOCHASTIC, KAHAN, MASTER = range(4)


class Extras(NamedTuple):
    """What stands around a rule.

    Clipping and averaging take one scalar each, after those of the rule, in this order. An average
    is one more stream after the states, and what a rounding keeps another one after that.
    """

    clipped: bool = False
    averaged: bool = False
    rounding: int = NEAREST

    @property
    def n_scalars(self) -> int:
        """Scalars beside the rule's."""
        return int(self.clipped) + int(self.averaged)

    @property
    def n_hypers(self) -> int:
        """Hyper-parameters beside the rule's: a limit; a decay, and how long it is warmed up."""
        return int(self.clipped) + 2 * int(self.averaged)


NO_EXTRAS = Extras()


def chunk_table(numels: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """(chunks, 3) int64: tensor, first, last for every `size` elements of each tensor."""
    counts = -(-numels // size)
    tensor = np.repeat(np.arange(len(numels), dtype=np.int64), counts)
    within = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    first = within * size
    last = np.minimum(first + size, numels[tensor])
    return np.ascontiguousarray(np.stack([tensor, first, last], axis=1))
