"""LayerNorm and RMSNorm for CPU: statistics summed towards float64, a row at a time.

    layer_norm  y = (x - mean) rstd weight + bias,    rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    rms_norm    y = x rstd (weight + weight_offset),  rstd = 1 / sqrt(mean(x^2) + eps)

Moments are taken about the mean of the first elements, which costs one pass less than about the
mean; where it was off by more than a standard deviation, once more about the mean itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import (
    fence,
    make_streaming_stores,
    staging,
    use_streaming_stores,
)
from fastopt_kernels.cpu.base.tasks import block_end, double_bits
from fastopt_kernels.cpu.base.vector_math import add, bits_to_double
from fastopt_kernels.cpu.base.xp import JIT
from fastopt_kernels.cpu.rows.layer_norm_gradients import gradients, make_deviation, make_weight

_args = memory.make_row(types.int64, 11)
# Elements a row begins with, whose mean is the center of its moments.
PIVOT = 64


class Source(NamedTuple):
    """The source of a row that is normalized: load(source, j), and fetch(source, start, stop),
    called before elements start to stop are loaded for the first time."""

    load: Callable[..., Any]
    fetch: Callable[..., Any]
    # Of what is fetched while the row is written.
    itemsize: int


@njit(**JIT)
def _nothing(source, start, stop):
    return None


def _make_moments(tag, source, compute, centered):
    """moments(x, n, center) -> mean of x - center, and of its square, in float64."""
    deviation, zero = make_deviation(tag, source.load, compute, centered), compute(0)
    fetch = source.fetch

    @tasks.inlined(tag)
    def moments(x, n, center):
        first, second = np.float64(0), np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part, squares = zero, zero
            fetch(x, start, stop)
            for j in range(start, stop):
                d = deviation(x, j, center, zero)
                part = add(part, d) if centered else part
                squares = add(squares, d * d)
            first += np.float64(part)
            second += np.float64(squares)
            start = stop
        return first / n, second / n

    return moments


def _make_statistics(tag, codec, centered, source):
    """statistics(source, x, n) -> the mean of a row in float64, and its variance about it; x: where
    the row lies once it has been loaded from its source."""
    compute, zero, load = codec.compute, codec.compute(0), source.load
    first_moments = _make_moments(tag, source, compute, centered)
    again = Source(codec.load, _nothing, codec.itemsize)
    moments = _make_moments(tag, again, compute, centered)

    @tasks.inlined(tag)
    def statistics(source, x, n):
        center = zero
        if centered:
            n_pivot = min(n, PIVOT)
            for j in range(n_pivot):
                center = add(center, load(source, j))
            center = center / compute(n_pivot)
        left, squares = first_moments(source, n, center)
        if centered and not left * left <= squares - left * left < np.inf:
            # Off by more than a standard deviation, too much would cancel: once more.
            center = compute(np.float64(center) + left)
            left, squares = moments(x, n, center)
        return np.float64(center) + left, squares - left * left

    return statistics


def make_normalize(tag, kind, weight_kind, bias_kind, centered, shifted, source=None):
    """normalize(source, x, y, weight, bias, stats, row, n, eps, offset, far, ahead, streaming): one
    row into y, what it was normalized by into row `row` of stats.

    x: where the row lies once it has been loaded from its source; far, ahead: what to fetch
    meanwhile, as `rows.fetch` has it; shifted: whether the weight counts as weight + offset
    """
    own_nan = weight_kind in (None, kind) and bias_kind in (None, kind)
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 1, own_nan).store
    source, compute = source or Source(codec.load, _nothing, codec.itemsize), codec.compute
    put, put_double = tasks.Codec(codec.wide, 2).store, tasks.Codec("fp64", 3).store
    weight_of = make_weight(tag, weight_kind, compute, 4, shifted)
    bias_of = memory.make_loader(bias_kind or "fp32", compute, 5)
    weighted, biased, zero = weight_kind is not None, bias_kind is not None, compute(0)
    deviation = make_deviation(tag, codec.load, compute, centered)
    stage, flush = make_streaming_stores(codec.itemsize)
    statistics, far_size = _make_statistics(tag, codec, centered, source), source.itemsize

    @tasks.inlined(tag)
    def normalize(source, x, y, weight, bias, stats, row, n, eps, offset, far, ahead, streaming):
        mean, variance = statistics(source, x, n)
        high = compute(mean) if centered else zero
        low = compute(mean - np.float64(high)) if centered else zero
        scale = compute(1.0 / math.sqrt(variance + bits_to_double(eps)))
        if stats != 0 and centered:
            put_double(stats, 2 * row, mean)
            put_double(stats, 2 * row + 1, np.float64(scale))
        elif stats != 0:
            put(stats, row, scale)
        shift = compute(bits_to_double(offset))
        start, scratch = 0, staging()
        while start < n:
            stop = block_end(start, n)
            tasks.fetch(far, ahead, start, stop, far_size)
            to = stage(y, scratch, start, streaming)
            for j in range(start, stop):
                result = deviation(x, j, high, low) * scale
                if weighted:
                    result = result * weight_of(weight, j, shift)
                if biased:
                    result = result + bias_of(bias, j)
                store(to, j, result)
            flush(y, scratch, start, stop, streaming)
            start = stop

    return normalize


def _forward(tag, kind, weight_kind, bias_kind, centered, shifted):
    itemsize = tasks.ITEMSIZE[kind]
    normalize = make_normalize(tag, kind, weight_kind, bias_kind, centered, shifted)

    def norm(args, task):
        x, weight, bias, y, stats, n_rows, n_cols, stride, eps, offset, n_task = _args(args, 0)
        ahead, first = tasks.ahead_of(n_rows, n_cols, stride, itemsize), task * n_task
        streaming = use_streaming_stores(n_rows * n_cols * itemsize)
        for row in range(first, min(first + n_task, n_rows)):
            x_row, y_row = x + row * stride * itemsize, y + row * n_cols * itemsize
            normalize(
                x_row, x_row, y_row, weight, bias, stats, row, n_cols, eps, offset, x_row, ahead,
                streaming,
            )  # fmt: skip
        fence(streaming)

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
    weight_offset: float = 0.0,
) -> None:
    kinds = tasks.kind_of(x), tasks.kind_of(weight), tasks.kind_of(bias)
    task = tasks.task_of(_forward, *kinds, centered, weight_offset != 0)
    inputs = (x.data_ptr(), tasks.address(weight), tasks.address(bias))
    outputs = (y.data_ptr(), tasks.address(stats))
    scalars = (double_bits(eps), double_bits(weight_offset))
    tasks.run_rows(task, sizes[0], sizes[1], *inputs, *outputs, *sizes, *scalars)


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
    weight_offset: float = 0.0,
) -> None:
    """Scale every row of x to unit mean square into y; stats: rstd for the backward, if any."""
    _run_forward(x, weight, None, y, stats, sizes, eps, False, weight_offset)


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
    weight_offset: float = 0.0,
) -> None:
    """Those of the two gradients that are wanted."""
    gradients(dy, x, weight, stats, (dx, dweight, None), sizes, False, weight_offset)
