"""Softmax and what is near it, for CPU: rows stay in cache from the first pass to the last.

    softmax      y = exp(x - max) / sum exp(x - max)
    log_softmax  y = x - max - log sum exp(x - max)
    logsumexp    max + log sum exp(x - max)

A NaN anywhere makes its row NaN through the sum; so do a +inf and a row of -inf, as with torch.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import (
    SPAN,
    fence,
    make_streaming_stores,
    staging,
    stream_bytes,
    use_streaming_stores,
)
from fastopt_kernels.cpu.base.tasks import block_end, double_bits
from fastopt_kernels.cpu.base.vector_math import add, bits_to_double, exp_of, larger
from fastopt_kernels.cpu.rows import softmax_columns

Shape = tuple[int, int, int]
Strides = tuple[int, int]

_args = memory.make_row(types.int64, 6)
_args7 = memory.make_row(types.int64, 7)
_args8 = memory.make_row(types.int64, 8)


def make_row_parts(tag, codec):
    """peak(x, n), the largest element of a row, and exp_sum(x, n, peak, ahead), sum exp(x - peak).

    ahead: as `rows.fetch` has it
    """
    load, load_order, unorder, lowest = codec.load, codec.load_order, codec.unorder, codec.lowest
    (exp, unit), zero, itemsize = exp_of(codec.kind), codec.compute(0), codec.itemsize

    @tasks.inlined(tag)
    def peak(x, n):
        top = lowest
        for j in range(n):
            top = larger(load_order(x, j), top)
        return unorder(top)

    @tasks.inlined(tag)
    def exp_sum(x, n, peak, ahead):
        total = np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part = zero
            tasks.fetch(x, ahead, start, stop, itemsize)
            for j in range(start, stop):
                part = add(part, exp(load(x, j) - peak))
            total += np.float64(part)
            start = stop
        return total / np.float64(unit)

    return peak, exp_sum


def _softmax(tag, kind):
    x_codec, y_codec = tasks.Codec(kind, 0), tasks.Codec(kind, 1)
    load, store, itemsize = x_codec.load, y_codec.store, x_codec.itemsize
    peak, _ = make_row_parts(tag, x_codec)
    (exp, _), compute = exp_of(kind), x_codec.compute
    zero, one = compute(0), np.float64(1)
    # The exponentials wait in the output where it is wide enough, and in cache.
    in_place = kind == tasks.wide(kind)
    e_codec = y_codec if in_place else tasks.Codec(tasks.wide(kind), 2)
    keep, kept, e_size = e_codec.store, e_codec.load, e_codec.itemsize
    stage, flush = make_streaming_stores(itemsize)

    def softmax(args, task):
        x, y, n_rows, n_cols, stride, n_task = _args(args, 0)
        ahead, first = tasks.ahead_of(n_rows, n_cols, stride, itemsize), task * n_task
        streaming, scratch = use_streaming_stores(n_rows * n_cols * itemsize), staging()
        waits = in_place and not streaming
        buffer = np.empty(1 if waits else n_cols * e_size, np.uint8)
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            y_row = y + row * n_cols * itemsize
            e_row = y_row if waits else np.int64(buffer.ctypes.data)
            top = peak(x_row, n_cols)
            total = np.float64(0)
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                part = zero
                tasks.fetch(x_row, ahead, start, stop, itemsize)
                for j in range(start, stop):
                    e = exp(load(x_row, j) - top)
                    keep(e_row, j, e)
                    part = add(part, e)
                total += np.float64(part)
                start = stop
            scale = compute(one / total)
            if in_place:  # by one address: of two, LLVM would ask whether they are one
                for j in range(n_cols):
                    store(e_row, j, kept(e_row, j) * scale)
                if streaming:
                    stream_bytes(y_row, e_row, n_cols * itemsize)
            else:
                for start in range(0, n_cols, SPAN):
                    stop = min(start + SPAN, n_cols)
                    to = stage(y_row, scratch, start, streaming)
                    for j in range(start, stop):
                        store(to, j, kept(e_row, j) * scale)
                    flush(y_row, scratch, start, stop, streaming)
        fence(streaming)
        tasks.alive(buffer)

    return softmax


def _log_softmax(tag, kind):
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 1).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    (peak, exp_sum), (stage, flush) = make_row_parts(tag, codec), make_streaming_stores(itemsize)

    def log_softmax(args, task):
        x, y, n_rows, n_cols, stride, n_task = _args(args, 0)
        ahead, first = tasks.ahead_of(n_rows, n_cols, stride, itemsize), task * n_task
        streaming, scratch = use_streaming_stores(n_rows * n_cols * itemsize), staging()
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            y_row = y + row * n_cols * itemsize
            top = peak(x_row, n_cols)
            log_total = compute(math.log(exp_sum(x_row, n_cols, top, ahead)))
            for start in range(0, n_cols, SPAN):
                stop = min(start + SPAN, n_cols)
                to = stage(y_row, scratch, start, streaming)
                for j in range(start, stop):
                    store(to, j, (load(x_row, j) - top) - log_total)
                flush(y_row, scratch, start, stop, streaming)
        fence(streaming)

    return log_softmax


def _softmax_backward(tag, kind, log):
    codec = tasks.Codec(kind, 0)
    itemsize = codec.itemsize
    load_dy, load_y, store = codec.load, tasks.Codec(kind, 1).load, tasks.Codec(kind, 2).store
    (exp, unit), compute = exp_of(codec.kind), codec.compute
    zero, (stage, flush) = compute(0), make_streaming_stores(itemsize)

    def softmax_backward(args, task):
        dy, y, dx, n_rows, n_cols, factor, n_task = _args7(args, 0)
        ahead, first = tasks.ahead_of(n_rows, n_cols, n_cols, itemsize), task * n_task
        streaming, scratch = use_streaming_stores(n_rows * n_cols * itemsize), staging()
        scale = compute(bits_to_double(factor))
        for row in range(first, min(first + n_task, n_rows)):
            at = row * n_cols * itemsize
            whole = np.float64(0)
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                part = zero
                for j in range(start, stop):
                    part = add(part, load_dy(dy + at, j) * load_y(y + at, j))
                whole += np.float64(part)
                start = stop
            total = compute(whole)
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                tasks.fetch(dy + at, ahead, start, stop, itemsize)
                tasks.fetch(y + at, ahead, start, stop, itemsize)
                to = stage(dx + at, scratch, start, streaming)
                for j in range(start, stop):  # dx = y (dy - sum dy y), times what scaled x
                    d = load_y(y + at, j) * (load_dy(dy + at, j) - total)
                    store(to, j, d * scale)
                flush(dx + at, scratch, start, stop, streaming)
                start = stop
        fence(streaming)

    def log_softmax_backward(args, task):
        dy, y, dx, n_rows, n_cols, n_task = _args(args, 0)
        ahead, first = tasks.ahead_of(n_rows, n_cols, n_cols, itemsize), task * n_task
        streaming, scratch = use_streaming_stores(n_rows * n_cols * itemsize), staging()
        for row in range(first, min(first + n_task, n_rows)):
            at = row * n_cols * itemsize
            whole = np.float64(0)
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                part = zero
                for j in range(start, stop):
                    part = add(part, load_dy(dy + at, j))
                whole += np.float64(part)
                start = stop
            total = compute(whole / np.float64(unit))
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                tasks.fetch(dy + at, ahead, start, stop, itemsize)
                to = stage(dx + at, scratch, start, streaming)
                for j in range(start, stop):  # dx = dy - exp(y) sum dy
                    store(to, j, load_dy(dy + at, j) - exp(load_y(y + at, j)) * total)
                flush(dx + at, scratch, start, stop, streaming)
                start = stop
        fence(streaming)

    return log_softmax_backward if log else softmax_backward


def _logsumexp(tag, kind):
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 1).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    put, zero = tasks.Codec("fp64", 2).store, compute(0)
    peak, exp_sum = make_row_parts(tag, codec)

    def logsumexp(args, task):
        x, out, stats, n_rows, n_cols, stride, n_task = _args7(args, 0)
        ahead, first = tasks.ahead_of(n_rows, n_cols, stride, itemsize), task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            top = peak(x_row, n_cols)
            log_total = math.log(exp_sum(x_row, n_cols, top, ahead))
            if top - top != zero:  # infinite: its own logsumexp, unless there is a NaN
                log_total = np.float64(0)
                for j in range(n_cols):
                    element = load(x_row, j)
                    top = element if element != element else top
            put(stats, 2 * row, np.float64(top))
            put(stats, 2 * row + 1, log_total)
            store(out, row, compute(np.float64(top) + log_total))

    return logsumexp


def _logsumexp_backward(tag, kind):
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 1).store
    load, itemsize, load_upstream = codec.load, codec.itemsize, tasks.Codec(kind, 3).load
    get, compute = tasks.Codec("fp64", 2).load, codec.compute
    (exp, unit), (stage, flush) = exp_of(codec.kind), make_streaming_stores(itemsize)

    def logsumexp_backward(args, task):
        dlse, x, stats, dx, n_rows, n_cols, stride, n_task = _args8(args, 0)
        first = task * n_task
        streaming, scratch = use_streaming_stores(n_rows * n_cols * itemsize), staging()
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            dx_row = dx + row * n_cols * itemsize
            upstream = load_upstream(dlse, row)
            top, log_total = compute(get(stats, 2 * row)), compute(get(stats, 2 * row + 1))
            for start in range(0, n_cols, SPAN):
                stop = min(start + SPAN, n_cols)
                to = stage(dx_row, scratch, start, streaming)
                for j in range(start, stop):  # dx = dlse exp(x - lse)
                    store(to, j, exp((load(x_row, j) - top) - log_total) / unit * upstream)
                flush(dx_row, scratch, start, stop, streaming)
        fence(streaming)

    return logsumexp_backward


def softmax(x: Tensor, y: Tensor, shape: Shape, strides: Strides, log: bool) -> None:
    """Softmax, or its logarithm, over the middle dimension of x into y."""
    n_outer, n_cols, n_inner = shape
    kind, pointers = tasks.KINDS[x.dtype], (x.data_ptr(), y.data_ptr())
    if n_inner == 1:
        task = tasks.task_of(_log_softmax if log else _softmax, kind)
        tasks.run_rows(task, n_outer, n_cols, *pointers, n_outer, n_cols, strides[0])
    else:
        wait = 0 if log else softmax_columns.width_to_wait(n_cols, kind)
        task = tasks.task_of(softmax_columns.softmax, kind, log, wait > 0)
        width = wait or softmax_columns.WIDTH
        softmax_columns.run(task, shape, *pointers, n_cols, n_inner, *strides, width=width)


def softmax_backward(
    dy: Tensor, y: Tensor, dx: Tensor, shape: Shape, log: bool, scale: float = 1.0
) -> None:
    """The derivative of softmax, or of its logarithm, from its result y; of softmax over rows,
    times what its input had been scaled by."""
    n_outer, n_cols, n_inner = shape
    kind, pointers = tasks.KINDS[y.dtype], (dy.data_ptr(), y.data_ptr(), dx.data_ptr())
    if n_inner == 1:
        task = tasks.task_of(_softmax_backward, kind, log)
        scalars = () if log else (double_bits(scale),)
        tasks.run_rows(task, n_outer, n_cols, *pointers, n_outer, n_cols, *scalars)
    else:
        task = tasks.task_of(softmax_columns.softmax_backward, kind, log)
        softmax_columns.run(task, shape, *pointers, n_cols, n_inner)


def logsumexp(x: Tensor, out: Tensor, stats: Tensor, shape: Shape, strides: Strides) -> None:
    """log sum exp(x) over the middle dimension into out, and apart into stats: the maximum and
    log sum exp(x - max), float64."""
    n_outer, n_cols, n_inner = shape
    kind, pointers = tasks.KINDS[x.dtype], (x.data_ptr(), out.data_ptr(), stats.data_ptr())
    if n_inner == 1:
        task = tasks.task_of(_logsumexp, kind)
        tasks.run_rows(task, n_outer, n_cols, *pointers, n_outer, n_cols, strides[0])
    else:
        task = tasks.task_of(softmax_columns.logsumexp, kind)
        softmax_columns.run(task, shape, *pointers, n_cols, n_inner, *strides)


def logsumexp_backward(
    dlse: Tensor, x: Tensor, stats: Tensor, dx: Tensor, shape: Shape, strides: Strides
) -> None:
    """The derivative of logsumexp; dlse is of x's dtype."""
    n_outer, n_cols, n_inner = shape
    pointers = (dlse.data_ptr(), x.data_ptr(), stats.data_ptr(), dx.data_ptr())
    kind = tasks.KINDS[x.dtype]
    if n_inner == 1:
        task = tasks.task_of(_logsumexp_backward, kind)
        tasks.run_rows(task, n_outer, n_cols, *pointers, n_outer, n_cols, strides[0])
    else:
        task = tasks.task_of(softmax_columns.logsumexp_backward, kind)
        softmax_columns.run(task, shape, *pointers, n_cols, n_inner, *strides)
