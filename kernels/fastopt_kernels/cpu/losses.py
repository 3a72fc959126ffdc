"""Cross entropy for CPU, which never writes a softmax: a row leaves its logsumexp and its loss.

    class indices  loss = (1 - s) w_t (lse - x_t) + s / C sum_c w_c (lse - x_c)
    probabilities  loss = sum_c w_c q_c (lse - x_c),  q_c = (1 - s) probs_c + s / C

The maximum and log sum exp(x - max) are kept apart: the rounding of their sum would be an error in
the loss and in every probability of the backward.
Classes that are not the last dimension are moved there by a copy first.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.cpu import memory, rows
from fastopt_kernels.cpu.memory import load_integer, store_integer
from fastopt_kernels.cpu.rows import block_end, double_bits
from fastopt_kernels.cpu.softmax import Shape, Strides, make_row_parts
from fastopt_kernels.cpu.vecmath import add, bits_to_double, exp_of

_args = memory.make_row(types.int64, 14)
_args13 = memory.make_row(types.int64, 13)
# How losses are reduced.
NONE, MEAN, SUM = range(3)


def _loss(tag, kind, weighted, smooth):
    codec, out_codec = rows.Codec(kind, 0), rows.Codec(kind, 1, own_nan=not weighted)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    store = out_codec.store
    get, put_double = rows.Codec(rows.wide(kind), 2).load, rows.Codec("fp64", 3).store
    peak, exp_sum = make_row_parts(tag, codec)
    zero, one = compute(0), compute(1)

    def cross_entropy(args, task):
        x, target, weight, out, stats, sums, n_rows, n_cols, stride, ignore, s, _, _, n_task = (
            _args(args, 0)
        )
        spread = compute(bits_to_double(s))
        ahead = rows.ahead_of(n_rows, n_cols, stride, itemsize)
        sum_of_losses, sum_of_weights = np.float64(0), np.float64(0)
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            top = peak(x_row, n_cols)
            log_sum = math.log(exp_sum(x_row, n_cols, top, ahead))
            put_double(stats, 2 * row, np.float64(top))
            put_double(stats, 2 * row + 1, log_sum)
            log_total = compute(log_sum)
            t, result = load_integer(target, row), zero
            if t != ignore and (t < 0 or t >= n_cols):
                store_integer(sums, 0, 1)
            elif t != ignore:
                w = get(weight, t) if weighted else one
                result = (one - spread) * w * ((top - load(x_row, t)) + log_total)
                if smooth:
                    total = np.float64(0)
                    start = 0
                    while start < n_cols:
                        stop = block_end(start, n_cols)
                        part = zero
                        for j in range(start, stop):
                            term = (top - load(x_row, j)) + log_total
                            part = add(part, get(weight, j) * term if weighted else term)
                        total += np.float64(part)
                        start = stop
                    result = result + spread / compute(n_cols) * compute(total)
                sum_of_weights = sum_of_weights + np.float64(w)
            sum_of_losses = sum_of_losses + np.float64(result)
            if out != 0:
                store(out, row, result)
        put_double(sums, 2 * task + 1, sum_of_losses)
        put_double(sums, 2 * task + 2, sum_of_weights)

    return cross_entropy


def _loss_backward(tag, kind, weighted, smooth):
    codec, out_codec = rows.Codec(kind, 0), rows.Codec(kind, 1, own_nan=not weighted)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    store = out_codec.store
    load_upstream = rows.Codec(kind, 4).load
    get, get_double = rows.Codec(rows.wide(kind), 2).load, rows.Codec("fp64", 3).load
    (exp, unit), zero, one = exp_of(codec.kind), compute(0), compute(1)

    def cross_entropy_backward(args, task):
        numbers = _args13(args, 0)
        x, target, weight, stats, dloss, dx = numbers[:6]
        each, n_rows, n_cols, stride, ignore, s, n_task = numbers[6:]
        spread = compute(bits_to_double(s))
        share = spread / compute(n_cols)
        weights = compute(n_cols)
        if weighted and smooth:
            weights = zero
            for j in range(n_cols):
                weights = add(weights, get(weight, j))
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            dx_row = dx + row * n_cols * itemsize
            t = load_integer(target, row)
            top = compute(get_double(stats, 2 * row))
            log_total = compute(get_double(stats, 2 * row + 1))
            if t == ignore:
                nothing = zero * (top + log_total)  # NaN for a row that holds one, as with torch
                for j in range(n_cols):
                    store(dx_row, j, nothing)
                continue
            upstream = load_upstream(dloss, row * each) / compute(get_double(stats, 2 * n_rows))
            hard = (one - spread) * (get(weight, t) if weighted else one)
            # dx_c = dloss ((hard + s / C sum w) p_c - hard [c = t] - s / C w_c)
            scale = upstream * (hard + share * weights if smooth else hard)
            for j in range(n_cols):
                p = exp((load(x_row, j) - top) - log_total) / unit
                if smooth:
                    even = share * get(weight, j) if weighted else share
                    store(dx_row, j, p * scale - upstream * even)
                else:
                    store(dx_row, j, p * scale)
            p = exp((load(x_row, t) - top) - log_total) / unit
            even = zero
            if smooth:
                even = share * get(weight, t) if weighted else share
            store(dx_row, t, p * scale - upstream * (hard + even))

    return cross_entropy_backward


def _reduced(tag, kind, reduction):
    """After all rows: the loss, and what its sum was divided by, behind the rows' statistics."""
    store, compute = rows.Codec(kind, 0).store, memory.compute_type(kind)
    get, put = rows.Codec("fp64", 1).load, rows.Codec("fp64", 2).store
    one = np.float64(1)

    def reduce_sums(args, task):
        _, _, _, _, stats, sums, n_rows, _, _, _, _, loss, n_sums, _ = _args(args, 0)
        divisor = one
        if reduction != NONE:
            total, weights = np.float64(0), np.float64(0)
            for i in range(n_sums):
                total = total + get(sums, 2 * i + 1)
                weights = weights + get(sums, 2 * i + 2)
            divisor = weights if reduction == MEAN else one
            store(loss, 0, compute(total / divisor))
        put(stats, 2 * n_rows, divisor)

    return reduce_sums


def _probs_loss(tag, kind, weighted):
    codec, out_codec = rows.Codec(kind, 0), rows.Codec(kind, 1, own_nan=not weighted)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    store = out_codec.store
    load_probs = rows.Codec(kind, 5).load
    get, put_double = rows.Codec(rows.wide(kind), 2).load, rows.Codec("fp64", 3).store
    peak, exp_sum = make_row_parts(tag, codec)
    zero, one = compute(0), compute(1)

    def cross_entropy_probs(args, task):
        x, probs, weight, out, stats, sums, n_rows, n_cols, stride, _, s, _, _, n_task = _args(
            args, 0
        )
        spread = compute(bits_to_double(s))
        share = spread / compute(n_cols)
        ahead = rows.ahead_of(n_rows, n_cols, stride, itemsize)
        sum_of_losses, n_summed = np.float64(0), np.float64(0)
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            probs_row = probs + row * n_cols * itemsize
            top = peak(x_row, n_cols)
            log_sum = math.log(exp_sum(x_row, n_cols, top, ahead))
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
                    term = q * ((top - load(x_row, j)) + log_total)
                    part = add(part, get(weight, j) * term if weighted else term)
                whole += np.float64(part)
                start = stop
            total = compute(whole)
            sum_of_losses = sum_of_losses + np.float64(total)
            n_summed = n_summed + np.float64(1)
            if out != 0:
                store(out, row, total)
        put_double(sums, 2 * task + 1, sum_of_losses)
        put_double(sums, 2 * task + 2, n_summed)

    return cross_entropy_probs


def _probs_loss_backward(tag, kind, weighted):
    codec, out_codec = rows.Codec(kind, 0), rows.Codec(kind, 1, own_nan=not weighted)
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    store = out_codec.store
    load_upstream = rows.Codec(kind, 4).load
    load_probs = rows.Codec(kind, 5).load
    get, get_double = rows.Codec(rows.wide(kind), 2).load, rows.Codec("fp64", 3).load
    (exp, unit), zero, one = exp_of(codec.kind), compute(0), compute(1)

    def cross_entropy_probs_backward(args, task):
        x, probs, weight, stats, dloss, dx, each, n_rows, n_cols, stride, _, s, n_task = _args13(
            args, 0
        )
        spread = compute(bits_to_double(s))
        share = spread / compute(n_cols)
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            at = row * n_cols * itemsize
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
            total = compute(whole)
            for j in range(n_cols):  # dx_c = dloss (p_c sum w q - w_c q_c)
                p = exp((load(x_row, j) - top) - log_total) / unit
                q = (one - spread) * load_probs(probs + at, j) + share
                wq = get(weight, j) * q if weighted else q
                store(dx + at, j, upstream * (p * total - wq))

    return cross_entropy_probs_backward


def _as_rows(x: Tensor, shape: Shape, strides: Strides) -> tuple[Tensor, int, int, int]:
    """(tensor, rows, columns, stride of a row), classes in the last dimension."""
    n_outer, n_cols, n_inner = shape
    if n_inner == 1:
        return x, n_outer, n_cols, strides[0]
    x = x.as_strided(shape, (strides[0], strides[1], 1)).transpose(1, 2).contiguous()
    return x, n_outer * n_inner, n_cols, n_cols


def _like_rows(dx: Tensor, shape: Shape) -> Tensor:
    """Where a gradient is written row by row, before `_from_rows` brings it home."""
    return dx if shape[2] == 1 else torch.empty_like(dx)


def _from_rows(rows_of_dx: Tensor, dx: Tensor, shape: Shape) -> None:
    n_outer, n_cols, n_inner = shape
    if n_inner > 1:
        dx.view(shape).copy_(rows_of_dx.view(n_outer, n_inner, n_cols).transpose(1, 2))


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shape: Shape,
    strides: Strides,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    loss: Tensor,
) -> tuple[Tensor, int | None]:
    """(stats, the first target that is out of range or None).

    loss: filled in, one a row, or a number; stats: the maximum and log sum exp(x - max) of each
    row, and last what the sum was divided by
    """
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    task = rows.task_of(_loss, rows.KINDS[x.dtype], weight is not None, smoothing != 0.0)
    options = (n_rows, n_cols, stride, ignore_index, double_bits(smoothing))
    stats, all_inside = _run_loss(task, x, target, weight, options, reduction, loss)
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
    smoothing: float,
    loss: Tensor,
) -> Tensor:
    """stats; the loss against probabilities, which are contiguous and of x's dtype."""
    _, n_cols, n_inner = shape
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    probs, *_ = _as_rows(probs, shape, (n_cols * n_inner, n_inner))
    task = rows.task_of(_probs_loss, rows.KINDS[x.dtype], weight is not None)
    options = (n_rows, n_cols, stride, 0, double_bits(smoothing))
    return _run_loss(task, x, probs, weight, options, reduction, loss)[0]


def _run_loss(
    task: rows.Task,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: tuple[int, ...],
    reduction: int,
    loss: Tensor,
) -> tuple[Tensor, bool]:
    """(stats, whether all targets are classes)."""
    n_rows, n_cols, *_ = options
    stats = torch.empty(2 * n_rows + 1, dtype=torch.float64)
    n_task = rows.rows_of(n_cols)
    n_tasks = -(-n_rows // n_task)
    # Whether a target is out of range, then of each task the sums of its losses and weights.
    sums = array("q", bytes(8 + 16 * n_tasks))
    each, all_of_them = (rows.address(loss), 0) if reduction == NONE else (0, rows.address(loss))
    pointers = (x.data_ptr(), target.data_ptr(), rows.address(weight), each, stats.data_ptr())
    numbers = (*pointers, sums.buffer_info()[0], *options, all_of_them, n_tasks, n_task)
    last = rows.task_of(_reduced, rows.KINDS[x.dtype], reduction)
    rows.run(task, n_tasks, n_rows * n_cols, numbers, last, 1)
    return stats, not sums[0]


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
    smoothing: float,
) -> None:
    """The derivative by x; dloss, contiguous and of x's dtype, is one a row or one for all."""
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    task = rows.task_of(_loss_backward, rows.KINDS[x.dtype], weight is not None, smoothing != 0.0)
    out = _like_rows(dx, shape)
    pointers = (x, target, weight, stats, dloss, out)
    each = int(dloss.numel() > 1)
    numbers = (each, n_rows, n_cols, stride, ignore_index, double_bits(smoothing))
    rows.run_rows(task, n_rows, n_cols, *map(rows.address, pointers), *numbers)
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
    smoothing: float,
) -> None:
    """The derivative by x; dloss, contiguous and of x's dtype, is one a row or one for all."""
    _, n_cols, n_inner = shape
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    probs, *_ = _as_rows(probs, shape, (n_cols * n_inner, n_inner))
    task = rows.task_of(_probs_loss_backward, rows.KINDS[x.dtype], weight is not None)
    out = _like_rows(dx, shape)
    pointers = map(rows.address, (x, probs, weight, stats, dloss, out))
    numbers = (int(dloss.numel() > 1), n_rows, n_cols, stride, 0, double_bits(smoothing))
    rows.run_rows(task, n_rows, n_cols, *pointers, *numbers)
    _from_rows(out, dx, shape)
