"""BatchNorm, InstanceNorm and GroupNorm for CPU: one kernel for planes, three for pixels.

    y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(var + eps)

with mean and variance of a set (`fastopt_kernels.channels`), or those given. Planes: a task is some
sets, so that a channel is still in cache when it is written. Pixels (channels_last): lines of
channels are walked as they lie, one number a channel; blocks of pixels, then the sets, then blocks.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.cpu import channel_norm_gradients, channel_pixels, memory, rows
from fastopt_kernels.cpu.channel_sets import (
    blocks_of,
    kind_at,
    kinds_code,
    load_any,
    make_moments,
    merge,
    move,
    planes_table,
    table_row,
    tidy,
)
from fastopt_kernels.cpu.norm_gradients import make_deviation
from fastopt_kernels.cpu.rows import double_bits
from fastopt_kernels.cpu.vecmath import bits_to_double

_args = memory.make_row(types.int64, 13)


def _make_statistics(tag, codec):
    """statistics(x, n_runs, run, down) -> mean and variance of a set, merged from its blocks."""
    itemsize, moments = codec.itemsize, make_moments(tag, codec)

    @rows.inlined(tag)
    def statistics(x, n_runs, run, down):
        n_blocks, together, parts, width = blocks_of(n_runs, run)
        mean, squares, n = np.float64(0), np.float64(0), np.float64(0)
        for block in range(n_blocks):
            first_run = block // parts * together
            last_run = min(first_run + together, n_runs)
            first = block % parts * width
            last = min(first + width, run)
            m, s = moments(x + first_run * down * itemsize, down * itemsize,
                           last_run - first_run, first, last)  # fmt: skip
            count = np.float64((last_run - first_run) * (last - first))
            if block == 0:
                mean, squares = m, s
            else:
                mean, squares = merge(n, mean, squares, count, m, s)
            n += count
        return mean, squares / n

    return statistics


def _planes(tag, kind):
    codec, store = rows.Codec(kind, 0), rows.Codec(kind, 1).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    put = rows.Codec("fp64", 2).store
    deviation = make_deviation(tag, load, compute, True)
    statistics = _make_statistics(tag, codec)

    def norm_planes(args, task):
        (
            x, y, weight, bias, stats, running_mean, running_var, table, kinds, eps, momentum,
            given, n_task,
        ) = _args(args, 0)  # fmt: skip
        (
            n_sets, inner, outer_x, inner_x, outer_y, inner_y, n_segments, segment_x, segment_y,
            length, channels, moving, n_runs, run, run_x,
        ) = table_row(table, 0)  # fmt: skip
        for k in range(task * n_task, min(task * n_task + n_task, n_sets)):
            x_set = x + (k // inner * outer_x + k % inner * inner_x) * itemsize
            y_set = y + (k // inner * outer_y + k % inner * inner_y) * itemsize
            first_channel = k % inner * channels
            if given:
                mean = load_any(running_mean, first_channel, kind_at(kinds, 2))
                variance = load_any(running_var, first_channel, kind_at(kinds, 3))
            else:
                mean, variance = statistics(x_set, n_runs, run, run_x)
                if running_mean != 0:
                    move(running_mean, k, kind_at(kinds, 2), mean, bits_to_double(momentum))
                if running_var != 0:
                    n = np.float64(n_runs * run)
                    unbiased = variance * (n / (n - 1))
                    move(running_var, k, kind_at(kinds, 3), unbiased, bits_to_double(momentum))
            if stats != 0:
                put(stats, 2 * k, mean)
                put(stats, 2 * k + 1, variance)
            rstd = 1.0 / math.sqrt(variance + bits_to_double(eps))
            high = compute(mean)
            low = compute(mean - np.float64(high))
            for j in range(n_segments):
                c, scale, shift = first_channel + j * moving, rstd, np.float64(0)
                if weight != 0:
                    scale *= load_any(weight, c, kind_at(kinds, 0))
                if bias != 0:
                    shift = load_any(bias, c, kind_at(kinds, 1))
                a, b = compute(tidy(scale)), compute(tidy(shift))
                x_row, y_row = x_set + j * segment_x * itemsize, y_set + j * segment_y * itemsize
                for i in range(length):
                    store(y_row, i, deviation(x_row, i, high, low) * a + b)

    return norm_planes


def channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    channels: Channels,
    eps: float,
    momentum: float | None,
) -> None:
    """Normalize every set of x into y, dense in the same order.

    weight, bias: (channels,), contiguous, of any dtype each; stats: float64 (sets, 2), mean and
    variance for the backward, if any; running: mean and variance of each channel, used where
    momentum is None, and else moved towards those of this x
    """
    mean, var = running
    kinds = kinds_code(weight, bias, mean, var)
    given, eps = int(momentum is None), double_bits(eps)
    inputs = x.data_ptr(), y.data_ptr(), rows.address(weight), rows.address(bias)
    rest = kinds, eps, double_bits(momentum or 0.0), given
    if channels.pixels:
        channel_pixels.forward(x, inputs, stats, running, channels, rest)
        return
    table = planes_table(channels)
    n_task = rows.rows_of(channels.per_set)
    numbers = (*inputs, rows.address(stats), rows.address(mean), rows.address(var))
    rows.run(
        rows.task_of(_planes, rows.kind_of(x)),
        -(-channels.n_sets // n_task),
        x.numel(),
        (*numbers, table.ctypes.data, *rest, n_task),
    )


def channel_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    channels: Channels,
    eps: float,
    given: bool,
) -> None:
    """Those of the three gradients that are wanted; given: the statistics were, and are constant.

    dy, dx: dense in the order of x
    """
    channel_norm_gradients.gradients(dy, x, weight, stats, (dx, dweight, dbias), channels, eps, given)
