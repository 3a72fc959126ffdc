"""Telemetry of the elements that a step passes over: sums of squares, and counts.

Squares in float64, where none of a float32 overflows or vanishes; summed within a chunk in an order
that follows from its length.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from fastopt_kernels.chunks import TELEMETRY
from fastopt_kernels.cpu.base import memory
from fastopt_kernels.cpu.base.vector_math import add
from fastopt_kernels.cpu.base.xp import JIT

_ZERO, _NONE, _ONE = np.float64(0), np.int32(0), np.int32(1)
_store = memory.make_storer("fp64", types.float64)


@njit(**JIT)
def see(g, before, exact, after):
    """The values TELEMETRY names, of one element: its gradient, and its parameter before the rule,
    as the rule has it, and as it is stored."""
    g, p, d = np.float64(g), np.float64(exact), np.float64(exact) - np.float64(before)
    nonfinite = _NONE if g - g == _ZERO else _ONE
    kept = after == before
    meant = exact != before or g != _ZERO
    return g * g, p * p, d * d, nonfinite, _ONE if kept and meant else _NONE


@njit(**JIT)
def _add_five(sums, seen):
    return (
        add(sums[0], seen[0]),
        add(sums[1], seen[1]),
        add(sums[2], seen[2]),
        np.int32(sums[3] + seen[3]),
        np.int32(sums[4] + seen[4]),
    )


@njit(**JIT)
def _write_five(address, c, sums):
    first = c * len(TELEMETRY)
    _store(address, first, sums[0])
    _store(address, first + 1, sums[1])
    _store(address, first + 2, sums[2])
    _store(address, first + 3, np.float64(sums[3]))
    _store(address, first + 4, np.float64(sums[4]))


@njit(**JIT)
def _same(sums, seen):
    return sums


@njit(**JIT)
def _skip(address, c, sums):
    pass


def make_sums(watched: bool):
    """(nothing, add_all(sums, seen), write(address, c, sums)): the sums of a chunk, and where they
    go; nothing at all where a launch is not watched."""
    if not watched:
        return (), _same, _skip
    return (_ZERO, _ZERO, _ZERO, _NONE, _NONE), _add_five, _write_five
