"""Reduces the gradients of a launch before its update, in one pass over them.

    sum g^2 or max |g|, and how many elements are not finite

In float64, where no square of a float32 overflows or vanishes. Chunks are measured apart and added
in order: the same bits for any number of threads. Elements that are not finite make a sum that is
not, and are counted only then.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
from numba import types

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.vector_math import add, larger_float

_args = memory.make_row(types.int64, 3)


class Chunked(Protocol):
    """Of a launch (`cpu/step/launch.py`): which elements of which tensors it walks."""

    kinds: tuple[str, ...]
    tensors: np.ndarray
    chunks: np.ndarray
    where: tuple[int, int]
    n_elements: int


class Measured(NamedTuple):
    """Of each tensor of a launch, float64: sum g^2 or max |g|, NaN where an element is NaN; and how
    many of its elements are not finite."""

    parts: np.ndarray
    nonfinite: np.ndarray


def _chunk_parts(tag, kind, n_columns, maximum):
    """Of a chunk's gradient sum g^2 or max |g|, which is NaN where one is."""
    load = memory.make_loader(kind, types.float64, 0)
    put = memory.make_storer("fp64", types.float64, True, 1)
    triple, row = memory.make_row(types.int64, 3), memory.make_row(types.int64, n_columns)
    zero, nan = np.float64(0), np.float64(math.nan)

    def chunk_parts(args, task):
        tensors, chunks, parts = _args(args, 0)
        tensor, first, last = triple(chunks, task)
        g = row(tensors, tensor)[1]
        total, n_nan = zero, 0
        for i in range(first, last):
            x = load(g, i)
            if maximum:
                total = larger_float(abs(x), total)
                n_nan += x != x
            else:
                total = add(total, x * x)
        put(parts, task, nan if n_nan > 0 else total)

    return chunk_parts


def _chunk_nonfinite(tag, kind, n_columns):
    """The number of elements of a chunk's gradient that are infinite or NaN."""
    load = memory.make_loader(kind, types.float64, 0)
    put = memory.make_storer("fp64", types.float64, True, 1)
    triple, row = memory.make_row(types.int64, 3), memory.make_row(types.int64, n_columns)

    def chunk_nonfinite(args, task):
        tensors, chunks, parts = _args(args, 0)
        tensor, first, last = triple(chunks, task)
        g = row(tensors, tensor)[1]
        count = 0
        for i in range(first, last):
            x = load(g, i)
            count += x - x != 0
        put(parts, task, np.float64(count))

    return chunk_nonfinite


def measure(launch: Chunked, maximum: bool) -> Measured:
    """Measure the gradients of the tensors that are selected; the others count nothing."""
    kind, n_columns = launch.kinds[1], len(launch.kinds)
    task = tasks.task_of(_chunk_parts, kind, n_columns, maximum)
    parts = _over_chunks(launch, task, np.maximum if maximum else np.add)
    nonfinite = np.zeros(len(parts))
    if not np.isfinite(parts).all():
        counting = tasks.task_of(_chunk_nonfinite, kind, n_columns)
        nonfinite = _over_chunks(launch, counting, np.add)
    return Measured(parts, nonfinite)


def _over_chunks(launch: Chunked, task: tasks.Task, merge: np.ufunc) -> np.ndarray:
    """A number for each tensor, out of one for each chunk."""
    chunks = launch.chunks
    parts = np.zeros(len(chunks))
    if len(chunks):
        tasks.run(task, len(chunks), launch.n_elements, (*launch.where, parts.ctypes.data))
    found = np.zeros(len(launch.tensors))
    with np.errstate(invalid="ignore"):
        merge.at(found, chunks[:, 0], parts)
    return found
