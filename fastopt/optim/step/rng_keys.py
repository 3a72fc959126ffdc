"""Keys of random rounding: bits that follow from seed, step and parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def seeds_of(groups: Sequence[Mapping[str, Any]], owners: np.ndarray[Any, Any]) -> Any:
    """(n,) uint64, or one number: what chance begins with, of each parameter's group."""
    seeds = [int(group.get("rounding_seed") or 0) for group in groups]
    alike = len(set(seeds)) == 1
    return np.uint64(seeds[0]) if alike else np.array(seeds, dtype=np.uint64)[owners]


def bases_of(seed: Any, positions: np.ndarray[Any, Any]) -> Any:
    """(n,) int64: 64 bits of a seed and a parameter's position."""
    with np.errstate(over="ignore"):
        x = np.asarray(seed, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(
            np.uint64
        )
        return x.view(np.int64)


def keys_of(seed: Any, steps: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]) -> Any:
    """(n,) int64: 32 bits of a seed, a step and a parameter's position, by splitmix64."""
    with np.errstate(over="ignore"):
        x = bases_of(seed, positions).view(np.uint64)
        x = x * np.uint64(0xBF58476D1CE4E5B9) + steps.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return ((x ^ (x >> np.uint64(31))) & np.uint64(0xFFFFFFFF)).astype(np.int64)
