"""LayerNorm and RMSNorm for CPU: statistics summed towards float64, a row at a time.

    layer_norm  y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    rms_norm    y = x rstd weight,                  rstd = 1 / sqrt(mean(x^2) + eps)

Moments are taken about the mean of the first elements, which costs one pass less than about the
mean; where it was off by more than a standard deviation, once more about the mean itself.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from torch import Tensor

from fastopt_kernels.cpu import memory, rows
from fastopt_kernels.cpu.norm_gradients import gradients, make_deviation
from fastopt_kernels.cpu.rows import block_end, double_bits
from fastopt_kernels.cpu.vecmath import add, bits_to_double

_args = memory.make_row(types.int64, 11)
# Elements a row begins with, whose mean is the center of its moments.
PIVOT = 64


def _make_statistics(tag, codec, centered):
    """statistics(x, n) -> the mean of a row in float64, and its variance about it."""
    load, compute, zero = codec.load, codec.compute, codec.compute(0)
    deviation = make_deviation(tag, load, compute, centered)

    @rows.inlined(tag)
    def moments(x, n, center):
        first, second = np.float64(0), np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part, squares = zero, zero
            for j in range(start, stop):
                d = deviation(x, j, center, zero)
                part = add(part, d) if centered else part
                squares = add(squares, d * d)
            first += np.float64(part)
            second += np.float64(squares)
            start = stop
        return first / n, second / n

    @rows.inlined(tag)
    def statistics(x, n):
        center = zero
        if centered:
            n_pivot = min(n, PIVOT)
            for j in range(n_pivot):
                center = add(center, load(x, j))
            center = center / compute(n_pivot)
        left, squares = moments(x, n, center)
        if centered and not left * left <= squares - left * left < np.inf:
            # Off by more than a standard deviation, too much would cancel: once more.
            center = compute(np.float64(center) + left)
            left, squares = moments(x, n, center)
        return np.float64(center) + left, squares - left * left

    return statistics


def _forward(tag, kind, weight_kind, bias_kind, centered):
    own_nan = weight_kind in (None, kind) and bias_kind in (None, kind)
    codec, store = rows.Codec(kind, 0), rows.Codec(kind, 1, own_nan).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    put, put_double = rows.Codec(codec.wide, 2).store, rows.Codec("fp64", 3).store
    weight_of = memory.make_loader(weight_kind or "fp32", compute, 4)
    bias_of = memory.make_loader(bias_kind or "fp32", compute, 5)
    weighted, biased, zero = weight_kind is not None, bias_kind is not None, compute(0)
    deviation = make_deviation(tag, load, compute, centered)
    statistics = _make_statistics(tag, codec, centered)

    def norm(args, task):
        x, weight, bias, y, stats, n_rows, n_cols, stride, eps, _, n_task = _args(args, 0)
        ahead, first = rows.ahead_of(n_rows, n_cols, stride, itemsize), task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            y_row = y + row * n_cols * itemsize
            mean, variance = statistics(x_row, n_cols)
            high = compute(mean) if centered else zero
            low = compute(mean - np.float64(high)) if centered else zero
            scale = compute(1.0 / math.sqrt(variance + bits_to_double(eps)))
            if stats != 0 and centered:
                put_double(stats, 2 * row, mean)
                put_double(stats, 2 * row + 1, np.float64(scale))
            elif stats != 0:
                put(stats, row, scale)
            start = 0
            while start < n_cols:
                stop = block_end(start, n_cols)
                rows.fetch(x_row, ahead, start, stop, itemsize)
                for j in range(start, stop):
                    result = deviation(x_row, j, high, low) * scale
                    if weighted:
                        result = result * weight_of(weight, j)
                    if biased:
                        result = result + bias_of(bias, j)
                    store(y_row, j, result)
                start = stop

    return norm


def _run_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int],
    eps: float,
    centered: bool,
) -> None:
    kinds = rows.kind_of(x), rows.kind_of(weight), rows.kind_of(bias)
    task = rows.task_of(_forward, *kinds, centered)
    inputs = (x.data_ptr(), rows.address(weight), rows.address(bias))
    outputs = (y.data_ptr(), rows.address(stats))
    rows.run_rows(task, sizes[0], sizes[1], *inputs, *outputs, *sizes, double_bits(eps), 0)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int],
    eps: float,
) -> None:
    """Normalize every row of x into y. sizes: rows, columns, stride of a row.

    stats: float64 (rows, 2), mean and rstd for the backward, if any
    """
    _run_forward(x, weight, bias, y, stats, sizes, eps, True)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int],
    eps: float,
) -> None:
    """Scale every row of x to unit mean square into y; stats: rstd for the backward, if any."""
    _run_forward(x, weight, None, y, stats, sizes, eps, False)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    sizes: tuple[int, int, int],
) -> None:
    """Those of the three gradients that are wanted."""
    gradients(dy, x, weight, stats, (dx, dweight, dbias), sizes, True)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    sizes: tuple[int, int, int],
) -> None:
    """Those of the two gradients that are wanted."""
    gradients(dy, x, weight, stats, (dx, dweight, None), sizes, False)
