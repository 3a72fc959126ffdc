"""Shared by the norms over channels: geometry, small arrays of any dtype, moments that merge.

A set is read in blocks that follow from the shape alone. Each block's moments are about a mean of
its own, and blocks merge in order, in float64 (Chan, Golub & LeVeque 1983, equation 2.1): the same
bits whoever took the blocks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit, types

from fastopt_kernels.channels import Channels
from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.tasks import block_end
from fastopt_kernels.cpu.base.vector_math import add
from fastopt_kernels.cpu.base.xp import JIT

# Elements of a block of planes: it stays in cache for a second look.
RUN = 16384
# Elements a block begins with, whose mean is the center of its moments.
PIVOT = 64
# Mean squares in float32 below this have lost what matters: once more in float64.
TINY = 1e-24

_loads = [memory.make_loader(kind, types.float64) for kind in memory.KINDS]
_stores = [memory.make_storer(kind, types.float64) for kind in memory.KINDS]
_fp32, _bf16, _fp16, _fp64 = _loads
_to_fp32, _to_bf16, _to_fp16, _to_fp64 = _stores


@njit(**JIT)
def load_any(address, i, kind):
    """Element i of an array whose kind is known when it is read: one number a channel, where a
    kernel for each mixture of dtypes would not pay."""
    if kind == 0:
        return _fp32(address, i)
    if kind == 1:
        return _bf16(address, i)
    if kind == 2:
        return _fp16(address, i)
    return _fp64(address, i)


@njit(**JIT)
def store_any(address, i, kind, x):
    """Round x to that kind, into element i."""
    if kind == 0:
        _to_fp32(address, i, x)
    elif kind == 1:
        _to_bf16(address, i, x)
    elif kind == 2:
        _to_fp16(address, i, x)
    else:
        _to_fp64(address, i, x)


def kinds_code(*tensors):
    """The kinds of four arrays at most, 2 bits each, first the lowest; 0 where there is none."""
    code = 0
    for shift, tensor in enumerate(tensors):
        if tensor is not None:
            code |= memory.KINDS.index(tasks.KINDS[tensor.dtype]) << 2 * shift
    return code


@njit(**JIT)
def kind_at(code, which):
    return (code >> (2 * which)) & 3


@njit(**JIT)
def move(running, i, kind, value, momentum):
    """running = momentum value + (1 - momentum) running, of one channel"""
    before = load_any(running, i, kind)
    store_any(running, i, kind, momentum * value + (1.0 - momentum) * before)


@njit(**JIT)
def size_of(kind):
    """Bytes of an element of that kind."""
    if kind == 0:
        return 4
    return 8 if kind == 3 else 2


@njit(**JIT)
def tidy(x):
    """x, and for a NaN the one whose rounding to 16 bits is a NaN too."""
    return x if x == x else np.nan


@njit(**JIT)
def merge(n_a, mean_a, squares_a, n_b, mean_b, squares_b):
    """Mean and sum of squares about it of two lots together; an infinity stays one."""
    delta = mean_b - mean_a
    share = n_b / (n_a + n_b)
    if delta - delta != 0.0:
        return mean_a + mean_b, squares_a + squares_b + delta * np.float64(0)
    return mean_a + delta * share, squares_a + squares_b + delta * delta * (n_a * share)


@njit(**JIT)
def poor(first, second):
    """True where mean and mean square about a center, summed in float32, lost the variance to
    overflow or underflow, or met what is not finite."""
    return not (TINY <= second < np.inf) and (second != 0.0 or first != 0.0)


@njit(**JIT)
def off(first, second):
    """True where a center was off by more than a standard deviation: too much would cancel."""
    return not first * first <= second - first * first < np.inf


# Of planes. A lot is what one step of a task takes: a set, or where images are normalized together
# a channel of some images, so that memory is walked as it lies. Lot k begins at
# (k // inner) * outer_x + (k % inner) * inner_x and is n_segments segments of `length` neighbours,
# segment_x apart (fewer in the last, where all have n_total); y's likewise. Segment j is of channel
# (k % inner) * channels + j * moving. Moments are taken of segments that touch as of one: `merged`.
TABLE = 14
table_row = memory.make_row(types.int64, TABLE)
# Elements a lot of several images has at least, and how many lots of images there are at most.
IMAGES, LOTS = 65536, 64


class Table(NamedTuple):
    """Integers that kernels read: in Python, and as an int64 array with its address, which numpy
    takes 0.4 us to give."""

    numbers: tuple[int, ...]
    array: np.ndarray
    address: int

    @classmethod
    def of(cls, numbers: tuple[int, ...]) -> Table:
        array = np.array(numbers, dtype=np.int64)
        return cls(numbers, array, array.ctypes.data)


@lru_cache(maxsize=512)
def planes_table(c: Channels) -> Table:
    """The numbers of `TABLE` for a geometry, the first of which is how many lots there are."""
    length, per_group = c.length, c.channels // c.groups
    dense = c.channels * length
    if c.batch:
        images = max(-(-IMAGES // dense), -(-c.images // LOTS))
        lots = -(-c.images // images) * c.groups, c.groups, images * c.stride_image
        starts = c.stride_channel, images * dense, length
        segments = images, c.stride_image, dense, c.images
    else:
        lots = c.n_sets, c.groups, c.stride_image
        starts = per_group * c.stride_channel, dense, per_group * length
        segments = per_group, c.stride_channel, length, c.images * per_group
    merged = int(not c.batch and c.stride_channel == length)
    return Table.of((*lots, *starts, *segments, length, per_group, int(per_group > 1), merged))


@njit(**JIT)
def segments_of(k, inner, n_segments, n_total):
    """The number of segments of lot k."""
    return min(n_segments, n_total - k // inner * n_segments)


@njit(**JIT)
def blocks_of(n_runs, run):
    """(blocks, runs in each, blocks to a run, elements in each): whole runs, or parts of one."""
    if run >= RUN:
        parts = (run + RUN - 1) // RUN
        width = (run + parts - 1) // parts
        width += -width % 16
        parts = (run + width - 1) // width
        return n_runs * parts, 1, parts, width
    together = RUN // run
    return (n_runs + together - 1) // together, together, 1, run


def make_moments(tag, codec):
    """moments(x, down, n_runs, first, last) -> mean and sum of squares about it in float64 of the
    elements first to last of n_runs runs, `down` bytes apart."""
    load, compute, zero = codec.load, codec.compute, codec.compute(0)

    @tasks.inlined(tag)
    def about(x, down, n_runs, first, last, center):
        total, squares = np.float64(0), np.float64(0)
        for r in range(n_runs):
            run = x + r * down
            start = first
            while start < last:
                stop = block_end(start, last)
                part, part_squares = zero, zero
                for j in range(start, stop):
                    d = load(run, j) - center
                    part = add(part, d)
                    part_squares = add(part_squares, d * d)
                total += np.float64(part)
                squares += np.float64(part_squares)
                start = stop
        return total, squares

    @tasks.inlined(tag)
    def precise(x, down, n_runs, first, last, n):
        total, squares = np.float64(0), np.float64(0)
        for r in range(n_runs):
            for j in range(first, last):
                total += np.float64(load(x + r * down, j))
        mean = total / n
        for r in range(n_runs):
            for j in range(first, last):
                d = np.float64(load(x + r * down, j)) - mean
                squares += d * d
        return mean, squares

    @tasks.inlined(tag)
    def moments(x, down, n_runs, first, last):
        center, n_pivot = zero, min(last - first, PIVOT)
        for j in range(first, first + n_pivot):
            center = add(center, load(x, j))
        center = center / compute(n_pivot)
        n = np.float64(n_runs * (last - first))
        total, squares = np.float64(0), np.float64(0)
        for attempt in range(2):  # a loop: one copy of `about` to compile
            if attempt == 1:
                center = compute(np.float64(center) + total / n)
            total, squares = about(x, down, n_runs, first, last, center)
            if not off(total / n, squares / n):
                break
        if poor(total / n, squares / n):
            return precise(x, down, n_runs, first, last, n)
        left = total / n
        return np.float64(center) + left, squares - total * left

    return moments
