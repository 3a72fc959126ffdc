"""Cross entropy for CPU, which never writes a softmax: a row leaves its logsumexp and its loss.

    z = x, or softcap tanh(x / softcap)
    class indices  loss = (1 - s) w_t (lse - z_t) + s / C sum_c w_c (lse - z_c) + z_loss lse^2
    probabilities  loss = sum_c w_c q_c (lse - z_c) + z_loss lse^2,  q_c = (1 - s) probs_c + s / C

The mean of a loss is its sum over that of w_t, and the mean of z_loss lse^2 that over the rows that
count; they are summed apart.
The maximum and log sum exp(z - max) are kept apart: the rounding of their sum would be an error in
the loss and in every probability of the backward.
Classes that are not the last dimension are moved there by a copy first.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.memory import load_integer, store_integer
from fastopt_kernels.cpu.base.tasks import block_end
from fastopt_kernels.cpu.base.vector_math import add
from fastopt_kernels.cpu.rows import cross_entropy_gradients
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

_args = memory.make_row(types.int64, 14)
# How losses are reduced.
NONE, MEAN, SUM = range(3)


def _loss(tag, kind, loss_kind, weighted, smooth, squared, capped):
    codec = tasks.Codec(kind, 0)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    store = memory.make_storer(loss_kind, compute, not weighted, 1)
    get, put_double = tasks.Codec(tasks.wide(kind), 2).load, tasks.Codec("fp64", 3).store
    scalar = tasks.Codec("fp64", 4).load
    caps_of, cap, peak, exp_sum = make_logits(tag, codec, capped)
    zero, one = compute(0), compute(1)

    def cross_entropy(args, task):
        given = _args(args, 0)
        x, target, weight, out, stats, sums = given[:6]
        n_rows, n_cols, stride, ignore, numbers, _, _, n_task = given[6:]
        spread, z_loss = compute(scalar(numbers, SMOOTHING)), scalar(numbers, Z_LOSS)
        caps = caps_of(scalar(numbers, SOFTCAP))
        ahead = tasks.ahead_of(n_rows, n_cols, stride, itemsize)
        sum_of_losses, sum_of_weights = np.float64(0), np.float64(0)
        sum_of_squares, n_counted = np.float64(0), np.float64(0)
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            top = peak(x_row, n_cols, caps)
            log_sum = math.log(exp_sum(x_row, n_cols, top, ahead, caps))
            put_double(stats, 2 * row, np.float64(top))
            put_double(stats, 2 * row + 1, log_sum)
            log_total = compute(log_sum)
            t, result, square = load_integer(target, row), zero, np.float64(0)
            if t != ignore and (t < 0 or t >= n_cols):
                store_integer(sums, 0, 1)
            elif t != ignore:
                w = get(weight, t) if weighted else one
                result = (one - spread) * w * ((top - cap(load(x_row, t), caps)[0]) + log_total)
                if smooth:
                    total = np.float64(0)
                    start = 0
                    while start < n_cols:
                        stop = block_end(start, n_cols)
                        part = zero
                        for j in range(start, stop):
                            term = (top - cap(load(x_row, j), caps)[0]) + log_total
                            part = add(part, get(weight, j) * term if weighted else term)
                        total += np.float64(part)
                        start = stop
                    result = result + spread / compute(n_cols) * compute(total)
                if squared:
                    lse = np.float64(top) + log_sum
                    square = z_loss * lse * lse
                sum_of_weights = sum_of_weights + np.float64(w)
                n_counted = n_counted + np.float64(1)
            sum_of_losses = sum_of_losses + np.float64(result)
            sum_of_squares = sum_of_squares + square
            if out != 0:
                store(out, row, compute(np.float64(result) + square) if squared else result)
        put_double(sums, 4 * task + 1, sum_of_losses)
        put_double(sums, 4 * task + 2, sum_of_weights)
        put_double(sums, 4 * task + 3, sum_of_squares)
        put_double(sums, 4 * task + 4, n_counted)

    return cross_entropy


def _probs_loss(tag, kind, loss_kind, weighted, squared, capped):
    codec = tasks.Codec(kind, 0)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    store = memory.make_storer(loss_kind, compute, not weighted, 1)
    load_probs = tasks.Codec(kind, 5).load
    get, put_double = tasks.Codec(tasks.wide(kind), 2).load, tasks.Codec("fp64", 3).store
    scalar = tasks.Codec("fp64", 4).load
    caps_of, cap, peak, exp_sum = make_logits(tag, codec, capped)
    zero, one = compute(0), compute(1)

    def cross_entropy_probs(args, task):
        x, probs, weight, out, stats, sums, n_rows, n_cols, stride, _, numbers, _, _, n_task = (
            _args(args, 0)
        )
        spread, z_loss = compute(scalar(numbers, SMOOTHING)), scalar(numbers, Z_LOSS)
        caps = caps_of(scalar(numbers, SOFTCAP))
        share = spread / compute(n_cols)
        ahead = tasks.ahead_of(n_rows, n_cols, stride, itemsize)
        sum_of_losses, n_summed = np.float64(0), np.float64(0)
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            probs_row = probs + row * n_cols * itemsize
            top = peak(x_row, n_cols, caps)
            log_sum = math.log(exp_sum(x_row, n_cols, top, ahead, caps))
            put_double(stats, 2 * row, np.float64(top))
            put_double(stats, 2 * row + 1, log_sum)
            log_total = compute(log_sum)
            whole = np.float64(0)
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                part = zero
                for j in range(start, stop):
                    q = (one - spread) * load_probs(probs_row, j) + share
                    term = q * ((top - cap(load(x_row, j), caps)[0]) + log_total)
                    part = add(part, get(weight, j) * term if weighted else term)
                whole += np.float64(part)
                start = stop
            if squared:
                lse = np.float64(top) + log_sum
                whole = whole + z_loss * lse * lse
            total = compute(whole)
            sum_of_losses = sum_of_losses + np.float64(total)
            n_summed = n_summed + np.float64(1)
            if out != 0:
                store(out, row, total)
        put_double(sums, 4 * task + 1, sum_of_losses)
        put_double(sums, 4 * task + 2, n_summed)
        put_double(sums, 4 * task + 3, np.float64(0))  # its squares are among its losses
        put_double(sums, 4 * task + 4, n_summed)

    return cross_entropy_probs


def _reduced(tag, kind, reduction):
    """After all rows: the loss, and behind the rows' statistics what the sum of losses was divided
    by, and how much more that is than what the sum of squares was divided by."""
    store, compute = tasks.Codec(kind, 0).store, memory.compute_type(kind)
    get, put = tasks.Codec("fp64", 1).load, tasks.Codec("fp64", 2).store
    one = np.float64(1)

    def reduce_sums(args, task):
        _, _, _, _, stats, sums, n_rows, _, _, _, _, loss, n_sums, _ = _args(args, 0)
        divisor, share = one, one
        if reduction != NONE:
            total, weights = np.float64(0), np.float64(0)
            squares, counted = np.float64(0), np.float64(0)
            for i in range(n_sums):
                total = total + get(sums, 4 * i + 1)
                weights = weights + get(sums, 4 * i + 2)
                squares = squares + get(sums, 4 * i + 3)
                counted = counted + get(sums, 4 * i + 4)
            if reduction == MEAN:
                divisor, share = weights, weights / counted
                total, squares = total / weights, squares / counted
            store(loss, 0, compute(total + squares))
        put(stats, 2 * n_rows, divisor)
        put(stats, 2 * n_rows + 1, share)

    return reduce_sums


@lru_cache(maxsize=256)
def _task_and_terms(
    build: Callable[..., Any],
    dtype: torch.dtype,
    loss_dtype: torch.dtype,
    weighted: bool,
    terms: tuple[float, float, float],
) -> tuple[tasks.Task, Terms]:
    """Both in one look-up: a small loss takes little longer."""
    numbers = terms_of(*terms)
    # A distribution is spread over the classes with smoothing and without.
    flags = numbers.flags if build is _loss else numbers.flags[1:]
    kinds = tasks.KINDS[dtype], tasks.KINDS[loss_dtype]
    return tasks.task_of(build, *kinds, weighted, *flags), numbers


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shape: Shape,
    strides: Strides,
    reduction: int,
    ignore_index: int,
    terms: tuple[float, float, float],
    loss: Tensor,
) -> tuple[Tensor, int | None]:
    """(stats, the first target that is out of range or None).

    loss: filled in, one a row, or a number; stats: the maximum and log sum exp(x - max) of each
    row, and last what the sum was divided by, and by how much more than the mean of squares;
    terms: label smoothing, z_loss and softcap, 0 for what is not wanted
    """
    x, n_rows, n_cols, stride = as_rows(x, shape, strides)
    loss_dtype = loss.dtype if reduction == NONE else x.dtype
    task, numbers = _task_and_terms(_loss, x.dtype, loss_dtype, weight is not None, terms)
    options = (n_rows, n_cols, stride, ignore_index)
    stats, all_inside = _run_loss(task, x, target, weight, options, numbers, reduction, loss)
    if all_inside:
        return stats, None
    outside = (target != ignore_index) & ((target < 0) | (target >= n_cols))
    return stats, int(target[outside][0])


def cross_entropy_probs(
    x: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    shape: Shape,
    strides: Strides,
    reduction: int,
    terms: tuple[float, float, float],
    loss: Tensor,
) -> Tensor:
    """stats; the loss against probabilities, which are contiguous and of x's dtype."""
    _, n_cols, n_inner = shape
    x, n_rows, n_cols, stride = as_rows(x, shape, strides)
    probs, *_ = as_rows(probs, shape, (n_cols * n_inner, n_inner))
    loss_dtype = loss.dtype if reduction == NONE else x.dtype
    task, numbers = _task_and_terms(_probs_loss, x.dtype, loss_dtype, weight is not None, terms)
    options = (n_rows, n_cols, stride, 0)
    return _run_loss(task, x, probs, weight, options, numbers, reduction, loss)[0]


def _run_loss(
    task: tasks.Task,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: tuple[int, ...],
    terms: Terms,
    reduction: int,
    loss: Tensor,
) -> tuple[Tensor, bool]:
    """(stats, whether all targets are classes)."""
    n_rows, n_cols, *_ = options
    stats = torch.empty(2 * n_rows + 2, dtype=torch.float64, device=tasks.CPU)
    n_task = tasks.rows_of(n_cols)
    n_tasks = -(-n_rows // n_task)
    # Whether a target is out of range, then of each task the sums of its losses, weights and
    # squares, and how many rows counted.
    sums = array("q", bytes(8 + 32 * n_tasks))
    each, all_of_them = (tasks.address(loss), 0) if reduction == NONE else (0, tasks.address(loss))
    pointers = (x.data_ptr(), target.data_ptr(), tasks.address(weight), each, stats.data_ptr())
    tail = (terms.address, all_of_them, n_tasks, n_task)
    last = tasks.task_of(_reduced, tasks.KINDS[loss.dtype], reduction)
    numbers = (*pointers, sums.buffer_info()[0], *options, *tail)
    tasks.run(task, n_tasks, n_rows * n_cols, numbers, last, 1)
    return stats, not sums[0]


cross_entropy_backward = cross_entropy_gradients.cross_entropy_backward
cross_entropy_probs_backward = cross_entropy_gradients.cross_entropy_probs_backward
