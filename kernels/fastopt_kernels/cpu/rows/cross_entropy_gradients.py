"""The gradients of cross entropy for CPU.

    indices        dz_c = dloss ((h + s / C W + 2 z_loss r lse) p_c - h [c = t] - s / C w_c),
                   h = (1 - s) w_t,  W = sum w,  r: what stats end with, the mean of w_t in a mean
    probabilities  dz_c = dloss ((sum_k w_k q_k + 2 z_loss lse) p_c - w_c q_c)
    dx = dz, or dz (1 - tanh(x / softcap)^2)

p = exp((z - max) - log sum exp(z - max)). A gradient may be written over the logits it is of.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.memory import load_integer
from fastopt_kernels.cpu.base.streaming_stores import (
    SPAN,
    fence,
    make_streaming_stores,
    staging,
    use_streaming_stores,
)
from fastopt_kernels.cpu.base.tasks import block_end
from fastopt_kernels.cpu.base.vector_math import add, exp_of
from fastopt_kernels.cpu.rows.cross_entropy_terms import (
    SMOOTHING,
    SOFTCAP,
    Z_LOSS,
    Terms,
    as_rows,
    make_logits,
    terms_of,
)
from fastopt_kernels.cpu.rows.softmax import Shape, Strides

_args = memory.make_row(types.int64, 13)


def _loss_backward(tag, kind, dloss_kind, weighted, smooth, squared, capped, in_place):
    codec = tasks.Codec(kind, 0, own_nan=not weighted)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    # Written over the logits, the stream is theirs.
    store = codec.store if in_place else tasks.Codec(kind, 1, own_nan=not weighted).store
    load_upstream = memory.make_loader(dloss_kind, compute, 4)
    get, get_double = tasks.Codec(tasks.wide(kind), 2).load, tasks.Codec("fp64", 3).load
    scalar = tasks.Codec("fp64", 5).load
    (exp, unit), zero, one = exp_of(codec.kind), compute(0), compute(1)
    (caps_of, cap, _, _), (stage, flush) = (
        make_logits(tag, codec, capped),
        make_streaming_stores(itemsize),
    )

    def cross_entropy_backward(args, task):
        (
            x,
            target,
            weight,
            stats,
            dloss,
            dx,
            each,
            n_rows,
            n_cols,
            stride,
            ignore,
            numbers,
            n_task,
        ) = _args(args, 0)
        spread, z_loss = compute(scalar(numbers, SMOOTHING)), scalar(numbers, Z_LOSS)
        caps = caps_of(scalar(numbers, SOFTCAP))
        share = spread / compute(n_cols)
        weights = compute(n_cols)
        if weighted and smooth:
            weights = zero
            for j in range(n_cols):
                weights = add(weights, get(weight, j))
        first, scratch = task * n_task, staging()
        streaming = not in_place and use_streaming_stores(n_rows * n_cols * itemsize)
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            dx_row = x_row if in_place else dx + row * n_cols * itemsize
            t = load_integer(target, row)
            top = compute(get_double(stats, 2 * row))
            log_total = compute(get_double(stats, 2 * row + 1))
            if t == ignore:
                nothing = zero * (top + log_total)  # NaN for a row that holds one, as with torch
                for j in range(n_cols):
                    store(dx_row, j, nothing)
                continue
            upstream = load_upstream(dloss, row * each) / compute(get_double(stats, 2 * n_rows))
            w = get(weight, t) if weighted else one
            hard = (one - spread) * w
            mass = hard + share * weights if smooth else hard
            if squared:
                lse = get_double(stats, 2 * row) + get_double(stats, 2 * row + 1)
                mass = mass + compute(2.0 * z_loss * get_double(stats, 2 * n_rows + 1) * lse)
            scale = upstream * mass
            z, slope = cap(load(x_row, t), caps)
            even = zero
            if smooth:
                even = share * get(weight, t) if weighted else share
            of_target = exp((z - top) - log_total) / unit * scale - upstream * (hard + even)
            of_target = of_target * slope if capped else of_target
            for start in range(0, n_cols, SPAN):
                stop = min(start + SPAN, n_cols)
                to = stage(dx_row, scratch, start, streaming)
                for j in range(start, stop):
                    z, slope = cap(load(x_row, j), caps)
                    p = exp((z - top) - log_total) / unit
                    dz = p * scale
                    if smooth:
                        even = share * get(weight, j) if weighted else share
                        dz = p * scale - upstream * even
                    store(to, j, dz * slope if capped else dz)
                if start <= t < stop:
                    store(to, t, of_target)
                flush(dx_row, scratch, start, stop, streaming)
        fence(streaming)

    return cross_entropy_backward


def _probs_loss_backward(tag, kind, dloss_kind, weighted, squared, capped, in_place):
    codec = tasks.Codec(kind, 0, own_nan=not weighted)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    store = codec.store if in_place else tasks.Codec(kind, 1, own_nan=not weighted).store
    load_upstream = memory.make_loader(dloss_kind, compute, 4)
    load_probs = tasks.Codec(kind, 5).load
    get, get_double = tasks.Codec(tasks.wide(kind), 2).load, tasks.Codec("fp64", 3).load
    scalar = tasks.Codec("fp64", 6).load
    (exp, unit), zero, one = exp_of(codec.kind), compute(0), compute(1)
    (caps_of, cap, _, _), (stage, flush) = (
        make_logits(tag, codec, capped),
        make_streaming_stores(itemsize),
    )

    def cross_entropy_probs_backward(args, task):
        x, probs, weight, stats, dloss, dx, each, n_rows, n_cols, stride, _, numbers, n_task = (
            _args(args, 0)
        )
        spread, z_loss = compute(scalar(numbers, SMOOTHING)), scalar(numbers, Z_LOSS)
        caps = caps_of(scalar(numbers, SOFTCAP))
        share = spread / compute(n_cols)
        first, scratch = task * n_task, staging()
        streaming = not in_place and use_streaming_stores(n_rows * n_cols * itemsize)
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            at = row * n_cols * itemsize
            dx_row = x_row if in_place else dx + at
            upstream = load_upstream(dloss, row * each) / compute(get_double(stats, 2 * n_rows))
            top = compute(get_double(stats, 2 * row))
            log_total = compute(get_double(stats, 2 * row + 1))
            whole = np.float64(0)
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                part = zero
                for j in range(start, stop):
                    q = (one - spread) * load_probs(probs + at, j) + share
                    part = add(part, get(weight, j) * q if weighted else q)
                whole += np.float64(part)
                start = stop
            if squared:
                lse = get_double(stats, 2 * row) + get_double(stats, 2 * row + 1)
                whole = whole + 2.0 * z_loss * lse
            total = compute(whole)
            for start in range(0, n_cols, SPAN):
                stop = min(start + SPAN, n_cols)
                to = stage(dx_row, scratch, start, streaming)
                for j in range(start, stop):
                    z, slope = cap(load(x_row, j), caps)
                    p = exp((z - top) - log_total) / unit
                    q = (one - spread) * load_probs(probs + at, j) + share
                    dz = upstream * (p * total - (get(weight, j) * q if weighted else q))
                    store(to, j, dz * slope if capped else dz)
                flush(dx_row, scratch, start, stop, streaming)
        fence(streaming)

    return cross_entropy_probs_backward


def _run(
    task: tasks.Task,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, int, int],
    ignore_index: int,
    terms: Terms,
) -> None:
    """tensors: x, target, weight, stats, dloss, dx; sizes: rows, columns, stride of a row."""
    dloss = tensors[4]
    assert dloss is not None
    numbers = (int(dloss.numel() > 1), *sizes, ignore_index, terms.address)
    tasks.run_rows(task, sizes[0], sizes[1], *map(tasks.address, tensors), *numbers)


def _like_rows(dx: Tensor, shape: Shape) -> Tensor:
    """The tensor that takes a gradient row by row, before `_from_rows` copies it to dx; or dx."""
    return dx if shape[2] == 1 else torch.empty_like(dx)


def _from_rows(rows_of_dx: Tensor, dx: Tensor, shape: Shape) -> None:
    n_outer, n_cols, n_inner = shape
    if n_inner > 1:
        dx.view(shape).copy_(rows_of_dx.view(n_outer, n_inner, n_cols).transpose(1, 2))


def cross_entropy_backward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    dx: Tensor,
    shape: Shape,
    strides: Strides,
    ignore_index: int,
    terms: tuple[float, float, float],
) -> None:
    """The derivative by x; dloss, contiguous, is one a row or one for all.

    dx: contiguous; it may be x itself
    """
    numbers = terms_of(*terms)
    x, *sizes = as_rows(x, shape, strides)
    out = _like_rows(dx, shape)
    kinds = tasks.KINDS[x.dtype], tasks.KINDS[dloss.dtype]
    which = (weight is not None, *numbers.flags, out.data_ptr() == x.data_ptr())
    task = tasks.task_of(_loss_backward, *kinds, *which)
    _run(task, (x, target, weight, stats, dloss, out), tuple(sizes), ignore_index, numbers)
    _from_rows(out, dx, shape)


def cross_entropy_probs_backward(
    x: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dloss: Tensor,
    dx: Tensor,
    shape: Shape,
    strides: Strides,
    terms: tuple[float, float, float],
) -> None:
    """The derivative by x; dloss, contiguous, is one a row or one for all.

    dx: contiguous; it may be x itself
    """
    _, n_cols, n_inner = shape
    numbers = terms_of(*terms)
    x, *sizes = as_rows(x, shape, strides)
    probs, *_ = as_rows(probs, shape, (n_cols * n_inner, n_inner))
    out = _like_rows(dx, shape)
    kinds = tasks.KINDS[x.dtype], tasks.KINDS[dloss.dtype]
    which = (weight is not None, *numbers.flags[1:], out.data_ptr() == x.data_ptr())
    task = tasks.task_of(_probs_loss_backward, *kinds, *which)
    _run(task, (x, probs, weight, stats, dloss, out), tuple(sizes), 0, numbers)
    _from_rows(out, dx, shape)
