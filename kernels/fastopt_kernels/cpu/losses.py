"""Cross entropy for CPU, which never writes a softmax: a row leaves its logsumexp and its loss.

    class indices  loss = (1 - s) w_t (lse - x_t) + s / C sum_c w_c (lse - x_c)
    probabilities  loss = sum_c w_c q_c (lse - x_c),  q_c = (1 - s) probs_c + s / C

lse is kept in float64: its rounding would be an error in every probability of the backward.
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
from fastopt_kernels.cpu.rows import double_bits
from fastopt_kernels.cpu.softmax import Shape, Strides, make_row_parts
from fastopt_kernels.cpu.vecmath import add, bits_to_double, exp_of

_args = memory.make_row(types.int64, 12)
# Rows whose losses are summed by one task.
SUMMED = 4096


def _loss(tag, kind, weighted, smooth):
    codec, statistic = rows.Codec(kind), rows.Codec(rows.wide(kind))
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    get, put, put_lse = statistic.load, statistic.store, rows.Codec("fp64").store
    peak, exp_sum = make_row_parts(tag, codec)
    zero, one = compute(0), compute(1)

    def cross_entropy(args, task):
        x, target, weight, loss, lse, bad, n_rows, n_cols, stride, ignore, s, n_task = _args(
            args, 0
        )
        spread = compute(bits_to_double(s))
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            top = peak(x_row, n_cols)
            log_total = np.float64(top) + math.log(np.float64(exp_sum(x_row, n_cols, top)))
            put_lse(lse, row, log_total)
            high, low = compute(log_total), compute(log_total - compute(log_total))
            put(loss, row, zero)
            t = load_integer(target, row)
            if t == ignore:
                continue
            if t < 0 or t >= n_cols:
                store_integer(bad, 0, 1)
                continue
            w = get(weight, t) if weighted else one
            result = (one - spread) * w * ((high - load(x_row, t)) + low)
            if smooth:
                total = zero
                for j in range(n_cols):
                    term = (high - load(x_row, j)) + low
                    total = add(total, get(weight, j) * term if weighted else term)
                result = result + spread / compute(n_cols) * total
            put(loss, row, result)

    return cross_entropy


def _loss_backward(tag, kind, weighted, smooth):
    codec, statistic = rows.Codec(kind), rows.Codec(rows.wide(kind))
    load, store, itemsize, compute = codec.load, codec.store, codec.itemsize, codec.compute
    get, get_lse = statistic.load, rows.Codec("fp64").load
    (exp, unit), zero, one = exp_of(compute), compute(0), compute(1)

    def cross_entropy_backward(args, task):
        x, target, weight, lse, dloss, dx, each, n_rows, n_cols, stride, ignore_s, n_task = _args(
            args, 0
        )
        ignore, spread = (
            load_integer(ignore_s, 0),
            compute(bits_to_double(load_integer(ignore_s, 1))),
        )
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
            if t == ignore:
                for j in range(n_cols):
                    store(dx_row, j, zero)
                continue
            upstream, log_total = get(dloss, row * each), get_lse(lse, row)
            high, low = compute(log_total), compute(log_total - compute(log_total))
            hard = (one - spread) * (get(weight, t) if weighted else one)
            # dx_c = dloss ((hard + s / C sum w) p_c - hard [c = t] - s / C w_c)
            scale = upstream * (hard + share * weights if smooth else hard)
            for j in range(n_cols):
                p = exp((load(x_row, j) - high) - low) / unit
                if smooth:
                    even = share * get(weight, j) if weighted else share
                    store(dx_row, j, p * scale - upstream * even)
                else:
                    store(dx_row, j, p * scale)
            p = exp((load(x_row, t) - high) - low) / unit
            even = zero
            if smooth:
                even = share * get(weight, t) if weighted else share
            store(dx_row, t, p * scale - upstream * (hard + even))

    return cross_entropy_backward


def _totals(tag, kind, weighted, by_index):
    get, put = rows.Codec(kind).load, rows.Codec("fp64").store
    zero, one = np.float64(0), np.float64(1)

    def totals(args, task):
        loss, target, weight, sums, n_rows, ignore, _, _, _, _, _, _ = _args(args, 0)
        total, weights = zero, zero
        for row in range(task * SUMMED, min((task + 1) * SUMMED, n_rows)):
            if by_index:
                t = load_integer(target, row)
                if t == ignore:
                    continue
                weights = weights + (np.float64(get(weight, t)) if weighted else one)
            total = total + np.float64(get(loss, row))
        put(sums, 2 * task, total)
        put(sums, 2 * task + 1, weights)

    return totals


def _probs_loss(tag, kind, weighted):
    codec, statistic = rows.Codec(kind), rows.Codec(rows.wide(kind))
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    get, put, put_lse = statistic.load, statistic.store, rows.Codec("fp64").store
    peak, exp_sum = make_row_parts(tag, codec)
    zero, one = compute(0), compute(1)

    def cross_entropy_probs(args, task):
        x, probs, weight, loss, lse, n_rows, n_cols, stride, s, _, _, n_task = _args(args, 0)
        spread = compute(bits_to_double(s))
        share = spread / compute(n_cols)
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            probs_row = probs + row * n_cols * itemsize
            top = peak(x_row, n_cols)
            log_total = np.float64(top) + math.log(np.float64(exp_sum(x_row, n_cols, top)))
            put_lse(lse, row, log_total)
            high, low = compute(log_total), compute(log_total - compute(log_total))
            total = zero
            for j in range(n_cols):
                q = (one - spread) * load(probs_row, j) + share
                term = q * ((high - load(x_row, j)) + low)
                total = add(total, get(weight, j) * term if weighted else term)
            put(loss, row, total)

    return cross_entropy_probs


def _probs_loss_backward(tag, kind, weighted):
    codec, statistic = rows.Codec(kind), rows.Codec(rows.wide(kind))
    load, store, itemsize, compute = codec.load, codec.store, codec.itemsize, codec.compute
    get, get_lse = statistic.load, rows.Codec("fp64").load
    (exp, unit), zero, one = exp_of(compute), compute(0), compute(1)

    def cross_entropy_probs_backward(args, task):
        x, probs, weight, lse, dloss, dx, each, n_rows, n_cols, stride, s, n_task = _args(args, 0)
        spread = compute(bits_to_double(s))
        share = spread / compute(n_cols)
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            at = row * n_cols * itemsize
            upstream, log_total = get(dloss, row * each), get_lse(lse, row)
            high, low = compute(log_total), compute(log_total - compute(log_total))
            total = zero
            for j in range(n_cols):
                q = (one - spread) * load(probs + at, j) + share
                total = add(total, get(weight, j) * q if weighted else q)
            for j in range(n_cols):  # dx_c = dloss (p_c sum w q - w_c q_c)
                p = exp((load(x_row, j) - high) - low) / unit
                q = (one - spread) * load(probs + at, j) + share
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    shape: Shape,
    strides: Strides,
    ignore_index: int,
    smoothing: float,
) -> int | None:
    """The loss of each row; returns the first target that is out of range, or None."""
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    task = rows.task_of(_loss, rows.KINDS[x.dtype], weight is not None, smoothing != 0.0)
    bad = array("q", (0,))
    pointers = (x.data_ptr(), target.data_ptr(), _address(weight), loss.data_ptr(), lse.data_ptr())
    numbers = (n_rows, n_cols, stride, ignore_index, double_bits(smoothing))
    task.run_rows(n_rows, n_cols, *pointers, bad.buffer_info()[0], *numbers)
    if not bad[0]:
        return None
    outside = (target != ignore_index) & ((target < 0) | (target >= n_cols))
    return int(target[outside][0])


def cross_entropy_backward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    dx: Tensor,
    shape: Shape,
    strides: Strides,
    ignore_index: int,
    smoothing: float,
) -> None:
    """The derivative by x; dloss has one number a row, or one for all."""
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    task = rows.task_of(_loss_backward, rows.KINDS[x.dtype], weight is not None, smoothing != 0.0)
    out = _like_rows(dx, shape)
    pointers = (x, target, weight, lse, dloss, out)
    options = array("q", (ignore_index, double_bits(smoothing)))
    numbers = (int(dloss.numel() > 1), n_rows, n_cols, stride, options.buffer_info()[0])
    task.run_rows(n_rows, n_cols, *map(_address, pointers), *numbers)
    _from_rows(out, dx, shape)


def totals(loss: Tensor, target: Tensor | None, weight: Tensor | None, ignore_index: int) -> Tensor:
    """(2,) float64: the sum of the losses, and of the weights of the targets that count."""
    n_rows = loss.numel()
    n_tasks = -(-n_rows // SUMMED)
    sums = torch.empty(n_tasks, 2, dtype=torch.float64)
    kind = rows.KINDS[loss.dtype]
    task = rows.task_of(_totals, kind, weight is not None, target is not None)
    pointers = map(_address, (loss, target, weight, sums))
    task.run(n_tasks, n_rows, *pointers, n_rows, ignore_index, *6 * (0,))
    return sums[0] if n_tasks == 1 else sums.sum(0)


def cross_entropy_probs(
    x: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    shape: Shape,
    strides: Strides,
    smoothing: float,
) -> None:
    """The loss of each row against probabilities, which are contiguous and of x's dtype."""
    _, n_cols, n_inner = shape
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    probs, *_ = _as_rows(probs, shape, (n_cols * n_inner, n_inner))
    task = rows.task_of(_probs_loss, rows.KINDS[x.dtype], weight is not None)
    pointers = map(_address, (x, probs, weight, loss, lse))
    numbers = (n_rows, n_cols, stride, double_bits(smoothing), 0, 0)
    task.run_rows(n_rows, n_cols, *pointers, *numbers)


def cross_entropy_probs_backward(
    x: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    dx: Tensor,
    shape: Shape,
    strides: Strides,
    smoothing: float,
) -> None:
    """The derivative by x; dloss has one number a row, or one for all."""
    _, n_cols, n_inner = shape
    x, n_rows, n_cols, stride = _as_rows(x, shape, strides)
    probs, *_ = _as_rows(probs, shape, (n_cols * n_inner, n_inner))
    task = rows.task_of(_probs_loss_backward, rows.KINDS[x.dtype], weight is not None)
    out = _like_rows(dx, shape)
    pointers = map(_address, (x, probs, weight, lse, dloss, out))
    numbers = (int(dloss.numel() > 1), n_rows, n_cols, stride, double_bits(smoothing))
    task.run_rows(n_rows, n_cols, *pointers, *numbers)
    _from_rows(out, dx, shape)
