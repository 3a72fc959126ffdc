"""Softmax of scaled and masked rows for CPU: nothing of x's size is written but the result.

    y = softmax(scale x + mask);  a boolean mask adds -inf where it is False, a causal one to the
    right of the diagonal

A row in which all is -inf gives zeros; NaN and +inf where they are not masked make a row NaN.
"""

from __future__ import annotations

import numpy as np
from numba import types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import fence, stream_bytes, use_streaming_stores
from fastopt_kernels.cpu.base.tasks import block_end, double_bits
from fastopt_kernels.cpu.base.vector_math import add as add_up
from fastopt_kernels.cpu.base.vector_math import bits_to_double, exp_of, larger, ordered

_args = memory.make_row(types.int64, 14)
BOOL = "bool"


def _make_masked(tag, kind, mask_kind):
    """masked(x, mask, j, scale), an element as the softmax sees it."""
    compute, low = memory.compute_type(kind), tasks.Codec(kind, 0)
    load, infinity = low.load, compute(np.inf)
    flagged, added = mask_kind == BOOL, mask_kind not in (None, BOOL)
    flag = memory.make_flag_loader(3)
    load_mask = memory.make_loader(mask_kind if added else "fp32", compute, 3)

    @tasks.inlined(tag)
    def masked(x, mask, j, scale):
        value = load(x, j) * scale
        if flagged:
            return value if flag(mask, j) else -infinity
        if added:
            return value + load_mask(mask, j)
        return value

    return masked


def _make_scores(tag, kind, mask_kind, e_codec):
    """scores(x, mask, e, n, scale, ahead): what the softmax sees of a row into e, and the largest;
    ahead: as `rows.fetch` has it."""
    masked, itemsize = _make_masked(tag, kind, mask_kind), tasks.ITEMSIZE[kind]
    keep, unorder, lowest = e_codec.store, e_codec.unorder, e_codec.lowest

    @tasks.inlined(tag)
    def scores(x, mask, e, n, scale, ahead):
        top = lowest
        start = 0
        while start < n:
            stop = block_end(start, n)
            tasks.fetch(x, ahead, start, stop, itemsize)
            part = lowest
            for j in range(start, stop):
                value = masked(x, mask, j, scale)
                keep(e, j, value)
                part = larger(ordered(value), part)
            top = larger(part, top)
            start = stop
        return unorder(top)

    return scores


def _make_exponentials(tag, kind, e_codec):
    """exponentials(e, n, peak): exp(e - peak) in its place, and their sum."""
    (exp, _), zero = exp_of(kind), e_codec.compute(0)
    keep, kept = e_codec.store, e_codec.load

    @tasks.inlined(tag)
    def exponentials(e, n, peak):
        total = np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part = zero
            for j in range(start, stop):
                value = exp(kept(e, j) - peak)
                keep(e, j, value)
                part = add_up(part, value)
            total += np.float64(part)
            start = stop
        return total

    return exponentials


def _make_nothing_left(tag, e_codec):
    """nothing_left(e, n): what a row is filled with whose largest is -inf: 0, or the NaN it has (a
    negative one is passed over by the maximum)."""
    kept, zero = e_codec.load, e_codec.compute(0)

    @tasks.inlined(tag)
    def nothing_left(e, n):
        fill = zero
        for j in range(n):
            value = kept(e, j)
            fill = value if value != value else fill
        return fill

    return nothing_left


def _forward(tag, kind, mask_kind):
    x_codec, y_codec = tasks.Codec(kind, 0), tasks.Codec(kind, 1)
    itemsize, compute, store = x_codec.itemsize, x_codec.compute, y_codec.store
    # What is to be exponentiated waits in the output where it is wide enough, and in cache.
    in_place = kind == tasks.wide(kind)
    e_codec = y_codec if in_place else tasks.Codec(tasks.wide(kind), 2)
    e_size = e_codec.itemsize
    kept, scores = e_codec.load, _make_scores(tag, kind, mask_kind, e_codec)
    exponentials = _make_exponentials(tag, kind, e_codec)
    nothing_left = _make_nothing_left(tag, e_codec)
    mask_size = 1 if mask_kind == BOOL else tasks.ITEMSIZE[mask_kind or "fp32"]
    zero, one, infinity = compute(0), np.float64(1), compute(np.inf)

    def masked_softmax(args, task):
        numbers = _args(args, 0)
        x, y, mask, n_rows, n_cols, stride, factor, n_queries = numbers[:8]
        n1, n2, s0, s1, s2, n_task = numbers[8:]
        scale = compute(bits_to_double(factor))
        ahead, first = tasks.ahead_of(n_rows, n_cols, stride, itemsize), task * n_task
        streaming = use_streaming_stores(n_rows * n_cols * itemsize)
        waits = in_place and not streaming
        buffer = np.empty(1 if waits else n_cols * (e_size + itemsize), np.uint8)
        for row in range(first, min(first + n_task, n_rows)):
            x_row, y_row = x + row * stride * itemsize, y + row * n_cols * itemsize
            e_row = y_row if waits else np.int64(buffer.ctypes.data)
            # In place by one address: of two, LLVM would ask whether they are one.
            to = e_row if in_place else (e_row + n_cols * e_size if streaming else y_row)
            outer = row // n2
            mask_row = mask + mask_size * (outer // n1 * s0 + outer % n1 * s1 + row % n2 * s2)
            n = min(n_cols, row % n_queries + 1) if n_queries > 0 else n_cols
            peak = scores(x_row, mask_row, e_row, n, scale, ahead)
            left = peak > -infinity or peak != peak
            part = compute(one / exponentials(e_row, n, peak)) if left else zero
            fill = zero if left else nothing_left(e_row, n)
            if left:
                for j in range(n):
                    store(to, j, kept(e_row, j) * part)
            else:
                for j in range(n):
                    store(to, j, fill)
            for j in range(n, n_cols):
                store(to, j, zero)
            if streaming:
                stream_bytes(y_row, to, n_cols * itemsize)
        fence(streaming)
        tasks.alive(buffer)

    return masked_softmax


def masked_softmax(
    x: Tensor,
    mask: Tensor | None,
    y: Tensor,
    sizes: tuple[int, int, int],
    walk: tuple[int, int, int, int, int],
    scale: float,
    n_queries: int,
) -> None:
    """y = softmax(scale x + mask) of every row.

    sizes: rows, columns, stride of a row of x; y: contiguous; mask: boolean or of any dtype, its
    columns next to each other, row (i0, i1, i2) at i0 s0 + i1 s1 + i2 s2; walk: (n1, n2, s0, s1,
    s2), n1 and n2 being the extents of i1 and i2; n_queries: rows of a causal block, 0: not causal
    """
    task = tasks.task_of(_forward, tasks.kind_of(x), mask_kind(mask))
    pointers = (x.data_ptr(), y.data_ptr(), tasks.address(mask))
    scalars = (double_bits(scale), n_queries)
    tasks.run_rows(task, sizes[0], sizes[1], *pointers, *sizes, *scalars, *walk)


def mask_kind(mask: Tensor | None) -> str | None:
    return BOOL if mask is not None and not mask.is_floating_point() else tasks.kind_of(mask)
