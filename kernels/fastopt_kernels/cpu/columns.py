"""Reductions over a dimension that is not the last: a tile of neighbouring columns at a time.

Columns lie beside each other in memory, so the loops run along a line of the tile and keep one
number a column; a tile is narrow enough to stay in cache from one pass to the next.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from fastopt_kernels.cpu import memory, rows
from fastopt_kernels.cpu.vecmath import exp_of, larger_float

_args = memory.make_row(types.int64, 8)
# Columns of a tile.
WIDTH = 256
# Lines summed by themselves before they go into the total: rounding errors grow with the square
# root of the lines instead of with the lines.
LINES = 32


def run(task: rows.Task, shape: tuple[int, int, int], *args: int) -> None:
    """A task for each tile of every outer index."""
    n_outer, n_cols, n_inner = shape
    n_tasks = n_outer * -(-n_inner // WIDTH)
    task.run(n_tasks, n_outer * n_cols * n_inner, *args, *(8 - len(args)) * (0,))


def make_tile_parts(tag, codec, keep=False):
    """peaks(x, n_cols, step, width, top) and exp_sums(x, n_cols, step, width, top, total, part).

    x: address of the tile; step: elements from one line to the next; top, total, part: one number
    a column, at these addresses
    """
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    scratch = rows.Codec(codec.wide)
    get, put = scratch.load, scratch.store
    (exp, unit), zero, lowest = exp_of(compute), compute(0), compute(-np.inf)

    @rows.inlined(tag)
    def peaks(x, n_cols, step, width, top):
        for i in range(width):
            put(top, i, lowest)
        for c in range(n_cols):
            line = x + c * step * itemsize
            for i in range(width):
                put(top, i, larger_float(load(line, i), get(top, i)))

    @rows.inlined(tag)
    def exp_sums(x, n_cols, step, width, top, total, part, y, y_step):
        for i in range(width):
            put(total, i, zero)
        for start in range(0, n_cols, LINES):
            for i in range(width):
                put(part, i, zero)
            for c in range(start, min(start + LINES, n_cols)):
                line = x + c * step * itemsize
                for i in range(width):
                    e = exp(load(line, i) - get(top, i))
                    put(part, i, get(part, i) + e)
                    if keep:
                        put(y + c * y_step * 4, i, e)
            for i in range(width):
                put(total, i, get(total, i) + get(part, i))
        for i in range(width):
            put(total, i, get(total, i) / unit)

    return peaks, exp_sums


def softmax(tag, kind, log):
    """The tasks of softmax and log_softmax."""
    codec = rows.Codec(kind)
    load, store, itemsize, compute = codec.load, codec.store, codec.itemsize, codec.compute
    get, put = rows.Codec(codec.wide).load, rows.Codec(codec.wide).store
    in_place = not log and kind == "fp32"
    peaks, exp_sums = make_tile_parts(tag, codec, in_place)
    (exp, unit), one = exp_of(compute), compute(1)

    def softmax_columns(args, task):
        x, y, n_cols, n_inner, stride_outer, step, _, _ = _args(args, 0)
        n_tiles = (n_inner + WIDTH - 1) // WIDTH
        outer, left = task // n_tiles, (task % n_tiles) * WIDTH
        width = min(WIDTH, n_inner - left)
        x_tile = x + (outer * stride_outer + left) * itemsize
        y_tile = y + (outer * n_cols * n_inner + left) * itemsize
        buffer = np.empty(3 * WIDTH, np.float64)
        top = buffer.ctypes.data
        total, part = top + 8 * WIDTH, top + 16 * WIDTH
        peaks(x_tile, n_cols, step, width, top)
        exp_sums(x_tile, n_cols, step, width, top, total, part, y_tile, n_inner)
        if log:
            for i in range(width):
                put(total, i, compute(math.log(get(total, i))))
        else:
            for i in range(width):
                put(total, i, one / get(total, i) / (unit if in_place else compute(1)))
        for c in range(n_cols):
            x_line = x_tile + c * step * itemsize
            y_line = y_tile + c * n_inner * itemsize
            if log:
                for i in range(width):
                    store(y_line, i, (load(x_line, i) - get(top, i)) - get(total, i))
            elif in_place:
                for i in range(width):
                    store(y_line, i, load(y_line, i) * get(total, i))
            else:
                for i in range(width):
                    store(y_line, i, exp(load(x_line, i) - get(top, i)) / unit * get(total, i))

    return softmax_columns


def softmax_backward(tag, kind, log):
    """The tasks of their derivatives."""
    codec = rows.Codec(kind)
    load, store, itemsize = codec.load, codec.store, codec.itemsize
    get, put = rows.Codec(codec.wide).load, rows.Codec(codec.wide).store
    (exp, unit), zero = exp_of(codec.compute), codec.compute(0)

    def softmax_backward_columns(args, task):
        dy, y, dx, n_cols, n_inner, _, _, _ = _args(args, 0)
        n_tiles = (n_inner + WIDTH - 1) // WIDTH
        outer, left = task // n_tiles, (task % n_tiles) * WIDTH
        width = min(WIDTH, n_inner - left)
        at = (outer * n_cols * n_inner + left) * itemsize
        buffer = np.empty(2 * WIDTH, np.float64)
        total = buffer.ctypes.data
        part = total + 8 * WIDTH
        for i in range(width):
            put(total, i, zero)
        for start in range(0, n_cols, LINES):
            for i in range(width):
                put(part, i, zero)
            for c in range(start, min(start + LINES, n_cols)):
                line = at + c * n_inner * itemsize
                if log:
                    for i in range(width):
                        put(part, i, get(part, i) + load(dy + line, i))
                else:
                    for i in range(width):
                        put(part, i, get(part, i) + load(dy + line, i) * load(y + line, i))
            for i in range(width):
                put(total, i, get(total, i) + get(part, i))
        for c in range(n_cols):
            line = at + c * n_inner * itemsize
            if log:
                for i in range(width):  # dx = dy - exp(y) sum dy
                    p = exp(load(y + line, i)) / unit
                    store(dx + line, i, load(dy + line, i) - p * get(total, i))
            else:
                for i in range(width):  # dx = y (dy - sum dy y)
                    store(dx + line, i, load(y + line, i) * (load(dy + line, i) - get(total, i)))

    return softmax_backward_columns


def logsumexp(tag, kind):
    """The task of logsumexp."""
    codec = rows.Codec(kind)
    load, store, itemsize, compute = codec.load, codec.store, codec.itemsize, codec.compute
    get, put = rows.Codec(codec.wide).load, rows.Codec("fp64").store
    peaks, exp_sums = make_tile_parts(tag, codec)
    zero = compute(0)

    def logsumexp_columns(args, task):
        x, out, stats, n_cols, n_inner, stride_outer, step, _ = _args(args, 0)
        n_tiles = (n_inner + WIDTH - 1) // WIDTH
        outer, left = task // n_tiles, (task % n_tiles) * WIDTH
        width = min(WIDTH, n_inner - left)
        x_tile = x + (outer * stride_outer + left) * itemsize
        buffer = np.empty(3 * WIDTH, np.float64)
        top = buffer.ctypes.data
        total, part = top + 8 * WIDTH, top + 16 * WIDTH
        peaks(x_tile, n_cols, step, width, top)
        exp_sums(x_tile, n_cols, step, width, top, total, part, 0, 0)
        for i in range(width):
            peak = get(top, i)
            log_total = math.log(np.float64(get(total, i)))
            if peak - peak != zero:  # infinite: its own logsumexp, unless there is a NaN
                log_total = np.float64(0)
                for c in range(n_cols):
                    element = load(x_tile + c * step * itemsize, i)
                    peak = element if element != element else peak
            at = outer * n_inner + left + i
            put(stats, 2 * at, np.float64(peak))
            put(stats, 2 * at + 1, log_total)
            store(out, at, compute(np.float64(peak) + log_total))

    return logsumexp_columns


def logsumexp_backward(tag, kind):
    """The task of its derivative."""
    codec = rows.Codec(kind)
    load, store, itemsize = codec.load, codec.store, codec.itemsize
    get, put = rows.Codec(codec.wide).load, rows.Codec(codec.wide).store
    of_stats, compute = rows.Codec("fp64").load, codec.compute
    exp, unit = exp_of(codec.compute)

    def logsumexp_backward_columns(args, task):
        dlse, x, stats, dx, n_cols, n_inner, stride_outer, step = _args(args, 0)
        n_tiles = (n_inner + WIDTH - 1) // WIDTH
        outer, left = task // n_tiles, (task % n_tiles) * WIDTH
        width = min(WIDTH, n_inner - left)
        x_tile = x + (outer * stride_outer + left) * itemsize
        dx_tile = dx + (outer * n_cols * n_inner + left) * itemsize
        at = outer * n_inner + left
        buffer = np.empty(2 * WIDTH, np.float64)
        high = buffer.ctypes.data
        low = high + 8 * WIDTH
        for i in range(width):
            put(high, i, compute(of_stats(stats, 2 * (at + i))))
            put(low, i, compute(of_stats(stats, 2 * (at + i) + 1)))
        for c in range(n_cols):
            x_line = x_tile + c * step * itemsize
            dx_line = dx_tile + c * n_inner * itemsize
            for i in range(width):  # dx = dlse exp(x - lse)
                p = exp((load(x_line, i) - get(high, i)) - get(low, i)) / unit
                store(dx_line, i, p * load(dlse, at + i))

    return logsumexp_backward_columns
