"""BatchNorm, InstanceNorm and GroupNorm for CPU: one kernel for planes, three for pixels.

    y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(var + eps)

with mean and variance of a set (`fastopt_kernels.channels`), or those given. A set that lies
together is in cache still when it is written. Where images are normalized together, memory is
walked twice as it lies: channel by channel through all images, writing takes twice as long.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.cpu.base import memory, streaming_stores, tasks
from fastopt_kernels.cpu.base.tasks import double_bits
from fastopt_kernels.cpu.base.vector_math import bits_to_double
from fastopt_kernels.cpu.rows import channel_norm_gradients, channels_last
from fastopt_kernels.cpu.rows.channel_sets import (
    blocks_of,
    kind_at,
    kinds_code,
    load_any,
    make_moments,
    merge,
    move,
    planes_table,
    segments_of,
    table_row,
    tidy,
)

_args = memory.make_row(types.int64, 12)
_wide_args = memory.make_row(types.int64, 14)
# Channels whose lots one task merges.
MERGED = 32


def _make_statistics(tag, codec):
    """statistics(x, n_runs, run, down) -> mean and variance of a set, merged from its blocks."""
    itemsize, moments = codec.itemsize, make_moments(tag, codec)

    @tasks.inlined(tag)
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
    """Statistics of each lot, where `own`; normalized elements, where y; from those statistics,
    from those of each channel, or from what was given."""
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 1).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    of_stats = tasks.Codec("fp64", 2)
    get, put = of_stats.load, of_stats.store
    statistics, (stage, flush) = (
        _make_statistics(tag, codec),
        streaming_stores.make_streaming_stores(itemsize),
    )

    def norm_planes(args, task):
        x, y, weight, bias, stats, given_mean, given_var, table, kinds, eps, own, n_task = _args(
            args, 0
        )
        (
            n_lots, inner, outer_x, inner_x, outer_y, inner_y, n_all, segment_x, segment_y, n_total,
            length, channels, moving, merged,
        ) = table_row(table, 0)  # fmt: skip
        staging, streaming = (
            streaming_stores.staging(),
            streaming_stores.use_streaming_stores(n_total * inner * length * itemsize),
        )
        for k in range(task * n_task, min(task * n_task + n_task, n_lots)):
            x_lot = x + (k // inner * outer_x + k % inner * inner_x) * itemsize
            y_lot = y + (k // inner * outer_y + k % inner * inner_y) * itemsize
            first_channel, n_segments = k % inner * channels, segments_of(k, inner, n_all, n_total)
            if own:
                n_runs, run = (1, n_segments * length) if merged else (n_segments, length)
                mean, variance = statistics(x_lot, n_runs, run, segment_x)
                if stats != 0:
                    put(stats, 2 * k, mean)
                    put(stats, 2 * k + 1, variance)
            elif given_mean != 0:
                mean = load_any(given_mean, first_channel, kind_at(kinds, 2))
                variance = load_any(given_var, first_channel, kind_at(kinds, 3))
            else:
                mean, variance = get(stats, 2 * first_channel), get(stats, 2 * first_channel + 1)
            rstd = 1.0 / math.sqrt(variance + bits_to_double(eps))
            high = compute(mean)
            low = mean - np.float64(high)
            for j in range(n_segments if y != 0 else 0):
                c, scale, shift = first_channel + j * moving, rstd, np.float64(0)
                if weight != 0:
                    scale *= load_any(weight, c, kind_at(kinds, 0))
                if bias != 0:
                    shift = load_any(bias, c, kind_at(kinds, 1))
                a, b = compute(tidy(scale)), compute(tidy(shift - low * scale))
                x_row, y_row = x_lot + j * segment_x * itemsize, y_lot + j * segment_y * itemsize
                for start in range(0, length, streaming_stores.SPAN):
                    stop = min(start + streaming_stores.SPAN, length)
                    to = stage(y_row, staging, start, streaming)
                    for i in range(start, stop):
                        store(to, i, (load(x_row, i) - high) * a + b)
                    flush(y_row, staging, start, stop, streaming)
        streaming_stores.fence(streaming)

    return norm_planes


def _merge_lots(tag):
    """Statistics of MERGED channels from those of their lots, and what they move."""
    of_lots, of_stats = tasks.Codec("fp64", 0), tasks.Codec("fp64", 1)
    get, put = of_lots.load, of_stats.store

    def merge_lots(args, task):
        _, _, _, _, lots, running_mean, running_var, table, kinds, _, _, _, stats, momentum = (
            _wide_args(args, 0)
        )
        n_lots, inner, _, _, _, _, n_all, _, _, n_total, length, _, _, _ = table_row(table, 0)
        for c in range(task * MERGED, min(task * MERGED + MERGED, inner)):
            mean, squares, n = np.float64(0), np.float64(0), np.float64(0)
            for k in range(c, n_lots, inner):
                count = np.float64(segments_of(k, inner, n_all, n_total) * length)
                m, s = get(lots, 2 * k), get(lots, 2 * k + 1) * count
                if k == c:
                    mean, squares = m, s
                else:
                    mean, squares = merge(n, mean, squares, count, m, s)
                n += count
            put(stats, 2 * c, mean)
            put(stats, 2 * c + 1, squares / n)
            if running_mean != 0:
                move(running_mean, c, kind_at(kinds, 2), mean, bits_to_double(momentum))
            if running_var != 0:
                unbiased = squares / (n - 1.0)
                move(running_var, c, kind_at(kinds, 3), unbiased, bits_to_double(momentum))

    return merge_lots


def _forward(
    x: Tensor,
    inputs: tuple[int, int, int, int],
    stats: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    channels: Channels,
    rest: tuple[int, int, int, int],
) -> None:
    """inputs: addresses of x, y, weight and bias; rest: kinds, eps, momentum, given"""
    task, table, n = tasks.task_of(_planes, tasks.kind_of(x)), planes_table(channels), x.numel()
    (kinds, eps, momentum, given), addresses = rest, tuple(map(tasks.address, running))
    n_lots, n_task = table.numbers[0], tasks.rows_of(channels.per_set)
    if channels.batch:
        n_task = tasks.rows_of(table.numbers[6] * channels.length)
    n_tasks, where = -(-n_lots // n_task), table.address
    if given or not channels.batch:
        numbers = (*inputs, tasks.address(stats), *addresses, where, kinds, eps, 1 - given, n_task)
        tasks.run(task, n_tasks, n, numbers)
        return
    lots = torch.empty(n_lots, 2, dtype=torch.float64, device=tasks.CPU)
    if stats is None:
        stats = torch.empty(channels.channels, 2, dtype=torch.float64, device=tasks.CPU)
    only_x = inputs[0], 0, 0, 0
    numbers = (*only_x, lots.data_ptr(), *addresses, where, kinds, eps, 1, n_task)
    numbers = (*numbers, stats.data_ptr(), momentum)
    tasks.run(
        task, n_tasks, n, numbers, tasks.task_of(_merge_lots), -(-channels.channels // MERGED)
    )
    numbers = (*inputs, stats.data_ptr(), 0, 0, where, kinds, eps, 0, n_task)
    tasks.run(task, n_tasks, n, numbers)


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
    inputs = x.data_ptr(), y.data_ptr(), tasks.address(weight), tasks.address(bias)
    rest = kinds, eps, double_bits(momentum or 0.0), given
    forward = channels_last.forward if channels.pixels else _forward
    forward(x, inputs, stats, running, channels, rest)


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
    channel_norm_gradients.gradients(
        dy, x, weight, stats, (dx, dweight, dbias), channels, eps, given
    )
