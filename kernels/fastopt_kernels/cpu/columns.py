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
# Bytes of exponentials that may wait in a tile: more would leave the cache. (Waiting in the output,
# lines a power of two apart fall on each other's cache sets.)
WAITING = 1 << 22
# Lines summed by themselves before they go into the total: rounding errors grow with the square
# root of the lines instead of with the lines.
LINES = 32


def run(task: rows.Task, shape: tuple[int, int, int], *args: int) -> None:
    """A task for each tile of every outer index."""
    n_outer, n_cols, n_inner = shape
    n_tasks = n_outer * -(-n_inner // WIDTH)
    rows.run(task, n_tasks, n_outer * n_cols * n_inner, args)


def make_scratch(kind):
    """Codecs of the numbers kept one a column: tops, totals, parts of totals."""
    return rows.Codec(kind, 5), rows.Codec(kind, 6), rows.Codec(kind, 7)


def make_tile_parts(tag, codec, e_codec=None):
    """peaks(x, n_cols, step, width, top) and
    exp_sums(x, n_cols, step, width, top, total, part, kept, kept_down).

    x: address of the tile; step: elements from one line to the next; top, total, part: one number
    a column, at these addresses; kept: where the exponentials go, kept_down bytes from one line to
    the next, if e_codec says how
    """
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    of_top, of_total, of_part = make_scratch(codec.wide)
    get_top, put_top = of_top.load, of_top.store
    get_total, put_total = of_total.load, of_total.store
    get_part, put_part = of_part.load, of_part.store
    (exp, unit), zero, lowest = exp_of(compute), compute(0), compute(-np.inf)
    keep, put_e = e_codec is not None, (e_codec or codec).store

    @rows.inlined(tag)
    def peaks(x, n_cols, step, width, top):
        for i in range(width):
            put_top(top, i, lowest)
        down = step * itemsize
        four = n_cols - n_cols % 4  # lines at a time: a column's number is read and written once
        for c in range(0, four, 4):
            line = x + c * down
            for i in range(width):
                ab = larger_float(load(line, i), load(line + down, i))
                cd = larger_float(load(line + 2 * down, i), load(line + 3 * down, i))
                put_top(top, i, larger_float(ab, larger_float(cd, get_top(top, i))))
        for c in range(four, n_cols):
            for i in range(width):
                put_top(top, i, larger_float(load(x + c * down, i), get_top(top, i)))

    @rows.inlined(tag)
    def exp_sums(x, n_cols, step, width, top, total, part, kept, kept_down):
        down = step * itemsize
        for i in range(width):
            put_total(total, i, zero)
        for start in range(0, n_cols, LINES):
            for i in range(width):
                put_part(part, i, zero)
            stop = min(start + LINES, n_cols)
            two = stop - (stop - start) % 2
            for c in range(start, two, 2):
                line, kept_line = x + c * down, kept + c * kept_down
                for i in range(width):
                    peak = get_top(top, i)
                    a, b = exp(load(line, i) - peak), exp(load(line + down, i) - peak)
                    put_part(part, i, get_part(part, i) + (a + b))
                    if keep:
                        put_e(kept_line, i, a)
                        put_e(kept_line + kept_down, i, b)
            if two < stop:
                for i in range(width):
                    a = exp(load(x + two * down, i) - get_top(top, i))
                    put_part(part, i, get_part(part, i) + a)
                    if keep:
                        put_e(kept + two * kept_down, i, a)
            for i in range(width):
                put_total(total, i, get_total(total, i) + get_part(part, i))
        for i in range(width):
            put_total(total, i, get_total(total, i) / unit)

    return peaks, exp_sums


def softmax(tag, kind, log, wait):
    """The tasks of softmax and log_softmax; wait: exponentials are kept in a tile of their
    own, not computed again."""
    codec, store = rows.Codec(kind, 0), rows.Codec(kind, 1).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    of_top, of_total, _ = make_scratch(codec.wide)
    get_top, get_total, put_total = of_top.load, of_total.load, of_total.store
    e_codec = rows.Codec(codec.wide, 2)
    get_e, kept_down = e_codec.load, WIDTH * e_codec.itemsize
    peaks, exp_sums = make_tile_parts(tag, codec, e_codec if wait else None)
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
        tile = np.empty(n_cols * kept_down if wait else 1, np.uint8)
        kept = tile.ctypes.data
        peaks(x_tile, n_cols, step, width, top)
        exp_sums(x_tile, n_cols, step, width, top, total, part, kept, kept_down)
        for i in range(width):
            if log:
                put_total(total, i, compute(math.log(get_total(total, i))))
            else:
                put_total(total, i, one / get_total(total, i))
        for c in range(n_cols):
            x_line = x_tile + c * step * itemsize
            y_line = y_tile + c * n_inner * itemsize
            if log:
                for i in range(width):
                    store(y_line, i, (load(x_line, i) - get_top(top, i)) - get_total(total, i))
            elif wait:
                for i in range(width):
                    e = get_e(kept + c * kept_down, i)
                    store(y_line, i, e / unit * get_total(total, i))
            else:
                for i in range(width):
                    e = exp(load(x_line, i) - get_top(top, i))
                    store(y_line, i, e / unit * get_total(total, i))
        rows.alive(buffer)
        rows.alive(tile)

    return softmax_columns


def softmax_backward(tag, kind, log):
    """The tasks of their derivatives."""
    codec = rows.Codec(kind, 0)
    itemsize, load_dy, load_y = codec.itemsize, codec.load, rows.Codec(kind, 1).load
    store = rows.Codec(kind, 2).store
    _, of_total, of_part = make_scratch(codec.wide)
    get_total, put_total = of_total.load, of_total.store
    get_part, put_part = of_part.load, of_part.store
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
            put_total(total, i, zero)
        for start in range(0, n_cols, LINES):
            for i in range(width):
                put_part(part, i, zero)
            for c in range(start, min(start + LINES, n_cols)):
                line = at + c * n_inner * itemsize
                if log:
                    for i in range(width):
                        put_part(part, i, get_part(part, i) + load_dy(dy + line, i))
                else:
                    for i in range(width):
                        put_part(
                            part, i, get_part(part, i) + load_dy(dy + line, i) * load_y(y + line, i)
                        )
            for i in range(width):
                put_total(total, i, get_total(total, i) + get_part(part, i))
        for c in range(n_cols):
            line = at + c * n_inner * itemsize
            if log:
                for i in range(width):  # dx = dy - exp(y) sum dy
                    p = exp(load_y(y + line, i)) / unit
                    store(dx + line, i, load_dy(dy + line, i) - p * get_total(total, i))
            else:
                for i in range(width):  # dx = y (dy - sum dy y)
                    store(
                        dx + line,
                        i,
                        load_y(y + line, i) * (load_dy(dy + line, i) - get_total(total, i)),
                    )
        rows.alive(buffer)

    return softmax_backward_columns


def logsumexp(tag, kind):
    """The task of logsumexp."""
    codec, store, put = rows.Codec(kind, 0), rows.Codec(kind, 1).store, rows.Codec("fp64", 2).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    of_top, of_total, _ = make_scratch(codec.wide)
    get_top, get_total = of_top.load, of_total.load
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
            peak = get_top(top, i)
            log_total = math.log(np.float64(get_total(total, i)))
            if peak - peak != zero:  # infinite: its own logsumexp, unless there is a NaN
                log_total = np.float64(0)
                for c in range(n_cols):
                    element = load(x_tile + c * step * itemsize, i)
                    peak = element if element != element else peak
            at = outer * n_inner + left + i
            put(stats, 2 * at, np.float64(peak))
            put(stats, 2 * at + 1, log_total)
            store(out, at, compute(np.float64(peak) + log_total))
        rows.alive(buffer)

    return logsumexp_columns


def logsumexp_backward(tag, kind):
    """The task of its derivative."""
    codec, store = rows.Codec(kind, 0), rows.Codec(kind, 1).store
    load, load_dlse, itemsize = codec.load, rows.Codec(kind, 3).load, codec.itemsize
    of_high, of_low, _ = make_scratch(codec.wide)
    get_high, put_high, get_low, put_low = of_high.load, of_high.store, of_low.load, of_low.store
    of_stats, compute = rows.Codec("fp64", 2).load, codec.compute
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
            put_high(high, i, compute(of_stats(stats, 2 * (at + i))))
            put_low(low, i, compute(of_stats(stats, 2 * (at + i) + 1)))
        for c in range(n_cols):
            x_line = x_tile + c * step * itemsize
            dx_line = dx_tile + c * n_inner * itemsize
            for i in range(width):  # dx = dlse exp(x - lse)
                p = exp((load(x_line, i) - get_high(high, i)) - get_low(low, i)) / unit
                store(dx_line, i, p * load_dlse(dlse, at + i))
        rows.alive(buffer)

    return logsumexp_backward_columns
