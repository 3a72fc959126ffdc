"""Reductions over a dimension that is not the last: a tile of neighbouring columns at a time.

Columns lie beside each other in memory, so the loops run along a line of the tile and keep one
number a column. A tile is as wide as its numbers stay in cache, for lines that are read as they lie
in memory; what a column gets does not depend on how wide.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, types

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import (
    SPAN,
    fence,
    make_streaming_stores,
    staging,
    use_streaming_stores,
)
from fastopt_kernels.cpu.base.vector_math import exp_of, larger_float
from fastopt_kernels.cpu.base.xp import JIT

_args7, _args8, _args9, _args10 = (memory.make_row(types.int64, n) for n in (7, 8, 9, 10))
# Columns of a tile: 2 to 8 KiB of a line.
WIDTH = 2048
# Bytes of exponentials that may wait in a tile for their sum, and the least columns it may have: a
# larger one would leave the cache, and computing them again is faster.
WAITING, LEAST = 96 << 10, 32
# Lines summed by themselves before they go into the total: rounding errors grow with the square
# root of the lines instead of with the lines.
LINES = 32


def width_to_wait(n_cols: int, kind: str) -> int:
    """Columns of a tile whose exponentials are kept until their sum is known; 0: too many lines."""
    return WAITING // (tasks.ITEMSIZE[tasks.wide(kind)] * n_cols) // LEAST * LEAST


def run(task: tasks.Task, shape: tuple[int, int, int], *numbers: int, width: int = WIDTH) -> None:
    """A task for each tile of every outer index; the last of the numbers are how many of those
    there are, and the tile's columns."""
    n_outer, n_cols, n_inner = shape
    if n_outer * n_inner < width * torch.get_num_threads():
        # One for each thread.
        share = -(-n_outer * n_inner // torch.get_num_threads())
        width = min(width, max(LEAST, -(-share // LEAST) * LEAST))
    n_tasks = n_outer * -(-n_inner // width)
    tasks.run(task, n_tasks, n_outer * n_cols * n_inner, (*numbers, n_outer, width))


@njit(**JIT)
def tile_of(task, n_inner, columns):
    """(outer index, first column, columns) of a task."""
    n_tiles = (n_inner + columns - 1) // columns
    left = (task % n_tiles) * columns
    return task // n_tiles, left, min(columns, n_inner - left)


def make_scratch(kind):
    """Codecs of the numbers kept one a column: tops, totals, parts of totals."""
    return tasks.Codec(kind, 5), tasks.Codec(kind, 6), tasks.Codec(kind, 7)


def _make_peaks(tag, codec, of_top):
    """peaks(x, n_lines, down, width, top): raise every column's top to what its lines hold, which
    are `down` bytes apart."""
    load, get_top, put_top = codec.load, of_top.load, of_top.store

    @tasks.inlined(tag)
    def peaks(x, n_lines, down, width, top):
        four = n_lines - n_lines % 4  # lines at a time: a column's number is read and written once
        for c in range(0, four, 4):
            line = x + c * down
            for i in range(width):
                ab = larger_float(load(line, i), load(line + down, i))
                cd = larger_float(load(line + 2 * down, i), load(line + 3 * down, i))
                put_top(top, i, larger_float(ab, larger_float(cd, get_top(top, i))))
        for c in range(four, n_lines):
            for i in range(width):
                put_top(top, i, larger_float(load(x + c * down, i), get_top(top, i)))

    return peaks


def _make_exp_sums(tag, codec, finite, e_codec=None):
    """exp_sums(x, n_lines, down, width, top, part, kept, kept_down): add exp(x - top) to parts.

    finite: count a top of -inf as the lowest finite number; kept: where the exponentials go,
    kept_down bytes from one line to the next, if e_codec says how
    """
    load, compute, itemsize = codec.load, codec.compute, codec.itemsize
    of_top, _, of_part = make_scratch(codec.wide)
    get_top, get_part, put_part = of_top.load, of_part.load, of_part.store
    (exp, _), keep, put_e = exp_of(codec.kind), e_codec is not None, (e_codec or codec).store
    lowest = compute(np.finfo(np.float64 if codec.wide == "fp64" else np.float32).min)

    @tasks.inlined(tag)
    def exp_sums(x, n_lines, down, width, top, part, kept, kept_down):
        two = n_lines - n_lines % 2
        for c in range(0, two, 2):
            line, kept_line = x + c * down, kept + c * kept_down
            if finite:  # the next block
                tasks.fetch(line, LINES * down, 0, width, itemsize)
                tasks.fetch(line + down, LINES * down, 0, width, itemsize)
            for i in range(width):
                peak = get_top(top, i)
                if finite:
                    peak = larger_float(peak, lowest)
                a, b = exp(load(line, i) - peak), exp(load(line + down, i) - peak)
                put_part(part, i, get_part(part, i) + (a + b))
                if keep:
                    put_e(kept_line, i, a)
                    put_e(kept_line + kept_down, i, b)
        if two < n_lines:
            for i in range(width):
                peak = get_top(top, i)
                if finite:
                    peak = larger_float(peak, lowest)
                a = exp(load(x + two * down, i) - peak)
                put_part(part, i, get_part(part, i) + a)
                if keep:
                    put_e(kept + two * kept_down, i, a)

    return exp_sums


def make_waiting(tag, codec, e_codec):
    """totals(x, n_cols, step, width, top, total, part, kept, kept_down): tops and sums of
    exp(x - top), and the exponentials, where the tile is small.

    x: address of the tile; step: elements from one line to the next; top, total, part: one number
    a column, at these addresses
    """
    itemsize, compute = codec.itemsize, codec.compute
    of_top, of_total, of_part = make_scratch(codec.wide)
    put_top, put_total, get_total = of_top.store, of_total.store, of_total.load
    get_part, put_part = of_part.load, of_part.store
    peaks = _make_peaks(tag, codec, of_top)
    exp_sums = _make_exp_sums(tag, codec, False, e_codec)
    (_, unit), zero, lowest = exp_of(codec.kind), compute(0), compute(-np.inf)

    @tasks.inlined(tag)
    def totals(x, n_cols, step, width, top, total, part, kept, kept_down):
        down = step * itemsize
        for i in range(width):
            put_top(top, i, lowest)
            put_total(total, i, zero)
            put_part(part, i, zero)
        peaks(x, n_cols, down, width, top)
        for start in range(0, n_cols, LINES):
            line, kept_line = x + start * down, kept + start * kept_down
            exp_sums(line, min(LINES, n_cols - start), down, width, top, part, kept_line, kept_down)
            for i in range(width):
                put_total(total, i, get_total(total, i) + get_part(part, i))
                put_part(part, i, zero)
        for i in range(width):
            put_total(total, i, get_total(total, i) / unit)

    return totals


def make_online(tag, codec):
    """totals(x, n_cols, step, width, top, total, part): the same where the tile is read once.

    Milakov & Gimelshein 2018, algorithm 3, over blocks of lines.
    """
    itemsize, compute = codec.itemsize, codec.compute
    of_top, of_total, of_part = make_scratch(codec.wide)
    get_top, put_top = of_top.load, of_top.store
    get_total, put_total = of_total.load, of_total.store
    get_part, put_part = of_part.load, of_part.store
    peaks = _make_peaks(tag, codec, of_part)
    exp_sums = _make_exp_sums(tag, codec, True)
    (exp, unit), zero, lowest = exp_of(codec.kind), compute(0), compute(-np.inf)
    floor = compute(np.finfo(np.float64 if codec.wide == "fp64" else np.float32).min)

    @tasks.inlined(tag)
    def totals(x, n_cols, step, width, top, total, part):
        down = step * itemsize
        for i in range(width):
            put_top(top, i, lowest)
            put_total(total, i, zero)
            put_part(part, i, lowest)
        for start in range(0, n_cols, LINES):
            line, n_lines = x + start * down, min(LINES, n_cols - start)
            peaks(line, n_lines, down, width, part)  # tops wait where the parts will be
            for i in range(width):
                before, after = get_top(top, i), get_part(part, i)
                shift = larger_float(before, floor) - larger_float(after, floor)
                put_total(total, i, get_total(total, i) * (exp(shift) / unit))
                put_top(top, i, after)
                put_part(part, i, zero)
            exp_sums(line, n_lines, down, width, top, part, 0, 0)
            for i in range(width):
                put_total(total, i, get_total(total, i) + get_part(part, i))
                put_part(part, i, get_top(top, i))
        for i in range(width):
            put_total(total, i, get_total(total, i) / unit)

    return totals


def softmax(tag, kind, log, wait):
    """The tasks of softmax and log_softmax; wait: exponentials are kept, not computed again."""
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 1).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    of_top, of_total, _ = make_scratch(codec.wide)
    get_top, get_total, put_total = of_top.load, of_total.load, of_total.store
    e_codec = tasks.Codec(codec.wide, 2)
    get_e, e_size = e_codec.load, e_codec.itemsize
    waiting, online = make_waiting(tag, codec, e_codec), make_online(tag, codec)
    (exp, unit), one, n_kept = exp_of(codec.kind), compute(1), WAITING if wait else 1
    stage, flush = make_streaming_stores(itemsize)

    @tasks.inlined(tag)
    def write(x_line, y_line, kept_line, width, top, total, streaming):
        scratch = staging()
        for start in range(0, width, SPAN):
            stop = min(start + SPAN, width)
            to = stage(y_line, scratch, start, streaming)
            for i in range(start, stop):
                if log:
                    store(to, i, (load(x_line, i) - get_top(top, i)) - get_total(total, i))
                elif wait:
                    store(to, i, get_e(kept_line, i) / unit * get_total(total, i))
                else:
                    e = exp(load(x_line, i) - get_top(top, i))
                    store(to, i, e / unit * get_total(total, i))
            flush(y_line, scratch, start, stop, streaming)

    def softmax_columns(args, task):
        x, y, n_cols, n_inner, stride_outer, step, n_outer, columns = _args8(args, 0)
        streaming = use_streaming_stores(n_outer * n_cols * n_inner * itemsize)
        outer, left, width = tile_of(task, n_inner, columns)
        x_tile = x + (outer * stride_outer + left) * itemsize
        y_tile = y + (outer * n_cols * n_inner + left) * itemsize
        buffer, waiting_room = np.empty(3 * width, np.float64), np.empty(n_kept, np.uint8)
        top, kept, kept_down = buffer.ctypes.data, waiting_room.ctypes.data, columns * e_size
        total, part = top + 8 * width, top + 16 * width
        if wait:
            waiting(x_tile, n_cols, step, width, top, total, part, kept, kept_down)
        else:
            online(x_tile, n_cols, step, width, top, total, part)
        for i in range(width):
            if log:
                put_total(total, i, compute(math.log(get_total(total, i))))
            else:
                put_total(total, i, one / get_total(total, i))
        for c in range(n_cols):
            x_line, y_line = x_tile + c * step * itemsize, y_tile + c * n_inner * itemsize
            write(x_line, y_line, kept + c * kept_down, width, top, total, streaming)
        fence(streaming)
        tasks.alive(buffer)
        tasks.alive(waiting_room)

    return softmax_columns


def softmax_backward(tag, kind, log):
    """The tasks of their derivatives."""
    codec = tasks.Codec(kind, 0)
    itemsize, load_dy, load_y = codec.itemsize, codec.load, tasks.Codec(kind, 1).load
    store = tasks.Codec(kind, 2).store
    _, of_total, of_part = make_scratch(codec.wide)
    get_total, put_total = of_total.load, of_total.store
    get_part, put_part = of_part.load, of_part.store
    (exp, unit), zero = exp_of(codec.kind), codec.compute(0)
    stage, flush = make_streaming_stores(itemsize)

    def softmax_backward_columns(args, task):
        dy, y, dx, n_cols, n_inner, n_outer, columns = _args7(args, 0)
        streaming, scratch = use_streaming_stores(n_outer * n_cols * n_inner * itemsize), staging()
        outer, left, width = tile_of(task, n_inner, columns)
        at = (outer * n_cols * n_inner + left) * itemsize
        buffer = np.empty(2 * width, np.float64)
        total = buffer.ctypes.data
        part = total + 8 * width
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
            for start in range(0, width, SPAN):
                stop = min(start + SPAN, width)
                to = stage(dx + line, scratch, start, streaming)
                if log:
                    for i in range(start, stop):  # dx = dy - exp(y) sum dy
                        p = exp(load_y(y + line, i)) / unit
                        store(to, i, load_dy(dy + line, i) - p * get_total(total, i))
                else:
                    for i in range(start, stop):  # dx = y (dy - sum dy y)
                        d = load_dy(dy + line, i) - get_total(total, i)
                        store(to, i, load_y(y + line, i) * d)
                flush(dx + line, scratch, start, stop, streaming)
        fence(streaming)
        tasks.alive(buffer)

    return softmax_backward_columns


def logsumexp(tag, kind):
    """The task of logsumexp."""
    codec, store, put = (
        tasks.Codec(kind, 0),
        tasks.Codec(kind, 1).store,
        tasks.Codec("fp64", 2).store,
    )
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    of_top, of_total, _ = make_scratch(codec.wide)
    get_top, get_total = of_top.load, of_total.load
    totals = make_online(tag, codec)
    zero = compute(0)

    def logsumexp_columns(args, task):
        x, out, stats, n_cols, n_inner, stride_outer, step, _, columns = _args9(args, 0)
        outer, left, width = tile_of(task, n_inner, columns)
        x_tile = x + (outer * stride_outer + left) * itemsize
        buffer = np.empty(3 * width, np.float64)
        top = buffer.ctypes.data
        total, part = top + 8 * width, top + 16 * width
        totals(x_tile, n_cols, step, width, top, total, part)
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
        tasks.alive(buffer)

    return logsumexp_columns


def logsumexp_backward(tag, kind):
    """The task of its derivative."""
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 1).store
    load, load_dlse, itemsize = codec.load, tasks.Codec(kind, 3).load, codec.itemsize
    of_high, of_low, _ = make_scratch(codec.wide)
    get_high, put_high, get_low, put_low = of_high.load, of_high.store, of_low.load, of_low.store
    of_stats, compute = tasks.Codec("fp64", 2).load, codec.compute
    (exp, unit), (stage, flush) = exp_of(codec.kind), make_streaming_stores(itemsize)

    def logsumexp_backward_columns(args, task):
        dlse, x, stats, dx, n_cols, n_inner, stride_outer, step, n_outer, columns = _args10(args, 0)
        streaming, scratch = use_streaming_stores(n_outer * n_cols * n_inner * itemsize), staging()
        outer, left, width = tile_of(task, n_inner, columns)
        x_tile = x + (outer * stride_outer + left) * itemsize
        dx_tile = dx + (outer * n_cols * n_inner + left) * itemsize
        at = outer * n_inner + left
        buffer = np.empty(2 * width, np.float64)
        high = buffer.ctypes.data
        low = high + 8 * width
        for i in range(width):
            put_high(high, i, compute(of_stats(stats, 2 * (at + i))))
            put_low(low, i, compute(of_stats(stats, 2 * (at + i) + 1)))
        for c in range(n_cols):
            x_line = x_tile + c * step * itemsize
            dx_line = dx_tile + c * n_inner * itemsize
            for start in range(0, width, SPAN):
                stop = min(start + SPAN, width)
                to = stage(dx_line, scratch, start, streaming)
                for i in range(start, stop):  # dx = dlse exp(x - lse)
                    p = exp((load(x_line, i) - get_high(high, i)) - get_low(low, i)) / unit
                    store(to, i, p * load_dlse(dlse, at + i))
                flush(dx_line, scratch, start, stop, streaming)
        fence(streaming)
        tasks.alive(buffer)

    return logsumexp_backward_columns
