"""Of a launch beside its rule, for both engines: the chunk table, and the options of the step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# How a bf16 parameter is rounded: to nearest; up or down by chance, as far as it is from either;
# with what was rounded away kept in bf16; or with its 16 low bits kept, which makes it a float32.
NEAREST, STOCHASTIC, KAHAN, MASTER = range(4)

# States of 8 bits: of either sign, and never below zero; each block of elements has a scale.
CODES_8BIT = ("int8", "uint8")
BLOCK_8BIT = 256
# A code is what is above SHIFT bits of the float32 |x| / s + BASE, less that of BASE alone.
SHIFT, BASE = 19, 2.0**-15
ORIGIN = int(np.float32(BASE).view(np.int32))
# The least that a block is divided by: one over it does not overflow.
LEAST_SCALE = 1e-37
# The largest code.
LAST = {"int8": 127, "uint8": 255}


def value_of(code: int) -> float:
    """The number that a code stands for, in units of the scale."""
    return float(np.int32(ORIGIN + (code << SHIFT)).view(np.float32)) - BASE


def n_codes(kinds: tuple[str, ...]) -> int:
    """The number of streams of 8 bits; as many streams of scales are the last ones."""
    return sum(kind in CODES_8BIT for kind in kinds)


class StepOptions(NamedTuple):
    """Options of a step that are part of its kernel, beside the rule.

    Clipping and averaging take one scalar each, after those of the rule, in this order. An average
    is one more stream after the states, and what a rounding keeps another one after that. A launch
    that is watched notes of each chunk what TELEMETRY names.
    """

    clipped: bool = False
    averaged: bool = False
    rounding: int = NEAREST
    watched: bool = False

    @property
    def n_scalars(self) -> int:
        """Scalars beside the rule's."""
        return int(self.clipped) + int(self.averaged)

    @property
    def n_hypers(self) -> int:
        """Hyper-parameters beside the rule's: a limit; a decay, and how long it is warmed up."""
        return int(self.clipped) + 2 * int(self.averaged)


NO_OPTIONS = StepOptions()

# Of a chunk: sum g^2, sum p'^2, sum (p' - p)^2; elements of g that are infinite or NaN; elements
# that are stored as they were though p' is not p, or g is not 0.
TELEMETRY = ("grad", "param", "update", "nonfinite", "lost")


def chunk_table(numels: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """(chunks, 3) int64: tensor, first, last for every `size` elements of each tensor."""
    counts = -(-numels // size)
    tensor = np.repeat(np.arange(len(numels), dtype=np.int64), counts)
    within = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    first = within * size
    last = np.minimum(first + size, numels[tensor])
    return np.ascontiguousarray(np.stack([tensor, first, last], axis=1))
